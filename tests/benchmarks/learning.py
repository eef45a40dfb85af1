"""What learning costs and what its masks are worth, beside the authors' algorithm, the floor, and other rankings.

    python -m tests.benchmarks.learning            # some 2 hours on an idle core (estimated), half for the curve
    python -m tests.benchmarks.learning --quick    # 5 to 10 minutes: one network, three classes, one seed
    python -m tests.benchmarks.learning --parts curve --figure docs/images/learning-curve.svg
    python -m tests.benchmarks.learning --parts contrastive --reference-classes 0 --convolutions
    python -m tests.benchmarks.learning --parts class-only contrastive --reference-classes 0 --networks densenet vit

(`python tests/benchmarks/learning.py` is the same.)

Two networks on Fashion-MNIST, a ResNet of nine sites and a VGG of six, are trained once (8 minutes, half an hour where
the processor is slow) and kept in the cache directory. One thread; seconds are processor time, runs to be compared
alternate. Nothing is chosen on held-out images: every method runs with its defaults. Parts:

- `nad`: against the reference (tests/benchmarks/reference.py) from the same first logits, on the same batches;
- `class-only`, `contrastive`: worth on held-out images of all classes, and time, beside the reference's;
- `curve`: the methods beside rankings, from much kept to little;
- `steps`: a step of `contrastive` beside the forward passes that it cannot do without;
- `memory`: of the reference and of `nad`, for torchvision's ResNet50, in processes of their own (Linux);
- `planted`: networks in which it is known what each class needs (tests/planted.py);
- `gpu`: all 1,000 classes of ResNet50, where there is a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import operator
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import nadhooks
from nadhooks import methods
from nadhooks.evaluation import recognition
from nadhooks.learning import emulated
from nadhooks.progress import Progress
from nadhooks.sampling import generator

if not __package__:  # as a file: python tests/benchmarks/learning.py
    sys.path[0], __package__ = str(Path(__file__).parents[2]), "tests.benchmarks"

from .. import planted
from .networks import ADAMW, RESNET_SITES, SGD, SMALL, VGG_SITES, pixels, resnet, trained, vgg
from .reference import BATCH, BETA, Shown, reference

NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "resnet": (lambda: resnet(32, 64, 128, 256), RESNET_SITES),
    "vgg": (vgg, VGG_SITES),
}
OTHERS = [name for name in SMALL if name not in NETWORKS]  # to be asked for, with blocks() for sites
PARTS = ("nad", "class-only", "contrastive", "curve", "steps", "memory", "planted", "gpu")
OWN_IMAGES = 512  # per class, as many as make the reference's 21 epochs 672 steps of 16
SHARES = (0.9, 0.7, 0.55, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05)
BASELINES = ("random", "activation", "taylor", "routing")
CLOSED: dict[str, Sequence[str]] = {"optimal": (), "mean": BASELINES, "zero": BASELINES}  # what of them is compared
FIGURES = ("kept", "recall", "fpr", "auc", "fpr95")
COLOURS = {
    "contrastive": "#D55E00",
    "random": "#999999",
    "activation": "#0072B2",
    "taylor": "#009E73",
    "routing": "#CC79A7",
}  # fmt: skip  (Okabe and Ito's, told apart by the colour-blind)
COMPARE = {"≥": operator.ge, "≤": operator.le}
console = Console(width=140)


class Targets:
    """A table of figures beside their targets."""

    def __init__(self, title: str):
        self.table = Table("figure", "found", "target", "met", box=None, header_style="bold", title=title)

    def add(self, name: str, value: float, wanted: str = "", digits: int = 3) -> None:
        """wanted: such as "≥ 2.5"; empty where nothing is aimed at."""
        met = ""
        if wanted:
            sign, bound = wanted.split()
            met = "yes" if COMPARE[sign](round(value, 9), round(float(bound), 9)) else "[bold]no[/bold]"
            wanted = f"{sign} {float(bound):.{digits}f}"
        self.table.add_row(name, f"{value:.{digits}f}", wanted, met)

    def show(self) -> None:
        console.print(self.table)


@dataclass
class Bench:
    """A trained network, its training images as a loader, and figures on held-out images."""

    name: str
    build: Callable[[], nn.Module]
    sites: list[str] | None
    model: nn.Module
    images: Tensor
    labels: Tensor
    test: list[tuple[Tensor, Tensor]]
    classes: list[int]
    gates: nadhooks.Gates = field(init=False)

    def __post_init__(self) -> None:
        judge = copy.deepcopy(self.model).to(memory_format=torch.channels_last)
        self.gates = nadhooks.attach(judge, self.sites, tasks=self.classes, example=self.images[:1])
        self.loader = list(zip(self.images.split(128), self.labels.split(128), strict=True))

    def learn(self, loader: object = None, **more: object) -> nadhooks.Masks:
        data = self.loader if loader is None else loader
        return nadhooks.learn(self.model, data, self.sites, tasks=self.classes, **more)  # type: ignore[arg-type]

    def worth(self, masks: nadhooks.Masks | None) -> dict[str, list[float]]:
        """{class: FIGURES} of hard masks, or of the full network."""
        measured = recognition(self.gates, self.test, masks and masks.hard())
        return {row.task: [getattr(row, key) for key in FIGURES] for row in measured}


def bench(name: str, options: argparse.Namespace) -> Bench:
    build, sites = NETWORKS.get(name) or (SMALL[name], None)
    images, labels = pixels("train", console)
    if name in OTHERS:
        images, labels = images[:20_000], labels[:20_000]
        model = trained(f"flow-{name}", build, images, labels, 4, ADAMW, console)
    else:
        model = trained(f"learning-{name}", build, images, labels, options.epochs, SGD, console)
    test = [part[: options.test_images] for part in pixels("test", console)]
    with torch.no_grad():
        right = torch.cat([model(x) for x in test[0].split(500)]).argmax(1).eq(test[1]).double().mean()
    console.rule(f"{name}, {right:.1%} of the held-out images right")
    if options.convolutions:
        sites = [each for each, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out = list(zip(test[0].split(250), test[1].split(250), strict=True))
    return Bench(name, build, sites, model, images[order], labels[order], held_out, list(range(options.classes)))


def seconds(run: Callable[[], object]) -> float:
    """Processor time: other processes on the machine disturb it least."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


