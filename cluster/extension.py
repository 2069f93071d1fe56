"""`merge --extend`: the merge of an earlier output again, with more experts.

Its config is the one that the output recorded, with the new models at the end. What does not depend on them, such as
the targets of the earlier experts, comes from the cache (`engine.run.reuse`); without a cache it is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.config.documents import Document
from engine.config.reader import parse_config, parse_recorded
from engine.config.schema import last_part
from engine.config.yaml_text import check_texts
from engine.errors import ConfigError, InputError
from engine.methods.registry import LEARNED
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.run.identity import Identity
from engine.run.inputs import IMAGE, identity
from engine.run.ownership import RECORD, EarlierMerge
from engine.run.place import check_apart
from engine.storage.paths import open_folder
from engine.untrusted import listed

ONE = "merge without --extend, from a config that lists all models"


def plan_extended(documents: Sequence[Document], run: str, target: str) -> Plan:
    """Return the plan of an earlier merge with the models of a config added.

    Args:
        documents: The config: the new `models`. Its other keys take precedence over those of the earlier merge.
        run: The output of the earlier merge, an absolute path or a URI.
        target: The output, in which no input may lie.

    Raises:
        ConfigError: `run` is no output of a learned merge; or the config lists one of its models, or another base.
        InputError: An input of the earlier merge is not as it was.
    """
    document = documents[-1]
    if len(documents) > 1:
        raise ConfigError("a config of several merges cannot extend one", str(document.path), do=ONE)
    recorded, before = _earlier(run)
    raw = _added(recorded, document)
    config = document.path.absolute()
    made = make_plan(parse_config(raw, document.path, None, document.strict), config.parent)
    check_apart(made, target, config)
    if made.base.address != recorded.get("base_model"):
        raise ConfigError(
            f"the base is {made.base.address}, and that of {run} is {recorded.get('base_model')}",
            str(document.path),
            "the same `base_model`, or none",
            "leave out `base_model`",
        )
    now = identity(made)
    changed = [
        name
        for name, file in before.files.items()
        if not name.startswith(IMAGE) and (name not in now.files or not now.files[name].is_as(file))
    ]
    if changed:
        raise InputError(
            f"not as it was when {run} was made: {listed(changed)}", "the inputs", do=f"restore it, or {ONE}"
        )
    return made


def _earlier(run: str) -> tuple[dict[str, Any], Identity]:
    """Return the recorded config of a learned merge, and its identity."""
    folder = open_folder(run)
    merge = EarlierMerge.read(folder)
    if merge is None or merge.identity is None:
        raise ConfigError("there is no complete merge", run, f"a folder with {RECORD}", "give the output of a merge")
    recorded = parse_recorded(folder.read(RECORD).decode(), f"{run}/{RECORD}")
    if recorded.get("merge_method") not in LEARNED or folder.exists("merge/documents.json"):
        raise ConfigError("only a learned merge of one config can be extended", run, do=ONE)
    return {key: value for key, value in recorded.items() if key != "record"}, merge.identity


def _added(recorded: dict[str, Any], document: Document) -> dict[str, Any]:
    """Return the keys of the earlier merge, with those of the config over them and its models at the end."""
    given, where = document.raw, str(document.path)
    check_texts(given, lambda _: where)
    models = given.get("models")
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models) or not models:
        raise ConfigError("there are no models to add", where, "`models`, a list of the new experts alone")
    names = {str(model.get("name")) for model in recorded["models"]}
    for model in models:
        name = str(model.get("name") or last_part(str(model.get("model"))))
        if name in names:
            what = f"the earlier merge has an expert {name!r}"
            raise ConfigError(
                what, where, "`models` with the new experts alone", "leave it out, or give a new one another `name`"
            )
    sections = {
        key: recorded[key] | value
        for key, value in given.items()
        if isinstance(value, dict) and isinstance(recorded.get(key), dict)
    }
    return recorded | given | sections | {"models": [*recorded["models"], *models]}
