"""Learning where labels are not outputs, where samples have several, and where outputs are no classes at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nadhooks
from nadhooks import methods, objectives
from nadhooks.errors import LearningError, NadhooksError, TaskError
from nadhooks.evaluation import recognition
from nadhooks.tasks import Label

from .nets import Line, Mlp, fair_line, images, labelled, seeded, vectors

Loader = list[tuple[Tensor, Tensor]]
GROUPS = {0: [1, 2], 1: [0]}
MEANT: dict[Label, list[int]] = {label: group for label, group in GROUPS.items()}  # noqa: C416


def mlp() -> Mlp:
    return seeded(Mlp, 4)


def grouped() -> Loader:
    """The network's own classes 1 and 2 as label 0, its class 0 as label 1."""
    return [(x, (y == 0).long()) for x, y in labelled(mlp(), vectors(60, seed=3))]


# --- several outputs of one meaning ---


def test_divergence_and_entropy_over_a_group_are_those_computed_by_hand() -> None:
    student, teacher = vectors(5, seed=1)[:, :3], vectors(5, seed=2)[:, :3]
    classes = torch.tensor([[False, True, True], [True, False, False]])[torch.tensor([0, 1, 0, 1, 0])]
    p, q = ((x.softmax(1) * classes).sum(1) for x in (teacher, student))
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(objectives.binary_kl(student, teacher, classes), kl)
    torch.testing.assert_close(objectives.cross_entropy(student, classes), -q.log())
    torch.testing.assert_close(objectives.log_probability(student, classes), q.log())
    said = classes[torch.arange(5), student.argmax(1)]
    assert objectives.correct(student, classes).tolist() == said.tolist()
    one = torch.tensor([2, 0, 1, 1, 0])
    alone = F.one_hot(one, 3).bool()
    torch.testing.assert_close(
        objectives.binary_kl(student, teacher, one), objectives.binary_kl(student, teacher, alone)
    )


@pytest.mark.parametrize(
    "method",
    [methods.nad(epochs=2), methods.class_only(steps=4), methods.contrastive(steps=4), methods.taylor(images=8)],
)
def test_groups_of_one_output_are_that_output(method: methods.Method) -> None:
    data = labelled(mlp(), vectors(60, seed=3))
    plain = nadhooks.learn(mlp(), data, "act", method=method)
    meant = nadhooks.learn(mlp(), data, "act", method=method, outputs={0: [0], 1: [1], 2: [2]})
    torch.testing.assert_close(meant["act"], plain["act"], rtol=0, atol=1e-12)


def test_gradients_of_a_group_are_those_computed_by_hand() -> None:
    model, data = mlp(), grouped()
    found: list[Tensor] = []

    def update(scores: methods.Table, gradients: methods.Table, step: methods.Step, state: methods.Table) -> None:
        found.append(gradients["act"].clone())

    method = replace(methods.nad(epochs=1, batch=64, beta=0.0), update=update)
    nadhooks.learn(model, data, "act", method=method, outputs=MEANT)
    gates = torch.stack([method.initial(7, nadhooks.sampling.generator(0, label)).sigmoid() for label in (0, 1)])
    for label, group in GROUPS.items():
        x = torch.cat([x[y == label] for x, y in data])
        logit = torch.logit(gates[label]).requires_grad_()
        hidden = model.act(model.fc1(x)).detach()
        student = model.fc2(hidden * logit.sigmoid())
        right = torch.isin(model(x).argmax(1), torch.tensor(group))
        loss = -student.softmax(1)[:, group].sum(1).log().mean()
        loss = loss + ((hidden * logit.sigmoid() - hidden)[right] ** 2).mean()
        (expected,) = torch.autograd.grad(loss, logit)
        torch.testing.assert_close(found[0][label], expected, rtol=1e-10, atol=1e-12)


