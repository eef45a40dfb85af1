"""Commands that make a mask file of a model: demo, sites, learn, convert."""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .. import demo, methods, zoo
from ..budgets import Budget
from ..data import BUILT_IN, load_images
from ..errors import DataError, MaskFileError, ModelError, NadhooksError
from ..evaluation import MEASURES, Recognition, quality, recognition, shuffled
from ..formats import authors
from ..gates import attach
from ..learning import CACHE_BYTES, learn
from ..masks import Masks, load
from ..progress import Report, csv_log, tensorboard_log
from ..sites import Sites, blocks, channels, heads, neurons
from ..tasks import Label, Tasks
from .printing import AT_LEAST_1, Update, bar, err, few, number, one_line, out, say, table

SELECTORS = {"blocks": blocks, "channels": channels, "neurons": neurons, "heads": heads}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
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


HEADINGS = {"recall": "recall", "fpr": "false pos.", "auc": "AUC", "fpr95": "false pos. at recall 95%"}
Command = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


def add_commands(command: Command) -> None:
    sub = command("demo", _demo, "train a small network on digits, learn its masks, write pictures")
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("demo"), help="folder for the results (default: %(default)s)"
    )
    _computing(sub)

    sub = command("sites", _sites, "list where gates would go in a model")
    modelling(sub)

    sub = command("learn", _learn, "learn a mask for each class of a data set")
    modelling(sub)
    reading(sub)
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("masks.safetensors"), help="mask file (default: %(default)s)"
    )
    sub.add_argument("--method", choices=list(methods.METHODS), default="contrastive", help="default: %(default)s")
    _learning_options(sub)
    sub.add_argument("--tasks", nargs="+", type=int, metavar="LABEL", help="only these output indices (default: all)")
    sub.add_argument("--no-test", action="store_true", help="skip the measurement on held-out images")

    sub = command("convert", _convert, "turn a folder of the NAD authors' checkpoints into a mask file")
    sub.add_argument("folder", type=Path, help="such as checkpoint/imagenet/resnet50, with a folder for each class")
    modelling(sub)
    sub.add_argument("--epoch", type=int, metavar="N", help="net_iterN.pth of each class (default: the last)")
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("masks.safetensors"), help="mask file (default: %(default)s)"
    )


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
    sub.add_argument("--closed", choices=["zero", "mean"], help="what a closed unit puts out (default: the method's)")
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


def _share_or_units(text: str) -> float | int:
    return int(text) if text.strip().isdecimal() else float(text)


def modelling(sub: argparse.ArgumentParser, chosen_by_file: bool = False) -> None:
    if chosen_by_file:
        sub.add_argument("model", nargs="?", help=f"{MODEL_HELP} (default: what the file says)")
    else:
        sub.add_argument("model", help=MODEL_HELP)
        sub.add_argument(
            "--sites",
            nargs="+",
            default=["blocks"],
            metavar="SITES",
            help=f"{', '.join(SELECTORS)}, or globs over module names such as 'layer?.*' (default: blocks)",
        )
        sub.add_argument("--axis", type=int, help="axis of the units, where it cannot be determined")
    weights = sub.add_mutually_exclusive_group()
    weights.add_argument("--weights", metavar="FILE", help="safetensors file or state_dict of the trained weights")
    weights.add_argument("--pretrained", action="store_true", help="the zoo's trained weights, from its hub")
    sub.add_argument(
        "--image-size", type=AT_LEAST_1, metavar="N", help="side of the model's input (default: what the model says)"
    )
    _computing(sub)


def reading(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--data", required=True, metavar="DATA", help=f"an ImageFolder directory, or {' or '.join(BUILT_IN)}"
    )
    sub.add_argument(
        "--batch-size", type=AT_LEAST_1, default=64, metavar="N", help="images per batch (default: %(default)s)"
    )
    workers = number(int, "a number of at least 0", lambda number: number >= 0)
    sub.add_argument("--workers", type=workers, default=0, metavar="N", help="processes that load images (default: 0)")


