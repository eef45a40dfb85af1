"""Who feeds whom: the directed acyclic graph of direct data flow between sites.

Two ways to know. The autograd graph of one forward pass tells almost everything at once, but cannot see through
`detach`, argmax and regions without gradients, and takes a slice of a concatenation for the whole of it. Perturbation
(change what one site puts out, hold all others, see what moves) sees what is there, at one forward pass a site.
`wire` uses the first and asks the second where the first is in doubt; `perturb` uses the second alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .as_found import other_parameters, undisturbed
from .comparing import same
from .errors import ModelError
from .hooking import on_sites, running
from .joins import Joined, joined
from .nesting import leaves_of
from .sites import Site
from .tracing import call_model

INPUT, OUTPUT = "input", "output"
# In the names of autograd nodes. What a detector keeps of one image is no evidence of how it is wired.
SLICES = ("SliceBackward", "SelectBackward", "Split", "Unbind", "Narrow")
CHOICES = ("IndexBackward", "IndexSelect", "Topk", "Gather", "Sort", "MaskedSelect")
FLAT = 1e-3  # parameters that are nowhere larger hide the flow: zero-initialised branches, layer scales

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # put out the same whenever they take in the same

Forward = Callable[[Tensor], Tensor]
Around = Callable[[Site, Forward, Tensor], Tensor]
Edges = dict[tuple[str, str], str]  # (source, target) -> how it was found
Joins = dict[tuple[str, str], Joined]


def wire(model: nn.Module, sites: Sequence[Site], example: Any) -> nx.DiGraph:
    """The wiring of `sites`: nodes "input", every site's name in firing order, "output"; frozen.

    An edge u -> v says that what v puts out was computed from what u put out with no other site between them; sites
    of modules that are called again stand where they fire first, and what feeds a later call feeds what follows it.
    Edges carry `join`, the most telling join of flows on the way (`nadhooks.joins`), and `arrives`, the last one before
    the target; and `found`: "autograd", or "perturbation" where only that sees them; "assumed" where they lead from a
    last site to the output because nothing else does, as in a detector that finds nothing in the example. On the meta
    device there are no values to perturb, and the autograd graph is believed.
    """
    with flowing(model):
        edges, doubtful, joins = _by_autograd(model, sites, example)
        if not _on_meta(model):
            sources = {source for source, _ in doubtful}
            fed, feeding = {target for _, target in edges}, {source for source, _ in edges}
            names = [site.name for site in sites]
            if any(name not in fed for name in names):
                sources.update((INPUT, *names))
            sources.update(name for name in names if name not in feeding)
            moved = _by_perturbation(model, sites, example, sources)
            for edge in doubtful - moved:
                del edges[edge]
            edges.update({edge: "perturbation" for edge in moved if edge not in edges})
    if not any(target == OUTPUT for _, target in edges):  # a detector that detects nothing in the example
        feeding = {source for source, _ in edges}
        edges.update({(site.name, OUTPUT): "assumed" for site in sites if site.name not in feeding})
    return _graph(sites, edges, joins)


def perturb(model: nn.Module, sites: Sequence[Site], example: Any) -> nx.DiGraph:
    """The wiring of `sites` by perturbation alone, at one forward pass a site: the second opinion on `wire`."""
    if _on_meta(model):
        raise ModelError("perturbation needs values, and this model is on the meta device")
    with flowing(model):
        moved = _by_perturbation(model, sites, example, {INPUT, *(site.name for site in sites)})
    return _graph(sites, dict.fromkeys(moved, "perturbation"))


def agreed(wiring: nx.DiGraph, second: nx.DiGraph) -> nx.DiGraph:
    """`wiring` with the edges that only `second` has, labelled as they are there, and without those that it refutes."""
    graph = nx.DiGraph()
    graph.add_nodes_from(wiring)
    graph.add_edges_from((u, v, (wiring if wiring.has_edge(u, v) else second)[u][v]) for u, v in second.edges)
    return nx.freeze(graph)


def flowing(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, parameters that hide the flow are others, drawn from [0.5, 1.5]; the model's own come back untouched."""
    generator = torch.Generator().manual_seed(0)

    def drawn(parameter: nn.Parameter) -> Tensor | None:
        if parameter.is_meta or not parameter.numel() or not parameter.detach().abs().amax() < FLAT:
            return None
        return torch.rand(parameter.shape, generator=generator).add_(0.5).to(parameter)

    return other_parameters(model, drawn)


# --- by autograd -----------------------------------------------------------------------------------------------------


