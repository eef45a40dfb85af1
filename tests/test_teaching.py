from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nadhooks
from nadhooks import methods
from nadhooks.starting import TOGETHER
from nadhooks.teaching import Forward, Teacher

from .nets import Line, Mlp, fair_line, images, labelled, seeded, vectors

LARGE = 2**30


@contextmanager
def teaching(
    model: nn.Module, sites: Any, example: Any, capacity: int = LARGE, compares: bool = True, read: Any = None
) -> Iterator[Teacher]:
    with nadhooks.as_found.frozen(model), nadhooks.attach(model, sites, example=example) as gates:
        forward = Forward(gates, torch.device("cpu"), read or (lambda outputs: outputs))
        forward.settle(example)
        yield Teacher(forward, capacity, compares)


def counted(model: nn.Module) -> list[int]:
    """Samples of each forward pass from now on."""
    passes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    return passes


# --- what it remembers ---


@pytest.mark.parametrize("again", [True, False])
def test_memory_is_given_back_where_no_image_comes_again(again: bool) -> None:
    model, x = fair_line(), images(6)
    with teaching(model, ["act1", "act2"], x[:1]) as teacher:
        teacher.of(x[:3], [0, 1, 2]).outputs  # noqa: B018
        teacher.of(x[3:], [3, 4, 1 if again else 5]).outputs  # noqa: B018
        teacher.forget_unused()
        assert bool(teacher.outputs.tables) is bool(teacher.sites.tables) is again
        answers = teacher.of(x, range(6))
        torch.testing.assert_close(answers.outputs, model(x).detach(), rtol=0, atol=1e-14)
        assert answers.sites["act1"].shape == (6, 4, 36)
        assert teacher.outputs.staying == (6 if again else 0)


def test_with_memory_enough_each_image_is_asked_once() -> None:
    model, x = fair_line(), images(6)
    with teaching(model, ["act1", "act2"], x[:1]) as teacher:
        passes = counted(model)
        expected = model(x).detach()
        passes.clear()
        for places in ([0, 1], [1, 2, 1], [0, 2, 1], [3], [3, 0, 5]):
            answers = teacher.of(x[places], places)
            torch.testing.assert_close(answers.outputs, expected[places], rtol=0, atol=1e-14)
            assert answers.sites["act1"].shape == (len(places), 4, 36)
        assert passes == [2, 1, 1, 1]


def test_without_memory_each_step_asks_once() -> None:
    model, x = fair_line(), images(6)
    with teaching(model, ["act1", "act2"], x[:1], capacity=0) as teacher:
        expected = teacher.forward(x, 6)
        passes = counted(model)
        for places in ([0, 1], [1, 2], [1, 2], [1]):
            answers = teacher.of(x[places], places)
            torch.testing.assert_close(answers.outputs, expected.outputs[places], rtol=0, atol=1e-14)
            torch.testing.assert_close(answers.sites["act2"], expected.sites["act2"][places], rtol=0, atol=1e-14)
            part = answers.take(torch.tensor([0]))
            torch.testing.assert_close(part.outputs, expected.outputs[places[:1]], rtol=0, atol=1e-14)
        assert passes == [2, 2, 1]  # a batch that comes twice in a row is asked once


@pytest.mark.parametrize("capacity", [0, LARGE])
def test_answers_to_no_images_at_all_are_empty(capacity: int) -> None:
    model, x = fair_line(), images(3)
    with teaching(model, "act1", x[:1], capacity) as teacher:
        answers = teacher.of(x, range(3))
        assert answers.sites["act1"].shape == (3, 4, 36)
        teacher.sites.forget_passing()  # as after each step
        assert answers.take(torch.zeros(3, dtype=torch.bool)).sites["act1"].shape == (0, 4, 36)


def test_nothing_is_asked_of_which_nobody_wants_to_know() -> None:
    model, x = fair_line(), images(6)
    with teaching(model, "act1", x[:1]) as teacher:
        passes = counted(model)
        answers = teacher.of(x, range(6))
        assert passes == []
        assert answers.take(torch.tensor([False, True, True, False, False, False])).sites["act1"].shape == (2, 4, 36)
        assert passes == [2]


