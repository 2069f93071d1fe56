"""Advice of `evaluate`, `report` and the command line is right: followed, the command succeeds.

The tests hold against tests/golden/messages.txt: a new `do` of the packages below needs a test, or an entry that names
the test that follows it, or says why none does.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet
import pytest
import tiny
import torch
import transformers
from advice import Advice
from click.testing import CliRunner, Result
from conftest import plan_of
from hostile_inputs import put
from recorded_merges import write_merge
from thorough import thorough_but

import cli
from cluster.evaluation import task_cpus
from cluster.seats import Node
from engine.errors import MergeError
from engine.evaluation.lm_eval_harness import Tasks, check_tasks
from engine.evaluation.measure import Evaluation
from engine.report import page

ELSEWHERE = {
    "{MORE}": "more or larger GPUs",
    "the training has saved no checkpoint of its last step": "test_callback.py, which trains again with a strategy",
    "give another name, or remove the file": "test_init.py, which removes it",
    "no answer to the question for the": "test_init.py, which gives these options",
    "begin a new one with /reset": "test_chat.py, which does",
}
# What the tests below this table of commands follow, by a part of the text in the golden file.
BELOW = (
    "{smaller}",
    "{lower --num-gpus to {most} at most | add a node with a CPU for tasks}",
    'run `pip install ".[eval]"` in the checkout',
    "give a config; `init` writes one, and `make demo` in a checkout shows a whole merge",
    "change to an existing folder",
    "name the base: BASE+{adapter}",
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [*map(str, arguments)])


def advice_of(ended: Result) -> str:
    """Return the advice in what a command printed."""
    assert ended.exit_code in (2, 3, 4) and "error: " in ended.stderr, ended.output
    return ended.stderr.partition("\n  do: ")[2].strip()


def done(*arguments: object) -> Result:
    """Run a command that must succeed."""
    ended = run(*arguments)
    assert ended.exit_code == 0, ended.output
    return ended


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands in this process change how it takes SIGTERM."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def gpt2(folder: Path) -> None:
    """Save a model with a table of 32 positions."""
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tiny.save_tokenizer(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, data and the output of a merge. Read-only."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    write_merge(plan_of(tiny.make_merge(folder)), folder / "m")
    gpt2(folder / "gpt2")
    records(folder, "text.jsonl", {"text": "w1 w2 w3"}, {"text": "w4 w5"})
    records(folder, "answers.jsonl", {"question": "w1 w2", "response": "w3"})
    records(folder, "long.jsonl", {"question": "w1 " * 200, "response": "w3"})
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which commands run."""
    copy = shutil.copytree(whole, tmp_path / "work")
    monkeypatch.chdir(copy)
    return copy


def records(folder: Path, name: str, *fields: dict[str, Any]) -> None:
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in fields))


Arguments = Sequence[object]
TEXT, ANSWERS = ("evaluate", "base", "--data", "text.jsonl"), ("evaluate", "base", "--data", "answers.jsonl")
LONG = ("evaluate", "base", "--data", "long.jsonl", "--max-length", "300")


@dataclass(frozen=True)
class Row:
    """A command that is refused in a folder that `spoil` changes.

    Each of `follow` is a way to do what the advice says: it takes the folder and the matched text of the regular
    expression `named`, and returns the command to run then. `template` is the advice in the golden file, if it differs.
    """

    named: str
    arguments: Arguments
    follow: tuple[Callable[[Path, re.Match[str]], Arguments], ...]
    spoil: Callable[[Path], object] = lambda _: None
    template: str = ""


def each_kind(folder: Path, _: re.Match[str]) -> Arguments:
    first, second = (folder / "kinds.jsonl").read_text().splitlines()
    put(folder, "first.jsonl", first)
    put(folder, "second.jsonl", second)
    return ("evaluate", "base", "--data", "first.jsonl", "--data", "second.jsonl")


def without(folder: Path, name: str, arguments: Arguments) -> Arguments:
    (folder / name).unlink()
    return arguments


def shorter(folder: Path, arguments: Arguments, name: str = "long.jsonl") -> Arguments:
    records(folder, name, {"question": "w1", "response": "w3"})
    return arguments


def with_scores(folder: Path, _: re.Match[str]) -> Arguments:
    done(*TEXT, "--out", "new.parquet")
    return ("report", "m", "--evaluation", "new.parquet")


