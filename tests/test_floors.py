"""The house: what may import what. A file may import only from floors below its own."""

from __future__ import annotations

import ast
import re
import sys
from configparser import ConfigParser
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "nadhooks"
FLOORS = [
    {
        "errors",
        "_version",
        "nesting",
        "as_found",
        "default_device",
        "batching",
        "functional",
        "joins",
        "formats.plain",
        "formats.writing",
        "formats.scene",
        "formats.words",
    },
    {"flow_like"},
    {"collapsing", "formats.labels", "formats.drawing", "formats.tikz", "formats.notebook"},
    {"formats.graphml", "formats.gexf", "formats.node_link", "formats.mermaid", "formats.table"},
    {"formats.data"},
    {"formats.site_layout"},
    {"formats.frame"},
    {"formats.site_scene", "formats.contact_sheet"},
    {"formats.unit_scene", "formats.dot"},
    {"formats.html"},
    {"formats"},
    {"graphs"},
    {"tasks", "tracing", "objectives", "formats.container", "formats.hub", "formats.authors", "data"},
    {"structure", "zoo.files", "formats.remote"},
    {"sites", "zoo"},
    {"hooking", "gating", "budgets"},
    {"methods.parts"},
    {"methods.estimators"},
    {"methods.authors", "methods.fidelity", "methods.baselines"},
    {"methods", "fusing", "formats.mask_file", "comparing", "checkpoints", "progress"},
    {"masks", "sampling", "ownership", "shortcut"},
    {"wiring", "identity", "layers", "gated", "acting"},
    {"hookable"},
    {"gates", "flow", "seeing", "segments", "analysis"},
    {"teaching", "evaluation.recognition", "folding", "shrinking"},
    {"starting"},
    {"learner"},
    {"faithfulness"},
    {"learning", "rendering", "effects"},
    {"measuring", "evaluation.causality"},
    {"units"},
    {"evaluation", "demo", "sharing"},
    {"cli.printing", "zoo.running"},
    {"zoo.check"},
    {"cli.models"},
    {"cli.files", "cli.live", "cli.learning"},
    {"cli"},
    {"zoo.coverage", "zoo.processes"},
    {"__main__", "zoo.__main__", ""},
]

LATE = {
    ("masks", "sharing"),  # a method for what stands above, imported when it is called
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    """The package's own modules that a file imports, inside functions too."""
    here = path.relative_to(PACKAGE).parent.parts
    known = {module_name(other) for other in PACKAGE.rglob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in known else ".".join(base))
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("nadhooks") for alias in node.names), f"{path}: import relatively"
    return found


def test_every_file_has_a_floor_and_imports_only_from_below() -> None:
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        name = module_name(path)
        assert name in floor, f"{name} has no floor"
        for imported in imports(path):
            below = floor[imported] < floor[name] or (name, imported) in LATE
            assert below, f"{name} imports {imported}, which is not below it"


def packages(tree: ast.AST) -> set[str]:
    """What others wrote, the standard library too, that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def test_what_is_imported_is_installed() -> None:
    """All but what an error tells how to get: a command must not end, when all is learnt, for lack of a package."""
    setup = ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    required = {re.split(r"[^\w-]", line)[0] for line in setup["options"]["install_requires"].split()}
    installed = required | {"PIL"}  # by torchvision and matplotlib
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        tried = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and "ImportError" in ast.dump(node)]
        told = set().union(*map(packages, tried))
        missing = {{"sklearn": "scikit-learn"}.get(name, name) for name in packages(tree) - told} - installed
        assert not missing - set(sys.stdlib_module_names), path


def test_only_zoo_knows_the_zoos_by_name() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = packages(ast.parse(path.read_text()))
        allowed = {"zoo": {"timm", "torchvision"}, "data": {"torchvision"}}.get(module_name(path), set())
        assert names & {"timm", "torchvision"} <= allowed, path
