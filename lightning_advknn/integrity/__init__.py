"""Detect and undo changes that an attack makes to its target."""

from lightning_advknn.integrity.snapshot import Snapshot
from lightning_advknn.integrity.watch import unchanged

__all__ = ["Snapshot", "unchanged"]
