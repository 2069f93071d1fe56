"""Headers of checkpoints: agreement with safetensors and torch, and refusals that name the file at fault."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
import tiny
import torch
from errors import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.checkpoints.find import find_model
from engine.checkpoints.headers import BYTES, FLOATS, read_file_header, read_json, read_model_header
from engine.errors import CheckpointError

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
INDEX = "model.safetensors.index.json"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one file; read only."""
    return tiny.save(tiny.make_model(), tmp_path_factory.mktemp("headers") / "model")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in many files with an index; read only."""
    return tiny.save(tiny.make_model(), tmp_path_factory.mktemp("headers") / "model", sharded=True)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of the model in one file, which a test may damage."""
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the model in many files, which a test may damage."""
    return shutil.copytree(sharded, tmp_path / "model")


def check_refused(folder: Path, where: Path, do: str = "", *, facts: Iterable[str] = ()) -> None:
    """Check that `read_model_header` refuses the folder, and that the error's `where` is exactly the given path."""
    with refused(CheckpointError, do=do, facts=facts) as caught:
        read_model_header(folder)
    assert caught.value.where == str(where)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("many", [False, True])
def test_headers_agree_with_safetensors_and_torch(tmp_path: Path, dtype: torch.dtype, many: bool) -> None:
    folder = tiny.save(tiny.make_model("qwen2", tied=True), tmp_path / "model", dtype, sharded=many)
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: (tensor, file.name) for file in files for name, tensor in load_file(file).items()}
    header = read_model_header(folder)
    assert (len(files) > 1) is many
    assert set(header.tensors) == set(tensors)
    for name, entry in header.tensors.items():
        tensor, file = tensors[name]
        assert (entry.name, entry.file, entry.shape) == (name, file, tuple(tensor.shape))
        assert (entry.numel, entry.nbytes) == (tensor.numel(), tensor.nbytes)
        assert getattr(torch, FLOATS[entry.dtype]) == tensor.dtype == dtype


@pytest.mark.parametrize("many", [False, True])
def test_tensors_come_in_the_order_of_the_files_bytes(whole: Path, sharded: Path, many: bool) -> None:
    folder = sharded if many else whole
    expected = []
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        names = {name: part for name, part in json.loads(content[8 : 8 + size]).items() if name != "__metadata__"}
        expected += sorted(names, key=lambda name: names[name]["data_offsets"])
    assert list(read_model_header(folder).tensors) == expected


def test_a_config_tells_architecture_vocabulary_and_blocks(whole: Path) -> None:
    header = read_model_header(whole)
    assert header.architecture == "LlamaForCausalLM (llama)"
    assert (header.vocab_size, header.num_layers, header.folder) == (tiny.VOCAB, 3, whole)


@pytest.mark.parametrize(
    ("config", "vocabulary", "layers"),
    [
        ({"text_config": {"vocab_size": 5, "num_hidden_layers": 2}, "vocab_size": 9}, 5, 2),
        ({"vocab_size": 7, "n_layer": 4}, 7, 4),
        ({"vocab_size": 7, "encoder_layers": 1, "decoder_layers": 3}, 7, 3),
        ({"vocab_size": 7, "layers_block_type": ["mamba", "moe", "full_attention"]}, 7, 3),
        ({"vocab_size": "many", "num_layers": None}, None, None),
    ],
)
def test_configs_of_other_shapes_are_read(folder: Path, config: Any, vocabulary: int | None, layers: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    header = read_model_header(folder)
    assert (header.vocab_size, header.num_layers, header.architecture) == (vocabulary, layers, "? (?)")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_every_type_and_shape_has_its_bytes(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    header = read_file_header(tmp_path / "model.safetensors")["a"]
    assert (header.shape, header.numel, header.nbytes) == (shape, tensor.numel(), tensor.nbytes)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    check_refused(folder, file, facts=["safetensors file"])


@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        b"PK\x03\x04" + bytes(100),
        b"\xff" * 100,
        bytes(100),
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_a_file_of_another_format_is_named(folder: Path, content: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(content)
    check_refused(folder, file, facts=["safetensors file"])


def test_bytes_behind_the_last_tensor_are_refused(folder: Path) -> None:
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"more")
    check_refused(folder, folder / "model.safetensors", facts=["safetensors file"])


def test_a_folder_in_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    check_refused(folder, folder / "model.safetensors", facts=["directory"])


@PROPERTY
@given(st.binary(max_size=200))
@example(b"\x09\x00\x00\x00\x00\x00\x00\x00[1, 2, 3]")
@example(b'\x20\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":"F32","shape":[9]}}')
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(content)
    with refused(CheckpointError, where=str(path)):
        read_file_header(path)


@PROPERTY
@given(st.data())
def test_a_damaged_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, data: st.DataObject
) -> None:
    content = bytearray((whole / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 600))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(bytes(content))
    try:
        assert read_file_header(path)
    except CheckpointError as error:
        assert error.where == str(path)  # noqa: PT017


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, 16, -1, 2**31, 2**62, 2**63, 2**64, 10**30, 1.5, True, "2", None])
CODES = st.sampled_from([*BYTES, "F4", "F31", "f32", "", None, 4])


