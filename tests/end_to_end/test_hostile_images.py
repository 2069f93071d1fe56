"""Hostile images, records with images and processors, through the command line; more in `test_hostile_records`."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_images
import yaml
from hostile import Server, refused
from hostile_inputs import MB, Cases, Spoil, calibration, cases, edit_configs, edit_json, expert, link, pipe, put
from PIL import Image

OPTION = "`trust_remote_code: true`"
LINE = "x.jsonl:2"


@pytest.fixture(scope="session")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a merge of two Qwen2-VL experts; read-only."""
    return tiny_images.make_merge(tmp_path_factory.mktemp("qwen2_vl"), "qwen2_vl", samples=(1, 1)).parent


@pytest.fixture
def folder(merge: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a merge, for the test to corrupt."""
    return shutil.copytree(merge, tmp_path / "in")


def record(folder: Path, **fields: Any) -> None:
    """Write the second expert's records: a valid one, and one with these fields."""
    good = {"question": "w1", "image_path": "good.png"}
    tiny_images.draw(folder / "good.png", 1)
    calibration(folder, "".join(json.dumps(fields) + "\n" for fields in (good, {"question": "w1"} | fields)))


def image(content: bytes | Callable[[], bytes], name: str = "x.png") -> Spoil:
    """Return a function that writes a record with this image."""

    def spoil(folder: Path) -> None:
        record(folder, image_path=name)
        put(folder, name, content if isinstance(content, bytes) else content())

    return spoil


def named(path: Any) -> Spoil:
    """Return a function that writes a record with this `image_path`."""
    return lambda folder: record(folder, image_path=path)


def options(text: str) -> Spoil:
    """Return a function that sets `calibration.image_options` for all files."""

    def spoil(folder: Path) -> None:
        record(folder)
        config = yaml.safe_load((folder / "merge.yaml").read_text())
        config["calibration"] = {"image_options": yaml.safe_load(text)}
        put(folder, "merge.yaml", yaml.safe_dump(config, sort_keys=False))

    return spoil


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, more: bytes = b"", last: bytes = b"") -> bytes:
    """Return a black PNG, which has pixels for at most 50 MB; `more` and `last` are chunks around them."""
    pixels = chunk(b"IDAT", zlib.compress(bytes(min(height * (width + 1), 50 * MB)), 9))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + pixels + last + chunk(b"IEND")


def jpeg(more: bytes = b"", **options: Any) -> bytes:
    """Return a small JPEG with bytes inserted after its start."""
    content = io.BytesIO()
    Image.new("RGB", (64, 64)).save(content, "JPEG", **options)
    return content.getvalue()[:2] + more + content.getvalue()[2:]


def scans() -> bytes:
    """Return a progressive JPEG of a large picture with 50,000 more scans."""
    content = io.BytesIO()
    Image.new("L", (7000, 7000)).save(content, "JPEG", progressive=True)
    whole = content.getvalue()
    return whole[:-2] + whole[whole.rfind(b"\xff\xda") : -2] * 50_000 + whole[-2:]


def large(folder: Path) -> None:
    """Write a record with a PNG of 100 MB."""
    image(png(8, 8))(folder)
    os.truncate(folder / "x.png", 100 * MB)


def evil(folder: Path) -> None:
    """Give the processor code of its own, which would leave a file if it ran."""
    put(folder, "base/evil.py", f"open({str(folder / 'ran')!r}, 'w').close()\n")
    changes = {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}}
    edit_json(folder, "base/preprocessor_config.json", **changes)
    edit_configs(folder, model_type="evil", auto_map={"AutoConfig": "evil.Config"})


TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 * MB), 9))
GIF = b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6)
BMP = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0)

