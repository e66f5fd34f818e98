"""What README and documentation say about speed, made from results: python -m benchmarks.headline.

Ratios are to the fastest peer of the same run. Peers of search are all brute force in float32: one that
rounding costs a vote (``differing``) counts too, because leaving it out would flatter ours. Attacks are
compared at equal success: ours is the fastest precision under which the network gets no more images right
than under the peer's.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from lightning_advknn.reports.render.page import with_marked
from lightning_advknn.storage import atomic_path

_RESULTS = "results/benchmarks"
_SHIPPED = ("torchattacks", "torchattacks, one batch", "foolbox")  # attacks as libraries ship them
_NO_PEERS = ("bare", "before", "import", "no callback")

_Row = dict[str, str]


class Compared(NamedTuple):
    """Ours and the fastest peer on one case of one run."""

    ours: _Row
    peer: _Row

    @property
    def ratio(self) -> float:
        """Time of the peer by ours."""
        return float(self.peer["seconds"]) / float(self.ours["seconds"])


def main(repository: Path = Path()) -> None:
    """Rewrite what stands between the markers of both pages."""
    for page, make in PAGES.items():
        path = repository / page
        text = with_marked(path.read_text(encoding="utf-8"), "speed", make(repository / _RESULTS))
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def headline(results: Path) -> str:
    """One line for each comparison, with ratios and where they were measured."""
    lines = []
    for name in ("search", "attacks", "gpu"):
        for each in _comparisons(results, name):
            where, what = each.ours["case"].split(": ", 1)
            lines.append(
                f"- {where}: {what}: {_seconds(each.ours)}, **{each.ratio:.2f} times** as fast as the fastest"
                f" peer ({each.peer['method']}, {_seconds(each.peer)}). {_made(results, name)}"
            )
    return "\n".join(lines) + "\n" if lines else "Not measured yet.\n"


def tables(results: Path) -> str:
    """A table of every method on the compared cases."""
    parts = []
    for name in ("search", "attacks", "gpu"):
        rows = _read(results, name)
        for each in _comparisons(results, name):
            case = each.ours["case"]
            lines = [
                "| method | s (min to max) | to ours | other votes or images | BLAS |",
                "|---|---|---|---|---|",
            ]
            for row in sorted((r for r in rows if r["case"] == case), key=lambda r: float(r["seconds"] or 0)):
                if row["seconds"]:
                    ratio = float(row["seconds"]) / float(each.ours["seconds"])
                    cells = [row["method"], _seconds(row, True), f"{ratio:.2f}", row.get("differing") or "-"]
                    lines.append(f"| {' | '.join([*cells, row.get('blas') or '-'])} |")
            parts.append(f"{case}. {_made(results, name)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts) or "Not measured yet.\n"


PAGES: dict[str, Callable[[Path], str]] = {"README.md": headline, "docs/usage/benchmarks.md": tables}
"""Pages, each with what stands between its markers."""


def _comparisons(results: Path, name: str) -> Iterator[Compared]:
    rows = _read(results, name)
    for case in dict.fromkeys(row["case"] for row in rows):
        searched = "all layers" in case and case.endswith("queries") and "clean" not in case
        if searched or ": bim " in case:
            found = compare([row for row in rows if row["case"] == case])
            if found:
                yield found


def compare(rows: Sequence[_Row]) -> Compared | None:
    """Ours and the fastest peer among the rows of one case; None if either is missing."""
    timed = [row for row in rows if row["seconds"] and not row["method"].startswith(_NO_PEERS)]
    ours = [row for row in timed if row["method"].startswith(report.OURS)]
    peers = [row for row in timed if row not in ours]
    if any(row.get("attacked_acc") for row in timed):
        peers = [row for row in peers if row["method"] in _SHIPPED]
    if not ours or not peers:
        return None
    peer = min(peers, key=_time)
    if peer.get("attacked_acc"):
        ours = [row for row in ours if float(row["attacked_acc"]) <= float(peer["attacked_acc"])]
    else:
        ours = [row for row in ours if row["method"] == report.OURS]
    return Compared(min(ours, key=_time), peer) if ours else None


def _time(row: _Row) -> float:
    return float(row["seconds"])


def _seconds(row: _Row, spread: bool = False) -> str:
    shown = f"{float(row['seconds']):.3g} s"
    name = row["method"].removeprefix(report.OURS).strip()
    if spread:
        return f"{shown} ({row['min']} to {row['max']})" if row.get("min") else shown
    return f"{shown} in {name}" if row["method"].startswith(report.OURS) and name else shown


def _made(results: Path, name: str) -> str:
    made = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    return f"{made['device']}, {made['options']['threads']} threads, {made['date']}."


def _read(results: Path, name: str) -> list[_Row]:
    path = results / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
