from __future__ import annotations

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import nadhooks
from nadhooks.errors import ModelError, NadhooksError, SiteError, TaskError
from nadhooks.gating import gate
from nadhooks.sites import Site

from .nets import Line, Mlp, Pair, Split, images, seeded, vectors

SITES = ["conv1", "act2"]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_gate_scales_units_and_mixes_in_closed_values() -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    g = torch.tensor([[1.0, 0.5, 0.0]])
    closed = torch.tensor([10.0, 20.0, 30.0])
    expected = torch.stack([x[:, 0], 0.5 * x[:, 1] + 10, torch.full((2, 2), 30.0)], 1)
    assert torch.equal(gate(x, g, Site("a", 1, 3, "a"), closed), expected)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (4, 4), (2, 1), (1, 2)])
def test_gradients_lead_through_gates_and_closed_values(
    rows: tuple[int, int], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr("nadhooks.gating.LARGE", 0)
        monkeypatch.setattr("nadhooks.batching.CACHED", 3 * 18)  # three samples and then one
    random = torch.Generator().manual_seed(0)
    x, g, closed = (
        torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()
        for shape in ((4, 3, 6), (rows[0], 2), (rows[1], 2))
    )

    def gated(x: Tensor, g: Tensor, closed: Tensor) -> Tensor:
        return gate(x, g, Site("a", 2, 2, "a", block=3), closed)

    assert torch.autograd.gradcheck(gated, (x, g, closed), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(gated, (x.detach(), g, closed.detach()), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(gated, (x, g, closed))
    several = torch.vmap(gated, (0, None, None))(torch.stack([x, 2 * x]), g, closed)
    torch.testing.assert_close(several, torch.stack([gated(x, g, closed), gated(2 * x, g, closed)]))
    gradient = torch.func.grad(lambda g, x: gated(x, g, closed).square().sum())
    each = torch.vmap(gradient, (None, 0))(g, torch.stack([x, 2 * x]))
    torch.testing.assert_close(each, torch.stack([gradient(g, x), gradient(g, 2 * x)]))


def test_gate_takes_blocks_and_windows() -> None:
    x = torch.ones(4, 2, 6)  # two samples of two windows each, two units of three positions
    g = torch.tensor([[0.0, 1.0], [1.0, 0.5]])
    out = gate(x, g, Site("a", 2, 2, "a", block=3))
    assert out[:2].sum() == 2 * 2 * 3
    assert torch.equal(out[2, 0], torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.5]))
    assert torch.equal(out[2], out[3])


def test_views_of_one_batch_get_their_samples_gates() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.fc(torch.cat([x, x.flip(1)])).chunk(2)
            return self.head(one * other)

    model = seeded(Views)
    with nadhooks.attach(model, "fc", tasks=2, example=vectors()) as gates:
        assert gates.sites[0].views
        with torch.no_grad():
            gates.logits["fc"][1] = 0
        with gates(torch.tensor([0, 1, 0, 0, 1, 0])):
            gated = model(vectors())
        assert torch.equal(gated[[0, 2, 3, 5]], model(vectors())[[0, 2, 3, 5]])
        assert torch.equal(gated[[1, 4]], model.head.bias.expand(2, 3))


def test_gate_keeps_the_dtype_of_what_it_gates() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert gate(x, torch.ones(1, 3), Site("a", 1, 3, "a"), torch.zeros(3)).dtype == torch.bfloat16


@pytest.mark.parametrize("closed", ["zero", "mean"])
def test_open_gates_leave_outputs_as_they_are(closed: nadhooks.gates.Closed) -> None:
    model, x = seeded(Line), images()
    bare = model(x)
    with nadhooks.attach(model, SITES, tasks=3, closed=closed, example=x) as gates:
        assert torch.equal(model(x), bare)
        if closed == "mean":
            gates.calibrate([x])
        with gates(torch.tensor([0, 1, 2, 0, 1, 2])):
            assert torch.equal(model(x), bare)


@pytest.mark.parametrize("strides", [(27, 1, 27), (27, 1, 1), (27, 1, 5), (54, 2, 2)])
def test_gated_tensors_lie_in_memory_as_they_were(strides: tuple[int, int, int]) -> None:
    """As far as it matters to nothing but the choice of kernels, which round differently."""

    class Laid(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.empty_strided((len(x), 27, 1), strides).copy_(x)

    model, x = nn.Sequential(Laid()), torch.randn(2, 27, 1, generator=torch.Generator().manual_seed(0))
    shut = torch.ones(2, 27).index_fill(1, torch.tensor([3]), 0)
    with nadhooks.attach(model, "0", example=x, axis=1) as gates:
        bare = model(x)
        for g in (shut, shut.clone().requires_grad_()):
            with gates.apply({"0": g}):
                gated = model(x)
            dense = strides[1] == 1
            assert gated.stride() == strides or not dense
            assert torch.equal(gated, bare * shut[:, :, None])
        with gates.close("0", 5):
            assert model(x).stride() == strides or not dense
    gated.sum().backward()
    assert g.grad is not None
    assert torch.equal(g.grad, bare[:, :, 0])


def test_open_gates_without_gradients_leave_the_very_tensor() -> None:
    model = seeded(Mlp)
    seen: list[Tensor] = []
    with nadhooks.attach(model, "act", tasks=2, example=vectors()) as gates:
        handle = model.act.register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.no_grad(), gates(0), gates.watch(lambda site, x: seen.append(x)):
            model(vectors())
        assert seen[0] is seen[1]
        handle.remove()
        with torch.no_grad():
            gates.logits["act"][1, 2] = 0
        with torch.no_grad(), gates(1), gates.watch(lambda site, x: seen.append(x)):
            model(vectors())
        assert not seen[-1][:, 2].any()


def test_each_sample_goes_through_its_own_tasks_gates() -> None:
    model, x = seeded(Line), images()
    labels = torch.tensor([2, 0, 1, 1, 2, 0])
    with nadhooks.attach(model, SITES, tasks=3, example=x) as gates:
        for parameter in gates.parameters():
            parameter.data = torch.rand_like(parameter)
        with gates(labels):
            together = model(x)
        for sample, label in enumerate(labels.tolist()):
            with gates(label):
                torch.testing.assert_close(model(x[sample : sample + 1])[0], together[sample], rtol=0, atol=1e-14)


def test_a_closed_unit_puts_out_zero_or_its_mean_and_nothing_else_changes() -> None:
    model, x = seeded(Line), images()
    seen: dict[str, torch.Tensor] = {}
    with nadhooks.attach(model, SITES, example=x) as gates:
        with gates.watch(lambda site, tensor: seen.update({site.name: tensor.clone()})):
            model(x)
            whole = dict(seen)
            with gates.close("conv1", [1, 3]):
                model(x)
        assert (seen["conv1"][:, [1, 3]] == 0).all()
        assert torch.equal(seen["conv1"][:, [0, 2]], whole["conv1"][:, [0, 2]])
        gates.calibrate([x[:4], x[4:]])
        with gates.watch(lambda site, tensor: seen.update({site.name: tensor.clone()})), gates.close("act2", 2):
            model(x)
        mean = whole["act2"][:, 2].detach().mean()
        torch.testing.assert_close(seen["act2"][:, 2], torch.full_like(seen["act2"][:, 2], float(mean)))


def test_means_are_measured_with_open_gates() -> None:
    model, x = seeded(Mlp), vectors()
    with nadhooks.attach(model, "act", example=x) as gates:
        gates.logits["act"].data.fill_(0)
        with gates(0):
            gates.calibrate([(x, None)])
        torch.testing.assert_close(gates.constants["act"], model.act(model.fc1(x)).mean(0).detach())
        with pytest.raises(nadhooks.NadhooksError, match="expected at least one batch"):
            gates.calibrate([])


def test_closes_combine_with_each_other_and_with_tasks() -> None:
    model, x = seeded(Mlp), vectors()
    with nadhooks.attach(model, "act", tasks=2, example=x) as gates:
        gates.logits["act"].data[1, 0] = 0
        with gates(1), gates.close("act", 1), gates.close("act", torch.arange(7) == 2):
            once = model(x)
        with gates.close("act", [0, 1, 2]):
            assert torch.equal(model(x), once)
        assert gates._now.shut == {}


def test_the_innermost_gates_count_and_the_outer_ones_come_back() -> None:
    model, x = seeded(Mlp), vectors()
    with nadhooks.attach(model, "act", tasks=2, example=x) as gates:
        gates.logits["act"].data[1] = 0
        with gates(1):
            shut = model(x)
            with gates(0):
                assert not torch.equal(model(x), shut)
            assert torch.equal(model(x), shut)
        assert not torch.equal(model(x), shut)


def test_gradients_reach_open_gates_and_lead_back_from_outside() -> None:
    model, x = seeded(Mlp), vectors()
    with nadhooks.attach(model, "act", example=x) as gates:
        logits = gates.logits["act"]
        logits.data[0, 0], logits.data[0, 1] = 1.5, -0.5
        with gates(0):
            model(x).square().sum().backward()
        assert logits.grad is not None
        assert (logits.grad[0, 2:] != 0).any()
        values = torch.tensor([[1.5, 1.5, -0.5, -0.5, 1.0, 0.0]], requires_grad=True)
        clipped = nadhooks.gating.Clip.apply(values)
        clipped.backward(torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0, 1.0]]))
        assert values.grad is not None
        assert values.grad.tolist() == [[1, 0, 0, -1, -1, 1]]  # only what leads back into [0, 1], or starts there


