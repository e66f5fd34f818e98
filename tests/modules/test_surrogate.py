"""The surrogate's targets against a float64 brute force, its losses against torch's own, and cached votes."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_advknn.data import Batch, Digits
from lightning_advknn.modules import SurrogateModule
from lightning_advknn.search import MemoryBank

MakeTrainer = Callable[..., Trainer]
MakeSurrogate = Callable[..., SurrogateModule]
K = 6


class Twins(Digits):
    """Digits whose second half repeats the first half's images under the next class's labels."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.name = "Digits"  # so that the backbone's checkpoint fits

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = super().load(train)
        half = len(images) // 2
        return torch.cat([images[:half], images[:half]]), torch.cat([labels[:half], (labels[:half] + 1) % 10])


class Batches(Callback):
    """Records the ids of the training batches."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.ids.append(batch.ids.cpu())


@pytest.fixture
def make_surrogate(small_net: type[nn.Module], backbone_checkpoint: Path) -> MakeSurrogate:
    """Make a surrogate of the trained backbone, on ``relu``, with dropout in the network."""

    def make(checkpoint: Path = backbone_checkpoint, **arguments: Any) -> SurrogateModule:
        torch.manual_seed(1)
        return SurrogateModule(
            small_net(dropout=0.5), str(checkpoint), **{"layer": "relu", "k": K, **arguments}
        )

    return make


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of queries of each search from now on."""
    sizes: list[int] = []
    votes = MemoryBank.votes

    def counted(self: MemoryBank, queries: Tensor, *arguments: Any) -> Tensor:
        sizes.append(len(queries))
        return votes(self, queries, *arguments)

    def counted_all(self: MemoryBank, k: int) -> Tensor:
        sizes.append(len(self))
        return leave_one_out(self, k)

    leave_one_out = MemoryBank.leave_one_out_votes
    monkeypatch.setattr(MemoryBank, "votes", counted)
    monkeypatch.setattr(MemoryBank, "leave_one_out_votes", counted_all)
    return sizes


def small_data(**arguments: Any) -> Digits:
    return Digits(**{"val_size": 850, "eval_batch_size": 97, **arguments})


def activations(checkpoint: Path, small_net: type[nn.Module], data: Digits, split: str, layer: str) -> Tensor:
    """Features of a split, from the checkpoint's weights, layer by layer."""
    network = small_net()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network.network."): value for name, value in state.items()})
    network.eval()
    values = data.split(split).images / 255
    with torch.no_grad():
        for name, module in network.named_children():
            values = module(values)
            if name == layer:
                return values.flatten(1)
    raise AssertionError(layer)


def brute_force(
    queries: Tensor, bank: Tensor, labels: Tensor, k: int, metric: str = "cosine", leave_out: bool = False
) -> np.ndarray:
    """Votes ``(B, 10)`` in float64; with `leave_out`, query i ignores row i."""
    q, b = queries.double().numpy(), bank.double().numpy()
    if metric == "cosine":
        q, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (q, b))
        distances = np.round(1 - q @ b.T, 12)
    else:
        distances = ((q[:, None] - b[None]) ** 2).sum(2)
    if leave_out:
        np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.stack([np.bincount(row, minlength=10) for row in labels.numpy()[nearest]])


def eq_16(logits: Tensor, votes: np.ndarray, cls_weight: float, cl_weight: float) -> Tensor:
    """Mean of Eq. (16) with torch's own losses."""
    distribution = torch.from_numpy(votes / votes.sum(1, keepdims=True)).float()
    labels = torch.from_numpy(votes.argmax(1))  # NumPy's takes the lowest class of a tie
    divergence = F.kl_div(logits.log_softmax(1), distribution, reduction="batchmean")
    return cls_weight * F.cross_entropy(logits, labels) + cl_weight * divergence


