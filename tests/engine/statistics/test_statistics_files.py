"""Files of statistics: what was written is read again, what was changed is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointError
from engine.statistics.files import HEADER, ROWS, Statistics, StatisticsWriter, packed, unpacked
from engine.statistics.moments import Moments
from engine.storage.local_folder import LocalFolder

HASH = "0" * 64
FACTS = {"base": {"a": HASH}, "model": {"a": HASH}, "data": HASH, "sequences": 2, "tokens": 9, "dtype": "float32"}


def moments(features: int, tokens: int, form: str) -> Moments:
    inputs = torch.randn(tokens, features)
    gram = inputs.T @ inputs if form == "gram" else None
    kept = inputs if form == "inputs" else None
    return Moments(tokens, inputs.square().sum(0), inputs.abs().sum(0), gram, kept)


@given(st.sampled_from([1, 2, 7, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 3]))
def test_a_triangle_is_the_whole_matrix(features: int) -> None:
    gram = torch.randn(features, features)
    gram = gram + gram.T
    triangle = torch.cat(list(packed(gram)))
    assert torch.equal(triangle, gram[torch.ones_like(gram, dtype=torch.bool).triu()])
    assert torch.equal(unpacked(triangle, features), gram)


@pytest.mark.parametrize("form", ["gram", "inputs", "diagonal"])
def test_what_was_written_is_read_by_each_layer_that_shares_an_input(tmp_path: Path, form: str) -> None:
    folder, given = LocalFolder(tmp_path), moments(5, 3, form)
    writer = StatisticsWriter(folder)
    writer.moments([(["q.weight", "k.weight"], given)])
    writer.fisher({"norm": torch.arange(4.0)})
    writer.finish(**FACTS, kinds=("activations",))
    statistics = Statistics(folder)
    for name in ("q.weight", "k.weight"):
        read = statistics.of(name, (2, 5)).moments()
        assert read is not None
        assert read.tokens == 3
        assert torch.equal(read.square_I, given.square_I) and torch.equal(read.absolute_I, given.absolute_I)
        if form != "diagonal":
            assert torch.allclose(read.gram(), given.gram(), rtol=0, atol=0)
        assert (read.gram_II is None) == (form != "gram") and (read.inputs_NI is None) == (form != "inputs")
    assert statistics.of("o.weight", (2, 5)).moments() is None
    assert statistics.of("q.weight", (2, 5)).fisher() is None
    fisher = statistics.of("norm", (4,)).fisher()
    assert fisher is not None and torch.equal(fisher, torch.arange(4.0))


def written(folder: Path) -> Path:
    writer = StatisticsWriter(LocalFolder(folder))
    writer.moments([(["q.weight"], moments(5, 3, "gram"))])
    writer.fisher({"norm": torch.arange(4.0)})
    writer.finish(**FACTS, kinds=("gram", "fisher"))
    return folder


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path) / "moments-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="moments-00000"):
        Statistics(LocalFolder(tmp_path)).of("q.weight", (2, 5)).moments()


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["files"].update({"../moments-00000.safetensors": HASH}),
        lambda header: header["fisher"].update({"norm": "../../secret"}),
        lambda header: header["moments"]["q.weight"].update(tokens=-1),
        lambda header: header.pop("model"),
        lambda header: header.update(format=2),
        lambda header: header.update(more=1),
        # It lacks what its kinds say, or a file that it names.
        lambda header: header.update(fisher={}),
        lambda header: header["moments"]["q.weight"].update(form="diagonal"),
        lambda header: header["fisher"].update(norm="fisher-00009.safetensors"),
        lambda header: header.update(kinds=["sensitivity"]),
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, change: object) -> None:
    path = written(tmp_path) / HEADER
    header = json.loads(path.read_text())
    assert callable(change)
    change(header)
    path.write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match=HEADER):
        Statistics(LocalFolder(tmp_path))


def test_statistics_of_other_shapes_are_refused(tmp_path: Path) -> None:
    statistics = Statistics(LocalFolder(written(tmp_path)))
    with pytest.raises(CheckpointError):
        statistics.of("q.weight", (2, 6)).moments()
    with pytest.raises(CheckpointError):
        statistics.of("norm", (2, 2)).fisher()


def test_a_folder_without_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no statistics"):
        Statistics(LocalFolder(tmp_path))


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", [HEADER, "moments-00000.safetensors"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str, name: str) -> None:
    path = written(tmp_path) / name
    path.unlink()
    {"pipe": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](path)
    with pytest.raises(CheckpointError):
        Statistics(LocalFolder(tmp_path)).of("q.weight", (2, 5)).moments()


def test_the_folder_of_several_models_names_one_of_them(tmp_path: Path) -> None:
    written(tmp_path / "expert1")
    with pytest.raises(CheckpointError) as caught:
        Statistics(LocalFolder(tmp_path))
    assert "expert1" in caught.value.do


def test_a_model_without_linear_layers_has_no_moments(tmp_path: Path) -> None:
    StatisticsWriter(LocalFolder(tmp_path)).finish(**FACTS, kinds=("gram",))
    assert Statistics(LocalFolder(tmp_path)).of("c_attn.weight", (5, 15)).moments() is None
