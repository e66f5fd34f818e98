"""Replayed steps equal ordinary ones: on a GPU by CUDA graphs, on a CPU by a recorder that stands for them.

The recorder keeps a graph's rules: recording changes nothing, and replays run operations but no Python.
"""

import contextlib
import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import shufflenet_v2_x0_5
from torchvision.transforms import RandomHorizontalFlip

from lightning_advknn.attacks import bim
from lightning_advknn.attacks.parts import step_graph
from lightning_advknn.attacks.parts.precision import prepared
from lightning_advknn.attacks.parts.probe import Probe
from lightning_advknn.attacks.parts.step_graph import _is_replayable, repeat, replayable
from lightning_advknn.experiment.iterates import Iterates
from lightning_advknn.models import ConvNet, Surrogate
from lightning_advknn.models.surrogate import DkNNB
from tests.real_gpu import REAL_GPU

BIM = {"eps": 0.1, "step_size": 0.01}


class Recorder(TorchDispatchMode):
    """Stands for a `torch.cuda.CUDAGraph` of operations on a CPU."""

    made: list["Recorder"] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self):
        super().__init__()
        self.operations, self.overwritten, self.replays, self.ended = [], [], 0, False
        self.made.append(self)

    def capture_begin(self, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)
        self.ended = True
        for tensor, value in reversed(self.overwritten):
            tensor.copy_(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            self.overwritten += [(each, each.clone()) for each in args if isinstance(each, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, result in self.operations:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Counted:
    """A real graph, and how often it was replayed."""

    def __init__(self):
        self.graph, self.replays = REAL_GRAPH(), 0
        Recorder.made.append(self)

    def capture_begin(self, **settings):
        self.graph.capture_begin(**settings)

    def capture_end(self):
        self.graph.capture_end()

    def replay(self):
        self.replays += 1
        self.graph.replay()


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


REAL_GRAPH = torch.cuda.CUDAGraph


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not REAL_GPU, reason="needs a GPU"))]
)
def place(request, monkeypatch):
    """A device whose steps are replayed."""
    Recorder.made.clear()
    step_graph._say_once.cache_clear()
    if request.param == "cpu":
        monkeypatch.setattr(step_graph, "_DEVICES", ("cpu",))
        step_graph._stream.cache_clear()
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    else:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    yield torch.device(request.param)
    step_graph._stream.cache_clear()


def graphs():
    """The graphs that were made, as their numbers of replays."""
    return [graph.replays for graph in Recorder.made]


def network(device, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2), nn.ReLU(), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(150, 5)
        )
    return made.to(device).eval()


def batch(device, shape=(2, 11, 11), size=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, *shape, generator=generator)
    return images.to(device), torch.randint(5, (size,), generator=generator).to(device)


def ordinary(monkeypatch, attack, *arguments, **settings):
    """The result without graphs."""
    with monkeypatch.context() as patch:
        patch.setattr(step_graph, "_DEVICES", ())
        return attack(*arguments, **settings)


@pytest.mark.parametrize("steps", [11, 30])
def test_replayed_steps_equal_ordinary_ones(place, monkeypatch, steps):
    target, (images, labels) = network(place), batch(place)
    expected = ordinary(monkeypatch, bim, target, images, labels, **BIM, steps=steps)
    assert not Recorder.made
    before = images.clone()
    found = bim(target, images, labels, **BIM, steps=steps)
    assert graphs() == [steps - 3], "of each step after the third"
    assert torch.equal(found, expected)
    assert not torch.equal(found, bim(target, images, labels, **BIM, steps=steps - 1)), "each step counts"
    assert torch.equal(images, before)


@pytest.mark.parametrize("precision", ["float32", "winograd"])
def test_prepared_networks_and_surrogates(place, monkeypatch, precision):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        backbone, block = ConvNet((1, 28, 28), 5).to(place), DkNNB(1152, 5).to(place)
    images, labels = batch(place, (1, 28, 28), 2)
    for target in (backbone, Surrogate(backbone, "relu3", block)):
        with prepared(target, precision) as ready:
            expected = ordinary(monkeypatch, bim, ready, images, labels, **BIM, steps=12)
            found = bim(ready, images, labels, **BIM, steps=12)
        assert torch.equal(found, expected)
    assert graphs() == [9, 9]


