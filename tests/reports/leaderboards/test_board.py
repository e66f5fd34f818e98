"""A leaderboard's files are read back over seeds and ranked."""

from pathlib import Path

import pytest

from lightning_advknn.reports.leaderboards.board import Board, read_board
from tests.reports.leaderboards.boards import ENTRIES, write_board


def test_values_are_over_seeds(tmp_path: Path) -> None:
    board = write_board(tmp_path, ENTRIES, (0, 1))
    value = board.value("bim, origin", "knn/relu3", "accuracy", ("l2", 2.0))
    assert value is not None
    assert value.values == (59.0, 58.0)
    assert board.value("least, dknn", "dknn", "min_l2_median", ("l2", None)).values == (1.25, 2.25)  # type: ignore[union-attr]
    assert board.value("least, dknn", "dknn", "accuracy", ("linf", 0.1)) is None
    assert board.value("least, dknn", "dnn", "detected", ("l2", None)) is None
    assert (board.title, board.radii("linf")) == ("Fashion-MNIST", [0.1, 0.2, 0.3, 0.4])
    assert board.main("bim, origin", "dknn") == ("linf", 0.4)
    assert board.main("least, dknn", "dknn") == ("l2", None)
    assert board.main("worst case", "dknn") == ("l2", 5.0)


def test_the_strongest_come_first(tmp_path: Path) -> None:
    never = {"never, origin": (9.0, True), "hardly, origin": (9.5, True)}
    board = write_board(tmp_path, {**never, **ENTRIES})
    records = [
        {**record, "min_l2_median": None}
        if str(record["attack"]).partition(",")[0] in ("never", "hardly")
        else record
        for record in board.records
    ]
    names = ["least, dknn", "bim, origin", "fgsm, origin", "hardly, origin", "never, origin"]
    assert Board(records, board.content).ranked("dknn") == names


def test_no_or_a_damaged_leaderboard(tmp_path: Path) -> None:
    assert read_board(tmp_path) is None
    write_board(tmp_path, ENTRIES)
    (tmp_path / "leaderboard.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"leaderboard.json to be as it was written, but.*Delete the leaderboard"
    ):
        read_board(tmp_path)
