"""Processors of each family with and without torchvision, and InternVL's tiles against a second implementation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_images
import torch
import transformers
from errors import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_inputs import tiles
from PIL import Image

import engine.models.loading
from engine.calibration.internvl_encoder import ChatEncoder
from engine.calibration.records import Record
from engine.errors import CheckpointError
from engine.models.loading import load_model_config, load_processor, load_tokenizer

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)
SIDE = tiny_images.SIDE
each_family = pytest.mark.parametrize("family", tiny_images.FAMILIES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder with a model's config and processor for each family."""
    made = {}
    for family in (*tiny_images.FAMILIES, tiny_images.CHAT):
        made[family] = tiny_images.save(tiny_images.make_model(family), tmp_path_factory.mktemp(family), family)
    return made


@pytest.fixture
def base(bases: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy of one of the folders, for tests that damage it."""
    return shutil.copytree(bases["qwen2_vl"], tmp_path / "base")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@each_family
def test_a_processor_needs_no_torchvision(bases: dict[str, Path], family: str) -> None:
    processor = load_processor(bases[family])
    assert (
        type(processor).__name__
        == json.loads((bases[family] / "preprocessor_config.json").read_text())["processor_class"]
    )
    assert "video_processor" not in processor.get_attributes()
    assert processor.image_processor.__module__.rpartition(".")[2].startswith("image_processing_pil")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}],
        chat_template=processor.chat_template or processor.tokenizer.chat_template,
        tokenize=False,
    )
    made = processor(text=[text], images=[Image.new("RGB", (40, 30))], return_tensors="pt")
    assert made["pixel_values"].isfinite().all() and processor.image_token_id in made["input_ids"]


@pytest.mark.parametrize("code", [False, True])
def test_with_torchvision_a_processor_is_transformers_own(
    base: Path, monkeypatch: pytest.MonkeyPatch, code: bool
) -> None:
    asked: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(engine.models.loading, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(
        transformers.AutoProcessor, "from_pretrained", lambda *args, **options: asked.append((args, options)) or "made"
    )
    assert load_processor(base, remote_code=code) == "made"
    assert asked == [((base,), {"local_files_only": True, "trust_remote_code": code})]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocessor_config.json", None),
        ("preprocessor_config.json", '{"image_processor_type": "NoSuchProcessor"}'),
        ("preprocessor_config.json", '{"image_processor_type": 3}'),
        ("preprocessor_config.json", '{"image_processor_type": "Qwen2VLImageProcessor", "size": "x"}'),
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": ["a"]}'),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
    ids=str,
)
def test_a_processor_that_cannot_be_read_is_refused_with_the_files_to_add(base: Path, file: str, content: Any) -> None:
    if content is None:
        (base / file).unlink()
    else:
        (base / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with refused(CheckpointError, do="preprocessor_config.json, tokenizer, chat template") as caught:
        load_processor(base)
    assert caught.value.where == str(base)


@pytest.mark.parametrize(
    ("file", "content", "fact"),
    [
        ("preprocessor_config.json", "", "valid JSON"),
        ("preprocessor_config.json", '{"size": 1, "size": 2}', "'size'"),
        ("preprocessor_config.json", "[" * 500 + "]" * 500, "levels"),
        ("preprocessor_config.json", "[]", "JSON object"),
        ("processor_config.json", "3", "JSON object"),
        ("video_preprocessor_config.json", "{", "valid JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_processor_file_that_is_not_a_json_object_is_named(base: Path, file: str, content: str, fact: str) -> None:
    (base / file).write_text(content)
    with refused(CheckpointError, facts=[fact]) as caught:
        load_processor(base)
    assert caught.value.where == str(base / file)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_a_processor_with_code_is_refused_by_the_option_that_allows_it(base: Path, file: str) -> None:
    (base / "evil.py").write_text(f"open({str(base / 'ran')!r}, 'w').close()\n")
    (base / file).write_text((base / "preprocessor_config.json").read_text())
    edit(base / file, processor_class="Evil", auto_map={"AutoProcessor": "evil.Evil"})
    edit(base / "config.json", model_type="llama", auto_map={})
    with refused(CheckpointError, do="`trust_remote_code: true`"):
        load_processor(base)
    assert not (base / "ran").exists()


def chat_tiles(folder: Path, image: Image.Image, **options: Any) -> torch.Tensor:
    """Return the tiles of an image for InternVL's own code, in float32."""
    encoder = ChatEncoder(load_model_config(folder, True), load_tokenizer(folder, True), folder, torch.float32)
    return encoder._tiles(image, Record("here", {"question": "w1"}, 1.0, (), options))


def picture(width: int, height: int) -> Image.Image:
    ramps = [Image.linear_gradient("L").rotate(90 * turns).resize((width, height)) for turns in range(3)]
    return Image.merge("RGB", ramps)


@pytest.mark.thorough
@PROPERTY
@given(width=st.integers(1, 400), height=st.integers(1, 400), most=st.integers(1, 12))
@example(width=1, height=400, most=12)
@example(width=400, height=1, most=12)
@example(width=28, height=28, most=12)
@example(width=200, height=100, most=2)
def test_tiles_are_those_of_dynamic_tiling(bases: dict[str, Path], width: int, height: int, most: int) -> None:
    image, folder = picture(width, height), bases[tiny_images.CHAT]
    wanted = tiles(image, SIDE, most)
    found = chat_tiles(folder, image, max_dynamic_patch=most)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    without = chat_tiles(folder, image, max_dynamic_patch=most, use_thumbnail=False)
    assert torch.equal(without, found[: max(1, len(found) - 1)])


@pytest.mark.thorough
@PROPERTY
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=2).map(sorted),
)
def test_the_number_of_tiles_is_within_its_limits(
    bases: dict[str, Path], width: int, height: int, counts: list[int]
) -> None:
    least, most = counts
    options = {"min_dynamic_patch": least, "max_dynamic_patch": most, "use_thumbnail": False}
    found = chat_tiles(bases[tiny_images.CHAT], picture(width, height), **options)
    assert least <= len(found) <= most and found.shape[1:] == (3, SIDE, SIDE)


def test_the_config_sets_the_limits_of_the_number_of_tiles(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(bases[tiny_images.CHAT], tmp_path / "base")
    for options, count in {(2, 2, True): 3, (1, 1, True): 1, (4, 4, False): 4, (6, 6, True): 7}.items():
        least, most, thumbnail = options
        edit(folder / "config.json", min_dynamic_patch=least, max_dynamic_patch=most, use_thumbnail=thumbnail)
        assert len(chat_tiles(folder, picture(300, 200))) == count
