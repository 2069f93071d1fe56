"""Conversation templates of a tiny model in OpenGVLab's layout, as stored with a checkpoint. The code is ours."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field


@dataclass
class Conversation:
    """A chat as one text, with whitespace around all words and marks, as the tests' word-level tokenizer needs it."""

    name: str
    system_message: str = ""
    roles: tuple[str, str] = ("user: ", "assistant: ")
    sep: str = " </s> "
    messages: list[list[str | None]] = field(default_factory=list)

    def append_message(self, role: str, message: str | None) -> None:
        """Add a message; None stands for the message to be generated."""
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """Return the chat so far; a message to be generated leaves its role open at the end."""
        system = f"{self.system_message} " if self.system_message else ""
        text = "".join(f"{role}{message}{self.sep}" if message else f"{role}" for role, message in self.messages)
        return f"<s> {system}{text}"

    def copy(self) -> Conversation:
        """Return an independent copy."""
        return deepcopy(self)


TEMPLATES = {"tiny": Conversation("tiny", system_message="w47 w48 w49")}


def get_conv_template(name: str) -> Conversation:
    """Return a new conversation of this template."""
    return TEMPLATES[name].copy()
