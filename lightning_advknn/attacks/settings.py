"""An attack with its settings, as configurations name it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from lightning_advknn.attacks.gradient_sign import LogitsFn
from lightning_advknn.attacks.precision import Precision

Attack = Callable[[LogitsFn, Tensor, Tensor], Tensor]
"""An attack with its settings bound: ``attack(logits_fn, images, labels) -> adversarial``."""


@dataclass(frozen=True)
class AttackSettings:
    """An attack of `lightning_advknn.attacks` with its settings.

    Args:
        function: Its name.
        settings: Its keyword arguments.
        precision: How its gradients are computed.
    """

    function: str
    settings: dict[str, int | float] = field(default_factory=dict)
    precision: Precision = "float32"

    def bind(self) -> Attack:
        """The attack as a function of logits function, images and labels.

        Raises:
            ValueError: If the function, a setting or the precision does not exist, one is missing, or one is out of
                range.
        """
        from lightning_advknn import attacks  # here, as the package itself imports this file

        if self.function not in attacks.__all__ or not self.function.islower():
            known = [name for name in attacks.__all__ if name.islower()]
            raise ValueError(f"Expected `function` to be one of {known}, but got {self.function!r}.")
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"Expected `precision` to be one of {get_args(Precision)}, but got {self.precision!r}."
            )
        function = getattr(attacks, self.function)
        bound = partial(function, **self.settings)
        try:
            inspect.signature(function).bind(None, None, None, **self.settings)
        except TypeError as error:
            wanted = list(inspect.signature(function).parameters)[3:]
            raise ValueError(
                f"Expected the settings of {self.function} to be {wanted}, but got {self.settings}: {error}."
            ) from error
        # One tiny attack makes the function itself judge its settings before any long work.
        bound(lambda images: images.flatten(1), torch.full((1, 2), 0.5), torch.zeros(1).long())
        return bound
