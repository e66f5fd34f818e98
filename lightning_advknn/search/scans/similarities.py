"""Similarities of given pairs of queries and bank rows: tight bounds in float32, exact values in float64."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_advknn.choices import Metric
from lightning_advknn.search.memory_plan import working_bytes
from lightning_advknn.search.scans.quantize import lengths
from lightning_advknn.search.scans.rounding import LARGEST, SMALLEST, float64_error, inverse, relative_error
from lightning_advknn.search.stored_rows import Matrix

_SEGMENT = 2048  # terms of a float32 sum, at least: shorter sums round less but take longer
_PAIRS = 2**20  # sampled at once


def bounded_similarities(
    queries: Tensor, features: Matrix, norms: Tensor, metric: Metric, query_rows: Tensor, bank_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the similarities of P pairs, float64 ``(P,)``; about 1e-4 apart for cosines.

    Vectors are cut into segments whose float32 dot products are added in float64. So rounding grows with the
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
    dot = torch.empty(len(query_rows), dtype=torch.float64, device=queries.device)
    for part in _parts(len(query_rows), _PAIRS):
        pairs = query_rows[part], bank_rows[part]
        if isinstance(features, Tensor) and features.device.type == "cpu":
            dot[part] = _sampled_dots(queries, features, *pairs, segments)
        else:
            dot[part] = _gathered_dots(queries, features, *pairs, segments)
    left, right = lengths(queries)[query_rows], norms[bank_rows]
    size = left * right
    error = relative_error(width // segments) * size + (width + 8) * SMALLEST * (1 + left + right)
    error = error.masked_fill(~(size < LARGEST), torch.inf)
    if metric == "cosine":
        similarity, error = dot * inverse(size), error * inverse(size) + 1e-12
        error = error.masked_fill(size == 0, 0.0)
    else:
        squares = left.square() + right.square()
        similarity, error = 2 * dot - squares, 2 * error + 2 * float64_error(width) * squares
    error = error + float64_error(width)
    in_doubt = ~((similarity + error).abs() < torch.inf)
    lower, upper = similarity - error, similarity + error
    return lower.masked_fill(in_doubt, -torch.inf), upper.masked_fill(in_doubt, torch.inf)


def exact_similarities(
    queries: Tensor, features: Matrix, metric: Metric, query_rows: Tensor, bank_rows: Tensor
) -> Tensor:
    """Similarities of P pairs, float64 ``(P,)``. Arguments are those of `bounded_similarities`.

    Equal rows have equal similarities, whichever pairs are computed together. Cosines are rounded to 12
    decimals: rows that tie in exact arithmetic tie here, unless their cosine is within about 1e-15 of the
    edge between two decimals. Minus squared distances are squares of float64 distances, so that they order as
    the distances do.
    """
    found = torch.empty(len(query_rows), dtype=torch.float64, device=queries.device)
    for part in _parts(len(query_rows), _elements(queries.device) // queries.shape[1]):
        left, right = queries[query_rows[part]].double(), features[bank_rows[part]].double()
        if metric == "cosine":
            if left.is_cuda:  # together: fewer kernels
                own, other, product = _sums(torch.stack([left.square(), right.square(), left * right]))
            else:  # apart: they stay in cache
                own, other, product = _sums(left.square()), _sums(right.square()), _sums(left * right)
            found[part] = (product * inverse((own * other).sqrt())).round(decimals=12)
        else:
            found[part] = -_sums((left - right).square()).sqrt().square()
    return found


def _elements(device: torch.device) -> int:
    """Number of float64 products held at once: 16 MiB on a CPU, and a sixteenth of a GPU's memory for searches."""
    return 2**21 if device.type == "cpu" else working_bytes(device) // 128


def _sums(terms: Tensor) -> Tensor:
    """Sums over the last dimension, of terms that are overwritten, by halves.

    The order of `torch.sum` depends on the number of rows.
    """
    width = terms.shape[-1]
    while width > 1:
        half = width // 2
        terms[..., :half].add_(terms[..., width - half : width])
        width -= half
    return terms[..., 0]


def _parts(total: int, size: int) -> Iterator[slice]:
    # Results go into one tensor: small ones between large temporary ones would fragment memory.
    size = max(1, size)
    return (slice(start, start + size) for start in range(0, total, size))


def _gathered_dots(
    queries: Tensor, features: Matrix, query_rows: Tensor, bank_rows: Tensor, segments: int
) -> Tensor:
    """Dot products, float64 ``(P,)``, from copies of both vectors of each pair."""
    found = torch.empty(len(query_rows), dtype=torch.float64, device=queries.device)
    for part in _parts(len(query_rows), 2 * _elements(queries.device) // queries.shape[1]):
        terms = queries[query_rows[part]] * features[bank_rows[part]]
        found[part] = terms.view(len(terms), segments, -1).sum(2).sum(1, dtype=torch.float64)
    return found


def _sampled_dots(
    queries: Tensor, features: Tensor, query_rows: Tensor, bank_rows: Tensor, segments: int
) -> Tensor:
    """The same dot products without copies: a sparse matrix selects them from the product of all segments."""
    batch, width = queries.shape
    left = queries.view(batch, segments, -1).transpose(0, 1).reshape(segments * batch, -1)
    right = features.reshape(len(features) * segments, width // segments)
    ends = torch.bincount(query_rows, minlength=batch).cumsum(0)
    pairs = len(query_rows)
    offsets = pairs * torch.arange(segments)[:, None]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (offsets + ends).flatten()])
    columns = (bank_rows * segments + torch.arange(segments)[:, None]).flatten()
    with warnings.catch_warnings(), torch.autocast("cpu", enabled=False):
        warnings.filterwarnings(
            "ignore", message="Sparse (CSR tensor support is in beta|invariant checks are)"
        )
        chosen = torch.sparse_csr_tensor(
            starts, columns, torch.zeros(len(columns)), (len(left), len(right)), check_invariants=False
        )
        found: Tensor = torch.sparse.sampled_addmm(chosen, left, right.T, beta=0.0).values()
    return found.view(segments, pairs).sum(0, dtype=torch.float64)
