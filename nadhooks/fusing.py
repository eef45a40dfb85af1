"""A frozen network made faster: convolutions do the work of the batch norms behind them, and pooling goes before ReLU.

In eval mode a batch norm is one factor and one summand for each channel, which the weights of the convolution before
it can take in. That spares a pass over the tensor, and what autograd would keep of it for the way back. The largest of
some values is the same before ReLU and after it, to the last bit, and so are gradients: behind the pooling there are
fewer to go through.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .hooking import running

CONVOLUTIONS = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
NORM = nn.BatchNorm2d.forward  # which those of one and three dimensions share
RELU = nn.ReLU.forward
POOLS = {nn.MaxPool1d.forward, nn.MaxPool2d.forward, nn.MaxPool3d.forward}
Norm = nn.modules.batchnorm._BatchNorm


class Fused:
    """While in force (`with`, also within itself), these modules run by other forward functions; weights stay."""

    def __init__(self, forwards: dict[nn.Module, Callable[..., Tensor]]):
        self.forwards = forwards
        self.depth = 0
        self.stack = ExitStack()

    def __enter__(self) -> None:
        self.depth += 1
        if self.depth == 1:
            self.stack.enter_context(running(self.forwards))

    def __exit__(self, *error: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.stack.close()


def fused(model: nn.Module, run: Callable[[], object], channels_last: bool = False) -> Fused:
    """What can be fused in a model in eval mode, found in one forward pass that `run` makes.

    Convolutions whose output goes to one batch norm and nowhere else, in every call, and ReLUs whose output goes to one
    max-pooling in the same way; none that a hook looks at. channels_last: images will be in that order of memory;
    weights in another would be copied in every pass.
    """
    with _watched(model) as watched, torch.no_grad():
        run()
    forwards: dict[nn.Module, Callable[..., Tensor]] = {}
    for taker, sources in watched.pairs().items():
        if isinstance(taker, Norm):
            for conv in sources:
                forwards[conv] = _with_norm(conv, taker, channels_last)
            forwards[taker] = _same if type(taker).forward is NORM else partial(_without_norm, taker.forward)
        else:
            forwards |= dict.fromkeys(sources, _same) | {taker: partial(_before_relu, taker.forward)}
    return Fused(forwards)


def _with_norm(conv: Any, norm: Any, channels_last: bool) -> Callable[..., Tensor]:
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    order = torch.channels_last if channels_last and weight.dim() == 4 else torch.contiguous_format
    ordered = weight.detach().contiguous(memory_format=order)
    return partial(conv._conv_forward, weight=ordered, bias=bias.detach())


def _same(x: Tensor) -> Tensor:
    return x


def _before_relu(pool: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return pool(x).relu_()


def _without_norm(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What else the layer does, such as timm's batch norms with an activation."""
    with _NoNorm():
        return forward(x)


class _NoNorm(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm:
            return args[0]
        return function(*args, **(kwargs or {}))


def _fits(source: Any, taker: Any) -> bool:
    if type(taker).forward in POOLS:
        return type(source).forward is RELU and not taker.return_indices
    return type(source).forward in CONVOLUTIONS and bool(source.out_channels == taker.num_features)


def _takes(module: nn.Module) -> bool:
    """Whether it may trade places with what feeds it: nobody looks in between, and a norm does alike in every call."""
    norm = isinstance(module, Norm) and not module.training and module.running_mean is not None
    return (norm or type(module).forward in POOLS) and not module._forward_pre_hooks


class _Watched(TorchFunctionMode):
    """Counts what becomes of the outputs of convolutions and ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[object] = []  # every tensor that goes by its id here, so that no other gets the same
        self.made: dict[int, nn.Module] = {}  # {id: what put it out, last if it was changed in place}
        self.outputs: dict[nn.Module, list[int]] = defaultdict(list)
        self.uses: dict[int, int] = defaultdict(int)
        self.taken: dict[int, nn.Module] = {}  # the norm or pooling that takes it
        self.fed: dict[nn.Module, set[int]] = defaultdict(set)  # and the other way round

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(found)):  # not its shape and the like
            for leaf in pytree.tree_leaves((args, kwargs)):
                if id(leaf) in self.made:
                    self.uses[id(leaf)] += 1
        return found

    def made_by(self, source: nn.Module, args: Any, output: Tensor) -> None:
        self.held.append(output)
        self.made[id(output)] = source
        self.outputs[source].append(id(output))
        self.uses[id(output)] = 0  # from here on

    def taken_by(self, taker: nn.Module, args: Any) -> None:
        x = args[0] if args else None
        self.held.append(x)
        self.taken[id(x)] = taker
        self.fed[taker].add(id(x))

    def pairs(self) -> dict[Any, set[Any]]:
        """{norm or pooling: the convolutions or ReLUs that feed it and nothing else}."""

        def only(source: nn.Module, taker: nn.Module) -> bool:
            alone = all(self.uses[key] == 1 and self.taken.get(key) is taker for key in self.outputs[source])
            return alone and _fits(source, taker)

        found = {}
        for taker, keys in self.fed.items():
            sources = {self.made[key] for key in keys if key in self.made}
            if keys <= self.made.keys() and all(only(source, taker) for source in sources):
                found[taker] = sources
        return found


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Watched]:
    watched = _Watched()
    with ExitStack() as stack:
        for module in model.modules():
            if "forward" in vars(module):  # somebody's own
                continue
            if type(module).forward in {*CONVOLUTIONS, RELU} and not module._forward_hooks:
                stack.callback(module.register_forward_hook(watched.made_by).remove)
            elif _takes(module):
                stack.callback(module.register_forward_pre_hook(watched.taken_by).remove)
        with watched:
            yield watched
