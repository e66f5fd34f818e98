"""Declaration of attacks: whether they attack logits or victims, and in which norm."""

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
    """The arguments of `attack`."""

    on: _On
    norm: Norm | None
    threads: bool = False


def attack(*, on: _On, norm: Norm | None = None, threads: bool = False) -> Callable[[_Attack], _Attack]:
    """Declare a function ``(target, images, labels, *, settings) -> adversarial`` as an attack; a decorator.

    The attack runs on the device of the victim: images and labels are moved there, adversarials are moved
    back. An attack on logits that gets a victim attacks `DkNN.surrogate`, which is trained if there is none.

    Args:
        on: ``logits`` if the target is a function from images to logits, ``victim`` if it is a `DkNN`.
        norm: Norm of eps, or the norm that the attack minimises; None if its setting ``norm`` says so.
        threads: Whether several threads may run it at once, each with a copy of the logits function. It must
            draw no random numbers and keep nothing between calls. On a CPU, `evaluation.perturb` is then
            about twice as fast.

    Raises:
        ValueError: If `on` or `norm` is not one of its choices. When the attack is called: if the target is
            of the wrong kind, or images or labels are not tensors.

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
                check_images(images)  # raises
            if not isinstance(labels, Tensor):
                check_labels(labels, len(images))
            if not isinstance(target, DkNN):
                if on == "victim" or not callable(target):
                    raise ValueError(_refusal(function.__name__, on, target))
                return function(target, images, labels, **settings)
            device = target.calibration_votes.device
            attacked = target if on == "victim" else target.surrogate()
            return function(attacked, images.to(device), labels.to(device), **settings).to(images.device)

        vars(run)["declaration"] = Declaration(on, norm, threads)
        return cast(_Attack, run)

    return declare


def declared(function: Callable[..., Any]) -> Declaration | None:
    """Get the declaration of a function; None if it is not declared."""
    found = getattr(function, "declaration", None)
    return found if isinstance(found, Declaration) else None


def on_votes(attack: Attack) -> Attack:
    """Make an attack on logits attack the vote shares of a victim instead of its surrogate."""

    def run(target: Any, images: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        asked = target.__call__ if isinstance(target, DkNN) else target
        return attack(asked, images, labels, **settings)

    return run


def _refusal(name: str, on: _On, target: object) -> str:
    kind = f"a {type(target).__module__}.{type(target).__qualname__}".replace("a builtins.", "a ")
    if on == "victim":
        return (
            f"Expected {name} to get a victim, a `DkNN` or `KNN`, but got {kind}. Make one from your model:"
            " `DkNN(model, layers=[...]).fit(train_images, train_labels)`."
        )
    return f"Expected {name} to get a module that gives logits, or a victim, but got {kind}."
