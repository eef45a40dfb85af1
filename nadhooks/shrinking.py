"""A physically smaller model that computes the same: units that are dead for every input are cut out of the weights.

torch-pruning (the extra `nadhooks[shrink]`) tells which rows, columns and norms hold the same unit (Fang et al.,
*DepGraph: Towards Any Structural Pruning*, CVPR 2023) and cuts them. Which units may go is decided here: those that are
constant in all that reads them, or are multiplied by zero there. What a constant contributed goes into a bias; where
zero padding makes a border of it, one constant unit stays and carries the contribution of all.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from . import zoo
from .as_found import gradients, undisturbed
from .comparing import close, difference, largest, outputs, varied
from .default_device import made_on_cpu
from .errors import ModelError, NadhooksError
from .gated import Gated
from .hookable import bare_copy, check_model
from .layers import own, put
from .tracing import call_model, has_weights, layer_axis

# Elementwise functions that are silent for some inputs only: with these passing everything, what is silent is dead.
SILENCING = {
    *(F.relu, F.relu6, F.hardtanh, F.hardswish, F.silu, F.gelu, F.leaky_relu, F.elu, F.hardsigmoid, F.softplus),
    *(torch.relu, torch.relu_, torch.clamp, torch.clamp_, F.relu_, F.hardtanh_, F.elu_, F.leaky_relu_),
    *(Tensor.relu, Tensor.relu_, Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clip_),
}
SHIFTS = (0.0, 0.3, -0.3, 3.0, -3.0, 100.0, -100.0)  # of what layers put out, by so many times its largest


@dataclass(frozen=True)
class Shrinking:
    """What was cut, and how far the outputs are from the model's before.

    parameters: before and after. removed: {layer: units that it no longer puts out}. kept: {layer: why its dead units
    could not go}. difference: the largest of an output, on the example and a random input; largest: the largest output.
    """

    parameters: tuple[int, int]
    removed: dict[str, int]
    kept: dict[str, str]
    difference: float
    largest: float

    def __str__(self) -> str:
        before, after = self.parameters
        units = sum(self.removed.values())
        return (
            f"{units:,} units of {len(self.removed)} layers removed: {after:,} of {before:,} parameters "
            f"({after / before:.0%}); outputs within {self.difference:.1e} (largest {self.largest:.1e})"
        )


@made_on_cpu
def shrink(model: nn.Module, *, example: Any = None, multiple: int = 8) -> nn.Module:
    """A smaller copy of `model`, for instance of a `sub_architecture`, that puts out the same up to rounding.

    Its attribute `shrinking`, a `Shrinking`, says what was cut. A unit goes only if whatever reads it reads a constant,
    for every input and not just for those at hand (checked with all that layers put out shifted by far in both
    directions), or multiplies it by zero. So units of a residual stream stay unless all that add to them are closed;
    attention keeps its heads, and units that a layer or group norm averages over stay. Units whose gates became part of
    a module stay too.

    multiple: layers keep so many dead units that their widths are multiples of it, which most devices compute faster.

    Raises NadhooksError where torch-pruning is not installed, ModelError where it cannot follow the model.
    """
    if not isinstance(multiple, int) or multiple < 1:
        raise NadhooksError(f"multiple: expected a whole number of at least 1, got {multiple!r}")
    pruning = _torch_pruning()
    check_model(model)
    example = zoo.example_for(model) if example is None else example
    with torch.inference_mode(False), undisturbed(model):
        return _Work(pruning, model, example, multiple).run()


def speed_up(before: nn.Module, after: nn.Module, example: Any, rounds: int = 11) -> float:
    """How many times as fast one model is as another: the ratio of the medians of forward passes that alternate."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    with torch.no_grad(), undisturbed(before), undisturbed(after):
        for _ in range(rounds + 1):
            for index, model in enumerate((before, after)):
                seconds[index].append(_seconds(model, example))
    return statistics.median(seconds[0][1:]) / statistics.median(seconds[1][1:])  # the first rounds warm up


def _seconds(model: nn.Module, example: Any) -> float:
    cuda = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    begun = time.perf_counter()
    call_model(model, example)
    if cuda is not None:
        torch.cuda.synchronize(cuda)
    return time.perf_counter() - begun


