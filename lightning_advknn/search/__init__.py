"""Nearest neighbours in a bank of stored features, exact unless told otherwise."""

from lightning_advknn.search.backends import check_backend
from lightning_advknn.search.bank import MemoryBank
from lightning_advknn.search.index_settings import APPROXIMATE, describe_index, index_settings
from lightning_advknn.search.memory_plan import least_bytes
from lightning_advknn.search.recall import recall
from lightning_advknn.search.scans.quantize import check_int8, fastest
from lightning_advknn.search.sharded import Bank, Exchange, ShardedBank
from lightning_advknn.search.stored_rows import StoredRows

__all__ = [
    "APPROXIMATE",
    "Bank",
    "Exchange",
    "MemoryBank",
    "ShardedBank",
    "StoredRows",
    "check_backend",
    "check_int8",
    "describe_index",
    "fastest",
    "index_settings",
    "least_bytes",
    "recall",
]
