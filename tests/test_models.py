"""The zoos: one small model of every model file through every check, and what selectors find in twelve of them.

Every other model stands in the ledger, docs/coverage.csv, which `python -m nadhooks.zoo check --all` writes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import nadhooks
from examples.darts import SITES as DARTS_SITES
from examples.darts import imagenet_network
from nadhooks import sites, zoo
from nadhooks.zoo import check, coverage

LEDGER = coverage.newest(coverage.read(Path(__file__).parent.parent / "docs" / "coverage.csv"))
LONG = 30.0  # seconds: a file of which no model takes less is attached on the meta device only

COUNTED = {  # spec -> (blocks, channels, neurons, heads), 0 where there are none
    "timm:resnet18": (8, 21, 0, 0),
    "timm:vit_tiny_patch16_224": (12, 50, 12, 12),
    "timm:convnext_atto": (12, 41, 12, 0),
    "timm:efficientnet_b0": (16, 82, 16, 0),
    "timm:densenet121": (4, 121, 0, 0),
    "timm:swin_tiny_patch4_window7_224": (12, 53, 12, 12),
    "torchvision:vgg16": (15, 16, 2, 0),
    "torchvision:resnet50": (16, 54, 0, 0),
    "torchvision:densenet121": (4, 121, 0, 0),
    "torchvision:vit_b_16": (12, 38, 12, 12),
    "torchvision:swin_t": (12, 53, 12, 12),
    "torchvision:googlenet": (9, 58, 0, 0),
}


def representatives() -> list[tuple[str, bool]]:
    """(the model of each file whose checks took the least time, whether to run it for real)."""
    files = zoo.model_names()
    installed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for row in LEDGER:
        if row["ran"] != "meta":
            seconds[row["model"]] = seconds.get(row["model"], 0) + float(row["seconds"])
    for spec in sorted(seconds, key=lambda spec: seconds[spec]):
        if spec in files:
            installed.setdefault(files[spec], spec)
    # detectors have no meta device to go to: the slow ones stand in the ledger only
    chosen = [spec for spec in installed.values() if seconds[spec] < 2 * LONG or ".detection." not in files[spec]]
    return [(spec, seconds[spec] < LONG) for spec in sorted(chosen)]


@pytest.mark.parametrize(("spec", "real"), representatives())
def test_attach_keeps_its_promises(spec: str, real: bool) -> None:
    found = list(check.check_model(spec, real=real))
    assert len(found) == len(check.GRANULARITIES)
    assert [finding for finding in found if not finding.passed] == []


@pytest.mark.parametrize("spec", COUNTED)
def test_every_selector_finds_its_sites(spec: str) -> None:
    model = zoo.load_model(spec)
    for expected, selector in zip(
        COUNTED[spec], (sites.blocks(), sites.channels(), sites.neurons(), sites.heads()), strict=True
    ):
        if not expected:
            with pytest.raises(nadhooks.NadhooksError, match="no site"):
                nadhooks.attach(model, selector)
            continue
        with nadhooks.attach(model, selector) as gates:
            assert len(gates.sites) == expected


def test_the_ledger_holds_every_model_without_a_failure() -> None:
    attached = {row["model"] for row in LEDGER if row["granularity"] == "blocks" and row["result"] == "attached"}
    assert [row for row in LEDGER if row["result"] == "failed"] == []
    if zoo.versions() == {key: LEDGER[-1][key] for key in zoo.versions()}:
        assert attached == set(zoo.model_names())


def test_blocks_are_as_many_as_a_person_would_count() -> None:
    for row in LEDGER:
        assert row["granularity"] != "blocks" or 4 <= int(row["sites"]) <= 64, row["model"]


@pytest.mark.parametrize(
    ("model", "globs", "number", "units"),
    [
        ("torchvision:vgg16", ["features.[1469]", "features.1[1368]", "features.2[0357]", "features.30"], 13, 4224),
        ("torchvision:resnet50", ["maxpool", "layer?.*"], 17, 15168),
        (
            "torchvision:densenet121",
            ["features.pool0", "features.denseblock[123]", "features.transition?", "features.norm5"],
            8,
            3776,
        ),
        ("examples/darts.py:imagenet_network", DARTS_SITES, 16, 6624),
    ],
)
def test_the_papers_sites(model: str, globs: list[str], number: int, units: int) -> None:
    network = imagenet_network() if model.startswith("examples") else zoo.load_model(model)
    with nadhooks.attach(network, globs) as gates:
        assert len(gates.sites) == number
        assert sum(site.units for site in gates.sites) == units
        assert {site.axis for site in gates.sites} == {1}
        if "darts" in model:  # each cell reads the two before it
            assert set(gates.wiring.predecessors("cells.6")) == {"cells.4", "cells.5"}
