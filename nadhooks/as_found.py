"""A model left as it was found, whatever ran on it meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

OF_EVERY_MODULE = set(vars(nn.Module()))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; flags, the random state, buffers and what modules keep in attributes as found afterwards.

    Attention layers may cache biases in eval mode and clear them on `train()`, which is not called here; counters and
    observers of ranges go on in eval mode.
    """
    found = [(module, module.training, _attributes(module), _buffers(module)) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            for module, *_ in found:
                module.training = False
            yield
    finally:
        for module, training, attributes, buffers in found:
            module.training = training
            _put_attributes_back(module, attributes)
            _put_buffers_back(module, buffers)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for weights inside; flags and the random state as found afterwards."""
    with gradients(model, False), undisturbed(model):
        yield


@contextmanager
def gradients(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, every parameter takes gradients, or none does; as found afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(wanted)
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)


@contextmanager
def other_parameters(model: nn.Module, other: Callable[[nn.Parameter], Tensor | None]) -> Iterator[None]:
    """Inside, what `other` gives for a floating-point parameter stands in its place; the model's own come back."""
    with ExitStack() as stack:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                value = other(parameter) if parameter.is_floating_point() else None
                if value is not None:
                    stack.callback(module._parameters.__setitem__, name, parameter)
                    module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        yield


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's own attributes: {name: (value, a copy of it if it is a list or a dict)}."""
    return {
        name: (value, copy.copy(value) if type(value) in (list, dict) else None)
        for name, value in vars(module).items()
        if name not in OF_EVERY_MODULE
    }


def _put_attributes_back(module: nn.Module, attributes: Mapping[str, tuple[Any, Any]]) -> None:
    for name in set(_attributes(module)) - set(attributes):
        del vars(module)[name]
    for name, (value, contents) in attributes.items():
        if type(value) is list:
            value[:] = contents
        elif type(value) is dict:
            value.clear()
            value.update(contents)
        vars(module)[name] = value


def _buffers(module: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None, int]]:
    """{name: (buffer, a copy of its values, how often it was written to)}; inference tensors do not count that."""
    found: dict[str, tuple[Tensor | None, Tensor | None, int]] = {}
    for name, buffer in module._buffers.items():
        if buffer is None or buffer.is_meta or is_lazy(buffer):
            found[name] = buffer, None, 0
        else:
            found[name] = buffer, buffer.detach().clone(), -1 if buffer.is_inference() else buffer._version
    return found


def _put_buffers_back(module: nn.Module, buffers: Mapping[str, tuple[Tensor | None, Tensor | None, int]]) -> None:
    module._buffers.clear()
    for name, (buffer, values, written) in buffers.items():
        module._buffers[name] = buffer
        if buffer is None or values is None or (not buffer.is_inference() and buffer._version == written):
            continue
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            if buffer.shape != values.shape:  # an observer that saw nothing before is empty
                buffer.resize_(values.shape)
            buffer.copy_(values)
