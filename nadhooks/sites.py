"""Where gates go: `Site`, and the selectors that choose sites from a dry run of the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from torch.nn.modules import activation

from .errors import SiteError
from .tracing import Call, Leaf, Trace, has_weights, input_units, layer_axis, never_fired

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Site:
    """One tensor of one module, with the one axis whose positions are its units.

    name: unique within a model; the module's name, with `[i]` behind it for the i-th tensor of a structured output
        and `@input` for what the module takes in.
    axis: counted from the front, batch included. units: how many. block: positions on the axis per unit.
    """

    name: str
    axis: int
    units: int
    module: str
    side: Side = "output"
    leaf: int | None = None
    block: int = 1


@dataclass(frozen=True)
class Pick:
    """A module that a selector chose. A required pick that cannot become a site is an error, any other is reported."""

    module: str
    required: bool = False
    side: Side = "output"
    units: int | None = None  # None: one per position on the axis


@dataclass
class Selection:
    """What a selector chose, and what it left out and why."""

    picks: list[Pick] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Selector:
    """Chooses sites from a dry run; `description` is what errors and mask files say of it."""

    description: str
    select: Callable[[Trace], Selection]

    def __repr__(self) -> str:
        return f"nadhooks.sites.{self.description}"


Sites = Selector | str | Sequence[str] | Sequence[Site] | Callable[[str, nn.Module], bool]
Axis = int | Mapping[str, int]


# --- selectors -------------------------------------------------------------------------------------------------------


def blocks() -> Selector:
    """The outputs of the network's building blocks (the default).

    A block is a module of two or more convolutions or linear layers that has siblings of its own class; a stage that
    holds such blocks is not one itself. Networks without blocks, such as VGG, give the last tensor before each layer.
    """
    return Selector("blocks()", lambda trace: Selection([Pick(name) for name in _block_names(trace)]))


def channels() -> Selector:
    """The outputs of every convolution and linear layer that fires."""

    def select(trace: Trace) -> Selection:
        fired = [call.name for call in trace.fired() if has_weights(call.module)]
        unused = dict.fromkeys(
            never_fired(trace),
            "never fired: its weight is used inside another function, in training only, or not at all",
        )
        return Selection([Pick(name) for name in fired], unused)

    return Selector("channels()", select)


def neurons() -> Selector:
    """The hidden units of multilayer perceptrons, squeeze-and-excite's included.

    That is what an activation puts out between two linear layers or 1x1 convolutions of one module.
    """

    def select(trace: Trace) -> Selection:
        selection = Selection()
        for index in [None, *range(len(trace.calls))]:
            hidden: Call | None = None  # the activation that followed the last layer
            after_layer = False
            for call in (trace.calls[child] for child in trace.children[index]):
                if _is_pointwise(call.module):
                    if hidden is not None and _puts_out(hidden, call.module):
                        selection.picks.append(Pick(hidden.name))
                    hidden, after_layer = None, True
                elif has_weights(call.module):
                    hidden, after_layer = None, False
                elif after_layer and hidden is None and _is_activation(call):
                    hidden = call
        selection.picks = list(dict.fromkeys(selection.picks))
        return selection

    return Selector("neurons()", select)


def heads() -> Selector:
    """Attention heads: what the output projection of an attention module takes in, one unit per head.

    Found as modules with a whole number `num_heads` whose last linear layer takes in something else than the module
    itself does. Where that projection's weight is used functionally (torchvision's transformers), no hook fires on
    it: such modules are reported as skipped.
    """

    def select(trace: Trace) -> Selection:
        selection = Selection()
        for name, module in trace.model.named_modules():
            number = getattr(module, "num_heads", None)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                continue
            call = trace.call(name)
            if call is None or any(hasattr(part, "num_heads") for part in module.modules() if part is not module):
                continue
            own = {leaf.serial for leaf in call.inputs}
            linear = [c for c in trace.inside(call) if isinstance(c.module, nn.Linear)]
            last = linear[-1] if linear else None
            if last is None or any(leaf.serial in own for leaf in last.inputs):
                if any(True for _ in module.parameters()):
                    selection.skipped[name] = "its output projection never fires (its weight is used functionally)"
            elif (input_units(last.module) or 0) % number:
                selection.skipped[name] = (
                    f"{last.name} takes {input_units(last.module)} features, not {number} equal heads"
                )
            else:
                selection.picks.append(Pick(last.name, side="input", units=number))
        return selection

    return Selector("heads()", select)


def matching(*globs: str) -> Selector:
    """Modules by name: `*` and `?` and `[…]` stay within one part of a dotted name, `**` spans parts."""

    def select(trace: Trace) -> Selection:
        names = [name for name, _ in trace.model.named_modules() if name]
        selection = Selection()
        for glob in globs:
            pattern = _glob_pattern(glob)
            matched = [name for name in names if pattern.fullmatch(name)]
            if not matched:
                raise SiteError(_no_match(glob, names))
            fired = [name for name in matched if trace.call(name)]
            if not fired:
                few = ", ".join(matched[:3]) + (", …" if len(matched) > 3 else "")
                raise SiteError(
                    f"{glob!r} matches {few}, which the forward pass never calls (a container, a weight used "
                    "functionally, or a training-only part); choose a module that is called"
                )
            selection.picks += [Pick(name, required=True) for name in fired]
            selection.skipped |= {name: "never fired" for name in matched if name not in fired}
        selection.picks = list(dict.fromkeys(selection.picks))
        return selection

    return Selector(f"matching({', '.join(map(repr, globs))})", select)


def where(condition: Callable[[str, nn.Module], bool]) -> Selector:
    """Modules for which `condition(name, module)` holds."""

    def select(trace: Trace) -> Selection:
        chosen = [name for name, module in trace.model.named_modules() if name and condition(name, module)]
        fired = [name for name in chosen if trace.call(name)]
        if chosen and not fired:
            raise SiteError(f"the forward pass never calls any of the chosen modules ({', '.join(chosen[:3])} …)")
        skipped = {name: "never fired" for name in chosen if name not in fired}
        return Selection([Pick(name, required=True) for name in fired], skipped)

    return Selector(f"where({getattr(condition, '__name__', condition)})", select)


def described(sites: Sites | None) -> str:
    """What mask files say of how the sites were chosen."""
    given = isinstance(sites, Sequence) and sites and all(isinstance(site, Site) for site in sites)
    return "given" if given else selector_of(sites).description


def selector_of(sites: Sites | None) -> Selector:
    """Whatever a user may pass as `sites`, as a selector."""
    if sites is None:
        return blocks()
    if isinstance(sites, Selector):
        return sites
    if isinstance(sites, str):
        return matching(sites)
    if isinstance(sites, Sequence) and sites and all(isinstance(glob, str) for glob in sites):
        return matching(*(glob for glob in sites if isinstance(glob, str)))
    if callable(sites):
        return where(sites)
    raise SiteError(
        f"sites: expected a selector such as nadhooks.sites.blocks(), a glob or a list of globs over module names, "
        f"or a callable (name, module) -> bool, got {sites!r}"
    )


# --- from picks to sites ---------------------------------------------------------------------------------------------


def find(trace: Trace, sites: Sites | None, axis: Axis | None = None) -> tuple[tuple[Site, ...], dict[str, str]]:
    """The sites that `sites` chooses, in the order in which they fire, and what was left out: {module: reason}.

    axis: the axis of the units where it cannot be determined, for all sites or as {glob: axis}.
    """
    if isinstance(sites, Sequence) and sites and all(isinstance(site, Site) for site in sites):
        return _as_given(trace, [site for site in sites if isinstance(site, Site)]), {}
    selector = selector_of(sites)
    selection = selector.select(trace)
    found: list[tuple[int, Site]] = []
    for pick in selection.picks:
        call = trace.call(pick.module)
        assert call is not None  # selectors pick what fired
        leaves = call.inputs[:1] if pick.side == "input" else call.outputs
        if not leaves:
            problem = f"{pick.module}: expected a floating-point tensor, its {pick.side} holds none"
            if pick.required:
                raise SiteError(f"{problem}; choose another module")
            selection.skipped[pick.module] = problem
        for leaf in leaves:
            try:
                found.append((2 * call.done + (pick.side == "output"), _site(trace, pick, call, leaf, axis)))
            except SiteError as error:
                if pick.required or axis is not None:
                    raise
                selection.skipped[pick.module] = str(error)
    if not found:
        reasons = "".join(f"\n  {name}: {why}" for name, why in list(selection.skipped.items())[:5])
        raise SiteError(
            f"no site: {selector!r} chose nothing in {type(trace.model).__name__}{':' + reasons if reasons else ''}; "
            "pass sites= with globs over module names or another selector"
        )
    return tuple(site for _, site in sorted(found, key=lambda pair: pair[0])), selection.skipped


def _site(trace: Trace, pick: Pick, call: Call, leaf: Leaf, axis: Axis | None) -> Site:
    name = pick.module + ("@input" if pick.side == "input" else "" if call.bare else f"[{leaf.index}]")
    given = _given_axis(pick.module, axis)
    ndim = len(leaf.shape)
    if given is not None:
        if not -ndim < given < ndim or given == 0:
            raise SiteError(f"{name}: axis={given} does not fit a tensor of shape {leaf.shape}; axis 0 is the batch")
        where = given % ndim
    else:
        known = layer_axis(call.module, ndim) if pick.side == "input" else trace.axis(call, leaf)
        if known is None:
            raise SiteError(
                f"{name}: the axis of its units cannot be determined from its output of shape {leaf.shape}; "
                "pass axis= (an integer, or {glob: integer})"
            )
        where = known
    positions = leaf.shape[where]
    units = pick.units or positions
    index = None if call.bare or pick.side == "input" else leaf.index
    return Site(name, where, units, pick.module, pick.side, index, positions // units)


def _as_given(trace: Trace, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Sites that are known already (from masks), checked against what the model does."""
    for site in sites:
        call = trace.call(site.module)
        if call is None:
            what = "never fires" if site.module in dict(trace.model.named_modules()) else "does not exist"
            raise SiteError(f"{site.name}: the module {what} in this {type(trace.model).__name__}")
        leaves = {leaf.index: leaf for leaf in (call.inputs if site.side == "input" else call.outputs)}
        leaf = leaves.get(site.leaf or 0)
        if leaf is None or site.axis >= len(leaf.shape) or leaf.shape[site.axis] != site.units * site.block:
            got = leaf.shape if leaf else "no such tensor"
            raise SiteError(f"{site.name}: expected {site.units * site.block} positions on axis {site.axis}, got {got}")
    return tuple(sites)


