"""Calibration samples: records of every kind as token ids, their order, and the place of invalid records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny
from conftest import plan_of
from errors import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from thorough import as_thorough

from engine.calibration.encoder import encoder
from engine.calibration.records import FIELDS, read_records
from engine.calibration.samples import Sample, make_samples
from engine.calibration.text_encoder import TextEncoder
from engine.errors import CalibrationError, CheckpointError
from engine.models.loading import load_tokenizer
from engine.planning.plan import Plan
from engine.planning.schedule import passes, training_order, windows

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
FUZZ = settings(max_examples=300, deadline=None, derandomize=True)
# Token ids of the tiny tokenizer: </s> 2, user: 4, assistant: 5, w0 6, w1 7, …
END, USER, ASSISTANT = 2, 4, 5


@pytest.fixture(scope="session")
def tokenizer(llama_merge: Path) -> Any:
    return load_tokenizer(llama_merge.parent / "base")


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a tokenizer without a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder, chat=False)
    return load_tokenizer(folder)


def write(path: Path, records: Any) -> Path:
    """Write records in the format that the file's name implies. Text and bytes are written unchanged."""
    if isinstance(records, str | bytes):
        path.write_bytes(records.encode() if isinstance(records, str) else records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    elif path.suffix == ".parquet":
        names = dict.fromkeys(name for record in records for name in record)
        columns = {name: [record.get(name) for record in records] for name in names}
        pyarrow.parquet.write_table(pa.table(columns), path)
    else:
        path.write_text(json.dumps(records), encoding="utf-8")
    return path


def plan_with(llama_merge: Path, *files: Path, options: Sequence[str] = ()) -> Plan:
    """Return the plan of two experts, the first of which has these calibration files."""
    return plan_of(llama_merge, f"models.0.calibration={json.dumps([str(file) for file in files])}", *options)


def first_samples(plan: Plan, tokenizer: Any) -> list[Sample]:
    return make_samples(read_records(plan), TextEncoder(tokenizer), plan)[0]


def check_refused(plan: Plan, where: str, *facts: str, tokenizer: Any = None) -> None:
    """Check that a record or file is refused with an error at `where` which states the facts."""
    with refused(CalibrationError) as caught:
        make_samples(read_records(plan), TextEncoder(tokenizer), plan)
    error = caught.value
    assert error.where == where
    # `where` contains the name of the test, which may contain a fact.
    assert all(fact in f"{error.what}; {error.expected}" for fact in facts), str(error)
    assert "None" not in error.what


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_records_of_each_kind_of_file_are_the_same_samples(
    tmp_path: Path, llama_merge: Path, tokenizer: Any, kind: str
) -> None:
    records = [
        {"input_ids": [7, 8, 9]},
        {"text": "w1 w2"},
        {"question": "w1"},
        {"question": "w1", "response": "w3", "source": "ignored"},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w3"}]},
    ]
    path = write(tmp_path / f"a.{kind}", records)
    samples = first_samples(plan_with(llama_merge, path), tokenizer)
    dialogue = (USER, 7, END, ASSISTANT, 9, END)
    assert [sample.input_ids for sample in samples] == [
        (7, 8, 9),
        (7, 8),
        (USER, 7, END, ASSISTANT),
        dialogue,
        dialogue,
    ]
    assert [(sample.expert, sample.index, sample.cut, sample.generate) for sample in samples] == [
        (0, index, 0, 0) for index in range(5)
    ]
    place = f"{path}:" if kind == "jsonl" else f"{path} record "
    assert [sample.where for sample in samples] == [f"{place}{number}" for number in range(1, 6)]


def test_a_record_is_made_of_the_first_field_that_it_has(tmp_path: Path, llama_merge: Path, tokenizer: Any) -> None:
    everything = {"text": "w4", "question": "w3", "messages": [{"role": "user", "content": "w2"}], "input_ids": [7]}
    names = ["input_ids", "messages", "question", "text"]
    records = [{**everything, **dict.fromkeys(names[:number])} for number in range(4)]
    path = write(tmp_path / "a.jsonl", records)
    assert [sample.input_ids for sample in first_samples(plan_with(llama_merge, path), tokenizer)] == [
        (7,),
        (USER, 8, END, ASSISTANT),
        (USER, 9, END, ASSISTANT),
        (10,),
    ]


def test_without_a_chat_template_a_question_is_text(tmp_path: Path, llama_merge: Path, plain_tokenizer: Any) -> None:
    records = [{"question": "w1 w2"}, {"question": "w1", "response": "w3"}, {"question": "w1", "response": ""}]
    plan = plan_with(llama_merge, write(tmp_path / "a.json", records), options=["calibration.generate_responses=5"])
    samples = first_samples(plan, plain_tokenizer)
    assert [(sample.input_ids, sample.generate) for sample in samples] == [((7, 8), 5), ((7, 9), 0), ((7,), 5)]


def test_only_prompts_are_marked_for_a_response(tmp_path: Path, llama_merge: Path, tokenizer: Any) -> None:
    user, assistant = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
    marked = [{"question": "w1"}, {"messages": [user]}, {"messages": [user, assistant, user]}]
    unmarked = [
        {"question": "w1", "response": "w2"},
        {"text": "w1"},
        {"input_ids": [7]},
        {"messages": [user, assistant]},
    ]
    options = ["calibration.generate_responses=6", "parameters.samples_per_model=99"]
    plan = plan_with(llama_merge, write(tmp_path / "a.jsonl", [*marked, *unmarked]), options=options)
    assert [sample.generate for sample in first_samples(plan, tokenizer)] == [6, 6, 6, 0, 0, 0, 0]
    assert not any(sample.generate for sample in first_samples(plan_with(llama_merge, tmp_path / "a.jsonl"), tokenizer))


@pytest.mark.parametrize(("length", "generate"), [(4, 0), (5, 1), (9, 5), (10, 6), (2, 0)])
def test_a_response_ends_at_max_length(
    tmp_path: Path, llama_merge: Path, tokenizer: Any, length: int, generate: int
) -> None:
    options = ["calibration.generate_responses=6", f"calibration.max_length={length}"]
    plan = plan_with(llama_merge, write(tmp_path / "a.jsonl", [{"question": "w1"}]), options=options)
    assert first_samples(plan, tokenizer)[0].generate == generate


@pytest.mark.parametrize(("length", "kept", "cut"), [(2, 2, 8), (9, 9, 1), (10, 10, 0), (11, 10, 0)])
def test_tokens_beyond_max_length_are_left_out_and_counted(
    tmp_path: Path, llama_merge: Path, length: int, kept: int, cut: int
) -> None:
    path = write(tmp_path / "a.jsonl", [{"input_ids": list(range(10, 20))}])
    plan = plan_with(llama_merge, path, options=[f"calibration.max_length={length}"])
    (sample,) = first_samples(plan, None)
    assert (sample.input_ids, sample.cut) == (tuple(range(10, 10 + kept)), cut)


@pytest.mark.parametrize(
    ("counts", "total", "taken"),
    [
        ((None, None), 9, [9, 7, 8, 6, 5]),
        ((None, None), 3, [9, 7, 8]),
        ((None, None), 1, [9]),
        ((2, None), 1, [9, 7, 8]),
        ((1, 1), 9, [9, 7]),
        ((None, 9), 2, [9, 7, 8, 6]),
    ],
)
def test_files_of_one_expert_take_turns_and_may_have_numbers_of_their_own(
    tmp_path: Path, llama_merge: Path, counts: tuple[int | None, int | None], total: int, taken: list[int]
) -> None:
    lists = [("b.jsonl", [9, 8, 5]), ("a.json", [7, 6])]
    files = [write(tmp_path / name, [{"input_ids": [i]} for i in ids]) for name, ids in lists]
    given = [
        {"path": str(file), "samples": count} if count else str(file) for file, count in zip(files, counts, strict=True)
    ]
    options = [f"models.0.calibration={json.dumps(given)}", f"parameters.samples_per_model={total}"]
    samples = first_samples(plan_of(llama_merge, *options), None)
    assert [sample.input_ids for sample in samples] == [(i,) for i in taken]


def test_a_file_may_have_a_loss_weight_of_its_own(tmp_path: Path, llama_merge: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", [{"input_ids": [7]}]) for name in "ab"]
    given = [{"path": str(files[0]), "loss_weight": 0.25}, str(files[1])]
    plan = plan_of(llama_merge, f"models.0.calibration={json.dumps(given)}", "parameters.loss_weight=3")
    assert [sample.loss_weight for sample in first_samples(plan, None)] == [0.25, 3.0]


def test_blank_lines_are_no_records_and_count_as_lines(tmp_path: Path, llama_merge: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\n{"input_ids": [7]}\r\n  \n{"input_ids": [8]}')
    assert [sample.where for sample in first_samples(plan_with(llama_merge, path), None)] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ([], [4, 3]),
        (["parameters.samples_per_model=2"], [2, 2]),
        (["parameters.samples_per_model=2", "models.1.parameters.samples_per_model=1"], [2, 1]),
        (["models.0.parameters.samples_per_model=3"], [3, 3]),
    ],
)
def test_each_expert_has_at_most_samples_per_model(llama_merge: Path, options: list[str], counts: list[int]) -> None:
    plan = plan_of(llama_merge, *options)
    everything = read_records(plan_of(llama_merge))
    records = read_records(plan)
    assert [len(mine) for mine in records] == counts
    assert records == [mine[:count] for mine, count in zip(everything, counts, strict=True)]


def test_by_default_five_samples_are_taken(tmp_path: Path, llama_merge: Path) -> None:
    plan = plan_with(llama_merge, write(tmp_path / "a.jsonl", [{"input_ids": [i]} for i in range(9)]))
    assert [sample.input_ids for sample in first_samples(plan, None)] == [(i,) for i in range(5)]


def test_shuffling_permutes_the_whole_list_by_the_seed_before_samples_are_taken(
    tmp_path: Path, llama_merge: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [{"input_ids": [i]} for i in range(60)])

    def taken(seed: int, count: int, *more: str) -> list[str]:
        options = [f"seed={seed}", "calibration.shuffle=true", f"parameters.samples_per_model={count}", *more]
        return [sample.where for sample in first_samples(plan_with(llama_merge, path, options=options), None)]

    every = [f"{path}:{number}" for number in range(1, 61)]
    whole = taken(0, 60)
    assert whole != every and sorted(whole) == sorted(every)
    assert taken(0, 5) == whole[:5]
    assert taken(0, 60) == whole
    assert taken(1, 60) != whole
    assert taken(0, 60, f"models.1.calibration={path}") == whole, "another expert's samples change nothing"


def test_the_lists_of_two_experts_are_shuffled_each_in_its_own_way(tmp_path: Path, llama_merge: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"input_ids": [i]} for i in range(60)])
    options = [f"models.1.calibration={path}", "calibration.shuffle=true", "parameters.samples_per_model=60"]
    first, second = read_records(plan_with(llama_merge, path, options=options))
    assert first != second and sorted(first, key=str) == sorted(second, key=str)