class _Work:
    """The work on one model: groups of coupled layers, one after the other, each tried, and taken back if it fails."""

    def __init__(self, pruning: Any, model: nn.Module, example: Any, multiple: int):
        self.multiple = multiple
        self.pruning, self.model, self.example = pruning, bare_copy(model), example
        self.inputs = [example, varied(example)]
        self.names = {module: name for name, module in self.model.named_modules()}
        self.removed: dict[str, int] = {}
        self.kept: dict[str, str] = {}
        with torch.no_grad():
            self.expected = [outputs(self.model, each) for each in self.inputs]
            self.constants = _constants(self.model, self.inputs)

    def run(self) -> nn.Module:
        before = sum(parameter.numel() for parameter in self.model.parameters())
        graph = self.graph()
        if not any(layer in graph.module2node for layer in self.constants):
            raise ModelError(
                f"torch-pruning sees none of the layers of {type(self.model).__name__}: it reads them off gradients, "
                "and the outputs have none; use the sub_architecture as it is"
            )
        done: set[nn.Module] = set()
        for layer in list(self.constants):
            if layer in done or layer not in graph.module2node or _grouped(layer):
                continue
            group = self.group(graph, layer, range(len(layer.weight)))  # type: ignore[arg-type]
            done |= {item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)}
            dead, carrier = self.dead(graph, group)
            if dead and not self.cut(graph, layer, group, dead, carrier):
                graph = self.graph()  # what the failed attempt left in it is gone
        after = sum(parameter.numel() for parameter in self.model.parameters())
        apart = max(difference(outputs(self.model, x), y) for x, y in zip(self.inputs, self.expected, strict=True))
        shrinking = Shrinking((before, after), self.removed, self.kept, apart, max(map(largest, self.expected)))
        self.model.shrinking = shrinking  # type: ignore[assignment]
        return self.model

    def graph(self) -> Any:
        """torch-pruning's graph of what is coupled with what. Raises ModelError."""
        try:
            with warnings.catch_warnings(), torch.enable_grad(), gradients(self.model, True):
                # it reads the graph off gradients, and warns of parameters that are no layer's: what they touch stays
                warnings.simplefilter("ignore")
                return self.pruning.DependencyGraph().build_dependency(
                    self.model, self.example, forward_fn=call_model, verbose=False
                )
        except Exception as error:  # whatever it stumbles over
            raise ModelError(
                f"torch-pruning cannot follow {type(self.model).__name__} ({type(error).__name__}: {error}); "
                "use the sub_architecture as it is"
            ) from error

    def group(self, graph: Any, layer: nn.Module, rows: Iterable[int]) -> Any:
        linear = isinstance(layer, nn.Linear)
        cut = self.pruning.prune_linear_out_channels if linear else self.pruning.prune_conv_out_channels
        return graph.get_pruning_group(layer, cut, list(rows))

    def readers(self, graph: Any, group: Any) -> Iterator[tuple[nn.Module, list[int], list[int]]]:
        """Layers that take in what a group's layers put out, with rows of its first layer and columns of their own."""
        for item in group:
            if not graph.is_out_channel_pruning_fn(item.dep.handler):  # norms cut what goes in and out at once
                yield item.dep.target.module, item.root_idxs, item.idxs

    def dead(self, graph: Any, group: Any) -> tuple[list[int], int | None]:
        """The units, by their row in the group's first layer, that all readers can do without.

        And the one that stays to carry the constants of others where zero padding makes borders of them, if need be.
        """
        readers = list(self.readers(graph, group))
        separate = all(_separate(item.dep.target.module, self.names) for item in group)
        if not separate or not readers or any(layer not in self.constants or _grouped(layer) for layer, *_ in readers):
            return [], None
        alive: set[int] = set()
        bordered: dict[int, dict[nn.Module, float]] = defaultdict(dict)  # unit -> where its constant has a border
        for layer, rows, columns in readers:
            constants = self.constants[layer]
            if max(columns, default=0) >= len(constants):  # as behind a GLU or a pixel shuffle
                return [], None
            for row, column in zip(rows, columns, strict=True):
                constant = float(constants[column])
                if constant != constant:  # NaN: it lives
                    alive.add(row)
                elif constant and _pads(layer):
                    bordered[row][layer] = abs(constant)
        dead = [row for row in group[0].idxs if row not in alive]
        carriers = [row for row in dead if row in bordered]
        carrier = max(carriers, key=lambda row: (len(bordered[row]), min(bordered[row].values())), default=None)
        if carrier is not None:
            dead = [row for row in dead if row != carrier and bordered[row].keys() <= bordered[carrier].keys()]
        units = len(group[0].idxs)
        width = max(1, units - len(dead))
        width = min(units, -(-width // self.multiple) * self.multiple)
        return dead[: units - width], carrier

    @torch.no_grad()
    def cut(self, graph: Any, layer: nn.Module, group: Any, dead: list[int], carrier: int | None) -> bool:
        """Cuts units out of a group's layers if the outputs stay; whether they did."""
        modules = {item.dep.target.module for item in group} & self.names.keys()
        before = {module: _state(module) for module in modules}
        left = dict(self.constants)
        for reader, rows, columns in self.readers(graph, group):
            gone = [column for row, column in zip(rows, columns, strict=True) if row in set(dead)]
            standing = next((column for row, column in zip(rows, columns, strict=True) if row == carrier), None)
            _carry(reader, gone, left[reader], standing)
            kept = torch.ones(len(left[reader]), dtype=torch.bool)
            kept[gone] = False
            left[reader] = left[reader][kept]
        try:
            self.group(graph, layer, dead).prune()
            found = [outputs(self.model, each) for each in self.inputs]
            problem = None if all(map(close, found, self.expected)) else "without them the outputs are others"
        except Exception as error:  # shapes that do not fit: something unseen holds these units too
            problem = f"something else needs their number ({type(error).__name__}: {error})"
        if problem is None:
            self.constants = left
            self.removed[self.names[layer]] = len(dead)
        else:
            self.kept[self.names[layer]] = f"{len(dead)} dead units stay: {problem}"
            for module, (attributes, parameters, buffers) in before.items():
                vars(module).clear()
                vars(module).update(attributes)
                module._parameters, module._buffers = parameters, buffers
        return problem is None


def _carry(layer: nn.Module, gone: list[int], constants: Tensor, standing: int | None) -> None:
    """Gives what these columns of a layer make of constants to its bias, or to the column of another constant unit."""
    weight = own(layer, "weight").double()
    columns = [column for column in gone if constants[column]]
    if not columns:
        return
    values = constants[columns].to(weight)
    read = torch.einsum("oc...,c->o...", weight[:, columns], values)
    if _pads(layer):
        assert standing is not None  # `dead` left one
        weight[:, standing] += read / float(constants[standing])
        put(layer, "weight", weight.to(own(layer, "weight").dtype))
    else:
        bias = getattr(layer, "bias", None)
        read = read.flatten(1).sum(1) if read.dim() > 1 else read
        put(layer, "bias", (read if bias is None else read + bias).to(own(layer, "weight").dtype))


# --- what is dead ----------------------------------------------------------------------------------------------------


def _constants(model: nn.Module, inputs: Sequence[Any]) -> dict[nn.Module, Tensor]:
    """{layer: (units,)} the constant that it takes in from a unit whatever the model takes in; NaN for units that live.

    0 for those that it multiplies by zero. In the order in which layers first run.

    What a few inputs do not move may be moved by others. So all that layers put out is shifted, in both directions and
    by far, but for units whose weights make nothing of what lives; and once activations that silence some inputs let
    everything pass, for norms may hold a shift back. Which those units are follows from what was found constant, until
    no more are: at first all that have weights live.
    """
    layers = list(filter(has_weights, model.modules()))
    ranges: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    sizes: dict[nn.Module, float] = {}  # of what a layer puts out by itself
    living = {layer: _fed(layer, None) for layer in layers}
    shift = 0.0

    def see(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:  # called with keywords: nothing is known of it
            return
        x = args[0].detach()
        units = x.movedim(layer_axis(layer, x.dim()), 0).flatten(1).double().cpu()
        lowest, highest = ranges.get(layer, (units.amin(1), units.amax(1)))
        ranges[layer] = torch.minimum(lowest, units.amin(1)), torch.maximum(highest, units.amax(1))

    @made_on_cpu
    def move(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        if not shift:
            sizes[layer] = max(sizes.get(layer, 0.0), float(out.detach().abs().amax()))
            return None
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, living[layer].shape, generator=generator) * 2 - 1
        lengths = 0.5 + torch.rand(signs.shape, generator=generator)  # of one length, a norm would take them for none
        by = (shift * (sizes.get(layer, 0.0) + 1.0) * signs * lengths * living[layer]).to(out)
        axis = layer_axis(layer, out.dim())
        assert axis is not None  # a layer's
        axis %= out.dim()
        return out + by.reshape(-1, *[1] * (out.dim() - 1 - axis))

    def run(mode: Any, shifts: Sequence[float]) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        nonlocal shift
        ranges.clear()
        sizes.clear()
        with ExitStack() as stack, mode:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(see).remove)
                stack.callback(layer.register_forward_hook(move).remove)
            for now, each in itertools.product(shifts, inputs):
                shift = now
                outputs(model, each)
        return dict(ranges)

    while True:
        passing, plain = run(_Passing(), [0.0]), run(nullcontext(), SHIFTS)
        constant = {
            layer: plain[layer][0].eq(plain[layer][1]) & passing[layer][0].eq(passing[layer][1]) for layer in plain
        }
        before, living = living, {layer: living[layer] & _fed(layer, constant.get(layer)) for layer in layers}
        if all(map(torch.equal, before.values(), living.values())):
            break
    found = {}
    for layer, (lowest, _) in plain.items():
        unread = own(layer, "weight").detach().transpose(0, 1).flatten(1).eq(0).all(1).cpu()
        values = torch.where(constant[layer], lowest, torch.full_like(lowest, torch.nan))
        found[layer] = torch.where(unread, 0.0, values) if len(unread) == len(values) else values  # not if grouped
    return found


def _fed(layer: nn.Module, constant: Tensor | None) -> Tensor:
    """(units that a layer puts out,) whether its weights make something of what it takes in, but for constant units."""
    weight = own(layer, "weight").detach().ne(0)
    weight = weight.reshape(*weight.shape[:2], -1).any(2)
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, _ConvTransposeNd):  # (in, out of a group)
        if groups > 1:
            return torch.ones(layer.out_channels, dtype=torch.bool)
        weight = weight.T
    weight = weight.cpu()
    if constant is None:
        return weight.any(1)
    moving = (~constant).reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return (weight & moving).any(1)


class _Passing(TorchFunctionMode):
    """Inside, elementwise functions that silence some inputs pass everything: what is silent then is always silent."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in SILENCING:
            return function(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        in_place = function.__name__.endswith("_") or kwargs.get("inplace", False)
        return x if in_place else x.clone()


def _pads(layer: nn.Module) -> bool:
    """Whether a layer may add a border of zeros to a map, so that it sees a constant unit as one with a border.

    Any larger kernel may: some convolutions pad in their own way.
    """
    return isinstance(layer, _ConvNd) and (max(layer.kernel_size) > 1 or layer.padding not in ((0,), (0, 0), (0, 0, 0)))


def _grouped(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvTransposeNd) or getattr(layer, "groups", 1) > 1


def _separate(module: Any, names: Mapping[nn.Module, str]) -> bool:
    """Whether units pass through a module of torch-pruning's graph without mixing; it has stand-ins for functions."""
    if isinstance(module, (nn.Parameter, Gated)):
        return False
    return module not in names or has_weights(module) or isinstance(module, (_BatchNorm, nn.PReLU))


# --- pieces ----------------------------------------------------------------------------------------------------------


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise NadhooksError(
            f"shrinking needs torch-pruning ({error}): pip install 'nadhooks[shrink]'; sub_architecture does without"
        ) from error
    return torch_pruning


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return dict(vars(module)), dict(module._parameters), dict(module._buffers)
