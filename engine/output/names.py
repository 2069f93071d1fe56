"""Names of models and files as others may see them: without folders of this machine, and escaped for Markdown."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import yaml

from engine.config.schema import Config

# A snapshot in the cache of huggingface_hub.
_SNAPSHOT = re.compile(r".*/models--(?:(?P<owner>[\w.-]+?)--)?(?P<name>[\w.-]+)/snapshots/[^/]+/?", flags=re.ASCII)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?", flags=re.ASCII)
# Characters that begin a piece of Markdown or HTML within a line.
_MARKUP = re.compile(r"[\\`*_\[\]<>&|~$]")


def public_name(model: str) -> str:
    """Return a hub id as it is, and the last part of a path or an address in object storage.

    A path into the cache of huggingface_hub becomes the hub id. In `model+adapter` each part is treated by itself.
    """
    return "+".join(map(_part, model.split("+")))


def _part(model: str) -> str:
    if snapshot := _SNAPSHOT.fullmatch(model):
        return "/".join(filter(None, (snapshot["owner"], snapshot["name"])))
    if _HUB_ID.fullmatch(model):
        return model
    path = model.partition("?")[0] if "://" in model else model
    return path.rstrip("/").rpartition("/")[2] or "model"


def hub_id(model: str) -> str | None:
    """Return the id of a model on the hub, without its revision; None for another path or an address.

    `model` is an address as a plan has it, in which a path is absolute.
    """
    known = _SNAPSHOT.fullmatch(model) or _HUB_ID.fullmatch(model)
    return _part(model).partition("@")[0] if known else None


def public_config(config: Config) -> Config:
    """Return a config with public names of its models and files, and without the labels of nodes."""

    def named(value: str | None) -> str | None:
        return None if value is None else public_name(value)

    files = [
        tuple(file.model_copy(update={"path": public_name(file.path)}) for file in expert.calibration)
        for expert in config.models
    ]
    experts = tuple(
        expert.model_copy(
            update={
                "model": public_name(expert.model),
                "calibration": of_expert,
                "statistics": named(expert.statistics),
                "optimizer_state": named(expert.optimizer_state),
            }
        )
        for expert, of_expert in zip(config.models, files, strict=True)
    )
    cluster = config.cluster
    actors = {role: getattr(cluster, role).model_copy(update={"labels": {}}) for role in ("expert", "trainer")}
    image_folder = {"image_folder": named(config.calibration.image_folder)}
    return config.model_copy(
        update={
            "base_model": public_name(config.base_model),
            "models": experts,
            "base_statistics": named(config.base_statistics),
            "tokenizer_source": named(config.tokenizer_source),
            "log_dir": named(config.log_dir),
            "cache": named(config.cache),
            "calibration": config.calibration.model_copy(update=image_folder),
            "cluster": cluster.model_copy(update={"labels": {}, **actors}),
        }
    )


def markdown(text: str) -> str:
    """Return a text for a line or a table cell of Markdown, in which nothing of it is markup."""
    return _MARKUP.sub(lambda match: f"\\{match[0]}", _one_line(text)).replace("\\<", "&lt;").replace("\\&", "&amp;")


def code(text: str) -> str:
    """Return a text as inline code of Markdown."""
    line = _one_line(text)
    fence = _fence(line, 1)
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def yaml_block(value: Any) -> str:
    """Return a value as a fenced block of YAML, which no text in it can end."""
    text = dump(value)
    fence = _fence(text, 3)
    return f"{fence}yaml\n{text}{fence}"


def dump(value: Any) -> str:
    """Return a value as YAML, each text on one line."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1 << 30))


def _one_line(text: str) -> str:
    return "".join(" " if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else char for char in text)


def _fence(text: str, least: int) -> str:
    """Return more backticks than stand together in a text, and at least `least`."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
