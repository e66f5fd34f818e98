"""Batches attacked in threads: the numbers of one thread, and state that is not shared."""

import threading
import time
from functools import partial

import pytest
import torch
from torch import nn

from lightning_advknn import evaluation
from lightning_advknn.attacks import bim, fgsm
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.threads import can_share, copy_for_thread, in_threads
from lightning_advknn.models import ConvNet, DkNNB, FeatureNetwork, Surrogate


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    """Torch's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Remembering(nn.Module):
    """A network that keeps its features between two lines of its forward pass, as some do."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 3, bias=False), nn.Linear(3, 2)

    def forward(self, images):
        self.kept = self.linear(images.flatten(1))
        time.sleep(0.001)  # another thread goes on here
        return self.head(self.kept.tanh())


def batch(n, shape):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, *shape, generator=generator), torch.arange(n) % 2


def network(shape=(1, 28, 28)):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ConvNet(shape)


@pytest.mark.parametrize("precision", ["float32", "winograd", "bfloat16"])
def test_adversarials_do_not_depend_on_the_number_of_threads(monkeypatch, precision):
    monkeypatch.setattr(evaluation, "CPU_BATCH", 5)
    before, found = torch.get_num_threads(), []
    images, labels = batch(17, (1, 28, 28))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        surrogate = Surrogate(network(), "relu3", DkNNB(1152, 10))
    seen = set()
    surrogate.dknnb.register_forward_hook(lambda *_: seen.add(threading.get_ident()))
    for number in (1, 2, 4):
        torch.set_num_threads(number)
        for target in (FeatureNetwork(network(), ["relu3"]), surrogate):
            made = evaluation.perturb(
                partial(bim, eps=0.1, step_size=0.02, steps=3), target, images, labels, precision
            )
            found.append(made)
        assert torch.get_num_threads() == number
    torch.set_num_threads(before)
    assert all(torch.equal(found[i], found[i % 2]) for i in range(6))
    assert (found[0] - images).abs().amax() > 0.05
    assert not torch.equal(found[0], found[1])
    assert len(seen) > 3  # a call runs in threads of its own


def test_networks_that_keep_state_are_copied(monkeypatch, threads):
    monkeypatch.setattr(evaluation, "CPU_BATCH", 2)
    target, (images, labels) = Remembering(), batch(21, (1, 2, 2))
    made = evaluation.perturb(partial(bim, eps=0.2, step_size=0.05, steps=4), target, images, labels)
    torch.testing.assert_close(
        made, bim(target.eval(), images, labels, eps=0.2, step_size=0.05, steps=4), rtol=0, atol=1e-6
    )


def test_a_copy_shares_tensors_and_nothing_else():
    target = FeatureNetwork(network(), ["relu2"])
    twin = copy_for_thread(target)
    images, _ = batch(3, (1, 28, 28))
    assert torch.equal(twin.features(images)["relu2"], target.features(images)["relu2"])
    assert all(a is b for a, b in zip(twin.parameters(), target.parameters(), strict=True))
    assert not {*twin.modules()} & {*target.modules()}
    twin.network.relu2.register_forward_hook(lambda *_: pytest.fail("a hook of the copy"))
    twin.network.conv1.register_buffer("more", torch.zeros(1))
    twin.network.conv2 = nn.Identity()
    assert "more" not in dict(target.network.conv1.named_buffers())
    assert target(images).shape == (3, 10)


def test_a_module_that_is_there_twice_is_copied_once():
    linear = nn.Linear(2, 2)
    twin = copy_for_thread(nn.Sequential(linear, nn.ReLU(), linear))
    assert twin[0] is twin[2]
    assert twin[0] is not linear


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_which_attacks_may_run_in_threads():
    @attack(on="logits")
    def own(logits_fn, images, labels):
        return images

    module = nn.Linear(2, 2)
    assert can_share(fgsm, module)
    assert can_share(partial(partial(bim, steps=1), eps=0.1), module)
    assert not can_share(own, module)
    assert not can_share(lambda *_: None, module)
    assert not can_share(fgsm, lambda images: images)
    assert not can_share(fgsm, nn.Sequential(torch.jit.trace(module, torch.zeros(1, 2))))
    assert not can_share(fgsm, torch.compile(module))


def test_results_are_in_order_and_one_thread_computes_each(threads):
    def square(tool, number):
        time.sleep(0.002 * (number % 3))
        return tool, number**2, torch.get_num_threads(), threading.get_ident()

    found = in_threads(square, range(20), list(range(threads)))
    assert [each[1] for each in found] == [number**2 for number in range(20)]
    assert {each[2] for each in found} == {1}
    assert len({each[3] for each in found}) <= threads
    assert {each[0] for each in found} <= set(range(threads))
    assert torch.get_num_threads() == threads


def test_an_error_ends_all_threads(threads):
    done = []

    def fail(_tool, number):
        if number == 3:
            raise ValueError("no")
        time.sleep(0.01)
        done.append(number)

    with pytest.raises(ValueError, match="no"):
        in_threads(fail, range(1000), list(range(threads)))
    assert len(done) < 100
    assert torch.get_num_threads() == threads
