"""Vectors in low precision (codes), each with a bound on what its code loses."""

import os
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_advknn.choices import ScanPrecision
from lightning_advknn.search.memory_plan import working_bytes
from lightning_advknn.search.scans.rounding import UNIT, inverse
from lightning_advknn.search.stored_rows import Matrix, StoredRows

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_LEVELS = 255  # steps between the least and the greatest int8
_ALIGNMENT = 16  # GPUs multiply int8 matrices whose width is a multiple of this
WIDEST = 2**16  # int8 products of more columns might exceed int32
_INT8_TENSOR_CORES = (7, 5)  # the first compute capability that has them
_NARROW = 256  # below this width, picking the best scores costs more than computing them


@dataclass(frozen=True)
class Codes:
    """n encoded vectors. Vector i decodes to ``scale[i] * (values[i] - zero[i])``."""

    precision: ScanPrecision
    width: int
    """D of the vectors; int8 values may be padded by zeros to more columns."""
    values: Matrix
    """``(n, at least D)`` of the precision's dtype."""
    scale: Tensor
    """float64 ``(n,)``."""
    zero: Tensor
    """Value that stands for 0: whole numbers, float64 ``(n,)``."""
    sums: Tensor
    """Sums of the values, float64 ``(n,)``."""
    residual: Tensor
    """Upper bound of the distance between a vector and its decoded code, float64 ``(n,)``."""

    def __getitem__(self, rows: slice) -> "Codes":
        parts = (self.values, self.scale, self.zero, self.sums, self.residual)
        return Codes(self.precision, self.width, *(part[rows] for part in parts))


