"""How masks are learnt: a `Method` is an objective, an estimator and an update, plain callables each.

`nad` is the authors' algorithm; `class_only` and `contrastive` are the recipe that we measured to be better and faster;
`random`, `activation`, `taylor` and `routing` learn nothing, for comparison.
"""

from __future__ import annotations

from collections.abc import Callable

from ..budgets import Budget
from ..errors import NadhooksError
from .authors import nad
from .baselines import activation, random, routing, taylor
from .estimators import (
    averaged,
    hard_concrete,
    momentum_step,
    normalised_step,
    perturbed_topk,
    sigmoid,
    straight_through_topk,
)
from .fidelity import class_only, contrastive, from_objective
from .parts import Estimator, Losses, Method, Objective, Pass, Samples, Step, Table, Update

METHODS: dict[str, Callable[[], Method]] = {
    "nad": nad,
    "class-only": class_only,
    "contrastive": contrastive,
    "random": random,
    "activation": activation,
    "taylor": taylor,
    "routing": routing,
}


def method_of(method: str | Method | Objective, what: str = "method") -> Method:
    """A method by its name, itself, or contrastive with another objective. Raises NadhooksError for anything else."""
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    if callable(method) and method not in METHODS.values():
        return from_objective(method)
    uncalled = [name for name, make in METHODS.items() if make is method]
    got = f"the function that makes {uncalled[0]!r}; call it" if uncalled else repr(method)
    raise NadhooksError(f"{what}: expected {', '.join(map(repr, METHODS))}, a Method or an objective, got {got}")


__all__ = [
    "METHODS",
    "Budget",
    "Estimator",
    "Losses",
    "Method",
    "Objective",
    "Pass",
    "Samples",
    "Step",
    "Table",
    "Update",
    "activation",
    "averaged",
    "class_only",
    "contrastive",
    "from_objective",
    "hard_concrete",
    "method_of",
    "momentum_step",
    "nad",
    "normalised_step",
    "perturbed_topk",
    "random",
    "routing",
    "sigmoid",
    "straight_through_topk",
    "taylor",
]
