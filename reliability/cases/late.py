"""What was found late, in raw words or not at all: precisions, labels, numbers, weights, and torch's own settings."""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_advknn.attacks import AttackSettings, bim, fgsm, sitawarin_wagner_linf
from lightning_advknn.callbacks import AttackEvaluation
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch, Digits
from lightning_advknn.data.base import ImageDataModule
from lightning_advknn.evaluation import judge, make_rows
from lightning_advknn.experiment.settings import Experiment, VictimSettings
from lightning_advknn.functional import knn_prediction, l2_distortion
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.modules import BackboneModule, SurrogateModule
from lightning_advknn.modules.checkpoint import load_weights
from lightning_advknn.search import MemoryBank
from lightning_advknn.search.build import build_banks
from reliability.case import Case, Outcome, evaluate, small_experiment, train
from reliability.networks import Small

N, CLASSES, SHAPE = 24, 3, (3, 4, 4)


class MakesDoubles(Small):
    """A network of one's own that changes torch's default dtype as it is made."""

    def __init__(self, num_classes: int = 4) -> None:
        torch.set_default_dtype(torch.float64)
        super().__init__(num_classes)


class OwnData(ImageDataModule):
    """A data module of one's own.

    Args:
        convert: Makes what `load` gives of int64 labels.
    """

    image_shape = SHAPE
    num_classes = CLASSES

    def __init__(self, convert: Callable[[Tensor], Any]) -> None:
        super().__init__(val_size=6, calibration_per_class=2)
        self.name, self._convert = "own", convert

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """24 images of 3 classes."""
        images = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(int(train)))
        return (images * 255).byte(), self._convert(_labels())


class Spy(nn.Linear):
    """Remembers in what arithmetic it ran."""

    seen: str = ""

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        self.seen = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]  # made when imported
        return super().forward(features)


def _labels() -> Tensor:
    return torch.arange(N) % CLASSES


def _images() -> Tensor:
    return torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(0))


def _network() -> FeatureNetwork:
    torch.manual_seed(0)
    layers = OrderedDict(
        flatten=nn.Flatten(), hidden=nn.Linear(48, 16), relu=nn.ReLU(), logits=Spy(16, CLASSES)
    )
    return FeatureNetwork(nn.Sequential(layers), ["relu", "logits"]).eval()


def _victim(k: Any = 5, labels: Any = None, images: Any = None) -> DkNN:
    network = _network()
    batch = Batch(
        _images() if images is None else images, _labels() if labels is None else labels, torch.arange(N)
    )
    dknn = DkNN.on_banks(network, build_banks(network, [batch], CLASSES), k)
    dknn.calibrate([batch])
    return dknn


def _refused(work: Callable[[], Any], *words: str) -> Outcome:
    """The outcome where a ValueError with these words is right."""
    try:
        found = work()
    except ValueError as error:
        return Outcome(f"ValueError: {error}", all(word in str(error) for word in words))
    return Outcome(f"no error, but {str(found)[:100]}", False)


def _equal(found: Tensor, expected: Tensor, what: str) -> Outcome:
    return Outcome(
        f"{what} {'as' if torch.equal(found, expected) else 'not as'} expected", torch.equal(found, expected)
    )


@contextmanager
def _defaults() -> Iterator[None]:
    """Restore torch's settings, whatever is done to them."""
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("cpu")
        torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")


# Precisions


def _callback(**settings: Any) -> dict[str, Any]:
    own = {
        "attacks": {"fgsm": {"function": "fgsm", "settings": {"eps": 0.1}}},
        "layer": "model.relu2",
        "k": 5,
    }
    sizes = {"num_images": 8, "num_calibration": 8, "bank_size": 60}
    return {
        "class_path": "lightning_advknn.callbacks.AttackEvaluation",
        "init_args": {**own, **sizes, **settings},
    }


def _train(precision: str, measured: bool, folder: Path) -> Outcome:
    small_experiment(folder, backbone={"trainer.precision": precision, "trainer.max_epochs": 1})
    more = [f"--trainer.callbacks+={_callback()}"] if measured else []
    return train(folder, "fit", "--config=backbone.yaml", "--trainer.accelerator=cpu", *more).refused(
        "`precision`", precision, "bf16-mixed"
    )


def _evaluate_half(folder: Path) -> Outcome:
    small_experiment(folder, surrogate={"trainer.precision": "bf16-true"})
    return evaluate(folder).refused("`precision`", "bf16-true")