def _by_autograd(model: nn.Module, sites: Sequence[Site], example: Any) -> tuple[Edges, set[tuple[str, str]], Joins]:
    """Edges, those among them that a second look should confirm, and how their flows join.

    The graph is cut at every site, so that a walk back from what enters one ends at those that feed it. Where slices
    lie on the way from several, an edge without any gradient is in doubt.
    """
    entries: dict[int, tuple[str, Tensor]] = {}  # id of a leaf of the cut graph -> the site behind it, and the leaf
    ends: list[tuple[str, Tensor]] = []

    def cut(name: str, tensor: Tensor) -> Tensor:
        leaf = tensor.detach().requires_grad_()
        entries[id(leaf)] = (name, leaf)
        return leaf.clone()  # not the leaf itself: a model may change it in place

    def mark(site: Site, tensor: Tensor) -> Tensor:
        ends.append((site.name, tensor))
        return cut(site.name, tensor)

    def entered(tensor: Tensor) -> Tensor:
        return cut(INPUT, tensor.clone()) if tensor.is_floating_point() else tensor

    with undisturbed(model), on_sites(model, sites, mark), torch.enable_grad():
        try:
            outputs = call_model(model, pytree.tree_map_only(Tensor, entered, example))
        except RuntimeError as error:
            raise ModelError(
                f"the model runs without gradients, but not with them, which gates and wiring need: {error}"
            ) from error
    ends += [(OUTPUT, leaf) for leaf in leaves_of(outputs) if isinstance(leaf, Tensor)]
    edges: Edges = {}
    doubtful: set[tuple[str, str]] = set()
    joins: Joins = {}
    numbers, names = {key: number for number, key in enumerate(entries)}, [name for name, _ in entries.values()]
    for target, tensor in ends:
        leaves, sliced = _leaves_behind(tensor.grad_fn, entries)
        sources = {name for name, _ in leaves}
        edges.update({(source, target): "autograd" for source in sources})
        joins.update({(names[number], target): how for number, how in joined(tensor.grad_fn, numbers).items()})
        if sliced and len(sources) > 1 and not tensor.is_meta:
            doubtful.update((source, target) for source in sources - _with_gradient(tensor, leaves))
    return edges, doubtful, joins


def _leaves_behind(start: Any, entries: dict[int, tuple[str, Tensor]]) -> tuple[list[tuple[str, Tensor]], bool]:
    """The leaves that a node was computed from, and whether slices lie on the way, and nothing chosen by its value."""
    found, kinds, seen, stack = [], set(), {start}, [start]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        entry = entries.get(id(getattr(node, "variable", None)))
        if entry is not None:
            found.append(entry)
        kinds.add(type(node).__name__)
        following = [other for other, _ in node.next_functions if other not in seen]
        seen.update(following)
        stack += following
    sliced, chosen = (any(part in kind for kind in kinds for part in parts) for parts in (SLICES, CHOICES))
    return found, sliced and not chosen


def _with_gradient(tensor: Tensor, leaves: Sequence[tuple[str, Tensor]]) -> set[str]:
    cotangent = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
    gradients = torch.autograd.grad(
        tensor, [leaf for _, leaf in leaves], cotangent, retain_graph=True, allow_unused=True
    )
    pairs = zip(leaves, gradients, strict=True)
    return {name for (name, _), gradient in pairs if gradient is not None and gradient.any()}


# --- by perturbation -------------------------------------------------------------------------------------------------


