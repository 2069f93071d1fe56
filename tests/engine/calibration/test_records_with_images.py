"""Records with images: location and place of the images, token ids and pixel inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_images
import torch
from conftest import plan_of
from errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from thorough import as_thorough, thorough_but

import engine.calibration.encoder
from engine.calibration.encoder import encoder
from engine.calibration.internvl_encoder import TILES
from engine.calibration.records import IMAGES, read_records
from engine.calibration.samples import Encoded, Sample, make_samples
from engine.errors import CalibrationError
from engine.planning.plan import Plan

FUZZ = settings(max_examples=60, deadline=None, derandomize=True)
QWEN, INTERN, CHAT = "qwen2_vl", "internvl", tiny_images.CHAT
FAMILIES = (QWEN, INTERN, CHAT)
# The image token.
TOKEN = {QWEN: "<|image_pad|>", INTERN: "<IMG_CONTEXT>", CHAT: "<IMG_CONTEXT>"}
each_family = pytest.mark.parametrize("family", thorough_but([QWEN], FAMILIES))
with_chat = pytest.mark.parametrize("family", thorough_but([QWEN, CHAT], FAMILIES))
HEAD = {QWEN: 0, INTERN: 0, CHAT: 4}
A = {"question": "w1 w2", "image_path": "a.png"}
# Facts that tell the errors about paths apart: the image is missing, is not a path, is an address, is given twice.
MISSING, NO_PATHS, ADDRESS, TWO_WAYS = "relative to", f"{IMAGES} paths", "address", "`image_paths`"


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return merge.yaml of one expert for each family. c.png is in its folder, a.png and b.png in `data`."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        made[family] = tiny_images.make_merge(folder, family, experts=1)
        for name, size in {"data/a": (60, 40), "data/b": (28, 84), "c": (56, 28), "dot": (1, 1)}.items():
            tiny_images.draw(folder / f"{name}.png", sum(size), size) if min(size) > 1 else None
        Image.new("RGB", (1, 3000)).save(folder / "data" / "tall.png")
        Image.new("RGB", (3000, 1)).save(folder / "data" / "wide.png")
        Image.new("RGB", (1, 1)).save(folder / "data" / "dot.png")
    return made


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Load the config, tokenizer and processor of a folder once: no test changes their files after they are loaded."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("load_model_config", "load_tokenizer", "load_processor"):
            monkeypatch.setattr(engine.calibration.encoder, name, cache(getattr(engine.calibration.encoder, name)))
        yield


@pytest.fixture(scope="module")
def plans(merges: dict[str, Path]) -> dict[str, Plan]:
    """Return the plan of each family's merge with the records of any.jsonl, which a plan does not read."""
    return {family: plan_with(config, A, name="any.jsonl") for family, config in merges.items()}


def write_records(path: Path, *records: Any) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def plan_with(config: Path, *records: Any, options: Sequence[str] = (), name: str = "x.jsonl") -> Plan:
    path = config.parent / "data" / name
    write_records(path, *records)
    return plan_of(config, f"models.0.calibration=data/{name}", "calibration.max_length=200", *options)


def made_of(plan: Plan) -> tuple[list[Sample], list[Mapping[str, Any]]]:
    """Return the samples and the pixel inputs of each."""
    inputs: dict[int, Mapping[str, Any]] = {}
    records = read_records(plan)
    (samples,) = make_samples(records, encoder(plan, records), plan, lambda one, more: inputs.update({one.index: more}))
    return samples, [inputs.get(index, {}) for index in range(len(samples))]


def encoded(plan: Plan) -> Encoded:
    records = read_records(plan)
    return encoder(plan, records).encode(records[0][0])


def check_refused(plan: Plan, *facts: str, do: str = "") -> str:
    with refused(CalibrationError, do=do, facts=facts) as caught:
        made_of(plan)
    return str(caught.value)


def check_record_refused(config: Path, record: Any, *facts: str) -> None:
    """Check that a record, the second of its file, is refused with an error that names its line."""
    plan = plan_with(config, A, record)
    message = check_refused(plan, *facts)
    assert message.startswith(f"{plan.experts[0].calibration[0]}:2: ") and len(message) < 1000
    assert "None" not in message.splitlines()[0] and "\n\n" not in message


