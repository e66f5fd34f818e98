"""Pretended GPUs compute what the CPU does, refuse what GPUs refuse, and count launches and waits."""

import ast
import copy
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.pretend_cuda.ledger import ledger
from tests.pretend_cuda.tensors import devices

if not devices.count:
    pytest.skip("runs on pretended GPUs, see tests/test_pretended_gpus.py", allow_module_level=True)

from tests.pretend_cuda.plugin import UNSEEN  # it makes GPUs

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda", devices.count - 1)
two_gpus = pytest.mark.skipif(devices.count < 2, reason="needs two GPUs")


def on_gpu(*sizes, dtype=torch.float32):
    return torch.arange(torch.Size(sizes).numel(), device=DEVICE).reshape(sizes).to(dtype)


# What is computed where


def test_tensors_say_where_they_are():
    for made in (
        torch.zeros(2, device=DEVICE),
        torch.zeros(2).to(DEVICE),
        torch.tensor([0.0, 0], device=DEVICE),
    ):
        assert made.device == DEVICE
        assert made.is_cuda
        assert (made + 1).device == made.relu().device == DEVICE
        assert made.cpu().device == torch.device("cpu")
    with torch.cuda.device(0):
        assert torch.zeros(2, device="cuda").device == torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(2, device=f"cuda:{devices.count}")


@two_gpus
def test_the_current_device():
    with torch.cuda.device(1):
        assert torch.zeros(2, device="cuda").device == torch.device("cuda", 1)
    assert torch.zeros(2).to("cuda").device == torch.device("cuda", 0)


def test_values_and_gradients_are_those_of_the_cpu():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, images = (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
            torch.rand(2, 1, 4, 4),
        )

    def gradients(module, images):
        images = images.clone().requires_grad_()
        module(images).square().sum().backward()
        return [each.grad for each in (images, *module.parameters())]

    expected = gradients(network, images)
    found = gradients(copy.deepcopy(network).to(DEVICE), images.to(DEVICE))
    assert all(each.device == DEVICE for each in found)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


def test_generators_are_not_the_cpus():
    def draw(device):
        return torch.rand(4, device=device).cpu()

    with torch.random.fork_rng(devices=range(devices.count)):
        torch.manual_seed(3)
        first, state = draw(DEVICE), torch.cuda.get_rng_state(DEVICE)
        again, own = draw(DEVICE), draw("cpu")
        torch.cuda.set_rng_state(state, DEVICE)
        assert torch.equal(draw(DEVICE), again)
        torch.manual_seed(3)
        assert torch.equal(draw(DEVICE), first)
        assert torch.equal(draw("cpu"), own)
    assert len({each.tolist()[0] for each in (first, again, own)}) == 3


def test_inference_mode():
    ordinary = on_gpu(3)
    with torch.inference_mode():
        moved = torch.arange(3).to(DEVICE)
        assert moved.device == moved[1:].device == (moved + ordinary).device == DEVICE
        assert moved.is_inference()
        assert not ordinary[1:].is_inference()


def test_other_threads_have_gpus_too():
    made = []
    thread = threading.Thread(target=lambda: made.append(torch.zeros(2).to(DEVICE) + 1))
    thread.start()
    thread.join()
    assert made[0].tolist() == [1, 1]


# What is refused

MIXED = {
    "sum": lambda gpu, other: gpu + other,
    "product": lambda gpu, other: gpu @ other.T,
    "in place": lambda gpu, other: gpu.mul_(other),
    "joined": lambda gpu, other: torch.cat([gpu, other]),
    "chosen": lambda gpu, other: torch.where(gpu > 3, gpu, other),
    "gathered": lambda gpu, other: gpu.gather(1, other.long().clamp(max=1)),
    "rows": lambda gpu, other: gpu.index_select(0, other[0].long()),
    "an index on the GPU": lambda gpu, other: other[gpu[0].long().clamp(max=1)],
    "values of an assignment": lambda gpu, other: gpu.long().__setitem__(gpu > 3, other.long()[other > 3]),
    "labels": lambda gpu, other: nn.functional.cross_entropy(gpu, 0 * other[:, 0].long()),
    "a module": lambda gpu, other: nn.Linear(2, 2).to(other.device)(gpu),
    "a distance": lambda gpu, other: torch.cdist(gpu, other),
}


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda:0", marks=two_gpus)])
@pytest.mark.parametrize("operator", MIXED.values(), ids=MIXED)
def test_operators_that_mix_devices(operator, place):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        operator(on_gpu(3, 2), torch.arange(6.0).reshape(3, 2).to(place))
    operator(on_gpu(3, 2), on_gpu(3, 2))


