"""Precisions of Lightning's trainer."""

from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer

from lightning_advknn.attacks import AttackSettings
from lightning_advknn.callbacks import AttackEvaluation
from lightning_advknn.data import Digits
from lightning_advknn.modules import BackboneModule
from reliability.case import Case, Outcome, evaluate, small_experiment, train
from reliability.small_victim import digits_network, refused


def _callback(**settings: Any) -> dict[str, Any]:
    own = {
        "attacks": {"fgsm": {"function": "fgsm", "settings": {"eps": 0.1}}},
        "layer": "model.relu2",
        "k": 5,
    }
    sizes = {"num_images": 8, "num_calibration": 8, "bank_size": 60}
    return {
        "class_path": "lightning_advknn.callbacks.AttackEvaluation",
        "init_args": {**own, **sizes, **settings},
    }


def _train(precision: str, measured: bool, folder: Path) -> Outcome:
    small_experiment(folder, backbone={"trainer.precision": precision, "trainer.max_epochs": 1})
    more = [f"--trainer.callbacks+={_callback()}"] if measured else []
    return train(folder, "fit", "--config=backbone.yaml", "--trainer.accelerator=cpu", *more).refused(
        "`precision`", precision, "bf16-mixed"
    )


def _evaluate_half(folder: Path) -> Outcome:
    small_experiment(folder, surrogate={"trainer.precision": "bf16-true"})
    return evaluate(folder).refused("`precision`", "bf16-true")


def _trainer_half(folder: Path) -> Outcome:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(precision="16-true", accelerator="cpu", default_root_dir=folder, **quiet)
    module = BackboneModule(digits_network(), ["relu", "logits"])
    return refused(lambda: trainer.fit(module, datamodule=Digits()), "`precision`", "16-true")


def _mixed(precision: str, folder: Path) -> Outcome:
    found = []
    for each in ("32-true", precision):
        attacks = {"fgsm": AttackSettings("fgsm", {"eps": 0.05})}
        layers = ["relu", "logits"]
        measure = AttackEvaluation(
            attacks, "relu", layers, 5, num_images=16, num_calibration=20, bank_size=200
        )
        quiet: dict[str, Any] = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        trainer = Trainer(
            precision=each, accelerator="cpu", callbacks=[measure], default_root_dir=folder, **quiet
        )
        module = BackboneModule(digits_network(), layers)
        found.append(trainer.validate(module, datamodule=Digits(), verbose=False)[0])
    differ = [name for name in found[0] if found[0][name] != found[1][name]]
    return Outcome(f"{len(found[0])} metrics, other than in float32: {differ}", not differ)


_BEFORE = "Refused before long work."

CASES = [
    Case(
        "late-bf16-true",
        "train.py with AttackEvaluation and `trainer.precision: bf16-true`.",
        _BEFORE,
        partial(_train, "bf16-true", True),
    ),
    Case(
        "late-16-true",
        "train.py with AttackEvaluation and `trainer.precision: 16-true`.",
        _BEFORE,
        partial(_train, "16-true", True),
    ),
    Case(
        "late-64-true",
        "train.py with `trainer.precision: 64-true`.",
        _BEFORE,
        partial(_train, "64-true", False),
    ),
    Case(
        "late-bf16-true-surrogate",
        "attack.py trains a surrogate in bf16-true.",
        _BEFORE,
        _evaluate_half,
    ),
    Case("late-16-true-python", "A Trainer with precision 16-true, in Python.", _BEFORE, _trainer_half),
    Case(
        "late-bf16-mixed",
        "AttackEvaluation and validation under bf16-mixed.",
        "Metrics as in float32.",
        partial(_mixed, "bf16-mixed"),
    ),
    Case(
        "late-16-mixed",
        "AttackEvaluation and validation under 16-mixed.",
        "Metrics as in float32.",
        partial(_mixed, "16-mixed"),
    ),
]