def files(plan: Plan) -> list[str]:
    return [
        image.relative_to(Path(plan.base_header.folder).parent).as_posix() for image in read_records(plan)[0][0].images
    ]


def test_an_image_is_looked_for_beside_its_file_and_then_from_the_configs_folder(merges: dict[str, Path]) -> None:
    folder = merges[QWEN].parent
    (folder / "both.png").unlink(missing_ok=True)
    shutil.copy(folder / "data" / "a.png", folder / "data" / "both.png")
    shutil.copy(folder / "c.png", folder / "both.png")
    for name, file in {
        "a.png": "data/a.png",
        "c.png": "c.png",
        "both.png": "data/both.png",
        "data/a.png": "data/a.png",
        "../c.png": "c.png",
        str(folder / "c.png"): "c.png",
        str(folder / "data" / "b.png"): "data/b.png",
    }.items():
        assert files(plan_with(merges[QWEN], {"question": "w1", "image_path": name})) == [file], name


def test_an_image_folder_may_be_given(merges: dict[str, Path], tmp_path: Path) -> None:
    tiny_images.draw(tmp_path / "there.png", 1)
    plan = plan_with(
        merges[QWEN],
        {"question": "w1", "image_path": "there.png"},
        options=[f"calibration.image_folder={tmp_path}"],
    )
    assert [str(image) for image in read_records(plan)[0][0].images] == [str(tmp_path / "there.png")]


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("none.png", [MISSING, "'none.png'"]),
        ("", [NO_PATHS]),
        (" ", [MISSING]),
        (".", [MISSING, "'.'"]),
        ("../data", [MISSING]),
        ("/dev/zero", [MISSING, "'/dev/zero'"]),
        ("a.png/b.png", [MISSING]),
        ("a\0.png", ["'a\\x00.png'", "null byte"]),
        ("a" * 300, [MISSING, "'aaa"]),
        ("a/" * 3000, [MISSING, "'a/a"]),
        ("~nobody/a.png", [MISSING]),
        ("\x1b[31m.png", [MISSING, "\\x1b[31m"]),
        ("http://host/a.png", [ADDRESS, "'http://host/a.png'"]),
        ("https://host/a.png", [ADDRESS]),
        ("s3://bucket/a.png", [ADDRESS]),
        ("file:///a.png", [ADDRESS]),
        ("data:image/png;base64,AAAA", [MISSING]),
        (3, [NO_PATHS]),
        (0, [NO_PATHS]),
        (True, [NO_PATHS]),
        (False, [NO_PATHS]),
        ({}, [NO_PATHS]),
        ({"bytes": "AA", "path": "a.png"}, [NO_PATHS]),
        ([["a.png"]], [NO_PATHS]),
        (["a.png", None], [NO_PATHS]),
        (["a.png", ""], [NO_PATHS]),
        (["a.png"] * (IMAGES + 1), [NO_PATHS]),
        (["a.png", "none.png"], [MISSING, "'none.png'"]),
    ],
    ids=lambda value: repr(value)[:30],
)
@pytest.mark.parametrize("place", ["image_path", "image_paths", "part"])
def test_an_image_without_a_valid_path_is_refused(
    merges: dict[str, Path], place: str, name: Any, facts: list[str]
) -> None:
    record: dict[str, Any] = {"question": "w1", place: name}
    if place == "part":
        listed = name if isinstance(name, list) else [name]
        parts = [{"type": "image", "path": path} for path in listed]
        record = {"messages": [{"role": "user", "content": parts}]}
        facts = [TWO_WAYS] if None in listed else facts
    check_record_refused(merges[QWEN], record, *facts)


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        (A | {"image_paths": ["b.png"]}, [TWO_WAYS]),
        ({"input_ids": [7], "image_path": "a.png"}, ["`input_ids`", "`messages`"]),
        ({"text": "w1", "image_path": "a.png"}, ["`text`", "`messages`"]),
        ({"question": "w1 <image>", "image_paths": ["a.png", "b.png"]}, ["1 place(s)", "2 image(s)"]),
        ({"question": "<image> <image> <image>", "image_paths": ["a.png", "b.png"]}, ["3 place(s)", "2 image(s)"]),
        ({"question": "<image> <image>", "image_path": "a.png"}, ["2 place(s)", "1 image(s)"]),
        ({"question": "w1", "response": "<image> <image>", "image_path": "a.png"}, ["2 place(s)", "1 image(s)"]),
    ],
    ids=str,
)
@each_family
def test_images_without_a_place_are_refused(
    merges: dict[str, Path], family: str, record: dict[str, Any], facts: list[str]
) -> None:
    check_record_refused(merges[family], record, *facts)


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


