"""The YAML of a merge: valid values, reported faults, and that any other input raises a ConfigError."""

from __future__ import annotations

import copy
import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import plan_of
from errors import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.config.reader import DEPTH, collected, load_config, parse_config
from engine.config.resources import Rates
from engine.config.schema import INTERNAL, Config
from engine.errors import ConfigError
from engine.methods.learned import PAPER, PRESETS
from engine.output.resolved_config import resolved_config

HEAD = """\
merge_method: expert_merging_pp
base_model: models/base
"""
MODELS = """\
models:
  - model: models/math
    calibration: math.jsonl
"""
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
FUZZ = settings(max_examples=300, deadline=None, derandomize=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "merge.yaml"


def load(path: Path, text: str, *overrides: str) -> Config:
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def fault(path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, text, *overrides)
    return str(caught.value)


def last_line(value: Any) -> str | None:
    """Return the last line of a config as a readable test id."""
    return value.strip().splitlines()[-1].strip()[:60] if isinstance(value, str) and value.strip() else None


def line_of(text: str, marker: str = "# here") -> int:
    return next(number for number, line in enumerate(text.splitlines(), start=1) if marker in line)


def test_defaults_are_those_of_the_methods_page(path: Path) -> None:
    config = load(path, HEAD + MODELS, "preset=paper")
    expert = config.models[0]
    assert (config.weight(expert), config.loss_weight(expert), config.samples_per_model(expert)) == (0.1, 1.0, 5)
    assert config.parameters.model_dump() == {
        "weight": 0.1,
        "loss_weight": 1.0,
        "samples_per_model": 5,
        "hidden_layers": "middle",
        "hidden_loss": "mse",
        "hidden_weight": 1.0,
        "temperature": 1.0,
        "loss_tokens": "all",
        "regularization": 5.0,
        "learning_rate": 0.5,
        "weight_decay": 1e-5,
        "max_grad_norm": 1.0,
        "gradient_accumulation": 8,
        "epochs": 1,
        "budget": 1.1,
        "kappa": 1.0,
        "chunks": "contiguous",
        "fixed": "prior",
        "start": "prior",
        "task_vectors": "whole",
        "granularity": "layer",
    }
    assert " ".join(config.exclude) == ".*vision.* .*visual.* .*lm_head.* .*norm.* .*embed_tokens.* .*bias.*"
    assert (config.calibration.max_length, config.calibration.shuffle) == (2048, False)
    assert config.calibration.generate_responses == 0
    assert (config.seed, config.dtype, config.out_dtype) == (0, None, None)
    assert (config.cluster.shards, config.cluster.wait, config.cluster.hang) == ("auto", 600, "auto")
    assert config.cluster.expert.num_gpus == config.cluster.trainer.num_gpus == "auto"
    assert (config.gradients, config.gradient_checkpointing) == ("auto", False)
    assert set(config.cluster.rates.model_dump().values()) == {None}


def test_a_preset_gives_defaults_and_no_more(path: Path) -> None:
    ours, papers = (load(path, HEAD + MODELS, *preset) for preset in ([], ["preset=paper"]))
    assert ours.preset is None and papers.preset == "paper"
    assert ours.weight(ours.models[0]) is None, "ours is found on the samples"
    differ = {name for name, value in papers.parameters if value != getattr(ours.parameters, name)}
    assert differ <= set(PAPER) and "weight" in differ
    assert {name: getattr(papers.parameters, name) for name in PAPER} == PAPER
    own = load(path, HEAD + MODELS, "preset=paper", "parameters.epochs=7", "calibration.generate_responses=3")
    assert (own.parameters.epochs, own.parameters.weight, own.calibration.generate_responses) == (7, 0.1, 3)
    with refused(ConfigError, facts=["preset", "'papers'", "'paper'"]):
        load(path, HEAD + MODELS, "preset=papers")


def test_the_presets_of_the_backbones_have_the_papers_prior_and_regularization(path: Path) -> None:
    assert set(PRESETS) == set(get_args(get_args(Config.model_fields["preset"].annotation)[0]))
    for preset, numbers in {"internvl": (0.1, 5.0), "qwen2-vl": (0.3, 0.8), "mistral": (0.3, 0.8)}.items():
        config = load(path, HEAD + MODELS, f"preset=paper/{preset}")
        assert (config.weight(config.models[0]), config.parameters.regularization) == numbers
        others = {name: value for name, value in PAPER.items() if name not in ("weight", "regularization")}
        assert {name: getattr(config.parameters, name) for name in others} == others
        assert config.calibration.generate_responses == 0


def test_adamerging_runs_no_expert_whatever_the_preset(path: Path) -> None:
    for preset in ([], ["preset=paper"]):
        config = load(path, HEAD + MODELS, "merge_method=adamerging", *preset)
        assert (config.parameters.weight, config.parameters.regularization) == (0.3, 0.0)
        assert config.calibration.generate_responses == 0


@pytest.mark.parametrize(("method", "stages"), [("expert_merging", 1), ("expert_merging_pp", 2)])
def test_the_method_says_how_many_stages_there_are(path: Path, method: str, stages: int) -> None:
    assert load(path, HEAD + MODELS, f"merge_method={method}").stages == stages


def test_a_parameter_is_the_models_own_else_the_top_levels(path: Path) -> None:
    config = load(
        path,
        HEAD
        + """\
models:
  - {model: a, calibration: a.jsonl, parameters: {weight: 0.3, loss_weight: 0, samples_per_model: 2}}
  - {model: b, calibration: b.jsonl, parameters: {weight: 0.4}}
  - {model: c, calibration: c.jsonl}
parameters: {weight: 0.6, loss_weight: 2, samples_per_model: 9}
""",
    )
    assert [config.weight(expert) for expert in config.models] == [0.3, 0.4, 0.6]
    assert [config.loss_weight(expert) for expert in config.models] == [0, 2, 2]
    assert [config.samples_per_model(expert) for expert in config.models] == [2, 9, 9]


def test_an_own_weight_stands_in_for_a_top_level_one_that_is_no_prior(path: Path) -> None:
    text = HEAD + "models: [{model: a, calibration: a.jsonl, parameters: {weight: 0.3}}]\nparameters: {weight: 1.5}\n"
    config = load(path, text)
    assert config.weight(config.models[0]) == 0.3


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models/math", "math"),
        ("models/math/", "math"),
        ("math", "math"),
        ("/abs/models/math", "math"),
        ("owner/math-7B", "math-7B"),
        ("owner/math-7B@1f2e3d", "math-7B"),
        ("owner/math-7B@refs/pr/3", "math-7B"),
        ("/home/me@work/models/math", "math"),
    ],
)
def test_a_name_is_by_default_the_last_part_of_the_path(path: Path, model: str, name: str) -> None:
    config = load(path, HEAD + f"models: [{{model: '{model}', calibration: a.jsonl}}]\n")
    assert (config.models[0].name, config.models[0].model) == (name, model)


