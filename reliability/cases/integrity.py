"""An attack leaves its victim as it was, and a network is a function of the image."""

import csv
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_advknn.attacks.parts.declare import declared
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch
from lightning_advknn.evaluation import perturb
from lightning_advknn.models import DkNNB, FeatureNetwork, LibraryNetwork, Surrogate
from lightning_advknn.search.build import build_banks
from lightning_advknn.storage import load_tensors
from reliability import attacks, networks
from reliability.case import Case, Outcome, evaluate, small_experiment, train

_OURS = "reliability.attacks"


def _random_network(folder: Path) -> Outcome:
    return _refused_network(folder, "DropoutAlways", "random numbers", "training=self.training")


def _batch_statistics(folder: Path) -> Outcome:
    return _refused_network(
        folder, "BatchStatistics", "batch", "['model.conv1.1']", "track_running_stats=True"
    )


def _training_batch_norm(folder: Path) -> Outcome:
    return _refused_network(
        folder, "TrainingBatchNorm", "changed `model.conv1.1.running_mean`", "training=self.training"
    )


def _mean_of_batch(folder: Path) -> Outcome:
    return _refused_network(folder, "MeanOfBatch", "batch", "mean over the whole batch")


def _drop_path(folder: Path) -> Outcome:
    return _refused_network(folder, "DropPath", "random numbers")


def _remembering(folder: Path) -> Outcome:
    return _refused_network(folder, "Remembering", "asked twice", "depends on what it was asked before")


def _shared_relu(folder: Path) -> Outcome:
    return _refused_network(
        folder,
        "SharedReLU",
        "'model.relu1': 2",
        "['normalize', 'model.conv1', 'model.conv2'",
        layers=["model.relu1", "model.fc"],
    )


def _refused_network(folder: Path, network: str, *words: str, layers: list[str] | None = None) -> Outcome:
    """Refused by attack.py and train.py before they train."""
    small_experiment(
        folder,
        network={"init_args.function": f"reliability.networks.{network}"},
        backbone={} if layers is None else {"model.init_args.layers": layers},
        attack={"surrogates": {}},
    )
    outcome = evaluate(folder).refused(*words)
    trained = list(folder.glob("runs/cache/backbone/*"))
    fitted = train(folder, "fit", "--config=backbone.yaml")
    said = all(word.lower() in fitted.err.lower() for word in words) and fitted.code != 0
    ended = list(folder.glob("runs/training/**/*.ckpt"))
    return outcome._replace(ok=outcome.ok and said and not trained and not ended)


def _returned(folder: Path, function: str, words: list[str]) -> Outcome:
    """Refused before training."""
    settings = {"function": f"{_OURS}.{function}", "settings": {"eps": 0.1}, "targets": ["origin"]}
    small_experiment(folder, attack={"surrogates": {}, "attacks": {"mine": settings}})
    outcome = evaluate(folder).refused(function, *words)
    return outcome._replace(ok=outcome.ok and not list(folder.glob("runs/cache/backbone/*")))


def _same_as_on_a_copy(function: Callable[..., Tensor]) -> Outcome:
    """Its images are those of `out_of_place`, and what it was given stays."""
    target = FeatureNetwork(networks.Small(), ["relu1"])
    images, labels = torch.rand(70, 3, 16, 16), torch.arange(70) % 4
    given = images.clone(), labels.clone()
    expected = perturb(partial(attacks.out_of_place, eps=0.1), target, images, labels)
    found = perturb(partial(function, eps=0.1), target, images, labels)
    same = torch.equal(found, expected) and found.dtype == torch.float32 and not found.requires_grad
    kept = torch.equal(images, given[0]) and torch.equal(labels, given[1])
    no_gradients = all(parameter.grad is None for parameter in target.parameters())
    return Outcome(
        f"{'the same' if same else 'other'} adversarials as on a copy, images and labels"
        f" {'stay' if kept else 'have changed'}",
        same and kept and no_gradients,
    )


