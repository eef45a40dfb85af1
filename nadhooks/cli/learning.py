"""Commands that learn: demo, learn."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.data import DataLoader

from .. import demo, methods, zoo
from ..budgets import Budget
from ..checkpoints import held
from ..data import load_images
from ..errors import DataError, MaskFileError, NadhooksError
from ..evaluation import MEASURES, Recognition, quality, recognition, shuffled
from ..gates import attach
from ..gating import Closed
from ..learning import CACHE_BYTES, learn
from ..masks import Masks, load
from ..progress import Report, csv_log, tensorboard_log
from ..sampling import POOL_BYTES
from .models import (
    Command,
    check_writable,
    chosen_sites,
    computing,
    device_of,
    first,
    held_out,
    made_model,
    measuring,
    modelling,
    reading,
    transform_of,
    weights_of,
    with_wordnet,
)
from .printing import AT_LEAST_1, HEADINGS, Update, bar, err, number, out, say, table

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
WARNING = (
    "Recall alone proves nothing: a sub-architecture that answers its class to everything has recall 1 and a "
    "false-positive rate of 1. Compare all four figures with the full network's and with the random mask's."
)
CLASSES_SHOWN = 20
MANY = 500_000  # passes: minutes on a GPU, hours on a CPU


def add_commands(command: Command) -> None:
    sub = command("demo", _demo, "train a small network on digits, learn its masks, write pictures")
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("demo"), help="folder for the results (default: %(default)s)"
    )
    computing(sub)

    sub = command("learn", _learn, "learn a mask for each class of a data set")
    modelling(sub)
    reading(sub)
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("masks.safetensors"), help="mask file (default: %(default)s)"
    )
    sub.add_argument("--method", choices=list(methods.METHODS), default="contrastive", help="default: %(default)s")
    _learning_options(sub)
    sub.add_argument(
        "--tasks",
        nargs="+",
        action="extend",
        type=int,
        metavar="LABEL",
        help="only these output indices (default: all)",
    )
    tested = sub.add_mutually_exclusive_group()
    measuring(tested)
    tested.add_argument("--no-test", action="store_true", help="skip the measurement on held-out images")


def _learning_options(sub: argparse.ArgumentParser) -> None:
    """How to learn: as the arguments of `learn`, which also says what fits what."""
    fits = "a share above 0 and at most 1, or a whole number of units"
    keep = number(_share_or_units, fits, lambda keep: keep >= 1 if isinstance(keep, int) else 0 < keep <= 1)
    sub.add_argument("--keep", type=keep, metavar="K", help=f"{fits} (default: 0.55; not for nad)")
    sub.add_argument(
        "--keep-over", choices=["network", "site"], help="the best units of all (default), or of each site"
    )
    shares = ["units", "parameters", "flops"]
    sub.add_argument("--keep-by", choices=shares, help="what --keep is a share of (default: units)")
    bound = number(float, "a divergence above 0", lambda bound: 0 < bound < math.inf)
    help = "instead of --keep: as little as keeps the held-out divergence from the full network, in nats, at most D"
    sub.add_argument("--fidelity", type=bound, metavar="D", help=help)
    sub.add_argument("--closed", choices=get_args(Closed), help="what a closed unit puts out (default: the method's)")
    weight = number(float, "a weight of at least 0", lambda beta: 0 <= beta < math.inf)
    nad = methods.nad().options
    sub.add_argument("--beta", type=weight, help=f"nad only: weight of the penalty (default: {nad['beta']})")
    sub.add_argument(
        "--epochs", type=AT_LEAST_1, metavar="N", help=f"nad only: times through the data (default: {nad['epochs']})"
    )
    sub.add_argument(
        "--start", metavar="METHOD", help="method, such as taylor, or mask file that first scores are from"
    )
    sub.add_argument("--checkpoint", metavar="FILE", help="how far the run is; the same command goes on from there")
    seconds = number(float, "a number of seconds of at least 0", lambda seconds: 0 <= seconds < math.inf)
    sub.add_argument("--every", type=seconds, metavar="SECONDS", help="between checkpoints (default: 60)")
    sub.add_argument("--log", metavar="LOG", help="figures of each step: FILE.csv, or a folder for TensorBoard")
    sub.add_argument(
        "--precision", choices=list(PRECISIONS), default="float32", help="to compute in (default: %(default)s)"
    )
    size = number(int, "a number of at least 0", lambda size: size >= 0)
    sub.add_argument(
        "--cache", type=size, metavar="MB", default=CACHE_BYTES // 2**20,
        help="memory for the full network's answers (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--memory", type=size, metavar="MB", default=POOL_BYTES // 2**20,
        help="for the images that are learnt from; with too little they are fewer of each class (default: %(default)s)",
    )  # fmt: skip


def _share_or_units(text: str) -> float | int:
    return int(text) if text.strip().isdecimal() else float(text)


def _demo(options: argparse.Namespace) -> None:
    begun = time.monotonic()
    device = device_of(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    check_writable(options.out / "masks.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small: on a busy machine two threads wait for each other ten times as long
    try:
        written = _run_demo(options, device)
    finally:
        torch.set_num_threads(threads)
    out.print(f"\n{len(written)} files in {options.out}/, in {time.monotonic() - begun:.0f} s:")
    for path in (written[0], *written[-3:], written[1]):
        say(f"  {path}")
    say(f"  … and one picture for each class. Next: nadhooks inspect {written[0]}")


def _run_demo(options: argparse.Namespace, device: torch.device) -> list[Path]:
    train, test = demo.digits()
    with bar("training a ResNet on digits") as update:
        model = demo.trained_model(train, options.seed, update).to(device)
    with bar("learning masks for ten classes") as update:
        masks = learn(model, train, demo.SITES, seed=options.seed, progress=_learning(update))
    masks = _from(masks, demo.MODEL, "digits", {})
    figures = _show_recognition(model, masks, test, options.seed)
    masks = _measured(masks, figures, "digits", sum(len(labels) for _, labels in test))
    return demo.write_results(options.out, masks)


def _learn(options: argparse.Namespace) -> None:
    with held(options.checkpoint) as options.checkpoint:  # until all is written
        _run_learn(options)


def _run_learn(options: argparse.Namespace) -> None:
    check_writable(options.out)
    settings, logs = _settings(options), _logs(options.log)
    with err.status("making the model"):
        model = made_model(options, runs=True)
    transform = transform_of(model, options)
    classes = zoo.class_index_of(model)
    train = load_images(options.data, "train", transform, classes)
    test = None if options.no_test else held_out(options, transform, classes)
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
    passes = 0 if test is None else 2 * len(labels) * len(test)  # of each class's units, and of as many random ones
    if passes > MANY:
        told = f"measuring will take {passes:,} forward passes; --test-images N takes fewer images, --no-test none"
        err.print(told, soft_wrap=True)
    with bar(f"learning masks for {len(labels)} classes") as update:
        masks = learn(
            model,
            loader,
            chosen_sites(options),
            tasks={label: train.names[label] for label in labels},
            progress=[_learning(update), *logs],
            **settings,
        )
    masks = _from(masks, options.model, options.data, classes, trained=weights_of(options))
    if isinstance(settings["start"], Masks):
        start = {"file": options.start, **masks.provenance["start"]}
        masks = masks.replaced(provenance={**masks.provenance, "start": start})
    _save(masks, options.out)
    if test is not None:
        figures = _show_recognition(model, masks, DataLoader(test.dataset, **loading), options.seed)
        masks = _measured(masks, figures, options.data, len(test))
        masks.save(options.out)
    say(f"{masks!r}\nwritten to {options.out}")


def _save(masks: Masks, path: Path) -> None:
    """There, or what took long to learn would be lost, among the system's temporary files."""
    try:
        masks.save(path)
    except MaskFileError as error:
        handle, elsewhere = tempfile.mkstemp(prefix="nadhooks-", suffix=".safetensors")
        os.close(handle)
        masks.save(elsewhere)
        raise DataError(f"{error}; the masks are in {elsewhere}") from error


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What `learn` is told beside model, data and tasks."""
    for_nad = {key: getattr(options, key) for key in ("beta", "epochs") if getattr(options, key) is not None}
    if for_nad and options.method != "nad":
        raise NadhooksError(f"--{next(iter(for_nad))} is an option of --method nad, got --method {options.method}")
    of_keep = {key: getattr(options, f"keep_{key}") for key in ("over", "by") if getattr(options, f"keep_{key}")}
    if of_keep and options.keep is None:
        raise NadhooksError(f"--keep-{next(iter(of_keep))} says what --keep means; pass --keep, too")
    if options.every is not None and options.checkpoint is None:
        raise NadhooksError("--every says how often --checkpoint is written; pass --checkpoint FILE, too")
    return {
        "method": methods.nad(**for_nad) if options.method == "nad" else options.method,
        "keep": Budget(options.keep, **of_keep) if of_keep else options.keep,
        "fidelity": options.fidelity,
        "closed": options.closed,
        "start": _start(options.start),
        "axis": options.axis,
        "seed": options.seed,
        "autocast": PRECISIONS[options.precision],
        "cache": options.cache * 2**20,
        "memory": options.memory * 2**20,
        "checkpoint": options.checkpoint,
        **({} if options.every is None else {"every": options.every}),
    }


def _start(text: str | None) -> str | Masks | None:
    if text is None or text in methods.METHODS:
        return text
    try:
        return load(text)
    except MaskFileError as error:
        raise NadhooksError(f"--start: expected {', '.join(methods.METHODS)} or a mask file; {error}") from error


def _logs(path: str | None) -> list[Report]:
    if path is None:
        return []
    return [csv_log(path) if path.endswith(".csv") else tensorboard_log(path)]


def _learning(update: Update) -> Report:
    return lambda learnt: update(learnt.done, learnt.total, f"loss {learnt.loss:.3g}, {learnt.kept:.0%} kept")


def _from(masks: Masks, model: str, data: str, classes: Mapping[str, int], **trained: str) -> Masks:
    """With the names of the model and the data that a person typed, and the WordNet ids of ImageNet's classes.

    trained: where the weights are from.
    """
    origin = {**masks.provenance, "model": model, "data": data, **trained}
    return masks.replaced(tasks=with_wordnet(masks.task_rows, classes), provenance=origin)


def _measured(masks: Masks, figures: Sequence[Sequence[Recognition]], data: str, images: int) -> Masks:
    """With the quality of each task's sub-architecture, and the means of the full network and of random masks."""
    full, own, random = (quality(rows) for rows in figures)
    means = {
        name: {measure: round(float(values.mean()), 4) for measure, values in found.items()}
        for name, found in (("network", full), ("random", random))
    }
    origin = {**masks.provenance, "quality": {"data": data, "images": images, **means}}
    return masks.replaced(provenance=origin, quality=own)


