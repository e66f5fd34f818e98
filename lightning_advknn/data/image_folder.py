"""Images of one's own."""

from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader

from lightning_advknn.data.base import Batch, ImageDataModule, MissingDataError, TrainingLoader
from lightning_advknn.data.files import ImageFiles


class ImageFolder(ImageDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``, as `torchvision.datasets.ImageFolder` finds them.

    Classes are numbered in order of their names. Images are RGB, numbered in order of their paths, and read from their files at
    each use. Every file is also read once at the start, so that damaged ones are found before any work, and its content enters
    the `fingerprint`, so that nothing made of other files is taken for it.

    Args:
        root: The folder.
        image_size: Height and width that images get: the shorter side is resized to it, then the centre is cut out. None
            leaves them as they are, all of one size.
        batch_size: Images a training step.
        eval_batch_size: Images a batch elsewhere.
        val_size: Images held out of the training images.
        calibration_per_class: Images of each class taken from the test images for calibration.
        split_seed: Seed of the splits.

    Raises:
        ValueError: If a size is below 1.
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
        if image_size is not None and image_size < 1:
            raise ValueError(f"Expected `image_size` to be at least 1 or null, but got {image_size}.")
        self.image_size = image_size

    def prepare_data(self) -> None:
        """Check that both folders are there and have the same classes."""
        classes = {}
        for part in ("train", "test"):
            if not (self.root / part).is_dir():
                raise MissingDataError(
                    f"Expected images in {self.root / part}/<class>/, but there is no such folder. Put them there, or set `root`"
                    " to the folder that holds `train` and `test`."
                )
            classes[part] = sorted(path.name for path in (self.root / part).iterdir() if path.is_dir())
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
        """Read every file and split the images, once."""
        if not self._splits:
            self.prepare_data()
            super().setup(stage)

    def load(self, train: bool) -> tuple[ImageFiles, torch.Tensor]:
        """The files of one original split, all read once, and labels int64 ``(n,)``."""
        folder = self.root / ("train" if train else "test")
        found = torchvision.datasets.ImageFolder(str(folder), allow_empty=True)
        labels = torch.tensor([label for _, label in found.samples], dtype=torch.int64)
        for label, name in enumerate(found.classes):
            if label not in labels:
                raise ValueError(
                    f"Expected images in {folder / name}, but there are none that end in"
                    f" {', '.join(found.extensions or torchvision.datasets.folder.IMG_EXTENSIONS)}. Put some there, or delete"
                    " the class from both train and test."
                )
        names = [Path(file).relative_to(self.root).as_posix() for file, _ in found.samples]
        images = ImageFiles.examine(self.root, names, self.image_size)
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
