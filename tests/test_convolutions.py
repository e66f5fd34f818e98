"""Fast convolutions against `torch.nn.functional.conv2d` in float64, values and gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_advknn.convolutions import CookToomConvolution, DirectConvolution, _cook_toom

# channels, outputs, kernel, stride, padding, map: small maps of many channels, where Cook-Toom is faster
SMALL = {
    "3x3": (32, 32, 3, 1, 0, (8, 8)),
    "3x3 padded": (32, 48, 3, 1, 1, (8, 8)),
    "5x5": (32, 32, 5, 1, 0, (7, 7)),
    "one output": (32, 32, 4, 1, 0, (5, 5)),
    "6x6 in strides of 2": (32, 32, 6, 2, 2, (14, 14)),
    "odd padding": (32, 32, 6, 2, 3, (13, 14)),
    "rows that no kernel reaches": (32, 32, 6, 3, 0, (14, 20)),
    "kernel no multiple of the stride": (32, 32, 5, 2, 1, (11, 12)),
    "different along the axes": (32, 48, (3, 6), (1, 2), (2, 1), (6, 13)),
    "all padding": (32, 32, 3, 1, 3, (2, 3)),
}
# Strided convolutions of few channels, whose gradient is computed by phases
FIRST = {
    "conv1": (1, 16, 8, 2, 3, (28, 28)),
    "three channels": (3, 16, 8, 2, 3, (32, 31)),
    "no padding": (2, 8, 5, 2, 0, (12, 13)),
    "pixels that no kernel reaches": (1, 8, 3, 4, 0, (13, 14)),
    "different along the axes": (2, 8, (3, 6), (1, 3), (2, 0), (9, 14)),
    "padding beyond the kernel": (1, 4, 2, 2, 4, (6, 6)),
}


def convolution(channels, outputs, kernel, stride, padding, device="cpu", dtype=torch.float64, **more):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(channels, outputs, kernel, stride, padding, dtype=dtype, **more).to(device)
    return conv.requires_grad_(False)


def maps(batch, channels, size, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size, generator=generator, dtype=dtype).to(device)


def expected(conv, images):
    """Outputs, a gradient of them, and the gradient of the images."""
    images = images.clone().requires_grad_()
    outputs = F.conv2d(images, conv.weight, conv.bias, conv.stride, conv.padding)
    weights = maps(len(outputs), outputs.shape[1], outputs.shape[2:], outputs.device, outputs.dtype)
    (gradient,) = torch.autograd.grad(outputs, images, weights)
    return outputs, weights, gradient


@pytest.mark.parametrize(
    ("outputs", "taps"), [(m, r) for m, r in itertools.product(range(1, 11), repeat=2) if m + r <= 11]
)
def test_cook_toom_is_a_correlation(outputs, taps):
    output, kernel, inputs = _cook_toom(outputs, taps)
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(outputs + taps - 1, generator=generator, dtype=torch.float64)
    weights = torch.randn(taps, generator=generator, dtype=torch.float64)
    found = output @ ((kernel @ weights) * (inputs @ row))
    torch.testing.assert_close(found, F.conv1d(row[None, None], weights[None, None])[0, 0])


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("bias", [True, False])
def test_cook_toom_convolution_is_conv2d(device, case, bias):
    *settings, size = case
    conv = convolution(*settings, device, bias=bias)
    images = maps(3, settings[0], size, device)
    outputs, weights, gradient = expected(conv, images)
    fast = CookToomConvolution(conv)
    # Memory formats of the images: contiguous, channels last, positions first.
    for x in (images, images.contiguous(memory_format=torch.channels_last), fast_format(images)):
        leaf = x.detach().requires_grad_()
        found = fast(leaf)
        torch.testing.assert_close(found, outputs, rtol=0, atol=1e-10)
        (back,) = torch.autograd.grad(found, leaf, weights)
        torch.testing.assert_close(back, gradient, rtol=0, atol=1e-10)
    assert list(fast._prepared.values()) != [None], "Cook-Toom was not tried"


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_cook_toom_convolution_trains_as_conv2d(device, case):
    *settings, size = case
    conv = convolution(*settings, device).requires_grad_()
    images = maps(3, settings[0], size, device).requires_grad_()
    fast = CookToomConvolution(conv, constant=False)
    for _ in range(2):  # weights change between two steps
        weights = maps(*conv(images).shape[:2], conv(images).shape[2:], device)
        leaves = (images, *conv.parameters())
        expected = torch.autograd.grad(conv(images), leaves, weights)
        for found, exact in zip(torch.autograd.grad(fast(images), leaves, weights), expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
        with torch.no_grad():
            conv.weight.mul_(-2)
    assert list(fast._prepared.values()) != [None], "Cook-Toom was not tried"


def fast_format(images):
    return images.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


@pytest.mark.parametrize(
    ("kernel", "size", "error"), [(3, 4, 1e-5), (3, 6, 1e-5), (5, 4, 1e-5), (3, 8, 1e-4), (5, 6, 1e-4)]
)
def test_cook_toom_errs_as_stated(device, kernel, size, error):
    conv = convolution(64, 64, kernel, 1, 0, device, torch.float32)
    images = maps(20, 64, (size + kernel - 1,) * 2, device).relu().float()
    exact = convolution(64, 64, kernel, 1, 0, device, torch.float32).double()
    outputs, weights, gradient = expected(exact, images.double())
    leaf = images.requires_grad_()
    found = CookToomConvolution(conv)(leaf)
    (back,) = torch.autograd.grad(found, leaf, weights.float())
    assert found.shape[2:] == (size, size)
    for ours, exact in ((found, outputs), (back, gradient)):
        assert ours.dtype == torch.float32
        assert (ours - exact).square().mean().sqrt() < error * exact.std()


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((5, 5), {"groups": 2}),
        ((7, 7), {"dilation": 2}),
        ((5, 5), {"padding": 1, "padding_mode": "circular"}),
        ((5, 5), {"padding": "same"}),
        ((13, 13), {}),
        ((8, 8), {"kernel_size": 1}),
    ],
)
def test_what_cook_toom_leaves_to_conv2d(device, size, settings):
    arguments = {"kernel_size": 3, **settings}
    conv = nn.Conv2d(32, 32, dtype=torch.float64, device=device, **arguments).requires_grad_(False)
    images = maps(2, 32, size, device)
    fast = CookToomConvolution(conv)
    torch.testing.assert_close(fast(images), conv(images))
    assert list(fast._prepared.values()) == [None]


def test_cook_toom_of_one_image_without_a_batch_and_of_none(device):
    conv = convolution(*SMALL["3x3"][:-1], device)
    images = maps(2, 32, (8, 8), device)
    fast = CookToomConvolution(conv)
    torch.testing.assert_close(fast(images[0]), conv(images[0]))
    torch.testing.assert_close(fast(images)[0], conv(images[0]))
    assert fast(images[:0]).shape == (0, 32, 6, 6)


def test_cook_toom_gives_way_to_autocast(device):
    # Cook-Toom's sums and differences would be too coarse in bfloat16.
    conv = convolution(*SMALL["3x3"][:-1], device, torch.float32)
    images = maps(2, 32, (8, 8), device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        found = CookToomConvolution(conv)(images)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), conv(images), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("case", FIRST.values(), ids=FIRST)
def test_a_gradient_by_phases_is_that_of_conv2d(case):
    *settings, size = case
    conv = convolution(*settings)
    images = maps(3, settings[0], size)
    outputs, weights, gradient = expected(conv, images)
    direct = DirectConvolution(conv, torch.float64, torch.preserve_format)
    assert direct.phases is not None
    leaf = images.requires_grad_()
    found = direct(leaf)
    assert torch.equal(found, outputs)
    (back,) = torch.autograd.grad(found, leaf, weights)
    torch.testing.assert_close(back, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{"groups": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}, {"stride": 1}, {"stride": 3}],
)
def test_gradients_that_phases_leave_alone(settings):
    conv = nn.Conv2d(2, 4, dtype=torch.float64, **{"kernel_size": 3, "stride": 2, **settings})
    direct = DirectConvolution(conv.requires_grad_(False), torch.float64, torch.channels_last)
    assert direct.phases is None
    images = maps(2, 2, (9, 9)).requires_grad_()
    torch.testing.assert_close(direct(images), conv(images))
    back, gradient = (torch.autograd.grad(f(images).square().sum(), images)[0] for f in (direct, conv))
    torch.testing.assert_close(back, gradient)


def test_a_network_that_enters_autocast_itself_has_its_own_gradient():
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    for parameter in conv.parameters():
        parameter.requires_grad_(False)
    gradients = []
    for convolution in (conv, DirectConvolution(conv, torch.float32, torch.preserve_format)):
        images = maps(2, 3, (8, 8), dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = convolution(images)
        assert outputs.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(outputs.square().sum(), images)
        gradients.append(gradient)
    assert torch.equal(*gradients)
