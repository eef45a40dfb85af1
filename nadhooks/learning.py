"""`learn`: from a trained model and a loader to masks."""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from numbers import Real
from os import PathLike
from types import CellType, FunctionType
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from .as_found import frozen
from .batching import copied, digest, moved
from .budgets import Budget, Selection
from .checkpoints import Checkpoint
from .default_device import made_on_cpu
from .errors import ModelError, NadhooksError, TaskError
from .faithfulness import faithful
from .gates import attach, check_closed
from .gating import Closed
from .identity import weights_of
from .learner import SEVERAL, Learner
from .masks import Masks
from .methods import Method, Objective, method_of
from .progress import Report, every_report
from .sampling import POOL_BYTES, Data, peek, read, seed_loaders
from .sites import Axis, Site, Sites
from .tasks import Label, Tasks, TaskSpec
from .teaching import Forward, Teacher
from .tracing import call_model, logits_of

CACHE_BYTES = 2 * 2**30


@made_on_cpu
def learn(
    model: nn.Module,
    loader: Iterable[Any],
    sites: Sites | None = None,
    *,
    tasks: TaskSpec | None = None,
    method: str | Method | Objective = "contrastive",
    keep: float | int | Budget | None = None,
    fidelity: float | None = None,
    closed: Closed | None = None,
    start: str | Method | Masks | None = None,
    outputs: Mapping[Label, Sequence[int]] | None = None,
    held_out: Iterable[Any] | None = None,
    example: Any = None,
    axis: Axis | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    cache: int = CACHE_BYTES,
    memory: int = POOL_BYTES,
    checkpoint: str | PathLike[str] | None = None,
    every: float = 60.0,
    progress: Report | Iterable[Report] | None = None,
) -> Masks:
    """Learns a mask for each task: which units of `model` that task needs.

    loader: yields (inputs, labels), labels (batch,) being the model's own output indices, as in any training loop; or
        (batch, outputs) of 0 and 1 where a sample has several (one that has none is left out). Inputs are a tensor or
        array, a list with an entry for each sample, or a tuple or dict of such, as for the model. A third part is
        handed to the objective as targets. A batch may be a dict with "labels" instead; the rest are the model's
        arguments.
    sites, axis, example: as for `attach`; the example is a sample of the loader by default.
    tasks: as for `attach`; None means every label that the loader shows. Samples of other labels serve as contrast.
    method: "contrastive" (default), "class-only", "nad" (the paper's), a baseline ("random", "activation", "taylor",
        "routing"), one of `nadhooks.methods` with options, or an objective
        `(student, teacher, samples, gates) -> (tasks,) losses` in place of contrastive's own, for any kind of output.
    keep: how much to keep: a share of the units (a float), a number of units (an int), or a `Budget`: in each site, or
        by parameters or FLOPs. 0.55 by default. With "nad" it follows from the method's beta.
    fidelity: instead of `keep`, the largest held-out divergence from the full network that a task may have; as little
        is kept as that allows. The whole curve is in `masks.provenance["curve"]`.
    closed: what a closed unit puts out: "zero"; "mean", its average over the data; or "optimal", a constant for each
        task and unit that is learnt with the mask, from the mean on (optimal ablation; Li and Janson, NeurIPS 2024). By
        default "zero" for "nad", "optimal" for "contrastive" and "mean" for the others.
    start: a method, or masks, that the first scores are taken from.
    outputs: {label: indices of the model's outputs} that say yes to a task, where labels are not outputs themselves:
        the loader's labels are these then.
    held_out: another loader, of samples that nothing is learnt from, kept in memory. Where outputs are classes, its
        figures go into `masks.quality`, and into the reports ten times in a run (not those of "routing"); fidelity is
        measured on it (otherwise on every fifth sample of the loader).
    seed: decides initial scores and draws, for each task alone: the order of tasks changes nothing.
    autocast: a dtype to compute in, torch.bfloat16 or torch.float16 where the hardware is fast in it (a warning says if
        the processor is not). Scores stay as they are. A `torch.autocast` around the call has no say. A default device
        has one in the model and the loader; what objectives and other callables make is on the CPU if they do not say
        where.
    cache: bytes for the open network's answers, which are the same whenever an image comes again.
    memory: bytes for the samples that steps draw from, as many of each label as the method wants (`images`). Where it
        is short, fewer, but four at least, and a warning says how many.
    checkpoint: a file that says every `every` seconds how far the run is. The same call goes on where it stopped, with
        the same masks in the end (on the CPU, to the last bit). The file goes when the run is over, or when the masks
        are saved: `nadhooks.checkpoints.held`. A loader that shows other samples is refused: random changes to images
        have to come from torch's random state.
    progress: called after each step with a `Progress`; several may be given. See `nadhooks.progress` for logs.

    The model's weights, gradients, training flags and hooks and the random state are left as found. Raises
    LearningError for an empty loader, a task without samples and a loss that is not finite, TaskError for labels that
    do not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ModelError("the model has lazy modules, which have no weights yet; run it once on an input, then learn")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            "the model is on the meta device, where there are no values to learn from; load it, then learn"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError("the model's weights were made under torch.inference_mode(); make it, or copy it, outside")
    reports = every_report(progress)
    seed, cache, memory, every = _numbers(seed, cache, memory, every)
    _check_autocast(autocast)
    method = method_of(method)
    budget = _budget(keep, fidelity, method)
    start = start if start is None or isinstance(start, Masks) else method_of(start, "start")
    if not (outputs is None or isinstance(outputs, Mapping)):
        raise TaskError(f"outputs: expected {{label: [output, …]}}, got {outputs!r}")
    fidelity = None if fidelity is None else float(fidelity)  # of numpy's kinds it could not be written down
    if (fidelity is not None or held_out is not None) and method.ranks and method.output == "any":
        method = replace(method, output="softmax")  # its objective measures no distance from the full network
    closed = method.closed if closed is None else closed
    learns_constants = method.closing is not None and method.sampling == "balanced"
    check_closed(closed, get_args(Closed) if learns_constants else ("zero", "mean"))
    given = Tasks.of(tasks) if tasks is not None else Tasks.of(list(outputs)) if outputs is not None else None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if autocast is not None and device.type == "cpu" and emulated(autocast):
        warnings.warn(f"this processor has no instructions for {autocast}; float32 is many times as fast", stacklevel=3)
    own = torch.autocast(device.type, enabled=False)  # the user's would be in force in some passes only
    with frozen(model), torch.inference_mode(False), torch.enable_grad(), own:
        seed_loaders(seed, device)  # `frozen` puts the user's random state back
        sample, loader = peek(loader)
        sample = moved(sample, device)
        with attach(model, sites, example=sample if example is None else example, axis=axis) as gates:
            number = None if method.output == "any" else _classes(model, sample)
            outputs = _meaning(outputs, number)
            forward = Forward(gates, device, (lambda x: x) if method.output == "any" else logits_of, autocast)
            forward.settle(sample)
            selection = None
            if budget is not None:
                selection = Selection(budget, gates.sites, _costs(budget, forward, sample), method.floor)
            if fidelity is not None:  # as many images as its longest runs but those for very little want
                method = replace(method, images=method.paced(SEVERAL, closed).images)
            elif selection is not None:
                method = method.paced(float(selection.shares().min()), closed)
            once = method.sampling == "own" and method.epochs == 1  # then no sample comes again to be looked up
            kept = None if held_out is None else _kept(Data(held_out, number, device, outputs, memory))
            learner = Learner(
                gates,
                Data(loader, number, device, outputs, memory),
                method,
                selection,
                closed,
                seed,
                Teacher(forward, 0 if once else cache, method.compares),
                reports,
                kept,
            )
            run = {
                "method": method.name,
                "options": method.described(),
                **({} if outputs is None else {"outputs": {str(label): [*which] for label, which in outputs.items()}}),
                **({"fidelity": fidelity} if fidelity is not None else {"keep": budget and budget.described()}),
                **({} if start is None else {"start": _origin(start)}),
                **({} if autocast is None else {"autocast": str(autocast).removeprefix("torch.")}),
                "seed": seed,
                "sites": gates.chosen_by,
                **({"weights": weights} if (weights := weights_of(model)) else {}),
            }
            known = {
                **run,
                "closed": closed,
                "labels": given and list(given.labels),
                "units": [*map(str, gates.sites)],
                **{f"method's {name}": value for name, value in _described(method).items()},
                "first masks": digest(dict(start.values)).hex() if isinstance(start, Masks) else None,
                "cache": cache,
                "memory": memory,
                "held-out data": kept and checkpoint and digest(kept.loader).hex(),
            }
            learner.checkpoint = Checkpoint(checkpoint, every, known)
            learner.read(given, fidelity)
            run["options"] = learner.asked.described()
            learner.warm(start)
            if fidelity is not None:
                found, run["curve"] = faithful(learner, fidelity)
            else:
                found = learner.learnt(selection)
            masks = gates.masks_of(learner.tasks, found.gates, run, found.constants)
            if kept is not None and (quality := learner.measured(masks)):
                measured = {"images": sum(len(labels) for _, labels, _ in kept.loader)}
                masks = masks.replaced(provenance={**masks.provenance, "quality": measured}, quality=quality)
            learner.checkpoint.remove()
            return masks


def _numbers(seed: Any, cache: Any, memory: Any, every: Any) -> tuple[int, int, int, float]:
    """These options as numbers, before anything is done."""
    if not (hasattr(seed, "__index__") and -(2**63) <= seed < 2**64):
        raise NadhooksError(f"seed: expected a whole number of 64 bits, got {seed!r}")
    for name, value, unit in (("cache", cache, "bytes"), ("memory", memory, "bytes"), ("every", every, "seconds")):
        if not (isinstance(value, Real) and float(value) >= 0):
            raise NadhooksError(f"{name}: expected a number of {unit}, 0 or more, got {value!r}")
    return operator.index(seed), int(min(cache, sys.maxsize)), int(min(memory, sys.maxsize)), float(every)


def _check_autocast(autocast: Any) -> None:
    if autocast not in (None, torch.bfloat16, torch.float16):  # others change nothing, and would be written down
        raise NadhooksError(
            f"autocast: expected torch.bfloat16, torch.float16 or None (the model's own dtype), got {autocast!r}"
        )


def emulated(dtype: torch.dtype) -> bool:
    """Whether the processor has no instructions for torch.bfloat16 or torch.float16, so that float32 is faster."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    supported = getattr(torch.ops.mkldnn, asked[dtype], None) if torch.backends.mkldnn.is_available() else None
    return supported is not None and not supported()


