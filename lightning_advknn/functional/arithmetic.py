"""What every public function expects of torch's settings, and the arithmetic in which victims decide."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


def check_defaults() -> None:
    """Raise a ValueError unless torch makes float32 tensors on the CPU where nothing else is said: results are defined so."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32:
        raise ValueError(
            f"Expected torch's default dtype to be torch.float32, in which features and votes are defined, but got {dtype}."
            " Call `torch.set_default_dtype(torch.float32)`, and convert single tensors where you need another dtype."
        )
    if device.type != "cpu":
        raise ValueError(
            f"Expected torch's default device to be the CPU, but got {device}. Call `torch.set_default_device('cpu')`, and move"
            " networks and images with `.to(device)`."
        )


def autocast_devices() -> list[str]:
    """Types of the devices on which autocast is on."""
    return [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]


@contextmanager
def float32_arithmetic() -> Iterator[None]:
    """Compute in float32, whatever autocast or `torch.set_float32_matmul_precision` say outside: as victims decide.

    Also a decorator. cuDNN's convolutions are left as they are.
    """
    matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made when imported
    lowered = [(each, each.fp32_precision) for each in matmuls if each.fp32_precision in ("tf32", "bf16")]
    with ExitStack() as stack:
        for device in autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            for matmul, _ in lowered:
                matmul.fp32_precision = "ieee"
            yield
        finally:
            for matmul, precision in lowered:
                matmul.fp32_precision = precision