@pytest.mark.parametrize("capacity", [0, 1_000, 5_000, 20_000])
def test_memory_stays_within_its_bytes_and_answers_stay_right(capacity: int) -> None:
    model, x = fair_line(), images(24)
    with teaching(model, ["act1", "act2"], x[:1], capacity) as teacher:
        expected = teacher.forward(x, 24)
        random = torch.Generator().manual_seed(0)
        for _ in range(30):
            places = torch.randint(24, (5,), generator=random).tolist()
            answers = teacher.of(x[places], places)
            torch.testing.assert_close(answers.outputs, expected.outputs[places], rtol=0, atol=1e-14)
            for site in ("act1", "act2"):
                torch.testing.assert_close(answers.sites[site], expected.sites[site][places], rtol=0, atol=1e-14)
            one = 36 * (4 + 5) * 8 + 3 * 8  # bytes that the open network says of one image
            memory = (teacher.outputs, teacher.sites)
            assert sum(table.nbytes for rows in memory for table in rows.tables) <= capacity
            passing = sum(x.nbytes for rows in memory for x in rows.passers)
            assert passing <= 5 * one  # a batch has to be there while it is looked at


def test_learning_asks_the_open_network_for_each_image_once() -> None:
    model = fair_line()
    data = labelled(model, images(60))
    passes, masks = {}, {}
    method = methods.contrastive(steps=10, positives=4, negatives=4)
    for cache in (LARGE, 0):
        seen = counted(model)
        masks[cache] = nadhooks.learn(model, data, "act1", method=method, cache=cache)
        passes[cache] = [n for n in seen if n > 2]  # attaching looks at one and two
    assert passes[LARGE] == [60, TOGETHER] + [24] * 10  # the preparation, then the gated network alone
    asked = sum(passes[0]) - 60 - TOGETHER - 10 * 24
    assert asked > 10 * 12  # in each step
    assert torch.equal(masks[0]["act1"], masks[LARGE]["act1"])


@pytest.mark.parametrize("cache", [0, 30_000, LARGE])
@pytest.mark.parametrize(
    "method", [methods.nad(epochs=2, batch=5), methods.class_only(steps=6), methods.contrastive(steps=6)]
)
def test_memory_changes_no_mask(method: methods.Method, cache: int) -> None:
    model = fair_line()
    data = labelled(model, images(60))
    masks, expected = (
        nadhooks.learn(model, data, ["act1", "act2"], method=method, cache=bytes_) for bytes_ in (cache, 300_000)
    )
    for site in ("act1", "act2"):
        torch.testing.assert_close(masks[site], expected[site], rtol=0, atol=1e-12)


