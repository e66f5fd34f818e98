"""Steps of an attack on a GPU: most are replays of a CUDA graph, instead of about 30 launches each."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lightning_advknn.attacks.parts.arguments import LogitsFn

_DEVICES = ("cuda",)
_FIRST = 3  # ordinary steps, in which libraries choose their algorithms
_REPLAYS = 8  # fewer are not worth a capture, which takes as long as some steps

# Modules in evaluation mode whose forward only launches operations, and forwards that `prepared` puts in place.
_MODULES = (
    "lightning_advknn.models",
    "timm.layers",
    "timm.models",
    "torch.nn",
    "torchvision.models",
    "torchvision.ops",
)
_FORWARDS = ("lightning_advknn.attacks.parts.precision", "lightning_advknn.convolutions")

_State = tuple[Tensor, ...]
_Step = Callable[..., _State]


def repeat(step: _Step, state: _State, times: int, logits_fn: LogitsFn) -> _State:
    """Apply a step several times: ``state = step(*state)``.

    On a GPU, steps after the third are replays of a CUDA graph, if the logits function allows it
    (`_is_replayable`). The first replay is compared with an ordinary step. All steps are ordinary ones if it is
    not equal bit for bit, or if the capture fails.

    Args:
        step: Computes the next state, of the same shapes and dtypes, from the state, the logits function and
            tensors that do not change.
        state: Where to start; not changed.
        times: Number of steps, at least 0.
        logits_fn: What the step asks.

    Returns:
        The last state.
    """
    device = state[0].device
    if device.type not in _DEVICES or times < _FIRST + _REPLAYS or not _is_replayable(logits_fn):
        return _ordinary(step, state, times)
    side, current = _stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):  # the default stream cannot be captured
        state = _ordinary(step, state, _FIRST)
        state = _replayed(step, state, times - _FIRST)
    current.wait_stream(side)
    return tuple(each.clone() for each in state)  # in memory of this stream


def _is_replayable(logits_fn: LogitsFn) -> bool:
    """Whether a function launches the same operations on the same weights each time, and does nothing else.

    It must be a module in evaluation mode that consists of modules of torch, torchvision, timm and this
    package. Other forwards may count calls, ask something outside or draw numbers in Python, which a replay
    does not repeat. So may hooks, except for those marked by `replayable`.
    """
    return (
        isinstance(logits_fn, nn.Module)
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
        and all(_is_plain(module) for module in logits_fn.modules())
    )


def replayable(hook: Callable[..., None]) -> Callable[..., None]:
    """Mark a forward hook that does nothing but change tensors of its own in place."""
    vars(hook)["replayable"] = True
    return hook


def _is_plain(module: nn.Module) -> bool:
    before = (module._forward_pre_hooks, module._backward_pre_hooks, module._backward_hooks)
    return (
        not module.training
        and _is_of(type(module), _MODULES)
        and ("forward" not in vars(module) or _is_of(type(vars(module)["forward"]), _FORWARDS))
        and not any(before)
        and all(getattr(hook, "replayable", False) for hook in module._forward_hooks.values())
    )


def _is_of(kind: type[Any], packages: tuple[str, ...]) -> bool:
    return f"{kind.__module__}.".startswith(tuple(f"{each}." for each in packages))


def _ordinary(step: _Step, state: _State, times: int) -> _State:
    for _ in range(times):
        state = step(*state)
    return state


def _replayed(step: _Step, state: _State, times: int) -> _State:
    held = tuple(each.clone() for each in state)  # what the graph reads and writes

    def advance() -> None:
        for old, new in zip(held, step(*held), strict=True):
            old.copy_(new)

    try:
        graph = _capture(advance)
    except RuntimeError as error:
        _say_once(f"{type(error).__name__}: {error}".splitlines()[0])
        return _ordinary(step, state, times)
    state = step(*state)
    graph.replay()
    if not all(torch.equal(replayed, ordinary) for replayed, ordinary in zip(held, state, strict=True)):
        _say_once("a replayed step differs from an ordinary one")
        return _ordinary(step, state, times - 1)
    for _ in range(times - 1):
        graph.replay()
    torch.cuda.current_stream(held[0].device).synchronize()  # the graph and its memory go now
    return held


def _capture(advance: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of what a function launches on the current stream; nothing runs yet.

    Raises:
        RuntimeError: If it does what cannot be captured, such as waiting for the GPU.
    """
    # `torch.cuda.graph` would also give all unused memory back to the system, which takes long for each batch.
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")  # data loaders may pin memory meanwhile
    try:
        advance()
    finally:
        graph.capture_end()  # also after an error, else the stream would go on recording
    return graph


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: matrix products keep memory for each stream that they have run on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def _say_once(reason: str) -> None:
    logging.getLogger(__name__).warning("Attack steps are not replayed from a CUDA graph: %s", reason)
