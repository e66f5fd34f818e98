"""Decoded pixels against the written ones, NumPy, and colour arithmetic in float64."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from lightning_advknn.data.decoding import _formats, _is_deep, decode, extensions
from reliability.image_files import (
    DISPLAY_P3,
    SRGB,
    colour_profile,
    encoded,
    png16,
    tiff16,
    two_frames,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
GREY = PIXELS[..., 0]


def read(content: bytes, background: tuple[float, float, float] | None = None) -> np.ndarray:
    """Pixels ``(H, W, 3)``."""
    return decode(content, None, background).permute(1, 2, 0).numpy()


# What a viewer does with the stored pixels for each orientation of EXIF 2.3.
ORIENTATIONS = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", [*ORIENTATIONS, 0, 9])  # the last two are undefined
def test_images_are_turned_as_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    off = read(encoded(Image.fromarray(PIXELS), kind, exif=exif, **settings)).astype(int)
    off -= ORIENTATIONS.get(orientation, ORIENTATIONS[1])(PIXELS)
    assert np.abs(off).max() <= (3 if kind == "JPEG" else 0)


def test_damaged_exif_says_nothing() -> None:
    content = encoded(Image.fromarray(PIXELS), "PNG", exif=b"Exif\0\0MM of something else, and too short")
    assert np.array_equal(read(content), PIXELS)


def test_resizing_comes_after_turning() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((20, 60, 3), np.uint8)
    stored[:, 20:40] = (10, 200, 30)
    pixels = decode(encoded(Image.fromarray(stored), "PNG", exif=exif), 10, None)
    assert pixels.shape == (3, 10, 10)
    assert pixels[:, 2:8, 2:8].flatten(1).unique(dim=1).squeeze(1).tolist() == [10, 200, 30]


def blended(colours: np.ndarray, alpha: np.ndarray, background: tuple[float, float, float]) -> np.ndarray:
    """Colours ``(H, W, 3)`` with alpha ``(H, W)`` over a background, in float64."""
    share = alpha[..., None] / 255
    return share * colours + (1 - share) * 255 * np.array(background)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "TGA", "ICO"])
@pytest.mark.parametrize("background", [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.2, 0.4, 1.0)])
def test_transparent_images_lie_on_the_background(kind: str, background: tuple[float, float, float]) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, GREY.shape, np.uint8)
    alpha[0, :3] = 0, 128, 255
    settings = {"WEBP": {"lossless": True, "exact": True}, "ICO": {"sizes": [(7, 5)]}}.get(kind, {})
    content = encoded(Image.fromarray(np.dstack([PIXELS, alpha])), kind, **settings)
    assert np.abs(read(content, background) - blended(PIXELS, alpha, background)).max() <= 0.51
    with pytest.raises(ValueError, match=r"transparent pixels: set `background` .*white"):
        read(content)


def test_transparent_greys_and_palettes_and_colours() -> None:
    white = (1.0, 1.0, 1.0)
    alpha = np.where(GREY < 128, 40, 255).astype(np.uint8)
    grey_alpha = encoded(Image.fromarray(np.dstack([GREY, alpha])), "PNG")
    assert np.abs(read(grey_alpha, white) - blended(np.dstack([GREY] * 3), alpha, white)).max() <= 0.51
    few = (GREY // 64).astype(np.uint8)
    palette = Image.fromarray(few, "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]], np.uint8)[few]
    shares = np.array([0, 100, 255, 255], np.uint8)
    several = encoded(palette, "PNG", transparency=bytes(shares))
    assert np.abs(read(several, white) - blended(colours, shares[few], white)).max() <= 0.51
    gone = np.where(few == 2, 0, 255)
    for kind in ("PNG", "GIF"):
        one = encoded(palette, kind, transparency=2)
        assert np.array_equal(read(one, white), blended(colours, gone, white))
        with pytest.raises(ValueError, match="transparent"):
            read(one)
    for image, colour in (
        (Image.fromarray(GREY), int(GREY[2, 2])),
        (Image.fromarray(PIXELS), tuple(PIXELS[2, 2].tolist())),
        (Image.fromarray(GREY > 127), 1),
    ):
        content = encoded(image, "PNG", transparency=colour)
        shown = np.array(image.convert("RGB"))
        there = np.where((shown == shown[2, 2]).all(-1) if colour != 1 else GREY > 127, 0, 255)
        assert np.array_equal(read(content, white), blended(shown, there, white))
        with pytest.raises(ValueError, match="transparent"):
            read(content)


def test_opaque_alpha_is_dropped() -> None:
    opaque = np.full_like(GREY, 255)
    assert np.array_equal(read(encoded(Image.fromarray(np.dstack([PIXELS, opaque])), "PNG")), PIXELS)
    for background in (None, (0.0, 1.0, 0.0)):
        content = encoded(Image.fromarray(np.dstack([GREY, opaque])), "PNG")
        assert np.array_equal(read(content, background), np.dstack([GREY] * 3))
    unused = tuple((PIXELS[0, 0] ^ np.array([1, 0, 0])).tolist())
    assert not (unused == PIXELS).all(-1).any()
    assert np.array_equal(read(encoded(Image.fromarray(PIXELS), "PNG", transparency=unused)), PIXELS)


WIDE = PIXELS.astype(np.uint16) * 257
DEEP = {
    "grey png": png16(WIDE[..., 0], 0),
    "rgb png": png16(WIDE, 2),
    "grey and alpha png": png16(WIDE[..., :2], 4),
    "rgba png": png16(np.dstack([WIDE, WIDE[..., 0]]), 6),
    "rgb tiff": tiff16(WIDE),
    "grey tiff": encoded(Image.fromarray(WIDE[..., 0]), "TIFF"),
    "whole numbers": encoded(Image.fromarray(WIDE[..., 0].astype(np.int32)), "TIFF"),
    "floats": encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "signed tiff": encoded(Image.fromarray(GREY), "TIFF", tiffinfo={339: 2}),
    "binary ppm": b"P6 7 5 65535\n" + WIDE.astype(">u2").tobytes(),
    "plain ppm": b"P3 7 5 1023\n" + " ".join(map(str, WIDE.flatten() >> 6)).encode(),
    "grey pgm": b"P5 7 5 4095\n" + (WIDE[..., 0] >> 4).astype(">u2").tobytes(),
    "pfm": b"Pf 7 5 -1.0\n" + GREY.astype("<f4").tobytes(),
    "sgi": encoded(Image.fromarray(GREY), "SGI", bpc=2),
    "jpeg 2000": encoded(Image.fromarray(WIDE[..., 0]), "JPEG2000"),
}


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_more_than_8_bits_a_channel_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"mode .*more than 8 bits a channel: save it with 8"):
        read(content)


@pytest.mark.parametrize(
    ("kind", "mark", "place", "bits"),
    [("JPEG2000", b"\xff\x4f\xff\x51", 42, 11), ("AVIF", b"av1C", 6, 0x40), ("AVIF", b"av1C", 6, 0x60)],
)
def test_headers_of_more_than_8_bits(kind: str, mark: bytes, place: int, bits: int) -> None:
    # Pillow writes only 8 bits in these formats, so the header is changed by hand.
    content = bytearray(encoded(Image.fromarray(PIXELS), kind))
    with Image.open(BytesIO(content)) as image:
        assert not _is_deep(image, bytes(content))
        content[content.index(mark) + place] |= bits
        assert _is_deep(image, bytes(content))


def test_dds_of_floats_are_refused() -> None:
    header = b"DDS " + b"".join(
        number.to_bytes(4, "little") for number in (124, 0x1007, 4, 4, 0, 0, 0, *[0] * 11, 32, 4)
    )
    header += b"DX10" + bytes(20) + (0x1000).to_bytes(4, "little") + bytes(16)
    content = header + b"".join(number.to_bytes(4, "little") for number in (95, 3, 0, 1, 0)) + bytes(16)
    with pytest.raises(ValueError, match="more than 8 bits"):
        read(content)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "AVIF"])
def test_several_frames_are_refused_and_one_is_not(kind: str) -> None:
    with pytest.raises(ValueError, match=r"2 frames or pages: save the one"):
        read(two_frames(Image.fromarray(GREY), kind))
    assert read(encoded(Image.fromarray(GREY), kind, save_all=True)).shape == (5, 7, 3)


def test_of_a_photograph_with_a_second_view_the_first_is_read() -> None:
    seen = read(two_frames(Image.fromarray(GREY), "MPO", quality=100)).astype(int)
    assert np.abs(seen - GREY[..., None]).max() <= 2


@pytest.mark.parametrize(
    ("mode", "kind", "off"),
    [
        *(("1", "PNG", 0), ("L", "PNG", 0), ("P", "GIF", 0), ("P", "BMP", 0)),
        *(("CMYK", "TIFF", 0), ("CMYK", "JPEG", 3), ("YCbCr", "TIFF", 2)),
    ],
)
def test_modes_are_read_as_pillow_shows_them(mode: str, kind: str, off: int) -> None:
    smooth = np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))
    rgb = Image.fromarray(np.dstack([smooth] * 3))
    image = rgb.quantize(8) if mode == "P" else rgb.convert(mode)
    content = encoded(image, kind, **({"quality": 100} if kind == "JPEG" else {}))
    shown = np.array(image.convert("RGB"), int)
    assert np.abs(read(content) - shown).max() <= off
    if mode != "1":
        assert np.abs(read(content) - np.array(rgb, int)).max() <= max(off, 2)


def test_white_is_zero() -> None:
    assert np.array_equal(
        read(encoded(Image.fromarray(GREY), "TIFF", tiffinfo={262: 0})), np.dstack([GREY] * 3)
    )


def test_lab_is_refused() -> None:
    lab = Image.frombytes("LAB", (7, 5), PIXELS.tobytes())
    with pytest.raises(ValueError, match="mode LAB: save it as RGB"):
        read(encoded(lab, "TIFF"))


def in_srgb(linear: np.ndarray) -> np.ndarray:
    """The sRGB curve of IEC 61966-2-1, from linear light in [0, 1] to [0, 255]."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("primaries", "gamma"), [(DISPLAY_P3, 2.2), (SRGB, 1.8), (SRGB, 1.0)])
