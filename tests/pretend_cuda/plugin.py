"""Pytest on pretended GPUs: ``PRETEND_CUDA=2 python -m pytest -p tests.pretend_cuda.plugin -n 0`` has two.

It selects tests whose `device` is a GPU, and those of pretended GPUs themselves.
"""

import os

from tests.pretend_cuda.ledger import ledger
from tests.pretend_cuda.tensors import devices
from tests.pretend_cuda.torch_cuda import install

if "PRETEND_CUDA" in os.environ:  # and not where pytest reads all files for doctests
    install(int(os.environ["PRETEND_CUDA"]))

_STRENGTH = (
    "how strong an attack is, in hundreds of steps whose numbers are the CPU's; others run its operators"
)

_BATCHES = "whether results depend on the batch, which is a matter of rounding"
_AUTOGRAD = "whether gradients are recorded, which is the same on every device"

UNSEEN = {
    "tests/attacks/parts/test_soft_votes.py::test_credible_errors_stay_in_the_ball_and_fool_whom_it_lets_them": _STRENGTH,
    "tests/attacks/parts/test_precision.py::test_float32_is_torchattacks_and_winograd_is_as_strong": _STRENGTH,
    "tests/attacks/parts/test_soft_votes.py::test_minimum_norm_comes_to_the_boundary": _STRENGTH,
    "tests/attacks/test_class_guides.py::test_an_image_does_not_depend_on_its_batch": _BATCHES,
    "tests/attacks/test_class_guides.py::test_kernels_find_the_boundary": _STRENGTH,
    "tests/attacks/test_class_guides.py::test_works_where_gradients_are_off": _AUTOGRAD,
    "tests/attacks/test_libraries.py::test_smallest_perturbations_of_a_linear_model": _STRENGTH,
    "tests/attacks/test_sitawarin_wagner.py::test_an_image_does_not_depend_on_its_batch": _BATCHES,
    "tests/attacks/test_sitawarin_wagner.py::test_the_knn_form_finds_a_small_perturbation": _STRENGTH,
    "tests/attacks/test_sitawarin_wagner.py::test_the_victim_is_asked_seldom": _STRENGTH,
    "tests/attacks/test_sitawarin_wagner.py::test_works_where_gradients_are_off": _AUTOGRAD,
    "tests/attacks/test_sitawarin_wagner_2020.py::test_a_bisector_is_reached_and_not_undercut": _STRENGTH,
    "tests/attacks/test_sitawarin_wagner_2020.py::test_no_grid_point_nearer_than_the_attack_by_much_fools_dknn": _STRENGTH,
    "tests/attacks/test_wang.py::test_no_attack_on_the_digits_comes_out_below": _STRENGTH,
    "tests/search/scans/test_torch_scan.py::test_bounds_hold_what_a_scan_finds_and_what_it_does_not": (
        "900 tests of rounding, which is the CPU's; other tests of scans run the same operators"
    ),
}
"""Tests that check what a pretended GPU cannot show, maybe only some parameters of them, and why."""

ON_TWO = "tests/attacks/test_"
"""Tests that are run on two GPUs alone, as they take long: what is wrong on one is also wrong on the second of two."""

MOST = 4
"""Sets of parameters with which any other test is run: more have other numbers, but hardly other operators."""


def pytest_collection_modifyitems(config, items):
    left_out = [*UNSEEN, *([ON_TWO] if devices.count == 1 else [])]
    kept = [item for item in items if _is_of_gpus(item) and not any(_is(name, item) for name in left_out)]
    kept = list(_few_of_each(kept))
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _few_of_each(items):
    """At most `MOST` of each test, equally far apart; all of the attacks and of pretended GPUs themselves."""
    tests = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for test, sets in tests.items():
        whole = test.startswith((ON_TWO, "tests/pretend_cuda/"))
        yield from sets if whole else sets[:: -(-len(sets) // MOST)]


def _is_of_gpus(item):
    device = getattr(item, "callspec", None) and item.callspec.params.get("device")
    return str(device).startswith("cuda") or item.nodeid.startswith("tests/pretend_cuda/")


def _is(name, item):
    test, _, parameters = name.partition("[")
    return item.nodeid.startswith(test) and parameters in item.nodeid


def pytest_runtest_setup(item):
    ledger.reset()
