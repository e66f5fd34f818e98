"""Attacks by import path: a user's function, or an attack class of another library.

Only this file knows torchattacks, foolbox and the Adversarial Robustness Toolbox (ART). It recognises their
attacks by the base class, so a user's class that extends one of theirs works too.
"""

import inspect
import math
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
_COUNTS = ("n_classes", "nb_classes", "num_classes")  # arguments that hold the number of classes
_STANDARD = 10  # AutoAttack's default: it targets the 9 nearest other classes, also if there are more


def load_function(path: str) -> Callable[..., Tensor]:
    """Load the attack with an import path.

    Args:
        path: For example ``my_package.my_module.my_attack`` or ``torchattacks.MIFGSM``.

    Returns:
        A function ``attack(target, images, labels, **settings) -> adversarial``.

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
            f"Expected {path} to be a function, or a class that extends one of {list(_MAKERS)}, but it"
            f" extends {bases[1:]}. Write a function (logits_fn, images, labels, **settings) that uses it."
        )
    return LibraryAttack(path, found, make)


class _Logits(nn.Module):
    """A logits function as a module in evaluation mode, on the device of the images.

    Libraries do not see the modules inside. So these keep their modes, devices and replaced convolutions.
    """

    logits_fn: LogitsFn

    def __init__(self, logits_fn: LogitsFn, images: Tensor) -> None:
        super().__init__()
        vars(self)["logits_fn"] = logits_fn  # not registered as a submodule
        # torchattacks moves everything to the device of the first parameter.
        self.device_of = nn.Parameter(images.new_empty(0), requires_grad=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.logits_fn(images.to(self.device_of.dtype))  # with NumPy 2, ART 1.20 passes float64


class _Made(NamedTuple):
    """A library's attack that is ready to run."""

    run: Callable[[Tensor, Tensor], Any]
    """Maps images and labels to what the library returns: adversarial images, if all goes well."""
    norm: object
    """The attack's norm as the library writes it; None if it does not say."""


# Arguments: the class, its target, one image, the settings.
_Make = Callable[[Any, _Logits, Tensor, dict[str, Any]], _Made]