# --- against the reference -------------------------------------------------------------------------------------------


Worth = dict[str, dict[tuple[int, str], list[float]]]  # {run: {(seed, class): FIGURES}}


@dataclass
class Runs:
    """What one seed's runs took and learnt."""

    seconds: dict[str, float] = field(default_factory=dict)  # a class, by run
    masks: dict[str, nadhooks.Masks] = field(default_factory=dict)
    of_reference: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # {class: {site: (units,) soft gates}}
    times_of_reference: list[float] = field(default_factory=list)


def against_reference(bench: Bench, options: argparse.Namespace) -> None:
    every = []
    for seed in range(options.seeds):
        number = options.reference_classes[min(seed, len(options.reference_classes) - 1)]
        every.append(one_seed(bench, seed, min(number, len(bench.classes)), options.parts))
    worth: Worth = {}
    for seed, runs in enumerate(every):
        for name, masks in runs.masks.items():
            worth.setdefault(name, {}).update({(seed, label): row for label, row in bench.worth(masks).items()})
    worth = {"full network": {(0, label): row for label, row in bench.worth(None).items()}} | worth
    table = Table(box=None, header_style="bold", title=f"{bench.name}: hard masks, means over classes and seeds")
    for heading in ("masks", "kept", "recall", "false pos.", "AUC", "false pos. at recall 95 %", "s a class", "ratio"):
        table.add_column(heading, justify="left" if heading == "masks" else "right")
    for name, rows in worth.items():
        times = [runs.seconds[name] for runs in every if name in runs.seconds]
        time_of = f"{statistics.median(times):.2f}" if times else ""
        table.add_row(
            name,
            *(f"{value:.3f}" for value in mean(rows.values())),
            time_of,
            f"{ratio(every, name):.1f}" if times and "reference" in worth else "",
        )
    console.print(table)
    number = sum(len(runs.times_of_reference) for runs in every)
    console.print(f"the reference ran for {number} classes; ratio: its time / theirs, a class, median of the seeds")
    judge(bench, every, worth)


