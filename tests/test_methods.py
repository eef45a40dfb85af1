from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nadhooks
from nadhooks import methods, objectives, sampling
from nadhooks.budgets import Budget
from nadhooks.errors import LearningError, NadhooksError, SiteError, TaskError
from nadhooks.gating import Closed
from nadhooks.learner import gradients_of
from nadhooks.masks import Masks
from nadhooks.methods.parts import Parted, whole

from .nets import Mlp, fair_line, images, labelled, seeded, sorted_by_label, vectors

SITES = ["act1", "act2"]
Loader = list[tuple[Tensor, Tensor]]


def line_loader() -> Loader:
    return labelled(fair_line(), images(64))


def mlp() -> Mlp:
    return seeded(Mlp, 4)


def mlp_loader(samples: int = 60) -> Loader:
    return labelled(mlp(), vectors(samples, seed=3))


def learnt(method: Any, data: Any = None, **more: Any) -> Masks:
    return nadhooks.learn(fair_line(), line_loader() if data is None else data, SITES, method=method, **more)


def same(a: Masks, b: Masks, atol: float = 1e-12) -> None:
    for label in b.labels:
        for site in b.values:
            torch.testing.assert_close(a.select(label)[site], b.select(label)[site], rtol=0, atol=atol)


def recording(method: methods.Method) -> tuple[methods.Method, list[dict[str, Tensor]]]:
    """The method, and the gradients that its update is shown."""
    seen: list[dict[str, Tensor]] = []

    def update(scores: methods.Table, gradients: methods.Table, step: methods.Step, state: methods.Table) -> None:
        seen.append({site: gradient.clone() for site, gradient in gradients.items()})
        method.update(scores, gradients, step, state)

    return replace(method, update=update), seen


def scored(method: methods.Method, model: Any, loader: Any, sites: Any, **more: Any) -> dict[str, Tensor]:
    """The scores that a method ends with."""
    found: dict[str, Tensor] = {}

    def estimator(scores: methods.Table, step: methods.Step) -> methods.Table:
        if step.final:
            found.update(scores)
        return method.estimator(scores, step)

    nadhooks.learn(model, loader, sites, method=replace(method, estimator=estimator), **more)
    return found


# --- mixed batches ---

ALL = [
    methods.nad(epochs=2, batch=4),
    methods.class_only(steps=6),
    methods.contrastive(steps=6),
    replace(methods.contrastive(steps=6), estimator=methods.hard_concrete()),
    methods.taylor(images=8),
    methods.activation(images=8),
    methods.routing(images=3, steps=3),
    methods.random(),
]


@pytest.mark.parametrize("method", ALL, ids=lambda method: f"{method.name}-{method.estimator.__qualname__[:6]}")
def test_tasks_together_get_what_each_gets_alone(method: methods.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    together = learnt(method)
    assert len({tuple(torch.cat([together[site][row] for site in SITES]).tolist()) for row in range(3)}) > 1
    same(learnt(method, tasks=[2, 0, 1]), together)
    same(learnt(method, sorted_by_label(line_loader())), together)
    same(learnt(method, cache=0), together)
    same(learnt(method, cache=50_000), together)
    for label in range(3):
        same(together, learnt(method, tasks=[label]))
    for samples in (8, 16):
        for module in (nadhooks.learner, nadhooks.faithfulness, sampling):
            monkeypatch.setattr(module, "SAMPLES_PER_PASS", samples)
        same(learnt(method), together)


@pytest.mark.parametrize(
    "method", [methods.nad(epochs=1, batch=64), methods.class_only(steps=2), methods.contrastive(steps=2)]
)
def test_gradients_of_tasks_together_are_those_of_each_alone(method: methods.Method) -> None:
    spied, together = recording(method)
    learnt(spied)
    for label in range(3):
        spied, alone = recording(method)
        learnt(spied, tasks=[label])
        for site in SITES:
            assert bool(alone[-1][site].any())
            torch.testing.assert_close(together[-1][site][label], alone[-1][site][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [methods.nad(epochs=2, batch=4), methods.contrastive(steps=5)])
def test_shuffling_loaders_give_tasks_the_same_together_and_alone(method: methods.Method) -> None:
    x, labels = (torch.cat(parts) for parts in zip(*line_loader(), strict=True))
    shuffling = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 9, shuffle=True)
    together = learnt(method, shuffling)
    same(learnt(method, shuffling, tasks=[1, 2, 0], cache=0), together)
    same(together, learnt(method, shuffling, tasks=[1]))
    other = learnt(method, shuffling, seed=1)
    assert any(not torch.equal(other[site], together[site]) for site in SITES)


@pytest.mark.parametrize("method", [methods.nad(epochs=1, batch=4), methods.contrastive(steps=5)])
def test_workers_that_stay_show_the_same_the_second_time(method: methods.Method) -> None:
    data = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*line_loader(), strict=True)))
    staying = torch.utils.data.DataLoader(data, 9, shuffle=True, num_workers=1, persistent_workers=True)
    same(learnt(method, staying), learnt(method, staying))


def test_less_to_keep_takes_more_steps_and_as_many_times_the_images() -> None:
    method = replace(methods.contrastive(images=64), pace=2.0)
    for share, times in ((0.8, 1), (0.55, 1), (0.275, 4), (0.01, 12)):
        paced = method.paced(share)
        assert (paced.steps, paced.images) == (82 * times, 64 * times)
        assert paced.paced(0.01) == paced  # once only
    given = methods.contrastive(steps=50, images=7).paced(0.1)
    assert (given.steps, given.images) == (50, 7)


# --- estimators ---

