"""Attacks as users write them, right and wrong; configurations of cases name them by import path."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from lightning_advknn import attack


def pgd(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float, steps: int) -> Tensor:
    """Correct PGD."""
    adversarial = images.clone()
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits_fn(adversarial), labels), adversarial)
        step = adversarial + 0.02 * gradient.sign()
        adversarial = torch.minimum(torch.maximum(step, images - eps), images + eps).clamp(0, 1)
    return adversarial.detach()


def pgd_in_training_mode(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float, steps: int) -> Tensor:
    """PGD that puts the model into training mode, as some tutorials do."""
    logits_fn.train()
    return pgd(logits_fn, images, labels, eps=eps, steps=steps)


def tutorial_fgsm(model: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """FGSM of PyTorch's tutorial, which also computes the gradients of all parameters."""
    adversarial = images.clone().requires_grad_()
    loss = F.cross_entropy(model(adversarial), labels)
    model.zero_grad()
    loss.backward()
    return (images + eps * adversarial.grad.sign()).clamp(0, 1)


def nothing(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Returns the images unchanged."""
    return images.clone()


def ends_training(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Switches the network's batch norms to training mode, without the victim's `train`."""
    for module in logits_fn.network.modules():
        module.training = True
    return images.clone()


def zeroes_weights(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Puts the model into training mode, and changes weights without changing their version counters."""
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
    """Converts the network to float16 and does not convert it back."""
    if hasattr(logits_fn, "half"):
        logits_fn.half()
    return images.clone()


def softplus(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Replaces a ReLU by a smoother function and does not put it back."""
    if hasattr(logits_fn, "network"):
        logits_fn.network.model.relu2 = torch.nn.Softplus()
    return images.clone()


def default_dtype(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Sets torch's default dtype to float64 and does not set it back."""
    torch.set_default_dtype(torch.float64)
    return images.double()


def in_place(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Changes the given images and labels in place."""
    labels.zero_()
    return images.add_(eps).clamp_(0, 1)


def out_of_place(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """The same images as `in_place`, without changing its arguments."""
    return (images + eps).clamp(0, 1)


def in_float64(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """The same images in float64."""
    return (images + torch.tensor(eps, dtype=torch.float32)).clamp(0, 1).double()


def attached(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """The same images, attached to autograd's graph, after a backward pass through the model."""
    adversarial = images.clone().requires_grad_()
    logits_fn(adversarial).sum().backward()
    return (adversarial + eps).clamp(0, 1)


_memory = torch.empty(0)


def one_memory(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """The same images, in one buffer for all batches."""
    global _memory
    if _memory.shape != images.shape:
        _memory = torch.empty_like(images)
    return torch.clamp(images + eps, 0, 1, out=_memory)


def as_numpy(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> np.ndarray[Any, Any]:
    """Returns a NumPy array."""
    return np.asarray((images + eps).clamp(0, 1))


def as_tuple(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Returns labels too."""
    return (images + eps).clamp(0, 1), labels


def as_list(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> list[Tensor]:
    """Returns a list of images."""
    return list((images + eps).clamp(0, 1))


def as_none(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> None:
    """Returns nothing."""


def channels_last(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Returns images with channels last."""
    return (images + eps).clamp(0, 1).permute(0, 2, 3, 1)


def fewer(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Returns fewer images than it was given."""
    return (images + eps).clamp(0, 1)[: max(1, len(images) // 2)]


def in_bytes(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Returns images in [0, 255] as uint8."""
    return ((images + eps).clamp(0, 1) * 255).round().byte()


def to_255(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Returns images in [0, 255], as floats."""
    return ((images + eps).clamp(0, 1) * 255).round()


def not_a_number(logits_fn: Any, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Divides zero by zero, as by a gradient that is zero."""
    return images + eps * 0 / torch.zeros_like(images)


def fails_later(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Fails on more than two images."""
    if len(images) > 2:
        raise KeyError("momentum")
    return images.clone()


@attack(on="victim")
def touches_bank(victim: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Changes one feature of the victim's bank."""
    bank = next(iter(victim.banks.values()))
    bank.features.data[0, 0] += 1
    return images.clone()


@attack(on="victim")
def touches_labels(victim: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Changes the labels of the victim's bank."""
    bank = next(iter(victim.banks.values()))
    bank.labels.data.fill_(0)
    return images.clone()


@attack(on="victim")
def lowers_k(victim: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Lowers the victim's k and does not restore it."""
    victim.k = 1
    return images.clone()


@attack(on="victim")
def touches_surrogate(victim: Any, images: Tensor, labels: Tensor, *, surrogate: Any) -> Tensor:
    """Changes the weights of the surrogate that it goes through."""
    surrogate.dknnb.weight.data *= 2
    return images.clone()


def as_papers_do(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """A step along the gradient's sign, by code that needs a module with parameters."""
    model.eval()
    device = next(model.parameters()).device
    leaf = images.clone().to(device).requires_grad_()
    F.cross_entropy(model(leaf), labels.to(device)).backward()
    gradient = torch.zeros_like(images) if leaf.grad is None else leaf.grad
    return (images + eps * gradient.sign()).clamp(0, 1)


def of_colour(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Changes each of three channels differently; fails on grey images."""
    return (
        images + eps * torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, *images.shape[2:])
    ).clamp(0, 1)


class WithLabels(torchattacks.PGD):
    """PGD that returns images and labels."""

    def forward(self, images: Tensor, labels: Tensor) -> Any:
        """Adversarial images and their labels."""
        return super().forward(images, labels), labels


def stays(logits_fn: Any, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Queries the model and returns the images unchanged."""
    logits_fn(images)
    return images


def overshoots(logits_fn: Any, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Finds adversarials within eps, and returns steps in the opposite direction."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(logits_fn(leaf), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    logits_fn((images + eps * gradient.sign()).clamp(0, 1))
    return (images - eps * gradient.sign()).clamp(0, 1)