def _given_axis(module: str, axis: Axis | None) -> int | None:
    if isinstance(axis, Mapping):
        return next((value for glob, value in axis.items() if _glob_pattern(glob).fullmatch(module)), None)
    return axis


# --- what the selectors look for -------------------------------------------------------------------------------------


def _block_names(trace: Trace) -> list[str]:
    modules = dict(trace.model.named_modules())
    composite = [call for call in trace.fired() if call.name and _is_composite(call.module)]
    family = {call.name: _family(call.name, modules) for call in composite}
    siblings = Counter((family[call.name], type(call.module)) for call in composite)
    repeated = [call for call in composite if siblings[family[call.name], type(call.module)] > 1]
    # a class of its own that stands in a row with blocks is a block too: EfficientNet's first, say
    rows = {_row(call.name, family[call.name]) for call in repeated} - {None}
    blocks = [call for call in composite if call in repeated or _row(call.name, family[call.name]) in rows]
    for stage in list(blocks):
        inner = [call for call in blocks if call.name.startswith(stage.name + ".")]
        if not inner or stage not in blocks:
            continue
        if _shapes(stage) == _shapes(inner[-1]):  # a stage that puts out what its last block does
            blocks.remove(stage)
        else:  # a block of its own, whose parts are collected: DenseNet's
            blocks = [call for call in blocks if call not in inner]
    return [call.name for call in blocks] or _segment_ends(trace)


