"""Layers that are never called, for a forward pass hands their weights to a function: seen and changed all the same.

torchvision's Swin and timm's BEiT do that with `qkv`, `torch.nn.MultiheadAttention` with `out_proj`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

APPLIED = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}

Apply = Callable[[Tensor], Tensor]


class WeightUse(TorchFunctionMode):
    """Inside `with`, calls `around(name, x, apply)` in place of each `apply(x)` that uses one of these weights.

    names: {id of a weight: the name of its layer}. What `around` returns is the layer's output. Both x and the output
    have the samples first, as `nn.MultiheadAttention` internally has not.
    """

    def __init__(self, names: Mapping[int, str], around: Callable[[str, Tensor, Apply], Tensor]):
        super().__init__()
        self.names, self.around = names, around

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in APPLIED:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            name = self.names.get(id(weight))
            if name is not None:
                x = args[0] if args else kwargs["input"]
                rest = {key: value for key, value in kwargs.items() if key != "input"}
                return self.around(name, x, lambda x: function(x, *args[1:], **rest))
        if function is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        return function(*args, **kwargs)

    def _attention(self, args: Any, kwargs: Any) -> Any:
        function = F.multi_head_attention_forward
        call = inspect.signature(function).bind(*args, **kwargs)
        weight, bias = call.arguments["out_proj_weight"], call.arguments["out_proj_bias"]
        name = self.names.get(id(weight))
        if name is None or call.arguments["query"].dim() != 3:  # (queries, batch, features)
            return function(*args, **kwargs)
        # an identity in its place leaves what the projection would have taken in, to the last bit
        call.arguments["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        call.arguments["out_proj_bias"] = None
        mixed, attention = function(*call.args, **call.kwargs)
        out = self.around(
            name, mixed.transpose(0, 1), lambda x: F.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
        )
        return out.transpose(0, 1), attention
