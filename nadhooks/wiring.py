"""Who feeds whom: the directed acyclic graph of direct data flow between sites, read off the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import ModelError
from .hooking import on_site
from .sites import Site
from .tracing import call_model, undisturbed

INPUT, OUTPUT = "input", "output"


def wire(model: nn.Module, sites: Sequence[Site], example: Any) -> nx.DiGraph:
    """The wiring of `sites` from one forward pass: nodes "input", every site's name in firing order, "output".

    An edge u -> v says that what v puts out was computed from what u put out with no other site between them. It is
    found by walking back from v through the autograd graph until gates of other sites are met, so it cannot see
    through `detach` and regions without gradients. Edges carry `found="autograd"`; the graph is frozen.
    """
    owners: dict[Any, str] = {}  # autograd node -> the site whose output it made, or "input"
    behind: list[tuple[str, Any]] = []  # (site, the autograd node just before its gate)

    def mark(site: Site, tensor: Tensor) -> Tensor:
        if tensor.grad_fn is not None:
            behind.append((site.name, tensor.grad_fn))
        marked = tensor.clone()
        if marked.grad_fn is not None:
            owners[marked.grad_fn] = site.name
        return marked

    def tracked(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        # not the leaf itself: a model may change its input in place
        entry = tensor.clone().detach().requires_grad_().clone()
        owners[entry.grad_fn] = INPUT
        return entry

    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.enable_grad())
        for site in sites:
            stack.callback(on_site(model, site, partial(mark, site)).remove)
        try:
            outputs = call_model(model, pytree.tree_map_only(Tensor, tracked, example))
        except RuntimeError as error:
            raise ModelError(
                f"the model runs without gradients, but not with them, which gates and wiring need: {error}"
            ) from error

    behind += [(OUTPUT, t.grad_fn) for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.grad_fn]
    rank = {INPUT: -1, OUTPUT: len(sites)} | {site.name: index for index, site in enumerate(sites)}
    graph = nx.DiGraph()
    graph.add_nodes_from([INPUT, *(site.name for site in sites), OUTPUT])
    edges = {(source, target) for target, start in behind for source in _sources(start, owners)}
    for source, target in sorted(edges, key=lambda edge: (rank[edge[1]], rank[edge[0]])):
        # a module that is called again feeds its own earlier calls: first-call order keeps the graph acyclic
        if rank[source] < rank[target]:
            graph.add_edge(source, target, found="autograd")
    return nx.freeze(graph)


def _sources(start: Any, owners: dict[Any, str]) -> set[str]:
    found: set[str] = set()
    seen = {start}
    stack = [start]
    while stack:
        node = stack.pop()
        if node in owners:
            found.add(owners[node])
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found
