"""An attack with its settings, as configurations name it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from lightning_advknn.attacks.libraries import LibraryAttack, load_function
from lightning_advknn.attacks.parts.arguments import LogitsFn, check_returned
from lightning_advknn.attacks.parts.balls import as_norm, norm_of
from lightning_advknn.attacks.parts.probe import try_out
from lightning_advknn.choices import GradientPrecision, Norm, did_you_mean
from lightning_advknn.classifiers import DkNN
from lightning_advknn.storage import code_of

Target = LogitsFn | DkNN
"""What an attack fools: a logits function, or a victim itself. A kNN is a DkNN of one layer."""

Attack = Callable[[Any, Tensor, Tensor], Tensor]
"""An attack with its settings bound: ``attack(target, images, labels) -> adversarial``."""

if TYPE_CHECKING:
    Plain = Any
else:
    Plain = bool | int | float | str | list | dict | None
"""A value as YAML writes it. Were it `Any`, jsonargparse would call whatever a value's `class_path` names."""

_LINF = ("ask", "bim", "fgsm", "sitawarin_wagner_linf")
"""Functions of `lightning_advknn.attacks` whose eps is of Linf. Others have a setting `norm`, or keep L2 small."""


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
        norm: What its eps is measured in, ``l2`` or ``linf`` in any way that libraries write them, where
            nothing else says so (`measure`).
    """

    function: str
    settings: dict[str, Plain] = field(default_factory=dict)
    precision: GradientPrecision = "float32"
    targets: list[str] | None = None
    through: str | None = None
    vary: dict[str, list[Plain]] = field(default_factory=dict)
    norm: str | float | None = None

    def check(self) -> None:
        """Judge all that can be judged without knowing what is attacked.

        Raises:
            ValueError: If the function, a setting, the precision or the norm does not exist, one is missing,
                or one is out of range.
            ImportError: If the library of the function is not installed.
        """
        if self.precision not in get_args(GradientPrecision):
            raise ValueError(
                f"Expected `precision` to be one of {get_args(GradientPrecision)}, but got {self.precision!r}."
            )
        if self.precision == "bfloat16" and self.on_victim:
            raise ValueError(
                f"Expected another `precision` than 'bfloat16' for {self.function}: a victim decides in float32."
            )
        function = self._load()
        given = {**self.settings, **({"surrogate": None} if self.through else {})}
        try:
            inspect.signature(function).bind(None, None, None, **given)
        except TypeError as error:
            wanted = list(inspect.signature(function).parameters)[3:]
            raise ValueError(
                f"Expected the settings of {self.function} to be {wanted}, but got {given}: {error}."
            ) from error
        _ = self.known_norm  # of a library's attack, judges its settings too
        if isinstance(function, LibraryAttack):
            return
        _check_types(self.function, function, self.settings)
        if "." not in self.function and not self.on_victim:
            # The function itself judges its settings.
            try_out(partial(function, **self.settings), precision=self.precision)

    def bind(self, image_shape: tuple[int, ...] = (1, 28, 28), num_classes: int = 10) -> Attack:
        """The attack as a function of its target, images and labels, after a trial on two images of a `probe.Probe`.

        Args:
            image_shape: Of the images to be attacked, ``(channels, H, W)``.
            num_classes: Of the target. Both are for the trial alone: the attack works for others, too.

        Raises:
            ValueError: As `check`; or if the attack fails, or returns something else than images.
            ImportError: If the library of the function is not installed.
        """
        self.check()
        function = self._load()
        bound = partial(function, **self.settings)
        if "." not in self.function or self.on_victim:
            return bound
        try:
            tried = try_out(bound, image_shape, num_classes, self.precision)
        except Exception as error:
            if isinstance(function, LibraryAttack):
                raise  # it names itself
            raise ValueError(
                f"Expected {self.function} with {self.settings} to attack two images of shape {image_shape} and a small module of"
                f" {num_classes} classes, but it raised {type(error).__name__}: {error}. Mend it, or change its settings."
            ) from error
        if tried:
            check_returned(self.function, *tried)
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

        A library's attack says so itself: foolbox's by its ``distance``, torchattacks' and ART's by their
        ``norm``, their documentation or paper (`LibraryAttack.check`); a function by its setting ``norm``.
        Where these are silent, its `norm` does.

        Raises:
            ValueError: If it is another norm, nothing says so, or two disagree.
        """
        if self.known_norm is None:
            raise ValueError(
                f"Expected `norm` to say what {self.function} keeps small, as nothing else does, but it is missing. Add"
                " `norm: l2` or `norm: linf` beside `function`."
            )
        return self.known_norm

    @property
    def known_norm(self) -> Norm | None:
        """`measure`, or None where nothing says so."""
        said = self._said()
        norms = [as_norm(value, self.function) for value in (said, self.norm) if value is not None]
        if len(set(norms)) > 1:
            raise ValueError(
                f"Expected `norm` of {self.function} to be {norms[0]!r}, as it says itself, but got {self.norm!r}. Leave `norm` out."
            )
        return norms[0] if norms else None

    def _said(self) -> object:
        """The attack's own word on its norm; None where it is silent."""
        function = self._load()
        if isinstance(function, LibraryAttack):
            return function.check(self.settings)
        parameter = inspect.signature(function).parameters.get("norm")
        if parameter is not None:
            own = None if parameter.default is parameter.empty else parameter.default
            given = self.settings.get("norm", own)
            return given if norm_of(given) else None  # a function of one's own may mean something else by it
        if function.__module__.startswith("lightning_advknn.attacks."):
            return "linf" if function.__name__ in _LINF else "l2"
        return None

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
                f"{did_you_mean(self.function, known)}"
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
