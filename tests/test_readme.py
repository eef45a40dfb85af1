"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import nadhooks
from nadhooks import cli, zoo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_snippets_run(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = zoo.load_model("timm:resnet18,num_classes=10,channels=(8,8,8,8)")
    model.requires_grad_(False)
    loader = [(torch.randn(10, 3, 32, 32), torch.arange(10)) for _ in range(3)]
    with nadhooks.attach(model, tasks=10, example=loader[0][0]) as gates:
        gates.masks().save("stranger.safetensors")
    exec(snippet, {"model": model, "loader": loader, "torch": torch})
    assert ("save(" not in snippet) or len(nadhooks.load("masks.safetensors")) == 10
    assert not any(module._forward_hooks for module in model.modules())


def test_commands_are_those_that_exist() -> None:
    lines = re.findall(r"^nadhooks (.*?)(?:\s{2,}#.*)?$", README, re.M)
    assert len(lines) >= 6
    for line in lines:
        cli._parser().parse_args(line.replace("'", "").split())


def test_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).is_file(), target