def _trainer_half(folder: Path) -> Outcome:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(precision="16-true", accelerator="cpu", default_root_dir=folder, **quiet)
    module = BackboneModule(_digits_network(), ["relu", "logits"])
    return _refused(lambda: trainer.fit(module, datamodule=Digits()), "`precision`", "16-true")


def _digits_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(flatten=nn.Flatten(), hidden=nn.Linear(784, 16), relu=nn.ReLU(), logits=nn.Linear(16, 10))
    )


def _mixed(precision: str, folder: Path) -> Outcome:
    found = []
    for each in ("32-true", precision):
        attacks = {"fgsm": AttackSettings("fgsm", {"eps": 0.05})}
        layers = ["relu", "logits"]
        measure = AttackEvaluation(
            attacks, "relu", layers, 5, num_images=16, num_calibration=20, bank_size=200
        )
        quiet: dict[str, Any] = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        trainer = Trainer(
            precision=each, accelerator="cpu", callbacks=[measure], default_root_dir=folder, **quiet
        )
        module = BackboneModule(_digits_network(), layers)
        found.append(trainer.validate(module, datamodule=Digits(), verbose=False)[0])
    differ = [name for name in found[0] if found[0][name] != found[1][name]]
    return Outcome(f"{len(found[0])} metrics, other than in float32: {differ}", not differ)


# Labels and images


def _load(convert: Callable[[Tensor], Any], folder: Path) -> Outcome:
    same = OwnData(convert).fingerprint == OwnData(lambda labels: labels).fingerprint
    return Outcome(f"data {'as' if same else 'not as'} of int64 labels", same)


def _load_refused(convert: Callable[[Tensor], Any], words: tuple[str, ...], folder: Path) -> Outcome:
    return _refused(OwnData(convert).setup, *words)


def _attack_labels(labels: Any, words: tuple[str, ...], folder: Path) -> Outcome:
    return _refused(lambda: fgsm(_network(), _images(), labels, eps=0.1), *words)


def _bank_labels(labels: Any, words: tuple[str, ...], folder: Path) -> Outcome:
    return _refused(lambda: MemoryBank(_images().flatten(1), labels, torch.arange(N), CLASSES), *words)


def _victim_labels(labels: Any, words: tuple[str, ...], folder: Path) -> Outcome:
    return _refused(lambda: _victim(labels=labels), *words)


def _victim_attack(labels: Tensor, words: tuple[str, ...], folder: Path) -> Outcome:
    attack = partial(sitawarin_wagner_linf, _victim(), eps=0.1, steps=1)
    return _refused(lambda: attack(_images(), labels), *words)


def _split(folder: Path) -> Outcome:
    sizes = {"val_size": np.int64(100), "split_seed": np.int64(1)}
    found, expected = Digits(**sizes), Digits(val_size=100, split_seed=1)
    found.share(Digits(val_size=150, split_seed=1))  # made otherwise: nothing is taken over
    return _equal(found.split("val").ids, expected.split("val").ids, "validation images")


def _rows(folder: Path) -> Outcome:
    victim, images = _victim(), _images()
    verdicts = judge(victim, "relu", images)
    return _refused(
        lambda: make_rows(torch.arange(N), _labels() + 1, images, images, verdicts, verdicts), "[0, 2]"
    )


def _asked(convert: Callable[[Tensor], Any], words: tuple[str, ...], folder: Path) -> Outcome:
    victim, images = _victim(), convert(_images())
    outcomes = [
        _refused(partial(ask, images), *words)
        for ask in (victim, partial(judge, victim, "relu"), victim.only("relu"))
    ]
    return Outcome(outcomes[0].words, all(outcome.ok for outcome in outcomes))


def _double(folder: Path) -> Outcome:
    victim, images = _victim(), _images()
    return _equal(victim(images.double()), victim(images), "vote shares")


# Numbers


def _numpy_k(folder: Path) -> Outcome:
    return _equal(_victim(np.int64(5))(_images()), _victim(5)(_images()), "predictions")


