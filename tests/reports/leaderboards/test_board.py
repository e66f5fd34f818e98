"""A leaderboard's files are read back over seeds, ranked, and shown as they are."""

import base64
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.axes import Axes

from lightning_advknn.reports.leaderboards.board import Board, attacks_table, published_table, read_board
from lightning_advknn.reports.leaderboards.figure import COLOURS, NAMED, board_figure
from lightning_advknn.reports.leaderboards.page import leaderboards_section, print_board, write_page
from lightning_advknn.reports.leaderboards.records import LEADERBOARD
from lightning_advknn.reports.paper.readme import render
from lightning_advknn.reports.records.csv_files import write_csv
from lightning_advknn.reports.render.page import Picture, Table, markdown_table

VICTIMS = ("dnn", "knn/relu2", "knn/relu3", "dknn")


def line(
    attack: str, victim: str, norm: str | None, eps: float | None, seed: int, **more: Any
) -> dict[str, Any]:
    counted = "nearest" if norm == "l2" and eps is not None else "run"
    return {
        "attack": attack,
        "victim": victim,
        "norm": norm,
        "eps": eps,
        "seed": seed,
        "n": 100,
        "counted": counted,
        **more,
    }


def lines(attack: str, seed: int, strength: float, ball: bool) -> list[dict[str, Any]]:
    """A whole entry, which leaves 100 - strength * budget % against DkNN, 1 point less against the others per seed."""
    found = []
    for victim in VICTIMS:
        entry: dict[str, Any] = {
            "fooled": 97.0 + seed,
            "min_l2_median": round(50 / strength + seed, 4),
            "queries": 0.0 if ball else 120.4,
            "seconds_per_image": 0.25,
        }
        if victim != "dnn":
            entry |= {"credibility_success_mean": 0.2 + 0.1 * seed, "detected": 40.0}

        def left(budget: float, victim: str = victim) -> float:
            return round(max(100 - strength * budget - seed - (victim != "dknn"), 0), 4)

        if ball:
            found += [
                line(attack, victim, "linf", eps, seed, accuracy=left(10 * eps), **entry)
                for eps in (0.1, 0.2, 0.3, 0.4)
            ]
        elif attack != "worst case":
            found.append(line(attack, victim, "l2", None, seed, accuracy=0.0, **entry))
        found += [
            line(attack, victim, "l2", half / 2, seed, accuracy=left(half / 2), **entry)
            for half in range(1, 11)
        ]
    return found


def write_board(folder: Path, entries: dict[str, tuple[float, bool]], seeds: tuple[int, ...] = (0,)) -> Board:
    """Write a leaderboard's files: entries with their strength, and whether they are at eps of Linf."""
    records = []
    for seed in seeds:
        records += [line("clean", victim, None, 0, seed, accuracy=98.0 + seed) for victim in VICTIMS]
        for attack, (strength, ball) in entries.items():
            records += lines(attack, seed, strength, ball)
        records += lines("worst case", seed, 50.0, False)
    check = {"check": "it is sound", "holds": True, "detail": "2 things"}
    run = {
        "command": "python attack.py leaderboard",
        "device": "2 CPU cores",
        "date": "2026-11-23",
        "images": 100,
        "checks": [check, {**check, "holds": False}, {**check, "holds": None}],
    }
    write_csv(folder / "leaderboard.csv", LEADERBOARD, records)
    settings = {"data": {"name": "FashionMNIST"}, "victim": {"layer": "relu3", "convention": "ge"}}
    content = {"settings": settings, "runs": {str(seed): run for seed in seeds}}
    (folder / "leaderboard.json").write_text(json.dumps(content))
    board = read_board(folder)
    assert board is not None
    return board


ENTRIES = {"fgsm, origin": (10.0, True), "bim, origin": (20.0, True), "least, dknn": (40.0, False)}


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


