"""Hostile records, adapters, tokenizers and code, through the command line; more in `test_hostile`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from hostile import Server, refused
from hostile_inputs import (
    MB,
    PREFIX,
    RECORD,
    Cases,
    Spoil,
    adapter,
    calibration,
    cases,
    cut_table,
    cut_tokens,
    edit_configs,
    edit_json,
    expert,
    factors,
    link,
    messages_bomb,
    move_out,
    no_text,
    own_code,
    pipe,
    put,
    repeated,
    table,
    template,
    text_record,
    tokenizer,
    tokenizer_config,
)

NAN, INF = float("nan"), float("inf")
EMPTY_LISTS = "[" * 100_000

RECORDS: Cases = {
    "10 MB line": (
        lambda f: calibration(f, '{"text": "' + "x" * 10 * MB + '"}'),
        ["x.jsonl:1: the record is too long"],
    ),
    "10 MB line of nothing": (lambda f: calibration(f, bytes(10 * MB)), ["x.jsonl:1: the record is too long"]),
    "5 million ids": (lambda f: calibration(f, '{"input_ids": [' + "7," * 5 * MB + "7]}"), ["x.jsonl:1", "too long"]),
    "10 million lines": (lambda f: calibration(f, "\n" * 10 * MB), ["x.jsonl", "more than 1,000,000"]),
    "100,000 lists": (lambda f: calibration(f, EMPTY_LISTS), ["x.jsonl:1: not valid JSON"]),
    "500 lists": (lambda f: calibration(f, '{"x": ' + "[" * 500 + "]" * 500 + "}"), ["x.jsonl:1", "too deeply"]),
    "not UTF-8": (lambda f: calibration(f, b'{"text": "\xff"}'), ["x.jsonl", "not UTF-8"]),
    "UTF-16": (lambda f: calibration(f, RECORD.encode("utf-16")), ["x.jsonl", "not UTF-8"]),
    "BOM": (lambda f: calibration(f, "\ufeff" + RECORD), ["x.jsonl:1", "BOM"]),
    "binary": (lambda f: calibration(f, bytes(range(256))), ["x.jsonl:1", "not valid JSON"]),
    "blank lines": (lambda f: calibration(f, "\n \n\t\n"), ["'expert1' has no calibration records"]),
    "list": (lambda f: calibration(f, "[1, 2]"), ["x.jsonl:1: the record is not a mapping"]),
    "number": (lambda f: calibration(f, RECORD + "1"), ["x.jsonl:2: the record is not a mapping"]),
    "key twice": (lambda f: calibration(f, '{"text": "a", "text": "b"}'), ["x.jsonl:1", "'text' is given twice"]),
    "ids that are fractions": (
        lambda f: calibration(f, '{"input_ids": [7.5]}'),
        ["x.jsonl:1", "not a list of integers"],
    ),
    "ids that are true": (lambda f: calibration(f, '{"input_ids": [true]}'), ["x.jsonl:1", "not a list of integers"]),
    "ids that are no numbers": (lambda f: calibration(f, '{"input_ids": [NaN]}'), ["x.jsonl:1", "list of integers"]),
    "ids that are text": (lambda f: calibration(f, '{"input_ids": ["7"]}'), ["x.jsonl:1", "not a list of integers"]),
    "id of 5,000 digits": (lambda f: calibration(f, '{"input_ids": [' + "7" * 5000 + "]}"), ["x.jsonl:1", "digits"]),
    "ids in lists": (lambda f: calibration(f, '{"input_ids": [[7]]}'), ["x.jsonl:1", "not a list of integers"]),
    "text that is a list": (lambda f: calibration(f, '{"text": ["a"]}'), ["x.jsonl:1", "`text` is not a text"]),
    "chat that is text": (lambda f: calibration(f, '{"messages": "a"}'), ["x.jsonl:1", "`messages` is not a list"]),
    "chat of nobody": (lambda f: calibration(f, '{"messages": [{"content": "a"}]}'), ["x.jsonl:1", "`messages`"]),
    "chat of nothing": (lambda f: calibration(f, '{"messages": [null]}'), ["x.jsonl:1", "`messages`"]),
    "half a character": (lambda f: calibration(f, '{"text": "\\ud800"}'), ["x.jsonl:1", "surrogates"]),
    "key of 1 MB": (lambda f: calibration(f, '{"' + "x" * MB + '": 1}'), ["x.jsonl:1", "no usable field", "xx…"]),
    "colours in a key": (lambda f: calibration(f, '{"\\u001b[31m": 1}'), ["x.jsonl:1", "'\\x1b[31m'"]),
    "JSON that is a record": (lambda f: calibration(f, RECORD, "x.json"), ["x.json: the file does not hold a list"]),
    "JSON of 40 MB": (lambda f: calibration(f, "[" + " " * 40 * MB + "]", "x.json"), ["x.json: the file has 41,"]),
    "JSON of 5 million records": (
        lambda f: calibration(f, "[" + "{}," * 5_000_000 + "{}]", "x.json"),
        ["x.json", "5,000,002 lists and mappings"],
    ),
    "JSON record of 10 MB": (
        lambda f: calibration(f, '[{"text": "' + "x" * 10 * MB + '"}]', "x.json"),
        ["x.json record 1: the record is too long"],
    ),
    "JSON truncated": (lambda f: calibration(f, '[{"text": "x"}, {"te', "x.json"), ["x.json: not valid JSON"]),
    "JSON of 100,000 lists": (lambda f: calibration(f, EMPTY_LISTS, "x.json"), ["x.json: not valid JSON"]),
    "table": (lambda f: calibration(f, "text\nw1\n", "x.csv"), ["x.csv: an unknown kind of file"]),
    "packed": (lambda f: calibration(f, RECORD, "x.jsonl.gz"), ["x.jsonl.gz: an unknown kind of file"]),
    "pipe": (lambda f: (pipe(f, "x.jsonl"), expert(f, calibration="x.jsonl")), ["x.jsonl", "no such calibration file"]),
    "device": (lambda f: expert(f, calibration="/dev/zero"), ["/dev/zero", "no such calibration file"]),
    "link to itself": (
        lambda f: (link(f, "x.jsonl", "x.jsonl"), expert(f, calibration="x.jsonl")),
        ["x.jsonl", "no such calibration file"],
    ),
}

TABLES: Cases = {
    "empty": (lambda f: calibration(f, "", "x.parquet"), ["x.parquet: not a parquet file"]),
    "text": (lambda f: calibration(f, RECORD, "x.parquet"), ["x.parquet: not a parquet file"]),
    "huge footer": (
        lambda f: calibration(f, b"PAR1\xff\xff\xff\x7fPAR1", "x.parquet"),
        ["x.parquet: not a parquet file"],
    ),
    "truncated": (lambda f: cut_table(f, 4, -30), ["x.parquet: not a parquet file"]),
    "without its beginning": (lambda f: cut_table(f, 3000, 10**9), ["x.parquet: "]),
    "no rows": (lambda f: table(f, {"text": pa.array([], pa.string())}), ["x.parquet", "no calibration records"]),
    "other columns": (lambda f: table(f, {"words": ["w1"]}), ["x.parquet record 1", "no usable field; it has words"]),
    "column twice": (
        lambda f: table(f, pa.Table.from_arrays([pa.array(["w1"]), pa.array(["w2"])], ["text", "text"])),
        ["x.parquet: two of its columns have one name"],
    ),
    "text that is bytes": (lambda f: table(f, {"text": [b"w1"]}), ["x.parquet record 1: `text` is not a text"]),
    "text that is a time": (lambda f: table(f, {"text": pa.array([1], pa.timestamp("us"))}), ["x.parquet record 1"]),
    "text that is no time": (lambda f: table(f, {"text": pa.array([2**62], pa.duration("s"))}), ["cannot be read"]),
    "text that is no UTF-8": (no_text, ["x.parquet: its records cannot be read"]),
    "ids that are fractions": (lambda f: table(f, {"input_ids": [[1.5]]}), ["x.parquet record 1", "list of integers"]),
    "ids that are nothing": (lambda f: table(f, {"input_ids": [[None]]}), ["x.parquet record 1", "list of integers"]),
    "id": (lambda f: table(f, {"input_ids": [7]}), ["x.parquet record 1", "not a list of integers"]),
    "chat that is a map": (
        lambda f: table(f, {"messages": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))}),
        ["x.parquet record 1", "`messages` is not a list"],
    ),
    "text of 10 MB": (lambda f: table(f, {"text": ["w" * 10 * MB]}), ["x.parquet record 1: the record is too long"]),
    "20 GB in a kilobyte": (messages_bomb, ["x.parquet: its records take too much memory"]),
    "5 million rows": (
        lambda f: table(f, {"text": repeated("w1", 5_000_000)}, store_schema=False),
        ["x.parquet: more than 1,000,000 records"],
    ),
}

SETTINGS = "expert1/adapter_config.json"
PAIR = "expert1/adapter_model.safetensors"
ADAPTERS: Cases = {
    "no JSON": (lambda f: (adapter(f), put(f, SETTINGS, "{")), [SETTINGS, "not valid JSON"]),
    "list": (lambda f: (adapter(f), put(f, SETTINGS, "[]")), [SETTINGS, "not a JSON object"]),
    "empty": (lambda f: (adapter(f), put(f, SETTINGS, "{}")), [SETTINGS, "peft_type None"]),
    "key twice": (lambda f: (adapter(f), put(f, SETTINGS, '{"r": 2, "r": 3}')), [SETTINGS, "'r' is given twice"]),
    **{
        f"rank {rank!r:.9}": ((lambda r: lambda f: adapter(f, r=r))(rank), [SETTINGS, f"rank {rank!r:.9}", "1 or more"])
        for rank in (0, -1, 10**18, "2", 2.0, None, True, [2], NAN)
    },
    **{
        f"alpha {alpha!r:.9}": (
            (lambda a: lambda f: adapter(f, lora_alpha=a))(alpha),
            [SETTINGS, f"and alpha {alpha!r:.9}", "a finite `lora_alpha`"],
        )
        for alpha in (NAN, INF, 1e300, 10**400, "4", None, True)
    },
    "no rank": (lambda f: adapter(f, r="left out"), [SETTINGS, "rank None"]),
    "other rank than the file's": (lambda f: adapter(f, r=4), [PREFIX, "(2, 32)", "rank 4"]),
    "kind of 1 MB": (lambda f: adapter(f, peft_type="x" * MB), [SETTINGS, "peft_type 'xxx", "…"]),
    "kinds": (lambda f: adapter(f, peft_type=["LORA"]), [SETTINGS, "peft_type ['LORA']"]),
    "unknown key of 1 MB": (lambda f: adapter(f, **{"x" * MB: True}), [SETTINGS, "xx…, which is not supported"]),
    "patterns in a list": (
        lambda f: adapter(f, rank_pattern=[1]),
        [SETTINGS, "rank_pattern or alpha_pattern is wrong"],
    ),
    "pattern that is none": (lambda f: adapter(f, rank_pattern={"(": 1}), [SETTINGS, "is wrong"]),
    "pattern that never ends": (lambda f: adapter(f, rank_pattern={"(.*)*!": 1}), [SETTINGS, "takes too long"]),
    "pattern that overflows": (lambda f: adapter(f, rank_pattern={"a{99999999999}": 1}), [SETTINGS, "too large"]),
    "pattern of 5,000 groups": (
        lambda f: adapter(f, alpha_pattern={"(" * 5000 + ")" * 5000: 1}),
        [SETTINGS, "recursion"],
    ),
    "rank by a pattern": (lambda f: adapter(f, rank_pattern={".*": "x"}), [SETTINGS, "rank 'x'"]),
    "half a pair": (lambda f: adapter(f, lambda p: p.pop(f"{PREFIX}lora_A.weight")), [PAIR, "without the other"]),
    "narrow A": (lambda f: adapter(f, factors(A=(2, 31))), ["(2, 31)", "(32, 32)"]),
    "short B": (lambda f: adapter(f, factors(B=(31, 2))), ["(31, 2)", "(32, 32)"]),
    "B of another rank": (lambda f: adapter(f, factors(B=(32, 3))), ["(32, 3)", "(32, 32)"]),
    "A that is a vector": (lambda f: adapter(f, factors(A=(2,))), ["(2,)", "(32, 32)"]),
    "A that is a number": (lambda f: adapter(f, factors(A=())), ["has shape ()", "rank 2"]),
    "empty A": (lambda f: adapter(f, factors(A=(0, 32))), ["(0, 32)", "rank 2"]),
    "A of integers": (
        lambda f: adapter(f, lambda p: p.update({f"{PREFIX}lora_A.weight": p[f"{PREFIX}lora_A.weight"].int()})),
        ["is I32", "F32"],
    ),
    "no such target": (
        lambda f: adapter(f, lambda p: p.update({name.replace("q_", "z_"): p.pop(name) for name in list(p)})),
        ["z_proj", "which the base does not have"],
    ),
    "no tensors": (lambda f: adapter(f, dict.clear), [PAIR, "the adapter has no tensors"]),
    "pickled": (
        lambda f: (adapter(f), (f / PAIR).rename(f / "expert1" / "adapter_model.bin")),
        ["expert1: no adapter_model.safetensors", "pickled", "save_pretrained"],
    ),
    "weights that are text": (lambda f: (adapter(f), put(f, PAIR, b"hello, world")), [PAIR, "not a whole safetensors"]),
    "weights that are a pipe": (lambda f: (adapter(f), pipe(f, PAIR)), [PAIR, "a pipe"]),
    "weights out of the folder": (lambda f: (adapter(f), move_out(f, PAIR)), [PAIR, "a link out"]),
    "config that is a pipe": (lambda f: (adapter(f), pipe(f, SETTINGS)), [SETTINGS, "a pipe"]),
}

OPTION = "`trust_remote_code: true`"
OWN = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
REPLACE = {"type": "Replace", "pattern": {"Regex": ".*"}, "content": ""}
TEMPLATE = ["x.jsonl:1: the chat template"]
# What needs the model's class or its tokenizer.
PREPARED: Cases = {
    "less than no features": (lambda f: edit_configs(f, hidden_size=-4), ["base: transformers cannot build"]),
    "features beyond all bounds": (lambda f: edit_configs(f, hidden_size=10**18), ["base: transformers cannot build"]),
    "features that are text": (lambda f: edit_configs(f, hidden_size="x"), ["base: transformers cannot read", "'x'"]),
    "other features than the file": (lambda f: edit_configs(f, hidden_size=64), ["base: ", "has shape (", "64"]),
    "vocabulary beyond all bounds": (lambda f: edit_configs(f, vocab_size=10**18), ["base: transformers cannot build"]),
    "larger vocabulary": (lambda f: edit_configs(f, vocab_size=10**7), ["base: ", "(10000000, 32), as config.json"]),
    "no heads": (lambda f: edit_configs(f, num_attention_heads=0), ["base: transformers cannot read"]),
    "heads beyond all bounds": (lambda f: edit_configs(f, head_dim=10**10), ["base: transformers cannot build"]),
    "unknown activation": (lambda f: edit_configs(f, hidden_act="x"), ["base: transformers cannot build"]),
    "unknown type": (lambda f: edit_configs(f, dtype="x"), ["base: transformers cannot read"]),
    "labels beyond all bounds": (
        lambda f: edit_configs(f, num_labels=10**18),
        ["config.json: it takes too much memory"],
    ),
    "kinds": (lambda f: edit_configs(f, model_type=["llama"]), ["base: transformers cannot read"]),
    "kind that writes nothing": (lambda f: edit_configs(f, model_type="t5"), ["base: transformers cannot build"]),
    "padding outside": (lambda f: edit_configs(f, pad_token_id=10**9), ["base: transformers cannot build"]),
    "method for a number": (lambda f: edit_configs(f, to_dict=1), ["base: transformers cannot read"]),
    "fewer blocks than the file": (lambda f: edit_configs(f, num_hidden_layers=2), ["layers.2", "no partner"]),
    "more blocks than the file": (lambda f: edit_configs(f, num_hidden_layers=30), ["fills", "layers.3"]),
    "expert of another activation": (lambda f: edit_json(f, "expert1/config.json", hidden_act="x"), ["expert1: "]),
    "expert of other features": (lambda f: edit_json(f, "expert1/config.json", hidden_size=64), ["expert1: ", "64"]),
    "expert that writes nothing": (
        lambda f: put(f, "expert1/generation_config.json", '{"max_new_tokens": -1}'),
        ["expert1: transformers cannot read its generation_config.json"],
    ),
    "code": (lambda f: own_code(f, model_type="evil", auto_map=OWN), ["base: transformers has no such", OPTION]),
    "code elsewhere": (
        lambda f: own_code(f, model_type="evil", auto_map={"AutoConfig": "owner/name--evil.Config"}),
        ["base: transformers has no such model", OPTION],
    ),
    "code of a tokenizer": (
        lambda f: (
            own_code(f),
            tokenizer_config(f, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}),
        ),
        ["base: its tokenizer cannot be read", OPTION],
    ),
    "tokenizer truncated": (
        lambda f: (text_record(f), put(f, "base/tokenizer.json", '{"version": "1.0", "mod')),
        ["base: its tokenizer cannot be read"],
    ),
    "tokenizer that is a list": (
        lambda f: (text_record(f), put(f, "base/tokenizer.json", "[]")),
        ["base: its tokenizer cannot be read"],
    ),
    "tokenizer of no kind": (lambda f: tokenizer(f, model={"type": "x"}), ["base: its tokenizer cannot be read"]),
    "tokenizer that leaves nothing": (lambda f: tokenizer(f, normalizer=REPLACE), ["x.jsonl:1", "makes no tokens"]),
    "tokens beyond the vocabulary": (cut_tokens, ["x.jsonl:1: token ids from 700 to 700", "64"]),
    "tokenizer_config.json": (
        lambda f: (text_record(f), put(f, "base/tokenizer_config.json", '{"a": ' + EMPTY_LISTS)),
        ["tokenizer_config.json: not valid JSON"],
    ),
    "class that is a list": (lambda f: tokenizer_config(f, tokenizer_class=["a"]), ["its tokenizer cannot be read"]),
    "tokens that are none": (lambda f: tokenizer_config(f, added_tokens_decoder=[1]), ["its tokenizer cannot be read"]),
    "ids below 0": (lambda f: calibration(f, '{"input_ids": [-1]}'), ["x.jsonl:1: token ids from -1 to -1", "64"]),
    "ids beyond the vocabulary": (lambda f: calibration(f, '{"input_ids": [64]}'), ["x.jsonl:1: token ids from 64"]),
    "id of 4,000 digits": (lambda f: calibration(f, '{"input_ids": [' + "9" * 4000 + "]}"), ["from 999", "…", "64"]),
    "template that refuses": (lambda f: template(f, "{{ raise_exception('no') }}"), [*TEMPLATE, "no"]),
    "template that is none": (lambda f: template(f, "{% if %}"), TEMPLATE),
    "template that divides by 0": (lambda f: template(f, "{{ 1 // 0 }}"), TEMPLATE),
    "template that reads a file": (lambda f: template(f, "{% include '/etc/passwd' %}"), TEMPLATE),
    "template that gets out": (lambda f: template(f, "{{ ''.__class__.__mro__ }}"), [*TEMPLATE, "unsafe"]),
    "template that calls itself": (lambda f: template(f, "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"), TEMPLATE),
    "template of a billion": (
        lambda f: template(f, "{% for i in range(10**9) %}x{% endfor %}"),
        [*TEMPLATE, "too big"],
    ),
    "template that never ends": (
        lambda f: template(f, "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2),
        [*TEMPLATE, "takes too long"],
    ),
    "template of 10 GB": (lambda f: template(f, "{{ 'a' * 10**10 }}"), [*TEMPLATE, "too much memory"]),
    "template of 50 MB": (lambda f: template(f, "{{ 'a' * 5 * 10**7 }}"), [*TEMPLATE, "makes 50,000,000 characters"]),
    "template of 5,000 brackets": (lambda f: template(f, "{{ " + "(" * 5000), TEMPLATE),
    "template that is not UTF-8": (lambda f: template(f, b"\xff\xfe"), ["base: its tokenizer cannot be read"]),
}


@pytest.fixture
def folder(llama_merge: Path, tmp_path: Path) -> Path:
    """The folder of a merge, to be spoilt."""
    return shutil.copytree(llama_merge.parent, tmp_path / "in")


@cases(record=RECORDS, table=TABLES, adapter=ADAPTERS)
def test_hostile_records_and_adapters_are_refused_by_a_plan(
    planner: Server, folder: Path, spoil: Spoil, words: list[str]
) -> None:
    spoil(folder)
    refused(planner.run("plan", "merge.yaml", cwd=folder), words)


@cases(prepared=PREPARED)
def test_what_transformers_does_not_take_is_refused_before_anything_starts(
    merger: Server, folder: Path, spoil: Spoil, words: list[str]
) -> None:
    spoil(folder)
    refused(merger.run("merge", "merge.yaml", "--out", "../out", cwd=folder), words, prepared=True)