@pytest.mark.parametrize(("records", "needed"), [([{"input_ids": [7]}], False), ([{"text": "w1"}], True)])
def test_a_tokenizer_is_needed_for_text_alone(
    tmp_path: Path, llama_merge: Path, records: list[Any], needed: bool
) -> None:
    plan = plan_with(llama_merge, write(tmp_path / "a.jsonl", records))
    with refused(CheckpointError, facts=["tokenizer"]) if needed else nullcontext():
        encoder(replace(plan, tokenizer=str(tmp_path)), read_records(plan))


def test_samples_go_round_robin_and_a_shorter_list_starts_again() -> None:
    assert training_order([3, 1, 2], 1) == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 0), (2, 1), (0, 2), (1, 0), (2, 0)]
    assert training_order([1, 2], 2) == [(0, 0), (1, 0), (0, 0), (1, 1)] * 2


@PROPERTY
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 12))
def test_order_and_windows_are_those_of_the_method(counts: list[int], epochs: int, size: int) -> None:
    order = training_order(counts, epochs)
    longest, experts = max(counts), len(counts)
    assert len(order) == longest * experts * epochs
    for place, (expert, index) in enumerate(order):
        assert expert == place % experts
        assert index == place // experts % longest % counts[expert]
    cut = windows(order, size)
    assert [pair for window in cut for pair in window] == order
    assert all(len(window) == size for window in cut[:-1]) and 1 <= len(cut[-1]) <= size


