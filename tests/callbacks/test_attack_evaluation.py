"""Metrics of the callback equal those of an independent run, and training is not affected."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from lightning_advknn.attacks import Attack, AttackSettings
from lightning_advknn.callbacks import AttackEvaluation, attack_evaluation, attacked_images
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch, Digits
from lightning_advknn.data.splits import ImageSplit
from lightning_advknn.evaluation import Verdicts, judge, make_rows, perturb
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.modules import SurrogateModule
from lightning_advknn.search.build import build_banks
from tests.callbacks.small import (
    FGSM,
    LAYERS,
    SIZES,
    Noise,
    SmallNet,
    attack_metrics,
    chosen,
    make_callback,
    make_trainer,
)


class Recorded(AttackSettings):
    """FGSM that records its labels and adversarials, and needs gradients to be enabled."""

    def check(self) -> None: ...

    def bind(self, image_shape: tuple[int, ...] = (), num_classes: int = 0) -> Attack:
        # Each stage binds the attack again.
        calls: list[tuple[Tensor, Tensor]] = vars(self).setdefault("calls", [])

        def attack(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
            leaf = images.clone().requires_grad_()
            loss = nn.functional.cross_entropy(logits_fn(leaf), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
            adversarial = (images + 0.1 * gradient.sign()).clamp(0, 1)
            calls.append((labels, adversarial))
            return adversarial

        return attack


class Forbidden(ImageSplit):
    """Images that must not be read."""

    def __getitems__(self, indices: Any) -> Batch:
        raise AssertionError("test images were read")

    def select(self, indices: Tensor) -> ImageSplit:
        raise AssertionError("test images were chosen")


class TestIsVal(Digits):
    """Digits whose test images are the validation images."""

    __test__ = False

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.name = "Digits"  # so that the backbone's checkpoint fits
        self._splits["test"] = self._splits["val"]


def rows_by_hand(
    module: LightningModule, attacked: Batch, calibration: Batch, label_source: str, eps: float = 0.1
) -> dict[str, dict[str, Tensor]]:
    """Rows before and after FGSM, as `attack.py` makes them."""
    surrogate = module.surrogate if isinstance(module, SurrogateModule) else None
    network = module.network.network if surrogate is None else surrogate.backbone.network
    features = FeatureNetwork(network.eval(), LAYERS)
    banks = build_banks(features, [chosen(Digits().split("train"), 0, 200)], 10)
    dknn = DkNN.on_banks(features, banks, k=5)
    dknn.calibrate([calibration])
    images, labels, ids = attacked
    before = judge(dknn, "relu", images)
    goal = before.knn if label_source == "knn" else labels
    attack = AttackSettings("fgsm", {"eps": eps}).bind()
    adversarial = perturb(attack, surrogate or network, images, goal)

    def rows(attacked: Tensor, after: Verdicts) -> dict[str, Tensor]:
        classes = None
        if surrogate is not None:
            with torch.no_grad():
                classes = surrogate(images).argmax(1), surrogate(attacked).argmax(1)
        return make_rows(ids, labels, images, attacked, before, after, classes)

    return {"clean": rows(images, before), "fgsm": rows(adversarial, judge(dknn, "relu", adversarial))}


def reduced_by_hand(rows: dict[str, Tensor], clean: bool) -> dict[str, float]:
    result = {}
    for victim in ("dnn", "knn", "dknn", "surrogate"):
        if f"{victim}_after" not in rows:
            continue
        right = rows[f"{victim}_after"] == rows["label"]
        result[f"{victim}_acc"] = right.double().mean()
        if not clean:
            result[f"{victim}_l2_success"] = rows["l2"][~right].double().mean()
        if victim in ("knn", "dknn"):
            credibility = rows[f"{victim}_credibility_after"]
            result[f"{victim}_credibility"] = credibility.mean()
            if not clean:
                result[f"{victim}_credibility_success"] = credibility[~right].mean()
    if not clean:
        result |= {"l2": rows["l2"].double().mean(), "linf": rows["linf"].max(), "n": torch.tensor(61.0)}
    return {name: value.item() for name, value in result.items()}


def test_each_attack_has_its_own_precision(
    make_module: Callable[[], LightningModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def keep(*args: Any, batch_size: int | None) -> Tensor:
        assert batch_size is None  # on a CPU, as everywhere else
        seen.append(args[4:])
        return perturb(*args)

    monkeypatch.setattr(attacked_images, "perturb", keep)
    attacks = {"exact": FGSM, "fast": AttackSettings("fgsm", {"eps": 0.1}, "winograd")}
    trainer = make_trainer(tmp_path, make_callback(attacks=attacks))
    trainer.validate(make_module(), datamodule=Digits(), verbose=False)
    assert seen == [("float32", "exact"), ("winograd", "fast")]


@pytest.mark.parametrize(("n", "size"), [(1, 64), (64, 64), (65, 256), (256, 256), (257, None), (9250, None)])
def test_few_images_are_filled_up_to_few_on_a_gpu(n: int, size: int | None) -> None:
    assert attacked_images._batch_size(n, torch.device("cuda")) == size
    assert attacked_images._batch_size(n, torch.device("cpu")) is None


@pytest.mark.parametrize("label_source", ["knn", "true"])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_are_those_of_an_independent_run(
    make_module: Callable[[], LightningModule], tmp_path: Path, stage: str, label_source: str
) -> None:
    module, data = make_module(), Digits()
    trainer = make_trainer(tmp_path, make_callback(label_source=label_source))
    getattr(trainer, stage)(module, datamodule=data, verbose=False)

    if stage == "validate":
        attacked, calibration = chosen(data.split("val"), 0, 61), chosen(data.split("val"), 61, 101)
        assert not set(attacked.ids.tolist()) & set(calibration.ids.tolist())
    else:
        attacked, calibration = chosen(data.split("test"), 0, 61), chosen(data.split("calibration"), 0, 40)
    rows = rows_by_hand(module, attacked, calibration, label_source)
    expected = {
        f"attack/{name}/{metric}": value
        for name in ("clean", "fgsm")
        for metric, value in reduced_by_hand(rows[name], clean=name == "clean").items()
    }
    assert attack_metrics(trainer) == pytest.approx(expected, nan_ok=True)
    for name, own in rows.items():
        for place, layer in enumerate(LAYERS):
            right = own["votes_after"][:, place].argmax(1) == own["label"]
            ties = own["votes_after"][:, place].sort(descending=True).values
            right &= ties[:, 0] > ties[:, 1]  # ties are broken by class id
            sure = right.double().mean().item()
            unsure = (ties[:, 0] == ties[:, 1]).double().mean().item()
            logged = trainer.callback_metrics[f"layers/{name}/{layer}_knn_acc"].item()
            assert sure - 1e-6 <= logged <= sure + unsure + 1e-6
    untrained = isinstance(module, SurrogateModule)
    assert ("attack/fgsm/surrogate_acc" in expected) == untrained
    # So that the comparison is meaningful: the attack works, and kNN and true labels differ.
    assert untrained or expected["attack/clean/dnn_acc"] > 0.7 > expected["attack/fgsm/dnn_acc"]
    assert not torch.equal(rows["clean"]["knn_before"], rows["clean"]["label"])


def test_curves_are_those_of_an_independent_run(
    make_module: Callable[[], LightningModule], tmp_path: Path
) -> None:
    module, data = make_module(), Digits()
    callback = make_callback(attacks={"fgsm": FGSM, "noise": Noise("noise")}, eps_curve=[0.3, 0.02])
    trainer = make_trainer(tmp_path, callback, logger=CSVLogger(tmp_path, name="log"), log_every_n_steps=1)
    trainer.fit(module, datamodule=data)
    attacked, calibration = chosen(data.split("val"), 0, 61), chosen(data.split("val"), 61, 101)
    with (tmp_path / "log" / "version_0" / "metrics.csv").open() as file:
        points = [row for row in csv.DictReader(file) if row["eps/eps"]]
    assert [float(point["eps/eps"]) for point in points] == [0, 0.02, 0.1, 0.3]
    for point in points:
        rows = rows_by_hand(module.eval(), attacked, calibration, "knn", float(point["eps/eps"]))["fgsm"]
        for victim in ("dnn", "knn", "dknn", "surrogate"):
            if f"{victim}_after" in rows:
                wrong = (rows[f"{victim}_after"] != rows["label"]).double().mean().item()
                assert float(point[f"eps/fgsm/{victim}_success"]) == pytest.approx(wrong)
    assert not [name for name in points[0] if "noise" in name and name.startswith("eps/")]  # noise has no eps


def test_eps_replaces_that_of_all_attacks_that_have_one(tmp_path: Path) -> None:
    own = {"fgsm": FGSM, "bim": AttackSettings("bim", {"eps": 0.1, "step_size": 0.1, "steps": 1})}
    callback = make_callback(attacks={**own, "noise": Noise("noise")}, eps=0.3)
    images, labels = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2).long()
    for name, largest in (("fgsm", 0.3), ("bim", 0.1)):  # BIM's one step
        changed = callback.attacks[name].bind()(lambda x: x.flatten(1), images, labels) - images
        assert changed.abs().max().item() == pytest.approx(largest)
    assert own["fgsm"].settings == {"eps": 0.1}


def test_layer_and_k_can_be_the_surrogates_own(checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for arguments in ({"layer": None, "k": None}, {"layer": "norm", "k": 3}, {"layer": "norm", "k": 5}):
        module = SurrogateModule(SmallNet(), str(checkpoint), "norm", k=3)
        module.load_state_dict(found[0][0] if found else module.state_dict())
        trainer = make_trainer(tmp_path, make_callback(**arguments))
        trainer.validate(module, datamodule=Digits(), verbose=False)
        found.append((module.state_dict(), attack_metrics(trainer)))
    (_, own), (_, same), (_, other) = found
    assert own == pytest.approx(same, nan_ok=True)
    assert own != pytest.approx(other, nan_ok=True)


def test_fit_validate_and_test_make_the_same_adversarials(
    make_module: Callable[[], LightningModule], tmp_path: Path
) -> None:
    module = make_module()
    recorded = Recorded("fgsm")
    trainer = make_trainer(tmp_path, make_callback(attacks={"noise": Noise("noise"), "fgsm": recorded}))
    trainer.fit(module, datamodule=TestIsVal())  # its validation sees the final weights
    fitted = attack_metrics(trainer)
    trainer.validate(module, datamodule=TestIsVal(), verbose=False)
    assert attack_metrics(trainer) == pytest.approx(fitted, abs=0, rel=0, nan_ok=True)
    trainer.test(module, datamodule=TestIsVal(), verbose=False)
    tested = attack_metrics(trainer)
    same = [name for name in fitted if "credibility" not in name]  # calibrated by other images
    assert {name: tested[name] for name in same} == pytest.approx(
        {name: fitted[name] for name in same}, abs=0, rel=0, nan_ok=True
    )
    (labels, adversarial), *others = recorded.calls  # type: ignore[attr-defined]
    assert len(others) == 2
    for other_labels, other in others:
        assert torch.equal(other_labels, labels)
        assert torch.equal(other, adversarial)


def test_training_does_not_notice(make_module: Callable[[], LightningModule], tmp_path: Path) -> None:
    outcomes, attacks = [], {"fgsm": FGSM, "noise": Noise("noise")}
    for callbacks in ([], [make_callback(attacks=attacks, eps_curve=[0.3])]):
        module = make_module()
        make_trainer(tmp_path, *callbacks, max_epochs=2).fit(module, datamodule=Digits())
        modes = [part.training for part in module.modules()]
        outcomes.append((module.state_dict(), torch.get_rng_state(), torch.initial_seed(), modes))
    (weights, state, seed, modes), (noticed_weights, noticed_state, noticed_seed, noticed_modes) = outcomes
    assert list(weights) == list(noticed_weights)
    assert all(torch.equal(weights[name], noticed_weights[name]) for name in weights)
    assert torch.equal(state, noticed_state)
    assert (seed, modes) == (noticed_seed, noticed_modes)


def test_modes_and_gradients_are_put_back(make_module: Callable[[], LightningModule], tmp_path: Path) -> None:
    module = make_module()
    seen: list[Any] = []

    def state() -> Any:
        return (
            [part.training for part in module.modules()],
            [(p.requires_grad, p.grad is None) for p in module.parameters()],
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )

    class Watched(AttackEvaluation):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = state()
            super().on_validation_epoch_end(trainer, pl_module)
            seen.append((before, state()))

    watched = Watched({"fgsm": FGSM}, layer="relu", layers=LAYERS, **SIZES)
    trainer = make_trainer(tmp_path, watched, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=Digits())
    trainer.validate(module, datamodule=Digits(), verbose=False)
    assert len(seen) == 2
    assert seen[1][0][3]  # inference mode, which attacks have to leave
    for before, after in seen:
        assert before == after


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_no_test_image_is_read_before_testing(
    make_module: Callable[[], LightningModule], tmp_path: Path, stage: str
) -> None:
    data = Digits()
    data.setup()
    for name in ("test", "calibration"):
        split = data.split(name)
        data._splits[name] = Forbidden(split.images, split.labels, split.ids)
    trainer = make_trainer(tmp_path, make_callback())
    getattr(trainer, stage)(make_module(), datamodule=data)
    assert "attack/fgsm/knn_acc" in trainer.callback_metrics
    with pytest.raises(AssertionError, match="test images were"):
        trainer.test(make_module(), datamodule=data)


def test_what_does_not_change_is_computed_once(
    make_module: Callable[[], LightningModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []

    def counted(*arguments: Any) -> Any:
        built.append(1)
        return build_banks(*arguments)

    monkeypatch.setattr(attack_evaluation, "build_banks", counted)
    recorded, module = Recorded("fgsm"), make_module()
    callback = make_callback(attacks={"fgsm": recorded}, every_n_epochs=2)
    trainer = make_trainer(tmp_path, callback, max_epochs=5)
    trainer.fit(module, datamodule=Digits())
    assert len(recorded.calls) == 2  # type: ignore[attr-defined]  # epochs 2 and 4; none in the sanity check
    assert len(built) == (1 if isinstance(module, SurrogateModule) else 2)
    trainer.validate(module, datamodule=Digits(), verbose=False)
    assert len(recorded.calls) == 3  # type: ignore[attr-defined]  # outside of a fit, always
    assert len(built) == (2 if isinstance(module, SurrogateModule) else 3)


def test_the_own_layers_are_the_default(make_module: Callable[[], LightningModule], tmp_path: Path) -> None:
    module = make_module()
    trainer = make_trainer(tmp_path, make_callback(layers=None))
    trainer.validate(module, datamodule=Digits(), verbose=False)
    metrics = attack_metrics(trainer)
    one_layer = isinstance(module, SurrogateModule)
    assert (metrics["attack/fgsm/dknn_credibility"] == metrics["attack/fgsm/knn_credibility"]) == one_layer