def _numpy_checkpoint(folder: Path) -> Outcome:
    module = SurrogateModule(
        _digits_network(),
        "none.ckpt",
        "relu",
        image_shape=np.array([1, 28, 28]),  # type: ignore[arg-type]
        num_classes=np.int64(10),  # type: ignore[arg-type]
        k=np.int64(5),  # type: ignore[arg-type]
        learning_rate=np.float64(1e-3),
    )
    torch.save(dict(module.hparams), folder / "hparams.pt")
    loaded = torch.load(folder / "hparams.pt", weights_only=True)
    return Outcome(f"loads: k = {loaded['k']}", loaded["k"] == 5)


def _wrong_k(k: Any, folder: Path) -> Outcome:
    return _refused(lambda: _victim(k), "`k`", "whole number")


def _numpy_experiment(folder: Path) -> Outcome:
    victim = VictimSettings(k=np.int64(5))  # type: ignore[arg-type]
    found = Experiment(None, {}, {}, victim, images=np.int64(12), seed=np.int64(3))  # type: ignore[arg-type]
    kept = json.dumps([found.victim.k, found.images, found.seed])  # as keys and results keep them
    return Outcome(kept, kept == "[5, 12, 3]")


def _eps(folder: Path) -> Outcome:
    attacked = [fgsm(_network(), _images(), _labels(), eps=eps) for eps in (np.float32(0.25), 0.25)]
    return _equal(*attacked, "adversarials")


def _settings(settings: Mapping[str, Any], words: tuple[str, ...], folder: Path) -> Outcome:
    return _refused(lambda: bim(_network(), _images(), _labels(), **settings), *words)


def _option(option: str, folder: Path) -> Outcome:
    small_experiment(folder)
    return evaluate(folder, option).refused(option.removeprefix("--").partition("=")[0].rpartition(".")[2])


def _votes(folder: Path) -> Outcome:
    # By hand: 26 is most; in bytes, 26 * 10 would be 4.
    votes = torch.tensor([[24, 26, 0, 0, 0, 0, 0, 0, 0, 25]], dtype=torch.uint8)
    return _equal(knn_prediction(votes), torch.tensor([1]), "the class with most votes")


# Weights


def _weights(change: Callable[[dict[str, Tensor]], Any], words: tuple[str, ...], folder: Path) -> Outcome:
    module = BackboneModule(_digits_network(), ["relu", "logits"])
    torch.save(change(_digits_network().state_dict()), folder / "own.pt")
    return _refused(lambda: load_weights(module, folder / "own.pt", module.identity("Digits")), *words)


def _half_weights(dtype: torch.dtype, folder: Path) -> Outcome:
    module = BackboneModule(_digits_network(), ["relu", "logits"])
    written = {name: tensor.to(dtype) for name, tensor in _digits_network().state_dict().items()}
    save_file(written, folder / "own.safetensors")
    load_weights(module, folder / "own.safetensors", module.identity("Digits"))
    loaded = module.network.network.state_dict()
    same = all(torch.equal(loaded[name], tensor.float()) for name, tensor in written.items())
    return Outcome(f"loaded {'exactly' if same else 'otherwise'}", same)


def _given(change: Callable[[dict[str, Tensor]], Any], words: tuple[str, ...], folder: Path) -> Outcome:
    """The same by ``attack.py --backbone.checkpoint``."""
    small_experiment(folder)
    torch.save(change(Small().state_dict()), folder / "own.pt")
    return evaluate(folder, "--backbone.checkpoint=own.pt").refused(*words)


# Settings of torch


def _default_dtype(dtype: torch.dtype, folder: Path) -> Outcome:
    small_experiment(folder)
    with _defaults():
        torch.set_default_dtype(dtype)
        return evaluate(folder).refused("default dtype", str(dtype))


def _network_makes_doubles(folder: Path) -> Outcome:
    function = f"{__name__}.MakesDoubles"
    small_experiment(folder, network={"init_args.function": function})
    with _defaults():
        return evaluate(folder).refused("default dtype", "float64")


def _default_device(folder: Path) -> Outcome:
    victim, images = _victim(), _images()
    with _defaults():
        torch.set_default_device("meta")
        return _refused(lambda: victim.predict(images), "default device", "meta")


def _autocast_votes(folder: Path) -> Outcome:
    victim, images = _victim(), _images()
    seen: list[torch.dtype] = []
    layer = victim.network.network.get_submodule("hidden")
    layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        judge(victim, "relu", images)
        victim.predict(images)
        victim.calibrate([Batch(images, _labels(), torch.arange(N))])
        build_banks(victim.network, [Batch(images, _labels(), torch.arange(N))], CLASSES)
    return Outcome(f"the network ran in {set(seen)}", set(seen) == {torch.float32})


