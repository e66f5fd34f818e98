"""Nearest neighbours in a bank of stored features, exact unless told otherwise."""

from lightning_advknn.search.approximate import APPROXIMATE, describe_index, index_settings, recall
from lightning_advknn.search.bank import Backend, MemoryBank, check_backend
from lightning_advknn.search.codes import check_int8, fastest
from lightning_advknn.search.rows import StoredRows, check_room, in_memory, least_bytes
from lightning_advknn.search.scan import Metric
from lightning_advknn.search.sharded import Exchange, ShardedBank

__all__ = [
    "APPROXIMATE",
    "Backend",
    "Exchange",
    "MemoryBank",
    "Metric",
    "ShardedBank",
    "StoredRows",
    "check_backend",
    "check_int8",
    "check_room",
    "describe_index",
    "fastest",
    "in_memory",
    "index_settings",
    "least_bytes",
    "recall",
]
