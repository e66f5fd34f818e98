"""Checkpoints of train.py: plain types, identity, and weights that fit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn

from lightning_advknn.data import Digits
from lightning_advknn.modules import BackboneModule, SurrogateModule
from lightning_advknn.modules.checkpoint import IDENTITY
from tests.modules.checkpoints import drop, load, put, rewrite, spoil

MakeTrainer = Callable[..., Trainer]


class OtherDigits(Digits):
    """The same images under another name."""


@pytest.fixture(scope="session")
def surrogate_checkpoint(
    small_net: type[nn.Module],
    make_trainer: MakeTrainer,
    backbone_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Checkpoint of a surrogate of the trained backbone, after one epoch."""
    trainer = make_trainer()
    module = SurrogateModule(small_net(), str(backbone_checkpoint), layer="relu", k=6)
    trainer.fit(module, datamodule=Digits(val_size=850))
    path = tmp_path_factory.mktemp("surrogate") / "surrogate.ckpt"
    trainer.save_checkpoint(path)
    return path


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(plain(key) and plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.Tensor)


@pytest.mark.parametrize("kind", ["backbone_checkpoint", "surrogate_checkpoint"])
def test_checkpoints_hold_plain_types_and_say_what_they_are(
    request: pytest.FixtureRequest, kind: str
) -> None:
    checkpoint = torch.load(request.getfixturevalue(kind), weights_only=True)
    assert plain(checkpoint["hyper_parameters"])
    assert plain(checkpoint[IDENTITY])
    assert checkpoint[IDENTITY]["kind"] == kind.removesuffix("_checkpoint")
    assert checkpoint[IDENTITY]["network"].endswith("conftest.SmallNet")
    assert checkpoint[IDENTITY]["data"] == "Digits"


def test_loading_gives_the_weights_that_were_saved(
    backbone: BackboneModule, backbone_checkpoint: Path
) -> None:
    load(backbone, backbone_checkpoint)
    saved = torch.load(backbone_checkpoint, weights_only=True)["state_dict"]
    assert saved.keys() == backbone.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in backbone.state_dict().items())
    assert saved["network.network.norm.num_batches_tracked"] == 10  # two epochs of five batches


def sequential(network: nn.Module) -> nn.Module:
    """The same layers in another class."""
    other = nn.Sequential()
    for name, module in network.named_children():
        other.add_module(name, module)
    return other


@pytest.mark.parametrize(
    ("make", "data_name", "difference"),
    [
        (
            lambda net: BackboneModule(sequential(net()), ["relu"]),
            "Digits",
            r"its network is '.*\.SmallNet', not 'torch\.nn\.modules\.container\.Sequential'",
        ),
        (lambda net: BackboneModule(net(), ["relu"]), "MNIST", r"its data is 'Digits', not 'MNIST'"),
        (
            lambda net: BackboneModule(net(7), ["relu"], num_classes=7),
            "Digits",
            r"its num_classes is 10, not 7",
        ),
        (
            lambda net: BackboneModule(net(), ["relu"], (1, 30, 30)),
            "Digits",
            r"its image_shape is \[1, 28, 28\], not \[1, 30, 30\]",
        ),
        (
            lambda net: BackboneModule(net(7), ["relu"], (1, 30, 30), 7),
            "SVHN",
            r"its data is .*; its image_shape is .*; its num_classes is 10, not 7",
        ),
    ],
    ids=["network", "data", "classes", "shape", "several"],
)
def test_a_backbone_of_something_else_is_refused_with_what_differs(
    backbone_checkpoint: Path,
    small_net: type[nn.Module],
    make: Callable[[type[nn.Module]], BackboneModule],
    data_name: str,
    difference: str,
) -> None:
    module = make(small_net)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=difference) as caught:
        load(module, backbone_checkpoint, data_name)
    assert str(backbone_checkpoint) in str(caught.value)
    assert "Use the checkpoint's own configuration, or train a new one." in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_surrogate_is_no_backbone(backbone: BackboneModule, surrogate_checkpoint: Path) -> None:
    with pytest.raises(
        ValueError, match=r"its kind is 'surrogate', not 'backbone'.*Use the checkpoint's own"
    ):
        load(backbone, surrogate_checkpoint)