HARD = [
    methods.straight_through_topk,
    methods.perturbed_topk(),
    methods.hard_concrete(),
    methods.hard_concrete(0.3, (-0.2, 1.2)),
]


@pytest.mark.parametrize("estimator", HARD)
@pytest.mark.parametrize("keep", [4, Budget(0.6, by="parameters"), Budget(2, over="site")])
def test_estimators_end_with_hard_gates_within_the_budget(estimator: methods.Estimator, keep: Any) -> None:
    method = replace(methods.contrastive(steps=6), estimator=estimator)
    masks = learnt(method, keep=keep)
    assert masks == masks.hard()
    units = torch.cat([masks[site] for site in SITES], 1).sum(1)
    if keep == 4:
        assert units.tolist() == [4, 4, 4]
    elif keep.over == "site":
        assert all(masks[site].sum(1).tolist() == [2, 2, 2] for site in SITES)
    else:
        cost = {"act1": 2 * 9 + 1, "act2": 4 * 9 + 1}
        paid = torch.stack([masks[site].sum(1) * cost[site] for site in SITES]).sum(0)
        assert bool((paid <= 0.6 * (4 * 19 + 5 * 37)).all())
    same(learnt(method, keep=keep), masks)  # randomness is decided by the seed


def step(index: int = 0, total: int = 10, keep: int = 3, noise: float = 0.5) -> methods.Step:
    def best(scores: methods.Table) -> methods.Table:
        everything = torch.cat(list(scores.values()), 1).detach()
        hard = torch.zeros_like(everything).scatter(1, everything.topk(keep).indices, 1)
        return dict(zip(scores, hard.split([x.shape[1] for x in scores.values()], 1), strict=True))

    return methods.Step(
        index, total, 0.0, best, lambda: {"a": torch.full((1, 4), noise), "b": torch.full((1, 2), noise)}
    )


def scores() -> methods.Table:
    return {
        "a": torch.tensor([[0.3, -1.0, 2.0, 0.1]]).requires_grad_(),
        "b": torch.tensor([[0.5, -0.2]]).requires_grad_(),
    }


def test_straight_through_gates_are_hard_and_pass_gradients_on() -> None:
    first = scores()
    gates = methods.straight_through_topk(first, step())
    assert gates["a"].tolist() == [[1, 0, 1, 0]]
    assert gates["b"].tolist() == [[1, 0]]
    (3 * gates["a"].sum()).backward()
    assert first["a"].grad is not None
    assert first["a"].grad.tolist() == [[3] * 4]


def test_noise_decides_between_gates_while_much_of_it_is_left() -> None:
    spread = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.5, -0.2]).std()
    uniform = {"a": torch.tensor([[0.5, 1.0, 0.5, 0.5]]), "b": torch.tensor([[0.5, 0.5]])}
    for index, noise, raised in ((0, 1.0, True), (0, 0.2, False), (6, 1.0, False), (7, 1.0, False), (10, 1.0, False)):
        first = scores()
        gates = methods.perturbed_topk(noise)(first, replace(step(index), noise=lambda: uniform))
        left = noise * max(0.0, 1 - index / 7)  # the second unit's score, -1, has to pass the third best, 0.3
        assert raised == bool(-1 + left * spread * 12**0.5 * 0.5 > 0.3)
        assert gates["a"].tolist() == [[0 if raised else 1, int(raised), 1, 0]]
        assert gates["b"].tolist() == [[1, 0]]
        torch.cat(list(gates.values()), 1).sum().backward()
        assert first["a"].grad is not None
        assert first["a"].grad.tolist() == [[1] * 4]


def test_hard_concrete_gates_stand_around_the_budgets_threshold() -> None:
    first = scores()
    gates = methods.hard_concrete()(first, step())
    # of no noise, (score − threshold) / temperature through the stretched sigmoid; the threshold is the third best, 0.3
    for site, score in first.items():
        expected = (((score - 0.3) * 1.5).sigmoid() * 1.2 - 0.1).clamp(0, 1)
        torch.testing.assert_close(gates[site], expected)
    torch.cat(list(gates.values()), 1).sum().backward()
    assert all(score.grad is not None and bool(score.grad.any()) for score in first.values())
    for noise, value in ((0.0, 0.0), (1.0, 1.0)):
        assert set(methods.hard_concrete()(scores(), step(noise=noise))["a"].flatten().tolist()) == {value}
    assert methods.hard_concrete()(scores(), step(10))["a"].tolist() == [[1, 0, 1, 0]]


def test_sigmoid_gates_know_no_budget() -> None:
    soft = learnt(replace(methods.contrastive(steps=3), estimator=methods.sigmoid), keep=0.1)
    values = torch.cat([soft[site] for site in SITES], 1)
    assert bool(((values > 0) & (values < 1)).all())
    found = methods.sigmoid(scores(), step())["b"]
    torch.testing.assert_close(found, torch.tensor([[1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.2))]]))


def test_updates_are_their_formulas() -> None:
    gradient = {"a": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}
    start = {"a": torch.zeros(2, 2)}
    methods.normalised_step(0.1)(start, gradient, step(), {})
    torch.testing.assert_close(start["a"], torch.tensor([[-0.06, -0.08], [0, 0]]))
    start = {"a": torch.zeros(2, 2)}
    state: methods.Table = {}
    expected, momentum = torch.zeros(2), torch.zeros(2)
    for index in range(3):
        turned = gradient["a"] if index != 1 else 10 * gradient["a"].flip(1)  # adds to the others as large as it is
        methods.momentum_step(0.5)(start, {"a": turned}, step(index, 4), state)
        momentum = 0.5 * momentum + turned[0]
        expected -= (1 + math.cos(math.pi * index / 4)) / 2 * math.sqrt(2) * momentum / momentum.norm()
    torch.testing.assert_close(start["a"], torch.stack([expected, torch.zeros(2)]))
    start = {"a": torch.zeros(2, 2)}
    methods.momentum_step(0.5)(start, {"a": 1e-16 * gradient["a"]}, step(), {})
    assert not start["a"].any()  # rounding is no direction
    lengths = []
    for index in range(8):
        start = {"a": torch.zeros(2, 2)}
        methods.momentum_step(0.5, rate=2.0, hold=0.5)(start, gradient, step(index, 8), {})
        lengths.append(float(start["a"][0].norm()) / math.sqrt(2))
    falling = [1 + math.cos(math.pi * part / 4) for part in range(4)]
    assert lengths == pytest.approx([2.0, 2.0, 2.0, 2.0, *falling])


