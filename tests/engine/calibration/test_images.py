"""Image files: read as RGB, upright, first frame. Any other file is refused within bounded time and memory."""

from __future__ import annotations

import errno
import io
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_images
from errors import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from thorough import as_thorough

from engine.calibration.images import BYTES, CHUNKS, KNOWN, SCANS, SIDE, read_image
from engine.errors import CalibrationError

FUZZ = settings(max_examples=250, deadline=None, derandomize=True)
WHERE = "a.jsonl:3"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
each_format = pytest.mark.parametrize("form", FORMATS)
# Limits for reading a file: seconds of CPU time, bytes of memory.
SECONDS, MEMORY = 10, 1 << 30
# The EXIF tag of the orientation.
ORIENTATION = 0x0112
# EXIF orientation → the sides of the stored image that are the top (red) and the bottom (blue) of the upright one.
STORED = {1: "top bottom", 2: "top bottom", 3: "bottom top", 4: "bottom top", 5: "left right", 6: "left right"}
STORED |= {7: "right left", 8: "right left"}


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def drawn(folder: Path, size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.open(tiny_images.draw(folder / "drawn.png", 5, size))


def read(folder: Path, content: bytes) -> Image.Image:
    path = folder / "picture"
    path.write_bytes(content)
    return read_image(path, WHERE)


def check_refused(path: Path, *facts: str) -> CalibrationError:
    """Check that a file is refused within the limits, with an error that names it and the record."""
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused(CalibrationError, facts=[WHERE, str(path), *facts]) as caught:
        read_image(path, WHERE)
    assert time.process_time() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MEMORY
    message = str(caught.value)
    assert "\n" not in caught.value.what and "object at" not in message and len(message) < 800
    return caught.value


def check_content_refused(folder: Path, content: bytes, *facts: str) -> CalibrationError:
    (folder / "picture").write_bytes(content)
    return check_refused(folder / "picture", *facts)


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], *more: bytes, rows: int | None = None, last: bytes = b"") -> bytes:
    """Return a black PNG with chunks `more` before and `last` after its pixels, of which it has only `rows` rows."""
    width, height = size
    packed = zlib.compressobj(9)
    row = bytes(1 + width)
    pixels = b"".join(packed.compress(row) for _ in range(height if rows is None else rows)) + packed.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", pixels) + last + chunk(b"IEND")


def gif(size: tuple[int, int], more: bytes = b"") -> bytes:
    """Return a GIF of one empty frame."""
    screen = b"GIF89a" + struct.pack("<HHBBB", *size, 0x80, 0, 0) + bytes(6)
    return screen + more + b"," + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\2\2\x44\1\0;"


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def tiff(*tags: tuple[int, int, int], following: int = 0) -> bytes:
    """Return the header of a TIFF and one directory of these tags, given as number, type and value."""
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following) + bytes(300)


def grey_tiff(width: int, height: int, *more: tuple[int, int, int], following: int = 0) -> bytes:
    tags = {256: (4, width), 257: (4, height), 258: (3, 8), 259: (3, 1), 262: (3, 1), 277: (3, 1)}
    tags |= {273: (4, 200), 278: (4, height), 279: (4, min(width * height, 2**32 - 1))} if not more else {}
    return tiff(*((tag, *rest) for tag, rest in tags.items()), *more, following=following)


def webp(width: int, height: int) -> bytes:
    """Return a WebP whose extended header gives a canvas of this size, and which contains one pixel."""
    inner = saved(Image.new("RGB", (1, 1)), "WEBP")[12:]
    canvas = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_lossless(width: int, height: int) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    body = b"WEBPVP8L" + struct.pack("<IB", 10, 0x2F) + struct.pack("<I", bits) + bytes(5)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg(more: bytes = b"") -> bytes:
    content = saved(Image.new("RGB", (8, 8)), "JPEG")
    return content[:2] + more + content[2:]


