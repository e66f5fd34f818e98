"""Attacks by import path: a function of one's own, or an attack class of another library as it is.

The only file that knows torchattacks, foolbox and the Adversarial Robustness Toolbox (ART). Their attacks are known by what
they inherit from, so a class of one's own that extends one of theirs works too.
"""

import inspect
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from lightning_advknn.attacks.parts.arguments import LogitsFn, check_arguments, returned_images
from lightning_advknn.attacks.parts.balls import norm_of
from lightning_advknn.attacks.parts.probe import Probe, seeded

_PACKAGES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "art": "adversarial-robustness-toolbox"}
_COUNTS = ("n_classes", "nb_classes", "num_classes")  # arguments that count the classes
_STANDARD = 10  # classes of AutoAttack's authors: with more, too, it aims at the 9 nearest others


def load_function(path: str) -> Callable[..., Tensor]:
    """The attack that an import path names.

    Args:
        path: Such as ``my_package.my_module.my_attack`` or ``torchattacks.MIFGSM``.

    Returns:
        ``attack(logits_fn or victim, images, labels, **settings) -> adversarial``.

    Raises:
        ValueError: If there is no such callable, or it is a class of another kind.
        ImportError: If its module cannot be imported.
    """
    module_name, _, name = path.rpartition(".")
    try:
        with warnings.catch_warnings():
            if path.partition(".")[0] in _PACKAGES:  # foolbox 3.3.4 imports a name that scipy moved
                warnings.simplefilter("ignore", DeprecationWarning)
            module = import_module(module_name)
    except ImportError as error:
        missing = (error.name or path).partition(".")[0]
        remedy = f"Install {missing}, or put it beside the script that is run or on PYTHONPATH."
        if missing in _PACKAGES:
            remedy = f"Install it: `python -m pip install {_PACKAGES[missing]}`."
        raise ImportError(f"Expected {path} to be importable, but got: {error}. {remedy}") from error
    found: Any = getattr(module, name, None)
    if not callable(found):
        known = [each for each, value in vars(module).items() if each[0] != "_" and callable(value)]
        raise ValueError(f"Expected {path} to be a function or a class, one of {known}, but it is not there.")
    if not isinstance(found, type):
        function: Callable[..., Tensor] = found
        return function
    bases = [f"{base.__module__}.{base.__qualname__}" for base in found.__mro__]
    make = next((_MAKERS[base] for base in bases if base in _MAKERS), None)
    if make is None:
        raise ValueError(
            f"Expected {path} to be a function, or a class that extends one of {list(_MAKERS)}, but it extends {bases[1:]}."
            " Write a function (logits_fn, images, labels, **settings) that uses it."
        )
    return LibraryAttack(path, found, make)


