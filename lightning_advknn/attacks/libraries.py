"""Attacks by import path: a function of one's own, or an attack of another library as it is."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor


def load_function(path: str) -> Callable[..., Tensor]:
    """The attack that an import path names.

    Args:
        path: Such as ``my_package.my_module.my_attack``.

    Returns:
        ``attack(logits_fn or victim, images, labels, **settings) -> adversarial``.

    Raises:
        ValueError: If there is no such callable.
        ImportError: If its module cannot be imported.
    """
    module, _, name = path.rpartition(".")
    found: Any = getattr(import_module(module), name, None)
    if not callable(found):
        raise ValueError(f"Expected {path} to be a function or a class, but {module} has no such thing.")
    function: Callable[..., Tensor] = found
    return function