def test_gates_learn_in_an_ordinary_training_loop() -> None:
    model, x = seeded(Mlp), vectors(64)
    labels = model(x).argmax(1)
    with nadhooks.attach(model, "act", tasks=3, example=x) as gates:
        optimizer = torch.optim.Adam(gates.parameters(), 0.05)
        for _ in range(60):
            with gates(labels):
                loss = nn.functional.cross_entropy(model(x), labels)
            penalty = nadhooks.objectives.squared_gates(gates.values()).mean()
            optimizer.zero_grad()
            (loss + 0.3 * penalty).backward()
            optimizer.step()
        masks = gates.masks().hard()
        gates.load(masks)
        with gates(labels):
            right = (model(x).argmax(1) == labels).double().mean()
    assert float(masks.kept().mean()) < 0.8
    assert float(right) > 0.9


def test_loaded_gates_are_exactly_the_masks_and_act() -> None:
    model, x = seeded(Line), images()
    with nadhooks.attach(model, SITES, tasks=2, example=x) as gates:
        for parameter in gates.parameters():
            parameter.data = torch.rand_like(parameter)
        masks = gates.masks()
        with gates(1):
            soft = model(x)
    with nadhooks.attach(model, masks.sites, example=x) as again:
        again.load(masks)
        assert again.tasks == masks.tasks
        for site in masks.sites:
            assert torch.equal(again.masks()[site.name], masks[site.name])
        with again(1):
            assert torch.equal(model(x), soft)


