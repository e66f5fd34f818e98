"""Attacks of other libraries."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability.case import Case, Outcome, Ran, attack, small_experiment


def _run(folder: Path, command: str, attacks: dict[str, Any]) -> Ran:
    small_experiment(
        folder,
        backbone={"trainer.max_epochs": 2},
        attack={
            "surrogates": {},
            "attacks": {name: {**each, "targets": ["origin"]} for name, each in attacks.items()},
        },
    )
    return attack(folder, command, "--config=attack.yaml", "--device=cpu", "--images=8")


def _library(function: str, **settings: Any) -> dict[str, Any]:
    return {"function": function, "settings": settings}


def _norms(folder: Path) -> Outcome:
    right = {
        "ddn": ("l2", _library("foolbox.attacks.DDNAttack", eps=1.0, steps=5)),
        "hop": ("l2", _library("foolbox.attacks.HopSkipJumpAttack", eps=1.0, steps=1)),
        "deepfool": ("linf", _library("foolbox.attacks.LinfDeepFoolAttack", eps=0.1, steps=5)),
        **{
            f"apgd_{given}": (norm, _library("torchattacks.APGD", norm=given, eps=1.0, steps=3))
            for given, norm in (("L2", "l2"), ("l2", "l2"), (2, "l2"), ("inf", "linf"))
        },
        "noise": ("linf", _library("torchattacks.GN", std=0.05) | {"norm": "LINF"}),
    }
    ran = _run(folder, "leaderboard", {name: each for name, (_, each) in right.items()})
    if ran.code:
        return ran.refused(code=0)
    lines = _lines(folder / "runs/experiment/leaderboard.csv")
    found = {
        name: {
            line["norm"] for line in lines if line["attack"] == f"{name}, origin" and line["counted"] == "run"
        }
        for name in right
    }
    words = "; ".join(f"{name}: {', '.join(sorted(norms))}" for name, norms in found.items())
    return Outcome(words, found == {name: {norm} for name, (norm, _) in right.items()})


def _refused(command: str, each: dict[str, Any], *words: str) -> Callable[[Path], Outcome]:
    def run(folder: Path) -> Outcome:
        ran = _run(folder, command, {"theirs": each})
        outcome = ran.refused(each["function"], *words)
        trained = (folder / "runs/cache").exists() and any((folder / "runs/cache").rglob("*.ckpt"))
        return outcome._replace(ok=outcome.ok and not trained)

    return run


def _four_classes(folder: Path) -> Outcome:
    attacks = {
        "autoattack": _library("torchattacks.AutoAttack", eps=0.2),
        "apgdt": _library("torchattacks.APGDT", eps=0.1, steps=3),
        "fab": _library("torchattacks.FAB", eps=0.1, steps=3),
        "told": _library("torchattacks.APGDT", eps=0.1, steps=3, n_classes=4),
    }
    ran = _run(folder, "evaluate", attacks)
    if ran.code:
        return ran.refused(code=0)
    counted, told = (
        [
            {name: value for name, value in line.items() if name not in ("attack", "settings")}
            for line in _lines(folder / f"runs/experiment/rows/origin/{name}.csv")
        ]
        for name in ("apgdt", "told")
    )
    return Outcome(f"exit 0; rows as with n_classes: 4: {counted == told}", counted == told)


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _own(folder: Path) -> Outcome:
    attacks = {
        "papers": _library("reliability.own_attacks.as_papers_do", eps=0.1),
        "colour": _library("reliability.own_attacks.of_colour", eps=0.1),
    }
    ran = _run(folder, "evaluate", attacks)
    return Outcome(f"exit {ran.code}; {ran.err[-300:]}", ran.code == 0)


FOOLBOX, ART, OWN = "foolbox.attacks", "art.attacks.evasion", "reliability.own_attacks"

CASES = [
    Case(
        "10-norms",
        "Ranks attacks of foolbox and torchattacks: DDN, HopSkipJump, LinfDeepFool, and APGD of four norms.",
        "Each is ranked under its library's norm.",
        _norms,
    ),
    Case(
        "10-norms-l1",
        "Ranks foolbox's L1FastGradientAttack.",
        "Refused at the start: L1 is not reported.",
        _refused("leaderboard", _library(f"{FOOLBOX}.L1FastGradientAttack", eps=1.0), "L2 or Linf", "'l1'"),
    ),
    Case(
        "10-norms-ead",
        "Evaluates foolbox's EAD attack.",
        "Refused at the start: its distance is L1.",
        _refused("evaluate", _library(f"{FOOLBOX}.EADAttack", eps=5.0), "L2 or Linf", "'l1'"),
    ),
    Case(
        "12-autoattack-4-classes",
        "Evaluates AutoAttack, APGDT and FAB on images of 4 classes, without n_classes.",
        "n_classes is 4; results as with n_classes: 4.",
        _four_classes,
    ),
    Case(
        "libraries-classes",
        "Evaluates AutoAttack with n_classes: 10 on images of 4 classes.",
        "Refused at the start, with the number of classes.",
        _refused(
            "evaluate",
            _library("torchattacks.AutoAttack", eps=0.1, n_classes=10),
            "n_classes is 10",
            "4 classes",
        ),
    ),
    Case(
        "libraries-pixels",
        "Evaluates JSMA, which changes few pixels (L0).",
        "Refused at the start: L0 is not reported.",
        _refused("evaluate", _library("torchattacks.JSMA"), "L2 or Linf", "'l0'"),
    ),
    Case(
        "libraries-disagree",
        "Sets norm: linf for ART's DeepFool, which minimises L2.",
        "Refused at the start: both norms are named.",
        _refused("leaderboard", _library(f"{ART}.DeepFool") | {"norm": "linf"}, "'l2'", "'linf'"),
    ),
    Case(
        "libraries-silent",
        "Ranks ART's SpatialTransformation, which has no norm.",
        "Refused at the start: `norm` must be given.",
        _refused("leaderboard", _library(f"{ART}.SpatialTransformation"), "Add `norm: l2` or `norm: linf`"),
    ),
    Case(
        "libraries-targeted",
        "Evaluates ART's BoundaryAttack, which is targeted by default (ART's issue 948).",
        "Refused at the start: the attack must be untargeted.",
        _refused("evaluate", _library(f"{ART}.BoundaryAttack"), "`targeted` must be false"),
    ),
    Case(
        "libraries-mid-run",
        "Evaluates foolbox's GenAttack, which is only targeted and fails when it runs (foolbox's issue 614).",
        "Refused at the start, with its own error.",
        _refused("evaluate", _library(f"{FOOLBOX}.GenAttack", eps=0.1), "ValueError: unsupported criterion"),
    ),
    Case(
        "libraries-more",
        "Evaluates a class that extends torchattacks' PGD and returns images and labels.",
        "Refused at the start: it must return a tensor.",
        _refused("evaluate", _library(f"{OWN}.WithLabels", eps=0.1), "got a tuple"),
    ),
    Case(
        "libraries-own-module",
        "Evaluates your own attacks that call model.eval() and model.parameters(), or need three channels.",
        "Tables, exit code 0.",
        _own,
    ),
]