def test_iterates_are_noted_in_replays(place, monkeypatch):
    target, (images, labels) = network(place), batch(place, size=9)
    labels = target(images).argmax(1)

    def notes(steps):
        iterates = Iterates("linf", 0.1)
        with iterates(0, target, images, labels):
            bim(target, images, labels, **BIM, steps=steps)
        return {name: column.tolist() for name, column in iterates.columns(9).items()}

    expected = ordinary(monkeypatch, notes, 14)
    assert expected != ordinary(monkeypatch, notes, 4), "what is reached in replayed steps matters"
    assert notes(14) == expected
    assert graphs() == [11]


@pytest.mark.parametrize("fails", ["capture_begin", "capture_end", "operation"])
def test_a_capture_that_fails(place, monkeypatch, caplog, fails):
    target, (images, labels) = network(place), batch(place)
    expected = ordinary(monkeypatch, bim, target, images, labels, **BIM, steps=20)

    class Failing(torch.cuda.CUDAGraph):
        def capture_begin(self, **settings):
            if fails == "capture_begin":
                raise RuntimeError("no capture\nmore of it")
            super().capture_begin(**settings)

        def capture_end(self):
            super().capture_end()
            if fails == "capture_end":
                raise RuntimeError("no capture\nmore of it")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Failing)
    if fails == "operation":

        @replayable
        def wait(_module, _inputs, logits):
            assert float(logits.detach().sum())

        target.register_forward_hook(wait)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(bim(target, images, labels, **BIM, steps=20), expected)
    assert graphs() == [0, 0]
    (said,) = [record.message for record in caplog.records if record.name == step_graph.__name__]
    assert said.startswith("Attack steps are not replayed from a CUDA graph: ")
    assert "more of it" not in said
    assert float(images.sum()) > 0, "nothing goes on recording"


def test_a_replay_that_differs(place, monkeypatch, caplog):
    # The hook changes the logits by a number that Python draws: recorded once, it stays the same.
    target, (images, labels) = network(place), batch(place)
    numbers = iter(range(100))
    target.register_forward_hook(replayable(lambda _module, _inputs, logits: logits * next(numbers)))
    with caplog.at_level(logging.WARNING):
        bim(target, images, labels, **BIM, steps=20)
    assert graphs() == [1]
    assert "a replayed step differs from an ordinary one" in caplog.text


def test_a_loss_that_is_not_finite(place):
    target, (images, labels) = network(place), batch(place)
    with torch.no_grad():
        target[0].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="Expected a finite attack loss, but got nan"):
        bim(target, images, labels, **BIM, steps=20)


def test_few_steps_are_ordinary(place):
    target, (images, labels) = network(place), batch(place)
    bim(target, images, labels, **BIM, steps=10)
    assert not Recorder.made


def test_a_cpu_has_no_graphs():
    Recorder.made.clear()
    (state,) = repeat(lambda value: (value + 1,), (torch.zeros(()),), 50, network("cpu"))
    assert state == 50
    assert not Recorder.made


class Own(nn.Module):
    def forward(self, images):
        return images


def test_what_is_replayable():
    plain = [
        network("cpu"),
        nn.Sequential(nn.Dropout(), network("cpu")).eval(),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))).eval(),
        shufflenet_v2_x0_5().eval(),
        ConvNet().eval(),
        Surrogate(ConvNet(), "relu3", DkNNB(1152, 10)),
    ]
    assert all(map(_is_replayable, plain))
    for module in (*plain[:1], *plain[3:]):
        with prepared(module) as ready:
            assert _is_replayable(ready)
    with prepared(plain[0], "winograd") as ready:
        assert _is_replayable(ready)
    with prepared(plain[0], "bfloat16") as ready:
        assert not _is_replayable(ready)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.forward,
        lambda module: lambda images: module(images),
        lambda module: module.train(),
        lambda module: module[0].train() and module,
        lambda module: nn.Sequential(Own(), module).eval(),
        lambda module: nn.Sequential(RandomHorizontalFlip(), module).eval(),
        lambda module: Probe((2, 11, 11), 5).eval(),
        lambda module: module[0].register_forward_hook(lambda *_: None) and module,
        lambda module: module[0].register_forward_pre_hook(lambda *_: None) and module,
        lambda module: module[0].register_full_backward_hook(lambda *_: None) and module,
        lambda module: vars(module[0]).update(forward=lambda images: images) or module,
        lambda module: nn.Sequential(
            nn.utils.parametrize.register_parametrization(nn.Linear(2, 2), "weight", Own())
        ).eval(),
    ],
    ids=range(12),
)
def test_what_is_not_replayable(change):
    module = network("cpu")
    assert _is_replayable(module)
    changed = change(module)
    assert not _is_replayable(changed)


def test_hooks_of_all_modules_are_not_replayable():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not _is_replayable(network("cpu"))
    finally:
        handle.remove()
