"""Hostile configs and overrides through the command line; more in `test_hostile`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hostile import Server, refused
from hostile_inputs import (
    MB,
    Cases,
    Spoil,
    add,
    bomb,
    cases,
    edit,
    expert,
    layers,
    link,
    make_folder,
    many_models,
    merge_keys,
    put,
    weight_space,
)

NAN, INF = float("nan"), float("inf")

LAST = "merge.yaml:20"
CONFIGS: Cases = {
    "billion laughs": (lambda f: add(f, bomb("exclude")), ["merge.yaml:26", "100,000 values"]),
    "billion laughs as a number": (lambda f: add(f, bomb("seed")), ["merge.yaml:26", "100,000 values"]),
    "merge keys that multiply": (lambda f: add(f, merge_keys()), ["merge.yaml:26", "100,000 values"]),
    "list in itself": (lambda f: add(f, "exclude: &a [*a]"), [LAST, "alias 'a'"]),
    "mapping in itself": (lambda f: add(f, "record: &a {b: *a}"), [LAST, "alias 'a'"]),
    "merge key of itself": (lambda f: add(f, "record: &a {<<: *a}"), [LAST, "alias 'a'"]),
    "10 MB number": (lambda f: add(f, f"seed: {'1' * 10 * MB}"), ["merge.yaml: ", "10,486,117", "4,194,304"]),
    "10 MB text": (lambda f: add(f, f"seed: '{'x' * 10 * MB}'"), ["merge.yaml: ", "10,486,119", "4,194,304"]),
    "1 MB name": (lambda f: expert(f, name="x" * MB), ["merge.yaml:13", "1,048,576"]),
    "100,000 open lists": (lambda f: add(f, f"seed: {'[' * 100_000}"), [LAST, "nested"]),
    "200 lists": (lambda f: add(f, f"record: {{a: {'[' * 200}{']' * 200}}}"), [LAST, "nested"]),
    "UTF-16": (lambda f: put(f, "merge.yaml", "a: b".encode("utf-16")), ["merge.yaml: ", "UTF-8"]),
    "UTF-16 without a mark": (lambda f: put(f, "merge.yaml", "a: b".encode("utf-16-le")), ["merge.yaml: ", "#x0000"]),
    "4 MB of NUL": (lambda f: put(f, "merge.yaml", bytes(4 * MB)), ["merge.yaml: ", "#x0000"]),
    "tab": (lambda f: add(f, "\tseed: 1"), [LAST, "'\\t'"]),
    "Latin-1": (lambda f: put(f, "merge.yaml", "base_model: é".encode("latin-1")), ["merge.yaml: ", "UTF-8"]),
    "call of Python": (lambda f: add(f, "seed: !!python/object/apply:os.mkdir [x]"), [LAST, "apply:os.mkdir"]),
    "name of Python": (lambda f: add(f, "seed: !!python/name:os.system"), [LAST, "name:os.system"]),
    "tag of its own": (lambda f: add(f, "seed: !include /etc/passwd"), [LAST, "tag", "!include"]),
    "whole number of nothing": (lambda f: add(f, "seed: !!int ''"), [LAST, "tag:yaml.org,2002:int"]),
    "truth of something": (lambda f: add(f, "seed: !!bool maybe"), [LAST, "tag:yaml.org,2002:bool"]),
    "mapping of a list": (lambda f: add(f, "seed: !!map [x]"), [LAST, "tag:yaml.org,2002:map"]),
    "set": (lambda f: add(f, "exclude: !!set {a, b}"), [LAST, "tag:yaml.org,2002:set"]),
    "hexadecimal of 6,000 digits": (lambda f: add(f, f"seed: 0x{'f' * 6000}"), [LAST, "6,002"]),
    "number to base 60": (lambda f: add(f, f"seed: 1{':1' * 400_000}"), [LAST, "800,001"]),
    "fraction to base 60": (lambda f: add(f, f"seed: 1{':1' * 400}.5"), ["merge.yaml: ", "YAML", "float"]),
    "not a number": (
        lambda f: edit(f, parameters={"temperature": NAN}),
        ["merge.yaml:14", "parameters.temperature", "nan", "finite"],
    ),
    "infinity": (lambda f: edit(f, parameters={"budget": INF}), ["merge.yaml:14", "parameters.budget", "inf"]),
    "budget without a chunk": (lambda f: edit(f, parameters={"budget": 1e-9}), ["parameters.budget", "1e-09"]),
    "budget above the elements": (lambda f: edit(f, parameters={"budget": 1e6}), ["parameters.budget", "1e+06"]),
    "budget that overflows": (lambda f: edit(f, parameters={"budget": 1e308}), ["budget", "1e+308", "1000000"]),
    "samples beyond all bounds": (
        lambda f: edit(f, parameters={"samples_per_model": 10**30}),
        ["merge.yaml:14", "samples_per_model", f"{10**30}"],
    ),
    "layer beyond all bounds": (
        lambda f: edit(f, parameters={"hidden_layers": [10**30]}),
        ["merge.yaml:14", "hidden_layers", f"[{10**30}]"],
    ),
    "date": (lambda f: add(f, "seed: 2001-01-01"), [LAST, "seed", "datetime.date(2001, 1, 1)"]),
    "date as a key": (lambda f: add(f, "2001-01-01: 1"), [LAST, "YAML", "a key"]),
    "nothing as a key": (lambda f: add(f, "null: 1"), [LAST, "YAML", "a key"]),
    "list for a mapping": (lambda f: add(f, "calibration: [a]"), [LAST, "calibration", "['a']"]),
    "mapping for a list": (lambda f: edit(f, models={"model": "a"}), ["merge.yaml:4", "models", "{'model': 'a'}"]),
    "list at the top": (lambda f: put(f, "merge.yaml", "- seed: 1\n"), ["merge.yaml:1: ", "mapping", "merge_method"]),
    "two documents": (lambda f: add(f, "---\na: 1"), ["merge.yaml:21: ", "`name`"]),
    "100,000 models": (lambda f: put(f, "merge.yaml", many_models()), ["merge.yaml:33335", "100,000 values"]),
    "10,000 faults": (
        lambda f: put(f, "merge.yaml", many_models("  kex: 1\n")),
        ["merge.yaml:5", "'models.0.kex'", "10,000"],
    ),
    "lines in a name": (lambda f: expert(f, name="a\n# b"), ["merge.yaml:13", "'\\n'"]),
    "colours in a name": (lambda f: add(f, 'tokenizer_source: "\\e[31m"'), [LAST, "'\\x1b'"]),
    "NUL in a path": (lambda f: expert(f, model="a\0b"), ["merge.yaml:9", "'\\x00'"]),
    "name that runs backwards": (lambda f: expert(f, name="a\u202eb"), ["merge.yaml:13", "'\\u202e'"]),
    "half a character": (lambda f: add(f, 'tokenizer_source: "\\uD800"'), [LAST, "'\\ud800'"]),
    "name that leaves the folder": (
        lambda f: weight_space(f, merge_method="svd_intermediate", models=[{"model": "expert0", "name": "../../x"}]),
        ["models: ", "'../../x'", "`name`"],
    ),
    "model outside": (lambda f: expert(f, model="../../../../../../../etc"), ["/etc/config.json", "No such file"]),
    "model that is a device": (lambda f: expert(f, model="/dev/null"), ["/dev/null: ", "config.json"]),
    "pattern that never ends": (lambda f: edit(f, exclude=["(.*)*!"]), ["exclude", "too long"]),
    "20,000 patterns": (lambda f: edit(f, exclude=[f"x{i}" for i in range(20_000)]), ["exclude", "too long"]),
    "pattern of 2,000 groups": (lambda f: edit(f, exclude=["(" * 2000 + ")" * 2000]), ["exclude.0", "recursion"]),
    "pattern that overflows": (lambda f: edit(f, exclude=["a{99999999999}"]), ["exclude.0", "too large"]),
    "layers that are lists": (lambda f: layers(f, [[0], {}]), ["merge.yaml", "layer_range", "`models`"]),
    "layers that are text": (lambda f: layers(f, [0, "x"]), ["merge.yaml", "layer_range", "`models`"]),
    "layers that are no number": (lambda f: layers(f, [0, NAN]), ["merge.yaml", "layer_range", "`models`"]),
    "half a layer": (lambda f: layers(f, [0, 3.5]), ["merge.yaml", "layer_range", "`models`"]),
    "list in a list": (
        lambda f: weight_space(f, parameters={"weight": [[0.5]]}),
        ["merge.yaml:7", "parameters.weight", "list"],
    ),
    "filter that is a list": (
        lambda f: weight_space(f, parameters={"weight": [{"filter": ["a"], "value": 1}]}),
        ["merge.yaml:7", "parameters.weight", "`filter`"],
    ),
    "method of 4,000 letters": (lambda f: edit(f, merge_method="x" * 4000), ["merge.yaml:1", "method", "'xxx", "xx…"]),
}

# Config paths that are not regular files, and the facts that the message must contain.
PLACES: dict[str, tuple[Spoil, list[str]]] = {
    "pipe": (lambda f: os.mkfifo(f / "c.yaml"), ["in/c.yaml"]),
    "folder": (lambda f: make_folder(f, "c.yaml"), ["in/c.yaml"]),
    "endless device": (lambda f: link(f, "c.yaml", "/dev/zero"), ["in/c.yaml"]),
    "empty device": (lambda f: link(f, "c.yaml", "/dev/null"), ["in/c.yaml"]),
    "link to nothing": (lambda f: link(f, "c.yaml", "gone"), ["in/c.yaml"]),
    "link to itself": (lambda f: link(f, "c.yaml", "c.yaml"), ["in/c.yaml"]),
}

# Numbers and names that are valid by their type.
ABSURD = {
    "cluster.shards=1e12": ["cluster.shards", "10,000"],
    "cluster.shards=1000000000000": ["cluster.shards", "10,000"],
    "cluster.expert.num_gpus=1.0e+300": ["cluster.expert.num_gpus", "1,024"],
    "cluster.trainer.num_gpus=1.5": ["cluster.trainer.num_gpus", "1.5"],
    "cluster.trainer.num_gpus=1.0e-9": ["cluster.trainer.num_gpus", "0.0001"],
    "cluster.wait=1.0e+300": ["cluster.wait", "1000000000"],
    "cluster.rates.compute_tflops=1.0e-300": ["cluster.rates.compute_tflops", "0.000000001"],
    "cluster.rates.stream_gbs=1.0e+300": ["cluster.rates.stream_gbs", "1000000000"],
    "cluster.rates.disk_gbs=1.0e-320": ["cluster.rates.disk_gbs", "0.000000001"],
    f"parameters.samples_per_model={2**63 - 1}": ["parameters.samples_per_model", "1000000"],
    f"models.0.parameters.samples_per_model={2**63 - 1}": ["models.0.parameters.samples_per_model", "1000000"],
    f"parameters.gradient_accumulation={2**63 - 1}": ["parameters.gradient_accumulation", "1000000"],
    f"parameters.epochs={2**62}": ["parameters.epochs", "10000"],
    f"batch_tokens={2**63 - 1}": ["batch_tokens", "10,000,000"],
    f"calibration.max_length={2**63 - 1}": ["calibration.max_length", "10000000"],
    f"calibration.generate_responses={2**63 - 1}": ["calibration.generate_responses", "10000000"],
    "max_shard_size=99999999999999999999TB": ["max_shard_size", "5GB"],
    "parameters.temperature=1.0e-300": ["parameters.temperature", "0.001"],
    "parameters.temperature=1.0e+300": ["parameters.temperature", "1000"],
    "parameters.learning_rate=1.0e+308": ["parameters.learning_rate", "1000000"],
    "parameters.kappa=1.0e+300": ["parameters.kappa", "100"],
    "parameters.hidden_weight=1.0e+300": ["parameters.hidden_weight", "1000000"],
    "parameters.regularization=1.0e+300": ["parameters.regularization", "1000000"],
    "models.0.parameters.loss_weight=1.0e+300": ["models.0.parameters.loss_weight", "1000000"],
    "models.0.name=' '": ["models.0.name", "255"],
    f"models.0.name={'x' * 256}": ["models.0.name", "255"],
}

LAUGHS = ["&a0 [x, x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
FORM = "key.sub=value"
OVERRIDES = {
    "nothing": ("", ["--set", FORM]),
    "no value": ("x" * 100_000, ["--set xxx", "xx…", FORM]),
    "two lines": ("a\nb", ["--set 'a\\nb'", FORM]),
    "call of Python": ("seed=!!python/object/apply:os.mkdir [x]", ["--set seed=", "tag:yaml.org,2002:python/object"]),
    "list in itself": ("seed=&a [*a]", ["--set seed=", "alias 'a'"]),
    "billion laughs": ("seed=[" + ", ".join(LAUGHS) + "]", ["--set seed=", "100,000 values"]),
    "index of 5,000 digits": (f"models.{'9' * 5000}.name=x", ["--set models.999", FORM]),
    "5,000 keys": (f"seed{'.a' * 5000}=1", ["--set seed.a.a", FORM]),
    "30 keys": (f"seed{'.a' * 30}=1", ["merge.yaml: ", "seed", "{'a': {'a': "]),
    "100,000 letters": (f"seed={'x' * 100_000}", ["--set seed=xxx", "100,000"]),
    "hexadecimal of 5,000 digits": (f"seed=0x{'f' * 5000}", ["--set seed=0xfff", "5,002"]),
    "fraction to base 60": (f"seed=1{':1' * 400}.5", ["--set seed=1:1", "YAML", "float"]),
    "whole number of nothing": ("seed=!!int ''", ["--set seed=", "tag:yaml.org,2002:int"]),
    "two documents": ("seed=1\n---\n2", ["--set 'seed=", "another document"]),
    "key twice": ("parameters={weight: 0.1, weight: 0.2}", ["--set parameters=", "key 'weight'"]),
    "no UTF-8": ("seed=\udcff", ["--set 'seed=", "#xdcff"]),
    "list as a key": ("seed={[a]: b}", ["--set seed=", "YAML", "a key"]),
}


@pytest.fixture
def folder(llama_merge: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a merge, for the test to corrupt."""
    return shutil.copytree(llama_merge.parent, tmp_path / "in")


