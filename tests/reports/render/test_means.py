"""Numbers over seeds."""

import pytest

from lightning_advknn.reports.render.means import Mean


def test_mean_over_seeds_by_hand() -> None:
    two = Mean((98.0, 99.0))
    assert two.mean == 98.5
    assert two.sd == pytest.approx(0.5**0.5)  # sqrt((.25 + .25) / 1)
    assert str(two) == "98.50 ± 0.71 (2)"
    assert str(Mean((1.0,))) == "1.00 (1)"
    assert Mean((1.0,)).sd is None
