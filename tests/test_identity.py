"""Which model masks belong to: the same structure under other names, other structures under the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

import nadhooks
from nadhooks import identity, zoo
from nadhooks.errors import SiteError

X = torch.randn(2, 3, 8, 8)


def net(width: int = 4, kernel: int = 3, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.Conv2d(width, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 64, classes),
    )


def masks_of(model: nn.Module, sites: object = "[13]", tasks: int = 2) -> nadhooks.Masks:
    with nadhooks.attach(model, sites, tasks=tasks, example=X) as gates:  # type: ignore[arg-type]
        with torch.no_grad():
            for logits in gates.parameters():
                logits.copy_(torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)).round())
        return gates.masks()


def test_structure_does_not_hear_of_the_classifier_or_of_wrappers() -> None:
    prints = {
        masks_of(model, sites).provenance["structure"]
        for model, sites in (
            (net(), "[13]"),
            (net(classes=7), "[13]"),
            (nn.DataParallel(net()), "module.*[13]"),
        )
    }
    assert len(prints) == 1
    assert masks_of(net(kernel=5)).provenance["structure"] not in prints
    assert masks_of(net(width=8)).provenance["structure"] not in prints


def test_the_same_network_of_both_zoos_has_one_structure() -> None:
    prints = set()
    for spec in ("timm:resnet50", "torchvision:resnet50", "timm:resnet50,num_classes=10"):
        with torch.device("meta"):
            model = zoo.load_model(spec)
        with nadhooks.attach(model, "layer?.*") as gates:
            prints.add(identity.structure_of(gates.sites, gates.parameters_behind))
    assert len(prints) == 1


def test_weights_tell_two_trainings_apart_and_not_two_wrappers() -> None:
    model, other = net(), net()
    assert identity.weights_of(model) == identity.weights_of(other) == identity.weights_of(nn.DataParallel(other))
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-6
    assert identity.weights_of(model) != identity.weights_of(other)
    assert identity.weights_of(net().half()) != identity.weights_of(model)
    assert identity.weights_of(nn.Linear(2, 2, device="meta")) is None


def test_fingerprints_are_those_that_the_format_specifies() -> None:
    masks, model = masks_of(net()), net()
    behind = masks.provenance["parameters_behind"]
    lines = ", ".join(f'["{s.name}", {s.axis}, {s.units}, {s.block}, false, {behind[s.name]}]' for s in masks.sites)
    assert masks.provenance["structure"] == f"sha256:{hashlib.sha256(f'[{lines}]'.encode()).hexdigest()}"
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} torch.float32 {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    assert identity.weights_of(model) == f"sha256:{digest.hexdigest()}"


def test_another_structure_is_refused_with_what_was_expected_and_found(tmp_path: Path) -> None:
    masks = masks_of(net())
    with nadhooks.attach(net(kernel=5), "[13]", example=X, tasks=3) as gates:
        before = gates.masks()
        with pytest.raises(SiteError, match=r"1: expected 1 \(4 units on axis 1\) behind 112 parameters, found 304"):
            gates.load(masks)
        assert gates.masks() == before
    with (
        nadhooks.attach(net(width=8), "[13]", example=X) as gates,
        pytest.raises(
            SiteError, match=r"1: expected 1 \(4 units on axis 1\), found 1 \(8 units on axis 1\) \(and 1 more"
        ),
    ):
        gates.load(masks)


def test_not_strictly_loads_what_fits_and_lists_the_rest() -> None:
    masks = masks_of(net(), tasks=3)
    with nadhooks.attach(net(width=8), ["0", "[13]"], example=X, closed="zero") as gates:
        differ = gates.load(masks, strict=False)
        assert set(differ) == {"0", "1", "3"}
        assert "behind" in differ["3"]  # which was loaded all the same: its tensor is the same
        assert "no such site" in differ["0"]
        loaded = gates.masks()
        assert torch.equal(loaded["3"], masks["3"])
        assert bool((loaded["1"] == 1).all() and (loaded["0"] == 1).all())
        assert loaded.tasks == masks.tasks
        with gates(2), torch.no_grad():  # it runs
            gates.attached()(X)
    with nadhooks.attach(net(), "0", example=X) as gates, pytest.raises(SiteError) as caught:
        gates.load(masks, strict=False)
    assert "strict=False" not in str(caught.value)  # nothing fits


def test_constants_of_sites_that_do_not_fit_are_not_missed() -> None:
    zero = masks_of(net(), tasks=2)
    with nadhooks.attach(net(), "[13]", tasks=2, example=X) as gates:
        constants = {site.name: torch.arange(2.0 * site.units).reshape(2, -1) for site in gates.sites}
        masks = gates.masks_of(gates.task_rows, zero.values, {}, constants)
    with nadhooks.attach(net(width=8), ["0", "[13]"], example=X) as gates:
        gates.load(masks, strict=False)
        loaded = gates.masks()
        assert loaded.closed == "optimal"
        assert torch.equal(loaded.constants["3"], masks.constants["3"])
        assert loaded.constants["0"].shape == (2, 8)
        seen: dict[str, torch.Tensor] = {}
        for task in (0, 1):
            with gates(task), gates.watch(lambda site, x: seen.update({site.name: x})), torch.no_grad():
                gates.attached()(X)
            shut = masks["3"][task] == 0
            put_out = seen["3"].movedim(1, -1)[..., shut]
            assert shut.any()
            assert torch.equal(put_out, constants["3"][task, shut].expand_as(put_out))


def test_means_of_sites_that_do_not_fit_are_not_missed() -> None:
    with nadhooks.attach(net(), "[13]", example=X) as gates:
        gates.calibrate([X])
        masks = gates.masks()
    assert masks.closed == "mean"
    model = net(width=8)
    with nadhooks.attach(model, "[13]", example=X) as gates, torch.no_grad():
        gates.load(masks, strict=False)
        bare = model(X)
        with gates(0):
            assert torch.equal(model(X), bare)  # all masks are open


@pytest.mark.parametrize("way", ["into a wrapped model", "out of a wrapped model"])
def test_wrappers_of_whole_models_do_not_matter(way: str) -> None:
    plain, wrapped = net(), nn.DataParallel(net())
    into, out = (wrapped, plain) if way.startswith("into") else (plain, wrapped)
    masks = masks_of(out, "**.[13]" if out is wrapped else "[13]")
    with nadhooks.attach(into, "**.[13]" if into is wrapped else "[13]", example=X) as gates:
        assert gates.load(masks) == {}
        for theirs, ours in zip(masks.sites, gates.sites, strict=True):
            assert torch.equal(gates.masks()[ours.name], masks[theirs.name])


@pytest.mark.parametrize("way", ["into a wrapped model", "out of a wrapped model"])
def test_gates_attach_where_masks_were_learnt_whatever_wraps_the_model(way: str) -> None:
    plain, wrapped = net(), nn.DataParallel(net())
    into, out = (wrapped, plain) if way.startswith("into") else (plain, wrapped)
    masks = masks_of(out, "**.[13]" if out is wrapped else "[13]")
    names = [name for name, _ in into.named_modules()]
    with nadhooks.attach(into, masks.sites, example=X) as gates:
        assert gates.load(masks) == {}
        assert all(site.module in names for site in gates.sites)
        with gates(0):
            gated = into(X)
    assert torch.equal(nadhooks.sub_architecture(into, masks, 0, example=X)(X), gated)
    graph = nadhooks.unit_flow(into, masks, 0, X)
    assert set(graph.graph["sites"]) == {site.name for site in gates.sites}
    assert nadhooks.verify(into, masks, graph, X).edges is not None


def test_other_names_are_given_by_the_user() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    masks = masks_of(net())
    with nadhooks.attach(Named(), "body.[13]", example=X) as gates:
        with pytest.raises(SiteError, match=r"found no such site.*masks\.renamed"):
            gates.load(masks)
        assert gates.load(masks.renamed(lambda name: f"body.{name}")) == {}