def test_a_base_listed_among_the_models_is_dropped(path: Path) -> None:
    text = HEAD + "models:\n  - model: models/base\n  - {model: models/math, calibration: math.jsonl}\n"
    assert [expert.model for expert in load(path, text).models] == ["models/math"]


def test_a_base_with_calibration_among_the_models_is_an_expert(path: Path) -> None:
    text = HEAD + "models: [{model: models/base, calibration: a.jsonl}, {model: b, calibration: b.jsonl}]\n"
    assert [expert.name for expert in load(path, text).models] == ["base", "b"]


@pytest.mark.parametrize("calibration", ["math.jsonl", "[math.jsonl]", "{path: math.jsonl}", "[{path: math.jsonl}]"])
def test_one_calibration_path_is_a_list_of_one(path: Path, calibration: str) -> None:
    config = load(path, HEAD + f"models: [{{model: a, calibration: {calibration}}}]\n")
    assert [file.path for file in config.models[0].calibration] == ["math.jsonl"]


@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("'0.5'", 0.5), ("1", 1.0)])
def test_numbers_that_yaml_takes_for_text_are_numbers(path: Path, text: str, value: float) -> None:
    assert load(path, f"{HEAD}{MODELS}parameters: {{weight_decay: {text}}}\n").parameters.weight_decay == value


@pytest.mark.parametrize(
    ("text", "value"), [("all", "all"), ("middle", "middle"), ("[0, 3]", (0, 3)), ("[]", ()), ("[-1]", (-1,))]
)
def test_hidden_layers_are_a_word_or_indices(path: Path, text: str, value: Any) -> None:
    assert load(path, f"{HEAD}{MODELS}parameters: {{hidden_layers: {text}}}\n").parameters.hidden_layers == value


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("gradients: stream", ("stream", False)),
        ("gradients: accumulate", ("accumulate", False)),
        ("gradient_checkpointing: true", ("auto", True)),
        ("gradients: stream\ngradient_checkpointing: false", ("stream", False)),
    ],
)
def test_how_the_gradient_is_held_may_be_chosen(path: Path, text: str, options: tuple[str, bool]) -> None:
    config = load(path, f"{HEAD}{MODELS}{text}\n")
    assert (config.gradients, config.gradient_checkpointing) == options


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0", 0), ("1", 1), ("64", 64)])
def test_shards_are_auto_or_a_number_that_may_be_none(path: Path, text: str, value: Any) -> None:
    assert load(path, f"{HEAD}{MODELS}cluster: {{shards: {text}}}\n").cluster.shards == value


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("1", 1), ("64", 64)])
def test_trainers_are_auto_or_a_number(path: Path, text: str, value: Any) -> None:
    assert load(path, f"{HEAD}{MODELS}cluster: {{trainers: {text}}}\n").cluster.trainers == value


