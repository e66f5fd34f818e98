"""Pixels of image files: orientation, transparency, modes, colour profiles, and normalisation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lightning_advknn.data import ImageFolder
from lightning_advknn.data.files import ImageFiles
from reliability.case import Case, Outcome, evaluate, small_experiment, write_images
from reliability.cases.folders import read_images
from reliability.image_files import RAMP, SRGB, colour_profile, encoded, png16, tiff16, two_frames


def turned(source: Path, target: Path, save: Callable[[Image.Image, Path], None]) -> None:
    """Copy images; test images are turned left, and `save` must mark that viewers turn them back."""
    for path in source.rglob("*.png"):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path)
        if "train" in path.parts:
            image.save(to)
        else:
            save(image.transpose(Image.Transpose.ROTATE_90), to)


def _same_pixels(folder: Path, save: Callable[[Image.Image, Path], None]) -> Outcome:
    write_images(folder / "upright")
    turned(folder / "upright", folder / "images", save)
    seen = read_images(folder)[0].split("test").images
    upright = ImageFolder(str(folder / "upright"), val_size=40).split("test").images
    positions = torch.arange(len(upright))
    equal = bool(torch.equal(seen[positions], upright[positions]))
    return Outcome(
        f"{len(seen)} test images, {'equal to' if equal else 'different from'} the upright ones", equal
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
    white = read_images(folder, background=[1.0, 1.0, 1.0])[0].split("train").images
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


def _modes(folder: Path) -> Outcome:
    """Each file must be decoded within the rounding of its format, or refused with the reason."""
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
    data = read_images(folder)[0]
    split = next(data.split(name) for name in ("train", "val") if 0 in data.split(name).ids)
    off = (split.images[0].int() - torch.from_numpy(colours[..., [1, 0, 2]]).permute(2, 0, 1).int()).abs()
    worst = int(off[:, 2:, 2:].max())  # near black, sRGB is linear
    return Outcome(f"off by at most {worst} from what a viewer shows", worst <= 6)


def _normalized(mean: list[float], std: list[float]) -> Callable[[Path], Outcome]:
    def run(folder: Path) -> Outcome:
        small_experiment(folder, network={"init_args.mean": mean, "init_args.std": std})
        return evaluate(folder).refused("`mean` and `std`", "in [0, 1]", "Divide", "255")

    return run


CASES = [
    Case(
        "01-exif",
        "Turned photographs with an EXIF orientation.",
        "Pixels as a viewer shows them.",
        _exif,
    ),
    Case(
        "folders-exif-elsewhere",
        "Turned TIFF and WebP files with an orientation.",
        "Pixels as a viewer shows them.",
        _exif_elsewhere,
    ),
    Case(
        "02-alpha-ink",
        "Black ink drawn in the alpha channel.",
        "Refused without `background`, composited with it.",
        _alpha,
    ),
    Case(
        "folders-transparent-colour",
        "PNG files with one transparent colour, or a palette with some.",
        "Refused without `background`.",
        _transparent_colour,
    ),
    Case(
        "05-modes",
        "One ramp in every mode of image files.",
        "Decoded right, or refused with the reason.",
        _modes,
    ),
    Case(
        "folders-colour-profile",
        "A photograph with a colour profile that is not sRGB.",
        "Colours as a viewer shows them.",
        _profile,
    ),
    Case(
        "19-mean-255",
        "mean and std of pixels in [0, 255].",
        "Refused.",
        _normalized([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    ),
    Case(
        "folders-std-255",
        "Only std is of pixels in [0, 255].",
        "Refused.",
        _normalized([0.485, 0.456, 0.406], [58.395, 57.12, 57.375]),
    ),
    Case(
        "folders-mean-negative",
        "mean -1 and std 1, for a network that expects [-1, 1].",
        "Refused.",
        _normalized([-1.0] * 3, [1.0] * 3),
    ),
]
