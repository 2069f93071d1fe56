"""Task vectors in few bits: the codec, the folder, and merges of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from click.testing import CliRunner
from conftest import plan_of
from errors import refused
from weight_space import ours, write_config

from cli import main
from engine.checkpoints.adapter_file import DELTA, DELTA_WEIGHTS
from engine.checkpoints.headers import read_model_header
from engine.checkpoints.ranges import Ranges
from engine.checkpoints.tensors import Checkpoint
from engine.compression import deltas
from engine.compression.deltas import Written, compress, groups_of, write_deltas
from engine.errors import CheckpointError, InputError, MergeError, OutputError
from engine.methods.compression import BITS, SIZE, parse_bits
from engine.packing import PackedGroup, Packing, decode, encode
from engine.planning.open_models import open_expert
from engine.task_vectors.experts import applied

EXACT = parse_bits("8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and a checkpoint that was trained from it."""
    model = tiny.make_model()
    tiny.save(model, tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    tiny.save(model, tmp_path / "expert")
    return tmp_path


def written(folder: Path, out: str = "delta", bits: Any = EXACT, size: float = 1.0) -> Written:
    expert, base = (read_model_header(folder / name) for name in ("expert", "base"))
    return write_deltas(expert, base, folder / out, bits, size, str(folder / "base"))


def config_of(folder: Path, *models: str, **keys: Any) -> Path:
    entries = [{"model": name, "parameters": {"weight": 0.5}} for name in models]
    return write_config(folder, **{"merge_method": "task_arithmetic", "base_model": "base", "models": entries, **keys})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def dense(folder: Path, of: str = "delta", out: str = "dense") -> dict[str, torch.Tensor]:
    """Write the checkpoint that compressed task vectors are, and return its tensors."""
    base = weights(folder / "base")
    expert = open_expert(plan_of(config_of(folder, of)).experts[0])
    tensors = {name: applied(tensor, expert.task_vector(name)) for name, tensor in base.items()}
    shutil.copytree(folder / "base", folder / out)
    safetensors.torch.save_file(tensors, folder / out / "model.safetensors", {"format": "pt"})
    return tensors


@pytest.mark.parametrize("length", [1, 127, 128, 301])
def test_errors_of_numbers_fall_with_bits(length: int) -> None:
    values = np.random.default_rng(0).normal(size=(5, length)).astype(np.float32)
    values[3] = 0
    errors = []
    for bits in range(1, 9):
        codes, scales = encode(values, bits)
        assert codes.nbytes + scales.nbytes == PackedGroup(bits, 5).nbytes(length)
        found = decode(codes, scales, length, bits)
        assert not found[3].any()
        errors.append(float(np.linalg.norm(found - values) / np.linalg.norm(values)))
    assert errors[7] < 0.01 and (length == 1 or errors == sorted(errors, reverse=True))


def test_groups_fill_the_share_of_the_matrix() -> None:
    groups = groups_of((4096, 1024), parse_bits(BITS), SIZE)
    assert [(group.bits, group.vectors) for group in groups[:2]] == [(8, 2), (3, 32)] and groups[2].bits == 2
    nbytes = sum(group.nbytes(length) for group in groups for length in (4096, 1024))
    assert 0.99 * SIZE < nbytes / (2 * 4096 * 1024) <= SIZE
    assert groups_of((64, 48), parse_bits("8:2,4"), 1.0) == (PackedGroup(8, 2), PackedGroup(4, 46))
    assert groups_of((64, 48), parse_bits("8"), 1e-6) == (PackedGroup(8, 1),)


@pytest.mark.parametrize("text", ["", "9", "0:1", "2,3", "8:0", "8:x", "8:2,,2", "-1", "8:99999999999"])
def test_other_groups_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"group|parts"):
        parse_bits(text)
    done = CliRunner().invoke(
        main, ["compress-delta", "a", "--base", "b", "--out", str(tmp_path / "o"), "--bits", text]
    )
    assert done.exit_code == 2 and not (tmp_path / "o").exists()