@pytest.mark.parametrize("rate", Rates.model_fields)
@pytest.mark.parametrize(("text", "value"), [("12.5", 12.5), ("3", 3.0), ("1e-3", 1e-3), ("null", None)])
def test_a_rate_is_a_positive_number_and_the_others_stay_unknown(
    path: Path, rate: str, text: str, value: float | None
) -> None:
    rates = load(path, f"{HEAD}{MODELS}cluster: {{rates: {{{rate}: {text}}}}}\n").cluster.rates
    assert rates.model_dump(exclude_none=True) == ({} if value is None else {rate: value})


def test_the_rates_are_these() -> None:
    wanted = ["compute_tflops", "memory_gbs", "stream_gbs", "exchange_gbs", "network_gbs", "disk_gbs"]
    assert list(Rates.model_fields) == wanted


@pytest.mark.parametrize(
    ("text", "key", "facts"),
    [
        ("gradients: keep", "gradients", ["'keep'", "'accumulate'", "'stream'"]),
        ("gradients: null", "gradients", ["null", "'accumulate'", "'stream'"]),
        ("gradient_checkpointing: 3", "gradient_checkpointing", ["3", "boolean"]),
        ("cluster: {shards: -1}", "cluster.shards", ["-1", "auto"]),
        ("cluster: {shards: all}", "cluster.shards", ["'all'", "auto"]),
        ("cluster: {trainers: 0}", "cluster.trainers", ["0", "auto"]),
        ("cluster: {trainers: all}", "cluster.trainers", ["'all'", "auto"]),
        ("cluster: {rates: {disk_gbs: 0}}", "cluster.rates.disk_gbs", ["0.000000001"]),
        ("cluster: {rates: {network_gbs: fast}}", "cluster.rates.network_gbs", ["'fast'", "number"]),
    ],
)
def test_faults_of_gradients_shards_and_rates_name_the_accepted_values(
    path: Path, text: str, key: str, facts: list[str]
) -> None:
    with refused(ConfigError, facts=[f"{path}:6: {key} ", "\n  expected: ", *facts]):
        load(path, f"{HEAD}{MODELS}{text}\n")


