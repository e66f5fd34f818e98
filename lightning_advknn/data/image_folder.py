"""Images of one's own."""

from collections.abc import Sequence

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_advknn.data.base import Batch, ImageDataModule, MissingDataError, TrainingLoader
from lightning_advknn.data.files import ImageFile, ImageFiles
from lightning_advknn.data.listing import (
    OTHER_PART,
    Unused,
    check_names,
    class_folders,
    class_words,
    equal_images,
    equal_words,
    find_images,
    is_hidden,
    unused_words,
)
from lightning_advknn.functional import whole


class ImageFolder(ImageDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``, at any depth, read as a viewer shows them.

    Classes are numbered in order of their names as text (1, 10, 2). Images are RGB, numbered in order of
    their paths, and read from their files at each use: turned as their EXIF orientation says, and in sRGB.
    Every file is also read once at the start, so that damaged ones are found before any work, and its content
    and pixels enter the `fingerprint`, so that nothing made of other images is taken for it. All that Pillow
    reads is used, but for hidden files and folders and links out of a class's folder. A warning names what is
    not used, equal images in train and test or in several classes, which `note` counts, and classes that
    differ only in case.

    Args:
        root: The folder.
        image_size: Height and width that images get: the shorter side is resized to it, then the centre is cut out. None
            leaves them as they are, all of one size.
        batch_size: Images a training step.
        eval_batch_size: Images a batch elsewhere.
        val_size: Images held out of the training images.
        calibration_per_class: Images of each class taken from the test images for calibration.
        split_seed: Seed of the splits.
        background: Red, green and blue in [0, 1] behind transparent pixels; None refuses images that have
            some.

    Raises:
        ValueError: If a size is below 1 or no whole number, or `background` is no colour in [0, 1].
    """

    def __init__(
        self,
        root: str = "images",
        image_size: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 250,
        val_size: int = 100,
        calibration_per_class: int = 10,
        split_seed: int = 0,
        background: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            root=root,
            download=False,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            calibration_per_class=calibration_per_class,
            split_seed=split_seed,
        )
        if image_size is not None and whole("image_size", image_size) < 1:
            raise ValueError(f"Expected `image_size` to be at least 1 or null, but got {image_size}.")
        if background is not None and not (
            len(background) == 3 and all(0 <= value <= 1 for value in background)
        ):
            raise ValueError(
                f"Expected `background` to be red, green and blue in [0, 1], or null, but got {list(background)}. Divide by 255 if it"
                " is of colours from 0 to 255."
            )
        # Python's own integer: of these `share` knows.
        self.image_size = None if image_size is None else int(image_size)
        self.background = None if background is None else tuple(background)
        self._unused: Unused = {}

    def prepare_data(self) -> None:
        """Check that both folders are there and have the same classes."""
        classes = {}
        for part in ("train", "test"):
            if not (self.root / part).is_dir():
                raise MissingDataError(
                    f"Expected images in {self.root / part}/<class>/, but there is no such folder. Put them there, or set `root`"
                    " to the folder that holds `train` and `test`."
                )
            classes[part] = class_folders(self.root / part)
        check_names(self.root, dict.fromkeys(classes["train"] + classes["test"]))
        for part, other in (("train", "test"), ("test", "train")):
            alone = [name for name in classes[part] if name not in classes[other]]
            if alone:
                raise ValueError(
                    f"Expected a folder for each class in both {self.root / 'train'} and {self.root / 'test'}, but {other} lacks"
                    f" {alone[:5]}. Add or delete them."
                )
        if len(classes["train"]) < 2:
            raise ValueError(
                f"Expected a folder for each of at least two classes in {self.root / 'train'}, but got {classes['train']}."
            )
        self.class_names = tuple(classes["train"])
        self.num_classes = len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Read every file and split the images, once; warn of what is not used and of equal images."""
        if not self._splits:
            self.prepare_data()
            self._unused = self._other_parts()
            super().setup(stage)
            equal = equal_images(self._labels("train", "val"), self._labels("calibration", "test"))
            self.note = "; ".join(f"{kind}: {len(names)}" for kind, names in equal.items())
            said = (
                unused_words(self.root, self._unused),
                class_words(self.class_names),
                equal_words(equal),
            )
            if any(said):
                rank_zero_warn(" ".join(filter(None, said)))

    def load(self, train: bool) -> tuple[ImageFiles, torch.Tensor]:
        """The files of one original split, all read once, and labels int64 ``(n,)``."""
        folder = self.root / ("train" if train else "test")
        found = find_images(folder)
        for name, files in found.images.items():
            if not files:
                raise ValueError(
                    f"Expected images in {folder / name}, but there are none that Pillow reads."
                    f" {unused_words(self.root, found.unused)} Put some there, or delete the class from both train and test."
                )
        for kind, paths in found.unused.items():
            self._unused[kind] = [*self._unused.get(kind, []), *paths]
        names = [path.relative_to(self.root).as_posix() for files in found.images.values() for path in files]
        check_names(self.root, names)
        labels = torch.tensor([label for label, files in enumerate(found.images.values()) for _ in files])
        images = ImageFiles.examine(self.root, names, self.image_size, self.background)
        if train:
            self.image_shape = images.files[0].shape
        elif images.files[0].shape != self.image_shape:
            raise ValueError(
                f"Expected test images of the training images' shape {self.image_shape}, but {folder} has"
                f" {images.files[0].shape}. Set `image_size` to resize and crop all."
            )
        return images, labels

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training images, without the one that would be a batch alone: batch norm cannot train on it."""
        loader = super().train_dataloader()
        if len(loader.sampler) % self.batch_size != 1:  # type: ignore[arg-type]  # it is a DistributedSampler
            return loader
        shorter = TrainingLoader(
            loader.dataset,
            batch_size=self.batch_size,
            sampler=loader.sampler,
            collate_fn=loader.collate_fn,
            drop_last=True,
        )
        shorter.trainer = self.trainer
        return shorter

    def _other_parts(self) -> Unused:
        """Folders such as ``root/val`` that have this data set's classes."""
        others = [
            path
            for path in sorted(self.root.iterdir())
            if path.name not in ("train", "test")
            and not is_hidden(path.name)
            and any((path / name).is_dir() for name in self.class_names)
        ]
        return {OTHER_PART: others} if others else {}

    def _labels(self, *splits: str) -> dict[ImageFile, int]:
        """The files of some splits with their labels."""
        found: dict[ImageFile, int] = {}
        for split in map(self.split, splits):
            if isinstance(split.images, ImageFiles):
                found |= dict(zip(split.images.files, split.labels.tolist(), strict=True))
        return found