def test_loading_keeps_the_optimisers_parameters() -> None:
    model, x = seeded(Mlp), vectors()
    with nadhooks.attach(model, "act", tasks=2, example=x) as gates:
        before = gates.parameters()
        gates.load(gates.masks().hard())
        assert all(a is b for a, b in zip(before, gates.parameters(), strict=True))


def test_masks_of_other_sites_are_refused_by_name() -> None:
    x = vectors()
    with nadhooks.attach(seeded(Mlp), "act", example=x) as gates:
        masks = gates.masks()
    with (
        nadhooks.attach(seeded(Mlp), "fc2", example=x) as other,
        pytest.raises(SiteError, match=r"act: expected act \(7 units on axis 1\), found no"),
    ):
        other.load(masks)
    with pytest.raises(SiteError, match=r"act: expected 7 positions on axis 1, got .*; take the model"):
        nadhooks.attach(Mlp(hidden=9).double(), masks.sites, example=x)
    inside = nn.Sequential(seeded(Mlp))
    with pytest.raises(SiteError, match=r"does not exist in this Sequential; take .* with masks\.renamed$"):
        nadhooks.attach(inside, masks.sites, example=x)
    nadhooks.attach(inside, masks.renamed(lambda name: f"0.{name}").sites, example=x).detach()


