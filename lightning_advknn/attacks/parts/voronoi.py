"""Lower bounds of the L2, or the exact one, that changes the class of a kNN on pixels.

They follow Wang et al. (Evaluating the Robustness of Nearest Neighbor Classifiers: A Primal-Dual Perspective,
arXiv 1906.03972). The bisector of a training image x- of a wrong class and one x+ of the own class is the set
of points with equal distances to both. An image must cross it to be nearer to x- than to x+. `lower_bound`
counts bisectors. `exact_minimum` is the distance to the nearest Voronoi cell of an x-, which its bisectors
with all x+ enclose; it solves a quadratic program for each x-, with pixels in [0, 1].

`lower_bound` allows pixels outside [0, 1]. Within [0, 1] an attack needs the same L2 or more. Features may be
pixels times one `scale` each plus a constant, for example normalised pixels. Perturbations and their L2 norms
are in pixels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

ALGORITHM = "wang-2019/2"  # part of the keys of stored results: change it if results change
_SCREEN = 64  # smallest number of nearest own rows that order the others
_BLOCK = 512  # other rows compared with all own rows at once
_CELLS = 8  # programs solved at once
_MORE = 8  # constraints added to a program at once
_TOLERANCE = 1e-9  # of constraints, in pixel units
_NEWTON = 100  # most steps on a dual before constraints are added
# Tried in each step: numbers added to the diagonal of second derivatives, which is at most 1, and lengths.
_DAMPING = (1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 1.0, 1e2)
_LENGTHS = (1.0, 0.5, 0.25)
_SAME = 1e-5  # rows are copies if their distance is below this share of their lengths


class Minimum(NamedTuple):
    """The smallest perturbations that change the class of a 1-NN."""

    norms: Tensor
    """Dual values of L2, float64 ``(B,)``, never above the minimum; infinite without another class."""
    perturbations: Tensor
    """float64 ``(B, D)``; up to rounding they end on the edge of a cell."""
    rows: Tensor
    """Row of the cell, int64 ``(B,)``; -1 if all rows have the own class."""


class _Range(NamedTuple):
    """Lowest and highest values of a perturbation, float64 ``(D,)``, or one for all."""

    lowest: Tensor | float
    highest: Tensor | float

    def clip(self, perturbations: Tensor) -> Tensor:
        return perturbations.clamp(self.lowest, self.highest)  # type: ignore[arg-type]


class _Side(NamedTuple):
    """All rows of the own class, or all others, relative to one query."""

    features: Tensor
    """float64 ``(m, D)``."""
    lengths: Tensor
    """Squared lengths of ``scale * features``, float64 ``(m,)``."""
    distances: Tensor
    """Squared distances of features to the query's, up to a constant, float64 ``(m,)``."""

    def pick(self, which: Tensor) -> "_Side":
        return _Side(self.features[which], self.lengths[which], self.distances[which])


@torch.no_grad()
def exact_minimum(
    rows: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    scale: Tensor | float = 1.0,
    pixels: Tensor | None = None,
) -> Minimum:
    """Compute the exact minimum for 1-NN.

    Each wrong row is a quadratic program, solved by Newton's method on its dual. Rows are ordered by a lower
    bound: their largest bisector distance to some own rows. The search ends when this bound exceeds the best
    value so far, and a program ends when its dual value does. A program starts with its farthest bisectors;
    violated ones are added.

    If rows of two classes are at the same distance, this counts as a change of class.

    Deviations: Wang et al. set no limits to pixels; here they stay in [0, 1]. The bounds that order rows use
        only the nearest own rows, which is faster and never too large. A program that has not converged after
        many steps counts by its dual value, a lower bound.

    Args:
        rows: Features of the training images, ``(M, D)``.
        labels: Their classes, int64 ``(M,)``.
        queries: Features of the images, ``(B, D)``.
        query_labels: Classes to leave, int64 ``(B,)``.
        scale: Change of a feature when its pixel changes by 1, ``(D,)`` or one for all; not 0.
        pixels: The images, ``(B, D)`` in [0, 1], which they do not leave; None for no limits.
    """
    sizes = torch.as_tensor(scale, dtype=torch.float64, device=rows.device).expand(rows.shape[1])
    norms = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=rows.device)
    perturbations = torch.zeros_like(queries, dtype=torch.float64)
    cells = torch.full_like(query_labels, -1)
    for i, own, others, wrong_rows in _each(rows, labels, queries, query_labels, sizes):
        if not len(own.features):
            norms[i], cells[i] = 0, wrong_rows[others.distances.argmin()]
            continue
        limits = _Range(-torch.inf, torch.inf)
        if pixels is not None:
            limits = _Range(-pixels[i].double(), 1 - pixels[i].double())
        bounds, order = _bounds(own, others, sizes, 1)
        for start in range(0, len(order), _CELLS):
            if bounds[start] >= norms[i]:
                break
            block = order[start : start + _CELLS]
            reached, found = _enter_cells(own, others.pick(block), sizes, limits, norms[i])
            nearest = reached.argmin()
            if reached[nearest] < norms[i]:
                norms[i], perturbations[i] = reached[nearest], found[nearest]
                cells[i] = wrong_rows[block[nearest]]
    return Minimum(norms, perturbations, cells)


