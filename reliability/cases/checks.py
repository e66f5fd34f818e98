"""Failed attacks, wrong networks and unfair samples, which must not pass for robustness."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from reliability import own_attacks
from reliability.case import CLASSES, TRAIN, Case, Outcome, Ran, evaluate, small_experiment, write_images
from reliability.networks import Small

BIM = {"function": "bim", "settings": {"eps": 0.1, "step_size": 0.01, "steps": 20}}
ATTACKS = {"surrogates": {}, "attacks.bim": BIM}


def pretrained(folder: Path, order: Sequence[int] = (0, 1, 2, 3)) -> None:
    """Write weights trained on the small experiment's images, with label ``order[c]`` for class c."""
    digits = load_digits()
    large = np.kron(digits.images / 16 * 255, np.ones((2, 2))).round() / 255
    rows = np.concatenate([np.flatnonzero(digits.target == digit)[:TRAIN] for digit in range(len(CLASSES))])
    images = torch.from_numpy(large[rows]).float()[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(order)[torch.from_numpy(digits.target[rows]).long()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Small()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    torch.save(network.state_dict(), folder / "small.pt")


def checked(folder: Path, *names: str, ran: Ran) -> Outcome:
    """The outcome where exactly these checks should fail, in output, summary and exit code."""
    checks = json.loads((folder / "runs" / "experiment" / "summary.json").read_text())["checks"]
    wrong = [check for check in checks if check["holds"] is False]
    last = ran.out.splitlines()[len(ran.out.splitlines()) - len(wrong) :]
    lines = [f"Check failed: {check['check']}: {check['detail']}" for check in wrong]
    ok = [check["check"] for check in wrong] == list(names) and last == lines
    words = "; ".join(lines) or "all checks hold"
    return Outcome(f"exit {ran.code}; {words}", ok and ran.code == (3 if names else 0))


def strict(*names: str, weights: Sequence[int] = (0, 1, 2, 3), **changes: Any) -> Callable[[Path], Outcome]:
    """A case that evaluates a pretrained network, where these checks should fail."""

    def run(folder: Path) -> Outcome:
        attack = {**ATTACKS, "backbone.checkpoint": "small.pt", **changes.get("attack", {})}
        small_experiment(folder, **{**changes, "attack": attack})
        pretrained(folder, weights)
        return checked(folder, *names, ran=evaluate(folder, "--strict"))

    return run


def own(function: str, **settings: Any) -> dict[str, Any]:
    """An attack of `own_attacks` instead of the others."""
    mine = {"function": f"{own_attacks.__name__}.{function}", "settings": settings, "norm": "linf"}
    return {"attacks.fgsm": None, "attacks.bim": None, "attacks.own": mine}


def scaled(scale: float) -> dict[str, Any]:
    """A network whose logits are scaled."""
    return {"init_args.settings": {"num_classes": 4, "scale": scale}}


def _names(folder: Path) -> Outcome:
    """Class names in another order than the weights': the output must show what is wrong."""
    small_experiment(folder, images=False, attack={**ATTACKS, "backbone.checkpoint": "small.pt"})
    write_images(folder / "images", {0: "1", 1: "2", 2: "10", 3: "11"})
    pretrained(folder)
    ran = evaluate(folder, "--strict")
    classes = json.loads((folder / "runs" / "experiment" / "summary.json").read_text())["classes"]
    line = next((line for line in ran.out.splitlines() if line.startswith("Classes")), "")
    outcome = checked(folder, CLEAN, ran=ran)
    # In order of names, the digits are 0, 2, 3, 1.
    listed = "0 1 60/30, 1 10 60/30, 2 11 60/30, 3 2 60/30" in line
    return Outcome(
        f"{line}; {outcome.words}", outcome.ok and listed and classes["names"] == ["1", "10", "11", "2"]
    )


def _sample(n: int) -> Callable[[Path], Outcome]:
    """A case that attacks n of 48 images in order of classes."""

    def run(folder: Path) -> Outcome:
        small_experiment(
            folder,
            images=False,
            attack={**ATTACKS, "backbone.checkpoint": "small.pt", "images": n},
            data={"init_args.calibration_per_class": 10},
        )
        write_images(folder / "images", test=22)
        pretrained(folder)
        ran = evaluate(folder)
        summary = json.loads((folder / "runs" / "experiment" / "summary.json").read_text())
        with (folder / "runs" / "experiment" / "rows" / "origin" / "bim.csv").open() as file:
            labels = Counter(int(row["label"]) for row in csv.DictReader(file))
        words = f"{n} of 48 test images, classes as in the whole, seed 0"
        fair = max(labels.values()) - min(labels.values()) <= (n % 4 > 0) and len(labels) == 4
        ok = ran.code == 0 and fair and words in ran.out and summary["settings"]["sample"]["of"] == 48
        counts = ", ".join(f"{labels[label]} of class {label}" for label in sorted(labels))
        return Outcome(f"exit {ran.code}; {counts}; says so: {bool(re.search(words, ran.out))}", ok)

    return run


MOVED = "attacks change the images that they leave"
GRADIENTS = "what attacks differentiate has gradients"
KEPT = "what fools on the way fools in the end"
CLEAN = "clean images are classified"

CASES = [
    Case(
        "checks-honest",
        "A correct network, kNN, DkNN, surrogate, FGSM and BIM, with --strict.",
        "All checks hold, exit code 0.",
        strict(attack={"surrogates": {"dknnb": {"config": "surrogate.yaml"}}}),
    ),
    Case(
        "checks-two-images",
        "Attacks two images, with --strict.",
        "All checks hold, exit code 0.",
        strict(attack={"images": 2}),
    ),
    Case(
        "09-saturated",
        "Logits times 1000: gradients of the cross-entropy vanish, and most adversarials equal the images.",
        "Two checks fail, exit code 3 with --strict.",
        strict(MOVED, GRADIENTS, network=scaled(1000.0)),
    ),
    Case(
        "checks-stays",
        "Your own attack returns the images unchanged.",
        "A check fails.",
        strict(MOVED, attack=own("stays", eps=0.1)),
    ),
    Case(
        "checks-silent-success",
        "Your own attack finds adversarials and returns other images.",
        "A check fails.",
        strict(KEPT, attack=own("overshoots", eps=0.1)),
    ),
    Case(
        "17-class-order",
        "Weights trained with folders 1, 2, 10, 11 in numerical order; here they are in order of names.",
        "Names and labels are printed and kept; a check reports that the kNN is far better than the network.",
        _names,
    ),
    Case(
        "checks-two-classes",
        "Weights with two of the four classes exchanged.",
        "A check fails.",
        strict(CLEAN, weights=(0, 1, 3, 2)),
    ),
    Case(
        "19-wrong-scale",
        "std 1/255 for a network trained on images in [0, 1]: logits are about 255 times too large.",
        "Checks fail.",
        strict(MOVED, GRADIENTS, network={"init_args.mean": [0.0] * 3, "init_args.std": [0.00392] * 3}),
    ),
    Case(
        "checks-first-images",
        "12 of the 48 test images of a folder, in order of classes.",
        "3 images of each of the four classes, as the results state.",
        _sample(12),
    ),
    Case(
        "checks-few-images",
        "6 of the 48 test images of a folder.",
        "Each of the four classes once or twice.",
        _sample(6),
    ),
]