@pytest.mark.parametrize(
    ("name", "content", "place", "fact"),
    [
        ("a.jsonl", "", "", "'expert0'"),
        ("a.jsonl", "\n \n", "", "'expert0'"),
        ("a.json", "[]", "", "'expert0'"),
        ("a.json", "", "", "JSON"),
        ("a.json", '{"text": "w1"}', "", "list"),
        ("a.json", '"text"', "", "list"),
        ("a.json", "[{]", "", "JSON"),
        ("a.json", "[" * 100_000, "", "JSON"),
        ("a.json", b"[\xff]", "", "UTF-8"),
        ("a.json", '[{"text": "w1"}, 3]', " record 2", "mapping"),
        ("a.json", "[[]]", " record 1", "mapping"),
        ("a.jsonl", '{"text": "w1"}\n\n{"text": w2}\n', ":3", "JSON"),
        ("a.jsonl", '{"text": "w1"}\n{"text":\n"w2"}\n', ":2", "JSON"),
        ("a.jsonl", "[1]\n", ":1", "mapping"),
        ("a.jsonl", '{"text": "w1"}\nnull\n', ":2", "mapping"),
        ("a.jsonl", b'{"text": "\xff"}\n', "", "UTF-8"),
        ("a.jsonl", '{"a": %s}' % ("9" * 5000), ":1", "JSON"),
        ("a.parquet", b"", "", "parquet"),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "", ""),
        ("a.parquet", [{"words": "w1"}], " record 1", "words"),
        ("a.csv", "text\nw1\n", "", "'.csv'"),
        ("a", "w1", "", ".json, .jsonl or .parquet"),
    ],
    ids=str,
)
def test_a_file_that_is_no_list_of_records_is_reported_with_the_place(
    tmp_path: Path, llama_merge: Path, tokenizer: Any, name: str, content: Any, place: str, fact: str
) -> None:
    path = write(tmp_path / name, content)
    check_refused(plan_with(llama_merge, path), f"{path}{place}", fact, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        ({}, ["none", ", ".join(FIELDS)]),
        ({"words": "w1", "label": 3}, ["words, label", ", ".join(FIELDS)]),
        ({"text": None}, ["fields: text", ", ".join(FIELDS)]),
        ({"text": ""}, ["`text`", "empty"]),
        ({"text": " \n"}, ["`text`", "empty"]),
        ({"text": ["w1"]}, ["`text`", "string"]),
        ({"question": 5}, ["`question`", "string"]),
        ({"question": "", "text": "w1"}, ["`question`", "empty"]),
        ({"question": "w1", "response": ["w2"]}, ["`response`", "string"]),
        ({"messages": []}, ["`messages`", "{role, content}"]),
        ({"messages": "w1"}, ["`messages`", "{role, content}"]),
        ({"messages": [{"role": "user"}]}, ["`messages`", "{role, content}"]),
        ({"messages": [{"role": 5, "content": "w1"}]}, ["`messages`", "{role, content}"]),
        ({"messages": [["user", "w1"]]}, ["`messages`", "{role, content}"]),
        ({"input_ids": "7 8"}, ["`input_ids`", "integers"]),
        ({"input_ids": [7.0]}, ["`input_ids`", "integers"]),
        ({"input_ids": [True]}, ["`input_ids`", "integers"]),
        ({"input_ids": [[7]]}, ["`input_ids`", "integers"]),
        ({"input_ids": {"7": 8}}, ["`input_ids`", "integers"]),
        ({"input_ids": []}, ["no tokens"]),
        ({"input_ids": [7, 64]}, ["7 to 64", "size, 64"]),
        ({"input_ids": [-1, 7]}, ["-1 to 7", "size, 64"]),
        ({"input_ids": [10**30]}, [f"{10**30}", "size, 64"]),
        ({"question": "w1", "image_path": "a.png"}, ["images"]),
        ({"question": "w1", "image_paths": ["a.png", "b.png"]}, ["images"]),
        ({"text": "w1 \ud800"}, []),
        ({"question": "\ud800"}, []),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, []),
    ],
    ids=str,
)
@pytest.mark.parametrize("template", [True, False])
def test_an_invalid_record_is_reported_with_its_line(
    tmp_path: Path,
    llama_merge: Path,
    tokenizer: Any,
    plain_tokenizer: Any,
    record: dict[str, Any],
    facts: list[str],
    template: bool,
) -> None:
    path = write(tmp_path / "a.jsonl", [{"input_ids": [7]}, record])
    plan = plan_with(llama_merge, path)
    check_refused(plan, f"{path}:2", *facts, tokenizer=tokenizer if template else plain_tokenizer)


