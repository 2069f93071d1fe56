"""Conversation templates of a tiny model in OpenGVLab's layout, as they travel with a checkpoint. Our own code."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field


@dataclass
class Conversation:
    """A chat as one text. Whitespace parts all words and marks, so that a tokenizer of words takes it."""

    name: str
    system_message: str = ""
    roles: tuple[str, str] = ("user: ", "assistant: ")
    sep: str = " </s> "
    messages: list[list[str | None]] = field(default_factory=list)

    def append_message(self, role: str, message: str | None) -> None:
        """Add a message; None: it is still to come."""
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """The chat so far; a message that is to come leaves its role open at the end."""
        system = f"{self.system_message} " if self.system_message else ""
        said = "".join(f"{role}{message}{self.sep}" if message else f"{role}" for role, message in self.messages)
        return f"<s> {system}{said}"

    def copy(self) -> Conversation:
        """One of its own with the same messages."""
        return deepcopy(self)


TEMPLATES = {"tiny": Conversation("tiny", system_message="w47 w48 w49")}


def get_conv_template(name: str) -> Conversation:
    """A fresh conversation of this template."""
    return TEMPLATES[name].copy()
