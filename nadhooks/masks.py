"""Masks: what was learnt, apart from any live model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import Any, Literal

import networkx as nx
import torch
from torch import Tensor

from .errors import MaskFileError, SiteError, TaskError
from .formats import mask_file, remote
from .sites import Site
from .tasks import Label, Tasks

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Masks:
    """The gates of every task over all sites; frozen.

    sites: in firing order. values: {site: (tasks, units) in [0, 1]}, also `masks[site]`. wiring: the directed acyclic
    graph of data flow between sites. closed: what a closed unit puts out, "zero" or "mean"; means: {site: (units,)}
    for the latter. provenance: where the masks came from, values that JSON knows.
    """

    sites: tuple[Site, ...]
    values: Mapping[str, Tensor]
    task_rows: Tasks
    wiring: nx.DiGraph
    closed: Literal["zero", "mean"] = "zero"
    means: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.sites:
            value = self.values.get(site.name)
            if value is None or tuple(value.shape) != (len(self.task_rows), site.units):
                got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise SiteError(
                    f"{site.name}: expected a mask of shape ({len(self.task_rows)}, {site.units}), got {got}"
                )
            if not bool(((value >= 0) & (value <= 1)).all()):  # NaN fails too
                raise SiteError(f"{site.name}: expected mask values in [0, 1], got others (or NaN)")
        if self.closed not in ("zero", "mean"):
            raise SiteError(f"closed: expected 'zero' or 'mean', got {self.closed!r}")
        for site in self.sites if self.closed == "mean" else ():
            mean = self.means.get(site.name)
            if mean is None or tuple(mean.shape) != (site.units,):
                raise SiteError(f"{site.name}: closed='mean' needs the units' means, shape ({site.units},)")
        # frozen all the way: mappings are read-only copies in site order
        object.__setattr__(self, "values", MappingProxyType({s.name: self.values[s.name] for s in self.sites}))
        object.__setattr__(self, "means", MappingProxyType(dict(self.means)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    # --- reading ---

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order of the rows."""
        return self.task_rows.names

    @property
    def labels(self) -> tuple[Label, ...]:
        """The tasks' labels, in the order of the rows."""
        return self.task_rows.labels

    @property
    def units(self) -> int:
        """Units over all sites."""
        return sum(site.units for site in self.sites)

    def __getitem__(self, site: str) -> Tensor:
        """(tasks, units) gates of one site, in [0, 1]."""
        if site not in self.values:
            raise SiteError(f"no site {site!r}: the sites are {', '.join(self.values)}")
        return self.values[site]

    def __len__(self) -> int:
        return len(self.task_rows)

    def __eq__(self, other: object) -> bool:
        """The same masks: sites, tasks, values, wiring and closed values; where they came from does not count."""
        if not isinstance(other, Masks):
            return NotImplemented
        return (
            self.sites == other.sites
            and self.task_rows == other.task_rows
            and self.closed == other.closed
            and set(self.wiring.edges) == set(other.wiring.edges)
            and all(torch.equal(self.values[name], other.values[name]) for name in self.values)
            and self.means.keys() == other.means.keys()
            and all(torch.equal(self.means[name], other.means[name]) for name in self.means)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Read-only mappings neither pickle nor copy; what they were made from does."""
        values, means, origin = dict(self.values), dict(self.means), dict(self.provenance)
        return Masks, (self.sites, values, self.task_rows, self.wiring, self.closed, means, origin)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        names = ", ".join(self.tasks[:4]) + (", …" if len(self) > 4 else "")
        return (
            f"Masks({len(self)} tasks ({names}), {len(self.sites)} sites, {self.units:,} units, "
            f"kept {float(self.kept().mean()):.0%}, closed={self.closed!r})"
        )

    def kept(self) -> Tensor:
        """(tasks,) share of all units whose gate is above 0.5."""
        kept = torch.stack([(value > 0.5).sum(1) for value in self.values.values()]).sum(0)
        return kept / self.units

    def jaccard(self) -> Tensor:
        """(tasks, tasks) similarity: the mean over sites of |A∩B| / |A∪B| of the units kept (gate > 0.5).

        Hu et al., ICCV 2021; authors' similarSubArch.py, but two empty sets are equal (1) here and NaN there.
        """
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for value in self.values.values():
            kept = (value > 0.5).double()  # (tasks, units)
            both = kept @ kept.T
            either = kept.sum(1)[:, None] + kept.sum(1)[None] - both
            total += torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both))
        return total / len(self.sites)

    # --- making others ---

    def hard(self, threshold: float = 0.5) -> Masks:
        """0/1 masks: 1 where the gate is above the threshold."""
        return self.replaced({name: (value > threshold).to(value.dtype) for name, value in self.values.items()})

    def select(self, tasks: object) -> Masks:
        """The masks of some tasks, by name or label, in that order; a single one may stand alone."""
        alone = isinstance(tasks, (str, int)) or not isinstance(tasks, Iterable) or getattr(tasks, "ndim", 1) == 0
        rows = [self.task_rows.row(task) for task in ([tasks] if alone else list(tasks))]  # type: ignore[call-overload]
        if not rows:
            raise TaskError("select: expected at least one task, got none")
        return self.replaced({name: value[rows] for name, value in self.values.items()}, self.task_rows.select(rows))

    def __and__(self, other: Masks) -> Masks:
        """What both keep, task by task (the smaller gate). The second may be of one task, which meets every other."""
        return self._combined(other, torch.minimum)

    def __or__(self, other: Masks) -> Masks:
        """What either keeps, task by task (the larger gate)."""
        return self._combined(other, torch.maximum)

    def __sub__(self, other: Masks) -> Masks:
        """What the first keeps and the second does not, task by task: min(a, 1 − b)."""
        return self._combined(other, lambda a, b: torch.minimum(a, 1 - b))

    def _combined(self, other: Masks, combine: Any) -> Masks:
        check_same_sites(other.sites, self.sites, "combine masks of one model and one choice of sites")
        if other.closed != self.closed:
            raise SiteError(f"expected masks whose closed units put out {self.closed!r}, got {other.closed!r}")
        if len(other) > 1:
            other = other.select(self.labels)  # task by task, in whatever order
        return self.replaced({name: combine(value, other[name].to(value.dtype)) for name, value in self.values.items()})

    def replaced(
        self,
        values: Mapping[str, Tensor],
        tasks: Tasks | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Masks:
        """The same sites, wiring and closed values with other values, and other tasks and origin if given."""
        origin = self.provenance if provenance is None else provenance
        return Masks(self.sites, values, tasks or self.task_rows, self.wiring, self.closed, self.means, origin)

    # --- files ---

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a mask file (safetensors): complete or not at all. Hard masks take a byte per unit, soft ones four."""
        mask_file.write(path, *self.to_parts())

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Publishes the masks on the Hugging Face Hub; see `nadhooks.sharing.push_to_hub` for the options."""
        from .sharing import push_to_hub  # it stands on flow graphs and pictures, which stand on masks

        return push_to_hub(self, repo, **options)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a mask file holds: a header that JSON knows, and tensors by name."""
        header = {
            "format": FORMAT_VERSION,
            "sites": [_fields(site) for site in self.sites],
            "tasks": [{"label": label, "name": name} for label, name in zip(self.labels, self.tasks, strict=True)],
            "wiring": [
                {"source": source, "target": target, **data} for source, target, data in self.wiring.edges(data=True)
            ],
            "closed": self.closed,
            "provenance": json.loads(json.dumps(dict(self.provenance), default=str)),
        }
        tensors = {}
        for site in self.sites:
            value = self.values[site.name].detach().cpu()
            hard = bool(((value == 0) | (value == 1)).all())
            tensors[f"mask/{site.name}"] = (value.bool() if hard else value).contiguous()
        tensors |= {f"mean/{name}": mean.detach().cpu().contiguous() for name, mean in self.means.items()}
        return header, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Masks:
        """The inverse of `to_parts`. Raises MaskFileError for anything that `to_parts` could not have made."""
        version = header.get("format")
        if version != FORMAT_VERSION:
            raise MaskFileError(
                f"expected mask file format {FORMAT_VERSION}, got {version!r}; a newer nadhooks may read it"
            )
        try:
            sites = tuple(_site(site) for site in header["sites"])
            if not sites or len({site.name for site in sites}) < len(sites):
                raise MaskFileError("not a valid mask file: it names no site, or one twice")
            names = {task["label"]: task["name"] for task in header["tasks"]}
            if len(names) < len(header["tasks"]) or not all(isinstance(name, str) for name in names.values()):
                raise MaskFileError("not a valid mask file: a task without a name, or one twice")
            tasks = Tasks.of(names)
            values = {}
            for site in sites:
                value = tensors[f"mask/{site.name}"]
                values[site.name] = value.float() if value.dtype == torch.bool else value
            means = {site.name: tensors[f"mean/{site.name}"] for site in sites} if header["closed"] == "mean" else {}
            return cls(sites, values, tasks, _wiring(header, sites), header["closed"], means, header["provenance"])
        except (KeyError, TypeError, ValueError, AttributeError, SiteError, TaskError) as error:
            raise MaskFileError(f"not a valid mask file: {type(error).__name__}: {error}") from error


def load(path: str | PathLike[str]) -> Masks:
    """Reads a mask file, also from `hf://org/name[@revision][/file]`, https://, s3:// and the like.

    No code in the file can run. Raises MaskFileError for any other file, and for one that cannot be fetched.
    """
    if not isinstance(path, (str, PathLike)):
        raise MaskFileError(f"expected the path of a mask file, got {path!r}")
    try:
        found = remote.fetch(str(path)) if remote.is_remote(path) else path
        return Masks.from_parts(*(mask_file.from_bytes(found) if isinstance(found, bytes) else mask_file.read(found)))
    except MaskFileError as error:
        raise MaskFileError(f"{path}: {error}") from error.__cause__


def check_same_sites(got: Sequence[Site], expected: Sequence[Site], remedy: str) -> None:
    """Raises SiteError that names the first site that differs."""
    for ours, theirs in zip(expected, got, strict=False):
        if ours != theirs:
            raise SiteError(f"the sites differ: expected {_described(ours)}, got {_described(theirs)}; {remedy}")
    if len(got) != len(expected):
        raise SiteError(f"the sites differ: expected {len(expected)} sites, got {len(got)}; {remedy}")


def _fields(site: Site) -> dict[str, Any]:
    return {each.name: getattr(site, each.name) for each in dataclasses.fields(site) if each.compare}


def _site(fields: Mapping[str, Any]) -> Site:
    """A site as a file describes it, with every field of its own kind."""
    if set(fields) - {each.name for each in dataclasses.fields(Site) if each.compare}:
        raise ValueError(f"not a site: {fields!r}")
    site = Site(**fields)
    words = isinstance(site.name, str) and isinstance(site.module, str) and site.side in ("input", "output")
    numbers = all(type(n) is int and n > 0 for n in (site.axis, site.units, site.block))
    leaf = site.leaf is None or type(site.leaf) is int
    if not (words and numbers and leaf and type(site.alternating) is bool):
        raise ValueError(f"not a site: {fields!r}")
    return site


def _described(site: Site) -> str:
    return f"{site.name} ({site.units} units on axis {site.axis})"


def _wiring(header: Mapping[str, Any], sites: Sequence[Site]) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(["input", *(site.name for site in sites), "output"])
    for edge in header["wiring"]:
        data = dict(edge)
        source, target = data.pop("source"), data.pop("target")
        if source not in graph or target not in graph:
            raise MaskFileError(f"the wiring names {source!r} -> {target!r}, which are not both sites")
        graph.add_edge(source, target, **data)
    if not nx.is_directed_acyclic_graph(graph):
        raise MaskFileError("the wiring has a cycle")
    return nx.freeze(graph)
