"""Pytest on pretended GPUs: ``PRETEND_CUDA=2 python -m pytest -p tests.pretend_cuda.plugin -n 0`` has two.

It selects tests whose `device` is a GPU, and those of pretended GPUs themselves.
"""

import os

from tests.pretend_cuda.ledger import ledger
from tests.pretend_cuda.torch_cuda import install

install(int(os.environ.get("PRETEND_CUDA", "1")))

UNSEEN: dict[str, str] = {}
"""Tests that check what a pretended GPU cannot show, and why."""


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if _is_of_gpus(item) and item.nodeid.split("[")[0] not in UNSEEN]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _is_of_gpus(item):
    device = getattr(item, "callspec", None) and item.callspec.params.get("device")
    return str(device).startswith("cuda") or item.nodeid.startswith("tests/pretend_cuda/")


def pytest_runtest_setup(item):
    ledger.reset()
