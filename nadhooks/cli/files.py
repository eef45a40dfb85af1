"""Commands on mask files alone: inspect, graph, render, select, merge, diff, push."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import networkx as nx
import torch

from ..analysis import pairs_overlap
from ..collapsing import SITES, collapse
from ..errors import TaskError
from ..flow import flow_graph
from ..formats import PICTURES, TEXT, WIDTHS, hub
from ..formats.data import DATA_WRITERS
from ..formats.words import called, headline
from ..masks import Masks, load, merge
from ..rendering import render
from .models import Command, check_writable
from .printing import AT_LEAST_1, HEADINGS, few, out, say, table, task_of

TASKS_SHOWN = 20


def add_commands(command: Command) -> None:
    sub = command("graph", _graph, "build the information-flow graph of a mask file and show it as a table")
    _choosing(sub)
    formats = ", ".join(DATA_WRITERS)
    sub.add_argument("-o", "--out", type=Path, help=f"also write it for other programs: {formats}")

    sub = command("render", _render, "draw the information-flow graph of a mask file")
    _choosing(sub)
    sub.add_argument("--width", choices=list(WIDTHS), default="double", help="of a paper's column (default: double)")
    help = f"sites whose names begin alike as one, for large networks: at most N (default: {SITES})"
    sub.add_argument("--collapse", nargs="?", type=AT_LEAST_1, const=SITES, metavar="N", help=help)
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("flow.svg"), help=f"{', '.join(PICTURES + TEXT)} (default: %(default)s)"
    )

    sub = command("inspect", _inspect, "show what a mask file holds")
    sub.add_argument("masks", help="mask file")
    sub.add_argument("--json", action="store_true", help="print everything but the gates as JSON")
    sub.add_argument(
        "--rows", type=AT_LEAST_1, default=TASKS_SHOWN, metavar="N", help="tasks to show (default: %(default)s)"
    )

    sub = command("select", _select, "write some tasks of a mask file to a file of their own")
    sub.add_argument("masks", help="mask file")
    sub.add_argument("tasks", nargs="+", metavar="TASK", help="names or labels, in the order that they shall have")
    sub.add_argument("-o", "--out", type=Path, required=True, help="mask file to write")

    sub = command("merge", _merge, "join the tasks of several mask files of one model in one file")
    sub.add_argument("masks", nargs="+", help="mask files")
    sub.add_argument("-o", "--out", type=Path, required=True, help="mask file to write")

    text = "compare two mask files (tasks, origin, which units they keep), or two tasks of one file site by site"
    sub = command("diff", _diff, text)
    sub.add_argument("masks", nargs="+", help="two mask files, or one with --task")
    sub.add_argument("--task", nargs=2, metavar="TASK", help="names or labels of two tasks of the one file")
    sub.add_argument(
        "--rows", type=AT_LEAST_1, default=TASKS_SHOWN, metavar="N", help="tasks to show (default: %(default)s)"
    )

    sub = command("push", _push, "publish a mask file, a model card and pictures on the Hugging Face Hub")
    sub.add_argument("masks", help="mask file")
    sub.add_argument("repo", help="org/name; it is made where there is none")
    sub.add_argument("--file", default=hub.FILE, metavar="NAME", help="the file's name there (default: %(default)s)")
    sub.add_argument("--license", metavar="ID", help="of the masks, such as cc-by-4.0; only their publisher knows it")
    sub.add_argument("--base-model", metavar="ORG/NAME", help="the network's repository (default: timm's, if it is)")
    sub.add_argument("--private", action="store_true", default=None, help="for a new repository")
    sub.add_argument("--create-pr", action="store_true", help="propose it as a pull request")
    sub.add_argument("--revision", metavar="BRANCH", help="an existing branch (default: main)")
    sub.add_argument("--message", help="of the commit")
    sub.add_argument("--no-card", action="store_true", help="leave the README and the pictures there as they are")


def _choosing(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("masks", help="mask file")
    sub.add_argument(
        "--task",
        nargs="+",
        action="extend",
        metavar="TASK",
        help="names or labels of tasks (default: all over each other)",
    )
    sub.add_argument(
        "--combine",
        choices=["union", "intersection", "difference"],
        default="union",
        help="of several tasks: units that one keeps, that all keep, that the first alone keeps (default: union)",
    )
    sub.add_argument("--joins", action="store_true", help="joins (sums, concatenations, …) as nodes of their own")


def _graph(options: argparse.Namespace) -> None:
    if options.out:
        check_writable(options.out)
    graph = _flow(options)
    shown = table("site", "stage >", "units >", "kept >", "share >", "feeds")
    for name, data in graph.nodes(data=True):
        figures = [f"{data['units']:,}", f"{data['kept']:,}", f"{data['share']:.0%}"] if data["units"] else [""] * 3
        shown.add_row(name, str(data["stage"]), *figures, few(graph.successors(name)))
    say(headline(graph))
    out.print(shown)
    if options.out:
        render(graph, options.out)
        say(f"written to {options.out}")


def _render(options: argparse.Namespace) -> None:
    whole = options.task is None and options.combine == "union" and not options.joins and not options.collapse
    if whole:
        render(load(options.masks), options.out, width=options.width)  # a page holds every task alone, too
    else:
        graph = collapse(_flow(options), options.collapse) if options.collapse else _flow(options)
        render(graph, options.out, width=options.width)
    say(f"written to {options.out}")


def _inspect(options: argparse.Namespace) -> None:
    masks = load(options.masks)
    if options.json:
        out.print(json.dumps(_described(masks), indent=1, ensure_ascii=False), soft_wrap=True)
        return
    say(repr(masks))
    for key, value in masks.provenance.items():
        if key != "parameters_behind":
            say(f"  {key}: {_told(key, value)}")
    similarity, kept = masks.jaccard().fill_diagonal_(-1), masks.kept()
    measures = [measure for measure in HEADINGS if measure in masks.quality]
    wordnet = ["WordNet"] if masks.task_rows.wordnet else []
    headings = [f"{HEADINGS[measure]} >" for measure in measures]
    shown = table("task", "label >", *wordnet, "kept >", *headings, "nearest task", "similarity >")
    for row, (name, label) in list(enumerate(zip(masks.tasks, masks.labels, strict=True)))[: options.rows]:
        nearest = int(similarity[row].argmax())
        near = ("", "") if len(masks) == 1 else (masks.tasks[nearest], f"{similarity[row, nearest]:.2f}")
        figures = [f"{float(masks.quality[measure][row]):.3f}" for measure in measures]
        shown.add_row(
            name, str(label), *([masks.task_rows.wordnet[row]] if wordnet else []), f"{kept[row]:.0%}", *figures, *near
        )
    if len(masks) > 1:
        figures = [f"{float(masks.quality[measure].nanmean()):.3f}" for measure in measures]
        shown.add_row("mean", "", *wordnet and [""], f"{kept.mean():.0%}", *figures, "", "", style="bold")
    out.print(shown)
    _say_more(len(masks), options.rows)
    shown = table("site", "axis >", "units >", "kept by a task, mean >", "kept by any >", "kept by all >", "fed by")
    for site in masks.sites:
        bits = masks.kept_units(site.name)
        shares = (bits.double().mean(), bits.any(0).double().mean(), bits.all(0).double().mean())
        fed = few(masks.wiring.predecessors(site.name))
        shown.add_row(site.name, str(site.axis), f"{site.units:,}", *(f"{share:.0%}" for share in shares), fed)
    out.print(shown)


def _told(key: str, value: Any) -> str:
    """What provenance says under a key, in a line."""
    if key == "curve" and isinstance(value, dict) and isinstance(value.get("keep"), list):
        return f"{len(value['keep'])} points, each a share and the divergence it gives, for every task (--json)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:199] + "…"


def _described(masks: Masks) -> dict[str, Any]:
    """Everything that a file holds but the gates, and how much they keep; for programs."""
    kept = masks.kept()
    tasks = []
    for row, (label, name) in enumerate(zip(masks.labels, masks.tasks, strict=True)):
        task: dict[str, Any] = {"label": label, "name": name, "kept": round(float(kept[row]), 6)}
        if masks.task_rows.wordnet:
            task["wordnet"] = masks.task_rows.wordnet[row]
        measured = {measure: float(values[row]) for measure, values in masks.quality.items()}
        tasks.append(task | {measure: value if math.isfinite(value) else None for measure, value in measured.items()})
    sites = [
        {"name": site.name, "module": site.module, "axis": site.axis, "units": site.units, "block": site.block}
        | {"side": site.side, "leaf": site.leaf, "alternating": site.alternating}
        | {"kept": round(float(masks.kept_units(site.name).double().mean()), 6)}
        for site in masks.sites
    ]
    wiring = [{"source": u, "target": v, **data} for u, v, data in masks.wiring.edges(data=True)]
    origin = dict(masks.provenance)
    return {"closed": masks.closed, "tasks": tasks, "sites": sites, "wiring": wiring, "provenance": origin}


def _select(options: argparse.Namespace) -> None:
    masks = load(options.masks)
    _save(masks.select([task_of(masks, task) for task in options.tasks]), options.out)


def _merge(options: argparse.Namespace) -> None:
    _save(merge([load(path) for path in options.masks]), options.out)


def _diff(options: argparse.Namespace) -> None:
    if len(options.masks) != (1 if options.task else 2):
        raise TaskError(f"expected two mask files, or one and --task with two of its tasks, got {len(options.masks)}")
    if options.task:
        _diff_tasks(options)
    else:
        _diff_files(options)


def _diff_tasks(options: argparse.Namespace) -> None:
    """Where two tasks of a file part."""
    masks = load(options.masks[0])
    both = masks.select([task_of(masks, task) for task in options.task])
    say(f"{options.masks[0]}: {both!r}")
    first, second = map(called, both.tasks)
    shown = table("site", "units >", f"kept by {first} >", f"by {second} >", "by both >", "Jaccard >", "by chance >")
    found = []
    for site in both.sites:
        kept = both.kept_units(site.name)  # (2, units)
        found.append([site.units, *kept.sum(1).tolist(), int(kept.all(0).sum()), *pairs_overlap(kept)])
        shown.add_row(site.name, *(f"{number:,}" for number in found[-1][:4]), *(f"{x:.3f}" for x in found[-1][4:]))
    sums = [sum(column) for column in zip(*found, strict=True)]
    means = (f"{total / len(found):.3f}" for total in sums[4:])
    shown.add_row("sum, mean", *(f"{number:,}" for number in sums[:4]), *means, style="bold")
    out.print(shown)


def _diff_files(options: argparse.Namespace) -> None:
    a, b = (load(path) for path in options.masks)
    shared = [label for label in a.labels if label in set(b.labels)]
    for masks, other, path in ((a, b, options.masks[0]), (b, a, options.masks[1])):
        alone = [name for label, name in zip(masks.labels, masks.tasks, strict=True) if label not in set(other.labels)]
        say(f"{path}: {masks!r}" + (f"\n  tasks only here: {few(alone, 8)}" if alone else ""))
    for key in sorted({*a.provenance, *b.provenance} - {"parameters_behind"}):
        if a.provenance.get(key) != b.provenance.get(key):
            say(f"  {key}: " + " | ".join(_told(key, each.provenance.get(key, "(none)")) for each in (a, b)))
    if a == b:
        say("the same tasks, sites, wiring, gates and closed values")
        return
    if not shared:
        raise TaskError("the files have no task in common, by label, whose units could be compared")
    a, b = a.select(shared), b.select(shared)
    agreement = a.agreement(b)
    shown = table("site", "units >", "kept by a task, first >", "second >", "Jaccard, mean over tasks >")
    for site in a.sites:
        theirs = next((each for each in b.sites if each.name == site.name), None)
        units = (
            f"{site.units:,}" if theirs is None or theirs.units == site.units else f"{site.units:,} | {theirs.units:,}"
        )
        keeps = [
            f"{each.kept_units(site.name).double().mean():.0%}" if site.name in each.values else "" for each in (a, b)
        ]
        same = f"{float(agreement[site.name].mean()):.3f}" if site.name in agreement else ""
        shown.add_row(site.name, units, *keeps, same)
    for site in b.sites:
        if site.name not in a.values:
            shown.add_row(site.name, f"{site.units:,}", "", f"{b.kept_units(site.name).double().mean():.0%}", "")
    out.print(shown)
    if agreement:
        mean = torch.stack(list(agreement.values())).mean(0)  # (tasks,)
        shown = table("task", "kept, first >", "second >", "Jaccard, mean over sites >")
        for row in mean.argsort()[: options.rows].tolist():
            name = " | ".join(dict.fromkeys((a.tasks[row], b.tasks[row])))  # of one label, but perhaps of two names
            shown.add_row(name, f"{a.kept()[row]:.0%}", f"{b.kept()[row]:.0%}", f"{float(mean[row]):.3f}")
        shown.add_row(
            "mean", f"{a.kept().mean():.0%}", f"{b.kept().mean():.0%}", f"{float(mean.mean()):.3f}", style="bold"
        )
        out.print(shown)
        _say_more(len(shared), options.rows)


def _push(options: argparse.Namespace) -> None:
    names = ("file", "license", "base_model", "private", "create_pr", "revision", "message")
    choices = {name: getattr(options, name) for name in names}
    card = "" if options.no_card else None
    say(f"published: nadhooks.load({load(options.masks).push_to_hub(options.repo, card=card, **choices)!r})")


def _save(masks: Masks, path: Path) -> None:
    masks.save(path)
    say(f"{masks!r}\nwritten to {path}")


def _say_more(tasks: int, rows: int) -> None:
    if tasks > rows:
        say(f"… {tasks - rows} more tasks, which the mean includes (--rows {tasks})")


def _flow(options: argparse.Namespace) -> nx.DiGraph:
    masks = load(options.masks)
    tasks = None if options.task is None else [task_of(masks, task) for task in options.task]
    return flow_graph(masks, tasks, combine=options.combine, joins=options.joins)
