from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nadhooks
from nadhooks.errors import DataError, NadhooksError, TaskError
from nadhooks.evaluation import recognition, shuffled


class Logits(nn.Module):
    """Puts out its input, three logits, through a site of three units."""

    def __init__(self) -> None:
        super().__init__()
        self.copy = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.copy.weight.copy_(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.copy(x)


# three images of class 0 (two of them answered with 0), two of class 1 (one answered with 0), one of class 2
LOGITS = torch.tensor([[5.0, 0, 0], [3.0, 0, 0], [0, 1.0, 0], [4.0, 1.0, 0], [0, 6.0, 0], [0, 0, 2.0]])
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])


def test_figures_are_those_counted_by_hand() -> None:
    model = Logits().train()
    with nadhooks.attach(model, "copy", tasks=3, example=LOGITS) as gates:
        zero, one, two = recognition(gates, [(LOGITS[:4], LABELS[:4]), (LOGITS[4:], LABELS[4:])])
        assert model.training
    assert zero.recall == pytest.approx(2 / 3)
    assert zero.fpr == pytest.approx(1 / 3)
    p = LOGITS.softmax(1)[:, 0]
    pairs = [float(own > other) for own in p[:3] for other in p[3:]]
    assert zero.auc == pytest.approx(sum(pairs) / 9)
    assert zero.fpr95 == pytest.approx(float((p[3:] >= p[:3].min()).double().mean()))  # all three must be found
    assert (one.recall, one.fpr) == pytest.approx((1 / 2, 1 / 4))
    assert (two.recall, two.fpr, two.auc, two.kept) == (1, 0, 1, 1)


def test_a_sub_architecture_that_says_yes_to_everything_is_shown_as_such() -> None:
    model = Logits()
    with nadhooks.attach(model, "copy", tasks=3, example=LOGITS) as gates:
        gates.logits["copy"].data.copy_(torch.eye(3))  # each class keeps its own logit only
        masks = gates.masks()
        for parameter in gates.parameters():
            parameter.data.fill_(1)
        figures = recognition(gates, [(LOGITS + 1, LABELS)], masks)
        assert all((gates.masks()[site.name] == 1).all() for site in gates.sites)  # given back as found
    assert [figure.recall for figure in figures] == [1, 1, 1]
    assert [figure.fpr for figure in figures] == [1, 1, 1]
    assert [figure.kept for figure in figures] == pytest.approx([1 / 3] * 3)


def test_random_masks_keep_as_many_units_of_each_site() -> None:
    with nadhooks.attach(Logits(), "copy", tasks=3, example=LOGITS) as gates:
        gates.logits["copy"].data.copy_(torch.tensor([[1.0, 0, 0], [1, 1, 0], [0.5, 0, 0.2]]))
        masks = gates.masks()
    random = shuffled(masks, seed=1)
    assert torch.equal(random["copy"].sort(1).values, masks["copy"].sort(1).values)
    assert torch.equal(random["copy"], shuffled(masks, seed=1)["copy"])
    assert any(not torch.equal(shuffled(masks, seed)["copy"], masks["copy"]) for seed in range(5))


def test_a_class_without_images_is_named() -> None:
    with nadhooks.attach(Logits(), "copy", tasks={0: "hat", 2: "shoe"}, example=LOGITS) as gates:
        with pytest.raises(DataError, match="task shoe: expected images of this class and of others"):
            recognition(gates, [(LOGITS[:5], LABELS[:5])])
        with pytest.raises(DataError, match="got an empty one"):
            recognition(gates, [])


def test_gates_are_lent_and_given_back_as_they_were() -> None:
    model = Logits()
    with nadhooks.attach(model, "copy", tasks=3, example=LOGITS) as gates:
        two = gates.masks().select([0, 1])
        before = gates.logits["copy"]
        with torch.no_grad():
            before.copy_(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) * 2)  # beyond [0, 1]
        values = before.detach().clone()
        recognition(gates, [(LOGITS, LABELS)], two)
        assert gates.logits["copy"] is before  # which an optimiser may hold
        assert torch.equal(before, values)
        assert len(gates.task_rows) == 3
        full = recognition(gates, [(LOGITS, LABELS)])
        with gates(1), gates.close("copy", [0]):
            assert recognition(gates, [(LOGITS, LABELS)]) == full
    with nadhooks.attach(model, "copy", tasks=3, closed="mean", example=LOGITS) as gates:  # not calibrated yet
        assert recognition(gates, [(LOGITS, LABELS)]) == full


def test_scores_that_tie_are_counted_at_their_own_thresholds() -> None:
    values = torch.linspace(-1, 1, 100).repeat(2)  # each is that of one image of the class, and of one other
    x = torch.stack([torch.zeros(200), values, torch.full((200,), -1e9)], 1)
    labels = torch.cat([torch.ones(100), torch.zeros(100)]).long()
    with nadhooks.attach(Logits(), "copy", tasks=[1], example=x) as gates:
        (found,) = recognition(gates, [(x, labels)])
    assert found.fpr95 == pytest.approx(0.95)


def test_a_task_that_is_no_output_is_named() -> None:
    with (
        nadhooks.attach(Logits(), "copy", tasks={7: "seven"}, example=LOGITS) as gates,
        pytest.raises(TaskError, match="task seven is not an output of the model, which has 0 to 2"),
    ):
        recognition(gates, [(LOGITS, torch.tensor([7, 0, 0, 0, 0, 0]))])


def test_options_that_are_none_are_named() -> None:
    with pytest.raises(NadhooksError, match=r"expected the gates that nadhooks.attach gives, got Logits"):
        recognition(Logits(), [(LOGITS, LABELS)])  # type: ignore[arg-type]
    with nadhooks.attach(Logits(), "copy", tasks=3, example=LOGITS) as gates:
        with pytest.raises(NadhooksError, match="expected Masks, got str"):
            recognition(gates, [(LOGITS, LABELS)], "masks")  # type: ignore[arg-type]
        with pytest.raises(NadhooksError, match="output: expected 'softmax' or 'sigmoid', got 'foo'"):
            recognition(gates, [(LOGITS, LABELS)], output="foo")  # type: ignore[arg-type]


def test_gates_are_calibrated_on_batches_of_any_form() -> None:
    with nadhooks.attach(Logits(), "copy", example=LOGITS) as gates:
        found = []
        for batches in ([LOGITS], [(LOGITS, LABELS)], [{"x": LOGITS, "labels": LABELS}]):
            gates.calibrate(batches)
            found.append(gates.constants["copy"])
        assert all(torch.equal(means, LOGITS.mean(0)) for means in found)
        with pytest.raises(NadhooksError, match=r"expected batches, got Tensor; pass a loader, or \[images\]"):
            gates.calibrate(LOGITS)
