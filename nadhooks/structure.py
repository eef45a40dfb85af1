"""What a dry run shows of a network's structure: its blocks, its hidden activations, its attention heads.

From what happened and from types of layers, never from names of models.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules import activation

from .tracing import Call, Trace, has_weights, input_units, layer_axis, never_fired

MOST = 64  # blocks; networks of more give the last block of each of their stages

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Pick:
    """A module that a selector chose. A required pick that cannot become a site is an error, any other is reported."""

    module: str
    required: bool = False
    side: Side = "output"
    units: int | None = None  # None: one per position on the axis
    alternating: bool = False


def block_names(trace: Trace) -> list[str]:
    """The modules that a person would call the network's blocks.

    They are modules of several convolutions or linear layers that are numbered among their like: `layer1.0`,
    `cell_3`, `Mixed_5b`; bare containers only where nothing else holds most of the layers. Plain stacks of layers
    have segments instead.
    """
    for containers in (False, True):
        names = _numbered(trace, containers)
        if _holds_most_layers(trace, names):
            break
    else:
        names = segment_ends(trace)
    stages = {name.rpartition(".")[0]: name for name in names}  # the last block of each
    return list(stages.values()) if len(names) > MOST and len(stages) > 3 else names


def _numbered(trace: Trace, containers: bool) -> list[str]:
    """Composite modules that are numbered among their like. A stage, which only runs such modules, gives way to them.

    containers: bare containers count too.
    """
    composite = [call for call in trace.fired() if _is_composite(call.module, containers) and _place(call.name)]
    places = Counter(_place(call.name) for call in composite)
    kinds = {
        type(call.module) for call in composite if places[_place(call.name)] > 1 and not _is_container(call.module)
    }
    found = [call for call in composite if places[_place(call.name)] > 1 or type(call.module) in kinds]
    found_names = {call.name for call in found}
    parts = {call.name: _nearest(trace, call, found_names) for call in found}
    chains = dict.fromkeys(places, True)
    for call in found:  # what holds for one module at a place must hold for all: a first or last stage may differ
        chains[_place(call.name)] &= _is_chain(trace, call, parts[call.name])
    outermost = _nearest(trace, None, found_names)
    blocks: list[Call] = []
    while outermost:
        call = outermost.pop()
        if chains[_place(call.name)]:
            outermost += parts[call.name]
        else:
            blocks.append(call)
    return [call.name for call in sorted(blocks, key=lambda call: call.done)]


def _place(name: str) -> str:
    """A module's name without numbers, layer2.0 -> layer#.#, Mixed_5b -> Mixed_#; empty if it has none at its end."""
    parts = [re.sub(r"\d.*", "#", part) for part in name.split(".")]
    return ".".join(parts) if parts[-1].endswith("#") else ""


def _is_composite(module: nn.Module, containers: bool) -> bool:
    return (containers or not _is_container(module)) and sum(has_weights(part) for part in module.modules()) > 1


def _is_container(module: nn.Module) -> bool:
    return type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _nearest(trace: Trace, call: Call | None, names: set[str]) -> list[Call]:
    """The calls of these modules that happen within a call (None: within the model's), with no other between."""
    found: dict[str, Call] = {}
    waiting = list(trace.children[None if call is None else trace.first[call.name]])
    while waiting:
        index = waiting.pop()
        inner = trace.calls[index]
        if inner.name in names:
            found.setdefault(inner.name, inner)
        else:
            waiting += trace.children[index]
    return sorted(found.values(), key=lambda inner: inner.done)


def _is_chain(trace: Trace, call: Call, parts: list[Call]) -> bool:
    """The module runs its numbered parts and puts out what the last of them does, at most in another shape."""
    if not parts or not all(_stands_in_a_row(part.name, call, trace) for part in parts):
        return False
    after = (c for c in trace.inside(call) if c.done > parts[-1].done and has_weights(c.module))
    sizes = [sum(math.prod(leaf.shape) for leaf in c.outputs) for c in (call, parts[-1])]
    return not any(True for _ in after) and sizes[0] == sizes[1]


def _stands_in_a_row(name: str, call: Call, trace: Trace) -> bool:
    """In a container, or numbered among nothing else: the blocks of a stage are, the branches of a cell are not."""
    parent = trace.model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return True
    weighted = [key for key, part in parent.named_children() if any(has_weights(inner) for inner in part.modules())]
    return parent is call.module and len({_place(key) for key in weighted} - {""}) == 1 and all(map(_place, weighted))


def _holds_most_layers(trace: Trace, names: list[str]) -> bool:
    layers = [call for call in trace.fired() if has_weights(call.module)]
    held = {inner.name for name in names for inner in trace.inside(trace.calls[trace.first[name]])}
    return 2 * sum(layer.name in held for layer in layers) >= len(layers)


