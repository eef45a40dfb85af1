"""How models of a zoo run while they are checked: alike each time, at a small size, and not too loud."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import zoo
from ..as_found import other_parameters, undisturbed
from ..errors import NadhooksError, SiteError
from ..nesting import leaves_of
from ..tracing import call_model, doubled

SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384)  # image sides that are tried, smallest first
FAINTER = (0.7, 0.3, 0.1)  # weights times these, until no sigmoid or softmax is saturated on the way of a gradient
LOUD = 1e6  # outputs beyond this, of networks of drawn weights, swallow the part of a single unit


class Runner:
    """Runs a model the same way each time: random state, buffers and training flags as they were.

    seconds: how long a run takes.
    """

    def __init__(self, model: nn.Module, batch: Any):
        self.model, self.batch = model, batch
        self.training_batch = zoo.training_example(model, batch)
        self.detects = zoo.detects(model)
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.moved = False  # running statistics, in train mode
        self.seen: dict[tuple[bool, bool], list[Tensor]] = {}  # what the bare model put out
        begun = time.monotonic()
        self.bare()
        self.seconds = time.monotonic() - begun

    def __call__(self, *, training: bool = False, gradients: bool = False) -> list[Tensor]:
        """The floating-point leaves of the output."""
        if self.moved:  # not right after the run that moved them: its gradients are still to be taken
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])
        self.moved = training
        with undisturbed(self.model), torch.set_grad_enabled(gradients):
            torch.manual_seed(2)  # dropout and stochastic depth
            if training:
                self.model.train()
            outputs = call_model(self.model, self.training_batch if training else self.batch)
        return [x for x in leaves_of(outputs) if isinstance(x, Tensor) and x.is_floating_point()]

    def bare(self, *, training: bool = False, gradients: bool = False) -> list[Tensor]:
        """What the model put out when this was asked first, without gates in force."""
        if (training, gradients) not in self.seen:
            outputs = self(training=training, gradients=gradients)
            self.seen[training, gradients] = [x.detach() for x in outputs]
        return self.seen[training, gradients]


@contextmanager
def zeroed(module: nn.Module, axis: int, unit: int) -> Iterator[None]:
    def zero(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_fill(axis, torch.tensor([unit], device=output.device), 0)

    handle = module.register_forward_hook(zero, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def calmed(model: nn.Module, batch: Any) -> Iterator[None]:
    """Inside, fainter weights where the model's own make its outputs overflow."""
    with ExitStack() as stack:
        for factor in (1.0, *FAINTER) if batch is not None and not zoo.detects(model) else ():
            stack.enter_context(scaled(model, factor))
            if all(bool((x.abs() < LOUD).all()) for x in Runner(model, batch).bare()):
                break
            stack.close()
        yield


def scaled(model: nn.Module, factor: float) -> AbstractContextManager[None]:
    """Inside, every parameter times a factor; the model's own come back untouched."""
    return other_parameters(model, lambda parameter: parameter.detach() * factor)


@contextmanager
def ordinary_attention() -> Iterator[None]:
    """Without the fused inference path of nn.MultiheadAttention, in which there is no tensor to gate."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def on_meta(spec: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return zoo.load_model(spec)
    except NadhooksError:  # torchvision's RegNet reads numbers from a tensor while it is made
        return zoo.load_model(spec).to("meta")


def smallest_example(model: nn.Module) -> tuple[Any, str]:
    """The forward arguments of the smallest images that the model takes, and their description."""
    rescaling = getattr(model, "transform", None)
    for module in model.modules():
        if hasattr(module, "score_thresh"):
            module.__dict__["score_thresh"] = 0.0  # an untrained detector is sure of nothing, so that it keeps all …
        if hasattr(module, "detections_per_img"):
            module.__dict__["detections_per_img"] = 8  # … and its mask and keypoint heads would take minutes
    for side in (*SIZES, None):
        example = zoo.example_for(model, side)
        size = max(leaf.shape[-1] for leaf in leaves_of(example))
        if rescaling is not None and hasattr(rescaling, "min_size") and getattr(rescaling, "fixed_size", None) is None:
            rescaling.min_size, rescaling.max_size = (size,), size  # detection would rescale to 800 pixels
        try:
            run = Runner(model, doubled(example))
            run(training=True)
            run()
        except Exception:  # each model has its own way to say that a size does not suit it
            continue
        return example, f"{size} px"
    raise SiteError("the model takes no image size that it says it takes")