class Learned(Callback):
    """Keeps what a module learns from, or is compared with, by split."""

    def __init__(self) -> None:
        self.votes: dict[str, Tensor] = {}
        self.features: dict[str, Tensor] = {}

    def _look(self, trainer: Trainer, module: Any) -> None:
        self.votes |= {split: targets.votes.cpu() for split, targets in module._targets.items()}
        self.features |= {split: targets.features.cpu() for split, targets in module._targets.items()}

    on_train_epoch_end = on_validation_epoch_end = on_test_epoch_end = _look


def head(module: SurrogateModule) -> tuple[Tensor, Tensor]:
    return module.surrogate.dknnb.weight.detach().clone(), module.surrogate.dknnb.bias.detach().clone()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("data", [small_data(), Twins(val_size=850)], ids=["digits", "twins"])
def test_targets_equal_a_brute_force_without_the_own_image(
    make_surrogate: MakeSurrogate,
    make_trainer: MakeTrainer,
    small_net: type[nn.Module],
    backbone_checkpoint: Path,
    device: torch.device,
    data: Digits,
    metric: str,
) -> None:
    module, learned = make_surrogate(metric=metric), Learned()
    trainer = make_trainer(device, callbacks=[learned])
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)

    bank = activations(backbone_checkpoint, small_net, data, "train", "relu")
    labels = data.split("train").labels
    for split, leave_out in (("train", True), ("val", False), ("test", False)):
        votes = learned.votes[split].numpy()
        queries = activations(backbone_checkpoint, small_net, data, split, "relu")
        expected = brute_force(queries, bank, labels, K, metric, leave_out)
        np.testing.assert_array_equal(votes, expected, err_msg=split)
    assert (votes.sum(1) == K).all()
    with_own = brute_force(bank, bank, labels, K, metric)
    assert (with_own != brute_force(bank, bank, labels, K, metric, leave_out=True)).any()


