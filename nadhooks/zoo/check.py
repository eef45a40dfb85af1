"""What `attach` promises, checked on one model of a zoo: the work behind `python -m nadhooks.zoo check`.

Zero-initialised and layer-scale parameters are others while this runs, so that gradients can flow. Every check gives
"ok", or what was found instead, which goes to the ledger as it is.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from .. import sites, zoo
from ..comparing import same
from ..errors import NadhooksError
from ..gates import Gates, attach
from ..gating import unit_sums
from ..sites import Site
from ..tracing import doubled, has_weights
from ..wiring import INPUT, OUTPUT, flowing, perturb
from .running import FAINTER, Runner, calmed, on_meta, ordinary_attention, scaled, smallest_example, zeroed

GRANULARITIES = {"blocks": sites.blocks, "channels": sites.channels, "neurons": sites.neurons, "heads": sites.heads}
CHECKS = ("open", "gradient", "closing", "per sample", "detach", "wiring", "perturbation")
MAY_BE_ABSENT = ("neurons", "heads")  # a network of convolutions has neither
SAMPLED = 6  # sites that are closed one at a time, where there are more
TRIED = 5  # units of such a site, until the output feels one
SECONDS_TO_PERTURB = {"blocks": 120, "channels": 2400}  # at most expected; in which a second opinion is asked for
REAL_PARAMETERS = 40_000_000
REAL_BYTES = 8 * 2**30


# differences that are right: (model, granularity, check, why)
EXPLAINED = [
    (
        "timm:csatv2*",
        "channels",
        "perturbation",
        "its spatial attention normalises a single feature, which puts out a constant whatever comes in",
    ),
    (
        "torchvision:*rcnn_resnet50_fpn*",
        "channels",
        "perturbation",
        "mask and keypoint heads see the boxes that the scores choose, which has no gradient (gates.rewire() adds it)",
    ),
    ("timm:csatv2*", "channels", "per sample", "its spatial attention is over the samples of the batch"),
]


@dataclass
class Finding:
    """One model at one granularity: a line of the ledger."""

    model: str
    granularity: str
    parameters: int
    ran: str  # "64 px" or "meta"; "real" if the process ended
    sites: int = 0
    units: int = 0
    left_out: int = 0
    edges: int = 0
    checks: dict[str, str] = field(default_factory=dict)
    attach_seconds: float = 0.0
    seconds: float = 0.0
    reason: str = ""

    def explain(self) -> None:
        for model, granularity, name, why in EXPLAINED:
            known = fnmatch.fnmatch(self.model, model) and self.granularity == granularity
            if known and self.checks.get(name, "ok") != "ok":
                self.checks[name] = f"ok: {why}; {self.checks[name]}"

    @property
    def passed(self) -> bool:
        """Attached, or nothing there to attach to, and no check found anything else than it expected."""
        absent = self.granularity in MAY_BE_ABSENT and self.reason.startswith("none")
        explained = all(found == "ok" or found.startswith(("ok:", "not run:")) for found in self.checks.values())
        return absent or (self.sites > 0 and explained)


def parameters_of(spec: str) -> int:
    """How many parameters a model has, without allocating them where it can be made on the meta device."""
    return sum(parameter.numel() for parameter in on_meta(spec).parameters())


def check_model(spec: str, *, real: bool, channels_wiring: bool = False) -> Iterator[Finding]:
    """All findings on one model, a granularity each.

    real: run it, at the smallest image size that it takes; otherwise attach on the meta device only, but for detectors.
    channels_wiring: compare the wiring with perturbation at the granularity of channels too.
    """
    torch.manual_seed(0)
    begun = time.monotonic()
    model = zoo.load_model(spec) if real else on_meta(spec)
    if zoo.detects(model):  # its way depends on what it sees, so that the meta device cannot run it
        real = True
        model = zoo.load_model(spec).double()  # sums over thousands of anchors would swallow a unit's part
    made = time.monotonic() - begun
    example, ran = smallest_example(model) if real else (zoo.example_for(model), "meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with flowing(model), ordinary_attention(), calmed(model, doubled(example) if real else None):
        run = Runner(model, doubled(example)) if real else None
        for granularity in GRANULARITIES:
            before = imprint(model)
            begun = time.monotonic()
            finding = Finding(spec, granularity, parameters, ran)
            try:
                gates = attach(model, GRANULARITIES[granularity](), example=example)
            except NadhooksError as error:
                finding.reason = _why_absent(error)
                yield finding
                continue
            finding.attach_seconds = made + time.monotonic() - begun
            finding.sites, finding.units = len(gates.sites), sum(site.units for site in gates.sites)
            finding.left_out, finding.edges = len(gates.skipped), gates.wiring.number_of_edges()
            finding.checks["wiring"] = wiring_is_sound(gates)
            with gates:
                if run is not None:
                    thorough = granularity == "blocks"
                    second = thorough or (granularity == "channels" and channels_wiring)
                    patience = SECONDS_TO_PERTURB[granularity] if second else 0
                    finding.checks |= checked(run, gates, example, thorough, patience)
                    finding.explain()
            if real:
                finding.checks["detach"] = detach_restores(model, before)
            finding.seconds = time.monotonic() - begun
            yield finding


def checked(run: Runner, gates: Gates, example: Any, thorough: bool, patience: float) -> dict[str, str]:
    """Every check that needs values, on a batch of two samples; perturbation if it takes `patience` seconds at most."""
    found = {"open": open_gates_change_nothing(run, gates, thorough)}
    strongest: dict[str, list[int]] = {}
    found["gradient"] = gradient_reaches_every_gate(run, gates, strongest)
    found["closing"] = closing_is_felt(run, gates, strongest)
    found["per sample"] = "not run: a list of images" if run.detects else samples_go_their_own_way(run, gates)
    if patience:
        expected = run.seconds * len(gates.sites) / 2  # a replay takes one sample, half of the batch
        late = expected > patience
        found["perturbation"] = (
            f"not run: {len(gates.sites)} passes would take {expected:.0f} s"
            if late
            else perturbation_agrees(run, gates, example)
        )
    return found


# --- the checks ------------------------------------------------------------------------------------------------------


def open_gates_change_nothing(run: Runner, gates: Gates, thorough: bool) -> str:
    """Bit for bit the bare model's output, in eval and train mode, each with and without gradients.

    Not thorough: in eval mode without gradients and in train mode with them.
    """
    differs = []
    for training, gradients in ((False, False), (True, True), *(((False, True), (True, False)) if thorough else ())):
        bare = run.bare(training=training, gradients=gradients)
        with gates(0):
            gated = run(training=training, gradients=gradients)
        if not same(bare, gated):
            differs.append(f"{'train' if training else 'eval'} {'with' if gradients else 'without'} gradients")
    return f"differs in {', '.join(differs)}" if differs else "ok"


def gradient_reaches_every_gate(run: Runner, gates: Gates, strongest: dict[str, list[int]]) -> str:
    """A finite gradient for some gate of every site, and for a quarter or more of all units that are alive.

    A unit that is alive may still meet a ReLU that both samples leave shut, at the one position there is; where a
    site has no gradient at all, fainter weights are tried. A site is excused whose closing as a whole
    leaves the output as it was, bit for bit: the patch tokens of a last block, where the head reads the class token
    only. Notes each site's strongest units.
    """
    missing, counts = _gradients(run, gates, strongest)
    for factor in FAINTER:
        if missing and not run.detects:
            with scaled(run.model, factor):
                missing = [name for name in missing if name in _gradients(run, gates, {})[0]]
    if missing and run.detects and len(missing) < len(gates.sites) / 2:
        return f"ok: a detector's loss sees only the anchors that it draws, none of {few(missing)}"
    unread = [name for name in missing if name not in strongest and not _is_felt(run, gates, name)]
    if missing and unread == missing:
        return f"ok: the output does not depend on {few(missing)}"
    if missing or 4 * counts[0] < counts[1]:
        return f"none at {few(missing)}" if missing else f"at {counts[0]} of {counts[1]} units only"
    return "ok"


def _is_felt(run: Runner, gates: Gates, name: str) -> bool:
    with gates.close(name, range(next(site.units for site in gates.sites if site.name == name))):
        return not same(run(), run.bare())


def _gradients(run: Runner, gates: Gates, strongest: dict[str, list[int]]) -> tuple[list[str], list[int]]:
    """Sites without a gradient, and how many units have one, of how many that are alive."""
    alive: dict[str, Tensor] = {}

    def see(site: Site, x: Tensor) -> None:
        now = unit_sums(x.abs(), site) > 0
        alive[site.name] = now | alive.get(site.name, now)

    with gates(0), gates.watch(see):
        outputs = [x for x in run(training=run.detects, gradients=True) if x.requires_grad and x.numel()]
    generator = torch.Generator().manual_seed(1)
    total = torch.stack([(x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs]).sum()
    gradients = torch.autograd.grad(total, gates.parameters(), allow_unused=True)
    missing, counts = [], [0, 0]
    for site, gradient in zip(gates.sites, gradients, strict=True):
        if gradient is None or not gradient.isfinite().all():
            missing.append(site.name)
            continue
        counts[0] += int((gradient[0] != 0).sum())
        counts[1] += int(alive[site.name].sum())
        if gradient.any():
            strongest[site.name] = gradient[0].abs().topk(min(TRIED, site.units)).indices.tolist()
        elif alive[site.name].any():
            missing.append(site.name)
    return missing, counts


def closing_is_felt(run: Runner, gates: Gates, strongest: dict[str, list[int]]) -> str:
    """Closing a site's strongest unit changes the output, and does what a hook that zeroes the channel does.

    Where rounding swallows the change (a head behind a saturated softmax), the next strongest are tried.
    """
    bare = run.bare(training=run.detects)
    wrong = []
    chosen = [site for site in gates.sites if site.name in strongest]
    for site in chosen[:: -(-len(chosen) // SAMPLED)] if chosen else []:
        module = run.model.get_submodule(site.module)
        layer = has_weights(module) and site.side == "output" and site.within is None
        for unit in strongest[site.name]:
            with gates.close(site.name, unit):
                closed = run(training=run.detects)
            if layer:
                with zeroed(module, site.axis, unit):
                    if not same(run(training=run.detects), closed):
                        wrong.append(f"{site.name} differs from the zeroed channel {unit}")
            if not same(closed, bare):
                break
        else:
            wrong.append(f"{site.name} does not feel units {strongest[site.name]}")
    return few(wrong) or "ok"


def samples_go_their_own_way(run: Runner, gates: Gates) -> str:
    """With every other unit closed for the second sample, the first gives what it did, and the second does not."""
    bare = run.bare()
    shut = {site.name: torch.ones(2, site.units) for site in gates.sites}
    for gate in shut.values():
        gate[1, ::2] = 0
    with gates.apply(shut):
        gated = run()
    pairs = [(a, b) for a, b in zip(bare, gated, strict=True) if a.dim() and len(a) == 2]
    if not pairs:
        return "not run: no output with the samples on axis 0"
    if not all(same([a[0]], [b[0]]) for a, b in pairs):
        return "the first sample changes with the second's gates"
    return "the second sample does not change" if all(same([a[1]], [b[1]]) for a, b in pairs) else "ok"


def wiring_is_sound(gates: Gates) -> str:
    """Acyclic, with the input as its one source, and every site on a way to the output."""
    wiring = gates.wiring
    if not nx.is_directed_acyclic_graph(wiring):
        return "has a cycle"
    sources = [node for node in wiring if not wiring.in_degree(node)]
    if sources != [INPUT]:
        return f"has other sources than the input: {few(sources)}"
    astray = set(wiring) - nx.ancestors(wiring, OUTPUT) - {OUTPUT}
    return f"no way to the output from {few(sorted(astray))}" if astray else "ok"


def perturbation_agrees(run: Runner, gates: Gates, example: Any) -> str:
    second = perturb(run.model, gates.sites, example)
    added = set(second.edges) - set(gates.wiring.edges)
    refuted = set(gates.wiring.edges) - set(second.edges)
    for factor in FAINTER:
        if refuted and not run.detects:
            with scaled(run.model, factor):
                refuted -= set(perturb(run.model, gates.sites, example).edges)
    differ = [f"adds {u} -> {v}" for u, v in sorted(added)] + [f"refutes {u} -> {v}" for u, v in sorted(refuted)]
    if differ and run.detects and not added:
        return f"ok: a detector looks only at the boxes that it keeps, each on one level, which {few(differ)}"
    return few(differ) or "ok"


def imprint(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """{module: its hooks, flags, attributes and parameters, and how often those were written to}."""
    return {
        name: (
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            module.training,
            sorted(vars(module)),
            [(id(p), p._version, p.requires_grad, p.grad is None) for p in module.parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


def detach_restores(model: nn.Module, before: dict[str, tuple[Any, ...]]) -> str:
    after = imprint(model)
    changed = [name or "the model" for name in before if after.get(name) != before[name]]
    return f"differs from before: {few(changed)}" if changed else "ok"


# --- pieces ----------------------------------------------------------------------------------------------------------


def _why_absent(error: NadhooksError) -> str:
    text = str(error)
    head, _, reasons = text.partition("\n")
    return "none in this network" if "chose nothing" in head and not reasons else " ".join(text.split())[:300]


def few(names: Sequence[str], number: int = 3) -> str:
    return ", ".join(names[:number]) + (f" and {len(names) - number} more" if len(names) > number else "")
