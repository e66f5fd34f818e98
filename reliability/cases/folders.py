"""Folders of images as cameras, scanners, editors and file managers leave them; means and standard deviations of other units."""

import os
import shutil
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from lightning_advknn.data import ImageFolder
from lightning_advknn.data.files import ImageFiles
from reliability.case import Case, Outcome, Ran, evaluate, small_experiment, write_images

RAMP = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
D50 = (0.9642, 1.0, 0.8249)
# Red, green and blue of Display P3 and sRGB in XYZ, seen under D50.
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    """What Pillow writes of an image."""
    file = BytesIO()
    image.copy().save(file, kind, **settings)  # a copy: saving leaves settings in an image
    return file.getvalue()


def two_frames(image: Image.Image, kind: str, **settings: object) -> bytes:
    """What Pillow writes of a grey image and its negative, as pages or frames."""
    return encoded(image, kind, save_all=True, append_images=[ImageOps.invert(image)], **settings)


def png16(pixels: np.ndarray, colour_type: int) -> bytes:
    """A PNG file of 16 bits a channel, which Pillow does not write.

    Args:
        pixels: uint16 ``(H, W)`` or ``(H, W, channels)``.
        colour_type: 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha.
    """
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def tiff16(pixels: np.ndarray) -> bytes:
    """A TIFF file of 16 bits a channel of pixels uint16 ``(H, W, 3)``, which Pillow does not write."""
    height, width, channels = pixels.shape
    entries = (
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, 8 + 2 + 12 * 9 + 4), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 8 + 2 + 12 * 9 + 4 + 6), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, pixels.nbytes),
    )  # fmt: skip
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return head + table + bytes(4) + struct.pack("<3H", 16, 16, 16) + pixels.astype("<u2").tobytes()


def colour_profile(primaries: Iterable[Iterable[float]], gamma: float) -> bytes:
    """An ICC profile: XYZ under D50 of red, green and blue, or of nothing for grey, and the exponent of every channel."""

    def numbers(values: Iterable[float]) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": numbers(D50)}
    for name, values in zip(b"rgb", primaries, strict=False):
        tags |= {bytes([name]) + b"XYZ": numbers(values), bytes([name]) + b"TRC": curve}
    space = b"RGB " if len(tags) > 1 else b"GRAY"
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    place, table, content = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", place + len(content), len(data))
        content += data
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x", place + len(content), 0x02400000, b"mntr", space, b"XYZ ", b"acsp"
    )
    return (header + numbers(D50)[8:]).ljust(128, b"\0") + table + content


def turned(source: Path, target: Path, save: Callable[[Image.Image, Path], None]) -> None:
    """Write images a second time: training images alike, test images turned left, to be saved in some way that turns them back."""
    for path in source.rglob("*.png"):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path)
        if "train" in path.parts:
            image.save(to)
        else:
            save(image.transpose(Image.Transpose.ROTATE_90), to)