@cases(
    every=3,
    thorough=[
        "1 MB name",
        "10,000 faults",
        "100,000 models",
        "20,000 patterns",
        "method of 4,000 letters",
        "pattern that never ends",
    ],
    config=CONFIGS,
)
def test_hostile_configs_are_refused_by_a_plan(planner: Server, folder: Path, spoil: Spoil, facts: list[str]) -> None:
    spoil(folder)
    refused(planner.run("plan", "merge.yaml", cwd=folder), facts)


@cases(config=PLACES)
def test_a_config_that_is_no_file_is_refused(planner: Server, folder: Path, spoil: Spoil, facts: list[str]) -> None:
    spoil(folder)
    refused(planner.run("plan", "c.yaml", cwd=folder), [*facts, "config file"])


@pytest.mark.parametrize("name", ["", "x" * 300, "/proc/self/fd/0", "base/../../../../../../../../dev/tty"])
def test_a_name_of_no_file_is_refused(planner: Server, folder: Path, name: str) -> None:
    refused(planner.run("plan", name, cwd=folder), [name or "in: ", "config file"])


@pytest.mark.parametrize(("override", "facts"), ABSURD.items(), ids=[key[:40] for key in ABSURD])
def test_an_absurd_number_or_name_is_refused(planner: Server, folder: Path, override: str, facts: list[str]) -> None:
    refused(planner.run("plan", "merge.yaml", "--set", override, cwd=folder), ["merge.yaml", *facts])


def test_the_largest_numbers_are_planned(planner: Server, folder: Path) -> None:
    largest = ["cluster.shards=10000", "cluster.wait=1000000000", "parameters.samples_per_model=1000000"]
    largest += ["batch_tokens=10000000", "calibration.max_length=10000000", f"models.0.name={'x' * 255}"]
    ended = planner.run("plan", "merge.yaml", *(f"--set={each}" for each in largest), cwd=folder)
    assert ended.code == 0, ended
    assert ended.seconds < 10


@pytest.mark.parametrize(("override", "facts"), OVERRIDES.values(), ids=list(OVERRIDES))
def test_a_hostile_override_is_refused(planner: Server, folder: Path, override: str, facts: list[str]) -> None:
    refused(planner.run("plan", "merge.yaml", "--set", override, cwd=folder), facts)
