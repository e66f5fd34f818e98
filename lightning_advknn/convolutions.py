"""Convolutions that are faster than `torch.nn.Conv2d`, mostly on CPUs and for constant weights."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LANES = 16  # oneDNN pads input channels to this number, for float32 in AVX-512

# Points at which Cook-Toom evaluates polynomials, besides infinity, in the order of use. Small numbers and
# their negative reciprocals have the smallest errors. The last two had the smallest of those tried.
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0, -0.5, 2.0, 0.75, -4 / 3)


class DirectConvolution:
    """A `torch.nn.Conv2d` with constant weights of a given dtype and memory format.

    On a CPU, it is faster for a strided convolution of few channels, such as a network's first. The gradient
    of the images is computed phase by phase, by a convolution without stride of stride^2 times as many
    channels. It adds up the same products, but oneDNN pads one channel to 16, so this is 3 to 4 times as
    fast.

    Args:
        conv: The convolution; not changed.
        dtype: Dtype of the arithmetic.
        memory_format: Memory format of the weights and outputs.
        in_order: Add up in oneDNN's order (on AVX-512), so that the gradient is equal bit for bit. False is
            twice as fast.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        in_order: bool = True,
    ) -> None:
        self.conv, self.in_order = conv, in_order
        self.weight = conv.weight.detach().to(dtype, memory_format=memory_format)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self.padding = _padding(conv)
        self.phases = None
        fills = conv.in_channels * math.prod(conv.stride) <= _LANES
        if max(conv.stride) > 1 and fills and self.padding and self.weight.device.type == "cpu":
            phases = _split_phases(self.weight, conv.stride)
            phases = phases.permute(1, 3, 5, 0, 2, 4).flatten(0, 2)
            self.phases = phases.contiguous(memory_format=torch.channels_last)

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, O, H', W')``."""
        # Under autocast, the gradient has another dtype than the weights.
        other = torch.is_autocast_enabled(images.device.type) and self.weight.dtype == torch.float32
        if self.phases is None or images.dim() != 4 or other:
            return self.forward(images)
        return _with_phase_gradient(images, self)

    def forward(self, images: Tensor) -> Tensor:
        """The same, with PyTorch's own gradient."""
        outputs: Tensor = self.conv._conv_forward(images, self.weight, self.bias)
        return outputs


