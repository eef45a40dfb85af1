from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

import nadhooks
from nadhooks import sites, zoo
from nadhooks.errors import ModelError, SiteError, TaskError
from nadhooks.folding import Folding
from nadhooks.sites import Sites
from tests.nets import Lean, Line, Mlp, Pair, images, seeded, vectors


def masks_of(model: nn.Module, chosen: Sites | None, example: Any, closed: str = "zero", soft: bool = False) -> Any:
    """Random masks of two tasks, about half of all units kept; means from the example."""
    with nadhooks.attach(model, chosen, tasks=2, example=example) as gates:
        draw(gates, example, closed, soft)
        return gates.masks()


@torch.no_grad()
def draw(gates: nadhooks.Gates, example: Any, closed: str, soft: bool = False) -> None:
    generator = torch.Generator().manual_seed(3)
    for logits in gates.logits.values():
        drawn = torch.rand(logits.shape, generator=generator)
        logits.copy_(drawn if soft else (drawn < 0.5).float())
        logits[:, 0], logits[:, 1] = 0, 1  # none is all open or all closed
    if closed == "mean":
        gates.calibrate([example])
    if closed == "optimal":
        constants = {name: torch.randn(x.shape, generator=generator).to(x) for name, x in gates.logits.items()}
        gates.load(gates.masks_of(gates.task_rows, gates.masks().values, {}, constants))


def hooked(model: nn.Module, masks: nadhooks.Masks, task: object, x: Any) -> Tensor:
    with nadhooks.attach(model, masks.sites, tasks=len(masks), example=x) as gates, torch.no_grad():
        gates.load(masks)
        with gates(task):
            return cast(Tensor, model(x))


def report(folded: nn.Module) -> Folding:
    return cast(Folding, folded.folding)


def hows(folded: nn.Module) -> dict[str, str]:
    return {fold.site: fold.how for fold in report(folded).folds}


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Around(nn.Module):
    """A linear layer, a module on its output, another linear layer; what lies between is given."""

    def __init__(self, between: nn.Module, after: Callable[[Tensor, Tensor], Tensor] = lambda y, z: z) -> None:
        super().__init__()
        self.fc1, self.between, self.fc2, self.after = nn.Linear(4, 6), between, nn.Linear(6, 3), after

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        return self.fc2(self.after(y, self.between(y)))


