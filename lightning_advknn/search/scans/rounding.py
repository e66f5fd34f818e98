"""Bounds on rounding errors of floating-point arithmetic."""

import torch
from torch import Tensor

UNIT = 2.0**-24  # largest relative rounding of float32
SMALLEST = 2.0**-126  # what float32 may lose to underflow, in one operation
LARGEST = 2.0**126  # a float32 intermediate of this size might overflow

# Largest relative rounding of an input of a float32 matmul, by `torch.get_float32_matmul_precision()`. TF32
# keeps 10 bits of mantissa and bfloat16 keeps 7. Hardware may truncate instead of rounding to nearest.
_INPUT_ROUNDING = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


def relative_error(width: int, input_rounding: float = 0.0) -> float:
    """Bound on the error of a float32 dot product of D terms in any order, relative to ``|q| |x|``.

    It is gamma_D = D u / (1 - D u) with u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms,
    section 3.1). Eight more roundings allow for norms and scaling.

    Args:
        width: D.
        input_rounding: Largest relative rounding of the factors before they are multiplied.
    """
    terms = (width + 8) * UNIT
    return (1 + input_rounding) ** 2 * (1 + terms / (1 - terms)) - 1


def float64_error(width: int) -> float:
    """The same bound for float64, with room for the few operations on similarities and bounds."""
    return 4 * (width + 8) * 2.0**-53


def matmul_rounding() -> float:
    """Largest relative rounding of an input of a float32 matmul, under torch's current settings."""
    try:
        return _INPUT_ROUNDING[torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch refuses this query once its newer precision switches are set
        return max(_INPUT_ROUNDING.values())


def inverse(values: Tensor) -> Tensor:
    """1 / value, and 0 for 0: the cosine similarity of a zero vector to anything is 0."""
    return torch.where(values > 0, 1 / values, 0.0)
