"""What the device can do at most: bandwidth of a large copy, and products in each precision.

Products are square, and of the shapes of a search. int8 must be exact.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.clock import Record, guarded, measured
from benchmarks.gpu.sizes import Sizes
from lightning_advknn.functional import float32_arithmetic, tf32_arithmetic
from lightning_advknn.search.scans.quantize import adds_up_bfloat16

PRODUCTS = ("float32", "tf32", "bfloat16", "int8")
_ADDED = "bfloat16 to float32"  # as a search multiplies, where the device can
COPY = "copy"
_AT_ONCE = 4096


def measure(device: torch.device, sizes: Sizes, root: str | None) -> Iterator[Record]:
    """Yield a record for the copy and each product; `rate` is in 1e12 operations a second, or GB/s."""
    yield guarded(f"copy of {sizes.copied >> 20} MiB", COPY, partial(_copy, device, sizes))
    side = sizes.side
    shapes = [(side, side, side)]
    shapes += [(min(_AT_ONCE, sizes.queries), sizes.rows, width) for width in sizes.widths]
    for shape in shapes:
        case = "product of {} x {} x {}".format(*shape)
        for name in (*PRODUCTS, *([_ADDED] if adds_up_bfloat16(device) else [])):
            yield guarded(case, name, partial(_product, device, sizes, name, *shape))


def _copy(device: torch.device, sizes: Sizes) -> Record:
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    _, found = measured(lambda: target.copy_(source), device, sizes.repeats)
    return {**found, "rate": 2e-9 * sizes.copied / found["min"]}  # read once, written once


def _product(device: torch.device, sizes: Sizes, name: str, n: int, m: int, width: int) -> Record:
    multiply, exact = _multiply(device, name, n, m, width)
    arithmetic = tf32_arithmetic if name == "tf32" else float32_arithmetic
    with arithmetic():
        _, found = measured(multiply, device, sizes.repeats)
    return {**found, "rate": 2e-12 * n * m * width / found["min"], **exact}


def _multiply(
    device: torch.device, name: str, n: int, m: int, width: int
) -> tuple[Callable[[], Tensor], Record]:
    torch.manual_seed(0)
    if name == "int8":
        wide, many, few = (-(-size // 16) * 16 for size in (width, m, n))
        left, right = (
            torch.randint(-128, 128, (size, wide), dtype=torch.int8, device=device)
            for size in (max(32, few), many)
        )
        some = torch._int_mm(left[:32], right[:32].T).cpu()
        right_sums = left[:32].cpu().int() @ right[:32].cpu().int().T
        return lambda: torch._int_mm(left, right.T), {"exact": torch.equal(some, right_sums)}
    dtype = torch.bfloat16 if name.startswith("bfloat16") else torch.float32
    one, other = (torch.randn(size, width, device=device).to(dtype) for size in (n, m))
    if name == _ADDED:
        return lambda: torch.mm(one, other.T, out_dtype=torch.float32), {}
    return lambda: one @ other.T, {}