ROWS = (
    Row(
        "put each kind into a file of its own",
        ("evaluate", "base", "--data", "kinds.jsonl"),
        (each_kind,),
        lambda f: records(f, "kinds.jsonl", {"text": "w1 w2"}, {"question": "w1", "response": "w2"}),
    ),
    Row(
        "lower --max-new-tokens, or shorten the record",
        ("evaluate", "base", "--data", "middle.jsonl"),
        (
            lambda f, _: ("evaluate", "base", "--data", "middle.jsonl", "--max-new-tokens", "8"),
            lambda f, _: shorter(f, ("evaluate", "base", "--data", "middle.jsonl"), "middle.jsonl"),
        ),
        lambda f: records(f, "middle.jsonl", {"question": "w1 " * 100, "response": "w2"}),
    ),
    Row("^shorten the record", LONG, (lambda f, _: shorter(f, LONG),), template="| shorten the record}"),
    Row(
        "^shorten the record",
        ("evaluate", "gpt2", "--data", "text.jsonl"),
        (lambda f, _: (records(f, "text.jsonl", {"text": "w1 " * 32}), ("evaluate", "gpt2", *TEXT[2:]))[1],),
        lambda f: records(f, "text.jsonl", {"text": "w1 " * 33}),
        template="shorten the record",
    ),
    Row(
        "raise --max-length, or shorten the record",
        (*ANSWERS, "--max-length", "4"),
        (
            lambda f, _: (*ANSWERS, "--max-length", "9"),
            lambda f, _: shorter(f, (*ANSWERS, "--max-length", "8"), "answers.jsonl"),
        ),
    ),
    Row(
        "give another --out",
        (*TEXT, "--out", "m/x.parquet"),
        (lambda f, _: (*TEXT, "--out", "y.parquet"),),
        lambda f: (f / "m/x.parquet").mkdir(),
    ),
    Row(
        "give another --out, or remove the file",
        (*TEXT, "--out", "x.parquet"),
        (
            lambda f, _: (*TEXT, "--out", "y.parquet"),
            lambda f, _: without(f, "x.parquet", (*TEXT, "--out", "x.parquet")),
        ),
        lambda f: put(f, "x.parquet", "mine"),
    ),
    Row(
        "give another --out",
        (*TEXT, "--out", "merge.yaml/x.parquet"),
        (lambda f, _: (*TEXT, "--out", "y.parquet"),),
    ),
    Row(
        "give another --out",
        (*TEXT, "--out", f"{'x' * 300}.parquet"),
        (lambda f, _: (*TEXT, "--out", "y.parquet"),),
    ),
    Row(
        "give another --out",
        ("report", "m", "--out", "merge.yaml/r.html"),
        (lambda f, _: ("report", "m", "--out", "new/r.html"),),
    ),
    Row(
        "give another --out, or remove it",
        ("report", "m", "--out", "notes.html"),
        (
            lambda f, _: ("report", "m", "--out", "other.html"),
            lambda f, _: without(f, "notes.html", ("report", "m", "--out", "notes.html")),
        ),
        lambda f: put(f, "notes.html", "<title>mine</title>"),
    ),
    Row(
        "give an unchanged output folder",
        ("report", "m"),
        (lambda f, _: ("report", "unchanged"),),
        lambda f: (shutil.copytree(f / "m", f / "unchanged"), (f / "m/merge/metrics.parquet").write_bytes(b"PAR1")),
        template="{do}",
    ),
    Row(
        "write the scores again with `evaluate`, or leave this file out",
        ("report", "m", "--evaluation", "x.parquet"),
        (with_scores, lambda f, _: ("report", "m")),
        lambda f: put(f, "x.parquet", "model,data,metric"),
        template="{do}",
    ),
    Row(
        "write the scores again with `evaluate`, or leave this file out",
        ("report", "m"),
        (
            lambda f, _: (
                (f / "m/merge/evaluation.parquet").unlink(),
                done(*TEXT, "--out", "m/merge/evaluation.parquet"),
                ("report", "m"),
            )[2],
            lambda f, _: without(f, "m/merge/evaluation.parquet", ("report", "m")),
        ),
        lambda f: shutil.copy(f / "m/merge/metrics.parquet", f / "m/merge/evaluation.parquet"),
        template="{do}",
    ),
)


def test_every_advice_has_a_test() -> None:
    advice = Advice(__name__, ELSEWHERE)
    advice.followed(*BELOW, *(row.template or row.named for row in ROWS))
    advice.check()


