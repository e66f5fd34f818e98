"""The figure of a leaderboard shows its numbers."""

from pathlib import Path

from lightning_advknn.reports.leaderboards.board import Board
from lightning_advknn.reports.leaderboards.figure import _COLOURS, _NAMED, board_figure
from tests.reports.leaderboards.boards import drawn, write_board


def test_the_figure_has_every_curve(tmp_path: Path) -> None:
    entries = {
        f"a{position}, {on}": (5.0 + position + (on == "dknnb_cl"), True)
        for position in range(15)
        for on in ("origin", "dknnb_cl")
    }
    figure = board_figure(write_board(tmp_path, entries))
    dknn, knn = figure.axes
    assert (dknn.get_title(), knn.get_title()) == ("DkNN", "kNN on relu3")
    assert len(dknn.lines) == len(knn.lines) == 31
    assert drawn(dknn)["worst case of all"] == [
        (0, 98.0),
        *((half / 2, max(100.0 - 25 * half, 0)) for half in range(1, 11)),
    ]
    assert drawn(knn)["a14"][:3] == [(0, 98.0), (0.5, 89.0), (1.0, 79.0)]
    # Of each attack the curve that is strongest, from the strongest attack on; the others are grey.
    named = [str(line.get_label()) for line in dknn.lines if line.get_color() != "0.65"]
    assert named == [
        "worst case of all",
        *(f"a{position}" for position in range(14, 14 - _NAMED, -1)),
    ]
    looks = [(line.get_color(), line.get_linestyle()) for line in dknn.lines if line.get_label() in named]
    assert len(set(looks)) == len(looks)
    (worst,) = (line for line in dknn.lines if line.get_color() == "black")
    assert worst.get_label() == "worst case of all"
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*named, "other attacks"]
    assert min(text.get_fontsize() for text in legend.get_texts()) >= 7
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert (
        min(axes.get_window_extent().height for axes in figure.axes) > 150
    )  # points at 100 dpi: the curves keep their room


def test_an_attack_has_one_colour_for_what_is_strongest_on_each_victim(tmp_path: Path) -> None:
    board = write_board(tmp_path, {"least, dknn": (30.0, False), "least, knn": (10.0, False)})
    swap = {"least, dknn": "least, knn", "least, knn": "least, dknn"}
    records = [
        {**record, "attack": swap.get(str(record["attack"]), record["attack"])}
        if record["victim"] == "knn/relu3"
        else record
        for record in board.records
    ]
    swapped = Board(records, board.content)
    assert (swapped.ranked("dknn")[0], swapped.ranked("knn/relu3")[0]) == ("least, dknn", "least, knn")
    for axes, other in zip(board_figure(swapped).axes, board_figure(board).axes, strict=True):
        assert drawn(axes)["least"] == drawn(other)["least"]
        assert {line.get_color() for line in axes.lines} == {"black", "0.65", _COLOURS[0]}


def test_what_is_strong_against_one_victim_has_a_colour(tmp_path: Path) -> None:
    board = write_board(tmp_path, {f"a{place}, origin": (5.0 + place, True) for place in range(15)})
    swap = {"a0, origin": "a14, origin", "a14, origin": "a0, origin"}
    records = [
        {**record, "attack": swap.get(str(record["attack"]), record["attack"])}
        if record["victim"] == "knn/relu3"
        else record
        for record in board.records
    ]
    swapped = Board(records, board.content)
    assert swapped.ranked("dknn")[-1] == swapped.ranked("knn/relu3")[0] == "a0, origin"
    for axes in board_figure(swapped).axes:
        named = [str(line.get_label()) for line in axes.lines if line.get_color() != "0.65"][1:]
        assert sorted(named) == sorted(["a0", *(f"a{place}" for place in range(14, 15 - _NAMED, -1))])
