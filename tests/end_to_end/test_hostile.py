"""Hostile input through the command line: exit code 2, one clear message, soon, in little memory, and nothing left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hostile import Server, refused
from hostile_inputs import (
    MB,
    Cases,
    Q,
    Spoil,
    add,
    bomb,
    cases,
    edit,
    edit_configs,
    edit_json,
    expert,
    index,
    integers,
    layers,
    link,
    make_folder,
    many_models,
    merge_keys,
    move_out,
    named_twice,
    pipe,
    put,
    tensor,
    weight_space,
    weights,
)

NAN, INF = float("nan"), float("inf")

CONFIGS: Cases = {
    "billion laughs": (lambda f: add(f, bomb("exclude")), ["merge.yaml:", "more than 100,000 values"]),
    "billion laughs as a number": (lambda f: add(f, bomb("seed")), ["merge.yaml:", "more than 100,000 values"]),
    "merge keys that multiply": (lambda f: add(f, merge_keys()), ["merge.yaml:", "more than 100,000 values"]),
    "list in itself": (lambda f: add(f, "exclude: &a [*a]"), ["merge.yaml:20", "what it is part of"]),
    "mapping in itself": (lambda f: add(f, "record: &a {b: *a}"), ["merge.yaml:20", "what it is part of"]),
    "merge key of itself": (lambda f: add(f, "record: &a {<<: *a}"), ["merge.yaml:20", "what it is part of"]),
    "10 MB number": (
        lambda f: add(f, f"seed: {'1' * 10 * MB}"),
        ["merge.yaml: the config has 10,", "at most 4,194,304"],
    ),
    "10 MB text": (lambda f: add(f, f"seed: '{'x' * 10 * MB}'"), ["merge.yaml: the config has 10,"]),
    "1 MB name": (lambda f: expert(f, name="x" * MB), ["merge.yaml:", "a value of 1,048,576 characters"]),
    "100,000 open lists": (lambda f: add(f, f"seed: {'[' * 100_000}"), ["merge.yaml:20", "nested too deeply"]),
    "200 lists": (lambda f: add(f, f"record: {{a: {'[' * 200}{']' * 200}}}"), ["merge.yaml:20", "nested too deeply"]),
    "UTF-16": (lambda f: put(f, "merge.yaml", "a: b".encode("utf-16")), ["merge.yaml", "not UTF-8"]),
    "UTF-16 without a mark": (lambda f: put(f, "merge.yaml", "a: b".encode("utf-16-le")), ["merge.yaml", "#x0000"]),
    "4 MB of NUL": (lambda f: put(f, "merge.yaml", bytes(4 * MB)), ["merge.yaml", "#x0000"]),
    "tab": (lambda f: add(f, "\tseed: 1"), ["merge.yaml:20", "'\\t'"]),
    "Latin-1": (lambda f: put(f, "merge.yaml", "base_model: é".encode("latin-1")), ["merge.yaml", "not UTF-8"]),
    "call of Python": (lambda f: add(f, "seed: !!python/object/apply:os.mkdir [x]"), ["merge.yaml:20", "a tag"]),
    "name of Python": (lambda f: add(f, "seed: !!python/name:os.system"), ["merge.yaml:20", "a tag"]),
    "tag of its own": (lambda f: add(f, "seed: !include /etc/passwd"), ["merge.yaml:20", "a tag (!include)"]),
    "whole number of nothing": (lambda f: add(f, "seed: !!int ''"), ["merge.yaml:20", "a tag"]),
    "truth of something": (lambda f: add(f, "seed: !!bool maybe"), ["merge.yaml:20", "a tag"]),
    "mapping of a list": (lambda f: add(f, "seed: !!map [x]"), ["merge.yaml:20", "a tag"]),
    "set": (lambda f: add(f, "exclude: !!set {a, b}"), ["merge.yaml:20", "a tag"]),
    "hexadecimal of 6,000 digits": (lambda f: add(f, f"seed: 0x{'f' * 6000}"), ["merge.yaml:20", "6,002 characters"]),
    "number to base 60": (lambda f: add(f, f"seed: 1{':1' * 400_000}"), ["merge.yaml:20", "800,001 characters"]),
    "fraction to base 60": (lambda f: add(f, f"seed: 1{':1' * 400}.5"), ["merge.yaml", "not valid YAML"]),
    "not a number": (lambda f: edit(f, parameters={"temperature": NAN}), ["merge.yaml:14", "is nan", "finite"]),
    "infinity": (lambda f: edit(f, parameters={"budget": INF}), ["merge.yaml:14", "is inf", "finite"]),
    "budget that overflows": (lambda f: edit(f, parameters={"budget": 1e308}), ["budget is 1e+308", "1000000"]),
    "samples beyond all bounds": (
        lambda f: edit(f, parameters={"samples_per_model": 10**30}),
        ["samples_per_model is"],
    ),
    "layer beyond all bounds": (lambda f: edit(f, parameters={"hidden_layers": [10**30]}), ["hidden_layers is [1000"]),
    "date": (lambda f: add(f, "seed: 2001-01-01"), ["merge.yaml:20", "seed is datetime.date"]),
    "date as a key": (lambda f: add(f, "2001-01-01: 1"), ["merge.yaml:20", "a key is not a text"]),
    "nothing as a key": (lambda f: add(f, "null: 1"), ["merge.yaml:20", "a key is not a text"]),
    "list for a mapping": (lambda f: add(f, "calibration: [a]"), ["merge.yaml:20: calibration is ['a']"]),
    "mapping for a list": (lambda f: edit(f, models={"model": "a"}), ["merge.yaml:4: models is {'model': 'a'}"]),
    "list at the top": (lambda f: put(f, "merge.yaml", "- seed: 1\n"), ["merge.yaml", "not a mapping"]),
    "two documents": (lambda f: add(f, "---\na: 1"), ["merge.yaml:20", "another document"]),
    "100,000 models": (lambda f: put(f, "merge.yaml", many_models()), ["merge.yaml:", "more than 100,000 values"]),
    "10,000 faults": (lambda f: put(f, "merge.yaml", many_models("  kex: 1\n")), ["merge.yaml:5", "(9995 more)"]),
    "lines in a name": (lambda f: expert(f, name="a\n# b"), ["merge.yaml:", "the character '\\n'"]),
    "colours in a name": (lambda f: add(f, 'tokenizer_source: "\\e[31m"'), ["merge.yaml:20", "the character '\\x1b'"]),
    "NUL in a path": (lambda f: expert(f, model="a\0b"), ["merge.yaml:", "the character '\\x00'"]),
    "name that runs backwards": (lambda f: expert(f, name="a\u202eb"), ["merge.yaml:", "the character '\\u202e'"]),
    "half a character": (lambda f: add(f, 'tokenizer_source: "\\uD800"'), ["merge.yaml:20", "'\\ud800'"]),
    "name that leaves the folder": (
        lambda f: weight_space(f, merge_method="svd_intermediate", models=[{"model": "expert0", "name": "../../x"}]),
        ["'../../x' cannot be a folder's"],
    ),
    "model outside": (lambda f: expert(f, model="../../../../../../../etc"), ["/etc/config.json", "cannot be read"]),
    "model that is a device": (lambda f: expert(f, model="/dev/null"), ["/dev/null: no such model folder"]),
    "pattern that never ends": (lambda f: edit(f, exclude=["(.*)*!"]), ["exclude", "take too long"]),
    "20,000 patterns": (lambda f: edit(f, exclude=[f"x{i}" for i in range(20_000)]), ["exclude", "take too long"]),
    "pattern of 2,000 groups": (lambda f: edit(f, exclude=["(" * 2000 + ")" * 2000]), ["exclude.0 is", "recursion"]),
    "pattern that overflows": (lambda f: edit(f, exclude=["a{99999999999}"]), ["exclude.0 is", "too large"]),
    "layers that are lists": (lambda f: layers(f, [[0], {}]), ["merge.yaml:", "slices are not supported"]),
    "layers that are text": (lambda f: layers(f, [0, "x"]), ["merge.yaml:", "slices are not supported"]),
    "layers that are no number": (lambda f: layers(f, [0, NAN]), ["merge.yaml:", "slices are not supported"]),
    "half a layer": (lambda f: layers(f, [0, 3.5]), ["merge.yaml:", "slices are not supported"]),
    "list in a list": (
        lambda f: weight_space(f, parameters={"weight": [[0.5]]}),
        ["weight: a list has no lists in it"],
    ),
    "filter that is a list": (
        lambda f: weight_space(f, parameters={"weight": [{"filter": ["a"], "value": 1}]}),
        ["`filter` is part of a tensor's name"],
    ),
    "method of 4,000 letters": (lambda f: edit(f, merge_method="x" * 4000), ["merge.yaml:1: there is no method"]),
}

CONFIG_JSON = "base/config.json"
LONG = '"' + "x" * MB + '"'
MODELS: Cases = {
    "truncated": (lambda f: put(f, CONFIG_JSON, '{"vocab_size": 6'), [CONFIG_JSON, "not valid JSON"]),
    "UTF-16": (lambda f: put(f, CONFIG_JSON, "{}".encode("utf-16")), [CONFIG_JSON, "not UTF-8"]),
    "BOM": (lambda f: put(f, CONFIG_JSON, "\ufeff{}"), [CONFIG_JSON, "not valid JSON", "BOM"]),
    "list": (lambda f: put(f, CONFIG_JSON, "[1]"), [CONFIG_JSON, "not a JSON object"]),
    "key twice": (lambda f: put(f, CONFIG_JSON, '{"a": 1, "a": 2}'), [CONFIG_JSON, "the key 'a' is given twice"]),
    "key of 1 MB twice": (
        lambda f: put(f, CONFIG_JSON, "{" + LONG + ": 1, " + LONG + ": 2}"),
        [CONFIG_JSON, "xx… is given"],
    ),
    "50,000 lists": (lambda f: put(f, CONFIG_JSON, f'{{"a": {"[" * 50_000}'), [CONFIG_JSON, "not valid JSON"]),
    "500 lists": (lambda f: put(f, CONFIG_JSON, f'{{"a": {"[" * 500}{"]" * 500}}}'), [CONFIG_JSON, "too deeply"]),
    "5 million mappings": (
        lambda f: put(f, CONFIG_JSON, '{"a": [' + "{}," * 5_000_000 + "1]}"),
        [CONFIG_JSON, "5,000,002 lists and mappings", "at most 4,000,000"],
    ),
    "40 MB": (lambda f: put(f, CONFIG_JSON, '{"a": "' + "x" * 40 * MB + '"}'), [CONFIG_JSON, "the file has 41,"]),
    "number of 5,000 digits": (lambda f: put(f, CONFIG_JSON, '{"a": ' + "9" * 5000 + "}"), [CONFIG_JSON, "digits"]),
    "half a character": (lambda f: put(f, CONFIG_JSON, '{"a": "\\ud800"}'), [CONFIG_JSON, "surrogates"]),
    "blocks that are text": (lambda f: edit_configs(f, num_hidden_layers="x"), ["base", "how many blocks"]),
    "less than no blocks": (lambda f: edit_configs(f, num_hidden_layers=-1), ["base", "-1 blocks", "30 tensors"]),
    "blocks beyond all bounds": (
        lambda f: (edit_configs(f, num_hidden_layers=10**18), edit(f, parameters={"hidden_layers": "all"})),
        ["base", "1000000000000000000 blocks", "30 tensors"],
    ),
    "true blocks": (lambda f: edit_configs(f, num_hidden_layers=True), ["base", "how many blocks"]),
    "vocabulary that is no number": (lambda f: edit_json(f, CONFIG_JSON, vocab_size=NAN), ["'expert0'", "64 tokens"]),
    "architecture of 1 MB": (lambda f: edit_json(f, CONFIG_JSON, architectures=["x" * MB]), ["'expert0'", "xx…"]),
    "architecture of lines": (lambda f: edit_json(f, CONFIG_JSON, architectures=["a\nb"]), ["'expert0'", "'a\\nb'"]),
    "folder for a file": (lambda f: make_folder(f, CONFIG_JSON), [CONFIG_JSON, "Is a directory"]),
    "pipe": (lambda f: pipe(f, CONFIG_JSON), [CONFIG_JSON, "a pipe or a device"]),
    "device": (lambda f: link(f, CONFIG_JSON, "/dev/zero"), [CONFIG_JSON, "a link out of the model's folder"]),
    "link out": (lambda f: move_out(f, CONFIG_JSON), [CONFIG_JSON, "a link out of the model's folder"]),
    "link to nothing": (lambda f: link(f, CONFIG_JSON, "gone"), [CONFIG_JSON, "cannot be read: No such file"]),
    "link to itself": (lambda f: link(f, CONFIG_JSON, "config.json"), [CONFIG_JSON, "cannot be read: Too many levels"]),
    "licence that is a secret": (lambda f: link(f, "base/LICENSE", "/etc/passwd"), ["base/LICENSE", "a link out"]),
    "tokenizer that is a pipe": (lambda f: pipe(f, "base/tokenizer.json"), ["base/tokenizer.json", "a pipe"]),
    "generation_config.json": (lambda f: put(f, "expert0/generation_config.json", "[]"), ["expert0/generation_config"]),
    "tokenizer that is none": (
        lambda f: (weight_space(f, tokenizer_source="expert0"), put(f, "expert0/tokenizer.json", '{"model": {}}')),
        ["expert0/tokenizer.json: not a tokenizer"],
    ),
    "pickled": (
        lambda f: (f / "expert1" / "model.safetensors").rename(f / "expert1" / "pytorch_model.bin"),
        ["expert1: no safetensors", "pytorch_model.bin", "save_pretrained"],
    ),
    "pickled, of another name": (
        lambda f: (f / "expert1" / "model.safetensors").rename(f / "expert1" / "consolidated.pth"),
        ["expert1: no safetensors", "consolidated.pth", "save_pretrained"],
    ),
}

INDEX = "expert1/model.safetensors.index.json"
INDICES: Cases = {
    "list": (lambda f: index(f, text="[]"), [INDEX, "not a JSON object"]),
    "map that is a list": (lambda f: index(f, text='{"weight_map": []}'), [INDEX, "no `weight_map`"]),
    "map of mappings": (lambda f: index(f, text='{"weight_map": {"a": {}}}'), [INDEX, "no `weight_map`"]),
    "empty map": (lambda f: index(f, text='{"weight_map": {}}'), ["expert1", "0 tensors"]),
    "tensor twice": (lambda f: index(f, text='{"weight_map": {"a": "x", "a": "y"}}'), [INDEX, "'a' is given twice"]),
    "truncated": (lambda f: index(f, text='{"weight_map": {"a'), [INDEX, "not valid JSON"]),
    "40 MB": (lambda f: index(f, text=" " * 40 * MB), [INDEX, "the file has 41,"]),
    "absolute": (lambda f: index(f, lambda w: w.update(x="/etc/passwd")), [INDEX, "outside", "'/etc/passwd'"]),
    "above": (lambda f: index(f, lambda w: w.update(x="../base/model.safetensors")), [INDEX, "outside"]),
    "backslashes": (lambda f: index(f, lambda w: w.update(x="..\\base")), [INDEX, "outside"]),
    "NUL": (lambda f: index(f, lambda w: w.update(x="a\0b")), [INDEX, "not there: 'a\\x00b'"]),
    "name of 1 MB": (lambda f: index(f, lambda w: w.update(x="x" * MB)), [INDEX, "not there: 'xxx", "…"]),
    "tensor of 1 MB": (
        lambda f: index(f, lambda w: w.update({"x" * MB: "a.safetensors"})),
        [INDEX, "xx…, and it does"],
    ),
    "half a character": (lambda f: index(f, lambda w: w.update(x="\ud800")), [INDEX, "surrogates"]),
    "folder": (lambda f: (index(f, lambda w: w.update(x="sub")), make_folder(f, "expert1/sub")), [INDEX, "'sub'"]),
    "pipe": (lambda f: (index(f, lambda w: w.update(x="sub")), pipe(f, "expert1/sub")), [INDEX, "'sub'"]),
    "missing file": (lambda f: index(f, lambda w: w.update(x="gone")), [INDEX, "not there: 'gone'"]),
    "missing tensor": (
        lambda f: index(f, lambda w: w.update(x="a.safetensors")),
        [INDEX, "holds 'x', and it does not"],
    ),
    "tensor in another file": (named_twice, [INDEX, "'b.safetensors' holds", Q]),
    "link out": (lambda f: (index(f), move_out(f, "expert1/a.safetensors")), ["a.safetensors", "a link out"]),
    "way out": (
        lambda f: (index(f, lambda w: w.update(x="sub/model.safetensors")), link(f, "expert1/sub", "../base")),
        ["sub/model.safetensors", "a link out"],
    ),
    "index that is a pipe": (lambda f: pipe(f, INDEX), [INDEX, "a pipe"]),
    "index that is a folder": (lambda f: make_folder(f, INDEX), [INDEX, "Is a directory"]),
    "100,000 files": (
        lambda f: index(f, lambda w: w.update({f"x{i}": f"{i}.safetensors" for i in range(100_000)})),
        [INDEX, "not there"],
    ),
}

FILE = "expert1/model.safetensors"
ONE = b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
TWICE = b"{" + ONE + b", " + ONE + b"}"
BLOCKS = {f"a{i}": tensor((2,), (8 * i, 8 * i + 8)) for i in range(3)}
BROKEN = [FILE, "not a whole safetensors file"]
HEADERS: Cases = {
    "length of 2⁶³": (lambda f: weights(f, {}, length=2**63), [*BROKEN, "9,223,372,036,854,775,808 bytes"]),
    "length of 90 MB": (lambda f: weights(f, b" " * 90 * MB), [*BROKEN, "94,371,840 bytes"]),
    "length of 0": (lambda f: weights(f, b""), BROKEN),
    "length beyond the file": (lambda f: weights(f, {}, length=1000), BROKEN),
    "empty": (lambda f: put(f, FILE, b""), BROKEN),
    "seven bytes": (lambda f: put(f, FILE, b"1234567"), BROKEN),
    "no JSON": (lambda f: weights(f, b"{{{{"), BROKEN),
    "list": (lambda f: weights(f, [1]), BROKEN),
    "not UTF-8": (lambda f: weights(f, b'{"\xff": 1}'), BROKEN),
    "nothing": (lambda f: weights(f, {"a": None}), BROKEN),
    "overlap": (lambda f: weights(f, {"a": tensor(), "b": tensor(offsets=(4, 12))}, 12), BROKEN),
    "out of range": (lambda f: weights(f, {"a": tensor((200,), (0, 800))}), BROKEN),
    "backwards": (lambda f: weights(f, {"a": tensor(offsets=(8, 0))}), BROKEN),
    "before the beginning": (lambda f: weights(f, {"a": tensor(offsets=(-8, 0))}), BROKEN),
    "hole": (lambda f: weights(f, {"a": tensor(), "b": tensor(offsets=(12, 20))}, 20), BROKEN),
    "hole at the beginning": (lambda f: weights(f, {"a": tensor(offsets=(8, 16))}, 16), BROKEN),
    "more behind": (lambda f: weights(f, {"a": tensor()}, 9), BROKEN),
    "too short": (lambda f: weights(f, {"a": tensor()}, 7), BROKEN),
    "other size than its shape": (lambda f: weights(f, {"a": tensor((3,))}), BROKEN),
    "three offsets": (lambda f: weights(f, {"a": tensor(offsets=(0, 8, 8))}), BROKEN),
    "no shape": (lambda f: weights(f, {"a": {"dtype": "F32", "data_offsets": (0, 8)}}), BROKEN),
    "shape that is text": (lambda f: weights(f, {"a": tensor("2")}), BROKEN),
    "negative": (lambda f: weights(f, {"a": tensor((-2,))}), BROKEN),
    "fraction": (lambda f: weights(f, {"a": tensor((2.0,))}), BROKEN),
    "huge": (lambda f: weights(f, {"a": tensor((2**63,))}), BROKEN),
    "product that overflows": (lambda f: weights(f, {"a": tensor((2**32,) * 3)}), BROKEN),
    "product that overflows to 8": (lambda f: weights(f, {"a": tensor((2**62 + 2, 4))}, 32), BROKEN),
    "unknown type": (lambda f: weights(f, {"a": tensor(dtype="F31")}), BROKEN),
    "type of half a byte": (lambda f: weights(f, {"a": tensor((16,), dtype="F4")}), [FILE, "'a' is F4"]),
    "integers for floats": (integers, ["'expert1'", Q, "is I32", "F32"]),
    "metadata that are numbers": (lambda f: weights(f, {"__metadata__": {"a": 1}, "a": tensor()}), BROKEN),
    "field twice": (lambda f: weights(f, b'{"a": {"dtype": "F32", "dtype": "F32"}}'), BROKEN),
    "tensor twice": (lambda f: weights(f, TWICE), [FILE, "the key 'a' is given twice"]),
    "name with NUL": (lambda f: weights(f, {**BLOCKS, "a\0b": tensor((0,), (24, 24))}, 24), ["'expert1'", "lacks 30"]),
    "name of 1 MB": (lambda f: weights(f, {"a" * MB: tensor()}), [FILE, "1,048,576 characters"]),
    "100,000 tensors": (
        lambda f: weights(f, {f"a{i}": tensor((2,), (8 * i, 8 * i + 8)) for i in range(100_000)}, 800_000),
        ["'expert1'", "has 100000 that the base does not have"],
    ),
    "100,000 lists": (
        lambda f: weights(f, TWICE[:-1] + b', "c": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"),
        BROKEN,
    ),
    "no tensors": (lambda f: weights(f, {}, 0), ["expert1", "0 tensors"]),
    "pipe": (lambda f: pipe(f, FILE), [FILE, "a pipe"]),
    "folder": (lambda f: make_folder(f, FILE), [FILE, "Is a directory"]),
    "device": (lambda f: link(f, FILE, "/dev/zero"), [FILE, "a link out"]),
    "link out": (lambda f: move_out(f, FILE), [FILE, "a link out"]),
}

# Configs that are no files to be read, and what the message must have.
PLACES: dict[str, tuple[Spoil, list[str]]] = {
    "pipe": (lambda f: os.mkfifo(f / "c.yaml"), ["c.yaml"]),
    "folder": (lambda f: make_folder(f, "c.yaml"), ["c.yaml"]),
    "endless device": (lambda f: link(f, "c.yaml", "/dev/zero"), ["c.yaml"]),
    "empty device": (lambda f: link(f, "c.yaml", "/dev/null"), ["c.yaml"]),
    "link to nothing": (lambda f: link(f, "c.yaml", "gone"), ["c.yaml"]),
    "link to itself": (lambda f: link(f, "c.yaml", "c.yaml"), ["c.yaml"]),
}

LAUGHS = ["&a0 [x, x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
OVERRIDES = {
    "nothing": ("", "not an override"),
    "no value": ("x" * 100_000, "not an override"),
    "two lines": ("a\nb", "'a\\nb': not an override"),
    "call of Python": ("seed=!!python/object/apply:os.mkdir [x]", "a tag"),
    "list in itself": ("seed=&a [*a]", "what it is part of"),
    "billion laughs": ("seed=[" + ", ".join(LAUGHS) + "]", "more than 100,000 values"),
    "index of 5,000 digits": (f"models.{'9' * 5000}.name=x", "not an override"),
    "5,000 keys": (f"seed{'.a' * 5000}=1", "not an override"),
    "30 keys": (f"seed{'.a' * 30}=1", "seed is {'a': {'a': "),
    "100,000 letters": (f"seed={'x' * 100_000}", "a value of 100,000 characters"),
    "hexadecimal of 5,000 digits": (f"seed=0x{'f' * 5000}", "a value of 5,002 characters"),
    "fraction to base 60": (f"seed=1{':1' * 400}.5", "not valid YAML"),
    "whole number of nothing": ("seed=!!int ''", "a tag"),
    "two documents": ("seed=1\n---\n2", "not valid YAML"),
    "key twice": ("parameters={weight: 0.1, weight: 0.2}", "'weight' is given twice"),
    "no UTF-8": ("seed=\udcff", "not valid YAML"),
    "list as a key": ("seed={[a]: b}", "a key is not a text"),
}


@pytest.fixture
def folder(llama_merge: Path, tmp_path: Path) -> Path:
    """The folder of a merge, to be spoilt."""
    return shutil.copytree(llama_merge.parent, tmp_path / "in")


@cases(config=CONFIGS, model=MODELS, index=INDICES, header=HEADERS)
def test_hostile_input_is_refused_by_a_plan(planner: Server, folder: Path, spoil: Spoil, words: list[str]) -> None:
    spoil(folder)
    refused(planner.run("plan", "merge.yaml", cwd=folder), words)


@cases(config=PLACES)
def test_a_config_that_is_no_file_is_refused(planner: Server, folder: Path, spoil: Spoil, words: list[str]) -> None:
    spoil(folder)
    refused(planner.run("plan", "c.yaml", cwd=folder), [*words, "no such config file"])


@pytest.mark.parametrize("name", ["", "x" * 300, "/proc/self/fd/0", "base/../../../../../../../../dev/tty"])
def test_a_name_of_no_file_is_refused(planner: Server, folder: Path, name: str) -> None:
    refused(planner.run("plan", name, cwd=folder), ["no such config file"])


@pytest.mark.parametrize(("override", "words"), OVERRIDES.values(), ids=list(OVERRIDES))
def test_a_hostile_override_is_refused(planner: Server, folder: Path, override: str, words: str) -> None:
    refused(planner.run("plan", "merge.yaml", "--set", override, cwd=folder), [words])


def test_what_is_not_spoilt_is_planned(planner: Server, folder: Path) -> None:
    index(folder)
    link(folder, "base/LICENSE", "config.json")
    ended = planner.run("plan", "merge.yaml", cwd=folder)
    assert (ended.code, ended.stderr, ended.loaded, ended.left) == (0, "", [], [])
    assert "LlamaForCausalLM" in ended.stdout
