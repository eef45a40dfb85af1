"""What pictures say of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx


def short_model(graph: nx.DiGraph) -> str:
    """The model as people name it: timm:NAME, file.py:NAME or a class."""
    model = str(graph.graph.get("model", "")).partition(",")[0]
    return model.rpartition("/")[2] if ":" in model else model.rpartition(".")[2]


def headline(graph: nx.DiGraph) -> str:
    """What the picture shows, in one line."""
    tasks = graph.graph.get("tasks", [])
    kept = sum(data["kept"] for _, data in graph.nodes(data=True))
    units = sum(data["units"] for _, data in graph.nodes(data=True))
    model = short_model(graph)
    share = f"{kept:,} of {units:,} units"
    combined = graph.graph.get("combine", "union")
    if len(tasks) == 1:
        text = f"task {tasks[0]}: {share} {graph.graph.get('counted', 'kept')} ({kept / max(1, units):.0%})"
    elif combined == "difference":
        text = f"{called(tasks[0])} without {', '.join(tasks[1:4])}{', …' if len(tasks) > 4 else ''}: {share} kept"
    elif combined == "intersection":
        text = f"{_named(tasks)}: {share} kept by all"
    else:
        text = f"{_named(tasks)}: {share} kept by at least one"
    return f"{model}, {text}" if model else text


def _named(tasks: Sequence[str]) -> str:
    return (
        f"tasks {tasks[0]} and {tasks[1]} over each other" if len(tasks) == 2 else f"{len(tasks)} tasks over each other"
    )


def called(task: str) -> str:
    """A number alone would not say what it counts."""
    return f"task {task}" if task.isdigit() else task


def subtitle(graph: nx.DiGraph) -> str:
    """What a unit-level picture shows, in one line."""
    units = sum(data["kind"] == "unit" for _, data in graph.nodes(data=True))
    text = f"task {', '.join(graph.graph.get('tasks', []))}: {units:,} units, {graph.number_of_edges():,} edges"
    model = short_model(graph)
    return f"{model}, {text}" if model else text
