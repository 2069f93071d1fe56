"""The JSON schema of a config, for editors: made from the types of `engine.config.schema` and the methods' options.

It refuses unknown keys where `engine.config.reader` does. Other faults, such as two experts of one name, only the
reader finds. `python -m engine.config.json_schema > docs/merge.schema.json` writes the published copy.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic

from engine.config.recipe import WeightSpaceSettings
from engine.config.schema import INTERNAL, Config, ExpertConfig
from engine.config.slices import MODULE_KEYS, SLICE_KEYS
from engine.config.unknown_keys import SOURCE, TOP
from engine.config.vocabulary import TOKEN_KEYS, TOKENIZER_KEYS
from engine.fields import Section
from engine.methods.learned import ABOUT, ModelParameters, Parameters
from engine.methods.options import Method, Option
from engine.methods.registry import LEARNED, MERGEKIT, NATIVE, is_mergekits, known_options

Schema = dict[str, Any]

# Keys whose form depends on the method.
OF_METHOD = ("base_model", "models", "parameters", "tokenizer_source")
MORE = {
    "slices": "The layers of the output, and the models that are merged into them. In place of `models`.",
    "modules": "The models of each module of a model with several. In place of `models`.",
    "tokenizer": "mergekit's other form of `tokenizer_source`, with rules for single tokens.",
    "name": "The name of this document, by which other documents of the file use its output.",
}
# A number and a truth value as a text, which pydantic takes as well: YAML 1.1 reads 1e-5 as a text.
NUMBER = r"^[-+ 0-9._eE]+$"
TRUTH = r"^([yY]([eE][sS])?|[nN][oO]?|[tT]([rR][uU][eE])?|[fF]([aA][lL][sS][eE])?|[oO][nN]|[oO][fF][fF]|[01])$"
# JSON schema's names of bounds that pydantic leaves under its own.
BOUNDS = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}
ANY_OPTION = "option of any method"
ANY_OBJECT: Schema = {"type": ["object", "null"]}


def config_schema() -> Schema:
    """Return the schema of one document of a YAML, in draft 7, which editors know."""
    whole = Config.model_json_schema(ref_template="#/definitions/{model}")
    definitions = {name: _loose(one) for name, one in whole["$defs"].items() if name not in _of_internal()}
    common = {key: _loose(one) for key, one in whole["properties"].items() if key not in INTERNAL}
    for key in OF_METHOD:
        common[key] = {}
    common["merge_method"] = {"enum": [name for name, _ in _methods()]}
    common |= {key: {} for key in MORE}
    _describe(definitions | {"Config": {"properties": common}})
    for key, about in MORE.items():
        common[key]["description"] = about
    for strict in (True, False):
        definitions |= _weight_space_keys(strict)
    definitions[ANY_OPTION] = {"enum": sorted(known_options())}
    definitions["expert"] = _section(ExpertConfig.model_fields, strict=True, **_entry()) | {"required": ["model"]}
    forms = []
    for name, method in _methods():
        definitions |= _of_method(method)
        given = {"properties": {"merge_method": {"const": name}}, "required": ["merge_method"]}
        forms.append({"if": given, "then": _ref(_label(method))})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A merge of fine-tuned experts of one base model",
        "type": "object",
        "required": ["merge_method"],
        "properties": common,
        "allOf": forms,
        "definitions": definitions,
    }


def _methods() -> Iterable[tuple[str, Method | None]]:
    """Yield each name that a method may have, with the method; None for those of mergekit's library."""
    for method in (*LEARNED.values(), *NATIVE.values()):
        yield from ((name, method) for name in (method.name, *method.aliases))
    yield from ((name, None) for name in MERGEKIT)


def _label(method: Method | None) -> str:
    return method.name if method else "methods of mergekit's library"


