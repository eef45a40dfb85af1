"""Commands that look at a model, and what all commands share that need one: its options, the model, its images."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .. import zoo
from ..data import BUILT_IN, Images, Transform, load_images
from ..errors import DataError, ModelError
from ..formats import authors
from ..gates import attach
from ..sites import Sites, blocks, channels, heads, neurons
from ..tasks import Label, Tasks
from .printing import AT_LEAST_1, err, few, number, one_line, out, say, table

SELECTORS = {"blocks": blocks, "channels": channels, "neurons": neurons, "heads": heads}
MODEL_HELP = (
    "timm:NAME, torchvision:NAME or file.py:factory; keyword arguments may follow, "
    "as in timm:resnet18,num_classes=10,in_chans=1; for learning, file.py also holds a function `transform`, "
    "from a PIL image to a (channels, height, width) tensor"
)

Command = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


def add_commands(command: Command) -> None:
    sub = command("sites", _sites, "list where gates would go in a model")
    modelling(sub)

    sub = command("convert", _convert, "turn a folder of the NAD authors' checkpoints into a mask file")
    sub.add_argument("folder", type=Path, help="such as checkpoint/imagenet/resnet50, with a folder for each class")
    modelling(sub)
    sub.add_argument("--epoch", type=int, metavar="N", help="net_iterN.pth of each class (default: the last)")
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("masks.safetensors"), help="mask file (default: %(default)s)"
    )


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
    computing(sub)


def reading(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--data", required=True, metavar="DATA", help=f"an ImageFolder directory, or {' or '.join(BUILT_IN)}"
    )
    sub.add_argument(
        "--batch-size", type=AT_LEAST_1, default=64, metavar="N", help="images per batch (default: %(default)s)"
    )
    workers = number(int, "a number of at least 0", lambda number: number >= 0)
    sub.add_argument("--workers", type=workers, default=0, metavar="N", help="processes that load images (default: 0)")


def measuring(sub: argparse._ActionsContainer) -> None:
    help = "held-out images of each class to measure on, spread evenly over them (default: all)"
    sub.add_argument("--test-images", type=AT_LEAST_1, metavar="N", help=help)


def held_out(options: argparse.Namespace, transform: Transform, class_index: dict[str, int]) -> Images:
    images = load_images(options.data, "test", transform, class_index)
    return images if options.test_images is None else images.few(options.test_images)


def computing(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    seed = number(int, "a number from -2**63 to 2**64 - 1", lambda seed: -(2**63) <= seed < 2**64)  # torch's range
    sub.add_argument("--seed", type=seed, default=0, metavar="N", help="for everything random (default: %(default)s)")


def _sites(options: argparse.Namespace) -> None:
    with err.status("making the model and looking where gates would go"):
        model = made_model(options, runs=False)
        gates = attach(model, chosen_sites(options), axis=options.axis, example=example_of(model, options))
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


def _convert(options: argparse.Namespace) -> None:
    check_writable(options.out)
    classes = authors.read(options.folder, options.epoch)
    with err.status("making the model"):
        model = made_model(options, runs=False)
    example = example_of(model, options)
    with attach(model, chosen_sites(options), axis=options.axis, example=example) as gates:
        values = authors.by_site(classes, [(site.name, site.units) for site in gates.sites])
        known = {index: name for name, index in reversed(zoo.class_index_of(model).items())}
        named: dict[Label, str] = {label: known.get(label, str(label)) for label in classes}
        names = named if len(set(named.values())) == len(named) else list(classes)
        origin = {"method": "nad", "sites": gates.chosen_by, "converted": str(options.folder)}
        tasks = with_wordnet(Tasks.of(names), zoo.class_index_of(model))
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
    if runs and weights_of(options) == "random":
        note = "nadhooks: note: the weights are random; pass --weights FILE or --pretrained for a trained model"
        err.print(note, soft_wrap=True)
    elif runs and weights_of(options) == options.model:
        note = f"nadhooks: note: the weights are those that {options.model} gives; pass --weights FILE if it loads none"
        err.print(note, soft_wrap=True)
    model = model.to(device_of(options.device))
    if options.image_size is not None:
        zoo.set_image_size(model, options.image_size)
    return model


def weights_of(options: argparse.Namespace) -> str:
    """Where a model's weights are from: a file, "pretrained", what makes the model, or "random"."""
    made = options.model if options.model.partition(":")[0].endswith(".py") else "random"
    return options.weights or ("pretrained" if options.pretrained else made)


def transform_of(model: nn.Module, options: argparse.Namespace) -> Callable[..., torch.Tensor]:
    if options.image_size is not None and zoo.own_transform(options.model):
        source = options.model.partition(":")[0]
        raise ModelError(f"the size of the images follows from `transform` in {source}; leave out --image-size")
    return zoo.transform_for(model, options.model)


def example_of(model: nn.Module, options: argparse.Namespace) -> torch.Tensor | None:
    """A sample for a dry run without data, by a file's own `transform` if that makes all images one size; else None."""
    transform = zoo.own_transform(options.model)
    if transform is None or hasattr(model, "pretrained_cfg"):  # which says the size, also that of --image-size
        return None
    from PIL import Image

    try:
        one, other = (transform(Image.new("RGB", size)) for size in ((300, 200), (400, 500)))
    except Exception:  # it is the user's program, and may want other images than these
        return None
    alike = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape
    return one[None].to(device_of(options.device)) if alike else None


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the meta device has no numbers
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {name} cannot be used here: {one_line(error)}") from error


def chosen_sites(options: argparse.Namespace) -> Sites:
    if len(options.sites) == 1 and options.sites[0] in SELECTORS:
        return SELECTORS[options.sites[0]]()
    return list(options.sites)


def with_wordnet(tasks: Tasks, classes: Mapping[str, int]) -> Tasks:
    """With the WordNet ids of the tasks that are ImageNet's classes by name too: others may have as many outputs."""
    wordnet: dict[object, str] = {index: name for name, index in classes.items() if re.fullmatch("n[0-9]{8}", name)}
    named = zip(tasks.labels, tasks.names, strict=True)
    ids = tuple(wordnet.get(label, "") if classes.get(name) == label else "" for label, name in named)
    return replace(tasks, wordnet=ids if any(ids) else ())


def check_writable(path: Path) -> None:
    """Before the work, not after it."""
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a directory; name a file")
    if not os.access(path.parent, os.W_OK):
        what = "is not writable" if path.parent.is_dir() else "is not a directory"
        raise DataError(f"cannot write {path}: {path.parent} {what}")


def first(loader: object, model: nn.Module) -> torch.Tensor:
    device = next(p.device for p in model.parameters())
    return next(iter(loader))[0][:1].to(device)  # type: ignore[call-overload]
