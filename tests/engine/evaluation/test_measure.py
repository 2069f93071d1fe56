"""Metrics of an evaluation against closed forms, and their invariance under batching and checkpoint settings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny
import tiny_images
import torch
from errors import refused
from hypothesis import given
from hypothesis import strategies as st
from object_store import Store
from thorough import as_thorough
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.calibration.records import Record
from engine.checkpoints.find import ModelName
from engine.errors import CalibrationError, CheckpointError, OutputError
from engine.evaluation.items import DataSet, make_item, read_data, unique
from engine.evaluation.measure import Evaluation, score
from engine.evaluation.metrics import chosen, exact_match, f1
from engine.evaluation.results import Row, results_file, save_results
from engine.evaluation.subject import Options, Reader, Subject, named
from engine.evaluation.tables import print_results, tables_of
from engine.storage.local_folder import LocalFolder
from engine.storage.paths import open_folder

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
# Question and answer pairs that the model below learns, and others that it does not.
LEARNT = [(f"w{i} w{i + 1} w{i * 7 % 40}", " ".join(f"w{j}" for j in range(i, i + 1 + i % 3))) for i in range(8)]
WRONG = [("w3 w4 w21", "w9 w9"), ("w30 w31 w32", "w7"), ("w5 w6 w35", "w5 w6")]
WORDS = st.lists(st.sampled_from(["one", "Two", "the", "three.", "a"]), max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A folder with a model that has learnt to answer some questions, and with an expert."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny.make_model()
    tiny.save_tokenizer(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [chat(tokenizer, question, answer) for question, answer in LEARNT]
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        for ids_BT in rows:
            optimizer.zero_grad()
            model(input_ids=ids_BT, labels=ids_BT).loss.backward()
            optimizer.step()
    tiny.save(model, folder / "model")
    tiny.save(tiny.make_expert(model, seed=1), folder / "expert")
    return folder


def chat(tokenizer: Any, question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return text


def records(fields: Sequence[Mapping[str, Any]]) -> list[Record]:
    return [Record(f"record {number}", one, 1.0) for number, one in enumerate(fields, start=1)]


def asked(pairs: Sequence[tuple[str, str]]) -> list[Record]:
    return records([{"question": question, "response": response} for question, response in pairs])


def measured(
    model: Path, items: Sequence[Record], expert: Path | None = None, **options: Any
) -> dict[str, tuple[float, int]]:
    given = Options(**({"max_new_tokens": 8} | options))
    data = DataSet("data", tuple(map(make_item, items)))
    subject = Subject(ModelName(str(model)), given)
    for item in data.items:
        with Reader(subject, data) as reader:
            reader.check(item)
    other = None if expert is None else Subject(ModelName(str(expert)), given)
    for one in (subject, other):
        if one is not None:
            one.load(CPU)
    rows = Evaluation(subject, CPU).measure("model", data, other)
    assert {(row.model, row.data) for row in rows} == {("model", "data")}
    return {row.metric: (row.value, row.count) for row in rows}


# Answers.


def test_f1_is_squads() -> None:
    assert f1("The cat sat.", "a cat sat") == 1
    assert f1("cat cat dog", "cat bird") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert f1("dog", "cat") == 0
    assert f1("the", "a") == 1 and f1("", "cat") == 0 and f1("cat", "the") == 0
    assert f1("it's", "its") == 1, "punctuation goes, and leaves no gap"


@given(WORDS, WORDS)
def test_f1_and_exact_match_are_symmetric(one: str, other: str) -> None:
    assert f1(one, other) == f1(other, one)
    assert 0 <= f1(one, other) <= 1 and f1(one, one) == 1
    assert exact_match(one, other) == exact_match(other, one) == float(one.strip() == other.strip())
    assert f1(one, other) == 1 or not exact_match(one, other)


def test_a_choice_is_taken_by_its_text_or_its_letter() -> None:
    choices = ["1", "10", "a dog"]
    assert [chosen(text, choices) for text in ("10", " 1.", "A dog, I think", "100")] == [1, 0, 2, None]
    assert [chosen(text, choices) for text in ("B", "(C)", "B. 10", "A: yes", "D", "Because", "", "b")] == [
        *(1, 2, 1, 0),
        *(None, None, None, None),
    ]
    assert chosen("A dog", ["cat", "bird"]) is None, "a word is no letter"


# Kinds of records.


def test_kinds_of_records() -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": [{"text": "w1"}]}
    fields: list[dict[str, Any]] = [
        {"text": "t"},
        {"question": "q"},
        {"messages": [user]},
        {"input_ids": [3, 4], "response": "w1"},
        {"question": "q", "response": "w1"},
        {"messages": [user, assistant]},
        {"question": "q", "choices": ["x", "y"], "answer": "B", "response": "other"},
    ]
    items = list(map(make_item, records(fields)))
    assert [item.kind for item in items] == ["text"] * 4 + ["response"] * 2 + ["choice"]
    assert [item.response for item in items[4:]] == ["w1", "w1", "y"]
    assert items[5].prompt is not None and items[5].prompt.fields["messages"] == [user]
    assert items[6].prompt is not None and items[6].prompt.fields["question"] == "q\nA. x\nB. y"
    assert [whole.fields["response"] for whole in items[6].wholes] == ["x", "y"]
    listed = make_item(records([{"question": "x or y?", "choices": ["x", "y"], "answer": 0}])[0])
    assert listed.prompt is not None and listed.prompt.fields["question"] == "x or y?", (
        "the question contains the choices"
    )


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"question": "q", "choices": ["x"], "answer": 0}, ["`choices`", "2 to 26"]),
        ({"question": "q", "choices": ["x", "x"], "answer": 0}, ["`choices`", "2 to 26"]),
        ({"question": "q", "choices": "xy", "answer": 0}, ["`choices`", "2 to 26"]),
        ({"question": "q", "choices": ["x", "y"], "answer": 2}, ["`answer` is 2", "0 to 1"]),
        ({"question": "q", "choices": ["x", "y"], "answer": True}, ["`answer` is True", "0 to 1"]),
        ({"question": "q", "choices": ["x", "y"], "answer": "C"}, ["`answer` is 'C'", "0 to 1"]),
        ({"question": "q", "choices": ["x", "y"]}, ["`answer` is None", "0 to 1"]),
        ({"text": "q", "choices": ["x", "y"], "answer": 0}, ["`choices`", "`text`", "`question`"]),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, ["user message", "assistant"]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": 3}]}, ["assistant", "text"]),
    ],
)
def test_invalid_records(fields: dict[str, Any], facts: list[str]) -> None:
    with refused(CalibrationError, where="record 1", facts=facts):
        make_item(records([fields])[0])


def test_data_from_files(tmp_path: Path) -> None:
    fields = [{"question": "q", "choices": ["x", "y"], "answer": "x"}, {"question": "r", "choices": ["x", "z"]}]
    (tmp_path / "one").mkdir()
    pa.parquet.write_table(pa.Table.from_pylist(fields[:1]), tmp_path / "one" / "test.parquet")
    (tmp_path / "test.json").write_text(json.dumps(fields))
    (tmp_path / "rest.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    files = [str(tmp_path / name) for name in ("one/test.parquet", "test.json", "rest.jsonl")]
    data = read_data(files, limit=1)
    assert [one.name for one in data] == ["one/test", f"{tmp_path.name}/test", "rest"]
    assert [(one.kind, len(one.items)) for one in data] == [("choice", 1), ("choice", 1), ("text", 1)]
    assert len(read_data(files[2:])[0].items) == 2
    with refused(CalibrationError, where="test.json record 2", facts=["`answer` is None"]):
        read_data(files)
    (tmp_path / "rest.jsonl").write_text('{"text": "a"}\n{"question": "b", "response": "c"}\n')
    with refused(CalibrationError, where="rest.jsonl:2", facts=["kind response", "kind text"]):
        read_data(files[2:])
    assert unique(["a", "a", "a-2", "b"]) == ["a", "a-2", "a-2-2", "b"]


# Metrics of answers.


def test_exact_match_by_generation_equals_that_by_teacher_forcing(learnt: Path) -> None:
    everything = asked([*LEARNT, *WRONG])
    found = measured(learnt / "model", everything, batch_size=4)
    model = AutoModelForCausalLM.from_pretrained(learnt / "model")
    tokenizer = AutoTokenizer.from_pretrained(learnt / "model")
    match, loss = score(model, tokenizer, everything, batch=4)
    assert found["exact_match"] == (match, 11) and match == 8 / 11
    assert 8 / 11 <= found["f1"][0] < 1
    assert found["loss"][0] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx((math.exp(loss), found["loss"][1]))


def test_the_loss_covers_the_response_and_its_end_token(learnt: Path) -> None:
    question, response = WRONG[0]
    found = measured(learnt / "model", asked([WRONG[0]]))
    model = AutoModelForCausalLM.from_pretrained(learnt / "model")
    tokenizer = AutoTokenizer.from_pretrained(learnt / "model")
    ids = tokenizer(f"user: {question} </s> assistant: {response} </s>").input_ids
    start = len(ids) - len(response.split()) - 1
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = -sum(float(log_probs[place - 1, ids[place]]) for place in range(start, len(ids))) / (len(ids) - start)
    assert found["loss"] == (pytest.approx(by_hand, rel=1e-5), 3)


def test_without_a_chat_template_the_model_must_end_its_answer(learnt: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(learnt / "model")
    tiny.save(model, tmp_path)
    tiny.save_tokenizer(tmp_path, chat=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    found = measured(tmp_path, asked(LEARNT))
    match, loss = score(model, tokenizer, asked(LEARNT), batch=3)
    assert found["exact_match"][0] == match
    assert found["loss"] == (pytest.approx(loss, rel=1e-5), sum(len(response.split()) + 1 for _, response in LEARNT))


def test_choices_by_generation_and_by_likelihood(learnt: Path) -> None:
    fields = [
        # The question contains its choices, so it stays as the model learnt it.
        {"question": question, "choices": [question.split()[0], question.split()[2]], "answer": 0}
        for question, response in LEARNT
        if response == question.split()[0] and question.split()[2] != response
    ]
    assert len(fields) == 2
    fields.append(fields[0] | {"answer": 1})
    found = measured(learnt / "model", records(fields))
    assert found == {"accuracy": (2 / 3, 3), "accuracy_likelihood": (2 / 3, 3)}


def test_a_penalty_of_the_checkpoint_changes_nothing(learnt: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(learnt / "model")
    model.generation_config.repetition_penalty = 5.0
    tiny.save(model, tmp_path)
    tiny.save_tokenizer(tmp_path)
    assert measured(tmp_path, asked(LEARNT))["exact_match"][0] == 1


# Metrics of texts.


def texts(count: int = 7) -> list[Record]:
    generator = torch.Generator().manual_seed(3)
    lengths = [2 + 3 * (i % 4) for i in range(count)]
    return records([{"input_ids": torch.randint(3, 60, (n,), generator=generator).tolist()} for n in lengths])


def test_a_model_is_its_own_expert(learnt: Path) -> None:
    found = measured(learnt / "model", texts(), learnt / "model")
    tokens = sum(len(record.fields["input_ids"]) for record in texts())
    assert {name: value for name, value in found.items() if name != "perplexity"} == {
        "kl": (0, tokens),
        "top1_agreement": (1, tokens),
        "hidden_distance": (0, tokens),
        "hidden_relative": (0, tokens),
    }
    assert measured(learnt / "model", texts()) == {"perplexity": found["perplexity"]}


def test_texts_against_a_plain_computation(learnt: Path) -> None:
    found = measured(learnt / "model", texts(), learnt / "expert", batch_size=3)
    student, expert = (AutoModelForCausalLM.from_pretrained(learnt / name) for name in ("model", "expert"))
    loss = kl = agree = distance = spread = tokens = predicted = 0.0
    for record in texts():
        ids_BT = torch.tensor([record.fields["input_ids"]])
        with torch.no_grad():
            mine, its = (one(ids_BT, output_hidden_states=True) for one in (student, expert))
        p, q = its.logits[0].double().log_softmax(-1), mine.logits[0].double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        loss -= float(q[:-1].gather(1, ids_BT[0, 1:, None]).sum())
        target_TH = its.hidden_states[1][0]
        distance += float((mine.hidden_states[1][0] - target_TH).square().mean(dim=1).sum())
        spread += float(target_TH.var(dim=0, correction=0).mean() * len(target_TH))
        tokens, predicted = tokens + ids_BT.shape[1], predicted + ids_BT.shape[1] - 1
    expected = {
        "perplexity": (math.exp(loss / predicted), predicted),
        "kl": (kl / tokens, tokens),
        "top1_agreement": (agree / tokens, tokens),
        "hidden_distance": (distance / tokens, tokens),
        "hidden_relative": (distance / spread, tokens),
    }
    assert found.keys() == expected.keys() and found["kl"][0] > 0 and 0 < found["top1_agreement"][0] < 1
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, rel=1e-4), metric


@pytest.mark.parametrize("family", ["llama", as_thorough("gemma2")])
def test_a_batch_changes_nothing(learnt: Path, tmp_path: Path, family: str) -> None:
    models = learnt
    if family != "llama":
        models = tmp_path
        base = tiny.make_model(family)
        tiny.save(base, tmp_path / "model")
        tiny.save_tokenizer(tmp_path / "model")
        tiny.save(tiny.make_expert(base, seed=1), tmp_path / "expert")
    for data, expert in ((texts(), models / "expert"), (asked([*LEARNT, *WRONG]), None)):
        alone = measured(models / "model", data, expert, batch_size=1)
        together = measured(models / "model", data, expert, batch_size=7)
        assert alone.keys() == together.keys()
        for metric, value in alone.items():
            assert together[metric] == pytest.approx(value, rel=1e-4), metric


def test_logits_some_tokens_at_a_time(learnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(learnt / "model", texts(), learnt / "expert")
    answers = measured(learnt / "model", asked(LEARNT))
    monkeypatch.setattr("engine.evaluation.measure.LOGIT_BYTES", 3 * 4 * tiny.VOCAB)
    for metric, value in measured(learnt / "model", texts(), learnt / "expert").items():
        assert value == pytest.approx(whole[metric], rel=1e-5), metric
    for metric, value in measured(learnt / "model", asked(LEARNT)).items():
        assert value == pytest.approx(answers[metric], rel=1e-5), metric


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl_chat"])
def test_records_with_images(tmp_path: Path, family: str) -> None:
    model = tiny_images.make_model(family)
    tiny_images.save(model, tmp_path / "model", family)
    tiny_images.save_processor(tmp_path / "model", family)
    tiny_images.draw(tmp_path / "one.png", seed=1)
    lines = [{"question": "w1 w2", "response": "w3", "image_path": "one.png"}, {"question": "w4", "response": "w5"}]
    for name, kept in (("answers", lines), ("texts", [{**line, "response": None} for line in lines])):
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    remote = family == "internvl_chat"
    for data in read_data([str(tmp_path / "answers.json"), str(tmp_path / "texts.json")]):
        given = [record for item in data.items for record in item.wholes]
        expert = tmp_path / "model" if data.kind == "text" else None
        found = measured(tmp_path / "model", given, expert, max_new_tokens=3, remote_code=remote)
        blind = measured(tmp_path / "model", [replace(one, images=()) for one in given[1:]], remote_code=remote)
        assert found["perplexity"][0] > 1
        assert found["perplexity"][1] > blind["perplexity"][1]
        if expert is None:
            assert found["exact_match"][1] == 2
        else:
            assert found["kl"][0] == 0
            assert found["kl"][1] > found["perplexity"][1] + 2, "image tokens count for kl and not for perplexity"


# Errors.


def test_records_that_a_model_cannot_process(learnt: Path, tmp_path: Path) -> None:
    model = learnt / "model"
    for data, options, facts, advice in (
        (records([{"input_ids": [1]}]), {}, ["at least 2"], ""),
        (records([{"input_ids": [1, 64]}]), {}, ["1 to 64"], ""),
        (records([{"input_ids": [5] * 9}]), {"max_length": 8}, ["9 tokens", "at most 8"], "--max-length"),
        (asked([("w1 " * 50, "w2")]), {"max_new_tokens": 90}, ["143 tokens"], "--max-new-tokens"),
        ([replace(texts(1)[0], images=(tmp_path / "x.png",))], {}, ["images"], ""),
    ):
        with refused(CalibrationError, where="record 1", do=advice, facts=facts):
            measured(model, data, **options)


def test_the_names_of_an_adapter_and_its_base(learnt: Path, tmp_path: Path) -> None:
    base, adapter = learnt / "model", tmp_path / "a+b"
    adapter.mkdir()

    def says(**config: Any) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(config))

    says(base_model_name_or_path=str(base), revision=None)
    assert named(str(base), tmp_path) == ModelName(str(base))
    assert named("a+b", tmp_path) == named(f"{base}+a+b", tmp_path) == ModelName(str(base), str(adapter))
    for config in ({}, {"base_model_name_or_path": 7}, {"base_model_name_or_path": "s3://bucket/base"}):
        says(**config)
        with refused(CheckpointError, where=str(adapter), do="BASE+a+b"):
            named("a+b", tmp_path)
    says(base_model_name_or_path="gone/away")
    with refused(CheckpointError, where=str(adapter), do="BASE+a+b", facts=["'gone/away'"]):
        named("a+b", tmp_path)
    says(base_model_name_or_path=str(adapter))
    with refused(CheckpointError, where=str(adapter), facts=["full checkpoint"]):
        named("a+b", tmp_path)
    with refused(CheckpointError, where=str(base)):
        named(f"{base}+{base}", tmp_path)
    says(base_model_name_or_path=str(base))
    with refused(CheckpointError, where=str(adapter), do="BASE+a+b", facts=["--trust-remote-code"]):
        named("a+b", tmp_path, remote_code=True)


def test_an_expert_of_another_size(learnt: Path, llama_merge: Path, tmp_path: Path) -> None:
    other = tiny.make_model("qwen2")
    other.resize_token_embeddings(70)
    tiny.save(other, tmp_path)
    subject = Subject(ModelName(str(learnt / "model")), Options())
    subject.check_alike(Subject(ModelName(str(llama_merge.parent / "expert0")), Options()))
    facts = ["70 tokens, 3 blocks, 32 features", f"{tiny.VOCAB} tokens, 3 blocks, 32 features"]
    with refused(CheckpointError, where=str(tmp_path), facts=facts):
        subject.check_alike(Subject(ModelName(str(tmp_path)), Options()))


def test_logits_that_are_not_finite(learnt: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(learnt / "model")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    tiny.save(model, tmp_path)
    with refused(CheckpointError, where="record ", facts=["finite"]):
        measured(tmp_path, texts())


# Results.


def test_results_are_a_file_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("m1", "a", "kl", 0.25, 3), Row("m1", "b", "f1", 1.0, 2, "m2"), Row("m2", "a", "kl", 1e-7, 3)]
    folder, name = results_file(str(tmp_path / "deep" / "out.parquet"))
    assert not (tmp_path / "deep").exists()
    save_results(rows, folder, name)
    table = pyarrow.parquet.read_table(tmp_path / "deep" / "out.parquet")
    assert [Row(**row) for row in table.to_pylist()] == rows
    assert {field.name: str(field.type) for field in table.schema} == {
        **{"model": "string", "data": "string", "metric": "string"},
        **{"value": "double", "count": "int64", "expert": "string"},
    }
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.parquet"]
    print_results(rows)
    said = capsys.readouterr().out.split()
    assert [word for word in said if not word.startswith("─")] == "kl a m1 0.25 m2 1e-07 b f1 (expert: m2) m1 1".split()


def test_tables_have_means_and_shares_of_the_experts_scores() -> None:
    scores = {
        "base": {"math": 0.2, "code": 0.0, "chat": 0.4},
        "merged": {"math": 0.6, "code": 0.9, "chat": 0.3},
        "math": {"math": 0.8},
        "code": {"code": 0.6, "math": 0.1},
    }
    experts = {"math": "math", "code": "code"}
    values = [(model, data, value) for model, of_model in scores.items() for data, value in of_model.items()]
    rows = [Row(m, d, "f1", value, 9, experts.get(d)) for m, d, value in values]
    rows += [Row(m, d, metric, 1 + v, 9, experts.get(d)) for metric in ("loss", "f1_stderr") for m, d, v in values]
    f1, loss, errors = tables_of(rows)
    assert f1.head() == ["f1", "math\n(expert: math)", "code\n(expert: code)", "chat", "mean", "of the experts"]
    assert list(f1.lines()) == [
        ["base", "0.2", "0", "0.4", "0.2", "12.5%"],
        ["merged", "0.6", "0.9", "0.3", "0.6", "112.5%"],
        ["math", "0.8", "", "", "", ""],
        ["code", "0.1", "0.6", "", "", "56.2%"],
    ]
    assert loss.mean("merged") == pytest.approx(1.6) and loss.of_experts("merged") is None
    assert errors.mean("merged") is None and len(errors.head()) == 4
    nothing = tables_of([Row(m, "a", "f1", 0.0, 9, "x") for m in ("x", "y")])[0]
    assert nothing.of_experts("y") is None and nothing.mean("y") is None, "no share of nothing, no mean of one"


def test_results_replace_only_results(tmp_path: Path, store: Store) -> None:
    rows = [Row("m1", "a", "kl", 0.25, 3)]
    mine = tmp_path / "mine.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a record"]}), mine)
    (tmp_path / "notes.parquet").write_text("notes")
    (tmp_path / "link.parquet").symlink_to("mine.parquet")
    os.mkfifo(tmp_path / "pipe.parquet")
    before = mine.read_bytes()
    for name in ("mine", "notes", "link", "pipe"):
        with refused(OutputError, where=".parquet"):
            results_file(str(tmp_path / f"{name}.parquet"))
        with refused(OutputError, where=f"{name}.parquet"):
            save_results(rows, LocalFolder(tmp_path), f"{name}.parquet")
    assert mine.read_bytes() == before and (tmp_path / "notes.parquet").read_text() == "notes"

    there = open_folder(f"{store.root}/scores")
    there.write("mine.parquet", before)
    with refused(OutputError, where="mine.parquet", do="--out"):
        results_file(f"{store.root}/scores/mine.parquet")
    for folder in (LocalFolder(tmp_path), there):
        for _ in range(2):
            save_results(rows, *results_file(f"{folder.where}/new.parquet"))
        assert "new.parquet" in folder.names()


def test_invalid_names_of_result_files(tmp_path: Path) -> None:
    with refused(OutputError, where="table.csv", facts=[".parquet"]):
        results_file("table.csv")
    (tmp_path / "x.parquet").mkdir()
    with refused(OutputError, where=str(tmp_path / "x.parquet"), do="--out"):
        results_file(str(tmp_path / "x.parquet"))
