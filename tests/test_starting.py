from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nadhooks
from nadhooks import methods
from nadhooks.evaluation import recognition
from nadhooks.starting import SAMPLES, TOGETHER, beside_means
from nadhooks.teaching import Forward


class Between(nn.Module):
    """Two linear layers, and something between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.between, self.last = nn.Linear(4, 6), between, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def looked_at(model: nn.Module, inputs: Tensor, sites: str | list[str]) -> dict[str, Tensor]:
    model.eval().requires_grad_(False)
    with nadhooks.attach(model, sites, example=inputs[:1]) as gates:
        forward = Forward(gates, torch.device("cpu"), lambda x: x)
        forward.settle(inputs[:1])
        return beside_means(forward, inputs, len(inputs))


def inputs(seed: int = 1, samples: int = SAMPLES) -> Tensor:
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("relu", [F.relu, lambda x: F.relu(x, inplace=True), lambda x: F.relu6(x)])
def test_before_a_relu_the_start_lies_between_what_the_relu_puts_out_and_what_it_lets_through(
    relu: Callable[[Tensor], Tensor],
) -> None:
    model, x = Between(relu), inputs()
    with torch.no_grad():
        values = model.first(x)
    beside = looked_at(model, x, "first")["first"]
    total, live = torch.zeros(6), torch.zeros(6)
    for part in values.split(TOGETHER):
        for unit in range(6):
            value = part[:, unit]
            through = value[value > 0]
            if 0 < len(through) < len(value):
                out, stopped = value.clamp(min=float(through.min())).mean(), 1 - len(through) / len(value)
                total[unit] += len(through) * (out + stopped * (through.mean() - out) - value.mean())
            live[unit] += len(through)
    assert torch.allclose(beside, total / live, atol=1e-6)
    assert (beside > 0).all()
    assert (values.mean(0) + beside > 0).all()  # where gradients come through


def test_where_everything_is_read_the_start_is_the_mean_exactly() -> None:
    model = Between(nn.ReLU())
    assert torch.equal(looked_at(model, inputs(), ["between"])["between"], torch.zeros(6))
    for smooth in (F.gelu, torch.tanh, lambda x: x):
        assert torch.equal(looked_at(Between(smooth), inputs(), "first")["first"], torch.zeros(6))


def test_what_is_read_at_large_values_counts_from_above_too() -> None:
    x = inputs()
    below = looked_at(Between(lambda y: F.relu(-y)), x, "first")["first"]
    mirrored = Between(F.relu)
    with torch.no_grad():
        mirrored.first.weight.neg_(), mirrored.first.bias.neg_()
    assert torch.allclose(below, -looked_at(mirrored, x, "first")["first"], atol=1e-6)


class First(nn.Module):
    """Of five positions, as of a transformer's tokens, the first alone is read."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.between, self.last = nn.Conv1d(4, 6, 1), between, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.tokens(x))[:, :, 0])


def test_positions_that_nobody_reads_are_left_out() -> None:
    x = torch.stack([inputs(seed) for seed in range(5)], 2) + torch.arange(5.0)  # (samples, 4, 5)
    assert torch.equal(looked_at(First(torch.tanh), x, "tokens")["tokens"], torch.zeros(6))

    model, alone = First(F.relu), Between(F.relu)
    alone.first.load_state_dict({"weight": model.tokens.weight[:, :, 0], "bias": model.tokens.bias})
    x = x[:TOGETHER]
    with torch.no_grad():
        values = model.tokens(x)  # (TOGETHER, 6, 5)
    start = values.mean((0, 2)) + looked_at(model, x, "tokens")["tokens"]
    of_read = values[:, :, 0].mean(0) + looked_at(alone, x[:, :, 0], "first")["first"]
    stopped = (values[:, :, 0] < 0).any(0) & (values[:, :, 0] > 0).any(0)
    assert stopped.sum() > 3
    assert torch.allclose(start[stopped], of_read[stopped], atol=1e-5)
    assert torch.equal(start[~stopped], values.mean((0, 2))[~stopped])


def test_units_that_nothing_depends_on_and_outputs_without_gradients_start_at_their_means() -> None:
    class Dead(Between):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(torch.cat([y[:, :3], 0 * y[:, 3:]], 1))

    assert torch.equal(looked_at(Dead(F.relu), inputs(), "first")["first"], torch.zeros(6))
    assert looked_at(Between(lambda x: x.detach()), inputs(), "first") == {}


def test_masks_of_layers_before_relu_are_worth_as_much_as_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that tells eight clusters apart; the same units, gated before batch norm and ReLU or behind them."""
    torch.manual_seed(0)
    centres = 1.3 * torch.randn(8, 12)
    labels = torch.arange(8).repeat_interleave(150)
    x = centres[labels] + 1.5 * torch.randn(1200, 12)
    layers = [nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, 8))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x[::2]), labels[::2]).backward()
        optimizer.step()
    model.eval()

    def worth(sites: list[str]) -> tuple[float, float]:
        found = nadhooks.learn(model, [(x[::2], labels[::2])], sites, keep=0.2, method=methods.contrastive(steps=80))
        with nadhooks.attach(model, found.sites, tasks=8, example=x[:1]) as gates:
            rows = recognition(gates, [(x[1::2], labels[1::2])], found)
        return sum(row.auc for row in rows) / 8, sum(row.fpr for row in rows) / 8

    behind, before = worth(["2", "5"]), worth(["0", "3"])
    monkeypatch.setattr("nadhooks.learner.beside_means", lambda *given: {})
    from_means = worth(["0", "3"])
    assert before[0] > behind[0] - 0.02
    assert before[0] > from_means[0] + 0.01
    assert before[1] < from_means[1] - 0.03


def test_units_that_stay_open_have_their_means_to_be_closed_to() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    x = torch.randn(600, 4)
    with torch.no_grad():
        values, labels = model[0](x), model(x).argmax(1)
    masks = nadhooks.learn(model, [(x, labels)], "0", keep=0.5, method=methods.contrastive(steps=30, images=600))
    beside = (masks.constants["0"] - values.mean(0)) / values.std(0)
    kept = masks["0"] == 1
    assert beside[kept].abs().max() < 0.1
    assert beside[~kept].mean() > 0.3
