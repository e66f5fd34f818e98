"""Losses against torch's own, against the formula in plain Python, and their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_advknn.functional import classification_loss, consistency_loss, surrogate_loss


def batch(device, samples=32, classes=10, dtype=torch.float64, seed=0):
    """Logits, vote distributions with zeros, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, classes, generator=generator, dtype=dtype)
    votes = torch.randint(4, (samples, classes), generator=generator)
    votes[:, 0] += 1
    distribution = (votes / votes.sum(1, keepdim=True).to(dtype)).to(dtype)
    assert (distribution == 0).any()
    return logits.to(device), distribution.to(device), votes.argmax(1).to(device)


def test_classification_loss_is_cross_entropy(device):
    logits, _, labels = batch(device)
    expected = [-math.log(row[t]) for row, t in zip(logits.softmax(1).tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(
        classification_loss(logits, labels).cpu(), torch.tensor(expected, dtype=torch.float64)
    )
    torch.testing.assert_close(classification_loss(logits, labels).mean(), F.cross_entropy(logits, labels))


def test_consistency_loss_is_kl_divergence(device):
    logits, distribution, _ = batch(device)
    loss = consistency_loss(logits, distribution)
    torch.testing.assert_close(
        loss, F.kl_div(F.log_softmax(logits, 1), distribution, reduction="none").sum(1)
    )
    torch.testing.assert_close(
        loss.mean(), F.kl_div(F.log_softmax(logits, 1), distribution, reduction="batchmean")
    )
    expected = [
        sum(p * (math.log(p) - math.log(q)) for p, q in zip(ps, qs, strict=True) if p > 0)
        for ps, qs in zip(distribution.tolist(), logits.softmax(1).tolist(), strict=True)
    ]
    torch.testing.assert_close(loss.cpu(), torch.tensor(expected, dtype=torch.float64))


def test_consistency_loss_by_hand(device):
    # p = (1/2, 1/2, 0), q = (1/2, 1/4, 1/4): KL = 1/2 log 1 + 1/2 log 2
    logits = torch.tensor([[0.5, 0.25, 0.25]], device=device).log()
    loss = consistency_loss(logits, torch.tensor([[0.5, 0.5, 0.0]], device=device))
    assert loss.item() == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_consistency_loss_is_zero_where_the_distributions_agree_and_positive_elsewhere(device):
    logits, distribution, _ = batch(device)
    equal = consistency_loss(logits, logits.softmax(1))
    torch.testing.assert_close(equal, torch.zeros_like(equal), rtol=0, atol=1e-12)
    assert (consistency_loss(logits, distribution) > 0.01).all()


def test_on_a_one_hot_distribution_both_losses_agree(device):
    logits, _, labels = batch(device)
    one_hot = F.one_hot(labels, 10).double()
    torch.testing.assert_close(consistency_loss(logits, one_hot), classification_loss(logits, labels))


def test_large_logits_stay_finite(device):
    logits = torch.tensor([[1e4, -1e4, 0.0]], device=device, requires_grad=True)
    loss = consistency_loss(logits, torch.tensor([[0.5, 0.5, 0.0]], device=device))
    loss.sum().backward()
    assert loss.item() == pytest.approx(1e4 - math.log(2), rel=1e-6)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", ["cls", "cl", "both"])
def test_gradients_against_finite_differences(device, name):
    logits, distribution, labels = batch(device, samples=3, classes=4)
    losses = {
        "cls": lambda z: classification_loss(z, labels),
        "cl": lambda z: consistency_loss(z, distribution),
        "both": lambda z: surrogate_loss(z, distribution, labels, 0.3),
    }
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(losses[name](logits).sum(), logits)
    step = 1e-6
    for row in range(3):
        for column in range(4):
            nudge = torch.zeros_like(logits)
            nudge[row, column] = step
            with torch.no_grad():
                slope = (losses[name](logits + nudge) - losses[name](logits - nudge)).sum() / (2 * step)
            assert gradient[row, column].item() == pytest.approx(slope.item(), abs=1e-8)


def test_gradients_are_q_minus_the_target(device):
    # The closed form of Eq. (14) and of its counterpart for L_CL, with respect to the logits.
    logits, distribution, labels = batch(device)
    logits.requires_grad_()
    q = logits.detach().softmax(1)
    one_hot = F.one_hot(labels, 10).double()
    (gradient,) = torch.autograd.grad(surrogate_loss(logits, distribution, labels, 0.3).sum(), logits)
    torch.testing.assert_close(gradient, 0.3 * (q - one_hot) + (q - distribution))


@pytest.mark.parametrize(("cls_weight", "cl_weight"), [(0.3, 1.0), (0.0, 1.0), (2.0, 0.5), (1.0, 0.0)])
def test_surrogate_loss_weighs_its_parts(device, cls_weight, cl_weight):
    logits, distribution, labels = batch(device)
    expected = cls_weight * F.cross_entropy(logits, labels, reduction="none") + cl_weight * F.kl_div(
        logits.log_softmax(1), distribution, reduction="none"
    ).sum(1)
    torch.testing.assert_close(surrogate_loss(logits, distribution, labels, cls_weight, cl_weight), expected)


def test_lambda_defaults_to_the_papers(device):
    logits, distribution, labels = batch(device)
    torch.testing.assert_close(
        surrogate_loss(logits, distribution, labels),
        0.3 * F.cross_entropy(logits, labels, reduction="none")
        + F.kl_div(logits.log_softmax(1), distribution, reduction="none").sum(1),
    )


def test_without_cl_the_distribution_is_not_read(device):
    logits, distribution, labels = batch(device)
    loss = surrogate_loss(logits, torch.full_like(distribution, torch.nan), labels, 1.0, cl_weight=0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))
