"""How an attack computes gradients: as PyTorch does, or faster and a little less exactly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lightning_advknn.attacks.parts.arguments import LogitsFn
from lightning_advknn.choices import GradientPrecision
from lightning_advknn.convolutions import CookToomConvolution, DirectConvolution


@contextmanager
def prepared(logits_fn: LogitsFn, precision: GradientPrecision = "float32") -> Iterator[LogitsFn]:
    """Make a logits function ready for many gradients, and restore it.

    A module is in evaluation mode, its parameters are frozen and their gradients put aside meanwhile; its
    convolutions use what has been made of their weights once. Other callables are left alone, but for
    autocast.

    Args:
        logits_fn: Maps images to logits.
        precision: Of its arithmetic.

    Yields:
        What to differentiate.
    """
    modules = list(logits_fn.modules()) if isinstance(logits_fn, nn.Module) else []
    training = [(module, module.training) for module in modules]
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    trainable = [p for p in parameters if p.requires_grad]
    gradients = [p.grad for p in parameters]  # of training: attacks call `zero_grad` and `backward`
    convolutions = {module: vars(module).get("forward") for module in modules if _is_ordinary(module)}
    try:
        if isinstance(logits_fn, nn.Module):
            logits_fn.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        with torch.inference_mode(False):  # autograd refuses what is made in it
            for conv in convolutions:
                # In its place, not instead of it: hooks and weights stay where others look for them.
                vars(conv)["forward"] = _convolution(conv, precision)
        yield _autocast(logits_fn) if precision == "bfloat16" else logits_fn
    finally:
        for conv, forward in convolutions.items():
            vars(conv).pop("forward", None)
            if forward is not None:
                vars(conv)["forward"] = forward
        for module, mode in training:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _is_ordinary(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a convolution is computed as `torch.nn.Conv2d` says, from float32 weights that stay as they are."""
    return (
        type(module) is nn.Conv2d
        and isinstance(vars(module).get("forward"), CookToomConvolution | None)  # in training, perhaps
        and "weight" in module._parameters  # a hook, such as weight norm's, would make it anew each time
        and module.weight.dtype == torch.float32
    )


def _convolution(conv: nn.Conv2d, precision: GradientPrecision) -> Callable[[Tensor], Tensor]:
    if precision == "float32":
        return DirectConvolution(conv, torch.float32, torch.preserve_format)
    if precision == "winograd":
        usual = vars(conv).get("forward") or partial(type(conv).forward, conv)
        return _Differentiated(CookToomConvolution(conv), usual)
    return DirectConvolution(conv, torch.bfloat16, torch.channels_last)


class _Differentiated:
    """A convolution for gradients; without them the usual one, as what a victim says of an image is not to depend on this."""

    def __init__(self, fast: CookToomConvolution, usual: Callable[[Tensor], Tensor]) -> None:
        self.fast, self.usual = fast, usual

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, O, H', W')``."""
        return self.fast(images) if torch.is_grad_enabled() else self.usual(images)


def _autocast(logits_fn: LogitsFn) -> LogitsFn:
    def logits(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return logits_fn(images).to(images.dtype)

    return logits