def segment_ends(trace: Trace) -> list[str]:
    """For plain stacks of layers: the last module before each next layer whose units are the last layer's."""
    ends: list[str] = []
    candidate: str | None = None
    units: int | None = None
    for call in trace.fired():
        of_parts = bool(list(call.module.children())) and not has_weights(call.module)  # a layer may compute its weight
        if of_parts or "parametrizations" in call.name.split(".") or not call.outputs:
            continue
        leaf = call.outputs[0]
        axis = trace.axis(call, leaf)
        if has_weights(call.module):
            ends += [candidate] if candidate else []
            candidate, units = call.name, None if axis is None else leaf.shape[axis]
        elif candidate and axis is not None and leaf.shape[axis] == units:
            candidate = call.name
    return ends  # the last segment is the model's own output


def is_pointwise(module: nn.Module) -> bool:
    kernel = getattr(module, "kernel_size", None)
    return isinstance(module, nn.Linear) or (has_weights(module) and kernel is not None and set(kernel) == {1})


def puts_out(call: Call, taker: nn.Module) -> bool:
    """The call puts out the units that the layer `taker` takes (a softmax between two layers does not)."""
    shape = call.outputs[0].shape if call.outputs else ()
    axis = layer_axis(taker, len(shape))
    return axis is not None and axis < len(shape) and shape[axis] == input_units(taker)


def is_activation(call: Call) -> bool:
    module = call.module
    if type(module).__module__ == activation.__name__ and not isinstance(module, nn.MultiheadAttention):
        return True
    inert = isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)) or layer_axis(module, 4) is not None
    return not inert and not list(module.children()) and not list(module.parameters())


def hidden_activations(trace: Trace) -> list[str]:
    """Activations between two linear layers or 1x1 convolutions that one module calls one after the other."""
    found: list[str] = []
    for parent in [None, *range(len(trace.calls))]:
        hidden: Call | None = None  # the activation that followed the last layer
        after_layer = False
        for call in (trace.calls[child] for child in trace.children[parent]):
            if is_pointwise(call.module):
                if hidden is not None and puts_out(hidden, call.module):
                    found.append(hidden.name)
                hidden, after_layer = None, True
            elif has_weights(call.module):
                hidden, after_layer = None, False
            elif after_layer and hidden is None and is_activation(call):
                hidden = call
    return list(dict.fromkeys(found))


HEAD_COUNTS = ("num_heads", "n_heads", "heads")
ALTERNATING = {"timm.models.nest.Attention"}  # types whose feature i belongs to head i mod heads


def attention_heads(trace: Trace) -> tuple[list[Pick], dict[str, str]]:
    """Where the heads of every attention module are, and {attention module: why it has none}.

    They are on what its output projection takes in, or on what it puts out, side by side, or alternating on the axis.
    Attention modules are those with a whole number `num_heads` (`n_heads`, `heads`) and no such module running inside.
    The output projection is the last linear layer or 1x1 convolution they run, unless that takes in what the module
    itself does (then it projects the queries, and the heads are what the module puts out).
    """
    found: list[Pick] = []
    skipped: dict[str, str] = {}
    attention = {call.name: number for call in trace.fired() if (number := _head_count(call.module))}
    for name, number in attention.items():
        call = trace.calls[trace.first[name]]
        inside = list(trace.inside(call))[1:]
        if any(inner.name in attention for inner in inside):
            continue
        own = {leaf.serial for leaf in call.inputs}
        layers = sorted((inner for inner in inside if has_weights(inner.module)), key=lambda inner: inner.done)
        projections = [
            layer for layer in layers if is_pointwise(layer.module) and own.isdisjoint(x.serial for x in layer.inputs)
        ]
        unused = [part for part in never_fired(trace) if part.startswith(name + ".")]
        features = input_units(projections[-1].module) if projections else _output_units(trace, call)
        alternating = f"{type(call.module).__module__}.{type(call.module).__qualname__}" in ALTERNATING
        if not layers:
            continue  # a bias or an embedding that knows the number of heads
        elif not projections and unused:
            skipped[name] = f"its output projection never fires (used in another way: {', '.join(unused)})"
        elif not features or features % number:
            skipped[name] = f"expected {number} heads of equal size, got {features or 'an unknown number of'} features"
        elif projections:
            found.append(Pick(projections[-1].name, False, "input", number, alternating))
        else:
            found.append(Pick(name, False, "output", number, alternating))
    return found, skipped


def _head_count(module: nn.Module) -> int:
    counts = (getattr(module, name, 0) for name in HEAD_COUNTS)
    return next((count for count in counts if type(count) is int and count > 0), 0)


def _output_units(trace: Trace, call: Call) -> int:
    axis = trace.axis(call, call.outputs[0]) if call.outputs else None
    return 0 if axis is None else call.outputs[0].shape[axis]
