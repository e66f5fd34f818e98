"""Small packages to read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house.reader import Package


@pytest.fixture
def make_package(tmp_path: Path) -> Callable[[dict[str, str]], Package]:
    """Writes files, of names such as ``package/part.py``, into a package ``made`` and reads it."""

    def make(files: dict[str, str]) -> Package:
        for name, text in files.items():
            path = tmp_path / "made" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Package(tmp_path, "made")

    return make
