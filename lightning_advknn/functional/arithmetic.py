"""Checks of torch's global settings, and float32 arithmetic for victims."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


def check_defaults() -> None:
    """Raise a ValueError unless torch's default dtype is float32 and its default device is the CPU."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32:
        raise ValueError(
            f"Expected torch's default dtype to be torch.float32, but got {dtype}. Call"
            " `torch.set_default_dtype(torch.float32)`, and convert tensors that need another dtype."
        )
    if device.type != "cpu":
        raise ValueError(
            f"Expected torch's default device to be the CPU, but got {device}. Call"
            " `torch.set_default_device('cpu')`, and move networks and images with `.to(device)`."
        )


def autocast_devices() -> list[str]:
    """Device types for which autocast is enabled."""
    return [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]


@contextmanager
def float32_arithmetic() -> Iterator[None]:
    """Compute in float32, with autocast off and matrix products in full precision; victims decide this way.

    Also works as a decorator. The precision of cuDNN's convolutions does not change.
    """
    cuda, cpu = torch.backends.cuda, torch.backends.mkldnn
    matmuls = cuda.matmul, cpu.matmul  # type: ignore[attr-defined]  # set when torch is imported
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
