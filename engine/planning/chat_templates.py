"""The chat template of the output: `chat_template` of a config, with the meanings that it has in mergekit 0.1.5.

A template is a text here; it is neither compiled nor rendered.
"""

from __future__ import annotations

import importlib.resources
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from engine.checkpoints.special_tokens import chat_template_of
from engine.config.schema import Config
from engine.errors import ConfigError
from engine.methods.registry import INSTALL, has_mergekit
from engine.planning.plan import ExpertPlan
from engine.untrusted import shown

# The templates that mergekit 0.1.5 has by name.
NAMES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
# As in mergekit, a shorter text is no template.
LEAST = 20


def find_chat_template(config: Config, base: Path, experts: Sequence[ExpertPlan]) -> str | None:
    """Return the text of the output's chat template, or None if it is that of the output's tokenizer.

    With `auto` it is the most frequent one among the models, the first of several that are equally frequent. An adapter
    has the template of the base, whose folder is `base`.

    Raises:
        ConfigError: `chat_template` is neither `auto` nor a name nor Jinja.
        CheckpointError: A file with the chat template of a model cannot be read.
    """
    given = config.chat_template
    if given is None:
        return None
    if given == "auto":
        baseless = config.recipe is not None and config.recipe.baseless
        folders = [*([] if baseless else [base]), *(expert.tokenizer_folder(base) for expert in experts)]
        found = Counter(template.strip() for folder in folders if (template := chat_template_of(folder)))
        return found.most_common(1)[0][0] if found else None
    if "{" in given and len(given) >= LEAST:
        return given
    if given not in NAMES:
        raise ConfigError(
            f"{shown(repr(given))} is no chat template",
            "chat_template",
            f"auto, {', '.join(NAMES)}, or the text of a Jinja template",
        )
    if not has_mergekit():
        raise ConfigError(
            f"the chat template {given!r} is a part of mergekit, which is not installed", "chat_template", do=INSTALL
        )
    templates = importlib.resources.files("mergekit._data") / "chat_templates"
    return (templates / f"{given}.jinja").read_text(encoding="utf-8")
