"""Attacks by import path: a function of one's own, or an attack class of another library as it is.

The only file that knows torchattacks, foolbox and the Adversarial Robustness Toolbox (ART). Their attacks are known by what
they inherit from, so a class of one's own that extends one of theirs works too.
"""

import inspect
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_advknn.attacks.arguments import check_arguments
from lightning_advknn.attacks.gradient_sign import LogitsFn

_PACKAGES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "art": "adversarial-robustness-toolbox"}
_ROUNDING = 1e-6  # by which a library's last addition in float32 may leave [0, 1]


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
        return self.logits_fn(images)


_Run = Callable[[Tensor, Tensor], Tensor]  # run(images, labels) -> adversarial
_Make = Callable[
    [Any, _Logits, Tensor, dict[str, Any]], _Run
]  # of a class, its target, an image, its settings


@dataclass(frozen=True)
class LibraryAttack:
    """An attack class of another library as a function ``attack(logits_fn, images, labels, **settings)``.

    Settings are the constructor's arguments, and `seed`. Attacks of foolbox also have `eps`, to which the perturbation is
    clipped in the attack's norm; without it, a minimum-norm attack has no bound. Where foolbox finds nothing and gives a black
    image, the image stays as it was. Attacks of ART show no progress unless `verbose` is set.

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
            ValueError: If images or labels are not as stated, or the library leaves [0, 1].
        """
        check_arguments(images, labels)
        if not len(images):
            return images.clone()
        # Outside of inference mode, and on copies, as in `bim`.
        with torch.inference_mode(False), torch.enable_grad(), _seeded(seed):
            images, labels = images.detach().clone(), labels.clone()
            run = self._made(logits_fn, images[:1], seed, settings)
            adversarial = run(images.clone(), labels).detach().to(images)
        low, high = adversarial.aminmax()
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN fails every comparison
            raise ValueError(
                f"Expected {self.path} to return finite images in [0, 1], but got values in [{low.item()}, {high.item()}]."
                " Change its settings or take another library's version of it: some divide by gradients that are zero."
            )
        return adversarial.clamp(0.0, 1.0)

    def check(self, settings: dict[str, Any]) -> None:
        """Judge settings by making the attack, which takes no time.

        Raises:
            ValueError: If it cannot be made with them.
        """
        parameters = inspect.signature(self.kind).parameters
        seed, given = settings.get("seed", 0), {name: settings[name] for name in settings if name != "seed"}
        try:
            for name, value in given.items():
                default = parameters[name].default if name in parameters else None
                # What most libraries would find out when they compute with it. (ART takes "inf" for a norm.)
                if isinstance(default, int | float) and math.isfinite(default) and isinstance(value, str):
                    raise TypeError(f"{name} is the text {value!r}, not a number such as {default}")
            with torch.inference_mode(False), _seeded(seed):
                self._made(lambda images: images.flatten(1)[:, :10], torch.zeros(1, 1, 28, 28), seed, given)
        except (TypeError, ValueError, AssertionError) as error:
            own = ["seed", "eps"] if self.make is _make_foolbox else ["seed"]
            wanted = [
                *own,
                *(name for name in parameters if name not in ("model", "estimator", "classifier")),
            ]
            raise ValueError(
                f"Expected the settings of {self.path} to be among {wanted}, but got {settings}: {error}."
            ) from error

    def _made(self, logits_fn: LogitsFn, example: Tensor, seed: int, settings: dict[str, Any]) -> _Run:
        # Some of torchattacks' would seed themselves with the time.
        own = {"seed": seed} if "seed" in inspect.signature(self.kind).parameters else {}
        return self.make(self.kind, _Logits(logits_fn, example), example, {**settings, **own})


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed every global random generator that a library may draw from, and restore them."""
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - ART draws from it
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)  # noqa: NPY002


def _make_torchattacks(kind: Any, logits: _Logits, example: Tensor, settings: dict[str, Any]) -> _Run:
    attack: _Run = kind(logits, **settings)
    return attack


def _make_foolbox(kind: Any, logits: _Logits, example: Tensor, settings: dict[str, Any]) -> _Run:
    from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack
    from foolbox.models.pytorch import PyTorchModel

    eps = settings.pop("eps", None)
    attack = kind(**settings)
    if eps is None and isinstance(attack, FixedEpsilonAttack):
        raise ValueError("eps is missing, and the attack looks for no smallest perturbation")
    if eps is not None and not (isinstance(eps, int | float) and 0 <= eps < math.inf):
        raise ValueError(f"eps is {eps!r}, not a finite number of at least 0")
    model = PyTorchModel(logits, bounds=(0, 1), device=example.device)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        adversarial: Tensor
        unbounded, adversarial, _ = attack(model, images, labels, epsilons=eps)
        if isinstance(attack, MinimizationAttack):  # such as Carlini and Wagner's and EAD
            nothing = ~unbounded.flatten(1).any(1)
            adversarial[nothing] = images[nothing]
        return adversarial

    return run


def _make_art(kind: Any, logits: _Logits, example: Tensor, settings: dict[str, Any]) -> _Run:
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        num_classes = logits(example).shape[1]
    estimator = PyTorchClassifier(
        logits,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(example.shape[1:]),
        nb_classes=num_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if example.is_cuda else "cpu",
    )
    quiet = {"verbose": False} if "verbose" in inspect.signature(kind).parameters else {}
    attack = kind(estimator, **{**quiet, **settings})
    if attack.targeted:
        raise ValueError("labels are classes to move away from, so `targeted` must be false")

    def run(images: Tensor, labels: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # ART 1.20 makes arrays of tensors as NumPy 1 did
            return torch.from_numpy(attack.generate(images.cpu().numpy(), labels.cpu().numpy()))

    return run


_MAKERS: dict[str, _Make] = {
    "torchattacks.attack.Attack": _make_torchattacks,
    "foolbox.attacks.base.Attack": _make_foolbox,
    "art.attacks.attack.EvasionAttack": _make_art,
}
