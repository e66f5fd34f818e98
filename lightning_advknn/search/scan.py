"""First pass over the bank: approximate scores of the best candidates, with a rigorous error bound.

A row's *score* grows as its distance falls: ``q . x / |x|`` (cosine) or ``q . x - |x|^2 / 2`` (Euclidean). A scan
returns the rows that score best in its own precision and a bound on the error of any of its scores;
`search.bank` turns that into exact neighbours. So backends can differ in speed but not in one vote.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Metric = Literal["cosine", "euclidean"]

_BLOCK_ELEMENTS = 2**25  # float32 scores held at once: 128 MiB

# Largest relative rounding of an input of a float32 matmul, by `torch.get_float32_matmul_precision()`: TF32 keeps
# 10 bits of mantissa, bfloat16 7; truncation is allowed for.
_INPUT_ROUNDING = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


class Candidates(NamedTuple):
    """What a scan found, for B queries and n candidates each, in no particular order."""

    scores: Tensor
    """float32 ``(B, n)``."""
    indices: Tensor
    """Bank rows, int64 ``(B, n)``, distinct within a query."""
    error: Tensor
    """float64 ``(B, 1)``: no row's true score is further than this from the scanned one."""


def torch_scan(queries: Tensor, features: Tensor, norms: Tensor, metric: Metric, n: int) -> Candidates:
    """Scan by chunked float32 matrix products.

    Args:
        queries: float32 ``(B, D)``.
        features: Bank rows, float32 ``(M, D)``.
        norms: Their Euclidean norms, float64 ``(M,)``.
        metric: Which score.
        n: Candidates to keep, in [1, M].
    """
    rows = max(n, _BLOCK_ELEMENTS // max(1, len(queries)))
    scores = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(features), rows):
        with torch.autocast(queries.device.type, enabled=False):  # would round more than the bound allows
            block = queries @ features[start : start + rows].T  # (B, rows)
        block_norms = norms[start : start + rows]
        if metric == "cosine":
            block *= inverse(block_norms).to(block.dtype)
        else:
            block -= (block_norms.square() / 2).to(block.dtype)
        best, best_indices = block.topk(min(n, block.shape[1]), sorted=False)
        scores = torch.cat([scores, best], dim=1)
        indices = torch.cat([indices, best_indices + start], dim=1)
        if scores.shape[1] > n:
            scores, kept = scores.topk(n, sorted=False)
            indices = indices.gather(1, kept)
    return Candidates(scores, indices, score_error(queries, norms, metric, _input_rounding()))


def _input_rounding() -> float:
    try:
        return _INPUT_ROUNDING[torch.get_float32_matmul_precision()]
    except RuntimeError:  # set through torch's newer switches, which this query refuses to look at
        return max(_INPUT_ROUNDING.values())


def score_error(queries: Tensor, norms: Tensor, metric: Metric, input_rounding: float = 0.0) -> Tensor:
    """Bound on the error of scores computed in float32, in any order of summation.

    A sum of D products has an error of at most gamma_D |q| |x| with gamma_D = D u / (1 - D u) and u = 2^-24
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); eight more roundings cover norms,
    scaling and the subtraction. What float32 may lose to underflow, and Euclidean distances in float64 to
    rounding, comes on top. Where a float32 intermediate could overflow the bound is infinite: all is in doubt.

    Args:
        queries: float32 ``(B, D)``.
        norms: Norms of the bank's rows, float64 ``(M,)``.
        metric: Which score.
        input_rounding: Largest relative rounding of the factors before they are multiplied.

    Returns:
        float64 ``(B, 1)``.
    """
    unit = 2.0**-24
    terms = (queries.shape[1] + 8) * unit
    relative = (1 + input_rounding) ** 2 * (1 + terms / (1 - terms)) - 1
    length = torch.linalg.vector_norm(queries.double(), dim=1, keepdim=True)  # (B, 1)
    longest, shortest = norms.max(), torch.where(norms > 0, norms, torch.inf).min()
    smallest = 2.0**-126  # normal float32
    lost = (queries.shape[1] + 8) * smallest * (1 + length + longest)
    overflows = (length + longest).square() > 2.0**126
    if metric == "cosine":
        overflows |= shortest < smallest  # its inverse is infinite
        error = relative * length + lost / shortest.clamp(max=1.0)
    else:
        rounding = (queries.shape[1] + 8) * 2.0**-53
        error = relative * (length * longest + longest.square() / 2) + lost
        error += rounding * (length + longest).square()
    return torch.where(overflows, torch.inf, error)


def inverse(norms: Tensor) -> Tensor:
    """1 / norm, and 0 for a zero row: its cosine similarity to anything is 0."""
    return torch.where(norms > 0, 1 / norms, 0.0)
