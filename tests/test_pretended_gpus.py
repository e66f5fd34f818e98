"""Tests that take a `device`, on one and on two GPUs that are pretended (tests/pretend_cuda)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretend_cuda.guard import obstacle

OPTIONS = "--import-mode=importlib --strict-markers"  # no doctests, and one process
LEAST = {1: 350, 2: 600}  # tests by GPUs

OBSTACLE = obstacle()


@pytest.mark.skipif(OBSTACLE is not None, reason=f"no GPUs are pretended: {OBSTACLE}")
@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.timeout(1200)
def test_pretended_gpus(gpus, tmp_path):
    arguments = ["-p", "tests.pretend_cuda.plugin", "-p", "no:cacheprovider", "-n", "0", "-q", "--tb=short"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    log = tmp_path / "log"
    try:
        with log.open("w") as output:
            result = subprocess.run(
                [sys.executable, "-m", "pytest", "-o", f"addopts={OPTIONS}", *arguments, "tests"],
                cwd=Path(__file__).parents[1],
                env={**environment, "PRETEND_CUDA": str(gpus), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=1150,
            )
    finally:
        sys.stdout.write(log.read_text())
    assert result.returncode == 0, "the output says why"
    (passed,) = re.findall(r"^(\d+) passed", log.read_text(), re.MULTILINE)
    assert int(passed) >= LEAST[gpus]
