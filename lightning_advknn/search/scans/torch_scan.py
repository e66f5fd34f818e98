"""A scan by matrix products in PyTorch.

A row's *similarity* to a query is their cosine, or minus their squared Euclidean distance. A scan computes it
in low precision. It returns the likeliest rows of each query with rigorous bounds on their similarities, and
one bound for all other rows. `search.nearest` finds the exact neighbours from these. So scans differ in
speed, never in a vote.
"""

from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_advknn.choices import Metric, ScanPrecision
from lightning_advknn.search.memory_plan import working_bytes
from lightning_advknn.search.scans.candidates import Candidates, best_of
from lightning_advknn.search.scans.quantize import Codes, adds_up_bfloat16, encode, lengths, products
from lightning_advknn.search.scans.rounding import (
    LARGEST,
    SMALLEST,
    UNIT,
    float64_error,
    inverse,
    matmul_rounding,
    relative_error,
)
from lightning_advknn.search.stored_rows import Matrix

_WIDE = 512  # below this width, sorting pairs of rows takes longer than multiplying them twice
_STRANDS = 8  # scores are folded into so many parts before the best are picked


class Query(NamedTuple):
    """B encoded queries. By cosine, lengths and residuals are those of unit vectors."""

    values: Tensor
    """Codes, ``(B, at least D)``."""
    left: list[Tensor]
    """Factors that rows' terms are multiplied by, each float32 ``(B, 1)``."""
    length: Tensor
    """float64 ``(B,)``."""
    residual: Tensor
    """float64 ``(B,)``."""
    factor: Tensor
    """Factor by which a score becomes a product of vectors, float64 ``(B,)``."""
    error: Tensor
    """Bound on the rounding error of a similarity, float64 ``(B,)``."""


class _Limits(NamedTuple):
    """Numbers that a scan has in memory at once, each of at most 4 bytes."""

    scores: int
    """Scores from which the best are picked."""
    product: int
    """Scores of one matrix product."""
    codes: int
    """Codes that are multiplied."""


