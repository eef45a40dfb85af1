"""How much a mask may keep: a share or a number of units, over the network or in each site, by units or by cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .errors import NadhooksError
from .sites import Site


@dataclass(frozen=True)
class Budget:
    """What `keep=` says in full: `learn(..., keep=Budget(0.3, over="site"))`.

    keep: a share, a float above 0 and at most 1, or a number of units, an int of at least 1.
    over: "network", the best units wherever they are (above a method's floor in each site), or "site", as much of
        every site.
    by: what the share is a share of: "units", or the "parameters" or "flops" behind them: what runs between a site and
        those before it, spread evenly over its units.
    """

    keep: float | int
    over: Literal["network", "site"] = "network"
    by: Literal["units", "parameters", "flops"] = "units"

    def __post_init__(self) -> None:
        if isinstance(self.keep, np.generic):
            object.__setattr__(self, "keep", self.keep.item())
        whole = isinstance(self.keep, int) and not isinstance(self.keep, bool)
        fits = (whole and self.keep >= 1) or (isinstance(self.keep, float) and 0 < self.keep <= 1)
        if not fits:
            raise NadhooksError(
                "keep: expected a share above 0 and at most 1 (a float) or a number of units (an int), "
                f"got {self.keep!r}"
            )
        if self.over not in ("network", "site"):
            raise NadhooksError(f"keep: expected over to be 'network' or 'site', got {self.over!r}")
        if self.by not in ("units", "parameters", "flops"):
            raise NadhooksError(f"keep: expected by to be 'units', 'parameters' or 'flops', got {self.by!r}")
        if whole and self.by != "units":
            raise NadhooksError(f"keep: expected a share of the {self.by}, got the whole number {self.keep}")

    @classmethod
    def of(cls, keep: Any) -> Budget:
        return keep if isinstance(keep, Budget) else cls(keep)

    def described(self) -> Any:
        """For a file: the number alone where the rest is as usual."""
        usual = (self.over, self.by) == ("network", "units")
        return self.keep if usual else {"keep": self.keep, "over": self.over, "by": self.by}


class Selection:
    """Picks the best units that a budget pays for.

    targets: (tasks or 1, groups) the share of each group's cost that may be kept, a group being the network or a site.
    """

    def __init__(self, budget: Budget, sites: Sequence[Site], costs: Mapping[str, float], floor: float = 0.0):
        """costs: {site: of one unit}, for budgets by parameters or FLOPs. floor: as a `Method` has it."""
        self.floor = floor
        self.units = {site.name: site.units for site in sites}
        names = list(self.units)
        self.groups = [names] if budget.over == "network" else [[name] for name in names]
        self.by_units = budget.by == "units"
        self.cost = {name: 1.0 if self.by_units else float(costs[name]) for name in names}
        if not any(self.cost.values()):
            raise NadhooksError(f"keep: there are no {budget.by} behind any site; budget by units")
        shares = [self._target(budget.keep, group) for group in self.groups]
        self.targets = torch.tensor([shares], dtype=torch.float64)

    def _target(self, keep: float | int, group: Sequence[str]) -> float:
        units = sum(self.units[name] for name in group)
        most = max(self.units.values()) if len(self.groups) > 1 else units
        if isinstance(keep, int) and keep > most:
            whose = "the largest site" if len(self.groups) > 1 else "the network"
            raise NadhooksError(f"keep: expected at most {whose}'s {most} units, got {keep}")
        return min(1.0, keep / units) if isinstance(keep, int) else keep

    def at(self, shares: Tensor) -> Selection:
        """The same with a share for each task, (tasks,)."""
        other = object.__new__(Selection)
        vars(other).update(vars(self), targets=shares.double().cpu()[:, None].expand(-1, len(self.groups)))
        return other

    def shares(self) -> Tensor:
        """(tasks or 1,) what each may keep, of several groups the one that may keep least."""
        return self.targets.amin(1)

    def rows(self, rows: Tensor) -> Selection:
        """The same for some tasks."""
        other = object.__new__(Selection)
        vars(other).update(vars(self), targets=self.targets[rows] if len(self.targets) > 1 else self.targets)
        return other

    def best(self, scores: Mapping[str, Tensor], left: float = 0.0) -> dict[str, Tensor]:
        """{site: (tasks, units)} scores -> hard masks of the highest within the budget, at least a unit of each group.

        left: what part of that which is to be closed is open still, from 1 (all) to 0 (the target).
        """
        found: dict[str, Tensor] = {}
        for group, target in zip(self.groups, self.targets.T, strict=True):  # target: (tasks or 1,)
            everything = torch.cat([scores[name].detach() for name in group], 1)  # (tasks, units of the group)
            share = (target + (1 - target) * left)[:, None].to(everything.device)  # (tasks or 1, 1)
            sizes = [self.units[name] for name in group]
            hard = self._affordable(everything, share, group)
            if self.floor and len(group) > 1:
                floors = (self.floor * share * share.new_tensor(sizes)).round().long()  # (tasks or 1, sites), 0 for few
                kept = torch.stack([part.sum(1) for part in hard.split(sizes, 1)], 1)
                if bool((kept < floors).any()):
                    hard = self._affordable(_with_floor(everything, floors, sizes), share, group)
            found |= dict(zip(group, hard.to(everything.dtype).split(sizes, 1), strict=True))
        return {name: found[name] for name in scores}

    def _affordable(self, scores: Tensor, share: Tensor, group: Sequence[str]) -> Tensor:
        """The best units that this share pays for, (tasks, units) bool; scores of the group's sites side by side."""
        if self.by_units:
            return _highest(scores, (share * scores.shape[1]).round().clamp(min=1).long())
        cost = torch.cat([torch.full((self.units[name],), self.cost[name]) for name in group]).double()
        order = scores.argsort(dim=1, descending=True, stable=True)
        within = cost.to(share.device)[order].cumsum(1) <= share * float(cost.sum()) * (1 + 1e-12)
        within[:, 0] = True
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, within.expand_as(order))


def _with_floor(scores: Tensor, floors: Tensor, sizes: Sequence[int]) -> Tensor:
    """Scores of sites side by side, in which each site's best units, (tasks or 1, sites), lead all the others."""
    leading = [
        _highest(part, number.clamp(min=1)) & (number > 0)
        for part, number in zip(scores.split(sizes, 1), floors.split(1, 1), strict=True)
    ]
    lead = scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True) + 1
    return torch.where(torch.cat(leading, 1), scores + lead, scores)


def _highest(scores: Tensor, number: Tensor) -> Tensor:
    """(rows, n) bool: each row's highest scores, so many of them, (rows or 1, 1); of equal ones the first.

    Without sorting whole rows, which takes several times as long.
    """
    differ = len(number) > 1
    best = scores.topk(int(number.max()), dim=1, sorted=differ).values
    least = best.gather(1, number - 1) if differ else best.amin(1, keepdim=True)
    above, equal = scores > least, scores == least
    return above | (equal & (equal.cumsum(1) <= number - above.sum(1, keepdim=True)))
