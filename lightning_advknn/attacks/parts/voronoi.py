"""How far an image must move at least until a kNN on pixels changes its class.

After Wang et al. (Evaluating the Robustness of Nearest Neighbor Classifiers: A Primal-Dual Perspective, arXiv 1906.03972). Of a
wrong training image x- and one of the own class x+, the bisector is where both are equally far: to be nearer to x- than to
x+, an image has to cross it. `lower_bound` counts bisectors. `exact_minimum` is the distance to the nearest cell of a wrong x-,
which its bisectors with all x+ enclose: a quadratic program for each x-.

Both ignore that pixels stay in [0, 1], so that an attack that heeds this needs as much or more. Features may be pixels times a
`scale` each, plus a constant, as normalised ones are; perturbations and their L2 norms are those of pixels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

ALGORITHM = "wang-2019/1"  # another wherever results change: stored ones go by it
_SCREEN = 64  # own rows at least, the nearest, by which others are put in order
_BLOCK = 512  # others compared with all own rows at once
_CELLS = 16  # programs solved at once
_MORE = 8  # constraints that join a program at once
_TOLERANCE = 1e-9  # in pixel units, of constraints
_UPDATES = 20_000  # of dual variables at most, before others join
_SAME = 1e-5  # rows nearer to each other than this share of their lengths count as copies


class Minimum(NamedTuple):
    """The smallest perturbations that change the class of a 1-NN."""

    norms: Tensor
    """L2, float64 ``(B,)``: by the dual, so never above the true ones. Infinite where all rows have the own class."""
    perturbations: Tensor
    """float64 ``(B, D)``; they end on the edge of a cell, but for rounding."""
    rows: Tensor
    """Whose cell, int64 ``(B,)``; -1 where all rows have the own class."""


class _Side(NamedTuple):
    """Rows on one side, all of the own class or none, as a query sees them."""

    features: Tensor
    """float64 ``(m, D)``."""
    lengths: Tensor
    """Squared, of ``scale * features``, float64 ``(m,)``."""
    distances: Tensor
    """Squared, of features from the query's, less a constant, float64 ``(m,)``."""

    def pick(self, which: Tensor) -> "_Side":
        return _Side(self.features[which], self.lengths[which], self.distances[which])


@torch.no_grad()
def exact_minimum(
    rows: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, scale: Tensor | float = 1.0
) -> Minimum:
    """The exact minimum for 1-NN where pixels have no range: for each wrong row a quadratic program, by coordinate ascent on its dual.

    Within [0, 1] the minimum may be larger: this is a lower bound of it.

    Wrong rows come in order of a lower bound, their largest bisector distance to some own rows, and a search ends where that
    exceeds the best so far; so does a program whose dual value does. A program begins with its farthest bisectors, and
    others join as they are violated.

    A distance at which two classes' rows are equally near counts as a change, whichever is preferred.

    Deviations: the bounds that put rows in order are over the nearest own rows only, which is quicker and cannot make
    them too large. A program that has not converged after many updates counts by its dual value, a lower bound.

    Args:
        rows: Features of the training images, ``(M, D)``.
        labels: Their classes, int64 ``(M,)``.
        queries: Features of the images, ``(B, D)``.
        query_labels: Classes to leave, int64 ``(B,)``.
        scale: Change of a feature when its pixel changes by 1, ``(D,)`` or one for all; not 0.
    """
    sizes = torch.as_tensor(scale, dtype=torch.float64, device=rows.device).expand(rows.shape[1])
    norms = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=rows.device)
    perturbations = torch.zeros_like(queries, dtype=torch.float64)
    cells = torch.full_like(query_labels, -1)
    for i, own, others, wrong_rows in _each(rows, labels, queries, query_labels, sizes):
        if not len(own.features):
            norms[i], cells[i] = 0, wrong_rows[others.distances.argmin()]
            continue
        bounds, order = _bounds(own, others, sizes, 1)
        for start in range(0, len(order), _CELLS):
            if bounds[start] >= norms[i]:
                break
            block = order[start : start + _CELLS]
            reached, found = _enter_cells(own, others.pick(block), sizes, norms[i])
            nearest = reached.argmin()
            if reached[nearest] < norms[i]:
                norms[i], perturbations[i] = reached[nearest], found[nearest]
                cells[i] = wrong_rows[block[nearest]]
    return Minimum(norms, perturbations, cells)


@torch.no_grad()
def lower_bound(
    rows: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, scale: Tensor | float = 1.0
) -> Tensor:
    """A lower bound for k-NN: the r-th smallest over wrong rows x- of the r-th largest bisector distance over own rows x+.

    A class is lost only if ``r = (k + 1) // 2`` wrong rows are among the k nearest, each of them nearer than all but ``k // 2``
    own ones. Deviation: for even k, where a tie of votes may go against the own class, the (r + 1)-th largest.

    Args:
        rows: Features of the training images, ``(M, D)``.
        labels: Their classes, int64 ``(M,)``.
        queries: Features of the images, ``(B, D)``.
        query_labels: Classes to leave, int64 ``(B,)``.
        k: Neighbours that vote.
        scale: Change of a feature when its pixel changes by 1, ``(D,)`` or one for all; not 0.

    Returns:
        L2 norms, float64 ``(B,)``; infinite where no perturbation suffices.

    Raises:
        ValueError: If k exceeds the rows.
    """
    if not 1 <= k <= len(rows):
        raise ValueError(f"Expected `k` to be in [1, {len(rows)}] (the rows), but got {k}.")
    wrong, rank = (k + 1) // 2, k // 2 + 1
    sizes = torch.as_tensor(scale, dtype=torch.float64, device=rows.device).expand(rows.shape[1])
    norms = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=rows.device)
    for i, own, others, _ in _each(rows, labels, queries, query_labels, sizes):
        if len(others.features) < wrong:
            continue
        if len(own.features) < rank:
            norms[i] = 0
            continue
        bounds, order = _bounds(own, others, sizes, rank)
        found = bounds[:0]
        for start in range(0, len(order), _BLOCK):
            if bounds[start] >= norms[i]:
                break
            block = others.pick(order[start : start + _BLOCK])
            found = torch.cat([found, _rank_th(own, block, sizes, rank)])
            if len(found) >= wrong:
                found = found.topk(wrong, largest=False).values
                norms[i] = found.amax()
    return norms