def one_seed(bench: Bench, seed: int, number: int, parts: Sequence[str]) -> Runs:
    """The reference's classes one by one, and between them the other runs."""
    runs = Runs()
    own = {label: bench.images[bench.labels == label][:OWN_IMAGES] for label in bench.classes}
    shown = Shown(own, seed)
    nad = methods.nad(beta=BETA)
    teacher, student = (_fresh(bench) for _ in range(2))
    jobs: dict[str, Callable[[], nadhooks.Masks]] = {}
    if "nad" in parts:
        jobs["nad"] = lambda: bench.learn(shown.mixed(bench.classes), method=nad, seed=seed)
        if not emulated(torch.bfloat16):
            jobs["nad, bfloat16"] = lambda: bench.learn(
                shown.mixed(bench.classes), method=nad, seed=seed, autocast=torch.bfloat16
            )
    if "class-only" in parts:
        jobs["class-only"] = lambda: bench.learn(method="class-only", seed=seed)
    if "contrastive" in parts:
        for keep in (0.55, 0.3, 0.15):
            jobs[f"contrastive, {keep:g}"] = partial(bench.learn, method="contrastive", keep=keep, seed=seed)

    def run(name: str, job: Callable[[], nadhooks.Masks]) -> None:
        runs.seconds[name] = seconds(lambda: runs.masks.update({name: job()})) / len(bench.classes)
        console.print(f"seed {seed}: {name}, {runs.seconds[name]:.2f} s a class", highlight=False)

    waiting = list(jobs.items())
    for done, label in enumerate(bench.classes[:number]):
        random = generator(seed, label)  # the first logits that `learn` draws
        initial = {site.name: nad.initial(site.units, random) for site in bench.gates.sites}

        def authors(label: int = label, initial: dict[str, Tensor] = initial) -> None:
            runs.of_reference[label] = reference(teacher, student, initial, shown.of(label), label)

        runs.times_of_reference.append(seconds(authors))
        console.print(f"seed {seed}: reference, class {label}, {runs.times_of_reference[-1]:.2f} s", highlight=False)
        while waiting and len(waiting) * number > len(jobs) * (number - done - 1):
            run(*waiting.pop(0))
    for name, job in waiting:  # where the reference did not run
        run(name, job)
    if runs.of_reference:
        runs.seconds["reference"] = statistics.median(runs.times_of_reference)
        parts_of = [site.name for site in bench.gates.sites]
        learnt = {name: torch.stack([gates[name] for gates in runs.of_reference.values()]) for name in parts_of}
        runs.masks["reference"] = bench.gates.masks().select(list(runs.of_reference)).replaced(learnt)
        if "class-only" in parts:
            keep = int(runs.masks["reference"].hard().kept().mean() * sum(site.units for site in bench.gates.sites))
            run("class-only, as many units", lambda: bench.learn(method="class-only", keep=keep, seed=seed))
    return runs


def _fresh(bench: Bench) -> nn.Module:
    model = bench.build().eval()
    model.load_state_dict(bench.model.state_dict())
    return model


