from __future__ import annotations

import copy
import pickle

import networkx as nx
import pytest
import torch

from nadhooks.errors import MaskFileError, NadhooksError, SiteError, TaskError
from nadhooks.gating import Closed
from nadhooks.masks import Masks, merge
from nadhooks.sites import Site
from nadhooks.tasks import Tasks

SITES = (Site("a", 1, 4, "a"), Site("b@input", 2, 2, "b", "input", None, 8))


def wiring() -> nx.DiGraph:
    return nx.freeze(nx.DiGraph([("input", "a"), ("a", "b@input"), ("b@input", "output")]))


def masks(a: list[list[float]], b: list[list[float]], **more: object) -> Masks:
    values = {"a": torch.tensor(a), "b@input": torch.tensor(b)}
    return Masks(SITES, values, Tasks.of({index: f"t{index}" for index in range(len(a))}), wiring(), **more)  # type: ignore[arg-type]


THREE = masks([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], [[1, 0], [0, 0], [0, 0]])


def test_kept_is_the_share_of_units_above_a_half() -> None:
    torch.testing.assert_close(THREE.kept(), torch.tensor([3 / 6, 2 / 6, 0]))
    assert masks([[0.5, 0.6, 0.4, 1]], [[0, 0]]).kept().tolist() == pytest.approx([2 / 6])


def test_jaccard_is_the_mean_over_sites_and_empty_sets_are_equal() -> None:
    # a: {0,1} and {0,2} share one of three; b: {0} and {} share nothing; {} and {} are the same
    expected = [
        [1, (1 / 3 + 0) / 2, 0],
        [(1 / 3 + 0) / 2, 1, (0 + 1) / 2],
        [0, (0 + 1) / 2, 1],
    ]
    assert not THREE.jaccard().isnan().any()
    torch.testing.assert_close(THREE.jaccard(), torch.tensor(expected, dtype=torch.float64))


def test_jaccard_agrees_with_pairs_counted_one_by_one() -> None:
    random = torch.Generator().manual_seed(0)
    many = masks(torch.rand(7, 4, generator=random).tolist(), torch.rand(7, 2, generator=random).tolist())
    for i in range(7):
        for j in range(7):
            parts = []
            for site in SITES:
                a, b = (set((many[site.name][k] > 0.5).nonzero()[:, 0].tolist()) for k in (i, j))
                parts.append(len(a & b) / len(a | b) if a | b else 1.0)
            assert float(many.jaccard()[i, j]) == pytest.approx(sum(parts) / 2)


def test_hard_and_select_and_sets() -> None:
    soft = masks([[0.2, 0.8, 0.5, 0.51]], [[1, 0]])
    assert soft.hard()["a"].tolist() == [[0, 1, 0, 1]]
    assert soft.hard(0.1)["a"].tolist() == [[1, 1, 1, 1]]
    assert THREE & THREE.select(["t2", "t1", "t0"]) == THREE  # tasks meet by label, not by row
    with pytest.raises(TaskError, match="unknown task 0"):
        THREE.select(["t0", "t1"]) & THREE.select(["t1", "t2"])
    with pytest.raises(SiteError, match="closed units put out 'zero', got 'mean'"):
        THREE & masks(
            [[0, 0, 0, 0]], [[0, 0]], closed="mean", constants={"a": torch.zeros(4), "b@input": torch.zeros(2)}
        )
    chosen = THREE.select(["t1", 0])
    assert chosen.tasks == ("t1", "t0")
    assert chosen.labels == (1, 0)
    assert torch.equal(chosen["a"], THREE["a"][[1, 0]])
    assert THREE.select("t2").tasks == THREE.select(2).tasks == ("t2",)
    both, either, only = (op(THREE, THREE.select("t0"))["a"] for op in (Masks.__and__, Masks.__or__, Masks.__sub__))
    assert both.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert either.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert only.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_wrong_values_are_refused() -> None:
    with pytest.raises(SiteError, match=r"a: expected mask values in \[0, 1\]"):
        masks([[float("nan"), 0, 0, 0]], [[0, 0]])
    with pytest.raises(SiteError, match=r"a: expected a mask of shape \(1, 4\), got shape \(1, 3\)"):
        masks([[0, 0, 0]], [[0, 0]])
    with pytest.raises(SiteError, match="needs the units' constants"):
        masks([[0, 0, 0, 0]], [[0, 0]], closed="mean")
    with pytest.raises(SiteError, match="no site 'c': the sites are a, b@input"):
        THREE["c"]
    with pytest.raises(TaskError, match=r"unknown task 't9'"):
        THREE.select("t9")
    with pytest.raises(TaskError, match="at least one task"):
        THREE.select([])
    with pytest.raises(TaskError, match="every task name once, got 'x'"):
        Tasks.of({0: "x", 1: "x"})


