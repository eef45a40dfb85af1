"""The check of both zoos: what it finds, that it notices faults, and its ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from nadhooks import acting, gates, gating, zoo
from nadhooks.zoo import check, coverage
from nadhooks.zoo.__main__ import main
from nadhooks.zoo.processes import examine

right_gate = gating.gate


def findings(spec: str = "timm:test_vit", real: bool = True) -> dict[str, check.Finding]:
    return {finding.granularity: finding for finding in check.check_model(spec, real=real, channels_wiring=real)}


def test_a_sound_model_passes_every_check() -> None:
    found = findings()
    assert all(finding.passed for finding in found.values())
    assert (found["blocks"].sites, found["heads"].sites) == (6, 6)
    assert set(found["blocks"].checks) == set(check.CHECKS)
    assert set(found["blocks"].checks.values()) == {"ok"}
    assert found["channels"].checks["perturbation"] == "ok"


def test_the_meta_device_attaches_and_wires_without_values() -> None:
    found = findings(real=False)
    assert all(finding.passed and finding.checks == {"wiring": "ok"} for finding in found.values())
    assert found["channels"].units == findings()["channels"].units


def test_a_network_without_heads_says_so() -> None:
    found = findings("timm:test_resnet")
    assert (found["heads"].sites, found["heads"].reason, found["heads"].passed) == (0, "none in this network", True)


@pytest.mark.parametrize(
    ("name", "fault", "noticed"),
    [
        ("open", lambda x, g, *rest, **more: x * 1.0001, "open"),
        ("closing", lambda x, *rest: x, "closing"),
        ("gradient", lambda x, g, *rest, **more: x, "gradient"),
        ("swapped", lambda x, g, axis, block, *rest, **more: right_gate(x, g.flip(0), axis, block), "per sample"),
        ("axis", lambda x, g, axis, block, *rest, **more: x * g[:, :1].reshape(-1, *[1] * (x.dim() - 1)), "gradient"),
    ],
)
def test_faulty_gates_are_noticed(monkeypatch: pytest.MonkeyPatch, name: str, fault: Any, noticed: str) -> None:
    monkeypatch.setattr(acting, "with_closed" if name == "closing" else "gate", fault)
    found = findings()["blocks"]
    assert not found.passed
    assert found.checks[noticed] != "ok"


def test_a_forgotten_hook_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates.Gates, "detach", lambda self: None)
    assert findings()["blocks"].checks["detach"].startswith("differs from before: the model")


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        (("input a", "a b", "b a", "b output"), "has a cycle"),
        (("input a", "b output", "a output"), "has other sources than the input: input, b"),
        (("input a", "a b", "a output"), "no way to the output from b"),
        (("input a", "a b", "b output"), "ok"),
    ],
)
def test_unsound_wiring_is_named(edges: tuple[str, ...], said: str) -> None:
    with gates.attach(nn.Sequential(nn.Linear(2, 2)), "0", example=torch.ones(1, 2)) as attached:
        attached.wiring = nx.DiGraph(edge.split() for edge in edges)
        assert check.wiring_is_sound(attached) == said


def test_the_second_opinion_names_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = check.perturb

    def other(*arguments: Any) -> Any:
        graph = right(*arguments).copy()
        graph.remove_edges_from([("blocks.0", "blocks.1")])
        graph.add_edge("input", "blocks.2")
        return graph

    monkeypatch.setattr(check, "perturb", other)
    found = findings()["blocks"].checks["perturbation"]
    assert found == "adds input -> blocks.2, refutes blocks.0 -> blocks.1"


def test_examples_suit_every_family() -> None:
    for name, shapes in {
        "r3d_18": [(1, 3, 16, 112, 112)],
        "raft_small": [(1, 3, 128, 128)] * 2,
        "lraspp_mobilenet_v3_large": [(1, 3, 520, 520)],
        "ssdlite320_mobilenet_v3_large": [(3, 256, 256)],
        "quantized_mobilenet_v3_large": [(1, 3, 224, 224)],
    }.items():
        example = zoo.example_for(zoo.load_model(f"torchvision:{name}"))
        leaves = example if isinstance(example, tuple) else (example,)
        assert [tuple(x.shape) for leaf in leaves for x in (leaf if isinstance(leaf, list) else [leaf])] == shapes


def test_both_zoos_are_known_by_name_and_file() -> None:
    names = zoo.model_names()
    assert names["timm:resnet50"] == "timm.models.resnet"
    assert names["torchvision:raft_small"] == "torchvision.models.optical_flow.raft"
    assert len(names) > 1200


def test_a_model_that_ends_its_process_is_a_finding() -> None:
    found = examine("timm:no_such_model", True, True, 7)
    assert [finding.granularity for finding in found] == list(check.GRANULARITIES)
    assert all(not finding.passed and "no model 'no_such_model'" in finding.reason for finding in found)


def test_a_ledger_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = tmp_path / "new" / "ledger.csv"
    assert main(["check", "test_resnet", "--report", str(ledger), "--workers", "1"]) == 0
    rows = coverage.read(ledger)
    assert [row["granularity"] for row in rows] == list(check.GRANULARITIES)
    assert {row["result"] for row in rows} == {"attached", "none"}
    with ledger.open("a") as file:
        file.write("0.1.0,a line that was cut")
    assert main(["check", "test_resnet", "--report", str(ledger), "--workers", "1"]) == 0
    assert "1 models, 1 of them in the ledger" in capsys.readouterr().out
    assert coverage.read(ledger) == rows
    assert main(["check", "no_model_is_called_so"]) == 2


def test_the_page_counts_what_the_ledger_holds() -> None:
    rows = [coverage.row_of(finding) for finding in findings().values()]
    failed = check.Finding("timm:resnet18", "blocks", 11_000_000, "64 px", reason="failed: by | hand")
    page = coverage.page([*rows, coverage.row_of(failed)])
    assert "**1 of " in page
    assert "| blocks | 1 | 0 | 1 | 6 |" in page
    assert "failed: by / hand" in page


class Detector(nn.Module):
    """Takes a list of images, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"scores": row} for row in self.conv(torch.stack(images)).mean((2, 3))]


def test_lists_of_images_are_batches() -> None:
    model, images = Detector(), [torch.rand(3, 8, 8), torch.rand(3, 8, 8)]
    with gates.attach(model, "conv", tasks=2, example=(images,)) as attached:
        with attached.close("conv", 1):
            closed = model(images)
        assert not any(found["scores"][1] for found in closed)
        with torch.no_grad():
            attached.logits["conv"][1] = 0
        with attached(torch.tensor([0, 1])):
            gated = model(images)
        assert torch.equal(gated[0]["scores"], model(images)[0]["scores"])
        assert not gated[1]["scores"].any()
