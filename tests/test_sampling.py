from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import nadhooks
from nadhooks import methods, sampling
from nadhooks.errors import LearningError, TaskError
from nadhooks.sampling import Data, Pool, balanced_batches, each_batches, generator, own_batches, peek, read
from nadhooks.tasks import Tasks

CPU = torch.device("cpu")
LABELS = torch.tensor([2, 0, 1, 0, 2, 1, 0, 0, 1, 2])


def loader(batch: int = 4, labels: Tensor = LABELS) -> list[tuple[Tensor, Tensor]]:
    """Samples that are their own number."""
    return list(zip(torch.arange(len(labels)).double()[:, None].split(batch), labels.split(batch), strict=True))


def data(loader_: Any = None, outputs: int | None = 3, **more: Any) -> Data:
    return Data(loader() if loader_ is None else loader_, outputs, CPU, **more)


def numbers(inputs: Tensor) -> list[int]:
    return inputs[:, 0].int().tolist()


def test_loaders_that_begin_anew_when_they_are_asked_for_an_iterator_show_every_sample_once() -> None:
    class Prefetching:
        def __iter__(self) -> Prefetching:
            self.left = iter(loader())
            return self

        def __next__(self) -> tuple[Tensor, Tensor]:
            return next(self.left)

    for each in (Prefetching(), iter(loader()), loader()):
        sample, whole = peek(each)
        assert numbers(sample) == [0]
        assert numbers(torch.cat([inputs for inputs, *_ in read(whole)])) == list(range(10))


def test_samples_of_which_none_has_a_label_are_refused() -> None:
    rows = torch.zeros(10, 2, dtype=torch.bool)
    with pytest.raises(LearningError, match="no sample of any label"):
        Pool.of(data(loader(labels=rows), outputs=2), None, methods.contrastive())


# --- each task's own samples ---


def seen_by(task: int, batches: list[sampling.Batch]) -> list[list[int]]:
    parts = (batch.inputs[batch.samples.rows == task] for batch in batches)
    return [numbers(part) for part in parts if len(part)]