def _autocast_attack(folder: Path) -> Outcome:
    with torch.autocast("cpu", torch.bfloat16):
        return _refused(lambda: fgsm(_network(), _images(), _labels(), eps=0.1), "autocast")


def _inside(context: Callable[[], Any], folder: Path) -> Outcome:
    run = partial(bim, _network(), eps=0.1, step_size=0.02, steps=5)
    expected = run(_images(), _labels())
    with context():
        found = run(_images(), _labels())
    return _equal(found, expected, "adversarials")


def _matmul(folder: Path) -> Outcome:
    victim = _victim()
    with _defaults():
        torch.set_float32_matmul_precision("medium")
        victim.predict(_images())
        kept = torch.get_float32_matmul_precision()
    seen = victim.network.network.get_submodule("logits").seen
    return Outcome(f"the network ran in {seen}, {kept!r} is kept", (seen, kept) == ("ieee", "medium"))


# Sizes


def _empty(what: str, folder: Path) -> Outcome:
    victim = _victim()
    work = {
        "calibration": lambda: victim.calibrate([]),
        "bank": lambda: build_banks(victim.network, [], CLASSES),
    }
    return _refused(work[what], "Expected", "images", "got none")


def _pairs(folder: Path) -> Outcome:
    return _refused(lambda: _victim().calibrate([(_images(), _labels())]), "Batch", "tuple")  # type: ignore[list-item]


def _shapes(folder: Path) -> Outcome:
    return _refused(lambda: l2_distortion(_images()[:, :1], _images()), "one shape")


def _one_class(folder: Path) -> Outcome:
    victim = _victim(labels=torch.ones(N).long())
    return _equal(victim.predict(_images()), torch.ones(N).long(), "predictions")


_AS_INTEGERS = "The data of int64 labels."
_SAID = "An error that says what to do."
_BEFORE = "Refused before long work."
_RIGHT = "As without."

