"""Where gates go: `Site`, and the selectors that choose sites from a dry run of the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from torch import nn

from .errors import SiteError
from .structure import Pick, Side, attention_heads, block_names, hidden_activations
from .tracing import Call, Leaf, Trace, has_weights, layer_axis, never_fired, own_weights, samples_on_axis_0

WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|_fsdp_wrapped_module\.)+")  # DataParallel, DDP; compile; FSDP


def unwrapped(name: str) -> str:
    """A module's name without what wrappers of whole models put before it."""
    return WRAPPERS.sub("", name)


@dataclass(frozen=True)
class Site:
    """One tensor of one module, with the one axis whose positions are its units.

    name: unique within a model; the module's name, with `[i]` behind it for the i-th tensor of a structured output
        and `@input` for what the module takes in.
    within: the module that uses this one's weight in a function, where this one is never called itself.
    views: axis 0 holds all samples of one view, then all of the next, and not all views of one sample.

    `within` and `views` are found anew in each model, and not part of what masks say of their sites.
    axis: counted from the front, batch included. units: how many. block: positions on the axis per unit; with
        `alternating`, position i belongs to unit i mod units.
    """

    name: str
    axis: int
    units: int
    module: str
    side: Side = "output"
    leaf: int | None = None
    block: int = 1
    alternating: bool = False
    within: str | None = field(default=None, compare=False)
    views: bool = field(default=False, compare=False)


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


GIVEN = "given"  # how sites were chosen that are handed over as they are

Sites = Selector | str | Sequence[str] | Sequence[Site] | Callable[[str, nn.Module], bool]
Axis = int | Mapping[str, int]


# --- selectors -------------------------------------------------------------------------------------------------------


def blocks() -> Selector:
    """The outputs of the network's building blocks (the default).

    A block is a module of two or more convolutions or linear layers that is numbered among its like (`layer1.0`,
    `cell_3`); a stage that only runs such blocks one after the other is none itself. Networks without blocks, such as
    VGG, give the last tensor before each layer; networks of more than 64, the last block of each stage.
    """
    return Selector("blocks()", lambda trace: Selection([Pick(name) for name in block_names(trace)]))


def channels() -> Selector:
    """The outputs of every convolution and linear layer, called or used functionally.

    Reported as left out: layers that never run, and modules that use weights of their own (an LSTM, say).
    """

    def select(trace: Trace) -> Selection:
        fired = [call.name for call in trace.fired() if has_weights(call.module)]
        unused = dict.fromkeys(
            never_fired(trace),
            "never fired: used in training only, in another way than as a layer, or not at all",
        )
        for name, parameters in own_weights(trace).items():
            unused[name or "(the model)"] = (
                f"not a layer, but computes with weights of its own: {', '.join(parameters)}"
            )
        return Selection([Pick(name) for name in fired], unused)

    return Selector("channels()", select)


def neurons() -> Selector:
    """The hidden units of multilayer perceptrons, squeeze-and-excite's included.

    That is what an activation puts out between two linear layers or 1x1 convolutions of one module.
    """
    return Selector("neurons()", lambda trace: Selection([Pick(name) for name in hidden_activations(trace)]))


def heads() -> Selector:
    """Attention heads: what the output projection of an attention module takes in, one unit per head.

    Found as modules with a whole number `num_heads` (`n_heads`, `heads`) that run a linear layer or 1x1 convolution
    on something else than they take in; where none does, the heads are what the module puts out.
    """
    return Selector("heads()", lambda trace: Selection(*attention_heads(trace)))


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
        try:
            chosen = [name for name, module in trace.model.named_modules() if name and condition(name, module)]
        except TypeError as error:
            raise SiteError(
                f"sites: expected a callable (name, module) -> bool, got {condition!r}: {error} "
                "(selectors are called: nadhooks.sites.blocks())"
            ) from error
        fired = [name for name in chosen if trace.call(name)]
        if chosen and not fired:
            raise SiteError(f"the forward pass never calls any of the chosen modules ({', '.join(chosen[:3])} …)")
        skipped = {name: "never fired" for name in chosen if name not in fired}
        return Selection([Pick(name, required=True) for name in fired], skipped)

    return Selector(f"where({getattr(condition, '__name__', condition)})", select)


