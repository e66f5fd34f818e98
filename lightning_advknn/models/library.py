"""Networks of torchvision, timm or one's own."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lightning_advknn.models.normalize import Normalize


class LibraryNetwork(nn.Module):
    """A network that a function makes, such as torchvision's and timm's, behind a normalisation.

    Its layers are called ``normalize`` and, after their names in the library, ``model.<layer>``.

    Args:
        function: Import path of a function or class that makes the network: ``torchvision.models.resnet18``,
            ``timm.create_model``, ``my_module.MyNetwork``.
        settings: Its keyword arguments.
        mean: Channel means that the network was or will be trained with, of images in [0, 1].
        std: Channel standard deviations.
        pool: Height and width that a layer's maps ``(B, channels, H, W)`` are averaged to before they vote, by the layer's
            name. Layers that are not named here vote whole.

    Raises:
        ValueError: If there is no such function, it refuses its settings or makes no network, or `pool` names no layer.
        ImportError: If its library is not installed.
    """

    def __init__(
        self,
        function: str,
        settings: dict[str, Any] | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        pool: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        make, settings = _load(function), settings or {}
        try:
            model = make(**settings)
        except Exception as error:  # libraries raise anything for settings they do not like
            raise ValueError(
                f"Expected {function} to make a network of the settings {settings}, but: {type(error).__name__}: {error}."
                " `settings` are its keyword arguments; pretrained weights of torchvision come with their own number of classes."
            ) from error
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"Expected {function} to make a torch.nn.Module, but it made a {type(model).__name__}."
            )
        self.normalize = Normalize(mean, std)
        self.model: nn.Module = model
        self.function = function
        self.pool: Mapping[str, int] = pool or {}
        known = [name for name, _ in self.named_modules() if name]
        for layer, size in self.pool.items():
            if layer not in known or size < 1:
                raise ValueError(
                    f"Expected `pool` to give layers of the network a size of at least 1, but got {layer!r}: {size}. Its layers"
                    f" are {known}."
                )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` of images in [0, 1].

        Raises:
            ValueError: If the network gives something else than a tensor.
        """
        logits = self.model(self.normalize(images))
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"Expected {self.function} to give logits, but got a {type(logits).__name__}. Switch off what it gives"
                " beside them, as torchvision's `aux_logits: false` does."
            )
        return logits


def _load(path: str) -> Callable[..., Any]:
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(
            f"Expected `function` to be an import path such as torchvision.models.resnet18, but got {path!r}."
        )
    try:
        module = import_module(module_name)
    except ImportError as error:
        missing = (error.name or path).partition(".")[0]
        remedy = f"Install {missing}, or put it beside the script that is run or on PYTHONPATH."
        if missing == "timm":
            remedy = 'Install it: `python -m pip install -e ".[timm]"`.'
        raise ImportError(f"Expected {path} to be importable, but got: {error}. {remedy}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(
            f"Expected {path} to be a function or a class, but {module_name} has none of this name."
        )
    make: Callable[..., Any] = found
    return make