CASES = [
    Case(
        "late-bf16-true",
        "train.py with AttackEvaluation and `trainer.precision: bf16-true`.",
        _BEFORE,
        partial(_train, "bf16-true", True),
    ),
    Case(
        "late-16-true",
        "train.py with AttackEvaluation and `trainer.precision: 16-true`.",
        _BEFORE,
        partial(_train, "16-true", True),
    ),
    Case("late-64-true", "train.py with `trainer.precision: 64-true`.", _BEFORE, partial(_train, "64-true", False)),
    Case("late-bf16-true-surrogate", "attack.py with a surrogate to be trained in bf16-true.", _BEFORE, _evaluate_half),
    Case("late-16-true-python", "A Trainer of Python with precision 16-true.", _BEFORE, _trainer_half),
    Case(
        "late-bf16-mixed",
        "AttackEvaluation and validation under bf16-mixed.",
        "Metrics as in float32.",
        partial(_mixed, "bf16-mixed"),
    ),
    Case(
        "late-16-mixed",
        "AttackEvaluation and validation under 16-mixed.",
        "Metrics as in float32.",
        partial(_mixed, "16-mixed"),
    ),
    Case("late-labels-int32", "A data module of one's own gives int32 labels.", _AS_INTEGERS, partial(_load, Tensor.int)),
    Case("late-labels-uint8", "A data module of one's own gives uint8 labels.", _AS_INTEGERS, partial(_load, Tensor.byte)),
    Case(
        "late-labels-float",
        "A data module of one's own gives whole numbers as floats.",
        _SAID,
        partial(_load_refused, Tensor.float, (".long()",)),
    ),
    Case(
        "late-labels-one-hot",
        "A data module of one's own gives one-hot labels.",
        _SAID,
        partial(_load_refused, nn.functional.one_hot, ("argmax(1)",)),
    ),
    Case(
        "late-labels-numpy",
        "A data module of one's own gives a NumPy array of labels.",
        _SAID,
        partial(_load_refused, Tensor.numpy, ("torch.as_tensor",)),
    ),
    Case(
        "late-labels-column",
        "An attack with labels (n, 1).",
        _SAID,
        partial(_attack_labels, _labels()[:, None], ("squeeze(1)",)),
    ),
    Case(
        "late-labels-list",
        "An attack with a list of labels.",
        _SAID,
        partial(_attack_labels, _labels().tolist(), ("torch.as_tensor",)),
    ),
    Case(
        "late-labels-ignored",
        "An attack with labels -100, which cross-entropy leaves out: no gradient.",
        _SAID,
        partial(_attack_labels, torch.full((N,), -100), ("at least 0", "-100")),
    ),
    Case(
        "late-labels-too-high",
        "An attack with a label beyond the logits' classes.",
        _SAID,
        partial(_attack_labels, torch.full((N,), CLASSES), ("[0, 2]",)),
    ),
    Case("late-labels-bank", "A MemoryBank of int32 labels.", _SAID, partial(_bank_labels, _labels().int(), (".long()",))),
    Case(
        "late-labels-bank-numpy",
        "A MemoryBank of NumPy labels.",
        _SAID,
        partial(_bank_labels, _labels().numpy(), ("torch.as_tensor",)),
    ),
    Case(
        "late-labels-victim",
        "A bank and calibration of fractions as labels.",
        _SAID,
        partial(_victim_labels, _labels() + 0.7, (".long()",)),
    ),
    Case("late-labels-from-one", "Rows of labels that count from 1.", _SAID, _rows),
    Case("late-images-numpy", "A victim asked about a NumPy array.", _SAID, partial(_asked, Tensor.numpy, ("torch.as_tensor",))),
    Case("late-images-double", "A victim asked about float64 images.", "The answer on them as stored, in float32.", _double),
    Case(
        "late-images-bytes",
        "A victim asked about uint8 images.",
        _SAID,
        partial(_asked, lambda images: (images * 255).byte(), ("255",)),
    ),
    Case(
        "late-images-nhwc",
        "A victim that flattens asked about images with channels last.",
        _SAID,
        partial(_asked, lambda images: images.movedim(1, -1), ("(B, 3, 4, 4)",)),
    ),
    Case(
        "late-images-one",
        "A victim asked about one image without a batch.",
        _SAID,
        partial(_asked, lambda images: images[0], ("(B, 3, 4, 4)",)),
    ),
    Case("late-k-numpy", "k is NumPy's integer.", _RIGHT, _numpy_k),
    Case("late-hparams-numpy", "A module's arguments are NumPy's numbers.", "Its checkpoint loads.", _numpy_checkpoint),
    Case(
        "late-labels-victims-attack",
        "An attack on a victim with labels that it does not know.",
        _SAID,
        partial(_victim_attack, torch.full((N,), 9), ("[0, 2]",)),
    ),
    Case("late-split-numpy", "Sizes and seeds of a split are NumPy's integers.", "The splits of Python's.", _split),
    Case("late-experiment-numpy", "k, images and seed of an Experiment are NumPy's.", _RIGHT, _numpy_experiment),
    Case(
        "late-images-float",
        "images of an Experiment is 10.0.",
        _SAID,
        lambda _: _refused(lambda: Experiment(None, {}, {}, images=10.0), "`images`", "whole number"),  # type: ignore[arg-type]
    ),
    Case("late-k-float", "k is 5.0.", _SAID, partial(_wrong_k, 5.0)),
    Case("late-k-bool", "k is True.", _SAID, partial(_wrong_k, True)),
    Case("late-k-numpy-bool", "k is NumPy's True.", _SAID, partial(_wrong_k, np.True_)),
    Case("late-option-k-bool", "attack.py --victim.k true.", _BEFORE, partial(_option, "--victim.k=true")),
    Case("late-option-k-float", "attack.py --victim.k 5.0.", _BEFORE, partial(_option, "--victim.k=5.0")),
    Case(
        "late-option-layers-twice",
        "attack.py with a layer twice in victim.layers.",
        _BEFORE,
        partial(_option, "--victim.layers=[model.relu2,model.relu2]"),
    ),
    Case("late-eps-numpy", "eps is NumPy's float32.", _RIGHT, _eps),
    Case(
        "late-eps-bool",
        "eps is True.",
        _SAID,
        partial(_settings, {"eps": True, "step_size": 0.1, "steps": 1}, ("`eps`", "one number")),
    ),
    Case(
        "late-eps-array",
        "eps is an array.",
        _SAID,
        partial(_settings, {"eps": np.array(0.1), "step_size": 0.1, "steps": 1}, ("`eps`", "one number")),
    ),
    Case("late-votes-bytes", "Votes in uint8.", "The class with most.", _votes),
    Case(
        "late-weights-int8",
        "A state dict of int8 weights.",
        _SAID,
        partial(_weights, lambda w: {n: (100 * t).to(torch.int8) for n, t in w.items()}, ("int8", "dequantised")),
    ),
    Case(
        "late-weights-bool",
        "A state dict with a boolean mask for weights.",
        _SAID,
        partial(_weights, lambda w: w | {"hidden.weight": w["hidden.weight"] > 0}, ("hidden.weight", "torch.bool")),
    ),
    Case(
        "late-weights-complex",
        "A state dict of complex weights.",
        _SAID,
        partial(_weights, lambda w: {n: t * 1j for n, t in w.items()}, ("complex64",)),
    ),
    Case(
        "late-weights-meta",
        "A state dict without values.",
        _SAID,
        partial(_weights, lambda w: {n: t.to("meta") for n, t in w.items()}, ("no values",)),
    ),
    Case(
        "late-weights-half", "Weights as float16 in safetensors.", "Loaded exactly.", partial(_half_weights, torch.float16)
    ),
    Case(
        "late-weights-bfloat16",
        "Weights as bfloat16 in safetensors.",
        "Loaded exactly.",
        partial(_half_weights, torch.bfloat16),
    ),
    Case(
        "late-state-dict-ema",
        "attack.py with a checkpoint of `state_dict` and `state_dict_ema`.",
        _BEFORE,
        partial(_given, lambda w: {"state_dict": w, "state_dict_ema": w}, ("['state_dict']", "['state_dict_ema']")),
    ),
    Case(
        "late-model-ema",
        "A checkpoint of `model` and `model_ema`.",
        _SAID,
        partial(_weights, lambda w: {"model": w, "model_ema": w, "epoch": 3}, ("['model']", "['model_ema']")),
    ),
    Case(
        "late-ema-nested",
        "A checkpoint with averaged weights deeper down, as a list.",
        _SAID,
        partial(
            _weights,
            lambda w: {"state_dict": w, "ema": {"decay": 0.99, "shadow": [*w.values()]}},
            ("['ema']['shadow']",),
        ),
    ),
    Case(
        "late-module-prefix",
        "attack.py with weights of a DataParallel module.",
        _BEFORE,
        partial(_given, lambda w: {f"module.{n}": t for n, t in w.items()}, ("Without the `module.`",)),
    ),
    Case(
        "late-ema-flat",
        "A state dict of `online.` and `ema.` weights.",
        _SAID,
        partial(
            _weights,
            lambda w: {f"{part}.{n}": t for n, t in w.items() for part in ("online", "ema")},
            ("`ema.` and `online.`",),
        ),
    ),
    Case(
        "late-entries",
        "A state dict with an epoch among the weights.",
        _SAID,
        partial(_weights, lambda w: w | {"epoch": 3}, ("'epoch', a int",)),
    ),
    Case("late-float64", "torch.set_default_dtype(float64), then attack.py.", _BEFORE, partial(_default_dtype, torch.float64)),
    Case("late-bfloat16", "torch.set_default_dtype(bfloat16), then attack.py.", _BEFORE, partial(_default_dtype, torch.bfloat16)),
    Case("late-float64-network", "A network of one's own sets the default dtype.", _BEFORE, _network_makes_doubles),
    Case("late-device", "torch.set_default_device('meta').", _SAID, _default_device),
    Case("late-autocast", "Victims asked under autocast.", "Their network runs in float32.", _autocast_votes),
    Case("late-autocast-attack", "An attack under autocast.", _SAID, _autocast_attack),
    Case("late-inference-mode", "An attack in inference mode.", _RIGHT, partial(_inside, torch.inference_mode)),
    Case("late-no-grad", "An attack where gradients are off.", _RIGHT, partial(_inside, torch.no_grad)),
    Case("late-matmul", "torch.set_float32_matmul_precision('medium').", "Victims decide in float32.", _matmul),
    Case("late-calibration-empty", "Calibration without images.", _SAID, partial(_empty, "calibration")),
    Case("late-bank-empty", "A bank without images.", _SAID, partial(_empty, "bank")),
    Case("late-batches", "Calibration by pairs of a plain DataLoader.", _SAID, _pairs),
    Case("late-shapes", "L2 of grey images to coloured ones.", _SAID, _shapes),
    Case("late-one-class", "A bank of one class of three.", "That class.", _one_class),
]  # fmt: skip
