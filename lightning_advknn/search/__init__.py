"""Exact nearest neighbours in a bank of stored features."""

from lightning_advknn.search.bank import Backend, MemoryBank, check_backend
from lightning_advknn.search.scan import Metric

__all__ = ["Backend", "MemoryBank", "Metric", "check_backend"]
