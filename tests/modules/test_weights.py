"""Backbone weights of users, not written by train.py."""

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_advknn.models import LibraryNetwork
from lightning_advknn.modules import BackboneModule, SurrogateModule, load_weights

State = dict[Any, Any]


@pytest.fixture
def weights(small_net: type) -> State:
    """Weights of another such network."""
    torch.manual_seed(1)
    return {name: tensor.clone() for name, tensor in small_net().state_dict().items()}


def load(backbone: BackboneModule, path: Path) -> dict[str, Tensor]:
    load_weights(backbone, path, backbone.identity("Digits"))
    return backbone.network.network.state_dict()


@pytest.mark.parametrize("kind", ["plain", "nested", "safetensors", "half", "old"])
def test_a_state_dict_is_loaded(backbone: BackboneModule, weights: State, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"own.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "half":
        weights = {n: t.half().float() if t.is_floating_point() else t for n, t in weights.items()}
    if kind == "safetensors":
        save_file(weights, path)
    else:
        written = {n: t.half() if t.is_floating_point() and kind == "half" else t for n, t in weights.items()}
        if kind == "old":  # torch before 0.4.1 did not count batches
            del written["norm.num_batches_tracked"]
        torch.save({"state_dict": written, "epoch": 3} if kind == "nested" else written, path)
    loaded = load(backbone, path)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in loaded.values())


class OwnNet(nn.Sequential):
    """A network with a layer ``model``, which is also the name of a `LibraryNetwork`'s inner network."""

    def __init__(self) -> None:
        super().__init__(OrderedDict(flatten=nn.Flatten(), model=nn.Linear(4, 2)))


@pytest.mark.parametrize("whole", [False, True])
def test_a_librarys_network_takes_its_own_names_or_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(nn, "OwnNet", OwnNet, raising=False)
    own, other = (LibraryNetwork("torch.nn.OwnNet", mean=[mean]) for mean in (0.0, 0.5))
    path = tmp_path / "own.pt"
    torch.save((other if whole else other.model).state_dict(), path)
    load(BackboneModule(own, ["model.model"], (1, 2, 2), 2), path)
    assert torch.equal(own.model.model.weight, other.model.model.weight)
    assert own.normalize.mean.item() == (0.5 if whole else 0)


def test_what_trainings_keep_beside_weights_is_no_alternative_to_them(
    backbone: BackboneModule, weights: State, tmp_path: Path
) -> None:
    other = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(other.parameters())
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "own.pt"
    beside = {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "rng": [torch.get_rng_state()],
        "metrics": {"acc": torch.tensor(0.5)},
        "ema": {},
    }
    torch.save({"state_dict": weights, **beside}, path)
    loaded = load(backbone, path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "conv.bias"}, r"it lacks conv\.bias\."),
        (lambda w: w | {"head.bias": torch.ones(1)}, r"it has head\.bias\."),
        (
            lambda w: {f"module.{k}": v for k, v in w.items()},
            r"it lacks conv\.weight, conv\.bias, .* and 3 more; it has module\.conv\.weight.*Without the `module\.` before each name",
        ),
        (
            lambda w: {f"net.module.{k}": v for k, v in w.items()},
            r"Without the `net\.module\.` before each name",
        ),
        (
            lambda w: {f"{part}.{k}": v for k, v in w.items() for part in ("model", "ema")},
            r"below `ema\.` and `model\.` are this network's",
        ),
        (
            lambda w: {"state_dict": w, "state_dict_ema": w},
            r"some under \['state_dict'\], \['state_dict_ema'\]\. Save",
        ),
        (
            lambda w: {"model": w, "optimizer": {"param_groups": [], "state": {0: w}}},
            r"some under \['model'\]\. Save",
        ),
        (lambda w: w | {"epoch": 3}, r"it also has 'epoch', a int"),
        (
            lambda w: w | {"logits.bias": torch.ones(10).to(torch.float8_e5m2)},
            r"`logits\.bias` in .*float8_e5m2",
        ),
        (lambda w: w | {"logits.bias": torch.ones(10).long()}, r"`logits\.bias` in .*int64"),
        (
            lambda w: w | {"logits.bias": torch.ones(9)},
            r"shapes differ: logits\.bias \(9,\) instead of \(10,\)",
        ),
        (lambda w: {"state_dict": w | {"logits.bias": 0.5}}, r"logits\.bias float instead of \(10,\)"),
        (lambda w: {"state_dict": w | {7: torch.ones(1)}}, r"it has 7\."),
        (lambda w: w | {"logits.bias": torch.full((10,), torch.nan)}, r"finite weights.*logits\.bias"),
        (lambda w: {}, r"to hold a `state_dict`, or to be one"),
        (lambda w: [*w.values()], r"to hold a `state_dict`, or to be one"),
    ],
)
def test_what_does_not_fit_is_named(
    backbone: BackboneModule, weights: State, tmp_path: Path, change: Any, message: str
) -> None:
    path = tmp_path / "own.pt"
    torch.save(change(weights), path)
    with pytest.raises(ValueError, match="(?s)" + message) as caught:
        load(backbone, path)
    assert str(path) in str(caught.value)


def test_a_damaged_safetensors_file_is_named(
    backbone: BackboneModule, weights: State, tmp_path: Path
) -> None:
    path = tmp_path / "own.safetensors"
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} to be a whole safetensors file"):
        load(backbone, path)


def test_a_surrogates_own_weights_are_refused(small_net: type, tmp_path: Path) -> None:
    surrogate = SurrogateModule(small_net(), "none.ckpt", "relu")
    path = tmp_path / "own.pt"
    torch.save(surrogate.state_dict(), path)
    with pytest.raises(ValueError, match=r"states no identity\. Only a backbone"):
        load_weights(surrogate, path, surrogate.identity("Digits"))
