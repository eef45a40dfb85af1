"""How fast pictures and pages of large graphs are: `python -m tests.benchmarks.pages`. Needs Chromium."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import networkx as nx
import torch

import nadhooks
from nadhooks.masks import Masks
from nadhooks.sites import Site
from nadhooks.tasks import Tasks
from tests.browser import act
from tests.graphs import chain, unit_graph

TIMED = """
const timed = (name, change) => {
  const begun = performance.now();
  change();
  svg.getBoundingClientRect();
  found[name] = Math.round(performance.now() - begun);
};
found.load = Math.round(performance.now());
if (!unitLevel) {
  timed("class", () => { set("mode", "one"); set("first", String(tasks.length - 1)); });
  timed("two classes", () => set("mode", "over"));
  timed("all classes", () => set("mode", "all"));
}
timed("threshold", () => type("threshold", "20"));
timed("search", () => type("search", "layer"));
timed("key", () => key("ArrowDown", svg));
timed("zoom", () => key("+", svg));
"""


def resnet50_masks(tasks: int) -> Masks:
    """Random masks of a network with ResNet50's 17 sites and 15,168 units."""
    widths = [64, *[256] * 3, *[512] * 4, *[1024] * 6, *[2048] * 3]
    names = ["maxpool", *(f"layer{stage}.{i}" for stage, n in enumerate((3, 4, 6, 3), 1) for i in range(n))]
    generator = torch.Generator().manual_seed(0)
    values = {
        name: (torch.rand(tasks, width, generator=generator) < 0.5).float()
        for name, width in zip(names, widths, strict=True)
    }
    sites = tuple(Site(name, 1, width, name) for name, width in zip(names, widths, strict=True))
    wiring = nx.DiGraph(nx.utils.pairwise(["input", *names, "output"]))
    return Masks(sites, values, Tasks.of({i: f"class {i}" for i in range(tasks)}), wiring)


def main() -> None:
    torch.set_num_threads(1)
    cases: dict[str, nx.DiGraph | Masks] = {
        "1,000 classes × 17 sites": resnet50_masks(1000),
        "3,060 units": unit_graph(17, 1024, 180),
        "400 sites": chain(400, 64),
    }
    for name, graph in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "flow.html"
            begun = time.monotonic()
            nadhooks.render(graph, path)
            written = time.monotonic() - begun
            found = act(path.read_text(), TIMED, Path(folder), 300)
            shown = ", ".join(f"{what} {milliseconds} ms" for what, milliseconds in found.items())
            print(f"{name}: {path.stat().st_size / 2**20:.1f} MiB written in {written:.1f} s; {shown}")
    pictures = {"1,000 classes × 17 sites": nadhooks.flow_graph(resnet50_masks(1000)), "60 sites": chain(60, 768)}
    for name, graph in pictures.items():
        for suffix in ("svg", "png", "pdf", "tex"):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"flow.{suffix}"
                begun = time.monotonic()
                nadhooks.render(graph, path)
                print(f"{name}, {suffix}: {time.monotonic() - begun:.1f} s, {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
