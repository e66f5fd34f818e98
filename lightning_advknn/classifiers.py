"""The victims: DkNN on several layers, KNN on one."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_advknn import functional
from lightning_advknn.choices import Backend, Convention, Metric, whole
from lightning_advknn.data.given import Images, Labelled, Labels, as_batches, as_images
from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.models import OUTPUT, FeatureNetwork, Frozen, Normalize, Surrogate
from lightning_advknn.models.surrogate import train_dknnb
from lightning_advknn.search import Bank
from lightning_advknn.search.build import BankSettings, build_banks, check_batch
from lightning_advknn.search.queries import together
from lightning_advknn.search.sharded import search_each, votes_of_each

_T = TypeVar("_T")

# Images a forward pass, on a GPU a whole piece of an attack; no result depends on it.
_BATCH = {"cpu": 500, "cuda": 1000}
_CALIBRATION = 75  # images of each class that calibrate, as in the paper


class DkNN(Frozen):
    """Deep kNN (arXiv 1803.04765): summed kNN votes of several layers (Eq. 4), with credibility (Eq. 5).

    A module, always in evaluation mode, whose forward pass gives vote shares. `fit` stores the training
    images that vote. Methods accept tensors and arrays on any device and return tensors on the victim's
    device.

    Args:
        model: Any module that accepts images in [0, 1]. It is put into evaluation mode.
        layers: Names of the submodules whose activations vote, as in ``model.named_modules()``; None for the
            model's output.
        k: Neighbours that vote in each layer; 75 in the paper.
        metric: Distance between features.
        convention: How credibility counts ties.
        mean: Channel means of images in [0, 1], for a normalisation before the model; None for none.
        std: Channel standard deviations for the same.
        backend: What searches the banks. Votes do not depend on it, unless it is approximate.
        index: Settings of an approximate backend that differ from its defaults.
        memory_gib: Memory for banks and searches in GiB; None for no limit, and on a GPU for most of what is
            free. Banks beyond it are read from disk.
        device: Device that `fit` moves the model and the banks to; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: If a layer does not exist or a setting is invalid.
    """

    calibration_votes: Tensor
    """True-class votes of the images passed to `calibrate`, int64 ``(N, L)``; before it, N is 0."""
    network: FeatureNetwork

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        k: int = 75,
        *,
        metric: Metric = "cosine",
        convention: Convention = "strict",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: Backend = "auto",
        index: Mapping[str, int] | None = None,
        memory_gib: float | None = None,
        device: str = "auto",
    ) -> None:
        super().__init__()
        for name, value, known in (("convention", convention, Convention), ("metric", metric, Metric)):
            if value not in get_args(known):
                raise ValueError(f"Expected `{name}` to be one of {get_args(known)}, but got {value!r}.")
        self._arguments = {  # the objects that were passed: scikit-learn's `clone` compares identities
            "model": model, "layers": layers, "k": k, "metric": metric, "convention": convention,
            "mean": mean, "std": std, "backend": backend, "index": index, "memory_gib": memory_gib,
            "device": device,
        }  # fmt: skip
        self.network = FeatureNetwork(model, layers or [OUTPUT], _normalization(mean, std))
        self.k = whole("k", k)
        self.metric: Metric = metric
        self.convention: Convention = convention
        self.backend: Backend = backend
        self.index, self.memory_gib, self.device = index, memory_gib, device
        self.queries = 0
        """Images queried so far: the cost of an attack on this victim."""
        self._forget()
        self.eval()

    def _forget(self) -> None:
        """Drop what `fit` and later calls have made."""
        self._banks = nn.ModuleList()  # by position, because module names must not contain dots
        empty = torch.empty(0, len(self.layers), dtype=torch.int64)
        self.register_buffer("calibration_votes", empty, persistent=False)
        # By layer. Plain dicts, because what is made on demand does not count as a change of the victim.
        self._surrogates: dict[str, Surrogate] = {}
        self._leave_one_out: dict[str, Tensor] = {}

    @classmethod
    def on_banks(
        cls,
        network: FeatureNetwork,
        banks: Mapping[str, Bank],
        k: int = 75,
        convention: Convention = "strict",
    ) -> "DkNN":
        """Make a DkNN from existing banks.

        Args:
            network: Gives the layers' features.
            banks: Features of the training images, by layer. Row m is the same image in all banks.
            k: Neighbours that vote in each layer; 75 in the paper.
            convention: How credibility counts ties.

        Raises:
            ValueError: If a layer has no bank, k is not an integer or exceeds a bank, or the convention is
                unknown.
        """
        missing = [layer for layer in network.layers if layer not in banks]
        if missing:
            raise ValueError(f"Expected a bank for each layer, but {missing} have none.")
        first, normalize = banks[network.layers[0]], network.normalize
        victim = DkNN(
            network.network,
            network.layers,
            k,
            metric=first.metric,
            convention=convention,
            mean=None if normalize is None else normalize.mean.flatten().tolist(),
            std=None if normalize is None else normalize.std.flatten().tolist(),
            backend=first.backend,
            index=first.index,
            device=str(first.labels.device),
        )
        victim.network = network
        victim._set_banks(banks)
        return victim

    def _set_banks(self, banks: Mapping[str, Bank]) -> None:
        for layer in self.layers:
            banks[layer].check_k(self.k)
        self._banks = nn.ModuleList(banks[layer] for layer in self.layers)
        self.calibration_votes = self.calibration_votes.to(banks[self.layers[0]].labels.device)
        self.eval()

    def fit(self, images: Labelled, labels: Labels | None = None) -> Self:
        """Store the features of the training images, which vote from now on.

        Moves the model to `device`. An earlier fit, its calibration and its surrogates are dropped.

        Args:
            images: float ``(M, ...)`` in [0, 1], as a tensor, an array or a list; or a Dataset or DataLoader
                of (image, label), which is read batch by batch.
            labels: Classes 0 to C - 1 as integers ``(M,)``; None if `images` contains them.

        Raises:
            ValueError: If an image is out of range, a label is not an integer of at least 0, k exceeds the
                number of images, a feature is not finite or depends on more than the image, or the device is
                not usable.
            OSError: If banks beyond `memory_gib` do not fit on the disk.
        """
        batches = as_batches(images, labels)
        n = sum(batches.sizes)
        if n and not 1 <= self.k <= n:
            raise ValueError(f"Expected `k` to be in [1, {n}] (the training images), but got {self.k}.")
        self._forget()
        self.eval().to(_find_device(self.device))
        settings = BankSettings(self.metric, self.backend, self.index, self.memory_gib)
        self._set_banks(build_banks(self.network, batches, settings=settings))
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the voting layers, in the order of the second dimension of votes."""
        return self.network.layers

    @property
    def banks(self) -> dict[str, Bank]:
        """Banks by layer; row m is the same training image in all of them. Empty before `fit`."""
        # It cannot raise a NotFittedError: `nn.Module` replaces any AttributeError of a property.
        return dict(zip(self.layers, cast(Iterable[Bank], self._banks), strict=False))

    @property
    def num_classes(self) -> int:
        """Number of classes, C; 0 before `fit`."""
        return next((bank.num_classes for bank in self.banks.values()), 0)

    @property
    def classes_(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Labels in the column order of `predict_proba`; scikit-learn reads them."""
        return np.arange(self.num_classes)

    def only(self, layer: str) -> "DkNN":
        """The kNN on one of the layers: a DkNN of that layer alone, with the same bank.

        Raises:
            ValueError: If the victim does not have the layer.
        """
        self._check_layer(layer)
        network = FeatureNetwork(self.network.network, [layer], self.network.normalize)
        one = DkNN.on_banks(network, self.banks, self.k, self.convention)
        position = self.layers.index(layer)
        one.calibration_votes = self.calibration_votes[:, position : position + 1]
        one._surrogates, one._leave_one_out = self._surrogates, self._leave_one_out
        return one

    def votes(self, features: Mapping[str, Tensor]) -> Tensor:
        """Count votes, int64 ``(B, L, C)``, for features ``(B, D)`` by layer."""
        votes = votes_of_each(self.banks, features, self.k)
        self.queries += len(votes)
        return votes

    def votes_in_turn(self, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
        """As `votes`, for batches of features; on a GPU several are searched together."""
        none = self.calibration_votes.new_empty(0, len(self.layers), self.num_classes)
        return torch.cat([none, *map(self.votes, together(batches))])

    def search(self, features: Mapping[str, Tensor], k: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Find the k nearest rows of each layer, as `MemoryBank.search`: distances and rows, ``(B, k)``."""
        self.queries += len(next(iter(features.values())))
        return search_each(self.banks, features, k)

    @torch.no_grad()
    @float32_arithmetic()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Compute features in batches, float32 ``(B, D)`` by layer, of images on the victim's device."""
        parts = [self.network.features(part) for part in torch.split(images, self._batch)]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in self.layers}

    @torch.no_grad()
    @float32_arithmetic()
    def forward(self, images: Tensor) -> Tensor:
        """Vote shares, float32 ``(B, C)``, of images in [0, 1]: the answer to a black-box attack.

        Images are rounded to float32, as they are when they are stored.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If an image is out of range, has another shape than the training images or is on
                another device than the victim, or a feature is not finite.
        """
        self.check_images(images)
        images = images.float()
        votes = self.votes(self.network.features(images)).sum(1)
        return votes.float() / (self.k * len(self.layers))

    def predict(self, images: Images) -> Tensor:
        """Predict classes, int64 ``(B,)``, of images in [0, 1] (Eq. 4); a tie goes to the lowest class.

        Raises:
            NotFittedError: Before `fit`. It is scikit-learn's, and a ValueError.
            ValueError: If an image is out of range or has another shape than the training images, or a
                feature is not finite.
        """
        # Equal counts give equal shares, so ties are exact.
        counts = self.predict_proba(images) * (self.k * len(self.layers))
        return functional.dknn_prediction(counts.round().long()[:, None])

    def predict_proba(self, images: Images) -> Tensor:
        """Vote shares, float32 ``(B, C)``, as `forward` gives them; errors as in `predict`."""
        return torch.cat(self._of_each_batch(self, images))

    def score(self, images: Labelled, labels: Labels | None = None) -> float:
        """Accuracy in [0, 1]; arguments as in `fit`, errors as in `predict`."""
        right = [
            self.predict(batch.images).cpu() == batch.labels.cpu() for batch in as_batches(images, labels)
        ]
        return torch.cat(right).double().mean().item()

    @torch.no_grad()
    @float32_arithmetic()
    def credibility(self, images: Images) -> Tensor:
        """Credibility (Eq. 5) against `reference_votes`, float64 ``(B,)``; errors as in `predict`."""
        known = self.reference_votes().sum(1)

        def ask(part: Tensor) -> Tensor:
            return functional.credibility(self.votes(self.network.features(part)), known, self.convention)

        return torch.cat(self._of_each_batch(ask, images))

    @torch.no_grad()
    @float32_arithmetic()
    def neighbours(self, images: Images, k: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Find the k nearest training images in each layer, nearest first; errors as in `predict`.

        Args:
            images: ``(B, ...)`` in [0, 1].
            k: Number of neighbours; None for the victim's `k`.

        Returns:
            By layer, distances float64 ``(B, k)`` and positions of the training images, int64 ``(B, k)``.
        """
        many = self.k if k is None else k
        parts = self._of_each_batch(lambda part: self.search(self.network.features(part), many), images)
        return {
            layer: (
                torch.cat([part[layer][0] for part in parts]),
                torch.cat([part[layer][1] for part in parts]),
            )
            for layer in self.layers
        }

    @property
    def _batch(self) -> int:
        """Images a forward pass."""
        return _BATCH[self.calibration_votes.device.type]

    def _of_each_batch(self, ask: Callable[[Tensor], _T], images: Images) -> list[_T]:
        """Call a function on batches of images, on the victim's device."""
        parts = torch.split(as_images(images), self._batch)
        shown = tqdm(parts, desc="query", disable=None if len(parts) > 1 else True, leave=False)
        found = []
        for part in shown:
            own = part.to(self.calibration_votes.device)
            self.check_images(own)
            found.append(ask(own))
        return found

    def check_images(self, images: Tensor) -> None:
        """Check that images are in [0, 1], on the victim's device and of the training images' shape.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If they are not.
        """
        self._check_fitted()
        _check_images_of(self.banks[self.layers[0]], images)

    @torch.no_grad()
    @float32_arithmetic()
    def calibrate(self, images: Labelled, labels: Labels | None = None) -> Self:
        """Store the true-class votes ``(N, L)`` of calibration images, for Eq. (5); earlier ones are dropped.

        Args:
            images: As in `fit`. They must not be training images.
            labels: As in `fit`.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If an image is out of range or has another shape than the training images, a label is
                not a class, a feature is not finite, or there are no images.
        """
        device = self.calibration_votes.device
        known: list[Tensor] = []

        def features() -> Iterator[dict[str, Tensor]]:
            for batch in tqdm(as_batches(images, labels), desc="calibration", disable=None, leave=False):
                check_batch(batch)
                own = batch.images.to(device)
                self.check_images(own)
                known.append(batch.labels.to(device))
                yield self.network.features(own)

        votes = self.votes_in_turn(features())
        if not len(votes):
            raise ValueError(
                "Expected calibration images, but got none. Pass those of the split `calibration`."
            )
        self.calibration_votes = functional.true_class_votes(votes, torch.cat(known))
        return self

    def reference_votes(self) -> Tensor:
        """True-class votes that `credibility` compares with, int64 ``(N, L)``.

        They are those of `calibrate`. Before it, they are leave-one-out votes on up to 75 training images of
        each class, evenly spaced in the bank.

        Raises:
            NotFittedError: Before `fit`.
        """
        self._check_fitted()
        if len(self.calibration_votes):
            return self.calibration_votes
        for layer, bank in self.banks.items():
            if layer not in self._leave_one_out:
                rows = _evenly_spaced(bank.labels)
                votes = bank.votes(bank.features[rows], self.k, bank.ids[rows])
                own = functional.true_class_votes(votes[:, None], bank.labels[rows])
                self._leave_one_out[layer] = own.squeeze(1)
        device = self.calibration_votes.device
        return torch.stack([self._leave_one_out[layer].to(device) for layer in self.layers], 1)

    def credibility_of(self, votes: Tensor) -> Tensor:
        """Credibility (Eq. 5), float64 ``(B,)``, of votes ``(B, L, C)``, against `calibration_votes`.

        Raises:
            ValueError: Before `calibrate`.
        """
        return functional.credibility(votes, self.calibration_votes.sum(1), self.convention)

    def fit_surrogate(
        self,
        layer: str | None = None,
        *,
        epochs: int = 20,
        learning_rate: float = 1.0,
        cls_weight: float = 0.3,
        cl_weight: float = 1.0,
        seed: int = 0,
    ) -> Surrogate:
        """Train a differentiable surrogate of the kNN on one layer, by `train_dknnb`; `surrogate` returns it.

        Args:
            layer: One of the victim's layers; None for the last.
            epochs: Passes over the rows of the bank.
            learning_rate: Approximate limit on how much one step changes a logit.
            cls_weight: lambda of Eq. (16).
            cl_weight: Weight of L_CL; 0 for L_CLS alone.
            seed: Seed of the order of rows.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If the victim does not have the layer, or k is not below the number of training
                images.
        """
        return self._train_surrogate(
            layer,
            epochs=epochs,
            learning_rate=learning_rate,
            cls_weight=cls_weight,
            cl_weight=cl_weight,
            seed=seed,
        )[0]

    def surrogate(self, layer: str | None = None) -> Surrogate:
        """The surrogate on a layer, None for the last; errors as in `fit_surrogate`.

        If there is none, it is trained, and one line on stderr says so.
        """
        layer = self.layers[-1] if layer is None else layer
        if layer not in self._surrogates:
            _, agreement = self._train_surrogate(layer)
            tqdm.write(
                f"Trained a surrogate on {layer}, as none was given: it agrees with the kNN on"
                f" {agreement:.1%} of held-out training images. `fit_surrogate` trains others.",
                file=sys.stderr,
            )
        return self._surrogates[layer].to(self.calibration_votes.device)

    def _train_surrogate(self, layer: str | None, **settings: Any) -> tuple[Surrogate, float]:
        """Train and store a surrogate; also return its agreement with the kNN on held-out rows."""
        layer = self.layers[-1] if layer is None else layer
        self._check_layer(layer)
        self._check_fitted()
        bank = self.banks[layer]
        with torch.inference_mode(False):  # autograd refuses tensors made in it
            trained = train_dknnb(bank.features, bank.leave_one_out_votes(self.k), **settings)
        surrogate = Surrogate(self.network.network, layer, trained.dknnb, self.network.normalize)
        self._surrogates[layer] = surrogate
        return surrogate, trained.agreement

    def _check_layer(self, layer: str) -> None:
        if layer not in self.layers:
            raise ValueError(f"Expected `layer` to be one of {list(self.layers)}, but got {layer!r}.")

    def _check_fitted(self) -> None:
        if not len(self._banks):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError(
                "Expected a victim with training images, but it has none. Call `fit(images, labels)` first."
            )

    # The interface that scikit-learn's `clone`, `check_is_fitted` and `cross_val_score` need.

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Arguments that the constructor was called with."""
        return dict(self._arguments)

    def set_params(self, **arguments: Any) -> Self:
        """Replace arguments of the constructor. The victim must be fitted again.

        Raises:
            ValueError: If there is no such argument, or the constructor refuses its value.
        """
        unknown = sorted(arguments.keys() - self._arguments.keys())
        if unknown:
            raise ValueError(f"Expected arguments among {list(self._arguments)}, but got {unknown}.")
        changed = type(self)(**{**self._arguments, **arguments})
        vars(self).clear()
        vars(self).update(vars(changed))
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return len(self._banks) > 0

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(three_d_array=True),
        )


class KNN(DkNN):
    """kNN on one layer: a DkNN of that layer alone.

    Args:
        model: Any module that accepts images in [0, 1]; ``torch.nn.Flatten()`` for a kNN on pixels.
        layer: Name of the submodule whose activations vote; None for the model's output.
        k: Neighbours that vote.
        arguments: The other arguments of `DkNN`.

    Raises:
        ValueError: As `DkNN`.
    """

    def __init__(self, model: nn.Module, layer: str | None = None, k: int = 75, **arguments: Any) -> None:
        super().__init__(model, None if layer is None else [layer], k, **arguments)
        own = {name: value for name, value in self._arguments.items() if name != "layers"}
        self._arguments = {**own, "layer": layer}


def _normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalize | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"Expected `mean` and `std` together, but got {mean} and {std}.")
    return Normalize(mean, std)


def _find_device(name: str) -> torch.device:
    """Find a device by name; ``auto`` is the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(0, device=name, dtype=torch.float64).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"Expected `device` to be one that torch can use here, with float64, but {name!r}: {error}"
        ) from error


def _evenly_spaced(labels: Tensor) -> Tensor:
    """Choose up to `_CALIBRATION` evenly spaced rows of each class, int64 ``(N,)``."""
    chosen = []
    for label in torch.unique(labels).tolist():
        rows = (labels == label).nonzero().squeeze(1)
        n = min(len(rows), _CALIBRATION)
        chosen.append(rows[torch.arange(n, device=rows.device) * len(rows) // n])
    return torch.cat(chosen)


def _check_images_of(bank: Bank, images: Tensor) -> None:
    """Check images against a bank, as `DkNN.check_images`; a bank made without images knows no shape."""
    functional.check_images(images)
    if images.device != bank.labels.device:
        raise ValueError(
            f"Expected images on {bank.labels.device}, like the bank, but they are on {images.device}."
            " Move them with `.to`."
        )
    shape = bank.image_shape
    if shape is not None and images.shape[1:] != shape:
        raise ValueError(
            f"Expected images of shape (B, {', '.join(map(str, shape))}), as in the bank, but got"
            f" {tuple(images.shape)}. Channels come before height and width."
        )