class Twice(nn.Module):
    """One linear layer and one activation, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.head = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.fc(self.act(self.fc(x)))))


def around(between: nn.Module, after: Callable[[Tensor, Tensor], Tensor] = lambda y, z: z) -> nn.Module:
    torch.manual_seed(0)
    return Around(between, after).double().eval()


def test_closed_units_of_a_layer_are_zero_rows_and_the_model_is_not_changed() -> None:
    model, x = seeded(Line), images()
    before = copy.deepcopy(model.state_dict())
    masks = masks_of(model, "conv1", x)
    folded = nadhooks.sub_architecture(model, masks, 1, example=x)
    kept = masks["conv1"][1]
    assert torch.equal(folded.get_parameter("conv1.weight"), model.conv1.weight * kept.view(-1, 1, 1, 1))
    assert torch.equal(folded.get_parameter("conv1.bias"), cast(Tensor, model.conv1.bias) * kept)
    assert torch.equal(folded(x), hooked(model, masks, 1, x))
    assert report(folded).exact
    assert hows(folded) == {"conv1": "weights"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks_on(model) == hooks_on(folded) == 0


def test_a_layer_without_bias_gets_one_for_means() -> None:
    model, x = seeded(Line), images()
    model.conv1.bias = None
    masks = masks_of(model, "conv1", x, "mean")
    folded = nadhooks.sub_architecture(model, masks, 0, example=x)
    expected = (1 - masks["conv1"][0]) * masks.constants["conv1"]
    assert torch.equal(folded.get_parameter("conv1.bias"), expected)
    torch.testing.assert_close(folded(x), hooked(model, masks, 0, x), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("between", "closed", "how"),
    [
        (nn.ReLU(), "zero", "weights before"),
        (nn.ReLU(inplace=True), "zero", "weights before"),
        (nn.ReLU(), "mean", "weights before"),  # means after a ReLU are not negative, and pass it
        (nn.Sequential(nn.GELU(), nn.Dropout(0.3)), "zero", "weights before"),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.3)), "mean", "columns behind"),  # dropout would scale the mean
        (nn.GELU(), "mean", "columns behind"),  # no bias gives every mean behind a GELU
        (nn.Sigmoid(), "zero", "columns behind"),  # sigmoid(0) is 0.5
        (nn.BatchNorm1d(6), "mean", "weights"),
        (nn.BatchNorm1d(6), "optimal", "weights"),
        (nn.ReLU(), "optimal", "columns behind"),  # negative constants after a ReLU
        (nn.LayerNorm(6), "mean", "weights"),
        (nn.RMSNorm(6), "mean", "columns behind"),  # has no bias
        (nn.Softmax(1), "zero", "columns behind"),  # mixes units
    ],
)
def test_gates_fold_where_that_is_exact(between: nn.Module, closed: str, how: str) -> None:
    model, x = around(between), vectors()
    masks = masks_of(model, "between", x, closed)
    folded = nadhooks.sub_architecture(model, masks, 1, example=x)
    assert hows(folded) == {"between": how}
    torch.testing.assert_close(folded(vectors(seed=9)), hooked(model, masks, 1, vectors(seed=9)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("after", [lambda y, z: z + y, lambda y, z: z * 2 + z, lambda y, z: z + y.relu_()])
def test_a_gate_stays_in_the_module_where_functions_use_its_tensors_unseen(
    after: Callable[[Tensor, Tensor], Tensor],
) -> None:
    model, x = around(nn.Tanh(), after), vectors()
    masks = masks_of(model, "between", x, "mean")
    folded = nadhooks.sub_architecture(model, masks, 0, example=x)
    assert hows(folded) == {"between": "gate"}
    assert torch.equal(folded(vectors(seed=9)), hooked(model, masks, 0, vectors(seed=9)))
    assert isinstance(folded.get_submodule("between"), nn.Tanh)


def test_gates_in_modules_keep_keys_and_names_and_copy_pickle_compile_and_export() -> None:
    model, x = around(nn.Tanh(), torch.add), vectors()
    masks = masks_of(model, "between", x, "mean")
    folded = nadhooks.sub_architecture(model, masks, 0, example=x)
    expected = hooked(model, masks, 0, x)
    assert folded.state_dict().keys() == model.state_dict().keys()
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in model.named_modules()]
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(other(x), expected)
        assert other.folding == report(folded)
    torch.testing.assert_close(copy.deepcopy(folded).float()(x.float()).double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(torch.compile(folded, backend="aot_eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(folded, (x,)).module()(x), expected)


def test_two_sites_of_one_chain_keep_their_own_masks() -> None:
    model, x = seeded(Line), images()
    for closed in ("zero", "mean"):
        masks = masks_of(model, ["conv1", "act1", "conv2", "act2"], x, closed)
        folded = nadhooks.sub_architecture(model, masks, 1, example=x)
        torch.testing.assert_close(folded(x), hooked(model, masks, 1, x), rtol=0, atol=1e-14)


def test_modules_called_twice_are_gated_each_time() -> None:
    model, x = seeded(Twice), vectors()
    for name, how in (("fc", "weights"), ("act", "gate")):
        masks = masks_of(model, name, x)
        folded = nadhooks.sub_architecture(model, masks, 1, example=x)
        assert hows(folded) == {name: how}
        assert torch.equal(folded(x), hooked(model, masks, 1, x))


def test_tensors_of_structures_are_gated_one_by_one() -> None:
    model, x = seeded(Pair), vectors()
    masks = masks_of(model, "both", x)
    folded = nadhooks.sub_architecture(model, masks, 1, example=x)
    assert hows(folded) == {"both[0]": "weights", "both[1]": "weights"}
    assert torch.equal(folded(x), hooked(model, masks, 1, x))


def test_weights_shared_with_another_layer_stay_there() -> None:
    model, x = seeded(Twice), vectors()
    model.head = nn.Linear(4, 4).double()
    model.head.weight = model.fc.weight
    masks = masks_of(model, "fc", x)
    folded = nadhooks.sub_architecture(model, masks, 0, example=x)
    assert torch.equal(folded.get_parameter("head.weight"), model.fc.weight)
    assert torch.equal(folded(x), hooked(model, masks, 0, x))


def test_soft_gates_scale_rows_to_rounding() -> None:
    model, x = seeded(Mlp), vectors()
    for closed in ("zero", "mean"):
        masks = masks_of(model, "act", x, closed, soft=True)
        folded = nadhooks.sub_architecture(model, masks, 1, example=x)
        torch.testing.assert_close(folded(x), hooked(model, masks, 1, x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("between", [nn.ReLU6(), nn.Hardtanh(), nn.Softshrink(), nn.Threshold(0.5, 0.0)])
def test_soft_gates_stay_behind_what_does_not_scale(between: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 16), between, nn.Linear(16, 4)).double()
    example = vectors(4).double()[:, :1] * torch.linspace(-0.1, 0.1, 8, dtype=torch.float64)
    masks = masks_of(model, "1", example, soft=True)
    folded = nadhooks.sub_architecture(model, masks, 0, example=example)
    for scale in (1, 10, 1000):
        x = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
        torch.testing.assert_close(folded(x), hooked(model, masks, 0, x))


def test_a_model_with_gates_attached_is_folded_without_them_and_keeps_them() -> None:
    model, x = seeded(Line), images()
    with nadhooks.attach(model, "conv1", example=x) as gates:
        with torch.no_grad():
            gates.logits["conv1"][0, :2] = 0
        before = hooks_on(model)
        masks = gates.masks()
        with gates.apply({"conv1": gates.logits["conv1"][0] * 1}):  # not a leaf, so nothing that could be copied
            folded = nadhooks.sub_architecture(model, masks, example=x)
            expected = model(x)
        assert hooks_on(folded) == 0 < before == hooks_on(model)
        assert torch.equal(folded(x), expected)


def test_what_a_model_has_cached_with_gradients_is_no_obstacle() -> None:
    model, x = seeded(Line), images()
    vars(model)["cache"] = {"last": model(x)}  # as attention layers cache biases in eval mode
    masks = masks_of(model, "conv1", x)
    assert torch.equal(nadhooks.sub_architecture(model, masks, 0, example=x)(x), hooked(model, masks, 0, x))


def test_a_sub_architecture_can_be_trained_further() -> None:
    model, x = around(nn.BatchNorm1d(6)), vectors()
    model.train().get_submodule("fc1").requires_grad_(False)
    masks = masks_of(model, "between", x)
    folded = nadhooks.sub_architecture(model, masks, 0, example=x)
    assert folded.training
    assert not folded.get_parameter("fc1.weight").requires_grad
    folded(x).sum().backward()
    assert folded.get_parameter("between.weight").grad is not None
    assert torch.equal(model.get_buffer("between.running_mean"), torch.zeros(6).double())  # the copy's have moved


def test_what_cannot_be_folded_is_explained() -> None:
    model, x = seeded(Line), images()
    masks = masks_of(model, "conv1", x)
    with pytest.raises(TaskError):
        nadhooks.sub_architecture(model, masks, "nowhere", example=x)
    with pytest.raises(TaskError, match="2 tasks"):
        nadhooks.sub_architecture(model, masks, example=x)
    with pytest.raises(SiteError, match="conv1"):
        nadhooks.sub_architecture(seeded(Mlp), masks, 0, example=vectors())
    with pytest.raises(SiteError, match=r"conv1: expected .* behind 76 parameters, found 12; take masks of this model"):
        nadhooks.sub_architecture(seeded(Lean), masks, 0, example=x)
    with pytest.raises(ModelError, match="meta device"):
        nadhooks.sub_architecture(copy.deepcopy(model).to("meta"), masks, 0, example=x)


def small_vit() -> nn.Module:
    return VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5).eval()


def small_swin() -> nn.Module:
    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5).eval()


ZOO: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: zoo.load_model("timm:resnet18,channels=(8,16,16,32)"), 64),
    "densenet121": (lambda: zoo.load_model("timm:densenet121,growth_rate=4,block_config=(2,3,3)"), 64),
    "convnext_atto": (lambda: zoo.load_model("timm:convnext_atto,depths=(1,1,2,1)"), 64),
    "vit_tiny": (lambda: zoo.load_model("timm:vit_tiny_patch16_224,img_size=64,depth=3"), 64),
    "swin": (lambda: zoo.load_model("timm:swin_tiny_patch4_window7_224,img_size=56,depths=(2,2),num_heads=(3,6)"), 56),
    "beit": (lambda: zoo.load_model("timm:beit_base_patch16_224,img_size=32,depth=2,embed_dim=48,num_heads=3"), 32),
    "mobilenet_v3_small": (lambda: zoo.load_model("torchvision:mobilenet_v3_small"), 64),
    "torchvision vit": (small_vit, 32),
    "torchvision swin": (small_swin, 32),
}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("closed", ["zero", "mean"])
def test_models_of_the_zoos_equal_the_hooked_ones(name: str, closed: str) -> None:
    make, size = ZOO[name]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # zero-initialised branches would hide what is wrong in them
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    example, x = torch.randn(2, 2, 3, size, size)
    for selector in (sites.blocks(), sites.channels(), sites.heads(), sites.neurons()):
        try:
            gates = nadhooks.attach(model, selector, tasks=2, example=example)
        except SiteError:
            assert selector.description in ("heads()", "neurons()")  # a network without any
            continue
        with gates, torch.no_grad():
            draw(gates, example, closed)
            with gates(1):
                theirs = model(x)
        folded = nadhooks.sub_architecture(model, gates.masks(), 1, example=example)
        with torch.no_grad():
            ours = folded(x)
        in_columns = any("columns" in how for how in hows(folded).values())
        tolerance = 1e-6 * max(1, float(theirs.abs().max())) if in_columns and closed == "mean" else 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_what_is_too_small_beside_another_unit_counts_in_the_end() -> None:
    """A constant before the activation is another behind it; the second unit drowns that where both are compared."""
    model = Around(nn.SiLU()).eval()
    with torch.no_grad():
        model.fc1.weight[1] *= 1e9
        model.fc2.weight[:, 1] *= 1e-9
        model.fc1.bias.zero_()
    x = vectors().float()
    with nadhooks.attach(model, "between", tasks=2, example=x, closed="mean") as gates:
        draw(gates, x, "mean")
        masks = gates.masks()
    folded = nadhooks.sub_architecture(model, masks, 1, example=x)
    assert hows(folded) == {"between": "gate"}
    assert torch.equal(folded(x), hooked(model, masks, 1, x))
