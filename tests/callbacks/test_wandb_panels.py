"""What W&B records of attacks, read back from the files of an offline run."""

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import nn

from lightning_advknn.attacks import AttackSettings
from lightning_advknn.callbacks import AttackEvaluation
from lightning_advknn.callbacks.wandb_panels import difference_pixels, enlarge, pixels, votes_text
from lightning_advknn.data import Digits
from lightning_advknn.modules import BackboneModule, SurrogateModule

EPOCHS, IMAGES, PANEL = 3, 40, 4
PREDICTIONS = [f"{who}_{when}" for who in ("dnn", "knn", "dknn", "surrogate") for when in ("before", "after")]
CREDIBILITIES = [f"{who}_credibility_{when}" for who in ("knn", "dknn") for when in ("before", "after")]
HISTOGRAMS = [f"{column}_histogram" for column in ("l2", *CREDIBILITIES)]


class OfflineRun(NamedTuple):
    """A surrogate's training as W&B recorded it."""

    folder: Path
    records: list[dict[str, Any]]
    metrics: dict[str, float]  # the last that Lightning knew

    def history(self, key: str) -> list[dict[str, Any]]:
        """Steps that logged a key."""
        items = [record["history"]["item"] for record in self.records if record["type"] == "history"]
        return [item for item in items if any(name == key or name.startswith(f"{key}.") for name in item)]

    def media(self, item: dict[str, Any], key: str) -> Path:
        return self.folder / "files" / item[f"{key}.path"]


def small_net() -> nn.Sequential:
    layers = OrderedDict(
        conv=nn.Conv2d(1, 4, kernel_size=8, stride=4),
        relu=nn.ReLU(),
        flatten=nn.Flatten(),
        logits=nn.Linear(144, 10),
    )
    return nn.Sequential(layers)


def make_trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        enable_checkpointing=False, log_every_n_steps=5, default_root_dir=folder, **quiet, **options
    )


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineRun]:
    """A surrogate trained on digits with W&B offline."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("WANDB_API_KEY", raising=False)
        environment.setenv("WANDB_MODE", "offline")
        environment.setenv("WANDB_SILENT", "true")
        environment.setenv("WANDB_CONSOLE", "off")
        environment.setenv("WANDB__DISABLE_STATS", "true")
        environment.setenv("WANDB_DISABLE_GIT", "true")
        for place in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
            environment.setenv(f"WANDB_{place}", str(folder / place.lower()))
        yield train(folder)
        wandb.teardown()


def train(folder: Path) -> OfflineRun:
    seed_everything(0, verbose=False)
    trainer = make_trainer(folder, max_epochs=2, logger=False)
    trainer.fit(BackboneModule(small_net(), ["relu"], learning_rate=0.01), datamodule=Digits())
    trainer.save_checkpoint(folder / "backbone.ckpt")

    attacks = {
        "fgsm": AttackSettings("fgsm", {"eps": 0.2}),
        "bim": AttackSettings("bim", {"eps": 0.2, "step_size": 0.05, "steps": 4}),
    }
    sizes = {"k": 5, "num_images": IMAGES, "num_calibration": 40, "bank_size": 200, "panel_images": PANEL}
    callback = AttackEvaluation(attacks, layer="relu", layers=["relu", "logits"], **sizes)
    logger = WandbLogger(project="lightning-advknn", save_dir=folder)
    loggers = [CSVLogger(folder, name="csv"), logger]
    trainer = make_trainer(folder, max_epochs=EPOCHS, logger=loggers, callbacks=[callback])
    module = SurrogateModule(small_net(), str(folder / "backbone.ckpt"), "relu", k=5, learning_rate=0.01)
    trainer.fit(module, datamodule=Digits())
    run_folder = Path(logger.experiment.dir).parent
    wandb.finish()
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_folder)]
    lines = subprocess.run(inspect, capture_output=True, text=True, timeout=60, check=True).stdout
    records = [json.loads(line) for line in lines.splitlines()]
    return OfflineRun(run_folder, records, {name: v.item() for name, v in trainer.callback_metrics.items()})


def table(offline_run: OfflineRun, name: str) -> dict[str, list[Any]]:
    """The last epoch's table by column."""
    key = f"attack/{name}/samples"
    content = json.loads(offline_run.media(offline_run.history(key)[-1], key).read_text())
    return dict(zip(content["columns"], zip(*content["data"], strict=True), strict=True))


def test_each_epoch_has_its_scalars(offline_run: OfflineRun) -> None:
    scalars = [name for name in offline_run.metrics if name.startswith("attack/")]
    assert {"attack/clean/knn_acc", "attack/bim/dknn_acc", "attack/fgsm/surrogate_acc"} < set(scalars)
    for name in scalars:
        items = offline_run.history(name)
        assert [item["epoch"] for item in items] == list(range(EPOCHS))
        assert items[-1][name] == pytest.approx(offline_run.metrics[name])


def test_the_epoch_is_the_axis_of_all_attacks(offline_run: OfflineRun) -> None:
    axes = {
        record["metric"]["name"]: record["metric"].get("step_metric")
        for record in offline_run.records
        if record["type"] == "metric" and "name" in record["metric"]
    }
    logged = {
        name.split(".")[0]
        for record in offline_run.records
        if record["type"] == "history"
        for name in record["history"]["item"]
        if name.startswith("attack/")
    }
    assert len(logged) > 40
    assert {axes[name] for name in logged} == {"epoch"}