class Deep(nn.Sequential):
    """(batch, 4) -> (batch, 3) with nine sites, `tanh0` to `tanh8`, of five units."""

    def __init__(self) -> None:
        super().__init__()
        for site in range(9):
            self.add_module(f"linear{site}", nn.Linear(5 if site else 4, 5))
            self.add_module(f"tanh{site}", nn.Tanh())
        self.add_module("head", nn.Linear(5, 3))


def standing(method: methods.Method, **more: Any) -> list[dict[str, Tensor]]:
    """The gradients of each step where scores stay as they are."""
    model, seen = seeded(Deep), []

    def update(scores: methods.Table, gradients: methods.Table, step: methods.Step, state: methods.Table) -> None:
        seen.append({site: gradient.clone() for site, gradient in gradients.items()})

    frozen = replace(method, update=update, closing=update if more.get("closed") == "optimal" else method.closing)
    nadhooks.learn(model, labelled(model, vectors(60, seed=3)), "tanh*", method=frozen, tasks=[0, 1], **more)
    return seen


@pytest.mark.parametrize("closed", ["mean", "optimal"])
def test_first_sites_get_gradients_in_deep_steps_alone_and_as_much_in_all(closed: str) -> None:
    method = methods.contrastive(steps=40)
    found, expected = (standing(each, closed=closed) for each in (method, replace(method, shallow=0.0)))
    shallow = [method.shallow_at(index) for index in range(40)]
    number = len(found) // 40  # gates' gradients, and then those of what closed units put out
    assert number == (2 if closed == "optimal" else 1)
    for index, (here, full) in enumerate(zip(found, expected, strict=True)):
        times = 0.0 if shallow[index // number] else 1 / (1 - method.shallow)
        assert here.keys() == full.keys()
        for site in full:
            first = site in ("tanh0", "tanh1")
            torch.testing.assert_close(here[site], (times if first else 1.0) * full[site], rtol=1e-9, atol=1e-12)
        if index % number == 0:
            assert all(bool(gradient.any()) for gradient in full.values())
    for turns in range(1, 7):  # that an objective may take: all come alike
        for turn in range(turns):
            of_turn = [method.shallow_at(index) for index in range(turn, 1500, turns)]
            assert sum(of_turn) == pytest.approx(method.shallow * len(of_turn), rel=0.15)


def test_shallow_steps_keep_nothing_of_the_first_sites_for_the_way_back() -> None:
    kept: list[list[bool]] = []
    method = methods.contrastive(steps=6, activation=0)

    def objective(
        student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table
    ) -> methods.Losses:
        kept.append([student.sites[f"tanh{site}"].requires_grad for site in range(9)])
        return method.objective(student, teacher, samples, gates)

    standing(replace(method, objective=objective))
    assert kept == [[not method.shallow_at(step)] * 2 + [True] * 7 for step in range(6)]
    assert not all(each[0] for each in kept)


def test_objectives_of_the_first_sites_alone_are_learnt_from_in_deep_steps() -> None:
    def objective(
        student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table
    ) -> Tensor:
        return objectives.per_task(student.sites["tanh0"].mean((1, 2)), samples.rows, 2)

    method = replace(methods.contrastive(steps=8), objective=objective)
    seen = standing(method)
    assert [bool(step["tanh0"].any()) for step in seen] == [not method.shallow_at(index) for index in range(8)]


@pytest.mark.parametrize("closed", ["zero", "mean", "optimal"])
def test_parts_of_a_method_know_what_closed_units_put_out(closed: Closed) -> None:
    """Where that is not learnt, the last steps are for the scores as well, and there are more of them."""
    told: list[str] = []
    usual = methods.contrastive()

    def objective(
        student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table
    ) -> methods.Losses:
        told.append(samples.closed)
        return usual.objective(student, teacher, samples, gates)

    def update(scores: methods.Table, gradients: methods.Table, step: methods.Step, state: methods.Table) -> None:
        told.append(step.closed)
        usual.update(scores, gradients, step, state)

    method = replace(usual, objective=objective, update=update)
    nadhooks.learn(mlp(), mlp_loader(), "act", method=method, closed=closed, keep=4 / 7)
    steps = 82 if closed == "optimal" else round(82 * (0.55 / (0.9 * 4 / 7)) ** usual.pace)
    assert told == [closed] * 2 * steps
    assert (steps > 82) == (closed != "optimal")
    other = methods.class_only()  # whose closed units put out the mean as a rule
    assert other.paced(0.55, "mean").steps == other.steps


def test_a_table_that_was_changed_is_no_longer_the_tensor_that_it_was_split_from() -> None:
    together = torch.arange(6.0)[None]

    def table() -> methods.Table:
        return Parted(together, {"a": torch.empty(1, 2), "b": torch.empty(1, 4)})

    assert whole(table()) is together
    assert {site: x.tolist() for site, x in table().items()} == {"a": [[0, 1]], "b": [[2, 3, 4, 5]]}
    other, less = table(), table()
    other["a"] = torch.tensor([[7.0, 8.0]])
    del less["b"]
    assert whole(other).tolist() == [[7, 8, 2, 3, 4, 5]]
    assert whole(less).tolist() == [[0, 1]]
    assert whole(table() | {"b": torch.ones(1, 1)}).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(("begin", "end"), [(0.7, 1.0), (0.5, 0.8)])
def test_averaged_scores_are_means_and_then_stay(begin: float, end: float) -> None:
    """Until then the update goes on from its own scores; all that is remembered is in its state."""
    gradients = [{"a": torch.randn(2, 3, dtype=torch.float64)} for _ in range(10)]
    plain, mean, seen = {"a": torch.zeros(2, 3).double()}, {"a": torch.zeros(2, 3).double()}, []
    states: list[methods.Table] = [{}, {}]
    first, last = round(10 * begin), round(10 * end) - 1
    for index, gradient in enumerate(gradients):
        methods.momentum_step(0.5)(plain, gradient, step(index, 10), states[0])
        seen.append(plain["a"].clone())
        methods.averaged(methods.momentum_step(0.5), begin, end)(mean, gradient, step(index, 10), states[1])
        states[1] = {name: value.clone() for name, value in states[1].items()}
        expected = plain["a"] if index < last else torch.stack(seen[first : last + 1]).mean(0)
        torch.testing.assert_close(mean["a"], expected)
    whole: list[methods.Table] = [{"a": torch.zeros(2, 3).double()} for _ in range(2)]
    states = [{}, {}]
    for index, gradient in enumerate(gradients):  # nothing is left to be done after `end`
        without = replace(step(index, 10), closed="mean")
        methods.averaged(methods.momentum_step(0.5), begin / end, 1.0)(whole[0], gradient, without, states[0])
        methods.averaged(methods.momentum_step(0.5), begin, end)(whole[1], gradient, without, states[1])
        torch.testing.assert_close(whole[0], whole[1])
    for steps in (1, 2, 3):  # of few steps the last one
        few = {"a": torch.zeros(2, 3).double()}
        methods.averaged(methods.normalised_step(1.0))(few, gradients[0], step(steps - 1, steps), {})
        torch.testing.assert_close(few["a"], -torch.nn.functional.normalize(gradients[0]["a"], dim=1))


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_contrastive_minds_how_logits_differ_and_not_how_small_they_are(output: objectives.Output) -> None:
    teacher = torch.tensor([[4.0, 1.0, -3.0], [-2.0, 3.0, 1.0], [1.0, 0.0, 2.0], [0.0, -4.0, 3.0]]).double()
    student = teacher + torch.tensor([0.5, -0.5, 1.0])
    samples = methods.Samples(
        torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 2, 2]), torch.tensor([True, False, True, False])
    )
    gates = {"a": torch.ones(2, 1, dtype=torch.float64)}
    loss = methods.contrastive(activation=0, output=output).objective

    def found(outputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs = outputs.clone().requires_grad_()
        terms = loss(methods.Pass(outputs, {}), methods.Pass(teacher, {}), samples, gates)
        total = torch.stack(list(terms.values())).sum(0)
        return total.detach(), torch.autograd.grad(total.sum(), outputs)[0]

    small = torch.tensor([0.1, 0.1, 0.02, 0.02], dtype=torch.float64)[:, None]  # a task's samples, alike
    torch.testing.assert_close(found(small * student)[0], found(student)[0])
    torch.testing.assert_close(small * found(small * student)[1], found(student)[1])
    assert float((found(student)[1] * student).sum().abs()) > 0.01  # to grow is worth something still
    constant = found(torch.ones_like(student))
    assert all(bool(x.isfinite().all()) for x in constant)


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize(("method", "most"), [(methods.contrastive, 6), (methods.class_only, 3)])
def test_activations_are_compared_at_each_site_in_turn(
    method: Callable[..., methods.Method], most: int, number: int
) -> None:
    names = [f"site{index}" for index in range(number)]
    gates = {name: torch.ones(1, 2) for name in names}
    random = torch.Generator().manual_seed(0)
    open_, gated = ({name: torch.randn(2, 2, 5, generator=random) for name in names} for _ in range(2))
    loss = method(activation=2.0).objective
    logits, row = torch.zeros(2, 3), torch.tensor([0, 0])

    def activation(step: int, sites: Mapping[str, Tensor]) -> float:
        samples = methods.Samples(row, row, torch.tensor([True, False]), step=step)
        terms = loss(methods.Pass(logits, sites), methods.Pass(logits, open_), samples, gates)
        assert isinstance(terms, Mapping)
        return float(terms["activation"])

    turns = min(most, number)
    alone = {name: [activation(step, {**open_, name: gated[name]}) > 0 for step in range(turns)] for name in names}
    assert all(sum(seen) == 1 for seen in alone.values())  # each site's turn comes, once
    changes = sum(objectives.relative_mse(gated[name], open_[name]) for name in names)
    every = sum(activation(step, gated) for step in range(turns)) / turns
    assert every == pytest.approx(float(2.0 * changes.sum() / number))  # type: ignore[union-attr]
    assert activation(turns, gated) == activation(0, gated)


def weighed(
    method: methods.Method, keep: torch.Tensor | None, closed: Closed = "optimal"
) -> Mapping[str, torch.Tensor]:
    """The loss of two tasks with two samples each, an own one and another."""
    random = torch.Generator().manual_seed(0)
    outputs, teacher = (torch.randn(4, 3, generator=random).double() for _ in range(2))
    open_, gated = ({"a": torch.randn(4, 2, 5, generator=random).double()} for _ in range(2))
    rows, positive = torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, True, False])
    samples = methods.Samples(rows, torch.tensor([0, 0, 2, 2]), positive, keep=keep, closed=closed)
    gates = {"a": torch.ones(2, 2, dtype=torch.float64)}
    terms = method.objective(methods.Pass(outputs, gated), methods.Pass(teacher, open_), samples, gates)
    assert isinstance(terms, Mapping)
    return terms