# Checked by a plan, which does not open images.
NAMES: Cases = {
    "nothing": (named("none.png"), [LINE, "'none.png'"]),
    "folder": (named("base"), [LINE, "'base'"]),
    "device": (named("/dev/zero"), [LINE, "'/dev/zero'"]),
    "pipe": (lambda f: (record(f, image_path="x.png"), pipe(f, "x.png")), [LINE, "'x.png'"]),
    "link to itself": (lambda f: (record(f, image_path="x.png"), link(f, "x.png", "x.png")), [LINE, "'x.png'", "loop"]),
    "address": (named("http://169.254.169.254/latest"), [LINE, "address", "'http://169.254.169.254/latest'"]),
    "address of storage": (named("s3://bucket/a.png"), [LINE, "address", "'s3://bucket/a.png'"]),
    "name of 1 MB": (named("x" * MB), [LINE, "'xxx", "…"]),
    "name with NUL": (named("a\0b"), [LINE, "'a\\x00b'", "null byte"]),
    "colours in a name": (named("\x1b[31m"), [LINE, "'\\x1b[31m'"]),
    "number": (named(7), [LINE, "images", "paths", " 64 "]),
    "bytes": (named({"bytes": "AAAA"}), [LINE, "images", "paths", " 64 "]),
    "100,000 images": (lambda f: record(f, image_paths=["good.png"] * 100_000), [LINE, " 64 "]),
    "two ways": (lambda f: record(f, image_path="good.png", image_paths=["good.png"]), [LINE, "`image_paths`"]),
    "beside ids": (lambda f: record(f, image_path="good.png", input_ids=[7]), [LINE, "images", "`input_ids`"]),
}

