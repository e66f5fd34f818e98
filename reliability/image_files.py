"""Image files of many formats, some of which Pillow cannot write."""

import struct
import zlib
from collections.abc import Iterable
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

RAMP = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
D50 = (0.9642, 1.0, 0.8249)
# XYZ of red, green and blue under D50.
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    """Encode an image with Pillow."""
    file = BytesIO()
    image.copy().save(file, kind, **settings)  # a copy, as saving changes the image's settings
    return file.getvalue()


def two_frames(image: Image.Image, kind: str, **settings: object) -> bytes:
    """Encode a grey image and its negative with Pillow, as pages or frames."""
    return encoded(image, kind, save_all=True, append_images=[ImageOps.invert(image)], **settings)


def png16(pixels: np.ndarray, colour_type: int) -> bytes:
    """Encode a PNG file of 16 bits a channel, which Pillow cannot.

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
    """Encode uint16 pixels ``(H, W, 3)`` as a TIFF file, which Pillow cannot."""
    height, width, channels = pixels.shape
    end = 8 + 2 + 12 * 9 + 4  # of the header and of 9 entries (tag, type, count, value)
    entries = (
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, end), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, end + 6), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, pixels.nbytes),
    )  # fmt: skip
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return head + table + bytes(4) + struct.pack("<3H", 16, 16, 16) + pixels.astype("<u2").tobytes()


def colour_profile(primaries: Iterable[Iterable[float]], gamma: float) -> bytes:
    """Make an ICC profile.

    Args:
        primaries: XYZ of red, green and blue under D50; empty for grey.
        gamma: Exponent of every channel.
    """

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