def test_colour_profiles_are_followed(kind: str, primaries: tuple, gamma: float) -> None:
    colours = np.random.default_rng(2).integers(100, 160, (5, 7, 3), np.uint8)  # in both gamuts
    settings = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(
        Image.fromarray(colours), kind, icc_profile=colour_profile(primaries, gamma), **settings
    )
    light = (colours / 255.0) ** gamma @ np.array(primaries) @ np.linalg.inv(np.array(SRGB))
    seen = read(content)
    assert np.abs(seen - in_srgb(light)).max() <= 1.5
    assert np.abs(seen.astype(int) - colours).max() > 4  # the profile matters


def test_colour_profiles_of_greys() -> None:
    profile = colour_profile((), 1.0)
    alpha = np.full_like(GREY, 255)
    for pixels in (GREY, np.dstack([GREY, alpha])):
        seen = read(encoded(Image.fromarray(pixels), "PNG", icc_profile=profile))
        assert np.abs(seen - in_srgb(GREY / 255)[..., None]).max() <= 1.5
    # An RGB profile applies to grey images; a grey profile does not apply to RGB.
    seen = read(encoded(Image.fromarray(GREY), "PNG", icc_profile=colour_profile(SRGB, 1.0)))
    assert np.abs(seen - in_srgb(GREY / 255)[..., None]).max() <= 1.5
    assert np.array_equal(read(encoded(Image.fromarray(PIXELS), "PNG", icc_profile=profile)), PIXELS)


