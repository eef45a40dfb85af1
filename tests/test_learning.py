from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nadhooks
from nadhooks import methods, objectives
from nadhooks.errors import LearningError, ModelError, NadhooksError, SiteError, TaskError
from nadhooks.evaluation import recognition
from nadhooks.gating import Closed
from nadhooks.methods.estimators import cubic
from nadhooks.progress import Progress
from nadhooks.sampling import generator

from .nets import Mlp, seeded, vectors

HIDDEN = 7
SEED = 4  # a network that gives the three classes 45, 35 and 16 of the samples
Loader = list[tuple[Tensor, Tensor]]


def net() -> Mlp:
    return seeded(Mlp, SEED)


def loader(samples: int = 96, batch: int = 13) -> Loader:
    """Vectors with the labels that the network itself gives them, and some wrong ones."""
    x = vectors(samples, seed=3)
    labels = net()(x).argmax(1).detach()
    labels[::7] = (labels[::7] + 1) % 3
    return list(zip(x.split(batch), labels.split(batch), strict=True))


def by_hand(
    model: Mlp, data: Loader, label: int, beta: float, epochs: int, batch: int, seed: int
) -> tuple[Tensor, int]:
    """The paper's formula for one task and one site, written out with nothing of nadhooks but the first logits."""
    x = torch.cat([images[labels == label] for images, labels in data])
    logits = torch.randn(HIDDEN, generator=generator(seed, label), dtype=torch.float64)
    skipped = 0
    for _ in range(epochs):
        for images in x.split(batch):
            hidden = F.relu(images @ model.fc1.weight.T + model.fc1.bias).detach()  # (batch, hidden)
            teacher = (hidden @ model.fc2.weight.T + model.fc2.bias).detach()
            right = teacher.argmax(1) == label
            if not right.any():
                skipped += 1
                continue
            m = logits.clone().requires_grad_()
            gate = 1 / (1 + torch.exp(-m))
            student = (hidden * gate) @ model.fc2.weight.T.detach() + model.fc2.bias.detach()
            entropy = -student.log_softmax(1)[:, label].mean()
            distance = ((hidden * gate - hidden)[right] ** 2).mean()
            loss = (entropy + distance) / 1 + beta * (gate**2).mean() / 1
            (gradient,) = torch.autograd.grad(loss, m)
            logits = logits - 0.1 * gradient / gradient.norm()
    return 1 / (1 + torch.exp(-logits)), skipped


def test_nad_is_the_formula_computed_by_hand() -> None:
    model, data = net(), loader()
    method = methods.nad(beta=0.3, epochs=4, batch=4)
    masks = nadhooks.learn(model, data, "act", method=method, seed=5)
    for row, label in enumerate(masks.labels):
        expected, _ = by_hand(model, data, int(label), 0.3, 4, 4, 5)
        torch.testing.assert_close(masks["act"][row], expected, rtol=0, atol=1e-13)
    assert not torch.equal(masks["act"][0], masks["act"][1])


def test_nad_averages_its_loss_over_sites() -> None:
    model, data = net(), loader()
    seen = []

    def update(scores: methods.Table, gradients: methods.Table, step: methods.Step, state: methods.Table) -> None:
        seen.append({site: gradient.clone() for site, gradient in gradients.items()})

    method = methods.nad(beta=0.3, epochs=1, batch=1000)
    method = methods.Method(**{**vars(method), "update": update})
    nadhooks.learn(model, data, ["fc1", "act"], method=method, tasks=[0])
    x = torch.cat([images[labels == 0] for images, labels in data])
    first = generator(0, 0)
    m = [torch.randn(HIDDEN, generator=first, dtype=torch.float64).requires_grad_() for _ in range(2)]
    original = [F.linear(x, model.fc1.weight, model.fc1.bias).detach()]
    original.append(original[0].relu())
    teacher = model(x).detach()
    gated = [original[0] * m[0].sigmoid()]
    gated.append(gated[0].relu() * m[1].sigmoid())
    right = teacher.argmax(1) == 0
    loss = F.cross_entropy(F.linear(gated[1], model.fc2.weight, model.fc2.bias), torch.zeros(len(x), dtype=torch.long))
    loss = loss + sum(F.mse_loss(g[right], o[right]) for g, o in zip(gated, original, strict=True))
    loss = loss / 2 + 0.3 * sum((logits.sigmoid() ** 2).mean() for logits in m) / 2
    for gradient, expected in zip(seen[0].values(), torch.autograd.grad(loss, m), strict=True):
        torch.testing.assert_close(gradient[0], expected, rtol=1e-11, atol=1e-14)


def test_nad_skips_batches_without_a_correct_sample() -> None:
    model, data = net(), loader()
    wrong = [(images, (model(images).argmax(1) + 1) % 3) for images, _ in data]
    masks = nadhooks.learn(model, wrong, "act", method=methods.nad(epochs=2), seed=5, tasks=[0, 1])
    for row, label in enumerate((0, 1)):
        first = torch.randn(HIDDEN, generator=generator(5, label), dtype=torch.float64).sigmoid()
        torch.testing.assert_close(masks["act"][row], first)
        assert by_hand(model, wrong, label, 0.2, 2, 16, 5)[1] > 0