def test_figures_of_groups_are_those_of_a_network_with_their_sum_as_output() -> None:
    model, data = mlp(), grouped()
    held_out = [(x, (y == 0).long()) for x, y in labelled(mlp(), vectors(60, seed=8))]
    masks = nadhooks.learn(
        model, data, "act", method=methods.contrastive(steps=6), outputs=MEANT, held_out=held_out, keep=4
    )
    assert masks.labels == (0, 1)
    x, labels = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    for label, group in GROUPS.items():
        answers = model.fc2(
            model.act(model.fc1(x)) * masks["act"][label] + (1 - masks["act"][label]) * masks.constants["act"][label]
        )
        said = torch.isin(answers.argmax(1), torch.tensor(group))
        own = labels == label
        assert float(masks.quality["recall"][label]) == pytest.approx(float(said[own].double().mean()))
        assert float(masks.quality["fpr"][label]) == pytest.approx(float(said[~own].double().mean()))
        p = answers.softmax(1)[:, group].sum(1)
        auc = (p[own][:, None] > p[~own][None]).double().mean()
        assert float(masks.quality["auc"][label]) == pytest.approx(float(auc), abs=1e-6)
    with (
        nadhooks.attach(model, "act", tasks=3, example=x) as gates,
        pytest.raises(TaskError, match="does not say which"),
    ):
        recognition(gates, [(x, labels)], outputs=MEANT)


def test_groups_are_not_said_in_place_of_names() -> None:
    with pytest.raises(TaskError, match=r"expected a name for each label, got \[0, 2\]; .*nadhooks\.learn\(outputs="):
        nadhooks.learn(mlp(), grouped(), "act", tasks={0: [0, 2], 1: [1]})  # type: ignore[dict-item]
    with pytest.raises(TaskError, match=r"outputs: expected \{label: \[output, …\]\}, got \[\[0, 2\], \[1\]\]"):
        nadhooks.learn(mlp(), grouped(), "act", outputs=[[0, 2], [1]])  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{0: [3]}, {0: []}, {0: [0, 1, 2]}, {0: [-1]}, {0: [True]}, {0: ["a"]}])
def test_groups_that_cannot_be_are_refused(wrong: Any) -> None:
    with pytest.raises(TaskError, match="outputs: expected for task 0 some but not all of the model's outputs 0 to 2"):
        nadhooks.learn(mlp(), grouped(), "act", outputs=wrong)


def test_tasks_without_a_meaning_and_meanings_without_classes_are_refused() -> None:
    with pytest.raises(TaskError, match="task 2: outputs= does not say which"):
        nadhooks.learn(mlp(), grouped(), "act", outputs=MEANT, tasks=[0, 2])
    with pytest.raises(NadhooksError, match="an objective of one's own decides itself what outputs mean"):
        nadhooks.learn(mlp(), grouped(), "act", outputs=MEANT, method=lambda s, t, p, g: g["act"].sum(1))
    with pytest.raises(TaskError, match="expected at least one task"):
        nadhooks.learn(mlp(), grouped(), "act", outputs={})


# --- samples of several labels ---


def several(dtype: torch.dtype = torch.int64) -> Loader:
    """Vectors with a yes or no for each output, most of them the network's own."""
    x = vectors(60, seed=3)
    yes = mlp()(x) > 0
    yes[::9] = ~yes[::9]
    return list(zip(x.split(13), yes.to(dtype).split(13), strict=True))


@pytest.mark.parametrize("method", ["contrastive", "class-only", "nad", "taylor"])
def test_every_output_can_be_a_yes_or_no_of_its_own(method: str) -> None:
    make: Any = methods.METHODS[method]
    found, again = (
        nadhooks.learn(mlp(), several(dtype), "act", method=make(output="sigmoid"), held_out=several())
        for dtype in (torch.int64, torch.bool)
    )
    assert found.labels == (0, 1, 2)
    assert found.provenance["options"]["output"] == "sigmoid"
    assert torch.equal(found["act"], again["act"])
    for label in (0, 1, 2):
        alone = nadhooks.learn(mlp(), several(), "act", method=make(output="sigmoid"), tasks=[label])
        torch.testing.assert_close(alone["act"][0], found["act"][label], rtol=0, atol=1e-12)
    x, labels = (torch.cat(parts) for parts in zip(*several(), strict=True))
    values = found.closed_values("act")
    for label in (0, 1, 2):
        gate, closed = found["act"][label], torch.zeros(7) if values is None else values[label]
        said = mlp().fc2(F.relu(mlp().fc1(x)) * gate + (1 - gate) * closed)[:, label] > 0
        own = labels[:, label].bool()
        assert float(found.quality["recall"][label]) == pytest.approx(float(said[own].double().mean()))
        assert float(found.quality["fpr"][label]) == pytest.approx(float(said[~own].double().mean()))


