"""The wheel: what it holds, and that it works in an empty folder, without the repository."""

import csv
import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lightning_advknn

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.xdist_group("package")  # they share a wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as pip builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ROOT, "-w", folder, *options], check=True, timeout=300
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(unpacked: Path, folder: Path, *arguments: str) -> str:
    """What ``python`` prints in a folder, where the unpacked wheel is the package."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(unpacked), "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_all_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        scripts = archive.read(next(name for name in names if name.endswith("/entry_points.txt"))).decode()
    package = ROOT / "lightning_advknn"
    files = [*package.rglob("*"), *(ROOT / "configs").rglob("*")]
    there = {
        str(
            path.relative_to(ROOT)
            if path.is_relative_to(package)
            else "lightning_advknn" / path.relative_to(ROOT)
        )
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == there
    for name in ("__init__.pyi", "py.typed", "configs/digits/attack.yaml", "configs/folder/own_attack.py"):
        assert f"lightning_advknn/{name}" in names
    assert any(name.endswith("templates/report.html") for name in names)
    assert "lightning-advknn = lightning_advknn.__main__:main" in scripts


def test_the_command_works_without_the_repository(unpacked: Path, tmp_path: Path) -> None:
    place = run(unpacked, tmp_path, "-c", "import lightning_advknn; print(lightning_advknn.__file__)")
    assert Path(place.strip()).is_relative_to(unpacked)
    start = ("-m", "lightning_advknn")
    version = run(unpacked, tmp_path, *start, "--version")
    assert version == f"lightning-advknn {lightning_advknn.__version__}\n"
    assert "leaderboard" in run(unpacked, tmp_path, *start, "--help")
    plan = run(
        unpacked,
        tmp_path,
        *start,
        "reproduce",
        "--config",
        "digits/reproduce",
        "--dry-run",
        "--only=digits/tables/seed0",
    )
    assert "lightning-advknn evaluate --config=digits/attack " in plan
    assert str(unpacked) not in plan


def test_the_main_job_works_without_the_repository(unpacked: Path, tmp_path: Path) -> None:
    shipped = unpacked / "lightning_advknn" / "configs" / "digits"
    for name in ("backbone", "surrogate", "network", "data"):  # copied, as an epoch is enough here
        text = re.sub("max_epochs: .*", "max_epochs: 1", (shipped / f"{name}.yaml").read_text())
        (tmp_path / f"{name}.yaml").write_text(text)
    options = ["--images=20", "--quiet", "--backbone.config=backbone"]
    surrogates = "--surrogates={'dknnb': {'config': 'surrogate'}}"
    printed = run(
        unpacked,
        tmp_path,
        "-m",
        "lightning_advknn",
        "evaluate",
        "--config=digits/attack",
        *options,
        surrogates,
    )
    assert printed.splitlines()[0] == "Rows, tables and pictures are in runs/digits"
    with (tmp_path / "runs" / "digits" / "rows" / "dknnb" / "bim.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 20
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["runs"]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, lightning_advknn; print(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(done.stdout.split()) - set(sys.stdlib_module_names)
    heavy = {
        "torch",
        "numpy",
        "scipy",
        "sklearn",
        "matplotlib",
        "wandb",
        "rich",
        "yaml",
        "jsonargparse",
        "tqdm",
    }
    assert {"lightning_advknn", "lazy_loader"} <= loaded
    assert not heavy & loaded


@pytest.mark.parametrize("name", [name for name in lightning_advknn.__all__ if name != "__version__"])
def test_names_of_the_package_are_its_modules_own(name: str) -> None:
    exported = getattr(lightning_advknn, name)
    assert callable(exported)
    assert getattr(importlib.import_module(exported.__module__), name) is exported


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="DkNNN"):
        _ = lightning_advknn.DkNNN  # type: ignore[attr-defined]
    assert "DkNN" in dir(lightning_advknn)


def test_extras_for_the_same_libraries_ask_for_the_same_versions() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("rivals", "torchattacks", "timm", "faiss-cpu"):
        assert set(extras[extra]) <= set(extras["dev"])
    assert not any("torchattacks" in each for each in extras["rivals"])
