"""An experiment's checks look at the runs and answers that they are about."""

from typing import Any

import pytest
import torch

from lightning_advknn.attacks import AttackSettings
from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.settings import Experiment, VictimSettings
from lightning_advknn.reports.leaderboards.checks import failed
from lightning_advknn.reports.leaderboards.evidence import Evidence
from lightning_advknn.reports.leaderboards.failures import Looked

N = 20
LABELS = torch.arange(N) % 2
NONE = torch.zeros(N, dtype=torch.bool)
ALL = ~NONE
ATTACKS = {
    "bim": AttackSettings("bim", {"eps": 0.5, "step_size": 0.1, "steps": 10}),
    "near": AttackSettings("minimum_norm", through="logits_s"),
}


def rows_of(fooled: bool, surrogate_right: bool = True) -> Rows:
    """Images that everyone gets right before an attack and, if it succeeds, wrong after it, at an L2 of 1."""
    after = 1 - LABELS if fooled else LABELS
    far = torch.full((N,), float(fooled), dtype=torch.float64)
    rows = {"id": torch.arange(N), "label": LABELS, "l2": far, "linf": far / 2}
    for when, classes in (("before", LABELS), ("after", after)):
        # Two layers of k = 3 that agree.
        votes = 3 * torch.nn.functional.one_hot(classes, 2)
        rows |= {f"{name}_{when}": classes for name in ("dnn", "knn", "dknn")}
        rows |= {
            f"votes_{when}": votes[:, None].expand(N, 2, 2),
            f"surrogate_{when}": classes if surrogate_right else torch.zeros_like(classes),
        }
    return rows


def gathered(**changes: Any) -> Evidence:
    """Of BIM on the network and a surrogate, and a minimum-norm attack on DkNN through the surrogate."""
    experiment = Experiment(
        backbone=None, surrogates={}, attacks=ATTACKS, victim=VictimSettings(layer="logits")
    )
    right = {"surrogate_right": changes.get("surrogate_right", True)}
    evidence = Evidence(experiment, ("relu", "logits"), torch.tensor([[3, 3]] * 4), rows_of(False))
    looked = {"iterates": {"moved": ALL, "reached": ALL, "differentiated": ALL}}
    evidence.add("origin", "bim", rows_of(changes.get("fooled", True)), **looked)
    evidence.add("logits_s", "bim", rows_of(True, **right), imitates="knn/logits", **looked)
    evidence.add("dknn", "near", rows_of(True), queries=2.0)
    evidence.asked_again = {"bim, origin": {"again": NONE, "apart": NONE} | changes.get("asked", {})}
    zero = changes.get("zero", NONE)
    evidence.looked = {name: Looked(torch.arange(N), zero, NONE) for name in evidence.differentiated}
    return evidence


def test_sound_runs_pass_all_checks() -> None:
    evidence = gathered()
    checks = evidence.checks(("even", "odd"), {"dknn": torch.full((N,), 0.9, dtype=torch.float64)})
    assert len(checks) == 12
    assert failed(checks) == []
    assert [(run.name, run.queries) for run in evidence.runs] == [
        ("bim, origin at 0.5", 0.0),
        ("bim, logits_s at 0.5", 0.0),
        ("near, dknn", 2.0),
    ]
    # Attacks on victims differentiate nothing themselves.
    assert evidence.differentiated == ["origin", "logits_s"]
    assert list(evidence.clean.victims) == ["dnn", "knn/relu", "knn/logits", "dknn"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"asked": {"again": ALL}},
            "stored adversarials, queried again, get the same votes: bim, origin: 20 of",
        ),
        ({"asked": {"apart": ALL}}, "images get the same votes in other batches: bim, origin: 20 of 20"),
        ({"surrogate_right": False}, "clean images are classified: logits_s: 50.00 % of clean images right"),
        (
            {"fooled": False},
            "what fools on the way fools in the end: bim, origin at 0.5: 20 of the 20 images left",
        ),
        (
            {"fooled": False, "zero": ALL},
            "what attacks differentiate has gradients: bim, origin at 0.5: at 20 of 20 images left",
        ),
    ],
)
def test_what_is_gathered_reaches_its_check(changes: dict[str, Any], said: str) -> None:
    lines = failed(gathered(**changes).checks(("even", "odd")))
    assert any(line.startswith(f"Check failed: {said}") for line in lines), lines


def test_a_bound_above_an_adversarial_is_found() -> None:
    bounds = {"knn/relu": torch.full((N,), 1.1, dtype=torch.float64)}
    (line,) = failed(gathered().checks(("even", "odd"), bounds))
    assert line.startswith("Check failed: no distance is below its lower bound: knn/relu: 20 images")
