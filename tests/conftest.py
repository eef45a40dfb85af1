from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from .hub import Hub, reach, serving

# Tensors of the tests are small, and on a busy machine two threads wait for each other ten times as long as one works.
torch.set_num_threads(1)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the Hugging Face Hub, where this process may write to repositories `us/…`, with an empty cache."""
    with serving(Hub()) as server:
        reach(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server