TEXT, IMAGE = {"type": "text", "text": "w1"}, {"type": "image"}


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        (user(IMAGE, TEXT), ["1 place(s)", "0 image(s)"]),
        (user(IMAGE, IMAGE) | {"image_path": "a.png"}, ["2 place(s)", "1 image(s)"]),
        (user(IMAGE) | {"image_paths": ["a.png", "b.png"]}, ["1 place(s)", "2 image(s)"]),
        (user(IMAGE | {"path": "a.png"}) | {"image_path": "a.png"}, [TWO_WAYS]),
        (user(IMAGE | {"path": "a.png"}, IMAGE), [TWO_WAYS]),
        (user(IMAGE | {"path": "a.png", "image": "b.png"}, TEXT), ["1 place(s)", "2 image(s)"]),
        (user(IMAGE | {"path": 3}), [NO_PATHS]),
        (user(IMAGE | {"url": "http://host/a.png"}), [ADDRESS]),
        (user({"type": "image_url", "image_url": {"url": "x"}}), ["image_url"]),
        (user({"type": "video", "path": "a.mp4"}), ["video"]),
        (user("w1"), ["'w1'"]),
        (user({"text": "w1"}), ["{'text': 'w1'}"]),
        (user({"type": "text"}), ["{'type': 'text'}"]),
        (user({"type": "text", "text": ["w1"]}), ["['w1']"]),
        (user({"type": "text", "text": 3}), ["'text': 3}"]),
        ({"messages": [{"role": "user", "content": 3}]}, ["is 3"]),
        ({"messages": [{"role": "user", "content": {"type": "image"}}]}, ["{'type': 'image'}"]),
        ({"messages": [{"role": "system", "content": "w1"}], "image_path": "a.png"}, ["0 place(s)", "1 image(s)"]),
    ],
    ids=str,
)
@each_family
def test_invalid_parts_are_refused(merges: dict[str, Path], family: str, record: Any, facts: list[str]) -> None:
    check_record_refused(merges[family], record, *facts)


def words(family: str, ids: Sequence[int]) -> list[str]:
    """Return the tokens from the first message on, with the tokens of an image reduced to one."""
    names = {number: token for token, number in tiny_images.tokens(family).items()}
    tokens: list[str] = []
    for token in (names[number] for number in ids[HEAD[family] :]):
        if not (token == TOKEN[family] and tokens and tokens[-1] == token):
            tokens.append(token)
    return [token for token in tokens if not token.startswith(("<img>", "</img>", "<|vision"))]