def entry(shape: Any, start: Any, stop: Any, dtype: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """Return a valid header of consecutive tensors with some of it changed, and the number of bytes behind it."""
    entries: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4)):
        shape, dtype = draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.sampled_from(sorted(BYTES)))
        size = math.prod(shape) * BYTES[dtype]
        entries[name] = entry(shape, end, end + size, dtype)
        end += size
    for name in draw(st.lists(st.sampled_from(sorted(entries)), max_size=2) if entries else st.just([])):
        key = draw(st.sampled_from(["shape", "data_offsets", "dtype", "more"]))
        value = CODES if key == "dtype" else st.lists(NUMBERS, max_size=3) | NUMBERS
        entries[name] = entries[name] | {key: draw(value)}
    text = json.dumps(entries)
    if entries and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(entries)))
        text = text.replace(f'"{name}"', f'"{draw(st.sampled_from("abcd"))}"')
    return text.encode(), end + draw(st.sampled_from([0, 0, 0, 1, -1]))


@PROPERTY
@given(headers())
@example((b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32"}}', 4))
def test_tensors_of_an_accepted_header_are_unique_and_inside_the_file(
    tmp_path_factory: pytest.TempPathFactory, header: tuple[bytes, int]
) -> None:
    text, size = header
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(max(size, 0)))
    try:
        tensors = read_file_header(path)
    except CheckpointError:
        return
    pairs = json.loads(text, object_pairs_hook=list)
    assert sorted(name for name, _ in pairs) == sorted(tensors)
    spans = {name: dict(facts)["data_offsets"] for name, facts in pairs}
    end = 0
    for name, tensor in tensors.items():
        assert spans[name] == [end, end + tensor.nbytes]
        end += tensor.nbytes
    assert end == max(size, 0)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "a/../../x.safetensors", "/tmp/x.safetensors", "..", "a\\..\\x.safetensors"]
)
def test_an_index_that_points_outside_its_folder_is_refused(shards: Path, file: str) -> None:
    save_file({"x": torch.ones(1)}, shards.parent / "x.safetensors")
    edit_index(shards, lambda weights: weights.update(x=file))
    check_refused(shards, shards / INDEX, facts=["outside", repr(file)])


@pytest.mark.parametrize("file", ["gone.safetensors", "", ".", "a\0b"])
def test_an_index_that_names_a_missing_file_is_refused(shards: Path, file: str) -> None:
    edit_index(shards, lambda weights: weights.update(x=file))
    check_refused(shards, shards / INDEX, facts=["missing file", repr(file)])


def test_an_index_that_assigns_a_tensor_to_a_file_without_it_is_refused(shards: Path) -> None:
    file = sorted(shards.glob("*.safetensors"))[0].name
    edit_index(shards, lambda weights: weights.update(extra=file))
    check_refused(shards, shards / INDEX, facts=[repr(file), "'extra'"])