def _classes(model: nn.Module, sample: Any) -> int:
    """How many outputs a classifier has."""
    with torch.no_grad():
        number = logits_of(call_model(model, copied(sample))).shape[1]
    if number < 2:
        raise ModelError(
            "expected a classifier of two or more classes, got one output; wrap the model so that it puts out "
            "torch.cat([torch.zeros_like(x), x], 1), or pass an objective of your own as method="
        )
    return number


def _kept(data: Data) -> Data:
    """Data in memory, read once: random changes to images are the same whenever they are measured."""
    with torch.random.fork_rng([]):
        return replace(data, loader=list(read(data.loader)))


def _described(method: Method) -> dict[str, str]:
    """What decides how a method learns, its callables by their names and what they were made with."""
    parts = {each.name: getattr(method, each.name) for each in fields(method)}
    return {name: _told(tuple(x.items()) if isinstance(x, Mapping) else x) for name, x in parts.items()}


def _told(value: Any, depth: int = 4) -> str:
    """The same in another process: numbers and strings as they are, in closures, partials and dataclasses too.

    Not in lists and dictionaries, which a run may fill.
    """
    name = getattr(value, "__qualname__", type(value).__qualname__)
    made_with: tuple[Any, ...] = ()
    if value is None or isinstance(value, (str, bool, int, float, np.generic, torch.dtype)):
        return repr(value)
    if isinstance(value, tuple):
        name, made_with = "", value
    elif isinstance(value, partial):
        made_with = (value.func, *value.args, *value.keywords.items())
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        made_with = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items())
    elif is_dataclass(value) and not isinstance(value, type):
        made_with = tuple(getattr(value, each.name) for each in fields(value))
    told = ", ".join(_told(each, depth - 1) for each in made_with) if depth else ""
    return f"{name}({told})" if told else name


