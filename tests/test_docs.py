"""What the documentation tells its readers to run, runs; what it quotes and lists is there."""

import csv
import importlib
import re
import shlex
import tomllib
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from lightning_advknn import attacks
from lightning_advknn.commands import COMMANDS
from lightning_advknn.commands.options import parse
from lightning_advknn.configurations import find
from lightning_advknn.reports.records import published

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if not path.is_symlink())]
# Their examples have tests of their own: the README's in tests/test_door.py, the tutorial's below.
TESTED = ("README.md", "docs/tutorial.md")


def blocks(language: str) -> list[tuple[str, str]]:
    """Pages and the code blocks of a language that they have."""
    return [
        (page.relative_to(ROOT).as_posix(), block)
        for page in PAGES
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]


def arguments_of(command: list[str]) -> list[str]:
    """What this project's command line is given; [] for other programs."""
    text = shlex.join(command)
    found = re.search(r"(?:^lightning-advknn|^python attack\.py|^torchrun .* -m lightning_advknn) (.*)", text)
    return shlex.split(found[1]) if found else []


SHELL = [
    shlex.split(command, comments=True)
    for _, block in blocks("bash")
    for line in block.splitlines()
    for command in line.split(" && ")
]
OURS = sorted({shlex.join(arguments_of(command)) for command in SHELL} - {""})
OTHERS = {shlex.join(command) for command in SHELL if not arguments_of(command)}


@pytest.mark.parametrize(("page", "code"), [each for each in blocks("python") if each[0] not in TESTED])
def test_examples_hold(page: str, code: str) -> None:
    assert "assert " in code
    exec(compile(code, page, "exec"), {})  # noqa: S102


def test_the_tutorials_example_reads_what_evaluate_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((_, code),) = [each for each in blocks("python") if each[0] == "docs/tutorial.md"]
    rows = tmp_path / "runs" / "digits" / "rows" / "dknnb_cl"
    rows.mkdir(parents=True)
    (rows / "bim.csv").write_text("label,dknn_after,l2\n1,1,1.5\n2,7,2\n3,0,2.5\n4,9,4\n")
    lines = "dknn,dknnb_cl,fgsm,1,1\nknn,dknnb_cl,bim,2,2\ndknn,dknnb_cl,bim,25.0,2.5\n"
    (tmp_path / "runs" / "digits" / "table2.csv").write_text(
        f"victim,method,attack,accuracy,l2_mean\n{lines}"
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "tutorial.md", "exec"), {})  # noqa: S102
    # By hand: one of four is right, and the mean of 1.5, 2, 2.5 and 4 is 2.5.
    assert (
        capsys.readouterr().out == "DkNN accuracy 25.00 % (table: 25.0), mean true L2 2.5000 (table: 2.5)\n"
    )
    with (ROOT / "results" / "mnist" / "table2.csv").open() as file:
        assert {"victim", "method", "attack", "accuracy", "l2_mean", "l2_mean_success"} <= set(
            next(csv.reader(file))
        )


@pytest.mark.parametrize("command", OURS)
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name, *arguments = shlex.split(command)
    if name == "train":
        assert arguments[0] in ("fit", "validate", "test")
        named = [value for option, value in pairwise(arguments) if option == "--config"]
        assert named
        assert all(map(find, named))
    elif name == "sweep":
        assert find(arguments[0])
    else:
        assert parse(name, arguments, "")


def test_every_command_is_shown() -> None:
    assert {command.split()[0] for command in OURS} == set(COMMANDS)


def test_other_commands_are_known() -> None:
    modules = {command.removeprefix("python -m ") for command in OTHERS if re.search(r" -m [\w.]+$", command)}
    known = {module for module in modules if module == "pytest" or find_spec(module)}
    assert modules == known
    assert OTHERS - {f"python -m {module}" for module in modules} == {
        "python -m pip install -e .",
        "python -m pip install -e '.[dev]'",
        "python -m pip install -e '.[docs]'",
        "mkdocs build --strict",
        "wandb sweep configs/digits/sweep.yaml",
    }


def test_extras_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [name for page in PAGES for name in re.findall(r"-e \"\.\[([\w,-]+)\]", page.read_text())]
    assert {extra for name in named for extra in name.split(",")} <= set(extras)
    assert named


def headings(page: Path) -> set[str]:
    """Anchors of a page, as MkDocs and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_reach_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_every_attack_is_in_the_table_of_attacks() -> None:
    page = (DOCS / "usage" / "attacks.md").read_text().split("\n## ")[0]
    named = set(re.findall(r"`([a-z0-9_]+)`", "".join(re.findall(r"^\|([^|]*)\|", page, re.MULTILINE))))
    assert named - {"function"} == {name for name in attacks.__all__ if name.islower()}


def test_printed_and_true_l2_agree() -> None:
    text = (DOCS / "concepts" / "units.md").read_text()
    converted = re.findall(r"^\| .* \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert {float(printed) for printed, _ in converted} == {
        published.OWN_POINT[1],
        published.FILTERED[1],
        published.CREDIBILITY[1],
    }
    for printed, true in converted:
        # Bytes are 255 to a pixel's 1, and 28 x 28 pixels are 784.
        assert float(true) == round(float(printed) / 255 * 784, 2)


def test_quoted_results_are_results() -> None:
    with (ROOT / "results" / "mnist" / "table2.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["method"] == "origin"]
    clean = {
        line["victim"]: float(line["credibility_mean"])
        for line in lines
        if (line["attack"], line["seed"]) == ("clean", "0")
    }
    text = " ".join((DOCS / "concepts" / "credibility.md").read_text().split())
    assert (
        f"its mean is {clean['dknn']:.2f} for DkNN and {clean['knn']:.2f} for the kNN".replace("0.", ".")
        in text
    )
    bim = [float(line["l2_mean"]) for line in lines if (line["victim"], line["attack"]) == ("dknn", "bim")]
    mean = sum(bim) / len(bim)
    text = " ".join((DOCS / "concepts" / "units.md").read_text().split())
    assert f"BIM at .25 has a mean of {mean:.2f} on MNIST" in text
    assert f"a true L2 of about {mean:.2f} here, which is {mean * 255 / 784:.2f} in the authors' unit" in text


def test_every_page_is_in_the_navigation_and_every_part_in_the_reference() -> None:
    # Plain YAML: no tags, so that this needs no MkDocs.
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(re.findall(r"[\w/-]+\.(?:md|ipynb)", yaml.safe_dump(navigation)))
    files = {
        path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb")
    }
    assert listed == files
    documented = {
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    }
    package = ROOT / "lightning_advknn"
    parts = {path.stem for path in [*package.glob("*.py"), *package.glob("*/")]}
    parts -= {"__init__", "__main__", "__pycache__"}
    names = {".".join(name.split(".")[:2]) for name in documented}
    assert names == {f"lightning_advknn.{part}" for part in parts}
    # Where a module has the name of the function in it, MkDocs takes the part's name for the module.
    for folder in (path.parent for path in package.glob("*/__init__.py")):
        public = importlib.import_module(f"lightning_advknn.{folder.name}")
        hidden = (name for name in getattr(public, "__all__", ()) if (folder / f"{name}.py").exists())
        assert {f"lightning_advknn.{folder.name}.{name}.{name}" for name in hidden} <= documented