@dataclass(frozen=True)
class LibraryAttack:
    """An attack class of another library as a function ``attack(logits_fn, images, labels, **settings)``.

    Settings are the arguments of the constructor, and `seed`. Attacks of foolbox also have `eps`: the
    perturbation is clipped to it in the attack's norm. Without `eps`, a minimum-norm attack has no bound. If
    foolbox finds nothing and returns a black image, the clean image is returned. Attacks of ART show no
    progress unless `verbose` is set. The number of classes is that of the logits, unless it is given. A norm
    can be written in any way that `balls.norm_of` knows.

    Args:
        path: Import path of the class.
        kind: The class.
        make: Makes attacks of this library.
    """

    path: str
    kind: type
    make: _Make

    def __call__(
        self, logits_fn: LogitsFn, images: Tensor, labels: Tensor, *, seed: int = 0, **settings: Any
    ) -> Tensor:
        """Attack images. Equal arguments give equal adversarials, and global random states do not change.

        Args:
            logits_fn: Maps images ``(B, channels, H, W)`` to logits ``(B, C)``. A module must be frozen and
                in evaluation mode, as `precision.prepared` makes it. A victim gives its vote shares.
            images: float ``(B, channels, H, W)`` in [0, 1].
            labels: Classes to move away from, int64 ``(B,)``.
            seed: Seed of all random numbers that the library draws.
            settings: Arguments of the class.

        Returns:
            Adversarial images in [0, 1], same shape, dtype and device.

        Raises:
            ValueError: If images or labels are invalid, or the library fails, returns something else or
                leaves [0, 1].
        """
        check_arguments(images, labels)
        if not len(images):
            return images.clone()
        # Not in inference mode, and on copies, as in `bim`.
        with torch.inference_mode(False), torch.enable_grad(), seeded(seed), _on(images.device):
            images, labels = images.detach().clone(), labels.clone()
            try:
                returned = self._made(logits_fn, images[:1], seed, settings).run(images.clone(), labels)
            except (MemoryError, torch.OutOfMemoryError):  # caused by the machine, not the attack
                raise
            except Exception as error:
                raise ValueError(
                    f"Expected {self.path} with {settings} to attack images of shape"
                    f" {tuple(images.shape)}, but it raised {_text(error)}. Change its settings, or leave it"
                    " out."
                ) from error
        return returned_images(self.path, returned, images)

    def check(self, settings: dict[str, Any]) -> object:
        """Check settings by making the attack, which is fast.

        Returns:
            The attack's norm as the library writes it, for example ``"Linf"`` or ``2``; None if it does not
            say.

        Raises:
            ValueError: If the attack cannot be made with these settings.
        """
        parameters = inspect.signature(self.kind).parameters
        seed, given = settings.get("seed", 0), {name: settings[name] for name in settings if name != "seed"}
        counts = [given[name] for name in _COUNTS if name in parameters and type(given.get(name)) is int]
        probe = Probe((1, 28, 28), max(2, *counts) if counts else 10).eval()
        try:
            for name, value in given.items():
                default = parameters[name].default if name in parameters and name != "norm" else None
                # Most libraries notice this only when they compute with it.
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
                f"Expected the settings of {self.path} to be among {wanted}, but got {settings}:"
                f" {_text(error)}."
            ) from error

    def _made(self, logits_fn: LogitsFn, example: Tensor, seed: int, settings: dict[str, Any]) -> _Made:
        parameters = inspect.signature(self.kind).parameters
        logits = _Logits(logits_fn, example)
        # Some attacks of torchattacks would seed themselves with the time.
        own: dict[str, Any] = {"seed": seed} if "seed" in parameters else {}
        for name in parameters.keys() & set(_COUNTS):
            own[name] = self._count(name, settings.get(name), logits, example)
        if settings.get("norm") is not None and "norm" in parameters:
            own["norm"] = _spelled(settings["norm"], parameters["norm"].default)
        return self.make(self.kind, logits, example, {**settings, **own})

    def _count(self, name: str, given: int | None, logits: _Logits, example: Tensor) -> int:
        """Find the number of classes, and check a given one."""
        classes = _count_classes(logits, example)
        if given is None:
            return classes
        if given not in (classes, min(classes, _STANDARD)):
            raise ValueError(
                f"{name} is {given}, but there are {classes} classes; leave it out, and it is {classes}"
            )
        return given


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: ART and others compute there, wherever images are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _count_classes(logits: _Logits, example: Tensor) -> int:
    with torch.no_grad():
        return int(logits(example).shape[1])


def _spelled(norm: object, default: object) -> object:
    """Write L2 or Linf in the way of a class's default; other norms stay as they are."""
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
            f"there are {classes} classes, and its DLR loss needs {fewest}; take APGD with `loss: ce`, FAB"
            " and Square instead"
        )
    # If the documentation names several, the setting decides.
    documented = re.search(r"Distance Measure *: *(\w+) *$", kind.__doc__ or "", re.MULTILINE)
    return _Made(attack, getattr(attack, "norm", documented and documented[1]))


def _fewest_classes(attack: Any) -> int:
    """Smallest number of classes for the loss: DLR ranks 3 logits, or 4 if it is targeted."""
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
        if isinstance(attack, MinimizationAttack):  # for example Carlini and Wagner's, and EAD
            nothing = ~unbounded.flatten(1).any(1)
            adversarial[nothing] = images[nothing]
        return adversarial

    return _Made(run, _foolbox_norm(attack))


def _foolbox_norm(attack: Any) -> object:
    try:
        return attack.distance.p
    except (AttributeError, ValueError):  # the attack has no distance, or none yet
        return None


_ART_NORMS = {
    # The norm in the attack's paper, if the class has no setting for it.
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
    """Random numbers by NumPy's global seed; ART's HopSkipJump and BoundaryAttack would draw another seed."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(np.random.randint(2**31) if seed is None else seed)  # noqa: NPY002


def _art_norm(kind: type, attack: Any) -> object:
    if kind.__module__.partition(".")[0] == "art" and kind.__name__ in _ART_NORMS:
        return _ART_NORMS[kind.__name__]
    # The `norm` of Wasserstein is that of its steps. The elastic net has neither L1 nor L2.
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
