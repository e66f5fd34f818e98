"""Result tables of the README, generated from `results/`: python -m lightning_advknn.reports.readme."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lightning_advknn.reports.tables import Record, read_csv
from lightning_advknn.storage import atomic_path

DATA = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "svhn": "SVHN"}


def main(repository: Path = Path()) -> None:
    """Rewrite the README's part between the result markers."""
    path = repository / "README.md"
    with atomic_path(path) as temporary:
        text = render(path.read_text(encoding="utf-8"), repository / "results")
        temporary.write_text(text, encoding="utf-8")


def render(readme: str, results: Path) -> str:
    """The README with its tables as `results` has them.

    Args:
        readme: Text with the markers ``<!-- results -->`` and ``<!-- /results -->``.
        results: Folder with one folder of tables a data set.

    Raises:
        ValueError: If a marker is missing.
    """
    tables = "\n".join(_section(results / folder, name) for folder, name in DATA.items())
    text, replaced = re.subn(
        "<!-- results -->.*<!-- /results -->",
        lambda _: f"<!-- results -->\n{tables}<!-- /results -->",
        readme,
        flags=re.DOTALL,
    )
    if not replaced:
        raise ValueError(
            "Expected the markers `<!-- results -->` and `<!-- /results -->`, but the README has none."
        )
    return text


def _section(folder: Path, name: str) -> str:
    table1, table2 = read_csv(folder / "table1.csv"), read_csv(folder / "table2.csv")
    if not (folder / "table1.csv").is_file() or not list(folder.glob("seed*.json")):
        return f"### {name}\n\nNot run yet: `python attack.py evaluate --config configs/{folder.name}/attack.yaml --results results/{folder.name}`.\n"
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("seed*.json"))]
    made = "; ".join(f"`{run['command']}` ({run['device']}, {run['date']})" for run in runs)
    settings = runs[0]["settings"]
    return "\n".join(
        [
            f"### {name}",
            "",
            _markdown(
                ["classifier", "accuracy %", "paper"],
                [
                    [victim, _mean(rows, "accuracy"), _paper(rows)]
                    for (victim,), rows in _cells(table1, "victim")
                ],
            ),
            "",
            _markdown(
                [
                    "victim",
                    "method",
                    "attack",
                    "eps",
                    "accuracy %",
                    "paper",
                    "true L2",
                    "L2 of successes",
                    "credibility, all",
                ],
                [
                    [
                        *key,
                        *(_mean(rows, "accuracy"), _paper(rows)),
                        *(_mean(rows, c) for c in ("l2_mean", "l2_mean_success", "credibility_mean")),
                    ]
                    for key, rows in _cells(table2, "victim", "method", "attack", "eps")
                    if key[2] != "clean"
                ],
            ),
            "",
            f"{table1[0]['n']} test images, {_seeds(table1)}; k = {settings['victim']['k']}, credibility convention"
            f" `{settings['victim']['convention']}`, attacks ascend the `{settings['label_source']}` label. Made by {made}.",
            "",
        ]
    )


def _cells(records: Sequence[Record], *names: str) -> list[tuple[tuple[str, ...], list[Record]]]:
    """Records of the same cell over seeds, in order of first appearance."""
    cells: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        cells[tuple(str(record[name]) for name in names)].append(record)
    return list(cells.items())


def _mean(rows: Sequence[Record], name: str) -> str:
    values = [float(cell) for row in rows if (cell := row[name]) is not None]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _paper(rows: Sequence[Record]) -> str:
    theirs = rows[0]["paper"]
    return "-" if theirs is None else f"{float(theirs):.2f}"


def _seeds(records: Sequence[Record]) -> str:
    seeds = sorted({int(record["seed"] or 0) for record in records})
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± standard deviation over seeds {seeds}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
