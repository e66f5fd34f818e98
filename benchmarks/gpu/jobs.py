"""Whether whole commands end well on the GPU: an experiment, a training, two ranks."""

import tempfile
from collections.abc import Iterator

import torch

from benchmarks import report
from benchmarks.gpu.clock import Record
from benchmarks.gpu.commands import run
from benchmarks.gpu.sizes import Sizes

_DIGITS = ("attack.py", "evaluate", "--config", "configs/digits/attack.yaml", "--wandb_mode", "disabled")
_LIMITS = {"digits": 60.0, "gpu1": 45.0, "two ranks": 45.0}


def measure(device: torch.device, sizes: Sizes, root: str | None) -> Iterator[Record]:
    """Yield a record of wall time for each command."""
    for name, command in commands(device.type).items():
        with tempfile.TemporaryDirectory() as folder:
            filled = [part.replace("FOLDER", folder) for part in command]
            record, _ = run(filled, _LIMITS[name])
        yield {"case": f"job: {name}", "method": report.OURS, **record}


def commands(device: str) -> dict[str, list[str]]:
    """What is run by Python, by name; FOLDER is a temporary one."""
    digits = [*_DIGITS, "--device", device, "--cache", "FOLDER/cache", "--output", "FOLDER/output"]
    training = ["train.py", "fit", "--config", "configs/digits/backbone.yaml"]
    training += ["--config", "configs/trainer/gpu1.yaml"]
    return {
        "digits": digits,
        "gpu1": [*training, "--trainer.max_epochs", "2", "--trainer.logger", "false"],
        "two ranks": ["-m", "torch.distributed.run", "--nproc_per_node", "2", *digits, "--images", "64"],
    }
