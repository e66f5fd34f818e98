"""What an experiment says it depends on, before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_advknn.commands.options import parse
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import experiment_of

CONFIG = Path(__file__).parents[2] / "configs" / "digits" / "attack.yaml"


def guess(target: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Needs no gradient of what it attacks."""
    tries = 1 - images
    return torch.where((target(tries).argmax(1) != labels)[:, None, None, None], tries, images)


@pytest.mark.parametrize(
    ("attack", "named"),
    [
        ({"function": "fgsm", "settings": {"eps": 0.1}}, False),
        ({"function": f"{__name__}.guess", "norm": "l2", "targets": ["origin"]}, False),
        ({"function": f"{__name__}.guess", "norm": "l2", "targets": ["origin", "dknn"]}, True),
        ({"function": "ask", "settings": {"eps": 0.1, "step_size": 0.1, "steps": 1}}, True),
    ],
)
def test_a_named_backend_counts_where_an_attack_asks_a_victim(
    tmp_path: Path, attack: dict[str, Any], named: bool
) -> None:
    config = yaml.safe_load(CONFIG.read_text())
    file = tmp_path / "attack.yaml"
    for name in ("backbone", "surrogates"):
        parts = config[name].values() if name == "surrogates" else [config[name]]
        for part in parts:
            part["config"] = str(CONFIG.parent / part["config"])
    file.write_text(yaml.safe_dump(config | {"attacks": {"one": attack}}))
    found = []
    for backend in ("auto", "float32"):
        options = ["--config", str(file), f"--victim.backend={backend}", f"--cache={tmp_path / 'cache'}"]
        run = ExperimentRun(experiment_of(parse("evaluate", [*options, "--device=cpu"], "")))
        found.append(run.describe())
    assert (found[0] != found[1]) == named
    assert found[1]["victim"].get("backend") == ("float32" if named else None)
