"""Images as others made them, read within bounds. Knows no model."""

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

# No format that runs code or another program (EPS and PDF do), or that few can check.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


KNOWN = f"one of {', '.join(FORMATS)}"


# Of a file, and of the picture that it stands for: a small file may hold a gigantic one. A narrow picture costs more
# than its pixels, as there is something to be kept for each of its lines.
BYTES, PIXELS, SIDE = 64 << 20, 50_000_000, 65_535


# Passes over all of a JPEG, of which an honest one has some ten, and pieces of a PNG.
SCANS, CHUNKS = 100, 100_000


MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")


END, SCAN = b"\xd9", b"\xda"


def read_image(path: Path, where: str) -> Image.Image:
    """The picture of a file, in RGB and upright; of several frames the first. `where` is the record that names it.

    Raises:
        CalibrationError: no such picture, a broken one, or one beyond the bounds here; it names file and record.
    """
    place = f"{where}: {path}"
    broken = library_errors_as(
        lambda told: CalibrationError(f"the image cannot be read: {told}", place, KNOWN),
        Image.DecompressionBombError,
        EOFError,
        SyntaxError,
        struct.error,
        zlib.error,
    )
    costly = CalibrationError("the image takes too long, or too much memory", place, do="save it anew, as PNG or JPEG")
    with open_regular(path, BYTES, CalibrationError, f"{where}: the image") as file, broken, warnings.catch_warnings():
        # Of odd metadata, which changes no pixel; what matters raises.
        warnings.simplefilter("ignore")
        content = file.read(BYTES)
        # Not what comes after: that is bounded by the number of pixels, whatever the machine. But a TIFF's tiles may be
        # larger than its picture.
        with cpu_limit(costly), memory_limit(costly):
            image = _opened(content, place)
        with image, memory_limit(costly) if image.format == "TIFF" else nullcontext():
            ImageOps.exif_transpose(image, in_place=True)
            return _in_rgb(image, place)


def _opened(content: bytes, place: str) -> Image.Image:
    """A picture of which only the header was read, and whose pixels may be."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise CalibrationError("no image, or a broken one", place, KNOWN) from error
    width, height = image.size
    if width * height > PIXELS or max(width, height) > SIDE:
        wanted = f"at most {PIXELS:,}, and {SIDE:,} a side"
        raise CalibrationError(f"the image has {width:,} x {height:,} pixels", place, wanted)
    # Each of these costs time of its own, beside that of the pixels.
    if (parts := _scans(content)) > SCANS or (parts := _chunks(content)) > CHUNKS:
        raise CalibrationError(f"the image is in {parts:,} parts or more", place, do="save it anew")
    return image


def _scans(content: bytes) -> int:
    """Scans of a JPEG, or as many as are too many."""
    at, scans = 2, 0
    while content.startswith(b"\xff\xd8") and scans <= SCANS and (marker := MARKER.search(content, at)):
        if marker[1] == END:
            break
        scans += marker[1] == SCAN
        at = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return scans


def _chunks(content: bytes) -> int:
    """Chunks of a PNG, or as many as are too many."""
    at, chunks = 8, 0
    while content.startswith(b"\x89PNG") and chunks <= CHUNKS and at < len(content):
        at += 12 + int.from_bytes(content[at : at + 4], "big")
        chunks += 1
    return chunks


def _in_rgb(image: Image.Image, place: str) -> Image.Image:
    if image.mode in ("I", "F"):
        wanted = "8 or 16 bits of a channel"
        raise CalibrationError("nothing says which of the image's numbers are black and white", place, wanted)
    if image.mode.startswith("I;16"):
        # PIL itself would make white of all that is not almost black.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
