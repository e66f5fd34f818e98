"""What an experiment runs on."""

import datetime
import os
import platform
from typing import Any

import torch

from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.ranks import Ranks
from lightning_advknn.storage import versions

# Environment variables by which libraries compute differently on one processor.
_LIMITS = (
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_MAX_CPU_ISA",
)


def find_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this name; ``auto`` is the GPU if there is one. Ranks on one machine get a GPU each.

    A GPU also becomes torch's current one, on which libraries compute that are not told another.

    Raises:
        ValueError: If torch cannot use it here, or not in float64.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.size > 1:
        # A launcher that gives each rank a GPU of its own shows it no other.
        name = f"cuda:{ranks.local_rank if torch.cuda.device_count() > 1 else 0}"
    try:
        device = torch.zeros(0, device=name, dtype=torch.float64).device
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"Expected `device` to be one that torch can use here, with float64, but {name!r}: {error}"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def arithmetic(device: torch.device) -> dict[str, Any]:
    """What decides how float32 numbers are rounded here, as plain values, for keys of attacks and verdicts.

    Products have the precision that victims decide in, whatever torch's switches say. Not the number of
    threads, nor versions of libraries: those do not go with the machine alone.
    """
    backends: Any = torch.backends  # whose attributes are set where type checkers do not see them
    with float32_arithmetic():
        if device.type == "cuda":
            instructions = "{}.{}".format(*torch.cuda.get_device_capability(device))
            matmul, conv = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
        else:
            instructions = backends.cpu.get_cpu_capability()
            matmul, conv = backends.mkldnn.matmul.fp32_precision, backends.mkldnn.conv.fp32_precision
    exact = {"none": "ieee"}  # what torch calls a precision that nobody has lowered
    return {
        "device": device.type,
        "instructions": instructions,
        "limits": {name: os.environ[name] for name in _LIMITS if name in os.environ},
        "matmul": exact.get(matmul, matmul),
        "conv": exact.get(conv, conv),
        "dtype": str(torch.get_default_dtype()),
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """What a result file says of its making: versions, device and date."""
    return {
        "versions": versions(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "date": datetime.date.today().isoformat(),
    }
