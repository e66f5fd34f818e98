"""Time, memory, launches and waits on a device."""

import re
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import peak_mib, summarized

T = TypeVar("T")
Record = dict[str, Any]

_PATIENCE = 5.0  # seconds after which no repeat starts
# What the CPU calls to start work on a GPU, and to wait for it, also at copies to ordinary memory. The
# profiler itself calls `cudaDeviceSynchronize`.
_LAUNCH = re.compile(r"cu(da)?(Launch\w*Kernel|GraphLaunch)\w*")
_SYNC = re.compile(r"cu(da)?(Stream|Event)Synchronize\w*")


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(
    function: Callable[[], T], device: torch.device, repeats: int = 3, warm: bool = True
) -> tuple[T, Record]:
    """Time a function on a device.

    Args:
        function: The function.
        device: What it runs on.
        repeats: Largest number of repeats; a slow function runs less often.
        warm: Whether it runs once before the clock starts.

    Returns:
        Its last result; times as of `measure.summarized`; and ``peak_mib``, of a GPU torch's memory alone.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if warm:
        function()
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < _PATIENCE):
        synchronize(device)
        started = time.perf_counter()
        result = function()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_mib()
    return result, {**summarized(seconds), "peak_mib": peak}


def counted(function: Callable[[], Any], device: torch.device) -> Record:
    """``launches`` and ``syncs`` of one call on a GPU; nothing on a CPU. A graph is one launch."""
    if device.type != "cuda":
        return {}
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        function()
    return launches_and_syncs(event.name for event in found.events())


def launches_and_syncs(names: Iterable[str]) -> Record:
    """How many of the calls, by name, start work on a GPU and wait for it."""
    names = list(names)
    return {
        "launches": sum(bool(_LAUNCH.fullmatch(name)) for name in names),
        "syncs": sum(bool(_SYNC.fullmatch(name)) for name in names),
    }


def guarded(case: str, method: str, measure: Callable[[], Record]) -> Record:
    """A record of a measurement, or of how it failed."""
    try:
        return {"case": case, "method": method, **measure()}
    except Exception as error:  # what comes next is worth more than a clean end
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"case": case, "method": method, "failed": reason}
