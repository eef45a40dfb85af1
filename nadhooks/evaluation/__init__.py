"""Measuring what masks are worth."""

from .recognition import Recognition, recognition, shuffled

__all__ = ["Recognition", "recognition", "shuffled"]