def _computing(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    seed = number(int, "a number from -2**63 to 2**64 - 1", lambda seed: -(2**63) <= seed < 2**64)  # torch's range
    sub.add_argument("--seed", type=seed, default=0, metavar="N", help="for everything random (default: %(default)s)")


def _demo(options: argparse.Namespace) -> None:
    begun = time.monotonic()
    device = _device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    check_writable(options.out / "masks.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small: on a busy machine two threads wait for each other ten times as long
    try:
        written = _run_demo(options, device)
    finally:
        torch.set_num_threads(threads)
    out.print(f"\n{len(written)} files in {options.out}/, in {time.monotonic() - begun:.0f} s:", markup=False)
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


def _sites(options: argparse.Namespace) -> None:
    with err.status("making the model and looking where gates would go"):
        model = made_model(options, runs=False)
        gates = attach(model, _chosen(options), axis=options.axis)
    with gates:
        shown = table("site", "class", "axis >", "units >", "parameters >", "fed by")
        total = sum(parameter.numel() for parameter in model.parameters())
        modules = dict(model.named_modules())
        for site in gates.sites:
            fed = few(gates.wiring.predecessors(site.name))
            kind = type(modules[site.module]).__name__
            share = f"{gates.parameters_behind.get(site.name, 0) / max(total, 1):.1%}"
            shown.add_row(site.name, kind, str(site.axis), f"{site.units:,}", share, fed)
        out.print(shown)
        units = sum(site.units for site in gates.sites)
        behind = sum(gates.parameters_behind.values())
        out.print(
            f"{len(gates.sites)} sites, {units:,} units, {behind / max(total, 1):.0%} of {total:,} parameters behind"
        )
        if gates.skipped:
            out.print(f"\nleft out, {len(gates.skipped)}:")
            for why in dict.fromkeys(gates.skipped.values()):
                names = [name for name, reason in gates.skipped.items() if reason == why]
                say(f"  {why}:\n    {few(names, 4)}")


def _learn(options: argparse.Namespace) -> None:
    check_writable(options.out)
    settings, logs = _settings(options), _logs(options.log)
    with err.status("making the model"):
        model = made_model(options, runs=True)
    transform = transform_of(model, options)
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
    with bar(f"learning masks for {len(labels)} classes") as update:
        masks = learn(
            model,
            loader,
            _chosen(options),
            tasks={label: train.names[label] for label in labels},
            progress=[_learning(update), *logs],
            **settings,
        )
    trained = options.weights or ("pretrained" if options.pretrained else "random")
    masks = _from(masks, options.model, options.data, classes, trained=trained)
    if isinstance(settings["start"], Masks):
        start = {"file": options.start, **masks.provenance["start"]}
        masks = masks.replaced(provenance={**masks.provenance, "start": start})
    masks.save(options.out)
    if test is not None:
        figures = _show_recognition(model, masks, DataLoader(test.dataset, **loading), options.seed)
        masks = _measured(masks, figures, options.data, len(test.dataset))  # type: ignore[arg-type]
        masks.save(options.out)
    say(f"{masks!r}\nwritten to {options.out}")


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


def _convert(options: argparse.Namespace) -> None:
    check_writable(options.out)
    classes = authors.read(options.folder, options.epoch)
    with err.status("making the model"):
        model = made_model(options, runs=False)
    with attach(model, _chosen(options), axis=options.axis) as gates:
        values = authors.by_site(classes, [(site.name, site.units) for site in gates.sites])
        known = {index: name for name, index in reversed(zoo.class_index_of(model).items())}
        named: dict[Label, str] = {label: known.get(label, str(label)) for label in classes}
        names = named if len(set(named.values())) == len(named) else list(classes)
        origin = {"method": "nad", "sites": gates.chosen_by, "converted": str(options.folder)}
        tasks = _with_wordnet(Tasks.of(names), zoo.class_index_of(model))
        masks = gates.masks_of(tasks, values, origin)
    masks = masks.replaced(provenance={**masks.provenance, "model": options.model})
    masks.save(options.out)
    say(f"{masks!r}\nwritten to {options.out}")


def made_model(options: argparse.Namespace, *, runs: bool) -> nn.Module:
    """The model that a person named; if it runs on images, random weights are worth a note."""
    if options.pretrained:
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()  # two lines for every try to reach it; the last error says all
    model = zoo.load_model(options.model, weights=options.weights, pretrained=options.pretrained)
    if runs and options.weights is None and not options.pretrained:
        note = "nadhooks: note: the weights are random; pass --weights FILE or --pretrained for a trained model"
        err.print(note, soft_wrap=True)
    model = model.to(_device(options.device))
    if options.image_size is not None:
        zoo.set_image_size(model, options.image_size)
    return model


def transform_of(model: nn.Module, options: argparse.Namespace) -> Callable[..., torch.Tensor]:
    if options.image_size is not None and zoo.own_transform(options.model):
        source = options.model.partition(":")[0]
        raise ModelError(f"the size of the images follows from `transform` in {source}; leave out --image-size")
    return zoo.transform_for(model, options.model)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the meta device has no numbers
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {name} cannot be used here: {one_line(error)}") from error


def _chosen(options: argparse.Namespace) -> Sites:
    if len(options.sites) == 1 and options.sites[0] in SELECTORS:
        return SELECTORS[options.sites[0]]()
    return list(options.sites)


def _from(masks: Masks, model: str, data: str, classes: Mapping[str, int], **trained: str) -> Masks:
    """With the names of the model and the data that a person typed, and the WordNet ids of ImageNet's classes.

    trained: the file of the weights, or "pretrained".
    """
    origin = {**masks.provenance, "model": model, "data": data, **trained}
    return masks.replaced(tasks=_with_wordnet(masks.task_rows, classes), provenance=origin)


def _with_wordnet(tasks: Tasks, classes: Mapping[str, int]) -> Tasks:
    wordnet: dict[object, str] = {index: name for name, index in classes.items() if re.fullmatch("n[0-9]{8}", name)}
    ids = tuple(wordnet.get(label, "") for label in tasks.labels)
    return replace(tasks, wordnet=ids if any(ids) else ())


def _measured(masks: Masks, figures: Sequence[Sequence[Recognition]], data: str, images: int) -> Masks:
    """With the quality of each task's sub-architecture, and the means of the full network and of random masks."""
    full, own, random = (quality(rows) for rows in figures)
    means = {
        name: {measure: round(float(values.mean()), 4) for measure, values in found.items()}
        for name, found in (("network", full), ("random", random))
    }
    origin = {**masks.provenance, "quality": {"data": data, "images": images, **means}}
    return masks.replaced(provenance=origin, quality=own)


def check_writable(path: Path) -> None:
    """Before the work, not after it."""
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a directory; name a file")
    if not os.access(path.parent, os.W_OK):
        what = "is not writable" if path.parent.is_dir() else "is not a directory"
        raise DataError(f"cannot write {path}: {path.parent} {what}")


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
    shown = table("class", "network", "kept >", "recall >", "false pos. >", "AUC >", "false pos. at recall 95% >")
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


def first(loader: object, model: nn.Module) -> torch.Tensor:
    device = next(p.device for p in model.parameters())
    return next(iter(loader))[0][:1].to(device)  # type: ignore[call-overload]


def _learning(update: Update) -> Report:
    return lambda learnt: update(learnt.done, learnt.total, f"loss {learnt.loss:.3g}, {learnt.kept:.0%} kept")
