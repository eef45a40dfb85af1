from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nadhooks
from nadhooks import methods
from nadhooks.budgets import Budget, Selection
from nadhooks.errors import NadhooksError
from nadhooks.sites import Site

from .nets import fair_line, images, labelled

SCORES = {
    "a": torch.tensor([[9.0, 1.0, 8.0, 2.0], [1.0, 2.0, 3.0, 4.0]]),
    "b": torch.tensor([[7.0, 3.0], [9.0, 8.0]]),
}


def sites() -> list[Site]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    with nadhooks.attach(model, ["0", "1"], example=torch.zeros(1, 3)) as gates:
        first, second = gates.sites
    return [Site(**{**vars(first), "name": "a"}), Site(**{**vars(second), "name": "b"})]


def kept(selection: Selection, left: float = 0.0) -> dict[str, list[list[float]]]:
    return {name: x.tolist() for name, x in selection.best(SCORES, left).items()}


def test_a_share_or_a_number_over_the_network_keeps_the_best_wherever_they_are() -> None:
    expected = {"a": [[1, 0, 1, 0], [0, 0, 0, 1]], "b": [[1, 0], [1, 1]]}
    assert kept(Selection(Budget(0.5), sites(), {})) == expected
    assert kept(Selection(Budget(3), sites(), {})) == expected
    assert kept(Selection(Budget(1.0), sites(), {})) == {"a": [[1] * 4] * 2, "b": [[1] * 2] * 2}
    assert kept(Selection(Budget(1), sites(), {})) == {"a": [[1, 0, 0, 0], [0] * 4], "b": [[0, 0], [1, 0]]}


def test_a_share_or_a_number_of_every_site() -> None:
    assert kept(Selection(Budget(0.5, over="site"), sites(), {})) == {
        "a": [[1, 0, 1, 0], [0, 0, 1, 1]],
        "b": [[1, 0], [1, 0]],
    }
    # a site of fewer units is kept whole
    assert kept(Selection(Budget(3, over="site"), sites(), {})) == {
        "a": [[1, 0, 1, 1], [0, 1, 1, 1]],
        "b": [[1, 1], [1, 1]],
    }


def test_of_a_group_a_unit_stays_however_small_the_budget() -> None:
    hard = Selection(Budget(0.001, over="site"), sites(), {}).best(SCORES)
    assert {name: x.sum(1).tolist() for name, x in hard.items()} == {"a": [1, 1], "b": [1, 1]}
    dear = Selection(Budget(0.001, by="parameters"), sites(), {"a": 10, "b": 10}).best(SCORES)
    assert torch.cat(list(dear.values()), 1).sum(1).tolist() == [1, 1]


def test_costs_decide_how_many_units_a_share_pays_for() -> None:
    selection = Selection(Budget(0.5, by="flops"), sites(), {"a": 1.0, "b": 10.0})  # of 24 there are 12 to spend
    # the first task: 1 + 1 + 10 spends all; the second: 10, and the next 10 are too much
    assert kept(selection) == {"a": [[1, 0, 1, 0], [0, 0, 0, 0]], "b": [[1, 0], [1, 0]]}


def test_what_is_left_open_shrinks_to_the_target() -> None:
    selection = Selection(Budget(0.5), sites(), {})
    for left, units in ((1.0, 6), (0.67, 5), (0.34, 4), (0.0, 3)):
        assert torch.cat(list(selection.best(SCORES, left).values()), 1).sum(1).tolist() == [units, units]