@pytest.mark.parametrize("rank", [3, 40])
def test_a_matrix_of_low_rank_is_its_leading_parts(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tau = torch.randn(60, rank, generator=generator) @ torch.randn(rank, 40, generator=generator)
    groups = (PackedGroup(8, 2), PackedGroup(8, 10))
    left, right = Packing("W.left", groups, 60, True), Packing("W.right", groups, 40, False)
    tensors, found = compress(tau, left, right)
    read = {
        name: tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        for name, tensor in tensors.items()
    }
    again = left.matrix(lambda name: read[name].numpy()) @ right.matrix(lambda name: read[name].numpy())
    torch.testing.assert_close(torch.from_numpy(again), found)
    u, s, vt = torch.linalg.svd(tau)
    best = u[:, :12] * s[:12] @ vt[:12]
    assert float((found - best).norm() / tau.norm()) < 0.02


def test_the_error_falls_with_bits_and_size_and_is_that_of_the_readers(folder: Path) -> None:
    sizes = [written(folder, f"size{size}", parse_bits("8:1,3:4,2"), size).error for size in (0.1, 0.2, 0.4)]
    bits = [written(folder, f"bits{bits}", ((bits, None),)).error for bits in (2, 3, 4, 8)]
    assert sizes == sorted(sizes, reverse=True) and bits == sorted(bits, reverse=True) and bits[3] < 0.02 < bits[2]
    base, expert, found = weights(folder / "base"), weights(folder / "expert"), dense(folder, "size0.2")
    norms = [name for name in base if base[name].dim() == 1]
    assert norms and all(torch.equal(found[name], expert[name]) for name in norms)
    matrices = [name for name in base if base[name].dim() == 2 and "embed" not in name and "head" not in name]
    off = sum(float((found[name] - expert[name]).square().sum()) for name in matrices)
    all_of_it = sum(float((expert[name] - base[name]).square().sum()) for name in matrices)
    assert (off / all_of_it) ** 0.5 == pytest.approx(sizes[1], rel=1e-3)
    names = safetensors.torch.load_file(folder / "size0.2" / DELTA_WEIGHTS).keys()
    assert not any("embed" in name for name in names)  # it did not change
    assert "lm_head.weight" in names  # no layer of a block: it is stored whole


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_an_expert_in_few_bits_merges_like_the_checkpoint_that_it_is(method: str, folder: Path) -> None:
    written(folder, bits=parse_bits("8:2,3:4,2"), size=0.3)
    dense(folder)
    keys = {"parameters": {"density": 0.5}} if method == "ties" else {}
    found, expected = (
        ours(config_of(folder, name, "expert", merge_method=method, **keys)) for name in ("delta", "dense")
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_both_readers_see_the_same_factors(folder: Path) -> None:
    written(folder, bits=parse_bits("8:2,3"))
    header = plan_of(config_of(folder, "delta")).experts[0].header
    (left, right), *_ = [(pair.b, pair.a) for pair in header.pairs.values()]  # type: ignore[union-attr]
    with Ranges(folder / "delta", header.tensors) as ranges:
        for name in (left, right):
            whole = Checkpoint(folder / "delta", header.tensors).read(name)
            assert whole.shape == header.tensors[name].shape
            assert np.array_equal(ranges.read(name, 3, 50), whole.reshape(-1)[3:50].numpy())


def test_one_matrix_is_in_memory_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def parts(self: Any, entry: Any, of: Any = deltas._Writer.parts) -> Any:
        yield from of(self, entry)
        kept.append({name.split(".weight.")[0] for name in self._ready})

    monkeypatch.setattr(deltas._Writer, "parts", parts)
    written(folder, bits=parse_bits("8:2,2"))
    assert max(map(len, kept)) == 1 and not kept[-1]


def test_learned_merges_and_evaluations_take_it(folder: Path) -> None:
    from engine.evaluation.subject import named

    written(folder)
    tiny.write_calibration(folder / "data.jsonl", 2, seed=0)
    models = [{"model": "delta", "calibration": str(folder / "data.jsonl")}]
    plan = plan_of(config_of(folder, merge_method="expert_merging", models=models))
    assert plan.experts[0].kind == "adapter"
    assert named("delta", folder).adapter == str(folder / "delta")
    assert named("delta", folder).checkpoint == str(folder / "base")


def edited(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def without(path: Path, ending: str) -> None:
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: own for name, own in tensors.items() if not name.endswith(ending)}, path)


@pytest.mark.parametrize(
    ("spoil", "where", "facts"),
    [
        (lambda at: edited(at / DELTA, version=2), DELTA, ["version 2", "version 1"]),
        (lambda at: edited(at / DELTA, format="gptq"), DELTA, ["gptq", "delta_come"]),
        (lambda at: edited(at / DELTA, bits=[99]), DELTA, ["[99]"]),
        (lambda at: edited(at / DELTA, bits=None), DELTA, ["None"]),
        (lambda at: edited(at / DELTA, bits=[4]), DELTA_WEIGHTS, ["codes"]),
        (lambda at: without(at / DELTA_WEIGHTS, "q_proj.weight.left.0.scales"), DELTA_WEIGHTS, ["left.0.scales"]),
        (lambda at: without(at / DELTA_WEIGHTS, "q_proj.weight.left.0.codes"), DELTA_WEIGHTS, ["left.0.scales"]),
        (lambda at: (at / DELTA_WEIGHTS).unlink(), DELTA_WEIGHTS, []),
        (lambda at: (at / DELTA_WEIGHTS).write_bytes(b"x" * 99), DELTA_WEIGHTS, []),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_damaged_folders_are_refused(spoil: Any, where: str, facts: list[str], folder: Path) -> None:
    written(folder)
    spoil(folder / "delta")
    with refused(CheckpointError, where, facts=facts):
        plan_of(config_of(folder, "delta"))


def test_another_base_is_refused(folder: Path) -> None:
    written(folder)
    config = json.loads((folder / "base" / "config.json").read_text()) | {"intermediate_size": 24}
    other = tiny.transformers.AutoModelForCausalLM.from_config(tiny.transformers.LlamaConfig(**config))
    tiny.save(other, folder / "base")
    with refused(CheckpointError, DELTA_WEIGHTS, "use the base that the task vectors were compressed with"):
        plan_of(config_of(folder, "delta"))


def changed(path: Path, change: Any) -> None:
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda own: own["model.norm.weight"].fill_(float("nan")), ["model.norm.weight"]),
        (lambda own: own["model.layers.1.mlp.up_proj.weight"].fill_(float("inf")), ["up_proj"]),
        (lambda own: own.pop("model.norm.weight"), ["model.norm.weight", "missing"]),
        (lambda own: own.update(more=torch.zeros(1)), ["more"]),
        (lambda own: own.update({"model.norm.weight": torch.zeros(3)}), ["(3,)", "(32,)"]),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_checkpoints_that_cannot_be_compressed_leave_nothing(change: Any, facts: list[str], folder: Path) -> None:
    changed(folder / "expert", change)
    before = sorted(folder.iterdir())
    with refused(CheckpointError, "expert", facts=facts):
        written(folder)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("expert", "base", "kept"), OutputError),
        (("expert", "base", "base"), OutputError),
        (("base", "base", "delta"), CheckpointError),
        (("nothing", "base", "delta"), CheckpointError),
        (("expert", "nothing", "delta"), CheckpointError),
        (("expert", "base", "s3://bucket/delta"), OutputError),
    ],
)
def test_the_command_refuses(
    arguments: tuple[str, str, str], error: type[MergeError], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "kept").mkdir()
    (folder / "kept" / "mine.txt").write_text("mine")
    expert, base, out = arguments
    done = CliRunner().invoke(main, ["compress-delta", expert, "--base", base, "--out", out])
    assert done.exit_code == error.exit_code and issubclass(error, InputError), done.output
    assert [path.name for path in (folder / "kept").iterdir()] == ["mine.txt"] and not (folder / "delta").exists()


def test_the_command_writes_what_a_config_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(
        main, ["compress-delta", "expert", "--base", "base", "--out", "new/delta", "--size", "0.5"]
    )
    assert done.exit_code == 0, done.output
    assert ours(config_of(folder, "new/delta")).keys() == weights(folder / "base").keys()
