"""Folders of images: the images are the written ones, and problems are named."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from lightning_advknn.data import ImageFolder, MissingDataError
from tests.data.folders import CLASSES, SMALL, SPLITS, save, warned


def test_images_are_the_files_numbered_by_path(root: Path) -> None:
    data = ImageFolder(str(root), **SMALL)
    data.prepare_data()
    data.setup()
    assert (data.image_shape, data.num_classes) == ((3, 8, 10), 3)
    seen = {"train": set(), "test": set()}
    for split in SPLITS:
        part = "train" if split in ("train", "val") else "test"
        paths = sorted((root / part).glob("*/*.png"))
        assert data.split(split).images.names == [
            paths[i].relative_to(root).as_posix() for i in data.split(split).ids
        ]
        for batch in data.loader(split):
            assert batch.images.dtype == torch.float32
            for image, label, number in zip(batch.images, batch.labels, batch.ids.tolist(), strict=True):
                written = np.array(Image.open(paths[number]))
                assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), written)
                assert CLASSES[label] == paths[number].parent.name
                assert number not in seen[part]
                seen[part].add(number)
    assert {part: len(numbers) for part, numbers in seen.items()} == {"train": 18, "test": 15}
    assert [len(data.split(split)) for split in SPLITS] == [14, 4, 6, 9]
    assert data.split("calibration").labels.bincount().tolist() == [2, 2, 2]
    again = ImageFolder(str(root), **SMALL)
    assert all(torch.equal(data.split(split).ids, again.split(split).ids) for split in SPLITS)


@pytest.mark.parametrize(("height", "width"), [(20, 60), (60, 20)])
def test_resizing_keeps_the_shape_and_cropping_the_centre(root: Path, height: int, width: int) -> None:
    # Three bands of one colour each, along the longer side: only the middle one is left.
    bands = np.zeros((20, 60, 3), np.uint8)
    bands[:, :20], bands[:, 20:40], bands[:, 40:] = (255, 0, 0), (10, 200, 30), (0, 0, 255)
    save(root / "train" / "ant" / "0.png", bands if width > height else bands.transpose(1, 0, 2))
    data = ImageFolder(str(root), image_size=10, **SMALL)
    data.setup()
    assert data.image_shape == (3, 10, 10)
    split = next(data.split(name) for name in ("train", "val") if 0 in data.split(name).ids)
    image = split.images[0]
    assert image.shape == (3, 10, 10)
    assert image[:, 2:8, 2:8].flatten(1).unique(dim=1).squeeze(1).tolist() == [10, 200, 30]


def test_transparent_images_need_a_background(root: Path) -> None:
    grey = np.full((8, 10), 77, np.uint8)
    save(root / "test" / "ant" / "0.png", grey)
    save(root / "test" / "ant" / "1.png", np.dstack([grey, grey + 1, grey + 2, grey * 0 + 51]))
    settings = {"val_size": 1, "calibration_per_class": 1}
    with pytest.raises(ValueError, match=r"test/ant/1\.png \(transparent pixels: set `background`"):
        ImageFolder(str(root), **settings).setup()
    data = ImageFolder(str(root), background=[1.0, 1.0, 0.0], **settings)
    data.load(train=True)
    images, _ = data.load(train=False)
    # A fifth of the colour, four of yellow.
    assert images[torch.tensor([0, 1])][:, :, 0, 0].tolist() == [[77, 77, 77], [219, 220, 16]]
    assert images.select(torch.tensor([1]))[0][:, 0, 0].tolist() == [219, 220, 16]
    others = [ImageFolder(str(root), background=colour, **settings) for colour in ([1.0] * 3, [0.0] * 3)]
    data.setup()
    others[0].share(data)
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 3


@pytest.mark.parametrize(
    "background", [[255, 255, 255], [1.0, 1.0], [1.0], [], [-0.1, 0, 0], [float("nan")] * 3]
)
def test_backgrounds_are_colours(background: list[float]) -> None:
    with pytest.raises(ValueError, match=r"`background` to be red, green and blue in \[0, 1\], or null.*255"):
        ImageFolder(background=background)


def test_the_fingerprint_is_that_of_the_files_wherever_they_are(root: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path = root, **options: int) -> str:
        return ImageFolder(str(folder), **{**SMALL, **options}).fingerprint

    first = fingerprint()
    elsewhere = shutil.copytree(root, tmp_path / "elsewhere")
    assert fingerprint(elsewhere) == first
    others = [
        fingerprint(image_size=8),
        fingerprint(image_size=9),
        fingerprint(val_size=5),
        fingerprint(split_seed=1),
    ]
    file = elsewhere / "test" / "bee" / "3.png"
    before, pixels = file.stat(), np.array(Image.open(file))
    pixels[0, 0, 0] ^= 1
    save(file, pixels)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    others.append(fingerprint(elsewhere))
    shutil.copyfile(root / "test" / "bee" / "3.png", file)
    assert fingerprint(elsewhere) == first
    file.rename(file.with_name("33.png"))
    others.append(fingerprint(elsewhere))
    assert len({first, *others}) == 7


def test_splits_are_shared_with_one_made_alike(root: Path) -> None:
    data, other = (ImageFolder(str(root), **{**SMALL, "batch_size": size}) for size in (7, 3))
    data.setup()
    other.share(data)
    shutil.rmtree(root)
    assert other.split("test") is data.split("test")
    assert (other.image_shape, other.num_classes) == ((3, 8, 10), 3)


def test_no_batch_is_of_one_image(root: Path) -> None:
    for batch_size, sizes in ((13, [13]), (7, [7, 7]), (6, [6, 6, 2]), (1, [1] * 14)):
        data = ImageFolder(str(root), **{**SMALL, "batch_size": batch_size})
        assert [len(batch.ids) for batch in data.train_dataloader()] == sizes


def damage(root: Path, what: str) -> None:
    file = root / "train" / "bee" / "2.png"
    if what == "missing":
        shutil.rmtree(root / "test")
    elif what == "classes":
        (root / "test" / "bee").rename(root / "test" / "wasp")
    elif what == "one class":
        for name in ("bee", "cat"):
            for part in ("train", "test"):
                shutil.rmtree(root / part / name)
    elif what == "empty":
        for path in (root / "test" / "bee").iterdir():
            path.rename(path.with_suffix(".txt"))
    elif what == "truncated":
        file.write_bytes(file.read_bytes()[:-60])
    elif what == "no image":
        file.write_text("no image")
    elif what == "jpeg":
        save(file.with_suffix(".jpg"), np.random.default_rng(1).integers(0, 256, (8, 10, 3), np.uint8))
        content = file.with_suffix(".jpg").read_bytes()
        file.with_suffix(".jpg").write_bytes(content[: len(content) - 40])
    elif what == "16 bits":
        save(file, np.full((8, 10), 3000, np.uint16))
    elif what == "size":
        save(file, np.zeros((9, 10, 3), np.uint8))
    elif what == "test size":
        for path in (root / "test").glob("*/*.png"):
            save(path, np.zeros((9, 10, 3), np.uint8))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"images in .*test/<class>/, but there is no such folder.*set `root`"),
        ("classes", r"test lacks \['bee'\]\. Add or delete"),
        ("one class", r"at least two classes in .*train, but got \['ant'\]"),
        (
            "empty",
            r"images in .*test/bee, but there are none that Pillow can read\. Not used.*\.txt 5.*Put some",
        ),
        ("truncated", r"readable images.*train/bee/2\.png \(.+\)\. .*replace or delete"),
        ("no image", r"train/bee/2\.png \(cannot identify.*replace or delete"),
        ("jpeg", r"train/bee/2\.jpg \(.*truncated.*replace or delete"),
        ("16 bits", r"8 bits a channel.*train/bee/2\.png \(mode I"),
        (
            "size",
            r"train/ant/0\.png is of shape \(3, 8, 10\) and .*train/bee/2\.png of \(3, 9, 10\).*`image_size`",
        ),
        ("test size", r"shape \(3, 8, 10\), but .*test has \(3, 9, 10\)\. Set `image_size`"),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(root: Path, what: str, message: str) -> None:
    damage(root, what)
    with pytest.raises(MissingDataError if what == "missing" else ValueError, match="(?s)" + message):
        ImageFolder(str(root), **SMALL).setup()


def test_of_many_damaged_files_a_few_are_named(root: Path) -> None:
    for path in (root / "train").glob("*/[12345].png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"ant/5\.png .* and 10 more\.") as caught:
        ImageFolder(str(root), **SMALL).setup()
    assert len(re.findall(r"\.png", str(caught.value))) == 5


def test_sizes_are_positive(root: Path) -> None:
    with pytest.raises(ValueError, match=r"`image_size` to be at least 1 or null, but got 0"):
        ImageFolder(str(root), image_size=0)


@pytest.mark.parametrize("size", [True, 8.0, [8, 8], "8"])
def test_sizes_are_whole_numbers(root: Path, size: Any) -> None:
    with pytest.raises(ValueError, match="`image_size` to be a whole number"):
        ImageFolder(str(root), image_size=size)


def test_sizes_of_numpy_are_sizes(root: Path) -> None:
    data, other = (ImageFolder(str(root), image_size=np.int64(size), **SMALL) for size in (8, 9))
    assert data.split("train").images.shape[1:] == (3, 8, 8)
    other.share(data)
    assert other.split("train").images.shape[1:] == (3, 9, 9)


def test_a_file_that_goes_away_is_named(root: Path) -> None:
    data = ImageFolder(str(root), **SMALL)
    images = data.split("train").images
    shutil.rmtree(root / "train")
    with pytest.raises(OSError, match=re.escape(str(root / images.names[0]))):
        images[0]


def test_a_file_that_changes_is_named(root: Path) -> None:
    images = ImageFolder(str(root), **SMALL).split("train").images
    path = root / images.names[3]
    before = images[3]
    path.touch()
    assert torch.equal(images[3], before)
    stat, pixels = path.stat(), np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    save(path, pixels)  # of the same shape
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(
        OSError, match=re.escape(str(path)) + r" to be as it was at the start, but it has changed"
    ):
        images[torch.tensor([2, 3])]
    assert images[torch.tensor([2, 4])].shape == (2, 3, 8, 10)


def test_images_are_numbered_as_torchvision_does(root: Path) -> None:
    for name in ("sub/1.png", "sub/deeper/0.JPG", "Sub/9.png", "5.JPEG", "sub.png"):
        path = root / "train" / "bee" / name
        save(path, np.random.default_rng(len(name)).integers(0, 256, (8, 10, 3), np.uint8))
    found = torchvision.datasets.ImageFolder(str(root / "train"))
    images, labels = ImageFolder(str(root), **SMALL).load(train=True)
    assert images.names == [Path(path).relative_to(root).as_posix() for path, _ in found.samples]
    assert labels.tolist() == [label for _, label in found.samples]
    assert len(labels) == 18 + 5


def test_classes_are_in_order_of_their_names_as_text(root: Path) -> None:
    for part in ("train", "test"):
        for old, new in zip(CLASSES, ("1", "10", "2"), strict=True):
            (root / part / old).rename(root / part / new)
    data, _ = warned(root)
    assert data.class_names == ("1", "10", "2")