def test_tasks_can_have_shares_of_their_own() -> None:
    selection = Selection(Budget(0.5), sites(), {}).at(torch.tensor([1 / 6, 5 / 6]))
    sums = torch.cat(list(selection.best(SCORES).values()), 1).sum(1)
    assert sums.tolist() == [1, 5]
    swapped = selection.rows(torch.tensor([1, 0]))
    assert torch.cat(list(swapped.best(SCORES).values()), 1).sum(1).tolist() == [5, 1]
    same = Selection(Budget(0.5), sites(), {}).rows(torch.tensor([1]))
    assert {name: x.tolist() for name, x in same.best({n: x[1:] for n, x in SCORES.items()}).items()} == {
        "a": [[0, 0, 0, 1]],
        "b": [[1, 1]],
    }
    by_site = Selection(Budget(0.5, over="site"), sites(), {}).at(torch.tensor([0.25, 1.0]))
    assert {name: x.sum(1).tolist() for name, x in by_site.best(SCORES).items()} == {"a": [1, 4], "b": [1, 2]}


def test_of_units_with_equal_scores_the_first_are_kept() -> None:
    scores = {
        "a": torch.tensor([[0.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]),
        "b": torch.tensor([[1.0, 0.0], [2.0, 3.0]]),
    }
    hard = Selection(Budget(3), sites(), {}).best(scores)
    assert {name: x.tolist() for name, x in hard.items()} == {"a": [[1, 1, 0, 0], [1, 1, 0, 0]], "b": [[1, 0], [0, 1]]}
    hard = Selection(Budget(0.5), sites(), {}).at(torch.tensor([2 / 6, 4 / 6])).best(scores)
    assert {name: x.tolist() for name, x in hard.items()} == {"a": [[0, 1, 0, 0], [1, 1, 1, 0]], "b": [[1, 0], [0, 1]]}


def test_a_floor_leaves_each_site_its_best_units_first() -> None:
    scores = {"a": torch.tensor([[9.0, 8.0, 7.0, 6.0]] * 2), "b": torch.tensor([[1.0, 2.0], [0.0, 6.5]])}

    def kept(keep: float | int, floor: float, **more: Any) -> dict[str, list[list[float]]]:
        budget = Budget(keep, by=more.get("by", "units"))
        found = Selection(budget, sites(), more.get("costs", {}), floor).best(scores, more.get("left", 0.0))
        return {name: x.tolist() for name, x in found.items()}

    assert kept(0.5, 0.0) == {"a": [[1, 1, 1, 0]] * 2, "b": [[0, 0], [0, 0]]}
    assert kept(0.5, 0.75) == {"a": [[1, 1, 0, 0]] * 2, "b": [[0, 1], [0, 1]]}
    assert kept(0.5, 1.0, left=1 / 3) == {"a": [[1, 1, 1, 0]] * 2, "b": [[0, 1], [0, 1]]}
    assert kept(0.5, 0.25) == kept(0.5, 0.0)  # less than half a unit of either site
    assert kept(0.4, 1.0) == {"a": [[1, 1, 0, 0]] * 2, "b": [[0, 0], [0, 0]]}  # rounded up in both: the best of them
    assert kept(0.75, 0.5, by="flops", costs={"a": 1.0, "b": 2.0}) == {"a": [[1, 1, 1, 1]] * 2, "b": [[0, 1], [0, 1]]}
    # each task has a share of its own, and so a floor
    selection = Selection(Budget(0.5), sites(), {}, 1.0).at(torch.tensor([0.5, 1.0]))
    assert {name: x.sum(1).tolist() for name, x in selection.best(scores).items()} == {"a": [2, 4], "b": [1, 2]}


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -1, True, False, "x", "0.5", None, float("nan"), float("inf")])
def test_what_is_no_budget_is_refused(keep: Any) -> None:
    with pytest.raises(NadhooksError, match=r"keep: expected a share above 0 and at most 1 .* or a number of units"):
        Budget(keep)


def test_budgets_that_make_no_sense_are_refused() -> None:
    with pytest.raises(NadhooksError, match="over to be 'network' or 'site', got 'layer'"):
        Budget(0.5, over="layer")  # type: ignore[arg-type]
    with pytest.raises(NadhooksError, match="by to be 'units', 'parameters' or 'flops', got 'bytes'"):
        Budget(0.5, by="bytes")  # type: ignore[arg-type]
    with pytest.raises(NadhooksError, match="expected a share of the parameters, got the whole number 5"):
        Budget(5, by="parameters")
    with pytest.raises(NadhooksError, match="at most the network's 6 units, got 7"):
        Selection(Budget(7), sites(), {})
    with pytest.raises(NadhooksError, match="at most the largest site's 4 units, got 5"):
        Selection(Budget(5, over="site"), sites(), {})
    with pytest.raises(NadhooksError, match="there are no parameters behind any site"):
        Selection(Budget(0.5, by="parameters"), sites(), {"a": 0, "b": 0})