@pytest.mark.parametrize(
    ("keep", "times", "closed"),
    [([0.55, 0.3], [1, 1], "optimal"), ([0.7, 0.1], [1.3**3, 1], "optimal"), ([0.9, 1.0], [3.9**3, 400], "optimal"),
     ([0.8, 0.61], [1.95**3, 1], "optimal"), ([0.36, 0.2], [1, 1], "mean"), ([0.6, 0.9], [1.25**3, 125], "mean"),
     ([1.0, 0.55], [400, (10 / 9) ** 3], "mean"), ([0.36, 0.2], [1, 1], "zero"),
     ([0.6, 0.9], [1.425**3, 4.5], "zero"), ([0.5, 0.43], [1, 1], "mean"), ([0.43, 1.0], [1, 4.5], "zero")],
)  # fmt: skip
def test_activations_weigh_more_where_less_is_closed(keep: list[float], times: list[float], closed: Closed) -> None:
    shares = torch.tensor(keep, dtype=torch.float64)
    for method, expected in ((methods.contrastive(), times), (methods.class_only(), [1, 1])):
        usual, now = (weighed(method, given, closed)["activation"] for given in (None, shares))
        torch.testing.assert_close(now, usual * torch.tensor(expected).double())


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_order_counts_where_little_is_kept(output: objectives.Output) -> None:
    method = methods.contrastive(order=2.0, output=output)
    assert "order" not in weighed(method, None)
    assert "order" not in weighed(method, torch.tensor([0.25, 0.55]))
    assert "order" not in weighed(methods.contrastive(order=0), torch.tensor([0.1, 0.1]))
    assert "order" not in weighed(methods.class_only(), torch.tensor([0.1, 0.1]))
    one, both = (weighed(method, torch.tensor(keep).double())["order"] for keep in ([0.05, 0.3], [0.05, 0.125]))
    assert one[0] == both[0] > 0
    assert one[1] == 0
    terms = {keep: weighed(method, torch.tensor([keep, keep]).double()) for keep in (0.05, 0.125)}
    torch.testing.assert_close(terms[0.05]["order"], 4 * terms[0.125]["order"])
    negatives = weighed(method, None)["negatives"]
    torch.testing.assert_close(terms[0.05]["negatives"], 1.8 * negatives)
    torch.testing.assert_close(terms[0.125]["negatives"], 1.2 * negatives)
    assert torch.equal(weighed(method, torch.tensor([0.25, 0.55]))["negatives"], negatives)


