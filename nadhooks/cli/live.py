"""Commands that run a mask file's model: verify, units."""

from __future__ import annotations

import argparse
import math
import re
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from .. import zoo
from ..data import load_images
from ..errors import DataError, MaskFileError, ModelError
from ..evaluation import MEASURES, quality, recognition, verify
from ..evaluation.causality import told
from ..formats import PICTURES, TEXT, WIDTHS
from ..gates import attach
from ..identity import weights_of
from ..masks import Masks, load
from ..rendering import render
from ..units import NO_EDGES, unit_flow
from .models import (
    Command,
    check_writable,
    first,
    held_out,
    made_model,
    measuring,
    modelling,
    reading,
    transform_of,
)
from .printing import AT_LEAST_1, HEADINGS, bar, err, number, out, say, table, task_of


def add_commands(command: Command) -> None:
    sub = command("verify", _verify, "measure the quality that a mask file states again, on your data")
    sub.add_argument("masks", help="mask file")
    modelling(sub, chosen_by_file=True)
    reading(sub)
    measuring(sub)
    within = number(float, "a difference of at least 0", lambda difference: 0 <= difference < math.inf)
    sub.add_argument(
        "--within",
        type=within,
        default=0.02,
        metavar="D",
        help="fail if a measure's mean over the tasks differs by more from what the file states (default: %(default)s)",
    )

    sub = command("units", _units, "draw the flow of one class from unit to unit, on images of it")
    sub.add_argument("masks", help="mask file")
    modelling(sub, chosen_by_file=True)
    reading(sub)
    sub.add_argument("--task", required=True, help="name or label of the class")
    sub.add_argument("--images", type=AT_LEAST_1, default=8, metavar="N", help="held-out images of it (default: 8)")
    share = number(float, "a share above 0 and at most 1", lambda value: 0 < value <= 1)
    sub.add_argument(
        "--nodes", type=share, default=0.8, metavar="SHARE", help="of each site's |attribution| (default: 0.8)"
    )
    sub.add_argument("--edges", type=share, default=0.98, metavar="SHARE", help="of each unit's inflow (default: 0.98)")
    sub.add_argument("--prove", action="store_true", help="also close units of the live network: is the graph true?")
    sub.add_argument("--width", choices=list(WIDTHS), default="double", help="of a paper's column (default: double)")
    sub.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("units.svg"),
        help=f"{', '.join(PICTURES + TEXT)} (default: %(default)s)",
    )


def _verify(options: argparse.Namespace) -> None:
    masks = load(options.masks)
    stated = [measure for measure in MEASURES if measure in masks.quality]
    if not stated:
        raise MaskFileError(f"{options.masks} states no quality that could be measured again")
    model = _loaded(masks, options)
    test = held_out(options, transform_of(model, options), zoo.class_index_of(model))
    loader = DataLoader(test.dataset, batch_size=options.batch_size, num_workers=options.workers)
    by_label = dict(zip(masks.labels, masks.tasks, strict=True))
    with (
        attach(model, masks.sites, tasks=by_label, example=first(loader, model)) as gates,
        bar("measuring the sub-architectures") as update,
    ):
        found = quality(recognition(gates, loader, masks, progress=update))
    shown, failed = table("measure", "stated >", "found >", "difference >", "largest of a task >"), []
    for measure in stated:
        told = ~masks.quality[measure].isnan()  # not where it could not be measured then
        if not told.any():
            shown.add_row(HEADINGS[measure], "none", f"{float(found[measure].mean()):.3f}", "", "")
            continue
        difference = (found[measure] - masks.quality[measure]).where(told, torch.zeros(()))  # (tasks,)
        parts = (masks.quality[measure], found[measure], difference)
        means = [float(part[told].mean()) for part in parts]
        worst = int(difference.abs().argmax())
        shown.add_row(
            HEADINGS[measure],
            *(f"{mean:.3f}" for mean in means[:2]),
            f"{means[2]:+.3f}",
            f"{float(difference[worst]):+.3f} ({masks.tasks[worst]})",
        )
        if not abs(means[2]) <= options.within:  # NaN is no agreement either
            failed.append(HEADINGS[measure])
    out.print(shown)
    if failed:
        raise MaskFileError(f"the mean of {', '.join(failed)} is not within {options.within} of what the file states")
    say(f"as stated, within {options.within}, on {len(test):,} images of {options.data}")


def _units(options: argparse.Namespace) -> None:
    check_writable(options.out)
    masks = load(options.masks)
    row = masks.task_rows.row(task_of(masks, options.task))
    label, name = masks.labels[row], masks.tasks[row]
    model = _loaded(masks, options)
    test = load_images(options.data, "test", transform_of(model, options), zoo.class_index_of(model))
    mine = test.at(test.of(label)[: options.images])
    if not len(mine):
        raise DataError(f"{options.data} has no held-out images of {name}")
    loader = DataLoader(mine.dataset, batch_size=options.batch_size, num_workers=options.workers)
    shown = torch.cat([images for images, _ in loader]).to(next(model.parameters()).device)
    with bar(f"following the flow of {name}") as update, warnings.catch_warnings():
        warnings.filterwarnings("ignore", re.escape(NO_EDGES))  # which is said below
        graph = unit_flow(model, masks, name, shown, nodes=options.nodes, edges=options.edges, progress=update)
    render(graph, options.out, width=options.width)
    say(f"{graph.number_of_nodes():,} nodes, {graph.number_of_edges():,} edges, of {len(shown)} images")
    if not graph.number_of_edges():
        say(NO_EDGES)
    if options.prove:
        with err.status("closing units of the live network"):
            found = verify(model, masks, graph, shown)
        lines = table("what the graph says, beside", "rank correlation >", "Pearson >")
        for words, agreement in (
            ("the target, when an edge's source is closed", found.edges),
            ("the logit, when only the target sees that", found.paths),
            ("the logit, when a unit is closed", found.units),
        ):
            lines.add_row(words, told(agreement.spearman), told(agreement.pearson))
        out.print(lines)
        say(str(found.removal))
    say(f"written to {options.out}")


def _loaded(masks: Masks, options: argparse.Namespace) -> nn.Module:
    """The masks' model, with a word on whether its weights are those of the masks."""
    if options.model is None:
        options.model = str(masks.provenance.get("model", "nothing"))
        if not zoo.is_plain(options.model):  # what runs code is the user's to say; a script tells a class alone
            raise ModelError(
                f"{options.masks} says that its model is {options.model}, which is not made without being asked for; "
                f"name the model after the masks: timm:NAME, torchvision:NAME or file.py:factory"
            )
    with err.status("making the model"):
        model = made_model(options, runs=True)
    weights = {True: "the same", False: "others (expect other figures)", None: "unknown (expect other figures)"}[
        masks.provenance["weights"] == weights_of(model) if "weights" in masks.provenance else None
    ]
    say(f"weights of {options.model}: {weights}")
    return model
