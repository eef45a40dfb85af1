"""What a gate does to a tensor: pure functions, without models and hooks."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .batching import few
from .default_device import made_on_cpu
from .errors import NadhooksError, SiteError, TaskError
from .sites import Site

Closed = Literal["zero", "mean", "optimal"]  # what a closed unit puts out
LARGE = 2**18  # numbers of a site, from which on passes over it cost more than what Python does


def gate(x: Tensor, g: Tensor, site: Site, closed: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
    """g·x + (1 − g)·c on the axis of a site's tensor x, exact at g = 1; c is zero or `closed`.

    x: floating-point, with the batch on axis 0. g, closed: (units,) or (1, units) for the whole batch, or (batch,
    units). Where axis 0 of x is a multiple of the batch, the positions of one sample lie together (windows, frames), or
    all samples of one view do (`site.views`). The result has x's dtype: a float32 gate must not promote an output under
    autocast. overwrite: into x itself, where c is zero. An x that is not finite stays so under a gate of 0, as 0·∞ is
    no number; `with_closed` replaces it.
    """
    g = _spread(g, x, site)  # (batch or 1, 1, …, positions, …, 1)
    if closed is None:
        return x.mul_(g) if overwrite else g * x
    c = _spread(closed, x, site)
    offset = c - g * c
    if not (g.requires_grad and torch.is_grad_enabled()):
        return torch.addcmul(offset, g, x)  # one pass over x; on the way back to g it would be one more
    if x.numel() < LARGE or torch.compiler.is_compiling():  # a compiler makes one pass of it by itself
        return (g * x).add_(offset)
    return cast(Tensor, _Affine.apply(g, x, offset))


class _Affine(torch.autograd.Function):
    """g·x + offset, one pass over x there, and on the way back one over x and two over the gradient.

    g, offset: of size 1 on the axes of x along which they are alike, and maybe on axis 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, offset: Tensor) -> Tensor:
        return torch.addcmul(offset, g, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        g, x, offset = inputs
        ctx.save_for_backward(g, x)
        ctx.save_for_forward(g, x)
        ctx.shape = offset.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        g, x = ctx.saved_tensors
        some, alike = few(x), g.shape[1:]
        parts = [
            ((a * b).sum_to_size(len(a), *alike), a.sum_to_size(len(a), *alike))
            for a, b in zip(grad.split(some), x.split(some), strict=True)
        ]
        to_g, to_offset = (torch.cat(part) for part in zip(*parts, strict=True))
        to_x = grad * g if ctx.needs_input_grad[1] else None
        return to_g.sum_to_size(g.shape), to_x, to_offset.sum_to_size(ctx.shape)

    @staticmethod
    def jvp(ctx: Any, dg: Tensor, dx: Tensor, d_offset: Tensor) -> Tensor:
        g, x = ctx.saved_tensors
        return dg * x + g * dx + d_offset


def with_closed(x: Tensor, units: Tensor, site: Site, closed: Tensor | None = None) -> Tensor:
    """x, and in place of these units (a (units,) boolean tensor) zero or `closed`, whatever they hold.

    closed: as for `gate`.
    """
    there = _spread(units, x, site, torch.bool)
    what = 0 if closed is None else _spread(closed, x, site)
    return torch.where(there, what, x)


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """y with the strides of x, where it differs from that on axes of size 1 alone.

    Nothing else is there, but matrix products choose their way by strides, and another way rounds otherwise: a sample's
    last bits would change with the gates of another.
    """
    strides = zip(x.shape, x.stride(), y.stride(), strict=True)
    if x.stride() == y.stride() or any(size > 1 and a != b for size, a, b in strides):
        return y
    return y.as_strided(y.shape, x.stride())


def _spread(rows: Tensor, x: Tensor, site: Site, dtype: torch.dtype | None = None) -> Tensor:
    """(units,) or (batch or 1, units) in the shape of x, of size 1 where all are alike."""
    rows = rows if rows.dim() > 1 else rows[None]
    if len(rows) not in (1, x.shape[0]):
        if x.shape[0] % len(rows):
            raise TaskError(
                f"expected {len(rows)} samples on axis 0, one per label, got a tensor of shape {tuple(x.shape)}; "
                "pass one label per sample, or one task for the whole batch"
            )
        times = x.shape[0] // len(rows)
        rows = rows.repeat(times, 1) if site.views else rows.repeat_interleave(times, 0)
    rows = positions(rows.to(device=x.device, dtype=dtype or x.dtype), site)
    shape = [1] * x.dim()
    shape[0], shape[site.axis] = rows.shape
    return rows.reshape(shape)


def positions(rows: Tensor, site: Site) -> Tensor:
    """(n, units) -> (n, positions on the axis): what holds for a unit at each of its `site.block` positions."""
    if site.block == 1:
        return rows
    return rows.repeat(1, site.block) if site.alternating else rows.repeat_interleave(site.block, 1)


class Clip(torch.autograd.Function):
    """Clips to [0, 1]. A logit outside still gets the gradients that lead back, so that no gate is stuck."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (logits,), (grad,) = ctx.saved_tensors, grads
        outward = ((logits > 1) & (grad < 0)) | ((logits < 0) & (grad > 0))
        return grad.masked_fill(outward, 0)


@made_on_cpu
def chosen_units(units: object, site: Site) -> Tensor:
    """An index, indices or booleans as a (units,) boolean tensor."""
    wrong = f"{site.name}: expected units from 0 to {site.units - 1}, or {site.units} booleans, got {units!r}"
    shut = torch.zeros(site.units, dtype=torch.bool)
    try:
        if not isinstance(units, (Tensor, str)) and hasattr(units, "__iter__"):
            units = [x if isinstance(x, bool) else operator.index(x) for x in units]
        chosen = units.cpu() if isinstance(units, Tensor) else torch.tensor(units)
        if chosen.dtype == torch.bool and chosen.shape == shut.shape:
            return chosen
        whole = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
        if chosen.numel() and not (whole and -site.units <= int(chosen.min()) <= int(chosen.max()) < site.units):
            raise SiteError(wrong)
        shut[chosen.long()] = True
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SiteError(wrong) from error
    return shut


def by_unit(x: Tensor, site: Site, samples: int) -> Tensor:
    """Any tensor of a site -> (samples, units, positions), a view where that can be."""
    axis = site.axis
    if x.shape[0] != samples:  # windows, frames or views of a sample on axis 0
        parts = x.shape[0] // samples
        shape = (parts, samples) if site.views else (samples, parts)
        x = x.reshape(*shape, *x.shape[1:]).movedim(0 if not site.views else 1, 0)
        axis += 1
    x = x.movedim(axis, 1)
    if site.block > 1:
        inner = (site.block, site.units) if site.alternating else (site.units, site.block)
        x = x.unflatten(1, inner)
        x = x.transpose(1, 2) if site.alternating else x
    return x.flatten(2) if x.dim() > 2 else x[:, :, None]


def from_units(x: Tensor, site: Site, shape: Sequence[int]) -> Tensor:
    """The inverse of `by_unit`, where neither parts of samples nor alternating units are in the way.

    x: (samples, units, positions). shape: of one sample of the site's tensor.
    """
    others = [size for axis, size in enumerate(shape, 1) if axis != site.axis]
    return x.reshape(len(x), site.units * site.block, *others).movedim(1, site.axis)


class UnitMeans:
    """Each unit's mean over all samples and positions that were added, and if asked for its standard deviation."""

    def __init__(self, sites: Iterable[Site], deviations: bool = False):
        self.sums = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in sites}
        self.squares = {name: x.clone() for name, x in self.sums.items()} if deviations else {}
        self.counts = dict.fromkeys(self.sums, 0)

    def add(self, site: Site, x: Tensor) -> None:
        self.sums[site.name] += unit_sums(x, site).cpu()
        if self.squares:
            wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))  # squares of 256 are infinite in float16
            self.squares[site.name] += unit_sums(wide.square(), site).cpu()
        self.counts[site.name] += x.numel() // site.units

    def means(self) -> dict[str, Tensor]:
        """{site: (units,)} in float64. Raises NadhooksError if nothing was added."""
        if not all(self.counts.values()):
            raise NadhooksError("expected at least one batch to take the units' means from, got none")
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def deviations(self) -> dict[str, Tensor]:
        """{site: (units,)} in float64, where they were asked for."""
        means = self.means()
        return {
            name: (total / self.counts[name] - means[name].square()).clamp(min=0).sqrt()
            for name, total in self.squares.items()
        }


def unit_sums(x: Tensor, site: Site) -> Tensor:
    """Sum over everything but a site's units: any tensor of the site -> (units,) float64."""
    others = [axis for axis in range(x.dim()) if axis != site.axis]
    by_position = x.detach().sum(others, dtype=torch.float64) if others else x.detach().double()  # (units · block,)
    grid = by_position.reshape(site.block, site.units).T if site.alternating else by_position.reshape(site.units, -1)
    return grid.sum(1)
