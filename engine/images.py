"""Images as others made them, read within bounds. Knows no model."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from engine.errors import CalibrationError
from engine.untrusted import foreign, open_regular

# No format that runs code or another program (EPS and PDF do), or that few can check.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Of a file, and of the picture that it stands for: a small file may hold a gigantic one.
BYTES, PIXELS = 64 << 20, 50_000_000


def read_image(path: Path, where: str) -> Image.Image:
    """The picture of a file, in RGB and upright; of several frames the first. `where` is the record that names it.

    Raises:
        CalibrationError: no such picture, a broken one, or one beyond BYTES or PIXELS; it names file and record.
    """
    place = f"{where}: {path}"
    broken = foreign(
        lambda told: CalibrationError(f"the image cannot be read: {told}", place, f"one of {', '.join(FORMATS)}"),
        UnidentifiedImageError,
        Image.DecompressionBombError,
        SyntaxError,
    )
    with open_regular(path, BYTES, CalibrationError, f"{where}: the image") as file, broken, warnings.catch_warnings():
        # Of odd metadata, which changes no pixel; what matters raises.
        warnings.simplefilter("ignore")
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > PIXELS:
                raise CalibrationError(f"the image has {width:,} x {height:,} pixels", place, f"at most {PIXELS:,}")
            return ImageOps.exif_transpose(image).convert("RGB")
