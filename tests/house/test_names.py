"""Top-level names: one definition each, and public only what is used outside its module."""

import ast
from collections import defaultdict
from pathlib import Path

from tests.house.reader import Module, Name, Package, notebook_code, python_blocks

REPOSITORY = Path(__file__).parents[2]

# Names that several modules may define, each with the reason.
REPEATED = {
    "main": "what a module that is run by `python -m` does",
    "evaluate": "of a victim in memory, and the command of that name, of an experiment",
}

# Public names that nothing uses, exports or documents, each with the reason.
UNUSED: dict[str, str] = {}

SHORT = 5  # lines of a private function that a module may have for itself

HOUSE = Package(REPOSITORY, "lightning_advknn")
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
CONFIGURATIONS = [REPOSITORY / "pyproject.toml", *sorted((REPOSITORY / "configs").rglob("*.yaml"))]
SCRIPTS = sorted(
    path
    for pattern in ("*.py", "benchmarks/**/*.py", "reliability/**/*.py", "configs/**/*.py")
    for path in REPOSITORY.glob(pattern)
)


def repeated(house: Package) -> dict[str, list[Name]]:
    """Names that stand in several modules, with the definitions that count.

    All public ones do. Private functions and classes do if they are long, or the same.
    """
    places = defaultdict(list)
    for module, source in house.modules.items():
        for each in source.definitions:
            if not each.startswith("__"):
                places[each].append(Name(module, each))
    return {
        name: where for name, where in places.items() if len(where) > 1 and _count_as_repeated(house, where)
    }


def _count_as_repeated(house: Package, where: list[Name]) -> bool:
    if not where[0].name.startswith("_"):
        return True
    nodes = [house.modules[each.module].definitions[each.name] for each in where]
    code = [ast.dump(node) for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    long = [node for node in nodes if (node.end_lineno or 0) - node.lineno >= SHORT]
    return len(long) > 1 or len(set(code)) < len(code)


def used_outside(house: Package, others: list[Module], texts: list[str]) -> set[Name]:
    """Definitions named by another module, a file or text beside the package, or a used one's signature."""
    uses = {name for module in others for name in house.uses(module)}
    uses |= {house.find_dotted(dotted) for text in texts for dotted in house.dotted_names(text)} - {None}
    for module, source in house.modules.items():
        uses |= {name for name in house.uses(source) if name.module != module}
        uses |= {Name(module, each) for each in source.called_as_script}
    to_visit = uses = {name for name in uses if name.name in house.modules[name.module].definitions}
    while to_visit:
        to_visit = {each for name in to_visit for each in house.shown(name)} - uses
        uses = uses | to_visit
    return uses


def unused(house: Package, used: set[Name]) -> list[Name]:
    """Public definitions that are not among those used."""
    return [
        Name(module, each)
        for module, source in house.modules.items()
        for each in source.definitions
        if not each.startswith("_") and Name(module, each) not in used
    ]


def beside_the_package() -> tuple[list[Module], list[str]]:
    """Scripts and examples; pages and configurations, which name classes and functions in full."""
    pages = [path.read_text() for path in PAGES]
    scripts = [Module(path.read_text()) for path in SCRIPTS]
    examples = [block for page in pages for block in python_blocks(page)]
    notebooks = [notebook_code(path) for path in sorted((REPOSITORY / "docs").rglob("*.ipynb"))]
    return [*scripts, *examples, *notebooks], [*pages, *(path.read_text() for path in CONFIGURATIONS)]


def test_a_name_is_defined_once():
    found = {name: where for name, where in repeated(HOUSE).items() if name not in REPEATED}
    assert not found, "\n".join(
        f"{name}: {', '.join(map(HOUSE.place, where))}" for name, where in sorted(found.items())
    )


def test_what_is_public_is_used_outside_its_module():
    found = [
        name for name in unused(HOUSE, used_outside(HOUSE, *beside_the_package())) if str(name) not in UNUSED
    ]
    assert not found, "\n".join(f"{HOUSE.place(name)}: {name.name}" for name in found)


def test_exceptions_are_needed():
    assert set(REPEATED) <= set(repeated(HOUSE))
    assert set(UNUSED) <= set(map(str, unused(HOUSE, used_outside(HOUSE, *beside_the_package()))))


def test_names_in_pages_configurations_and_scripts_exist():
    modules, texts = beside_the_package()
    imported = " ".join(str(name) for module in modules for _, _, name in module.imports)
    names = {name for text in [*texts, imported] for name in HOUSE.dotted_names(text)}
    lost = sorted(name for name in names if HOUSE.find_dotted(name) is None)
    assert not lost, f"Not in the package: {lost}"


A = """
import logging
X: int = 1
T = TypeVar("T")
def by_import() -> "Shown": ...
def by_attribute(): ...
def by_string(): ...
def by_script(): ...
def by_page(): ...
def at_home(): by_home()
def by_home(): ...
class Shown:
    field: "Field"
class Field: ...
class Hidden: ...
def _private() -> Hidden: ...
if __name__ == "__main__":
    by_script()
"""

B = """
from made import a
def f():
    from made.a import by_import as renamed
    renamed()
a.by_attribute()
CLASS = "made.a.by_string"
logging.at_home()
"""


def test_uses_are_found(make_package):
    made = make_package({"__init__.py": "", "a.py": A, "b.py": B})
    used = used_outside(made, [], ["See `made.a.by_page`, made.nothing and made."])
    names = {str(name).removeprefix("made.") for name in unused(made, used)}
    assert names == {"a.X", "a.at_home", "a.by_home", "a.Hidden", "b.f", "b.CLASS"}
    assert Name("made.a", "X") in used_outside(made, [Module("from made.a import X")], [])


def test_exports_are_uses(make_package):
    made = make_package(
        {
            "__init__.py": "",
            "__init__.pyi": "from made.a import lazy as lazy",
            "a.py": "def lazy(): ...\ndef of_package(): ...\ndef neither(): ...",
            "package/__init__.py": "from made.a import of_package",
        }
    )
    assert unused(made, used_outside(made, [], [])) == [Name("made.a", "neither")]


def test_repeated_definitions_are_found(make_package):
    long = "\n".join(f"    x{i} = {i}" for i in range(SHORT))
    a = f"public = 1\n_number = 1\ndef _long():\n{long}\ndef _same(): return 1\ndef _short(): return 1"
    b = (
        a.replace("public = 1", "class public: ...")
        .replace("x0", "y")
        .replace("_short(): return 1", "_short(): ...")
    )
    made = make_package({"__init__.py": "from made.a import public", "a.py": a, "b.py": b})
    assert set(repeated(made)) == {"public", "_long", "_same"}
