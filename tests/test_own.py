"""The commands of docs/usage/own.md, word for word, on few small images."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import wandb
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from lightning_advknn.commands import main as command_line
from lightning_advknn.commands.evaluate import prepare
from lightning_advknn.commands.options import parse
from lightning_advknn.experiment.settings import ORIGIN, experiment_of

ROOT = Path(__file__).parents[1]
CLASSES = ("eight", "one", "zero")  # in order of name

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def commands() -> list[list[str]]:
    """The arguments of each command of the page, after ``lightning-advknn``."""
    (block,) = re.findall("```bash\n(.*?)```", (ROOT / "docs" / "usage" / "own.md").read_text(), re.DOTALL)
    return [shlex.split(line)[1:] for line in block.splitlines()]


def write_images(root: Path) -> None:
    """20 training and 6 test images of each class as coloured PNG files of 8x8 pixels."""
    digits = load_digits()
    for name, digit in zip(CLASSES, (8, 1, 0), strict=True):
        for number, pixels in enumerate(digits.images[digits.target == digit][:26]):
            rgb = (pixels[..., None] / 16 * [255, 160, 40]).round().astype(np.uint8)
            path = root / ("train" if number < 20 else "test") / name / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rgb).save(path)


def make_small(folder: Path) -> None:
    """Make an experiment of configurations small, in nothing but sizes."""
    for path in folder.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        arguments = content.get("init_args", {})
        if path.stem == "data":
            arguments |= {"val_size": 12, "calibration_per_class": 4, "batch_size": 24}
        if path.stem == "network":
            arguments["settings"]["num_classes"] = 3
        if "trainer" in content:
            content["model"]["init_args"]["num_classes"] = 3
            content["trainer"]["max_epochs"] = 1
            (evaluation,) = (
                c for c in content["trainer"]["callbacks"] if "AttackEvaluation" in c["class_path"]
            )
            evaluation["init_args"] |= {"k": 5, "num_images": 2, "num_calibration": 3}
            evaluation["init_args"]["attacks"]["bim"]["settings"]["steps"] = 2
        if path.stem == "surrogate":
            content["model"]["init_args"]["k"] = 5
        if path.stem in ("attack", "leaderboard"):
            content["victim"]["k"] = 5
            for attack in content["attacks"].values():
                few = {"steps": 2, "surrogate_steps": 2, "tries": 2, "neighbours": 6}
                settings = attack.get("settings", {})
                settings |= {name: few[name] for name in few.keys() & settings.keys()}
        path.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, configurations and weights, in which all commands have run."""
    home = tmp_path_factory.mktemp("own")
    shutil.copytree(ROOT / "configs" / "folder", home / "configs" / "folder")
    write_images(home / "images")
    make_small(home / "configs" / "folder")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), home / "my_resnet18.pt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(home)
        monkeypatch.setenv("WANDB_MODE", "disabled")
        for arguments in commands():
            assert command_line.main(arguments) == 0
            wandb.finish()
    return home


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.xdist_group("own")
def test_training_logs_every_layers_victim(home: Path) -> None:
    for kind in ("backbone", "surrogate"):
        logged = rows(home / "runs" / "folder-training" / kind / "version_0" / "metrics.csv")
        assert {"val/loss", "attack/bim/knn_acc", "attack/bim/dknn_acc"} <= logged[-1].keys()
    saved = torch.load(
        home / "runs/folder-training/backbone/version_0/checkpoints/best.ckpt", weights_only=True
    )
    assert saved["lightning_advknn"]["network"] == "torchvision.models.resnet18"


@pytest.mark.xdist_group("own")
def test_rows_name_the_file_of_each_image(home: Path) -> None:
    folder = home / "runs" / "folder" / "rows"
    assert {path.name for path in folder.iterdir()} == {"origin", "dknnb_cl"}
    paths = sorted(home.glob("images/test/*/*.png"))
    for path in folder.glob("*/*.csv"):
        lines = rows(path)
        assert len(lines) == 3 * (6 - 4)
        for line in lines:
            file = home / "images" / line["file"]
            assert file == paths[int(line["id"])]
            assert file.parent.name == CLASSES[int(line["label"])]
        if path.stem == "random_signs":  # each pixel moves by eps, unless it meets 0 or 1
            assert all(float(line["linf"]) == pytest.approx(0.03, abs=1e-6) for line in lines)
    assert {path.stem for path in folder.glob("origin/*")} == {"clean", "random_signs", "fgsm", "bim"}


@pytest.mark.xdist_group("own")
def test_reports_are_left(home: Path) -> None:
    for file in ("folder/table1.csv", "folder/table2.csv", "folder/neighbours.png"):
        assert (home / "runs" / file).stat().st_size
    board = json.loads((home / "runs/folder-leaderboard/leaderboard.json").read_text())
    assert "random_signs@eps=0.1" in board["settings"]["attacks"]
    victims = {line["victim"] for line in rows(home / "runs/folder-leaderboard/leaderboard.csv")}
    assert {"dnn", "dknn", "knn/model.layer4", "knn/model.fc"} <= victims


@pytest.mark.xdist_group("own")
def test_a_checkpoint_of_ones_own_is_what_was_attacked(home: Path) -> None:
    # The network that made the file, on the pixels of the PNG files; the configurations' mean and deviation.
    arguments = yaml.safe_load((home / "configs/folder/network.yaml").read_text())["init_args"]
    plain = torchvision.models.resnet18(num_classes=3).eval()
    plain.load_state_dict(torch.load(home / "my_resnet18.pt", weights_only=True))
    mean, std = (torch.tensor(arguments[name])[:, None, None] for name in ("mean", "std"))
    for line in rows(home / "runs/folder-own/rows/origin/clean.csv"):
        with Image.open(home / "images" / line["file"]) as file:
            pixels = np.array(file.resize((32, 32), Image.Resampling.BILINEAR))
        image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        with torch.no_grad():
            assert plain(((image - mean) / std)[None]).argmax().item() == int(line["dnn_before"])
    described = json.loads((home / "runs/folder-own/summary.json").read_text())["settings"]
    assert list(described["checkpoints"]) == ["origin"]


@pytest.mark.xdist_group("own")
def test_changed_images_are_not_taken_for_the_old(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("images", "configs"):
        shutil.copytree(home / part, tmp_path / part)
    file = tmp_path / "images" / "train" / "one" / "03.png"
    with Image.open(file) as image:
        image.rotate(90).save(file)
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--config",
        "configs/folder/attack.yaml",
        f"--cache={home / 'runs' / 'cache'}",
        "--output",
        "new",
    ]
    new = prepare(experiment_of(parse("evaluate", arguments, "")))
    assert not new.networks.checkpoint(ORIGIN).is_file()
    shutil.copyfile(home / "images" / "train" / "one" / "03.png", file)
    arguments[-1] = "old"
    old = prepare(experiment_of(parse("evaluate", arguments, "")))
    assert old.networks.checkpoint(ORIGIN).is_file()
