"""`python -m nadhooks.zoo check`: what `attach` promises, on every model of timm and torchvision, a process each."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from . import coverage, model_names
from .check import REAL_BYTES, REAL_PARAMETERS, Finding
from .processes import each, examine, weigh

console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        console.print("stopped; a ledger (--report) is gone on with next time")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nadhooks.zoo", description="Gates on the models of two zoos.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    sub = commands.add_parser("check", help="check what attach promises on models of timm and torchvision")
    sub.set_defaults(run=_check)
    sub.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help="globs over names, as in 'timm:resnet*' or 'swin_*'"
    )
    sub.add_argument("--all", action="store_true", help="every model of both zoos (hours)")
    sub.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="models at a time (default: %(default)s)"
    )
    sub.add_argument(
        "--report", type=Path, metavar="FILE", help="ledger to append to; models that it holds are skipped"
    )
    sub.add_argument("--again", action="store_true", help="check models that the ledger holds again")
    sub = commands.add_parser("page", help="print the coverage page of a ledger, in Markdown")
    sub.set_defaults(run=_page)
    sub.add_argument("ledger", type=Path)
    return parser


def _page(options: argparse.Namespace) -> int:
    print(coverage.page(coverage.read(options.ledger)), end="")
    return 0


def _check(options: argparse.Namespace) -> int:
    files = model_names()
    chosen = [
        spec
        for spec in files
        if options.all
        or any(fnmatch.fnmatch(name, p) for p in options.patterns for name in (spec, spec.partition(":")[2]))
    ]
    if not chosen or options.workers < 1:
        console.print("nothing to do: pass PATTERN (as in 'timm:resnet*') or --all, and at least one worker")
        return 2
    rows = coverage.read(options.report) if options.report else []
    weights = {row["model"]: int(row["parameters"]) for row in rows if int(row["parameters"])}
    weights |= dict(each([spec for spec in chosen if spec not in weights], weigh, options.workers, "weighing"))
    lightest: dict[str, str] = {}
    for spec in sorted((spec for spec in weights if weights[spec] and spec in files), key=lambda spec: weights[spec]):
        lightest.setdefault(files[spec], spec)

    def is_lightest(spec: str) -> bool:
        return lightest.get(files[spec]) == spec

    def for_real(spec: str) -> bool:
        light = is_lightest(spec) and 4 * weights[spec] <= REAL_BYTES
        return weights[spec] > 0 and (weights[spec] <= REAL_PARAMETERS or light)

    held = set() if options.again else coverage.done(rows)
    on_meta = {row["model"] for row in coverage.newest(rows) if row["ran"] == "meta"}
    held -= {spec for spec in chosen if spec in on_meta and for_real(spec)}
    # one model of every file first, where what is wrong shows early, then the meta device, then small before large
    order = sorted(set(chosen) - held, key=lambda spec: (not is_lightest(spec), for_real(spec), weights[spec]))
    console.print(f"{len(chosen)} models, {len(chosen) - len(order)} of them in the ledger")
    failed = 0
    for _, findings in each(
        order, lambda spec: examine(spec, for_real(spec), is_lightest(spec), weights[spec]), options.workers, "checking"
    ):
        made = [coverage.row_of(finding) for finding in findings]
        failed += any(row["result"] == "failed" for row in made)
        if options.report:
            coverage.append(options.report, made)
        for finding, row in zip(findings, made, strict=True):
            if row["result"] == "failed" or not options.report:
                _say(finding, row["result"])
    console.print(f"{len(order) - failed} of {len(order)} models passed")
    return 1 if failed else 0


def _say(finding: Finding, result: str) -> None:
    found = [f"{name}: {text}" for name, text in finding.checks.items() if text != "ok"]
    text = "; ".join([*found, *([finding.reason] if finding.reason else [])])
    size = f"{finding.sites} sites, {finding.units:,} units, {finding.seconds:.1f} s, {finding.ran}"
    console.print(
        f"{result:9} {finding.model} {finding.granularity}: {size}{'; ' + text if text else ''}",
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