def scans(count: int) -> bytes:
    """Return a progressive JPEG of `count` scans, by repeating its last one."""
    content = saved(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    last = content[content.rfind(b"\xff\xda") : -2]
    return content[:-2] + last * (count - content.count(b"\xff\xda")) + content[-2:]


@each_format
def test_a_picture_of_each_format_is_as_it_was_saved(tmp_path: Path, form: str) -> None:
    picture = drawn(tmp_path)
    image = read(tmp_path, saved(picture, form, **({"lossless": True} if form == "WEBP" else {})))
    assert (image.mode, image.size) == ("RGB", (60, 40))
    close = {"JPEG": 40, "GIF": 60}.get(form, 0)
    off = np.abs(np.asarray(image).astype(int) - np.asarray(picture))
    assert off.mean() <= close / 5 and off.max() <= 4 * close


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
        *(("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16")),
        *(("JPEG", mode) for mode in ("L", "CMYK")),
        *(("WEBP", mode) for mode in ("RGBA", "P")),
        *(("GIF", mode) for mode in ("1", "L", "P")),
        *(("BMP", mode) for mode in ("1", "L", "P", "RGBA")),
    ],
)
def test_a_picture_of_each_mode_has_its_colours(tmp_path: Path, form: str, mode: str) -> None:
    grey = Image.new("L", (16, 8), 255)
    grey.paste(0, (0, 0, 8, 8))
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "LA":
        stored = grey.convert("LA")
    else:
        stored = grey.convert("RGB").convert(mode)
    assert stored.mode == mode
    image = read(tmp_path, saved(stored, form))
    assert (image.mode, image.size) == ("RGB", (16, 8))
    assert max(image.getpixel((2, 4))) < 20 and min(image.getpixel((13, 4))) > 235


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_of_grey_are_greys(tmp_path: Path, form: str) -> None:
    stored = Image.fromarray(np.array([[0, 0x1234, 0x8000, 0xFFFF]], np.uint16))
    image = read(tmp_path, saved(stored, form))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(grey,) * 3 for grey in (0, 0x12, 0x80, 0xFF)]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused(tmp_path: Path, mode: str) -> None:
    check_content_refused(tmp_path, saved(Image.new(mode, (4, 4)), "TIFF"), f"mode {mode}", "8 or 16 bits")


def test_what_a_palette_or_an_alpha_channel_makes_transparent_keeps_its_colour(tmp_path: Path) -> None:
    assert read(tmp_path, saved(Image.new("RGBA", (2, 2), (9, 99, 199, 0)), "PNG")).getpixel((0, 0)) == (9, 99, 199)
    stored = Image.new("RGB", (2, 2), (9, 99, 199)).quantize(4)
    image = read(tmp_path, saved(stored, "PNG", transparency=bytes(4)))
    assert image.getpixel((0, 0)) == (9, 99, 199)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_upright(tmp_path: Path, form: str, orientation: int) -> None:
    first = STORED[orientation].split()[0]
    size = (48, 32) if first in ("top", "bottom") else (32, 48)
    stored = Image.new("RGB", size, "blue")
    boxes = {"top": (0, 0, 48, 16), "bottom": (0, 16, 48, 32), "left": (0, 0, 16, 48), "right": (16, 0, 32, 48)}
    stored.paste("red", boxes[first])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = read(tmp_path, saved(stored, form, exif=exif))
    assert image.size == (48, 32)
    (red, _, little), (few, _, blue) = image.getpixel((24, 4)), image.getpixel((24, 28))
    assert min(red, blue) > 200 and max(little, few) < 60


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, form: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    content = saved(frames[0], form, save_all=True, append_images=frames[1:])
    red, green, blue = read(tmp_path, content).getpixel((5, 5))
    assert red > 240 and max(green, blue) < 20


def test_a_jpeg_of_several_pictures_is_its_first(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    image = read(tmp_path, saved(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert image.size == (16, 16) and image.getpixel((3, 3))[0] > 240


def test_what_is_read_needs_its_file_no_more(tmp_path: Path) -> None:
    image = read(tmp_path, saved(drawn(tmp_path), "PNG"))
    (tmp_path / "picture").unlink()
    assert image.resize((5, 5)).tobytes() == drawn(tmp_path).resize((5, 5)).tobytes()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def large(path: Path) -> None:
    """Create a sparse file that is larger than allowed."""
    path.write_bytes(jpeg())
    os.truncate(path, BYTES + 1)


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda path: None, os.strerror(errno.ENOENT)),
        (Path.mkdir, os.strerror(errno.EISDIR)),
        (pipe, "pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "device"),
        (lambda path: path.symlink_to(path), os.strerror(errno.ELOOP)),
        (large, f"{BYTES:,}"),
    ],
    ids=["missing", "directory", "pipe", "device", "loop", "large"],
)
def test_a_path_that_is_no_regular_file_is_refused(tmp_path: Path, make: Callable[[Path], Any], fact: str) -> None:
    make(tmp_path / "picture.png")
    check_refused(tmp_path / "picture.png", fact)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 1000,
        b"hello, world\n" * 50,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b"%PDF-1.4\n1 0 obj <</Type /Catalog>> endobj\ntrailer <</Root 1 0 R>>\n%%EOF\n",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
        b"P6 4 4 255\n" + bytes(48),
        saved(Image.new("RGB", (16, 16)), "ICO"),
        saved(Image.new("RGB", (16, 16)), "JPEG2000"),
        saved(Image.new("RGB", (16, 16)), "TGA"),
        saved(Image.new("RGB", (16, 16)), "PDF"),
        saved(Image.new("RGB", (16, 16)), "EPS"),
    ],
    ids=["empty", "zeros", "text", "EPS", "PDF", "SVG", "PPM", "ICO", "JPEG2000", "TGA", "PDF of PIL", "EPS of PIL"],
)
def test_a_file_of_another_format_is_refused_with_the_known_formats(tmp_path: Path, content: bytes) -> None:
    check_content_refused(tmp_path, content, "JPEG, PNG, WEBP, GIF, BMP, TIFF")


