"""One task's sub-architecture as an ordinary module: without hooks, its gates folded into weights where that is exact.

A gate on what a layer puts out scales the rows of its weight, and what closed units put out becomes its bias; a gate on
what a projection takes in scales columns. The layer may lie before the site with only layers without parameters
between (activations, pooling). Whether such a fold is exact is not read off a table: it is tried against the hooked
model, and where the two differ the gate becomes a part of the site's module instead.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import zoo
from .comparing import close, difference, largest, outputs, scaled, varied
from .default_device import made_on_cpu
from .errors import ModelError, TaskError
from .gated import put_gate
from .hookable import bare_copy, check_model
from .hooking import on_sites
from .identity import misfit, parameters_of_sites, unlike, without_wrappers
from .layers import Neighbour, consumers, producers, scale_columns, scale_rows
from .masks import Masks, check_masks
from .nesting import flatten
from .segments import Gating, gated
from .sites import Site, find
from .tracing import Trace, trace
from .wiring import OUTPUT, flowing

SCALES = (1.0, 0.01, 30.0, 1000.0)  # of inputs on which soft gates are tried

How = Literal["open", "weights", "weights before", "columns", "columns behind", "gate"]


@dataclass(frozen=True)
class Fold:
    """How the gates of one site became part of the model.

    how: "open" (every gate is, nothing to do), "weights" (rows and bias of `layer`, whose tensor the site is),
        "weights before" (the same, with layers without parameters between `layer` and the site), "columns" (those of
        the projection `layer`, for sites on its input), "columns behind" (those of the one layer that takes the site
        in, with layers without parameters between), "gate" (a gate within the forward pass of `layer`).
    """

    site: str
    how: How
    layer: str


@dataclass(frozen=True)
class Folding:
    """How a sub-architecture was made, and how far its outputs are from the hooked model's.

    difference: the largest difference of an output, on the example and a random input; 0.0 is equal to the last bit.
    largest: the largest output there, to compare `difference` with.
    """

    task: str
    folds: tuple[Fold, ...]
    difference: float
    largest: float

    @property
    def exact(self) -> bool:
        """Equal to the hooked model to the last bit, on the inputs tried."""
        return self.difference == 0

    def __str__(self) -> str:
        hows = [fold.how for fold in self.folds]
        counts = ", ".join(f"{hows.count(how)} {_SAID[how]}" for how in _SAID if how in hows)
        equal = "equal to the last bit" if self.exact else f"within {self.difference:.1e} (largest {self.largest:.1e})"
        return f"task {self.task}: {counts}; outputs {equal}"


_SAID: dict[How, str] = {
    "weights": "sites in their own weights",
    "weights before": "in the weights before them",
    "columns": "in columns",
    "columns behind": "in columns behind them",
    "gate": "as gates in their modules",
    "open": "open",
}


@made_on_cpu
def sub_architecture(model: nn.Module, masks: Masks, task: object = None, *, example: Any = None) -> nn.Module:
    """The part of `model` that one task keeps, as an ordinary module without hooks; `model` itself is not changed.

    It computes what the model does with `gates.load(masks)` inside `with gates(task)`: to the last bit for hard masks
    whose closed units put out zero; to rounding where a bias is added (closed="mean") or weights are scaled (soft
    masks). Its attribute `folding`, a `Folding`, says how each site was folded and the measured difference.

    model: with or without gates attached; training flags, dtype, device and `requires_grad` carry over. Layers may get
    a bias, and shared weights that a fold changes are shared no more. Closed rows are zero, not frozen: training moves
    them again. task: name or label; may be left out where masks have one. example: as for `attach`.

    Raises SiteError when the masks belong to another model, TaskError for an unknown task, ModelError for models
    without values or where no way gives the hooked model's outputs.
    """
    check_model(model)
    check_masks(masks)
    if task is None and len(masks) != 1:
        some = ", ".join(masks.tasks[:4]) + (", …" if len(masks) > 4 else "")
        raise TaskError(f"expected one of the {len(masks)} tasks ({some}) as task=, got none")
    chosen = masks.select(masks.labels if task is None else [task])
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("folding needs weights, and this model is on the meta device; load them first")
    example = zoo.example_for(model) if example is None else example
    with torch.inference_mode(False), torch.no_grad():
        bare = bare_copy(model)
        seen = trace(bare, example)
        sites, _ = find(seen, chosen.sites)
        chosen = without_wrappers(chosen, sites)
        if differ := unlike(chosen, sites, parameters_of_sites(seen, sites)):
            raise misfit(differ, "take masks of this model, or gates.masks() after gates.load(masks, strict=False)")
        rows: Gating = {
            site.name: (
                chosen[site.name][0],
                None if (closed := chosen.closed_values(site.name)) is None else closed[0],
            )
            for site in sites
        }
        inputs = [example, varied(example)]
        options = _options(seen, sites, rows)
        # what is too small for the twin to show may count in the model itself: then gates alone
        for plan in (_confirmed(bare, sites, rows, options, inputs), [each[-1] for each in options]):
            folded = _folded(bare, sites, rows, plan)
            apart, most, alike = _apart(bare, sites, rows, folded, inputs)
            if alike:
                folded.folding = Folding(chosen.tasks[0], tuple(plan), apart, most)  # type: ignore[assignment]
                return folded
        raise ModelError(
            f"the sub-architecture differs from the hooked model by {apart:.1e} (largest output {most:.1e}): "
            "some module runs in another way when it has hooks, or at random; use attach, gates.load and gates(task)"
        )


def _apart(
    bare: nn.Module, sites: Sequence[Site], rows: Gating, folded: nn.Module, inputs: Sequence[Any]
) -> tuple[float, float, bool]:
    """How far a folded model's outputs are from the hooked one's, the largest of those, and whether both are alike."""
    apart, most, alike = 0.0, 0.0, True
    for each in inputs:
        ours = outputs(folded, each)
        with _gated(bare, sites, rows):
            theirs = outputs(bare, each)
        apart, most = max(apart, difference(ours, theirs)), max(most, largest(theirs))
        alike = alike and close(ours, theirs)
    return apart, most, alike


# --- the plan --------------------------------------------------------------------------------------------------------


def _options(seen: Trace, sites: Sequence[Site], rows: Gating) -> list[list[Fold]]:
    """For each site where its gates could go, best first; what is doubtful is for `_confirmed` to try."""
    before, behind = producers(seen, sites), consumers(seen, sites)
    options = []
    for site in sites:
        g, closed = rows[site.name]
        found: list[Fold] = [Fold(site.name, "gate", site.within or site.module)]
        if bool((g == 1).all()):
            found = [Fold(site.name, "open", site.module)]
        indirect: tuple[tuple[Neighbour | None, How], ...] = (
            (behind.get(site.name), "columns behind"),
            (before.get(site.name), "weights before"),
        )
        for neighbour, how in indirect:
            # dropout would scale a constant, which some layers have no bias for
            if neighbour is None or found[0].how == "open":
                continue
            layer = seen.model.get_submodule(neighbour.layer)
            if closed is None or (not neighbour.at_random and hasattr(layer, "bias")):
                at_once: How = "columns" if site.side == "input" else "weights"
                found.insert(0, Fold(site.name, at_once if neighbour.direct else how, neighbour.layer))
        options.append(found)
    return options


def _confirmed(
    bare: nn.Module, sites: Sequence[Site], rows: Gating, options: Sequence[list[Fold]], inputs: Sequence[Any]
) -> list[Fold]:
    """The best of the options that are exact: where a fold is not, the next is tried; the last is a gate.

    Tried on a twin without parameters that hide the flow, in single precision at least. A fold before or behind a site
    may be seen by others, which would be blamed for it; so if blame leads nowhere, all such folds go, and then all.
    """
    twin = _lively(bare)
    inputs = [_cast_like(twin, each) for each in inputs]
    if any(bool(((g != 0) & (g != 1)).any()) for g, _ in rows.values()):  # to scale is not the same on either side of
        inputs = [scaled(each, scale) for each in inputs for scale in SCALES]  # what saturates, or has a threshold
    chosen = [0] * len(options)
    while True:
        plan = [each[index] for each, index in zip(options, chosen, strict=True)]
        wrong = _wrong(twin, sites, rows, plan, inputs)
        blamed = [n for n, fold in enumerate(plan) if fold.site in wrong and fold is not options[n][-1]]
        indirect = [n for n, fold in enumerate(plan) if fold.how in ("weights before", "columns behind")]
        others = [n for n, fold in enumerate(plan) if fold is not options[n][-1]]
        if not wrong or not others:
            return plan
        for n in blamed or indirect or others:
            chosen[n] = chosen[n] + 1 if blamed else len(options[n]) - 1


def _lively(bare: nn.Module) -> nn.Module:
    """A copy of a model whose every parameter lets something through, in single precision at least."""
    twin = copy.deepcopy(bare)
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in twin.parameters()):
        twin = twin.float()
    with flowing(twin):
        return copy.deepcopy(twin)


def _wrong(
    twin: nn.Module, sites: Sequence[Site], rows: Gating, plan: Sequence[Fold], inputs: Sequence[Any]
) -> set[str]:
    """The sites where a folded model puts out something else than the hooked one, each judged by itself: what enters
    it is the hooked model's. Also OUTPUT.
    """
    folded = _folded(twin, sites, rows, plan)
    wrong: set[str] = set()
    places: dict[str, list[str]] = defaultdict(list)  # where sites can be seen in both: what their module puts out
    for site, fold in zip(sites, plan, strict=True):
        place = fold.layer if fold.how == "columns behind" else site.module
        places[site.within or place].append(site.name)
    for each in inputs:
        recorded: dict[str, list[list[Any]]] = defaultdict(list)

        def record(place: str, leaves: list[Any], recorded: Any = recorded) -> None:
            recorded[place].append([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves])

        with _gated(twin, sites, rows), _seen(twin, places, record):
            expected = outputs(twin, each)

        def replay(place: str, leaves: list[Any], recorded: Any = recorded) -> list[Any] | None:
            if not recorded[place]:  # called more often than in the hooked model: something before it differs
                return None
            before = recorded[place].pop(0)
            if not close(leaves, before):
                wrong.update(places[place])
            return before

        with _seen(folded, places, replay):
            got = outputs(folded, each)
        if not close(got, expected):
            wrong.add(OUTPUT)
    return wrong


@contextmanager
def _seen(model: nn.Module, places: Iterable[str], see: Callable[[str, list[Any]], list[Any] | None]) -> Iterator[None]:
    """Inside, `see` gets what these modules put out, as leaves, and may put others in their place."""

    def hook(place: str, module: nn.Module, args: Any, output: Any) -> Any:
        leaves, rebuild = flatten(output)
        others = see(place, leaves)
        return None if others is None else rebuild(others)

    with ExitStack() as stack:
        for place in places:
            stack.callback(model.get_submodule(place).register_forward_hook(partial(hook, place)).remove)
        yield


# --- the model, folded and hooked ------------------------------------------------------------------------------------


def _folded(bare: nn.Module, sites: Sequence[Site], rows: Gating, plan: Sequence[Fold]) -> nn.Module:
    """A copy of a model with gates where the plan says."""
    folded = copy.deepcopy(bare)
    device = next((parameter.device for parameter in folded.parameters()), None)
    # columns first: what a layer takes in is gated before what it puts out
    for site, fold in sorted(zip(sites, plan, strict=True), key=lambda pair: "columns" not in pair[1].how):
        g, closed = rows[site.name]
        module = folded.get_submodule(fold.layer)
        if fold.how == "gate":
            layer = folded.get_submodule(site.module) if site.within else None
            put_gate(module, site, g.to(device), None if closed is None else closed.to(device), layer)
        elif "columns" in fold.how:
            scale_columns(module, site, g, closed)
        elif fold.how != "open":
            scale_rows(module, site, g, closed)
    return folded


def _gated(model: nn.Module, sites: Sequence[Site], rows: Gating) -> AbstractContextManager[None]:
    """Inside, hooks gate the sites as `with gates(task)` does."""

    def change(site: Site, x: Tensor) -> Tensor | None:
        return None if bool((rows[site.name][0] == 1).all()) else gated(site, x, rows)

    return on_sites(model, sites, change)


def _cast_like(model: nn.Module, example: Any) -> Any:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, example)