@pytest.mark.parametrize(
    ("record", "order"),
    [
        (A, "IMAGE w1 w2"),
        ({"question": "w1 <image> w2 <image>", "image_paths": ["a.png", "b.png"]}, "w1 IMAGE w2 IMAGE"),
        ({"question": "w1 w2", "image_paths": ["a.png", "b.png"]}, "IMAGE IMAGE w1 w2"),
        ({"question": "<image>\nw1", "image_path": "a.png"}, "IMAGE w1"),
        ({"question": "w1 <image>", "image_paths": "a.png"}, "w1 IMAGE"),
        (user(TEXT, IMAGE, TEXT) | {"image_path": "a.png"}, "w1 IMAGE w1"),
        (user(IMAGE | {"path": "a.png"}, TEXT, IMAGE | {"image": "b.png"}), "IMAGE w1 IMAGE"),
        (user(TEXT, IMAGE | {"url": "a.png"}), "w1 IMAGE"),
        ({"messages": [{"role": "user", "content": "w3 <image> w4"}], "image_path": "a.png"}, "w3 IMAGE w4"),
    ],
    ids=str,
)
@with_chat
def test_an_image_stands_where_the_record_says(
    merges: dict[str, Path], family: str, record: dict[str, Any], order: str
) -> None:
    ids = encoded(plan_with(merges[family], record)).input_ids
    tokens = [token for token in words(family, ids) if token not in ("</s>", "<s>")]
    # Adjacent images are a single run of tokens in families without tokens between images.
    assert tokens == ["user:", *order.replace("IMAGE", TOKEN[family]).split(), "assistant:"] or "IMAGE IMAGE" in order


@with_chat
def test_images_are_in_the_order_of_their_paths(merges: dict[str, Path], family: str) -> None:
    def pixels(*names: str) -> torch.Tensor:
        record = {"question": "<image> w1 <image>" if len(names) > 1 else "w1", "image_paths": list(names)}
        values: torch.Tensor = encoded(plan_with(merges[family], record)).inputs["pixel_values"]
        return values

    first, second = pixels("a.png"), pixels("b.png")
    assert torch.equal(pixels("a.png", "b.png"), torch.cat([first, second]))
    assert torch.equal(pixels("b.png", "a.png"), torch.cat([second, first]))


@each_family
def test_records_of_text_alone_are_text(merges: dict[str, Path], family: str) -> None:
    plan = plan_with(merges[family], {"question": "w1"}, A, {"input_ids": [7, 8]}, {"text": "w1 w2"})
    samples, inputs = made_of(plan)
    ids = tiny_images.tokens(family)
    assert [sample.input_ids[HEAD[family] :] for sample in (samples[0], samples[3])] == [
        (ids["user:"], ids["w1"], ids["</s>"], ids["assistant:"]),
        (ids["w1"], ids["w2"])[HEAD[family] :],
    ]
    assert samples[2].input_ids == (7, 8)
    assert inputs[1].keys() >= {"pixel_values"}
    if family != CHAT:
        assert [dict(inputs[number]) for number in (0, 2, 3)] == [{}, {}, {}]
        assert [sample.inputs for sample in samples] == [False, True, False, False]
        return
    for number in (0, 2, 3):
        assert inputs[number].keys() == {"pixel_values", "image_flags"}
        assert inputs[number]["image_flags"].tolist() == [0] and not inputs[number]["pixel_values"].any()
    assert set(inputs[1]["image_flags"].tolist()) == {1}


@pytest.mark.parametrize("kind", ["question", "text", "messages", "input_ids", "one more", "one before"])
@each_family
def test_an_image_token_without_an_image_is_refused(merges: dict[str, Path], family: str, kind: str) -> None:
    token = TOKEN[family]
    record = {
        "question": {"question": f"w1 {token}"},
        "text": {"text": f"w1 {token}"},
        "messages": {"messages": [{"role": "user", "content": f"w1 {token}"}]},
        "input_ids": {"input_ids": [7, tiny_images.tokens(family)[token]]},
        "one more": {"question": f"w1 <image> {token}", "image_path": "a.png"},
        "one before": {"question": f"{token} w1 <image>", "image_path": "a.png"},
    }[kind]
    check_record_refused(merges[family], record)


@pytest.mark.parametrize(
    "record", [{"text": "<|video_pad|>"}, {"question": "<|video_pad|>"}, A | {"question": "<|video_pad|>"}]
)
def test_a_token_of_a_video_is_refused(merges: dict[str, Path], record: dict[str, Any]) -> None:
    check_record_refused(merges[QWEN], record)


def tokens_of_images(found: Encoded) -> int:
    return sum(stop - start for start, stop in found.images)


