"""An experiment by stage, and the cost of `AttackEvaluation`: python -m benchmarks.pipeline [--quick].

Wall times of stages come from a summary of ``attack.py evaluate`` (``--summary``). With ``--quick``, the
embedded digits' experiment runs now, in a temporary folder. ``--before FILE``, another summary or a JSON of
seconds by stage, adds an earlier version: ``ratio`` compares their times, and ``exact`` says whether all
metrics are equal, if both have some.

Then one epoch of the backbone trains with and without the callback, each in its own process.
``ratio`` is relative to the epoch with it, ``share_of_epoch`` is the time that it adds, and ``exact`` says
whether the trained weights are equal bit for bit. Loggers are off, so W&B panels do not count.

At last, commands start: their help and the import of the package, beside the import of torch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.measure import in_child, peak_mib, summarized, timed
from lightning_advknn.callbacks import AttackEvaluation
from lightning_advknn.experiment.training import instantiate
from lightning_advknn.modules import BackboneModule
from lightning_advknn.storage import weights_digest

_WITHOUT = "no callback"
_STARTS = {
    "import lightning_advknn": ["-c", "import lightning_advknn"],
    **{
        f"lightning-advknn {arguments}": ["-m", "lightning_advknn", *arguments.split()]
        for arguments in ("--help", "evaluate --help", "leaderboard --help", "train --help")
    },
}


def main(args: Sequence[str] | None = None) -> list[report.Record]:
    """Run the command line."""
    parser = report.options(__doc__)
    parser.add_argument(
        "--summary", help="Summary of attack.py; results/mnist/seed0.json, or of a new run if quick."
    )
    parser.add_argument("--before", help="Summary of an earlier version, or a JSON of seconds by stage.")
    given = report.parse(parser, args)
    now = _summary(given)
    before = _read(given.before) if given.before else {}
    label = f"{'quick, ' if given.quick else ''}{now['settings']['data']['name']}"
    records = report.with_ratios([*stages(now, before, label), *_epochs(given), *_starts(given)])
    settings = {"stages_of": {key: now[key] for key in ("command", "versions", "device", "date")}}
    settings["before_of"] = {
        key: before[key] for key in settings["stages_of"] if key in before
    } or given.before
    report.publish("pipeline", records, given, settings, "share_of_epoch")
    return records


def _summary(given: argparse.Namespace) -> dict[str, Any]:
    """The summary of ``attack.py evaluate``, which runs now if quick."""
    if given.summary or not given.quick:
        return _read(given.summary or "results/mnist/seed0.json")
    with tempfile.TemporaryDirectory() as folder:
        places = [f"--output={folder}/output", f"--cache={folder}/cache"]
        arguments = ["evaluate", f"--config={given.config}", "--device=cpu", *places]
        in_child("attack", "main", given.threads, args=arguments)
        return _read(f"{folder}/output/summary.json")


def _read(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return found


def stages(now: dict[str, Any], before: dict[str, Any], label: str) -> list[report.Record]:
    """Each stage and their sum, now and before."""
    equal = now["metrics"] == before["metrics"] if "metrics" in before else None
    sides = [(report.OURS, now, now["seconds"], equal)]
    if before:
        sides.append(("before", before, before.get("seconds", before), None))
    names = [*dict.fromkeys(stage for side in sides for stage in side[2]), "all stages"]
    records = []
    for stage in names:
        for method, summary, seconds, exact in sides:
            totals = {**seconds, "all stages": sum(seconds.values())}
            if stage in totals:
                record = {"case": f"{label}: {stage}", "method": method, "seconds": float(totals[stage])}
                records.append({**record, "exact": exact, "device": summary.get("device"), "threads": None})
    return records


def _epochs(given: argparse.Namespace) -> list[report.Record]:
    """An epoch with and without the callback."""
    found = {
        method: in_child(
            "benchmarks.pipeline",
            "epoch",
            given.threads,
            config=given.config,
            root=given.root,
            evaluating=method == report.OURS,
            repeats=1 if given.quick else 3,
        )
        for method in (report.OURS, _WITHOUT)
    }
    data = {times.pop("data") for times in found.values()}.pop()
    case = f"{'quick, ' if given.quick else ''}{data}: epoch of the backbone with AttackEvaluation"
    exact = found[report.OURS].pop("weights") == found[_WITHOUT].pop("weights")
    added = found[report.OURS]["seconds"] / found[_WITHOUT]["seconds"] - 1
    return [
        {"case": case, "method": report.OURS, **found[report.OURS], "exact": exact, "share_of_epoch": added},
        {"case": case, "method": _WITHOUT, **found[_WITHOUT]},
    ]


def _starts(given: argparse.Namespace) -> list[report.Record]:
    """What a new process needs before it works, in rounds over all commands."""
    commands = {"import torch": ["-c", "import torch"], **_STARTS}
    seconds: dict[str, list[float]] = {case: [] for case in commands}
    for _ in range(1 if given.quick else 5):
        for case, arguments in commands.items():
            run = partial(subprocess.run, [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds[case].append(timed(run)[1]["seconds"])
    return [
        {"case": case, "method": method, **summarized(seconds[measured])}
        for case in _STARTS
        for method, measured in ((report.OURS, case), ("import torch", "import torch"))
    ]


def epoch(config: str, root: str | None, evaluating: bool, repeats: int) -> dict[str, Any]:
    """Time one epoch of training in this process, validation included.

    Args:
        config: Configuration of an experiment.
        root: Folder of the data files.
        evaluating: Whether to keep the configuration's `AttackEvaluation`.
        repeats: Number of repeats, each from the beginning.

    Returns:
        The time, a digest of the ``weights``, and the name of the ``data``.
    """
    experiment = report.experiment(config, root, None)
    seconds = []
    for _ in range(repeats):
        cli = instantiate(
            experiment.backbone, BackboneModule, experiment.seed, experiment.root, torch.device("cpu")
        )
        trainer: Any = cli.trainer
        trainer.callbacks = [c for c in trainer.callbacks if evaluating and isinstance(c, AttackEvaluation)]
        trainer.fit_loop.max_epochs = 1
        cli.datamodule.setup()
        fit = partial(trainer.fit, cli.model, datamodule=cli.datamodule)
        seconds.append(timed(fit)[1]["seconds"])
    times = {**summarized(seconds), "peak_mib": peak_mib()}
    return {**times, "weights": weights_digest(cli.model.network), "data": cli.datamodule.name}


if __name__ == "__main__":
    main()
