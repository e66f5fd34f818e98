"""Distortions against numpy in float64 and the paper's own arithmetic."""

import numpy as np
import pytest
import torch

from lightning_advknn.functional import authors_l2, l2_distortion, linf_distortion


def test_by_hand(device):
    images = torch.zeros(3, 1, 2, 2, device=device)
    adversarial = images.clone()
    adversarial[1, 0] = torch.tensor([[0.5, -0.5], [0.5, 0.5]])
    adversarial[2, 0, 1, 0] = -0.25
    assert l2_distortion(images, adversarial).tolist() == [0, 1, 0.25]
    assert linf_distortion(images, adversarial).tolist() == [0, 0.5, 0.25]


@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (4, 3, 32, 32), (3, 7)])
def test_agrees_with_numpy(device, shape):
    generator = torch.Generator().manual_seed(len(shape))
    images = torch.rand(shape, generator=generator)
    adversarial = (images + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1)
    difference = (adversarial.numpy().astype(np.float64) - images.numpy().astype(np.float64)).reshape(
        len(images), -1
    )
    l2 = l2_distortion(images.to(device), adversarial.to(device))
    linf = linf_distortion(images.to(device), adversarial.to(device))
    assert l2.dtype == linf.dtype == torch.float64
    np.testing.assert_allclose(l2.cpu(), np.sqrt((difference**2).sum(1)), rtol=1e-13)
    np.testing.assert_array_equal(linf.cpu(), np.abs(difference).max(1))


def test_changes_below_float32_resolution_of_their_sum_count(device):
    # 1000 changes of 1e-5 beside one of 1: in float32 the small squares vanish.
    images = torch.zeros(1, 1001, device=device)
    adversarial = torch.full((1, 1001), 1e-5, device=device)
    adversarial[0, 0] = 1
    expected = (1 + 1000 * float(np.float32(1e-5)) ** 2) ** 0.5
    assert expected > 1
    assert l2_distortion(images, adversarial).item() == pytest.approx(expected, rel=1e-15)


def test_no_images(device):
    empty = torch.zeros(0, 1, 4, 4, device=device)
    assert l2_distortion(empty, empty).shape == linf_distortion(empty, empty).shape == (0,)


def test_the_papers_headline_number_in_the_authors_unit():
    # A BIM image at eps .25 on MNIST has a true L2 of about 4.6: the paper prints 1.49.
    assert authors_l2(torch.tensor(784 / 255, dtype=torch.float64)).item() == pytest.approx(1)
    assert authors_l2(torch.tensor(4.5837, dtype=torch.float64)).item() == pytest.approx(1.4909, abs=1e-4)
