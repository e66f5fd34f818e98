"""The scan of a bank for its own rows: each product of two rows serves both of them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_advknn.search.scans.candidates import Candidates
from lightning_advknn.search.scans.torch_scan import Query, TorchScan

_SAMPLE = 2048  # rows that estimate how similar a row's nearest are
_SPARE = 1.4  # thresholds aim at so many times the candidates asked for, as the sample only estimates
_MOST = 16  # a row keeps at most about so many times the candidates asked for
_ROUNDING = 1e-6  # more than an upper bound loses here by rounding to float32


def candidates_of_all(scan: TorchScan, norms: Tensor, n: int, at_once: int) -> Iterator[Candidates | None]:
    """Candidates for all rows of a bank, in order: about n for each, itself among them.

    By cosine both rows of a pair have the same upper bound. A row keeps the pairs above its threshold, which
    its similarities to a sample of the bank set so that about n are above. The other pairs are unseen, so a
    poor threshold costs time and no vote.

    Args:
        scan: Of the bank, by cosine.
        norms: Of the bank's rows, float64 ``(M,)``.
        n: Candidates wanted.
        at_once: Rows a step.

    Yields:
        Candidates for the next `at_once` rows, padded with some at minus infinity; None if an ordinary scan
        is better.
    """
    total = len(norms)
    chunks = [slice(start, min(start + at_once, total)) for start in range(0, total, at_once)]
    thresholds, error = _thresholds(scan, norms, n, chunks)
    if not error < 1:  # useless, and more than `_ROUNDING` allows for
        yield from (None for _ in chunks)
        return
    kept = torch.zeros(total, dtype=torch.int64, device=scan.device)
    waiting: list[list[_Pairs]] = [[] for _ in chunks]
    for number, rows in enumerate(chunks):
        query = scan.query(scan.codes[rows], norms[rows])
        step = max(1, scan.at_once(at_once) // at_once) * at_once
        for start in range(rows.start, total, step):
            others = slice(start, min(start + step, total))
            upper = _upper(query, scan.scores(query, others))
            mine, other = (upper > thresholds[rows, None]).nonzero(as_tuple=True)
            waiting[number].append(_Pairs(mine.int(), other.int() + start, upper[mine, other]))
            later = slice(max(start, rows.stop), others.stop)
            found = _of_others(upper[:, later.start - start :], thresholds[later], rows.start)
            counts = torch.bincount(
                found.mine // at_once, minlength=-(-(later.stop - later.start) // at_once)
            )
            parts = zip(*(torch.split(column, counts.tolist()) for column in found), strict=True)
            for ahead, part in enumerate(parts):
                ahead_of = later.start // at_once + ahead
                waiting[ahead_of].append(_Pairs(part[0] - ahead * at_once, *part[1:]))
            kept[later] += torch.bincount(found.mine, minlength=later.stop - later.start)
        thresholds[kept > _MOST * n] = torch.inf  # too many pairs: left to an ordinary scan
        yield _candidates(scan, query, waiting[number], thresholds[rows], error, n)
        waiting[number] = []


def _thresholds(scan: TorchScan, norms: Tensor, n: int, chunks: list[slice]) -> tuple[Tensor, Tensor]:
    """Upper bounds that about n rows exceed, float32 ``(M,)``, and the largest rounding error, float64."""
    total = len(norms)
    thresholds = torch.empty(total, device=scan.device)
    sample = scan.every(max(1, total // _SAMPLE))
    sampled = len(sample.codes.values)
    rank = min(sampled, round(_SPARE * n * sampled / total) + 1)
    error = torch.zeros((), dtype=torch.float64, device=scan.device)
    for rows in chunks:
        query = scan.query(scan.codes[rows], norms[rows])
        bounds = _upper(query, sample.scores(query, slice(0, sampled)))
        thresholds[rows] = bounds.topk(rank).values[:, -1]
        error = torch.maximum(error, query.error.max())
    return thresholds, error


class _Pairs(NamedTuple):
    """P pairs of rows above a threshold."""

    mine: Tensor
    """Position among the rows of a step, int32 ``(P,)``."""
    other: Tensor
    """Bank row, int32 ``(P,)``."""
    upper: Tensor
    """Upper bound of their similarity, float32 ``(P,)``."""


def _of_others(upper: Tensor, thresholds: Tensor, first: int) -> _Pairs:
    """Pairs above the thresholds of the columns' rows, which are `mine`; the others start with row `first`."""
    other, mine = (upper > thresholds).nonzero(as_tuple=True)
    mine, order = mine.sort()
    return _Pairs(mine.int(), other[order].int() + first, upper[other[order], mine])


def _upper(query: Query, scores: Tensor) -> Tensor:
    """Upper bounds of cosines from scores, which are overwritten."""
    scores.mul_(query.factor.float()[:, None])
    return scores.add_((query.residual + query.error + _ROUNDING).float()[:, None])


def _candidates(
    scan: TorchScan, query: Query, found: list[_Pairs], thresholds: Tensor, error: Tensor, least: int
) -> Candidates:
    """Candidates of a step's rows from their pairs, at least `least` columns wide."""
    mine, other, upper = (torch.cat(column) for column in zip(*found, strict=True))
    mine, order = mine.long().sort()
    counts = torch.bincount(mine, minlength=len(thresholds))
    place = torch.arange(len(mine), device=mine.device) - (counts.cumsum(0) - counts)[mine]
    shape = len(thresholds), max(least, int(counts.max()))
    indices = torch.zeros(shape, dtype=torch.int64, device=mine.device)
    indices[mine, place] = other[order].long()
    bounds = torch.full(shape, -torch.inf, dtype=torch.float64, device=mine.device)
    bounds[mine, place] = upper[order].double()
    # Length 1 also for zero rows, as the bound may come from the other row of a pair.
    width = scan.width(torch.ones_like(query.length), query.residual, error + _ROUNDING, indices)
    return Candidates(bounds - width, bounds, indices, thresholds.double()[:, None])