class _Logits(nn.Module):
    """A logits function as libraries want it: a module in evaluation mode on the device of some images.

    They do not see the modules within, which so keep their mode, their device and what runs instead of their convolutions.
    """

    logits_fn: LogitsFn

    def __init__(self, logits_fn: LogitsFn, images: Tensor) -> None:
        super().__init__()
        vars(self)["logits_fn"] = logits_fn  # not registered as a submodule
        # torchattacks moves all to the device of the first parameter.
        self.device_of = nn.Parameter(images.new_empty(0), requires_grad=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.logits_fn(images.to(self.device_of.dtype))  # ART 1.20 asks about float64 where NumPy is 2


class _Made(NamedTuple):
    """An attack that is ready."""

    run: Callable[[Tensor, Tensor], Any]
    """Of images and labels, what the library gives: adversarial images, if all goes well."""
    norm: object
    """What the library says that the attack keeps small, in its own words; None where it is silent."""


# Of a class, its target, an image, its settings.
_Make = Callable[[Any, _Logits, Tensor, dict[str, Any]], _Made]


@dataclass(frozen=True)
class LibraryAttack:
    """An attack class of another library as a function ``attack(logits_fn, images, labels, **settings)``.

    Settings are the constructor's arguments, and `seed`. Attacks of foolbox also have `eps`, to which the
    perturbation is clipped in the attack's norm; without it, a minimum-norm attack has no bound. Where
    foolbox finds nothing and gives a black image, the image stays as it was. Attacks of ART show no progress
    unless `verbose` is set. A number of classes is that of the logits, unless it is given. A norm may be
    written in any way that `balls.norm_of` knows.

    Args:
        path: Its import path.
        kind: The class.
        make: What makes attacks of this library.
    """

    path: str
    kind: type
    make: _Make

    def __call__(
        self, logits_fn: LogitsFn, images: Tensor, labels: Tensor, *, seed: int = 0, **settings: Any
    ) -> Tensor:
        """Attack images. Equal arguments give equal adversarials, and no global random state changes.

        Args:
            logits_fn: Maps images ``(B, channels, H, W)`` to logits ``(B, C)``. A module is in evaluation mode and frozen,
                as `precision.prepared` makes it.
            images: float ``(B, channels, H, W)`` in [0, 1].
            labels: Classes to move away from, int64 ``(B,)``.
            seed: Of all random numbers that the library draws.
            settings: Of the class.

        Returns:
            Adversarial images in [0, 1], same shape, dtype and device.

        Raises:
            ValueError: If images or labels are not as stated, or the library fails, returns something else or
                leaves [0, 1].
        """
        check_arguments(images, labels)
        if not len(images):
            return images.clone()
        # Outside of inference mode, and on copies, as in `bim`.
        with torch.inference_mode(False), torch.enable_grad(), seeded(seed):
            images, labels = images.detach().clone(), labels.clone()
            try:
                returned = self._made(logits_fn, images[:1], seed, settings).run(images.clone(), labels)
            except (MemoryError, torch.OutOfMemoryError):  # the machine's, not the attack's
                raise
            except Exception as error:
                raise ValueError(
                    f"Expected {self.path} with {settings} to attack images of shape {tuple(images.shape)}, but it raised"
                    f" {_text(error)}. Change its settings, or leave it out."
                ) from error
        return returned_images(self.path, returned, images)

    def check(self, settings: dict[str, Any]) -> object:
        """Judge settings by making the attack, which takes no time.

        Returns:
            What the library says that the attack keeps small, in its own words such as ``"Linf"`` or ``2``;
            None where it is silent.

        Raises:
            ValueError: If it cannot be made with them.
        """
        parameters = inspect.signature(self.kind).parameters
        seed, given = settings.get("seed", 0), {name: settings[name] for name in settings if name != "seed"}
        counts = [given[name] for name in _COUNTS if name in parameters and type(given.get(name)) is int]
        probe = Probe((1, 28, 28), max(2, *counts) if counts else 10).eval()
        try:
            for name, value in given.items():
                default = parameters[name].default if name in parameters and name != "norm" else None
                # What most libraries would find out when they compute with it.
                if isinstance(default, int | float) and math.isfinite(default) and isinstance(value, str):
                    raise TypeError(f"{name} is the text {value!r}, not a number such as {default}")
            with torch.inference_mode(False), seeded(seed):
                return self._made(probe, probe.examples()[0][:1], seed, given).norm
        except Exception as error:
            own = ["seed", "eps"] if self.make is _make_foolbox else ["seed"]
            wanted = [
                *own,
                *(name for name in parameters if name not in ("model", "estimator", "classifier")),
            ]
            raise ValueError(
                f"Expected the settings of {self.path} to be among {wanted}, but got {settings}: {_text(error)}."
            ) from error

    def _made(self, logits_fn: LogitsFn, example: Tensor, seed: int, settings: dict[str, Any]) -> _Made:
        parameters = inspect.signature(self.kind).parameters
        logits = _Logits(logits_fn, example)
        # Some of torchattacks' would seed themselves with the time.
        own: dict[str, Any] = {"seed": seed} if "seed" in parameters else {}
        for name in parameters.keys() & set(_COUNTS):
            own[name] = self._count(name, settings.get(name), logits, example)
        if settings.get("norm") is not None and "norm" in parameters:
            own["norm"] = _spelled(settings["norm"], parameters["norm"].default)
        return self.make(self.kind, logits, example, {**settings, **own})

    def _count(self, name: str, given: int | None, logits: _Logits, example: Tensor) -> int:
        """The number of classes."""
        classes = _count_classes(logits, example)
        if given is None:
            return classes
        if given not in (classes, min(classes, _STANDARD)):
            raise ValueError(
                f"{name} is {given}, but there are {classes} classes; leave it out, and it is {classes}"
            )
        return given


def _count_classes(logits: _Logits, example: Tensor) -> int:
    with torch.no_grad():
        return int(logits(example).shape[1])


def _spelled(norm: object, default: object) -> object:
    """L2 or Linf as a class writes its own norm; another as it is."""
    if default in ("L2", "Linf"):
        return {"l2": "L2", "linf": "Linf"}.get(norm_of(norm) or "", norm)
    if isinstance(default, int | float):
        return {"l2": 2, "linf": np.inf}.get(norm_of(norm) or "", norm)
    return norm


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".: ")


_UNTARGETED = "labels are classes to move away from, so `targeted` must be false"


def _make_torchattacks(kind: Any, logits: _Logits, example: Tensor, settings: dict[str, Any]) -> _Made:
    attack = kind(logits, **settings)
    if attack.targeted:
        raise ValueError(_UNTARGETED)
    fewest = _fewest_classes(attack)
    if fewest > 2 and (classes := _count_classes(logits, example)) < fewest:
        raise ValueError(
            f"there are {classes} classes, and its DLR loss needs {fewest}; take APGD with `loss: ce`, FAB and Square instead"
        )
    # Where several are named, its setting decides.
    documented = re.search(r"Distance Measure *: *(\w+) *$", kind.__doc__ or "", re.MULTILINE)
    return _Made(attack, getattr(attack, "norm", documented and documented[1]))


