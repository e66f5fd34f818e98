"""An attack and its settings, as configurations write them.

This file imports nothing heavy, because the command line reads its options from it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from lightning_advknn.choices import VICTIMS, GradientPrecision, Norm, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeIs

    from lightning_advknn.attacks.libraries import LibraryAttack
    from lightning_advknn.attacks.parts.arguments import Attack
    from lightning_advknn.attacks.parts.declare import Declaration

    Plain = Any
else:
    Plain = bool | int | float | str | list | dict | None
"""A plain value of YAML. With `Any`, jsonargparse would call whatever the `class_path` of a value names."""


@dataclass(frozen=True)
class AttackSettings:
    """An attack and its settings.

    Args:
        function: Name of a function of `lightning_advknn.attacks`; or the import path of another function
            ``(target, images, labels, **settings)``, or of an attack class of torchattacks, foolbox or the
            Adversarial Robustness Toolbox (`libraries.LibraryAttack`). `lightning_advknn.attack` declares
            whether a function attacks logits or victims; without it, it attacks logits.
        settings: Keyword arguments of the function.
        precision: How gradients are computed.
        targets: What is attacked: ``origin``, names of surrogates, ``knn``, ``dknn``. None means all victims
            for an attack on victims, and all others for an attack on logits. An attack on logits gets the
            vote shares of a victim as logits without a gradient; a function that is not declared gets the
            victim itself.
        through: Name of the surrogate that is passed to an attack on victims as `surrogate`.
        vary: Values of more settings, for example ``eps: [.1, .2]``: one attack for each combination.
        norm: Norm of eps, ``l2`` or ``linf``, for an attack that does not say (`measure`).
    """

    function: str
    settings: dict[str, Plain] = field(default_factory=dict)
    precision: GradientPrecision = "float32"
    targets: list[str] | None = None
    through: str | None = None
    vary: dict[str, list[Plain]] = field(default_factory=dict)
    norm: str | float | None = None

    def check(self) -> None:
        """Check all that does not depend on images and networks.

        Raises:
            ValueError: If the function, a setting, the precision or the norm does not exist, a setting is
                missing or out of range, or a function with an argument `victim` is not declared.
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
        _ = self.known_norm  # for a library's attack, this checks the settings too
        if _is_library(function):
            return
        _check_types(self.function, function, self.settings)
        if "." not in self.function and not self.on_victim:
            from lightning_advknn.attacks.parts.probe import try_out

            # The function checks its settings itself.
            try_out(partial(function, **self.settings), precision=self.precision)

    def _check_precision(self) -> None:
        if self.precision not in get_args(GradientPrecision):
            raise ValueError(
                f"Expected `precision` to be one of {get_args(GradientPrecision)}, but got"
                f" {self.precision!r}."
            )
        if self.precision in ("bfloat16", "tf32") and self.on_victim:
            raise ValueError(
                f"Expected another `precision` than {self.precision!r} for {self.function}: a victim decides in"
                " float32."
            )
        if self.precision != "float32" and self._victims and not self.on_victim:
            raise ValueError(
                f"Expected `precision` 'float32' for {self.function} with {self._victims} among `targets`,"
                f" but got {self.precision!r}: votes have no gradient. Leave `precision` out."
            )

    def _check_target(self, function: Callable[..., "Tensor"]) -> None:
        """Refuse a function with an argument `victim`, unless it is declared or all `targets` are victims."""
        first = next(iter(inspect.signature(function).parameters), None)
        if first == "victim" and self._declaration is None and not self._only_victims:
            raise ValueError(
                f"Expected {self.function}, whose first argument is `victim`, to be declared as an attack on"
                ' victims, but it is not. Put `@lightning_advknn.attack(on="victim")` above it, or'
                " `targets: [knn, dknn]` beside `function`."
            )

    def bind(self, image_shape: tuple[int, ...] = (1, 28, 28), num_classes: int = 10) -> "Attack":
        """Bind the settings, after a trial on two images (`probe.try_out`).

        Args:
            image_shape: Shape of the images in the trial, ``(channels, H, W)``.
            num_classes: Number of classes in the trial. The attack also works with other shapes and classes.

        Raises:
            ValueError: As `check`; or if the attack fails in the trial, does not return images, or needs
                gradients although it will attack votes.
            ImportError: If the library of the function is not installed.
        """
        from lightning_advknn.attacks.parts.declare import on_votes
        from lightning_advknn.attacks.parts.probe import try_out

        self.check()
        function = self._load()
        bound = partial(function, **self.settings)
        own = self._declaration is None and not _is_library(function)
        votes = bool(self._victims) and not own  # it gets vote shares, not the victim itself
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
        """Make the error of an attack that failed in its trial."""
        hint = (
            f" It is to attack votes ({self._victims} among `targets`), which have no gradient: use an attack"
            " that needs none, or leave these out."
        )
        if _is_library(self._load()):
            return ValueError(f"{error}{hint}")
        return ValueError(
            f"Expected {self.function} with {self.settings} to attack two images of shape {image_shape} and a"
            f" small module of {num_classes} classes, but it raised {type(error).__name__}: {error}."
            + (hint if votes else " Correct it, or change its settings.")
        )

    @property
    def on_victim(self) -> bool:
        """Whether it is declared as an attack on victims, and attacks them if `targets` is None."""
        return self._declaration is not None and self._declaration.on == "victim"

    def targets_among(self, methods: Sequence[str]) -> Sequence[str]:
        """Find what it attacks.

        Args:
            methods: Names of the logits functions: ``origin`` and surrogates.

        Raises:
            ValueError: If `targets` or `through` names something else.
        """
        known = VICTIMS if self.on_victim else (*methods, *VICTIMS)
        for given, there in ((self.targets or (), known), (filter(None, [self.through]), methods)):
            for name in given:
                if name not in there:
                    raise ValueError(
                        f"Expected {self.function} to have `targets` and `through` among {list(there)}, but"
                        f" got {name!r}."
                    )
        if not self.through and "surrogate" in inspect.signature(self._load()).parameters:
            raise ValueError(
                f"Expected {self.function} to have `through`, the name of the surrogate that it searches with, among"
                f" {list(methods)}, but it is missing. Add it beside `function`."
            )
        if self.targets is not None:
            return self.targets
        return VICTIMS if self.on_victim else methods

    @property
    def _victims(self) -> list[str]:
        """Victims among `targets`."""
        return [name for name in self.targets or () if name in VICTIMS]

    @property
    def _only_victims(self) -> bool:
        return bool(self.targets) and len(self._victims) == len(self.targets or ())

    @property
    def _declaration(self) -> "Declaration | None":
        from lightning_advknn.attacks.parts.declare import declared

        return declared(self._load())

    @property
    def eps(self) -> float | None:
        """Radius of its ball; None if it has none."""
        eps = self.settings.get("eps")
        return float(eps) if isinstance(eps, int | float) else None

    @property
    def measure(self) -> Norm:
        """Norm of its eps, or the norm that it minimises if it has no eps.

        It comes from the attack itself if possible: from ``distance`` in foolbox; from ``norm``, the
        documentation or the paper in torchattacks and ART (`LibraryAttack.check`); from the declaration or
        the setting ``norm`` of a function. Otherwise it is the field `norm`.

        Raises:
            ValueError: If the norm is neither L2 nor Linf, is unknown, or differs from the field `norm`.
        """
        if self.known_norm is None:
            raise ValueError(
                f"Expected `norm` to say what {self.function} keeps small, as nothing else does, but it is"
                " missing. Add `norm: l2` or `norm: linf` beside `function`."
            )
        return self.known_norm

    @property
    def known_norm(self) -> Norm | None:
        """The same as `measure`, but None if it is unknown."""
        from lightning_advknn.attacks.parts.balls import as_norm

        said = self._said()
        norms = [as_norm(value, self.function) for value in (said, self.norm) if value is not None]
        if len(set(norms)) > 1:
            raise ValueError(
                f"Expected `norm` of {self.function} to be {norms[0]!r}, as it says itself, but got"
                f" {self.norm!r}. Leave `norm` out."
            )
        return norms[0] if norms else None

    def _said(self) -> object:
        """The norm by the attack itself, in any spelling; None if it does not say."""
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
        return given if norm_of(given) else None  # the word may mean something else in a user's function

    def describe(self) -> dict[str, Any]:
        """What its results depend on, apart from the target."""
        through = {"through": self.through} if self.through else {}
        return {"function": self.function, "settings": self.settings, "precision": self.precision, **through}

    @property
    def defaults(self) -> dict[str, Plain]:
        """Settings of a function of this package that are not given, with their values in this version."""
        if "." in self.function:
            return {}
        parameters = list(inspect.signature(self._load()).parameters.values())[3:]
        return {each.name: each.default for each in parameters if each.name not in self.settings}

    @property
    def code(self) -> list[str]:
        """Identifies the code of a function by import path (`storage.code_of`); empty for others."""
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
    """Check settings by the annotations of a function."""
    types = get_type_hints(function)
    for setting in settings.keys() & types.keys():
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{setting}", type=types[setting])
        try:
            parser.parse_object({setting: settings[setting]})
        except ArgumentError as error:
            wanted = inspect.formatannotation(types[setting])
            raise ValueError(
                f"Expected `{setting}` of {name} to be {wanted}, but got {settings[setting]!r}."
            ) from error