def test_a_chat_without_a_chat_template_is_a_fault(tmp_path: Path, llama_merge: Path, plain_tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "w1"}]}])
    check_refused(plan_with(llama_merge, path), f"{path}:1", "chat template", tokenizer=plain_tokenizer)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ messages[9]['content'] }}", "{% if %}"]
)
def test_a_chat_template_that_fails_on_a_record_is_reported(tmp_path: Path, llama_merge: Path, template: str) -> None:
    tiny.save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = template
    path = write(tmp_path / "a.jsonl", [{"question": "w1"}])
    check_refused(plan_with(llama_merge, path), f"{path}:1", "chat template", tokenizer=tokenizer)


def test_an_invalid_record_beyond_those_that_are_taken_is_reported(tmp_path: Path, llama_merge: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"input_ids": [7]}] * 9 + [{"words": 3}])
    check_refused(plan_with(llama_merge, path), f"{path}:10", "words")


@pytest.mark.parametrize("column", [pa.array([1], pa.timestamp("ns")), pa.array([1], pa.duration("ns"))], ids=str)
def test_a_parquet_column_that_is_no_field_of_ours_is_ignored_whatever_its_type(
    tmp_path: Path, llama_merge: Path, tokenizer: Any, column: Any
) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["w1"], "made": column}), path)
    assert [sample.input_ids for sample in first_samples(plan_with(llama_merge, path), tokenizer)] == [(7,)]