@pytest.mark.parametrize("small", [1.0, 1e-3])
def test_order_is_the_loss_of_pairs_that_are_as_far_apart_as_in_the_full_network(small: float) -> None:
    rows = torch.tensor([0, 1, 0, 1, 0, 0])
    positive = torch.tensor([True, False, False, True, True, False])
    teacher = torch.tensor([4.0, -1.0, -3.0, 2.0, 1.0, 0.5]).double()[:, None]
    student = small * torch.tensor([1.0, 2.0, 3.0, -1.0, 0.0, -2.0]).double()[:, None] + 7
    samples = methods.Samples(rows, torch.zeros(6).long(), positive, keep=torch.full((2,), 0.125).double())
    gates = {"a": torch.ones(2, 1, dtype=torch.float64)}
    loss = methods.contrastive(activation=0, order=1.0, output="sigmoid").objective  # where log-odds are the outputs
    terms = loss(methods.Pass(student, {}), methods.Pass(teacher, {}), samples, gates)
    assert isinstance(terms, Mapping)
    for task in (0, 1):
        own, spread = rows == task, [x[rows == task, 0].std(correction=0) for x in (student, teacher)]
        odds = student[:, 0] / spread[0] * spread[1]
        pairs = [odds[other] - odds[mine] for mine in range(6) for other in range(6) if own[mine] and own[other]
                 and positive[mine] and not positive[other]]  # fmt: skip
        torch.testing.assert_close(terms["order"][task], torch.stack(pairs).exp().log1p().mean())
    alike = loss(methods.Pass(torch.ones_like(student), {}), methods.Pass(teacher, {}), samples, gates)
    assert isinstance(alike, Mapping)
    torch.testing.assert_close(alike["order"], torch.full((2,), math.log(2)).double())


# --- baselines ---


def test_random_units_depend_on_the_seed_and_the_task_alone() -> None:
    masks = learnt("random", keep=4)
    assert torch.cat([masks[site] for site in SITES], 1).sum(1).tolist() == [4, 4, 4]
    other_data = labelled(fair_line(5), images(50, seed=7))
    same(learnt("random", other_data, keep=4, tasks=[2, 1]), masks.select([1, 2]))
    assert any(not torch.equal(learnt("random", keep=4, seed=1)[site], masks[site]) for site in SITES)
    rows = {tuple(torch.cat([masks[site][row] for site in SITES]).tolist()) for row in range(3)}
    assert len(rows) > 1


def of_label(data: Loader, label: int) -> Tensor:
    return torch.cat([x[y == label] for x, y in data])


def even(data: Loader, number: int) -> Loader:
    """The first so many samples of every label."""
    x, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    places = torch.cat([(labels == label).nonzero()[:number, 0] for label in range(3)])
    return [(x[places], labels[places])]


