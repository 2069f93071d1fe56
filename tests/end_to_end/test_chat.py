"""`chat`: questions from stdin to one model or two."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import transformers
from click.testing import CliRunner, Result
from errors import refused

import cli
from engine.errors import CheckpointError, RunError
from engine.evaluation.chat import Conversation
from engine.evaluation.subject import Options


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, of which the second has no chat template."""
    folder = tmp_path_factory.mktemp("chat")
    base = tiny.make_model()
    for name, model in (("base", base), ("expert", tiny.make_expert(base, 1))):
        tiny.save(model, folder / name)
        tiny.save_tokenizer(folder / name, chat=name == "base")
    return folder


def run(*arguments: object, answers: str) -> Result:
    return CliRunner().invoke(cli.main, ["chat", *map(str, arguments), "--max-new-tokens", "5"], input=answers)


def written(folder: Path, text: str) -> str:
    """What transformers alone generates after a text, greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    row = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(row, skip_special_tokens=True)).strip()


def conversation(folder: Path, **options: int) -> Conversation:
    return Conversation(str(folder), Options(max_new_tokens=5, **options), torch.device("cpu"))


@pytest.mark.usefixtures("one_thread")
def test_an_answer_is_what_the_model_generates_after_all_that_was_said(folder: Path) -> None:
    talk = conversation(folder / "base")
    first = talk.ask("w1 w2")
    first.future.result()
    assert first.done and first.text.strip() == written(folder / "base", "user: w1 w2 </s> assistant: ")
    second = talk.ask("w3")
    second.future.result()
    assert [one["role"] for one in talk.messages] == ["user", "assistant", "user", "assistant"]
    said = f"user: w1 w2 </s> assistant: {first.text} </s> user: w3 </s> assistant: "
    assert second.text.strip() == written(folder / "base", said)
    talk.reset()
    again = talk.ask("w1 w2")
    again.future.result()
    assert again.text == first.text


@pytest.mark.usefixtures("one_thread")
def test_a_conversation_that_is_too_long_goes_on_after_a_reset(folder: Path) -> None:
    talk = conversation(folder / "base")
    talk.ask("w5 " * 100).future.result()
    with refused(RunError, do="/reset", facts=["128"]):
        talk.check("w6 " * 30)
    talk.reset()
    talk.check("w6 " * 30)


def test_text_that_could_control_a_terminal_is_left_out(folder: Path) -> None:
    answer = conversation(folder / "base").ask("w1")
    answer.stop()
    answer.future.result()
    answer.text = ""
    answer.on_finalized_text("a\x1b[2Jb\nc\u202e")
    assert answer.text == "a[2Jb\nc"


@pytest.mark.usefixtures("one_thread")
def test_two_models_answer_the_lines_of_stdin(folder: Path) -> None:
    done = run(folder / "base", "--against", folder / "expert", answers="w1 w2\n\n/reset\nw3")
    assert done.exit_code == 0, done.output
    assert f"{folder / 'expert'} has no chat template" in done.output
    for words in (written(folder / "base", "user: w3 </s> assistant: "), written(folder / "expert", "w3")):
        assert all(word in done.output for word in words.split())


def test_a_model_that_is_not_there_is_an_error(folder: Path) -> None:
    with refused(CheckpointError):
        conversation(folder / "missing")
    done = run(folder / "missing", answers="")
    assert done.exit_code == CheckpointError.exit_code and str(folder / "missing") in done.output


@pytest.mark.usefixtures("one_thread")
def test_each_answer_ends_a_line_and_bytes_that_are_no_text_are_a_question(folder: Path) -> None:
    asked = CliRunner().invoke(
        cli.main, ["chat", str(folder / "base"), "--max-new-tokens", "2"], input=b"w1\n\xff\xfe w2\nw3\n"
    )
    assert asked.exit_code == 0 and asked.exception is None
    assert asked.output.endswith("\n") and len(asked.output.splitlines()) == 3