def test_masks_are_read_only_and_copy() -> None:
    with pytest.raises(TypeError):
        THREE.values["a"] = torch.zeros(3, 4)  # type: ignore[index]
    with pytest.raises(AttributeError):
        THREE.closed = "mean"  # type: ignore[misc]
    assert copy.deepcopy(THREE) == pickle.loads(pickle.dumps(THREE)) == THREE


def test_names_that_cannot_be_printed_are_refused() -> None:
    for name in ("a\nb", "\x1b[31m", "x" * 1001, "\ud800", "\u202egnp.exe", "\ufffe"):
        with pytest.raises(TaskError, match="none of them control characters"):
            Tasks.of({0: name})
    assert Tasks.of({0: "Zwölf – 猫 🐈"}).names == ("Zwölf – 猫 🐈",)


def test_quality_goes_with_its_tasks_and_not_with_other_values() -> None:
    measured = THREE.replaced(quality={"recall": torch.tensor([0.1, 0.2, 0.3])})
    assert measured.select(["t2", "t0"]).quality["recall"].tolist() == pytest.approx([0.3, 0.1])
    assert not measured.hard().quality
    with pytest.raises(TaskError, match=r"expected recall of shape \(3,\), got \(2,\)"):
        THREE.replaced(quality={"recall": torch.zeros(2)})


def test_renamed_masks_fit_a_model_with_other_names() -> None:
    from_other = THREE.renamed({"b": "stages.1"})
    assert [site.name for site in from_other.sites] == ["a", "stages.1@input"]
    assert from_other.sites[1].module == "stages.1"
    assert set(from_other.wiring.edges) == {("input", "a"), ("a", "stages.1@input"), ("stages.1@input", "output")}
    assert torch.equal(from_other["stages.1@input"], THREE["b@input"])
    assert THREE.renamed(lambda name: f"module.{name}").sites[0].name == "module.a"
    with pytest.raises(SiteError, match="no site at module 'c': the sites are a, b@input"):
        THREE.renamed({"c": "d"})
    with pytest.raises(SiteError, match="two sites would have one name"):
        masks([[0, 0, 0, 0]], [[0, 0]]).renamed({"a": "b@input", "b": "b"})


def optimal(number: int, first: float = 0) -> Masks:
    """The masks of THREE's first tasks, with constants that count upwards."""
    some = THREE.select(list(range(number)))
    constants = {"a": first + torch.arange(4.0 * number).reshape(number, 4), "b@input": torch.ones(number, 2)}
    return Masks(some.sites, some.values, some.task_rows, some.wiring, "optimal", constants)


def test_constants_of_a_tasks_own_go_where_the_task_goes() -> None:
    three = optimal(3)
    assert three.select(["t2", "t0"]).constants["a"].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert three.select("t1").closed == "optimal"
    assert merge([three.select([0]), three.select([1, 2])]) == three
    assert (three & optimal(3, 100)).constants["a"].equal(three.constants["a"])
    assert three != optimal(3, 100)
    assert three.renamed({"a": "c"}).constants["c"].equal(three.constants["a"])
    assert pickle.loads(pickle.dumps(three)) == copy.deepcopy(three) == three
    with pytest.raises(SiteError, match=r"a: closed='optimal' needs the units' constants, shape \(3, 4\)"):
        Masks(SITES, THREE.values, THREE.task_rows, THREE.wiring, "optimal", {"a": torch.zeros(4)})
    with pytest.raises(SiteError, match="closed: expected 'zero' or 'mean' or 'optimal', got 'max'"):
        Masks(SITES, THREE.values, THREE.task_rows, THREE.wiring, "max")  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="put out 'optimal', got 'zero'"):
        three & THREE


@pytest.mark.parametrize("closed", ["zero", "mean", "optimal"])
def test_what_closed_units_put_out_has_a_row_for_each_task(closed: Closed) -> None:
    means = {"a": torch.arange(4.0), "b@input": torch.zeros(2)}
    constants = {"zero": {}, "mean": means, "optimal": optimal(3).constants}[closed]
    three = Masks(SITES, THREE.values, THREE.task_rows, THREE.wiring, closed, constants)
    expected = {"zero": None, "mean": [[0, 1, 2, 3]] * 3, "optimal": torch.arange(12).reshape(3, 4).tolist()}[closed]
    found = three.closed_values("a")
    assert (found if found is None else found.tolist()) == expected


