"""A leaderboard for reading: its page in Markdown with its figure, and on the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_advknn.reports.leaderboards.board import NAME, Board, read_board
from lightning_advknn.reports.leaderboards.figure import board_figure
from lightning_advknn.reports.leaderboards.tables import attacks_table, published_table
from lightning_advknn.reports.records.summaries import neighbours_sentence, which_images
from lightning_advknn.reports.render.blocks import Block, Illustration, Lines, Section, Table
from lightning_advknn.reports.render.page import render_markdown
from lightning_advknn.reports.render.style import save_figure
from lightning_advknn.reports.render.terminal import print_table
from lightning_advknn.storage import atomic_path

_INTRODUCTION = (
    "An attack is named with what it is on: the backbone (`origin`), a surrogate, or a victim itself (`knn`,"
    " `dknn`). Each victim judges the same stored adversarials. At an eps of Linf, accuracy is that under"
    " the attack at this eps. Within a budget of true L2, an image is lost if any of the attack's stored"
    " adversarials within it fools the victim, or if the victim is wrong without one; `worst case` counts"
    " those of all attacks together: what is left is robust accuracy. Lower is better for the attacker. A"
    " credibility that 5 % of these images are below, while they are clean, raises an alarm."
)


def write_page(board: Board, folder: Path) -> None:
    """Write ``leaderboard.md`` and its figure as PNG and PDF; equal leaderboards give equal files."""
    sections = [Section("curves", "Accuracy against true L2", [_picture(board, folder / NAME)])]
    for victim, title in board.victims.items():
        beside = published_table(board, victim)
        sections.append(Section(victim, title, [attacks_table(board, victim), *filter(None, [beside])]))
    for seed, run in board.content["runs"].items():
        sections.append(Section(f"seed{seed}", f"Checks, seed {seed}", [_checks(run), _made(board, run)]))
    text = render_markdown(f"Leaderboard, {board.title}", [_INTRODUCTION], sections)
    with atomic_path(folder / f"{NAME}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def brief_tables(board: Board) -> list[Table]:
    """The strongest attacks on DkNN, and published results beside them."""
    return [
        attacks_table(board, "dknn", brief=True),
        *filter(None, [published_table(board, "dknn")]),
    ]


def leaderboards_section(results: Path, output: Path) -> Section:
    """The leaderboards of a results folder in brief, with their figures.

    Args:
        results: Searched with its subfolders.
        output: Folder of the figures.
    """
    blocks: list[Block] = []
    for path in sorted(results.glob(f"**/{NAME}.json")):
        board, place = read_board(path.parent), path.parent.relative_to(results)
        if board is not None:
            made = [_made(board, run) for run in board.content["runs"].values()]
            whole = f"`{(place / NAME).as_posix()}.csv` has all numbers, `.md` every victim and checks."
            figure = output / "-".join([*place.parts, NAME])
            blocks += [whole, *brief_tables(board), _picture(board, figure), *made]
    if blocks:
        blocks.insert(0, _INTRODUCTION)
    return Section("leaderboards", "Leaderboards: all attacks side by side", blocks or ["None has run."])


def print_board(board: Board, seed: int) -> None:
    """Print a brief table of DkNN and a seed's checks."""
    print_table(attacks_table(board, "dknn", brief=True))
    print_table(_checks(board.content["runs"][str(seed)]))


def _picture(board: Board, path: Path) -> Illustration:
    save_figure(board_figure(board), path)
    caption = (
        f"{board.title}: accuracy within a budget of true L2. Black: all attacks together. Dotted red: below"
        " it no attack can go, where this is known. In colour, the strongest attacks, each on what it is"
        " strongest on against the victim; grey, all else."
    )
    return Illustration.of_file(path, caption, f"Line chart. {caption} The tables have its numbers.")


def _made(board: Board, run: Mapping[str, Any]) -> str:
    which = which_images(board.content["settings"], run["images"])
    made = f"`{run['command']}`, {which}, {run['device']}, {run['date']}."
    return f"{made} {neighbours_sentence(run.get('approximation', {}).get('origin'))}".strip()


def _checks(run: Mapping[str, Any]) -> Table:
    said = {True: "✓ holds", False: "✗ does not hold", None: "- not looked at"}
    rows: list[list[Lines]] = [
        [(check["check"],), (said[check["holds"]],), (check["detail"],)] for check in run["checks"]
    ]
    caption = "What no sound evaluation violates; a check that does not hold says where to look."
    return Table(caption, ["check", "here", "detail"], rows, prose=True)
