"""Layers that are never called: their weights go to functions, and gates reach them all the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import nadhooks
from nadhooks import sites, zoo
from tests.nets import seeded, vectors


class Borrowed(nn.Module):
    """Calls no layer: (batch, 4) -> (batch, 3) by the weights of `fc1` and `fc2`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.fc1.weight, self.fc1.bias).relu()
        return F.linear(input=hidden, weight=self.fc2.weight, bias=self.fc2.bias)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Borrowed()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Attention(nn.Module):
    """(batch, 5, 8) -> (batch, 5, 8) through `nn.MultiheadAttention` of four heads."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.attention(x, x, x, need_weights=False)[0]
        return y if self.batch_first else y.transpose(0, 1)


def tokens() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_functional_layers_are_sites_with_wiring() -> None:
    with nadhooks.attach(seeded(Inner), sites.channels(), example=vectors()) as gates:
        assert [(site.name, site.units, site.within) for site in gates.sites] == [
            ("part.fc1", 6, "part"),
            ("part.fc2", 3, "part"),
        ]
        assert set(gates.wiring.edges) == {("input", "part.fc1"), ("part.fc1", "part.fc2"), ("part.fc2", "output")}
        assert not gates.skipped


def test_a_closed_functional_unit_puts_out_zero() -> None:
    model = seeded(Inner)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.part.fc1.weight[2], expected.part.fc1.bias[2] = 0, 0
    with nadhooks.attach(model, sites.channels(), example=vectors()) as gates, gates.close("part.fc1", 2):
        assert torch.equal(model(vectors()), expected(vectors()))


def test_several_functional_sites_of_one_caller_act_together_and_are_removed() -> None:
    model = seeded(Inner)
    bare = model(vectors())
    gates = nadhooks.attach(model, sites.channels(), tasks=2, example=vectors())
    with torch.no_grad():
        gates.logits["part.fc1"][1] = 0
        gates.logits["part.fc2"][1, 0] = 0
    with gates(torch.tensor([0, 1, 0, 1, 0, 1])):
        gated = model(vectors())
    assert torch.equal(gated[::2], bare[::2])
    assert torch.equal(gated[1::2, 1:], model.part.fc2.bias[1:].expand(3, 2))
    assert not gated[1::2, 0].any()
    gates.detach()
    assert not model.part._forward_hooks
    assert not model.part._forward_pre_hooks
    assert torch.equal(model(vectors()), bare)


def test_a_failing_forward_leaves_functions_as_they_were() -> None:
    model = seeded(Inner)
    with nadhooks.attach(model, sites.channels(), example=vectors()) as gates:
        with gates(0), pytest.raises(RuntimeError):
            model(torch.ones(2, 9, dtype=torch.float64))
        assert torch.overrides._get_current_function_mode() is None


def test_an_interrupted_forward_leaves_nothing_behind_once_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Inner)

    def interrupt(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with nadhooks.attach(model, "part.fc*", example=vectors()) as gates:
        monkeypatch.setattr(torch.Tensor, "relu", interrupt)
        with gates.apply({"part.fc1": torch.zeros(6)}), pytest.raises(KeyboardInterrupt):
            model(vectors())
    assert not torch.overrides._get_current_function_mode_stack()


def test_gated_functional_layers_copy_and_pickle() -> None:
    model = seeded(Inner)
    nadhooks.attach(model, sites.channels(), example=vectors())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(vectors()), model(vectors()))


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_of_multihead_attention_close(batch_first: bool) -> None:
    model = Attention(batch_first).double().eval()
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.attention.out_proj.weight[:, 2:4] = 0  # what head 1 feeds
    with nadhooks.attach(model, sites.heads(), example=tokens()) as gates:
        (site,) = gates.sites
        assert (site.name, site.units, site.block) == ("attention.out_proj@input", 4, 2)
        with gates.close(site.name, 1):
            assert torch.allclose(model(tokens()), expected(tokens()), atol=1e-12)


def test_each_sample_has_its_own_heads() -> None:
    model = Attention().double().eval()
    with nadhooks.attach(model, sites.heads(), tasks=2, example=tokens()) as gates:
        with torch.no_grad():
            gates.logits["attention.out_proj@input"][1] = 0
        with gates(torch.tensor([0, 1])):
            gated = model(tokens())
        assert torch.allclose(gated[0], model(tokens())[0], atol=1e-12)
        assert torch.allclose(gated[1], model.attention.out_proj.bias.expand(5, 8))


def test_open_heads_equal_the_ordinary_path_bit_for_bit_and_outside_the_fused_one_stays() -> None:
    model = Attention().double().eval()
    with torch.no_grad():
        fused = model(tokens())
        with nadhooks.attach(model, sites.heads(), example=tokens()) as gates:
            assert torch.equal(model(tokens()), fused)
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                ordinary = model(tokens())
                with gates(0):
                    assert torch.equal(model(tokens()), ordinary)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)


def test_masks_of_functional_sites_are_those_of_ordinary_ones() -> None:
    class Called(Borrowed):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).relu())

    with nadhooks.attach(seeded(Borrowed), sites.channels(), example=vectors()) as gates:
        masks = gates.masks()
    with nadhooks.attach(seeded(Called), masks.sites, example=vectors()) as gates:
        gates.load(masks)  # another release of a model may call what it used functionally before
        assert gates.sites[0].within is None


def test_functional_layers_keep_their_dtype_under_autocast() -> None:
    model, x = Inner(), torch.randn(2, 4)
    with nadhooks.attach(model, sites.channels(), example=x) as gates, torch.autocast("cpu", torch.bfloat16):
        bare = model(x)
        with gates(0):
            gated = model(x)
        assert bare.dtype == gated.dtype == torch.bfloat16
        assert torch.equal(bare, gated)


def test_functional_layers_learn_inside_checkpoints() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    def gradients(model: nn.Module, name: str) -> Tensor:
        with nadhooks.attach(model, sites.channels(), example=vectors()) as gates, gates(0):
            model(vectors()).pow(2).sum().backward(inputs=gates.parameters())
            found = gates.logits[name].grad
            assert found is not None
            return found

    plain = seeded(Inner)
    checkpointed = Checkpointed().double()
    checkpointed.inner.load_state_dict(plain.state_dict())
    assert torch.equal(gradients(plain, "part.fc1"), gradients(checkpointed, "inner.part.fc1"))


def test_weights_that_no_layer_holds_are_reported_by_name() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)
            self.mixing = nn.Parameter(torch.randn(3, 3))
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0].mean(1)) @ self.mixing

    with nadhooks.attach(Recurrent(), sites.channels(), example=torch.randn(2, 6, 4)) as gates:
        assert [site.name for site in gates.sites] == ["head"]
        assert gates.skipped == {
            "unused": "never fired: used in training only, in another way than as a layer, or not at all",
            "rnn": "not a layer, but computes with weights of its own: weight_ih_l0, weight_hh_l0",
            "(the model)": "not a layer, but computes with weights of its own: mixing",
        }


def test_naflex_patches_with_coordinates_are_samples() -> None:
    model = zoo.load_model("timm:naflexvit_base_patch16_gap,num_classes=5")
    along = torch.arange(4)
    patches = {
        "patches": torch.randn(2, 16, 768, generator=torch.Generator().manual_seed(0)),
        "patch_coord": torch.cartesian_prod(along, along).expand(2, 16, 2),
        "patch_valid": torch.ones(2, 16, dtype=torch.bool),
    }
    with nadhooks.attach(model, sites.heads(), tasks=2, example=(patches,)) as gates, torch.no_grad():
        bare = model(patches)
        for logits in gates.logits.values():
            logits[1, ::2] = 0
        with gates(torch.tensor([0, 1])):
            gated = model(patches)
    assert len(gates.sites) == 12
    assert torch.equal(gated[0], bare[0])
    assert not torch.equal(gated[1], bare[1])