def mean(rows: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def ratio(every: Sequence[Runs], name: str) -> float:
    """Reference's time a class / the run's, the median of the seeds in which both ran."""
    found = [r.seconds["reference"] / r.seconds[name] for r in every if "reference" in r.seconds and name in r.seconds]
    return statistics.median(found) if found else float("nan")


def agreement(every: Sequence[Runs], name: str) -> float:
    """The share of equal bits, unit by unit, of the classes that the reference ran for."""
    equal = [
        (runs.masks[name].hard()[site][row] == (gate > 0.5)).double()
        for runs in every
        for label, gates in runs.of_reference.items()
        for row in [runs.masks[name].task_rows.row(label)]
        for site, gate in gates.items()
    ]
    return float(torch.cat(equal).mean()) if equal else float("nan")


def judge(bench: Bench, every: Sequence[Runs], worth: Worth) -> None:
    targets = Targets(f"{bench.name}: against the reference")
    ran = every[0].seconds
    if "nad" in ran:
        targets.add("nad: equal bits", agreement(every, "nad"), "≥ 0.995", 4)
        targets.add("nad: reference's time / its time", ratio(every, "nad"), "≥ 2.5", 2)
    if "nad, bfloat16" in ran:
        targets.add("nad, bfloat16: equal bits", agreement(every, "nad, bfloat16"), "", 4)
        targets.add("nad, bfloat16: reference's time / its time", ratio(every, "nad, bfloat16"), "≥ 4", 2)
    elif "nad" in ran:
        console.print("this processor has no instructions for bfloat16: nad was not tried in it")
    if "class-only" in ran and "reference" in worth:
        theirs = worth["reference"]
        kept, _, _, auc, _ = mean(theirs.values())
        for name in ("class-only", "class-only, as many units"):  # of the classes that the reference ran for
            found = mean(worth[name][which] for which in theirs)
            targets.add(f"{name}: kept", found[0], f"≤ {kept}" if name != "class-only" else "", 4)
            targets.add(f"{name}: AUC, the reference's at least", found[3], f"≥ {auc}", 4)
        targets.add("class-only: reference's time / its time", ratio(every, "class-only"), "≥ 150", 1)
    wanted = {0.55: ("≥ 0.97", "≤ 0.06", "≥ 0.99", "≥ 50"), 0.3: ("≥ 0.95", "≤ 0.10", "≥ 0.98", "≥ 5"), 0.15: ("",) * 4}
    for keep, (recall, fpr, auc_of, times) in wanted.items():
        name = f"contrastive, {keep:g}"
        if name in ran:
            found = mean(worth[name].values())
            targets.add(f"{name}: recall", found[1], recall)
            targets.add(f"{name}: false positives", found[2], fpr)
            targets.add(f"{name}: AUC", found[3], auc_of)
            targets.add(f"{name}: false positives at recall 95 %", found[4])
            if "reference" in worth:
                targets.add(f"{name}: reference's time / its time", ratio(every, name), times, 1)
            if keep == 0.15:  # collapse: yes to everything, or to nothing
                targets.add(f"{name}: recall − false positives", found[1] - found[2], "≥ 0.5")
    targets.show()


# --- the curve -------------------------------------------------------------------------------------------------------

Curve = dict[tuple[str, str, float], list[float]]  # {(method, closed, share): FIGURES}


def curve(bench: Bench, options: argparse.Namespace) -> Curve:
    found: Curve = {}
    table = Table("share", "closed", *("contrastive", *BASELINES), box=None, header_style="bold",
                  title=f"{bench.name}: AUC (recall / false positives) at each share kept")  # fmt: skip
    for closed, compared in CLOSED.items():
        for share in options.shares:
            for method in ("contrastive", *compared):
                masks = [
                    bench.learn(method=method, keep=share, closed=closed, seed=seed)
                    for seed in range(options.curve_seeds)
                ]
                found[method, closed, share] = mean(row for each in masks for row in bench.worth(each).values())
                console.print(
                    f"{closed}, {share:g}, {method}: AUC {found[method, closed, share][3]:.3f}", highlight=False
                )
            cells = [found[method, closed, share] for method in ("contrastive", *compared)]
            table.add_row(f"{share:g}", closed, *(f"{x[3]:.3f} ({x[1]:.2f} / {x[2]:.2f})" for x in cells))
    console.print(table)
    for closed in CLOSED:
        lost = [
            f"{share:g} ({method}, {kind})"
            for method, kind, share in found
            if method != "contrastive" and (kind == closed or closed == "optimal")
            if found["contrastive", closed, share][3] < found[method, kind, share][3]
        ]
        verdict = f"not at {', '.join(lost)}" if lost else "at every share"
        console.print(
            f"{bench.name}, closed {closed}: contrastive beats every baseline in AUC: {verdict}", highlight=False
        )
    return found


def draw(curves: dict[str, Curve], path: Path) -> None:
    """A panel for each network: AUC against the share kept, bold for what is optimal, dashed for zero."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "nadhooks"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.6), sharey=True, squeeze=False)
    for panel, (name, found) in zip(axes[0], curves.items(), strict=True):
        for (method, colour), marker in zip(COLOURS.items(), "osv^D", strict=True):
            for closed, style in (("optimal", "-"), ("mean", "-"), ("zero", "--")):
                shares = sorted(share for what, how, share in found if (what, how) == (method, closed))
                panel.plot(
                    shares, [found[method, closed, share][3] for share in shares], style, color=colour, marker=marker,
                    markersize=6 if closed == "optimal" else 4, linewidth=3 if closed == "optimal" else 1.2,
                    label=method if closed == "mean" else None,
                )  # fmt: skip
        panel.set(title=name, xlabel="share of units kept", ylim=(0.38, 1.01))
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("AUC, class against the rest")
    axes[0][-1].plot([], [], "k-", linewidth=3, label="closed to what is optimal")
    axes[0][-1].plot([], [], "k-", linewidth=1.2, label="closed to the mean")
    axes[0][-1].plot([], [], "k--", linewidth=1.2, label="closed to zero")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="lower right", labelspacing=0.2)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    console.print(f"drawn: {path}")


# --- a step beside its floor -----------------------------------------------------------------------------------------


def steps(bench: Bench, options: argparse.Namespace) -> None:
    """Between two reports lies a step; in each report, a forward pass of as many samples is timed."""
    bare = copy.deepcopy(bench.model).to(memory_format=torch.channels_last)
    targets = Targets(f"{bench.name}: a step of contrastive, {len(bench.classes)} classes at once")
    for name, cache, passes in (("the open network remembered", {}, 2), ("not remembered", {"cache": 0}, 3)):
        took: list[float] = []
        forward: list[float] = []
        last: list[float] = [0.0, 0.0]  # samples, time

        def report(
            progress: Progress, took: list[float] = took, forward: list[float] = forward, last: list[float] = last
        ) -> None:
            samples = int(progress.samples - last[0])
            if last[1]:
                took.append((time.process_time() - last[1]) / samples)
            images = bench.images[:samples].contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                forward.append(seconds(lambda: bare(images)) / samples)
            last[:] = progress.samples, time.process_time()

        bench.learn(method="contrastive", progress=report, **cache)
        floor = [passes * each for each in forward[: len(took)]]
        targets.add(f"{name}: ms a sample", 1000 * statistics.median(windows(took)))
        targets.add(f"{name}: {passes} F, forward passes without gradients", 1000 * statistics.median(windows(floor)))
        ratios = map(operator.truediv, windows(took), windows(floor))  # of times that lie together: machines slow down
        targets.add(f"{name}: time / {passes} F", statistics.median(ratios), "≤ 1.15")
    targets.show()


def windows(times: Sequence[float]) -> list[float]:
    """Means of some in a row, for steps differ: each turn comes twice in 13, and 4 of them are shallow."""
    turns = min(13, len(times))
    return [statistics.mean(times[first : first + turns]) for first in range(len(times) - turns + 1)]


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> None:
    peaks, remembered = {}, {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # memory goes back at once: no gaps are counted
    ours = ("nad, one epoch", "nad, two epochs, cache=0", "nad, two epochs")
    for what in ("reference", *ours):
        call = [sys.executable, __file__, "--measure", what, "--pixels", str(options.pixels)]
        done = subprocess.run(call, check=True, capture_output=True, text=True, env=environment)
        peaks[what], remembered[what] = (size / 2**20 for size in json.loads(done.stdout))
    targets = Targets(f"peak memory above the network's own, ResNet50 at {options.pixels} pixels, batch {BATCH}, MiB")
    targets.add("reference", peaks["reference"], "", 0)
    for what in ours:
        targets.add(what, peaks[what], "", 0)
        kept, all_of_it = remembered[what], f"{what}, as a share of the reference's"
        if kept:
            targets.add(all_of_it, peaks[what] / peaks["reference"], "", 2)
        name = f"the same without {kept:.0f} of answers in the cache" if kept else all_of_it
        targets.add(name, (peaks[what] - kept) / peaks["reference"], "≤ 0.5", 2)
    targets.show()


def peak(what: str, size: int, batches: int = 4) -> tuple[int, int]:
    """Bytes that a few steps of it take at most, above those with one network in memory, and the cache's part of them.

    What is remembered of the open network from one epoch to the next has a budget of its own, `cache=`.
    """
    import torchvision

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    images = torch.randn(batches, BATCH, 3, size, size)
    with torch.no_grad():
        label = int(model(images[0]).argmax(1).mode().values)
    sites = ["maxpool", "layer?.*"]
    with nadhooks.attach(model, sites, example=images[0, :1]) as gates:
        initial = {site.name: torch.randn(site.units) for site in gates.sites}
        answers: list[int] = []  # to one image, at each site
        with torch.no_grad(), gates.watch(lambda site, x: answers.append(x.nbytes)):
            model(images[0, :1])
    remembered = sum(answers) * len(images) * BATCH if what == "nad, two epochs" else 0  # less than the budget
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    if what == "reference":
        student = torchvision.models.resnet50().eval()
        student.load_state_dict(model.state_dict())
        reference(model, student, initial, images, label)
    else:
        loader = [(x, torch.full((BATCH,), label)) for x in images]
        method = methods.nad(beta=BETA, epochs=1 if "one epoch" in what else 2)
        more = {"cache": 0} if what.endswith("cache=0") else {}
        nadhooks.learn(model, loader, sites, tasks=[label], method=method, **more)  # type: ignore[arg-type]
    return _status("VmHWM") - before, remembered


def _status(key: str) -> int:
    """Bytes, from the kernel's account of this process. (getrusage would count the parent's peak.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status does not say {key}")


# --- planted networks ------------------------------------------------------------------------------------------------


def on_planted(options: argparse.Namespace) -> None:
    names = list(methods.METHODS)
    table = Table("network", "closed", *names, box=None, header_style="bold",
                  title=f"F1 of the planted parts, means over classes and {options.seeds} seeds")  # fmt: skip
    exact, cases = 0, 0
    for kind in planted.KINDS:
        for closed in CLOSED:
            found: dict[str, list[Tensor]] = {
                name: [] for name in names if closed != "optimal" or methods.METHODS[name]().closing
            }
            for seed in range(options.seeds):
                plant = planted.planted(*kind, seed=seed)
                for name in found:
                    keep = None if name == "nad" else plant.keep
                    masks = plant.learn(method=name, keep=keep, closed=closed, seed=seed)
                    found[name].append(plant.f1(masks.hard().values))
            figures = {name: float(torch.stack(rows).mean()) for name, rows in found.items()}
            table.add_row(plant.name, closed, *(f"{figures[name]:.2f}" if name in found else "" for name in names))
            exact += sum(bool((row == 1).all()) for row in found["contrastive"])
            cases += len(found["contrastive"])
    console.print(table)
    targets = Targets("planted networks")
    targets.add("contrastive: share of the networks and seeds with F1 = 1 for every class", exact / cases, "≥ 1")
    targets.show()


# --- on a GPU --------------------------------------------------------------------------------------------------------


def on_gpu(model: nn.Module, sites: list[str], size: int, classes: int, device: torch.device) -> None:
    """`class-only` for every class of a network with random weights, on random images, beside its floor."""
    method = methods.class_only()

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def loader() -> list[tuple[Tensor, Tensor]]:
        labels = torch.arange(classes).repeat(4)
        return [(torch.randn(len(part), 3, size, size), part) for part in labels.split(250)]

    data = loader()
    model.to(device)
    nadhooks.learn(model, data, sites, tasks=list(range(2)), method=method)  # kernels are chosen on first use
    finish()
    begun = time.perf_counter()
    nadhooks.learn(model, data, sites, tasks=classes, method=method)
    finish()
    took = time.perf_counter() - begun
    batch = data[0][0].to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        model(batch)
        finish()
        begun = time.perf_counter()
        for _ in range(5):
            model(batch)
        finish()
    forward = (time.perf_counter() - begun) / (5 * len(batch))
    floor = 2 * forward * classes * method.steps * (method.positives + method.negatives)
    targets = Targets(f"class-only on {device}, {classes} classes, {size} pixels")
    targets.add("seconds, preparation included", took, "", 1)
    targets.add("seconds a class", took / classes, "", 4)
    targets.add("share of that which 2 F a sample would take", floor / took, "", 2)
    targets.show()


# --- the whole -------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS, *OTHERS], default=list(NETWORKS))
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--reference-classes", type=int, nargs="+", default=[10, 2], metavar="NUMBER",
        help="that the reference, half a minute each, runs for with the first seed, and with each other seed",
    )  # fmt: skip
    parser.add_argument("--curve-seeds", type=int, default=1)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--convolutions", action="store_true", help="gates before batch norm and ReLU, not behind")
    parser.add_argument("--epochs", type=int, default=5, help="of the networks' training")
    parser.add_argument("--pixels", type=int, default=224, help="at which memory is measured")
    parser.add_argument("--figure", type=Path, help="where the curve is drawn, such as docs/images/learning-curve.svg")
    parser.add_argument("--quick", action="store_true", help="one network, three classes, one seed, few shares")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.networks, options.classes, options.seeds = options.networks[:1], 3, 1
        options.reference_classes, options.shares, options.test_images = [2], (0.55, 0.15), 500
        options.pixels = 112
    return options


def main() -> None:
    options = arguments()
    if options.measure:
        print(json.dumps(peak(options.measure, options.pixels)))
        return
    torch.set_num_threads(1)
    curves: dict[str, Curve] = {}
    for name in options.networks if {*PARTS[:5]} & {*options.parts} else ():
        network = bench(name, options)
        if {*PARTS[:3]} & {*options.parts}:
            against_reference(network, options)
        if "curve" in options.parts:
            curves[name] = curve(network, options)
        if "steps" in options.parts:
            steps(network, options)
    if options.figure and curves:
        draw(curves, options.figure)
    if "memory" in options.parts:
        memory(options)
    if "planted" in options.parts:
        on_planted(options)
    if "gpu" in options.parts and torch.cuda.is_available():
        import torchvision

        on_gpu(torchvision.models.resnet50().eval(), ["maxpool", "layer?.*"], 224, 1000, torch.device("cuda"))
    elif "gpu" in options.parts:
        console.print("no GPU")


if __name__ == "__main__":
    main()
