"""Where tensors are made that name no device: ours on the CPU, those of users' models and loaders where they say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_users: ContextVar[torch.device | None] = ContextVar("users_device", default=None)


def made_on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """For what users call: `torch.set_default_device("cuda")` has no say inside, but where `users_device` is in force.

    What belongs beside a model is moved there by name; counts, orders and draws stay on the CPU, and their generators.
    """

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        device = torch.empty(0).device
        if device.type == "cpu":
            return function(*args, **kwargs)
        before = _users.set(device)
        try:
            with torch.device("cpu"):
                return function(*args, **kwargs)
        finally:
            _users.reset(before)

    return called


def users_device() -> AbstractContextManager[object]:
    """To be in force while a user's model runs, or a loader."""
    device = _users.get()
    return nullcontext() if device is None else device