@pytest.mark.parametrize(
    ("family", "option", "tokens"),
    [
        (QWEN, "size: {shortest_edge: 196, longest_edge: 784}", 2),
        (QWEN, "max_pixels: 784", 2),
        (INTERN, "max_patches: 2", 12),
        (INTERN, "max_patches: 1", 4),
        (CHAT, "max_dynamic_patch: 2", 12),
        (CHAT, "max_dynamic_patch: 1", 4),
        (CHAT, "use_thumbnail: false", 16),
    ],
)
def test_an_option_decides_how_many_tokens_an_image_has(
    merges: dict[str, Path], family: str, option: str, tokens: int
) -> None:
    by_default = encoded(plan_with(merges[family], A))
    found = encoded(plan_with(merges[family], A, options=[f"calibration.image_options={{{option}}}"]))
    assert tokens_of_images(found) == tokens
    assert tokens_of_images(by_default) not in (0, tokens)
    assert found.inputs["pixel_values"].shape[0] < by_default.inputs["pixel_values"].shape[0]


def test_a_file_has_options_of_its_own_before_the_configs(merges: dict[str, Path]) -> None:
    folder = merges[INTERN].parent
    for name in "pq":
        (folder / "data" / f"{name}.jsonl").write_text(json.dumps(A) + "\n")
    given = [
        {"path": "data/p.jsonl", "image_options": {"max_patches": 1}, "loss_weight": 0.5, "samples": 1},
        {"path": "data/q.jsonl"},
    ]
    options = [f"models.0.calibration={json.dumps(given)}", "calibration.image_options={max_patches: 2}"]
    samples, inputs = made_of(plan_of(merges[INTERN], *options, "parameters.loss_weight=2"))
    assert [len(more["pixel_values"]) for more in inputs] == [1, 3]
    assert [sample.loss_weight for sample in samples] == [0.5, 2]


@pytest.mark.parametrize("family", [QWEN, INTERN])
@pytest.mark.parametrize(
    "option",
    ["max_patchs: 2", "return_tensors: np", "device: cuda", "data_format: channels_last"],
)
def test_an_unknown_option_is_refused_with_the_known_ones(merges: dict[str, Path], family: str, option: str) -> None:
    plan = plan_with(merges[family], A, options=[f"calibration.image_options={{{option}}}"])
    known = "max_patches" if family == INTERN else "patch_size"
    check_refused(plan, "`image_options`", f"'{option.split(':')[0]}'", "do_resize", known)


def test_internvls_own_code_has_options_of_its_own(merges: dict[str, Path]) -> None:
    plan = plan_with(merges[CHAT], A, options=["calibration.image_options={max_patches: 2}"])
    check_refused(plan, "'max_patches'", "InternVL", "max_dynamic_patch, use_thumbnail")


@pytest.mark.parametrize(
    ("family", "option"),
    [
        *((INTERN, f"max_patches: {value}") for value in ("0", "-1", "x", "1.5", "true")),
        as_thorough((INTERN, "max_patches: 1000000000")),
        *((INTERN, f"min_patches: {value}") for value in ("0", "-1", "x")),
        *((INTERN, f"size: {value}") for value in ("x", "0", "-4", "{height: -4, width: 4}", "{height: 0, width: 0}")),
        *((INTERN, f"size: {value}") for value in ("{height: 100000, width: 100000}", "{height: 28}", "{a: 1}", "{}")),
        *((INTERN, option) for option in ("image_mean: x", "do_rescale: 3", "resample: 99")),
        *((QWEN, f"patch_size: {value}") for value in ("0", "-7", "x", "7.5", "{a: 1}")),
        *((QWEN, f"size: {value}") for value in ("x", "{height: 9, width: 9}", "{shortest_edge: 9}")),
        *((QWEN, f"size: {{shortest_edge: {a}, longest_edge: {b}}}") for a, b in ((0, 0), (-1, -5), (10**12, 10**13))),
        *((QWEN, option) for option in ("max_pixels: 0", "max_pixels: -1", "min_pixels: 10000000000000")),
        *((QWEN, f"temporal_patch_size: {value}") for value in ("0", "1000000", "x")),
        *((QWEN, f"merge_size: {value}") for value in ("0", "-2", "x")),
        (QWEN, "do_resize: false"),
    ],
)
def test_an_option_of_a_wrong_value_is_refused(merges: dict[str, Path], family: str, option: str) -> None:
    plan = plan_with(merges[family], A, options=[f"calibration.image_options={{{option}}}"])
    message = check_refused(plan)
    assert message.startswith(f"{plan.experts[0].calibration[0]}:1: ") and len(message) < 800