def _row(name: str, family: str) -> tuple[str, int] | None:
    """The container within the family that a module stands in, and how deep; None outside containers."""
    inside = name[len(family) :].strip(".").split(".")
    return (f"{family}.{inside[0]}", len(inside)) if len(inside) > 1 else None


def _shapes(call: Call) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in call.outputs]


def _is_composite(module: nn.Module) -> bool:
    plain = type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return not plain and sum(has_weights(part) for part in module.modules()) > 1


def _family(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The nearest module above that is more than a container: its parts are siblings, however they are grouped."""
    parent = name.rpartition(".")[0]
    while parent and type(modules[parent]) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        parent = parent.rpartition(".")[0]
    return parent


def _segment_ends(trace: Trace) -> list[str]:
    """For plain stacks of layers: the last module before each next layer whose units are the last layer's."""
    ends: list[str] = []
    candidate: str | None = None
    units: int | None = None
    for call in trace.fired():
        if list(call.module.children()) or not call.outputs:
            continue
        leaf = call.outputs[0]
        axis = trace.axis(call, leaf)
        if has_weights(call.module):
            ends += [candidate] if candidate else []
            candidate, units = call.name, None if axis is None else leaf.shape[axis]
        elif candidate and axis is not None and leaf.shape[axis] == units:
            candidate = call.name
    return ends  # the last segment is the model's own output


def _is_pointwise(module: nn.Module) -> bool:
    kernel = getattr(module, "kernel_size", None)
    return isinstance(module, nn.Linear) or (has_weights(module) and kernel is not None and set(kernel) == {1})


def _puts_out(call: Call, taker: nn.Module) -> bool:
    """The call puts out the units that the layer `taker` takes (a softmax between two layers does not)."""
    shape = call.outputs[0].shape if call.outputs else ()
    axis = layer_axis(taker, len(shape))
    return axis is not None and axis < len(shape) and shape[axis] == input_units(taker)


def _is_activation(call: Call) -> bool:
    module = call.module
    if type(module).__module__ == activation.__name__ and not isinstance(module, nn.MultiheadAttention):
        return True
    inert = isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)) or layer_axis(module, 4) is not None
    return not inert and not list(module.children()) and not list(module.parameters())


def _glob_pattern(glob: str) -> re.Pattern[str]:
    tokens = re.findall(r"\*\*|\*|\?|\[!?[^\]]+\]|.", glob)
    spelled = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile(
        "".join(
            spelled.get(token) or ("[" + token[1:].replace("!", "^", 1) if len(token) > 1 else re.escape(token))
            for token in tokens
        )
    )


def _no_match(glob: str, names: Iterable[str]) -> str:
    hint = ""
    if "**" not in glob and any(_glob_pattern(glob.replace("*", "**")).fullmatch(name) for name in names):
        hint = f"; `*` stays within one part of a dotted name, did you mean {glob.replace('*', '**')!r}?"
    shown = ", ".join(list(names)[:6])
    return f"no module name matches {glob!r}{hint} (names begin {shown}, …)"