def _by_perturbation(
    model: nn.Module, sites: Sequence[Site], example: Any, sources: Iterable[str]
) -> set[tuple[str, str]]:
    """The edges that leave these sources: whose input moves when one changes and every other puts out what it did."""
    sources = set(sources)
    if not sources:
        return set()
    generator = torch.Generator().manual_seed(0)
    recorded: dict[str, list[Tensor]] = defaultdict(list)
    taken: dict[str, list[Tensor]] = defaultdict(list)  # by layers

    def take(site: Site, forward: Forward, input: Tensor) -> Tensor:
        taken[site.name].append(input.clone())
        return forward(input)

    def record(site: Site, tensor: Tensor) -> None:
        recorded[site.name].append(tensor.clone())  # an in-place layer that follows would overwrite it

    def noisy(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor + noise * (tensor.std(correction=0) + FLAT)

    def run(inputs: Any, change: Callable[[Site, Tensor], Tensor | None], around: Around) -> list[Any]:
        hooked = on_sites(model, sites, change)
        with undisturbed(model), hooked, _layers_run(model, sites, around), torch.no_grad():
            return leaves_of(call_model(model, pytree.tree_map_only(Tensor, Tensor.clone, inputs)))

    outputs = run(example, record, take)
    edges: set[tuple[str, str]] = set()
    passes = [(site.name, example) for site in sites if site.name in sources]
    if INPUT in sources:
        changed = _noisy_inputs(example, noisy), _other_numbers(example, generator)
        passes = [(INPUT, inputs) for inputs in changed if inputs is not None] + passes
    for source, inputs in passes:
        calls: dict[str, int] = defaultdict(int)

        def replay(site: Site, tensor: Tensor, source: str = source, calls: dict[str, int] = calls) -> Tensor:
            index, calls[site.name] = calls[site.name], calls[site.name] + 1
            if index >= len(recorded[site.name]):  # a module that is called more often than before has moved
                edges.add((source, site.name))
                return tensor
            before = recorded[site.name][index]
            if not same([tensor], [before]):
                edges.add((source, site.name))
            return noisy(before) if site.name == source else before.clone()

        def skip(site: Site, forward: Forward, input: Tensor, calls: dict[str, int] = calls) -> Tensor:
            index = calls[site.name]
            known = index < len(recorded[site.name]) and same([input], [taken[site.name][index]])
            return recorded[site.name][index] if known else forward(input)

        try:
            moved = not same(run(inputs, replay, skip), outputs)
        except (RuntimeError, IndexError):  # other proposals than those that the replayed tensors belong to
            moved = True
        if moved:
            edges.add((source, OUTPUT))
    return edges


def _noisy_inputs(example: Any, noisy: Callable[[Tensor], Tensor]) -> Any:
    """Forward arguments with noise on those that are no whole numbers; None without any."""
    if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(example)):
        return None
    return pytree.tree_map_only(Tensor, lambda x: noisy(x) if x.is_floating_point() else x, example)


def _other_numbers(example: Any, generator: torch.Generator) -> Any:
    """Forward arguments with whole numbers (tokens, images of bytes) in another order; None without any.

    Where no order is another, as with one token, the first of them are other numbers. Booleans beside something else
    are masks, and stay.
    """
    leaves, rebuild = pytree.tree_flatten(example)
    tensors = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    whole = {place: leaf for place, leaf in tensors.items() if not leaf.is_floating_point()}
    if len(whole) < len(tensors):
        whole = {place: leaf for place, leaf in whole.items() if leaf.dtype != torch.bool}
    if not whole:
        return None
    for place, leaf in whole.items():
        order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
        leaves[place] = leaf.flatten()[order].view(leaf.shape)
    if all(torch.equal(leaves[place], leaf) for place, leaf in whole.items()):
        place, leaf = next(iter(whole.items()))
        leaves[place] = torch.where(leaf > 0, leaf.long() - 1, 1).to(leaf.dtype)
    return pytree.tree_unflatten(leaves, rebuild)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _layers_run(model: nn.Module, sites: Sequence[Site], around: Around) -> AbstractContextManager[None]:
    """Inside, `around(site, forward, input)` stands for each `forward(input)` of the layers that are sites."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for site in sites:
        layer = model.get_submodule(site.module)
        output = site.side == "output" and site.leaf is site.within is None
        if output and type(layer) in PLAIN and "forward" not in vars(layer):
            forwards[layer] = partial(around, site, layer.forward)
    return running(forwards)


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _graph(sites: Sequence[Site], edges: Edges, joins: Joins | None = None) -> nx.DiGraph:
    rank = {INPUT: -1, OUTPUT: len(sites)} | {site.name: index for index, site in enumerate(sites)}
    feeds: dict[str, list[str]] = defaultdict(list)
    for source, target in sorted(edges, key=lambda edge: (rank[edge[1]], rank[edge[0]])):
        feeds[source].append(target)
    graph = nx.DiGraph()
    graph.add_nodes_from([INPUT, *(site.name for site in sites), OUTPUT])
    for source in graph:
        # a site that feeds a later call of an earlier one would close a circle: it feeds what that call feeds instead
        waiting, seen = [(source, target) for target in feeds[source]], {source}
        while waiting:
            edge = waiting.pop(0)
            target = edge[1]
            if rank[target] > rank[source]:
                how = (joins or {}).get(edge)
                known = {} if how is None else {"join": how.join, "arrives": how.arrives}
                graph.add_edge(source, target, found=edges[edge], **known)
            elif target not in seen:
                seen.add(target)
                waiting += [(target, other) for other in feeds[target]]
    return nx.freeze(graph)
