"""Hostile model folders through the command line: exit code 2, one message, bounded time and memory, nothing left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hostile import Server, refused
from hostile_inputs import (
    MB,
    PREFIX,
    Cases,
    Q,
    Spoil,
    adapter,
    cases,
    edit,
    edit_configs,
    edit_json,
    factors,
    index,
    integers,
    link,
    make_folder,
    move_out,
    named_twice,
    pipe,
    put,
    tensor,
    weight_space,
    weights,
)

NAN, INF = float("nan"), float("inf")

CONFIG_JSON = "base/config.json"
LONG = '"' + "x" * MB + '"'
MODELS: Cases = {
    "truncated": (lambda f: put(f, CONFIG_JSON, '{"vocab_size": 6'), [CONFIG_JSON, "JSON", "column 17"]),
    "UTF-16": (lambda f: put(f, CONFIG_JSON, "{}".encode("utf-16")), [CONFIG_JSON, "UTF-8 text"]),
    "BOM": (lambda f: put(f, CONFIG_JSON, "\ufeff{}"), [CONFIG_JSON, "JSON", "BOM"]),
    "list": (lambda f: put(f, CONFIG_JSON, "[1]"), [CONFIG_JSON, "JSON object"]),
    "key twice": (lambda f: put(f, CONFIG_JSON, '{"a": 1, "a": 2}'), [CONFIG_JSON, "JSON", "key 'a'"]),
    "key of 1 MB twice": (
        lambda f: put(f, CONFIG_JSON, "{" + LONG + ": 1, " + LONG + ": 2}"),
        [CONFIG_JSON, "JSON", "key 'xxx", "xx…"],
    ),
    "50,000 lists": (lambda f: put(f, CONFIG_JSON, f'{{"a": {"[" * 50_000}'), [CONFIG_JSON, "JSON", "recursion"]),
    "500 lists": (
        lambda f: put(f, CONFIG_JSON, f'{{"a": {"[" * 500}{"]" * 500}}}'),
        [CONFIG_JSON, "JSON", "nested", " 100 "],
    ),
    "5 million mappings": (
        lambda f: put(f, CONFIG_JSON, '{"a": [' + "{}," * 5_000_000 + "1]}"),
        [CONFIG_JSON, "JSON", "5,000,002", "4,000,000"],
    ),
    "40 MB": (
        lambda f: put(f, CONFIG_JSON, '{"a": "' + "x" * 40 * MB + '"}'),
        [CONFIG_JSON, "41,943,049", "33,554,432"],
    ),
    "number of 5,000 digits": (
        lambda f: put(f, CONFIG_JSON, '{"a": ' + "9" * 5000 + "}"),
        [CONFIG_JSON, "JSON", "5000 digits"],
    ),
    "half a character": (lambda f: put(f, CONFIG_JSON, '{"a": "\\ud800"}'), [CONFIG_JSON, "JSON", "surrogates"]),
    "blocks that are text": (
        lambda f: edit_configs(f, num_hidden_layers="x"),
        ["in/base", "config.json", "num_hidden_layers"],
    ),
    "less than no blocks": (lambda f: edit_configs(f, num_hidden_layers=-1), ["in/base", "-1 blocks", "30 tensors"]),
    "blocks beyond all bounds": (
        lambda f: (edit_configs(f, num_hidden_layers=10**18), edit(f, parameters={"hidden_layers": "all"})),
        ["in/base", f"{10**18} blocks", "30 tensors"],
    ),
    "true blocks": (lambda f: edit_configs(f, num_hidden_layers=True), ["in/base", "config.json", "num_hidden_layers"]),
    "vocabulary that is no number": (
        lambda f: edit_json(f, CONFIG_JSON, vocab_size=NAN),
        ["'expert0'", "vocabulary", "64", "`tokenizer_source: base`"],
    ),
    "architecture of 1 MB": (
        lambda f: edit_json(f, CONFIG_JSON, model_type="x" * MB),
        ["'expert0'", "LlamaForCausalLM", "xx…"],
    ),
    "architecture of lines": (
        lambda f: edit_json(f, CONFIG_JSON, model_type="a\nb"),
        ["'expert0'", "LlamaForCausalLM", "'a\\nb'"],
    ),
    "folder for a file": (lambda f: make_folder(f, CONFIG_JSON), [CONFIG_JSON, "a directory"]),
    "pipe": (lambda f: pipe(f, CONFIG_JSON), [CONFIG_JSON, "pipe"]),
    "device": (lambda f: link(f, CONFIG_JSON, "/dev/zero"), [CONFIG_JSON, "link", "/dev/zero"]),
    "link out": (lambda f: move_out(f, CONFIG_JSON), [CONFIG_JSON, "link", "in/outside"]),
    "link to nothing": (lambda f: link(f, CONFIG_JSON, "gone"), [CONFIG_JSON, "No such file"]),
    "link to itself": (lambda f: link(f, CONFIG_JSON, "config.json"), [CONFIG_JSON, "symbolic links"]),
    "licence that is a secret": (
        lambda f: link(f, "base/LICENSE", "/etc/passwd"),
        ["base/LICENSE", "link", "/etc/passwd"],
    ),
    "tokenizer that is a pipe": (lambda f: pipe(f, "base/tokenizer.json"), ["base/tokenizer.json", "pipe"]),
    "generation_config.json": (
        lambda f: put(f, "expert0/generation_config.json", "[]"),
        ["expert0/generation_config.json", "JSON object"],
    ),
    "tokenizer that is none": (
        lambda f: (weight_space(f, tokenizer_source="expert0"), put(f, "expert0/tokenizer.json", '{"model": {}}')),
        ["expert0/tokenizer.json", "ModelUntagged"],
    ),
    "pickled": (
        lambda f: (f / "expert1" / "model.safetensors").rename(f / "expert1" / "pytorch_model.bin"),
        ["in/expert1: ", "pytorch_model.bin", "save_pretrained"],
    ),
    "pickled, of another name": (
        lambda f: (f / "expert1" / "model.safetensors").rename(f / "expert1" / "consolidated.pth"),
        ["in/expert1: ", "consolidated.pth", "save_pretrained"],
    ),
}

INDEX = "expert1/model.safetensors.index.json"
INDICES: Cases = {
    "list": (lambda f: index(f, text="[]"), [INDEX, "JSON object"]),
    "map that is a list": (lambda f: index(f, text='{"weight_map": []}'), [INDEX, "`weight_map`"]),
    "map of mappings": (lambda f: index(f, text='{"weight_map": {"a": {}}}'), [INDEX, "`weight_map`"]),
    "empty map": (lambda f: index(f, text='{"weight_map": {}}'), ["in/expert1", "3 blocks", "0 tensors"]),
    "tensor twice": (lambda f: index(f, text='{"weight_map": {"a": "x", "a": "y"}}'), [INDEX, "JSON", "key 'a'"]),
    "truncated": (lambda f: index(f, text='{"weight_map": {"a'), [INDEX, "JSON", "column 17"]),
    "40 MB": (lambda f: index(f, text=" " * 40 * MB), [INDEX, "41,943,040", "33,554,432"]),
    "absolute": (lambda f: index(f, lambda w: w.update(x="/etc/passwd")), [INDEX, "outside", "'/etc/passwd'"]),
    "above": (
        lambda f: index(f, lambda w: w.update(x="../base/model.safetensors")),
        [INDEX, "outside", "'../base/model.safetensors'"],
    ),
    "backslashes": (lambda f: index(f, lambda w: w.update(x="..\\base")), [INDEX, "outside", "'..\\\\base'"]),
    "NUL": (lambda f: index(f, lambda w: w.update(x="a\0b")), [INDEX, "'a\\x00b'"]),
    "name of 1 MB": (lambda f: index(f, lambda w: w.update(x="x" * MB)), [INDEX, "'xxx", "xx…"]),
    "tensor of 1 MB": (
        lambda f: index(f, lambda w: w.update({"x" * MB: "a.safetensors"})),
        [INDEX, "'a.safetensors'", "'xxx", "xx…"],
    ),
    "half a character": (lambda f: index(f, lambda w: w.update(x="\ud800")), [INDEX, "JSON", "surrogates"]),
    "folder": (lambda f: (index(f, lambda w: w.update(x="sub")), make_folder(f, "expert1/sub")), [INDEX, "'sub'"]),
    "pipe": (lambda f: (index(f, lambda w: w.update(x="sub")), pipe(f, "expert1/sub")), [INDEX, "'sub'"]),
    "missing file": (lambda f: index(f, lambda w: w.update(x="gone")), [INDEX, "'gone'"]),
    "missing tensor": (
        lambda f: index(f, lambda w: w.update(x="a.safetensors")),
        [INDEX, "'a.safetensors'", "'x'"],
    ),
    "tensor in another file": (named_twice, [INDEX, "'b.safetensors'", Q]),
    "link out": (
        lambda f: (index(f), move_out(f, "expert1/a.safetensors")),
        ["expert1/a.safetensors", "link", "in/outside"],
    ),
    "way out": (
        lambda f: (index(f, lambda w: w.update(x="sub/model.safetensors")), link(f, "expert1/sub", "../base")),
        ["expert1/sub/model.safetensors", "link", "in/base/model.safetensors"],
    ),
    "index that is a pipe": (lambda f: pipe(f, INDEX), [INDEX, "pipe"]),
    "index that is a folder": (lambda f: make_folder(f, INDEX), [INDEX, "a directory"]),
    "100,000 files": (
        lambda f: index(f, lambda w: w.update({f"x{i}": f"{i}.safetensors" for i in range(100_000)})),
        [INDEX, "'0.safetensors'"],
    ),
}

FILE = "expert1/model.safetensors"
ONE = b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
TWICE = b"{" + ONE + b", " + ONE + b"}"
BLOCKS = {f"a{i}": tensor((2,), (8 * i, 8 * i + 8)) for i in range(3)}
# Most of the facts are those of the safetensors library, which the message quotes.
HEADERS: Cases = {
    "length of 2⁶³": (lambda f: weights(f, {}, length=2**63), [FILE, "9,223,372,036,854,775,808", "33,554,432"]),
    "length of 90 MB": (lambda f: weights(f, b" " * 90 * MB), [FILE, "94,371,840", "33,554,432"]),
    "length of 0": (lambda f: weights(f, b""), [FILE, "EOF"]),
    "length beyond the file": (lambda f: weights(f, {}, length=1000), [FILE, "header length"]),
    "empty": (lambda f: put(f, FILE, b""), [FILE, "header too small"]),
    "seven bytes": (lambda f: put(f, FILE, b"1234567"), [FILE, "15,540,725,856,023,089"]),
    "no JSON": (lambda f: weights(f, b"{{{{"), [FILE, "key must"]),
    "list": (lambda f: weights(f, [1]), [FILE, "HashMetadata"]),
    "not UTF-8": (lambda f: weights(f, b'{"\xff": 1}'), [FILE, "UTF-8"]),
    "nothing": (lambda f: weights(f, {"a": None}), [FILE, "TensorInfo"]),
    "overlap": (lambda f: weights(f, {"a": tensor(), "b": tensor(offsets=(4, 12))}, 12), [FILE, "offset", "`b`"]),
    "out of range": (lambda f: weights(f, {"a": tensor((200,), (0, 800))}), [FILE, "incomplete metadata"]),
    "backwards": (lambda f: weights(f, {"a": tensor(offsets=(8, 0))}), [FILE, "offset", "`a`"]),
    "before the beginning": (lambda f: weights(f, {"a": tensor(offsets=(-8, 0))}), [FILE, "`-8`"]),
    "hole": (lambda f: weights(f, {"a": tensor(), "b": tensor(offsets=(12, 20))}, 20), [FILE, "offset", "`b`"]),
    "hole at the beginning": (lambda f: weights(f, {"a": tensor(offsets=(8, 16))}, 16), [FILE, "offset", "`a`"]),
    "more behind": (lambda f: weights(f, {"a": tensor()}, 9), [FILE, "incomplete metadata"]),
    "too short": (lambda f: weights(f, {"a": tensor()}, 7), [FILE, "incomplete metadata"]),
    "other size than its shape": (lambda f: weights(f, {"a": tensor((3,))}), [FILE, "invalid shape"]),
    "three offsets": (lambda f: weights(f, {"a": tensor(offsets=(0, 8, 8))}), [FILE, "length 3"]),
    "no shape": (lambda f: weights(f, {"a": {"dtype": "F32", "data_offsets": (0, 8)}}), [FILE, "`shape`"]),
    "shape that is text": (lambda f: weights(f, {"a": tensor("2")}), [FILE, '"2"']),
    "negative": (lambda f: weights(f, {"a": tensor((-2,))}), [FILE, "`-2`"]),
    "fraction": (lambda f: weights(f, {"a": tensor((2.0,))}), [FILE, "`2.0`"]),
    "huge": (lambda f: weights(f, {"a": tensor((2**63,))}), [FILE, "overflow"]),
    "product that overflows": (lambda f: weights(f, {"a": tensor((2**32,) * 3)}), [FILE, "overflow"]),
    "product that overflows to 8": (lambda f: weights(f, {"a": tensor((2**62 + 2, 4))}, 32), [FILE, "overflow"]),
    "unknown type": (lambda f: weights(f, {"a": tensor(dtype="F31")}), [FILE, "`F31`"]),
    "type of half a byte": (lambda f: weights(f, {"a": tensor((16,), dtype="F4")}), [FILE, "'a'", " F4", "C64"]),
    "integers for floats": (integers, ["'expert1'", Q, "I32", "F32"]),
    "metadata that are numbers": (lambda f: weights(f, {"__metadata__": {"a": 1}, "a": tensor()}), [FILE, "`1`"]),
    "field twice": (lambda f: weights(f, b'{"a": {"dtype": "F32", "dtype": "F32"}}'), [FILE, "`dtype`"]),
    "tensor twice": (lambda f: weights(f, TWICE), [f"{FILE}: ", "JSON", "key 'a'"]),
    "name with NUL": (
        lambda f: weights(f, {**BLOCKS, "a\0b": tensor((0,), (24, 24))}, 24),
        ["'expert1'", " 30 ", "'lm_head.weight'", " 4 ", "'a0'"],
    ),
    "name of 1 MB": (lambda f: weights(f, {"a" * MB: tensor()}), [FILE, "1,048,576"]),
    "100,000 tensors": (
        lambda f: weights(f, {f"a{i}": tensor((2,), (8 * i, 8 * i + 8)) for i in range(100_000)}, 800_000),
        ["'expert1'", "'lm_head.weight'", "100000", "'a0'"],
    ),
    "100,000 lists": (
        lambda f: weights(f, TWICE[:-1] + b', "c": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"),
        [FILE, "recursion limit"],
    ),
    "no tensors": (lambda f: weights(f, {}, 0), ["in/expert1", "3 blocks", "0 tensors"]),
    "pipe": (lambda f: pipe(f, FILE), [FILE, "pipe"]),
    "folder": (lambda f: make_folder(f, FILE), [FILE, "a directory"]),
    "device": (lambda f: link(f, FILE, "/dev/zero"), [FILE, "link", "/dev/zero"]),
    "link out": (lambda f: move_out(f, FILE), [FILE, "link", "in/outside"]),
}

SETTINGS = "expert1/adapter_config.json"
PAIR = "expert1/adapter_model.safetensors"
MODULE, WEIGHT = "'model.layers.1.self_attn.q_proj'", "'model.layers.1.self_attn.q_proj.weight'"
ADAPTERS: Cases = {
    "no JSON": (lambda f: (adapter(f), put(f, SETTINGS, "{")), [SETTINGS, "JSON", "column 2"]),
    "list": (lambda f: (adapter(f), put(f, SETTINGS, "[]")), [SETTINGS, "JSON object"]),
    "empty": (lambda f: (adapter(f), put(f, SETTINGS, "{}")), [SETTINGS, "peft_type None", "merge_and_unload"]),
    "key twice": (lambda f: (adapter(f), put(f, SETTINGS, '{"r": 2, "r": 3}')), [SETTINGS, "JSON", "key 'r'"]),
    **{
        f"rank {rank!r:.9}": (
            (lambda r: lambda f: adapter(f, r=r))(rank),
            [SETTINGS, MODULE, f"rank {rank!r:.9}", "`r`"],
        )
        for rank in (0, -1, 10**18, "2", 2.0, None, True, [2], NAN)
    },
    **{
        f"alpha {alpha!r:.9}": (
            (lambda a: lambda f: adapter(f, lora_alpha=a))(alpha),
            [SETTINGS, MODULE, f"alpha {alpha!r:.9}", "`lora_alpha`"],
        )
        for alpha in (NAN, INF, 1e300, 10**400, "4", None, True)
    },
    "no rank": (lambda f: adapter(f, r="left out"), [SETTINGS, MODULE, "rank None"]),
    "other rank than the file's": (lambda f: adapter(f, r=4), [f"{PREFIX}lora_A.weight", "(2, 32)", "rank 4"]),
    "kind of 1 MB": (lambda f: adapter(f, peft_type="x" * MB), [SETTINGS, "peft_type 'xxx", "xx…"]),
    "kinds": (lambda f: adapter(f, peft_type=["LORA"]), [SETTINGS, "peft_type ['LORA']"]),
    "unknown key of 1 MB": (lambda f: adapter(f, **{"x" * MB: True}), [SETTINGS, "xx…", "merge_and_unload"]),
    "patterns in a list": (
        lambda f: adapter(f, rank_pattern=[1]),
        [SETTINGS, "rank_pattern", "alpha_pattern", "'list'"],
    ),
    "pattern that is none": (
        lambda f: adapter(f, rank_pattern={"(": 1}),
        [SETTINGS, "rank_pattern", "alpha_pattern", "unterminated subpattern"],
    ),
    "pattern that never ends": (
        lambda f: adapter(f, rank_pattern={"(.*)*!": 1}),
        [SETTINGS, "rank_pattern", "alpha_pattern", "too long"],
    ),
    "pattern that overflows": (
        lambda f: adapter(f, rank_pattern={"a{99999999999}": 1}),
        [SETTINGS, "rank_pattern", "alpha_pattern", "too large"],
    ),
    "pattern of 5,000 groups": (
        lambda f: adapter(f, alpha_pattern={"(" * 5000 + ")" * 5000: 1}),
        [SETTINGS, "rank_pattern", "alpha_pattern", "recursion"],
    ),
    "rank by a pattern": (lambda f: adapter(f, rank_pattern={".*": "x"}), [SETTINGS, MODULE, "rank 'x'"]),
    "half a pair": (lambda f: adapter(f, lambda p: p.pop(f"{PREFIX}lora_A.weight")), [PAIR, MODULE]),
    "narrow A": (lambda f: adapter(f, factors(A=(2, 31))), ["in/expert1", WEIGHT, "(2, 31)", "(32, 32)"]),
    "short B": (lambda f: adapter(f, factors(B=(31, 2))), ["in/expert1", WEIGHT, "(31, 2)", "(32, 32)"]),
    "B of another rank": (lambda f: adapter(f, factors(B=(32, 3))), ["in/expert1", WEIGHT, "(32, 3)", "(32, 32)"]),
    "A that is a vector": (lambda f: adapter(f, factors(A=(2,))), ["in/expert1", WEIGHT, "(2,)", "(32, 32)"]),
    "A that is a number": (lambda f: adapter(f, factors(A=())), [f"{PREFIX}lora_A.weight", "shape ()", "rank 2"]),
    "empty A": (lambda f: adapter(f, factors(A=(0, 32))), [f"{PREFIX}lora_A.weight", "(0, 32)", "rank 2"]),
    "A of integers": (
        lambda f: adapter(f, lambda p: p.update({f"{PREFIX}lora_A.weight": p[f"{PREFIX}lora_A.weight"].int()})),
        [f"{PREFIX}lora_A.weight", "I32", "F32"],
    ),
    "no such target": (
        lambda f: adapter(f, lambda p: p.update({name.replace("q_", "z_"): p.pop(name) for name in list(p)})),
        ["in/expert1", "'model.layers.1.self_attn.z_proj.weight'", "base"],
    ),
    "no tensors": (lambda f: adapter(f, dict.clear), [PAIR, "LoRA"]),
    "pickled": (
        lambda f: (adapter(f), (f / PAIR).rename(f / "expert1" / "adapter_model.bin")),
        ["in/expert1: ", "adapter_model.safetensors", "save_pretrained"],
    ),
    "weights that are text": (
        lambda f: (adapter(f), put(f, PAIR, b"hello, world")),
        [PAIR, "8,583,909,746,840,200,552", "33,554,432"],
    ),
    "weights that are a pipe": (lambda f: (adapter(f), pipe(f, PAIR)), [PAIR, "pipe"]),
    "weights out of the folder": (lambda f: (adapter(f), move_out(f, PAIR)), [PAIR, "link", "in/outside"]),
    "config that is a pipe": (lambda f: (adapter(f), pipe(f, SETTINGS)), [SETTINGS, "pipe"]),
}


@pytest.fixture
def folder(llama_merge: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a merge, for the test to corrupt."""
    return shutil.copytree(llama_merge.parent, tmp_path / "in")


@cases(
    every=3,
    thorough=["100,000 files", "100,000 tensors", "pattern that never ends"],
    model=MODELS,
    index=INDICES,
    header=HEADERS,
    adapter=ADAPTERS,
)
def test_hostile_models_are_refused_by_a_plan(planner: Server, folder: Path, spoil: Spoil, facts: list[str]) -> None:
    spoil(folder)
    refused(planner.run("plan", "merge.yaml", cwd=folder), facts)


def test_an_intact_merge_is_planned(planner: Server, folder: Path) -> None:
    index(folder)
    link(folder, "base/LICENSE", "config.json")
    ended = planner.run("plan", "merge.yaml", cwd=folder)
    assert (ended.code, ended.stderr, ended.loaded, ended.left) == (0, "", [], [])
    assert "LlamaForCausalLM" in ended.stdout
