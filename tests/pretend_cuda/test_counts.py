"""How many kernels are launched, and how often the host waits: counts, not times.

A launch takes 5 to 8 microseconds of the host. The bounds are what was counted, with a little room for other
versions of torch: lower them whenever a change lowers the counts.
"""

import pytest
import torch

import lightning_advknn as advknn
from lightning_advknn.attacks import bim
from lightning_advknn.attacks.parts.precision import prepared
from lightning_advknn.models import ConvNet
from tests.pretend_cuda.ledger import ledger
from tests.pretend_cuda.tensors import devices

if not devices.count:
    pytest.skip("runs on pretended GPUs, see tests/test_pretended_gpus.py", allow_module_level=True)

DEVICE = torch.device("cuda", devices.count - 1)

BIM_STEP = {"float32": 27, "tf32": 28, "bfloat16": 34}  # launches
BIM_SYNCS = 4  # of a call; its steps have none
# Syncs are looks at a few numbers, most of which are copied to the host for it.
QUERY = {"launches": 640, "syncs": 18, "downloads": 6}  # of a batch in four layers
MINIMUM_NORM_STEP = {"launches": 770, "syncs": 4, "downloads": 4}


def counts(function, *arguments, **settings):
    ledger.reset()
    function(*arguments, **settings)
    return ledger.totals()


def growth(function, few, many, *arguments, **settings):
    """The counts of one step more."""
    first, last = (counts(function, *arguments, steps=steps, **settings) for steps in (few, many))
    return {kind: (last[kind] - first[kind]) / (many - few) for kind in first}


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ConvNet((1, 20, 20), 5).to(DEVICE).eval()


@pytest.fixture(scope="module")
def images_and_labels():
    """100 images of five patterns and noise."""
    generator = torch.Generator().manual_seed(1)
    patterns, labels = torch.rand(5, 1, 20, 20, generator=generator), torch.arange(100) % 5
    noise = torch.rand(100, 1, 20, 20, generator=generator)
    return 0.6 * patterns[labels] + 0.4 * noise, labels


@pytest.fixture(scope="module")
def victim(network, images_and_labels):
    layers = ["relu1", "relu2", "relu3", "logits"]
    return advknn.DkNN(network, layers=layers, k=15, device=str(DEVICE)).fit(*images_and_labels)


@pytest.fixture
def batch(images_and_labels):
    return [each[:2].to(DEVICE) for each in images_and_labels]


@pytest.mark.parametrize("precision", BIM_STEP)
def test_a_bim_step(network, batch, precision):
    with prepared(network, precision) as ready:
        step = growth(bim, 2, 4, ready, *batch, eps=0.1, step_size=0.01)
        call = counts(bim, ready, *batch, eps=0.1, step_size=0.01, steps=2)
    assert step["launches"] <= BIM_STEP[precision]
    assert step["syncs"] == step["uploads"] == step["downloads"] == 0
    assert call["syncs"] <= BIM_SYNCS
    assert call["uploads"] == 0


def test_a_wait_in_each_step_is_counted(network, batch):
    def look(_module, _inputs, logits):
        assert not logits.isnan().any()

    handle = network.register_forward_hook(look)
    try:
        assert growth(bim, 2, 4, network, *batch, eps=0.1, step_size=0.01)["syncs"] == 1
    finally:
        handle.remove()


def test_a_query(victim, batch):
    victim.predict(batch[0])  # what is known once for each device
    found = counts(victim.predict, batch[0])
    assert found["launches"] <= QUERY["launches"]
    assert found["syncs"] <= QUERY["syncs"]
    assert found["downloads"] <= QUERY["downloads"]
    assert found["uploads"] == 0


def test_a_minimum_norm_step(network, victim, batch):
    # One image, which fools the victim from the start: calls differ in nothing but steps.
    images, labels = batch[0][:1], (victim.predict(batch[0][:1]) + 1) % 5
    settings = {"surrogate": network, "classes": 1, "surrogate_steps": 1, "neighbours": 40}
    step = growth(advknn.minimum_norm, 1, 3, victim, images, labels, **settings)
    assert step["launches"] <= MINIMUM_NORM_STEP["launches"]
    assert step["syncs"] <= MINIMUM_NORM_STEP["syncs"]
    assert step["downloads"] <= MINIMUM_NORM_STEP["downloads"]
    assert step["uploads"] == 0