def chosen_by(sites: Sites | None) -> str:
    """What mask files say of how the sites were chosen."""
    return GIVEN if _given(sites) else selector_of(sites).description


def _given(sites: Sites | None) -> TypeGuard[Sequence[Site]]:
    """Whether they are handed over as they are, and no selector is to find them."""
    return isinstance(sites, Sequence) and bool(sites) and all(isinstance(site, Site) for site in sites)


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
    if _given(sites):
        return _as_given(trace, sites), {}
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
    if name in ("input", "output"):  # what flow graphs call their ends
        name += "@output"
    given = _given_axis(pick.module, axis)
    ndim = len(leaf.shape)
    if given is not None:
        if not isinstance(given, int):
            raise SiteError(f"{name}: axis: expected an integer or {{glob: integer}}, got {given!r}")
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
    others = {
        other.shape[where : where + 1]
        for again in trace.calls
        if again.name == call.name
        for other in (again.inputs[:1] if pick.side == "input" else again.outputs)
    }
    if call.bare and others - {(positions,)}:
        raise SiteError(
            f"{name}: it is called several times, and not always with {positions} units; choose other modules"
        )
    samples = samples_on_axis_0(trace, call, leaf)
    if samples == "none":
        raise SiteError(
            f"{name}: axis 0 of shape {leaf.shape} does not hold the samples, so gates cannot differ by sample"
        )
    units = pick.units or positions
    index = None if call.bare or pick.side == "input" else leaf.index
    return Site(
        name=name,
        axis=where,
        units=units,
        module=pick.module,
        side=pick.side,
        leaf=index,
        block=positions // units,
        alternating=pick.alternating,
        within=call.within,
        views=samples == "views",
    )


def _as_given(trace: Trace, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Sites that are known already (from masks), checked against what the model does.

    They may be those of the model in or out of a wrapper, such as DataParallel, and then bear this model's names.
    """
    modules = dict(trace.model.named_modules())
    bare = {unwrapped(name): name for name in modules}
    found = []
    for site in sites:
        if site.module not in modules and (module := bare.get(unwrapped(site.module))):
            site = replace(site, module=module, name=module + site.name.removeprefix(site.module))
        call = trace.call(site.module)
        if call is None:
            what = "never fires" if site.module in modules else "does not exist"
            renamed = "" if site.module in modules else ", or give them this model's names with masks.renamed"
            raise SiteError(
                f"{site.name}: the module {what} in this {type(trace.model).__name__}; "
                f"take the model that the sites are of{renamed}"
            )
        leaves = {leaf.index: leaf for leaf in (call.inputs if site.side == "input" else call.outputs)}
        leaf = leaves.get(site.leaf or 0)
        if leaf is None or site.axis >= len(leaf.shape) or leaf.shape[site.axis] != site.units * site.block:
            got = leaf.shape if leaf else "no such tensor"
            raise SiteError(
                f"{site.name}: expected {site.units * site.block} positions on axis {site.axis}, got {got}; "
                "take the model that the sites are of"
            )
        views = samples_on_axis_0(trace, call, leaf) == "views"
        found.append(replace(site, within=call.within, views=views))
    return tuple(found)


def _given_axis(module: str, axis: Axis | None) -> int | None:
    if isinstance(axis, Mapping):
        return next((value for glob, value in axis.items() if _glob_pattern(str(glob)).fullmatch(module)), None)
    return axis


def _glob_pattern(glob: str) -> re.Pattern[str]:
    tokens = re.findall(r"\*\*\.|\*\*|\*|\?|\[!?[^\]]+\]|.", glob)
    spelled = {"**.": r"(?:.*\.)?", "**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    parts = (
        spelled.get(token) or ("[" + token[1:].replace("!", "^", 1) if len(token) > 1 else re.escape(token))
        for token in tokens
    )
    try:
        return re.compile("".join(parts))
    except re.error as error:
        raise SiteError(f"{glob!r} is not a glob: {error}") from error


def _no_match(glob: str, names: Iterable[str]) -> str:
    hint = ""
    if "**" not in glob and any(_glob_pattern(glob.replace("*", "**")).fullmatch(name) for name in names):
        hint = f"; `*` stays within one part of a dotted name, did you mean {glob.replace('*', '**')!r}?"
    shown = ", ".join(list(names)[:6])
    return f"no module name matches {glob!r}{hint} (names begin {shown}, …)"