def said_by(folder: Path, **settings: object) -> tuple[ImageFolder, str]:
    """Read ``folder/images``; the data, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = ImageFolder(
            str(folder / "images"), **{"val_size": 40, "calibration_per_class": 10, **settings}
        )  # type: ignore[arg-type]
        data.setup()
    return data, " ".join(str(each.message) for each in caught)


def named(folder: Path, used: int, *words: str) -> Outcome:
    """Right if so many images are used and a warning has these words."""
    data, said = said_by(folder)
    count = sum(map(sum, data.counts().values()))
    ok = count == used and all(word in said for word in words)
    return Outcome(f"{count} images used; {said or 'no word'}", ok)


def _same_pixels(folder: Path, save: Callable[[Image.Image, Path], None]) -> Outcome:
    write_images(folder / "upright")
    turned(folder / "upright", folder / "images", save)
    seen = said_by(folder)[0].split("test").images
    upright = ImageFolder(str(folder / "upright"), val_size=40).split("test").images
    positions = torch.arange(len(upright))
    equal = bool(torch.equal(seen[positions], upright[positions]))
    return Outcome(
        f"{len(seen)} test images, {'equal to' if equal else 'other than'} the upright ones", equal
    )


def _exif(folder: Path) -> Outcome:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _same_pixels(folder, lambda image, path: image.save(path, exif=exif))


def _exif_elsewhere(folder: Path) -> Outcome:
    exif = Image.Exif()
    exif[0x0112] = 6

    def save(image: Image.Image, path: Path) -> None:
        if int(path.stem) % 2:
            image.save(path.with_suffix(".tiff"), tiffinfo={274: 6})
        else:
            image.save(path.with_suffix(".webp"), lossless=True, exif=exif)

    return _same_pixels(folder, save)


def _in_alpha(folder: Path) -> None:
    small_experiment(folder)
    for path in (folder / "images").rglob("*.png"):
        ink = np.asarray(Image.open(path))[..., 0]
        Image.fromarray(np.dstack([np.zeros_like(ink)] * 3 + [ink]), "RGBA").save(path)


def _alpha(folder: Path) -> Outcome:
    _in_alpha(folder)
    refused = evaluate(folder).refused("transparent", "`background`", "c0/000.png")
    white = said_by(folder, background=[1.0, 1.0, 1.0])[0].split("train").images
    seen = white[torch.arange(len(white))].flatten(1)
    written = [
        255 - torch.from_numpy(np.array(Image.open(folder / "images" / name).getchannel("A")).flatten())
        for name in white.names
    ]
    right = bool(torch.equal(seen, torch.stack(written).repeat(1, 3)))
    return Outcome(f"{refused.words}; on white {'right' if right else 'wrong'}", refused.ok and right)


def _transparent_colour(folder: Path) -> Outcome:
    small_experiment(folder)
    path = folder / "images" / "train" / "c1" / "005.png"
    Image.open(path).save(path, transparency=(0, 0, 0))
    grey = folder / "images" / "train" / "c2" / "007.png"
    Image.open(grey).convert("L").quantize(16).save(grey, transparency=bytes([0, 128] + [255] * 14))
    return evaluate(folder).refused("c1/005.png", "c2/007.png", "transparent", "`background`")


def _extensions(folder: Path) -> Outcome:
    write_images(folder / "images")
    for number, path in enumerate(sorted((folder / "images").rglob("*.png"))):
        if number % 2:
            suffix, kind = ((".GIF", "GIF"), (".jfif", "JPEG"), (".jpe", "JPEG"), (".avif", "AVIF"))[
                number // 2 % 4
            ]
            Image.open(path).save(path.with_suffix(suffix), kind)
            path.unlink()
    data, said = said_by(folder)
    count = sum(map(sum, data.counts().values()))
    return Outcome(f"{count} images used; {said or 'no word'}", count == 360)


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
    return named(folder, 360, "does not read: 3 (.heic 2, .json 1;", "(train/read.me)", "(val)")


def _notebook(folder: Path) -> Outcome:
    write_images(folder / "images")
    for part in ("train", "test"):
        shutil.copytree(folder / "images" / part / "c0", folder / "images" / part / ".ipynb_checkpoints")
        shutil.copytree(folder / "images" / part / "c1", folder / "images" / part / "__MACOSX" / "c1")
    inner = folder / "images" / "train" / "c1" / ".ipynb_checkpoints"
    inner.mkdir()
    shutil.copyfile(folder / "images" / "train" / "c0" / "000.png", inner / "000-checkpoint.png")
    (folder / "images" / "train" / "c1" / "._001.png").write_bytes(b"Mac OS X")
    outcome = named(folder, 360, "hidden files and folders: 6", ".ipynb_checkpoints", "__MACOSX")
    names = said_by(folder)[0].class_names
    return Outcome(f"classes {names}; {outcome.words}", outcome.ok and names == ("c0", "c1", "c2", "c3"))


def _links(folder: Path) -> Outcome:
    write_images(folder / "images")
    train = folder / "images" / "train"
    (train / "c0" / "other.png").symlink_to(train / "c1" / "000.png")
    (train / "c0" / "broken.png").symlink_to("nowhere.png")
    (train / "c0" / "around").symlink_to(train)
    return named(folder, 360, "to nothing: 3", "other.png", "broken.png", "around")


def _pipe(folder: Path) -> Outcome:
    write_images(folder / "images")
    os.mkfifo(folder / "images" / "train" / "c0" / "pipe.png")  # reading it would never end
    return named(folder, 360, "pipes, sockets and devices: 1 (train/c0/pipe.png)")


def _modes(folder: Path) -> Outcome:
    """Each file must be right within the rounding of its coding, or refused with a reason."""
    rgb, grey = Image.fromarray(np.dstack([RAMP] * 3)), Image.fromarray(RAMP)
    wide = RAMP.astype(np.uint16) * 257
    opaque = np.full_like(wide, 65535)
    shown = {
        "L.png": encoded(grey, "PNG"),
        "RGB.png": encoded(rgb, "PNG"),
        "CMYK.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "CMYK.jpg": encoded(rgb.convert("CMYK"), "JPEG", quality=100),
        "YCbCr.tif": encoded(rgb.convert("YCbCr"), "TIFF"),
        "P.png": encoded(rgb.quantize(16), "PNG"),
        "LA.png": encoded(grey.convert("LA"), "PNG"),
        "white is zero.tif": encoded(grey, "TIFF", tiffinfo={262: 0}),
        "with a preview.jpg": two_frames(grey, "MPO", quality=100),
    }
    refused = {
        "I16.png": png16(wide, 0),
        "12 of 16 bits.png": png16(wide >> 4, 0),
        "RGB16.png": png16(np.dstack([wide] * 3), 2),
        "LA16.png": png16(np.dstack([wide, opaque]), 4),
        "RGBA16.png": png16(np.dstack([wide] * 3 + [opaque]), 6),
        "RGB16.tif": tiff16(np.dstack([wide] * 3)),
        "I16.tif": encoded(Image.fromarray(wide), "TIFF"),
        "I.tif": encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"),
        "F.tif": encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
        "RGB16.ppm": b"P6 16 16 65535\n" + np.dstack([wide] * 3).astype(">u2").tobytes(),
        "L16.sgi": encoded(grey, "SGI", bpc=2),
        "two pages.tif": two_frames(grey, "TIFF"),
        "animated.png": two_frames(grey, "PNG"),
        "animated.gif": two_frames(grey, "GIF"),
        "animated.webp": two_frames(grey, "WEBP", lossless=True),
        "animated.avif": two_frames(grey, "AVIF"),
    }
    wrong = []
    for name, content in {**shown, **refused}.items():
        (folder / name).write_bytes(content)
        try:
            pixels = ImageFiles.examine(folder, [name], None)[0]
        except ValueError as error:
            if name in shown or not any(
                word in str(error) for word in ("bits a channel: save", "frames or pages")
            ):
                wrong.append(f"{name}: {error}")
        else:
            off = int((pixels.int() - torch.from_numpy(RAMP).int()).abs().max())
            if name in refused or off > 2:
                wrong.append(f"{name} is off by {off}")
    return Outcome("; ".join(wrong) or f"{len(shown)} right, {len(refused)} refused", not wrong)


def _profile(folder: Path) -> Outcome:
    write_images(folder / "images")
    path = folder / "images" / "train" / "c0" / "000.png"
    colours = np.dstack([RAMP, RAMP.T, np.full_like(RAMP, 40)])
    swapped = colour_profile((SRGB[1], SRGB[0], SRGB[2]), 2.2)  # a viewer shows red as green
    Image.fromarray(colours).save(path, icc_profile=swapped)
    data = said_by(folder)[0]
    split = next(data.split(name) for name in ("train", "val") if 0 in data.split(name).ids)
    off = (split.images[0].int() - torch.from_numpy(colours[..., [1, 0, 2]]).permute(2, 0, 1).int()).abs()
    worst = int(off[:, 2:, 2:].max())  # near black, sRGB is no exponent
    return Outcome(f"off by at most {worst} from what a viewer shows", worst <= 6)


def _leak(folder: Path) -> Outcome:
    write_images(folder / "images")
    train, test = folder / "images" / "train", folder / "images" / "test"
    shutil.copyfile(train / "c0" / "003.png", test / "c0" / "copy.png")
    Image.open(train / "c1" / "004.png").save(test / "c1" / "copy.bmp")  # the same pixels in other bytes
    shutil.copyfile(train / "c2" / "005.png", train / "c3" / "copy.png")
    data, said = said_by(folder)
    kept = (
        data.note
        == "test images that are training images too: 2; images in the folders of several classes: 1"
    )
    pairs = ("test/c1/copy.bmp = train/c1/004.png", "train/c2/005.png = train/c3/copy.png")
    return Outcome(f"kept: {data.note}; said: {said}", kept and all(pair in said for pair in pairs))


def _renamed(folder: Path, name: str, other: str) -> Ran:
    small_experiment(folder)
    (folder / "images" / "train" / "c0").rename(folder / "images" / "train" / name)
    (folder / "images" / "test" / "c0").rename(folder / "images" / "test" / other)
    return evaluate(folder)


def _forms(folder: Path) -> Outcome:
    forms = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    return _renamed(folder, *forms).refused("Unicode forms", "NFC", "caf\\xe9", "cafe\\u0301")


def _bytes(folder: Path) -> Outcome:
    name = os.fsdecode("café".encode("latin-1"))
    return _renamed(folder, name, name).refused("names in UTF-8", r"b'caf\xe9'")


def _byte_files(folder: Path) -> Outcome:
    small_experiment(folder)
    path = folder / "images" / "train" / "c0" / "000.png"
    path.rename(path.with_name(os.fsdecode("ä.png".encode("latin-1"))))
    return evaluate(folder).refused("names in UTF-8", r"\xe4.png")


def _case(folder: Path) -> Outcome:
    write_images(folder / "images", {0: "a", 1: "A"})
    return named(folder, 180, "differ only in case", "['A', 'a']")


def _changed(folder: Path) -> Outcome:
    write_images(folder / "images")
    images = said_by(folder)[0].split("test").images
    path = folder / "images" / images.names[0]
    Image.new("RGB", (16, 16), (1, 2, 3)).save(path)
    try:
        images[0]
    except OSError as error:
        return Outcome(str(error), "has changed since" in str(error) and str(path) in str(error))
    return Outcome("read as if nothing had happened", False)


def _normalized(mean: list[float], std: list[float]) -> Callable[[Path], Outcome]:
    def run(folder: Path) -> Outcome:
        small_experiment(folder, network={"init_args.mean": mean, "init_args.std": std})
        return evaluate(folder).refused("`mean` and `std`", "in [0, 1]", "Divide", "255")

    return run


USED_OR_NAMED = "Used, or named by kind in a warning."

CASES = [
    Case("01-exif", "Photographs stored turned, with an EXIF orientation.", "Pixels as a viewer shows them.", _exif),
    Case("folders-exif-elsewhere", "The same in TIFF and WebP files.", "Pixels as a viewer shows them.", _exif_elsewhere),
    Case("02-alpha-ink", "Black ink drawn in the alpha channel.", "Refused without `background`, composited with it.", _alpha),
    Case(
        "folders-transparent-colour", "PNG files with one transparent colour, or a palette with some.",
        "Refused without `background`.", _transparent_colour,
    ),
    Case("03-extensions", "Half of the files are .GIF .jfif .jpe .avif.", "All are used.", _extensions),
    Case("folders-other-files", "HEIC photographs, notes and a third part beside the images.", USED_OR_NAMED, _other_files),
    Case("folders-hidden", "A notebook and a Mac left .ipynb_checkpoints, __MACOSX and ._001.png.", "No classes, no images.", _notebook),
    Case("folders-links", "Links to another class, to nothing and around.", USED_OR_NAMED, _links),
    Case("folders-pipe", "A named pipe among the images.", USED_OR_NAMED, _pipe),
    Case("05-modes", "One ramp in every mode a folder of scans may have.", "Right, or refused with the reason.", _modes),
    Case("folders-colour-profile", "A photograph with a colour profile that is not sRGB.", "Colours as a viewer shows them.", _profile),
    Case("folders-equal-images", "Test images that are training images too; one image in two classes.", "Named in a warning that results keep.", _leak),
    Case("folders-unicode-forms", "A class named by macOS in train, by Linux in test.", "Refused.", _forms),
    Case("folders-latin1-class", "A class whose name is not UTF-8.", "Refused.", _bytes),
    Case("folders-latin1-file", "A file whose name is not UTF-8.", "Refused.", _byte_files),
    Case("folders-case", "Classes A and a.", "Two classes, and named in a warning.", _case),
    Case("folders-changed", "An image is replaced while a command runs.", "An error that names it.", _changed),
    Case("19-mean-255", "mean and std of pixels from 0 to 255.", "Refused.", _normalized([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])),
    Case("folders-std-255", "Only std is of pixels from 0 to 255.", "Refused.", _normalized([0.485, 0.456, 0.406], [58.395, 57.12, 57.375])),
    Case("folders-mean-negative", "A network that wants [-1, 1] is given mean -1 and std 1.", "Refused.", _normalized([-1.0] * 3, [1.0] * 3)),
]  # fmt: skip
