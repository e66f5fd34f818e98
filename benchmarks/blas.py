"""Which library multiplies matrices for a method, and by which kernel.

faiss's wheel carries an OpenBLAS of 2021. Environment variables can force it to a slow kernel, and on
processors that it does not know it falls back to one by itself: Prescott's, at a fifth of the speed. That
would flatter what it is compared with. So benchmarks start processes without these variables
(`measure.in_child`), faiss gets the fastest kernel that its OpenBLAS has, and each row names what was used.
"""

import re
import time
from functools import cache

from benchmarks.measure import FORCING, in_child

_KERNELS = ("SkylakeX", "Haswell", "Zen")  # for x86, beside what it chooses
_QUERIES, _ROWS, _WIDTH = 256, 4096, 1024  # of the product that compares them
_NAMES = {"openblas": "OpenBLAS", "mkl": "MKL"}
_OWN = {"faiss": "faiss_cpu", "scikit-learn": "numpy"}  # whose OpenBLAS a method uses; all others use torch's


def used(method: str) -> str:
    """Library, version and kernel of a method's matrix products, in a process where it has run."""
    import torch

    package = next((package for start, package in _OWN.items() if method.startswith(start)), None)
    if package is None:
        built = torch.__config__.show()
        versions = {"MKL": r"Math Kernel Library Version ([\d.]+)", "oneDNN": r"MKL-DNN v([\d.]+)"}
        found = {name: re.search(pattern, built) for name, pattern in versions.items()}
        parts = [f"{name} {version[1]}" for name, version in found.items() if version]
        return ", ".join([*parts, torch.backends.cpu.get_cpu_capability()])
    from threadpoolctl import threadpool_info  # scikit-learn needs it too

    libraries = {
        f"{_NAMES.get(each['internal_api'], 'BLAS')} {each['version']} {each.get('architecture')}"
        for each in threadpool_info()
        if each["user_api"] == "blas" and f"/{package}" in each["filepath"]
    }
    return ", ".join(sorted(libraries)) or "unknown"


@cache
def fastest_for(method: str, threads: int) -> dict[str, str]:
    """Environment variables by which a method's library uses the fastest kernel that it has.

    They are measured, each in its own process. A kernel whose instructions the processor lacks ends its
    process.
    """
    if method != "faiss":
        return {}
    choices: list[dict[str, str]] = [{}, *({FORCING[0]: kernel} for kernel in _KERNELS)]
    seconds = {i: _seconds(choice, threads) for i, choice in enumerate(choices)}
    return choices[min(seconds, key=seconds.__getitem__)]


def _seconds(variables: dict[str, str], threads: int) -> float:
    try:
        return float(in_child("benchmarks.blas", "faiss_seconds", threads, variables, quiet=True))
    except RuntimeError:
        return float("inf")


def faiss_seconds() -> float:
    """Time of a small exact search by faiss in this process, the best of several."""
    import numpy as np

    from lightning_advknn.search.scans.faiss_scan import import_faiss

    rows = np.random.default_rng(0).random((_ROWS, _WIDTH), dtype=np.float32)
    index = import_faiss().IndexFlatIP(_WIDTH)
    index.add(rows)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        index.search(rows[:_QUERIES], 10)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