@pytest.mark.parametrize("name", ["tall.png", "wide.png"])
def test_an_image_of_extreme_proportions_is_read_or_refused(merges: dict[str, Path], name: str) -> None:
    record = {"question": "w1", "image_path": name}
    check_record_refused(merges[QWEN], record, "aspect ratio", "200", "3000")
    for family in (INTERN, CHAT):
        assert tokens_of_images(encoded(plan_with(merges[family], record))) >= 4


@each_family
def test_an_image_of_one_pixel_is_an_image(merges: dict[str, Path], family: str) -> None:
    assert tokens_of_images(encoded(plan_with(merges[family], {"question": "w1", "image_path": "dot.png"}))) == 4


@each_family
def test_a_damaged_image_is_reported_with_its_record(merges: dict[str, Path], family: str) -> None:
    path = merges[family].parent / "data" / "broken.png"
    path.write_bytes((path.parent / "a.png").read_bytes()[:200])
    check_record_refused(merges[family], {"question": "w1", "image_path": "broken.png"}, f":2: {path}: ")


@with_chat
def test_max_length_cuts_text_and_no_image(merges: dict[str, Path], family: str) -> None:
    found = encoded(plan_with(merges[family], A))
    end = found.images[-1][1]
    (sample,), _ = made_of(plan_with(merges[family], A, options=[f"calibration.max_length={end}"]))
    assert (len(sample.input_ids), sample.cut) == (end, len(found.input_ids) - end)
    plan = plan_with(merges[family], A, options=[f"calibration.max_length={end - 1}"])
    check_refused(plan, f"token {end}", f"`calibration.max_length`, {end - 1}", do="`image_options`")


