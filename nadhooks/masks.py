"""Masks: what was learnt, apart from any live model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from os import PathLike
from types import MappingProxyType
from typing import Any, get_args

import networkx as nx
import torch
from torch import Tensor

from .default_device import made_on_cpu
from .errors import MaskFileError, NadhooksError, SiteError, TaskError
from .formats import mask_file, remote
from .formats.mask_file import Stored, StoredValues
from .formats.notebook import masks_table
from .gating import Closed
from .sites import Site
from .tasks import Label, Tasks, alone


@dataclass(frozen=True, eq=False)
class Masks:
    """The gates of every task over all sites; frozen.

    sites: in firing order. values: {site: (tasks, units) in [0, 1]}, also `masks[site]`. wiring: the directed acyclic
    graph of data flow between sites. closed: what a closed unit puts out: "zero", "mean", its average over the data,
    or "optimal", a constant learnt with the mask; constants: these, {site: (units,)} means, or {site: (tasks, units)}
    that are optimal. provenance: where the masks came from, values that JSON knows. quality: {measure: (tasks,)}, what
    was measured with them, such as "recall".

    Masks that `load` opened read their values from the file whenever they are asked for, and no more of it than that.
    """

    sites: tuple[Site, ...]
    values: Mapping[str, Tensor]
    task_rows: Tasks
    wiring: nx.DiGraph
    closed: Closed = "zero"
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("constants", "provenance", "quality"):  # frozen all the way: read-only copies
            part = getattr(self, name)
            object.__setattr__(self, name, part if isinstance(part, Stored) else MappingProxyType(dict(part)))
        if isinstance(self.values, StoredValues):  # which was checked when it was read
            return
        for site in self.sites:
            value = self.values.get(site.name)
            if value is None or tuple(value.shape) != (len(self.task_rows), site.units):
                got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise SiteError(
                    f"{site.name}: expected a mask of shape ({len(self.task_rows)}, {site.units}), got {got}"
                )
            if not bool(((value >= 0) & (value <= 1)).all()):  # NaN fails too
                raise SiteError(f"{site.name}: expected mask values in [0, 1], got others (or NaN)")
        if self.closed not in get_args(Closed):
            raise SiteError(f"closed: expected {' or '.join(map(repr, get_args(Closed)))}, got {self.closed!r}")
        for site in self.sites if self.closed != "zero" else ():
            shape = (site.units,) if self.closed == "mean" else (len(self.task_rows), site.units)
            constants = self.constants.get(site.name)
            if constants is None or tuple(constants.shape) != shape:
                raise SiteError(f"{site.name}: closed={self.closed!r} needs the units' constants, shape {shape}")
        for name, measure in self.quality.items():
            if tuple(measure.shape) != (len(self.task_rows),):
                raise TaskError(
                    f"quality: expected {name} of shape ({len(self.task_rows)},), got {tuple(measure.shape)}"
                )
        object.__setattr__(self, "values", MappingProxyType({s.name: self.values[s.name] for s in self.sites}))

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
            and _same_tables(self.constants, other.constants)
            and _same_tables(self.values, other.values)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Read-only mappings neither pickle nor copy; what they were made from does."""
        return Masks, tuple(dict(part) if isinstance(part, Mapping) else part for part in self.parts())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        names = ", ".join(self.tasks[:4]) + (", …" if len(self) > 4 else "")
        return (
            f"Masks({len(self)} tasks ({names}), {len(self.sites)} sites, {self.units:,} units, "
            f"kept {float(self.kept().mean()):.0%}, closed={self.closed!r})"
        )

    def _repr_html_(self) -> str:
        return masks_table(self)

    def kept(self) -> Tensor:
        """(tasks,) share of all units whose gate is above 0.5."""
        return torch.stack([self.kept_units(name).sum(1) for name in self.values]).sum(0) / self.units

    def kept_units(self, site: str) -> Tensor:
        """(tasks, units) booleans: the units of one site whose gate is above 0.5."""
        return self.values.kept(site) if isinstance(self.values, StoredValues) else self[site] > 0.5

    @made_on_cpu
    def jaccard(self) -> Tensor:
        """(tasks, tasks) similarity: the mean over sites of |A∩B| / |A∪B| of the units kept (gate > 0.5).

        Hu et al., ICCV 2021; authors' similarSubArch.py, but two empty sets are equal (1) here and NaN there.
        """
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for name in self.values:
            kept = self.kept_units(name).float()  # (tasks, units); counts of up to 2**24 units are exact
            with torch.autocast(kept.device.type, enabled=False):  # but not in bfloat16
                both = kept @ kept.T
            either = kept.sum(1)[:, None] + kept.sum(1)[None] - both
            total += torch.where(either > 0, both.double() / either.clamp(min=1), torch.ones_like(total))
        return total / len(self.sites)

    @made_on_cpu
    def agreement(self, other: Masks) -> dict[str, Tensor]:
        """{site: (tasks,) |A∩B| / |A∪B|} with other masks, task by task (1 where neither keeps a unit of the site).

        For the sites that both have, and the tasks of `self`, all of which the other must have. Raises TaskError where
        it has not: two tasks of one model are compared by `analysis.overlap_curve`.
        """
        check_masks(other)
        try:
            other = other.select(self.labels)
        except TaskError as error:
            raise TaskError(
                f"agreement compares masks task by task: {error}; two tasks of the same masks are compared by "
                "nadhooks.analysis.overlap_curve(masks.select([one, other]))"
            ) from error
        shared = {site.name: site.units for site in other.sites}
        found = {}
        for site in self.sites:
            if shared.get(site.name) == site.units:
                a, b = self.kept_units(site.name), other.kept_units(site.name)
                either = (a | b).sum(1).double()
                found[site.name] = torch.where(either > 0, (a & b).sum(1) / either.clamp(min=1), 1.0)
        return found

    def closed_values(self, site: str) -> Tensor | None:
        """(tasks, units) what closed units of one site put out; None for zero."""
        if self.closed == "zero":
            return None
        return self.constants[site].expand(len(self), -1)

    # --- making others ---

    def hard(self, threshold: float = 0.5) -> Masks:
        """0/1 masks: 1 where the gate is above the threshold."""
        return self.replaced({name: (value > threshold).to(value.dtype) for name, value in self.values.items()})

    def select(self, tasks: object) -> Masks:
        """The masks of some tasks, by name or label, in that order; a single one may stand alone."""
        several = [tasks] if alone(tasks) else list(tasks)  # type: ignore[call-overload]
        rows = [self.task_rows.row(task) for task in several]
        if not rows:
            raise TaskError("select: expected at least one task, got none")
        values, constants = (
            table.take(rows) if isinstance(table, Stored) else {name: value[rows] for name, value in table.items()}
            for table in (self.values, self.constants if self.closed == "optimal" else {})
        )
        quality = {name: measure[rows] for name, measure in self.quality.items()}
        return self.replaced(values, self.task_rows.select(rows), quality=quality, constants=constants or None)

    def renamed(self, names: Mapping[str, str] | Callable[[str], str]) -> Masks:
        """The same masks for a model that calls its modules otherwise.

        names: {module: its name there}, or a function from the one to the other. Other modules keep their names.
        Raises SiteError for a module that no site has, and where two sites would have one name.
        """
        if not callable(names):
            unknown = [name for name in names if name not in {site.module for site in self.sites}]
            if unknown:
                raise SiteError(f"no site at module {unknown[0]!r}: the sites are {', '.join(self.values)}")
        new = {site.name: _named(site, names) for site in self.sites}
        to = {old: site.name for old, site in new.items()}
        if len(set(to.values())) < len(to):
            raise SiteError("renamed: two sites would have one name")
        if taken := {"input", "output"} & set(to.values()):
            raise SiteError(f"renamed: {taken.pop()!r} is the name of an end of the wiring, not of a site")
        known = {key: value for key, value in self.provenance.items() if key != "structure"}  # which is of the names
        behind = {to.get(name, name): count for name, count in self.provenance.get("parameters_behind", {}).items()}
        return Masks(
            tuple(new.values()),
            {to[name]: value for name, value in self.values.items()},
            self.task_rows,
            nx.freeze(nx.relabel_nodes(self.wiring, to)),
            self.closed,
            {to[name]: constants for name, constants in self.constants.items()},
            {**known, **({"parameters_behind": behind} if behind else {})},
            self.quality,
        )

    def __and__(self, other: Masks) -> Masks:
        """What both keep, task by task (the smaller gate). The second may be of one task, which meets every other.

        Closed units put out what the first's do, here and in what follows.
        """
        return self._combined(other, torch.minimum)

    def __or__(self, other: Masks) -> Masks:
        """What either keeps, task by task (the larger gate)."""
        return self._combined(other, torch.maximum)

    def __sub__(self, other: Masks) -> Masks:
        """What the first keeps and the second does not, task by task: min(a, 1 − b)."""
        return self._combined(other, lambda a, b: torch.minimum(a, 1 - b))

    def _combined(self, other: Masks, combine: Any) -> Masks:
        check_masks(other)
        check_same_sites(other.sites, self.sites, "combine masks of one model and one choice of sites")
        if other.closed != self.closed:
            raise SiteError(f"expected masks whose closed units put out {self.closed!r}, got {other.closed!r}")
        if len(other) > 1:
            other = other.select(self.labels)  # task by task, in whatever order
        both = {name: (value, other[name]) for name, value in self.values.items()}
        dtypes = {name: torch.promote_types(torch.result_type(*pair), torch.float32) for name, pair in both.items()}
        return self.replaced({name: combine(*(x.to(dtypes[name]) for x in pair)) for name, pair in both.items()})

    def replaced(
        self,
        values: Mapping[str, Tensor] | None = None,
        tasks: Tasks | None = None,
        provenance: Mapping[str, Any] | None = None,
        quality: Mapping[str, Tensor] | None = None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> Masks:
        """The same sites and wiring with other values, tasks, origin, measures or constants, as far as given.

        Other values have no measured quality unless it is given too.
        """
        measured = (self.quality if values is None else {}) if quality is None else quality
        origin = dict(self.provenance if provenance is None else provenance)
        if provenance is None and not measured:
            origin.pop("quality", None)
        elif provenance is None and values is not None and isinstance(about := origin.get("quality"), Mapping):
            # without what is of the tasks and masks that were measured
            origin["quality"] = {key: value for key, value in about.items() if key not in ("network", "random")}
        values, tasks = self.values if values is None else values, tasks or self.task_rows
        constants = self.constants if constants is None else constants
        return Masks(self.sites, values, tasks, self.wiring, self.closed, constants, origin, measured)

    # --- files ---

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a mask file (safetensors): complete or not at all. Hard masks take a bit per unit, soft ones 32.

        Raises MaskFileError where it cannot be written.
        """
        mask_file.write(path, self.parts())

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Publishes the masks on the Hugging Face Hub; see `nadhooks.sharing.push_to_hub` for the options."""
        from .sharing import push_to_hub  # it stands on flow graphs and pictures, which stand on masks

        return push_to_hub(self, repo, **options)

    def parts(self) -> mask_file.Parts:
        """What a mask file holds."""
        return mask_file.Parts(*(getattr(self, name) for name in mask_file.Parts._fields))


def load(path: str | PathLike[str]) -> Masks:
    """Opens a mask file, also from `hf://org/name[@revision][/file]`, https://, s3:// and the like.

    Gates are read from the file when they are asked for. No code in the file can run. Raises MaskFileError for any
    other file, and for one that cannot be fetched: at once or, for gates that are out of range, when they are read.
    """
    if not isinstance(path, (str, PathLike)):
        raise MaskFileError(f"expected the path of a mask file, got {path!r}")
    try:
        found = remote.fetch(str(path)) if remote.is_remote(path) else path
        return Masks(*(mask_file.from_bytes(found) if isinstance(found, bytes) else mask_file.read(found)))
    except MaskFileError as error:
        raise MaskFileError(f"{path}: {error}") from error.__cause__


def merge(parts: Sequence[Masks]) -> Masks:
    """The tasks of several masks of one model, one after the other: shards of a long run, say.

    They must agree in sites, wiring and what closed units put out (but where that is a task's own), and have no task in
    common. What their provenance shares stays; where it differs, `merged` lists each one's own. Of measured quality
    stays what all have.

    Raises TaskError for a task that is there twice, SiteError for masks that do not fit each other.
    """
    if not parts:
        raise TaskError("merge: expected at least one, got none")
    for each in parts:
        check_masks(each)
    first = parts[0]
    for other in parts[1:]:
        check_same_sites(other.sites, first.sites, "merge masks of one model and one choice of sites")
        if set(other.wiring.edges) != set(first.wiring.edges):
            raise SiteError("expected masks of one wiring, got another; merge masks of one model")
        same = first.closed == "optimal" or _same_tables(other.constants, first.constants)
        if other.closed != first.closed or not same:
            raise SiteError(
                "expected closed units that put out the same; masks learnt apart from each other on other "
                "data have other means"
            )
    tasks = Tasks(
        tuple(label for each in parts for label in each.labels),
        tuple(name for each in parts for name in each.tasks),
        tuple(chain.from_iterable(each.task_rows.wordnet or [""] * len(each) for each in parts)),
    )
    values = {name: torch.cat([each[name] for each in parts]) for name in first.values}
    own_constants = first.constants if first.closed == "optimal" else ()
    constants = {name: torch.cat([each.constants[name] for each in parts]) for name in own_constants}
    measures = [name for name in first.quality if all(name in each.quality for each in parts)]
    quality = {name: torch.cat([each.quality[name] for each in parts]) for name in measures}
    shared = {k: v for k, v in first.provenance.items() if all(each.provenance.get(k) == v for each in parts)}
    own = [{k: v for k, v in each.provenance.items() if k not in shared} for each in parts]
    origin = {**shared, "merged": own} if any(own) else shared
    return first.replaced(values, tasks, origin, quality, constants or None)


def check_masks(given: object) -> None:
    """Raises NadhooksError for anything but masks."""
    if not isinstance(given, Masks):
        raise NadhooksError(f"expected Masks, got {type(given).__name__}; nadhooks.load(path) reads a file")


def check_same_sites(got: Sequence[Site], expected: Sequence[Site], remedy: str) -> None:
    """Raises SiteError that names the first site that differs."""
    for ours, theirs in zip(expected, got, strict=False):
        if ours != theirs:
            raise SiteError(f"the sites differ: expected {described(ours)}, got {described(theirs)}; {remedy}")
    if len(got) != len(expected):
        raise SiteError(f"the sites differ: expected {len(expected)} sites, got {len(got)}; {remedy}")


def described(site: Site) -> str:
    return f"{site.name} ({site.units} units on axis {site.axis})"


def _same_tables(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and bool((a[name] == b[name]).all()) for name in a
    )


def _named(site: Site, names: Mapping[str, str] | Callable[[str], str]) -> Site:
    module = names(site.module) if callable(names) else names.get(site.module, site.module)
    return replace(site, module=module, name=module + site.name.removeprefix(site.module))
