"""The command line: arguments, files, devices and printing. What it does stands in the other rooms."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import networkx as nx
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from . import demo, methods, zoo
from ._version import __version__
from .data import BUILT_IN, load_images
from .errors import DataError, ModelError, NadhooksError
from .evaluation import Recognition, recognition, shuffled
from .flow import flow_graph
from .formats import PICTURES, TEXT, render
from .formats.writing import write_bytes
from .gates import attach
from .learning import Progress as Learnt
from .learning import learn
from .masks import Masks, load
from .sites import Sites, blocks, channels, heads, neurons

SELECTORS = {"blocks": blocks, "channels": channels, "neurons": neurons, "heads": heads}
MODEL_HELP = (
    "timm:NAME, torchvision:NAME or file.py:factory; keyword arguments may follow, "
    "as in timm:resnet18,num_classes=10,in_chans=1; for learning, file.py also holds a function `transform`, "
    "from a PIL image to a (channels, height, width) tensor"
)
WARNING = (
    "Recall alone proves nothing: a sub-architecture that answers its class to everything has recall 1 and a "
    "false-positive rate of 1. Compare all four figures with the full network's and with the random mask's."
)
CLASSES_SHOWN = 20


def _number(kind: type, expected: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: numbers of that kind that fit. NaN fits nothing."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return number


AT_LEAST_1 = _number(int, "a number of at least 1", lambda number: number >= 1)

out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)  # files and pipes have no width
err = Console(stderr=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for what a user can mend, 2 for bad usage, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (NadhooksError, OSError, ImportError) as error:
        if options.debug:
            raise
        err.print(f"nadhooks: error: {_as_options(_one_line(error))}", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        err.print("nadhooks: stopped")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nadhooks",
        description="Which part of a trained vision network does what: learn which units each class needs, "
        "and see them as an information-flow graph.",
        epilog="New here? Run `nadhooks demo`. Every command explains itself: nadhooks learn --help.",
    )
    parser.add_argument("--version", action="version", version=f"nadhooks {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--debug", action="store_true", help="show a traceback when something fails")
        sub.set_defaults(run=run)
        return sub

    sub = command("demo", _demo, "train a small network on digits, learn its masks, write pictures")
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("demo"), help="folder for the results (default: %(default)s)"
    )
    _computing(sub)

    sub = command("sites", _sites, "list where gates would go in a model")
    _modelling(sub)

    sub = command("learn", _learn, "learn a mask for each class of a data set")
    _modelling(sub)
    sub.add_argument(
        "--data", required=True, metavar="DATA", help=f"an ImageFolder directory, or {' or '.join(BUILT_IN)}"
    )
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("masks.safetensors"), help="mask file (default: %(default)s)"
    )
    sub.add_argument("--method", choices=list(methods.METHODS), default="contrastive", help="default: %(default)s")
    share = _number(float, "a share above 0 and at most 1", lambda keep: 0 < keep <= 1)
    sub.add_argument("--keep", type=share, metavar="SHARE", help="share of units to keep (default: 0.55; not for nad)")
    sub.add_argument("--closed", choices=["zero", "mean"], help="what a closed unit puts out (default: the method's)")
    weight = _number(float, "a weight of at least 0", lambda beta: 0 <= beta < math.inf)
    nad = methods.nad().options
    sub.add_argument("--beta", type=weight, help=f"nad only: weight of the penalty (default: {nad['beta']})")
    sub.add_argument(
        "--epochs", type=AT_LEAST_1, metavar="N", help=f"nad only: times through the data (default: {nad['epochs']})"
    )
    sub.add_argument("--tasks", nargs="+", type=int, metavar="LABEL", help="only these output indices (default: all)")
    sub.add_argument(
        "--batch-size", type=AT_LEAST_1, default=64, metavar="N", help="images per batch (default: %(default)s)"
    )
    workers = _number(int, "a number of at least 0", lambda number: number >= 0)
    sub.add_argument("--workers", type=workers, default=0, metavar="N", help="processes that load images (default: 0)")
    sub.add_argument("--no-test", action="store_true", help="skip the measurement on held-out images")

    sub = command("graph", _graph, "build the information-flow graph of a mask file and show it as a table")
    sub.add_argument("masks", help="mask file")
    sub.add_argument("--task", help="name or label of one task (default: all over each other)")
    sub.add_argument("-o", "--out", type=Path, help="also write it as networkx node-link JSON")

    sub = command("render", _render, "draw the information-flow graph of a mask file")
    sub.add_argument("masks", help="mask file")
    sub.add_argument("--task", help="name or label of one task (default: all over each other)")
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("flow.svg"), help=f"{', '.join(PICTURES + TEXT)} (default: %(default)s)"
    )

    sub = command("inspect", _inspect, "show what a mask file holds")
    sub.add_argument("masks", help="mask file")
    return parser


def _modelling(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help=MODEL_HELP)
    weights = sub.add_mutually_exclusive_group()
    weights.add_argument("--weights", metavar="FILE", help="safetensors file or state_dict of the trained weights")
    weights.add_argument("--pretrained", action="store_true", help="the zoo's trained weights, from its hub")
    sub.add_argument(
        "--sites",
        nargs="+",
        default=["blocks"],
        metavar="SITES",
        help=f"{', '.join(SELECTORS)}, or globs over module names such as 'layer?.*' (default: blocks)",
    )
    sub.add_argument("--axis", type=int, help="axis of the units, where it cannot be determined")
    sub.add_argument(
        "--image-size", type=AT_LEAST_1, metavar="N", help="side of the model's input (default: what the model says)"
    )
    _computing(sub)


def _computing(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    seed = _number(int, "a number from -2**63 to 2**64 - 1", lambda seed: -(2**63) <= seed < 2**64)  # torch's range
    sub.add_argument("--seed", type=seed, default=0, metavar="N", help="for everything random (default: %(default)s)")


# --- commands --------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> None:
    begun = time.monotonic()
    device = _device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    _check_writable(options.out / "masks.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small: on a busy machine two threads wait for each other ten times as long
    try:
        written = _run_demo(options, device)
    finally:
        torch.set_num_threads(threads)
    out.print(f"\n{len(written)} files in {options.out}/, in {time.monotonic() - begun:.0f} s:", markup=False)
    for path in (written[0], *written[-3:], written[1]):
        out.print(f"  {path}", markup=False, soft_wrap=True)
    out.print(f"  … and one picture for each class. Next: nadhooks inspect {written[0]}", markup=False, soft_wrap=True)


def _run_demo(options: argparse.Namespace, device: torch.device) -> list[Path]:
    train, test = demo.digits()
    with _bar("training a ResNet on digits") as update:
        model = demo.trained_model(train, options.seed, update).to(device)
    with _bar("learning masks for ten classes") as update:
        masks = learn(model, train, demo.SITES, seed=options.seed, progress=_learning(update))
    masks = _from(masks, demo.MODEL, "digits")
    _show_recognition(model, masks, test, options.seed)
    return demo.write_results(options.out, masks)


def _sites(options: argparse.Namespace) -> None:
    with err.status("making the model and looking where gates would go"):
        model = _model(options)
        gates = attach(model, _chosen(options), axis=options.axis)
    with gates:
        table = _table("site", "class", "axis >", "units >", "parameters >", "fed by")
        total = sum(parameter.numel() for parameter in model.parameters())
        modules = dict(model.named_modules())
        for site in gates.sites:
            fed = _few(gates.wiring.predecessors(site.name))
            kind = type(modules[site.module]).__name__
            share = f"{gates.parameters_behind.get(site.name, 0) / max(total, 1):.1%}"
            table.add_row(site.name, kind, str(site.axis), f"{site.units:,}", share, fed)
        out.print(table)
        units = sum(site.units for site in gates.sites)
        behind = sum(gates.parameters_behind.values())
        out.print(
            f"{len(gates.sites)} sites, {units:,} units, {behind / max(total, 1):.0%} of {total:,} parameters behind"
        )
        if gates.skipped:
            out.print(f"\nleft out, {len(gates.skipped)}:")
            for why in dict.fromkeys(gates.skipped.values()):
                names = [name for name, reason in gates.skipped.items() if reason == why]
                out.print(f"  {why}:\n    {_few(names, 4)}", markup=False, soft_wrap=True)


def _learn(options: argparse.Namespace) -> None:
    _check_writable(options.out)
    for_nad = {key: getattr(options, key) for key in ("beta", "epochs") if getattr(options, key) is not None}
    if for_nad and options.method != "nad":
        raise NadhooksError(f"--{next(iter(for_nad))} is an option of --method nad, got --method {options.method}")
    method = methods.nad(**for_nad) if options.method == "nad" else options.method
    with err.status("making the model"):
        model = _model(options)
    if options.image_size is not None and zoo.own_transform(options.model):
        source = options.model.partition(":")[0]
        raise ModelError(f"the size of the images follows from `transform` in {source}; leave out --image-size")
    transform = zoo.transform_for(model, options.model)
    classes = zoo.class_index_of(model)
    train = load_images(options.data, "train", transform, classes)
    test = None if options.no_test else load_images(options.data, "test", transform, classes)
    generator = torch.Generator().manual_seed(options.seed)
    loading = {"batch_size": options.batch_size, "num_workers": options.workers}
    loader = DataLoader(train.dataset, shuffle=True, generator=generator, **loading)
    labels = sorted(train.names) if options.tasks is None else options.tasks
    unknown = [label for label in labels if label not in train.names]
    if unknown:
        raise DataError(f"{options.data} has no images of label {unknown[0]}: its labels are {sorted(train.names)}")
    unseen = [train.names[label] for label in labels if test is not None and label not in test.names]
    if unseen or (test is not None and len(test.names) < 2):
        what = f"{unseen[0]!r}" if unseen else "other classes"
        raise DataError(f"{options.data} has no held-out images of {what} to measure on; add some, or pass --no-test")
    with _bar(f"learning masks for {len(labels)} classes") as update:
        masks = learn(
            model,
            loader,
            _chosen(options),
            tasks={label: train.names[label] for label in labels},
            method=method,
            keep=options.keep,
            closed=options.closed,
            axis=options.axis,
            seed=options.seed,
            progress=_learning(update),
        )
    masks = _from(masks, options.model, options.data)
    masks.save(options.out)
    if test is not None:
        _show_recognition(model, masks, DataLoader(test.dataset, **loading), options.seed)
    out.print(f"{masks!r}\nwritten to {options.out}", markup=False, soft_wrap=True)


def _graph(options: argparse.Namespace) -> None:
    if options.out:
        _check_writable(options.out)
    graph = _flow(options)
    table = _table("site", "stage >", "units >", "kept >", "share >", "feeds")
    for name, data in graph.nodes(data=True):
        figures = [f"{data['units']:,}", f"{data['kept']:,}", f"{data['share']:.0%}"] if data["units"] else [""] * 3
        table.add_row(name, str(data["stage"]), *figures, _few(graph.successors(name)))
    out.print(table)
    if options.out:
        write_bytes(options.out, json.dumps(nx.node_link_data(graph, edges="edges"), indent=1).encode())
        out.print(f"written to {options.out}", markup=False, soft_wrap=True)


def _render(options: argparse.Namespace) -> None:
    render(_flow(options), options.out)
    out.print(f"written to {options.out}", markup=False, soft_wrap=True)


def _inspect(options: argparse.Namespace) -> None:
    masks = load(options.masks)
    out.print(repr(masks), markup=False, soft_wrap=True)
    for key, value in masks.provenance.items():
        out.print(f"  {key}: {value}", markup=False, soft_wrap=True)
    table = _table("task", "label >", "kept >", "nearest task", "similarity >")
    similarity = masks.jaccard().fill_diagonal_(-1)
    for row, (name, label) in enumerate(zip(masks.tasks, masks.labels, strict=True)):
        nearest = int(similarity[row].argmax())
        alone = len(masks) == 1
        near = ("", "") if alone else (masks.tasks[nearest], f"{similarity[row, nearest]:.2f}")
        table.add_row(name, str(label), f"{masks.kept()[row]:.0%}", *near)
    out.print(table)
    table = _table("site", "axis >", "units >", "kept by a task, mean >", "kept by any >", "kept by all >")
    for site in masks.sites:
        kept = masks[site.name] > 0.5
        shares = (kept.double().mean(), kept.any(0).double().mean(), kept.all(0).double().mean())
        table.add_row(site.name, str(site.axis), f"{site.units:,}", *(f"{share:.0%}" for share in shares))
    out.print(table)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _model(options: argparse.Namespace) -> nn.Module:
    if options.pretrained:
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()  # two lines for every try to reach it; the last error says all
    model = zoo.load_model(options.model, weights=options.weights, pretrained=options.pretrained)
    if options.weights is None and not options.pretrained and options.run is _learn:
        note = "nadhooks: note: the weights are random; pass --weights FILE or --pretrained for a trained model"
        err.print(note, soft_wrap=True)
    model = model.to(_device(options.device))
    if options.image_size is not None:
        zoo.set_image_size(model, options.image_size)
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the meta device has no numbers
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {name} cannot be used here: {_one_line(error)}") from error


def _chosen(options: argparse.Namespace) -> Sites:
    if len(options.sites) == 1 and options.sites[0] in SELECTORS:
        return SELECTORS[options.sites[0]]()
    return list(options.sites)


def _flow(options: argparse.Namespace) -> nx.DiGraph:
    masks, task = load(options.masks), options.task
    named = task is None or task in masks.tasks or not task.isdecimal()
    return flow_graph(masks, task if named else int(task))


def _from(masks: Masks, model: str, data: str) -> Masks:
    """With the names of the model and the data that a person typed, for the file and the pictures."""
    return masks.replaced(masks.values, provenance={**masks.provenance, "model": model, "data": data})


def _check_writable(path: Path) -> None:
    """Before the work, not after it."""
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a directory; name a file")
    if not os.access(path.parent, os.W_OK):
        what = "is not writable" if path.parent.is_dir() else "is not a directory"
        raise DataError(f"cannot write {path}: {path.parent} {what}")


def _show_recognition(model: nn.Module, masks: Masks, loader: object, seed: int) -> None:
    figures: list[list[Recognition]] = []
    with attach(
        model, masks.sites, tasks=dict(zip(masks.labels, masks.tasks, strict=True)), example=_first(loader, model)
    ) as gates:
        for text, measured in (
            ("measuring the full network", None),
            ("measuring the sub-architectures", masks),
            ("measuring random masks", shuffled(masks, seed)),
        ):
            with _bar(text) as update:
                figures.append(recognition(gates, loader, measured, progress=update))  # type: ignore[arg-type]
    table = _table("class", "network", "kept >", "recall >", "false pos. >", "AUC >", "false pos. at recall 95% >")
    names = ("full", "sub-architecture", "random mask")
    for rows in list(zip(*figures, strict=True))[:CLASSES_SHOWN]:
        for name, row in zip(names, rows, strict=True):
            table.add_row(row.task if name == "full" else "", name, *_figures([row]), end_section=name == names[-1])
    for name, measures in zip(names, figures, strict=True):
        table.add_row("mean" if name == "full" else "", name, *_figures(measures), style="bold")
    out.print(table)
    if len(masks) > CLASSES_SHOWN:
        out.print(f"… {len(masks) - CLASSES_SHOWN} more classes, which the mean includes")
    out.print(WARNING, style="dim")


def _figures(rows: Sequence[Recognition]) -> list[str]:
    means = [sum(getattr(row, key) for row in rows) / len(rows) for key in ("kept", "recall", "fpr", "auc", "fpr95")]
    return [f"{means[0]:.0%}", *(f"{mean:.3f}" for mean in means[1:])]


def _first(loader: object, model: nn.Module) -> torch.Tensor:
    device = next(p.device for p in model.parameters())
    return next(iter(loader))[0][:1].to(device)  # type: ignore[call-overload]


def _learning(update: Callable[[int, int], None]) -> Callable[[Learnt], None]:
    return lambda learnt: update(learnt.done, learnt.total)


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the screen, gone when done; `update(done, total)` moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


def _table(*headings: str) -> Table:
    """A table without lines; headings that end in ` >` head columns of figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        side: Literal["left", "right"] = "right" if heading.endswith(" >") else "left"
        # the names that rows are about stay whole, and what else is long folds
        table.add_column(heading.removesuffix(" >"), justify=side, overflow="fold", no_wrap=index == 0)
    return table


def _few(names: Iterable[str], shown: int = 2) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _as_options(text: str) -> str:
    """An error's arguments, such as axis=2, as the options of the command line."""
    text = re.sub(r"pass example=.*", "give the size by --image-size", text)  # other examples are for programs
    text = re.sub(r"(?<![\w,.])(axis|closed|keep|method|sites|tasks|weights)=(?=[\w\"'])", r"--\1 ", text)
    return re.sub(r"(?<![\w,.])(axis|closed|keep|method|sites|tasks|weights)=", r"--\1", text)


def _one_line(error: BaseException) -> str:
    text = str(error)
    if "\nOriginal Traceback" in text:  # from a process that loads images: what it raised is the last line
        text = text.strip().splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return text or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