class _PhaseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, convolution: DirectConvolution) -> Tensor:
        ctx.convolution, ctx.shape = convolution, images.shape
        return convolution.forward(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        convolution = ctx.convolution
        (pad_h, pad_w), (stride_h, stride_w) = convolution.padding, convolution.conv.stride
        batch, channels, height, width = ctx.shape
        blocks = (_gradient_in_order if convolution.in_order else _gradient_by_rows)(
            gradient, convolution.phases
        )
        rows, columns = blocks.shape[2:]
        padded = blocks.reshape(batch, channels, stride_h, stride_w, rows, columns)
        padded = padded.permute(0, 1, 4, 2, 5, 3).reshape(
            batch, channels, rows * stride_h, columns * stride_w
        )
        right, bottom = width + pad_w - columns * stride_w, height + pad_h - rows * stride_h
        return F.pad(padded, (-pad_w, right, -pad_h, bottom)), None


_with_phase_gradient: Callable[[Tensor, DirectConvolution], Tensor] = _PhaseGradient.apply


def _gradient_in_order(gradient: Tensor, phases: Tensor) -> Tensor:
    """Gradient ``(B, phases, rows, columns)`` from that of outputs ``(B, O, H, W)``, in oneDNN's order."""
    *_, taps_h, taps_w = phases.shape
    # A transposed convolution, as an ordinary one of the flipped map.
    turned = gradient.flip(2, 3).contiguous(memory_format=torch.channels_last)
    return F.conv2d(turned, phases, padding=(taps_h - 1, taps_w - 1)).flip(2, 3)


def _gradient_by_rows(gradient: Tensor, phases: Tensor) -> Tensor:
    """The same gradient, as one matrix product for each row of taps, and one sum for each column."""
    channels, outputs, taps_h, taps_w = phases.shape
    batch, _, height, width = gradient.shape
    positions = gradient.permute(2, 3, 0, 1).reshape(-1, outputs)
    rows = positions.new_zeros(height + taps_h - 1, width * batch, taps_w * channels)
    for tap in range(taps_h):
        taps = phases[:, :, tap].permute(1, 2, 0).reshape(outputs, -1)
        rows[tap : tap + height].flatten(0, 1).addmm_(positions, taps)
    columns = rows.view(len(rows), width, batch, taps_w, channels)
    blocks = rows.new_zeros(len(rows), width + taps_w - 1, batch, channels)
    for tap in range(taps_w):
        blocks[:, tap : tap + width] += columns[:, :, :, tap]
    return blocks.permute(2, 3, 0, 1)


class _Matrices(NamedTuple):
    """A and B of `_cook_toom` for height and for width, and G for both."""

    output_h: Tensor
    input_h: Tensor
    output_w: Tensor
    input_w: Tensor
    kernel: Tensor


class CookToomConvolution:
    """A convolution of small maps with fewer multiplications (Winograd's minimal filtering).

    A correlation of a row of inputs with r taps is ``A ((G taps) * (B row))``, with three constant matrices.
    The outputs are coefficients of a product of polynomials, interpolated from its values at n = outputs + r
    - 1 points. In two dimensions, n^2 multiplications for all outputs replace r^2 for each output. Strides
    are first turned into channels, one for each phase, and the whole map is one tile. Everything is linear in
    images and taps, so autograd's gradients need as few multiplications.

    Results equal those of `torch.nn.Conv2d` up to rounding. In float32, root mean square errors relative to
    the outputs' standard deviation are below 1e-5 for up to 8 points and below 1e-4 for up to 10 (direct:
    2e-7). Larger maps are computed directly, and so are convolutions that would need no fewer
    multiplications.

    Args:
        conv: The convolution; not changed.
        constant: Whether its weights stay constant, so that their transform is computed only once.
    """

    def __init__(self, conv: nn.Conv2d, constant: bool = True) -> None:
        self.conv, self.constant, self.padding = conv, constant, _padding(conv)
        self.direct = (
            DirectConvolution(conv, conv.weight.dtype, torch.channels_last, in_order=False)
            if constant
            else partial(type(conv).forward, conv)
        )
        self._prepared: dict[torch.Size, tuple[_Matrices, Tensor | None] | None] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, O, H', W')``."""
        size, conv = images.shape[-2:], self.conv
        if size not in self._prepared:
            self._prepared[size] = self._prepare(size)
        prepared = self._prepared[size]
        if prepared is None or images.dim() != 4 or torch.is_autocast_enabled(images.device.type):
            return self.direct(images)
        matrices, taps = prepared
        taps = _taps(conv.weight, conv.stride, matrices.kernel) if taps is None else taps
        (out_h, h), (out_w, w) = matrices.output_h.shape, matrices.output_w.shape
        _, channels, outputs = taps.shape
        rows, columns = matrices.input_h.shape[1], matrices.input_w.shape[1]
        (stride_h, stride_w), batch, padding = conv.stride, len(images), self.padding or (0, 0)
        top, left = padding[0] % stride_h, padding[1] % stride_w
        pads = (left, columns * stride_w - left - size[1], top, rows * stride_h - top - size[0])
        # With positions first and channels last, everything but the phases is matrix products without copies.
        x = images.permute(2, 3, 0, 1)
        x = F.pad(x, (0, 0, 0, 0, *pads)) if any(pads) else x
        x = x.reshape(rows, stride_h, columns, stride_w, *x.shape[2:]).permute(0, 2, 4, 1, 3, 5)
        x = matrices.input_h @ x.reshape(rows, -1)
        x = torch.bmm(matrices.input_w.expand(h, w, columns), x.view(h, columns, -1))
        y = torch.bmm(x.view(h * w, batch, channels), taps)
        y = torch.bmm(matrices.output_w.expand(h, out_w, w), y.view(h, w, -1))
        y = (matrices.output_h @ y.view(h, -1)).view(out_h, out_w, batch, outputs)
        bias = conv.bias.detach() if self.constant and conv.bias is not None else conv.bias
        return (y if bias is None else y + bias).permute(2, 3, 0, 1)

    @torch.inference_mode(False)  # autograd refuses tensors made in it
    @torch.no_grad()
    def _prepare(self, size: torch.Size) -> tuple[_Matrices, Tensor | None] | None:
        """The matrices for maps of this size, and constant taps; None if direct convolution is better."""
        conv, weight, padding = self.conv, self.conv.weight, self.padding
        if padding is None:
            return None
        stride, kernel_size = conv.stride, conv.kernel_size
        out_h, out_w = ((size[a] + 2 * padding[a] - kernel_size[a]) // stride[a] + 1 for a in (0, 1))
        taps_h, taps_w = (-(-kernel_size[a] // stride[a]) for a in (0, 1))
        h, w = out_h + taps_h - 1, out_w + taps_w - 1  # points
        if min(out_h, out_w) < 1 or max(h, w) > len(_POINTS) + 1:
            return None
        outputs, channels = conv.out_channels, conv.in_channels * math.prod(stride)
        transforms = channels * h * w * (h + w) + outputs * h * out_w * (w + out_h)
        if h * w * channels * outputs + transforms >= out_h * out_w * outputs * weight[0].numel():
            return None
        output_h, kernel_h, input_h = _cook_toom(out_h, taps_h)
        output_w, kernel_w, input_w = _cook_toom(out_w, taps_w)
        # Columns for blocks of padding only are dropped, instead of padding the images with zeros.
        input_h, input_w = (
            matrix[:, pad // step :][:, : -(-(length + pad % step) // step)]
            for matrix, length, pad, step in zip((input_h, input_w), size, padding, stride, strict=True)
        )
        kernel = torch.kron(kernel_h, kernel_w).to(weight.device)
        taps = _taps(weight.double(), stride, kernel).to(weight) if self.constant else None
        matrices = (output_h, input_h, output_w, input_w, kernel)
        return _Matrices(*(matrix.to(weight).contiguous() for matrix in matrices)), taps


def _taps(weight: Tensor, stride: tuple[int, ...], kernel: Tensor) -> Tensor:
    """Values of the taps' polynomials, ``(points, phases * C, O)``, with a kernel ``(points, taps)``."""
    phases = _split_phases(weight, stride)
    outputs, channels, taps_h, stride_h, taps_w, stride_w = phases.shape
    taps = phases.permute(2, 4, 3, 5, 1, 0).reshape(taps_h * taps_w, -1)
    return (kernel @ taps).view(-1, stride_h * stride_w * channels, outputs)


