"""Masks as a small HTML table, for notebooks."""

from __future__ import annotations

from html import escape
from typing import Any

from .scene import BLUE, FAINT, GREY

TASKS, SITES = 12, 60  # rows and bars; of more, the number is told


def masks_table(masks: Any) -> str:
    """What each task of `Masks` keeps of each site: a row for a task, a bar for a site, as high as the share kept."""
    shown = masks.sites[:SITES]
    head = f"<b>{escape(repr(masks))}</b>"
    kept = masks.kept().tolist()
    lines = []
    for row, (name, label) in enumerate(list(zip(masks.tasks, masks.labels, strict=True))[:TASKS]):
        shares = [float(masks.kept_units(site.name)[row].double().mean()) for site in shown]
        lines.append(
            f"<tr><td>{escape(name)}</td><td>{escape(str(label))}</td><td>{kept[row]:.0%}</td><td>{_bars(shares)}</td></tr>"
        )
    rest = [f"{len(masks) - TASKS:,} more tasks"] if len(masks) > TASKS else []
    rest += [f"{len(masks.sites) - SITES:,} more sites"] if len(masks.sites) > SITES else []
    names = f"{shown[0].name} … {shown[-1].name}" if len(shown) > 1 else shown[0].name
    columns = f"<tr><th>task</th><th>label</th><th>kept</th><th>kept of {escape(names)}</th></tr>"
    foot = f'<p style="color:{GREY}">and {", ".join(rest)}</p>' if rest else ""
    return f"<div>{head}<table>{columns}{''.join(lines)}</table>{foot}</div>"


def _bars(shares: list[float]) -> str:
    bars = "".join(
        f'<rect x="{6 * place}" y="0" width="5" height="16" fill="{FAINT}"/>'
        f'<rect x="{6 * place}" y="{16 - 16 * share:.1f}" width="5" height="{16 * share:.1f}" fill="{BLUE}"/>'
        for place, share in enumerate(shares)
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{6 * len(shares)}" height="16">{bars}</svg>'
