"""The import graph: data flows one way, without circles; other libraries are each imported in one place."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from tests.house.reader import Package

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "lightning_advknn"
HOUSE = Package(REPOSITORY, PACKAGE)

# Each may import only from itself and from those before it.
# A module belongs to the longest of these that its name begins with.
ORDER = (
    "choices",
    "allocator",
    "configurations",
    "command_line",
    "storage",
    "ranks",
    "functional",
    "convolutions",
    "search",
    "integrity",
    "models",
    "data",
    "search.extraction",  # fills a bank with a network's features of a data set
    "search.build",
    "classifiers",
    "attacks.parts",
    "attacks",
    "modules",
    "evaluation",
    "callbacks",
    "training_cli",
    "experiment",
    "reports.render",
    "reports.records",
    "reports.leaderboards",
    "reports.paper",
    "reports",
    "commands",
    "__main__",
)


def part(module: str) -> str:
    """Which of ORDER a module belongs to; "" for the package's own ``__init__``."""
    fitting = [each for each in ORDER if f"{module}.".startswith(f"{PACKAGE}.{each}.")]
    return max(fitting, key=len, default="")


def one_circle(house: Package) -> list[str]:
    """The imports of one circle, each with its line; [] if there is no circle."""
    edges = {module: house.edges(module) for module in house.modules}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]
        return [f"{house.line(a, edges[a][b])} imports {b}" for a, b in pairwise(circle)]
    return []


def importers(distribution: str) -> list[str]:
    """Files that import a distribution."""
    return [
        HOUSE.paths[name].relative_to(REPOSITORY).as_posix()
        for name, module in HOUSE.modules.items()
        if any(imported.module.split(".")[0] == distribution for _, _, imported in module.imports)
    ]


def test_every_part_has_its_place():
    assert {part(module) for module in HOUSE.modules} - {""} == set(ORDER)
    assert [module for module in HOUSE.modules if not part(module)] == [PACKAGE]


def test_imports_name_modules_in_full():
    relative = [
        HOUSE.line(name, node.lineno)
        for name, module in HOUSE.modules.items()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and (node.level or node.names[0].name == "*")
    ]
    assert not relative


def test_imports_point_one_way():
    backwards = [
        f"{HOUSE.line(module, line)}: imports {target}, but {part(module)} comes before {part(target)}"
        for module in HOUSE.modules
        for target, line in HOUSE.edges(module).items()
        if module != PACKAGE != target and ORDER.index(part(module)) < ORDER.index(part(target))
    ]
    assert not backwards, "\n".join(backwards)


def test_no_circle():
    circle = one_circle(HOUSE)
    assert not circle, "\n".join(circle)


@pytest.mark.parametrize(
    ("one", "other", "lines"),
    [
        ("from made.other import f", "x = 1", set()),
        ("from made.other import f", "from made.one import g", {"one.py:1", "other.py:1"}),
        ("import made.other", "def f():\n    from made import one", {"one.py:1", "other.py:2"}),
        (
            "if TYPE_CHECKING:\n    from made.other import F",
            "import made.one as o",
            {"one.py:2", "other.py:1"},
        ),
        ("from made.package import f", "", {"one.py:1", "package/__init__.py:1", "package/part.py:1"}),
        ("from made.package import other", "", {"one.py:1", "package/__init__.py:1", "package/part.py:1"}),
        ("from made import lazily", "", {"one.py:1", "lazily.py:1"}),
        ("from made import lazy", "from made import one", {"one.py:1", "lazily.py:1"}),
        ("import made\nmade.lazy()", "", {"one.py:2", "lazily.py:1"}),
        ("from made import __version__", "from made import one", set()),
    ],
)
def test_a_circle_is_found(one, other, lines, make_package):
    made = make_package(
        {
            "__init__.py": "__version__ = '1'",
            "__init__.pyi": "from made.lazily import lazy as lazy",
            "one.py": f"{one}\n\ndef g(): pass",
            "other.py": f"{other}\n\ndef f(): pass",
            "lazily.py": "from made.one import g\n\nlazy = g",
            "package/__init__.py": "from made.package.part import f",
            "package/part.py": "from made.one import g\n\nf = g",
            "package/other.py": "from made.package import part",
        }
    )
    found = {line.removeprefix("made/").split()[0] for line in one_circle(made)}
    assert found == lines


def test_functional_imports_torch_only():
    allowed = {"torch", *sys.stdlib_module_names}
    others = [
        f"{HOUSE.line(module, line)}: {name}"
        for module, source in HOUSE.modules.items()
        if part(module) == "functional"
        for line, _, name in source.imports
        if name.module.split(".")[0] not in allowed and part(name.module) not in ("functional", "choices")
    ]
    assert not others, "\n".join(others)


@pytest.mark.parametrize(
    ("distribution", "files"),
    [
        ("faiss", [f"{PACKAGE}/search/scans/faiss_scan.py"]),
        ("wandb", [f"{PACKAGE}/callbacks/wandb_panels.py"]),
        ("art", [f"{PACKAGE}/attacks/libraries.py"]),
        ("foolbox", [f"{PACKAGE}/attacks/libraries.py"]),
        ("torchattacks", []),  # what a configuration names, `attacks/libraries.py` calls
    ],
)
def test_each_is_removed_by_editing_one_file(distribution, files):
    assert importers(distribution) == files


def test_other_libraries_are_imported_only_when_their_attacks_are_named():
    body = HOUSE.modules[f"{PACKAGE}.attacks.libraries"].tree.body
    at_once = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "from torch import Tensor, nn" in at_once
    assert not [
        line for line in at_once if line.split()[1].split(".")[0] in ("art", "foolbox", "torchattacks")
    ]