def _fewest_classes(attack: Any) -> int:
    """How many classes a loss of differences of logits ranks: 3, or 4 if it is targeted."""
    automatic = type(attack).__name__ == "AutoAttack"
    if type(attack).__name__ == "APGDT" or (automatic and attack.version != "rand"):
        return 4
    return 3 if automatic or getattr(attack, "loss", None) == "dlr" else 2


def _make_foolbox(kind: Any, logits: _Logits, example: Tensor, settings: dict[str, Any]) -> _Made:
    from foolbox import distances
    from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack
    from foolbox.models.pytorch import PyTorchModel

    eps = settings.pop("eps", None)
    if norm_of(settings.get("distance")):
        settings["distance"] = getattr(distances, norm_of(settings["distance"]) or "")
    if isinstance(settings.get("constraint"), str):
        settings["constraint"] = settings["constraint"].lower()
    attack = kind(**settings)
    if eps is None and isinstance(attack, FixedEpsilonAttack):
        raise ValueError("eps is missing, and the attack looks for no smallest perturbation")
    if eps is not None and not (isinstance(eps, int | float) and 0 <= eps < math.inf):
        raise ValueError(f"eps is {eps!r}, not a finite number of at least 0")
    if "distance" in inspect.signature(kind).parameters and not isinstance(
        settings.get("distance"), distances.Distance
    ):
        raise ValueError("distance says neither l2 nor linf, and the attack has none of its own")
    model = PyTorchModel(logits, bounds=(0, 1), device=example.device)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        adversarial: Tensor
        unbounded, adversarial, _ = attack(model, images, labels, epsilons=eps)
        if isinstance(attack, MinimizationAttack):  # such as Carlini and Wagner's and EAD
            nothing = ~unbounded.flatten(1).any(1)
            adversarial[nothing] = images[nothing]
        return adversarial

    return _Made(run, _foolbox_norm(attack))


def _foolbox_norm(attack: Any) -> object:
    try:
        return attack.distance.p
    except (AttributeError, ValueError):  # it has none, or none yet
        return None


_ART_NORMS = {
    # What they minimise or bound by their papers, where they have no setting that says so.
    "BoundaryAttack": "l2",
    "CarliniL0Method": "l0",
    "CarliniL2Method": "l2",
    "CarliniLInfMethod": "linf",
    "DeepFool": "l2",
    "NewtonFool": "l2",
    "PixelAttack": "l0",
    "SaliencyMapMethod": "l0",
    "SignOPTAttack": "l2",
    "SimBA": "l2",
    "ThresholdAttack": "linf",
    "VirtualAdversarialMethod": "l2",
    "ZooAttack": "l2",
}


def _make_art(kind: Any, logits: _Logits, example: Tensor, settings: dict[str, Any]) -> _Made:
    from art.estimators.classification import PyTorchClassifier

    estimator = PyTorchClassifier(
        logits,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(example.shape[1:]),
        nb_classes=_count_classes(logits, example),
        clip_values=(0.0, 1.0),
        device_type="gpu" if example.is_cuda else "cpu",
    )
    quiet = {"verbose": False} if "verbose" in inspect.signature(kind).parameters else {}
    attack = kind(estimator, **{**quiet, **settings})
    if attack.targeted:
        raise ValueError(_UNTARGETED)

    def run(images: Tensor, labels: Tensor) -> Any:
        with warnings.catch_warnings(), patch.object(np.random, "RandomState", _SeededState):
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # ART 1.20 makes arrays of tensors as NumPy 1 did
            generated = attack.generate(images.cpu().numpy(), labels.cpu().numpy())
        return torch.from_numpy(generated) if isinstance(generated, np.ndarray) else generated

    return _Made(run, _art_norm(kind, attack))


class _SeededState(np.random.RandomState):
    """A generator that NumPy's global seed decides, where ART makes one from the clock: HopSkipJump and BoundaryAttack do."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(np.random.randint(2**31) if seed is None else seed)  # noqa: NPY002


def _art_norm(kind: type, attack: Any) -> object:
    if kind.__module__.partition(".")[0] == "art" and kind.__name__ in _ART_NORMS:
        return _ART_NORMS[kind.__name__]
    # Wasserstein's `norm` is that of its steps; of the elastic net, which is neither L1 nor L2, no more is
    # known.
    for name in ("ball", "norm", "decision_rule"):
        if hasattr(attack, name):
            said = getattr(attack, name)
            return None if said == "EN" else said
    return None


_MAKERS: dict[str, _Make] = {
    "torchattacks.attack.Attack": _make_torchattacks,
    "foolbox.attacks.base.Attack": _make_foolbox,
    "art.attacks.attack.EvasionAttack": _make_art,
}
