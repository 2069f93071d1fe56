"""The steps after a merge in a config: their forms, and with which methods and models they go together."""

from __future__ import annotations

from pathlib import Path

import pytest
from errors import refused

from engine.config.reader import load_config
from engine.config.schema import Config
from engine.errors import ConfigError

BASE = "base_model: b\n"
MODELS = "models: [{model: x}, {model: y}]\n"
RECORDS = "models: [{model: x, calibration: x.jsonl}, {model: y, calibration: y.jsonl}]\n"
LAYERS = "slices: [{sources: [{model: x, layer_range: [0, 2]}, {model: y, layer_range: [0, 2]}]}]\n"


def load(folder: Path, text: str) -> Config:
    path = folder / "merge.yaml"
    path.write_text(text)
    return load_config(path)


def steps(config: Config) -> list[tuple[str, dict[str, object]]]:
    return [(one.method, one.options) for one in config.calibrate]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("svc", [("svc", {"alpha": 0.1})]),
        ("{method: svc, alpha: 1}", [("svc", {"alpha": 1.0})]),
        ("[{method: svc, alpha: 0.5}, featcal]", [("svc", {"alpha": 0.5}), ("featcal", {})]),
        ("[]", []),
    ],
)
def test_a_step_is_a_name_or_a_mapping_or_several_in_order(
    tmp_path: Path, given: str, expected: list[tuple[str, dict[str, object]]]
) -> None:
    found = steps(load(tmp_path, f"merge_method: ties\n{BASE}{RECORDS}calibrate: {given}\n"))
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert all(options.items() >= wanted.items() for (_, options), (_, wanted) in zip(found, expected, strict=True))


def test_steps_on_weights_need_no_samples_and_aim_those_of_the_base(tmp_path: Path) -> None:
    merge = f"merge_method: ties\n{BASE}"
    assert not load(tmp_path, f"{merge}{MODELS}calibrate: svc\n").uses_samples
    assert not load(tmp_path, f"{merge}{MODELS}calibrate: aim\nbase_statistics: folder\n").uses_samples
    sampled = load(tmp_path, f"{merge}{RECORDS}calibrate: aim\n")
    assert sampled.uses_samples and sampled.statistics == () and sampled.statistics_of_base == ("activations",)
    with refused(ConfigError, where="merge.yaml:3", facts=["'x'", "aim", "base_statistics"]):
        load(tmp_path, f"{merge}{MODELS}calibrate: aim\n")


@pytest.mark.parametrize(
    ("text", "line", "facts"),
    [
        (f"merge_method: svd_intermediate\n{BASE}{MODELS}calibrate: svc\n", 4, ["svd_intermediate", "svc"]),
        (f"merge_method: svd_intermediate\n{BASE}{RECORDS}calibrate: featcal\n", 4, ["svd_intermediate", "featcal"]),
        (f"merge_method: ties\n{BASE}{RECORDS}calibrate: [featcal, svc, featcal]\n", 4, ["featcal"]),
        (f"merge_method: regmean_plus_plus\n{BASE}{RECORDS}calibrate: featcal\n", 4, ["regmean_plus_plus", "featcal"]),
        (f"merge_method: linear\n{LAYERS}calibrate: svc\n", 2, ["svc", "slices"]),
        (f"merge_method: linear\n{MODELS}calibrate: svc\n", 1, ["svc", "base_model"]),
        (
            f"merge_method: ties\n{BASE}{RECORDS}calibrate: [svc, aim]\ntokenizer_source: union\n",
            5,
            ["aim", "tokenizer"],
        ),
        (f"merge_method: ties\n{BASE}{MODELS}calibrate: {{method: svc, alpha: 0}}\n", 4, ["alpha"]),
        (f"merge_method: ties\n{BASE}{MODELS}calibrate: {{method: svc, omega: 1}}\n", 4, ["omega", "alpha"]),
        (f"merge_method: ties\n{BASE}{MODELS}calibrate: sharpen\n", 4, ["featcal, svc, aim"]),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, facts: list[str]
) -> None:
    with refused(ConfigError, where=f"merge.yaml:{line}" if line > 1 else "merge.yaml", facts=facts):
        load(tmp_path, text)


def test_steps_on_weights_go_with_another_vocabulary(tmp_path: Path) -> None:
    config = load(tmp_path, f"merge_method: ties\n{BASE}{MODELS}calibrate: svc\ntokenizer_source: union\n")
    assert [name for name, _ in steps(config)] == ["svc"]