def test_a_config_is_frozen(path: Path) -> None:
    config = load(path, HEAD + MODELS)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("merge_method: expert_merging\nbase_model: 3  # here\n" + MODELS, "base_model"),
        ("merge_method: expert_merging\nbase_model: ''  # here\n" + MODELS, "base_model"),
        (HEAD + "models: math  # here\n", "models"),
        (HEAD + "models: []  # here\n", "models"),
        (HEAD + "models:\n  - math  # here\n", "models.0"),
        (HEAD + "models:\n  - model: 5  # here\n    calibration: a.jsonl\n", "models.0.model"),
        (HEAD + "models:\n  - model: ''  # here\n    calibration: a.jsonl\n", "models.0.model"),
        (HEAD + "models:\n  - model: a\n    calibration: 5  # here\n", "models.0.calibration"),
        (HEAD + "models:\n  - model: a\n    calibration: [5]  # here\n", "models.0.calibration.0"),
        (HEAD + "models:\n  - model: a\n    calibration: a.jsonl\n    name: [b]  # here\n", "models.0.name"),
        *(
            (HEAD + MODELS + f"  - model: b\n    calibration: [{{path: a.json, {key}: {value}}}]  # here\n", at)
            for key, value, at in [
                ("samples", 0, "models.1.calibration.0.samples"),
                ("samples", "many", "models.1.calibration.0.samples"),
                ("loss_weight", -1, "models.1.calibration.0.loss_weight"),
                ("image_options", 3, "models.1.calibration.0.image_options"),
                ("image_options", "{max_patches: [1]}", "models.1.calibration.0.image_options.max_patches"),
            ]
        ),
        (HEAD + MODELS + "  - model: b\n    parameters: {weight: a}  # here\n", "models.1.parameters.weight"),
        *(
            (f"{HEAD}{MODELS}parameters:\n  temperature: 2\n  {text}  # here\n", f"parameters.{key}")
            for text, key in [
                ("weight: true", "weight"),
                ("weight: heavy", "weight"),
                ("weight: [0.1]", "weight"),
                ("weight: .nan", "weight"),
                ("weight: .inf", "weight"),
                (f"weight: {'9' * 400}", "weight"),
                ("loss_weight: -1", "loss_weight"),
                ("samples_per_model: 0", "samples_per_model"),
                ("samples_per_model: true", "samples_per_model"),
                ("epochs: 1.5", "epochs"),
                ("epochs: null", "epochs"),
                ("regularization: -0.1", "regularization"),
                ("learning_rate: 0", "learning_rate"),
                ("budget: {a: 1}", "budget"),
                ("fixed: stage2", "fixed"),
                ("start: 1", "start"),
                ("hidden_layers: last", "hidden_layers"),
                ("hidden_layers: 3", "hidden_layers"),
                ("hidden_layers: true", "hidden_layers"),
                ("hidden_layers: [a]", "hidden_layers"),
                ("hidden_layers: [true]", "hidden_layers"),
            ]
        ),
        *(
            (f"{HEAD}{MODELS}{text}  # here\n", key)
            for text, key in [
                ("parameters: [1]", "parameters"),
                ("parameters: null", "parameters"),
                ("calibration: 5", "calibration"),
                ("calibration: {max_length: 1}", "calibration.max_length"),
                ("calibration: {shuffle: 3}", "calibration.shuffle"),
                ("calibration: {generate_responses: -1}", "calibration.generate_responses"),
                ("exclude: '.*norm.*'", "exclude"),
                ("exclude: [a, 3]", "exclude.1"),
                ("exclude: [a, '(b']", "exclude.1"),
                ("dtype: float64", "dtype"),
                ("out_dtype: 16", "out_dtype"),
                ("seed: true", "seed"),
                ("seed: -1", "seed"),
                ("seed: 1.5", "seed"),
                ("seed: 2020-01-02", "seed"),
                (f"seed: {2**63}", "seed"),
                ("cluster: 4", "cluster"),
                ("cluster: {expert: {num_gpus: lots}}", "cluster.expert.num_gpus"),
                ("cluster: {trainer: {num_gpus: -1}}", "cluster.trainer.num_gpus"),
                ("gradients: keep", "gradients"),
                ("gradients: [stream]", "gradients"),
                ("gradients: true", "gradients"),
                ("gradient_checkpointing: 3", "gradient_checkpointing"),
                ("gradient_checkpointing: null", "gradient_checkpointing"),
                ("cluster: {shards: -1}", "cluster.shards"),
                ("cluster: {shards: 1.5}", "cluster.shards"),
                ("cluster: {rates: 5}", "cluster.rates"),
                ("cluster: {rates: null}", "cluster.rates"),
                ("cluster: {rates: {compute_tflops: -1}}", "cluster.rates.compute_tflops"),
                ("cluster: {rates: {stream_gbs: 0}}", "cluster.rates.stream_gbs"),
                ("cluster: {rates: {exchange_gbs: true}}", "cluster.rates.exchange_gbs"),
                ("cluster: {rates: {network_gbs: .inf}}", "cluster.rates.network_gbs"),
                ("cluster: {rates: {disk_gbs: [1]}}", "cluster.rates.disk_gbs"),
                ("cluster: {shards: true}", "cluster.shards"),
                ("cluster: {wait: soon}", "cluster.wait"),
                ("cluster: {hang: 0}", "cluster.hang"),
                ("cluster: {hang: never}", "cluster.hang"),
                ("record: 5", "record"),
            ]
        ),
    ],
    ids=last_line,
)
def test_a_wrong_value_is_one_fault_with_line_key_and_what_was_expected(path: Path, text: str, key: str) -> None:
    message = fault(path, text)
    assert message.startswith(f"{path}:{line_of(text)}: {key}")
    assert message.count(str(path)) == 1, "one fault is reported once"
    assert message.count("expected: ") == 1


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        (HEAD + MODELS + "parametres: {}  # here\n", "parametres", "parameters"),
        (HEAD + MODELS + "sed: 3  # here\n", "sed", "seed"),
        (HEAD + MODELS + "merge-methods: 3  # here\n", "merge-methods", "merge_method"),
        (HEAD + MODELS + "parameters:\n  weigth: 0.2  # here\n", "parameters.weigth", "weight"),
        (HEAD + MODELS + "parameters:\n  learning-rate: 1  # here\n", "parameters.learning-rate", "learning_rate"),
        (HEAD + MODELS + "parameters:\n  loss.weight: 1  # here\n", "parameters.loss.weight", "loss_weight"),
        (HEAD + MODELS + "    modle: x  # here\n", "models.0.modle", "model"),
        (HEAD + MODELS + "    parameters: {wieght: 0.2}  # here\n", "models.0.parameters.wieght", "weight"),
        (HEAD + MODELS + "calibration: {max_lenght: 9}  # here\n", "calibration.max_lenght", "max_length"),
        (
            HEAD + "models: [{model: a, calibration: {path: a.json, sample: 9}}]  # here\n",
            "models.0.calibration.0.sample",
            "samples",
        ),
        (HEAD + MODELS + "cluster: {shard: 2}  # here\n", "cluster.shard", "shards"),
        (HEAD + MODELS + "cluster: {expert: {num_gpu: 2}}  # here\n", "cluster.expert.num_gpu", "num_gpus"),
        (HEAD + MODELS + "cluster: {rates: {disk_gb: 2}}  # here\n", "cluster.rates.disk_gb", "disk_gbs"),
        (HEAD + MODELS + "gradient: stream  # here\n", "gradient", "gradients"),
    ],
    ids=last_line,
)
def test_an_unknown_key_is_reported_with_the_nearest_known_one(path: Path, text: str, key: str, near: str) -> None:
    place, advice = fault(path, text).splitlines()
    assert place.startswith(f"{path}:{line_of(text)}: ") and repr(key) in place
    assert advice.startswith("  do: ") and repr(near) in advice


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("zzzz: 1", "merge_method, base_model"),
        ("'': 1", "merge_method, base_model"),
        ("parameters: {zzzz: 1}", "temperature"),
    ],
)
def test_an_unknown_key_like_no_other_is_reported_with_all_known_ones(path: Path, text: str, known: str) -> None:
    place, advice = fault(path, f"{HEAD}{MODELS}{text}\n").splitlines()
    assert place.startswith(f"{path}:6: ")
    assert advice.startswith("  do: ") and known in advice


