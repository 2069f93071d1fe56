"""The config of a compression, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_mixtures
import yaml
from click.testing import CliRunner
from errors import refused

from cli import main
from engine.compression.config import read_compression
from engine.compression.families import experts_kept, smaller_config
from engine.config.mergekit_yaml import as_yaml
from engine.errors import CheckpointError, ConfigError
from engine.planning.planner import make_plan

MINIMAL: dict[str, Any] = {"model": "model", "compress": {"experts": 0.5}, "calibration": "data.jsonl"}


def written(folder: Path, config: Any) -> Path:
    path = folder / "compress.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_the_config_is_written_as_it_is_read(tmp_path: Path) -> None:
    given = MINIMAL | {"compress": {"experts": 3, "method": "sub_moe", "rank": 0.5, "align": "none"}, "samples": 7}
    config = read_compression(written(tmp_path, given), ["seed=5"])
    again = read_compression(written(tmp_path, as_yaml(config)))
    assert again == config and config.seed == 5 and config.calibration.generate_responses == 0


@pytest.mark.parametrize(
    ("change", "where", "facts"),
    [
        ({"compress": {"experts": 0}}, "compress.yaml:", ["compress.experts"]),
        ({"compress": {"experts": 1.5}}, "compress.yaml:", ["compress.experts"]),
        ({"compress": {"experts": True}}, "compress.yaml:", ["compress.experts", "true"]),
        ({"compress": {}}, "compress.yaml:", ["compress.experts"]),
        ({"compress": {"experts": 2, "method": "prune"}}, "compress.yaml:", ["prune", "ream", "m_smoe", "sub_moe"]),
        ({"compress": {"experts": 2, "group_size": 1}}, "compress.yaml:", ["group_size"]),
        ({"compress": {"experts": 2, "rank": 0}}, "compress.yaml:", ["rank"]),
        ({"compress": {"experts": 2, "groups": 2}}, "compress.yaml:", ["compress.groups"]),
        ({"calibration": []}, "compress.yaml:", ["calibration"]),
        ({"calibration": None}, "compress.yaml:", ["calibration"]),
        ({"models": []}, "compress.yaml:", ["models"]),
        ({"samples": 0}, "compress.yaml:", ["samples"]),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(change: Any, where: str, facts: list[str], tmp_path: Path) -> None:
    with refused(ConfigError, where, facts=facts):
        read_compression(written(tmp_path, MINIMAL | change))


def test_a_misspelt_key_is_answered_with_the_right_one(tmp_path: Path) -> None:
    with refused(ConfigError, do="'calibration'"):
        read_compression(written(tmp_path, MINIMAL | {"calibratoin": "data.jsonl"}))


def kept(folder: Path, family: str, more: Any = None, **compress: Any) -> int:
    tiny_mixtures.save_mixture(tiny_mixtures.make_mixture(family, **(more or {})), folder / "model")
    tiny.write_calibration(folder / "data.jsonl", 2, seed=0)
    config = read_compression(written(folder, MINIMAL | {"compress": compress}))
    assert config.compress is not None
    return experts_kept(make_plan(config, folder).base_header, config.compress)


@pytest.mark.parametrize("family", tiny_mixtures.FAMILIES)
def test_a_share_of_the_experts_is_left(family: str, tmp_path: Path) -> None:
    assert kept(tmp_path, family, experts=0.5) == 4


@pytest.mark.parametrize(
    ("family", "compress", "where", "facts"),
    [
        ("mixtral", {"experts": 9}, "experts", ["9", "at most 8"]),
        ("mixtral", {"experts": 1}, "experts", ["at least 2"]),
        ("mixtral", {"experts": 0.1}, "experts", ["at least 2"]),
        ("mixtral", {"experts": 3, "group_size": 2}, "group_size", ["at least 3"]),
        ("deepseek_v3", {"experts": 5}, "experts", ["a multiple of 2"]),
        ("deepseek_v3", {"experts": 2}, "experts", ["at least 4"]),
    ],
    ids=str,
)
def test_numbers_that_the_router_cannot_use_are_refused(
    family: str, compress: Any, where: str, facts: list[str], tmp_path: Path
) -> None:
    with refused(ConfigError, f"compress.{where}", facts=facts):
        kept(tmp_path, family, **compress)


@pytest.mark.parametrize(("family", "facts"), [("llama", ["num_experts"]), ("granitemoe", ["granitemoe", "Mixtral"])])
def test_other_models_are_refused_by_the_command(
    family: str, facts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(tiny.FAMILIES, "granitemoe", ("GraniteMoeConfig", more))
    tiny.save(tiny.make_model(family), tmp_path / "model")
    tiny.write_calibration(tmp_path / "data.jsonl", 2, seed=0)
    config = written(tmp_path, MINIMAL)
    done = CliRunner().invoke(main, ["compress", str(config), "--out", str(tmp_path / "out")])
    assert done.exit_code == CheckpointError.exit_code
    assert all(fact in done.output for fact in facts) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_the_smaller_config_has_the_number_by_every_key(key: str) -> None:
    found = smaller_config({key: 8, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1}, 3)
    assert found == {key: 3, "num_experts_per_tok": 2, "num_nextn_predict_layers": 0}