@pytest.mark.parametrize("method", [methods.nad(epochs=2), methods.class_only(steps=6), methods.contrastive(steps=6)])
def test_tasks_together_get_what_each_gets_alone_in_any_order(method: methods.Method) -> None:
    model, data = net(), loader()
    together = nadhooks.learn(model, data, "act", tasks=[0, 1, 2], method=method, keep=None, closed="zero")
    reverse = nadhooks.learn(model, data, "act", tasks=[2, 1, 0], method=method, keep=None, closed="zero")
    for row in range(3):
        alone = nadhooks.learn(model, data, "act", tasks=[row], method=method, keep=None, closed="zero")
        torch.testing.assert_close(together["act"][row], alone["act"][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(together["act"][row], reverse["act"][2 - row], rtol=0, atol=1e-12)


def test_chunks_of_tasks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = net(), loader()
    method = methods.contrastive(steps=9, positives=4, negatives=4)
    whole = nadhooks.learn(model, data, "act", method=method)
    monkeypatch.setattr(nadhooks.learner, "SAMPLES_PER_PASS", 16)
    reports: list[Progress] = []
    parts = nadhooks.learn(model, data, "act", method=method, progress=reports.append)
    assert torch.equal(whole["act"], parts["act"])
    assert [report.done for report in reports] == list(range(1, 19))
    assert {report.total for report in reports} == {18}


def test_the_same_seed_gives_the_same_masks_and_another_does_not() -> None:
    model, data = net(), loader()
    first, again, other = (nadhooks.learn(model, data, "act", method="nad", seed=seed)["act"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("method", ["class-only", "contrastive"])
@pytest.mark.parametrize("closed", ["zero", "mean", "optimal"])
def test_keep_is_the_share_that_is_kept(method: str, closed: Closed) -> None:
    for keep in (0.3, 1.0):
        masks = nadhooks.learn(net(), loader(), ["fc1", "act"], method=method, keep=keep, closed=closed)
        assert (masks.kept() == round(keep * 2 * HIDDEN) / (2 * HIDDEN)).all()
        assert masks.closed == closed
        assert masks == masks.hard()


OUTPUT_ONLY = methods.contrastive(activation=0)  # the activation term would also reward units that no one reads


def planted() -> tuple[nn.Module, Loader]:
    """Units 0 to 2 carry classes 0 to 2 (the class's feature, weight 4); units 3 to 6 carry noise that no one reads."""
    model = Mlp().double().eval()
    x = torch.randn(600, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs() * 0.2
    labels = torch.arange(600) % 3
    x[torch.arange(600), labels] += 1
    with torch.no_grad():
        model.fc1.weight.zero_(), model.fc1.bias.zero_(), model.fc2.weight.zero_(), model.fc2.bias.zero_()
        for unit in range(3):
            model.fc1.weight[unit, unit] = 1
            model.fc2.weight[unit, unit] = 4
        model.fc1.weight[3:, 3] = 1
    return model, list(zip(x.split(50), labels.split(50), strict=True))


@pytest.mark.parametrize("closed", ["zero", "mean"])
def test_contrastive_finds_the_units_that_classes_were_planted_in(closed: Closed) -> None:
    model, data = planted()
    masks = nadhooks.learn(model, data, "act", method=OUTPUT_ONLY, keep=3 / 7, closed=closed)
    # a class needs its own unit to say yes, and the other two to say no
    assert masks["act"].tolist() == [[1, 1, 1, 0, 0, 0, 0]] * 3


def test_closed_means_are_those_of_the_data_and_travel() -> None:
    model, data = net(), loader()
    masks = nadhooks.learn(model, data, "act", method="nad", closed="mean")
    x = torch.cat([images for images, _ in data])
    torch.testing.assert_close(masks.constants["act"], F.relu(model.fc1(x)).mean(0).detach())
    with nadhooks.attach(model, "act", example=x) as gates:
        gates.load(masks)
        with gates.close("act", range(HIDDEN)):
            expected = model.fc2(masks.constants["act"].expand(len(x), -1))
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)


def test_what_closed_units_put_out_is_learnt_as_by_hand() -> None:
    """Gradient descent in standard deviations, beginning at the means, written out for one site."""
    model, data = net(), [(vectors(3, seed=3), torch.arange(3))] * 4
    shut = torch.tensor(
        [[1.0, 0, 0, 1, 0, 1, 0], [0.0, 1, 1, 0, 0, 1, 0], [1.0, 1, 0, 0, 0, 0, 0]], dtype=torch.float64
    )

    def closing(offsets: methods.Table, gradients: methods.Table, step: methods.Step, state: methods.Table) -> None:
        offsets["act"] -= 0.1 * gradients["act"]

    def objective(student: Any, teacher: Any, samples: Any, gates: methods.Table) -> Tensor:
        far = (student.outputs - samples.classes[:, None]).square().sum(1)
        return objectives.per_task(far[samples.positive], samples.rows[samples.positive], 3)

    method = replace(
        methods.contrastive(steps=5), objective=objective, closing=closing,
        estimator=lambda scores, step: {"act": shut + scores["act"] - scores["act"].detach()},
    )  # fmt: skip
    masks = nadhooks.learn(model, data, "act", method=method)
    hidden = F.relu(model.fc1(data[0][0])).detach()
    mean, deviation = hidden.mean(0), hidden.std(0, unbiased=False)
    for row in range(3):
        offset = torch.zeros(HIDDEN, dtype=torch.float64)
        for _ in range(5):
            leaf = offset.clone().requires_grad_()
            x = shut[row] * hidden[row] + (1 - shut[row]) * (mean + deviation * leaf)
            (gradient,) = torch.autograd.grad((model.fc2(x) - row).square().sum(), leaf)
            offset = offset - 0.1 * gradient
        torch.testing.assert_close(masks.constants["act"][row], mean + deviation * offset, rtol=0, atol=1e-12)
    assert masks.closed == "optimal"


@pytest.mark.parametrize(
    ("keep", "share"),
    [
        (0.3, 0.3),
        (3, 3 / HIDDEN),
        (methods.Budget(0.5, over="site"), 0.5),
        (methods.Budget(0.4, by="parameters"), 0.4),
        (None, None),
    ],
)
def test_objectives_are_told_what_is_kept_in_the_end(keep: Any, share: float | None) -> None:
    model, seen = net(), []

    def objective(student: Any, teacher: Any, samples: Any, gates: methods.Table) -> Tensor:
        seen.append(samples.keep)
        return torch.stack([gate.sum(1) for gate in gates.values()]).sum(0)

    method = methods.nad(epochs=1) if keep is None else methods.contrastive(steps=2)
    nadhooks.learn(model, loader(), "act", method=replace(method, objective=objective), keep=keep)
    told = [None if shares is None else shares.tolist() for shares in seen]
    assert told == [None if share is None else [share] * 3] * len(seen)
    assert seen


def test_learning_leaves_the_model_and_the_random_state_as_found() -> None:
    model, data = net(), loader()
    model.train()
    model.fc1.weight.requires_grad_(False)
    model.fc2.weight.grad = torch.ones_like(model.fc2.weight)
    state = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    shuffling = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.cat, zip(*data, strict=True))), 10, True
    )
    nadhooks.learn(model, shuffling, "act", method=methods.nad(epochs=1))
    nadhooks.learn(model, shuffling, "act", method=methods.contrastive(steps=2))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert [p.grad is None for p in model.parameters()] == [True, True, False, True]
    assert (model.fc2.weight.grad == 1).all()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", [methods.nad(epochs=1), methods.contrastive(steps=2)])
def test_learning_on_the_cpu_leaves_other_devices_alone(
    method: methods.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a seed for CUDA")

    model, data = net(), loader()
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    nadhooks.learn(model, data, "act", method=method)


def test_learning_works_beside_the_users_own_gates() -> None:
    model, data = net(), loader()
    alone = nadhooks.learn(model, data, "act", method=methods.contrastive(steps=5))
    with nadhooks.attach(model, "act", example=data[0][0]):
        beside = nadhooks.learn(model, data, "act", method=methods.contrastive(steps=5))
    assert torch.equal(alone["act"], beside["act"])


def test_own_objectives_replace_the_built_in_one() -> None:
    calls = []

    def prefer_first_units(
        student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table
    ) -> Tensor:
        calls.append((student.outputs.shape, samples.positive.sum().item(), gates["act"].shape))
        return -(gates["act"] * torch.arange(HIDDEN, 0, -1)).sum(1) + 0 * student.outputs.sum()

    masks = nadhooks.learn(net(), loader(), "act", method=prefer_first_units, keep=3 / 7)
    usual = methods.contrastive()  # whose draws it takes
    positives, negatives = 3 * usual.positives, 3 * usual.negatives
    assert calls == [((positives + negatives, 3), positives, (3, HIDDEN))] * usual.paced(3 / 7).steps
    assert masks["act"].tolist() == [[1, 1, 1, 0, 0, 0, 0]] * 3
    assert masks.provenance["method"] == "prefer_first_units"


def test_other_labels_serve_as_contrast() -> None:
    model, data = planted()
    masks = nadhooks.learn(model, data, "act", tasks={1: "one"}, method=OUTPUT_ONLY, keep=3 / 7, closed="zero")
    assert masks.tasks == ("one",)
    assert masks["act"].tolist() == [[1, 1, 1, 0, 0, 0, 0]]


def test_iterators_are_enough_where_data_is_read_once() -> None:
    model, data = net(), loader()
    expected = nadhooks.learn(model, data, "act", method=methods.contrastive(steps=5))
    once = nadhooks.learn(model, iter(data), "act", method=methods.contrastive(steps=5))
    assert torch.equal(once["act"], expected["act"])
    with pytest.raises(LearningError, match=r"nad reads the data again and again .* got an iterator"):
        nadhooks.learn(model, iter(data), "act", method="nad", tasks=3)


@pytest.mark.parametrize("form", [lambda x: (x, None), lambda x: {"loss": None, "logits": x}])
def test_logits_are_a_tuples_first_tensor_or_a_dicts_logits(form: Callable[[Tensor], Any]) -> None:
    class Twin(Mlp):
        def forward(self, x: Tensor) -> Any:
            return form(super().forward(x))

    data = loader()
    assert torch.equal(
        nadhooks.learn(seeded(Twin, SEED), data, "act")["act"], nadhooks.learn(net(), data, "act")["act"]
    )


def test_batches_may_be_dicts_with_labels() -> None:
    class Named(Mlp):
        def forward(self, vectors: Tensor) -> Any:
            return super().forward(vectors)

    model, data = seeded(Named, SEED), loader()
    named = [{"labels": labels, "vectors": x} for x, labels in data]
    assert torch.equal(nadhooks.learn(model, named, "act")["act"], nadhooks.learn(net(), data, "act")["act"])
    with nadhooks.attach(model, "act", example=named[0]["vectors"][:1]) as gates:
        assert recognition(gates, named) == recognition(gates, data)
    with pytest.raises(LearningError, match="got batches of dict of 'label', 'vectors', without 'labels'"):
        nadhooks.learn(model, [{"label": labels, "vectors": x} for x, labels in data], "act")


def test_batches_may_be_numpys() -> None:
    data = [(x.numpy(), labels.numpy()) for x, labels in loader()]
    assert torch.equal(nadhooks.learn(net(), data, "act")["act"], nadhooks.learn(net(), loader(), "act")["act"])


def test_outputs_without_logits_are_named() -> None:
    class Pixels(Mlp):
        def forward(self, x: Tensor) -> Any:
            return {"out": super().forward(x), "aux": x}

    with pytest.raises(ModelError, match="got dict of 'out', 'aux', without 'logits'"):
        nadhooks.learn(seeded(Pixels, SEED), loader(), "act")


def test_masks_say_where_they_came_from() -> None:
    reports: list[Progress] = []
    masks = nadhooks.learn(net(), loader(), "act", keep=0.5, seed=4, progress=reports.append)
    assert masks.provenance["method"] == "contrastive"
    assert masks.provenance["options"]["steps"] == len(reports) > methods.contrastive().steps  # more, for less to keep
    named = nadhooks.learn(net(), loader(), "act", method=methods.contrastive(steps=7, positives=3), keep=0.3)
    assert [named.provenance["options"][name] for name in ("steps", "positives")] == [7, 3]
    assert (masks.provenance["keep"], masks.provenance["seed"]) == (0.5, 4)
    assert masks.provenance["sites"] == "matching('act')"
    assert masks.provenance["model"].endswith("nets.Mlp")


def nan_loader() -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in loader():
        yield images * float("nan"), labels


@pytest.mark.parametrize("method", ["nad", "class-only", "contrastive"])
def test_bad_data_is_named(method: str) -> None:
    model, data = net(), loader()
    x, y = data[0]

    def learn(data: object, **more: Any) -> nadhooks.Masks:
        return nadhooks.learn(model, data, "act", method=method, **more)  # type: ignore[arg-type]

    with pytest.raises(LearningError, match="got an empty one"):
        learn([])
    with pytest.raises(LearningError, match=r"expected a loader of \(inputs, labels\) batches, got batches of Tensor"):
        learn([x])
    with pytest.raises(LearningError, match=r"got TensorDataset; pass torch\.utils\.data\.DataLoader\(data set\), or"):
        learn(torch.utils.data.TensorDataset(x, y))
    with pytest.raises(TaskError, match=r"expected 13 whole-number labels, one per sample .*, got shape \(3,\)"):
        learn([(x, y[:3])])
    with pytest.raises(TaskError, match=r"label 3 is out of range: the model has 3 outputs"):
        learn([(x, 0 * y + 3)])
    with pytest.raises(TaskError, match=r"label -1 is out of range"):
        learn([(x, 0 * y - 1)])
    with pytest.raises(LearningError, match=r"the loader shows no sample of task shoe"):
        learn([(x[y != 1], y[y != 1])], tasks={0: "hat", 1: "shoe"})
    with pytest.raises(TaskError, match=r"task 9 is not an output of the model, which has 0 to 2"):
        learn(data, tasks=[9])
    with pytest.raises(TaskError, match=r"task 'hat': expected the whole number .* as in tasks=\{3: 'hat'\}"):
        learn(data, tasks=["hat", "shoe"])
    with pytest.raises(LearningError, match=r"the loss is nan at step 1"):
        learn(list(nan_loader()))
    with pytest.raises(SiteError, match="no module name matches"):
        nadhooks.learn(model, data, "nothing", method=method)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_what_closed_units_put_out_has_to_be_a_number() -> None:
    with pytest.raises(LearningError, match="what closed units of site 'act' put out is not finite"):
        nadhooks.learn(net(), list(nan_loader()), "act", method="random")


WRITTEN_INTO = [
    *(methods.contrastive(steps=5), methods.routing(steps=3), methods.nad(epochs=2)),
    replace(methods.nad(epochs=1), closed="mean"),
]


@pytest.mark.parametrize("method", WRITTEN_INTO)
@pytest.mark.parametrize("cache", [0, 2**30])
def test_a_model_may_write_into_its_inputs(method: methods.Method, cache: int) -> None:
    class Normalised(nn.Module):
        def __init__(self, writes: bool) -> None:
            super().__init__()
            self.inner, self.writes = net(), writes

        def forward(self, x: Tensor) -> Tensor:
            x = x.sub_(0.3).div_(2.0) if self.writes else x.sub(0.3).div(2.0)
            return cast(Tensor, self.inner(x))

    data, example = loader(), vectors()

    def learn(writes: bool, held_out: Loader) -> nadhooks.Masks:
        more: dict[str, Any] = {"method": method, "cache": cache, "held_out": held_out, "example": example}
        return nadhooks.learn(Normalised(writes), data, "inner.act", **more)

    held_out = loader(40)
    found, expected = learn(True, held_out), learn(False, loader(40))
    assert torch.equal(found["inner.act"], expected["inner.act"])
    assert all(torch.equal(found.quality[name], figures) for name, figures in expected.quality.items())
    assert all(torch.equal(x, other) for (x, _), (other, _) in zip(held_out, loader(40), strict=True))
    assert all(torch.equal(x, other) for (x, _), (other, _) in zip(data, loader(), strict=True))
    assert torch.equal(example, vectors())


def test_means_are_those_of_all_the_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
            return cast(Tensor, self.inner(x if added is None else x + added))

    def constants(data: Any) -> Tensor:
        method = methods.nad(epochs=1)
        return nadhooks.learn(Two(), data, "inner.act", method=method, closed="mean").constants["inner.act"]

    halves = [((x / 2, x / 2), y) for x, y in loader()]
    assert torch.equal(constants(halves), constants(loader()))


class Counting(nn.Module):
    """Writes to its buffers in eval mode too, one of them empty at first."""

    calls: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.empty(0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.seen.resize_(4).copy_(x[0].detach())
        self.register_buffer("last", x.detach())
        return cast(Tensor, self.inner(x))


def test_buffers_that_a_model_writes_to_are_left_as_found() -> None:
    model = Counting()
    buffers = dict(model.named_buffers())
    nadhooks.learn(model, loader(), "inner.act", method=methods.contrastive(steps=3))
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == {k: id(x) for k, x in buffers.items()}
    assert model.calls == 0
    assert model.seen.shape == (0,)


def test_half_precision_has_room_for_deviations() -> None:
    """Squares of more than 255 have none in float16."""
    model = net().float()
    with torch.no_grad():
        model.fc1.weight.mul_(2000)
        model.fc2.weight.div_(2000)
    data = [(x.half(), y) for x, y in loader()]
    found = nadhooks.learn(model.half(), data, "act", method=methods.contrastive(steps=5))
    assert float(found.constants["act"].max()) > 255


def test_lists_of_images_of_several_sizes_are_padded_as_the_model_likes() -> None:
    class Padding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 6, 3), nn.Linear(6, 3)

        def forward(self, images: list[Tensor]) -> Tensor:
            most = max(len(x) for x in images)
            padded = torch.stack([F.pad(x, (0, 0, 0, most - len(x))) for x in images])
            return cast(Tensor, self.fc(self.conv(padded[:, None]).relu().mean((2, 3))))

    random = torch.Generator().manual_seed(0)
    heights = torch.randint(8, 20, (48,), generator=random).tolist()
    images = [torch.rand(height, 7, generator=random, dtype=torch.float64) for height in heights]
    labels = torch.arange(48) % 3
    data = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 48, 16)]
    model = seeded(Padding)
    for method in (methods.contrastive(steps=4), methods.class_only(steps=4), methods.activation(), methods.nad()):
        found = [nadhooks.learn(model, data, "conv", method=method, cache=cache) for cache in (0, 2**30)]
        assert torch.equal(found[0]["conv"], found[1]["conv"])