def test_detach_restores_the_model_and_may_be_repeated() -> None:
    model, x = seeded(Line), images()
    model.train()
    model.act2.eval()
    model.conv1.weight.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    gates = nadhooks.attach(model, SITES, example=x)
    assert torch.equal(torch.random.get_rng_state(), random)
    gates.detach()
    gates.detach()
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert not model.conv1.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(nadhooks.NadhooksError, match="detached"), gates(0):
        pass


def test_failed_attach_leaves_no_hooks() -> None:
    class Refuses(nn.ReLU):
        def register_forward_hook(self, hook, **kwargs):
            if isinstance(hook, nadhooks.hooking.SiteHook) and isinstance(hook.change, nadhooks.acting.SiteGate):
                raise RuntimeError("no hooks here")
            return super().register_forward_hook(hook, **kwargs)

    model = seeded(Line)
    model.act2 = Refuses()
    model.train()
    with pytest.raises(RuntimeError, match="no hooks here"):
        nadhooks.attach(model, SITES, example=images())
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())


def test_failed_forward_leaves_no_hooks() -> None:
    model = seeded(Line)
    with pytest.raises(ModelError, match=r"failed on the example input .*\(6, 4\).*pass example="):
        nadhooks.attach(model, SITES, example=vectors())
    assert hooks(model) == 0


def test_tuple_outputs_have_one_site_per_leaf() -> None:
    model, x = seeded(Pair), vectors()
    with nadhooks.attach(model, "both", example=x) as gates:
        assert [site.name for site in gates.sites] == ["both[0]", "both[1]"]
        with gates.close("both[1]", range(5)):
            torch.testing.assert_close(model(x), model.head(model.both.left(x)), rtol=0, atol=0)


def test_gated_models_copy_and_pickle() -> None:
    model, x = seeded(Mlp), vectors()
    with nadhooks.attach(model, "act", example=x) as gates:
        clone = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model))
        with gates.close("act", range(7)):
            assert torch.equal(clone(x), pickled(x))  # a copy has gates of its own, which stay open
            assert not torch.equal(model(x), clone(x))


def test_a_copy_made_inside_a_with_has_open_gates() -> None:
    model, x = seeded(Mlp), vectors()
    bare = model(x)
    with nadhooks.attach(model, "act", tasks=2, example=x) as gates:
        values = torch.zeros(7, requires_grad=True) * 1  # not a leaf: refuses to be copied
        with gates.apply({"act": values}), gates.close("act", 0), gates.watch(lambda site, tensor: None):
            clone, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            assert not torch.equal(model(x), bare)
        assert torch.equal(clone(x), bare)
        assert torch.equal(pickled(x), bare)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("closed", ["zero", "mean"])
def test_a_closed_unit_puts_out_its_value_whatever_it_holds(grad: Any, closed: nadhooks.gates.Closed) -> None:
    model, x = seeded(Mlp), vectors()
    seen: list[Tensor] = []
    with nadhooks.attach(model, "act", closed=closed, example=x) as gates:
        gates.calibrate([x])
        gates.closed = closed
        expected = gates.constants["act"][2] if closed == "mean" else torch.zeros(())
        model.fc1.weight.data[2] = torch.inf  # activations of ±inf and NaN
        with grad(), gates.close("act", 2), gates.watch(lambda site, tensor: seen.append(tensor.clone())):
            assert model(x).isfinite().all()
    assert (seen[0][:, 2] == expected).all()


def constants(*rows: float) -> dict[str, Tensor]:
    """What seven closed units put out, a row for each task."""
    return {"act": torch.tensor(rows, dtype=torch.float64)[:, None].repeat(1, 7)}