@pytest.mark.parametrize(("cls_weight", "cl_weight"), [(0.3, 1.0), (1.0, 0.0), (0.0, 1.0), (2.0, 0.5)])
def test_the_training_loss_is_eq_16_of_the_batch_on_leave_one_out_votes(
    make_surrogate: MakeSurrogate,
    make_trainer: MakeTrainer,
    small_net: type[nn.Module],
    backbone_checkpoint: Path,
    cls_weight: float,
    cl_weight: float,
) -> None:
    data, batches = small_data(batch_size=20), Batches()
    module = make_surrogate(cls_weight=cls_weight, cl_weight=cl_weight)
    weight, bias = head(module)
    trainer = make_trainer(max_steps=1, callbacks=[batches])
    trainer.fit(module, datamodule=data)

    features = activations(backbone_checkpoint, small_net, data, "train", "relu")
    votes = brute_force(features, features, data.split("train").labels, K, leave_out=True)
    rows = [data.split("train").ids.tolist().index(image) for image in batches.ids[0].tolist()]
    assert rows != sorted(rows)  # shuffled, so rows were found by id
    expected = eq_16(features[rows] @ weight.T + bias, votes[rows], cls_weight, cl_weight)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("cls_weight", "cl_weight"), [(0.3, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize(("stage", "split"), [("validate", "val"), ("test", "test")])
@pytest.mark.parametrize("shuffled", [False, True])
def test_evaluation_equals_own_computation_in_any_order(
    make_surrogate: MakeSurrogate,
    make_trainer: MakeTrainer,
    small_net: type[nn.Module],
    backbone_checkpoint: Path,
    stage: str,
    split: str,
    shuffled: bool,
    cls_weight: float,
    cl_weight: float,
) -> None:
    data = small_data()
    if shuffled:

        def loader() -> DataLoader[Batch]:
            order = torch.randperm(len(data.split(split)), generator=torch.Generator().manual_seed(9))
            return DataLoader(
                data.split(split), batch_size=61, sampler=order.tolist(), collate_fn=lambda batch: batch
            )

        setattr(data, f"{split}_dataloader", loader)
    module = make_surrogate(cls_weight=cls_weight, cl_weight=cl_weight)
    (logged,) = getattr(make_trainer(), stage)(module, datamodule=data, verbose=False)

    weight, bias = head(module)
    bank, queries = (
        activations(backbone_checkpoint, small_net, data, part, "relu") for part in ("train", split)
    )
    votes = brute_force(queries, bank, data.split("train").labels, K)
    logits = queries @ weight.T + bias
    predicted, labels = logits.argmax(1).numpy(), data.split(split).labels.numpy()
    expected = {
        f"{split}/loss": eq_16(logits, votes, cls_weight, cl_weight).item(),
        f"{split}/kl": eq_16(logits, votes, 0, 1).item(),
        f"{split}/agreement": np.mean(predicted == votes.argmax(1)),
        f"{split}/acc": np.mean(predicted == labels),
    }
    assert logged == pytest.approx(expected, rel=1e-5)
    assert logged[f"{split}/agreement"] != logged[f"{split}/acc"]


def test_only_dknnb_changes_in_training(
    make_surrogate: MakeSurrogate,
    make_trainer: MakeTrainer,
    backbone_checkpoint: Path,
    device: torch.device,
    tmp_path: Path,
) -> None:
    module = make_surrogate(learning_rate=0.01)
    weight, bias = head(module)
    trainer = make_trainer(device, max_epochs=2)
    trainer.fit(module, datamodule=small_data())

    trained = torch.load(backbone_checkpoint, weights_only=True)["state_dict"]
    frozen = {f"network.{name}": value for name, value in module.surrogate.backbone.state_dict().items()}
    assert trained.keys() == frozen.keys()
    assert {"network.network.norm.running_mean", "network.network.norm.num_batches_tracked"} < frozen.keys()
    for name, value in trained.items():
        assert torch.equal(frozen[name].cpu(), value), name
    assert all(parameter.grad is None for parameter in module.surrogate.backbone.parameters())
    assert not torch.equal(module.surrogate.dknnb.weight.cpu(), weight)
    assert not torch.equal(module.surrogate.dknnb.bias.cpu(), bias)
    (group,) = trainer.optimizers[0].param_groups
    assert {id(parameter) for parameter in group["params"]} == {
        id(p) for p in module.surrogate.dknnb.parameters()
    }


def test_training_brings_the_surrogate_closer_to_the_knn(
    make_surrogate: MakeSurrogate, make_trainer: MakeTrainer
) -> None:
    module, data = make_surrogate(learning_rate=0.01), small_data()
    (before,) = make_trainer().validate(module, datamodule=data, verbose=False)
    make_trainer(max_epochs=15).fit(module, datamodule=data)
    (after,) = make_trainer().validate(module, datamodule=data, verbose=False)
    assert after["val/kl"] < before["val/kl"] / 2
    assert after["val/agreement"] > 0.6 > before["val/agreement"]


def test_the_backbone_is_evaluated_whatever_mode_is_asked_for(make_surrogate: MakeSurrogate) -> None:
    module = make_surrogate()
    for switch in (lambda: module, module.train, module.eval, module.train):
        switch()
        assert not any(part.training for part in module.surrogate.backbone.modules())
        assert not any(parameter.requires_grad for parameter in module.surrogate.backbone.parameters())


def test_forward_is_dknnb_on_the_layers_features(
    make_surrogate: MakeSurrogate, small_net: type[nn.Module], backbone_checkpoint: Path
) -> None:
    module, data = make_surrogate(), small_data()
    module.load_backbone("Digits")
    weight, bias = head(module)
    images = (data.split("val").images / 255).requires_grad_()
    logits = module(images)
    expected = activations(backbone_checkpoint, small_net, data, "val", "relu") @ weight.T + bias
    torch.testing.assert_close(logits, expected)
    (gradient,) = torch.autograd.grad(logits.sum(), images)  # attacks can differentiate it
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "stages",
    ["fit", "validate", "test", "validate fit", "test fit", "fit validate test", "fit fit", "test validate"],
)
def test_stages_follow_each_other_in_any_order(
    make_surrogate: MakeSurrogate, make_trainer: MakeTrainer, stages: str
) -> None:
    module, data = make_surrogate(learning_rate=0.01), small_data()
    for stage in stages.split():
        weight, _ = head(module)
        trainer = make_trainer()
        arguments = {} if stage == "fit" else {"verbose": False}
        getattr(trainer, stage)(module, datamodule=data, **arguments)
        expected = {"fit": ("train/loss", "val/kl"), "validate": ("val/kl",), "test": ("test/kl",)}[stage]
        for name in expected:
            assert 0 < trainer.callback_metrics[name].item() < 100
        assert torch.equal(head(module)[0], weight) == (stage != "fit")


@pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty"
)  # to resume there is the point
def test_an_interrupted_training_goes_on_to_the_same_weights(
    make_surrogate: MakeSurrogate, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def train(epochs: int, ckpt_path: Path | None = None) -> tuple[Tensor, Tensor]:
        seed_everything(0, verbose=False)
        module = make_surrogate(learning_rate=0.01)
        picker = ModelCheckpoint(tmp_path, "best", monitor="val/loss", save_last=True)
        trainer = make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[picker])
        trainer.fit(module, datamodule=small_data(), ckpt_path=ckpt_path, weights_only=True)
        return head(module)

    uninterrupted, unfinished = train(4), train(2)
    resumed = train(4, tmp_path / "last.ckpt")
    assert not torch.equal(unfinished[0], uninterrupted[0])
    assert torch.equal(resumed[0], uninterrupted[0])
    assert torch.equal(resumed[1], uninterrupted[1])