@each_format
@pytest.mark.parametrize("part", [0.001, 0.05, 0.2, 0.5, 0.9])
def test_a_truncated_picture_is_refused(tmp_path: Path, form: str, part: float) -> None:
    content = saved(drawn(tmp_path, (300, 200)), form)
    error = check_content_refused(tmp_path, content[: max(1, int(len(content) * part))])
    assert error.expected == KNOWN


# Made when a test runs, as some of them take long to make.
GIGANTIC: dict[str, tuple[Callable[[], bytes], str]] = {
    "PNG of 10 Gpx": (lambda: png((100_000, 100_000), rows=100), "10000000000 pixels"),
    "PNG of 100 Mpx": as_thorough((lambda: png((10_000, 10_000)), "10,000 x 10,000 pixels")),
    "PNG too high": (lambda: png((1, SIDE + 1)), "1 x 65,536 pixels"),
    "PNG too wide": (lambda: png((SIDE + 1, 1)), "65,536 x 1 pixels"),
    "PNG of the largest sides": (lambda: png((2**31 - 1, 2**31 - 1), rows=0), "pixels"),
    "GIF of 4 Gpx": (lambda: gif((65_535, 65_535)), "pixels"),
    "GIF of 100 Mpx": (lambda: gif((10_000, 10_000)), "pixels"),
    "BMP of 10 Gpx": (lambda: bmp(100_000, 100_000), "pixels"),
    "BMP of 100 Mpx": (lambda: bmp(10_000, -10_000), "pixels"),
    "BMP of the largest sides": (lambda: bmp(2**31 - 1, 2**31 - 1), "pixels"),
    "TIFF of 10 Gpx": (lambda: grey_tiff(100_000, 100_000), "pixels"),
    "TIFF of the largest sides": (lambda: grey_tiff(2**32 - 1, 2**32 - 1), "pixels"),
    "WEBP too wide": (lambda: webp(2**24, 255), ""),
    "WEBP of 268 Mpx": (lambda: webp(16_383, 16_383), ""),
    "WEBP of 268 Mpx, lossless": (lambda: webp_lossless(16_383, 16_383), "pixels"),
    "JPEG of 60 Mpx": (lambda: saved(Image.new("L", (10_000, 6_000)), "JPEG"), "10,000 x 6,000 pixels"),
}


@pytest.mark.parametrize(("make", "fact"), GIGANTIC.values(), ids=list(GIGANTIC))
def test_a_small_file_of_a_gigantic_picture_is_refused(tmp_path: Path, make: Callable[[], bytes], fact: str) -> None:
    content = make()
    assert len(content) < 1 << 20
    check_content_refused(tmp_path, content, fact)


@cache
def bomb() -> bytes:
    return zlib.compress(bytes(100 << 20), 9)


# Some of these take seconds to make and to read.
LONG: dict[str, Callable[[], bytes]] = {
    "text": lambda: png((8, 8), chunk(b"zTXt", b"a\0\0" + bomb())),
    "international text": as_thorough(lambda: png((8, 8), chunk(b"iTXt", b"a\0\1\0\0\0" + bomb()))),
    "profile": as_thorough(lambda: png((8, 8), chunk(b"iCCP", b"a\0\0" + bomb()))),
    "texts": lambda: png((8, 8), *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20), 9))] * 200),
    "chunks": lambda: png((8, 8), chunk(b"prIv") * (CHUNKS + 1)),
    "chunks behind": lambda: png((8, 8), last=chunk(b"prIv") * (CHUNKS + 1)),
    "empty pixels": lambda: png((8, 8), last=chunk(b"IDAT") * (CHUNKS + 1)),
    "short texts": as_thorough(lambda: png((8, 8), chunk(b"tEXt", b"a\0b") * 4_000_000)),
    "PNG 0 x 8": lambda: png((0, 8)),
    "PNG 8 x 0": lambda: png((8, 0)),
    "GIF 0": lambda: gif((0, 0)),
    "BMP 0 x 8": lambda: bmp(0, 8),
    "BMP 8 x 0": lambda: bmp(8, 0),
    "TIFF 0 x 8": lambda: grey_tiff(0, 8),
    "TIFF 8 x 0": lambda: grey_tiff(8, 0),
    "fill": as_thorough(lambda: jpeg(b"\xff" * 50_000_000)),
    "markers": as_thorough(lambda: jpeg(b"\xff\xe9\0\2" * 12_000_000)),
    "scans": lambda: scans(SCANS + 1),
    "comments": as_thorough(lambda: gif((8, 8), b"!\xfe" + b"\1a" * 25_000_000 + b"\0")),
    "tile": lambda: grey_tiff(8, 8, (322, 4, 60_000), (323, 4, 60_000), (324, 4, 200), (325, 4, 64)),
    "directories": lambda: tiff(following=8),
}


