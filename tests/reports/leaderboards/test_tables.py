"""Tables of a leaderboard by hand."""

from pathlib import Path
from typing import Any

import pytest

from lightning_advknn.reports.leaderboards.board import Board
from lightning_advknn.reports.leaderboards.figure import board_figure
from lightning_advknn.reports.leaderboards.records import LEADERBOARD
from lightning_advknn.reports.leaderboards.tables import attacks_table, published_table
from tests.reports.leaderboards.boards import ENTRIES, drawn, line, write_board


def test_a_table_by_hand(tmp_path: Path) -> None:
    board = write_board(tmp_path, ENTRIES, (0, 1))
    table = attacks_table(board, "dknn")
    assert list(table.header) == [
        "attack",
        *("Linf 0.1", "Linf 0.2", "Linf 0.3", "Linf 0.4"),
        *("L2 1", "L2 2", "L2 3", "L2 4", "L2 5"),
        *("fooled", "median L2", "mean L2", "credibility", "detected", "queries", "seconds"),
    ]
    rows = [[cell[0] for cell in row] for row in table.rows]
    assert [row[0] for row in rows] == ["worst case", "least, dknn", "bim, origin", "fgsm, origin"]
    # Seeds differ by 1 (standard deviation .71), credibilities by .1 (.07).
    assert rows[2] == [
        "bim, origin",
        *("79.50 ± 0.71", "59.50 ± 0.71", "39.50 ± 0.71", "19.50 ± 0.71"),
        *("79.50 ± 0.71", "59.50 ± 0.71", "39.50 ± 0.71", "19.50 ± 0.71", "0.00 ± 0.00"),
        *("97.5 ± 0.7", "3.00 ± 0.71", "-", "0.25 ± 0.07", "40.0 ± 0.0", "0 ± 0", "0.250 ± 0.000"),
    ]
    assert rows[1][1:5] == ["-"] * 4
    assert rows[1][-2:] == ["120 ± 0", "0.250 ± 0.000"]
    assert "98.50 ± 0.71 on clean images" in table.caption
    assert "all 3 attacks" in table.caption
    assert "mean credibility (`ge`)" in table.caption
    assert "5 % false alarms" in table.caption


def test_a_brief_table_has_the_strongest(tmp_path: Path) -> None:
    entries = {f"attack{position}, origin": (5.0 + position, True) for position in range(12)}
    table = attacks_table(write_board(tmp_path, entries), "dknn", brief=True)
    assert [row[0][0] for row in table.rows] == [
        "worst case",
        *(f"attack{n}, origin" for n in range(11, 1, -1)),
    ]
    assert list(table.header) == [
        "attack",
        *("Linf 0.1", "Linf 0.3", "Linf 0.4"),
        *("L2 1", "L2 2", "L2 3"),
        *("median L2", "credibility", "detected"),
    ]
    assert "the 10 strongest of 12 attacks" in table.caption


def mnist_board(**victim: Any) -> Board:
    """Two entries that others have published numbers of, one of them against two victims."""
    settings = {"layer": "relu3", "k": 75, "metric": "cosine", "convention": "ge", **victim}
    more = {"l2_mean": 3.25, "credibility_success_mean": 0.1234}
    empty = dict.fromkeys(LEADERBOARD)
    records = [
        empty | record
        for record in (
            line("sitawarin_wagner_published, dknn", "dknn", "linf", 0.2, 0, accuracy=11.1, **more),
            line("bim, dknnb_cl", "dknn", "linf", 0.25, 0, accuracy=0.5, **more),
            line("bim, dknnb_cl", "knn/relu3", "linf", 0.25, 0, accuracy=0.0, **more),
            line("worst case", "dknn", "linf", 0.2, 0, accuracy=0.3),
        )
    ]
    return Board(records, {"settings": {"data": {"name": "MNIST"}, "victim": settings}, "runs": {}})


def test_published_numbers_stand_beside_ours() -> None:
    table = published_table(mnist_board(), "dknn")
    assert table is not None
    wagner, advknn = ([cell[0] for cell in row] for row in table.rows)
    # Of Sitawarin & Wagner 17.44 % at a mean L2 of 3.476, credibility .104; of the paper's Table 2 only 5.97 %.
    name = "sitawarin_wagner_published, dknn"
    assert wagner == [
        *("Sitawarin & Wagner 2019", name, "Linf 0.2", "17.44", "11.10"),
        *("0.30", "3.48", "3.25", "0.104", "0.123"),
    ]
    assert advknn == [
        *("AdvKNN, DkNNB + CL BIM", "bim, dknnb_cl", "Linf 0.25", "5.97", "0.50"),
        *("-", "-", "3.25", "-", "0.123"),
    ]
    knn = published_table(mnist_board(), "knn/relu3")
    assert knn is not None
    assert [row[3][0] for row in knn.rows] == ["1.03"]
    strict = published_table(mnist_board(convention="strict"), "dknn")
    assert strict is not None
    assert [row[-1][0] for row in strict.rows] == ["-", "-"]


@pytest.mark.parametrize("other", [{"k": 25}, {"metric": "euclidean"}, {"layers": ["relu3"]}])
def test_other_victims_have_no_published_numbers(other: dict[str, Any]) -> None:
    assert published_table(mnist_board(**other), "dknn") is None


def with_bound(board: Board) -> Board:
    """The same with a lower bound of DkNN, which looks stronger than any attack."""
    bound = [
        line("lower bound", "dknn", "l2", half / 2, 0, accuracy=max(100.0 - 20 * half, 0))
        | {"counted": "bound", "min_l2_median": 0.1}
        for half in range(1, 11)
    ]
    empty = dict.fromkeys(LEADERBOARD)
    return Board([*board.records, *(empty | record for record in bound)], board.content)


def test_a_lower_bound_is_shown_and_is_no_attack(tmp_path: Path) -> None:
    without = write_board(tmp_path, ENTRIES)
    board = with_bound(without)
    assert board.ranked("dknn") == without.ranked("dknn")
    table, other = attacks_table(board, "dknn"), attacks_table(board, "knn/relu3")
    assert [row[0][0] for row in table.rows][:3] == ["worst case", "lower bound", "least, dknn"]
    assert [cell[0] for cell in table.rows[1]] == [
        "lower bound",
        *["-"] * 4,
        *("60.00", "20.00", "0.00", "0.00", "0.00"),
        *("-", "0.10", "-", "-", "-", "-", "-"),
    ]
    assert "all 3 attacks" in table.caption
    assert "no attack at all can go below" in table.caption
    assert [row[0][0] for row in other.rows][:2] == ["worst case", "least, dknn"]
    assert "below" not in other.caption
    dknn, knn = board_figure(board).axes
    (dotted,) = (one for one in dknn.lines if one.get_linestyle() == ":")
    assert drawn(dknn)["lower bound of any attack"][:3] == [(0, 98.0), (0.5, 80.0), (1.0, 60.0)]
    assert dotted.get_label() == "lower bound of any attack"
    assert len(dknn.lines) == 1 + len(knn.lines) == 1 + 4
