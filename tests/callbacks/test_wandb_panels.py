"""W&B's panels of attacks, read from the files of an offline run."""

import csv
import hashlib
import json
from base64 import b64encode
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
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn

from lightning_advknn.attacks import AttackSettings, fgsm
from lightning_advknn.callbacks import AttackEvaluation
from lightning_advknn.callbacks.pictures import count, difference_pixels, enlarge, pixels, votes_text
from lightning_advknn.data import Digits
from lightning_advknn.modules import BackboneModule, SurrogateModule
from tests.wandb_runs import OfflineRun, offline_wandb, read_runs

EPOCHS, IMAGES, PANEL = 3, 40, 4
ATTACKS, LAYERS = ("fgsm", "bim"), ("relu", "logits")
PREDICTIONS = [f"{who}_{when}" for who in ("dnn", "knn", "dknn", "surrogate") for when in ("before", "after")]
CREDIBILITIES = [f"{who}_credibility_{when}" for who in ("knn", "dknn") for when in ("before", "after")]


class Trained(NamedTuple):
    """A surrogate's training: W&B's records, and Lightning's metrics."""

    run: OfflineRun
    metrics: dict[str, float]  # the last
    module: SurrogateModule
    csv: list[dict[str, str]]


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
    return Trainer(log_every_n_steps=5, default_root_dir=folder, **quiet, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A surrogate trained on digits with W&B offline."""
    folder = tmp_path_factory.mktemp("wandb")
    with offline_wandb(folder):
        yield train(folder)


def train(folder: Path) -> Trained:
    seed_everything(0, verbose=False)
    trainer = make_trainer(folder, max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(BackboneModule(small_net(), ["relu"], learning_rate=0.01), datamodule=Digits())
    trainer.save_checkpoint(folder / "backbone.ckpt")

    attacks = {
        "fgsm": AttackSettings("fgsm", {"eps": 0.2}),
        "bim": AttackSettings("bim", {"eps": 0.2, "step_size": 0.05, "steps": 4}),
    }
    sizes = {"k": None, "num_images": IMAGES, "num_calibration": 40, "bank_size": 200, "panel_images": PANEL}
    callback = AttackEvaluation(attacks, layer=None, layers=LAYERS, eps_curve=[0.05, 0.3], **sizes)
    logger = WandbLogger(project="lightning-advknn", save_dir=folder, log_model=True)
    picker = ModelCheckpoint(folder / "checkpoints", "best", monitor="val/loss", save_last=True)
    loggers = [CSVLogger(folder, name="csv"), logger]
    trainer = make_trainer(folder, max_epochs=EPOCHS, logger=loggers, callbacks=[callback, picker])
    module = SurrogateModule(small_net(), str(folder / "backbone.ckpt"), "relu", k=5, learning_rate=0.01)
    trainer.fit(module, datamodule=Digits())
    wandb.finish()
    (run,) = read_runs(folder)
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return Trained(run, {name: v.item() for name, v in trainer.callback_metrics.items()}, module, rows)


def shown(trained: Trained, name: str) -> dict[str, list[Any]]:
    """The last epoch's table of samples by column."""
    return trained.run.table(f"samples/{name}/table")


def stored(ids: list[int]) -> Tensor:
    """Validation images, in [0, 1]."""
    split = Digits().split("val")
    return torch.cat([split.images[split.ids == each] for each in ids]) / 255


def test_each_epoch_has_its_scalars(trained: Trained) -> None:
    scalars = [
        name for name in trained.metrics if name.startswith(("attack/", "layers/", "surrogate/", "val/"))
    ]
    victims = ("dnn", "knn", "dknn", "surrogate")
    expected = {f"attack/{name}/{who}_acc" for name in ("clean", *ATTACKS) for who in victims}
    expected |= {f"layers/{name}/{layer}_knn_acc" for name in ("clean", *ATTACKS) for layer in LAYERS}
    expected |= {f"surrogate/{name}/{key}" for name in ("clean", *ATTACKS) for key in ("agreement", "kl")}
    expected |= {"val/acc", "val/loss", "val/kl", "val/agreement"}
    assert expected <= set(scalars)
    for name in scalars:
        items = trained.run.history(name)
        assert [item["epoch"] for item in items] == list(range(EPOCHS))
        by_epoch = [float(row[name]) for row in trained.csv if row[name]]
        assert [item[name] for item in items] == pytest.approx(by_epoch, nan_ok=True)


def test_panels_are_drawn_over_epochs_or_eps(trained: Trained) -> None:
    logged = {name.split(".")[0] for record in trained.run.of("history") for name in record["item"]}
    sections = {name.split("/")[0] for name in logged if "/" in name}
    assert sections == {
        "attack", "layers", "surrogate", "eps", "samples", "histograms", "train", "val", "trainer"
    }  # fmt: skip
    axes = dict.fromkeys(sections - {"train", "trainer"}, "epoch") | {"eps": "eps/eps"}
    for section, axis in axes.items():
        names = [name for name in logged if name.startswith(f"{section}/")]
        assert {trained.run.axes[name] for name in names} == {axis}


def test_success_against_eps_is_there_once(trained: Trained) -> None:
    names = [f"eps/{name}/{who}_success" for name in ATTACKS for who in ("dnn", "knn", "dknn", "surrogate")]
    points = trained.run.history("eps/eps")
    assert [point["eps/eps"] for point in points] == [0, 0.05, 0.2, 0.3]
    in_csv = [row for row in trained.csv if row["eps/eps"]]
    for name in names:
        assert [point[name] for point in points] == pytest.approx([float(row[name]) for row in in_csv])
    # The last epoch has the final weights, so it measured eps 0 and the attacks' own eps.
    for eps, attack in ((0, "clean"), (0.2, None)):
        for name in names:
            _, own, victim = name.removesuffix("_success").split("/")
            point = next(point for point in points if point["eps/eps"] == eps)
            assert point[name] == pytest.approx(1 - trained.metrics[f"attack/{attack or own}/{victim}_acc"])
    columns = shown(trained, "fgsm")
    images, labels = stored(columns["id"]), torch.tensor(columns["label"])
    trained.module.eval()
    for point in points:
        adversarial = fgsm(trained.module, images, torch.tensor(columns["knn_before"]), eps=point["eps/eps"])
        wrong = trained.module(adversarial).argmax(1) != labels
        assert point["eps/fgsm/surrogate_success"] == pytest.approx(wrong.double().mean().item())


def first_class(votes: str, layer: str) -> int:
    """The class with the most votes of a layer, from its description."""
    return int(dict(part.split(": ") for part in votes.split("; "))[layer].split(", ")[0].split(" for ")[1])


def test_layers_have_the_accuracy_of_their_votes(trained: Trained) -> None:
    columns = shown(trained, "bim")
    for layer in LAYERS:
        for name, votes in (("clean", columns["votes_before"]), ("bim", columns["votes_after"])):
            right = [
                first_class(text, layer) == label for text, label in zip(votes, columns["label"], strict=True)
            ]
            assert trained.metrics[f"layers/{name}/{layer}_knn_acc"] == pytest.approx(np.mean(right))
    assert trained.metrics["layers/bim/relu_knn_acc"] == pytest.approx(trained.metrics["attack/bim/knn_acc"])


def test_imitation_is_that_of_votes_and_softmax(trained: Trained) -> None:
    columns = shown(trained, "fgsm")
    images, ascended = stored(columns["id"]), torch.tensor(columns["knn_before"])
    trained.module.eval()
    adversarial = fgsm(trained.module, images, ascended, eps=0.2)
    for name, inputs, when in (("clean", images, "before"), ("fgsm", adversarial, "after")):
        with torch.no_grad():
            logits = trained.module(inputs).double().numpy()
        q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        divergences = []
        for row, votes in enumerate(columns[f"votes_{when}"]):
            counts = [part.split(" for ") for part in votes.split("; ")[0].removeprefix("relu: ").split(", ")]
            divergences.append(
                sum(int(n) / 5 * np.log(int(n) / 5 / q[row, int(label)]) for n, label in counts)
            )
        assert trained.metrics[f"surrogate/{name}/kl"] == pytest.approx(np.mean(divergences), rel=1e-3)
        agree = np.equal(q.argmax(1), columns[f"knn_{when}"])
        assert trained.metrics[f"surrogate/{name}/agreement"] == pytest.approx(agree.mean())
    assert columns["surrogate_kl"] == pytest.approx(divergences, rel=1e-2, abs=1e-4)
    assert np.mean(columns["surrogate_agreement"]) == pytest.approx(agree.mean())
    assert 0 < trained.metrics["surrogate/fgsm/agreement"] < 1


def test_the_table_has_every_sample(trained: Trained) -> None:
    for name in ATTACKS:
        columns = shown(trained, name)
        votes, pictures = ["votes_before", "votes_after"], ["clean", "adversarial", "difference"]
        expected = {"id", "label", "l2", "linf", *PREDICTIONS, *CREDIBILITIES, *votes, *pictures}
        assert set(columns) == expected | {"surrogate_agreement", "surrogate_kl"}
        assert len(columns["id"]) == IMAGES
        assert list(columns["id"]) == sorted(set(columns["id"]))
        for who in ("dnn", "knn", "dknn", "surrogate"):
            right = np.mean(np.equal(columns[f"{who}_after"], columns["label"]))
            assert right == pytest.approx(trained.metrics[f"attack/{name}/{who}_acc"])
        assert np.mean(columns["l2"]) == pytest.approx(trained.metrics[f"attack/{name}/l2"])
        for picture in pictures:
            assert [cell is not None for cell in columns[picture]] == [i < PANEL for i in range(IMAGES)]
        assert columns["votes_before"][0].startswith("relu: ")
        assert "; logits: " in columns["votes_before"][0]


def test_histograms_are_of_the_table(trained: Trained) -> None:
    for name in ATTACKS:
        columns = shown(trained, name)
        for column in ("l2", *CREDIBILITIES):
            key = f"histograms/{name}/{column}"
            items = trained.run.history(key)
            assert [item["epoch"] for item in items] == list(range(EPOCHS))
            counts, bins = (items[-1][f"{key}.{part}"] for part in ("values", "bins"))
            expected, _ = np.histogram(columns[column], bins=bins)
            # Values are float32 in the histogram and float64 in the table, so one may cross an edge.
            assert np.abs(np.cumsum(expected) - np.cumsum(counts)).max() <= 1
            assert sum(counts) == IMAGES
            # Equal bins for all attacks, before and after, so that histograms can be compared.
            width = 0.25 if column == "l2" else 0.05
            assert bins == pytest.approx(np.arange(len(bins)) * width)
            assert bins[-2] <= max(columns[column]) < bins[-1] if column == "l2" else bins[-1] == 1


def test_a_picture_lays_clean_and_adversarial_histograms_over_each_other(trained: Trained) -> None:
    for name in ATTACKS:
        key = f"histograms/{name}/clean_and_adversarial"
        assert [item["epoch"] for item in trained.run.history(key)] == list(range(EPOCHS))
        picture = np.asarray(Image.open(trained.run.media(key)))
        height, width, _ = picture.shape
        assert width > 2 * height > 400
        for part in np.split(picture[:, : width // 3 * 3], 3, axis=1):  # kNN, DkNN, L2
            red, blue = part[..., 0].astype(int), part[..., 2].astype(int)
            assert (red - blue > 60).any()  # adversarial, in orange
        for part in np.split(picture[:, : width // 3 * 3], 3, axis=1)[:2]:
            assert (part[..., 2].astype(int) - part[..., 0] > 60).any()  # clean, in blue


def test_checkpoints_are_artifacts(trained: Trained) -> None:
    artifacts = [each for each in trained.run.of("artifact") if each["type"] == "model"]
    assert {each["name"] for each in artifacts} == {f"model-{trained.run.of('run')[0]['run_id']}"}
    (best,) = [each for each in artifacts if "best" in each["aliases"]]
    metadata = json.loads(best["metadata"])
    losses = [float(row["val/loss"]) for row in trained.csv if row["val/loss"]]
    assert metadata["score"] == pytest.approx(min(losses))
    assert metadata["original_filename"] == "best.ckpt"
    (content,) = best["manifest"]["contents"]
    home = trained.run.folder.parents[1]
    kept = Path(content["local_path"])
    assert kept.is_relative_to(home)  # not in the home directory
    checkpoint = kept.read_bytes()
    assert checkpoint == (home / "checkpoints" / "best.ckpt").read_bytes()
    assert content["digest"] == b64encode(hashlib.md5(checkpoint).digest()).decode()  # noqa: S324 -- W&B's
    assert torch.load(kept, weights_only=True)["epoch"] == np.argmin(losses)


def test_pictures_show_the_images(trained: Trained) -> None:
    key = "samples/bim/images"
    items = trained.run.history(key)
    assert [item["epoch"] for item in items] == list(range(EPOCHS))
    columns, split = shown(trained, "bim"), Digits().split("val")
    assert items[-1][f"{key}.count"] == PANEL
    for sample, file in enumerate(items[-1][f"{key}.filenames"]):
        picture = np.asarray(Image.open(trained.run.folder / "files" / file))
        assert picture.shape == (4 * 28, 3 * 4 * 28)
        clean, adversarial, difference = (part[::4, ::4] for part in np.split(picture, 3, axis=1))
        images = split.images[split.ids == columns["id"][sample]].squeeze().numpy()
        assert np.array_equal(clean, images)
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


def test_other_loggers_get_the_scalars(trained: Trained) -> None:
    scalars = {name for name in trained.metrics if name.startswith(("attack/", "layers/", "surrogate/"))}
    assert scalars <= trained.csv[0].keys()
    assert not [name for name in trained.csv[0] if name.startswith(("samples/", "histograms/"))]


def test_bins_are_the_same_whatever_is_counted() -> None:
    counts, edges = count("l2", torch.tensor([0.1, 0.2, 1.3]))
    assert counts.tolist() == [2, 0, 0, 0, 0, 1]
    assert edges.tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    assert count("l2", torch.zeros(3))[0].tolist() == [3]
    counts, edges = count("knn_credibility_after", torch.tensor([0.5, 1.0]))
    assert edges.tolist() == pytest.approx([step / 20 for step in range(21)])
    assert np.flatnonzero(counts).tolist() == [10, 19]


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
