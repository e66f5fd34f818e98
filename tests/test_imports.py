"""The import graph: data flows one way."""

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "lightning_advknn"

# Each may import only from itself and from those before it.
ORDER = (
    "storage", "ranks", "convolutions", "functional", "search", "integrity", "models", "data", "classifiers", "attacks", "modules", "evaluation",
    "callbacks", "cli", "sweep", "experiment", "reports",
)  # fmt: skip

FILES = sorted((REPOSITORY / PACKAGE).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it: ``torch.nn.functional``, ``lightning_advknn.search``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    """Which of ORDER a file belongs to; "" for the package's own ``__init__``."""
    relative = path.relative_to(REPOSITORY / PACKAGE).with_suffix("")
    return "" if relative.parts == ("__init__",) else relative.parts[0]


def importers(top: str) -> list[str]:
    """Files that import a distribution."""
    return [
        path.relative_to(REPOSITORY).as_posix()
        for path in [*FILES, *REPOSITORY.glob("*.py")]
        if any(name.split(".")[0] == top for name in imported(path))
    ]


def test_every_part_has_its_place():
    assert {part(path) for path in FILES} - {""} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_imports_point_one_way(path):
    own = part(path)
    allowed = set(ORDER[: ORDER.index(own) + 1]) if own else set()
    for name in imported(path):
        top, *rest = name.split(".")
        # `from lightning_advknn import __version__` points nowhere.
        if top != PACKAGE or not set(rest[:1]) & set(ORDER):
            continue
        assert rest[0] in allowed, f"{path.relative_to(REPOSITORY)} imports {name}, but {own} comes first"


def test_functional_imports_torch_only():
    for path in (REPOSITORY / PACKAGE / "functional").glob("*.py"):
        for name in imported(path):
            known = name.split(".")[0] in {"torch", *sys.stdlib_module_names}
            assert known or name.startswith(f"{PACKAGE}.functional."), f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("distribution", "files"),
    [
        ("faiss", [f"{PACKAGE}/search/faiss_backend.py"]),
        ("wandb", [f"{PACKAGE}/callbacks/wandb_panels.py"]),
        ("art", [f"{PACKAGE}/attacks/libraries.py"]),
        ("foolbox", [f"{PACKAGE}/attacks/libraries.py"]),
        ("torchattacks", []),  # what a configuration names, `attacks/libraries.py` calls
    ],
)
def test_each_is_removed_by_editing_one_file(distribution, files):
    assert importers(distribution) == files


def test_other_libraries_are_imported_only_when_their_attacks_are_named():
    body = ast.parse((REPOSITORY / PACKAGE / "attacks" / "libraries.py").read_text()).body
    at_once = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "from torch import Tensor, nn" in at_once
    assert not [
        line for line in at_once if line.split()[1].split(".")[0] in ("art", "foolbox", "torchattacks")
    ]


def test_the_graph_is_read_right():
    # The proof is worth what its reader is: it sees imports of names, of modules, and within functions.
    search = imported(REPOSITORY / PACKAGE / "search" / "bank.py")
    assert f"{PACKAGE}.functional.count_votes" in search
    assert f"{PACKAGE}.search.faiss_backend.FaissScan" in search
    assert f"{PACKAGE}.functional" in imported(REPOSITORY / PACKAGE / "classifiers.py")