KNOWN = "JPEG, PNG, WEBP, GIF, BMP, TIFF"
FIRST = "expert0.json record 1"
# Some of the facts are those of Pillow or transformers, which the message quotes.
IMAGES: Cases = {
    "empty": (image(b""), [LINE, "in/x.png", "an image", KNOWN]),
    "text": (image(b"hello, world"), [LINE, "in/x.png", "an image", KNOWN]),
    "EPS": (
        image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
        [LINE, "in/x.png", "an image", KNOWN],
    ),
    "SVG": (image(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "x.svg"), [LINE, "in/x.svg", "an image", KNOWN]),
    "truncated": (image(jpeg()[:300]), [LINE, "in/x.png", "Truncated File"]),
    "100 MB": (large, [LINE, "in/x.png", "104,857,600", "67,108,864"]),
    "10 Gpx": (image(png(100_000, 100_000)), [LINE, "in/x.png", "10000000000 pixels"]),
    "100 Mpx": (image(png(10_000, 10_000)), [LINE, "in/x.png", "10,000 x 10,000", "50,000,000"]),
    "50 million lines": (image(png(1, 50_000_000)), [LINE, "in/x.png", "1 x 50,000,000", "65,535"]),
    "GIF of 4 Gpx": (
        image(GIF + b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\2\0;"),
        [LINE, "in/x.png", "4294836225 pixels"],
    ),
    "BMP of 10 Gpx": (image(BMP), [LINE, "in/x.png", "10000000000 pixels"]),
    "100 MB of words": (image(png(8, 8, TEXT_BOMB)), [LINE, "in/x.png", "MAX_TEXT_CHUNK"]),
    "5 million pieces": (
        image(lambda: png(8, 8, last=chunk(b"prIv") * 5_000_000)),
        [LINE, "in/x.png", "100,001 "],
    ),
    "15 million marks": (image(lambda: jpeg(b"\xff\xe9\0\2" * 15_000_000)), [LINE, "in/x.png", "too long"]),
    "60 MB of nothing": (image(lambda: jpeg(b"\xff" * 60_000_000)), [LINE, "in/x.png", "too long"]),
    "50,000 passes": (image(scans), [LINE, "in/x.png", " 101 "]),
    "a line": (image(lambda: png(1, 3000)), [LINE, "aspect ratio", "200"]),
    "token without an image": (lambda f: record(f, question="<|image_pad|>"), [LINE, "1 <|image_pad|>"]),
    "one token more": (lambda f: record(f, question="<|image_pad|>", image_path="good.png"), [LINE, "2 <|image_pad|>"]),
    "more places": (lambda f: record(f, question="<image>" * 99, image_path="good.png"), [LINE, " 99 ", " 1 "]),
    "too long": (
        lambda f: (record(f, image_paths=["good.png"] * 64), edit_max_length(f)),
        [LINE, "896", "max_length", " 100", "`image_options`"],
    ),
    "options unknown": (options("{" + "x" * 1000 + ": 1}"), [FIRST, "image_options", "'xxx", "xx…"]),
    "options of no size": (
        options("{size: {shortest_edge: 0, longest_edge: 0}}"),
        [FIRST, "image_options", "above 0"],
    ),
    "options of a gigantic size": (
        options("{size: {shortest_edge: 10000000000, longest_edge: 20000000000}}"),
        [FIRST, "processor", "memory"],
    ),
    "options of a million frames": (options("{temporal_patch_size: 1000000}"), [FIRST, "processor", "memory"]),
    "options that are text": (options("{patch_size: x}"), [FIRST, "processor", "'x'"]),
    "processor that is text": (
        lambda f: (record(f), edit_json(f, "base/preprocessor_config.json", size="x")),
        ["in/base: ", "processor", "dict: x"],
    ),
    "processor of a gigantic size": (
        lambda f: edit_json(f, "base/preprocessor_config.json", size={"shortest_edge": 10**10, "longest_edge": 10**11}),
        [FIRST, "processor", "memory"],
    ),
    "no processor": (
        lambda f: (f / "base" / "preprocessor_config.json").unlink(),
        ["in/base: ", "processor", "load image"],
    ),
    "processor nested": (
        lambda f: put(f, "base/preprocessor_config.json", "[" * 100_000),
        ["base/preprocessor_config.json: ", "JSON", "recursion"],
    ),
    "processor that is a pipe": (
        lambda f: pipe(f, "base/preprocessor_config.json"),
        ["base/preprocessor_config.json: ", "pipe"],
    ),
    "processor of code": (evil, ["in/base: ", OPTION]),
    "no template": (
        lambda f: (f / "base" / "chat_template.jinja").unlink(),
        [FIRST, "chat template", "`tokenizer_source`"],
    ),
    "template without places": (
        lambda f: put(f, "base/chat_template.jinja", "w1"),
        [FIRST, "0 <|image_pad|>", "2 images"],
    ),
    "template of a billion places": (
        lambda f: put(f, "base/chat_template.jinja", "{{ '<|image_pad|>' * 10**9 }}"),
        [FIRST, "chat template", "memory"],
    ),
}

QUICK = {
    "10 Gpx",
    "100 MB",
    "a line",
    "empty",
    "more places",
    "no processor",
    "no template",
    "one token more",
    "options of no size",
    "options unknown",
    "processor of code",
    "processor that is text",
    "template without places",
    "too long",
    "truncated",
}


def edit_max_length(folder: Path) -> None:
    expert(folder, calibration="x.jsonl")
    config = yaml.safe_load((folder / "merge.yaml").read_text()) | {"calibration": {"max_length": 100}}
    put(folder, "merge.yaml", yaml.safe_dump(config, sort_keys=False))


@cases(name=NAMES)
def test_invalid_paths_of_images_are_refused_by_a_plan(
    planner: Server, folder: Path, spoil: Spoil, facts: list[str]
) -> None:
    spoil(folder)
    refused(planner.run("plan", "merge.yaml", cwd=folder), facts)


@cases(thorough=IMAGES.keys() - QUICK, image=IMAGES)
def test_hostile_images_are_refused_before_anything_starts(
    merger: Server, folder: Path, spoil: Spoil, facts: list[str]
) -> None:
    spoil(folder)
    refused(merger.run("merge", "merge.yaml", "--out", "../out", cwd=folder), facts, prepared=True)
    assert not (folder / "ran").exists()
