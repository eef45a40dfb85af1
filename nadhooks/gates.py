"""Gates on the units of a live model: `attach`, and `Gates`, the only live object of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, cast, get_args

import networkx as nx
import torch
from torch import Tensor, nn

from . import zoo
from ._version import __version__
from .acting import InForce, Passing, SiteGate, State, forget_compiled
from .as_found import undisturbed
from .batching import copied, moved
from .default_device import made_on_cpu
from .errors import LearningError, ModelError, NadhooksError, SiteError, TaskError
from .gating import Clip, Closed, UnitMeans, chosen_units
from .hookable import check_model
from .hooking import Handle, on_site
from .identity import misfit, parameters_of_sites, structure_of, unlike, without_wrappers
from .masks import Masks, check_masks
from .sites import GIVEN, Axis, Site, Sites, chosen_by, find
from .tasks import Tasks, TaskSpec
from .tracing import Trace, call_model, trace
from .wiring import INPUT, OUTPUT, agreed, perturb, wire


@made_on_cpu
def attach(
    model: nn.Module,
    sites: Sites | None = None,
    *,
    tasks: TaskSpec = 1,
    closed: Closed = "zero",
    example: Any = None,
    axis: Axis | None = None,
) -> Gates:
    """Puts an open gate on every unit of the chosen sites of `model`, without changing its code or its outputs.

    sites: a selector (`nadhooks.sites.blocks()` is the default; `channels()`, `neurons()`, `heads()`), a glob or a
        list of globs over module names, a callable `(name, module) -> bool`, or the sites of masks.
    tasks: a number K (labels 0..K-1), a sequence of labels, or {label: name}.
    closed: what a closed unit puts out: "zero", or "mean", its average over data that `gates.calibrate` is shown.
        (The third kind, "optimal", is learnt by `nadhooks.learn` and comes with masks.)
    example: the forward arguments (tensor, tuple or dict) for one dry run; by default made from what timm and
        torchvision models say of their input.
    axis: the axis of the units where it cannot be determined, for all sites or as {glob: axis}.

    Raises SiteError when no site can be found, ModelError when the model or example cannot be used, TaskError for bad
    tasks. After an error the model is as it was.
    """
    check_model(model)
    return Gates(model, sites, Tasks.of(tasks), closed, zoo.example_for(model) if example is None else example, axis)


class Gates:
    """Gates on a model: the logits, and the hooks that apply them. Made by `attach`.

    sites: the sites in the order in which they fire. tasks: names, in the order of the rows. wiring: who feeds whom.
    logits: {site: (tasks, units) parameter}; a gate is its logit clipped to [0, 1], so that 1 is open, exactly, and
        gates learn from there. skipped: {module: why it has no gate}. parameters_behind: {site: how many of the model's
        parameters run between it and the site that fires before}.

    A context manager that detaches; detaching twice is fine. Outside `with gates(...)` every gate is open.
    """

    task_rows: Tasks

    def __init__(
        self, model: nn.Module, sites: Sites | None, tasks: Tasks, closed: Closed, example: Any, axis: Axis | None
    ):
        check_closed(closed, ("zero", "mean"))
        with torch.inference_mode(False):  # logits made there could never learn, and nothing there has wiring
            self._attach(model, sites, tasks, closed, example, axis)

    def _attach(
        self, model: nn.Module, sites: Sites | None, tasks: Tasks, closed: Closed, example: Any, axis: Axis | None
    ) -> None:
        seen = trace(model, example)
        self.model: nn.Module | None = model  # None once detached
        found, self.skipped = find(seen, sites, axis)
        self.chosen_by = chosen_by(sites)
        self.wiring: nx.DiGraph = wire(model, found, example)
        self.sites = self._without_dead_ends(found) if self.chosen_by != GIVEN else found
        self.closed: Closed = closed
        self.constants: dict[str, Tensor] = {}  # as those of `Masks`
        self.parameters_behind = parameters_of_sites(seen, self.sites)
        self._model_name = f"{type(model).__module__}.{type(model).__qualname__}"
        self._by_name = {site.name: site for site in self.sites}
        self._tensors = {site.name: _dtype_and_device(seen, site) for site in self.sites}
        self._set_tasks(tasks)
        self._now = InForce(self)
        self._handles: list[Handle] = []
        with ExitStack() as undo:
            for site in self.sites:
                site_gate = SiteGate(self._now, site)
                self._handles.append(on_site(model, site, site_gate, site_gate.active))
                undo.callback(self._handles[-1].remove)
            forget_compiled()
            passing = Passing(self._now)
            entering = model.register_forward_pre_hook(passing.enter, with_kwargs=True)
            self._handles.append(Handle(entering, model.register_forward_hook(passing.leave, always_call=True)))
            undo.pop_all()

    def _without_dead_ends(self, found: tuple[Site, ...]) -> tuple[Site, ...]:
        """The sites on a way from the input to the output; the wiring and `skipped` follow."""
        ahead, behind = nx.descendants(self.wiring, INPUT), nx.ancestors(self.wiring, OUTPUT)
        dead = {site.name: "it leads nowhere: no output depends on it" for site in found if site.name not in behind}
        dead |= {site.name: "nothing of the input reaches it" for site in found if site.name not in ahead}
        if len(dead) == len(found):
            reasons = "".join(f"\n  {name}: {why}" for name, why in list(dead.items())[:5])
            raise SiteError(f"no site: none lies between the input and the output:{reasons}\nchoose other modules")
        self.skipped |= dead
        self.wiring = nx.freeze(self.wiring.subgraph(node for node in self.wiring if node not in dead).copy())
        return tuple(site for site in found if site.name not in dead)

    @made_on_cpu
    def rewire(self, example: Any = None) -> nx.DiGraph:
        """A second opinion on `wiring`, by perturbation: one forward pass a site. Returns and keeps what it confirms.

        Edges that only perturbation sees are added (`found="perturbation"`), edges that it refutes are removed.
        example: as for `attach`.
        """
        model = self.attached()
        with self.everything_open(), torch.inference_mode(False):
            second = perturb(model, self.sites, zoo.example_for(model) if example is None else example)
        self.wiring = agreed(self.wiring, second)
        return self.wiring

    # --- learning ---

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.task_rows.names

    def parameters(self) -> list[nn.Parameter]:
        """The logits of all sites, for any torch optimiser."""
        return list(self.logits.values())

    def values(self) -> dict[str, Tensor]:
        """{site: (tasks, units)} gates in [0, 1] with their gradients, for penalties."""
        return {name: cast(Tensor, Clip.apply(logits)) for name, logits in self.logits.items()}

    def __call__(self, labels: object) -> _Activation:
        """`with gates(labels):` sends each sample through its task's gates.

        labels: (batch,) one per sample, or one task's name or label for the whole batch. The innermost `with` counts.
        Raises TaskError, at once, for unknown labels.
        """
        return _Activation(self, rows=self.task_rows.rows(labels))

    def apply(self, values: Mapping[str, Tensor], closed: Mapping[str, Tensor] | None = None) -> _Activation:
        """`with gates.apply(values):` uses these gates instead of the logits': {site: (units,) or (batch, units)}.

        For estimators of one's own: gradients flow into `values`. Sites that are not named stay open. closed: what
        closed units put out meanwhile, in the same form; gradients flow into it, too.
        """
        handed = [self._handed(values, "gates"), self._handed({} if closed is None else closed, "closed values")]
        return _Activation(self, None, *handed)

    def _handed(self, values: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        if not isinstance(values, Mapping):
            raise SiteError(f"expected {what} as {{site: tensor}}, got {type(values).__name__}")
        for name, value in values.items():
            site = self._site(name)
            if not isinstance(value, Tensor) or not len(value):
                raise SiteError(f"{name}: expected a tensor of {what}, got {value!r}")
            if value.dim() not in (1, 2) or value.shape[-1] != site.units:
                raise SiteError(
                    f"{name}: expected {what} of shape ({site.units},) or (batch, {site.units}), "
                    f"got {tuple(value.shape)}"
                )
        return {name: torch.atleast_2d(value) for name, value in values.items()}

    @contextmanager
    def close(self, site: str, units: int | Iterable[int] | Tensor) -> Iterator[None]:
        """`with gates.close(site, units):` shuts these units, and nothing else changes. Nests and combines.

        units: an index, several indices, or a (units,) boolean tensor.
        """
        self.attached()
        chosen = self._site(site)
        with self._now.closing(chosen, chosen_units(units, chosen)):
            yield

    @contextmanager
    def watch(self, see: Callable[[Site, Tensor], None]) -> Iterator[None]:
        """Calls `see(site, tensor)` for what leaves each site, gated if a gate acts, while the forward pass runs.

        Clone what is to be kept: an in-place layer that follows would overwrite it.
        """
        self.attached()
        with self._now.watching(see):
            yield

    @made_on_cpu
    def calibrate(self, batches: Iterable[Any]) -> None:
        """Measures what closed="mean" needs: each unit's mean over the data, all samples and positions alike.

        batches: inputs, or (inputs, labels) pairs as a training loop's loader yields them, or dicts of arguments, in
            which "labels" do not count.

        The model runs in eval mode with open gates. From then on closed units put out their means. Raises NadhooksError
        where there is no batch.
        """
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            raise NadhooksError(
                f"calibrate: expected batches, got {type(batches).__name__}; pass a loader, or [images]"
            )
        model, means = self.attached(), UnitMeans(self.sites)
        device = next((p.device for p in model.parameters()), None)
        with torch.no_grad(), undisturbed(model), self.everything_open(), self.watch(means.add):
            for batch in batches:
                inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
                if isinstance(batch, Mapping):
                    inputs = {name: x for name, x in batch.items() if name != "labels"}
                call_model(model, copied(inputs if device is None else moved(inputs, device)))
        self.close_to_means(means)

    def close_to_means(self, means: UnitMeans) -> None:
        """From now on closed units put out these means."""
        self.constants = {name: mean.to(self.logits[name].dtype) for name, mean in means.means().items()}
        self.closed = "mean"

    # --- masks ---

    def masks(self) -> Masks:
        """The gates as masks: a copy, on the CPU, with sites, wiring and where they came from.

        Raises ModelError for gates on the meta device, which have no values.
        """
        if any(logits.is_meta for logits in self.parameters()):
            raise ModelError("gates on the meta device have no values; attach to a model that is on another")
        values = {name: gates.detach().cpu().clone() for name, gates in self.values().items()}
        return self.masks_of(self.task_rows, values, {"method": "own training loop", "sites": self.chosen_by})

    def masks_of(
        self,
        tasks: Tasks,
        values: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
        optimal: Mapping[str, Tensor] | None = None,
    ) -> Masks:
        """Masks of these gates' sites with other tasks and values {site: (tasks, units)}.

        optimal: {site: (tasks, units)} what closed units put out, where it is not what these gates' do.
            Raises LearningError where that is not finite.
        """
        origin = {
            "model": self._model_name,
            "structure": structure_of(self.sites, self.parameters_behind),
            "parameters_behind": dict(self.parameters_behind),
            "libraries": {"nadhooks": __version__, **zoo.versions()},
        }
        closed: Closed = "optimal" if optimal else self.closed
        constants = {name: each.cpu() for name, each in (optimal or self.constants).items()}
        for name, each in constants.items():
            if not bool(each.isfinite().all()):
                raise LearningError(
                    f"what closed units of site {name!r} put out is not finite; look for NaN in data and weights"
                )
        return Masks(self.sites, values, tasks, self.wiring, closed, constants, origin | dict(provenance))

    @made_on_cpu
    def load(self, masks: Masks, *, strict: bool = True) -> dict[str, str]:
        """Sets every gate to exactly the mask's value, and tasks and closed values to those of the masks.

        strict: the masks must be of these sites, with as many parameters behind each. Otherwise the sites that have
            the same name, axis and units are loaded, gates elsewhere are open, and {site: how it differs} is returned,
            empty where all was loaded as it was learnt.

        Names may differ by the prefix of DataParallel, DDP or torch.compile; for other names see `masks.renamed`.
        Optimisers keep working if the tasks are as many as before; otherwise the logits are new parameters.
        Raises SiteError where the masks do not fit, TaskError for another number of tasks inside `with gates(...)`.
        """
        check_masks(masks)
        masks = without_wrappers(masks, self.sites)
        differ = unlike(masks, self.sites, self.parameters_behind)
        fitting = [site for site in self.sites if site in masks.sites]
        if differ and (strict or not fitting):
            remedy = ", or load what fits with strict=False" if fitting else ""
            raise misfit(
                differ,
                "attach with sites=masks.sites, load the masks of this model, give sites other names with "
                f"masks.renamed{remedy}",
            )
        if len(masks.tasks) != len(self.task_rows) and not (self._now.rows is self._now.values is None):
            raise TaskError(
                f"expected masks of the {len(self.task_rows)} tasks that are in force, got {len(masks.tasks)} tasks; "
                "load them outside of `with gates(...)`"
            )
        # a damaged file is found here, before any change; units of gates that stay open never put out their constants
        tables = {site.name: masks[site.name] for site in fitting}
        tasks = (len(masks),) if masks.closed == "optimal" else ()
        constants = {
            site.name: masks.constants[site.name] if site in fitting else torch.zeros(*tasks, site.units)
            for site in self.sites
            if masks.closed != "zero"
        }
        if len(masks.tasks) != len(self.task_rows):
            self._set_tasks(masks.task_rows)
        self.task_rows = masks.task_rows
        with torch.no_grad():
            for site in self.sites:
                logits = self.logits[site.name]
                logits.copy_(tables[site.name]) if site.name in tables else logits.fill_(1)
        self.closed, self.constants = masks.closed, constants
        return differ

    # --- hooks ---

    def detach(self) -> None:
        """Removes every hook. The logits stay, and so do masks; detaching again does nothing."""
        for handle in self._handles:
            handle.remove()
        self.model = None

    def __enter__(self) -> Gates:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def __repr__(self) -> str:
        units = sum(site.units for site in self.sites)
        state = "" if self.model is not None else ", detached"
        size = f"{len(self.sites)} sites, {units:,} units, {len(self.task_rows)} tasks"
        return f"Gates({size}, closed={self.closed!r}{state})"

    def _set_tasks(self, tasks: Tasks) -> None:
        self.task_rows = tasks
        self.logits: dict[str, nn.Parameter] = {}
        for site in self.sites:
            dtype, device = self._tensors[site.name]
            self.logits[site.name] = nn.Parameter(torch.ones(len(tasks), site.units, dtype=dtype, device=device))

    @contextmanager
    def everything_open(self) -> Iterator[None]:
        """Every gate open inside, whatever is in force outside."""
        self.attached()
        with self._now.everything_open():
            yield

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, other masks may be loaded; afterwards tasks, closed values and the very parameters are as before."""
        before = self.logits, self.task_rows, self.closed, self.constants
        self._set_tasks(self.task_rows)
        try:
            yield
        finally:
            self.logits, self.task_rows, self.closed, self.constants = before

    def _site(self, name: str) -> Site:
        if name not in self._by_name:
            raise SiteError(f"no site {name!r}: the sites are {', '.join(self._by_name)}")
        return self._by_name[name]

    def attached(self) -> nn.Module:
        """The model. Raises NadhooksError after `detach`."""
        if self.model is None:
            raise NadhooksError("these gates are detached and act on nothing; attach again")
        return self.model


