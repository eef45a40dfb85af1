"""A dry run: which modules fire, in what order, on tensors of what shape, and which axis holds the units.

Decided from what happens, never from a model's name. The one table here maps layer *types* to the axis of their units.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from .as_found import undisturbed
from .batching import copied
from .default_device import users_device
from .errors import ModelError
from .functional import Apply, WeightUse
from .nesting import leaves_of


@dataclass(frozen=True)
class Leaf:
    """One floating-point tensor among a module's inputs or outputs."""

    index: int  # its place among the flattened leaves
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    serial: int  # the same number for the same tensor object, wherever it turns up
    rows: Tensor | None = field(default=None, compare=False)  # the mean of each position on axis 0, if there are more


@dataclass
class Call:
    """One call of one module during the dry run."""

    name: str
    module: nn.Module
    index: int  # among all calls
    parent: int | None  # index of the call that this one happened in
    inputs: list[Leaf]
    outputs: list[Leaf] = field(default_factory=list)
    bare: bool = False  # the output is a tensor, not a structure of tensors
    within: str | None = None  # the module that uses this one's weight in a function, where it is not called itself
    done: int = -1  # rank by completion


@dataclass
class Trace:
    """What a dry run showed. `calls` are in the order in which they began."""

    model: nn.Module
    calls: list[Call]
    twice: Trace | None = None  # the same with every sample twice, where the example allows that
    samples: int = 1  # in the example

    def __post_init__(self) -> None:
        self.first: dict[str, int] = {}
        self.children: dict[int | None, list[int]] = defaultdict(list)
        self.consumers: dict[int, list[Call]] = defaultdict(list)
        for index, call in enumerate(self.calls):
            self.first.setdefault(call.name, index)
            self.children[call.parent].append(index)
            for leaf in call.inputs:
                self.consumers[leaf.serial].append(call)

    def call(self, name: str) -> Call | None:
        """The first call of that module, None when it never fired."""
        return self.calls[self.first[name]] if name in self.first else None

    def fired(self) -> list[Call]:
        """The first call of every module that fired, in the order in which those calls ended."""
        return sorted((self.calls[index] for index in self.first.values()), key=lambda call: call.done)

    def inside(self, call: Call) -> Iterator[Call]:
        """That call and all calls that happened within it."""
        yield call
        for index in self.children[call.index]:
            yield from self.inside(self.calls[index])

    def axis(self, call: Call, leaf: Leaf) -> int | None:
        """The axis of an output leaf that holds its units, None unless the evidence gives exactly one.

        First what made the tensor: the last layer of a known type that ran inside the module (for a module without
        layers: before it) and whose units the tensor can hold. Then who takes it: a layer of a known type whose input
        is that very tensor, or what an activation made of it.
        """
        inside = [made for made in self.inside(call) if layer_axis(made.module, 4) is not None]
        before = [made for made in self.calls if made.done < call.done and layer_axis(made.module, 4) is not None]
        made_by = inside or sorted(before, key=lambda made: made.done)[-1:]
        votes = (_axis_like(leaf.shape, maker) for maker in sorted(made_by, key=lambda made: -made.done))
        made = [next((axis for axis in votes if axis is not None), None)]
        takers = ((layer_axis(c.module, len(leaf.shape)), input_units(c.module)) for c in self._takers(leaf))
        taken: list[int | None] = [a for a, units in takers if a is not None and leaf.shape[a] == units]
        # where another axis is as long, a block may have turned its tensor around: who takes it knows better
        ambiguous = made != [None] and leaf.shape[1:].count(leaf.shape[made[0] or 0]) > 1
        return next((axis for axis in (taken + made if ambiguous else made + taken) if axis is not None), None)

    def _takers(self, leaf: Leaf) -> Iterator[Call]:
        """The calls that take a tensor, also behind modules without layers that keep its shape (activations)."""
        waiting, seen = [leaf], {leaf.serial}
        while waiting:
            for call in self.consumers[waiting.pop(0).serial]:
                yield call
                if layer_axis(call.module, 4) is None and not list(call.module.children()):
                    same = [out for out in call.outputs if out.shape == leaf.shape and out.serial not in seen]
                    seen.update(out.serial for out in same)
                    waiting += same