def test_the_table_has_every_sample(offline_run: OfflineRun) -> None:
    for name in ("fgsm", "bim"):
        columns = table(offline_run, name)
        votes, pictures = ["votes_before", "votes_after"], ["clean", "adversarial", "difference"]
        expected = {"id", "label", "l2", "linf", *PREDICTIONS, *CREDIBILITIES, *votes, *pictures}
        assert set(columns) == expected
        assert len(columns["id"]) == IMAGES
        assert list(columns["id"]) == sorted(set(columns["id"]))
        for who in ("dnn", "knn", "dknn", "surrogate"):
            right = np.mean(np.equal(columns[f"{who}_after"], columns["label"]))
            assert right == pytest.approx(offline_run.metrics[f"attack/{name}/{who}_acc"])
        assert np.mean(columns["l2"]) == pytest.approx(offline_run.metrics[f"attack/{name}/l2"])
        for picture in pictures:
            assert [cell is not None for cell in columns[picture]] == [i < PANEL for i in range(IMAGES)]
        assert columns["votes_before"][0].startswith("relu: ")
        assert "; logits: " in columns["votes_before"][0]


def test_histograms_are_of_the_table(offline_run: OfflineRun) -> None:
    columns = table(offline_run, "bim")
    for key in HISTOGRAMS:
        items = offline_run.history(f"attack/bim/{key}")
        assert [item["epoch"] for item in items] == list(range(EPOCHS))
        counts, bins = (items[-1][f"attack/bim/{key}.{part}"] for part in ("values", "bins"))
        expected, _ = np.histogram(columns[key.removesuffix("_histogram")], bins=bins)
        # float32 values in a table of float64: one may lie on the other side of an edge.
        assert np.abs(np.cumsum(expected) - np.cumsum(counts)).max() <= 1
        assert sum(counts) == IMAGES
        if "credibility" in key:
            assert (bins[0], bins[-1]) == (0, 1)


def test_pictures_show_the_images(offline_run: OfflineRun) -> None:
    key = "attack/bim/images"
    items = offline_run.history(key)
    assert [item["epoch"] for item in items] == list(range(EPOCHS))
    columns, split = table(offline_run, "bim"), Digits().split("val")
    assert items[-1][f"{key}.count"] == PANEL
    for sample, file in enumerate(items[-1][f"{key}.filenames"]):
        picture = np.asarray(Image.open(offline_run.folder / "files" / file))
        assert picture.shape == (4 * 28, 3 * 4 * 28)
        clean, adversarial, difference = (part[::4, ::4] for part in np.split(picture, 3, axis=1))
        stored = split.images[split.ids == columns["id"][sample]].squeeze().numpy()
        assert np.array_equal(clean, stored)
        changed = (adversarial.astype(float) - clean) / 255
        assert np.abs(changed).max() == pytest.approx(columns["linf"][sample], abs=1 / 255)
        assert np.linalg.norm(changed) == pytest.approx(columns["l2"][sample], rel=0.05)
        assert np.array_equal(
            np.sign(changed[np.abs(changed) > 0.02]), np.sign(difference - 128.0)[np.abs(changed) > 0.02]
        )
        assert {0, 255} & set(difference.ravel().tolist())
        caption = items[-1][f"{key}.captions"][sample]
        assert f"image {columns['id'][sample]}, label {columns['label'][sample]}" in caption
        assert f"knn {columns['knn_before'][sample]} to {columns['knn_after'][sample]}" in caption


def test_other_loggers_get_the_scalars(offline_run: OfflineRun) -> None:
    header = (offline_run.folder.parents[1] / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert {name for name in offline_run.metrics if name.startswith("attack/")} <= set(header.split(","))
    assert not [name for name in header.split(",") if "histogram" in name or "samples" in name]


def test_pixels_are_bytes() -> None:
    image = torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1).expand(3, 2, 4)
    assert pixels(image).dtype == np.uint8
    assert pixels(image).shape == (2, 4, 3)
    assert pixels(image)[0, 0].tolist() == [0, 51, 255]


def test_no_difference_is_grey() -> None:
    image = torch.full((1, 2, 2), 0.5)
    assert set(difference_pixels(image, image).ravel().tolist()) == {128}
    changed = image + torch.tensor([[0.1, 0.0], [-0.1, 0.05]])
    assert difference_pixels(image, changed).squeeze().tolist() == [[255, 128], [0, 191]]


def test_enlarged_pixels_are_squares() -> None:
    enlarged = enlarge(np.arange(4, dtype=np.uint8).reshape(2, 2, 1))
    assert enlarged.shape == (8, 8, 1)
    for row in range(8):
        for column in range(8):
            assert enlarged[row, column, 0] == 2 * (row // 4) + column // 4


def test_votes_are_ordered_by_number_then_class() -> None:
    votes = torch.tensor([[2, 0, 2, 6], [0, 10, 0, 0]])
    assert votes_text(votes, ["relu", "logits"]) == "relu: 6 for 3, 2 for 0, 2 for 2; logits: 10 for 1"