@pytest.mark.parametrize("key", ["1", "null", "1.5", "true", "2020-01-02", "? [a, b]\n", "? {a: b}\n"])
def test_a_key_that_is_no_text_is_a_config_error(path: Path, key: str) -> None:
    assert fault(path, f"{HEAD}{MODELS}{key}: 1\n").startswith(str(path))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("{}\n", ["merge_method", "base_model", "models"]),
        (HEAD, ["models"]),
        (HEAD + "models: [{calibration: a.jsonl}]\n", ["models.0.model"]),
    ],
    ids=last_line,
)
def test_missing_keys_are_named_and_no_other(path: Path, text: str, missing: list[str]) -> None:
    named = [re.findall(r"'(.*?)'", line) for line in fault(path, text).splitlines()]
    assert [keys for keys in named if keys] == [[key] for key in missing]


def test_at_most_five_faults_are_reported_at_once(path: Path) -> None:
    with refused(ConfigError, where=str(path), facts=["7"]) as caught:
        load(path, HEAD + MODELS + "".join(f"zzzz{number}: 1\n" for number in range(7)))
    assert str(caught.value).count("'zzzz") == 5


def test_a_single_fault_has_its_place(path: Path) -> None:
    with refused(ConfigError, where=f"{path}:6", do="'seed'"):
        load(path, HEAD + MODELS + "sead: 1\n")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hush@bucket/a",
        "s3://AKIA:hu/sh@bucket/a",
        "gs://bucket/a?access_token=hush",
        "s3://b/a+s3://k:hush@b/c",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(path: Path, uri: str) -> None:
    model = f"{HEAD}models: [{{model: '{uri}', calibration: a.jsonl}}]\n"
    calibration = MODELS + f"  - {{model: x, calibration: ['{uri}']}}\n"
    for text, line in ((model, 3), (HEAD + calibration, 6)):
        with refused(ConfigError, where=f"{path}:{line}") as caught:
            load(path, text)
        assert "hush" not in str(caught.value)
    with refused(ConfigError, where=str(path)) as caught:
        load(path, HEAD + MODELS, f"base_model={uri}")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (HEAD + MODELS + "seed: 1\nseed: 2  # here\n", "'seed'"),
        (HEAD + MODELS + "parameters:\n  weight: 0.1\n  weight: 0.1  # here\n", "'weight'"),
        (HEAD + MODELS + "parameters: {kappa: 1, 'kappa': 2}  # here\n", "'kappa'"),
        (HEAD + MODELS + "\tseed: 1  # here\n", "\\t"),
        (HEAD + MODELS + "seed: *unknown  # here\n", "alias 'unknown'"),
        (HEAD + MODELS + "seed: !!python/object:os.system {}  # here\n", "python/object:os.system"),
        (HEAD + MODELS + "---\nseed: 1  # here\n", "another document"),
        (HEAD + "models: [  # here", "<stream end>"),
    ],
)
def test_text_that_is_no_yaml_is_reported_with_its_line(path: Path, text: str, problem: str) -> None:
    with refused(ConfigError, where=f"{path}:{line_of(text)}", facts=["YAML", problem]):
        load(path, text)


