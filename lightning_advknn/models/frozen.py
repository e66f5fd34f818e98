"""Modules that are always in evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from torch import nn


class Frozen(nn.Module):
    """A module that is always in evaluation mode with all below it, whatever `train` is called with.

    Its constructor ends with `eval`, which also puts what it is made of into evaluation mode.
    """

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode, whatever is asked for."""
        return super().train(False)


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Put a module and all below it back into the modes that they had, each its own."""
    training = [(each, each.training) for each in module.modules()]
    try:
        yield
    finally:
        for each, mode in training:
            each.training = mode
