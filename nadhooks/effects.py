"""What effects of units on units are measured in: one task's sub-architecture on some images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import networkx as nx
import torch
from torch import Tensor, nn

from .as_found import frozen
from .batching import finite
from .errors import DataError, NadhooksError, TaskError
from .gates import attach
from .gating import Closed, UnitMeans, by_unit, gate
from .hookable import check_model
from .identity import without_wrappers
from .masks import Masks, check_masks
from .segments import Cut, Gating, Score, replaying
from .sites import Site
from .tracing import call_model, logits_of
from .wiring import INPUT, OUTPUT

Weighting = Literal["class", "pooled"]
Estimator = Literal["gradient", "midpoint"]
Edge = tuple[str, str]


@dataclass(frozen=True)
class Setting:
    """One task's sub-architecture on some images: everything that effects are measured in.

    gates: the task's hard gates, in force everywhere. kept: {site: (units,) bool}. references: {site: (units,)} what a
    unit is set to, under "input" a value for every channel. wiring: of this model, with joins.
    """

    model: nn.Module
    sites: Mapping[str, Site]
    wiring: nx.DiGraph
    gates: Gating
    kept: Mapping[str, Tensor]
    references: Mapping[str, Tensor]
    batches: tuple[Tensor, ...]
    label: int
    images: int
    regions: tuple[int, int]

    def score(self, outputs: Any) -> Tensor:
        """(images,) the class's logit."""
        return logits_of(outputs)[:, self.label]

    def cut(self, images: Tensor) -> Cut:
        return Cut(self.model, list(self.sites.values()), self.gates, images, self.score)

    def replaying(self, images: Tensor, score: Score | None = None) -> Any:
        return replaying(self.model, list(self.sites.values()), self.gates, images, score or self.score)

    def closed(self, source: str, value: Tensor, units: Tensor) -> Tensor:
        """What leaves a source with these units (numbers; of the input: regions) at their reference."""
        if source == INPUT:
            shut = self.region_numbers(value).unsqueeze(-1).eq(units.to(value.device)).any(-1)
            return torch.where(shut, self.references[INPUT], value)
        site = self.sites[source]
        g = torch.ones(1, site.units, device=value.device, dtype=value.dtype)
        g[:, units] = 0
        return gate(value, g, site, self.references[source])

    def difference(self, source: str, value: Tensor) -> Tensor:
        """Value − reference, zero for units that the mask drops."""
        if source == INPUT:
            return value - self.references[INPUT]
        site = self.sites[source]
        return self.of_kept(source, value - self.closed(source, value, torch.arange(site.units)))

    def region_numbers(self, images: Tensor) -> Tensor:
        """(height, width) number of each pixel's region; one region for inputs that are not images."""
        rows, columns = self.regions
        if images.dim() != 4:
            return torch.zeros(images.shape[1:], dtype=torch.long, device=images.device)
        height, width = images.shape[2:]
        down = torch.arange(height, device=images.device) * rows // height
        across = torch.arange(width, device=images.device) * columns // width
        return down[:, None] * columns + across[None]

    def of_kept(self, name: str, x: Tensor) -> Tensor:
        """Without what belongs to units that the mask drops."""
        if name == OUTPUT:
            return x
        return gate(x, self.kept[name].to(x), self.sites[name])

    def by_image(self, name: str, x: Tensor, images: int) -> Tensor:
        """Sums over positions: (images, units) float64; of the input (images, regions), of the output (images, 1)."""
        x = x.detach()
        if name == OUTPUT:
            return x.double().reshape(images, 1).cpu()
        if name != INPUT:
            return by_unit(x, self.sites[name], images).sum(2, dtype=torch.float64).cpu()
        numbers = self.region_numbers(x)
        by_position = x.double().sum(1) if x.dim() == 4 else x.double()
        total = torch.zeros(images, self.regions[0] * self.regions[1], dtype=torch.float64, device=x.device)
        return total.index_add(1, numbers.flatten(), by_position.flatten(1)).cpu()


@dataclass
class Effects:
    """Averages over the images. shown: {site: units that are looked at}, the input's regions, the output as unit 0.

    attribution: {site: (units,)} how much a unit adds to the logit. edges: {(source, target): (targets shown, sources
    shown)}. bias: {site: (shown,)} what a unit has beyond all units upstream. outflow: {source: (shown,)} the sum of a
    unit's edges to everything behind it, shown or not.
    """

    shown: dict[str, Tensor]
    attribution: dict[str, Tensor]
    logit: float
    edges: dict[Edge, Tensor]
    bias: dict[str, Tensor] = field(default_factory=dict)
    outflow: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, shown: Mapping[str, Tensor], attribution: dict[str, Tensor], logit: float, edges: Iterable[Edge]
    ) -> Effects:
        effects = cls(dict(shown), attribution, logit, dict.fromkeys(edges, torch.empty(0)))
        for name, units in shown.items():
            effects.look_at(name, units)
        return effects

    def look_at(self, name: str, units: Tensor) -> None:
        """Takes these units of a site, of which nothing is known yet."""
        self.shown[name] = units
        self.bias[name] = torch.zeros(len(units), dtype=torch.float64)
        self.outflow[name] = torch.zeros(len(units), dtype=torch.float64)
        for source, target in self.edges:
            if name in (source, target):
                size = len(self.shown[target]), len(self.shown[source])
                self.edges[source, target] = torch.zeros(size, dtype=torch.float64)

    def narrow(self, name: str, chosen: Tensor) -> None:
        """Forgets all but the chosen ones (booleans) among a site's units."""
        for known in (self.shown, self.bias, self.outflow):
            known[name] = known[name][chosen]
        for source, target in self.edges:
            if target == name:
                self.edges[source, target] = self.edges[source, target][chosen]
            elif source == name:
                self.edges[source, target] = self.edges[source, target][:, chosen]


