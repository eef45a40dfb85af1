"""Layers that gates fold into: which lie before and behind a site, and what a gate does to their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .gating import positions
from .sites import Site
from .tracing import Call, Trace, has_weights, layer_axis


@dataclass(frozen=True)
class Neighbour:
    """The layer that gates of a site could fold into.

    direct: the site is what that layer puts out, or takes in. at_random: between the two lies something that acts
    otherwise in training, such as dropout.
    """

    layer: str
    direct: bool
    at_random: bool = False


def producers(seen: Trace, sites: Sequence[Site]) -> dict[str, Neighbour]:
    """{site: the layer that its gates could fold into}, as far as calls of modules show; sites without are not in.

    Functions may use a layer's output unseen, or change it in place: that is for the caller to try.
    """
    times = Counter(call.name for call in seen.calls)
    taken = {site.module for site in sites if site.side == "output"}  # their tensors have gates of their own
    found = {}
    for site in sites:
        call = seen.call(site.module)
        assert call is not None  # `find` has seen it
        if site.side == "input":
            if _takes_units(call, site):
                found[site.name] = Neighbour(site.module, True)
            continue
        chain = list(_back(seen, site, call, times, taken))
        if chain and _foldable(chain[-1], site) and not _used_by_others(seen, chain):
            between = [each.module for each in chain[:-1] if not seen.children[seen.first[each.name]]]
            at_random = any(map(_at_random, between))
            found[site.name] = Neighbour(chain[-1].name, not between, at_random)
    return found


def consumers(seen: Trace, sites: Sequence[Site]) -> dict[str, Neighbour]:
    """{site on an output: the one layer that takes it in}, at once or behind layers without parameters."""
    times = Counter(call.name for call in seen.calls)
    taken = {site.module for site in sites}
    found = {}
    for site in sites:
        call = seen.call(site.module)
        assert call is not None
        if site.side == "input" or times[site.module] > 1:
            continue
        serial = next(leaf.serial for leaf in call.outputs if leaf.index == (site.leaf or 0))
        at_random, place = False, seen.first[site.module]
        while True:
            inside = {id(each) for each in seen.inside(call)}
            later = [
                (at, each)
                for at, each in enumerate(seen.calls)
                if at > place and id(each) not in inside and serial in [x.serial for x in each.inputs]
            ]
            leaves = [(at, each) for at, each in later if not seen.children[at]]
            if not leaves or times[leaves[0][1].name] > 1:
                break
            place, call = leaves[0]
            if len(leaves) > 1 and serial not in [x.serial for x in call.outputs]:  # as an identity puts it out again
                break
            if _takes_units(call, site) and not {each.name for _, each in later} & taken:
                found[site.name] = Neighbour(call.name, False, at_random)
            passes = len(call.inputs) == len(call.outputs) == 1 and not any(True for _ in call.module.parameters())
            if not passes or call.name in taken or call.inputs[0].shape != call.outputs[0].shape:
                break
            at_random |= _at_random(call.module)
            serial = call.outputs[0].serial
    return found


def _at_random(module: nn.Module) -> bool:
    """Dropout, unless it drops nothing."""
    return "Drop" in type(module).__name__ and bool(getattr(module, "p", getattr(module, "drop_prob", 1)))


def _back(seen: Trace, site: Site, call: Call, times: Counter[str], taken: set[str]) -> Iterator[Call]:
    """The calls that made a site's tensor, last first, up to a foldable layer or to what cannot be passed."""
    leaf = next(leaf for leaf in call.outputs if leaf.index == (site.leaf or 0))
    serial, size = leaf.serial, (len(leaf.shape), leaf.shape[site.axis])
    while True:
        yield call
        if _foldable(call, site):
            return
        if not seen.children[seen.first[call.name]]:  # not a container, whose output something within has made
            if len(call.inputs) != 1 or any(True for _ in call.module.parameters()):
                return
            serial = call.inputs[0].serial
        makers = [each for each in seen.calls if each.done < call.done and serial in [x.serial for x in each.outputs]]
        if not makers or times[site.module] > 1:
            return
        call = max(makers, key=lambda each: each.done)
        shape = next(x.shape for x in call.outputs if x.serial == serial)
        if times[call.name] > 1 or call.name in taken or len(shape) != size[0] or shape[site.axis] != size[1]:
            return


