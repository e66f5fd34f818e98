"""The scan of a bank for its own rows: each product of two rows serves both."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_advknn.search.scans.candidates import Candidates
from lightning_advknn.search.scans.torch_scan import Query, TorchScan

_SAMPLE = 2048  # rows that tell how similar a row's nearest are
_SPARE = 1.4  # times as many candidates as asked for are aimed at: the sample only estimates
_MOST = 16  # times as many candidates are kept of a row, or none
_ROUNDING = 1e-6  # more than float32 takes off an upper bound here


def candidates_of_all(scan: TorchScan, norms: Tensor, n: int, at_once: int) -> Iterator[Candidates | None]:
    """Candidates of the bank's rows, so many queries at once and in order; about n each, a row among its own.

    Both rows of a pair have the same upper bound by cosine. A row keeps the pairs that exceed its threshold, set by its
    similarities to a sample of the bank so that about n do. The others are unseen, so a poor threshold costs time and no
    vote.

    Args:
        scan: Of the bank, by cosine.
        norms: Of the bank's rows, float64 ``(M,)``.
        n: Candidates wanted.
        at_once: Rows a step.

    Yields:
        Candidates of the next rows, filled up by some at minus infinity; None where an ordinary scan does better.
    """
    total = len(norms)
    chunks = [slice(start, min(start + at_once, total)) for start in range(0, total, at_once)]
    thresholds = torch.empty(total, device=scan.device)
    step = max(1, total // _SAMPLE)
    sample = scan.every(step)
    sampled = len(sample.codes.values)
    rank = min(sampled, round(_SPARE * n * sampled / total) + 1)
    error = torch.zeros((), dtype=torch.float64, device=scan.device)
    for rows in chunks:
        query = scan.query(scan.codes[rows], norms[rows])
        bounds = _upper(query, sample.scores(query, slice(0, sampled)))
        thresholds[rows] = bounds.topk(rank).values[:, -1]
        error = torch.maximum(error, query.error.max())
    if not error < 1:  # of no use, and beyond what `_ROUNDING` allows for
        yield from (None for _ in chunks)
        return
    kept = torch.zeros(total, dtype=torch.int64, device=scan.device)
    waiting: list[list[_Pairs]] = [[] for _ in chunks]
    for number, rows in enumerate(chunks):
        query = scan.query(scan.codes[rows], norms[rows])
        upper = _upper(query, scan.scores(query, slice(rows.start, total)))
        mine, other = (upper > thresholds[rows, None]).nonzero(as_tuple=True)
        waiting[number].append(_Pairs(mine.int(), other.int() + rows.start, upper[mine, other]))
        later = upper[:, rows.stop - rows.start :]
        mine, other = (later > thresholds[rows.stop :]).nonzero(as_tuple=True)
        other, order = other.sort()
        found = _Pairs(other.int(), mine[order].int() + rows.start, later[mine[order], other])
        counts = torch.bincount(other // at_once, minlength=len(chunks) - number - 1).tolist()
        for ahead, part in enumerate(zip(*(torch.split(column, counts) for column in found), strict=True)):
            waiting[number + 1 + ahead].append(_Pairs(part[0] - ahead * at_once, *part[1:]))
        kept[rows.stop :] += torch.bincount(other, minlength=total - rows.stop)
        thresholds[kept > _MOST * n] = torch.inf  # as many similar rows as this are left to ordinary scans
        yield _candidates(scan, query, waiting[number], thresholds[rows], error, n)
        waiting[number] = []


class _Pairs(NamedTuple):
    """P pairs of rows that may be near each other."""

    mine: Tensor
    """Row among those of a step, int32 ``(P,)``."""
    other: Tensor
    """Row of the bank, int32 ``(P,)``."""
    upper: Tensor
    """Upper bound of their similarity, float32 ``(P,)``."""


def _upper(query: Query, scores: Tensor) -> Tensor:
    """Scores, in place, as upper bounds of cosines."""
    scores.mul_(query.factor.float()[:, None])
    return scores.add_((query.residual + query.error + _ROUNDING).float()[:, None])


def _candidates(
    scan: TorchScan, query: Query, found: list[_Pairs], thresholds: Tensor, error: Tensor, least: int
) -> Candidates:
    mine, other, upper = (torch.cat(column) for column in zip(*found, strict=True))
    mine, order = mine.long().sort()
    counts = torch.bincount(mine, minlength=len(thresholds))
    place = torch.arange(len(mine), device=mine.device) - (counts.cumsum(0) - counts)[mine]
    shape = len(thresholds), max(least, int(counts.max()))
    indices = torch.zeros(shape, dtype=torch.int64, device=mine.device)
    indices[mine, place] = other[order].long()
    bounds = torch.full(shape, -torch.inf, dtype=torch.float64, device=mine.device)
    bounds[mine, place] = upper[order].double()
    # As if no row had length 0: the bound may have been found from the other row's side.
    width = scan.width(torch.ones_like(query.length), query.residual, error + _ROUNDING, indices)
    return Candidates(bounds - width, bounds, indices, thresholds.double()[:, None])