def test_losses_of_yes_and_no_are_those_computed_by_hand() -> None:
    student, teacher = vectors(4, seed=1)[:, :3], vectors(4, seed=2)[:, :3]
    classes = torch.tensor([0, 2, 1, 0])
    own, before = (x[torch.arange(4), classes] for x in (student, teacher))
    p, q = before.sigmoid(), own.sigmoid()
    torch.testing.assert_close(objectives.cross_entropy(student, classes, "sigmoid"), -q.log())
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(objectives.binary_kl(student, teacher, classes, "sigmoid"), kl)
    assert objectives.correct(student, classes, "sigmoid").tolist() == (own > 0).tolist()
    pairs = torch.tensor([[True, True, False]] * 4)
    strongest = student[:, :2].amax(1)
    torch.testing.assert_close(objectives.cross_entropy(student, pairs, "sigmoid"), -strongest.sigmoid().log())


@pytest.mark.parametrize("method", [methods.nad(epochs=2), methods.class_only(steps=4), methods.contrastive(steps=4)])
def test_one_label_may_be_written_as_a_row_of_zeros_and_a_one(method: methods.Method) -> None:
    data = labelled(mlp(), vectors(60, seed=3))
    rows = [(x, F.one_hot(y, 3)) for x, y in data]
    plain, written = (nadhooks.learn(mlp(), each, "act", method=method) for each in (data, rows))
    assert torch.equal(plain["act"], written["act"])


def test_rows_of_another_length_are_refused() -> None:
    wide = [(x, torch.cat([y, y], 1)) for x, y in several()]
    for method in (methods.contrastive(output="sigmoid"), methods.nad(output="sigmoid")):
        with pytest.raises(TaskError, match="expected a label for each of the 3 outputs, got 6"):
            nadhooks.learn(mlp(), wide, "act", method=method)


# --- outputs of any kind ---


class Dense(nn.Module):
    """Puts out an image of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Line()
        self.paint = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        line = self.line
        return self.paint(line.act2(line.conv2(line.act1(line.conv1(x)))))


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = Line()

    def forward(self, x: Tensor) -> dict[str, Any]:
        found = self.line(x)
        return {"embedding": F.normalize(found), "all": [found, (found.sum(1),)]}


class Detector(nn.Module):
    """Takes a list of images, puts out a dictionary for each, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Line()

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = self.line(torch.stack(images))
        return [{"boxes": row.expand(2, 3), "scores": row[:2]} for row in found]


def dense(x: Any) -> Tensor:
    return x.mean((2, 3))


def embedding(x: Any) -> Tensor:
    return x["embedding"] + x["all"][0] + x["all"][1][0][:, None]


def detector(x: Any) -> Tensor:
    return torch.stack([each["boxes"].sum(0) + each["scores"].sum() for each in x])


ANY: list[tuple[type[nn.Module], Callable[[Any], Tensor]]] = [
    (Dense, dense),
    (Embedding, embedding),
    (Detector, detector),
]


@pytest.mark.parametrize("cache", [0, 2**30])
@pytest.mark.parametrize(("kind", "read"), ANY, ids=["dense", "embedding", "detector"])
def test_objectives_see_outputs_of_any_kind_and_each_samples_targets(
    kind: type[nn.Module], read: Callable[[Any], Tensor], cache: int
) -> None:
    model: Any = seeded(kind, 1)
    x, labels = images(24), torch.arange(24) % 2
    wanted = torch.arange(24)
    loader: list[Any] = [(x[i : i + 7], labels[i : i + 7], wanted[i : i + 7]) for i in range(0, 24, 7)]
    if kind is Detector:  # targets of detectors are lists too
        loader = [(list(x), y, [{"number": number} for number in t]) for x, y, t in loader]
        expected = read(model(list(x))).detach()
    else:
        expected = read(model(x)).detach()

    def objective(
        student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table
    ) -> dict[str, Tensor]:
        numbers = samples.targets
        if isinstance(numbers, list):
            numbers = torch.stack([each["number"] for each in numbers])
        assert numbers.shape == samples.rows.shape
        assert torch.equal(labels[numbers] == samples.rows, samples.positive)
        torch.testing.assert_close(read(teacher.outputs), expected[numbers], rtol=0, atol=1e-12)
        part = teacher.take(samples.positive)
        torch.testing.assert_close(read(part.outputs), expected[numbers[samples.positive]], rtol=0, atol=1e-12)
        assert teacher.sites["line.act2"].shape == student.sites["line.act2"].shape == (len(numbers), 5, 36)
        change = (read(student.outputs) - read(teacher.outputs)).square().mean(1)
        return {"change": objectives.per_task(change, samples.rows, 2), "size": 0.1 * gates["line.act2"].mean(1)}

    reports: list[nadhooks.progress.Progress] = []
    masks = nadhooks.learn(
        model, loader, ["line.act1", "line.act2"], method=objective, keep=6, cache=cache, progress=reports.append
    )
    assert torch.cat([masks["line.act1"], masks["line.act2"]], 1).sum(1).tolist() == [6, 6]
    paced = methods.from_objective(objective).paced(6 / 9)
    assert len(reports) == paced.steps == masks.provenance["options"]["steps"]
    assert set(reports[0].terms) == {"change", "size"}
    assert masks.quality == {}
    nad = replace(methods.nad(epochs=1), objective=objective, output="any")
    soft = nadhooks.learn(model, loader, ["line.act1", "line.act2"], method=nad, cache=cache)["line.act1"]
    assert bool(((soft > 0) & (soft < 1)).all())