@pytest.mark.parametrize(
    "text", ["seed: 2020-13-45", "seed: 0x_", f"seed: {'1' * 5000}", "seed: !!int abc"], ids=last_line
)
def test_a_value_that_yaml_cannot_make_is_a_config_error(path: Path, text: str) -> None:
    assert fault(path, f"{HEAD}{MODELS}{text}\n").startswith(str(path))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: \x00", "#x0000"),
        ("seed: \x1b[0m", "#x001b"),
        ("a: " + "[" * 3000 + "]" * 3000, f"{DEPTH} levels"),
    ],
    ids=["NUL", "escape", "nested"],
)
def test_faults_of_yaml_name_the_character_or_the_bound(path: Path, text: str, problem: str) -> None:
    with refused(ConfigError, where=str(path), facts=["YAML", problem]):
        load(path, HEAD + MODELS + text)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "merge\n", "3\n"])
def test_a_config_that_is_no_mapping_is_a_config_error(path: Path, text: str) -> None:
    with refused(ConfigError, facts=["mapping", "`merge_method: …`"]) as caught:
        load(path, text)
    assert caught.value.where == str(path)


def test_a_config_that_is_not_utf8_is_a_config_error(path: Path) -> None:
    path.write_bytes(b"merge_method: \xff\xfe")
    with refused(ConfigError, where=str(path), facts=["UTF-8"]):
        load_config(path)


def test_a_config_that_cannot_be_read_is_a_config_error(path: Path) -> None:
    with refused(ConfigError, where=str(path), facts=[os.strerror(errno.ENOENT)]):
        load_config(path)
    path.mkdir()
    with refused(ConfigError, where=str(path), facts=[os.strerror(errno.EISDIR)]):
        load_config(path)


def test_yaml_anchors_and_merge_keys_may_be_used(path: Path) -> None:
    text = f"{HEAD}models:\n  - &first {{model: a, calibration: a.jsonl}}\n  - {{<<: *first, model: b, name: b}}\n"
    models = load(path, text).models
    assert [(expert.model, [file.path for file in expert.calibration]) for expert in models] == [
        ("a", ["a.jsonl"]),
        ("b", ["a.jsonl"]),
    ]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("  - model: other/math  # here\n    calibration: b.jsonl\n", ["'math'", "`name`"]),
        ("  - {model: b, name: math, calibration: b.jsonl}  # here\n", ["'math'", "`name`"]),
        ("  - model: b  # here\n", ["'b'", "`calibration: FILE`"]),
        ("  - {model: b, calibration: []}  # here\n", ["'b'", "`calibration: FILE`"]),
        *(
            (
                f"  - {{model: b, calibration: b.jsonl, parameters: {{weight: {weight}}}}}  # here\n",
                ["'b'", "`weight`", str(float(weight))],
            )
            for weight in ("0", "1", "-0.1", "1.5")
        ),
    ],
)
def test_faults_that_span_several_keys_are_reported_with_the_experts_line(
    path: Path, text: str, facts: list[str]
) -> None:
    text = HEAD + MODELS + text
    with refused(ConfigError, where=f"{path}:{line_of(text)}", facts=facts):
        load(path, text)


def test_a_top_level_prior_outside_0_to_1_is_reported_with_the_expert(path: Path) -> None:
    with refused(ConfigError, where=str(path), facts=["'math'", "1.0", "`weight`"]):
        load(path, HEAD + MODELS + "parameters: {weight: 1}\n")


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ("  - model: a\n    calibration: a.jsonl\n    modle: x  # here\n", "models.1.modle"),
        ("  - model: a\n    calibration: 5  # here\n", "models.1.calibration"),
        ("  - model: a  # here\n", "`calibration: FILE`"),
        ("  - {model: a, calibration: a.jsonl, parameters: {weight: 2}}  # here\n", "`weight`"),
    ],
    ids=last_line,
)
def test_a_base_among_the_models_does_not_shift_the_lines_of_faults(path: Path, entry: str, key: str) -> None:
    text = HEAD + "models:\n  - model: models/base\n" + entry
    message = fault(path, text)
    assert message.startswith(f"{path}:{line_of(text)}: ")
    assert key in message


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda config: config.seed == 7),
        ("parameters.weight=0.4", lambda config: config.parameters.weight == 0.4),
        ("parameters={weight: 0.4}", lambda config: config.parameters.weight == 0.4),
        ("parameters.hidden_layers=[1, 2]", lambda config: config.parameters.hidden_layers == (1, 2)),
        ("models.0.name=sums", lambda config: config.models[0].name == "sums"),
        ("models.0.parameters.weight=0.4", lambda config: config.weight(config.models[0]) == 0.4),
        ("models.0.calibration=a=b.jsonl", lambda config: config.models[0].calibration[0].path == "a=b.jsonl"),
        ("gradients=stream", lambda config: config.gradients == "stream"),
        ("cluster.rates.disk_gbs=2.5", lambda config: config.cluster.rates.disk_gbs == 2.5),
        ("cluster.expert.num_gpus=0", lambda config: config.cluster.expert.num_gpus == 0),
        ("exclude=[]", lambda config: config.exclude == ()),
        ("dtype=", lambda config: config.dtype is None),
    ],
)
def test_an_override_sets_a_key(path: Path, override: str, read: Any) -> None:
    assert read(load(path, HEAD + MODELS, override))