def _costs(budget: Budget, forward: Forward, sample: Any) -> dict[str, float]:
    """{site: of one unit} the parameters or FLOPs between the site and those that fire before it."""
    gates = forward.gates
    if budget.by == "units":
        return {}
    costs = dict.fromkeys((site.name for site in gates.sites), 0.0)
    if budget.by == "parameters":
        costs |= gates.parameters_behind
    else:
        counted = [0]
        with torch.no_grad(), gates.everything_open(), FlopCounterMode(display=False) as counter:

            def see(site: Site, x: Tensor) -> None:
                costs[site.name] += counter.get_total_flops() - counted[0]
                counted[0] = counter.get_total_flops()

            forward(sample, 1, see)
    return {site.name: costs[site.name] / site.units for site in gates.sites}


def _meaning(outputs: Mapping[Label, Sequence[int]] | None, number: int | None) -> dict[Label, list[int]] | None:
    """{label: which of the model's so many outputs say yes to it}, checked."""
    if outputs is None:
        return None
    if number is None:
        raise NadhooksError("outputs: an objective of one's own decides itself what outputs mean")
    found = {}
    for label, given in outputs.items():
        indices: Any = given.tolist() if isinstance(given, (np.ndarray, Tensor)) else given
        if not isinstance(indices, Iterable):
            raise TaskError(f"outputs: expected for task {label!r} a list of the model's outputs, got {indices!r}")
        which = [x.item() if isinstance(x, np.generic) else x for x in indices]
        wrong = [x for x in which if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < number]
        if wrong or not 0 < len(set(which)) < number:
            raise TaskError(
                f"outputs: expected for task {label!r} some but not all of the model's outputs 0 to {number - 1}, "
                f"got {which!r}"
            )
        found[label] = which
    return found


