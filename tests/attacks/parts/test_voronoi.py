"""Exact minima and lower bounds against banks worked by hand, SciPy's SLSQP, grids and plain loops."""

import numpy as np
import pytest
import scipy.optimize
import torch

from lightning_advknn.attacks.parts import voronoi
from lightning_advknn.attacks.parts.voronoi import exact_minimum, lower_bound


def points(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_two_points_by_hand(device):
    rows, labels = points([0.2, 0.5], [0.8, 0.5]).to(device), torch.tensor([0, 1], device=device)
    queries = points([0.3, 0.9], [0.5, 0.1], [0.6, 0.2], [0.1, 0.7]).to(device)
    # Between them lies x = .5. The third is beyond it; the fourth has the other's class.
    own = torch.tensor([0, 0, 0, 1], device=device)
    found = exact_minimum(rows, labels, queries, own)
    assert found.norms.tolist() == pytest.approx([0.2, 0, 0, 0], abs=1e-9)
    expected = points([0.2, 0], [0, 0], [0, 0], [0, 0]).to(device)
    torch.testing.assert_close(found.perturbations, expected, rtol=0, atol=1e-9)
    assert found.rows.tolist() == [1, 1, 1, 0]
    assert lower_bound(rows, labels, queries, own, 1).tolist() == pytest.approx([0.2, 0, 0, 0], abs=1e-9)
    assert found.norms.dtype == torch.float64


def test_three_points_by_hand(device):
    # The cell of (1, .5) ends in a corner: 2x + y = 1.25 against (0, 0), 2x - y = .25 against (0, 1).
    rows, labels = points([0, 0], [0, 1], [1, 0.5]).to(device), torch.tensor([4, 4, 0], device=device)
    query, own = points([0, 0.5]).to(device), torch.tensor([4], device=device)
    found = exact_minimum(rows, labels, query, own)
    assert found.norms.item() == pytest.approx(0.375)
    torch.testing.assert_close(found.perturbations, points([0.375, 0]).to(device))
    assert found.rows.item() == 2
    # The bound knows only how far either line is.
    assert lower_bound(rows, labels, query, own, 1).item() == pytest.approx(0.75 / 5**0.5)
    # Two own rows always win among three.
    assert lower_bound(rows, labels, query, own, 3).item() == torch.inf


@pytest.mark.parametrize("more", [1, 3, 8])
def test_the_corner_of_a_cube_by_hand(device, monkeypatch, more):
    # Around 0, unit vectors e_i cut off all that is beyond x_i = .5: from (.9, ..., .9) the cube's corner is
    # nearest.
    monkeypatch.setattr(voronoi, "_MORE", more)
    rows = torch.cat([torch.zeros(1, 12), torch.eye(12)]).double().to(device)
    labels, own = torch.tensor([0] + 12 * [1], device=device), torch.tensor([1], device=device)
    query = torch.full((1, 12), 0.9, dtype=torch.float64, device=device)
    found = exact_minimum(rows, labels, query, own)
    assert found.norms.item() == pytest.approx(0.4 * 12**0.5)
    torch.testing.assert_close(found.perturbations, torch.full_like(query, -0.4))
    assert lower_bound(rows, labels, query, own, 1).item() == pytest.approx(0.4)


def test_the_smallest_bound_is_not_always_of_the_nearest_cell(device, monkeypatch):
    # The corner's cell is at .375, and its bound .335 is the smallest; (b cos t, -b sin t) is at (b + sin t)
    # / 2, and so is its bound.
    monkeypatch.setattr(voronoi, "_CELLS", 1)
    rows = points([0, 0], [0, 1], [1, 0.5], [0.62 * 0.99**0.5, -0.062]).to(device)
    labels, own = torch.tensor([1, 1, 0, 2], device=device), torch.tensor([1], device=device)
    found = exact_minimum(rows, labels, points([0, 0.5]).to(device), own)
    assert found.norms.item() == pytest.approx(0.36)
    assert found.rows.item() == 3


def test_features_of_another_scale_by_hand(device):
    # Pixels (0, 0) and (1, 1), the first of which counts double: nearer to (1, 1) where 4x + y >= 2.5.
    rows, labels = points([3, 7], [5, 8]).to(device), torch.tensor([0, 1], device=device)
    scale = torch.tensor([2.0, 1.0], device=device)
    query, own = points([3, 7]).to(device), torch.tensor([0], device=device)
    found = exact_minimum(rows, labels, query, own, scale)
    assert found.norms.item() == pytest.approx(2.5 / 17**0.5)
    torch.testing.assert_close(found.perturbations, points([4, 1]).to(device) * 2.5 / 17)
    assert lower_bound(rows, labels, query, own, 1, scale).item() == pytest.approx(2.5 / 17**0.5)
    # One scale for all: features are ten times as far apart as pixels.
    tenfold = exact_minimum(10 * rows, labels, 10 * query, own, 10.0)
    assert tenfold.norms.item() == pytest.approx(5**0.5 / 2)


def test_a_tie_of_votes_by_hand():
    # Own rows at 0 and .1, the other's at 1. Of k = 2, one vote against one may be lost: from .05 on, that is
    # beyond .5, where the other's row is nearer than that at 0. For k = 1 it has to be nearer than both:
    # beyond .55.
    rows, labels = points([0], [0.1], [1]), torch.tensor([1, 1, 0])
    query, own = points([0.05]), torch.tensor([1])
    assert lower_bound(rows, labels, query, own, 2).item() == pytest.approx(0.45)
    assert lower_bound(rows, labels, query, own, 1).item() == pytest.approx(0.5)


def test_one_class_alone_and_none_of_it():
    rows, labels = points([0.2, 0.5], [0.8, 0.5]), torch.tensor([1, 1])
    queries = points([0.7, 0.5], [0.3, 0.5])
    found = exact_minimum(rows, labels, queries, torch.tensor([1, 0]))
    assert found.norms.tolist() == [torch.inf, 0]
    assert found.rows.tolist() == [-1, 0]
    assert not found.perturbations.any()
    assert lower_bound(rows, labels, queries, torch.tensor([1, 0]), 1).tolist() == [torch.inf, 0]


def test_copies_bound_nothing():
    # The first other row is a copy of an own one: both are always equally near.
    rows, labels = points([0.2, 0.5], [0.2, 0.5], [0.9, 0.5], [0.5, 0.5]), torch.tensor([0, 1, 1, 0])
    query, own = points([0.6, 0.5]), torch.tensor([0])
    found = exact_minimum(rows, labels, query, own)
    assert found.norms.item() == pytest.approx(0.1)  # to (.9, .5) across .7; to the copy it is .25
    assert found.rows.item() == 2
    assert lower_bound(rows, labels, query, own, 1).item() == pytest.approx(0.1)


def cell_distance(own, other, query, scale, pixels=None):
    """The nearest point of a cell by SciPy, from the constraint that squared distances say."""

    def slack(step):
        moved = query + scale * step
        return ((moved - own) ** 2).sum(1) - ((moved - other) ** 2).sum()

    start = (other - query) / scale
    solved = scipy.optimize.minimize(
        lambda step: step @ step / 2,
        start,
        jac=lambda step: step,
        constraints={"type": "ineq", "fun": slack},
        bounds=None if pixels is None else list(zip(-pixels, 1 - pixels, strict=True)),
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert slack(solved.x).min() > -1e-7
    return np.linalg.norm(solved.x)


def problem(seed, width=4, size=30, classes=3):
    rng = np.random.default_rng(seed)
    rows, labels = rng.random((size, width)), rng.integers(classes, size=size)
    queries, scale = rng.random((3, width)), rng.uniform(0.5, 3, width)
    own = [labels[((rows - query) ** 2).sum(1).argmin()] for query in queries]
    arrays = rows, labels, queries, np.array(own), scale
    return arrays, [torch.from_numpy(each) for each in arrays]


@pytest.mark.parametrize("seed", range(8))
def test_exact_minima_are_scipys(device, monkeypatch, seed):
    # Few at once, so that each loop runs several times.
    for name, value in (("_SCREEN", 3), ("_CELLS", 2), ("_MORE", 2)):
        monkeypatch.setattr(voronoi, name, value)
    (rows, labels, queries, own, scale), tensors = problem(seed, width=2 + seed % 4)
    found = exact_minimum(*(each.to(device) for each in tensors))
    for i, query in enumerate(queries):
        theirs = [
            cell_distance(rows[labels == own[i]], rows[j], query, scale)
            for j in np.flatnonzero(labels != own[i])
        ]
        assert found.norms[i].item() == pytest.approx(min(theirs), abs=1e-6)
        assert np.flatnonzero(labels != own[i])[np.argmin(theirs)] == found.rows[i].item()
        # The dual value is that of a point which is indeed there.
        step = found.perturbations[i].cpu().numpy()
        assert np.linalg.norm(step) == pytest.approx(found.norms[i].item(), abs=1e-8)
        squares = ((query + scale * step - rows) ** 2).sum(1)
        assert squares[found.rows[i]] == pytest.approx(squares[labels == own[i]].min(), abs=1e-7)


@pytest.mark.parametrize("seed", range(8))
def test_exact_minima_within_the_unit_interval_are_scipys(device, monkeypatch, seed):
    for name, value in (("_SCREEN", 3), ("_CELLS", 2), ("_MORE", 2)):
        monkeypatch.setattr(voronoi, name, value)
    (points, labels, pixels, _, scale), _ = problem(seed, width=3 + seed % 3)
    pixels[:, 1:] = pixels[:, 1:].round()  # many are black or white
    rows, queries = scale * points - 0.3, scale * pixels - 0.3
    own = np.array([labels[((rows - query) ** 2).sum(1).argmin()] for query in queries])
    arrays = [torch.from_numpy(each).to(device) for each in (rows, labels, queries, own, scale, pixels)]
    found, endless = exact_minimum(*arrays), exact_minimum(*arrays[:5])
    for i, query in enumerate(queries):
        theirs = [
            cell_distance(rows[labels == own[i]], rows[j], query, scale, pixels[i])
            for j in np.flatnonzero(labels != own[i])
        ]
        assert found.norms[i].item() == pytest.approx(min(theirs), abs=1e-6)
        step = found.perturbations[i].cpu().numpy()
        assert np.linalg.norm(step) == pytest.approx(found.norms[i].item(), abs=1e-8)
        assert -1e-12 <= (pixels[i] + step).min() <= (pixels[i] + step).max() <= 1 + 1e-12
        squares = ((query + scale * step - rows) ** 2).sum(1)
        assert squares[found.rows[i]] == pytest.approx(squares[labels == own[i]].min(), abs=1e-7)
    assert (endless.norms <= found.norms + 1e-9).all()
    assert (endless.norms < found.norms - 1e-3).any()


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("seed", range(3))
def test_lower_bounds_are_those_of_plain_loops(device, monkeypatch, seed, k):
    for name, value in (("_SCREEN", 2), ("_BLOCK", 3)):
        monkeypatch.setattr(voronoi, name, value)
    (rows, labels, queries, own, scale), tensors = problem(seed)
    found = lower_bound(*(each.to(device) for each in tensors[:4]), k, tensors[4].to(device))
    for i, query in enumerate(queries):
        by_other = []
        for other in rows[labels != own[i]]:
            distances = []
            for mine in rows[labels == own[i]]:
                away, near = ((query - other) ** 2).sum(), ((query - mine) ** 2).sum()
                distances.append(max(0.0, (away - near) / (2 * np.linalg.norm(scale * (mine - other)))))
            # All but k // 2 of them are to be crossed.
            by_other.append(sorted(distances, reverse=True)[k // 2] if len(distances) > k // 2 else 0.0)
        expected = sorted(by_other)[(k + 1) // 2 - 1] if len(distances) > k // 2 else 0.0
        assert found[i].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(4))
def test_no_point_of_a_grid_is_nearer(pixel_knn, device, seed, k):
    # The victim itself is asked about all of a square around the image, with its own rule for ties.
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(24, 1, 1, 2, generator=generator)
    labels = torch.randint(2, (24,), generator=generator)
    victim = pixel_knn(rows, labels, k, mean=(0.3,), std=(0.5,))
    bank = victim.banks["normalize"]
    query = torch.rand(1, 1, 1, 2, generator=generator).to(device)
    own = victim.predict(query)
    axis = torch.linspace(0, 1, 101)
    grid = torch.cartesian_prod(axis, axis).view(-1, 1, 1, 2).to(device)
    fooled = grid[victim.predict(grid) != own].flatten(1)
    nearest = (fooled - query.flatten(1)).double().norm(dim=1).min().item() if len(fooled) else np.inf
    queries = victim.network.features(query)["normalize"]
    bound = lower_bound(bank.features, bank.labels, queries, own, k, 2.0).item()
    assert bound <= nearest + 1e-6
    if k == 1:
        exact = exact_minimum(bank.features, bank.labels, queries, own, 2.0)
        assert bound <= exact.norms.item() + 1e-9
        assert exact.norms.item() <= nearest + 1e-6
        end = query.flatten(1) + exact.perturbations
        if 0.01 < end.min() <= end.max() < 0.99:
            assert nearest <= exact.norms.item() + 0.03  # cells are wider than the grid's steps of .01


def test_a_larger_problem_has_no_gap(device, monkeypatch):
    # Three cells among 600 others in 20 dimensions: several constraints are active. Weak duality bounds from
    # below, a feasible point from above.
    monkeypatch.setattr(voronoi, "_MORE", 1)
    rng = np.random.default_rng(0)
    rows = rng.random((600, 20))
    labels = (np.arange(600) >= 3).astype(int)
    query = rows[labels == 1].mean(0)
    found = exact_minimum(
        *(torch.from_numpy(each).to(device) for each in (rows, labels, query[None], np.array([1])))
    )
    step = found.perturbations[0].cpu().numpy()
    squares = ((query + step - rows) ** 2).sum(1)
    assert squares[found.rows[0]] <= squares[labels == 1].min() + 1e-8
    assert np.linalg.norm(step) == pytest.approx(found.norms.item(), rel=1e-7)
    active = np.abs(squares[labels == 1] - squares[found.rows[0]]) < 1e-7
    assert active.sum() > 2


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k):
    rows, labels = points([0.0], [1.0], [2.0]), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=rf"Expected `k` to be in \[1, 3\] \(the rows\), but got {k}"):
        lower_bound(rows, labels, rows, labels, k)