def test_other_data_on_the_same_module_has_its_own_targets(
    make_surrogate: MakeSurrogate, make_trainer: MakeTrainer
) -> None:
    module, fresh = make_surrogate(), make_surrogate()
    make_trainer().validate(module, datamodule=small_data(), verbose=False)
    other = small_data(split_seed=1)
    (again,) = make_trainer().validate(module, datamodule=other, verbose=False)
    (expected,) = make_trainer().validate(fresh, datamodule=other, verbose=False)
    assert again == expected


def test_taught_votes_are_learned_instead_of_a_search(
    make_surrogate: MakeSurrogate, make_trainer: MakeTrainer, searches: list[int]
) -> None:
    results = []
    votes: dict[str, Tensor] = {}
    for _ in range(2):
        module, learned = make_surrogate(), Learned()
        module.teach(votes)
        seed_everything(0, verbose=False)
        trainer = make_trainer(callbacks=[learned])
        trainer.fit(module, datamodule=small_data())
        results.append((head(module), {**trainer.callback_metrics}, sum(searches)))
        searches.clear()
        votes = learned.votes
    (first, logged, searched), (second, logged_again, searched_again) = results
    assert searched == 150 + 850  # train, val: each image once
    assert searched_again == 0
    assert torch.equal(first[0], second[0])
    assert logged == logged_again
    # What is taught is what is learned: other votes or features, another head.
    module = make_surrogate()
    module.teach({split: each.flip(1) for split, each in votes.items()})
    make_trainer().fit(module, datamodule=small_data())
    assert not torch.equal(head(module)[0], first[0])


def test_known_features_are_read_instead_of_images(
    make_surrogate: MakeSurrogate, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(votes: dict[str, Tensor], features: dict[str, Tensor]) -> tuple[SurrogateModule, Learned]:
        module, learned = make_surrogate(), Learned()
        module.teach(votes, features)
        seed_everything(0, verbose=False)
        make_trainer(callbacks=[learned]).fit(module, datamodule=small_data())
        return module, learned

    first, known = trained({}, {})
    monkeypatch.setattr("lightning_advknn.modules.surrogate.build_banks", None)
    again, _ = trained(known.votes, known.features)
    assert torch.equal(head(first)[0], head(again)[0])
    other, _ = trained(known.votes, {split: each.flip(1) for split, each in known.features.items()})
    assert not torch.equal(head(first)[0], head(other)[0])
    assert not other._features_given  # freed with the training


@pytest.mark.parametrize(("accumulated", "shown"), [(1, [2, 5, 8]), (2, [5])])
def test_losses_shown_are_those_of_their_steps(
    make_surrogate: MakeSurrogate,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    accumulated: int,
    shown: list[int],
) -> None:
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item() * accumulated)

    trainer = make_trainer(
        callbacks=[Losses()],
        logger=CSVLogger(tmp_path, name="log"),
        log_every_n_steps=3,
        accumulate_grad_batches=accumulated,
    )
    trainer.fit(make_surrogate(), datamodule=small_data(batch_size=15))  # of 150 images
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        rows = [float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]]
    assert rows == pytest.approx([losses[number] for number in shown])
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(losses[-1])