def test_overrides_apply_in_order_and_before_lookup(path: Path) -> None:
    assert load(path, HEAD + MODELS, "seed=1", "seed=2").seed == 2
    assert load(path, HEAD + MODELS, "models.0.model=x/y").models[0].name == "y"


@pytest.mark.parametrize(
    "override",
    [
        "seed",
        "=1",
        ".=1",
        "seed.=1",
        "parameters..weight=1",
        "models.1.name=x",
        "models.1=x",
        "models.-1.name=x",
        "models.name=x",
        "models.².name=x",
        "base_model.sub.sub=1",
        "seed=[",
        "seed=2020-13-45",
        "seed=" + "[" * 3000,
    ],
    ids=last_line,
)
def test_an_override_that_cannot_be_applied_is_named(path: Path, override: str) -> None:
    assert f"--set {override}"[:40] in fault(path, HEAD + MODELS, override)


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("parameters.weigth=0.2", ["'parameters.weigth'", "'weight'"]),
        ("parameters.0=1", ["parameters.0"]),
        ("seed=abc", ["seed", "'abc'"]),
        ("base_model=", ["base_model", "null"]),
        ("parameters.weight=2", ["'math'", "`weight`"]),
    ],
)
def test_a_fault_in_an_override_is_reported_like_any_other(path: Path, override: str, facts: list[str]) -> None:
    with refused(ConfigError, facts=facts):
        load(path, HEAD + MODELS, override)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"parameters": {"hidden_layers": "all", "weight_decay": "1e-7"}, "dtype": "float16", "out_dtype": "bfloat16"},
    {"parameters": {"hidden_layers": [1, 3]}, "exclude": [".*norm.*", "été"], "seed": 2**63 - 1},
    {"cluster": {"expert": {"num_gpus": 0.5}, "shards": 3, "wait": 1e9}, "calibration": {"shuffle": True}},
    {"gradients": "stream", "gradient_checkpointing": True, "cluster": {"shards": 0, "rates": {"stream_gbs": 1.5}}},
    {"record": {"identity": "…", "versions": {"torch": "2"}}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_resolved_config_runs_from_anywhere_and_resolves_to_itself(
    tmp_path: Path, llama_merge: Path, options: dict[str, Any]
) -> None:
    path = shutil.copytree(llama_merge.parent, tmp_path / "merge") / "merge.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(llama_merge.read_text()) | options), encoding="utf-8")
    plan = plan_of(path)
    resolved = resolved_config(plan)
    elsewhere = tmp_path / "config.yaml"
    elsewhere.write_text(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), encoding="utf-8")
    again = plan_of(elsewhere)
    assert resolved_config(again) == resolved
    assert (again.base, again.experts, again.merged) == (plan.base, plan.experts, plan.merged)
    unchanged = {"base_model", "models", "record"}
    assert again.config.model_dump(exclude=unchanged) == plan.config.model_dump(exclude=unchanged)


KEYS = [
    *(key for key in Config.model_fields if key not in INTERNAL),
    "model",
    "name",
    "weight",
    "hidden_layers",
    "shards",
    "num_gpus",
    "expert",
    "max_length",
    "rates",
]
VALID: dict[str, Any] = {
    "merge_method": "expert_merging",
    "base_model": "base",
    "models": [{"model": "a", "calibration": ["a.jsonl"], "parameters": {"weight": 0.3}}, {"model": "base"}],
    "parameters": {"hidden_layers": [1]},
    "exclude": ["a"],
    "cluster": {"expert": {"num_gpus": 1}, "shards": 2, "rates": {"disk_gbs": 2.0, "network_gbs": 1}},
    "calibration": {"shuffle": True},
}
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("auto")
json_like = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def is_config_or_config_error(raw: dict[Any, Any]) -> bool:
    try:
        return isinstance(parse_config(raw, Path("merge.yaml")), Config)
    except ConfigError as error:
        return str(error).startswith("merge.yaml")


@PROPERTY
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), json_like, max_size=5))
@example({"": 1})
@example({"a-b": 1})
def test_any_mapping_is_a_config_or_a_config_error(raw: dict[str, Any]) -> None:
    assert is_config_or_config_error(raw)


