"""Checkpoints that are damaged, unsafe or of something else are refused with words; sound ones hold plain types."""

import copy
import errno
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn

from lightning_advknn.data import Digits
from lightning_advknn.modules import BackboneModule, SurrogateModule, load_weights
from lightning_advknn.modules.checkpoint import IDENTITY, AtomicCheckpointIO, read_checkpoint

MakeTrainer = Callable[..., Trainer]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


class OtherDigits(Digits):
    """The same images under another name."""


@pytest.fixture
def backbone(small_net: type[nn.Module]) -> BackboneModule:
    return BackboneModule(small_net(), ["relu"])


@pytest.fixture(scope="session")
def surrogate_checkpoint(
    small_net: type[nn.Module],
    make_trainer: MakeTrainer,
    backbone_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Of a surrogate of the trained backbone, after one epoch."""
    trainer = make_trainer()
    module = SurrogateModule(small_net(), str(backbone_checkpoint), layer="relu", k=6)
    trainer.fit(module, datamodule=Digits(val_size=850))
    path = tmp_path_factory.mktemp("surrogate") / "surrogate.ckpt"
    trainer.save_checkpoint(path)
    return path


def load(module: BackboneModule, path: Path, data_name: str = "Digits") -> None:
    load_weights(module, path, module.identity(data_name))


def rewrite(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Save an edited copy of a checkpoint."""
    checkpoint = torch.load(source, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, target)
    return target


def put(value: Any, *keys: Any) -> Callable[[dict[str, Any]], None]:
    """Edit that sets a value."""

    def edit(checkpoint: dict[str, Any]) -> None:
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        checkpoint[keys[-1]] = value

    return edit


def drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Edit that removes a key."""

    def edit(checkpoint: dict[str, Any]) -> None:
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        del checkpoint[keys[-1]]

    return edit


def spoil(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    """Edit that replaces one number of a weight."""

    def edit(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][name].view(-1)[-1] = value

    return edit


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


@pytest.mark.parametrize("place", ["state_dict", IDENTITY, "hyper_parameters", "extra"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(
    backbone: BackboneModule, backbone_checkpoint: Path, tmp_path: Path, place: str, zipped: bool
) -> None:
    target, path = tmp_path / "it ran", tmp_path / "bomb.ckpt"
    checkpoint = torch.load(backbone_checkpoint, weights_only=True)
    checkpoint[place] = Bomb(target)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bomb\.ckpt.*would run code.*a source you trust"):
        load(backbone, path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the bomb is live
    assert target.exists()


def test_a_bare_pickle_is_refused_and_does_not_run(
    backbone: BackboneModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The variable with which users of torch switch its caution off for code that does not say what it wants.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target, path = tmp_path / "it ran", tmp_path / "bomb.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Bomb(target)}, protocol=2))
    with pytest.raises(ValueError, match=r"would run code"):
        load(backbone, path)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()


def test_a_trainer_given_code_as_ckpt_path_does_not_run_it(
    backbone: BackboneModule, make_trainer: MakeTrainer, backbone_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "it ran"
    path = rewrite(backbone_checkpoint, tmp_path / "bomb.ckpt", put(Bomb(target), "extra"))
    with pytest.raises(pickle.UnpicklingError):
        make_trainer().validate(backbone, datamodule=Digits(val_size=850), ckpt_path=path)
    assert not target.exists()


@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.99, 0.9999])
def test_a_truncated_file_is_refused(
    backbone: BackboneModule, backbone_checkpoint: Path, tmp_path: Path, part: float
) -> None:
    content = backbone_checkpoint.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"Expected .*cut\.ckpt"):
        load(backbone, path)


def test_every_flipped_number_is_found(tmp_path: Path) -> None:
    # Each byte of each tensor; torch.load itself would not notice one.
    path = tmp_path / "flipped.ckpt"
    torch.save({"state_dict": {"a": torch.arange(64.0), "b": torch.ones(3, dtype=torch.int64)}}, path)
    whole = bytearray(path.read_bytes())
    for tensor in (torch.arange(64.0), torch.ones(3, dtype=torch.int64)):
        content = tensor.numpy().tobytes()
        start = whole.index(content)
        for position in range(start, start + len(content)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            assert not torch.equal(
                torch.cat([v.double() for v in torch.load(path)["state_dict"].values()]),
                torch.cat([torch.arange(64.0).double(), torch.ones(3).double()]),
            )
            with pytest.raises(ValueError, match=r"Expected .*flipped\.ckpt to be as it was written"):
                read_checkpoint(path)
    path.write_bytes(whole)
    assert read_checkpoint(path)["state_dict"]["a"][63] == 63


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello, no checkpoint\n",
        b"seed_everything: 0\nmodel:\n",
        b"\x89PNG\r\n\x1a\n",
        b"PK\x03\x04" + b"\x00" * 100,
        b"\x80\x02.",
        pickle.dumps([1, 2, 3], 2),
    ],
    ids=["empty", "newline", "text", "yaml", "image", "zip", "pickle", "list"],
)
def test_what_is_no_checkpoint_is_refused(backbone: BackboneModule, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected .*odd\.ckpt"):
        load(backbone, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, of random bytes
def test_random_and_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "noise.ckpt"
    refused = []
    for zipped in (True, False):
        buffer = io.BytesIO()
        content = {"state_dict": {"a": torch.ones(3)}, "x": [1]}
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        for _ in range(100):
            damaged = bytearray(buffer.getvalue())
            damaged[rng.integers(len(damaged))] = rng.integers(256)
            cut = rng.integers(1, len(damaged))
            for noise in (damaged, damaged[:cut], rng.bytes(rng.choice([1, 8, 300]))):
                path.write_bytes(noise)
                try:
                    read_checkpoint(path)  # damage to a tensor's numbers does not show
                except ValueError as error:
                    refused.append(str(error))
    assert len(refused) > 300
    assert all(str(path) in message for message in refused)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_no_file_is_refused_with_the_way_to_make_one(
    backbone: BackboneModule, tmp_path: Path, kind: str
) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "none.ckpt"
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(path))}.*train\.py fit"):
        load(backbone, path)


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


def test_a_full_disk_leaves_the_checkpoint_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writer = tmp_path / "checkpoints" / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"epoch": 1}, path)

    def half(self: Path, content: Any) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left"):
            writer.save_checkpoint({"epoch": 2}, path)
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"epoch": 1}


def test_places_that_are_no_paths_are_left_to_lightning() -> None:
    fsspec.filesystem("memory").rm("/", recursive=True)
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, "memory://folder/last.ckpt")
    assert fsspec.filesystem("memory").exists("/folder/last.ckpt")