def test_activation_ranks_units_by_their_share_of_energy() -> None:
    model, data = mlp(), even(mlp_loader(), 8)
    method = methods.activation(images=8)
    found = scored(method, model=model, loader=data, sites=["fc1", "act"])
    hard = nadhooks.learn(model, data, ["fc1", "act"], method=method, keep=6)
    for label in range(3):
        x = model.fc1(of_label(data, label)).detach()
        energies = [x.square(), x.relu().square()]
        expected = torch.cat([(e / e.mean(1, keepdim=True)).mean(0) for e in energies])
        row = torch.cat([found[site][label] for site in ("fc1", "act")])
        torch.testing.assert_close(row, expected, rtol=1e-12, atol=1e-12)
        best = expected.argsort(descending=True, stable=True)[:6]
        kept = torch.cat([hard[site][label] for site in ("fc1", "act")])
        assert sorted(best.tolist()) == kept.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("images", [1, 3, 8, 9, 12, 32, 33])
def test_baselines_see_as_many_images_as_they_say(images: int) -> None:
    for method in (methods.activation(images=images), methods.taylor(images=images)):
        assert images <= method.steps * method.positives < images + method.steps
        assert method.positives <= 8


@pytest.mark.parametrize("closed", ["zero", "mean"])
def test_taylor_scores_are_gradients_computed_by_hand(closed: Any) -> None:
    model, data = mlp(), even(mlp_loader(), 6)
    method = replace(methods.taylor(images=6), steps=1, positives=6, negatives=400)
    found = scored(method, model=model, loader=data, sites="act", closed=closed, seed=3)
    x, labels = data[0]
    hidden = model.act(model.fc1(x)).detach().requires_grad_()
    mean = hidden.detach().mean(0) if closed == "mean" else torch.zeros(7)
    for label in range(3):
        surprise = F.cross_entropy(model.fc2(hidden), torch.full((len(x),), label), reduction="none")
        (gradient,) = torch.autograd.grad(surprise.sum(), hidden)
        each = ((hidden - mean) * gradient).detach()  # what closing the gate changes, to first order
        drawn = sampling.generator(3, label)
        own, others = (labels == label).nonzero()[:, 0], (labels != label).nonzero()[:, 0]
        torch.randperm(len(own), generator=drawn)
        negatives = others[torch.randint(len(others), (400,), generator=drawn)]
        expected = -(each[own].mean(0) - each[negatives].mean(0))
        torch.testing.assert_close(found["act"][label], expected, rtol=1e-10, atol=1e-12)


def test_routing_is_the_loop_written_by_hand() -> None:
    model, data = mlp(), even(mlp_loader(), 5)
    method = methods.routing(images=5, steps=4, lr=0.1, penalty=0.05)
    found = scored(method, model=model, loader=data, sites="act")
    for label in range(3):
        gates = []
        for x in of_label(data, label):
            gate, speed = torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
            hidden = model.act(model.fc1(x)).detach()
            predicted = model(x[None]).argmax(1)
            for _ in range(4):
                leaf = gate.clone().requires_grad_()
                loss = F.cross_entropy(model.fc2(hidden * leaf)[None], predicted) + 0.05 * leaf.sum()
                (gradient,) = torch.autograd.grad(loss, leaf)
                speed = 0.9 * speed + gradient
                gate = (gate - 0.1 * speed).clamp(min=0)
            gates.append(gate)
        torch.testing.assert_close(found["act"][label], torch.stack(gates).mean(0), rtol=0, atol=1e-12)
    hard = nadhooks.learn(model, data, "act", method=method, keep=3)
    for label in range(3):
        best = found["act"][label].argsort(descending=True, stable=True)[:3]
        assert hard["act"][label].nonzero()[:, 0].tolist() == sorted(best.tolist())


# --- where learning starts ---

STILL = replace(methods.contrastive(steps=1, images=4, floor=0.0), update=lambda scores, gradients, step, state: None)


@pytest.mark.parametrize("start", ["taylor", "activation", "random"])
def test_a_warm_start_is_the_order_of_the_baseline(start: str) -> None:
    masks = learnt(STILL, start=start, keep=4)
    baseline = methods.METHODS[start]()
    # one pool for both: the start sees no more samples than the method itself
    same(masks, learnt(replace(baseline, images=STILL.images), keep=4))
    assert masks.provenance["start"] == {"method": start, "options": baseline.described()}


def test_masks_are_a_start() -> None:
    first = learnt("random", keep=4, seed=8)
    masks = learnt(STILL, start=first, keep=4)
    same(masks, first)
    assert masks.provenance["start"] == {"method": "random", "options": {}, "keep": 4, "seed": 8}
    same(learnt(STILL, start=first.select([2, 1, 0]), keep=4), first)  # whatever their order
    nad = learnt(replace(methods.nad(epochs=1), update=STILL.update), start=first)
    logits = [torch.logit(nad[site]) - 3 * (2 * first[site] - 1) for site in SITES]
    initial = learnt(replace(methods.nad(epochs=1), update=STILL.update))
    for site, logit in zip(SITES, logits, strict=True):
        torch.testing.assert_close(logit, torch.logit(initial[site]))


def test_an_objective_that_does_not_compare_can_start_from_one_that_does() -> None:
    masks = learnt(methods.contrastive(steps=2, activation=0), start="activation", cache=1000)
    assert masks.provenance["start"] == {"method": "activation", "options": methods.activation().described()}


def test_samples_of_their_own_gates_do_not_know_of_other_tasks() -> None:
    method = replace(methods.routing(images=4, steps=2), initial=methods.estimators.normal)
    same(learnt(method, tasks=[0, 1]), learnt(method, tasks=[1, 0]).select([0, 1]))


