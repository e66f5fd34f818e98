"""An attack with its settings, as configurations name it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from lightning_advknn.attacks.balls import Norm
from lightning_advknn.attacks.gradient_sign import LogitsFn
from lightning_advknn.attacks.libraries import LibraryAttack, load_function
from lightning_advknn.attacks.precision import Precision
from lightning_advknn.classifiers import DkNNClassifier
from lightning_advknn.storage import code_of

Target = LogitsFn | DkNNClassifier
"""What an attack fools: a logits function, or a victim itself. A kNN is a DkNN of one layer."""

Attack = Callable[[Any, Tensor, Tensor], Tensor]
"""An attack with its settings bound: ``attack(target, images, labels) -> adversarial``."""

if TYPE_CHECKING:
    Plain = Any
else:
    Plain = bool | int | float | str | list | dict | None
"""A value as YAML writes it. Were it `Any`, jsonargparse would call whatever a value's `class_path` names."""

_NORMS: dict[str, Norm] = {"l2": "l2", "2": "l2", "linf": "linf", "inf": "linf"}


@dataclass(frozen=True)
class AttackSettings:
    """An attack with its settings.

    Args:
        function: A function of `lightning_advknn.attacks` by name, or by import path any other
            ``function(logits_fn, images, labels, **settings)`` or ``function(victim, images, labels, **settings)``, or an attack
            class of torchattacks, foolbox or the Adversarial Robustness Toolbox (`libraries.LibraryAttack`).
        settings: Its keyword arguments.
        precision: How its gradients are computed.
        targets: What it is run on: ``origin`` and names of surrogates for an attack on logits, ``knn`` and ``dknn`` for one on a
            victim. None for all of them.
        through: Surrogate that an attack on a victim may differentiate; its argument `surrogate`.
        vary: Values of further settings, such as ``eps: [.1, .2]``: one attack for each combination.
        norm: What its eps is measured in, where nothing else says so (`measure`).
    """

    function: str
    settings: dict[str, Plain] = field(default_factory=dict)
    precision: Precision = "float32"
    targets: list[str] | None = None
    through: str | None = None
    vary: dict[str, list[Plain]] = field(default_factory=dict)
    norm: Norm | None = None

    def bind(self) -> Attack:
        """The attack as a function of its target, images and labels.

        Raises:
            ValueError: If the function, a setting or the precision does not exist, one is missing, or one is out of
                range.
            ImportError: If the library of the function is not installed.
        """
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"Expected `precision` to be one of {get_args(Precision)}, but got {self.precision!r}."
            )
        if self.precision == "bfloat16" and self.on_victim:
            raise ValueError(
                f"Expected another `precision` than 'bfloat16' for {self.function}: a victim decides in float32."
            )
        function = self._load()
        bound = partial(function, **self.settings)
        given = {**self.settings, **({"surrogate": None} if self.through else {})}
        try:
            inspect.signature(function).bind(None, None, None, **given)
        except TypeError as error:
            wanted = list(inspect.signature(function).parameters)[3:]
            raise ValueError(
                f"Expected the settings of {self.function} to be {wanted}, but got {given}: {error}."
            ) from error
        if isinstance(function, LibraryAttack):
            function.check(given)
            return bound
        _check_types(self.function, function, self.settings)
        if not self.on_victim:
            # One tiny attack makes the function itself judge its settings before any long work.
            bound(lambda images: images.flatten(1), torch.full((1, 1, 8, 8), 0.5), torch.zeros(1).long())
        return bound

    @property
    def on_victim(self) -> bool:
        """Whether it attacks a victim itself, not logits: its first argument is called ``victim``."""
        return next(iter(inspect.signature(self._load()).parameters), None) == "victim"

    @property
    def eps(self) -> float | None:
        """Radius of its ball; None of an attack without one."""
        eps = self.settings.get("eps")
        return float(eps) if isinstance(eps, int | float) else None

    @property
    def measure(self) -> Norm:
        """What its eps is measured in, or what it makes small without one.

        In this order: its `norm`; the setting ``norm``, or its function's own; L2 if the function's name has ``l2`` in it, as
        foolbox's and torchattacks' have; Linf if it has an eps; L2.

        Raises:
            ValueError: If it is another norm.
        """
        parameter = inspect.signature(self._load()).parameters.get("norm")
        own = None if parameter is None or parameter.default is parameter.empty else parameter.default
        norm = self.norm or self.settings.get("norm", own)
        if norm is None:
            named = "l2" in self.function.rpartition(".")[2].lower()
            return "l2" if named or self.settings.get("eps") is None else "linf"
        if str(norm) not in _NORMS:
            raise ValueError(
                f"Expected the norm of {self.function} to be one of {list(_NORMS)}, but got {norm!r}."
            )
        return _NORMS[str(norm)]

    def describe(self) -> dict[str, Any]:
        """What its outcome depends on, beside its target."""
        through = {"through": self.through} if self.through else {}
        return {"function": self.function, "settings": self.settings, "precision": self.precision, **through}

    @property
    def code(self) -> list[str]:
        """Of a function by import path, what tells it from an edited one (`storage.code_of`); else nothing."""
        return code_of(self.function) if "." in self.function else []

    def _load(self) -> Callable[..., Tensor]:
        from lightning_advknn import attacks  # here, as the package itself imports this file

        if "." in self.function:
            return load_function(self.function)
        if self.function not in attacks.__all__ or not self.function.islower():
            known = [name for name in attacks.__all__ if name.islower()]
            raise ValueError(
                f"Expected `function` to be one of {known} or an import path, but got {self.function!r}."
            )
        function: Callable[..., Tensor] = getattr(attacks, self.function)
        return function


def _check_types(name: str, function: Callable[..., Tensor], settings: Mapping[str, Any]) -> None:
    """Judge settings by the annotations of a function."""
    types = get_type_hints(function)
    for setting in settings.keys() & types.keys():
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{setting}", type=types[setting])
        try:
            parser.parse_object({setting: settings[setting]})
        except ArgumentError as error:
            raise ValueError(
                f"Expected `{setting}` of {name} to be {inspect.formatannotation(types[setting])}, but got {settings[setting]!r}."
            ) from error


def expand(attacks: Mapping[str, AttackSettings]) -> dict[str, AttackSettings]:
    """Each attack once for every combination of its varied settings, named ``<name>@<setting>=<value>``.

    >>> list(expand({"pgd": AttackSettings("bim", vary={"eps": [0.1, 0.2]}), "fgsm": AttackSettings("fgsm")}))
    ['pgd@eps=0.1', 'pgd@eps=0.2', 'fgsm']
    """
    expanded = {}
    for name, attack in attacks.items():
        for values in product(*attack.vary.values()):
            varied = dict(zip(attack.vary, values, strict=True))
            full = "@".join([name, *(f"{setting}={value}" for setting, value in varied.items())])
            expanded[full] = replace(attack, settings={**attack.settings, **varied}, vary={})
    return expanded


def family(name: str) -> str:
    """Name of the attack that `expand` made this one of."""
    return name.partition("@")[0]