@pytest.mark.parametrize("make", LONG.values(), ids=list(LONG))
def test_a_picture_that_would_take_long_or_much_memory_is_refused(tmp_path: Path, make: Callable[[], bytes]) -> None:
    check_content_refused(tmp_path, make())


def frames(mode: str, form: str, count: int) -> bytes:
    """Return an animation of `count` frames."""
    first, second = (Image.new(mode, (900, 900), colour) for colour in (0, 1))
    return saved(first, form, save_all=True, append_images=[second] * (count - 1))


BESIDE: dict[str, Callable[[], bytes]] = {
    "endless directories": lambda: grey_tiff(8, 8, following=8),
    "as many scans as may be": lambda: scans(SCANS),
    "chunks": lambda: png((8, 8), chunk(b"prIv") * (CHUNKS // 2)),
    "markers": lambda: jpeg(b"\xff\xe9\0\2" * 1000),
    "GIF of frames": lambda: frames("P", "GIF", 301),
    "PNG of frames": as_thorough(lambda: frames("RGB", "PNG", 100)),
    "film behind": lambda: saved(Image.new("RGB", (64, 64)), "JPEG") + os.urandom(1 << 20),
}


@pytest.mark.parametrize("make", BESIDE.values(), ids=list(BESIDE))
def test_what_stands_beside_the_first_frame_costs_nothing(tmp_path: Path, make: Callable[[], bytes]) -> None:
    content = make()
    began = time.process_time()
    assert read(tmp_path, content).mode == "RGB"
    assert time.process_time() - began < SECONDS


def test_a_picture_of_a_large_camera_is_read(tmp_path: Path) -> None:
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read(tmp_path, png((8_192, 6_100))).size == (8_192, 6_100)
    assert time.process_time() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MEMORY


@cache
def small() -> list[bytes]:
    """Return a few images of each format, with metadata and further frames."""
    made, exif = [], Image.Exif()
    exif[ORIENTATION] = 6
    for mode in ("RGB", "P", "L", "CMYK", "RGBA", "1", "I;16"):
        grey = Image.linear_gradient("L").resize((24, 18))
        image = Image.fromarray(np.asarray(grey).astype(np.uint16)) if mode == "I;16" else grey.convert(mode)
        for form in FORMATS:
            try:
                made.append(saved(image, form, exif=exif))
            except (OSError, KeyError, ValueError):
                continue
    frames = [Image.new("RGB", (24, 18), colour) for colour in ("red", "blue")]
    for form in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        made.append(saved(frames[0], form, save_all=True, append_images=frames[1:]))
    compressions = ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")
    made += [saved(frames[0], "TIFF", compression=compression) for compression in compressions]
    made += [saved(frames[0], "JPEG", progressive=True, exif=exif), saved(frames[0], "WEBP", lossless=True)]
    return made


def is_picture_or_refused(folder: Path, content: bytes) -> bool:
    try:
        image = read(folder, content)
    except CalibrationError as error:
        return WHERE in str(error) and str(folder) in str(error)
    return image.mode == "RGB" and max(image.size) <= SIDE and len(image.tobytes()) == 3 * image.width * image.height


def test_small_pictures_are_read(tmp_path: Path) -> None:
    assert len(small()) > 30
    assert {read(tmp_path, content).size for content in small()} == {(24, 18), (18, 24)}


@pytest.mark.thorough
@FUZZ
@given(data=st.data())
def test_a_spoilt_picture_is_a_picture_or_a_calibration_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = data.draw(st.sampled_from(small()))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, min(len(content), start + 8)) | st.just(len(content)))
        piece = data.draw(
            st.binary(min_size=stop - start, max_size=stop - start) if stop - start < 9 else st.just(b"")
        ) or data.draw(st.sampled_from([b"", b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", content[start:stop] * 2]))
        content = content[:start] + piece + content[stop:]
    assert is_picture_or_refused(tmp_path_factory.getbasetemp(), content)


@FUZZ
@given(
    content=st.binary(max_size=200), start=st.deferred(lambda: st.sampled_from([content[:40] for content in small()]))
)
@example(content=b"", start=b"")
def test_the_beginning_of_a_picture_and_random_bytes_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, start: bytes
) -> None:
    assert is_picture_or_refused(tmp_path_factory.getbasetemp(), start + content)