def test_an_approximate_knn_is_imitated_and_its_recall_logged(
    make_surrogate: MakeSurrogate, make_trainer: MakeTrainer, searches: list[int]
) -> None:
    pytest.importorskip("faiss")

    def validated(**arguments: Any) -> tuple[dict[str, float], Tensor]:
        searches.clear()
        module, learned = make_surrogate(**arguments), Learned()
        (logged,) = make_trainer(callbacks=[learned]).validate(module, datamodule=small_data(), verbose=False)
        return dict(logged), learned.votes["val"]

    exact, votes = validated()
    logged, found = validated(backend="ivf", index={"nlist": 3, "nprobe": 3})  # everywhere
    assert searches
    assert torch.equal(found, votes)
    assert logged == {**exact, "val/recall": 1.0}
    # Half of the rows, and more than the k + 32 that a search wants.
    logged, found = validated(backend="ivf", index={"nlist": 2, "nprobe": 1})
    differing = (found != votes)[:100].any(1).double().mean().item()
    assert 0 < 1 - logged["val/recall"] < differing < 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.0, 0.0), r"not both 0, but got 0\.0 and 0\.0"),
        ((-1.0, 2.0), r"at least 0.*got -1\.0 and 2\.0"),
        ((1.0, -0.5), r"at least 0.*got 1\.0 and -0\.5"),
    ],
)
def test_weights_that_train_nothing_are_refused(
    make_surrogate: MakeSurrogate, weights: tuple[float, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_surrogate(cls_weight=weights[0], cl_weight=weights[1])


def test_an_unknown_layer_is_refused_with_those_there_are(make_surrogate: MakeSurrogate) -> None:
    with pytest.raises(
        ValueError, match=r"relu3.*\['conv', 'norm', 'relu', 'flatten', 'dropout', 'logits', 'output'\]"
    ):
        make_surrogate(layer="relu3")


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("k", [0, 150, 9999])
def test_k_outside_of_the_bank_is_refused_before_any_search(
    make_surrogate: MakeSurrogate, make_trainer: MakeTrainer, searches: list[int], stage: str, k: int
) -> None:
    with pytest.raises(ValueError, match=rf"`k` to be in \[1, 149\] .*, but got {k}\."):
        getattr(make_trainer(), stage)(make_surrogate(k=k), datamodule=small_data())
    assert not searches


def test_the_largest_k_lets_every_other_image_vote(
    make_surrogate: MakeSurrogate, make_trainer: MakeTrainer
) -> None:
    data, learned = small_data(), Learned()
    make_trainer(callbacks=[learned]).fit(make_surrogate(k=149), datamodule=data)
    votes = learned.votes["train"]
    labels = data.split("train").labels
    assert torch.equal(votes, labels.bincount(minlength=10) - F.one_hot(labels, 10))


def test_a_missing_backbone_is_named_with_the_way_to_make_one(
    make_surrogate: MakeSurrogate, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = make_surrogate(checkpoint=tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt.*train\.py fit .*backbone_checkpoint"):
        make_trainer().fit(module, datamodule=small_data())


def test_a_loss_that_is_not_finite_stops_training(
    make_surrogate: MakeSurrogate, make_trainer: MakeTrainer
) -> None:
    module = make_surrogate()
    module.surrogate.dknnb.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite training loss, but got nan.*learning rate"):
        make_trainer(num_sanity_val_steps=0).fit(module, datamodule=small_data())
