"""A conversation with a model, whose answers are read while they are written."""

from __future__ import annotations

import threading
import unicodedata
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.errors import UNSEEN, RunError
from engine.evaluation.subject import Options, Subject, named
from engine.models.loading import load_tokenizer


class Answer(transformers.TextStreamer):  # type: ignore[misc]
    """An answer, which grows until it is done.

    Attributes:
        text: What is written so far, without characters that could control a terminal.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self._stopped = "", threading.Event()
        self.future: Future[None] = Future()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take more text, which transformers calls with each word."""
        self.text += "".join(char for char in text if char in "\n\t" or unicodedata.category(char) not in UNSEEN)

    def stop(self) -> None:
        """End the answer after the next token."""
        self._stopped.set()

    def __call__(self, tokens: Any, scores: Any, **more: Any) -> Any:
        """Return whether the answer was stopped, as a criterion of `generate`."""
        return torch.full((len(tokens),), self._stopped.is_set(), device=tokens.device)

    @property
    def done(self) -> bool:
        """Whether the answer is complete, or has failed."""
        return self.future.done()


class Conversation:
    """A loaded model, and what was said so far.

    Args:
        model: A path, URI or hub id of a checkpoint or an adapter, or CHECKPOINT+ADAPTER.
        options: Of these, `max_new_tokens`, `dtype` and `remote_code` are used.
        device: Where the model computes.
        system: The first message, to the model alone; empty for none.

    Raises:
        CheckpointError: The model or its tokenizer cannot be loaded.
    """

    def __init__(self, model: str, options: Options, device: torch.device, system: str = "") -> None:
        subject = Subject(named(model, Path.cwd(), options.remote_code), options)
        self._tokenizer = load_tokenizer(subject.folder, options.remote_code)
        subject.load(device)
        self._model, self._options, self._device = subject.model, options, device
        self._positions = subject.positions or subject.header.text_config.get("max_position_embeddings")
        self._first = [{"role": "system", "content": system}] if system else []
        self._thread = ThreadPoolExecutor(1)
        self.reset()

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template. Without one, the model continues the question as a text."""
        return bool(self._tokenizer.chat_template)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = list(self._first)

    def check(self, question: str) -> None:
        """Check that there is room for an answer to a question.

        Raises:
            RunError: The conversation is longer than the model allows.
        """
        tokens, most = self._encoded(question)["input_ids"].shape[1], self._positions
        if isinstance(most, int) and tokens >= most:
            what = f"the conversation has {tokens:,} tokens, and the model has {most:,} positions"
            raise RunError(what, do="begin a new one with /reset")

    def ask(self, question: str) -> Answer:
        """Begin the answer to a question, which was checked, in a thread."""
        inputs, most, answer = self._encoded(question), self._options.max_new_tokens, Answer(self._tokenizer)
        if isinstance(self._positions, int):
            most = min(most, self._positions - inputs["input_ids"].shape[1])
        self.messages.append({"role": "user", "content": question})
        answer.future = self._thread.submit(self._write, answer, inputs, most)
        return answer

    def _encoded(self, question: str) -> dict[str, Any]:
        if self.has_template:
            messages = [*self.messages, {"role": "user", "content": question}]
            inputs = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = self._tokenizer(question, return_tensors="pt")
        # Some tokenizers return token types, which decoders do not take.
        return {name: inputs[name].to(self._device) for name in ("input_ids", "attention_mask")}

    @torch.inference_mode()
    def _write(self, answer: Answer, inputs: Any, most: int) -> None:
        criteria = transformers.StoppingCriteriaList([answer])
        self._model.generate(**inputs, streamer=answer, max_new_tokens=most, num_beams=1, stopping_criteria=criteria)
        self.messages.append({"role": "assistant", "content": answer.text})
