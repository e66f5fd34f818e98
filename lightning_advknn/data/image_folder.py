"""Your own images, in a folder for each class."""

from collections.abc import Sequence

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_advknn.choices import whole
from lightning_advknn.data.base import ImageDataModule, MissingDataError
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
from lightning_advknn.data.splits import Batch, TrainingLoader


class ImageFolder(ImageDataModule):
    """RGB images in ``root/train/<class>/`` and ``root/test/<class>/``, at any depth.

    Classes are numbered in alphabetical order of their names (1, 10, 2), images in order of their paths.
    Files are read when needed, with their EXIF orientation applied, and converted to sRGB. They are also all
    read at the start, to find damaged ones, and to hash contents and pixels for the `fingerprint`. All files
    that Pillow can read are used, except hidden files and folders, and links out of a class folder. A warning
    names unused files, images that are equal across train and test or across classes (`note` has their
    number), and classes whose names differ only in case.

    Args:
        root: The folder.
        image_size: Height and width of the images: the shorter side is resized to it, then the centre is
            cropped. None keeps their size, which must then be the same for all.
        batch_size: Batch size in training.
        eval_batch_size: Batch size everywhere else.
        val_size: Number of training images in ``val``.
        calibration_per_class: Number of test images of each class in ``calibration``.
        split_seed: Seed of the splits.
        background: Red, green and blue in [0, 1] behind transparent pixels; None refuses those.

    Raises:
        ValueError: If a size is not an integer of at least 1, or `background` is not a colour in [0, 1].
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
                "Expected `background` to be red, green and blue in [0, 1], or null, but got"
                f" {list(background)}. If it is in [0, 255], divide it by 255."
            )
        # Python's own integer, not NumPy's: `share` compares it.
        self.image_size = None if image_size is None else int(image_size)
        self.background = None if background is None else tuple(background)
        self._unused: Unused = {}

    def prepare_data(self) -> None:
        """Check that both folders exist and have the same classes."""
        classes = {}
        for part in ("train", "test"):
            if not (self.root / part).is_dir():
                raise MissingDataError(
                    f"Expected images in {self.root / part}/<class>/, but there is no such folder. Put them"
                    " there, or set `root` to the folder that holds `train` and `test`."
                )
            classes[part] = class_folders(self.root / part)
        check_names(self.root, dict.fromkeys(classes["train"] + classes["test"]))
        for part, other in (("train", "test"), ("test", "train")):
            alone = [name for name in classes[part] if name not in classes[other]]
            if alone:
                raise ValueError(
                    f"Expected a folder for each class in both {self.root / 'train'} and"
                    f" {self.root / 'test'}, but {other} lacks {alone[:5]}. Add or delete them."
                )
        if len(classes["train"]) < 2:
            raise ValueError(
                f"Expected a folder for each of at least two classes in {self.root / 'train'}, but got"
                f" {classes['train']}."
            )
        self.class_names = tuple(classes["train"])
        self.num_classes = len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Read every file and split the images, once; warn about unused files and equal images."""
        if not self._splits:
            self.prepare_data()
            self._unused = self._other_parts()
            super().setup(stage)
            equal = equal_images(self._labels("train", "val"), self._labels("calibration", "test"))
            self.note = "; ".join(f"{kind}: {len(names)}" for kind, names in equal.items())
            warnings = (
                unused_words(self.root, self._unused),
                class_words(self.class_names),
                equal_words(equal),
            )
            if any(warnings):
                rank_zero_warn(" ".join(filter(None, warnings)))

    def load(self, train: bool) -> tuple[ImageFiles, torch.Tensor]:
        """Examine the training or test images; their files, and labels int64 ``(n,)``."""
        folder = self.root / ("train" if train else "test")
        found = find_images(folder)
        for name, files in found.images.items():
            if not files:
                raise ValueError(
                    f"Expected images in {folder / name}, but there are none that Pillow can read."
                    f" {unused_words(self.root, found.unused)} Put some there, or delete the class from both"
                    " train and test."
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
        """Shuffled training images; drops a last batch of one image, which batch norm cannot train on."""
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
        """The files of these splits with their labels."""
        found: dict[ImageFile, int] = {}
        for split in map(self.split, splits):
            if isinstance(split.images, ImageFiles):
                found |= dict(zip(split.images.files, split.labels.tolist(), strict=True))
        return found