@PROPERTY
@given(st.data())
def test_a_config_with_anything_in_the_place_of_a_part_is_one_or_a_config_error(data: st.DataObject) -> None:
    raw = copy.deepcopy(VALID)
    target: Any = raw
    while True:
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(target[key], dict | list) or not target[key] or data.draw(st.booleans()):
            break
        target = target[key]
    target[key] = data.draw(json_like)
    assert is_config_or_config_error(raw)


@PROPERTY
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_any_file_is_a_config_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    with pytest.raises(ConfigError):
        load_config(path)


SPACE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "slices": [{"sources": [{"model": "a", "layer_range": [0, 3], "parameters": {"weight": [0.1, 0.2]}}]}],
    "parameters": {"density": {"filter": "mlp", "value": 0.5}},
    "tokenizer": {"source": "base"},
}
FILES = [yaml.safe_dump(raw, sort_keys=False).encode() for raw in (VALID, SPACE)]
PIECES = [
    *(b"&a ", b"*a", b"<<: *a", b"!!int ''", b"!!map [", b"!x ", b"---\n", b"? ", b"- ", b": ", b"{", b"}", b"[", b"]"),
    *(
        b"\t",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\n",
        b"\n  ",
        b"|",
        b">",
        b"'",
        b'"\\ud800"',
        b"#",
        b"0x" + b"f" * 5000,
    ),
    *(b"1" + b":1" * 500, b"1" + b":1" * 500 + b".5", b"2020-13-45", b".nan", b".inf", b"1e400", b"null", b"~", b"yes"),
]


@st.composite
def spoilt_files(draw: st.DrawFn) -> bytes:
    """Return a valid config file with parts removed, repeated or replaced."""
    content = draw(st.sampled_from(FILES))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 12)))
        piece = draw(st.sampled_from([*PIECES, b"", content[start:stop] * 2]) | st.binary(max_size=3))
        content = content[:start] + piece + content[stop:]
    return content


def is_config_or_refused(path: Path, *overrides: str) -> bool:
    try:
        return isinstance(load_config(path, overrides), Config)
    except ConfigError as error:
        return str(error).startswith((str(path), "--set")) and len(str(error)) < 5000


@pytest.mark.thorough
@FUZZ
@given(spoilt_files())
def test_a_spoilt_config_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "spoilt.yaml"
    path.write_bytes(content)
    assert is_config_or_refused(path)


@pytest.mark.thorough
@FUZZ
@given(st.sampled_from([VALID, SPACE]), st.sampled_from(KEYS) | st.just("slices"), json_like)
def test_any_value_of_any_key_in_a_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any], key: str, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-value.yaml"
    path.write_text(yaml.safe_dump(raw | {key: value}, allow_unicode=True), encoding="utf-8")
    assert is_config_or_refused(path)


@pytest.mark.thorough
@FUZZ
@given(
    st.lists(st.sampled_from([*KEYS, "0", "1", "-1", "9" * 5000, "", "."]) | st.text(max_size=3), max_size=4),
    st.sampled_from([piece.decode("latin-1") for piece in PIECES]) | st.text(max_size=12),
)
def test_any_override_is_applied_or_refused(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], value: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "override.yaml"
    path.write_bytes(FILES[0])
    assert is_config_or_refused(path, f"{'.'.join(keys)}={value}")


def test_statistics_and_the_state_of_a_training_are_not_both_given(llama_merge: Path) -> None:
    both = ("merge_method=fisher", "models.0.statistics=folder", "models.0.optimizer_state=optimizer.pt")
    with refused(ConfigError, facts=["expert0"], do="remove one"):
        load_config(llama_merge, both)
    load_config(llama_merge, both[:2]), load_config(llama_merge, (both[0], both[2]))


def test_statistics_that_a_method_does_not_use_are_listed(llama_merge: Path) -> None:
    given = ("models.0.statistics=folder", "base_statistics=folder", "models.1.optimizer_state=optimizer.pt")
    named = {"models[].statistics", "models[].optimizer_state", "base_statistics"}
    assert named <= set(load_config(llama_merge, ("merge_method=ties", *given)).unused)
    assert not named & set(load_config(llama_merge, ("merge_method=lewis", *given)).unused)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "end ", "Merge", "base", "é" * 200])
def test_a_name_that_cannot_be_a_folder_s_is_refused_by_stats(llama_merge: Path, name: str) -> None:
    config = load_config(llama_merge)
    models = (config.models[0].model_copy(update={"name": name}), *config.models[1:])
    with refused(ConfigError, do="another `name`"):
        collected(config.model_copy(update={"models": models}), ("gram",), False, "config")
