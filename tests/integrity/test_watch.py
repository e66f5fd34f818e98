"""Changes that an attack makes to its target are found and undone."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_advknn import evaluation
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch
from lightning_advknn.integrity import Snapshot, snapshot, tensors
from lightning_advknn.models import DkNNB, FeatureNetwork, JointSurrogate, Surrogate
from lightning_advknn.search import StoredRows
from lightning_advknn.search.build import build_banks

IMAGES, LABELS = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))


def attacked(attack: Callable[..., Any], target: Any, name: str = "mine") -> Tensor:
    return evaluation.perturb(attack, target, IMAGES, LABELS, name=name)


def bytes_of(module: nn.Module) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in module.state_dict().values()]


def dknn() -> DkNN:
    features, batch = FeatureNetwork(network(), ["2", "3"]), Batch(IMAGES, LABELS, torch.arange(6))
    victim = DkNN.on_banks(features, build_banks(features, [batch], 3), k=2)
    victim.calibrate([batch])
    return victim


def test_frozen_modules_evaluate_whatever_is_asked_for() -> None:
    own = network()
    victim = dknn()
    kinds = (
        FeatureNetwork(own, ["2"]),
        Surrogate(own, "2", DkNNB(4, 3)),
        JointSurrogate(own, {"2": DkNNB(4, 3), "3": DkNNB(4, 3)}),
        victim,
        victim.only("3"),
        victim.only(victim.layers[0]),
    )
    for module in kinds:
        for switch in (lambda: None, module.train, module.eval, module.train):
            switch()
            assert not any(part.training for part in module.modules())


def test_a_network_put_into_training_mode_is_not_judged() -> None:
    victim = dknn()
    victim.network.network[1].train()
    for ask in (victim, victim.network, victim.network.features):
        with pytest.raises(
            ValueError, match=r"evaluation mode, but its modules \['1'\] are in training mode"
        ):
            ask(IMAGES)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", [True, False])
def test_all_is_put_back(mode: bool, fails: bool) -> None:
    module = network().train(mode)
    module[4].weight.requires_grad_(False)
    module.scale = [1.0, math.nan]
    hook = module[0].register_forward_hook(lambda *_: None)
    before, parts = bytes_of(module), list(module.named_modules())
    weight, mean = module[0].weight, module[1].running_mean

    def attack(target: Any, images: Tensor, labels: Tensor) -> Tensor:
        target.train()
        target(images)  # running statistics
        hook.remove()
        target[0].register_forward_pre_hook(lambda *_: None)
        target[0].weight = nn.Parameter(torch.zeros(4, 1, 2, 2))
        target[1].running_mean = torch.zeros(4)
        target[4].weight.data.view(-1)[3] += 1e-3
        target[4].weight.requires_grad_(True)
        target[4].bias.data = target[4].bias.data.double()
        target[2] = nn.Softplus()
        target[3].forward = lambda images: images
        target.scale[0] = 2.0
        target[1].eps = 1.0
        target[4].__class__ = nn.Module
        torch.set_grad_enabled(False)
        if fails:
            raise OSError("disk on fire")
        return images

    message = (
        "'mine' failed: OSError: disk on fire"
        if fails
        else r"'mine' to leave .* and \d+ more\. Nothing that it made"
    )
    with pytest.raises(ValueError, match=message):
        attacked(attack, module)
    assert list(module.named_modules()) == parts
    assert bytes_of(module) == before
    assert [part.training for part in module.modules()] == [mode] * 6
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"4.weight"}
    assert module[0].weight is weight
    assert module[1].running_mean is mean
    assert len(module[0]._forward_hooks) == 1
    assert not module[0]._forward_pre_hooks
    assert (module[1].eps, module.scale[0]) == (1e-5, 1.0)
    assert "forward" not in vars(module[3])
    assert torch.is_grad_enabled()


def add_to_one(target: Any, images: Tensor, labels: Tensor, *, tensor: Tensor, value: float) -> Tensor:
    tensor.data.view(-1)[0] += value
    return images


def test_what_has_changed_and_by_how_much() -> None:
    victim = dknn()
    for name, tensor in victim.named_buffers():
        with pytest.raises(ValueError, match=rf"it changed `{name}` by up to 2\. Nothing"):
            attacked(partial(add_to_one, tensor=tensor, value=2), victim)
    for name, parameter in victim.named_parameters():
        with pytest.raises(ValueError, match=rf"it changed `{name}` by up to 0\.25\. Nothing"):
            attacked(partial(add_to_one, tensor=parameter, value=0.25), victim)


def test_modules_that_an_attack_holds_are_watched() -> None:
    own = network()

    class Wrapper:
        def __init__(self) -> None:
            self.module = own

        def attack(self, target: Any, images: Tensor, labels: Tensor, extra: Any = None) -> Tensor:
            with torch.no_grad():
                own[4].bias.add_(1)
            return images

    class AsObject(Wrapper):
        __call__ = Wrapper.attack

    method = Wrapper().attack
    cases = (
        (AsObject(), network()),
        (partial(AsObject()), network()),
        (partial(method, extra=own), network()),
        (partial(method, extra={"a": [own]}), network()),
        (method, own),
        (method, own.forward),
        (method, lambda images: own(images)),
        (method, partial(own.forward)),
    )
    for attack, target in cases:
        before = bytes_of(own)
        with pytest.raises(ValueError, match=r"4\.bias` by up to 1"):
            attacked(attack, target)
        assert bytes_of(own) == before


class Doubling(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return 2 * features


def test_what_is_changed_outside_of_modules_shows_in_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def rewrites_a_class(target: Any, images: Tensor, labels: Tensor) -> Tensor:
        monkeypatch.setattr(Doubling, "forward", lambda _self, features: 3 * features)
        return images

    target = nn.Sequential(nn.Flatten(), Doubling())
    gap = IMAGES[:2].max().item()
    with pytest.raises(ValueError, match=rf"attack 'mine' to leave.*other answers, by up to {gap:.3g}\."):
        attacked(rewrites_a_class, target)


def test_autocast_that_stays_on_shows_in_the_answers() -> None:
    autocast = torch.autocast("cpu", torch.bfloat16)

    def stays_in_autocast(target: Any, images: Tensor, labels: Tensor) -> Tensor:
        autocast.__enter__()
        return images

    try:
        with pytest.raises(ValueError, match="other answers"):
            attacked(stays_in_autocast, network())
    finally:
        autocast.__exit__(None, None, None)


def test_a_target_by_chance_is_no_fault_of_the_attack() -> None:
    def by_chance(images: Tensor) -> Tensor:
        return torch.randn(len(images), 3)

    assert torch.equal(attacked(lambda target, images, labels: images, by_chance), IMAGES)


def test_pruned_weights_are_put_back() -> None:
    """Pruning replaces a parameter by an attribute."""
    target = network()
    before = target.eval()(IMAGES)
    with pytest.raises(ValueError, match=r"changed `4.weight` for another"):
        attacked(
            lambda target, images, labels: (prune.random_unstructured(target[4], "weight", 2), images)[1],
            target,
        )
    assert isinstance(target[4].weight, nn.Parameter)
    assert torch.equal(target.eval()(IMAGES), before)


def test_large_tensors_are_summed_once_an_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    victim = dknn()
    features = victim.banks["2"].features
    summed: list[int] = []
    checksum = tensors._checksum
    monkeypatch.setattr(snapshot, "_COPIED", 0)
    monkeypatch.setattr(
        tensors, "_checksum", lambda tensor: (summed.append(tensor.data_ptr()), checksum(tensor))[1]
    )
    for times in (2, 3, 4):  # before and after; then the last sum is the next one's first
        attacked(lambda f, x, y: x, victim)
        assert summed.count(features.data_ptr()) == times
    with torch.no_grad():
        features += 0  # counts as a change
    attacked(lambda f, x, y: x, victim)
    assert summed.count(features.data_ptr()) == 6
    with pytest.raises(
        ValueError, match=r"_banks\.0\.features`.*but for _banks\.0\.features: make the victim again"
    ):
        attacked(partial(add_to_one, tensor=features, value=1e-7), victim)

    def fail(target: Any, images: Tensor, labels: Tensor) -> Tensor:
        add_to_one(target, images, labels, tensor=features, value=1)
        raise RuntimeError("no")

    with pytest.raises(
        ValueError, match=r"RuntimeError: no It also changed _banks\.0\.features: make the victim"
    ):
        attacked(fail, victim)


def test_rows_in_a_file_are_watched(tmp_path: Any) -> None:
    rows = StoredRows(3, torch.float32, tmp_path, torch.device("cpu"))
    rows.append(torch.zeros(2, 3))
    module = nn.Module()
    module.features = rows
    time.sleep(0.05)  # a file system's clock is coarse
    snapshot = Snapshot({"bank": module})
    assert torch.equal(rows[0:2], torch.zeros(2, 3))
    assert snapshot.changes() == []
    rows._rows = 0
    rows.append(torch.ones(2, 3))
    assert snapshot.changes() == ["the file of `bank.features`"]
    assert snapshot.restore() == ["bank.features"]


def test_gradients_of_training_are_put_aside() -> None:
    module = network()
    module(IMAGES).sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    before = [gradient.clone() for gradient in gradients]

    def attack(target: Any, images: Tensor, labels: Tensor) -> Tensor:
        leaf = images.clone().requires_grad_()
        target(leaf).sum().backward()
        target.zero_grad(set_to_none=False)
        return (images + leaf.grad).clamp(0, 1)

    attacked(attack, module)
    for parameter, gradient, kept in zip(module.parameters(), gradients, before, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, kept)


def test_what_a_network_remembers_itself_is_no_damage() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls, self.last, self.temperature = network(), 0, None, 2.0
            self.maps = torch.zeros(1)

        def forward(self, images: Tensor) -> Tensor:
            self.calls, self.last, self.maps = self.calls + 1, tuple(images.shape), images.mean((1, 2, 3))
            return self.inner(images) / self.temperature

    module = Remembers()
    attacked(lambda f, x, y: (f(x), x)[1], module)
    assert module.calls > 0

    def hotter(target: Any, images: Tensor, labels: Tensor) -> Tensor:
        target.temperature = 100.0
        return images

    with pytest.raises(ValueError, match=r"it changed `temperature` from 2\.0 to 100\.0\. Nothing"):
        attacked(hotter, module)
    assert module.temperature == 2.0


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(143), MemoryError(), torch.OutOfMemoryError()]
)
def test_what_is_not_the_attacks_fault_stays_what_it_is(error: BaseException) -> None:
    module = network()

    def attack(target: Any, images: Tensor, labels: Tensor) -> Tensor:
        target[0].weight.data += 1
        raise error

    before = bytes_of(module)
    with pytest.raises(type(error)):
        attacked(attack, module)
    assert bytes_of(module) == before
    assert module.training


def test_an_attack_gets_copies() -> None:
    images, labels = IMAGES.clone(), LABELS.clone()

    def attack(target: Any, images: Tensor, labels: Tensor) -> Tensor:
        labels.zero_()
        return images.zero_()

    assert not evaluation.perturb(attack, network(), images, labels).any()
    assert torch.equal(images, IMAGES)
    assert torch.equal(labels, LABELS)
    victim = dknn()
    assert not evaluation.perturb(attack, victim, images, labels).any()
    assert torch.equal(images, IMAGES)


def test_rounding_is_clipped() -> None:
    found = attacked(lambda f, x, y: torch.ones_like(x) + 5e-7, network())
    assert torch.equal(found, torch.ones_like(IMAGES))
    assert torch.equal(attacked(lambda f, x, y: x.to_sparse(), network()), IMAGES)


def test_works_in_inference_mode() -> None:
    module = network().eval()
    with torch.inference_mode():
        module.register_buffer("made_here", torch.zeros(2))
        with pytest.raises(ValueError, match="`made_here` by up to 1"):
            attacked(lambda f, x, y: (module.made_here.add_(1), x)[1], module)
        assert not module.made_here.any()
