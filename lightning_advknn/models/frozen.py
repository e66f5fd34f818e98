"""Modules that are always in evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from torch import nn


class Frozen(nn.Module):
    """A module that is always in evaluation mode, with all its submodules; `train` has no effect.

    A subclass calls `eval` at the end of its constructor.
    """

    def train(self, mode: bool = True) -> Self:
        """Set evaluation mode, whatever `mode` is."""
        return super().train(False)


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of a module and of each submodule on exit."""
    training = [(each, each.training) for each in module.modules()]
    try:
        yield
    finally:
        for each, mode in training:
            each.training = mode