def _ref(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


def _of_method(method: Method | None) -> dict[str, Schema]:
    """Return what a method adds to the schema: the forms of its models and options, and which keys there are."""
    if method is None:
        return {_label(method): _ref(_weight_space(strict=False))}
    others, label = known_options().keys() - method.by_name.keys(), f"options of {method.name}"
    if method.learned:
        keys = [key for key in Config.model_fields if key not in INTERNAL]
        of_model = {name: one for name, one in _learned(ModelParameters).items() if name in method.by_name}
        options = {name: one for name, one in _learned(Parameters).items() if name in method.by_name}
        entry = {"allOf": [_ref("expert"), {"properties": {"parameters": _options(of_model, others)}}]}
        forms = {
            "base_model": {"type": "string", "minLength": 1},
            "models": {"type": "array", "items": entry},
            "parameters": _ref(label),
            "tokenizer_source": {"type": ["string", "null"]},
        }
        named: Schema = {"propertyNames": {"enum": [*keys, "name"]}}
        required: Schema = {"required": ["base_model", "models"], "properties": forms}
        return {method.name: required | named, label: _options(options, others)}
    strict = not is_mergekits(method)
    options = {name: _setting(option) for name, option in method.by_name.items()}
    typed: Schema = {"type": "object", "properties": {"parameters": _ref(label)}}
    forms = {"models": {"type": "array", "items": typed}, "parameters": _ref(label)}
    parts: list[Schema] = [_ref(_weight_space(strict)), {"properties": forms}]
    of_method: Schema = {"allOf": parts}
    if strict:
        known = {"parameters": {"propertyNames": _ref(ANY_OPTION)}}
        parts.append({"properties": {"models": {"items": {"properties": known}}}})
        # Else the options may be those of a slice's own method.
        of_method |= {"if": {"required": ["models"]}, "then": {"properties": known}}
    return {method.name: of_method, label: _options(options, None) | ANY_OBJECT}


def _weight_space(strict: bool) -> str:
    return "weight space" if strict else "weight space, unknown keys ignored"


def _section(keys: Iterable[str], strict: bool, **forms: Schema) -> Schema:
    """Return the form of a mapping with these keys, of which `forms` has that of some; `strict`: no other keys."""
    known = {"type": "object", "properties": {key: {} for key in keys} | forms}
    return known | ({"additionalProperties": False} if strict else {})


def _weight_space_keys(strict: bool) -> dict[str, Schema]:
    """Return the forms of models, slices, modules and tokenizers of weight-space methods."""
    ignored = "" if strict else ", unknown keys ignored"
    reference: Schema = {"type": ["string", "object", "null"]}
    model = _section(SOURCE, strict, **_entry(reference), parameters=ANY_OBJECT, layer_range={"type": "array"})
    models = {"type": "array", "minItems": 1, "items": _ref(f"model{ignored}")}
    one = _section(SLICE_KEYS, strict, sources=models, parameters=ANY_OBJECT, base_model=reference)
    slices = {"type": "array", "minItems": 1, "items": one | {"required": ["sources"]}}
    module = _section(MODULE_KEYS, strict, slices=slices, models=models, parameters=ANY_OBJECT)
    tokens = {"type": ["object", "null"], "additionalProperties": _section(TOKEN_KEYS, strict)}
    forms: Schema = {
        "base_model": reference,
        "models": models,
        "slices": slices,
        "modules": {"type": "object", "additionalProperties": module},
        "tokenizer_source": reference,
        "tokenizer": _section(TOKENIZER_KEYS, strict, tokens=tokens) | {"type": ["object", "null"]},
    }
    keys = {"propertyNames": {"enum": [*TOP, "name"]}} if strict else {}
    return {f"model{ignored}": model | {"required": ["model"]}, _weight_space(strict): {"properties": forms} | keys}


def _entry(model: Schema | None = None) -> Schema:
    """Return the forms of the keys of an entry of `models`, without its `parameters`."""
    properties = ExpertConfig.model_json_schema(ref_template="#/definitions/{model}")["properties"]
    about = _attributes(ExpertConfig)
    entry = {key: {**_loose(properties[key]), "description": about[key]} for key in properties if key != "parameters"}
    return entry if model is None else entry | {"model": model | {"description": about["model"]}}


def _options(own: Schema, others: Iterable[str] | None) -> Schema:
    """Return the form of `parameters`: options of the method, and those of others, which are ignored; None: any."""
    form: Schema = {"type": "object", "properties": own}
    if others is not None:
        names = {*own, *others}
        form["propertyNames"] = _ref(ANY_OPTION) if names == known_options().keys() else {"enum": sorted(names)}
    return form


def _learned(section: type[Section]) -> Schema:
    """Return the forms of the learned methods' options, with their descriptions."""
    properties = section.model_json_schema()["properties"]
    return {name: {**_loose(one), "description": ABOUT[name]} for name, one in properties.items()}


def _setting(option: Option) -> Schema:
    """Return the forms of a weight-space method's option: a value, values over the layers, or values by a filter."""
    value = pydantic.TypeAdapter(option.kind).json_schema()
    if option.choices:
        value["enum"] = list(option.choices)
    bounds = {"minimum": option.low, "maximum": option.high}
    value = _loose(value | {name: bound for name, bound in bounds.items() if math.isfinite(bound)})
    other = {"type": ["array", "object"], "minItems": 1, "required": ["value"]}
    default = {} if option.default is None else {"default": option.default}
    return {"description": option.about, "anyOf": [value, other], **default}


def _loose(schema: Any) -> Any:
    """Return a schema of pydantic's that accepts what pydantic accepts: numbers and truth values as texts, too."""
    if isinstance(schema, list):
        return [_loose(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    # A title says what the key says. Bounds of 64 bits are beyond what JSON's numbers can say.
    kept = {key: one for key, one in schema.items() if key not in ("title", "default") and abs(_number(one)) < 2**63}
    loose = {BOUNDS.get(key, key): _loose(one) for key, one in kept.items() if key != "properties"}
    if "properties" in schema:
        loose["properties"] = {name: _loose(one) for name, one in schema["properties"].items()}
    kind = loose.get("type")
    if kind in ("integer", "number"):
        loose |= {"type": [kind, "string"], "pattern": NUMBER}
    elif kind == "boolean":
        del loose["type"]
        loose["anyOf"] = [{"type": "boolean"}, {"enum": [0, 1]}, {"type": "string", "pattern": TRUTH}]
    default = schema.get("default")
    return loose | ({} if default is None or isinstance(default, dict) else {"default": default})


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _of_internal() -> set[str]:
    """Return the names of the sections that only INTERNAL keys have, and of those whose form depends on the method."""
    named = WeightSpaceSettings.model_json_schema()["$defs"]
    return {*named, "WeightSpaceSettings", "ExpertConfig", "ModelParameters", "Parameters"}


def _describe(sections: Mapping[str, Schema]) -> None:
    """Give the sections and their keys the descriptions that the docstrings of their classes have."""
    classes = {kind.__name__: kind for kind in Section.__subclasses__()}
    for name, section in sections.items():
        section["description"] = (inspect.getdoc(classes[name]) or "").partition("\n\n")[0]
        for key, about in _attributes(classes[name]).items():
            if key in section["properties"]:
                section["properties"][key]["description"] = about


def _attributes(section: type[Section]) -> dict[str, str]:
    """Return the descriptions under `Attributes:` in the docstring of a section, by name."""
    listed = (inspect.getdoc(section) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w[\w, ]*): (.*(?:\n     .*)*)", listed, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def as_text(schema: Schema) -> str:
    """Return a schema as it is published."""
    text = json.dumps(schema, indent=1, ensure_ascii=False)
    # A list of names on one line.
    return re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


if __name__ == "__main__":
    print(as_text(config_schema()), end="")
