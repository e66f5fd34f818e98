"""Bounds on rounding hold, also for what a tensor core does."""

import math

import pytest
import torch

from lightning_advknn.search.scans import quantize
from lightning_advknn.search.scans.rounding import matmul_rounding, relative_error


def truncated(number: float, unit: float) -> float:
    return math.trunc(number / unit) * unit


def tensor_core_dot(left: torch.Tensor, right: torch.Tensor, block: int) -> float:
    """A sum of products as tensor cores do it: aligned to the largest of a block, and cut off."""
    total = 0.0
    for start in range(0, len(left), block):
        products = left[start : start + block].double() * right[start : start + block].double()
        terms = [total, *products.tolist()]  # exact: 24 bits each, and 2 * 11
        unit = 2.0 ** (math.frexp(max(map(abs, terms)))[1] - 24)
        found = math.fsum(truncated(term, unit) for term in terms)
        total = truncated(found, 2.0 ** (math.frexp(found)[1] - 24)) if found else 0.0
    return total


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("small", [1.96 * 2.0**-24, 1.5 * 2.0**-24, 2.0**-20, 1.0])
def test_sums_of_tensor_cores_stay_within_their_bound(block, small):
    # Behind a first product of 1, one below 2^-23 is cut off: twice what rounding to nearest loses.
    row = torch.full((4096,), math.sqrt(small)).bfloat16().float()
    row[0] = 1
    true = row.double().square().sum().item()  # the product of the lengths, too
    error = abs(tensor_core_dot(row, row, block) - true) / true
    assert error <= relative_error(4096, tensor_cores=True)
    if small == 1.96 * 2.0**-24:
        assert error > relative_error(4096)


def test_the_rounding_of_inputs_is_that_of_the_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    before = torch.get_float32_matmul_precision()
    try:
        for word, on_cpu, on_gpu in (("highest", 0, 0), ("high", 2**-10, 2**-10), ("medium", 2**-7, 2**-10)):
            torch.set_float32_matmul_precision(word)
            assert (matmul_rounding(cpu), matmul_rounding(gpu)) == (on_cpu, on_gpu)
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_of_bfloat16_are_rounded_as_the_bound_assumes(device):
    left = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    found = quantize.products(left, left)
    assert (found.dtype == torch.float32) == quantize.adds_up_bfloat16(device)
    true = left.double() @ left.double().T
    size = left.double().norm(dim=1)[:, None] * left.double().norm(dim=1)
    output = 0.0 if quantize.adds_up_bfloat16(device) else 2.0**-8
    assert (((found.double() - true) / size).abs() <= relative_error(64, tensor_cores=True) + output).all()


def test_int8_products_of_any_number_of_rows_are_exact(device):
    generator = torch.Generator().manual_seed(2)
    for n, m in ((1, 1), (17, 8), (40, 13), (64, 64)):
        left, right = (
            torch.randint(-128, 128, (rows, 32), generator=generator).to(torch.int8) for rows in (n, m)
        )
        found = quantize.products(left.to(device), right.to(device))
        assert found.tolist() == (left.long() @ right.long().T).tolist()