def test_fidelity_is_not_had_where_nothing_is_held_out() -> None:
    own = replace(methods.nad(epochs=1), estimator=methods.straight_through_topk, keep=0.5)
    with pytest.raises(NadhooksError, match="fidelity: 'nad' reads the loader itself, and holds nothing out"):
        learnt(own, fidelity=0.5)


def test_small_gradients_come_through_half_precision() -> None:
    far = torch.randn(4, 64, 28, 28, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0**16), (torch.float16, 2.0**40)):
        x = far.clone().requires_grad_()
        losses = objectives.mse(x.to(dtype), torch.zeros_like(x, dtype=dtype)) / 300
        found.append(gradients_of(losses, [x], scale)[0].flatten())
    for other in found[1:]:
        assert float(torch.cosine_similarity(found[0], other, dim=0)) > 0.999
        assert float(other.norm() / found[0].norm()) == pytest.approx(1, abs=0.01)


def test_starts_that_do_not_fit_are_refused() -> None:
    other = nadhooks.learn(mlp(), mlp_loader(), "act", method="random")
    with pytest.raises(SiteError, match="start from masks of this model and choice of sites"):
        learnt(STILL, start=other)
    with pytest.raises(TaskError, match="unknown task 2"):
        learnt(STILL, start=learnt("random", tasks=[0, 1]))
    with pytest.raises(LearningError, match="'contrastive' cannot begin with 'nad', for 'nad' reads the loader itself"):
        learnt(STILL, start="nad")
    with pytest.raises(LearningError, match="'nad' cannot begin with 'taylor', for 'nad' reads the loader itself"):
        learnt("nad", start="taylor")
    with pytest.raises(LearningError, match="the gates of 'routing' start open"):
        learnt("routing", start="taylor")
    with pytest.raises(LearningError, match="'taylor' takes outputs for 'softmax' and 'contrastive' for 'sigmoid'"):
        learnt(methods.contrastive(output="sigmoid"), start="taylor")
    with pytest.raises(NadhooksError, match="start: expected"):
        learnt(STILL, start="magic")


# --- fidelity ---