def _axis_like(shape: tuple[int, ...], maker: Call) -> int | None:
    """The axis of `shape` that corresponds to the unit axis of the layer that made it."""
    made = maker.outputs[0].shape if maker.outputs else ()
    axis = layer_axis(maker.module, len(made))
    if axis is None or axis >= len(made):
        return None
    if len(shape) == len(made) and shape[axis] == made[axis]:
        return axis
    candidates = [i for i in range(1, len(shape)) if shape[i] == made[axis]]
    if len(candidates) == 1:  # turned around, or tokens put back into a map
        return candidates[0]
    others_agree = len(shape) == len(made) and all(
        a == b for i, (a, b) in enumerate(zip(shape, made, strict=True)) if i != axis
    )
    return axis if others_agree and not candidates else None  # several such outputs concatenated


def layer_axis(module: nn.Module, ndim: int) -> int | None:
    """The axis of the units in an `ndim`-dimensional output of a layer, None for types that are not layers."""
    if isinstance(module, _ConvNd):
        return ndim - 1 - len(module.kernel_size)
    if isinstance(module, nn.Linear):
        return ndim - 1
    if isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm)):
        return 1
    if re.search(r"Norm.*[123]d$", type(module).__name__):  # LayerNorm2d subclasses LayerNorm, but is channels-first
        return 1
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return ndim - len(module.normalized_shape)  # over (C, H, W) it is the first of them
    return None


def input_units(module: nn.Module) -> int | None:
    """How many units a layer expects on that axis of its input."""
    for attribute in ("in_channels", "in_features", "num_features", "num_channels"):
        size = getattr(module, attribute, None)
        if isinstance(size, int):
            return size
    shape = getattr(module, "normalized_shape", None)
    return int(shape[0]) if isinstance(shape, (tuple, list)) and shape else None


def call_model(model: nn.Module, example: Any) -> Any:
    """The forward arguments as users write them: a tensor, a tuple of positional or a dict of keyword arguments."""
    with users_device():
        if isinstance(example, dict):
            return model(**example)
        if isinstance(example, (tuple, list)):
            return model(*example)
        return model(example)


def trace(model: nn.Module, example: Any) -> Trace:
    """Runs the model in eval mode and without gradients, and records every module call.

    It runs twice, the second time with every sample doubled: that tells where samples lie along axis 0. Leaves the
    training flags, the buffers, the hooks and the random state as they were.
    """
    once = _run(model, example)
    try:
        once.twice, once.samples = _run(model, doubled(example)), samples_in(example)
    except (ModelError, RuntimeError):  # a model for one batch size, or an example that is not made of batches
        once.twice = None
    return once


def doubled(example: Any) -> Any:
    """Forward arguments with every sample twice: tensors have samples on axis 0, lists among them are of samples."""
    if isinstance(example, (tuple, list)):
        return tuple(each * 2 if isinstance(each, list) else doubled(each) for each in example)
    if isinstance(example, dict):
        return {key: each * 2 if isinstance(each, list) else doubled(each) for key, each in example.items()}
    return pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.dim() else x, example)


def samples_in(example: Any) -> int:
    """How many samples forward arguments hold, by the first of them: the length of a list, or of a tensor's axis 0."""
    arguments = list(example.values()) if isinstance(example, dict) else example
    if isinstance(arguments, (tuple, list)) and arguments and isinstance(arguments[0], list):
        return len(arguments[0])
    leaves = (leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim())
    return next((len(leaf) for leaf in leaves), 1)


def samples_on_axis_0(trace: Trace, call: Call, leaf: Leaf) -> Literal["together", "views", "none"]:
    """How twice the samples came to lie on axis 0, if nothing else grew.

    "together": all positions of a sample follow each other. "views": all samples of one view, then all of the next, as
    in `cat([images, images.flip(3)])`. "none": axis 0 does not hold the samples.
    """
    again = trace.twice.call(call.name) if trace.twice else None
    if again is None:
        return "together"  # nothing speaks against it
    leaves = {other.index: other for other in (again.inputs if leaf in call.inputs else again.outputs)}
    other = leaves.get(leaf.index)
    if other is None or other.shape != (2 * leaf.shape[0], *leaf.shape[1:]):
        return "none"
    if leaf.rows is None or other.rows is None:
        return "together"
    if len(leaf.rows) % trace.samples or len(leaf.rows) == trace.samples:
        return "together"
    as_a_whole = leaf.rows.repeat(2)
    view_by_view = leaf.rows.reshape(-1, trace.samples).repeat(1, 2).flatten()
    differences = [(other.rows - rows).abs().sum() for rows in (as_a_whole, view_by_view)]
    return "views" if differences[1] < 1e-3 * differences[0] else "together"