def _training_mode_is_no_matter(folder: Path) -> Outcome:
    """`train()` on a victim does nothing: rows are those of the same attack without it, alone and beside others."""
    settings = {"settings": {"eps": 0.1, "steps": 10}, "targets": ["origin"]}
    ours = {
        "a_pgd": {"function": f"{_OURS}.pgd", **settings},
        "b_mode": {"function": f"{_OURS}.pgd_in_training_mode", **settings},
        "c_nothing": {"function": f"{_OURS}.nothing", "targets": ["origin"]},
        "d_tutorial": {"function": f"{_OURS}.tutorial_fgsm", "settings": {"eps": 0.1}, "targets": ["origin"]},
        "e_fgsm": {"function": "fgsm", "settings": {"eps": 0.1}, "targets": ["origin"]},
    }
    small_experiment(
        folder,
        network={"init_args.function": "reliability.networks.BatchNorm"},
        backbone={"trainer.max_epochs": 2},
        attack={"surrogates": {}, "attacks": ours},
    )
    ran = evaluate(folder)
    if ran.code:
        return ran.refused(code=0)
    rows = {
        name: (folder / "runs/experiment/rows/origin" / f"{name}.csv").read_text().replace(name, "it")
        for name in ours
    }
    mode = rows["b_mode"] == rows["a_pgd"]
    tutorial = rows["d_tutorial"] == rows["e_fgsm"]
    clean = all(
        row["dnn_before"] == row["dnn_after"] for row in csv.DictReader(io.StringIO(rows["c_nothing"]))
    )
    return Outcome(
        f"with `train()` {'the same' if mode else 'other'} rows as without; the tutorial's FGSM gives"
        f" {'the same' if tutorial else 'others'} as `fgsm`; images left alone"
        f" {'keep' if clean else 'change'} their class",
        mode and tutorial and clean,
    )


def _damage(folder: Path) -> Outcome:
    """The run ends with an error; what another run finds in the cache is what it would have made itself."""
    ours = {
        "a_nudges": {"function": f"{_OURS}.nudges_a_weight", "targets": ["origin"]},
        "b_fgsm": {"function": "fgsm", "settings": {"eps": 0.1}, "targets": ["origin"]},
    }
    small_experiment(folder, backbone={"trainer.max_epochs": 1}, attack={"surrogates": {}, "attacks": ours})
    outcome = evaluate(folder).refused(
        "'a_nudges'", "model.fc.bias` by up to 0.002", "nothing that it made is kept", code=1
    )
    stored = list(folder.glob("runs/cache/adversarial/**/*.safetensors"))
    without = ["--attacks={b_fgsm: {function: fgsm, settings: {eps: 0.1}, targets: [origin]}}"]
    again = evaluate(folder, *without, "--output=runs/again")
    fresh = evaluate(folder, *without, "--output=runs/fresh", "--cache=runs/fresh_cache")
    made = [
        load_tensors(path)[0]["adversarial"]
        for cache in ("cache", "fresh_cache")
        for path in folder.glob(f"runs/{cache}/adversarial/**/*.safetensors")
    ]
    same = len(made) == 2 and torch.equal(*made)
    return outcome._replace(ok=outcome.ok and not stored and same and not again.code and not fresh.code)


def _fails_later(folder: Path) -> Outcome:
    ours = {"mine": {"function": f"{_OURS}.fails_later", "targets": ["origin"]}}
    small_experiment(folder, backbone={"trainer.max_epochs": 1}, attack={"surrogates": {}, "attacks": ours})
    return evaluate(folder).refused("attack 'mine' failed", "KeyError", "momentum", code=1)


def _put_back(attack: Callable[..., Tensor], *words: str, through: bool = False) -> Outcome:
    """Refused in Python; afterwards the target says what it said before."""
    torch.manual_seed(0)
    network = LibraryNetwork("reliability.networks.BatchNorm", {"num_classes": 4})
    features = FeatureNetwork(network, ["model.relu2"])
    images, labels = torch.rand(40, 3, 16, 16), torch.arange(40) % 4
    banks = build_banks(features, [Batch(images, labels, torch.arange(40))], 4)
    victim = DkNN.on_banks(features, banks, k=3)
    target = victim if declared(attack) else features
    surrogate = Surrogate(network, "model.relu2", DkNNB(256, 4))
    bound: Any = partial(attack, surrogate=surrogate) if through else attack
    asked = images[:8] + 0.05 * (0.5 - images[:8])

    def said() -> list[Tensor]:
        with torch.no_grad():
            return [features(asked), victim(asked), surrogate(asked)]

    before = said()
    try:
        perturb(bound, target, images[:8], labels[:8])
    except ValueError as error:
        ok = all(word in str(error) for word in (attack.__name__, *words))
        ok = ok and all(torch.equal(one, other) for one, other in zip(said(), before, strict=True))
        ok = ok and torch.get_default_dtype() == torch.float32
        return Outcome(str(error), ok and not any(module.training for module in victim.modules()))
    return Outcome("no error", False)