def test_each_task_has_constants_of_its_own() -> None:
    model, x = seeded(Mlp), vectors()
    with nadhooks.attach(model, "act", tasks=2, example=x) as gates:
        shut = {"act": torch.zeros(2, 7, dtype=torch.float64)}
        masks = gates.masks_of(gates.task_rows, shut, {}, constants(1, 2))
        gates.load(masks)
        assert (gates.closed, gates.masks()) == ("optimal", masks)
        one, two = (model.fc2(torch.full((len(x), 7), value, dtype=torch.float64)) for value in (1.0, 2.0))
        for grad in (torch.enable_grad, torch.no_grad):
            with grad():
                with gates(1):
                    assert torch.equal(model(x), two)
                with gates([1, *[0] * (len(x) - 1)]):
                    assert torch.equal(model(x), torch.cat([two[:1], one[1:]]))
                with gates.apply({"act": torch.zeros(7)}, {"act": torch.ones(7)}):
                    assert torch.equal(model(x), one)
                with gates.close("act", 0), pytest.raises(NadhooksError, match="for each task; close them inside"):
                    model(x)
        gates.load(masks.select(0))
        with gates.close("act", range(7)):
            assert torch.equal(model(x), one)


def test_gradients_lead_into_what_closed_units_put_out() -> None:
    model, x = seeded(Mlp), vectors(4)
    closed = torch.zeros(4, 7, dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([1.0, 0, 0.5, 1, 1, 1, 1], dtype=torch.float64)
    with nadhooks.attach(model, "act", example=x) as gates, gates.apply({"act": gate}, {"act": closed}):
        model(x).sum().backward()
    expected = ((1 - gate) * model.fc2.weight.sum(0)).expand(4, 7)
    torch.testing.assert_close(closed.grad, expected, rtol=0, atol=1e-14)


def test_batches_without_samples_pass() -> None:
    model, x = seeded(Mlp), vectors()[:0]
    with nadhooks.attach(model, "act", tasks=2, example=vectors()) as gates:
        none = torch.zeros(0, dtype=torch.long)
        with gates(none):
            assert model(x).shape == (0, 3)
        gates.load(gates.masks_of(gates.task_rows, gates.masks().values, {}, constants(1, 2)))
        with torch.no_grad():
            gates.logits["act"].zero_()
        with gates(none):
            assert model(x).shape == (0, 3)


def test_constants_are_not_had_by_attaching() -> None:
    with pytest.raises(NadhooksError, match=r"'zero' or 'mean', got 'optimal', which is learnt: by nadhooks\.learn"):
        nadhooks.attach(seeded(Mlp), "act", closed="optimal", example=vectors())
    with nadhooks.attach(seeded(Mlp), "act", example=vectors()) as gates:
        six = {"act": torch.ones(6)}
        with pytest.raises(SiteError, match=r"act: expected closed values of shape \(7,\) or \(batch, 7\)"):
            gates.apply({"act": torch.ones(7)}, six)


def test_masks_of_other_tasks_wait_until_nothing_is_in_force() -> None:
    model, x = seeded(Mlp), vectors()
    with nadhooks.attach(model, "act", tasks=4, example=x) as gates:
        fewer = gates.masks().select([0, 1])
        with gates(3), pytest.raises(TaskError, match=r"expected masks of the 4 tasks that are in force, got 2"):
            gates.load(fewer)
        with gates(3):
            model(x)
        gates.load(fewer)
        assert len(gates.tasks) == 2


def test_logits_that_change_between_passes_are_seen_without_gradients_too() -> None:
    model, x = seeded(Mlp), vectors()
    with nadhooks.attach(model, "act", tasks=2, example=x) as gates, torch.no_grad(), gates(1):
        whole = model(x)
        gates.logits["act"].data[1] = 0
        shut = model(x)
        assert not torch.equal(whole, shut)
        assert not model.act(x.new_ones(2, 7)).any()  # a module of the model on its own goes through its gate
        gates.logits["act"].data[1] = 1
        assert torch.equal(model(x), whole)


def test_float32_gates_do_not_promote_under_autocast() -> None:
    model, x = Mlp(), vectors().float()
    with nadhooks.attach(model, "fc1", example=x) as gates, torch.autocast("cpu", dtype=torch.bfloat16):
        bare = model(x)
        with gates(0):
            gated = model(x)
    assert gated.dtype == bare.dtype == torch.bfloat16
    assert torch.equal(gated, bare)


def test_user_hooks_see_the_gated_tensor() -> None:
    model, x = seeded(Mlp), vectors()
    seen: list[torch.Tensor] = []
    model.act.register_forward_hook(lambda module, args, output: seen.append(output))
    with nadhooks.attach(model, "act", example=x) as gates, gates.close("act", range(7)):
        seen.clear()
        model(x)
    assert (seen[0] == 0).all()


def test_own_estimators_go_through_apply() -> None:
    model, x = seeded(Mlp), vectors()
    scores = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    with nadhooks.attach(model, "act", example=x) as gates:
        with gates.apply({"act": scores.sigmoid()}):
            model(x).sum().backward()
        assert scores.grad is not None
        with pytest.raises(SiteError, match=r"act: expected gates of shape \(7,\) or \(batch, 7\), got \(6,\)"):
            gates.apply({"act": torch.ones(6)})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (3, r"unknown task 3: expected one of 0, 1, 2"),
        ("shoe", r"unknown task 'shoe'"),
        (torch.tensor([0, 7]), r"unknown task 7"),
        (torch.tensor([0.5]), r"expected integers"),
        (torch.zeros(2, 2, dtype=torch.long), r"shape \(batch,\), got shape \(2, 2\)"),
    ],
)
def test_unknown_labels_are_named(labels: object, message: str) -> None:
    with (
        nadhooks.attach(seeded(Mlp), "act", tasks=3, example=vectors()) as gates,
        pytest.raises(TaskError, match=message),
    ):
        gates(labels)


