"""Decode image files to the pixels that a viewer shows."""

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from io import BytesIO

import torch
from PIL import Image, ImageCms, ImageFile, ImageOps
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.transforms import functional as F

# Formats whose first frame is the whole picture. Other frames are previews and second views (MPO, a kind of
# JPEG) or layers (PSD).
_FIRST_IS_ALL = ("MPO", "PSD")
_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode by colour space of an ICC profile


@cache
def _formats() -> tuple[str, ...]:
    """Names of the formats that Pillow and its plugins can decode."""
    Image.init()
    factories = {name: Image.OPEN[name][0] for name in Image.ID}
    return tuple(
        name
        for name, factory in factories.items()
        # Pillow reads only the header of MPEG, and EPS files are programs that Ghostscript would run.
        if name not in ("MPEG", "EPS")
        and not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))
    )


@cache
def extensions() -> frozenset[str]:
    """Extensions of these formats in lower case: ``.png``, ``.jpg`` and others."""
    known = (*_formats(), "MPO")  # Pillow opens MPO as JPEG
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in known)


def decode(content: bytes, image_size: int | None, background: Sequence[float] | None) -> Tensor:
    """RGB pixels of an image file, uint8 ``(3, H, W)``.

    Applies its EXIF orientation, converts its colours to sRGB, and composites it with the background.

    Args:
        content: Bytes of the file.
        image_size: Height and width of the result: the shorter side is resized to it (bilinear, antialiased),
            then the centre is cropped. None keeps the size.
        background: Red, green and blue in [0, 1] behind transparent pixels; None refuses those.

    Raises:
        ValueError: If the image has several frames, more than 8 bits a channel, or transparent pixels without
            a background.
        Exception: Of any kind, for damaged files.
    """
    with Image.open(BytesIO(content), formats=_formats()) as image:
        frames = 1 if image.format in _FIRST_IS_ALL else getattr(image, "n_frames", 1)
        if frames > 1:
            raise ValueError(f"{frames} frames or pages: save the one you need as a separate file")
        if _is_deep(image, content):
            raise ValueError(f"mode {image.mode}, more than 8 bits a channel: save it with 8")
        if image.mode == "LAB":
            raise ValueError("mode LAB: save it as RGB")
        image.load()
        try:
            upright = ImageOps.exif_transpose(image)
        except Exception:  # viewers ignore damaged EXIF data too
            upright = image.copy()
    picture = _opaque(upright, background)
    if image_size is not None:
        picture = F.center_crop(F.resize(picture, image_size), image_size)
    pixels: Tensor = F.pil_to_tensor(picture)
    return pixels


def _opaque(image: Image.Image, background: Sequence[float] | None) -> Image.Image:
    """An image in RGB, composited with the background."""
    profile = image.info.get("icc_profile")
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    whole = image.convert("RGBA")
    alpha = whole.getchannel("A")
    colours = whole.getchannel("R") if image.mode in ("1", "L", "LA", "La") else whole.convert("RGB")
    picture = _in_srgb(colours, profile)
    if F.pil_to_tensor(alpha).amin() == 255:
        return picture
    if background is None:
        raise ValueError(
            "transparent pixels: set `background` to the colour behind them, such as [1.0, 1.0, 1.0] for"
            " white"
        )
    red, green, blue = (round(255 * value) for value in background)
    return Image.composite(picture, Image.new("RGB", picture.size, (red, green, blue)), alpha)


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """An opaque image in sRGB, converted by its colour profile if that fits its mode."""
    if picture.mode not in _SPACES.values():
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    transform = _transform(profile, picture.mode) if profile else None
    if transform is None:
        return picture.convert("RGB")
    return transform.apply(picture if picture.mode == transform.input_mode else picture.convert("RGB"))


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion from a colour profile to sRGB; None if it is sRGB or does not fit the mode."""
    try:
        source = ImageCms.getOpenProfile(BytesIO(profile))
        space = _SPACES.get(source.profile.xcolor_space.strip())
        if space is None or (space != mode and (space, mode) != ("RGB", "L")):
            return None
        # The optimisation of LittleCMS for grey has errors of up to 10 of 255.
        flags = ImageCms.Flags.NOOPTIMIZE if space == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), space, "RGB", flags=flags)
    except ImageCms.PyCMSError:  # viewers ignore a damaged profile too
        return None
    if space == "RGB":
        steps = torch.arange(0, 256, 15, dtype=torch.uint8)
        colours = torch.cartesian_prod(steps, steps, steps)[None].permute(2, 0, 1)  # (3, 1, colours)
        shown = F.pil_to_tensor(transform.apply(F.to_pil_image(colours)))
        if (shown.int() - colours.int()).abs().max() <= 2:  # rounding
            return None
    return transform


def _is_deep(image: Image.Image, content: bytes) -> bool:
    """Whether the file has more than 8 bits a channel, of which Pillow silently drops some."""
    if image.mode[0] in "IF":
        return True
    if image.format == "PNG":
        return content[24] > 8  # bits in the header
    if isinstance(image, TiffImageFile):
        # BitsPerSample, and SampleFormat: 1 is unsigned integers, the default, and 4 is undefined.
        return max(image.tag_v2.get(258, (1,))) > 8 or not {1, 4}.issuperset(image.tag_v2.get(339, (1,)))
    if isinstance(image, PpmImageFile):
        arguments = image.tile[0].args  # a mode, or a mode and the value of white
        return isinstance(arguments, tuple) and isinstance(arguments[-1], int) and arguments[-1] > 255
    if image.format == "SGI":
        return content[3] > 1  # bytes a channel
    if image.format == "JPEG2000":
        bits = content[content.index(b"\xff\x4f\xff\x51") + 42]  # of the first component, less 1
        return (bits & 0x7F) + 1 > 8
    if image.format == "AVIF":
        flag = re.search(rb"av1C..[\x40-\x7f\xc0-\xff]", content, re.DOTALL)  # set for 10 or 12 bits
        return flag is not None
    return str(getattr(image, "pixel_format", "")).startswith("BC6")  # DDS of floats
