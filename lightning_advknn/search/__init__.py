"""Exact nearest neighbours in a bank of stored features."""

from lightning_advknn.search.bank import Backend, MemoryBank, check_backend
from lightning_advknn.search.rows import StoredRows, in_memory
from lightning_advknn.search.scan import Metric
from lightning_advknn.search.sharded import Exchange, ShardedBank

__all__ = [
    "Backend",
    "Exchange",
    "MemoryBank",
    "Metric",
    "ShardedBank",
    "StoredRows",
    "check_backend",
    "in_memory",
]
