"""Similarities of chosen pairs of queries and bank rows: tightly bounded in float32, exact in float64."""

import warnings

import torch
from torch import Tensor

from lightning_advknn.search.bounds import LARGEST, SMALLEST, float64_error, inverse, relative_error
from lightning_advknn.search.scan import Metric

PAIR_ELEMENTS = 2**23  # float64 products held at once: 64 MiB
_SEGMENT = 512  # terms of a float32 sum at least: shorter sums round less and take longer
_PAIRS = 2**20  # sampled at once


def bounded_similarities(
    queries: Tensor, features: Tensor, norms: Tensor, metric: Metric, query_rows: Tensor, bank_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds, float64 ``(P,)``, of P pairs, some 1e-5 apart.

    The vectors are cut into segments whose float32 dot products are added in float64, so rounding grows with the
    length of a segment only.

    Args:
        queries: float32 ``(B, D)``.
        features: Bank rows, float32 ``(M, D)``.
        norms: Their Euclidean norms, float64 ``(M,)``.
        metric: Which similarity.
        query_rows: int64 ``(P,)``, ascending.
        bank_rows: int64 ``(P,)``.
    """
    width = queries.shape[1]
    segments = 1
    while width % (2 * segments) == 0 and width // (2 * segments) >= _SEGMENT:
        segments *= 2
    dots = _sampled_dots if queries.device.type == "cpu" else _gathered_dots
    dot = torch.cat(
        [dots(queries, features, *pairs, segments) for pairs in _parts(query_rows, bank_rows, _PAIRS)]
    )
    left = torch.linalg.vector_norm(queries, dim=1, dtype=torch.float64)[query_rows]
    lengths = left * norms[bank_rows]
    error = relative_error(width // segments) * lengths + (width + 8) * SMALLEST * (
        1 + left + norms[bank_rows]
    )
    error = error.masked_fill(~(lengths < LARGEST), torch.inf)
    if metric == "cosine":
        similarity, error = dot * inverse(lengths), error * inverse(lengths) + 1e-12
        error = error.masked_fill(lengths == 0, 0.0)
    else:
        squares = left.square() + norms[bank_rows].square()
        similarity, error = 2 * dot - squares, 2 * error + 2 * float64_error(width) * squares
    error = error + float64_error(width)
    in_doubt = ~torch.isfinite(similarity + error)
    lower, upper = similarity - error, similarity + error
    return lower.masked_fill(in_doubt, -torch.inf), upper.masked_fill(in_doubt, torch.inf)


def exact_similarities(
    queries: Tensor, features: Tensor, norms: Tensor, metric: Metric, query_rows: Tensor, bank_rows: Tensor
) -> Tensor:
    """Similarities of P pairs in float64, ``(P,)``; arguments as above.

    Cosines count to 12 decimals, so that rows which tie in exact arithmetic tie here, in whatever order their
    products are summed.
    """
    parts = []
    for query_part, bank_part in _parts(query_rows, bank_rows, PAIR_ELEMENTS // queries.shape[1]):
        left, right = queries[query_part].double(), features[bank_part].double()
        if metric == "cosine":
            lengths = torch.linalg.vector_norm(left, dim=1) * norms[bank_part]
            parts.append(((left * right).sum(1) * inverse(lengths)).round(decimals=12))
        else:
            parts.append(-(left - right).square().sum(1))
    return torch.cat(parts)


def _parts(query_rows: Tensor, bank_rows: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    size = max(1, size)
    return list(zip(torch.split(query_rows, size), torch.split(bank_rows, size), strict=True))


def _gathered_dots(
    queries: Tensor, features: Tensor, query_rows: Tensor, bank_rows: Tensor, segments: int
) -> Tensor:
    """Dot products float64 ``(P,)`` from copies of both sides' rows."""
    parts = []
    for query_part, bank_part in _parts(query_rows, bank_rows, 2 * PAIR_ELEMENTS // queries.shape[1]):
        terms = (queries[query_part] * features[bank_part]).view(len(query_part), segments, -1)
        parts.append(terms.sum(2).sum(1, dtype=torch.float64))
    return torch.cat(parts)


def _sampled_dots(
    queries: Tensor, features: Tensor, query_rows: Tensor, bank_rows: Tensor, segments: int
) -> Tensor:
    """The same without a copy: entries of one product of all segments, chosen by a sparse matrix."""
    batch, width = queries.shape
    left = queries.view(batch, segments, -1).transpose(0, 1).reshape(segments * batch, -1)
    right = features.reshape(len(features) * segments, width // segments)
    ends = torch.bincount(query_rows, minlength=batch).cumsum(0)
    pairs = len(query_rows)
    offsets = pairs * torch.arange(segments)[:, None]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (offsets + ends).flatten()])
    columns = (bank_rows * segments + torch.arange(segments)[:, None]).flatten()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        chosen = torch.sparse_csr_tensor(
            starts, columns, torch.zeros(len(columns)), (len(left), len(right)), check_invariants=False
        )
    with torch.autocast("cpu", enabled=False):
        found: Tensor = torch.sparse.sampled_addmm(chosen, left, right.T, beta=0.0).values()
    return found.view(segments, pairs).sum(0, dtype=torch.float64)