def _limits(device: torch.device) -> _Limits:
    if device.type == "cpu":
        return _Limits(2**25, 2**20, 2**25)  # a product's scores stay in cache while they are scaled
    working = working_bytes(device)
    return _Limits(working // 8, working // 32, working // 32)  # half of it, and an eighth each


class TorchScan:
    """Matrix products of low-precision codes, scaled in float32.

    A vector is its decoded code plus a residual: ``q = q' + r``, ``x = x' + s``. By the Cauchy-Schwarz
    inequality and ``q . x = q' . x' + r . x' + q . s``, the product of codes is off by at most
    ``|r| |x| + (|q| + |r|) |s|``, plus rounding. Residuals are measured, not estimated. Rows are ranked by
    their upper bounds, so no row with a large residual is missed.

    Args:
        features: Bank rows, float32 ``(M, D)``.
        norms: Their Euclidean norms, float64 ``(M,)``.
        metric: Which similarity. By cosine, all vectors below are scaled to unit length.
        precision: Of the codes.
    """

    def __init__(self, features: Matrix, norms: Tensor, metric: Metric, precision: ScanPrecision) -> None:
        self.metric, self.precision, self.device = metric, precision, features.device
        self._limits = _limits(self.device)
        self.codes = codes = encode(features, norms, precision)
        unit = inverse(norms) if metric == "cosine" else torch.ones_like(norms)
        self._lengths, self._residual, weights = unit * norms, unit * codes.residual, unit * codes.scale
        # A row's score is its weight times the product of codes, plus these terms times the query's factors.
        right = []
        if precision == "int8":
            # If z and y stand for 0: (a - z) . (b - y) = a . b - y sum(a) + z (D y - sum(b)).
            right += [-weights * codes.zero, weights * (codes.width * codes.zero - codes.sums)]
        if precision != "float32":
            right += [self._residual]
        if metric == "euclidean":
            right += [self._lengths.square() / 2]
            if precision != "float32":
                right += [self._lengths]
        self._weights, self._right = weights.float(), [term.float() for term in right]
        self._largest_right = torch.stack([weights, *right]).abs().amax(1, keepdim=True)  # (T, 1)
        self._largest_norm, self._largest_sum = norms.max(), self._largest_right.sum()
        self._underflow = (codes.width + 8) * SMALLEST * (1 + self._largest_right[0])

    def __call__(self, queries: Tensor, n: int) -> Candidates:
        """The n likeliest rows for queries, float32 ``(B, D)``; n is in [1, M]."""
        norms = lengths(queries)
        query = self.query(encode(queries, norms, self.precision), norms)
        scores, indices = self._best(query, n)
        upper = self.upper(query, scores)
        lower = upper - self.width(query.length, query.residual, query.error, indices)
        return best_of(len(self.codes.values), lower, upper, indices)

    def query(self, codes: Codes, norms: Tensor) -> "Query":
        """Encoded queries with norms float64 ``(B,)``, ready for `scores`."""
        unit = inverse(norms) if self.metric == "cosine" else torch.ones_like(norms)
        length, residual, factor = unit * norms, unit * codes.residual, unit * codes.scale
        spread = length + residual
        left = []
        if self.precision == "int8":
            left += [codes.sums, codes.zero]
        if self.precision != "float32":
            left += [spread * inverse(factor)]
        if self.metric == "euclidean":
            left += [-inverse(factor)]
            if self.precision != "float32":
                left += [residual * inverse(factor)]
        error = self._rounding(norms, spread, factor, left)
        if self.metric == "cosine":
            error = error + 1e-12 + float64_error(codes.width)
        else:
            error = 2 * error + float64_error(codes.width) * (length + self._largest_norm).square()
        return Query(
            codes.values[:], [term.float()[:, None] for term in left], length, residual, factor, error
        )

    def upper(self, query: "Query", scores: Tensor) -> Tensor:
        """Upper bounds of similarities, float64 ``(B, n)``, from scores ``(B, n)``."""
        products = scores.double() * query.factor[:, None]
        if self.metric == "cosine":
            return products + (query.residual + query.error)[:, None]
        return 2 * products + (query.error - query.length.square())[:, None]

    def width(self, length: Tensor, residual: Tensor, error: Tensor, indices: Tensor) -> Tensor:
        """Upper less lower bounds, of queries' lengths, residuals and errors ``(B,)`` and rows ``(B, n)``."""
        length, residual, error = length[:, None], residual[:, None], error[..., None]
        width = 2 * (length + residual) * self._residual[indices]
        if self.metric == "cosine":
            return width + 2 * residual + 2 * error
        return 2 * (width + 2 * residual * self._lengths[indices]) + 2 * error

    def scores(self, query: "Query", rows: slice) -> Tensor:
        """Scores of queries with consecutive rows, float32 ``(B, rows)``, which rank rows by upper bound."""
        scores = torch.empty(len(query.values), rows.stop - rows.start, device=self.device)
        limits = self._limits
        step = min(limits.product // max(1, len(query.values)), limits.codes // self.codes.width)
        step = max(8, step // 8 * 8)
        for start in range(rows.start, rows.stop, step):
            some = slice(start, min(start + step, rows.stop))
            block = scores[:, start - rows.start : some.stop - rows.start]
            torch.mul(products(query.values, self.codes.values[some]), self._weights[some], out=block)
            for query_term, row_term in zip(query.left, self._right, strict=True):
                block.addcmul_(query_term, row_term[some])
        return scores

    def at_once(self, queries: int) -> int:
        """Number of rows whose scores with so many queries are held at once."""
        return max(1, self._limits.scores // max(1, queries))

    @property
    def symmetric(self) -> bool:
        """Whether one product serves both rows of a pair, and saves time.

        By cosine both have the same bounds. Codes must be in memory, and products take longer than sorting.
        """
        return self.metric == "cosine" and self.codes.width >= _WIDE and isinstance(self.codes.values, Tensor)

    def every(self, step: int) -> "TorchScan":
        """A scan of every `step`-th row."""
        part = copy(self)
        rows = slice(None, None, step)
        part.codes, part._lengths, part._residual = (
            self.codes[rows],
            self._lengths[rows],
            self._residual[rows],
        )
        part._weights, part._right = self._weights[rows], [term[rows] for term in self._right]
        return part

    def _best(self, query: "Query", n: int) -> tuple[Tensor, Tensor]:
        """The n largest scores, float32 ``(B, n)``, and their rows."""
        queries, total = len(query.values), len(self.codes.values)
        held = max(n, self.at_once(queries))
        if total <= held:
            return self._best_in(query, slice(0, total), n)
        best = torch.empty(queries, 0, device=self.device)
        indices = torch.empty(queries, 0, dtype=torch.int64, device=self.device)
        for start in range(0, total, held):
            stop = min(start + held, total)
            found, where = self._best_in(query, slice(start, stop), min(n, stop - start))
            best, indices = torch.cat([best, found], dim=1), torch.cat([indices, where + start], dim=1)
            if best.shape[1] > n:
                best, kept = best.topk(n, sorted=False)
                indices = indices.gather(1, kept)
        return best, indices

    def _best_in(self, query: "Query", rows: slice, n: int) -> tuple[Tensor, Tensor]:
        """The same among consecutive rows: the n largest scores, and their places among the rows."""
        return _top(self.scores(query, rows), n)

    def _rounding(self, norms: Tensor, spread: Tensor, factor: Tensor, left: list[Tensor]) -> Tensor:
        """Bound on the rounding error of q . x in float32, float64 ``(B,)``; infinite if it can overflow."""
        width, largest = self.codes.width, self._largest_right
        if self.precision == "int8":
            product = torch.full_like(norms, 2.0**14 * width)  # which is exact
        else:
            reached = spread * (self._lengths + self._residual).max()
            product = reached * inverse(factor) * inverse(largest[0])
        terms = torch.stack([product, *left]).abs()  # (T, B)
        size = (terms * largest).sum(0)
        error = (4 * len(terms) + 12) * UNIT * size * factor
        if self.precision != "int8":
            error = reached * self._relative_error() + error
        touched = 1 + norms + self._largest_norm + terms.sum(0) + self._largest_sum
        error = error + self._underflow * touched * factor
        # Without a factor all scores are equal, which is right for zero vectors by cosine only.
        told = (factor > 0) | (norms == 0) if self.metric == "cosine" else factor > 0
        fits = (touched.square() < LARGEST) & (size < LARGEST) & told
        return error.masked_fill(~fits, torch.inf)

    def _relative_error(self) -> float:
        """Bound on the error of a product of codes that are not int8, relative to the vectors' lengths."""
        width, on_gpu = self.codes.width, self.device.type == "cuda"
        if self.precision == "bfloat16":
            output = 0.0 if adds_up_bfloat16(self.device) else 2.0**-8  # products come out in bfloat16
            return relative_error(width, tensor_cores=on_gpu) + output
        rounding = matmul_rounding(self.device)
        return relative_error(width, rounding, tensor_cores=on_gpu and rounding > 0)


def _top(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row and their columns, in no order; as `topk`, with fewer comparisons."""
    size = scores.shape[1] // _STRANDS
    if n > size // 4:
        return scores.topk(n, sorted=False)
    strands = scores[:, : size * _STRANDS].reshape(len(scores), _STRANDS, size)
    # The n largest are in the n columns with the largest maxima: else n maxima would exceed one of them.
    columns = strands.amax(1).topk(n, sorted=False).indices  # (B, n)
    starts = torch.arange(0, size * _STRANDS, size, device=scores.device)
    last = torch.arange(size * _STRANDS, scores.shape[1], device=scores.device)
    where = (columns[:, None] + starts[:, None]).flatten(1)  # (B, _STRANDS n)
    where = torch.cat([where, last.expand(len(scores), -1)], dim=1)
    found, kept = scores.gather(1, where).topk(n, sorted=False)
    return found, where.gather(1, kept)
