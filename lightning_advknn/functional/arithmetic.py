"""Checks of torch's global settings, and the float32 arithmetic of victims and attacks."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")

_LOWERED = ("tf32", "bf16")  # precisions below that of IEEE float32


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
    """Compute as victims decide: in `ieee_arithmetic`, with autocast off. Also works as a decorator."""
    with ExitStack() as stack:
        for device in autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(ieee_arithmetic())
        yield


@contextmanager
def ieee_arithmetic() -> Iterator[None]:
    """Multiply float32 numbers in full precision, on every device, and in `reproducible_convolutions`.

    Torch's default is TF32 for the convolutions of a GPU: features would be off by 1e-3, by another 1e-3 in
    each batch.
    """
    with ExitStack() as stack:
        if _lowered():
            stack.enter_context(_multiplying("ieee", _lowered))
        stack.enter_context(reproducible_convolutions())
        yield


@contextmanager
def tf32_arithmetic() -> Iterator[None]:
    """Multiply float32 numbers in TF32 where a GPU can; a CPU computes as before."""
    with _multiplying("tf32", lambda: _switches()[:3]):
        yield


@contextmanager
def reproducible_convolutions() -> Iterator[None]:
    """Have cuDNN choose its algorithms without timing them, among those that round alike each time."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _switches() -> Sequence[Any]:
    """Torch's switches of float32 products: those of GPUs, then those of CPUs."""
    backends: Any = torch.backends  # whose attributes are set where type checkers do not see them
    cuda, cudnn, cpu = backends.cuda, backends.cudnn, backends.mkldnn
    return cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn


def _lowered() -> Sequence[Any]:
    return [switch for switch in _switches() if switch.fp32_precision in _LOWERED]


@contextmanager
def _multiplying(precision: str, switches: Callable[[], Sequence[Any]]) -> Iterator[None]:
    """Set switches to a precision, ``ieee`` or ``tf32``, and restore all on exit.

    Torch has older switches for the same, and refuses to read one that says something else than the newer
    ones. So they are set too, and first, for networks and libraries that read them.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [(switch, switch.fp32_precision) for switch in _switches()]
    word, allowed = _readable(torch.get_float32_matmul_precision), _readable(lambda: cudnn.allow_tf32)
    try:
        with _without_advice():
            matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        for switch in switches():
            switch.fp32_precision = precision
        yield
    finally:
        with _without_advice():
            if word is not None:
                torch.set_float32_matmul_precision(word)
            if allowed is not None:
                cudnn.allow_tf32 = allowed
        for switch, was in before:
            if switch.fp32_precision != was:
                switch.fp32_precision = "none"  # as a more general switch says
            if switch.fp32_precision != was:
                switch.fp32_precision = was


def _readable(get: Callable[[], _T]) -> _T | None:
    """What an older switch says; None if torch refuses to read it."""
    try:
        with _without_advice():
            return get()
    except RuntimeError:
        return None


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without the warning of some versions of torch that the older switches are older."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
        yield