def _each(
    rows: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, scale: Tensor
) -> Iterator[tuple[int, _Side, _Side, Tensor]]:
    """Queries that have rows of another class: position, rows of the own class, the others, and which these are."""
    with tqdm(total=len(queries), desc="bisectors", disable=None, leave=False) as progress:
        for label in sorted(set(query_labels.tolist())):
            wrong = (labels != label).nonzero().squeeze(1)
            sides = rows[labels == label].double(), rows[wrong].double()
            squares = [torch.linalg.vecdot(side, side) for side in sides]
            lengths = [side.square() @ scale.square() for side in sides]
            for i in (query_labels == label).nonzero().squeeze(1).tolist():
                query = queries[i].double()
                own, others = (
                    _Side(*each[:2], each[2] - 2 * (each[0] @ query))
                    for each in zip(sides, lengths, squares, strict=True)
                )
                if len(wrong):
                    yield i, own, others, wrong
                progress.update()


def _bounds(own: _Side, others: _Side, scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A lower bound of each other row's rank-th largest bisector distance, ascending, and which row it is of, ``(n,)``."""
    size = min(len(own.features), max(_SCREEN, 2 * rank))
    near = own.pick(own.distances.topk(size, largest=False).indices)
    bounds, order = _rank_th(near, others, scale, rank).sort()
    return bounds, order


def _rank_th(own: _Side, others: _Side, scale: Tensor, rank: int) -> Tensor:
    """Rank-th largest bisector distance of others, 0 where that many are not to be crossed, ``(P,)``."""
    return _bisectors(own, others, scale)[1].topk(rank, 1).values[:, -1].clamp(min=0)


def _bisectors(own: _Side, others: _Side, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of P other rows with m own ones: lengths of normals ``scale (x+ - x-)``, and the query's distances, ``(P, m)``.

    Distances are negative on the other row's side. Those of copies are 0 and their normals infinite: they bound nothing.
    """
    lengths = others.lengths[:, None] + own.lengths
    squares = lengths - others.features @ (2 * scale.square() * own.features).T
    normals = squares.masked_fill(squares <= _SAME**2 * lengths, torch.inf).sqrt()
    return normals, (others.distances[:, None] - own.distances) / (2 * normals)


def _enter_cells(own: _Side, cells: _Side, scale: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Norms ``(P,)`` and perturbations ``(P, D)`` that lead into the cells of P other rows.

    A program is ``min |d|^2 / 2`` such that ``u_j d + b_j <= 0`` for every own row j: b_j is its bisector's distance, u_j the
    normal of unit length. It is given up where its dual value shows that it exceeds a limit.
    """
    normals, distances = _bisectors(own, cells, scale)
    norms, perturbations = normals.new_zeros(len(normals)), torch.zeros_like(cells.features)
    size = min(_MORE, normals.shape[1])
    joining = distances.topk(size, 1).indices
    todo, joined, duals = torch.arange(len(normals), device=normals.device), joining[:, :0], distances[:, :0]
    while len(todo):
        joined = torch.cat([joined, joining], 1)  # (P, w)
        duals = torch.cat([duals, duals.new_zeros(joining.shape)], 1)
        units = (own.features[joined] - cells.features[todo, None]) * scale
        units = units / normals[todo].gather(1, joined)[:, :, None]  # (P, w, D)
        gram, missing = units @ units.mT, distances[todo].gather(1, joined)
        duals = _coordinate_ascent(gram, missing, duals)
        steps = -(duals[:, None] @ units).squeeze(1)  # (P, D)
        values = (duals * missing).sum(1) - steps.square().sum(1) / 2
        norms[todo], perturbations[todo] = (2 * values).clamp(min=0).sqrt(), steps
        scaled = steps * scale
        violations = scaled @ own.features.T - (scaled * cells.features[todo]).sum(1, keepdim=True)  # (P, m)
        violations = violations / normals[todo] + distances[todo]
        worst, joining = violations.scatter(1, joined, -torch.inf).topk(size, 1)
        open_ = (worst[:, 0] > _TOLERANCE) & (norms[todo] < limit)
        todo, joined, joining, duals = todo[open_], joined[open_], joining[open_], duals[open_]
    return norms, perturbations


def _coordinate_ascent(gram: Tensor, missing: Tensor, duals: Tensor) -> Tensor:
    """The ``duals >= 0`` that maximise ``missing duals - duals gram duals / 2``, from given ones: the largest change first.

    Args:
        gram: ``(P, w, w)``, 1 on the diagonal.
        missing: ``(P, w)``.
        duals: ``(P, w)``.
    """
    gradient = missing - (gram @ duals[:, :, None]).squeeze(2)
    for _ in range(_UPDATES):
        changes = (duals + gradient).clamp(min=0) - duals
        largest, which = changes.abs().max(1, keepdim=True)
        if not (largest > _TOLERANCE).any():
            break
        change = changes.gather(1, which)
        column = gram.gather(1, which[:, :, None].expand(-1, 1, gram.shape[2])).squeeze(1)
        duals, gradient = duals.scatter_add(1, which, change), gradient - change * column
    return duals
