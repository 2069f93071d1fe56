"""The models of a merge as its card names them: ids on the hub, licenses and languages of their own cards, hashes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.find import CARD, check_inside
from engine.config.yaml_text import parse
from engine.errors import CheckpointError, InputError
from engine.output.names import hub_id, public_name
from engine.planning.open_models import weight_files
from engine.planning.plan import ModelPlan, Plan
from engine.untrusted import read_text

# Maximum bytes of a card, and values in its front matter.
_BYTES, _VALUES = 1 << 20, 10_000
_FRONT = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*")
# Keys of a card's front matter that tell its license, and the form of each value.
_LICENSE_KEYS = {
    "license": _LICENSE,
    "license_name": re.compile(r"[\w. +-]{1,100}"),
    "license_link": re.compile(r"https?://[!-~]{1,300}"),
}


@dataclass(frozen=True)
class NamedModel:
    """A model of a merge.

    Attributes:
        role: What it is in the merge: `base`, or the name of the expert.
        model: Its public name.
        hub_id: Its id on the hub, if its address tells one.
        license: The keys of its card's front matter that tell its license.
        languages: The languages that its card names.
        files: Its weight files, each with its SHA-256.
    """

    role: str
    model: str
    hub_id: str | None
    license: Mapping[str, str]
    languages: tuple[str, ...]
    files: tuple[tuple[str, str], ...]


def sources_of(plan: Plan, digests: Mapping[str, str]) -> list[NamedModel]:
    """Return the models of a merge, the base first, an adapter after its checkpoint.

    `digests` are the SHA-256 of the weight files, by address. Outputs of other merges of the same file have no id.
    """
    made = {document.place for document in plan.documents}
    return [
        NamedModel(
            role,
            public_name(model.model),
            None if model.model in made else hub_id(model.model),
            _license(front),
            _languages(front.get("language")),
            tuple((file.path.name, digests[file.address]) for file in weight_files(model)),
        )
        for role, model in _models(plan)
        for front in [front_matter(model.header.folder)]
    ]


def _models(plan: Plan) -> Iterator[tuple[str, ModelPlan]]:
    """Yield what each model is, and the model without its adapter, which follows."""
    for role, model in (("base", plan.base), *((expert.name, expert) for expert in plan.experts)):
        yield role, ModelPlan(model.model, model.header)
        if model.adapter is not None:
            yield f"{role}, adapter", model.adapter


def front_matter(folder: Path) -> dict[str, Any]:
    """Return the front matter of a model folder's card; nothing without one, or if it cannot be read as YAML."""
    path = folder / CARD
    try:
        check_inside(path, folder)
        found = _FRONT.match(read_text(path, _BYTES, CheckpointError))
        value = parse(found[1], str(path), _VALUES, plain=False)[0] if found else None
    except InputError:
        return {}
    return value if isinstance(value, dict) else {}


def inherited_license(sources: Sequence[NamedModel]) -> Mapping[str, str]:
    """Return the license of the base's card, if no other model's card tells another one."""
    told = [source.license for source in sources if source.license]
    own = sources[0].license
    return own if all(other == own for other in told) else {}


def _license(front: Mapping[str, Any]) -> dict[str, str]:
    kept = {key: front.get(key) for key in _LICENSE_KEYS}
    told = {key: text for key, text in kept.items() if isinstance(text, str) and _LICENSE_KEYS[key].fullmatch(text)}
    return told if "license" in told else {}


def _languages(given: Any) -> tuple[str, ...]:
    listed = given if isinstance(given, list) else [given]
    return tuple(one for one in listed if isinstance(one, str) and _LANGUAGE.fullmatch(one))