def test_a_file_that_went_away_is_a_fault(tmp_path: Path, llama_merge: Path) -> None:
    for name in ("a.json", "a.jsonl", "a.parquet"):
        path = write(tmp_path / name, [{"input_ids": [7]}])
        plan = plan_with(llama_merge, path)
        path.unlink()
        check_refused(plan, str(path))


def are_records_or_refused(plan: Plan, tokenizer: Any, path: Path) -> bool:
    try:
        return bool(make_samples(read_records(plan), TextEncoder(tokenizer), plan)[0])
    except CalibrationError as error:
        return str(error).startswith(str(path))


@pytest.fixture(scope="session")
def random_file(llama_merge: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """Return a plan and the calibration file of its first expert, which each example overwrites."""
    path = write(tmp_path_factory.mktemp("random") / "a.jsonl", [])
    return plan_with(llama_merge, path), path


@PROPERTY
@given(st.binary(max_size=80) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b'{"input_ids": [7]}')
@example(b'\xef\xbb\xbf{"input_ids": [7]}')
@example(b'{"text": "\\ud800"}')
@example(b'{"question": "\\ud800"}')
def test_random_bytes_are_records_or_a_calibration_error(
    random_file: tuple[Plan, Path], tokenizer: Any, content: bytes
) -> None:
    plan, path = random_file
    path.write_bytes(content)
    assert are_records_or_refused(plan, tokenizer, path)


GOOD = [
    {"input_ids": [7, 8]},
    {"text": "w1 w2"},
    {"question": "w1", "response": "w3"},
    {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w3"}]},
]
# Each file has a single column, so that its rows are valid records.
COLUMNS = [{name: [record[name]] * 3} for record in GOOD for name in record if name != "response"]
PIECES = [
    b"\0",
    b"\xff",
    b"\xff\xff\xff\x7f",
    b"\n",
    b"{",
    b"[" * 200,
    b"]",
    b'"',
    b"null",
    b"NaN",
    b"1e400",
    b"9" * 5000,
]


@pytest.fixture(scope="session")
def good_files(
    llama_merge: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Plan, Path, list[bytes]]]:
    """Return, for each kind of file, a plan that reads such a file, its path, and valid contents."""
    folder = tmp_path_factory.mktemp("good")
    made = {}
    for kind in ("json", "jsonl", "parquet"):
        path = folder / f"a.{kind}"
        contents = []
        for number, columns in enumerate(COLUMNS):
            if kind == "parquet":
                options = {"compression": "snappy" if number % 2 else "zstd", "use_dictionary": number < 2}
                pyarrow.parquet.write_table(pa.table(columns), path, **options)
            else:
                write(path, GOOD)
            contents.append(path.read_bytes())
        made[kind] = plan_with(llama_merge, path), path, contents
    return made


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_good_files_are_good(good_files: Any, tokenizer: Any, kind: str) -> None:
    plan, path, contents = good_files[kind]
    for content in contents:
        path.write_bytes(content)
        assert first_samples(plan, tokenizer)


@pytest.mark.parametrize("kind", [as_thorough("json"), "jsonl", as_thorough("parquet")])
@FUZZ
@given(st.data())
def test_a_spoilt_file_is_records_or_a_calibration_error(
    good_files: Any, tokenizer: Any, kind: str, data: st.DataObject
) -> None:
    plan, path, contents = good_files[kind]
    content = data.draw(st.sampled_from(contents))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, min(len(content), start + 9)))
        piece = data.draw(st.sampled_from([*PIECES, b"", content[start:stop] * 2]) | st.binary(max_size=4))
        content = content[:start] + piece + content[stop:]
    path.write_bytes(content)
    assert are_records_or_refused(plan, tokenizer, path)