def test_images_of_bytes_give_what_the_same_numbers_give() -> None:
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.fc(self.conv(x.double() / 255).relu().mean((2, 3))))

    images = torch.randint(0, 256, (48, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(48) % 3
    method, model = methods.contrastive(steps=4), seeded(Scaling)
    found, expected = (nadhooks.learn(model, [(x, labels)], "conv", method=method) for x in (images, images.double()))
    assert torch.equal(found["conv"], expected["conv"])
    assert set(found.wiring.edges) == {("input", "conv"), ("conv", "output")}


def test_targets_go_with_their_samples_whatever_they_are() -> None:
    x, y = (torch.cat(part) for part in zip(*loader(), strict=True))
    names = [f"label {int(label)}" for label in y]
    forms: list[Any] = [lambda part: tuple(part), lambda part: list(part), lambda part: np.array(part)]
    for form in forms:
        data = [(x[i : i + 32], y[i : i + 32], form(names[i : i + 32])) for i in range(0, 96, 32)]

        def objective(
            student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table
        ) -> Tensor:
            assert len(samples.targets) == len(samples.rows)
            for name, label, own in zip(
                samples.targets, samples.classes.tolist(), samples.positive.tolist(), strict=True
            ):
                assert (name == f"label {label}") == own
            change = (student.outputs - teacher.outputs).square().mean(1)
            return objectives.per_task(change, samples.rows, len(gates["act"]))

        nadhooks.learn(net(), data, "act", method=replace(methods.contrastive(steps=3), objective=objective))


def test_parts_of_a_method_that_give_other_shapes_are_refused() -> None:
    wrong: list[Any] = [
        lambda scores, step: None,
        lambda scores, step: {site: score.sum(1) for site, score in scores.items()},
        lambda scores, step: {site: score[:1] for site, score in scores.items()},
        lambda scores, step: {},
    ]
    for estimator in wrong:
        with pytest.raises(LearningError, match=r"the estimator must give .* of shapes {'act': \(3, 7\)}, got "):
            nadhooks.learn(net(), loader(), "act", method=replace(methods.contrastive(), estimator=estimator))
    short = replace(methods.contrastive(), initial=lambda units, random: torch.zeros(units + 1))
    with pytest.raises(LearningError, match=r"initial must give .* got {'act': \(3, 8\)}"):
        nadhooks.learn(net(), loader(), "act", method=short)


def test_gates_that_no_score_moves_are_refused() -> None:
    fixed = replace(
        methods.contrastive(steps=5),
        estimator=lambda scores, step: {k: v.detach().sigmoid() for k, v in scores.items()},
    )
    with pytest.raises(LearningError, match="do not depend on any score"):
        nadhooks.learn(net(), loader(), "act", method=fixed)


def test_a_start_that_wants_contrast_says_so() -> None:
    own = [(x[y == 0], y[y == 0]) for x, y in loader()]
    with pytest.raises(LearningError, match="start: taylor needs samples of at least two labels"):
        nadhooks.learn(net(), own, "act", method="class-only", start="taylor")


def test_a_model_made_in_inference_mode_is_refused_and_left_alone() -> None:
    with torch.inference_mode():
        model = net()
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ModelError, match=r"made under torch\.inference_mode"):
        nadhooks.learn(model, loader(), "act")
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("whole", [True, False])
def test_sites_that_run_without_gradients_are_refused(whole: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.first = net(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return cast(Tensor, checkpoint(self.inner, x, use_reentrant=True))

    with pytest.raises(LearningError, match=r"site 'inner\.act' runs without gradients"):
        nadhooks.learn(Checkpointed(), loader(), "inner.act" if whole else ["first", "inner.act"])


def test_masks_do_not_depend_on_the_default_dtype() -> None:
    model, data = net().float(), [(x.float(), y) for x, y in loader()]
    first, last = {}, {}
    nadhooks.learn(model, data, "act", progress=lambda report: first.update({report.done: report.terms}))
    torch.set_default_dtype(torch.float64)
    try:
        nadhooks.learn(model, data, "act", progress=lambda report: last.update({report.done: report.terms}))
    finally:
        torch.set_default_dtype(torch.float32)
    assert first == last


def test_half_precision_that_the_processor_has_no_instructions_for_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nadhooks.learning.emulated", lambda dtype: True)
    with pytest.warns(UserWarning, match="no instructions for torch.bfloat16; float32 is many times as fast"):
        nadhooks.learn(net().float(), [(x.float(), y) for x, y in loader()], "act", autocast=torch.bfloat16)


def test_autocast_around_it_changes_nothing() -> None:
    def learn() -> nadhooks.Masks:
        data = [(x.float(), y) for x, y in loader()]
        return nadhooks.learn(net().float(), data, "act", method=methods.contrastive(steps=5), held_out=data)

    expected = learn()
    with torch.autocast("cpu", torch.bfloat16):
        found = learn()
    assert torch.equal(found["act"], expected["act"])
    assert torch.equal(found.constants["act"], expected.constants["act"])
    assert all(torch.equal(found.quality[name], figures) for name, figures in expected.quality.items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_learning_works_where_gradients_are_off(mode: Any) -> None:
    model, data = net(), loader()
    expected = nadhooks.learn(model, data, "act", method=methods.contrastive(steps=5))
    with mode():
        assert torch.equal(
            nadhooks.learn(model, data, "act", method=methods.contrastive(steps=5))["act"], expected["act"]
        )


def test_loaders_of_other_kinds_are_read_or_refused() -> None:
    data = loader()
    expected = nadhooks.learn(net(), data, "act", method=methods.contrastive(steps=5))
    small = [(x, y.to(torch.uint8)) for x, y in data] + [(data[0][0][:0], data[0][1][:0])]
    assert torch.equal(nadhooks.learn(net(), small, "act", method=methods.contrastive(steps=5))["act"], expected["act"])
    for wrong in (5, None):
        with pytest.raises(LearningError, match="expected a loader"):
            nadhooks.learn(net(), wrong, "act")  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="expected whole-number labels"):
        nadhooks.learn(net(), [(data[0][0], ["cat"] * 13)], "act")
    for method in (methods.nad(epochs=1), "nad"):
        with pytest.raises(LearningError, match="got an iterator"):
            nadhooks.learn(net(), iter(data), "act", method=method)
    x, y = data[0]
    wrong_targets: list[tuple[Any, str]] = [
        (
            torch.zeros(39, 5),
            r"of the 13 samples, .*got Tensor of shape \(39, 5\); yield \(inputs, labels\) alone",
        ),
        ([x, x], r"got list of 2 \(Tensor of shape \(13, 4\)\)"),
        ({"size": [y, y]}, r"got dict of 'size': list of 2"),
    ]
    for targets, message in wrong_targets:
        with pytest.raises(LearningError, match=message):
            nadhooks.learn(net(), [(x, y, targets)], "act")
    with pytest.raises(TaskError, match=r"expected 2 whole-number labels.*a tuple one for each argument of the model"):
        nadhooks.learn(net(), [([x, x], y)], "act")
    with pytest.raises(LearningError, match=r"expected samples of one shape in every batch, got \(4,\) and \(5,\)"):
        nadhooks.learn(nn.Sequential(Sums(), net()), [(x, y), (F.pad(x, (0, 1)), y)], "1.act")


class Sums(nn.Module):
    """Takes any number of numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True).repeat(1, 4)


def test_objectives_of_another_shape_are_refused() -> None:
    for wrong in (lambda s, t, p, g: s.outputs.sum(1), lambda s, t, p, g: s.outputs.sum(), lambda s, t, p, g: 3.0):
        with pytest.raises(LearningError, match=r"one loss per task, shape \(3,\), got"):
            nadhooks.learn(net(), loader(), "act", method=wrong)  # type: ignore[arg-type]
    with pytest.raises(LearningError, match="does not depend on any gate"):
        nadhooks.learn(net(), loader(), "act", method=lambda s, t, p, g: torch.zeros(3))


def test_an_update_that_gives_other_scores_is_refused() -> None:
    def update(scores: methods.Table, gradients: methods.Table, step: methods.Step, state: methods.Table) -> Any:
        return {site: score - gradients[site] for site, score in scores.items()}

    with pytest.raises(LearningError, match=r"an update changes scores in place and gives None, got dict"):
        nadhooks.learn(net(), loader(), "act", method=replace(methods.contrastive(steps=2), update=update))


def test_models_that_run_in_inference_mode_are_refused() -> None:
    class Inferring(Mlp):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(LearningError, match=r"site 'act' runs under torch\.inference_mode"):
        nadhooks.learn(Inferring().double(), loader(), "act")


def test_a_data_set_in_place_of_a_loader_is_told_from_one() -> None:
    with pytest.raises(TaskError, match=r"this is a sample, not a batch: pass torch\.utils.data.DataLoader"):
        nadhooks.learn(net(), [(x, int(y)) for x, y in zip(*loader()[0], strict=True)], "act")


def test_bad_options_are_named() -> None:
    model, data = net(), loader()
    for make in (lambda: methods.contrastive(steps=0), lambda: methods.nad(batch=0), lambda: methods.nad(epochs=0)):
        with pytest.raises(LearningError, match="of at least 1, got 0"):
            make()
    impossible: list[dict[str, Any]] = [{"negatives": -1}, {"images": -3}]
    for draws in impossible:
        with pytest.raises(LearningError, match="expected negatives of at least 0 and images of at least 1"):
            methods.contrastive(**draws)
    with pytest.raises(LearningError, match=r"expected sampling of .*, got 'bogus'"):
        replace(methods.contrastive(), sampling="bogus")  # type: ignore[arg-type]
    with pytest.raises(NadhooksError, match="got the function that makes 'contrastive'; call it"):
        nadhooks.learn(model, data, "act", method=methods.contrastive)  # type: ignore[arg-type]
    with pytest.raises(NadhooksError, match=r"start: expected 'nad', .*, got 'bogus'"):
        nadhooks.learn(model, data, "act", start="bogus")
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got str"):
        nadhooks.learn("resnet18", data)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="two or more classes, got one output"):
        nadhooks.learn(
            nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1)).double(), [(vectors(4), torch.zeros(4).long())], "0"
        )
    for keep in (0, 1.5, -0.1):
        with pytest.raises(NadhooksError, match="keep: expected a share above 0 and at most 1"):
            nadhooks.learn(model, data, "act", keep=keep)
    with pytest.raises(NadhooksError, match="keep: with 'nad' the share that is kept follows"):
        nadhooks.learn(model, data, "act", method="nad", keep=0.5)
    with pytest.raises(NadhooksError, match=r"method: expected 'nad', 'class-only', 'contrastive', .*got 'magic'"):
        nadhooks.learn(model, data, "act", method="magic")
    with pytest.raises(NadhooksError, match="needs samples of at least two labels"):
        nadhooks.learn(model, [(x[y == 0], y[y == 0]) for x, y in data], "act")
    with pytest.raises(NadhooksError, match="closed: expected 'zero' or 'mean' or 'optimal', got 'half'"):
        nadhooks.learn(model, data, "act", closed="half")  # type: ignore[arg-type]
    for method in ("nad", "taylor"):
        with pytest.raises(NadhooksError, match="closed: expected 'zero' or 'mean', got 'optimal', which is learnt"):
            nadhooks.learn(model, data, "act", method=method, closed="optimal")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"seed": None}, "seed: expected a whole number of 64 bits, got None"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"seed": 2**70}, "seed: expected a whole number"),
        ({"cache": None}, "cache: expected a number of bytes, 0 or more, got None"),
        ({"cache": -1}, "cache: expected a number of bytes"),
        ({"every": "5"}, "every: expected a number of seconds, 0 or more, got '5'"),
        ({"every": float("nan")}, "every: expected a number of seconds"),
        ({"autocast": "bfloat16"}, "autocast: expected torch.bfloat16, torch.float16 or None .*, got 'bfloat16'"),
        ({"autocast": torch.int8}, "autocast: expected torch.bfloat16, torch.float16 or None"),
        ({"autocast": torch.float64}, "expected torch.bfloat16, torch.float16 or None .*, got torch.float64"),
        ({"progress": "a.csv"}, "progress: expected functions of a Progress, .* got 'a.csv'"),
        ({"progress": [print, 5]}, "progress: expected functions of a Progress, .* got 5"),
    ]
    for options, message in wrong:
        with pytest.raises(NadhooksError, match=message):
            nadhooks.learn(model, data, "act", **options)
    quick = methods.contrastive(steps=5)
    found = nadhooks.learn(model, data, "act", method=quick, seed=np.int64(3), cache=1e6)  # type: ignore[arg-type]
    assert torch.equal(found["act"], nadhooks.learn(model, data, "act", method=quick, seed=3)["act"])
    with pytest.raises(ModelError, match=r"expected a classifier that puts out \(batch, classes\)"):
        nadhooks.learn(nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1))).double(), data, "0")
    squeezing = net()
    squeezing.register_forward_hook(lambda module, args, out: out.squeeze())
    with pytest.raises(ModelError, match=r"got shape \(3,\); if the model squeezes batches of one"):
        nadhooks.learn(squeezing, data, "act")
    with pytest.raises(ModelError, match="lazy modules, which have no weights yet; run it once"):
        nadhooks.learn(nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3)).double(), data, "0")
    with torch.device("meta"), pytest.raises(ModelError, match="on the meta device, where there are no values"):
        nadhooks.learn(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), data, "0")
    with pytest.raises(TaskError, match="outputs: expected for task 0 a list of the model's outputs, got 0"):
        nadhooks.learn(model, data, "act", outputs={0: 0, 1: 1})  # type: ignore[dict-item]
    beta = np.float32(0.25)  # a number that JSON does not know
    assert nadhooks.learn(model, data, "act", method=methods.nad(beta=beta, epochs=1)).provenance["options"] == {
        **methods.nad(epochs=1).described(),
        "beta": 0.25,
    }


def test_binary_kl_is_exact_and_stable() -> None:
    teacher = torch.tensor([[2.0, 0.5, -1.0], [40.0, 0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[1.0, 0.7, 0.3], [20.0, 0.0, 0.0]], dtype=torch.float64)
    classes = torch.tensor([0, 0])
    p, q = teacher.softmax(1)[0, 0], student.softmax(1)[0, 0]
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = objectives.binary_kl(student, teacher, classes)
    torch.testing.assert_close(found[0], expected)
    assert 0 < float(found[1]) < 1e-8  # 1 − p is 4e-18 there: it would vanish if computed as 1 − p
    assert float(objectives.binary_kl(teacher, teacher, classes).abs().max()) == 0


def test_means_are_taken_per_task() -> None:
    values, rows = torch.tensor([1.0, 3.0, 10.0]), torch.tensor([2, 2, 0])
    assert objectives.per_task(values, rows, 3).tolist() == [10, 0, 2]


def test_the_kept_share_falls_from_one_to_the_target() -> None:
    shares = [0.3 + 0.7 * cubic(step, 100) for step in range(100)]
    assert 0.95 < shares[0] < 1
    assert shares == sorted(shares, reverse=True)
    assert shares[69] == shares[99] == pytest.approx(0.3)
    assert shares[34] == pytest.approx(0.3 + 0.7 * 0.5**3)


# --- faults of the authors' code that must not come back ------------------------------------------------------------


def test_no_gradients_are_computed_for_weights() -> None:
    model = net()
    required: list[bool] = []

    def objective(
        student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table
    ) -> Tensor:
        required.extend(parameter.requires_grad for parameter in model.parameters())
        return gates["act"].sum(1) + 0 * student.outputs.sum()

    nadhooks.learn(model, loader(), "act", method=objective)
    assert required
    assert not any(required)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", ["nad", "class-only", "contrastive"])
def test_one_network_is_in_memory_and_not_two(method: str) -> None:
    class Unique(Mlp):
        def __deepcopy__(self, memo: object) -> Unique:
            raise AssertionError("copied")

        def __reduce__(self) -> str:
            raise AssertionError("pickled")

    nadhooks.learn(seeded(Unique, SEED), loader(), "act", method=method)


class Counted:
    """A loader that counts how often it is read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.read += 1
        return iter(loader())


def test_all_classes_share_each_pass_over_the_data() -> None:
    counted = Counted()
    nadhooks.learn(net(), counted, "act", tasks=3, method=methods.nad(epochs=4))
    assert counted.read == 1 + 4  # one look at the first sample, then the epochs
    counted = Counted()
    nadhooks.learn(net(), counted, "act", tasks=3)
    assert counted.read == 1 + 1


@pytest.mark.parametrize("method", ["random", "activation"])
def test_fidelity_of_a_ranking_is_measured_on_outputs_not_by_its_own_objective(method: str) -> None:
    masks = nadhooks.learn(net(), loader(), ["fc1", "act"], method=method, fidelity=0.005)
    curve = masks.provenance["curve"]
    divergence = torch.tensor(curve["divergence"])  # (shares, tasks)
    assert bool((divergence >= 0).all())
    assert bool((divergence > 0.005).any())
    for row, kept in enumerate(masks.kept().tolist()):
        fits = [share[row] for share, far in zip(curve["keep"], curve["divergence"], strict=True) if far[row] <= 0.005]
        assert kept == pytest.approx(min([1.0, *fits]), abs=0.5 / 14 + 1e-6)  # of 14 units


def test_options_may_be_numpys_numbers() -> None:
    """As they come out of np.linspace, np.flatnonzero and the like; in the file they are plain ones."""
    model, data, quick = net(), loader(), methods.contrastive(steps=3)

    def learnt(**options: Any) -> nadhooks.Masks:
        return nadhooks.learn(model, data, "act", method=quick, **options)

    assert learnt(keep=np.float32(0.5)) == learnt(keep=0.5)
    assert learnt(keep=np.int64(4)) == learnt(keep=4)
    assert learnt(fidelity=np.float32(0.5)) == learnt(fidelity=0.5)
    expected = learnt(outputs={0: [0, 1], 1: [2]})
    assert learnt(outputs={0: np.arange(2), 1: [np.int64(2)]}) == expected
    assert learnt(outputs={0: torch.arange(2), 1: [2]}) == expected


def test_provenance_says_what_a_run_started_from_and_was_bounded_by() -> None:
    model, data = net(), loader()
    first = nadhooks.learn(model, data, "act", method=methods.contrastive(steps=5), keep=3, seed=2)
    assert first.provenance["keep"] == 3
    assert "start" not in first.provenance
    then = nadhooks.learn(model, data, "act", method=methods.class_only(steps=2), start=first, fidelity=0.5)
    assert then.provenance["start"] == {name: first.provenance[name] for name in ("method", "options", "keep", "seed")}
    assert then.provenance["fidelity"] == 0.5
    assert "keep" not in then.provenance
    ranked = nadhooks.learn(model, data, "act", method=methods.class_only(steps=2), start=methods.activation(images=8))
    assert ranked.provenance["start"] == {"method": "activation", "options": {"images": 8}}
