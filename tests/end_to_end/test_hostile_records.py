"""Hostile records, tokenizers, chat templates and code through the command line; more in `test_hostile`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from hostile import Server, refused
from hostile_inputs import (
    MB,
    RECORD,
    Cases,
    Spoil,
    calibration,
    cases,
    cut_table,
    cut_tokens,
    edit_configs,
    edit_json,
    expert,
    link,
    messages_bomb,
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

EMPTY_LISTS = "[" * 100_000

# Bytes of a record at most, and the fields that a record can have.
MOST, FIELDS = "2,097,152", "input_ids, messages, question, text"
IDS = "`input_ids`"

RECORDS: Cases = {
    "10 MB line": (lambda f: calibration(f, '{"text": "' + "x" * 10 * MB + '"}'), ["x.jsonl:1", "the record", MOST]),
    "10 MB line of nothing": (lambda f: calibration(f, bytes(10 * MB)), ["x.jsonl:1", "the record", MOST]),
    "5 million ids": (
        lambda f: calibration(f, '{"input_ids": [' + "7," * 5 * MB + "7]}"),
        ["x.jsonl:1", "the record", MOST],
    ),
    "10 million lines": (lambda f: calibration(f, "\n" * 10 * MB), ["x.jsonl: ", "1,000,000"]),
    "100,000 lists": (lambda f: calibration(f, EMPTY_LISTS), ["x.jsonl:1", "list"]),
    "500 lists": (
        lambda f: calibration(f, '{"x": ' + "[" * 500 + "]" * 500 + "}"),
        ["x.jsonl:1", "JSON", "nested", " 100 "],
    ),
    "not UTF-8": (lambda f: calibration(f, b'{"text": "\xff"}'), ["x.jsonl: ", "UTF-8"]),
    "UTF-16": (lambda f: calibration(f, RECORD.encode("utf-16")), ["x.jsonl: ", "UTF-8"]),
    "binary": (lambda f: calibration(f, bytes(range(256))), ["x.jsonl:1", "JSON", "Expecting value"]),
    "blank lines": (lambda f: calibration(f, "\n \n\t\n"), ["x.jsonl: ", "'expert1'", "calibration records"]),
    "list": (lambda f: calibration(f, "[1, 2]"), ["x.jsonl:1", "mapping"]),
    "number": (lambda f: calibration(f, RECORD + "1"), ["x.jsonl:2", "mapping"]),
    "key twice": (lambda f: calibration(f, '{"text": "a", "text": "b"}'), ["x.jsonl:1", "JSON", "key 'text'"]),
    "ids that are fractions": (lambda f: calibration(f, '{"input_ids": [7.5]}'), ["x.jsonl:1", IDS, "integers"]),
    "ids that are true": (lambda f: calibration(f, '{"input_ids": [true]}'), ["x.jsonl:1", IDS, "integers"]),
    "ids that are no numbers": (lambda f: calibration(f, '{"input_ids": [NaN]}'), ["x.jsonl:1", IDS, "integers"]),
    "ids that are text": (lambda f: calibration(f, '{"input_ids": ["7"]}'), ["x.jsonl:1", IDS, "integers"]),
    "id of 5,000 digits": (
        lambda f: calibration(f, '{"input_ids": [' + "7" * 5000 + "]}"),
        ["x.jsonl:1", "JSON", "5000 digits"],
    ),
    "ids in lists": (lambda f: calibration(f, '{"input_ids": [[7]]}'), ["x.jsonl:1", IDS, "integers"]),
    "text that is a list": (lambda f: calibration(f, '{"text": ["a"]}'), ["x.jsonl:1", "`text`"]),
    "chat that is text": (lambda f: calibration(f, '{"messages": "a"}'), ["x.jsonl:1", "`messages`", "role"]),
    "chat of nobody": (
        lambda f: calibration(f, '{"messages": [{"content": "a"}]}'),
        ["x.jsonl:1", "`messages`", "role"],
    ),
    "chat of nothing": (lambda f: calibration(f, '{"messages": [null]}'), ["x.jsonl:1", "`messages`", "role"]),
    "half a character": (lambda f: calibration(f, '{"text": "\\ud800"}'), ["x.jsonl:1", "JSON", "surrogates"]),
    "key of 1 MB": (lambda f: calibration(f, '{"' + "x" * MB + '": 1}'), ["x.jsonl:1", "xx…", FIELDS]),
    "colours in a key": (lambda f: calibration(f, '{"\\u001b[31m": 1}'), ["x.jsonl:1", "'\\x1b[31m'", FIELDS]),
    "JSON that is a record": (lambda f: calibration(f, RECORD, "x.json"), ["x.json: ", "list", "records"]),
    "JSON of 40 MB": (
        lambda f: calibration(f, "[" + " " * 40 * MB + "]", "x.json"),
        ["x.json: ", "41,943,042", "33,554,432"],
    ),
    "JSON of 5 million records": (
        lambda f: calibration(f, "[" + "{}," * 5_000_000 + "{}]", "x.json"),
        ["x.json: ", "5,000,002", "4,000,000"],
    ),
    "JSON record of 10 MB": (
        lambda f: calibration(f, '[{"text": "' + "x" * 10 * MB + '"}]', "x.json"),
        ["x.json record 1", "the record", MOST],
    ),
    "JSON truncated": (
        lambda f: calibration(f, '[{"text": "x"}, {"te', "x.json"),
        ["x.json: ", "JSON", "column 18"],
    ),
    "JSON of 100,000 lists": (lambda f: calibration(f, EMPTY_LISTS, "x.json"), ["x.json: ", "JSON", "recursion"]),
    "table": (lambda f: calibration(f, "text\nw1\n", "x.csv"), ["x.csv: ", "'.csv'", ".parquet"]),
    "packed": (lambda f: calibration(f, RECORD, "x.jsonl.gz"), ["x.jsonl.gz: ", "'.gz'", ".parquet"]),
    "pipe": (
        lambda f: (pipe(f, "x.jsonl"), expert(f, calibration="x.jsonl")),
        ["in/x.jsonl", "'expert1'", "calibration file"],
    ),
    "device": (
        lambda f: expert(f, calibration="/dev/zero"),
        ["/dev/zero", "'expert1'", "calibration file"],
    ),
    "link to itself": (
        lambda f: (link(f, "x.jsonl", "x.jsonl"), expert(f, calibration="x.jsonl")),
        ["in/x.jsonl", "'expert1'", "loop"],
    ),
}

# Some of the facts are those of pyarrow, which the message quotes.
TABLES: Cases = {
    "empty": (lambda f: calibration(f, "", "x.parquet"), ["x.parquet: ", "parquet file", "0 bytes"]),
    "text": (lambda f: calibration(f, RECORD, "x.parquet"), ["x.parquet: ", "parquet file", "magic bytes"]),
    "huge footer": (
        lambda f: calibration(f, b"PAR1\xff\xff\xff\x7fPAR1", "x.parquet"),
        ["x.parquet: ", "parquet file", "2147483647"],
    ),
    "truncated": (lambda f: cut_table(f, 4, -30), ["x.parquet: ", "parquet file", "magic bytes"]),
    "without its beginning": (lambda f: cut_table(f, 3000, 10**9), ["x.parquet: ", "column metadata"]),
    "no rows": (
        lambda f: table(f, {"text": pa.array([], pa.string())}),
        ["x.parquet: ", "'expert1'", "calibration records"],
    ),
    "other columns": (lambda f: table(f, {"words": ["w1"]}), ["x.parquet record 1", "words", FIELDS]),
    "column twice": (
        lambda f: table(f, pa.Table.from_arrays([pa.array(["w1"]), pa.array(["w2"])], ["text", "text"])),
        ["x.parquet: ", "columns"],
    ),
    "text that is bytes": (lambda f: table(f, {"text": [b"w1"]}), ["x.parquet record 1", "`text`"]),
    "text that is a time": (
        lambda f: table(f, {"text": pa.array([1], pa.timestamp("us"))}),
        ["x.parquet record 1", "`text`"],
    ),
    "text that is no time": (
        lambda f: table(f, {"text": pa.array([2**62], pa.duration("s"))}),
        ["x.parquet: ", "too large"],
    ),
    "text that is no UTF-8": (no_text, ["x.parquet: ", "'utf-8'", "0xff"]),
    "ids that are fractions": (
        lambda f: table(f, {"input_ids": [[1.5]]}),
        ["x.parquet record 1", IDS, "integers"],
    ),
    "ids that are nothing": (
        lambda f: table(f, {"input_ids": [[None]]}),
        ["x.parquet record 1", IDS, "integers"],
    ),
    "id": (lambda f: table(f, {"input_ids": [7]}), ["x.parquet record 1", IDS, "integers"]),
    "chat that is a map": (
        lambda f: table(f, {"messages": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))}),
        ["x.parquet record 1", "`messages`", "role"],
    ),
    "text of 10 MB": (lambda f: table(f, {"text": ["w" * 10 * MB]}), ["x.parquet record 1", "the record", MOST]),
    "20 GB in a kilobyte": (messages_bomb, ["x.parquet: ", "memory"]),
    "5 million rows": (
        lambda f: table(f, {"text": repeated("w1", 5_000_000)}, store_schema=False),
        ["x.parquet: ", "1,000,000"],
    ),
}

OPTION = "`trust_remote_code: true`"
OWN = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
REPLACE = {"type": "Replace", "pattern": {"Regex": ".*"}, "content": ""}
TEMPLATE = ["x.jsonl:1", "chat template"]
BASE = "in/base: "
TOKENIZER = [BASE, "tokenizer", "`input_ids`"]
# Checked with the model's class or its tokenizer. Most of the facts are those of the libraries that the message quotes.
PREPARED: Cases = {
    "less than no features": (lambda f: edit_configs(f, hidden_size=-4), [BASE, "transformers", "dimension -4"]),
    "features beyond all bounds": (
        lambda f: edit_configs(f, hidden_size=10**18),
        [BASE, "transformers", f"[64, {10**18}]"],
    ),
    "features that are text": (
        lambda f: edit_configs(f, hidden_size="x"),
        [BASE, "transformers", "config.json", "'hidden_size'", "'x'"],
    ),
    "other features than the file": (
        lambda f: edit_configs(f, hidden_size=64),
        [BASE, "'lm_head.weight'", "(64, 32)", "(64, 64)"],
    ),
    "vocabulary beyond all bounds": (
        lambda f: edit_configs(f, vocab_size=10**18),
        [BASE, "transformers", f"[{10**18}, 32]"],
    ),
    "larger vocabulary": (
        lambda f: edit_configs(f, vocab_size=10**7),
        [BASE, "'lm_head.weight'", "(64, 32)", "(10000000, 32)", "config.json"],
    ),
    "no heads": (lambda f: edit_configs(f, num_attention_heads=0), [BASE, "transformers", "config.json", "by zero"]),
    "heads beyond all bounds": (
        lambda f: edit_configs(f, head_dim=10**10),
        [BASE, "transformers", "5120000000000 bytes"],
    ),
    "unknown activation": (lambda f: edit_configs(f, hidden_act="x"), [BASE, "transformers", ": 'x'\n"]),
    "unknown type": (lambda f: edit_configs(f, dtype="x"), [BASE, "transformers", "config.json", "attribute 'x'"]),
    "labels beyond all bounds": (lambda f: edit_configs(f, num_labels=10**18), [BASE, "config.json", "memory"]),
    "kinds": (lambda f: edit_configs(f, model_type=["llama"]), [BASE, "transformers", "config.json", "'list'"]),
    "kind that writes nothing": (lambda f: edit_configs(f, model_type="t5"), [BASE, "transformers", "T5Config"]),
    "padding outside": (lambda f: edit_configs(f, pad_token_id=10**9), [BASE, "transformers", "Padding_idx"]),
    "method for a number": (lambda f: edit_configs(f, to_dict=1), [BASE, "transformers", "config.json", "'int'"]),
    "fewer blocks than the file": (
        lambda f: edit_configs(f, num_hidden_layers=2),
        [BASE, "'model.layers.2.", "LlamaForCausalLM"],
    ),
    "more blocks than the file": (lambda f: edit_configs(f, num_hidden_layers=30), [BASE, "'model.layers.3."]),
    "expert of another activation": (
        lambda f: edit_json(f, "expert1/config.json", hidden_act="x"),
        ["in/expert1: ", "transformers", "'x'"],
    ),
    "expert of other features": (
        lambda f: edit_json(f, "expert1/config.json", hidden_size=64),
        ["in/expert1: ", "'lm_head.weight'", "(64, 32)", "(64, 64)"],
    ),
    "expert that writes nothing": (
        lambda f: put(f, "expert1/generation_config.json", '{"max_new_tokens": -1}'),
        ["in/expert1: ", "generation_config.json", "`max_new_tokens`", "-1"],
    ),
    "code": (lambda f: own_code(f, model_type="evil", auto_map=OWN), [BASE, "transformers", OPTION]),
    "code elsewhere": (
        lambda f: own_code(f, model_type="evil", auto_map={"AutoConfig": "owner/name--evil.Config"}),
        [BASE, "transformers", OPTION],
    ),
    "code of a tokenizer": (
        lambda f: (
            own_code(f),
            tokenizer_config(f, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}),
        ),
        [BASE, "tokenizer", "custom code", OPTION],
    ),
    "tokenizer truncated": (
        lambda f: (text_record(f), put(f, "base/tokenizer.json", '{"version": "1.0", "mod')),
        [*TOKENIZER, "column 20"],
    ),
    "tokenizer that is a list": (
        lambda f: (text_record(f), put(f, "base/tokenizer.json", "[]")),
        [*TOKENIZER, "'str'"],
    ),
    "tokenizer of no kind": (lambda f: tokenizer(f, model={"type": "x"}), [*TOKENIZER, "ModelUntagged"]),
    "tokenizer that leaves nothing": (lambda f: tokenizer(f, normalizer=REPLACE), ["x.jsonl:1", "no tokens"]),
    "tokens beyond the vocabulary": (cut_tokens, ["x.jsonl:1", "from 700", "64"]),
    "tokenizer_config.json": (
        lambda f: (text_record(f), put(f, "base/tokenizer_config.json", '{"a": ' + EMPTY_LISTS)),
        ["base/tokenizer_config.json: ", "JSON", "recursion"],
    ),
    "class that is a list": (lambda f: tokenizer_config(f, tokenizer_class=["a"]), [*TOKENIZER, "'removesuffix'"]),
    "tokens that are none": (lambda f: tokenizer_config(f, added_tokens_decoder=[1]), [*TOKENIZER, "'items'"]),
    "ids below 0": (lambda f: calibration(f, '{"input_ids": [-1]}'), ["x.jsonl:1", "-1", "64"]),
    "ids beyond the vocabulary": (lambda f: calibration(f, '{"input_ids": [64]}'), ["x.jsonl:1", "from 64", "64"]),
    "id of 4,000 digits": (
        lambda f: calibration(f, '{"input_ids": [' + "9" * 4000 + "]}"),
        ["x.jsonl:1", "from 999", "99…", "64"],
    ),
    "template that refuses": (lambda f: template(f, "{{ raise_exception('no') }}"), [*TEMPLATE, ": no"]),
    "template that is none": (lambda f: template(f, "{% if %}"), [*TEMPLATE, "'end of statement block'"]),
    "template that divides by 0": (lambda f: template(f, "{{ 1 // 0 }}"), [*TEMPLATE, "by zero"]),
    "template that reads a file": (lambda f: template(f, "{% include '/etc/passwd' %}"), [*TEMPLATE, "no loader"]),
    "template that gets out": (lambda f: template(f, "{{ ''.__class__.__mro__ }}"), [*TEMPLATE, "unsafe"]),
    "template that calls itself": (
        lambda f: template(f, "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
        [*TEMPLATE, "recursion"],
    ),
    "template of a billion": (
        lambda f: template(f, "{% for i in range(10**9) %}x{% endfor %}"),
        [*TEMPLATE, "MAX_RANGE"],
    ),
    "template that never ends": (
        lambda f: template(f, "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2),
        [*TEMPLATE, "too long"],
    ),
    "template of 10 GB": (lambda f: template(f, "{{ 'a' * 10**10 }}"), [*TEMPLATE, "memory"]),
    "template of 50 MB": (lambda f: template(f, "{{ 'a' * 5 * 10**7 }}"), [*TEMPLATE, "50,000,000", MOST]),
    "template of 5,000 brackets": (lambda f: template(f, "{{ " + "(" * 5000), [*TEMPLATE, "recursion"]),
    "template that is not UTF-8": (lambda f: template(f, b"\xff\xfe"), [*TOKENIZER, "'utf-8'", "0xff"]),
}

QUICK = {
    "code",
    "code of a tokenizer",
    "expert of other features",
    "expert that writes nothing",
    "fewer blocks than the file",
    "ids beyond the vocabulary",
    "larger vocabulary",
    "less than no features",
    "other features than the file",
    "template of 10 GB",
    "template that gets out",
    "template that refuses",
    "tokenizer that leaves nothing",
    "tokenizer truncated",
    "tokens beyond the vocabulary",
    "unknown activation",
}


@pytest.fixture
def folder(llama_merge: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a merge, for the test to corrupt."""
    return shutil.copytree(llama_merge.parent, tmp_path / "in")


@cases(every=2, thorough=["10 million lines", "20 GB in a kilobyte"], record=RECORDS, table=TABLES)
def test_hostile_records_are_refused_by_a_plan(planner: Server, folder: Path, spoil: Spoil, facts: list[str]) -> None:
    spoil(folder)
    refused(planner.run("plan", "merge.yaml", cwd=folder), facts)


@cases(thorough=PREPARED.keys() - QUICK, prepared=PREPARED)
def test_input_that_transformers_rejects_is_refused_before_anything_starts(
    merger: Server, folder: Path, spoil: Spoil, facts: list[str]
) -> None:
    spoil(folder)
    refused(merger.run("merge", "merge.yaml", "--out", "../out", cwd=folder), facts, prepared=True)