def _foldable(call: Call, site: Site) -> bool:
    return call.bare and bool(call.outputs) and _has_units(call.module, site.axis, len(call.outputs[0].shape))


def _takes_units(call: Call, site: Site) -> bool:
    mixes = has_weights(call.module) and not isinstance(call.module, _ConvTransposeNd)
    return mixes and _has_units(call.module, site.axis, len(call.inputs[0].shape))


def _has_units(layer: nn.Module, axis: int, ndim: int) -> bool:
    """Whether a layer has, as its own, a weight that scales its units, and these on that axis."""
    own = layer._parameters.get("weight", layer._buffers.get("weight"))  # no parametrisation, which would undo a change
    return isinstance(own, Tensor) and (own.dim() == 1 or has_weights(layer)) and layer_axis(layer, ndim) == axis


def _used_by_others(seen: Trace, chain: Sequence[Call]) -> bool:
    """Whether a call outside the chain takes a tensor that a fold into its last call changes, before the site does."""
    places = [seen.first[call.name] for call in chain]
    around = {place for each in places for place in _parents(seen, each)}
    site, inside = places[0], {id(call) for call in seen.inside(chain[0])}
    passed = {leaf.serial for call in chain for leaf in call.outputs}
    gated = {leaf.serial for leaf in chain[0].outputs}
    for place, call in enumerate(seen.calls):
        serials = passed & {leaf.serial for leaf in call.inputs}
        if place <= places[-1] or place in places or place in around or not serials:
            continue
        if place < site or id(call) in inside or not serials <= gated:
            return True
    return False


def _parents(seen: Trace, place: int) -> Iterator[int]:
    parent = seen.calls[place].parent
    while parent is not None:
        yield parent
        parent = seen.calls[parent].parent


# --- what a gate does to weights -------------------------------------------------------------------------------------


def scale_rows(layer: nn.Module, site: Site, g: Tensor, closed: Tensor | None) -> None:
    """Makes a layer put out g·y + (1 − g)·c where it put out y, in place: new weight and bias, none shared."""
    weight = own(layer, "weight")
    g, shift = _factors(site, g, closed, weight)
    bias = getattr(layer, "bias", None)
    if weight.dim() == 1 or not isinstance(layer, _ConvTransposeNd):
        rows = g.reshape(-1, *[1] * (weight.dim() - 1))
    else:  # (in, out / groups, ...)
        rows = g.reshape(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1)
        rows = rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    put(layer, "weight", weight * rows)
    if bias is not None:
        put(layer, "bias", bias * g if shift is None else bias * g + shift)
    elif shift is not None:
        put(layer, "bias", shift)


def scale_columns(layer: nn.Module, site: Site, g: Tensor, closed: Tensor | None) -> None:
    """Makes a convolution or linear layer take in g·x + (1 − g)·c in place of x, in place.

    With c, exact for convolutions without zero padding only.
    """
    weight = own(layer, "weight")
    g, shift = _factors(site, g, closed, weight)
    put(layer, "weight", weight * _columns(layer, g))
    if shift is not None:
        change = (weight.double() * _columns(layer, shift.double())).flatten(1).sum(1).to(weight.dtype)
        bias = getattr(layer, "bias", None)
        put(layer, "bias", change if bias is None else bias + change)


def _columns(layer: nn.Module, x: Tensor) -> Tensor:
    """(positions of the input,) as it multiplies a weight."""
    weight = own(layer, "weight")
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    rows = x.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)  # (out, in / groups)
    return rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


def _factors(site: Site, g: Tensor, closed: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """g and (1 − g)·c for each position on the site's axis; None where that is zero everywhere."""
    spread = positions(g[None].to(like), site)[0]
    if closed is None:
        return spread, None
    return spread, (1 - spread) * positions(closed[None].to(like), site)[0]


def own(layer: nn.Module, name: str) -> Tensor:
    tensor = getattr(layer, name)
    assert isinstance(tensor, Tensor)
    return tensor


def put(layer: nn.Module, name: str, value: Tensor) -> None:
    """A tensor of the layer's own in the place of one that other layers may share."""
    before = layer._parameters.get(name)
    if name in layer._buffers:
        layer._buffers[name] = value
    else:
        learns = layer.weight.requires_grad if before is None else before.requires_grad
        setattr(layer, name, nn.Parameter(value, bool(learns)))
