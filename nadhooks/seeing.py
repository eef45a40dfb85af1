"""What a unit sees: the images that excite it most, cropped to where, and how strongly each class does."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_found import undisturbed
from .batching import described, finite
from .default_device import made_on_cpu
from .errors import DataError, NadhooksError, SiteError
from .flow_like import check_flow
from .hooking import on_site
from .sampling import read
from .sites import Site, find
from .tracing import call_model, trace

MASS = 0.8  # share of the squared gradient that a crop holds
PREFIX = 8  # tokens before those of the patches: class, distillation, registers


@made_on_cpu
def what_units_see(
    model: nn.Module,
    graph: nx.DiGraph,
    sites: Sequence[Site],
    loader: Iterable[Any],
    *,
    units: Mapping[str, Sequence[int]] | None = None,
    names: Mapping[int, str] | None = None,
    top: int = 9,
    size: int = 64,
) -> nx.DiGraph:
    """A copy of a flow graph whose units know what excites them.

    Every unit node of a unit-level graph gets
        sees: the `top` images with the strongest activation, strongest first, each a mapping of `image` (its number in
            the order of the loader), `label`, `activation` (its largest value anywhere in the image), `box` (top, left,
            height, width in the model's input) and `crop`, a PNG of size × size as a data URI;
        activation: {class: its mean activation over that class's images and all places}.
    In a site-level graph, units= says which, as {site: units}, and they stand in the site's `seen`, {unit: the same}.

    sites: masks.sites or gates.sites. loader: (images (batch, channels, height, width), labels); names: {label: name}.
    A unit of several positions (an attention head) counts as the norm over them. The crop is centred where the maximum
    lies and as large as the part of the image that moves one place of the site: 80 % of the squared gradient there.
    Where places cannot be told (classifiers, windows), it is the whole image.

    Raises DataError for a loader without images, SiteError for sites that the model or the graph lacks.
    """
    check_flow(graph)
    if top < 1 or size < 1:
        raise NadhooksError(f"expected top and size from 1, got {top} and {size}")
    if not isinstance(names or {}, Mapping):
        raise NadhooksError(f"names: expected {{label: name}}, got {names!r}")
    wanted = _wanted(graph, units)
    by_name = {site.name: site for site in sites}
    if missing := [name for name in wanted if name not in by_name]:
        raise SiteError(f"{missing[0]}: the graph has units of this site, but sites= does not hold it")
    for name, chosen in wanted.items():
        if not chosen or not all(0 <= unit < by_name[name].units for unit in chosen):
            last = by_name[name].units - 1
            raise SiteError(f"units: expected some of the units 0 to {last} of {name}, got {chosen}")
        if absent := [unit for unit in chosen if name not in graph and f"{name}:{unit}" not in graph]:
            raise SiteError(f"units: the graph does not show unit {absent[0]} of {name}; unit_flow's top= shows more")
    watches = {name: Watch(by_name[name], torch.tensor(chosen), top) for name, chosen in wanted.items()}
    images = _watched(model, watches, loader)
    out = graph.copy()
    for name, watch in watches.items():
        for column, unit in enumerate(wanted[name]):
            seen = _seen(watch, column, images, names or {}, size)
            if f"{name}:{unit}" in out and out.nodes[f"{name}:{unit}"]["kind"] == "unit":
                out.nodes[f"{name}:{unit}"].update(seen)
            else:
                out.nodes[name].setdefault("seen", {})[str(unit)] = seen
    return out


@dataclass
class Watch:
    """What a site's chosen units did so far."""

    site: Site
    units: Tensor  # (chosen,)
    top: int
    side: tuple[float, float] = (1.0, 1.0)  # of a crop, as shares of the image's height and width
    values: Tensor = field(init=False)  # (chosen, up to top), falling
    images: Tensor = field(init=False)  # their numbers
    places: Tensor = field(init=False)  # (chosen, up to top, 2), in [0, 1]; NaN where they cannot be told
    sums: dict[int, Tensor] = field(default_factory=dict)  # of mean activations, by label
    counts: dict[int, int] = field(default_factory=dict)
    now: Tensor | None = None

    def __post_init__(self) -> None:
        chosen = len(self.units)
        self.values = torch.empty(chosen, 0)
        self.images = torch.empty(chosen, 0, dtype=torch.long)
        self.places = torch.empty(chosen, 0, 2)

    def see(self, tensor: Tensor) -> None:
        self.now = tensor.clone()  # an in-place layer that follows would overwrite it

    def update(self, labels: Sequence[int], first: int, image: Sequence[int]) -> None:
        """Takes in what a batch left, whose first image has this number. image: height and width."""
        if self.now is None:
            raise SiteError(f"{self.site.name}: the model did not reach this site")
        active, grid = activations(self.now, self.site, len(labels), image)  # (batch, units, places)
        active = active[:, self.units].detach().float().cpu()
        best, at = active.max(2)  # (batch, chosen)
        numbers = torch.arange(first, first + len(labels)).expand(len(self.units), -1)
        values = torch.cat([self.values, best.T], 1)
        images = torch.cat([self.images, numbers], 1)
        places = torch.cat([self.places, _centres(at.T, grid)], 1)
        self.values, order = values.topk(min(self.top, values.shape[1]), 1)
        self.images = images.gather(1, order)
        self.places = places.gather(1, order[..., None].expand(-1, -1, 2))
        means = active.mean(2)
        for row, label in enumerate(labels):
            self.sums[label] = self.sums.get(label, torch.zeros(len(self.units))) + means[row]
            self.counts[label] = self.counts.get(label, 0) + 1
        self.now = None


def activations(
    tensor: Tensor, site: Site, batch: int, image: Sequence[int]
) -> tuple[Tensor, tuple[int, int, int] | None]:
    """A site's tensor as (batch, units, places), and its places as (rows, columns, how many stand before them).

    The places are None where they cannot be told. A unit of several positions is the norm over them. image: height and
    width of the images.
    """
    x = tensor.movedim(site.axis, -1)  # (batch, …, positions)
    rest = tuple(x.shape[1:-1])
    times = x.shape[0] // max(1, batch)
    if site.views:
        x = x.unflatten(0, (times, batch)).transpose(0, 1).flatten(0, 1)
    x = x.reshape(batch, -1, x.shape[-1])  # (batch, places, positions)
    if site.block > 1:
        apart = (site.block, site.units) if site.alternating else (site.units, site.block)
        x = torch.linalg.vector_norm(x.unflatten(2, apart), dim=2 if site.alternating else 3)
    return x.transpose(1, 2), _grid(rest, image) if times == 1 else None


def _grid(rest: tuple[int, ...], image: Sequence[int]) -> tuple[int, int, int] | None:
    """Tokens in a row are of square patches, with others before them, such as one for the class."""
    if len(rest) == 2:
        return rest[0], rest[1], 0
    if len(rest) == 1:
        for before in range(min(PREFIX, rest[0] - 1) + 1):
            rows = math.isqrt((rest[0] - before) * image[0] // image[1])
            columns = (rest[0] - before) // max(1, rows)
            if min(rows, columns) > 1 and rows * columns == rest[0] - before and rows * image[1] == columns * image[0]:
                return rows, columns, before
    return None


def _centres(at: Tensor, grid: tuple[int, int, int] | None) -> Tensor:
    """(chosen, batch) places as (chosen, batch, 2) shares of the image's height and width."""
    if grid is None:
        return torch.full((*at.shape, 2), math.nan)
    rows, columns, before = grid
    place = (at - before).float()
    centre = torch.stack(
        [(place.div(columns, rounding_mode="floor") + 0.5) / rows, (place % columns + 0.5) / columns], -1
    )
    return centre.masked_fill((at < before)[..., None], math.nan)


def _wanted(graph: nx.DiGraph, units: Mapping[str, Sequence[int]] | None) -> dict[str, list[int]]:
    wanted: dict[str, list[int]] = {}
    if units is not None:
        for name, chosen in units.items():
            if name not in graph and name not in graph.graph.get("sites", {}):
                raise SiteError(f"units: the graph has no site {name!r}")
            if not isinstance(chosen, Iterable):
                raise SiteError(f"units: expected a list of units of {name}, got {chosen!r}")
            wanted[name] = [int(unit) for unit in chosen]
        return wanted
    for _, data in graph.nodes(data=True):
        if data.get("kind") == "unit":
            wanted.setdefault(data["site"], []).append(data["unit"])
    if not wanted:
        raise NadhooksError("expected a graph with units, or units={site: units}; this one is site-level or empty")
    return wanted


def _watched(model: nn.Module, watches: Mapping[str, Watch], loader: Iterable[Any]) -> dict[int, tuple[Tensor, int]]:
    """Lets all images through; those that excite a unit most come back by number."""
    kept: dict[int, tuple[Tensor, int]] = {}
    first = 0
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        for inputs, labels, _ in read(loader):
            images, *others = inputs.values() if isinstance(inputs, Mapping) else (inputs,)
            if others or not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
                expected = "images as one floating-point tensor (images, channels, height, width)"
                raise DataError(f"what_units_see: expected {expected}, got {described(inputs)}")
            if not finite(images):
                raise DataError("what_units_see: expected images that are finite numbers, got NaN or infinity in them")
            if labels.dim() != 1:
                raise DataError("what_units_see: expected one label for each image, got rows of 0 and 1")
            if first == 0:
                for site in find(trace(model, images[:1].to(device)), [watch.site for watch in watches.values()])[0]:
                    watches[site.name].site = site  # files do not hold all of it
                    stack.callback(on_site(model, site, watches[site.name].see).remove)
                with torch.inference_mode(False), torch.enable_grad():
                    _measure(model, watches, images[:4].to(device))
            with torch.no_grad():
                call_model(model, images.to(device))
            listed = labels.tolist()
            for watch in watches.values():
                watch.update(listed, first, images.shape[2:])
            for row, image in enumerate(images):
                kept[first + row] = image.detach().cpu(), listed[row]
            first += len(images)
            used = {number for watch in watches.values() for number in watch.images.flatten().tolist()}
            kept = {number: each for number, each in kept.items() if number in used}
    if not first:
        raise DataError("what_units_see: expected at least one batch of images, got none")
    return kept


def _measure(model: nn.Module, watches: Mapping[str, Watch], images: Tensor) -> None:
    """How much of the image moves the place in the middle of every site: the side of its crops."""
    for watch in watches.values():
        x = images.clone().requires_grad_()
        call_model(model, x)
        if watch.now is None:
            raise SiteError(f"{watch.site.name}: the model did not reach this site")
        active, grid = activations(watch.now, watch.site, len(images), images.shape[2:])
        watch.now = None
        if grid is None or not active.requires_grad:
            continue
        rows, columns, before = grid
        middle = active[:, :, before + (rows // 2) * columns + columns // 2]
        weights = torch.randn(middle.shape, generator=torch.Generator().manual_seed(0))  # a plain sum may cancel
        (gradient,) = torch.autograd.grad(middle, x, weights.to(middle))
        mass = gradient.square().sum((0, 1)).cpu()  # (height, width)
        centre = ((rows // 2 + 0.5) / rows, (columns // 2 + 0.5) / columns)
        watch.side = _span(mass.sum(1), centre[0], rows), _span(mass.sum(0), centre[1], columns)


def _span(mass: Tensor, centre: float, places: int) -> float:
    """The width around a centre, as a share, that holds most of a mass; at least one place of the site."""
    if not bool(mass.sum() > 0):
        return 1.0
    away = ((torch.arange(len(mass)) + 0.5) / len(mass) - centre).abs()
    order = away.argsort()
    held = mass[order].cumsum(0) / mass.sum()
    last = int((held < MASS).sum())
    return min(1.0, max(1 / places, 2 * float(away[order[min(last, len(order) - 1)]]) + 1 / len(mass)))


def _seen(
    watch: Watch, column: int, images: Mapping[int, tuple[Tensor, int]], names: Mapping[int, str], size: int
) -> dict[str, Any]:
    sees = []
    for rank in range(watch.values.shape[1]):
        number = int(watch.images[column, rank])
        image, label = images[number]
        box = _box(watch.places[column, rank].tolist(), watch.side, image.shape[-2:])
        sees.append(
            {
                "image": number,
                "label": names.get(label, str(label)),
                "activation": float(watch.values[column, rank]),
                "box": list(box),
                "crop": _png(image, box, size),
            }
        )
    means = {
        names.get(label, str(label)): float(watch.sums[label][column] / watch.counts[label])
        for label in sorted(watch.sums)
    }
    return {"sees": sees, "activation": means}


def _box(centre: Sequence[float], side: tuple[float, float], shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Top, left, height, width in pixels, inside the image."""
    if any(math.isnan(value) for value in centre):
        return 0, 0, shape[0], shape[1]
    lengths = [max(1, min(shape[i], round(side[i] * shape[i]))) for i in (0, 1)]
    starts = [min(max(0, round(centre[i] * shape[i] - lengths[i] / 2)), shape[i] - lengths[i]) for i in (0, 1)]
    return starts[0], starts[1], lengths[0], lengths[1]


def _png(image: Tensor, box: tuple[int, int, int, int], size: int) -> str:
    """A crop as a PNG in a data URI; grey values from the image's own least to its largest."""
    from PIL import Image

    image = image.float()
    image = (image - image.amin()) / (image.amax() - image.amin()).clamp(min=1e-12)
    if image.shape[0] != 3:
        image = image.mean(0, keepdim=True)
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    mode = "area" if min(height, width) >= size else "nearest"
    pixels = (F.interpolate(crop, (size, size), mode=mode)[0] * 255).round().byte()
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    data = io.BytesIO()
    Image.fromarray(array).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
