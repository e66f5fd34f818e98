"""The arithmetic of an attack's gradients: that of PyTorch, or a faster one that is slightly less exact."""

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
    """Prepare a logits function for many gradients, and restore it afterwards.

    Meanwhile a module is in evaluation mode, its parameters are frozen, their gradients are set aside, and
    its convolutions use weights that are transformed once. Other callables change only by autocast.

    Args:
        logits_fn: Maps images to logits.
        precision: Arithmetic of the gradients.

    Yields:
        The function to differentiate.
    """
    modules = list(logits_fn.modules()) if isinstance(logits_fn, nn.Module) else []
    training = [(module, module.training) for module in modules]
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    trainable = [p for p in parameters if p.requires_grad]
    gradients = [p.grad for p in parameters]  # those of training: attacks call `zero_grad` and `backward`
    convolutions = [module for module in modules if _is_ordinary(module)]
    forwards = {module: vars(module).get("forward") for module in [*convolutions, *modules[:1]]}
    try:
        if isinstance(logits_fn, nn.Module):
            logits_fn.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        with torch.inference_mode(False):  # autograd refuses tensors made in it
            for conv in convolutions:
                # Only `forward` is replaced, so that hooks and weights stay where others expect them.
                vars(conv)["forward"] = _convolution(conv, precision)
        if precision == "bfloat16" and isinstance(logits_fn, nn.Module):
            vars(logits_fn)["forward"] = _autocast(logits_fn.forward)
        yield _autocast(logits_fn) if precision == "bfloat16" and not modules else logits_fn
    finally:
        for module, forward in forwards.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
        for module, mode in training:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _is_ordinary(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a plain `torch.nn.Conv2d` with constant float32 weights."""
    return (
        type(module) is nn.Conv2d
        and isinstance(vars(module).get("forward"), CookToomConvolution | None)  # training may set it
        and "weight" in module._parameters  # a hook, such as that of weight norm, computes it each time
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
    """A fast convolution for gradients; without gradients the usual one, so that votes do not change."""

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
