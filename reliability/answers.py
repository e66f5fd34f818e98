"""What commands record in a project: their settings and numbers."""

import json
from pathlib import Path
from typing import Any

import yaml

from lightning_advknn.reports.records.csv_files import read_csv

Answer = tuple[Any, Any]
"""What a run recorded: its settings, and its numbers."""


def evaluated(home: Path) -> Answer:
    """The answer of ``attack.py evaluate``: settings, metrics and rows."""
    summary = _json(_only(home, "summary.json"))
    rows = {str(p.relative_to(home)): read_csv(p) for p in sorted(home.glob("runs/**/rows/**/*.csv"))}
    return summary["settings"], (summary["metrics"], summary["credibility"], rows)


def ranked(home: Path) -> Answer:
    """The answer of ``attack.py leaderboard``: settings and table."""
    path = _only(home, "leaderboard.json")
    lines = read_csv(path.with_suffix(".csv"))
    timed = "seconds_per_image"
    return _json(path)["settings"], [{k: v for k, v in line.items() if k != timed} for line in lines]


def reported(home: Path) -> Answer:
    """The answer of ``attack.py reproduce``: settings, tables and report."""
    folder = home / "results"
    tables = {path.name: read_csv(path) for path in sorted(folder.glob("digits/table*.csv"))}
    report = (folder / "report" / "report.md").read_text().splitlines()
    # These lines differ between any two runs: wall time, date and command.
    lines = [line for line in report if not any(word in line for word in ("seconds", ":", "| sum"))]
    return _json(folder / "digits" / "seed0.json")["settings"], (tables, lines)


def trained(home: Path) -> Answer:
    """The answer of ``train.py``: settings and logged metrics."""
    settings = yaml.safe_load(_only(home, "config.yaml").read_text())
    # There are none without a logger; damaged settings may ask for that.
    return settings, [read_csv(path) for path in sorted(home.glob("runs/**/metrics.csv"))]


def _only(home: Path, name: str) -> Path:
    (path,) = [path for path in home.rglob(name) if "cache" not in path.parts]
    return path


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
