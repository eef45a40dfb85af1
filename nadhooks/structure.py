"""What a dry run shows of a network's structure: its blocks, its hidden activations, its attention heads.

From what happened and from types of layers, never from names of models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn
from torch.nn.modules import activation

from .tracing import Call, Trace, has_weights, input_units, layer_axis


def block_names(trace: Trace) -> list[str]:
    modules = dict(trace.model.named_modules())
    composite = [call for call in trace.fired() if call.name and _is_composite(call.module)]
    family = {call.name: _family(call.name, modules) for call in composite}
    siblings = Counter((family[call.name], type(call.module)) for call in composite)
    repeated = [call for call in composite if siblings[family[call.name], type(call.module)] > 1]
    # a class of its own that stands in containers as blocks do is a block too: EfficientNet's first, say
    rows = {_row(call.name, family[call.name]) for call in repeated} - {None}
    blocks = [call for call in composite if call in repeated or _row(call.name, family[call.name]) in rows]
    for stage in list(blocks):
        inner = [call for call in blocks if call.name.startswith(stage.name + ".")]
        if not inner or stage not in blocks:
            continue
        if _put_out(stage) == _put_out(inner[-1]):  # a stage hands on the very tensor of its last block
            blocks.remove(stage)
        else:  # a block of its own, which does something with what its parts put out
            blocks = [call for call in blocks if call not in inner]
    return [call.name for call in blocks] or segment_ends(trace)


def _row(name: str, family: str) -> tuple[str, int] | None:
    """The family, and how many containers deep a module stands in it; None outside containers."""
    containers = name[len(family) :].strip(".").count(".")
    return (family, containers) if containers else None


def _put_out(call: Call) -> list[int]:
    return [leaf.serial for leaf in call.outputs]


def _is_composite(module: nn.Module) -> bool:
    plain = type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return not plain and sum(has_weights(part) for part in module.modules()) > 1


def _family(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The nearest module above that is more than a container: its parts are siblings, however they are grouped."""
    parent = name.rpartition(".")[0]
    while parent and type(modules[parent]) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        parent = parent.rpartition(".")[0]
    return parent


def segment_ends(trace: Trace) -> list[str]:
    """For plain stacks of layers: the last module before each next layer whose units are the last layer's."""
    ends: list[str] = []
    candidate: str | None = None
    units: int | None = None
    for call in trace.fired():
        if list(call.module.children()) or not call.outputs:
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


def head_projections(trace: Trace) -> tuple[dict[str, int], dict[str, str]]:
    """{output projection of an attention module: number of heads}, and {attention module: why it has none}.

    Attention modules are those with a whole number `num_heads` and no such module inside; the projection is the last
    linear layer they call, unless that takes in what the module itself does (then it projects the queries).
    """
    found: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for name, module in trace.model.named_modules():
        number = getattr(module, "num_heads", None)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            continue
        call = trace.call(name)
        if call is None or any(hasattr(part, "num_heads") for part in module.modules() if part is not module):
            continue
        own = {leaf.serial for leaf in call.inputs}
        linear = [inner for inner in trace.inside(call) if isinstance(inner.module, nn.Linear)]
        last = linear[-1] if linear else None
        if last is None or any(leaf.serial in own for leaf in last.inputs):
            if any(True for _ in module.parameters()):
                skipped[name] = "its output projection never fires (its weight is used functionally)"
        elif (input_units(last.module) or 0) % number:
            skipped[name] = f"{last.name} takes {input_units(last.module)} features, not {number} equal heads"
        else:
            found[last.name] = number
    return found, skipped
