"""Keys that nothing reads: left out and listed for mergekit's methods, errors for all others and with --strict."""

from __future__ import annotations

from pathlib import Path

import pytest
from errors import refused

from engine.config.reader import load_config
from engine.errors import ConfigError

HEAD = "base_model: b\nmodels:\n- model: x\n- model: y\n"
SLICE = "base_model: b\nslices:\n- sources:\n  - {model: x, layer_range: [0, 2]}\n  - {model: y, layer_range: [0, 2]}\n"
# Lines after a config, the unknown key, and what it may have been meant as.
UNKNOWN = (
    (HEAD, "lamda: 2", "lamda", "parameters.lambda"),
    (HEAD, "select_topk: 0.1", "select_topk", ""),
    (HEAD, "  density: 0.5", "models.1.density", "parameters.density"),
    (HEAD, "  paramters: {density: 0.5}", "models.1.paramters", "'parameters'"),
    (HEAD, "parameters: {densty: 0.5}", "parameters.densty", "'density'"),
    (HEAD, "parameters: {density: {filter: mlp, value: 1, filters: attn}}", "parameters.density.filters", "'filter'"),
    (HEAD, "tokenizer: {source: base, pad_to_multiple: 8}", "tokenizer.pad_to_multiple", "'pad_to_multiple_of'"),
    (SLICE, "  residual_weight: 0.5", "slices.0.residual_weight", ""),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "merge.yaml"


@pytest.mark.parametrize(("head", "line", "key", "near"), UNKNOWN, ids=[key for _, _, key, _ in UNKNOWN])
def test_what_mergekit_ignores_is_left_out_and_listed(path: Path, head: str, line: str, key: str, near: str) -> None:
    path.write_text(f"merge_method: ties\n{head}{line}\n")
    config = load_config(path)
    (found,) = config.unused
    assert key in found and near in found
    path.write_text(f"merge_method: ties\n{head}")
    known = load_config(path)
    assert config.recipe is not None and known.recipe is not None
    assert config.models == known.models and config.recipe.slices == known.recipe.slices
    path.write_text(f"merge_method: ties\n{head}{line}\n")
    with refused(ConfigError, where=str(path)):
        load_config(path, strict=True)


def test_methods_of_this_program_alone_and_its_own_sections_are_strict(path: Path) -> None:
    for method, line in (("wudi", "lamda: 2"), ("weight_average", "lamda: 2"), ("ties", "cluster: {shard: 2}")):
        path.write_text(f"merge_method: {method}\n{HEAD}{line}\n")
        with refused(ConfigError, where=f"{path}:6"):
            load_config(path)


def test_a_weight_that_is_not_among_the_parameters_is_refused(path: Path) -> None:
    text = f"merge_method: ties\n{HEAD}  weight: 0.5\n"
    path.write_text(text)
    with refused(ConfigError, where=f"{path}:6", facts=["models.1.weight"]):
        load_config(path)
    # With weights in their place mergekit merges with those.
    path.write_text(f"{text}parameters: {{weight: 0.3}}\n")
    assert len(load_config(path).unused) == 1


def test_options_of_a_slice_s_own_method_are_known(path: Path) -> None:
    pytest.importorskip("mergekit")
    sources = "[{model: x, layer_range: [0, 1]}, {model: y, layer_range: [0, 1]}]"
    own = "merge_method: nuslerp, parameters: {nuslerp_row_wise: true, weight: 1}"
    path.write_text(f"merge_method: linear\nslices:\n- {{sources: {sources}, {own}}}\n")
    assert load_config(path).unused == ()


def test_the_name_of_a_merge_is_no_unknown_key(path: Path) -> None:
    path.write_text(f"name: other\nmerge_method: ties\n{HEAD}")
    assert load_config(path, strict=True).unused == ()


def test_only_what_is_no_name_of_a_file_may_be_long(path: Path) -> None:
    template = "".join(f"  line {number}\n\n" for number in range(1000))
    path.write_text(f"merge_method: ties\n{HEAD}description: |\n{template}")
    assert load_config(path).unused
    for line in ('config_source: "a\\nb"', f"config_source: {'a' * 5000}", f"{'a' * 5000}: 1", '? "a\\nb"\n: 1'):
        path.write_text(f"merge_method: ties\n{HEAD}{line}\n")
        with refused(ConfigError, where=f"{path}:6"):
            load_config(path)
    path.write_text(f"merge_method: ties\n{HEAD}description: {'a' * (1 << 19)}\n")
    with refused(ConfigError, where=f"{path}:6"):
        load_config(path)