@pytest.mark.parametrize(
    ("row", "way"),
    thorough_but([(row, 0) for row in ROWS], [(row, way) for row in ROWS for way in range(len(row.follow))]),
    ids=lambda value: value.named if isinstance(value, Row) else str(value),
)
def test_the_advice_leads_to_a_command_that_succeeds(folder: Path, row: Row, way: int) -> None:
    row.spoil(folder)
    advice = advice_of(run(*row.arguments))
    found = re.search(row.named, advice)
    assert found is not None, f"{row.named!r} is not in {advice!r}"
    done(*row.follow[way](folder, found))


# evaluate and report.


def test_an_adapter_is_evaluated_as_the_model_that_peft_makes_with_its_base_named_or_found(folder: Path) -> None:
    shutil.rmtree(folder / "expert1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers about each other
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        options = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, options)
        adapted.save_pretrained(folder / "adapter")
        adapted.merge_and_unload().save_pretrained(folder / "by peft")
    tiny.save_tokenizer(folder / "by peft")

    def scores(*arguments: str) -> list[float]:
        done("evaluate", *arguments, *TEXT[2:])
        values: list[float] = pyarrow.parquet.read_table("evaluation.parquet")["value"].to_pylist()
        return values

    expected = scores("by peft")
    assert scores("base") != pytest.approx(expected)
    assert scores("adapter") == pytest.approx(expected)
    assert scores("base+adapter") == pytest.approx(expected)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    put(folder, "adapter/adapter_config.json", json.dumps(config | {"base_model_name_or_path": "nowhere/at-all"}))
    for code in ([], ["--trust-remote-code"]):
        advised = re.search("name the base: (.+)", advice_of(run("evaluate", "adapter", *TEXT[2:], *code)))
        assert advised is not None
        assert scores(advised[1].replace("BASE", "base", 1), *code) == pytest.approx(expected)


def test_batches_that_are_too_large_for_the_gpu_are_made_smaller(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Evaluation.measure

    def limited(self: Evaluation, *arguments: Any) -> Any:
        if self.subject.options.batch_size > 2:
            raise torch.OutOfMemoryError
        return measure(self, *arguments)

    monkeypatch.setattr(Evaluation, "measure", limited)
    option = re.match(r"lower (--\S+),", advice_of(run(*TEXT)))
    assert option is not None
    done(*TEXT, option[1], 2)
    monkeypatch.setattr(Evaluation, "measure", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    assert option[1] not in advice_of(run(*TEXT, option[1], 1)), "it cannot be lower"


def test_the_number_of_gpus_in_the_advice_is_accepted() -> None:
    for nodes in ([Node(8, 2), Node(0, 4)], [Node(4, 0)], [Node(8, 1.5)]):
        with pytest.raises(MergeError) as caught:
            task_cpus(nodes, 5, 1)
        found = re.search(r"--num-gpus to (\d+)", caught.value.do)
        assert found is not None
        assert task_cpus(nodes, int(found[1]), 1) >= 1
    with pytest.raises(MergeError) as caught:
        task_cpus([Node(0, 2)], 0, 1)
    assert "add a node with a CPU" in caught.value.do
    assert task_cpus([Node(0, 2), Node(1, 0)], 0, 1) == 1


def test_the_extra_in_the_advice_has_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MergeError) as caught:
        check_tasks(Tasks(("toy",)))
    command = shlex.split(caught.value.do.split("`")[1])
    assert command[:2] == ["pip", "install"] and len(command) == 3
    extra = re.fullmatch(r"\.\[(\w+)\]", command[2])
    assert extra is not None
    project = tomllib.loads((Path(cli.__file__).parent / "pyproject.toml").read_text())["project"]
    assert any(one.startswith("lm-eval") for one in project["optional-dependencies"][extra[1]])


def test_a_report_that_takes_too_much_is_made_of_fewer_merges(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = page.write_report

    def limited(folders: Sequence[str], *arguments: Any) -> None:
        if len(folders) > 1:
            raise MemoryError
        write(folders, *arguments)

    monkeypatch.setattr(page, "write_report", limited)
    shutil.copytree("m", "n")
    assert "fewer merges" in advice_of(run("report", "m", "n"))
    done("report", "m")


# The command line.


def test_without_a_config_one_is_given(folder: Path) -> None:
    (folder / "merge.yaml").rename("mine.yaml")
    advice = advice_of(run("plan"))
    assert "give a config" in advice
    done("plan", "mine.yaml")
    (target,) = re.findall(r"`make (\w+)`", advice)
    assert f"\n{target}:" in Path(cli.__file__).with_name("Makefile").read_text()


def test_in_an_existing_folder_the_command_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()
    assert advice_of(run("report", folder / "m")) == "change to an existing folder"
    monkeypatch.chdir(folder)
    done("report", folder / "m")