def encode(rows: Matrix, norms: Tensor, precision: ScanPrecision) -> Codes:
    """Encode vectors.

    int8 maps [min(row, 0), max(row, 0)] to 256 levels, one of which is 0. So after a ReLU, zeros stay exact
    and no level is spent on negative numbers.

    Args:
        rows: float32 ``(n, D)``.
        norms: Their Euclidean norms, float64 ``(n,)``.
        precision: Of the codes. They are kept where the rows are: in memory or in a file.
    """
    n, width = rows.shape
    if precision == "float32":
        one, none = (torch.full((n,), value, dtype=torch.float64, device=rows.device) for value in (1.0, 0.0))
        return Codes(precision, width, rows, one, none, none, none)
    columns = width if precision == "bfloat16" else -(-width // _ALIGNMENT) * _ALIGNMENT
    encode_block = _encode_int8 if precision == "int8" else _encode_bfloat16
    at_once = max(1, _elements(rows.device) // max(1, width))

    def encoded(block: slice) -> Codes:
        coded, scale, zero, sums, lost = encode_block(rows[block], norms[block])
        # `lost` itself is rounded: each of its D + 1 terms by float32's unit, relative to the row's length.
        residual = lost * (1 + (width + 8) * UNIT) + 4 * UNIT * norms[block]
        padded = F.pad(coded, (0, columns - width)) if columns > width else coded
        return Codes(precision, width, padded, scale, zero, sums, residual)

    if isinstance(rows, Tensor) and n <= at_once:
        return encoded(slice(0, n))
    dtype = _DTYPES[precision]
    values: Matrix
    if isinstance(rows, Tensor):
        values = torch.empty(n, columns, dtype=dtype, device=rows.device)
    else:
        values = StoredRows(columns, dtype, rows.folder, rows.device)
    about = torch.zeros(4, n, dtype=torch.float64, device=rows.device)
    for start in range(0, n, at_once):
        block = slice(start, start + at_once)
        part = encoded(block)
        if isinstance(values, Tensor):
            values[block] = part.values[:]
        else:
            values.append(part.values[:])
        about[:, block] = torch.stack([part.scale, part.zero, part.sums, part.residual])
    return Codes(precision, width, values, *about)


def _encode_int8(rows: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    low, high = rows.amin(1).double().clamp(max=0), rows.amax(1).double().clamp(min=0)
    scale = ((high - low) / _LEVELS).float()
    scale = scale.masked_fill(scale <= 2.0**-100, 0.0)  # a smaller row is all residual
    factor = inverse(scale)
    zero = (-128 - low * factor).round().clamp(-128, 127).float()
    levels = rows * factor[:, None]
    coded = (levels + zero[:, None]).round_().clamp_(-128, 127)
    values, sums = coded.to(torch.int8), coded.sum(1).double()
    # In units of a level, so that no square underflows. Codes less their zeros are exact.
    scale = scale.double()
    lost = torch.linalg.vector_norm(levels.sub_(coded.sub_(zero[:, None])), dim=1) * scale
    lost = torch.where(scale > 0, lost, norms)
    return values, scale, zero.double(), sums, lost


def _encode_bfloat16(rows: Tensor, _norms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    values = rows.bfloat16()
    one = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    lost = torch.linalg.vector_norm(rows - values, dim=1, dtype=torch.float64)
    return values, one, 0 * one, 0 * one, lost


def lengths(rows: Matrix) -> Tensor:
    """Euclidean norms of float32 ``(n, D)``, float64 ``(n,)``."""
    # In blocks, as torch converts a whole argument to float64.
    at_once = max(1, _elements(rows.device) // max(1, rows.shape[1]))
    if len(rows) <= at_once:
        whole: Tensor = torch.linalg.vector_norm(rows[:], dim=1, dtype=torch.float64)
        return whole
    found = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), at_once):
        block = slice(start, start + at_once)
        found[block] = torch.linalg.vector_norm(rows[block], dim=1, dtype=torch.float64)
    return found


def _elements(device: torch.device) -> int:
    """Numbers encoded at once: they stay in a CPU's cache, and keep a GPU busy, in half of `working_bytes`."""
    return 2**20 if device.type == "cpu" else working_bytes(device) // 64


def products(left: Tensor, right: Tensor) -> Tensor:
    """Products of all pairs of values' rows, ``(n, m)``: exact int32 for int8, float32 for float32.

    Those of bfloat16 are float32 where a device `adds_up_bfloat16`, else rounded to bfloat16.
    """
    if left.dtype != torch.int8:
        matmul = torch.backends.cuda.matmul
        rounds = matmul.allow_bf16_reduced_precision_reduction
        # Autocast and partial sums in bfloat16 would exceed the bounds on rounding.
        matmul.allow_bf16_reduced_precision_reduction = False
        try:
            with torch.autocast(left.device.type, enabled=False):
                if left.dtype == torch.bfloat16 and adds_up_bfloat16(left.device):
                    return torch.mm(left, right.T, out_dtype=torch.float32)
                return left @ right.T
        finally:
            matmul.allow_bf16_reduced_precision_reduction = rounds
    n, m = len(left), len(right)
    if left.is_cuda:  # it takes more than 16 rows, and multiples of 8
        left = _with_rows(left, max(32, -(-n // 8) * 8))
        right = _with_rows(right, -(-m // 8) * 8)
    return torch._int_mm(left, right.T)[:n, :m]


def _with_rows(values: Tensor, rows: int) -> Tensor:
    """The values with rows of zeros added up to a number, without a copy if there are as many."""
    missing = rows - len(values)
    return F.pad(values, (0, 0, 0, missing)) if missing else values


@cache
def adds_up_bfloat16(device: torch.device) -> bool:
    """Whether a device gives the float32 sums of bfloat16 products, as GPUs do."""
    few = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        return torch.mm(few, few, out_dtype=torch.float32).dtype == torch.float32
    except RuntimeError:  # not implemented
        return False


def fastest(device: torch.device, width: int = WIDEST) -> ScanPrecision:
    """The precision in which this kind of device multiplies matrices of this width fastest.

    It depends on the kind of device alone, so it is the same in every process on one kind of machine.
    """
    if not _NARROW <= width <= WIDEST:
        return "float32"
    return "int8" if _is_quick_in_int8(device) and _int8_is_exact(device) else "float32"


def _is_quick_in_int8(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _INT8_TENSOR_CORES
    # Without this instruction torch multiplies int8 in a plain loop, 20 times slower than float32.
    quick = torch.cpu._is_vnni_supported()
    return quick and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def check_int8(device: torch.device) -> None:
    """Raise a ValueError unless this device multiplies int8 exactly, as the bounds assume."""
    if not _int8_is_exact(device):
        limits = [name for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in os.environ]
        unset = f", or unset {limits[0]}" if limits else ""
        raise ValueError(
            f"Expected exact int8 products for `backend='int8'`, but on this {device.type} device they"
            f" overflow or are not implemented. Use `backend='auto'`{unset}."
        )


@cache
def _int8_is_exact(device: torch.device) -> bool:
    """Whether extreme values multiply exactly. oneDNN without an instruction for int8 sums in 16 bits."""
    extremes = torch.tensor([127, -128], dtype=torch.int8).repeat(16)[:, None].expand(-1, 64).contiguous()
    try:
        found = products(*[extremes.to(device)] * 2).cpu()
    except RuntimeError:  # not implemented on this device
        return False
    return torch.equal(found, 64 * extremes[:, :1].int() * extremes[:, 0].int())
