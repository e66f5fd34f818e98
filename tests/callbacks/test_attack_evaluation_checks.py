"""Arguments that do not fit are refused before training."""

import re
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import LightningModule

from lightning_advknn.attacks import AttackSettings
from lightning_advknn.data import Digits
from lightning_advknn.modules import BackboneModule
from tests.callbacks.small import FGSM, LAYERS, Noise, SmallNet, make_callback, make_surrogate, make_trainer


def test_a_backbone_has_no_layer_and_k_of_its_own(tmp_path: Path) -> None:
    module = BackboneModule(SmallNet(), LAYERS)
    for name in ("layer", "k"):
        with pytest.raises(ValueError, match="Expected `layer` and `k` with a backbone"):
            make_trainer(tmp_path, make_callback(**{name: None})).fit(module, datamodule=Digits())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "Expected `k` to be at least 1, but got 0."),
        ({"num_images": 0}, "Expected `num_images` to be at least 1, but got 0."),
        ({"num_calibration": 0}, "Expected `num_calibration` to be at least 1, but got 0."),
        ({"bank_size": 0}, "Expected `bank_size` to be at least 1, but got 0."),
        ({"every_n_epochs": 0}, "Expected `every_n_epochs` to be at least 1, but got 0."),
        ({"panel_images": -1}, "Expected `panel_images` to be at least 0, but got -1."),
        ({"metric": "l2"}, "Expected `metric` to be one of ('cosine', 'euclidean'), but got 'l2'."),
        ({"label_source": "dnn"}, "Expected `label_source` to be one of ('true', 'knn'), but got 'dnn'."),
        ({"convention": "loose"}, "Expected `convention` to be one of"),
        ({"attacks": {"clean": FGSM}}, "Expected no attack named 'clean'"),
        (
            {"attacks": {"a": AttackSettings("fgsm", {"eps": -0.1})}},
            "Expected `eps` to be finite and at least 0",
        ),
        ({"attacks": {"a": AttackSettings("fgsm", {"epsilon": 0.1})}}, "Expected the settings of fgsm"),
        ({"attacks": {"a": Noise("noise")}, "eps_curve": [0.1]}, "Expected no `eps_curve` without an attack"),
        ({"eps_curve": [-0.1]}, "Expected `eps` to be finite and at least 0"),
        ({"attacks": {"a": AttackSettings("pgd++")}}, "Expected `function` to be one of ["),
    ],
)
def test_bad_settings_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_callback(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 201}, "Expected `k` to be in [1, 200] (the bank's rows), but got 201."),
        ({"k": 851, "bank_size": None}, "Expected `k` to be in [1, 850]"),
        (
            {"bank_size": 851},
            "Expected `bank_size` to be at most 850 (images of Digits's split 'train'), but got 851.",
        ),
        ({"num_images": 111}, "Expected `num_images` + `num_calibration` to be at most 150 (images of"),
        (
            {"layers": ["norm", "relu9"]},
            "Expected distinct `layers` of the network, but got ['norm', 'relu9'].",
        ),
        ({"layer": "conv"}, "Expected `layer` to be one of `layers`, ['norm', 'relu'], but got 'conv'."),
        ({"attacks": {"a": AttackSettings("torchattacks.TIFGSM")}}, "raised RuntimeError: Given groups=3"),
        (
            {"attacks": {"a": AttackSettings("torchattacks.APGDT", {"n_classes": 4})}},
            "n_classes is 4, but there are 10 classes",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    checkpoint: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    module = make_surrogate(checkpoint)
    trainer = make_trainer(tmp_path, make_callback(**arguments))
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.fit(module, datamodule=Digits())
    assert trainer.global_step == 0


def test_too_few_test_images_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    module = make_surrogate(checkpoint)
    for arguments, name, most in (
        ({"num_images": 548}, "num_images", 547),
        ({"num_calibration": 251}, "num_calibration", 250),
    ):
        with pytest.raises(ValueError, match=f"Expected `{name}` to be at most {most} "):
            make_trainer(tmp_path, make_callback(**arguments)).test(module, datamodule=Digits())


def test_other_modules_are_refused(tmp_path: Path) -> None:
    callback, trainer = make_callback(), make_trainer(tmp_path)
    with pytest.raises(TypeError, match="set to an ImageDataModule, but got NoneType"):
        callback.setup(trainer, LightningModule(), "fit")
    trainer.datamodule = Digits()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="Expected a BackboneModule or a SurrogateModule"):
        callback.setup(trainer, LightningModule(), "fit")
