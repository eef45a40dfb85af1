"""Measuring what masks are worth, and whether flow graphs are true."""

from .causality import Agreement, Removal, Verification, verify
from .recognition import Recognition, recognition, shuffled

__all__ = ["Agreement", "Recognition", "Removal", "Verification", "recognition", "shuffled", "verify"]