def test_a_tensor_that_the_index_does_not_list_is_ignored(shards: Path) -> None:
    name = next(iter(read_model_header(shards).tensors))
    edit_index(shards, lambda weights: weights.pop(name))
    assert name not in read_model_header(shards).tensors


def test_a_truncated_shard_is_named(shards: Path) -> None:
    file = sorted(shards.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    check_refused(shards, file, facts=["safetensors file"])


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": null}', "[]", "", "{", "\xff"]
)
def test_an_invalid_index_is_named(shards: Path, index: str) -> None:
    (shards / INDEX).write_bytes(index.encode("latin-1"))
    check_refused(shards, shards / INDEX)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_alone_are_refused_by_name(folder: Path, pickled: str) -> None:
    (folder / "model.safetensors").rename(folder / pickled)
    check_refused(folder, folder, do="save_pretrained", facts=[pickled])


@pytest.mark.parametrize("shards", ["kept", "gone"])
def test_a_single_file_counts_before_an_index_as_in_transformers(tmp_path: Path, shards: str) -> None:
    old = tiny.save(tiny.make_model(), tmp_path / "model", sharded=True)
    new = tiny.make_model(seed=1)
    if shards == "gone":
        new.save_pretrained(old)  # removes the shards, but not their index
    else:
        new.save_pretrained(tmp_path / "new")
        shutil.copy(tmp_path / "new" / "model.safetensors", old)
    header = read_model_header(old)
    assert {tensor.file for tensor in header.tensors.values()} == {"model.safetensors"}
    assert [INDEX in note for note in header.notes] == [True]
    assert not read_model_header(tiny.save(new, tmp_path / "plain")).notes


def test_a_folder_of_a_trainer_s_checkpoints_is_refused_by_their_names(folder: Path, tmp_path: Path) -> None:
    for step in (500, 1000):
        shutil.copytree(folder, tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    check_refused(tmp_path / "run", tmp_path / "run", do=str(tmp_path / "run" / "checkpoint-1000"))
    shutil.copytree(folder, tmp_path / "run", dirs_exist_ok=True)
    assert read_model_header(tmp_path / "run").tensors


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with refused(CheckpointError, facts=[INDEX]) as caught:
        read_model_header(folder)
    assert caught.value.where == str(folder) and not caught.value.do


def test_a_quantized_checkpoint_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "quantization_config" not in read_model_header(folder).config, "the tensors are floats"
    tensors = load_file(folder / "model.safetensors")
    codes = {name: tensor.to(torch.int32) if "up_proj" in name else tensor for name, tensor in tensors.items()}
    save_file(codes, folder / "model.safetensors")
    check_refused(folder, folder, do="float16", facts=["up_proj", "I32"])


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "valid JSON"),
        (b"{,}", "valid JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "valid JSON"),
        (b"[]", "JSON object"),
        (b"3", "JSON object"),
        (None, os.strerror(errno.ENOENT)),
    ],
)
def test_an_invalid_config_json_is_named(folder: Path, content: bytes | None, fact: str) -> None:
    path = folder / "config.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    check_refused(folder, path, facts=[fact])


def test_a_folder_in_place_of_a_json_file_is_refused(tmp_path: Path) -> None:
    with refused(CheckpointError, where=str(tmp_path), facts=["directory"]):
        read_json(tmp_path)


@pytest.mark.parametrize("model", ["model", "./model", "model/", "../{parent}/model", "{absolute}"])
def test_a_path_is_relative_to_the_configs_folder(whole: Path, model: str) -> None:
    model = model.format(parent=whole.parent.name, absolute=whole)
    assert find_model(model, whole.parent) == whole.resolve()


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    monkeypatch.setenv("HOME", str(whole.parent))
    assert find_model("~/model", Path("/")) == whole.resolve()


