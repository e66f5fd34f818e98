"""GTSRB."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from lightning_advknn.data.base import ImageDataModule, MissingDataError

_SIDE = 32
_OFFICIAL = {"train": 39_209, "test": 12_630}  # numbers of images


class GTSRB(ImageDataModule):
    """German traffic signs: 39,209 training and 12,630 test photographs of 43 classes, resized to 3x32x32.

    Files: ``root/gtsrb/GTSRB/Training/<class>/<track>_<frame>.ppm``, ``root/gtsrb/GTSRB/Final_Test/Images``
    and ``root/gtsrb/GT-final_test.csv``, in torchvision's layout. Photographs have sides of 15 to 250 pixels.
    Each is resized to 32x32 (bilinear, antialiased); its aspect ratio may change. If all files are 32x32
    already, they are not the original photographs, and `note` says so.

    Training photographs come in tracks: about 30 frames of one sign, nearly alike. So
    ``val`` has whole tracks of each class, and ``train`` has none of their frames.

    Args:
        root: Folder of the data files.
        val_size: Approximate number of training images in ``val``, which has at least one whole track of each
            class.
        calibration_per_class: Number of test images of each class in ``calibration``. The smallest class has
            60 test images.
        settings: Other arguments of `ImageDataModule`. `verify_checksums` verifies downloaded archives and
            the number of files.
    """

    image_shape = (3, _SIDE, _SIDE)
    num_classes = 43
    class_names = (
        *(f"speed limit {limit}" for limit in (20, 30, 50, 60, 70, 80)),
        "end of speed limit 80",
        *(f"speed limit {limit}" for limit in (100, 120)),
        *("no passing", "no passing over 3.5 t", "right of way at the next intersection", "priority road"),
        *("yield", "stop", "no vehicles", "no vehicles over 3.5 t", "no entry", "general caution"),
        *("dangerous curve to the left", "dangerous curve to the right", "double curve", "bumpy road"),
        *("slippery road", "road narrows on the right", "road work", "traffic signals", "pedestrians"),
        *("children crossing", "bicycles crossing", "beware of ice or snow", "wild animals crossing"),
        *("end of all speed and passing limits", "turn right ahead", "turn left ahead", "ahead only"),
        *("go straight or right", "go straight or left", "keep right", "keep left", "roundabout"),
        *("end of no passing", "end of no passing over 3.5 t"),
    )

    def __init__(
        self, root: str = "data", val_size: int = 3900, calibration_per_class: int = 20, **settings: Any
    ) -> None:
        super().__init__(root, val_size=val_size, calibration_per_class=calibration_per_class, **settings)
        self._tracks: list[str] = []  # one for each training image

    def prepare_data(self) -> None:
        """Download missing files, if `download` is set, and check that they exist."""
        for split in _OFFICIAL:
            if self.download:
                with self._downloading():
                    torchvision.datasets.GTSRB(str(self.root), split=split, download=True)
        self._check_there()

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read the training or test images, uint8 ``(n, 3, 32, 32)``, and labels, int64 ``(n,)``."""
        self._check_there()
        split = "train" if train else "test"
        with self._reading():
            samples = torchvision.datasets.GTSRB(str(self.root), split=split)._samples  # paths and labels
            if train:  # torchvision numbers the existing folders, and some may be missing
                samples = [(path, int(Path(path).parent.name)) for path, _ in samples]
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                pictures, sizes = zip(*pool.map(_read, [path for path, _ in samples]), strict=True)
        if self.verify_checksums and len(samples) != _OFFICIAL[split]:
            raise ValueError(
                f"Expected the official {_OFFICIAL[split]} {split} images of GTSRB in {self.root / 'gtsrb'},"
                f" but got {len(samples)}. Extract the archives again, or set `verify_checksums` to false if"
                " they are your own."
            )
        if set(sizes) == {(_SIDE, _SIDE)}:
            self.note = f"files of {_SIDE}x{_SIDE} pixels, resized before: not the official photographs"
        if train:
            self._tracks = [f"{label}/{Path(path).name.partition('_')[0]}" for path, label in samples]
        return torch.stack(pictures), torch.tensor([label for _, label in samples], dtype=torch.int64)

    def _held_out(self, labels: Tensor) -> Tensor:
        """Positions of the images of whole tracks: in each class at least one track, and never all."""
        share = self.val_size / len(labels)
        tracks = sorted(set(self._tracks))
        shuffled = [tracks[i] for i in torch.randperm(len(tracks), generator=self._generator()).tolist()]
        by_class: dict[str, list[str]] = {}
        for track in shuffled:
            by_class.setdefault(track.partition("/")[0], []).append(track)
        chosen: set[str] = set()
        for label, own in by_class.items():
            if len(own) < 2:
                raise ValueError(
                    f"Expected at least two tracks of class {label} in {self.root / 'gtsrb'}, one for"
                    f" training and one for validation, but got {own}."
                )
            chosen.update(own[: min(max(1, round(share * len(own))), len(own) - 1)])
        return torch.tensor([i for i, track in enumerate(self._tracks) if track in chosen])

    def _check_there(self) -> None:
        folder = self.root / "gtsrb"
        wanted: Sequence[Path] = (
            folder / "GTSRB" / "Training",
            folder / "GTSRB" / "Final_Test" / "Images",
            folder / "GT-final_test.csv",
        )
        for path in wanted:
            if not path.exists():
                raise MissingDataError(
                    f"Expected {self.name}'s files in {path}, but it is missing. Set `root` to the folder"
                    " that holds `gtsrb`, or `download` to true."
                )


def _read(path: str) -> tuple[Tensor, tuple[int, int]]:
    """A photograph, uint8 ``(3, 32, 32)``, and the width and height of its file."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except Exception as error:  # decoders raise anything for a damaged file
        raise ValueError(f"{path}: {error or type(error).__name__}") from error
    size = picture.size
    if size != (_SIDE, _SIDE):
        picture = F.resize(picture, [_SIDE, _SIDE])
    pixels: Tensor = F.pil_to_tensor(picture)
    return pixels, size
