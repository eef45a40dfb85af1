"""Writes the files in tests/golden anew: `python -m tests.golden`. Look at the difference before it is committed."""

from __future__ import annotations

from nadhooks.formats.graphml import to_graphml
from nadhooks.formats.mermaid import to_mermaid
from nadhooks.formats.node_link import to_node_link
from nadhooks.formats.table import to_csv

from .test_data_formats import GOLDEN, site_level
from .test_units import planted

if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for level, graph in (("site", site_level()), ("unit", planted())):
        for name, write in (("graphml", to_graphml), ("json", to_node_link), ("mmd", to_mermaid), ("csv", to_csv)):
            (GOLDEN / f"{level}.{name}").write_text(write(graph), encoding="utf-8")
