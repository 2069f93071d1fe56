"""Read image files from untrusted sources with bounded time and memory."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from engine.errors import CalibrationError
from engine.untrusted import cpu_limit, library_errors_as, memory_limit, open_regular

# Common formats, without those that PIL reads with other programs or that contain code (EPS, PDF).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
KNOWN = f"one of {', '.join(FORMATS)}"

# Bounds of the file's bytes and of the decoded image: a small file can contain a gigantic image. The sides are bounded
# as well, because PIL keeps data for each line.
BYTES, PIXELS, SIDE = 64 << 20, 50_000_000, 65_535

# Bounds of the scans of a JPEG, each of which is a pass over all pixels (a normal one has about ten), and of the chunks
# of a PNG.
SCANS, CHUNKS = 100, 100_000

# Markers of a JPEG, and those of the end of the image and of the start of a scan.
MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
END, SCAN = b"\xd9", b"\xda"


def read_image(path: Path, where: str) -> Image.Image:
    """Read an image as RGB, rotated as its EXIF orientation says. Only the first frame is read.

    Args:
        path: The file.
        where: The record that names the file, for errors.

    Raises:
        CalibrationError: The file is missing, damaged, not an image, or exceeds the bounds.
    """
    place = f"{where}: {path}"
    broken = library_errors_as(
        lambda message: CalibrationError(f"the image cannot be read: {message}", place, KNOWN),
        Image.DecompressionBombError,
        EOFError,
        SyntaxError,
        struct.error,
        zlib.error,
    )
    costly = CalibrationError(
        "reading the image takes too long or too much memory", place, do="save the image again as PNG or JPEG"
    )
    with open_regular(path, BYTES, CalibrationError, f"{where}: the image") as file, broken, warnings.catch_warnings():
        # Warnings concern metadata, which does not change pixels. Serious faults raise.
        warnings.simplefilter("ignore")
        content = file.read(BYTES)
        # Decoding needs no limits, because the number of pixels bounds it. A TIFF is the exception: its tiles may be
        # larger than the image.
        with cpu_limit(costly), memory_limit(costly):
            image = _opened(content, place)
        with image, memory_limit(costly) if image.format == "TIFF" else nullcontext():
            ImageOps.exif_transpose(image, in_place=True)
            return _in_rgb(image, place)


def _opened(content: bytes, place: str) -> Image.Image:
    """Open an image and check the bounds. Only the header is read, not the pixels."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise CalibrationError("the file is not an image, or it is damaged", place, KNOWN) from error
    width, height = image.size
    if width * height > PIXELS or max(width, height) > SIDE:
        limits = f"at most {PIXELS:,} pixels, and {SIDE:,} per side"
        raise CalibrationError(f"the image has {width:,} x {height:,} pixels", place, limits)
    # Each scan and each chunk takes time, whatever the number of pixels.
    if (parts := _scans(content)) > SCANS or (parts := _chunks(content)) > CHUNKS:
        raise CalibrationError(f"the image has at least {parts:,} scans or chunks", place, do="save the image again")
    return image


def _scans(content: bytes) -> int:
    """Count the scans of a JPEG, up to SCANS + 1."""
    at, scans = 2, 0
    while content.startswith(b"\xff\xd8") and scans <= SCANS and (marker := MARKER.search(content, at)):
        if marker[1] == END:
            break
        scans += marker[1] == SCAN
        at = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return scans


def _chunks(content: bytes) -> int:
    """Count the chunks of a PNG, up to CHUNKS + 1."""
    at, chunks = 8, 0
    while content.startswith(b"\x89PNG") and chunks <= CHUNKS and at < len(content):
        at += 12 + int.from_bytes(content[at : at + 4], "big")
        chunks += 1
    return chunks


def _in_rgb(image: Image.Image, place: str) -> Image.Image:
    if image.mode in ("I", "F"):
        problem = f"the image has 32-bit pixels (mode {image.mode}), for which black and white are not defined"
        raise CalibrationError(problem, place, "8 or 16 bits per channel")
    if image.mode.startswith("I;16"):
        # PIL's own conversion clips: everything above 255 of 65,535 becomes white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