class _Activation:
    """`with gates(...)` and `with gates.apply(...)`: puts gates in force, and back what was in force before."""

    def __init__(
        self,
        gates: Gates,
        rows: Tensor | None = None,
        values: Mapping[str, Tensor] | None = None,
        closed: Mapping[str, Tensor] | None = None,
    ):
        gates.attached()
        self._gates, self._state = gates, (rows, values, closed or {})
        self._before: list[State] = []

    def __enter__(self) -> Gates:
        self._before.append(self._gates._now.enter(self._state))
        return self._gates

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._gates._now.leave(self._before.pop())


def check_closed(closed: str, kinds: Sequence[str] = get_args(Closed)) -> None:
    if closed not in kinds:
        more = "" if closed not in get_args(Closed) else ", which is learnt: by nadhooks.learn with 'contrastive', say"
        raise NadhooksError(f"closed: expected {' or '.join(map(repr, kinds))}, got {closed!r}{more}")


def _dtype_and_device(seen: Trace, site: Site) -> tuple[torch.dtype, torch.device]:
    call = seen.call(site.module)
    assert call is not None  # `find` chose it because it fired
    leaves = {leaf.index: leaf for leaf in (call.inputs if site.side == "input" else call.outputs)}
    leaf = leaves[site.leaf or 0]
    return (leaf.dtype if leaf.dtype == torch.float64 else torch.float32), leaf.device