@pytest.mark.parametrize("together", [1, 1000])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_every_task_gets_its_own_samples_in_the_loaders_order(
    together: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SAMPLES_PER_PASS", together)
    method = methods.nad(epochs=2, batch=batch)
    for tasks in (Tasks.of([0, 1, 2]), Tasks.of([2, 1]), Tasks.of([1])):
        batches = list(own_batches(data(), tasks, method))
        for row, label in enumerate(tasks.labels):
            own = [place for place, x in enumerate(LABELS.tolist()) if x == label]
            epoch = [own[i : i + batch] for i in range(0, len(own), batch)]
            assert seen_by(row, batches) == epoch * 2
        if together == 1:
            assert all(len(each.samples.rows.unique()) == 1 for each in batches)


def test_no_task_has_two_batches_in_one_step_and_memory_is_bounded() -> None:
    many = torch.tensor([0] * 40 + [1] * 4)
    method = methods.nad(epochs=1, batch=4)
    sizes = [len(batch.keys) for batch in own_batches(data(loader(6, many)), Tasks.of(2), method)]
    assert max(sizes) <= 8
    assert sizes[0] == 4 + 4  # the first task waits for the second
    batches = list(own_batches(data(loader(6, many), memory=8 * 4), Tasks.of(2), method))  # there is no more
    assert len(batches[0].keys) == 4
    assert seen_by(0, batches) == [list(range(i, i + 4)) for i in range(0, 40, 4)]


def test_the_last_of_the_own_batches_is_the_end_of_the_run() -> None:
    for batch in (1, 2, 3, 16):
        done = [each.done for each in own_batches(data(), Tasks.of(3), methods.nad(epochs=3, batch=batch))]
        assert done == sorted(done)
        assert done.count(9) == 1  # three batches of the loader, three times
        assert done[-1] == 9


def test_a_data_set_without_a_length_has_a_total_when_it_has_been_read_once() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter((x[0], y[0]) for x, y in loader(1))

    stream: Any = torch.utils.data.DataLoader(Stream(), 4)
    batches = list(own_batches(data(stream), Tasks.of(3), methods.nad(epochs=2)))
    assert seen_by(0, batches) == [[1, 3, 6, 7]] * 2
    batches = list(own_batches(data(stream), Tasks.of(3), methods.nad(epochs=2, batch=2)))
    totals = [batch.total for batch in batches]
    assert set(totals) == {0, 6}
    assert totals == sorted(totals)
    assert batches[-1].done == 6


def test_equal_samples_have_equal_keys_whatever_batch_they_come_in() -> None:
    first, second = (
        {
            number: key
            for batch in own_batches(data(loader(size)), Tasks.of(3), methods.nad(epochs=1, batch=2))
            for number, key in zip(numbers(batch.inputs), batch.keys, strict=True)
        }
        for size in (4, 3)
    )
    assert first == second
    assert len(set(first.values())) == 10


def test_a_class_the_loader_does_not_show_is_named() -> None:
    with pytest.raises(LearningError, match="the loader shows no sample of task 1, 7"):
        list(own_batches(data(loader(4, LABELS * 2), None), Tasks.of([0, 1, 7]), methods.nad(epochs=1)))


# --- as many of every task ---


def test_the_pool_is_the_same_for_sorted_data() -> None:
    order = LABELS.argsort(stable=True)
    x = torch.arange(10).double()[:, None]
    sorted_loader = list(zip(x[order].split(3), LABELS[order].split(3), strict=True))
    for method in (methods.contrastive(), methods.contrastive(steps=1, positives=2)):
        pool, other = (Pool.of(data(each), None, method) for each in (loader(), sorted_loader))
        assert numbers(pool.inputs) == numbers(other.inputs)
        assert pool.labels.tolist() == other.labels.tolist() == sorted(pool.labels.tolist())


def test_the_pool_reads_no_further_than_it_needs() -> None:
    read_ = []

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader(4, torch.arange(400) % 3):
            read_.append(batch)
            yield batch

    pool = Pool.of(data(stream()), None, replace(methods.contrastive(steps=2, positives=3), images=None))
    assert torch.bincount(pool.labels).tolist() == [6, 6, 6]
    assert len(read_) == 5  # 18 samples in batches of 4
    pool = Pool.of(data(stream()), None, methods.contrastive(images=2))
    assert torch.bincount(pool.labels).tolist() == [2, 2, 2]


def test_short_memory_goes_half_to_tasks_and_half_to_contrast_and_is_warned_of() -> None:
    every = loader(4, torch.arange(300) % 3)
    with pytest.warns(UserWarning, match=r"^24 samples of each task are drawn from, not 64, .*= \(384 bytes now\)"):
        pool = Pool.of(data(every, memory=8 * 48), Tasks.of([1]), methods.contrastive())
    assert torch.bincount(pool.labels).tolist() == [8, 24, 8]
    with pytest.warns(UserWarning, match="^16 samples of each task are drawn from, not 64"):  # all are tasks
        assert len(Pool.of(data(every, memory=8 * 48), None, methods.contrastive())) == 48
    with warnings.catch_warnings():  # what the loader does not have is not for lack of memory
        warnings.simplefilter("error")
        assert len(Pool.of(data(every), Tasks.of([1]), methods.contrastive(images=500))) == 300
        assert len(Pool.of(data(every, memory=8 * 128), Tasks.of([1]), methods.contrastive())) == 21 + 64 + 21


def test_every_step_draws_as_many_of_each_task_and_of_others() -> None:
    method = methods.contrastive(steps=6, positives=2, negatives=3)
    pool = Pool.of(data(), None, method)
    label_of = dict(enumerate(LABELS.tolist()))
    batches = list(balanced_batches(pool, data(), Tasks.of(3), method, seed=0))
    assert len(batches) == 6
    for batch in batches:
        samples = batch.samples
        assert samples.rows.tolist() == [0] * 5 + [1] * 5 + [2] * 5
        assert samples.positive.tolist() == [True, True, False, False, False] * 3
        shown = torch.tensor([label_of[x] for x in numbers(batch.inputs)])
        assert torch.equal(shown == samples.rows, samples.positive)
        assert torch.equal(samples.classes, samples.rows)
    # positives come in rounds: each sample before any comes again
    for row, label in enumerate((0, 1, 2)):
        own = sorted(place for place, x in label_of.items() if x == label)
        drawn = [x for b in batches for x in numbers(b.inputs[(b.samples.rows == row) & b.samples.positive])]
        for start in range(0, len(drawn) - len(own) + 1, len(own)):
            assert sorted(drawn[start : start + len(own)]) == own


def test_draws_of_a_task_are_its_own() -> None:
    method = methods.contrastive(steps=4)
    pool = Pool.of(data(), None, method)

    def drawn(labels: list[int], seed: int = 0) -> dict[int, list[list[int]]]:
        batches = list(balanced_batches(pool, data(), Tasks.of(labels), method, seed))
        return {label: [numbers(b.inputs[b.samples.rows == row]) for b in batches] for row, label in enumerate(labels)}

    together = drawn([0, 1, 2])
    assert drawn([2, 0]) == {2: together[2], 0: together[0]}
    assert drawn([1]) == {1: together[1]}
    assert drawn([1], seed=1) != drawn([1])
    assert generator(0, 1).initial_seed() != generator(0, 2).initial_seed()


def test_targets_stay_with_their_samples() -> None:
    x, labels = torch.arange(10).double()[:, None], LABELS
    boxes = [{"box": 10 * place} for place in range(10)]
    for targets in (x[:, 0] * 10, boxes):
        batches_ = [(x[i : i + 4], labels[i : i + 4], targets[i : i + 4]) for i in range(0, 10, 4)]
        pool = Pool.of(data(batches_), None, methods.contrastive(steps=2))
        drawn = [
            *balanced_batches(pool, data(batches_), Tasks.of(3), methods.contrastive(steps=2), 0),
            *own_batches(data(batches_), Tasks.of(3), methods.nad(epochs=1)),
        ]
        for batch in drawn:
            found = [x["box"] if isinstance(x, dict) else int(x) for x in batch.samples.targets]
            assert found == [10 * number for number in numbers(batch.inputs)]


def test_samples_one_by_one_have_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    method = methods.routing(images=2, steps=3)
    pool = Pool.of(data(), None, method)
    monkeypatch.setattr(sampling, "SAMPLES_PER_PASS", 4)
    found = [(rows, list(batches)) for rows, batches in each_batches(pool, data(), Tasks.of(3), method, 0)]
    assert [rows.tolist() for rows, _ in found] == [[0, 0, 1, 1], [2, 2]]
    for rows, batches in found:
        assert len(batches) == 3
        assert batches[0].samples.rows.tolist() == list(range(len(rows)))
        assert torch.equal(LABELS[numbers(batches[0].inputs)], rows)
        assert batches[0].samples.classes.tolist() == rows.tolist()
    assert [batch.done for _, batches in found for batch in batches] == [1, 2, 3, 4, 5, 6]


def test_held_out_samples_are_others() -> None:
    pool = Pool.of(data(), None, methods.contrastive())
    learnt, held = pool.parted(5)
    assert sorted(numbers(learnt.inputs) + numbers(held.inputs)) == list(range(10))
    assert len(held) == 2


# --- labels ---

SEVERAL = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_samples_can_have_several_labels_or_none(dtype: torch.dtype) -> None:
    batches_ = loader(4, torch.zeros(4).long())
    several = [(batches_[0][0], SEVERAL.to(dtype))]
    assert data(several).tasks(None).labels == (0, 1, 2)
    batches = list(own_batches(data(several), Tasks.of(3), methods.nad(epochs=1)))
    assert [seen_by(row, batches) for row in range(3)] == [[[0, 2]], [[1, 2]], [[0]]]
    pool = Pool.of(data(several), None, methods.contrastive(steps=2))
    assert sorted(numbers(pool.inputs)) == [0, 1, 2]  # what is of no label is no contrast either
    for batch in balanced_batches(pool, data(several), Tasks.of(3), methods.contrastive(steps=2), 0):
        expected = SEVERAL[numbers(batch.inputs), batch.samples.rows].bool()
        assert torch.equal(expected, batch.samples.positive)


def test_groups_of_outputs_become_booleans() -> None:
    grouped = data(meaning={0: [1, 2], 7: [0]})
    assert grouped.classes(0).tolist() == [False, True, True]
    assert grouped.classes(7).tolist() == [True, False, False]
    assert data().classes(2).tolist() == 2
    with pytest.raises(TaskError, match="task 1: outputs= does not say which of the model's outputs mean it"):
        grouped.tasks(Tasks.of([1]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.5, 1, 2, 0]), "expected 4 whole-number labels"),
        (torch.tensor([0, 1]), "expected 4 whole-number labels"),
        (torch.tensor([[0, 2, 1]] * 4), "rows of 0 and 1"),
        (torch.tensor([[0.7, 0.3, 0]] * 4), "mixed or soft labels, as of MixUp, .* pass a loader without"),
        (torch.tensor([[0, 1, 1]] * 3), "rows of 0 and 1"),
        (torch.zeros(4, 1, 1), "expected 4 whole-number labels"),
        (["a", "b", "c", "d"], "expected whole-number labels"),
    ],
)
def test_labels_of_another_shape_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        next(read([(torch.zeros(4, 1), labels)]))


