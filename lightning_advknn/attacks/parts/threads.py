"""Several batches attacked at once on a CPU: one thread each is faster than all threads on one batch."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from lightning_advknn.attacks.parts.arguments import Attack
from lightning_advknn.attacks.parts.declare import declared

_Work = TypeVar("_Work")
_Result = TypeVar("_Result")
_Tool = TypeVar("_Tool")


def can_share(attack: Attack, target: object) -> bool:
    """Whether batches may be attacked at once: the attack is declared so, and the module can be copied."""
    while isinstance(attack, partial):
        attack = attack.func
    found = declared(attack)
    if found is None or not found.threads or not isinstance(target, nn.Module):
        return False
    # Compiled and scripted modules have state that is not Python's.
    return not any(type(each).__module__.startswith(("torch.jit", "torch._")) for each in target.modules())


def copy_for_thread(module: nn.Module, known: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """Copy a module for another thread: hooks and attributes are its own, parameters and buffers are shared."""
    known = {} if known is None else known
    if module not in known:
        copied = known[module] = module.__new__(type(module))
        for name, value in vars(module).items():
            # Dicts hold parameters, buffers, modules and hooks, by name or number.
            vars(copied)[name] = value.copy() if isinstance(value, dict) else value
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else copy_for_thread(child, known)
    return known[module]


def in_threads(
    function: Callable[[_Tool, _Work], _Result], work: Iterable[_Work], tools: Iterable[_Tool]
) -> list[_Result]:
    """Call a function on each piece of work, in as many threads as there are tools, with one tool each.

    Torch computes with one thread in each of them, so results do not depend on their number.

    Returns:
        Results in the order of the work.
    """
    left, own, threads = list(tools), threading.local(), torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that begin later
        own.tool = left.pop()

    with ThreadPoolExecutor(len(left), initializer=begin) as pool:
        waiting = [pool.submit(lambda piece: function(own.tool, piece), piece) for piece in work]
        try:
            return [each.result() for each in waiting]
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or a signal
            torch.set_num_threads(threads)