@pytest.mark.parametrize("model", ["../none", "/none/at/all", "a b", "a/b/c", "http://huggingface.co/a/b", "@main"])
def test_a_missing_folder_is_named_with_its_absolute_path(tmp_path: Path, model: str) -> None:
    with refused(CheckpointError, facts=["owner/name"]) as caught:
        find_model(model, tmp_path)
    assert caught.value.where == str((tmp_path / model).resolve())


@pytest.mark.parametrize("model", ["~no-such-user/model", "a\0b", "owner/name@a\0b", "x" * 5000, "x/" * 3000])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(CheckpointError):
        find_model(model, tmp_path)


@pytest.mark.parametrize("model", ["owner/none", "owner/none@main", "none", "owner/a--b", "owner/a.git"])
def test_a_hub_id_that_is_not_in_the_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with refused(CheckpointError, do="HF_HUB_OFFLINE=1") as caught:
        find_model(model, tmp_path)
    assert caught.value.where == model and str(tmp_path / model.partition("@")[0]) in caught.value.do


def test_leftovers_of_a_training_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["config.json", "model.safetensors", "additional_chat_templates/tools.jinja", "checkpoint-5/config.json"]
    wanted: list[str] = []

    def download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        options = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        wanted.extend(huggingface_hub.utils.filter_repo_objects([*files, "consolidated.safetensors"], **options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find_model("owner/name", tmp_path)
    assert wanted == files[:3]


def test_a_copy_without_the_card_is_enough_where_the_hub_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def download(hub_id: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append("README.md" in allow_patterns)
        if asked[-1]:
            raise huggingface_hub.errors.LocalEntryNotFoundError("the cached snapshot is incomplete")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("owner/name", Path("/")) == tmp_path and asked == [True, False]


@pytest.mark.parametrize("revision", ["", "@main", "@{commit}"])
def test_a_hub_id_is_found_in_the_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, revision: str
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--owner--name"
    snapshot = shutil.copytree(whole, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = find_model("owner/name" + revision.format(commit=commit), tmp_path)
    assert folder == snapshot
    assert read_model_header(folder).tensors == read_model_header(whole).tensors


def test_files_of_the_hubs_cache_are_links_to_blobs_of_their_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    blobs = shutil.copytree(whole, snapshot.parent.parent / "blobs")
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert read_model_header(find_model("owner/name", tmp_path)).tensors == read_model_header(whole).tensors
    # The cache itself may be behind a link.
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "link"))
    assert read_model_header(find_model("owner/name", tmp_path)).tensors == read_model_header(whole).tensors


@pytest.mark.parametrize("target", ["../other/{file}", "../../blobs/../other/{file}", "/etc/passwd"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_snapshot_may_link_to_nothing_but_its_blobs(tmp_path: Path, whole: Path, target: str, file: str) -> None:
    snapshot = shutil.copytree(whole, tmp_path / "models--owner--name" / "snapshots" / "0123")
    for other in (snapshot.parent / "other", tmp_path / "models--owner--name" / "other"):
        shutil.copytree(whole, other)
    (tmp_path / "models--owner--name" / "blobs").mkdir()
    (snapshot / file).unlink()
    (snapshot / file).symlink_to(target.format(file=file))
    check_refused(snapshot, snapshot / file, do="link", facts=[str((snapshot / file).resolve())])


@pytest.mark.parametrize("name", ["vocab.bpe", "LICENSE.md", "tokenizer.json", "additional_chat_templates/a.jinja"])
def test_a_link_out_of_the_folder_is_refused_for_every_file_that_is_copied_or_read(
    tmp_path: Path, folder: Path, name: str
) -> None:
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    check_refused(folder, folder / name, do="link", facts=[str(tmp_path / "secret")])


def test_a_folder_of_templates_is_not_a_link_out_of_the_folder(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    check_refused(folder, folder / "additional_chat_templates", do="link", facts=[str(tmp_path / "elsewhere")])


def test_a_link_within_the_folder_is_followed(folder: Path, whole: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert read_model_header(folder).tensors == read_model_header(whole).tensors


def test_a_folder_takes_precedence_over_a_hub_id_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find_model("owner/name", tmp_path) == tmp_path / "owner" / "name"