def test_after_two_shares_in_a_row_that_were_too_far_a_lucky_one_does_not_count(monkeypatch: Any) -> None:
    far = [[0, 0, 1], [1, 0, 1], [1, 0, 1], [0, 0, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    told = iter(torch.tensor(far, dtype=torch.float32))  # at 0.9, 0.8, …, 0.4, and at two shares between
    monkeypatch.setattr(nadhooks.faithfulness, "divergence", lambda learner, found: next(told))
    masks = learnt(methods.contrastive(steps=1), fidelity=0.5)
    assert (9 * masks.kept()).tolist() == pytest.approx([8, 5, 9])  # of 9 units: 0.9, 0.6, everything
    assert masks.provenance["curve"]["divergence"] == far


def test_every_task_is_faithful_enough_or_kept_whole(tmp_path: Any) -> None:
    method = methods.contrastive(steps=16)
    kept = []
    for bound in (0.003, 0.03, 0.3, 10.0):
        masks = learnt(method, fidelity=bound)
        curve = masks.provenance["curve"]
        assert masks.provenance["fidelity"] == bound
        assert len(curve["keep"]) == len(curve["divergence"])
        for row in range(3):
            share = float(masks.kept()[row])
            within = [
                keep[row] for keep, far in zip(curve["keep"], curve["divergence"], strict=True) if far[row] <= bound
            ]
            assert share == (pytest.approx(max(1, round(min(within) * 9)) / 9) if within else 1)
        kept.append(masks.kept())
    for tight, loose in pairwise(kept):
        assert bool((tight >= loose).all())
    assert kept[-1].tolist() == pytest.approx([1 / 9] * 3)
    masks.save(tmp_path / "masks")
    assert nadhooks.load(tmp_path / "masks").provenance["curve"] == curve


def test_fidelity_is_measured_on_held_out_data_if_there_is_some() -> None:
    method = methods.contrastive(steps=4)
    held_out = labelled(fair_line(), images(64, seed=9))
    masks, own = learnt(method, fidelity=0.05, held_out=held_out), learnt(method, fidelity=0.05)
    assert set(masks.quality) == {"recall", "fpr", "auc", "fpr95"}
    assert own.quality == {}
    assert masks.provenance["curve"] != own.provenance["curve"]
    last = masks.provenance["curve"]["divergence"]
    again = learnt(method, fidelity=0.05, held_out=iter(held_out)).provenance["curve"]["divergence"]
    assert last == again


def test_fidelity_is_the_divergence_on_samples_of_its_own() -> None:
    """One task, and held-out data of so few images that all are drawn alike."""
    model, data = mlp(), mlp_loader()
    x = vectors(2, seed=12)
    held_out = [(x, torch.tensor([0, 1]))]  # every positive is the first, every negative the second
    options: dict[str, Any] = {"method": methods.contrastive(steps=3), "tasks": [0], "closed": "zero"}
    masks = nadhooks.learn(model, data, "act", fidelity=1e-12, held_out=held_out, **options)
    curve = masks.provenance["curve"]
    first = nadhooks.learn(model, data, "act", keep=0.9, **options)
    student = model.fc2(model.act(model.fc1(x)) * first["act"][0]).detach()
    expected = nadhooks.objectives.binary_kl(student, model(x).detach(), torch.tensor([0, 0])).sum()
    assert curve["keep"][0] == [0.9]
    assert curve["divergence"][0] == [pytest.approx(float(expected), abs=1e-6)]


@pytest.mark.parametrize("method", [methods.contrastive(steps=6), methods.class_only(steps=4)])
def test_fidelity_of_a_task_does_not_depend_on_the_others(method: methods.Method) -> None:
    paced = replace(method, pace=1.0)
    together = learnt(paced, fidelity=0.3)
    assert len(set(together.provenance["curve"]["keep"][-1])) > 1
    for row, label in enumerate(together.labels):
        alone = learnt(paced, fidelity=0.3, tasks=[label])
        tried = [(share[row], far[row]) for share, far in zip(*together.provenance["curve"].values(), strict=True)]
        mine = [(share[0], far[0]) for share, far in zip(*alone.provenance["curve"].values(), strict=True)]
        assert set(mine) <= set(tried)
        assert all(torch.equal(alone[site][0], together[site][row]) for site in alone.values)


def test_fidelity_of_gates_for_each_sample() -> None:
    masks = learnt(methods.routing(images=4, steps=3), fidelity=0.5)
    assert set(masks.provenance["curve"]) == {"keep", "divergence"}


def test_fidelity_that_cannot_be_is_refused_before_anything_is_learnt() -> None:
    reports: list[Any] = []
    method = methods.contrastive(steps=2)
    with pytest.raises(NadhooksError, match=r"expected keep= or fidelity=, got both"):
        learnt(method, fidelity=0.1, keep=0.5)
    with pytest.raises(NadhooksError, match="fidelity: with 'nad' the share that is kept follows from its options"):
        learnt("nad", fidelity=0.1)
    for wrong in (0, -1.0, float("inf"), float("nan"), "x"):
        with pytest.raises(NadhooksError, match="fidelity: expected a divergence above 0"):
            learnt(method, fidelity=wrong)
    few = even(line_loader(), 3)
    two = [(x[y != 2], y[y != 2]) for x, y in line_loader()]
    for data, more in ((few, {}), (line_loader(), {"held_out": two})):
        which = "" if more else r".* \(of the loader's, every 5th is held out\)"
        with pytest.raises(LearningError, match=f"held-out samples: the loader shows no sample of task{which}"):
            learnt(method, data, fidelity=0.1, progress=reports.append, **more)
    assert reports == []
    assert learnt("taylor", fidelity=0.5).provenance["curve"]["keep"]


# --- lower precision ---


class Planted(nn.Module):
    """Units 0 to 2 of its convolution carry classes 0 to 2; the others carry what no one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.conv.weight[range(3), range(3)] = 1
            self.conv.weight[3:, 3] = 1
            self.head.weight[range(3), range(3)] = 4

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def test_learning_in_lower_precision_finds_the_same_units_and_keeps_scores_in_full() -> None:
    labels = torch.arange(60) % 3
    x = torch.rand(60, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 0.2
    x[torch.arange(60), labels] += 1
    method = methods.contrastive(steps=60, activation=0)
    seen: list[Any] = []

    def objective(student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table) -> Any:
        seen.append((student.outputs.dtype, teacher.outputs.dtype, {gate.dtype for gate in gates.values()}))
        seen.append(student.sites["conv"].dtype)
        return method.objective(student, teacher, samples, gates)

    def update(scores: methods.Table, gradients: methods.Table, step: methods.Step, state: methods.Table) -> None:
        method.update(scores, gradients, step, state)
        seen.append({x.dtype for x in (*scores.values(), *gradients.values(), *state.values())})

    spied = replace(method, objective=objective, update=update)
    full, low = (
        nadhooks.learn(Planted(), [(x, labels)], "conv", method=spied, keep=3, autocast=dtype)
        for dtype in (None, torch.bfloat16)
    )
    single = torch.float32
    for place, sites in ((0, single), (180, torch.bfloat16)):
        assert seen[place : place + 180] == [(single, single, {single}), sites, {single}] * 60
    assert full["conv"].tolist() == low["conv"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]] * 3
    assert low.constants["conv"].dtype == single


# --- means ---


@pytest.mark.parametrize("sites", [["act1", "act2"], ["conv1", "conv2"]])
def test_closed_units_put_out_the_means_that_calibrate_finds(sites: list[str]) -> None:
    data = line_loader()
    for method in (methods.contrastive(steps=30), methods.nad(epochs=1)):
        masks = nadhooks.learn(fair_line(), data, sites, method=method, closed="mean")
        with nadhooks.attach(fair_line(), sites, example=images(1)) as gates:
            gates.calibrate(data)
            for site in sites:
                torch.testing.assert_close(masks.constants[site], gates.constants[site], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("left", [1.5, -0.5, math.nan])
def test_schedules_that_give_no_part_are_named(left: float) -> None:
    method = replace(methods.contrastive(steps=4), schedule=lambda index, total: left)
    with pytest.raises(LearningError, match=f"expected a schedule that gives parts from 0 to 1, got {left}"):
        nadhooks.learn(fair_line(), line_loader(), ["act1", "act2"], method=method)


def test_options_are_checked() -> None:
    for make, message in (
        (lambda: methods.contrastive(positives=0), "contrastive: expected positives of at least 1, got 0"),
        (lambda: methods.taylor(images=0), "taylor: expected positives of at least 1, got 0"),
        (lambda: methods.routing(steps=0), "routing: expected steps of at least 1, got 0"),
        (lambda: methods.contrastive(floor=1.5), "contrastive: expected a floor from 0 to 1, got 1.5"),
        (lambda: methods.contrastive(shallow=1.0), "contrastive: expected shallow from 0 to below 1, got 1.0"),
        (lambda: methods.nad(output="linear"), "expected output 'softmax', 'sigmoid' or 'any', got 'linear'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(LearningError, match=message):
            make()