def test_an_objective_may_have_samples_of_one_label_alone() -> None:
    def restores(
        student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table
    ) -> Tensor:
        assert bool(samples.positive.all())
        far = (student.outputs - teacher.outputs).square().mean((1, 2, 3))
        return objectives.per_task(far, samples.rows, len(gates["line.act1"]))

    data = [(images(40), torch.zeros(40, dtype=torch.long))]
    sites = ["line.act1", "line.act2"]
    assert float(nadhooks.learn(seeded(Dense), data, sites, method=restores, keep=4).kept()) == pytest.approx(4 / 9)
    started = nadhooks.learn(seeded(Dense), data, sites, method=restores, start=methods.from_objective(restores))
    assert started.provenance["options"]["negatives"] == 0
    found = nadhooks.learn(seeded(Dense), data, sites, method=restores, fidelity=1e-3)
    assert 0 < float(found.kept()[0]) <= 1
    with pytest.raises(LearningError, match="held-out samples: the loader shows no sample of task 0"):
        nadhooks.learn(
            seeded(Dense), data, sites, method=restores, fidelity=1e-3, held_out=[(images(4), torch.ones(4).long())]
        )


class Takes(Mlp):
    def forward(self, x: Tensor, more: Any = None, scale: Tensor | float = 1.0) -> Tensor:
        more = torch.stack(more) if isinstance(more, list) else 0.0 if more is None else more
        return super().forward(x + more) * scale


def test_inputs_are_handed_over_in_whatever_form() -> None:
    model = seeded(Takes, 4)
    plain = labelled(mlp(), vectors(40, seed=3))
    expected = nadhooks.learn(model, plain, "act", method=methods.contrastive(steps=5))
    zero = torch.zeros(1, 4, dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)  # a number for all samples
    forms: list[Callable[[Tensor], Any]] = [
        lambda x: (x, zero.expand(len(x), 4)),
        lambda x: (x, zero.expand(len(x), 4), one),
        lambda x: {"x": x, "more": zero.expand(len(x), 4)},
        lambda x: {"x": x, "scale": one},
        lambda x: (x, list(zero.expand(len(x), 4))),
        lambda x: {"more": list(x), "x": 0 * x},
    ]
    for form in forms:
        data = [(form(x), y) for x, y in plain]
        for method in (methods.contrastive(steps=5),):
            found = nadhooks.learn(model, data, "act", method=method)
            assert torch.equal(found["act"], expected["act"])
            once = nadhooks.learn(model, iter(data), "act", method=method)
            assert torch.equal(once["act"], expected["act"])
        own = nadhooks.learn(model, data, "act", method=methods.nad(epochs=1))
        assert torch.equal(own["act"], nadhooks.learn(model, plain, "act", method=methods.nad(epochs=1))["act"])


def test_a_baseline_that_needs_no_classes_ranks_units_of_any_network() -> None:
    model: Any = seeded(Dense, 1)
    loader = [(images(24), torch.arange(24) % 2)]
    for method in ("activation", "random"):
        assert nadhooks.learn(model, loader, "line.act2", method=method, keep=2)["line.act2"].sum(1).tolist() == [2, 2]


def test_images_of_one_network_stay_as_they_were_in_another_order_of_memory() -> None:
    data = labelled(fair_line(), images(40))
    other = [(x.to(memory_format=torch.channels_last), y) for x, y in data]
    first, second = (
        nadhooks.learn(fair_line(), each, "act2", method=methods.nad(epochs=2), cache=30_000) for each in (data, other)
    )
    torch.testing.assert_close(first["act2"], second["act2"], rtol=0, atol=1e-12)
