"""What an attack asks its target on the way, by which a failed attack is told from a robust target."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_advknn.attacks.parts.balls import length
from lightning_advknn.attacks.parts.step_graph import replayable
from lightning_advknn.choices import Norm
from lightning_advknn.classifiers import DkNN
from lightning_advknn.experiment.settings import ROUNDING

_Look = Callable[[Tensor, Any], None]  # gets images that are asked about, and the answer


class Iterates:
    """Notes what an attack asks its target, as `evaluation.Watch`. Adversarials are those of the attack.

    Only questions about a whole batch are understood, as then each row is an image of the batch.

    Args:
        norm: What its eps is measured in; None if nobody knows, so that no iterate is known to be within it.
        eps: Radius of its ball; None of a minimum-norm attack.
    """

    def __init__(self, norm: Norm | None, eps: float | None) -> None:
        self.norm, self.eps = norm, eps
        self._notes: dict[int, dict[str, Tensor]] = {}

    @contextmanager
    def __call__(self, number: int, target: Any, images: Tensor, labels: Tensor) -> Iterator[None]:
        """Look at the attack on a batch ``(B, ...)``."""
        notes = _Notes(images, labels, self.norm, self.eps)
        # A victim's network is asked without its votes, too.
        network = target.network if isinstance(target, DkNN) else None
        with ExitStack() as hooks:
            hooks.enter_context(_asked(target, notes.look))
            if network is not None:
                hooks.enter_context(_asked(network, notes.look_at_images))
            yield
        self._notes[number] = notes.columns(differentiable=network is None)

    def columns(self, n: int) -> dict[str, Tensor]:
        """What was noted of the first n images, each bool ``(n,)``.

        ``reached``: an iterate within eps, other than the clean image, had the target say another class than
        the label. ``moved``: it was asked about another image than the clean one, or perhaps was.
        ``differentiated``: its answer was asked for a gradient; not of victims, which have none.
        """
        notes = [self._notes[number] for number in sorted(self._notes)]
        return {name: torch.cat([part[name] for part in notes])[:n] for name in notes[0]}


class _Notes:
    """Of one batch. Changed in place, so that replays of a step that is a CUDA graph change them too."""

    def __init__(self, images: Tensor, labels: Tensor, norm: Norm | None, eps: float | None) -> None:
        self.images, self.labels = images, labels
        self.norm, self.eps = norm, eps
        self.reached, self.moved, self.differentiated = torch.zeros(
            3, len(images), dtype=torch.bool, device=images.device
        )

    def look(self, asked: Tensor, answer: Any) -> None:
        """Logits ``(B, C)`` or classes ``(B,)`` of images."""
        self.look_at_images(asked, answer)
        if not isinstance(answer, Tensor) or asked.shape != self.images.shape:
            return
        if answer.requires_grad:
            self.differentiated.fill_(True)
        perturbation = asked - self.images
        inside = perturbation.flatten(1).any(1) & ((asked - 0.5).abs() <= 0.5 + ROUNDING).flatten(1).all(1)
        if self.eps is not None:
            radius = self.eps if self.norm else -1.0
            inside &= length(perturbation, self.norm or "l2") <= radius + ROUNDING
        classes = answer.detach().argmax(1) if answer.ndim == 2 else answer
        self.reached |= inside & (classes != self.labels)

    def look_at_images(self, asked: Tensor, _answer: Any) -> None:
        """Whether they are the clean ones; of another number of images nobody knows which is which."""
        known = asked.shape == self.images.shape
        moved = (asked != self.images).flatten(1).any(1) if known else torch.ones_like(self.moved)
        self.moved |= moved

    def columns(self, differentiable: bool) -> dict[str, Tensor]:
        """As `Iterates.columns`."""
        found = {"reached": self.reached, "moved": self.moved}
        return found | ({"differentiated": self.differentiated} if differentiable else {})


@contextmanager
def _asked(module: nn.Module, look: _Look) -> Iterator[None]:
    """Look at all that a module is asked."""

    @replayable
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
        asked = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if asked is not None:
            with torch.no_grad():
                look(asked.detach(), answer)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