leaves = st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.text(max_size=6) | st.just("w1")
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = st.sampled_from(["input_ids", "messages", "question", "response", "text", "image_path", "other"])


@PROPERTY
@given(st.lists(values | st.dictionaries(fields, values, max_size=4), max_size=3))
@example([{"messages": [{"role": "user", "content": {"a": [1, None]}}]}])
def test_any_json_is_records_or_a_calibration_error(
    random_file: tuple[Plan, Path], tokenizer: Any, records: list[Any]
) -> None:
    plan, path = random_file
    write(path, records)
    assert are_records_or_refused(plan, tokenizer, path)


@given(tokens=st.lists(st.integers(1, 50), min_size=1, max_size=12), limit=st.integers(1, 300))
def test_passes_hold_every_sample_once_and_no_more_tokens_than_the_limit(tokens: list[int], limit: int) -> None:
    made = passes(tokens, limit)
    assert sorted(index for together in made for index in together) == list(range(len(tokens)))
    longest = [max(tokens[index] for index in together) for together in made]
    assert all(most * len(together) <= max(limit, *tokens) for most, together in zip(longest, made, strict=True))
    # The first sample of a pass would not have fit into the pass before.
    for before, (most, together) in zip(made, list(zip(longest, made, strict=True))[1:], strict=False):
        assert max(tokens[index] for index in before) * (len(before) + 1) > max(limit, *tokens)
        assert most == tokens[together[0]]


def test_passes_keep_the_order_of_equals_and_put_long_samples_first() -> None:
    assert passes([5, 5, 5, 5, 5], 10) == [[0, 1], [2, 3], [4]]
    assert passes([3, 9, 3, 8], 18) == [[1, 3], [0, 2]]
    assert passes([100, 20, 20, 20], 1) == [[0], [1, 2, 3]], "as many tokens as the longest sample has in any case"
    assert passes([7], 256) == [[0]]