def test_as_many_columns_as_outputs_are_expected() -> None:
    with pytest.raises(TaskError, match="expected a label for each of the 3 outputs, got 4"):
        next(data([(torch.zeros(2, 1), torch.tensor([[0, 1, 0, 1]] * 2))]).batches())
    few: Any = [(torch.zeros(2, 1), torch.tensor([[0, 1], [1, 0]]))]
    with pytest.raises(LearningError, match="no sample of task 5"):
        list(own_batches(data(few, None), Tasks.of([5]), methods.nad(epochs=1)))


def test_a_look_at_the_first_sample_takes_nothing_away() -> None:
    sample, rest = peek(iter(loader()))
    assert sample.tolist() == [[0.0]]
    assert [numbers(inputs) for inputs, _, _ in read(rest)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    again = loader()
    assert peek(again)[1] is again


def test_tasks_of_a_shuffling_loader_learn_from_the_same_order_whether_they_are_named_or_found() -> None:
    from .nets import fair_line, images, labelled

    model = fair_line()
    x, labels = (torch.cat(parts) for parts in zip(*labelled(model, images(64)), strict=True))
    shuffling = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 16, shuffle=True)
    method = methods.nad(epochs=2)
    found = nadhooks.learn(model, shuffling, "act1", method=method)
    named = nadhooks.learn(model, shuffling, "act1", method=method, tasks=[2, 1, 0])
    for row in range(3):
        torch.testing.assert_close(found["act1"][row], named["act1"][2 - row], rtol=0, atol=1e-12)