def test_numbers_and_indices_may_be_on_the_cpu():
    assert (on_gpu(3) + torch.tensor(1)).tolist() == [1, 2, 3]
    assert on_gpu(3)[torch.tensor([2, 0])].tolist() == [2, 0]
    assert on_gpu(3)[[2, 0]].tolist() == [2, 0]
    changed = on_gpu(3)
    changed[torch.tensor([2, 0])] = torch.tensor(7.0)
    assert changed.tolist() == [7, 1, 7]


def test_arrays():
    with pytest.raises(TypeError, match=r"can't convert cuda:\d device type tensor to numpy"):
        on_gpu(3).numpy()
    with pytest.raises(TypeError, match=r"can't convert cuda:\d device type tensor to numpy"):
        np.asarray(on_gpu(3))


@pytest.mark.parametrize("sizes", [(16, 8, 8), (24, 12, 8), (24, 8, 12)])
def test_int8_products_of_forbidden_sizes(sizes):
    n, width, m = sizes
    with pytest.raises(RuntimeError, match="pretended"):
        torch._int_mm(on_gpu(n, width, dtype=torch.int8), on_gpu(width, m, dtype=torch.int8))


def test_int8_products():
    left, right = on_gpu(24, 8, dtype=torch.int8), on_gpu(8, 16, dtype=torch.int8)
    assert torch.equal(torch._int_mm(left, right).cpu(), left.cpu().int() @ right.cpu().int())


def test_products_of_integers():
    with pytest.raises(RuntimeError, match=r"not implemented for torch\.int64"):
        on_gpu(2, 2, dtype=torch.int64) @ on_gpu(2, 2, dtype=torch.int64)


def test_products_of_bfloat16_in_float32():
    left = on_gpu(3, 5, dtype=torch.bfloat16) / 3
    found = torch.mm(left, left.T, out_dtype=torch.float32)
    assert found.device == DEVICE
    assert torch.equal(found.cpu(), left.cpu().float() @ left.cpu().float().T)


def test_a_generator_of_the_cpu():
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())


# What is counted

WAITS = {
    "item": lambda tensor: tensor[0].item(),
    "bool": lambda tensor: bool(tensor.any()),
    "nonzero": lambda tensor: tensor.nonzero(),
    "rows": lambda tensor: tensor[tensor > 0],
    "assigned rows": lambda tensor: tensor.__setitem__(tensor > 0, tensor[1:2].expand(3)),
    "unique": lambda tensor: tensor.unique(),
    "list": lambda tensor: tensor.tolist(),
    "copy": lambda tensor: tensor.cpu(),
    "copy in place": lambda tensor: torch.zeros(4).copy_(tensor),
    "equal": lambda tensor: torch.equal(tensor, tensor),
    "repeated": lambda tensor: tensor.repeat_interleave(tensor.long()),
}


@pytest.mark.parametrize("operator", WAITS.values(), ids=WAITS)
def test_waits(operator):
    tensor = on_gpu(4)
    ledger.reset()
    for _ in range(3):
        operator(tensor)
    assert ledger.totals()["syncs"] == 3


def test_launches():
    tensor = on_gpu(4, 4)
    ledger.reset()
    view = tensor.T[1:, 0].reshape(3, 1).expand(3, 2).detach()
    torch.empty_like(tensor)
    assert ledger.totals()["launches"] == 0
    view = view * 2 + 1
    view[view > 3] = 0.0  # a comparison, and filling by a mask
    assert ledger.totals() == {"launches": 4, "syncs": 0, "uploads": 0, "downloads": 0}
    torch.ones(3).to(DEVICE)
    tensor[torch.tensor([1, 2])]
    assert ledger.totals()["uploads"] == 2


def test_what_is_not_seen_exists():
    for name in UNSEEN:
        path, test = name.partition("[")[0].split("::")
        functions = ast.walk(ast.parse((ROOT / path).read_text()))
        assert test in {each.name for each in functions if isinstance(each, ast.FunctionDef)}, name
