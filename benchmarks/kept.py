"""Measurements that are written to a file as they are made, so that a run can stop at any time and go on."""

import json
from pathlib import Path
from typing import Any

from lightning_advknn.storage import digest


class Kept:
    """One JSON line for each measurement.

    Args:
        path: The file. A last line that was cut off is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                self.lines.append(json.loads(line))
        if text and not text.endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")

    def add(self, **measurement: Any) -> None:
        """Write a measurement."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measurement) + "\n")
        self.lines.append(measurement)

    def having(self, **fields: Any) -> list[dict[str, Any]]:
        """Measurements whose fields have these values."""
        return [line for line in self.lines if all(line.get(name) == fields[name] for name in fields)]


def source_digest(*patterns: str) -> str:
    """A digest of this project's files of these patterns: measurements of other code are apart."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(path for pattern in patterns for path in root.glob(pattern))
    return digest([[path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")] for path in files])
