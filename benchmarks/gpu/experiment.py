"""The MNIST experiment on the GPU, by stage."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.gpu.clock import Record
from benchmarks.gpu.commands import run
from benchmarks.gpu.sizes import Sizes
from benchmarks.pipeline import stages

_LIMIT = 170.0


def measure(device: torch.device, sizes: Sizes, root: str | None) -> Iterator[Record]:
    """Yield a record of the whole command, then one for each stage."""
    case = "MNIST experiment"
    if root is None:
        yield {"case": case, "method": report.OURS, "failed": "no `--root` with MNIST's files"}
        return
    with tempfile.TemporaryDirectory() as folder:
        places = ["--root", root, "--cache", f"{folder}/cache", "--output", f"{folder}/output"]
        command = ["attack.py", "evaluate", "--config", "configs/mnist/attack.yaml", "--device", device.type]
        record, _ = run([*command, "--wandb_mode", "disabled", *places], _LIMIT)
        yield {"case": f"{case}: whole command", "method": report.OURS, **record}
        summary = Path(folder) / "output" / "summary.json"
        if summary.is_file():
            for stage in stages(json.loads(summary.read_text(encoding="utf-8")), {}, case):
                yield {key: stage[key] for key in ("case", "method", "seconds")}
