"""What an attack says of itself: what it is on, and its norm."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

from torch import Tensor

from lightning_advknn.attacks.parts.arguments import Attack
from lightning_advknn.attacks.parts.balls import check_norm
from lightning_advknn.choices import Norm
from lightning_advknn.classifiers import DkNN
from lightning_advknn.functional import check_images, check_labels

_Attack = TypeVar("_Attack", bound=Callable[..., Tensor])
_On = Literal["logits", "victim"]


class Declaration(NamedTuple):
    """What `attack` was told."""

    on: _On
    norm: Norm | None


def attack(*, on: _On, norm: Norm | None = None) -> Callable[[_Attack], _Attack]:
    """Declare a function ``(target, images, labels, *, settings) -> adversarial`` as an attack; a decorator.

    What is declared runs wherever the victim is: images and labels are moved there, adversarials back. An attack on logits
    that is given a victim attacks the victim's surrogate, which is trained if there is none.

    Args:
        on: ``logits``: its first argument is a function of images that gives logits. ``victim``: a `DkNN`.
        norm: What its eps is measured in, or what it makes small; None where its setting ``norm`` says so.

    Raises:
        ValueError: If `on` or `norm` is none of its choices. When the attack is called: if it is on a victim and gets something
            else, or images and labels are no tensors.

    >>> @attack(on="logits", norm="linf")
    ... def brighter(logits_fn, images, labels, *, eps):
    ...     return (images + eps).clamp(0, 1)
    """
    if on not in get_args(_On):
        raise ValueError(f"Expected `on` to be one of {get_args(_On)}, but got {on!r}.")
    if norm is not None:
        check_norm(norm)

    def declare(function: _Attack) -> _Attack:
        @wraps(function)
        def run(target: Any, images: Any, labels: Any, **settings: Any) -> Tensor:
            if not isinstance(images, Tensor):
                check_images(images)  # refuses them
            if not isinstance(labels, Tensor):
                check_labels(labels, len(images))
            if not isinstance(target, DkNN):
                if on == "victim" or not callable(target):
                    raise ValueError(_refusal(function.__name__, on, target))
                return function(target, images, labels, **settings)
            device = target.calibration_votes.device
            attacked = target if on == "victim" else target.surrogate()
            return function(attacked, images.to(device), labels.to(device), **settings).to(images.device)

        vars(run)["declaration"] = Declaration(on, norm)
        return cast(_Attack, run)

    return declare


def declared(function: Callable[..., Any]) -> Declaration | None:
    """What a function was declared as; None if it was not."""
    found = getattr(function, "declaration", None)
    return found if isinstance(found, Declaration) else None


def on_votes(attack: Attack) -> Attack:
    """The same attack, on a victim's vote shares as logits, instead of the victim or its surrogate."""

    def run(target: Any, images: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        asked = target.__call__ if isinstance(target, DkNN) else target
        return attack(asked, images, labels, **settings)

    return run


def _refusal(name: str, on: _On, target: object) -> str:
    kind = f"a {type(target).__module__}.{type(target).__qualname__}".replace("a builtins.", "a ")
    if on == "victim":
        return (
            f"Expected {name} to get a victim, a `DkNN` or `KNN`, but got {kind}. Make one of your model:"
            " `DkNN(model, layers=[...]).fit(train_images, train_labels)`."
        )
    return f"Expected {name} to get a module that gives logits, or a victim, but got {kind}."