@pytest.mark.parametrize("family", [QWEN, INTERN])
def test_images_need_a_chat_template_which_tokenizer_source_can_provide(
    merges: dict[str, Path], family: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(merges[family].parent, tmp_path / "merge")
    (folder / "base" / "chat_template.jinja").unlink()
    check_refused(plan_with(folder / "merge.yaml", A), "chat template", do="`tokenizer_source`")
    plan = plan_with(folder / "merge.yaml", {"question": "w1"}, A)
    records = read_records(plan)
    text = encoder(plan, records).encode(records[0][0])
    assert list(text.input_ids) == [tiny_images.tokens(family)["w1"]] and not text.inputs
    plan = plan_with(folder / "merge.yaml", A, options=["tokenizer_source=expert0"])
    assert list(encoded(plan).input_ids) == list(encoded(plan_with(merges[family], A)).input_ids)


def test_a_chat_template_that_drops_images_is_refused(merges: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(merges[QWEN].parent, tmp_path / "merge")
    (folder / "base" / "chat_template.jinja").write_text("user: w1 assistant: ")
    check_refused(plan_with(folder / "merge.yaml", A), "x.jsonl:1: ")


def masked_spans(plan: Plan) -> list[tuple[tuple[int, int], ...]]:
    return [sample.masked_spans for sample in made_of(plan)[0]]


@with_chat
def test_of_text_alone_what_counts_is_all_but_images(merges: dict[str, Path], family: str) -> None:
    records = [{"question": "w1 <image> w2 <image>", "image_paths": ["a.png", "b.png"]}, {"question": "w1"}]
    plan = plan_with(merges[family], *records, options=["parameters.loss_tokens=text"])
    (seen, read), _ = made_of(plan)
    token = tiny_images.tokens(family)[TOKEN[family]]
    inside = {place for start, stop in seen.masked_spans for place in range(start, stop)}
    marked = {place for place, number in enumerate(seen.input_ids) if number == token}
    assert len(seen.masked_spans) == 2 and marked == inside
    assert read.masked_spans == ()
    assert masked_spans(plan_with(merges[family], *records)) == [(), ()]


RESPONSE = "parameters.loss_tokens=response"


@with_chat
def test_of_a_response_what_counts_begins_where_its_first_token_is_predicted(
    merges: dict[str, Path], family: str
) -> None:
    answer = {"response": "w3 w4"}
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w3 w4"}]
    records = [A | answer, {"question": "w1"} | answer, {"messages": [*chat, *chat]}]
    samples, _ = made_of(plan_with(merges[family], *records, options=[RESPONSE]))
    ids = tiny_images.tokens(family)
    for sample in samples:
        # The sample ends with the two words of the response and the end of the message.
        first = len(sample.input_ids) - 3
        assert sample.input_ids[first:] == (ids["w3"], ids["w4"], ids["</s>"])
        assert sample.masked_spans == ((0, first - 1),)


@each_family
def test_of_a_response_that_the_expert_writes_all_counts(merges: dict[str, Path], family: str) -> None:
    options = [RESPONSE, "calibration.generate_responses=6"]
    samples, _ = made_of(plan_with(merges[family], A, {"question": "w1"}, options=options))
    assert [sample.generate for sample in samples] == [6, 6]
    assert [sample.masked_spans for sample in samples] == [((0, len(one.input_ids) - 1),) for one in samples]


@pytest.mark.parametrize("record", [A, {"question": "w1"}, {"input_ids": [7, 8]}, {"text": "w1"}], ids=str)
@each_family
def test_a_record_without_a_response_is_refused_if_only_responses_count(
    merges: dict[str, Path], family: str, record: dict[str, Any]
) -> None:
    plan = plan_with(merges[family], A | {"response": "w1"}, record, options=[RESPONSE])
    check_refused(plan, ":2: ", "`loss_tokens`", do="`calibration.generate_responses`")


@pytest.mark.parametrize("chat", [True, False], ids=["template", "plain"])
def test_of_a_language_model_the_same_counts(llama_merge: Path, tmp_path: Path, chat: bool) -> None:
    tiny.save_tokenizer(tmp_path, chat=chat)
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "w1", "response": "w3 w4"}\n')
    options = [f"models.{number}.calibration={path}" for number in (0, 1)]
    plan = replace(plan_of(llama_merge, *options, RESPONSE), tokenizer=str(tmp_path))
    records = read_records(plan)
    (sample,) = make_samples(records, encoder(plan, records), plan)[0]
    assert sample.input_ids == ((4, 7, 2, 5, 9, 10, 2) if chat else (7, 9, 10))
    assert sample.masked_spans == (((0, 3),) if chat else ())
    path.write_text('{"question": "w1"}\n')
    with refused(CalibrationError, do="`calibration.generate_responses`", facts=["`loss_tokens`"]):
        make_samples(records := read_records(plan), encoder(plan, records), plan)
    generating = replace(
        plan_of(llama_merge, *options, RESPONSE, "calibration.generate_responses=4"), tokenizer=str(tmp_path)
    )
    (sample,) = make_samples(records, encoder(generating, records), generating)[0]
    assert (sample.generate, sample.masked_spans) == (4, ((0, 3),) if chat else ())


@pytest.mark.parametrize("length", [5, 6, 7])
def test_a_response_beyond_max_length_is_refused(llama_merge: Path, tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "w1 w1 w1", "response": "w3"}\n')
    options = [f"models.{number}.calibration={path}" for number in (0, 1)]
    plan = plan_of(llama_merge, *options, RESPONSE, f"calibration.max_length={length}")
    records = read_records(plan)
    if length > 5:
        assert make_samples(records, encoder(plan, records), plan)[0][0].masked_spans == ((0, 5),)
        return
    with refused(CalibrationError, do="`calibration.max_length`", facts=[f"{length} tokens"]):
        make_samples(records, encoder(plan, records), plan)


def test_files_take_turns_and_are_permuted_each_by_the_seed(merges: dict[str, Path]) -> None:
    folder = merges[QWEN].parent
    for name in "rs":
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(A) + "\n" for _ in range(30)))
    given = [{"path": "data/r.jsonl", "samples": 20}, {"path": "data/s.jsonl", "samples": 20, "loss_weight": 0.25}]

    def taken(seed: int) -> list[list[str]]:
        options = [f"models.0.calibration={json.dumps(given)}", f"seed={seed}", "calibration.shuffle=true"]
        (records,) = read_records(plan_of(merges[QWEN], *options))
        assert [record.loss_weight for record in records] == [1.0, 0.25] * 20
        assert [Path(record.where.partition(":")[0]).stem for record in records] == ["r", "s"] * 20
        return [[record.where.rpartition(":")[2] for record in records[place::2]] for place in (0, 1)]

    first, second = taken(0)
    assert first != second and len(set(first)) == len(set(second)) == 20
    assert sorted(first, key=int) != first and taken(0) == [first, second] and taken(1) != [first, second]