def _run(model: nn.Module, example: Any) -> Trace:
    serials, numbers = WeakTensorKeyDictionary(), count()
    calls: list[Call] = []
    open_calls: list[int] = []
    finished = 0

    def leaves(values: Any) -> list[Leaf]:
        found = []
        for index, value in enumerate(leaves_of(values)):
            if isinstance(value, Tensor) and value.is_floating_point():
                if value not in serials:
                    serials[value] = next(numbers)
                several = value.dim() > 1 and len(value) > 1 and not value.is_meta
                rows = value.detach().flatten(1).mean(1, dtype=torch.float64) if several else None
                found.append(Leaf(index, tuple(value.shape), value.dtype, value.device, serials[value], rows))
        return found

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(Call(name, module, len(calls), open_calls[-1] if open_calls else None, leaves((args, kwargs))))
        open_calls.append(calls[-1].index)

    def after(output: Any) -> None:
        nonlocal finished
        call = calls[open_calls.pop()]
        call.outputs, call.bare, call.done = leaves(output), isinstance(output, Tensor), finished
        finished += 1

    def use(name: str, x: Tensor, apply: Apply) -> Tensor:
        within = calls[open_calls[-1]].name if open_calls else ""
        # the layer itself is being called, or one that shares its weight
        if own_weight(modules[within]) is own_weight(modules[name]):
            return apply(x)
        before(name, modules[name], (x,), {})
        calls[-1].within = within
        out = apply(x)
        after(out)
        return out

    modules = dict(model.named_modules())
    layers = {name: own_weight(module) for name, module in modules.items() if has_weights(module)}
    weights = {id(weight): name for name, weight in layers.items() if weight is not None}
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(WeightUse(weights, use))
        for name, module in modules.items():
            enter = module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: before(name, module, args, kwargs), with_kwargs=True
            )
            stack.callback(enter.remove)
            leave = module.register_forward_hook(lambda module, args, output: after(output))
            stack.callback(leave.remove)
        try:
            call_model(model, copied(example))  # models may write into what they are given
        except Exception as error:
            shapes = [tuple(value.shape) for value in pytree.tree_leaves(example) if isinstance(value, Tensor)]
            raise ModelError(
                f"the model failed on the example input (shapes {shapes}): {error}; "
                "pass example= with forward arguments that it accepts"
            ) from error
    return Trace(model, calls)


def logits_of(outputs: Any) -> Tensor:
    """(batch, classes) of what a classifier returns: a tensor, the first of a tuple, or a dict's "logits"."""
    first = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    first = first[0] if isinstance(first, (tuple, list)) and first else first
    if not isinstance(first, Tensor) or first.dim() != 2:
        got = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(outputs).__name__
        keyed = isinstance(outputs, Mapping) and "logits" not in outputs
        keys = f" of {', '.join(map(repr, outputs))}, without 'logits'" if keyed else ""
        alone = isinstance(first, Tensor) and first.dim() == 1  # batches of one come up all along: an epoch's last, say
        lost = "; if the model squeezes batches of one, have it name the axis, as in squeeze(-1)" if alone else ""
        raise ModelError(f"expected a classifier that puts out (batch, classes), got {got}{keys}{lost}")
    return first


def has_weights(module: nn.Module) -> bool:
    """A leaf with weights that mixes its inputs: a convolution or a linear layer, whatever its class."""
    return isinstance(module, (_ConvNd, nn.Linear))


def own_weight(module: nn.Module) -> Tensor | None:
    """Of a layer; None where it has none, or computes it anew at each look (parametrizations)."""
    return module._parameters.get("weight")


def never_fired(trace: Trace) -> Sequence[str]:
    """Modules with parameters of their own that did not fire: used functionally, in training only, or not at all."""
    return [
        name
        for name, module in trace.model.named_modules()
        if name not in trace.first and any(True for _ in module.parameters(recurse=False))
    ]


def own_weights(trace: Trace) -> dict[str, list[str]]:
    """{module: names of its own parameters} for modules that fire and are no layers: an LSTM, a table of positions.

    Parameters of fewer than two axes longer than 1 (biases, scales, class tokens) do not count.
    """
    found: dict[str, list[str]] = {}
    for call in trace.fired():
        if layer_axis(call.module, 4) is None:
            own = call.module.named_parameters(recurse=False)
            names = [name for name, parameter in own if sum(length > 1 for length in parameter.shape) > 1]
            found |= {call.name: names} if names else {}
    return found