def test_a_surrogates_backbone_must_fit_its_data(
    small_net: type[nn.Module], make_trainer: MakeTrainer, backbone_checkpoint: Path
) -> None:
    module = SurrogateModule(small_net(), str(backbone_checkpoint), layer="relu", k=6)
    with pytest.raises(ValueError, match=r"its data is 'Digits', not 'OtherDigits'"):
        make_trainer().validate(module, datamodule=OtherDigits(val_size=850))


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"seed": 1}, r"its backbone is '[0-9a-f]+', not '[0-9a-f]+'"),
        ({"k": 5}, r"its k is 6, not 5"),
        ({"metric": "euclidean"}, r"its metric is 'cosine', not 'euclidean'"),
        ({"layer": "norm"}, r"its layer is 'relu', not 'norm'"),
    ],
    ids=["backbone", "k", "metric", "layer"],
)
def test_a_surrogate_of_something_else_is_refused_with_what_differs(
    small_net: type[nn.Module],
    make_trainer: MakeTrainer,
    make_backbone: Callable[[int], Path],
    backbone_checkpoint: Path,
    surrogate_checkpoint: Path,
    stage: str,
    arguments: dict[str, Any],
    difference: str,
) -> None:
    arguments = {"layer": "relu", "k": 6, **arguments}
    path = make_backbone(arguments.pop("seed")) if "seed" in arguments else backbone_checkpoint
    module = SurrogateModule(small_net(), str(path), **arguments)
    with pytest.raises(ValueError, match=difference + r".*Use the checkpoint's own configuration"):
        getattr(make_trainer(), stage)(
            module, datamodule=Digits(val_size=850), ckpt_path=surrogate_checkpoint, weights_only=True
        )


def test_a_surrogate_continues_from_its_own_checkpoint(
    small_net: type[nn.Module],
    make_trainer: MakeTrainer,
    backbone_checkpoint: Path,
    surrogate_checkpoint: Path,
) -> None:
    module = SurrogateModule(small_net(), str(backbone_checkpoint), layer="relu", k=6)
    make_trainer().validate(
        module,
        datamodule=Digits(val_size=850),
        ckpt_path=surrogate_checkpoint,
        weights_only=True,
        verbose=False,
    )
    saved = torch.load(surrogate_checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(module.surrogate.dknnb.weight, saved["surrogate.dknnb.weight"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("state_dict"), r"to hold a `state_dict`"),
        (put(3, "state_dict"), r"to hold a `state_dict`"),
        (drop(IDENTITY), r"it lacks conv\.weight.*it has network\.network\.conv\.weight"),
        (put("backbone", IDENTITY), r"written by this project's train\.py"),
        (drop(IDENTITY, "data"), r"its data is None, not 'Digits'"),
        (drop("state_dict", "network.network.conv.bias"), r"Missing key.*network\.conv\.bias"),
        (put(torch.ones(1), "state_dict", "surplus"), r"Unexpected key.*surplus"),
        (put(torch.ones(1), "state_dict", 7), r"fit BackboneModule"),
        (put(0.5, "state_dict", "network.network.logits.bias"), r"network\.logits\.bias"),
        (put(torch.ones(9), "state_dict", "network.network.logits.bias"), r"size mismatch.*logits\.bias"),
        (
            spoil("network.network.conv.weight", torch.nan),
            r"finite weights, but `network\.network\.conv\.weight`.*Train it again",
        ),
        (
            spoil("network.network.norm.running_var", torch.inf),
            r"finite weights, but `network\.network\.norm\.running_var`",
        ),
    ],
    ids=[
        "no state_dict",
        "number as state_dict",
        "no identity",
        "text as identity",
        "no data set",
        "missing key",
        "extra key",
        "key that is no text",
        "weight that is no tensor",
        "shape",
        "NaN",
        "infinite buffer",
    ],
)
def test_a_checkpoint_with_wrong_contents_is_refused(
    backbone: BackboneModule,
    backbone_checkpoint: Path,
    tmp_path: Path,
    edit: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    path = rewrite(backbone_checkpoint, tmp_path / "wrong.ckpt", edit)
    with pytest.raises(ValueError, match="(?s)" + message) as caught:
        load(backbone, path)
    assert "wrong.ckpt" in str(caught.value)