@contextmanager
def setting(
    model: nn.Module,
    masks: Masks,
    task: object,
    images: Tensor,
    reference: Closed | None,
    regions: int | tuple[int, int],
    batch: int,
) -> Iterator[Setting]:
    """The task's sub-architecture on the images; the model is in eval mode inside, its weights frozen."""
    check_model(model)
    check_masks(masks)
    if not isinstance(images, Tensor) or not images.is_floating_point() or not len(images):
        got = f"shape {tuple(images.shape)} of {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"expected images of the task as a floating-point tensor (images, channels, height, width), got {got}"
        )
    if not finite(images):
        raise DataError("expected images that are finite numbers, got NaN or infinity in them")
    if reference not in (None, "zero", "mean", masks.closed):
        raise NadhooksError(f"reference: expected 'zero', 'mean' or what closed units put out, got {reference!r}")
    chosen = masks.select(task).hard()
    if len(chosen) != 1:
        raise TaskError(f"expected one task, got {len(chosen)}; draw one graph for each")
    grid = (regions, regions) if isinstance(regions, int) else tuple(regions) if isinstance(regions, Sequence) else ()
    if len(grid) != 2 or not all(isinstance(number, int) and number >= 1 for number in grid):
        raise NadhooksError(f"regions: expected a number or (rows, columns) of at least 1, got {regions!r}")
    if not isinstance(batch, int) or batch < 1:
        raise NadhooksError(f"batch: expected a number of images of at least 1, got {batch!r}")
    device = next((p.device for p in model.parameters()), images.device)
    images = images.to(device)
    with attach(model, masks.sites, example=images[:1]) as attached:
        attached.load(chosen)  # or says how the model differs from that of the masks
        masks, chosen = (without_wrappers(each, attached.sites) for each in (masks, chosen))
        sites = {site.name: site for site in attached.sites}
        wiring = nx.DiGraph(attached.wiring)  # with joins, and with what the masks know that one image does not show
        wiring.add_edges_from(edge for edge in masks.wiring.edges(data=True) if not wiring.has_edge(*edge[:2]))
    known = {name: values[0].to(device) for name in sites if (values := chosen.closed_values(name)) is not None}
    gates = {name: (chosen[name].to(device), known.get(name)) for name in sites}
    with frozen(model), torch.inference_mode(False):
        found = Setting(
            model, sites, wiring, gates, {name: chosen[name][0] > 0.5 for name in sites}, {},
            tuple(images.split(batch)), _label(chosen), len(images),
            (grid[0], grid[1]) if images.dim() == 4 else (1, 1),
        )  # fmt: skip
        with torch.no_grad():
            outputs = logits_of(call_model(model, images[:1])).shape[1]
        if found.label >= outputs:
            raise TaskError(f"task {chosen.tasks[0]} is not an output of the model, which has 0 to {outputs - 1}")
        reference = reference or chosen.closed
        yield _with_references(found, reference, known if reference == chosen.closed else None)


def _label(masks: Masks) -> int:
    label = masks.labels[0]
    if not isinstance(label, int) or label < 0:
        raise TaskError(f"task {masks.tasks[0]}: expected a label that is an output of the model, got {label!r}")
    return label


def _with_references(found: Setting, reference: str, known: Mapping[str, Tensor] | None) -> Setting:
    """What a unit is set to: zero, or what the masks know, or where they do not its mean over these images."""
    first = found.batches[0]
    if reference == "zero":
        references = {name: torch.zeros(site.units, device=first.device) for name, site in found.sites.items()}
        references[INPUT] = torch.zeros((), device=first.device, dtype=first.dtype)
    else:
        pixels = torch.cat(found.batches)
        axes = (0, 2, 3) if pixels.dim() == 4 else (0,)
        references = dict(known) if known is not None else _means(found)
        references[INPUT] = pixels.mean(axes, keepdim=True)[0]
    return replace(found, references=references)


def _means(found: Setting) -> dict[str, Tensor]:
    means = UnitMeans(found.sites.values())
    for images in found.batches:
        with found.replaying(images) as replay:
            for name, site in found.sites.items():
                means.add(site, replay.leaving[name])
    return {name: mean.to(found.batches[0]) for name, mean in means.means().items()}