@pytest.mark.parametrize("crops", [True, False])
def test_the_papers_method_remembers_nothing_of_images_that_always_change(
    crops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fair_line()
    data = labelled(model, images(40))

    class Loader:
        def __len__(self) -> int:
            return len(data)

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for x, labels in data:
                yield x + crops * 1e-3 * torch.randn(x.shape, dtype=x.dtype), labels

    remembered: dict[int, int] = {}
    of = Teacher.of

    def spy(self: Teacher, inputs: Any, keys: Any) -> Any:
        remembered[len(remembered)] = self.outputs.staying
        return of(self, inputs, keys)

    monkeypatch.setattr(Teacher, "of", spy)
    nadhooks.learn(model, Loader(), "act1", method=methods.nad(epochs=4), tasks=[0])
    steps = len(remembered)
    assert remembered[steps // 4] > 0
    assert (remembered[steps - 1] == 0) is crops


@pytest.mark.parametrize("epochs", [1, 2])
def test_what_no_second_epoch_shows_is_not_remembered(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fair_line()
    data = labelled(model, images(60))
    remembered: list[int] = []
    of = Teacher.of

    def spy(self: Teacher, inputs: Any, keys: Any) -> Any:
        remembered.append(self.sites.staying)
        return of(self, inputs, keys)

    monkeypatch.setattr(Teacher, "of", spy)
    nadhooks.learn(model, data, "act1", method=methods.nad(epochs=epochs, batch=4), tasks=[0])
    assert len(remembered) > 2 * epochs
    assert (max(remembered) == 0) is (epochs == 1)


def test_equal_images_share_an_answer_in_the_papers_method() -> None:
    model = fair_line()
    data = labelled(model, images(30))
    passes = counted(model)
    nadhooks.learn(model, data, "act1", method=methods.nad(epochs=4, batch=8), tasks=[0])
    own = sum(int((labels == 0).sum()) for _, labels in data)
    whole = [n for n in passes if n > 2]
    assert sum(whole) == own + 4 * own  # asked in the first epoch, gated in every one


# --- what objectives see ---


def test_a_layer_that_overwrites_what_leaves_a_site_changes_nothing() -> None:
    model, x = fair_line(), images(8)  # act1 is in place and overwrites what conv1 put out
    with teaching(model, ["conv1", "conv2"], x[:1]) as teacher:
        expected = model.conv1(x).flatten(2)
        assert bool((expected < 0).any())
        torch.testing.assert_close(teacher.of(x, range(8)).sites["conv1"], expected, rtol=0, atol=1e-14)
        gate = torch.rand(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with teacher.forward.gates.apply({"conv1": gate}):
            student = teacher.forward(x, 8)
        torch.testing.assert_close(student.sites["conv1"], expected * gate[:, :, None], rtol=0, atol=1e-14)
        (gradient,) = torch.autograd.grad(student.sites["conv1"].square().sum(), gate)
        torch.testing.assert_close(gradient[0], (2 * gate[0] * expected.square().sum((0, 2))).detach())
    assert teacher.forward.overwritten == {"conv1"}


def test_objectives_learn_the_same_on_a_network_that_overwrites_nothing() -> None:
    free = fair_line()
    free.act1 = nn.ReLU()
    data = labelled(free, images(40))
    for method in (methods.nad(epochs=2), methods.contrastive(steps=6)):
        first, second = (
            nadhooks.learn(model, data, ["conv1", "conv2"], method=method) for model in (fair_line(), free)
        )
        assert all(torch.equal(first[site], second[site]) for site in ("conv1", "conv2"))


class Flat(Line):
    """Flattens with `view`, which does not take images whose channels lie last in memory."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head = nn.Linear(5 * 36, 3)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.conv2(self.act1(self.conv1(x))))
        return self.head(self.flatten(x))


def test_networks_that_flatten_with_view_get_the_same_masks() -> None:
    channels_last, masks = [], []
    for flatten in (lambda x: x.view(x.size(0), -1), lambda x: x.flatten(1)):
        model = seeded(lambda flatten=flatten: Flat(flatten), 3)  # type: ignore[arg-type]
        with torch.no_grad():
            model.head.bias.sub_(model(images(40)).mean(0))
        data = labelled(model, images(40))
        with teaching(model, "act1", images(1)) as teacher:
            channels_last.append(teacher.forward.channels_last)
        masks.append(nadhooks.learn(model, data, ["act1", "act2"], method=methods.contrastive(steps=9), seed=1))
    assert channels_last == [False, True]
    assert all(torch.equal(masks[0][site], masks[1][site]) for site in ("act1", "act2"))


class Last(nn.Module):
    """(batch, 2, 6, 6) images and (batch, tokens, features) within."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.mlp = nn.Linear(4, 6)
        self.tokens = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        return self.head(self.tokens(self.mlp(x).flatten(1, 2)).mean(1))


def test_every_site_shows_samples_units_positions() -> None:
    model, x = seeded(Last), images(5)
    with teaching(model, ["conv", "mlp", "tokens"], x[:1]) as teacher:
        sites = teacher.of(x, range(5)).sites
        nchw = model.conv(x)
        nhwc = model.mlp(nchw.permute(0, 2, 3, 1))
        tokens = model.tokens(nhwc.flatten(1, 2))
        torch.testing.assert_close(sites["conv"], nchw.flatten(2))
        torch.testing.assert_close(sites["mlp"], nhwc.permute(0, 3, 1, 2).flatten(2))
        torch.testing.assert_close(sites["tokens"], tokens.transpose(1, 2))
    flat = seeded(Mlp)
    with teaching(flat, "act", vectors(1)) as teacher:
        sites = teacher.of(vectors(5), range(5)).sites
        torch.testing.assert_close(sites["act"], flat.act(flat.fc1(vectors(5)))[:, :, None])


@pytest.mark.parametrize("alternating", [False, True])
def test_heads_show_their_features_as_positions(alternating: bool) -> None:
    model, x = seeded(Mlp), vectors(5)
    with teaching(model, nadhooks.sites.matching("fc1"), x[:1]) as teacher:
        (site,) = teacher.forward.gates.sites
    heads = replace(site, units=3, block=2, alternating=alternating)
    features = torch.arange(5 * 6).double().reshape(5, 6)
    shown = nadhooks.gating.by_unit(features, heads, 5)
    assert shown.shape == (5, 3, 2)
    places = [[0, 3], [1, 4], [2, 5]] if alternating else [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(shown, features[:, torch.tensor(places)])
    tokens = torch.arange(5 * 4 * 6).double().reshape(5, 4, 6)
    shown = nadhooks.gating.by_unit(tokens, replace(heads, axis=2), 5)
    expected = tokens[:, :, torch.tensor(places)].permute(0, 2, 3, 1)  # (samples, heads, features, tokens)
    assert shown.shape == (5, 3, 8)
    assert torch.equal(shown.sort(2).values, expected.flatten(2).sort(2).values)


def test_windows_and_views_belong_to_their_samples() -> None:
    model = seeded(Mlp)
    with nadhooks.attach(model, "fc1", example=vectors(1)) as gates:
        (site,) = gates.sites
    x = torch.arange(6 * 7).double().reshape(6, 7)
    windows = nadhooks.gating.by_unit(x, site, 2)  # a sample's three lie together
    views = nadhooks.gating.by_unit(x, replace(site, views=True), 2)  # a view's two samples lie together
    assert windows.shape == views.shape == (2, 7, 3)
    assert torch.equal(windows[0], x[:3].T)
    assert torch.equal(views[0], x[::2].T)


# --- outputs of any kind ---


class Puts(Mlp):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(super().forward(x))


@pytest.mark.parametrize(
    ("form", "by_sample"),
    [
        (lambda y: {"logits": y, "more": (y[:, :1], y)}, True),
        (lambda y: [y, y], True),
        (lambda y: y[:, :, None, None].expand(-1, -1, 4, 4), True),
        (lambda y: [{"boxes": y[:2], "scores": y[:2, 0]} for _ in y], False),  # two boxes, as many as samples are tried
        (lambda y: (y, y.sum()), False),
        (lambda y: (y, "text"), False),
        (lambda y: y.mean(0, keepdim=True), False),
        (lambda y: y.mean(0).expand(2, -1), False),
    ],
)
def test_outputs_of_any_kind_are_handed_over(form: Callable[[Tensor], Any], by_sample: bool) -> None:
    model = seeded(lambda: Puts(form), 1)  # type: ignore[arg-type]
    x = vectors(6)
    with teaching(model, "act", x[:1]) as teacher:
        assert teacher.forward.by_sample is by_sample
        expected, again = teacher.of(x, range(6)).outputs, teacher.of(x[:4], range(4)).outputs
        leaves = nadhooks.nesting.leaves_of
        assert type(expected) is type(model(x))
        for found, wanted in ((expected, model(x)), (again, model(x[:4]))):
            for a, b in zip(leaves(found), leaves(wanted), strict=True):
                if isinstance(a, Tensor):
                    torch.testing.assert_close(a, b)
                else:
                    assert a == b


def test_outputs_of_lower_precision_are_shown_in_full() -> None:
    model = fair_line().float()
    x = images(5).float()
    with teaching(model, "act1", x[:1]) as teacher:
        teacher.forward.autocast = torch.bfloat16
        found = teacher.of(x, range(5))
        assert found.outputs.dtype == torch.float32
        assert found.sites["act1"].dtype == torch.bfloat16
        torch.testing.assert_close(found.outputs, model(x), rtol=0, atol=0.5)
        assert not torch.equal(found.outputs, model(x))
