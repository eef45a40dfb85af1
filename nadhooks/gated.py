"""Gates as part of a module's own forward pass, where they cannot be folded into weights: no hooks, same state_dict.

A gated module's class is a subclass of what it was before, so that attributes, `isinstance`, children and the keys of
its state_dict stay; it deep-copies, pickles, compiles and exports.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from .functional import Apply, WeightUse
from .gating import gate
from .hooking import SiteHook
from .sites import Site


class Gated:
    """Gates the tensors of `gated_sites`. Buffers, not in the state_dict, hold the gates and what closed units put out.

    gated_layers: for each site the layer that its module uses without calling it, or None.
    """

    gated_sites: tuple[Site, ...]
    gated_layers: tuple[nn.Module | None, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        numbered = list(enumerate(self.gated_sites))
        for number, site in numbered:
            if site.side == "input" and site.within is None:
                changed = SiteHook(site, partial(self._gated, number))(self, args, kwargs)  # type: ignore[arg-type]
                args, kwargs = changed
        with ExitStack() as stack:
            for number, site in numbered:
                layer = self.gated_layers[number]
                if layer is not None:
                    names = {id(layer.weight): site.module}
                    stack.enter_context(WeightUse(names, partial(self._around, number)))
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        for number, site in numbered:
            if site.side == "output" and site.within is None:
                output = SiteHook(site, partial(self._gated, number))(self, args, output)  # type: ignore[arg-type]
        return output

    def _around(self, number: int, name: str, x: Tensor, apply: Apply) -> Tensor:
        if self.gated_sites[number].side == "input":
            return apply(self._gated(number, x))
        return self._gated(number, apply(x))

    def _gated(self, number: int, x: Tensor) -> Tensor:
        g, closed = getattr(self, f"gates_{number}"), getattr(self, f"closed_{number}", None)
        return gate(x, g, self.gated_sites[number], closed)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A class that was made here cannot be found by its name: what it was made from can."""
        kind = type(self).__mro__[2]  # behind this class and Gated
        return _empty, (kind,), *super().__reduce_ex__(protocol)[2:]


_CLASSES: dict[type, type[nn.Module]] = {}


def _gated_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _CLASSES:
        about = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        _CLASSES[kind] = type(f"Gated{kind.__name__}", (Gated, kind), about)
    return _CLASSES[kind]


def _empty(kind: type[nn.Module]) -> nn.Module:
    made = _gated_class(kind)
    return made.__new__(made)


def put_gate(module: nn.Module, site: Site, g: Tensor, closed: Tensor | None, layer: nn.Module | None = None) -> None:
    """Makes the gate of a site part of a module, in place. g: (units,), closed: (units,) or None for zero.

    layer: for sites of a layer that `module` uses without calling it, that layer.
    """
    if not isinstance(module, Gated):
        module.__class__ = _gated_class(type(module))
        module.gated_sites, module.gated_layers = (), ()  # type: ignore[assignment]
    number = len(module.gated_sites)  # type: ignore[arg-type]
    module.gated_sites += (site,)  # type: ignore[operator]
    module.gated_layers += (layer,)  # type: ignore[operator]
    # buffers go where the module goes; the state_dict is left as it was
    module.register_buffer(f"gates_{number}", g.detach().clone()[None], persistent=False)
    if closed is not None:
        module.register_buffer(f"closed_{number}", closed.detach().clone(), persistent=False)
