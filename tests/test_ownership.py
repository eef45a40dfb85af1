"""Gates write into the tensors that nobody else can see, and into no others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nadhooks
from nadhooks import ownership

ONES = torch.ones(2, 3)


class Block(nn.Module):
    """Doubles its input, in one of many ways to put the result out."""

    def __init__(self) -> None:
        super().__init__()
        self.put_out: Callable[[Block, Tensor], Tensor] = double
        self.kept: Any = None
        self.weight = nn.Parameter(2 * torch.ones(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.put_out(self, x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x)) + 0 * x


def keep(block: Block, kept: Any, x: Tensor) -> Tensor:
    block.kept = kept
    return x


def as_numpy(block: Block, x: Tensor) -> Tensor:
    block.kept = np.full((2, 3), 2, np.float32)
    return torch.from_numpy(block.kept)


def saved_for_backward(block: Block, x: Tensor) -> Tensor:
    twice = 2 * x
    with torch.enable_grad():
        block.kept = (twice * block.weight).sum()  # its backward pass needs `twice`
    return twice


def through_views(block: Block, x: Tensor) -> Tensor:
    twice = 2 * x
    return keep(block, twice.detach().view(3, 2), twice)


HELD: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "in an attribute": lambda block, x: keep(block, y := 2 * x, y),
    "in a list": lambda block, x: keep(block, [y := 2 * x], y),
    "as a view": lambda block, x: keep(block, (y := 2 * x)[:1], y),
    "as a view of a view": through_views,
    "by a tensor that it is a view of": lambda block, x: keep(block, y := 2 * x, y[:]),
    "as an array": lambda block, x: keep(block, (y := 2 * x).numpy(), y),
    "by numpy": as_numpy,
    "for a backward pass": saved_for_backward,
    "as a parameter": lambda block, x: block.weight,
    "as a parameter's data": lambda block, x: block.weight.data,
    "by the caller": lambda block, x: x.mul_(2),
}


def double(block: Block, x: Tensor) -> Tensor:
    return 2 * x


def half_closed(net: Net, x: Tensor, grad: Any = torch.no_grad, put_out: Any = double) -> tuple[Tensor, list[bool]]:
    """The output with the middle one of three units closed, and whether each gate wrote into its tensor."""
    wrote: list[bool] = []
    asked = ownership.held_by_nobody_else

    def told(tensor: Tensor, references: int) -> bool:
        wrote.append(asked(tensor, references))
        return wrote[-1]

    with (
        pytest.MonkeyPatch.context() as patch,
        nadhooks.attach(net, "block", tasks=2, example=ONES.clone(), axis=1) as gates,
    ):
        patch.setattr("nadhooks.acting.held_by_nobody_else", told)
        with torch.no_grad():
            gates.logits["block"][1, 1] = 0
        next(module for module in net.modules() if isinstance(module, Block)).put_out = put_out
        with gates(1), grad():
            return net(x), wrote


EXPECTED = torch.tensor([[2.0, 0.0, 2.0]]).expand(2, 3)


@pytest.fixture(autouse=True)
def untraced() -> Any:
    """Under a debugger or a coverage tool the counts are not taken: here they are, in a moment without."""
    tracing, profiling = sys.gettrace(), sys.getprofile()
    sys.settrace(None)
    sys.setprofile(None)
    ownership._of_fresh()
    sys.settrace(tracing)
    sys.setprofile(profiling)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_a_gate_writes_into_a_tensor_of_its_own(grad: Any) -> None:
    out, wrote = half_closed(Net(), ONES.clone(), grad)
    assert torch.equal(out, EXPECTED)
    assert wrote == [True]


@pytest.mark.parametrize("how", HELD)
def test_a_tensor_that_is_held_elsewhere_stays_as_it_is(how: str) -> None:
    net = Net()
    out, wrote = half_closed(net, ONES.clone(), put_out=HELD[how])
    assert torch.equal(out, EXPECTED)
    assert wrote == [False]
    kept = net.block.kept
    if how == "for a backward pass":
        kept.backward()
        kept = net.block.weight.grad
    if kept is not None:
        assert (torch.as_tensor(kept[0] if isinstance(kept, list) else kept) == 2).all()
    assert (net.block.weight == 2).all()


def test_what_a_hook_inside_has_kept_stays_as_it_is() -> None:
    net = Net()
    net.block = nn.Sequential(net.block)  # type: ignore[assignment]
    kept: list[Tensor] = []
    net.block[0].register_forward_hook(lambda module, args, output: kept.append(output))  # type: ignore[index]
    out, wrote = half_closed(net, ONES.clone())
    assert torch.equal(out, EXPECTED)
    assert wrote == [False]
    assert (kept[-1] == 2).all()


def test_with_gradients_nothing_is_written_into() -> None:
    out, wrote = half_closed(Net(), ONES.clone(), torch.enable_grad)
    assert torch.equal(out, EXPECTED)
    assert wrote == [False]


def test_tensors_of_other_kinds_are_left_alone() -> None:
    with torch.inference_mode():
        expanded, inferred = torch.ones(1).expand(2, 3), torch.ones(2, 3)
    for x in (expanded, inferred, nn.Parameter(ONES), ONES.to_sparse(), ONES.to("meta"), torch.ones(3, 3)[:2]):
        with torch.no_grad():
            assert not ownership.held_by_nobody_else(x, 0)


def test_where_the_counts_cannot_be_told_nothing_is_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_of_a_fresh_one", None)
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    out, wrote = half_closed(Net(), ONES.clone())
    assert torch.equal(out, EXPECTED)
    assert wrote == [False]


def test_counts_taken_beside_a_hook_on_all_modules_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_of_a_fresh_one", None)
    kept: list[Tensor] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: kept.append(output))
    try:
        out, wrote = half_closed(Net(), ONES.clone())
    finally:
        handle.remove()
    assert torch.equal(out, EXPECTED)
    assert wrote == [False]
    assert ownership._of_a_fresh_one is None


def test_vmap_goes_through_gates() -> None:
    net = Net()
    with nadhooks.attach(net, "block", tasks=2, example=ONES.clone(), axis=1) as gates, torch.no_grad():
        gates.logits["block"][1, 1] = 0
        with gates(1):
            out = torch.vmap(net)(torch.ones(4, 2, 3))
    assert torch.equal(out, EXPECTED.expand(4, 2, 3))