def test_labels_of_the_wrong_length_are_named() -> None:
    model, x = seeded(Mlp), vectors(6)
    with (
        nadhooks.attach(model, "act", tasks=3, example=x) as gates,
        gates(torch.tensor([0, 1, 2, 0])),
        pytest.raises(TaskError, match="expected one label for each of the 6 samples, got 4"),
    ):
        model(x)


def test_tasks_have_labels_and_names() -> None:
    with nadhooks.attach(seeded(Mlp), "act", tasks={3: "cat", 8: "dog"}, example=vectors(1)) as gates:
        assert gates.tasks == ("cat", "dog")
        gates("dog"), gates(8), gates([3]), gates(["cat"])
        masks = gates.masks()
    assert masks.labels == (3, 8)


def test_mean_without_calibration_says_how() -> None:
    model, x = seeded(Mlp), vectors()
    with (
        nadhooks.attach(model, "act", closed="mean", example=x) as gates,
        gates.close("act", 0),
        pytest.raises(nadhooks.NadhooksError, match=r"call gates.calibrate"),
    ):
        model(x)


def test_close_refuses_units_that_do_not_exist() -> None:
    with nadhooks.attach(seeded(Mlp), "act", example=vectors()) as gates:
        with pytest.raises(SiteError, match="expected units from 0 to 6, or 7 booleans, got 7"), gates.close("act", 7):
            pass
        with pytest.raises(SiteError, match="no site 'fc9': the sites are act"), gates.close("fc9", 0):
            pass


def test_models_that_cannot_be_hooked_are_refused() -> None:
    x = vectors().float()
    scripted = torch.jit.trace(Mlp(), x)
    with pytest.raises(ModelError, match="ScriptModule"):
        nadhooks.attach(scripted, "act", example=x)
    with pytest.raises(ModelError, match="attach, then compile, or hand over the original, its _orig_mod"):
        nadhooks.attach(torch.compile(Mlp()), "act", example=x)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got str"):
        nadhooks.attach("resnet18", example=x)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"nothing tells what input Mlp takes; pass example="):
        nadhooks.attach(Mlp(), "act")


# --- what a careful reader tried -------------------------------------------------------------------------------------


def test_quantised_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(nadhooks.NadhooksError, match="quantised"):
        nadhooks.attach(quantised, "0", example=torch.ones(2, 4))


def test_parameters_behind_a_site_are_those_since_the_one_before() -> None:
    with nadhooks.attach(seeded(Split), ["stem", "join"], example=vectors()) as gates:
        assert gates.parameters_behind == {"stem": 4 * 6 + 6, "join": 2 * (6 * 6 + 6) + 6 * 3 + 3}


