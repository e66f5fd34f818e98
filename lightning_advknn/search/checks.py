"""What a bank expects of its rows, of queries and of k."""

import math
from typing import get_args

import torch
from torch import Tensor

from lightning_advknn.choices import Metric, whole
from lightning_advknn.functional import check_defaults, check_labels
from lightning_advknn.search.stored_rows import Matrix, StoredRows


def check_rows(features: Matrix, labels: Tensor, ids: Tensor, num_classes: int, metric: Metric) -> None:
    """Raise a ValueError unless these are rows for a `MemoryBank`; arguments as there."""
    check_defaults()
    for name, column in (("features", features), ("labels", labels), ("ids", ids)):
        if not isinstance(column, Tensor | StoredRows):
            raise ValueError(
                f"Expected `{name}` to be a tensor, but got a {type(column).__name__}. Convert it with"
                " `torch.as_tensor`."
            )
    if features.ndim != 2 or not (len(features) == len(labels) == len(ids)) or 0 in features.shape:
        raise ValueError(
            "Expected at least one row and column of features (M, D), labels (M,) and ids (M,), but got"
            f" shapes {tuple(features.shape)}, {tuple(labels.shape)} and {tuple(ids.shape)}."
        )
    if metric not in get_args(Metric):
        raise ValueError(f"Expected `metric` to be one of {get_args(Metric)}, but got {metric!r}.")
    if features.dtype != torch.float32:
        raise ValueError(
            f"Expected float32 features, but got {features.dtype}. Convert them with `.float()`."
        )
    if ids.dtype != torch.int64:
        raise ValueError(f"Expected int64 `ids`, but got {ids.dtype}. Convert them with `.long()`.")
    check_labels(labels, len(features), whole("num_classes", num_classes))


def check_finite(norms: Tensor) -> None:
    """Raise a ValueError unless rows of these norms, ``(M,)``, are finite."""
    broken = int((~torch.isfinite(norms)).sum())
    if broken:
        raise ValueError(
            f"Expected finite features, but {broken} of {len(norms)} rows hold NaN or infinity. Check the"
            " network's weights."
        )


def check_queries(queries: Tensor, width: int, own_ids: Tensor | None) -> None:
    """Raise a ValueError unless queries are finite, float32 ``(B, width)``, and their ids are ``(B,)``."""
    check_defaults()
    if not isinstance(queries, Tensor):
        raise ValueError(
            f"Expected queries as a float32 tensor, but got a {type(queries).__name__}. Convert them with"
            " `torch.as_tensor(queries, dtype=torch.float32)`."
        )
    if queries.ndim != 2 or queries.shape[1] != width or queries.dtype != torch.float32:
        raise ValueError(
            f"Expected float32 queries of shape (B, {width}) as in the bank, but got {queries.dtype} of shape"
            f" {tuple(queries.shape)}."
        )
    if queries.numel() and not math.isfinite(sum(torch.stack(queries.aminmax()).tolist())):
        raise ValueError(
            "Expected finite query features, but got NaN or infinity. Check the images and the network's"
            " weights."
        )
    if own_ids is not None and own_ids.shape != (len(queries),):
        raise ValueError(
            f"Expected `own_ids` of shape ({len(queries)},), one for each query, but got"
            f" {tuple(own_ids.shape)}."
        )


def check_k(k: int, rows: int, own: int = 0) -> None:
    """Raise a ValueError unless k is a whole number and k rows can vote.

    Args:
        k: Number of neighbours.
        rows: M of the bank.
        own: Rows of the query's own image that cannot vote, at most.
    """
    k = whole("k", k)
    if not 1 <= k <= rows - own:
        less = " less the image's own" if own else ""
        raise ValueError(f"Expected `k` to be in [1, {rows - own}] (the bank's rows{less}), but got {k}.")
