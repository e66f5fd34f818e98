"""Result tables of the README, made from `results/`: python -m lightning_advknn.reports.paper.readme."""

from pathlib import Path

from lightning_advknn.reports.leaderboards.board import NAME, read_board
from lightning_advknn.reports.leaderboards.page import brief_tables
from lightning_advknn.reports.paper.tables import attacked_table, clean_table
from lightning_advknn.reports.records.over_seeds import Planned, Results, load
from lightning_advknn.reports.records.summaries import which_images
from lightning_advknn.reports.render.page import captioned, with_marked
from lightning_advknn.storage import atomic_path

_DATA = ("mnist", "fashion_mnist", "gtsrb", "svhn")
_REPORT = "report/report.md"


def main(repository: Path = Path()) -> None:
    """Rewrite the README's part between the result markers."""
    path = repository / "README.md"
    with atomic_path(path) as temporary:
        text = _with_tables(path.read_text(encoding="utf-8"), repository / "results")
        temporary.write_text(text, encoding="utf-8")


def _with_tables(readme: str, results: Path) -> str:
    """The README with its tables as `results` has them.

    Args:
        readme: Text with the markers ``<!-- results -->`` and ``<!-- /results -->``.
        results: Folder with one folder of tables a data set.

    Raises:
        ValueError: If a marker is missing.
    """
    plan = {data: {"tables": [Planned(0, _command(data))]} for data in _DATA}
    tables = "\n".join(_data_set(found) + _leaderboard(found.folder) for found in load(plan, results))
    if (results / _REPORT).is_file():
        tables = f"All tables and figures: [report]({results.name}/{_REPORT}).\n\n{tables}"
    return with_marked(readme, "results", tables)


def _command(data: str) -> str:
    return f"python attack.py evaluate --config configs/{data}/attack.yaml --results results/{data}"


def _data_set(results: Results) -> str:
    heading = f"### {results.title}\n\n"
    if not results.runs:
        return f"{heading}Not run yet: `{results.to_run[0].command}`.\n"
    made = "; ".join(f"`{run['command']}` ({run['device']}, {run['date']})" for run in results.runs.values())
    which = which_images(results.settings, results.measurements()[0].n)
    seeds = list(results.runs)
    of_seeds = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds}"
    victim, labels = results.victim, results.settings["label_source"]
    facts = (
        f"{which}, {of_seeds}; k = {victim['k']}, credibility convention `{victim['convention']}`, attacks"
        f" ascend the `{labels}` label. Made by {made}."
    )
    tables = [captioned(table) for table in (clean_table([results]), attacked_table(results))]
    return heading + "\n\n".join([*tables, " ".join([facts, *results.notes])]) + "\n"


def _leaderboard(folder: Path) -> str:
    """A brief leaderboard, if there is one."""
    board = read_board(folder)
    if board is None:
        return ""
    where = f"{folder.parent.name}/{folder.name}/{NAME}"
    whole = f"[All attacks against every victim]({where}.md), [curves]({where}.png), [numbers]({where}.csv)."
    shown = "\n\n".join(map(captioned, brief_tables(board)))
    return f"\nLeaderboard. {shown}\n\n{whole}\n"


if __name__ == "__main__":
    main()