def test_fewer_labels_than_samples_are_refused_even_where_they_divide() -> None:
    model, x = seeded(Mlp), vectors(6)
    with (
        nadhooks.attach(model, "act", tasks=3, example=x) as gates,
        gates([0, 1, 2]),
        pytest.raises(TaskError, match="expected one label for each of the 6 samples, got 3"),
    ):
        model(x)


def test_a_table_of_tasks_is_not_taken_for_gates_of_samples() -> None:
    model, x = seeded(Mlp), vectors(6)
    table = {"act": torch.ones(3, 7, dtype=torch.float64)}
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    with nadhooks.attach(model, "act", tasks=3, example=x) as gates:
        for handed in ([table], [{}, table]):
            with (
                gates.apply(*handed),
                pytest.raises(TaskError, match=r"act: expected a row for each of the 6 samples.* got 3"),
            ):
                model(x)
        with gates.apply({"act": table["act"][labels]}):
            model(x)


def test_samples_of_a_list_among_keyword_arguments_are_counted() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = seeded(Mlp)

        def forward(self, images: list[Tensor]) -> Tensor:
            return cast(Tensor, self.inner(torch.stack(images)))

    model, x = Images(), list(vectors(6))
    with nadhooks.attach(model, "inner.act", tasks=3, example={"images": x}) as gates, gates([0, 1, 2] * 2):
        torch.testing.assert_close(model(images=x), model(x))


def test_gates_are_in_force_in_one_thread_at_a_time() -> None:
    model, x = seeded(Mlp), vectors()
    with nadhooks.attach(model, "act", tasks=2, example=x) as gates, ThreadPoolExecutor(1) as other:

        def use() -> None:
            with gates(1), gates(0):
                model(x)

        with gates(0), pytest.raises(NadhooksError, match="in force in another thread; give each a copy"):
            other.submit(use).result()
        other.submit(use).result()
        with gates.everything_open():
            assert other.submit(model, x).result() is not None


def test_samples_are_counted_wherever_they_are() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = seeded(Mlp)

        def forward(self, table: Tensor, batch: dict[str, list[Tensor]]) -> Tensor:
            return cast(Tensor, self.inner(torch.stack(batch["images"]) + table.mean()))

    model, x = Nested(), list(vectors(6))
    arguments = (torch.ones(5, dtype=torch.float64), {"images": x})
    with nadhooks.attach(model, "inner.act", tasks=3, example=arguments) as gates:
        with gates([0, 1, 2] * 2):
            model(*arguments)
        with gates([0, 1, 2, 0]), pytest.raises(TaskError, match="for each of the 5 or 6 samples, got 4"):
            model(*arguments)


def test_means_are_measured_open_inside_a_close_too() -> None:
    model, x = seeded(Mlp), vectors()
    with nadhooks.attach(model, "act", example=x) as gates:
        with gates.close("act", range(7)):
            gates.calibrate([x])
            assert gates._now.shut
        torch.testing.assert_close(gates.constants["act"], model.act(model.fc1(x)).mean(0).detach())


def test_attach_works_in_inference_mode() -> None:
    model, x = seeded(Mlp), vectors()
    with torch.inference_mode():
        gates = nadhooks.attach(model, "act", example=torch.ones_like(x))
    assert set(gates.wiring.edges) == {("input", "act"), ("act", "output")}
    with gates(0):
        model(x).sum().backward()
    assert gates.logits["act"].grad is not None


@pytest.mark.parametrize(
    "units", [np.int64(3), [np.uint8(3)], torch.tensor([3], dtype=torch.uint8), torch.tensor(3), (3,)]
)
def test_units_of_any_whole_number_kind_are_closed(units: Any) -> None:
    with nadhooks.attach(seeded(Mlp), "act", example=vectors()) as gates, gates.close("act", units):
        assert gates._now.shut["act"].nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("units", [None, 1.5, "abc", 10**30, [[1, 2], [3]], [True], torch.tensor([0.5])])
