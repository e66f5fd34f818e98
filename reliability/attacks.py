"""Attacks as users write them; configurations of cases name them by import path."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_advknn import attack


def pgd(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float, steps: int) -> Tensor:
    """PGD as it should be."""
    adversarial = images.clone()
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits_fn(adversarial), labels), adversarial)
        step = adversarial + 0.02 * gradient.sign()
        adversarial = torch.minimum(torch.maximum(step, images - eps), images + eps).clamp(0, 1)
    return adversarial.detach()


def pgd_in_training_mode(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float, steps: int) -> Tensor:
    """The PGD of a tutorial: puts the model into training mode and never back."""
    logits_fn.train()
    return pgd(logits_fn, images, labels, eps=eps, steps=steps)


def tutorial_fgsm(model: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """FGSM as PyTorch's tutorial writes it: gradients of all parameters, with `zero_grad`."""
    adversarial = images.clone().requires_grad_()
    loss = F.cross_entropy(model(adversarial), labels)
    model.zero_grad()
    loss.backward()
    return (images + eps * adversarial.grad.sign()).clamp(0, 1)


def nothing(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """The images themselves."""
    return images.clone()


def ends_training(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Switches a network's own batch norms to training mode, past the victim."""
    for module in logits_fn.network.modules():
        module.training = True
    return images.clone()


def zeroes_weights(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Puts the model into training mode, and writes all weights where no version counter sees it."""
    logits_fn.train()
    for parameter in logits_fn.parameters():
        parameter.data.mul_(0)
    return images.clone()


def nudges_a_weight(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Adds 1e-3 to one weight of the last parameter."""
    weights = list(logits_fn.parameters())[-1].data
    weights.view(-1)[0] += 1e-3
    return images.clone()


def half_precision(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Converts the network and leaves it so."""
    if hasattr(logits_fn, "half"):
        logits_fn.half()
    return images.clone()


def softplus(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Replaces a ReLU by what has smoother gradients, and leaves it so."""
    if hasattr(logits_fn, "network"):
        logits_fn.network.model.relu2 = torch.nn.Softplus()
    return images.clone()


def default_dtype(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Works in float64 and does not switch back."""
    torch.set_default_dtype(torch.float64)
    return images.double()


def in_place(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Writes into the images that it was given, and into their labels."""
    labels.zero_()
    return images.add_(eps).clamp_(0, 1)


def out_of_place(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """The same on a copy."""
    return (images + eps).clamp(0, 1)


def in_float64(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """The same in float64."""
    return (images + torch.tensor(eps, dtype=torch.float32)).clamp(0, 1).double()


def attached(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """The same, still on autograd's tape, after a backward pass through the model."""
    adversarial = images.clone().requires_grad_()
    logits_fn(adversarial).sum().backward()
    return (adversarial + eps).clamp(0, 1)


_memory = torch.empty(0)


def one_memory(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """The same, in one and the same memory for all batches."""
    global _memory
    if _memory.shape != images.shape:
        _memory = torch.empty_like(images)
    return torch.clamp(images + eps, 0, 1, out=_memory)


def as_numpy(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> np.ndarray[Any, Any]:
    """Returns an array."""
    return np.asarray((images + eps).clamp(0, 1))


def as_tuple(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Returns labels too."""
    return (images + eps).clamp(0, 1), labels


def as_list(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> list[Tensor]:
    """Returns a list of images."""
    return list((images + eps).clamp(0, 1))


def as_none(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> None:
    """Forgets to return."""


def channels_last(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Returns images as other libraries have them."""
    return (images + eps).clamp(0, 1).permute(0, 2, 3, 1)


def fewer(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Returns those images alone that it can change."""
    return (images + eps).clamp(0, 1)[: max(1, len(images) // 2)]


def in_bytes(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Returns images in [0, 255], as bytes."""
    return ((images + eps).clamp(0, 1) * 255).round().byte()


def to_255(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Returns images in [0, 255], as floats."""
    return ((images + eps).clamp(0, 1) * 255).round()


def not_a_number(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Divides by a gradient that is zero."""
    return images + eps * 0 / torch.zeros_like(images)


def fails_later(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Works on two images but not on more."""
    if len(images) > 2:
        raise KeyError("momentum")
    return images.clone()


@attack(on="victim")
def touches_bank(victim: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Moves one feature of the victim's bank."""
    bank = next(iter(victim.banks.values()))
    bank.features.data[0, 0] += 1
    return images.clone()


@attack(on="victim")
def touches_labels(victim: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Changes what the bank's rows vote for."""
    bank = next(iter(victim.banks.values()))
    bank.labels.data.fill_(0)
    return images.clone()


@attack(on="victim")
def lowers_k(victim: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Asks a victim of fewer neighbours, as which it leaves it."""
    victim.k = 1
    return images.clone()


@attack(on="victim")
def touches_surrogate(victim: Any, images: Tensor, labels: Tensor, *, surrogate: Any) -> Tensor:
    """Fits the surrogate that it goes through a little better."""
    surrogate.dknnb.weight.data *= 2
    return images.clone()
