"""Measuring what masks are worth, and whether flow graphs are true."""

from .causality import Agreement, Removal, Verification, verify
from .recognition import MEASURES, Recognition, quality, recognition, shuffled

__all__ = [
    "MEASURES",
    "Agreement",
    "Recognition",
    "Removal",
    "Verification",
    "quality",
    "recognition",
    "shuffled",
    "verify",
]