def loader() -> list[tuple[Tensor, Tensor]]:
    return labelled(fair_line(), images(64))


def learnt(keep: Any) -> nadhooks.Masks:
    return nadhooks.learn(fair_line(), loader(), ["act1", "act2"], method=methods.contrastive(steps=8), keep=keep)


# Line: (2, 6, 6) -> act1 (4 units) -> act2 (5 units)
PARAMETERS = {"act1": 2 * 4 * 9 + 4, "act2": 4 * 5 * 9 + 5}
FLOPS = {"act1": 2 * (2 * 9) * 4 * 36, "act2": 2 * (4 * 9) * 5 * 36}  # a multiplication and an addition for each weight
UNITS = {"act1": 4, "act2": 5}


@pytest.mark.parametrize(("by", "costs"), [("parameters", PARAMETERS), ("flops", FLOPS)])
@pytest.mark.parametrize("keep", [0.3, 0.62, 1.0])
def test_what_is_kept_costs_no_more_than_the_budget_and_hardly_less(
    by: Any, costs: dict[str, int], keep: float
) -> None:
    masks = learnt(Budget(keep, by=by))
    budget = keep * sum(costs.values())
    one = {site: costs[site] / UNITS[site] for site in costs}
    for row in range(3):
        paid = sum(float(masks[site][row].sum()) * one[site] for site in costs)
        assert paid <= budget * (1 + 1e-9)
        assert paid > budget - max(one.values()) or keep == 1
    assert masks.provenance["keep"] == {"keep": keep, "over": "network", "by": by}


def test_costs_are_those_counted_by_hand() -> None:
    seen: dict[str, dict[str, float]] = {}
    original = Selection.__init__

    def spy(self: Selection, budget: Budget, sites: Any, costs: dict[str, float], floor: float) -> None:
        seen[budget.by] = dict(costs)
        original(self, budget, sites, costs, floor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selection, "__init__", spy)
        learnt(Budget(0.5, by="parameters"))
        learnt(Budget(0.5, by="flops"))
    assert seen["parameters"] == {site: PARAMETERS[site] / UNITS[site] for site in UNITS}
    assert seen["flops"] == {site: FLOPS[site] / UNITS[site] for site in UNITS}


def test_learning_takes_budgets_of_every_kind() -> None:
    assert learnt(4).kept().tolist() == pytest.approx([4 / 9] * 3)
    assert learnt(4).provenance["keep"] == 4
    by_site = learnt(Budget(2, over="site"))
    assert all(by_site[site].sum(1).tolist() == [2, 2, 2] for site in UNITS)
    shares = learnt(Budget(0.5, over="site"))
    assert shares["act1"].sum(1).tolist() == [2, 2, 2]
    for wrong in (10, Budget(6, over="site")):
        with pytest.raises(NadhooksError, match="keep: expected at most"):
            learnt(wrong)
    with pytest.raises(NadhooksError, match="keep: expected a share"):
        learnt("much")


def test_flops_are_counted_once_where_layers_overwrite_what_leaves_a_site() -> None:
    masks = nadhooks.learn(fair_line(), loader(), ["conv1", "act2"], method="random", keep=Budget(0.5, by="flops"))
    costs = {"conv1": FLOPS["act1"] / 4, "act2": FLOPS["act2"] / 5}
    for row in range(3):
        paid = sum(float(masks[site][row].sum()) * costs[site] for site in costs)
        assert 0.5 * sum(FLOPS.values()) - max(costs.values()) < paid <= 0.5 * sum(FLOPS.values())
