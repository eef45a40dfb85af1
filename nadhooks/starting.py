"""From where it is learnt what closed units put out: their mean, or where nothing would lead on from that, beside it.

A unit's mean before its ReLU is below zero as a rule. The ReLU stops that value, and every gradient on the way back:
the value cannot move, and the gate, once it is closed, cannot open again.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batching import pick
from .gating import by_unit
from .nesting import leaves_of
from .sites import Site
from .teaching import Forward

SAMPLES, TOGETHER = 64, 16  # that are looked at, and as many of them in a pass


def beside_means(forward: Forward, inputs: Any, samples: int) -> dict[str, Tensor]:
    """{site: (units,)}: how far beside the unit's mean to start, 0 where no value is stopped."""
    forward = replace(forward, autocast=None)  # or what is small would be 0
    sums, counts = defaultdict[str, Any](int), defaultdict[str, Any](int)
    for places in torch.arange(samples).split(TOGETHER):
        stopped = False
        for name, (value, slope) in _slopes(forward, pick(inputs, places), len(places)).items():
            live = (slope != 0).flatten(1).sum(1)
            beside = _beside(value, slope)
            sums[name] += live * beside
            counts[name] += live
            stopped |= bool(beside.any())
        if not stopped:  # as behind the last layer of a block; others would show the same
            break
    return {name: total / counts[name].clamp(min=1) for name, total in sums.items()}


def _beside(value: Tensor, slope: Tensor) -> Tensor:
    """(units, samples, positions) values and the gradients that came back to them -> (units,), from mean to start.

    Positions where no unit of any sample has a gradient are left out: nobody reads them, as a ViT's tokens beside the
    one for the class. Values with a gradient are live, and `low` to `high` is where they lie. Of all that is below a
    ReLU makes one value, that of `low`, so that the mean of `passed` stands for the unit. Where little of it is live
    that is so close to `low` that gradients are stopped again: the more is outside, the nearer the start is to the mean
    of what is live. Values between that have no gradient say nothing: another is larger in a pooling window.
    """
    average, live = value.flatten(1).mean(1), slope != 0
    read = live.flatten(0, 1).any(0)
    if not read.any():
        return torch.zeros_like(average)
    value, live = value[:, :, read].flatten(1), live[:, :, read].flatten(1)
    count = live.sum(1)
    low, high = value.where(live, torch.inf).amin(1), value.where(live, -torch.inf).amax(1)
    passed = value.clamp(low[:, None], high[:, None])
    outside = (passed != value).float().mean(1)
    mean, kept = passed.mean(1), value.where(live, 0).sum(1) / count.clamp(min=1)
    start = mean + outside * (kept - mean)
    return (start - average).where((count > 0) & (outside > 0), 0)


def _slopes(forward: Forward, inputs: Any, samples: int) -> dict[str, tuple[Tensor, ...]]:
    """{site: values and gradients, (units, samples, positions) each} of the open network, where gradients come to.

    The gradient of a random weighting of all outputs: what is exactly 0 is so for each of them.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    passed: list[bool] = []

    def see(site: Site, x: Tensor) -> None:
        def units(tensor: Tensor) -> Tensor:
            wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
            return by_unit(wide, site, samples).movedim(1, 0)

        passed.append(x.requires_grad)
        if x.requires_grad:
            value = x.detach().clone() if site.name in forward.overwritten else x.detach()
            x.register_hook(lambda gradient: found[site.name].append((units(value), units(gradient))))

    gates = {name: torch.ones_like(x[:1]).requires_grad_() for name, x in forward.gates.logits.items()}
    with forward.gates.apply(gates):
        outputs = forward(inputs, samples, see).outputs
        shown = [x for x in leaves_of(outputs) if isinstance(x, Tensor) and x.requires_grad]
        if not (shown and all(passed)):  # learning will say what to do about it
            return {}
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(x.shape, generator=generator).to(x) for x in shown]
        with forward.way_back():
            torch.autograd.grad(shown, [*gates.values()], weights, allow_unused=True)
    return {name: tuple(torch.cat(side, 2) for side in zip(*parts, strict=True)) for name, parts in found.items()}
