"""GTSRB: photographs of traffic signs."""

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
_OFFICIAL = {"train": 39_209, "test": 12_630}  # images


class GTSRB(ImageDataModule):
    """German traffic signs, 39,209 training and 12,630 test photographs of 43 classes, as 3x32x32 images, from torchvision.

    Files: ``root/gtsrb/GTSRB/Training/<class>/<track>_<frame>.ppm``, ``root/gtsrb/GTSRB/Final_Test/Images``
    and ``root/gtsrb/GT-final_test.csv``. Photographs are of 15 to 250 pixels a side; each is resized to 32x32
    (bilinear, antialiased), its sides alike or not. Where all files are of 32x32 already, someone has resized
    them before, and `note` says so.

    Training photographs are frames of a track, some 30 of one sign in passing, nearly alike. So validation
    images are whole tracks of each class, and no frame of theirs is in the training part.

    Args:
        root: Folder of the data files, in torchvision's layout.
        val_size: Images held out of the training split, about, as tracks are whole; at least a track of each
            class.
        calibration_per_class: Images of each class taken from the test split for calibration. The smallest
            has 60.
        settings: The others of `ImageDataModule`. `verify_checksums` checks archives that are downloaded, and
            that files are as many as the official ones.
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
        self._tracks: list[str] = []  # of the training images

    def prepare_data(self) -> None:
        """Download what is missing, if asked to, and check that it is there."""
        for split in _OFFICIAL:
            if self.download:
                with self._downloading():
                    torchvision.datasets.GTSRB(str(self.root), split=split, download=True)
        self._check_there()

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read one original split: images uint8 ``(n, 3, 32, 32)``, labels int64 ``(n,)``."""
        self._check_there()
        split = "train" if train else "test"
        with self._reading():
            samples = torchvision.datasets.GTSRB(str(self.root), split=split)._samples  # it knows paths alone
            if train:  # torchvision numbers the folders that are there, which may not be all
                samples = [(path, int(Path(path).parent.name)) for path, _ in samples]
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                pictures, sizes = zip(*pool.map(_read, [path for path, _ in samples]), strict=True)
        if self.verify_checksums and len(samples) != _OFFICIAL[split]:
            raise ValueError(
                f"Expected the official {_OFFICIAL[split]} {split} images of GTSRB in {self.root / 'gtsrb'}, but got"
                f" {len(samples)}. Extract the archives again, or set `verify_checksums` to false if they are your own."
            )
        if set(sizes) == {(_SIDE, _SIDE)}:
            self.note = f"files of {_SIDE}x{_SIDE} pixels, resized before: not the official photographs"
        if train:
            self._tracks = [f"{label}/{Path(path).name.partition('_')[0]}" for path, label in samples]
        return torch.stack(pictures), torch.tensor([label for _, label in samples], dtype=torch.int64)

    def _held_out(self, labels: Tensor) -> Tensor:
        """Whole tracks of each class, of as large a share as `val_size` is of all, at least one and never all."""
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
                    f"Expected at least two tracks of class {label} in {self.root / 'gtsrb'}, one to train on and one to"
                    f" validate with, but got {own}."
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
                    f"Expected {self.name}'s files in {path}, but it is missing. Set `root` to the folder that holds `gtsrb`, or"
                    " `download` to true."
                )


def _read(path: str) -> tuple[Tensor, tuple[int, int]]:
    """A photograph as 3x32x32 bytes, and the width and height that its file has."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except Exception as error:  # a damaged file can raise anything from a decoder's depths
        raise ValueError(f"{path}: {error or type(error).__name__}") from error
    size = picture.size
    if size != (_SIDE, _SIDE):
        picture = F.resize(picture, [_SIDE, _SIDE])
    pixels: Tensor = F.pil_to_tensor(picture)
    return pixels, size