def test_colour_profiles_with_transparency_and_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = np.where(GREY < 128, 0, 255).astype(np.uint8)
    swapped = colour_profile((SRGB[1], SRGB[0], SRGB[2]), 1.0)
    content = encoded(Image.fromarray(np.dstack([PIXELS, alpha])), "PNG", icc_profile=swapped, exif=exif)
    shown = blended(in_srgb(PIXELS[..., [1, 0, 2]] / 255), alpha, (0.0, 1.0, 0.0))
    assert np.abs(read(content, (0.0, 1.0, 0.0)) - np.rot90(shown, -1)).max() <= 1.5


def test_profiles_that_are_srgb_or_damaged_change_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile", srgb[:100]):
        assert np.array_equal(read(encoded(Image.fromarray(PIXELS), "PNG", icc_profile=profile)), PIXELS)


def test_all_that_pillow_decodes_itself_is_read() -> None:
    assert {
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".gif",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".jp2",
        ".mpo",
    } <= extensions()
    assert not {".pdf", ".eps", ".ps", ".h5", ".mpg", ".wmf", ".txt", ""} & extensions()
    for kind in ("BMP", "GIF", "PNG", "TIFF", "PPM", "PCX", "TGA", "DDS", "SGI", "WEBP", "QOI"):
        if kind in Image.SAVE and kind in _formats():
            settings = {"lossless": True} if kind == "WEBP" else {}
            few = np.dstack([GREY // 64 * 64] * 3)
            assert np.array_equal(read(encoded(Image.fromarray(few), kind, **settings)), few), kind


def test_a_program_under_an_images_name_is_not_run() -> None:
    with pytest.raises(OSError, match="cannot identify"):
        read(encoded(Image.fromarray(PIXELS), "EPS"))


def test_pixels_are_bytes_of_three_channels() -> None:
    pixels = decode(encoded(Image.fromarray(GREY), "PNG"), None, None)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 5, 7))
