"""An attack with its settings, as configurations name it.

This file imports nothing heavy, as the command line reads its options from it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from lightning_advknn.choices import GradientPrecision, Norm, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeIs

    from lightning_advknn.attacks.libraries import LibraryAttack
    from lightning_advknn.attacks.parts.arguments import Attack
    from lightning_advknn.attacks.parts.declare import Declaration

    Plain = Any
else:
    Plain = bool | int | float | str | list | dict | None
"""A value as YAML writes it. Were it `Any`, jsonargparse would call whatever a value's `class_path` names."""

_VICTIMS = ("knn", "dknn")


@dataclass(frozen=True)
class AttackSettings:
    """An attack with its settings.

    Args:
        function: A function of `lightning_advknn.attacks` by name, or by import path any other ``function(target, images,
            labels, **settings)`` or an attack class of torchattacks, foolbox or the Adversarial Robustness Toolbox
            (`libraries.LibraryAttack`). A function is on logits, unless it is declared otherwise (`lightning_advknn.attack`).
        settings: Its keyword arguments.
        precision: How its gradients are computed.
        targets: What it is run on: ``origin``, names of surrogates, ``knn``, ``dknn``. None for both victims of an attack on
            victims, and for all others of one on logits. One on logits gets a victim's vote shares as logits, which have no
            gradient; a function that is not declared gets the victim itself.
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
                or one is out of range; or nothing says that a function is on victims.
            ImportError: If the library of the function is not installed.
        """
        self._check_precision()
        function = self._load()
        self._check_target(function)
        given = {**self.settings, **({"surrogate": None} if self.through else {})}
        try:
            inspect.signature(function).bind(None, None, None, **given)
        except TypeError as error:
            wanted = list(inspect.signature(function).parameters)[3:]
            raise ValueError(
                f"Expected the settings of {self.function} to be {wanted}, but got {given}: {error}."
            ) from error
        _ = self.known_norm  # of a library's attack, judges its settings too
        if _is_library(function):
            return
        _check_types(self.function, function, self.settings)
        if "." not in self.function and not self.on_victim:
            from lightning_advknn.attacks.parts.probe import try_out

            # The function itself judges its settings.
            try_out(partial(function, **self.settings), precision=self.precision)

    def _check_precision(self) -> None:
        if self.precision not in get_args(GradientPrecision):
            raise ValueError(
                f"Expected `precision` to be one of {get_args(GradientPrecision)}, but got {self.precision!r}."
            )
        if self.precision == "bfloat16" and self.on_victim:
            raise ValueError(
                f"Expected another `precision` than 'bfloat16' for {self.function}: a victim decides in float32."
            )
        if self.precision != "float32" and self._victims and not self.on_victim:
            raise ValueError(
                f"Expected `precision` 'float32' for {self.function} with {self._victims} among `targets`, but got"
                f" {self.precision!r}: votes have no gradient. Leave `precision` out."
            )

    def _check_target(self, function: Callable[..., "Tensor"]) -> None:
        """Raise a ValueError if a function calls its first argument a victim, but nothing says that it gets one."""
        first = next(iter(inspect.signature(function).parameters), None)
        if first == "victim" and self._declaration is None and not self._only_victims:
            raise ValueError(
                f"Expected {self.function}, whose first argument is called `victim`, to say that it is on victims, but nothing"
                ' does. Put `@lightning_advknn.attack(on="victim")` above it, or `targets: [knn, dknn]` beside `function`.'
            )

    def bind(self, image_shape: tuple[int, ...] = (1, 28, 28), num_classes: int = 10) -> "Attack":
        """The attack as a function of its target, images and labels, after a trial on two images of a `probe.Probe`.

        Args:
            image_shape: Of the images to be attacked, ``(channels, H, W)``.
            num_classes: Of the target. Both are for the trial alone: the attack works for others, too.

        Raises:
            ValueError: As `check`; or if the attack fails, returns something else than images, or needs gradients and
                is to attack a victim's votes.
            ImportError: If the library of the function is not installed.
        """
        from lightning_advknn.attacks.parts.declare import on_votes
        from lightning_advknn.attacks.parts.probe import try_out

        self.check()
        function = self._load()
        bound = partial(function, **self.settings)
        own = self._declaration is None and not _is_library(function)
        votes = bool(self._victims) and not own  # as logits, instead of the victim itself
        if self.on_victim or ("." not in self.function and not votes) or (own and self._only_victims):
            return bound
        try:
            tried = try_out(bound, image_shape, num_classes, self.precision, differentiable=not votes)
        except Exception as error:
            if _is_library(function) and not votes:
                raise  # it names itself
            raise self._of_trial(error, votes, image_shape, num_classes) from error
        if tried:
            from lightning_advknn.attacks.parts.arguments import check_returned

            check_returned(self.function, *tried)
        return on_votes(bound) if votes else bound

    def _of_trial(
        self, error: Exception, votes: bool, image_shape: tuple[int, ...], num_classes: int
    ) -> ValueError:
        """What to say of an attack that failed in its trial."""
        hint = (
            f" It is to attack votes ({self._victims} among `targets`), which have no gradient: take an attack that only asks"
            " for outputs, or leave these out."
        )
        if _is_library(self._load()):
            return ValueError(f"{error}{hint}")
        return ValueError(
            f"Expected {self.function} with {self.settings} to attack two images of shape {image_shape} and a small module of"
            f" {num_classes} classes, but it raised {type(error).__name__}: {error}."
            + (hint if votes else " Mend it, or change its settings.")
        )

    @property
    def on_victim(self) -> bool:
        """Whether it attacks a victim itself, not logits, where `targets` says nothing: whether it is declared so."""
        return self._declaration is not None and self._declaration.on == "victim"

    def targets_among(self, methods: Sequence[str], victims: Sequence[str]) -> Sequence[str]:
        """What it is run on.

        Args:
            methods: What attacks on logits differentiate: ``origin`` and names of surrogates.
            victims: ``knn`` and ``dknn``, as far as they are there.

        Raises:
            ValueError: If `targets` or `through` name something else.
        """
        known = victims if self.on_victim else (*methods, *victims)
        for given, there in ((self.targets or (), known), (filter(None, [self.through]), methods)):
            for name in given:
                if name not in there:
                    raise ValueError(
                        f"Expected {self.function} to have `targets` and `through` among {list(there)}, but got {name!r}."
                    )
        if self.targets is not None:
            return self.targets
        return victims if self.on_victim else methods

    @property
    def _victims(self) -> list[str]:
        """Victims among `targets`."""
        return [name for name in self.targets or () if name in _VICTIMS]

    @property
    def _only_victims(self) -> bool:
        return bool(self.targets) and len(self._victims) == len(self.targets or ())

    @property
    def _declaration(self) -> "Declaration | None":
        from lightning_advknn.attacks.parts.declare import declared

        return declared(self._load())

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
        from lightning_advknn.attacks.parts.balls import as_norm

        said = self._said()
        norms = [as_norm(value, self.function) for value in (said, self.norm) if value is not None]
        if len(set(norms)) > 1:
            raise ValueError(
                f"Expected `norm` of {self.function} to be {norms[0]!r}, as it says itself, but got {self.norm!r}. Leave `norm` out."
            )
        return norms[0] if norms else None

    def _said(self) -> object:
        """The attack's own word on its norm; None where it is silent."""
        from lightning_advknn.attacks.parts.balls import norm_of

        function, declaration = self._load(), self._declaration
        if _is_library(function):
            return function.check(self.settings)
        if declaration is not None and declaration.norm is not None:
            return declaration.norm
        parameter = inspect.signature(function).parameters.get("norm")
        if parameter is None:
            return None
        own = None if parameter.default is parameter.empty else parameter.default
        given = self.settings.get("norm", own)
        return given if norm_of(given) else None  # a function of one's own may mean something else by it

    def describe(self) -> dict[str, Any]:
        """What its outcome depends on, beside its target."""
        through = {"through": self.through} if self.through else {}
        return {"function": self.function, "settings": self.settings, "precision": self.precision, **through}

    @property
    def code(self) -> list[str]:
        """Of a function by import path, what tells it from an edited one (`storage.code_of`); else nothing."""
        from lightning_advknn.storage import code_of

        return code_of(self.function) if "." in self.function else []

    def _load(self) -> Callable[..., "Tensor"]:
        from lightning_advknn import attacks
        from lightning_advknn.attacks.libraries import load_function
        from lightning_advknn.attacks.parts.declare import declared

        if "." in self.function:
            return load_function(self.function)
        known = [name for name in attacks.__all__ if declared(getattr(attacks, name))]
        if self.function not in known:
            raise ValueError(
                f"Expected `function` to be one of {known} or an import path, but got {self.function!r}."
                f"{did_you_mean(self.function, known)}"
            )
        function: Callable[..., Tensor] = getattr(attacks, self.function)
        return function


def _is_library(function: Callable[..., "Tensor"]) -> "TypeIs[LibraryAttack]":
    """Whether it is an attack class of another library."""
    from lightning_advknn.attacks.libraries import LibraryAttack

    return isinstance(function, LibraryAttack)


def _check_types(name: str, function: Callable[..., "Tensor"], settings: Mapping[str, Any]) -> None:
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
