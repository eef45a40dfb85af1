"""The ledger of `python -m nadhooks.zoo check`: a line for each model and granularity, and the page made from it."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .._version import __version__
from . import model_names, versions
from .check import CHECKS, GRANULARITIES, MAY_BE_ABSENT, Finding, few

VERSIONS = ("nadhooks", "torch", "timm", "torchvision")
COLUMNS = (
    *VERSIONS, "model", "granularity", "result", "parameters", "ran", "sites", "units", "left out", "edges", *CHECKS,
    "attach seconds", "seconds", "reason",
)  # fmt: skip

Row = Mapping[str, str]


def row_of(finding: Finding) -> dict[str, str]:
    attached = "attached" if finding.sites else "none"
    return {
        "nadhooks": __version__,
        **versions(),
        "model": finding.model,
        "granularity": finding.granularity,
        "result": attached if finding.passed else "failed",
        "parameters": str(finding.parameters),
        "ran": finding.ran,
        "sites": str(finding.sites),
        "units": str(finding.units),
        "left out": str(finding.left_out),
        "edges": str(finding.edges),
        **{check: finding.checks.get(check, "") for check in CHECKS},
        "attach seconds": f"{finding.attach_seconds:.2f}",
        "seconds": f"{finding.seconds:.1f}",
        "reason": finding.reason,
    }


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a ledger, [] where there is none yet; a last line that was cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("reason") is not None]


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds lines at once, so that a ledger that is being written to can be read and gone on with."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.writeheader()
    writer.writerows(rows)
    with path.open("a", newline="") as file:
        file.write(text.getvalue())


def done(rows: Iterable[Row]) -> set[str]:
    """The models of which a ledger holds every granularity at the installed versions."""
    installed = {"nadhooks": __version__, **versions()}
    held = defaultdict(set)
    for row in rows:
        if all(row[key] == value for key, value in installed.items()):
            held[row["model"]].add(row["granularity"])
    return {model for model, granularities in held.items() if granularities >= set(GRANULARITIES)}


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last line of each model and granularity, in the order of the zoos."""
    last = {(row["model"], row["granularity"]): row for row in rows}
    order = {spec: index for index, spec in enumerate(model_names())}
    return sorted(
        last.values(), key=lambda row: (order.get(row["model"], -1), list(GRANULARITIES).index(row["granularity"]))
    )


def _shortened(text: str) -> str:
    """At most 160 characters, without figures of one model."""
    text = re.sub(r"\d+( of \d+)? (passes|units|sites)", r"\2", re.sub(r"\d+ s\b", "too long", text)).replace("|", "/")
    return text if len(text) <= 160 else text[:159] + "…"


def page(rows: Sequence[Row]) -> str:
    """The coverage page in Markdown, from the newest lines of a ledger."""
    rows = newest(rows)
    files = model_names()
    models = {row["model"]: row for row in rows if row["granularity"] == "blocks"}
    attached = [row for row in models.values() if row["result"] == "attached"]
    real = [row for row in models.values() if row["ran"] != "meta"]
    failed = [row for row in rows if row["result"] == "failed"]
    seconds = sorted(float(row["attach seconds"]) for row in attached)
    last = rows[-1]
    lines = [
        "# Coverage",
        "",
        "Made from `docs/coverage.csv` by `python -m nadhooks.zoo page docs/coverage.csv`; the ledger is written by",
        "`python -m nadhooks.zoo check --all --report docs/coverage.csv`. What each check asks for stands in",
        "`nadhooks/zoo/check.py`.",
        "",
        f"timm {last['timm']}, torchvision {last['torchvision']}, torch {last['torch']}: "
        f"**{len(attached):,} of {len(files):,} models attached**; {len(real):,} ran for real with all checks, "
        f"{len(models) - len(real):,} on the meta device (attached, and the wiring sound).",
        "",
        f"Making a model, attaching to its blocks and wiring them took {seconds[len(seconds) // 2]:.1f} s on the",
        f"median model and {seconds[-1]:.1f} s on the slowest, on one thread of a shared machine.",
        "",
        "| granularity | attached | none in the network | failed | sites | units |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for granularity in GRANULARITIES:
        own = [row for row in rows if row["granularity"] == granularity]
        counts = [sum(row["result"] == result for row in own) for result in ("attached", "none", "failed")]
        sums = [sum(int(row[key]) for row in own) for key in ("sites", "units")]
        lines.append(f"| {granularity} | " + " | ".join(f"{n:,}" for n in (*counts, *sums)) + " |")
    lines += ["", "## Failed, or explained", ""]
    notes = defaultdict(list)
    for row in rows:
        absent = row["granularity"] in MAY_BE_ABSENT and row["result"] == "none"
        said = {check: row[check] for check in CHECKS if row[check] not in ("", "ok")}
        for check, text in ({} if absent else {"reason": row["reason"]} if row["reason"] else said).items():
            notes[row["granularity"], check, _shortened(text)].append(row["model"])
    lines += [] if failed else ["Nothing failed.", ""]
    lines += ["| granularity | check | found | models |", "| --- | --- | --- | --- |"] if notes else []
    for (granularity, check, text), names in notes.items():
        lines.append(f"| {granularity} | {check} | {text} | {few([f'`{name}`' for name in names], 4)} |")
    lines += [
        "",
        "## By model file",
        "",
        "| file | models | for real | meta | blocks | failed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    by_file = defaultdict(list)
    for name in models:
        by_file[files.get(name, "?")].append(name)
    bad = {row["model"] for row in failed}
    for file, names in sorted(by_file.items()):
        numbers = sorted(int(models[name]["sites"]) for name in names)
        ran = sum(models[name]["ran"] != "meta" for name in names)
        blocks = f"{numbers[0]} to {numbers[-1]}" if numbers[0] < numbers[-1] else str(numbers[0])
        wrong = sum(name in bad for name in names)
        lines.append(f"| {file} | {len(names)} | {ran} | {len(names) - ran} | {blocks} | {wrong or ''} |")
    return "\n".join(lines) + "\n"