def test_merged_masks_have_all_tasks_and_what_their_origins_share() -> None:
    one = THREE.select(["t0"]).replaced(provenance={"model": "m", "seed": 1}, quality={"auc": torch.tensor([0.9])})
    two = THREE.select(["t2", "t1"]).replaced(provenance={"model": "m", "seed": 2}, quality={"auc": torch.ones(2)})
    both = merge([one, two])
    assert both.labels == (0, 2, 1)
    assert both.select([0, 1, 2]) == THREE
    assert both.provenance == {"model": "m", "merged": [{"seed": 1}, {"seed": 2}]}
    assert both.quality["auc"].tolist() == pytest.approx([0.9, 1, 1])
    assert "merged" not in merge([one, one.replaced(tasks=Tasks.of({7: "x"}))]).provenance
    with pytest.raises(TaskError, match="every task label once, got 0"):
        merge([one, THREE])
    with pytest.raises(SiteError, match="closed units"):
        merge(
            [one, masks([[0] * 4], [[0] * 2], closed="mean", constants={"a": torch.ones(4), "b@input": torch.ones(2)})]
        )
    with pytest.raises(TaskError, match="at least one"):
        merge([])


def test_agreement_is_jaccard_site_by_site_and_task_by_task() -> None:
    other = masks([[1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], [[0, 1], [0, 0], [1, 1]])
    found = THREE.agreement(other.select([2, 1, 0]))  # tasks meet by label
    assert found["a"].tolist() == [0.5, 1, 1]
    assert found["b@input"].tolist() == [0, 1, 0]


def test_agreement_of_two_tasks_says_how_these_are_compared() -> None:
    with pytest.raises(TaskError, match=r"task by task: unknown task 0: .*overlap_curve\(masks.select\(\["):
        THREE.select(0).agreement(THREE.select(1))


def test_autocast_has_no_say_in_similarity() -> None:
    one = Masks((Site("a", 1, 3001, "a"),), {"a": torch.ones(2, 3001)}, Tasks.of(2), nx.DiGraph([("input", "a")]))
    with torch.autocast("cpu", torch.bfloat16):
        assert bool((one.jaccard() == 1).all())


def test_names_of_the_wirings_ends_are_no_names_of_sites() -> None:
    for name in ("input", "output"):
        with pytest.raises(SiteError, match=f"renamed: '{name}' is the name of an end of the wiring"):
            THREE.renamed({"a": name})


def test_a_fingerprint_does_not_outlive_the_names_that_it_is_of() -> None:
    known = THREE.replaced(provenance={"structure": "sha256:0", "model": "m"})
    assert known.renamed({"a": "c"}).provenance == {"model": "m"}


def test_sets_of_whole_numbers_and_shares_keep_the_shares() -> None:
    whole = THREE.replaced({name: value.long() for name, value in THREE.values.items()})
    soft = THREE.replaced({name: 0.75 * value for name, value in THREE.values.items()})
    truth = THREE.replaced({name: value.bool() for name, value in THREE.values.items()})
    for masks in (whole, truth):
        assert torch.equal((masks & soft)["a"], soft["a"])
        assert torch.equal((soft & masks)["a"], soft["a"])
        assert torch.equal((masks - soft)["a"], THREE["a"] * 0.25)


def test_other_things_than_masks_are_named() -> None:
    for wrong in (lambda: THREE & 3, lambda: merge([THREE, 3])):  # type: ignore[operator, list-item]
        with pytest.raises(NadhooksError, match=r"expected Masks, got int; nadhooks.load\(path\) reads a file"):
            wrong()
    with pytest.raises(MaskFileError, match="expected a path, got None"):
        THREE.save(None)  # type: ignore[arg-type]


def test_figures_of_other_tasks_and_masks_do_not_go_along() -> None:
    known = {"images": 360, "network": {"recall": 0.9}, "random": {"recall": 0.1}}
    measured = THREE.replaced(provenance={"quality": known, "model": "m"}, quality={"recall": torch.ones(3)})
    assert measured.select([0, 1]).provenance == {"quality": {"images": 360}, "model": "m"}
    for masks in (measured.hard(), measured & measured, measured.replaced(quality={})):
        assert masks.provenance == {"model": "m"}