def _stays_in_autocast() -> Outcome:
    """What an attack changes for all of torch shows in what its target answers."""
    autocast = torch.autocast("cpu", torch.bfloat16)

    def attack(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
        autocast.__enter__()
        return images

    try:
        perturb(attack, networks.Small().eval(), torch.rand(8, 3, 16, 16), torch.arange(8) % 4)
    except ValueError as error:
        return Outcome(str(error), "'attack'" in str(error) and "other answers" in str(error))
    finally:
        autocast.__exit__(None, None, None)
    return Outcome("no error", False)


def _out_of_range(attack: Callable[..., Tensor]) -> Outcome:
    target = FeatureNetwork(networks.Small(), ["relu1"])
    try:
        perturb(partial(attack, eps=0.1), target, torch.rand(4, 3, 16, 16), torch.arange(4))
    except ValueError as error:
        return Outcome(str(error), attack.__name__ in str(error) and "in [0, 1]" in str(error))
    return Outcome("no error", False)


def _counts_calls() -> Outcome:
    """A count that changes nothing is not taken for damage."""
    target = FeatureNetwork(networks.CountsCalls(), ["relu1"])
    images, labels = torch.rand(5, 3, 16, 16), torch.arange(5) % 4
    found = perturb(partial(attacks.pgd, eps=0.1, steps=2), target, images, labels)
    return Outcome("attacked as any other", bool((found != images).any()))


def _frozen() -> Outcome:
    """The library restores the mode that it finds."""
    import torchattacks

    network = networks.BatchNorm()
    surrogate = Surrogate(network, "relu2", DkNNB(256, 4)).train()
    torchattacks.PGD(surrogate, eps=0.1, steps=2)(torch.rand(4, 3, 16, 16), torch.arange(4))
    modes = [module.training for module in (*surrogate.modules(), *network.modules())]
    return Outcome(f"{sum(modes)} of {len(modes)} modules in training mode", not any(modes))


_REFUSED_RETURNS = {
    "20-own-attack-numpy": (attacks.as_numpy, "A NumPy array.", "numpy.ndarray"),
    "20-own-attack-tuple": (attacks.as_tuple, "Images and labels.", "tuple"),
    "20-own-attack-channels-last": (attacks.channels_last, "Images with channels last.", "(2, 16, 16, 3)"),
    "20-own-attack-fewer": (attacks.fewer, "Fewer images than it was given.", "(1, 3, 16, 16)"),
    "20-own-attack-uint8": (attacks.in_bytes, "Images as bytes.", "uint8", "255"),
    "integrity-list": (attacks.as_list, "A list of images.", "list"),
    "integrity-none": (attacks.as_none, "Nothing.", "None"),
}
_GOOD_RETURNS = {
    "20-own-attack-inplace": (attacks.in_place, "writes into its images and labels"),
    "20-own-attack-nograd-double": (attacks.in_float64, "returns float64"),
    "20-own-attack-attached": (attacks.attached, "returns images with a gradient's history"),
    "integrity-one-memory": (attacks.one_memory, "returns the same memory for each batch"),
}
_DAMAGES: dict[str, tuple[Callable[..., Tensor], str, list[str]]] = {
    "20-own-attack-train-mode": (
        attacks.zeroes_weights,
        "calls `train()` and zeroes all weights",
        ["model.conv1.0.weight", "and"],
    ),
    "integrity-inner-mode": (
        attacks.ends_training,
        "sets the mode of the network within",
        ["`network.model.conv1` to training mode"],
    ),
    "integrity-half": (attacks.half_precision, "calls `half()` on the model", ["torch.float16"]),
    "integrity-softplus": (attacks.softplus, "replaces a ReLU", ["`network.model.relu2` for another"]),
    "integrity-default-dtype": (
        attacks.default_dtype,
        "sets torch's default dtype",
        ["torch.set_default_dtype"],
    ),
    "integrity-bank": (attacks.touches_bank, "changes a feature of the bank", ["features` by up to 1"]),
    "integrity-labels": (attacks.touches_labels, "changes the labels of the bank", ["bank.labels"]),
    "integrity-k": (attacks.lowers_k, "lowers a victim's k", ["k` from 3 to 1"]),
    "integrity-surrogate": (
        attacks.touches_surrogate,
        "changes the surrogate it goes through",
        ["surrogate.dknnb.weight"],
    ),
}


def _python(name: str, what: str, expected: str, run: Callable[[], Outcome]) -> Case:
    """A case without files."""
    return Case(name, what, expected, lambda _folder: run())


CASES = [
    Case(
        "06-random-network",
        "`F.dropout(x)` without `training=self.training`.",
        "Refused before training.",
        _random_network,
    ),
    Case(
        "07-batch-stats",
        "Batch norm without running statistics.",
        "Refused before training.",
        _batch_statistics,
    ),
    Case(
        "integrity-training-batch-norm",
        "`F.batch_norm(..., training=True)`.",
        "Refused before training.",
        _training_batch_norm,
    ),
    Case(
        "integrity-mean-of-batch",
        "A network that divides by a mean over the batch.",
        "Refused before training.",
        _mean_of_batch,
    ),
    Case(
        "integrity-drop-path",
        "Stochastic depth that is never off, of 5 %.",
        "Refused before training.",
        _drop_path,
    ),
    Case(
        "integrity-remembering",
        "A network that subtracts what it saw before.",
        "Refused before training.",
        _remembering,
    ),
    Case(
        "integrity-shared-relu",
        "One ReLU at two places, named in `layers`.",
        "Refused; layers that run once are listed.",
        _shared_relu,
    ),
    *(
        Case(
            name,
            f"An own attack returns: {what}",
            "Refused before training, by name.",
            partial(_returned, function=function.__name__, words=words),
        )
        for name, (function, what, *words) in _REFUSED_RETURNS.items()
    ),
    *(
        _python(
            name,
            f"An own attack {what}.",
            "The adversarials of the same attack on a copy.",
            partial(_same_as_on_a_copy, function),
        )
        for name, (function, what) in _GOOD_RETURNS.items()
    ),
    *(
        _python(
            name,
            f"An own attack {what}.",
            "An error that names attack and change; all is put back.",
            partial(_put_back, function, *words, through=function is attacks.touches_surrogate),
        )
        for name, (function, what, words) in _DAMAGES.items()
    ),
    _python(
        "integrity-autocast",
        "An own attack enters autocast and never leaves it.",
        "An error that names the attack, as the same images get other answers.",
        _stays_in_autocast,
    ),
    _python(
        "20-own-attack-bytes",
        "An own attack returns images in [0, 255].",
        "Refused, by name.",
        partial(_out_of_range, attacks.to_255),
    ),
    _python(
        "integrity-nan",
        "An own attack divides zero by zero.",
        "Refused, by name.",
        partial(_out_of_range, attacks.not_a_number),
    ),
    Case(
        "22-attack-touches-victim",
        "PGD that calls `model.train()` and FGSM as PyTorch's tutorial writes it, beside others.",
        "The victim evaluates all the same; rows are right.",
        _training_mode_is_no_matter,
    ),
    Case(
        "22-attack-touches-victim-weight",
        "An attack adds 1e-3 to one weight, then FGSM.",
        "An error; the cache holds nothing made after it.",
        _damage,
    ),
    Case(
        "integrity-fails-later",
        "An own attack raises KeyError in mid-run.",
        "An error that names it.",
        _fails_later,
    ),
    _python(
        "integrity-counts-calls", "A network that counts its calls.", "Attacked as any other.", _counts_calls
    ),
    _python(
        "integrity-torchattacks",
        "torchattacks' PGD on a fresh surrogate.",
        "The backbone stays in evaluation mode.",
        _frozen,
    ),
]