leaves = (
    st.none() | st.booleans() | st.integers(-2, 70) | st.sampled_from(["a.png", "b.png", "w1 <image>", "", "x.png"])
)
parts = st.dictionaries(
    st.sampled_from(["type", "text", "path", "image", "url"]),
    leaves | st.sampled_from(["image", "text"]),
    max_size=3,
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system"]),
            "content": leaves | st.lists(parts | leaves, max_size=3),
        }
    ),
    max_size=3,
)


@pytest.mark.parametrize("family", thorough_but([QWEN], FAMILIES))
@FUZZ
@given(
    record=st.fixed_dictionaries(
        {"question": st.sampled_from(["w1", "w1 <image>", "<image> <image>", f"w1 {TOKEN[QWEN]} {TOKEN[INTERN]}"])},
        optional={
            "image_path": leaves,
            "image_paths": leaves | st.lists(leaves, max_size=3),
            "messages": messages,
            "response": leaves,
        },
    )
)
def test_any_record_is_a_sample_or_a_calibration_error(
    merges: dict[str, Path], plans: dict[str, Plan], family: str, record: dict[str, Any]
) -> None:
    write_records(merges[family].parent / "data" / "any.jsonl", record, A)
    assert is_sample_or_refused(plans[family])


def is_sample_or_refused(plan: Plan) -> bool:
    try:
        samples, _ = made_of(plan)
    except CalibrationError as error:
        return str(error).startswith(str(plan.experts[0].calibration[0]))
    return len(samples) == 2 and all(0 <= start < stop for one in samples for start, stop in one.masked_spans)


@pytest.mark.parametrize(
    "options",
    [
        "{max_dynamic_patch: 0}",
        "{max_dynamic_patch: -1}",
        "{max_dynamic_patch: x}",
        "{max_dynamic_patch: 1.5}",
        "{max_dynamic_patch: true}",
        "{max_dynamic_patch: 1000000000}",
        "{min_dynamic_patch: 5, max_dynamic_patch: 4}",
        "{min_dynamic_patch: 0}",
        "{use_thumbnail: x}",
        "{use_thumbnail: 1}",
    ],
)
def test_internvls_own_options_are_bounded(merges: dict[str, Path], options: str) -> None:
    plan = plan_with(merges[CHAT], A, options=[f"calibration.image_options={options}"])
    bounds = f"1 <= min_dynamic_patch <= max_dynamic_patch <= {TILES}"
    check_refused(plan, "use_thumbnail" if "use_thumbnail" in options else bounds)


@pytest.mark.parametrize("field", ["question", "text", "messages", "input_ids"])
def test_a_token_of_an_image_is_an_error_where_no_record_has_one(merges: dict[str, Path], field: str) -> None:
    text, number = f"w1 {TOKEN[QWEN]} w2", tiny_images.tokens(QWEN)[TOKEN[QWEN]]
    value = {"messages": [{"role": "user", "content": text}], "input_ids": [7, number, 8]}.get(field, text)
    plan = plan_with(merges[QWEN], {field: value})
    records = [read_records(plan)[0]]
    with refused(CalibrationError, where="x.jsonl:1", facts=["image token"]):
        make_samples(records, encoder(plan, records), plan)