def drawn(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {str(line.get_label()): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines}


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
        *(f"a{position}" for position in range(14, 14 - NAMED, -1)),
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
        assert {line.get_color() for line in axes.lines} == {"black", "0.65", COLOURS[0]}


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
        assert sorted(named) == sorted(["a0", *(f"a{place}" for place in range(14, 15 - NAMED, -1))])


def test_the_page_has_tables_checks_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = write_board(tmp_path, ENTRIES, (0, 1))
    write_page(board, tmp_path)
    page = (tmp_path / "leaderboard.md").read_text()
    assert page.startswith("# Leaderboard, Fashion-MNIST\n")
    for victim, title in (("dknn", "DkNN"), ("knn/relu3", "kNN on relu3"), ("dnn", "DNN")):
        assert f"## {title}\n" in page
        assert markdown_table(attacks_table(board, victim)) in page
    for mark in ("✓ holds", "✗ does not hold", "- not looked at"):
        assert page.count(f"| it is sound | {mark} | 2 things |") == 2
    assert "](leaderboard.png)" in page
    assert "`python attack.py leaderboard`, 100 test images, 2 CPU cores, 2026-11-23." in page
    assert (tmp_path / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "leaderboard.pdf").read_bytes().startswith(b"%PDF")
    print_board(write_board(tmp_path, ENTRIES), 0)
    said = capsys.readouterr().out
    assert all(name in said for name in ("worst", "least", "bim", "fgsm", "median"))
    assert said.count("it is sound") == 3


def test_the_report_has_every_leaderboard_in_brief(tmp_path: Path) -> None:
    results, output = tmp_path / "results", tmp_path / "report"
    output.mkdir()
    assert leaderboards_section(results, output).blocks == ["None has run."]
    boards = []
    for place, strength in (("fashion_mnist", 50.0), ("fashion_mnist/pixels", 20.0)):
        (results / place).mkdir(parents=True)
        boards.append(write_board(results / place, {"bim, origin": (strength, False)}))
    blocks = leaderboards_section(results, output).blocks
    assert [block for block in blocks if isinstance(block, Table)] == [
        attacks_table(board, "dknn", brief=True) for board in boards
    ]
    pictures = [block for block in blocks if isinstance(block, Picture)]
    assert [picture.name for picture in pictures] == [
        "fashion_mnist-leaderboard",
        "fashion_mnist-pixels-leaderboard",
    ]
    for picture in pictures:
        assert base64.b64decode(picture.png) == (output / f"{picture.name}.png").read_bytes()
        assert (output / f"{picture.name}.pdf").is_file()
    said = " ".join(block for block in blocks if isinstance(block, str))
    assert "`fashion_mnist/leaderboard.csv`" in said
    assert "`fashion_mnist/pixels/leaderboard.csv`" in said
    assert said.count("`python attack.py leaderboard`, 100 test images") == 2


def test_no_or_a_damaged_leaderboard(tmp_path: Path) -> None:
    assert read_board(tmp_path) is None
    write_board(tmp_path, ENTRIES)
    (tmp_path / "leaderboard.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"leaderboard.json to be as it was written, but.*Delete the leaderboard"
    ):
        read_board(tmp_path)


def test_the_readme_has_a_brief_leaderboard(tmp_path: Path, folders: ModuleType) -> None:
    results = tmp_path / "results"
    folders.write_results(results / "mnist", folders.settings(), lambda *_: 50.0)
    (results / "fashion_mnist").mkdir()
    board = write_board(results / "fashion_mnist", ENTRIES)
    text = render("<!-- results --><!-- /results -->", results)
    mnist, fashion = text.split("### Fashion-MNIST")
    assert "Leaderboard" not in mnist
    assert markdown_table(attacks_table(board, "dknn", brief=True)) in fashion
    assert "](results/fashion_mnist/leaderboard.md)" in fashion
    assert "Leaderboard" not in fashion.split("### SVHN")[1]