@torch.no_grad()
def lower_bound(
    rows: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, scale: Tensor | float = 1.0
) -> Tensor:
    """Compute a lower bound for kNN: the r-th smallest of the wrong rows' distances.

    The class changes only if ``r = (k + 1) // 2`` wrong rows are among the k nearest, each nearer than all
    but ``k // 2`` own rows. So the distance of a wrong row is its r-th largest one to own rows. Deviation:
    for even k it is the (r + 1)-th largest, because the own class may lose a tie of votes.

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
    """Yield for each query with wrong rows: its position, the own rows, the others, and their positions."""
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
    """Lower bounds of other rows' rank-th largest bisector distances, ascending, and the rows, ``(n,)``."""
    size = min(len(own.features), max(_SCREEN, 2 * rank))
    near = own.pick(own.distances.topk(size, largest=False).indices)
    bounds, order = _rank_th(near, others, scale, rank).sort()
    return bounds, order


def _rank_th(own: _Side, others: _Side, scale: Tensor, rank: int) -> Tensor:
    """Rank-th largest bisector distance of other rows, at least 0, ``(P,)``."""
    return _bisectors(own, others, scale)[1].topk(rank, 1).values[:, -1].clamp(min=0)


def _bisectors(own: _Side, others: _Side, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Bisectors of P other and m own rows: lengths of normals ``scale (x+ - x-)`` and distances, ``(P, m)``.

    Distances of the query are negative on the other row's side. For copies they are 0 and the normals are
    infinite, so copies bound nothing.
    """
    lengths = others.lengths[:, None] + own.lengths
    squares = lengths - others.features @ (2 * scale.square() * own.features).T
    normals = squares.masked_fill(squares <= _SAME**2 * lengths, torch.inf).sqrt()
    return normals, (others.distances[:, None] - own.distances) / (2 * normals)


def _enter_cells(
    own: _Side, cells: _Side, scale: Tensor, limits: _Range, most: Tensor
) -> tuple[Tensor, Tensor]:
    """Find norms ``(P,)`` and perturbations ``(P, D)`` that lead into the cells of P other rows.

    A program is ``min |d|^2 / 2`` within the limits, subject to ``u_j d + b_j <= 0`` for every own row j,
    where b_j is the distance of the bisector and u_j its unit normal. It ends when its dual value exceeds `most`.
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
        duals, steps, values = _solve_dual(units, distances[todo].gather(1, joined), duals, limits)
        norms[todo], perturbations[todo] = (2 * values).clamp(min=0).sqrt(), steps
        scaled = steps * scale
        violations = scaled @ own.features.T - (scaled * cells.features[todo]).sum(1, keepdim=True)  # (P, m)
        violations = violations / normals[todo] + distances[todo]
        worst, joining = violations.scatter(1, joined, -torch.inf).topk(size, 1)
        open_ = (worst[:, 0] > _TOLERANCE) & (norms[todo] < most)
        todo, joined, joining, duals = todo[open_], joined[open_], joining[open_], duals[open_]
    return norms, perturbations


def _solve_dual(
    units: Tensor, missing: Tensor, duals: Tensor, limits: _Range
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximise the duals of P programs by projected Newton steps.

    For multipliers ``m >= 0`` of the constraints, the nearest point is ``d = clip(-sum_j m_j u_j)``. The dual
    is concave with gradient ``b_j + u_j d``, which is linear as long as the same coordinates are at their
    limits. Multipliers at 0 that would fall are left out of a step (Bertsekas 1982). Of steps of several
    dampings and lengths, that which raises the dual most is taken: undamped where constraints are
    independent, else some part of a gradient step, which always raises it.

    Args:
        units: Unit normals u, float64 ``(P, w, D)``.
        missing: Distances b, ``(P, w)``.
        duals: First multipliers, ``(P, w)``.
        limits: Of d.

    Returns:
        Multipliers ``(P, w)``, points d ``(P, D)`` and dual values ``(P,)``.
    """
    some, width = range(len(duals)), duals.shape[1]
    damped, lengths = (
        torch.tensor(each, dtype=duals.dtype, device=duals.device) for each in (_DAMPING, _LENGTHS)
    )
    damping = damped[:, None, None, None] * torch.eye(width, dtype=duals.dtype, device=duals.device)
    for _ in range(_NEWTON):
        pull = -(duals[:, None] @ units).squeeze(1)  # (P, D)
        steps = limits.clip(pull)
        gradient = missing + (units @ steps[:, :, None]).squeeze(2)
        if not (torch.where(duals > 0, gradient.abs(), gradient) > _TOLERANCE).any():
            break
        fixed = (duals <= 0) & (gradient <= 0)
        free = (pull == steps).to(units.dtype)
        hessian = (units * free[:, None]) @ units.mT
        hessian = hessian.masked_fill(fixed[:, :, None] | fixed[:, None], 0.0) + damping  # (8, P, w, w)
        changes = torch.linalg.solve(hessian, gradient.masked_fill(fixed, 0.0)[None, :, :, None]).squeeze(3)
        tries = (duals + lengths[:, None, None, None] * changes).clamp(min=0).flatten(0, 1)
        tries = torch.cat([duals[None], tries])
        chosen = _dual_values(units, missing, tries, limits)[1].argmax(0)
        duals = tries[chosen, some]
    steps, values = _dual_values(units, missing, duals, limits)
    return duals, steps, values


def _dual_values(units: Tensor, missing: Tensor, duals: Tensor, limits: _Range) -> tuple[Tensor, Tensor]:
    """Points ``(..., P, D)`` and dual values ``(..., P)`` of multipliers ``(..., P, w)``."""
    pull = -(duals[..., None, :] @ units).squeeze(-2)
    steps = limits.clip(pull)
    return steps, (duals * missing).sum(-1) + (steps.square() / 2 - pull * steps).sum(-1)
