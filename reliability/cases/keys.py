"""The cache: its keys, concurrent runs that share it, and damaged or read-only files."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

import attack as attack_script
from lightning_advknn.search.scans import quantize
from reliability.case import Case, Outcome, Ran, evaluate, small_experiment
from reliability.concurrent_runs import events

STAGE = "query origin/fgsm"  # a stage that makes the attack too
JUDGED = ["adversarial", "asked_again", "neighbours", "observations"]  # what follows an attack
NUMBERS = sorted(
    [*JUDGED, "bank", "calibration", "gradients", "predictions"]
)  # what depends on a machine's rounding

_Circumstances = contextlib.AbstractContextManager[object]


def _run_concurrently(folder: Path, stop: str, *names: str) -> tuple[list[int], str]:
    """Run one small experiment in several processes; their exit codes, and what is wrong with the results."""
    small_experiment(folder)
    command = [sys.executable, "-m", "reliability.concurrent_runs", str(folder), stop, *names]
    root = Path(attack_script.__file__).parent
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "WANDB_MODE": "disabled"}
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    ends = [what for _, verb, what in events(folder) if verb == "ends"]
    wrong = []
    if len(ends) != len(set(ends)) or len(ends) < 8:
        wrong.append(f"made: {sorted(ends)}")
    rows = [_results(folder / name) for name in names[bool(stop) :]]
    if not rows[0] or rows[0] != rows[1]:
        wrong.append("the results differ")
    if locks := [path.name for path in folder.rglob(".*")]:
        wrong.append(f"left: {locks}")
    for name in names[bool(stop) :]:
        lines = (folder / f"{name}.err").read_text().splitlines()
        messages = [line for line in lines if line.startswith("waiting for another run that makes ")]
        if len(messages) != len(set(messages)) or (
            stop and f"waiting for another run that makes {stop}" not in messages
        ):
            wrong.append(f"{name} printed: {messages}")
    return json.loads(ran.stdout), "; ".join(wrong)


def _results(output: Path) -> dict[str, str]:
    """All results of a run as text, by file; empty if it did not end."""
    if not (output / "summary.json").is_file():
        return {}
    found = {str(path.relative_to(output)): path.read_text() for path in output.rglob("*.csv")}
    summary = json.loads((output / "summary.json").read_text())
    return found | {name: json.dumps(summary[name]) for name in ("metrics", "credibility", "settings")}


def _two(folder: Path) -> Outcome:
    ends, wrong = _run_concurrently(folder, "", "first", "second")
    makers = {name for name, *_ in events(folder)}
    words = wrong or "each stage was made once, and both have equal results"
    return Outcome(f"exits {ends}; {words}; made by {len(makers)}", ends == [0, 0] and not wrong)


def _killed(folder: Path) -> Outcome:
    ends, wrong = _run_concurrently(folder, STAGE, "killed", "first", "second")
    lines = list(events(folder))
    begun = {what for name, verb, what in lines if (name, verb) == ("killed", "begins")}
    ended = {what for name, verb, what in lines if (name, verb) == ("killed", "ends")}
    if len(begun - ended) != 1:
        wrong = f"{wrong}; the killed one was in {begun - ended}"
    words = wrong or "the others waited for it, continued and have equal results; each stage was made once"
    return Outcome(f"exits {ends}; {words}", ends == [-9, 0, 0] and not wrong)


def _files(folder: Path) -> dict[str, int]:
    """Files of the cache, with their times."""
    cache = folder / "runs" / "cache"
    return {
        str(path.relative_to(cache)): path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()
    }


def _kinds(names: set[str]) -> list[str]:
    return sorted({name.split("/")[0] for name in names})


def _again(
    folder: Path, before: _Circumstances, after: _Circumstances, remade: list[str], **changes: object
) -> Outcome:
    """Run a small experiment under two circumstances; `remade` are the stages that should be made again."""
    small_experiment(folder, attack=changes)
    with before:
        first = evaluate(folder)
    kept = _files(folder)
    with after:
        second = evaluate(folder)
    now = _files(folder)
    new, same = _kinds(now.keys() - kept.keys()), kept.items() <= now.items()
    words = f"exits {first.code}, {second.code}; made again: {', '.join(new) or 'nothing'}"
    if not same:
        words += "; what was kept has been overwritten"
    return Outcome(words, (first.code, second.code, new, same) == (0, 0, remade, True))


def _quick(name: str) -> _Circumstances:
    """A processor on which this precision is the fastest."""
    return mock.patch("lightning_advknn.search.scans.quantize._is_quick_in_int8", return_value=name == "int8")


def _instructions(folder: Path) -> Outcome:
    settings = {"eps": 0.1, "step_size": 0.1, "steps": 1}
    attacks = {
        "ask": {"function": "ask", "settings": settings},
        "fgsm": {"function": "fgsm", "settings": {"eps": 0.1}},
    }
    return _again(folder, _quick("float32"), _quick("int8"), JUDGED, attacks=attacks, images=8)


@contextlib.contextmanager
def _lowered() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _precision(folder: Path) -> Outcome:
    return _again(folder, contextlib.nullcontext(), _lowered(), [])


def _copied(folder: Path) -> Outcome:
    other = mock.patch("torch.backends.cpu.get_cpu_capability", return_value="AVX9")
    return _again(folder, other, contextlib.nullcontext(), NUMBERS)


def _limited(folder: Path) -> Outcome:
    limited = mock.patch.dict(os.environ, ONEDNN_MAX_CPU_ISA="AVX2")
    return _again(folder, contextlib.nullcontext(), limited, NUMBERS)


def _read_only(folder: Path) -> Outcome:
    small_experiment(folder)
    first = evaluate(folder)
    touch = Path.touch

    def refuse(self: Path, *arguments: object, **named: object) -> None:  # because root may write everywhere
        if "cache" in self.parts:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        touch(self)

    with mock.patch.object(Path, "touch", refuse):
        whole = evaluate(folder)
        shutil.rmtree(folder / "runs" / "cache" / "adversarial")
        lacking = evaluate(folder)
    refused = lacking.refused("Expected to be able to write in", "Read-only file system", code=1)
    words = f"exits {first.code}, {whole.code}; where something is missing, {refused.words}"
    return Outcome(words, (first.code, whole.code) == (0, 0) and refused.ok)


def _damaged(folder: Path) -> Outcome:
    small_experiment(folder)
    first = evaluate(folder)
    path = min((folder / "runs" / "cache" / "adversarial").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    second = evaluate(folder)
    third = evaluate(folder)
    counts = [ran.err.count("It is made again") for ran in (first, second, third)]
    codes = [ran.code for ran in (first, second, third)]
    return Outcome(
        f"exits {codes}; made again with a warning: {counts}", (codes, counts) == ([0] * 3, [0, 1, 0])
    )


def _overflow(folder: Path) -> Outcome:
    small_experiment(folder, attack={"victim.backend": "int8"})

    def saturating(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left.int() @ right.int()).clamp(-(2**15), 2**15 - 1)

    quantize._int8_is_exact.cache_clear()
    try:
        with mock.patch("torch._int_mm", saturating):
            ran: Ran = evaluate(folder)
    finally:
        quantize._int8_is_exact.cache_clear()
    return ran.refused("Expected exact int8 products", "Use `backend='auto'`")


CASES = [
    Case(
        "keys-two-runs",
        "Two processes run one experiment at the same time on one empty cache.",
        "Each stage is made once, by one of them; both end with equal results and leave no locks.",
        _two,
    ),
    Case(
        "keys-killed",
        "Three processes run one experiment at the same time; one is killed by signal 9 within a stage.",
        "The two that wait for it continue, make each stage once and end with equal results.",
        _killed,
    ),
    Case(
        "keys-instruction-sets",
        "An attack on the victim with `backend: auto` continues on a machine with another fastest precision.",
        "The attack on the victim, which depends on it, is made again; FGSM and clean votes are kept.",
        _instructions,
    ),
    Case(
        "keys-matmul-precision",
        "`torch.set_float32_matmul_precision('medium')` between two runs.",
        "Nothing is made again: victims and attacks compute in IEEE float32 whatever is set.",
        _precision,
    ),
    Case(
        "keys-copied-cache",
        "A cache and results copied from a machine with another instruction set.",
        "Trainings are kept; adversarials and observations are made again.",
        _copied,
    ),
    Case(
        "keys-limited-instructions",
        "ONEDNN_MAX_CPU_ISA is set between two runs, which changes the rounding of convolutions.",
        "Adversarials and observations are made again; trainings are kept.",
        _limited,
    ),
    Case(
        "keys-int8-overflow",
        "`backend: int8` where int8 products overflow, as oneDNN's do without VNNI.",
        "Refused before long work: neighbours would be wrong.",
        _overflow,
    ),
    Case(
        "keys-read-only-cache",
        "A complete cache on a read-only file system; then one with a missing stage.",
        "All is read and nothing is made; the missing stage is an error before its work.",
        _read_only,
    ),
    Case(
        "keys-damaged",
        "A file of the cache is truncated.",
        "It is made again once, with a warning; a third run warns of nothing.",
        _damaged,
    ),
]