def test_other_units_are_refused(units: Any) -> None:
    with nadhooks.attach(seeded(Mlp), "act", example=vectors()) as gates:
        with pytest.raises(SiteError, match="expected units from 0 to 6, or 7 booleans"), gates.close("act", units):
            pass
        assert gates._now.shut == {}


@pytest.mark.parametrize("label", [1, np.int64(1), torch.tensor(1), np.array(1), "1"])
def test_one_task_may_be_named_in_any_way(label: Any) -> None:
    with nadhooks.attach(seeded(Mlp), "act", tasks=3, example=vectors()) as gates:
        assert gates.task_rows.rows(label).tolist() == [1]
        assert gates.masks().select(label).tasks == ("1",)
        assert nadhooks.flow_graph(gates.masks(), label).graph["tasks"] == ["1"]


@pytest.mark.parametrize("labels", [[], True, [True], 1.5, [torch.tensor(1.7)], b"x", None])
def test_labels_of_other_kinds_are_refused(labels: Any) -> None:
    with nadhooks.attach(seeded(Mlp), "act", tasks=200, example=vectors()) as gates, pytest.raises(TaskError):
        gates(labels)


@pytest.mark.parametrize("tasks", [0, True, 1.5, "cat", None, [1.5], torch.tensor(1.5), [], [1, 1]])
def test_tasks_of_other_kinds_are_refused(tasks: Any) -> None:
    with pytest.raises(TaskError):
        nadhooks.attach(seeded(Mlp), "act", tasks=tasks, example=vectors())


def test_what_is_not_masks_or_gates_is_refused() -> None:
    with nadhooks.attach(seeded(Mlp), "act", example=vectors()) as gates:
        with pytest.raises(nadhooks.NadhooksError, match="expected Masks, got str"):
            gates.load("masks.safetensors")  # type: ignore[arg-type]
        for values in (None, [1], {"act": 3}, {"act": torch.ones(0, 7)}):
            with pytest.raises(SiteError, match="expected"):
                gates.apply(values)  # type: ignore[arg-type]


def test_checkpointed_blocks_learn_inside_their_gates() -> None:
    class Checkpointed(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    x = vectors(40)
    data = [(x, seeded(Mlp, 4)(x).argmax(1))]
    plain, checkpointed = (nadhooks.learn(seeded(kind, 4), data, "act", method="nad") for kind in (Mlp, Checkpointed))
    assert torch.equal(plain["act"], checkpointed["act"])


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_gates_compile_into_one_graph_also_when_they_are_attached_again(grad: Any) -> None:
    model, x = seeded(Mlp), vectors()
    compiled: Any = None
    for unit in (2, 4):
        bare = model(x)
        with nadhooks.attach(model, "act", tasks=2, example=x) as gates, grad():
            gates.logits["act"].data[1, unit:] = 0
            if compiled is None:
                compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            with gates(1):
                assert torch.equal(compiled(x), model(x))
                assert not torch.equal(compiled(x), bare)
            assert torch.equal(compiled(x), bare)
        with grad():
            compiled(x)  # without any gate


def test_models_compiled_in_place_are_refused() -> None:
    model = Mlp()
    model.compile()
    with pytest.raises(ModelError, match=r"attach, then compile$"):
        nadhooks.attach(model, "act", example=vectors().float())


def test_what_modules_cache_in_eval_mode_is_gone_after_attach() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.bias = nn.Parameter(torch.zeros(3))
            self.cache: dict[str, Tensor] = {}
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            self.last = x
            if self.training:
                return self.fc(x) + self.bias
            if "bias" not in self.cache:
                self.cache["bias"] = 2 * self.bias
            return self.fc(x) + self.cache["bias"]

    model = Caching()
    with nadhooks.attach(model, "fc", example=torch.ones(2, 4)):
        assert (model.cache, model.passes, hasattr(model, "last")) == ({}, 0, False)


def test_gates_on_the_meta_device_give_no_masks() -> None:
    with torch.device("meta"):
        model, example = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.zeros(1, 4)
    with (
        nadhooks.attach(model, "0", example=example) as gates,
        pytest.raises(nadhooks.NadhooksError, match="meta device have no values"),
    ):
        gates.masks()