def _origin(start: Method | Masks) -> dict[str, Any]:
    """What first scores were taken from, for a file."""
    if isinstance(start, Masks):
        told = ("method", "options", "keep", "fidelity", "seed")
        return {name: start.provenance[name] for name in told if name in start.provenance}
    return {"method": start.name, "options": start.described()}


def _budget(keep: float | int | Budget | None, fidelity: float | None, method: Method) -> Budget | None:
    asked = {name: value for name, value in (("keep", keep), ("fidelity", fidelity)) if value is not None}
    if len(asked) == 2:
        raise NadhooksError("expected keep= or fidelity=, got both: fidelity decides how much is kept")
    if asked and method.keep is None:
        name, value = asked.popitem()
        value = value.keep if isinstance(value, Budget) else value
        raise NadhooksError(
            f"{name}: with {method.name!r} the share that is kept follows from its options, got {name}={value}"
        )
    if fidelity is not None and method.sampling == "own":
        raise NadhooksError(f"fidelity: {method.name!r} reads the loader itself, and holds nothing out; pass keep=")
    if fidelity is not None and not (isinstance(fidelity, Real) and 0 < float(fidelity) < math.inf):
        raise NadhooksError(f"fidelity: expected a divergence above 0 (in nats), got {fidelity!r}")
    return None if method.keep is None else Budget.of(method.keep if keep is None else keep)
