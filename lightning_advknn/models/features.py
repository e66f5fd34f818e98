"""Layer features of any network."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_advknn.models.frozen import Frozen
from lightning_advknn.models.library import LibraryNetwork
from lightning_advknn.models.normalize import Normalize

OUTPUT = "output"
"""Layer name of a network's own output."""


class FeatureNetwork(Frozen):
    """A network and the layers whose features vote, always in evaluation mode.

    Args:
        network: Any module that maps images in [0, 1] to logits.
        layers: Names of its submodules, as in ``network.named_modules()``. Each must run exactly once in a
            forward pass. `OUTPUT` names the network's own output.
        normalize: Applied to images before the network; None for nothing.

    Raises:
        ValueError: If a layer does not exist, is named twice or is TorchScript.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], normalize: Normalize | None = None) -> None:
        super().__init__()
        submodules = {name: module for name, module in network.named_modules() if name}
        modules = {**submodules, OUTPUT: submodules.get(OUTPUT, network)}
        known = list(modules)
        unknown = [layer for layer in layers if layer not in known]
        if unknown or not layers or len(set(layers)) < len(layers):
            raise ValueError(
                f"Expected distinct `layers` of the network, but got {list(layers)}. Its layers are {known}."
            )
        scripted = [layer for layer in layers if isinstance(modules[layer], torch.jit.ScriptModule)]
        if scripted:
            raise ValueError(
                f"Expected `layers` that are ordinary modules, but {scripted[:3]} are TorchScript, whose"
                " features cannot be read. Use the network that was scripted or traced, with its"
                " `state_dict`."
            )
        self.network, self.normalize = network, normalize
        self.layers = tuple(layers)
        self._places = {layer: "" if modules[layer] is network else layer for layer in layers}
        self._pool = network.pool if isinstance(network, LibraryNetwork) else {}
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` of images in [0, 1].

        Raises:
            ValueError: If images or the network's weights are not float32, or if a module of the network is
                in training mode.
        """
        if images.dtype != torch.float32:
            raise ValueError(
                f"Expected float32 images, but got {images.dtype}. Convert them with `.float()`; divide uint8"
                " by 255."
            )
        training = [name for name, module in self.network.named_modules() if module.training]
        if training:
            raise ValueError(
                f"Expected the network in evaluation mode, but its modules {training[:3]} are in training"
                " mode, so its outputs may depend on more than the image. Call `eval()` on it."
            )
        try:
            logits: Tensor = self.network(images if self.normalize is None else self.normalize(images))
        except RuntimeError as error:
            others = {str(each.dtype) for each in self.network.parameters()} - {"torch.float32"}
            if others:
                raise ValueError(
                    f"Expected a network with float32 weights, but some are {', '.join(sorted(others))}, and"
                    f" it fails on float32 images: {error}. Call `.float()` on it."
                ) from error
            raise
        return logits

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images in [0, 1] by layer: its flattened activations, float32 ``(B, D)``."""
        return self.logits_and_features(images)[1]

    def logits_and_features(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits ``(B, C)`` and features of each layer, float32 ``(B, D)``, from one forward pass.

        Raises:
            ValueError: If a layer does not run exactly once, does not return a tensor, or is to be pooled but
                does not return maps; or if `forward` refuses the images.
        """
        outputs: dict[str, Tensor] = {}
        runs = Counter[str]()

        def keep(layer: str, output: Any) -> None:
            runs[layer] += 1
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"Expected layer {layer!r} to give a tensor, but got a {type(output).__name__}. Choose"
                    " another layer."
                )
            if layer in self._pool:
                if output.ndim != 4:
                    raise ValueError(
                        f"Expected layer {layer!r} of `pool` to give maps (B, channels, H, W), but got"
                        f" {tuple(output.shape)}. Remove it from `pool`."
                    )
                output = F.adaptive_avg_pool2d(output, self._pool[layer])
            # A copy: the next layer may change its input in place.
            outputs[layer] = output.flatten(1).to(torch.float32, copy=True)

        handles = [
            self.network.get_submodule(self._places[layer]).register_forward_hook(
                lambda _module, _inputs, output, layer=layer: keep(layer, output)
            )
            for layer in self.layers
        ]
        try:
            logits = self(images)
        finally:
            for handle in handles:
                handle.remove()
        if len(outputs) < len(self.layers):
            silent = [layer for layer in self.layers if layer not in outputs]
            raise ValueError(
                f"Expected the network to run each of `layers`, but it skips {silent}. Those that ran:"
                f" {list(outputs)}. If it is compiled (`torch.compile`), pass the original network."
            )
        if repeated := {layer: times for layer, times in runs.items() if times > 1}:
            raise ValueError(
                f"Expected each of `layers` to run once in a forward pass, but got these runs: {repeated}."
                f" Layers that run once are {self._running_once(images)}. Choose among them, or use a"
                " separate module for each call."
            )
        return logits, {layer: outputs[layer] for layer in self.layers}

    @torch.no_grad()
    def _running_once(self, images: Tensor) -> list[str]:
        """Layers that run exactly once in a forward pass."""
        runs = Counter[str]()
        handles = [
            module.register_forward_hook(lambda *_, name=name: runs.update([name]))
            for name, module in self.network.named_modules()
            if name
        ]
        try:
            self(images)
        finally:
            for handle in handles:
                handle.remove()
        return [name for name, times in runs.items() if times == 1]