def _show_recognition(
    model: nn.Module, masks: Masks, loader: object, seed: int
) -> tuple[list[Recognition], list[Recognition], list[Recognition]]:
    """Prints and returns the figures of the full network, the sub-architectures and random masks."""
    figures: list[list[Recognition]] = []
    with attach(
        model, masks.sites, tasks=dict(zip(masks.labels, masks.tasks, strict=True)), example=first(loader, model)
    ) as gates:
        for text, measured in (
            ("measuring the full network", None),
            ("measuring the sub-architectures", masks),
            ("measuring random masks", shuffled(masks, seed)),
        ):
            with bar(text) as update:
                figures.append(recognition(gates, loader, measured, progress=update))  # type: ignore[arg-type]
    shown = table("class", "network", "kept >", *(f"{HEADINGS[measure]} >" for measure in MEASURES))
    names = ("full", "sub-architecture", "random mask")
    for rows in list(zip(*figures, strict=True))[:CLASSES_SHOWN]:
        for name, row in zip(names, rows, strict=True):
            shown.add_row(row.task if name == "full" else "", name, *_figures([row]), end_section=name == names[-1])
    for name, measures in zip(names, figures, strict=True):
        shown.add_row("mean" if name == "full" else "", name, *_figures(measures), style="bold")
    out.print(shown)
    if len(masks) > CLASSES_SHOWN:
        out.print(f"… {len(masks) - CLASSES_SHOWN} more classes, which the mean includes")
    out.print(WARNING, style="dim")
    return figures[0], figures[1], figures[2]


def _figures(rows: Sequence[Recognition]) -> list[str]:
    means = [sum(getattr(row, key) for row in rows) / len(rows) for key in ("kept", *MEASURES)]
    return [f"{means[0]:.0%}", *(f"{mean:.3f}" for mean in means[1:])]
