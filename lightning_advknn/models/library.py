"""Networks of torchvision or timm, or your own."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lightning_advknn.models.normalize import Normalize


class LibraryNetwork(nn.Module):
    """Normalisation followed by a network that a function returns, such as torchvision's or timm's.

    Its layers are ``normalize`` and ``model.<layer>``, where ``<layer>`` is the name in the library.

    Args:
        function: Import path of a function or class that returns the network:
            ``torchvision.models.resnet18``, ``timm.create_model``, ``my_module.MyNetwork``.
        settings: Its keyword arguments.
        mean: Channel means of the images in [0, 1] that the network was or will be trained on.
        std: Channel standard deviations.
        pool: By layer name, the height and width to which its maps ``(B, channels, H, W)`` are averaged
            before they vote. Other layers vote with all their features.

    Raises:
        ValueError: If `function` does not exist, refuses its settings or returns no network; or if `pool`
            names a layer that does not exist.
        ImportError: If the library of `function` is not installed.
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
        make, settings = _import_function(function), settings or {}
        try:
            model = make(**settings)
        except Exception as error:  # libraries raise anything for settings they do not like
            raise ValueError(
                f"Expected {function} to make a network with the settings {settings}, but it failed:"
                f" {type(error).__name__}: {error}. `settings` must be its keyword arguments; torchvision's"
                " pretrained weights need their own number of classes."
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
                    f"Expected `pool` to give layers of the network a size of at least 1, but got {layer!r}:"
                    f" {size}. Its layers are {known}."
                )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` of images in [0, 1].

        Raises:
            ValueError: If the network does not return a tensor.
        """
        logits = self.model(self.normalize(images))
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"Expected {self.function} to give logits, but got a {type(logits).__name__}. Switch off its"
                " other outputs, such as torchvision's with `aux_logits: false`."
            )
        return logits


def _import_function(path: str) -> Callable[..., Any]:
    """Import a function or class by its path."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(
            f"Expected `function` to be an import path such as torchvision.models.resnet18, but got {path!r}."
        )
    try:
        module = import_module(module_name)
    except ImportError as error:
        missing = (error.name or path).partition(".")[0]
        remedy = f"Install {missing}, or put it beside the script or on PYTHONPATH."
        if missing == "timm":
            remedy = 'Install it: `python -m pip install -e ".[timm]"`.'
        raise ImportError(f"Expected {path} to be importable, but got: {error}. {remedy}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(
            f"Expected {path} to be a function or a class, but {module_name} has none of that name."
        )
    make: Callable[..., Any] = found
    return make
