"""Bounds on rounding errors of floating-point arithmetic."""

from typing import Any

import torch
from torch import Tensor

UNIT = 2.0**-24  # largest relative rounding of float32
SMALLEST = 2.0**-126  # what float32 may lose to underflow, in one operation
LARGEST = 2.0**126  # a float32 intermediate of this size might overflow

# Largest relative rounding of an input of a float32 matmul. TF32 keeps 10 bits of mantissa and bfloat16 keeps
# 7. Hardware may truncate instead of rounding to nearest.
_INPUT_ROUNDING = {"tf32": 2.0**-10, "bf16": 2.0**-7}

# A tensor core adds blocks of at least 4 products to a sum. It truncates each of these 5 numbers to 24 bits of
# the largest, and the result once more: 6 errors of 2 u where 4 of u are counted.
_TENSOR_CORES = 3


def relative_error(width: int, input_rounding: float = 0.0, tensor_cores: bool = False) -> float:
    """Bound on the error of a float32 dot product of D terms in any order, relative to ``|q| |x|``.

    It is gamma_D = D u / (1 - D u) with u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms,
    section 3.1), with three times as many terms on tensor cores (Fasi et al., Numerical behavior of NVIDIA
    tensor cores, 2021). Eight more roundings allow for norms and scaling.

    Args:
        width: D.
        input_rounding: Largest relative rounding of the factors before they are multiplied.
        tensor_cores: Whether a GPU's tensor cores add up the terms.
    """
    terms = (width + 8) * UNIT * (_TENSOR_CORES if tensor_cores else 1)
    return (1 + input_rounding) ** 2 * (1 + terms / (1 - terms)) - 1


def float64_error(width: int) -> float:
    """The same bound for float64, with room for the few operations on similarities and bounds."""
    return 4 * (width + 8) * 2.0**-53


def matmul_rounding(device: torch.device) -> float:
    """Largest relative rounding of an input of a float32 matmul on a device, under torch's current settings."""
    backends: Any = torch.backends  # whose attributes are set where type checkers do not see them
    matmul = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    return _INPUT_ROUNDING.get(matmul.fp32_precision, 0.0)


def inverse(values: Tensor) -> Tensor:
    """1 / value, and 0 for 0: the cosine similarity of a zero vector to anything is 0."""
    # Not `torch.where`, which fills a tensor with the number first: on a GPU one more kernel.
    return values.reciprocal().masked_fill(values <= 0, 0.0)
