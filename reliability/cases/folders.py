"""Folders of images: which files are used, and warnings about the others."""

import os
import shutil
import unicodedata
import warnings
from pathlib import Path

from PIL import Image

from lightning_advknn.data import ImageFolder
from reliability.case import Case, Outcome, Ran, evaluate, small_experiment, write_images


def read_images(folder: Path, **settings: object) -> tuple[ImageFolder, str]:
    """Read ``folder/images``; the data, and the text of warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = ImageFolder(
            str(folder / "images"), **{"val_size": 40, "calibration_per_class": 10, **settings}
        )  # type: ignore[arg-type]
        data.setup()
    return data, " ".join(str(each.message) for each in caught)


def warned(folder: Path, used: int, *words: str) -> Outcome:
    """The outcome where `used` images should be used and a warning should have these words."""
    data, warning = read_images(folder)
    count = sum(map(sum, data.counts().values()))
    ok = count == used and all(word in warning for word in words)
    return Outcome(f"{count} images used; {warning or 'no word'}", ok)


def _extensions(folder: Path) -> Outcome:
    write_images(folder / "images")
    for number, path in enumerate(sorted((folder / "images").rglob("*.png"))):
        if number % 2:
            suffix, kind = ((".GIF", "GIF"), (".jfif", "JPEG"), (".jpe", "JPEG"), (".avif", "AVIF"))[
                number // 2 % 4
            ]
            Image.open(path).save(path.with_suffix(suffix), kind)
            path.unlink()
    data, warning = read_images(folder)
    count = sum(map(sum, data.counts().values()))
    return Outcome(f"{count} images used; {warning or 'no word'}", count == 360)


def _other_files(folder: Path) -> Outcome:
    write_images(folder / "images")
    train = folder / "images" / "train"
    for path in (
        train / "c0" / "a.heic",
        train / "c0" / "b.HEIC",
        train / "c3" / "labels.json",
        train / "read.me",
    ):
        path.write_bytes(b"of something else")
    shutil.copytree(train, folder / "images" / "val")
    return warned(folder, 360, "does not read: 3 (.heic 2, .json 1;", "(train/read.me)", "(val)")


def _notebook(folder: Path) -> Outcome:
    write_images(folder / "images")
    for part in ("train", "test"):
        shutil.copytree(folder / "images" / part / "c0", folder / "images" / part / ".ipynb_checkpoints")
        shutil.copytree(folder / "images" / part / "c1", folder / "images" / part / "__MACOSX" / "c1")
    inner = folder / "images" / "train" / "c1" / ".ipynb_checkpoints"
    inner.mkdir()
    shutil.copyfile(folder / "images" / "train" / "c0" / "000.png", inner / "000-checkpoint.png")
    (folder / "images" / "train" / "c1" / "._001.png").write_bytes(b"Mac OS X")
    outcome = warned(folder, 360, "hidden files and folders: 6", ".ipynb_checkpoints", "__MACOSX")
    names = read_images(folder)[0].class_names
    return Outcome(f"classes {names}; {outcome.words}", outcome.ok and names == ("c0", "c1", "c2", "c3"))


def _links(folder: Path) -> Outcome:
    write_images(folder / "images")
    train = folder / "images" / "train"
    (train / "c0" / "other.png").symlink_to(train / "c1" / "000.png")
    (train / "c0" / "broken.png").symlink_to("nowhere.png")
    (train / "c0" / "around").symlink_to(train)
    return warned(folder, 360, "to nothing: 3", "other.png", "broken.png", "around")


def _pipe(folder: Path) -> Outcome:
    write_images(folder / "images")
    os.mkfifo(folder / "images" / "train" / "c0" / "pipe.png")  # reading it would never end
    return warned(folder, 360, "pipes, sockets and devices: 1 (train/c0/pipe.png)")


def _leak(folder: Path) -> Outcome:
    write_images(folder / "images")
    train, test = folder / "images" / "train", folder / "images" / "test"
    shutil.copyfile(train / "c0" / "003.png", test / "c0" / "copy.png")
    Image.open(train / "c1" / "004.png").save(test / "c1" / "copy.bmp")  # the same pixels in other bytes
    shutil.copyfile(train / "c2" / "005.png", train / "c3" / "copy.png")
    data, warning = read_images(folder)
    kept = (
        data.note
        == "test images that are training images too: 2; images in the folders of several classes: 1"
    )
    pairs = ("test/c1/copy.bmp = train/c1/004.png", "train/c2/005.png = train/c3/copy.png")
    return Outcome(f"kept: {data.note}; warned: {warning}", kept and all(pair in warning for pair in pairs))


def _rewarned(folder: Path, name: str, other: str) -> Ran:
    small_experiment(folder)
    (folder / "images" / "train" / "c0").rename(folder / "images" / "train" / name)
    (folder / "images" / "test" / "c0").rename(folder / "images" / "test" / other)
    return evaluate(folder)


def _forms(folder: Path) -> Outcome:
    forms = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    return _rewarned(folder, *forms).refused("Unicode forms", "NFC", "caf\\xe9", "cafe\\u0301")


def _bytes(folder: Path) -> Outcome:
    name = os.fsdecode("café".encode("latin-1"))
    return _rewarned(folder, name, name).refused("names in UTF-8", r"b'caf\xe9'")


def _byte_files(folder: Path) -> Outcome:
    small_experiment(folder)
    path = folder / "images" / "train" / "c0" / "000.png"
    path.rename(path.with_name(os.fsdecode("ä.png".encode("latin-1"))))
    return evaluate(folder).refused("names in UTF-8", r"\xe4.png")


def _case(folder: Path) -> Outcome:
    write_images(folder / "images", {0: "a", 1: "A"})
    return warned(folder, 180, "differ only in case", "['A', 'a']")


def _changed(folder: Path) -> Outcome:
    write_images(folder / "images")
    images = read_images(folder)[0].split("test").images
    path = folder / "images" / images.names[0]
    Image.new("RGB", (16, 16), (1, 2, 3)).save(path)
    try:
        images[0]
    except OSError as error:
        return Outcome(str(error), "has changed since" in str(error) and str(path) in str(error))
    return Outcome("read without an error", False)


def _plain(folder: Path) -> Outcome:
    small_experiment(folder)
    ran = evaluate(folder)
    return Outcome(f"exit {ran.code}; {ran.err[-300:]}", ran.code == 0)


USED_OR_NAMED = "Used, or named in a warning by kind."


CASES = [
    Case("data-plain", "A correct folder of images.", "Tables, exit code 0.", _plain),
    Case("03-extensions", "Half of the files are .GIF .jfif .jpe .avif.", "All are used.", _extensions),
    Case(
        "folders-other-files",
        "HEIC photographs, notes and a third split beside the images.",
        USED_OR_NAMED,
        _other_files,
    ),
    Case(
        "folders-hidden",
        "Folders .ipynb_checkpoints and __MACOSX, and a file ._001.png.",
        "Neither classes nor images.",
        _notebook,
    ),
    Case(
        "folders-links", "Links to another class, to nothing and to a parent folder.", USED_OR_NAMED, _links
    ),
    Case("folders-pipe", "A named pipe among the images.", USED_OR_NAMED, _pipe),
    Case(
        "folders-equal-images",
        "Test images that are training images too; one image in two classes.",
        "Named in a warning, and in the results.",
        _leak,
    ),
    Case("folders-unicode-forms", "A class named by macOS in train, by Linux in test.", "Refused.", _forms),
    Case("folders-latin1-class", "A class whose name is not UTF-8.", "Refused.", _bytes),
    Case("folders-latin1-file", "A file whose name is not UTF-8.", "Refused.", _byte_files),
    Case("folders-case", "Classes A and a.", "Two classes, named in a warning.", _case),
    Case(
        "folders-changed", "An image is replaced while a command runs.", "An error that names it.", _changed
    ),
]
