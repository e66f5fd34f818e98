"""Which files of a folder are used, and warnings about the others."""

import os
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_advknn.data import ImageFolder
from tests.data.folders import CLASSES, SMALL, SPLITS, save, warned


def test_nothing_is_said_of_a_folder_of_images(root: Path) -> None:
    data, said = warned(root)
    assert (said, data.note) == ("", "")
    assert data.class_names == CLASSES
    counts = data.counts()
    assert list(counts) == list(SPLITS)
    assert [a + b for a, b in zip(counts["train"], counts["val"], strict=True)] == [6, 6, 6]
    assert (counts["calibration"], counts["test"]) == ([2, 2, 2], [3, 3, 3])


def put(*places: str) -> Callable[[Path], None]:
    """Copy an image of ants to these paths."""

    def change(root: Path) -> None:
        for place in places:
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / "train" / "ant" / "0.png", root / place)

    return change


def link(place: str, target: str) -> Callable[[Path], None]:
    """Make a link from one path to another."""
    return lambda root: (root / place).symlink_to(root / target)


UNUSED = {
    "extension": (
        put("train/ant/a.heic", "test/bee/b.HEIC", "test/bee/c"),
        r"files of kinds that Pillow does not read: 3 \(\.heic 2, none 1; test/bee/b",
    ),
    "dot": (
        put("train/ant/._0.png", "train/.DS_Store/0.png"),
        r"hidden .*: 2 \(train/\.DS_Store, train/ant/\._0\.png\)",
    ),
    "notebook": (
        put("train/ant/.ipynb_checkpoints/0-checkpoint.png"),
        r"hidden .*: 1 \(train/ant/\.ipynb_checkpoints\)",
    ),
    "servers": (
        put("train/@eaDir/0.png", "test/__MACOSX/ant/0.png", "test/ant/Thumbs.db"),
        r"hidden .*: 3 \(",
    ),
    "beside": (
        put("train/0.png", "test/labels.csv"),
        r"files beside the class folders: 2 \(test/labels\.csv, train/0\.png\)",
    ),
    "out": (
        link("train/ant/z.png", "train/bee/0.png"),
        r"links out of their class folder.*: 1 \(train/ant/z\.png\)",
    ),
    "outside": (link("train/ant/z.png", "../other.png"), r"links .*: 1 \("),
    "broken": (link("train/ant/z.png", "nowhere.png"), r"links .*: 1 \("),
    "itself": (link("train/ant/z.png", "train/ant/z.png"), r"links .*: 1 \("),
    "around": (
        link("train/ant/z", "train"),
        r"links out of their class folder, to folders or to nothing: 1 \(train/ant/z\)",
    ),
    "no class": (link("train/z", "nowhere"), r"files beside the class folders: 1 \(train/z\)"),
    "pipe": (
        lambda root: os.mkfifo(root / "train" / "ant" / "z.png"),
        r"pipes, sockets and devices: 1 \(train/ant/z\.png\)",
    ),
    "third part": (put("val/ant/0.png", "docs/0.png"), r"folders beside train and test .*: 1 \(val\)"),
    "bytes": (put(f"train/ant/{os.fsdecode(b'caf' + bytes([0xE9]))}.txt"), r"train/ant/caf\\xe9\.txt"),
}


@pytest.mark.parametrize(("change", "words"), UNUSED.values(), ids=UNUSED)
def test_what_is_not_used_is_named(root: Path, change: Callable[[Path], None], words: str) -> None:
    before, _ = warned(root)
    save(root.parent / "other.png", np.zeros((8, 10, 3), np.uint8))
    change(root)
    data, said = warned(root)
    assert re.fullmatch(rf"Not used, of \S+: .*{words}.*\.", said)
    assert (data.fingerprint, data.note) == (before.fingerprint, "")
    assert data.class_names == CLASSES


def test_links_that_stay_in_their_class_are_used(root: Path) -> None:
    link("train/ant/z.png", "train/ant/0.png")(root)
    (root / "train" / "cat").rename(root.parent / "cats")
    (root / "train" / "cat").symlink_to(root.parent / "cats")
    data, said = warned(root)
    assert said == ""
    assert sum(data.counts()["train"] + data.counts()["val"]) == 19


def test_equal_images_in_train_and_test_are_named(root: Path) -> None:
    shutil.copyfile(root / "train" / "ant" / "2.png", root / "test" / "ant" / "same.png")
    Image.open(root / "train" / "bee" / "3.png").save(root / "test" / "bee" / "coded.bmp")
    data, said = warned(root)
    pairs = "test/ant/same.png = train/ant/2.png, test/bee/coded.bmp = train/bee/3.png"
    assert said == (
        f"Equal pixel by pixel, test images that are training images too: 2 ({pairs}). Delete the wrong ones."
    )
    assert data.note == "test images that are training images too: 2"


def test_equal_images_of_several_classes_are_named(root: Path) -> None:
    shutil.copyfile(root / "train" / "ant" / "2.png", root / "train" / "bee" / "same.png")
    shutil.copyfile(root / "train" / "ant" / "3.png", root / "train" / "ant" / "copy.png")
    shutil.copyfile(root / "test" / "ant" / "4.png", root / "test" / "cat" / "same.png")
    data, said = warned(root)
    assert "train/ant/2.png = train/bee/same.png, test/ant/4.png = test/cat/same.png" in said
    assert data.note == "images in the folders of several classes: 2"


def test_classes_that_differ_in_case_are_named(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "bee").rename(root / part / "Ant")
    data, said = warned(root)
    assert data.class_names == ("Ant", "ant", "cat")
    assert said.startswith(
        "These classes differ only in case or blanks, and count as different: ['Ant', 'ant']."
    )


@pytest.mark.parametrize("places", [("train/bee", "test/bee"), ("train/ant/0.png",), ("test/ant/0.png",)])
def test_names_that_are_no_utf8(root: Path, places: tuple[str, ...]) -> None:
    for place in places:
        path = root / place
        path.rename(path.with_name(os.fsdecode(b"\xff") + path.suffix))
    with pytest.raises(ValueError, match=r"names in UTF-8 in .*, but got the bytes b'.*\\xff"):
        ImageFolder(str(root), **SMALL).setup()


@pytest.mark.parametrize(
    "places",
    [
        ("train/bee", "test/bee"),  # one name in either part
        ("train/ant", "train/bee", "test/ant", "test/bee"),  # both in both
        ("train/ant/0.png", "train/ant/1.png"),
    ],
)
def test_names_in_two_unicode_forms(root: Path, places: tuple[str, ...]) -> None:
    for number, place in enumerate(places):
        path = root / place
        form = unicodedata.normalize(("NFC", "NFD")[number % 2], "\u00e9")
        path.rename(path.with_name(form + path.suffix))
    with pytest.raises(
        ValueError, match=r"\\u0301.* are the same text in two Unicode forms.*Rename or merge"
    ):
        ImageFolder(str(root), **SMALL).setup()


def test_one_unicode_form_is_as_good_as_the_other(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "bee").rename(root / part / unicodedata.normalize("NFD", "\u00e9"))
    assert warned(root)[0].class_names == ("ant", "cat", "e\u0301")