def _cook_toom(outputs: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of a correlation: ``out[i] = sum_j taps[j] row[i + j] = A ((G taps) * (B row))``.

    Args:
        outputs: m, at least 1.
        taps: r, at least 1; n = m + r - 1 is at most 10.

    Returns:
        A ``(m, n)``, G ``(n, r)`` and B ``(n, n)``, float64.
    """
    points = torch.tensor(_POINTS[: outputs + taps - 2], dtype=torch.float64)

    def evaluate(length: int) -> Tensor:
        """The matrix that evaluates a polynomial of `length` coefficients at the points and at infinity."""
        powers = points[:, None] ** torch.arange(length)
        return torch.cat([powers, torch.eye(length, dtype=torch.float64)[-1:]])

    # Values of a product are products of values. The transpose of the product is the correlation.
    return evaluate(outputs).T, evaluate(taps), torch.linalg.inv(evaluate(outputs + taps - 1)).T


def _padding(conv: nn.Conv2d) -> tuple[int, ...] | None:
    """Zero padding of height and width; None for other padding, groups or dilation."""
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return conv.padding if plain and not isinstance(conv.padding, str) else None


def _split_phases(weight: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Zero-pad kernels ``(O, C, k_h, k_w)`` and split them, to ``(O, C, taps, stride, taps, stride)``."""
    (stride_h, stride_w), (kernel_h, kernel_w) = stride, weight.shape[2:]
    weight = F.pad(weight, (0, -kernel_w % stride_w, 0, -kernel_h % stride_h))
    return weight.reshape(
        *weight.shape[:2], weight.shape[2] // stride_h, stride_h, weight.shape[3] // stride_w, stride_w
    )
