"""The model card (README.md) of a merged model. It has no path of this machine: models are named as on the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from rich.filesize import decimal

from engine.config.mergekit_yaml import as_yaml
from engine.learning.end_check import before_steps, distances
from engine.methods.corrections import CORRECTIONS
from engine.methods.options import Method
from engine.methods.registry import get_method
from engine.output.names import code, dump, markdown, public_config, public_name, yaml_block
from engine.output.resolved_config import versions
from engine.output.sources import NamedModel, inherited_license, sources_of
from engine.planning.plan import Plan
from engine.statistics.fits import NO_FITS, Fits, described
from engine.storage.scores import NO_SCORES
from engine.task_vectors.coefficients import Coefficients

# Stands in the commands of the card for the place of the model, which `push` knows.
PLACE = "PATH-OF-THIS-FOLDER"
# The picture of a learned merge's coefficients, beside the card.
PICTURE = "merge/coefficients.png"
# The line that `add_memory` replaces.
_NO_MEMORY = "<!-- memory -->"


def write_card(
    path: Path,
    plan: Plan,
    learned: Coefficients,
    digests: Mapping[str, str],
    fits: Fits = NO_FITS,
    checked: pa.Table | None = None,
) -> None:
    """Write the README.md of a learned merge.

    Args:
        path: The file.
        plan: The plan, with every prior.
        learned: The coefficients of the last stage.
        digests: The SHA-256 of the weight files, by address.
        fits: The coefficients of the layers in closed form, if the merge computed them.
        checked: The contents of merge/end_check.parquet, if there are any.
    """
    method = {"expert_merging_pp": "Expert Merging++", "adamerging": "AdaMerging"}.get(
        plan.config.merge_method, "Expert Merging"
    )
    tied = plan.config.merge_method == "adamerging" and plan.config.parameters.granularity == "task"
    total = 1 if tied else int(np.sum(learned.layout.learned_columns))
    rows = [
        f"| {markdown(expert.name)} | {expert.kind} | {prior:g} | {values.mean():.3f} "
        f"| {values.min():.3f} to {values.max():.3f} |"
        for expert, prior, values in zip(
            plan.experts, plan.priors, learned.values[:, learned.layout.learned_columns], strict=True
        )
    ]
    about = [
        f"{len(plan.experts)} fine-tuned experts of {code(public_name(plan.base.model))} in one model. For each expert "
        f"{total}\ncoefficients were learned on unlabelled samples, so that {_aim(plan)}.\n"
        f"{len(plan.merged)} tensors are merged; all other tensors are the base's.",
        _chunks(plan, learned),
        _steps(plan),
        _fitted(fits, plan),
        "\n".join(["| expert | given as | prior | mean learned coefficient | range |", "|---|---|---|---|---|", *rows]),
        _distances(checked, plan),
        f"![The distance of the coefficients from their priors: experts down, tensors across]({PICTURE})",
    ]
    record = (
        "`merge/` holds the whole config, every coefficient, the importance of every tensor, the losses of every step, "
        "and\nthe peak memory of every process."
    )
    _write(path, plan, plan.config.merge_method, f"{len(plan.experts)} experts by {method}", about, record, digests)


def write_weight_space_card(
    path: Path, plan: Plan, method: Method, digests: Mapping[str, str], fits: Fits = NO_FITS
) -> None:
    """Write the README.md of a weight-space merge; see `write_card`."""
    output = "One model per expert, each in a folder of its name" if method.outputs == "experts" else "One model"
    about = [
        f"{output}: {method.summary}, `{method.formula}` ({method.source}). {len(plan.merged)} tensors are\n"
        f"merged; all other tensors are those of {code(public_name(plan.base.address))}.",
        _fitted(fits, plan),
        _list("The layers of the output, from the first to the last:", [markdown(line) for line in plan.stacked]),
        _steps(plan),
    ]
    record = "`merge/` holds the whole config and the peak memory of every process."
    _write(path, plan, method.name, f"{plan.described_models} by {method.name}", about, record, digests)


def _distances(checked: pa.Table | None, plan: Plan) -> str:
    """Return a table of how near base and merged model are to the experts, or nothing without such figures."""
    if checked is None:
        return ""
    rows = [
        f"| {markdown(one.model)} | {one.base:.3g} | {one.merged:.3g} | {f'{one.removed:.0%}' if one.base else ''} |"
        for one in distances(checked)
    ]
    title = f"{before_steps(plan)}means over the samples of each expert (`merge/end_check.parquet`):"
    head = ["| expert | KL divergence of the base | of the merged model | removed |", "|---|---|---|---|"]
    return "\n".join([f"{title[:1].upper()}{title[1:]}", "", *head, *rows])


def write_compression_card(path: Path, plan: Plan, about: Sequence[str], digests: Mapping[str, str]) -> None:
    """Write the README.md of a mixture of experts that was made smaller.

    Args:
        path: The file.
        plan: The plan, with the header of the smaller model.
        about: Paragraphs on what was done.
        digests: The SHA-256 of the weight files, by address.
    """
    assert plan.config.compress is not None
    record = "`merge/` holds the whole config, the groups of experts, and the peak memory of every process."
    title = f"{code(public_name(plan.base.model))} with fewer experts"
    _write(path, plan, plan.config.compress.method, title, about, record, digests, "compress")


def _fitted(fits: Fits, plan: Plan) -> str:
    """Return what the coefficients in closed form foretell; nothing if there are none."""
    if not fits:
        return ""
    before = f", before {plan.config.calibrate[0].method}" if plan.config.calibrate else ""
    return f"By least squares on the experts' own inputs{before}, {described(fits)} (`merge/layers.parquet`)."


def add_memory(path: Path, memory: Mapping[str, Any]) -> None:
    """Add to a card what merge/memory.json says about memory."""
    actors = memory["actors"]
    largest = max(actors, key=lambda actor: actor["peak_anonymous_bytes"])
    text = f"The largest of its {len(actors)} processes ({largest['role']}) used " if len(actors) > 1 else "It used "
    text += f"{decimal(largest['peak_anonymous_bytes'])} of memory"
    gpus = [gpu for actor in actors for gpu in actor.get("gpus", ())]
    if gpus:
        fullest = max(gpus, key=lambda gpu: gpu["peak_allocated_bytes"])
        text += f", the fullest GPU ({markdown(fullest['name'])}) {decimal(fullest['peak_allocated_bytes'])}"
    path.write_text(path.read_text(encoding="utf-8").replace(_NO_MEMORY, f"{text}.", 1), encoding="utf-8")


def _write(
    path: Path,
    plan: Plan,
    method: str,
    title: str,
    about: Sequence[str],
    record: str,
    digests: Mapping[str, str],
    kind: Literal["merge", "compress"] = "merge",
) -> None:
    sources = sources_of(plan, digests)[: 1 if kind == "compress" else None]
    made_with = ", ".join(f"{name} {number}" for name, number in versions().items())
    parts = [
        f"---\n{dump(_front(plan, method, sources, kind))}---",
        f"# A merge of {title}" if kind == "merge" else f"# {title}",
        *about,
        _list("On the models:", [f"{markdown(owner)}: {markdown(note)}" for owner, note in plan.notes]),
        NO_SCORES,
        *_usage(plan),
        "## How it was made",
        f"{record} {_NO_MEMORY}\nMade with {made_with}.",
        _folded("The config, with names for paths", yaml_block(as_yaml(public_config(plan.resolved)))),
        "## Models",
        _models(sources),
        _folded("SHA-256 of their weight files", _hashes(sources)),
    ]
    path.write_text("\n\n".join(part.strip("\n") for part in parts if part) + "\n", encoding="utf-8")


def _steps(plan: Plan) -> str:
    """Return the steps after the merge as a list."""
    methods = [(step, CORRECTIONS[step.method]) for step in plan.config.calibrate]
    lines = [f"{step}: {method.summary}, `{method.formula}` ({method.source})" for step, method in methods]
    return _list("Steps after the merge, in order:", lines)


def _front(plan: Plan, method: str, sources: Sequence[NamedModel], kind: str) -> dict[str, Any]:
    """Return the front matter of the card, whose keys the hub defines."""
    ids = list(dict.fromkeys(source.hub_id for source in sources if source.hub_id))
    pipeline = _pipeline(plan)
    return {
        **inherited_license(sources),
        **({"language": list(sources[0].languages)} if sources[0].languages else {}),
        **({"base_model": ids} if ids else {}),
        **({"base_model_relation": "merge"} if ids and kind == "merge" else {}),
        "library_name": "transformers",
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "tags": [kind, "expert-merging", method],
    }


def _pipeline(plan: Plan) -> str | None:
    """Return the hub's name of what the model does, or None if its config does not tell."""
    if plan.base_header.takes_images:
        return "image-text-to-text"
    kinds = plan.base_header.config.get("architectures")
    causal = isinstance(kinds, list) and any(isinstance(kind, str) and kind.endswith("ForCausalLM") for kind in kinds)
    return "text-generation" if causal else None


def _usage(plan: Plan) -> list[str]:
    """Return how to run the model: with transformers, with vLLM, and as GGUF; nothing for several models."""
    pipeline = _pipeline(plan)
    several = not plan.config.learned and get_method(plan.config.merge_method).outputs == "experts"
    if several or pipeline is None:
        return []
    own = plan.config.trust_remote_code and "auto_map" in plan.base_header.config
    parts = ["## Use it", f"```python\n{_loading(plan)}\n```", "With [vLLM](https://docs.vllm.ai):"]
    parts.append(f"```bash\nvllm serve {PLACE}{' --trust-remote-code' if own else ''}\n```")
    if pipeline == "text-generation" and not own:
        parts += [
            "As GGUF, with the converter of [llama.cpp](https://github.com/ggml-org/llama.cpp), if it knows the\n"
            "architecture; FOLDER is a copy of the model on a disk:",
            "```bash\npython llama.cpp/convert_hf_to_gguf.py FOLDER --outfile merged.gguf --outtype auto\n```",
        ]
    return parts


def _models(sources: Sequence[NamedModel]) -> str:
    """Return a table of the models with their licenses, and what the front matter leaves out."""
    rows = [
        f"| {markdown(one.role)} | {_linked(one)} | {markdown(' '.join(one.license.values())) or 'not known'} |"
        for one in sources
    ]
    lines = ["| model | name | license of its card |", "|---|---|---|", *rows]
    if any(source.license for source in sources) and not inherited_license(sources):
        lines += ["", "The cards do not name one license that is the base's, so that this card names none."]
    return "\n".join(lines)


def _linked(source: NamedModel) -> str:
    name = markdown(source.model)
    return f"[{name}](https://huggingface.co/{source.hub_id})" if source.hub_id else name


def _hashes(sources: Sequence[NamedModel]) -> str:
    rows = [
        f"| {markdown(one.role)} | {markdown(name)} | `{digest}` |" for one in sources for name, digest in one.files
    ]
    return "\n".join(["| model | file | SHA-256 |", "|---|---|---|", *dict.fromkeys(rows)])


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _list(title: str, lines: Sequence[str]) -> str:
    """Return lines as a list below a title, or nothing without lines."""
    return "\n".join([title, "", *(f"- {line}" for line in lines)]) if lines else ""


def _loading(plan: Plan) -> str:
    """Return the Python lines that load the merged model and its tokenizer or processor."""
    own = plan.config.trust_remote_code and "auto_map" in plan.base_header.config
    if plan.base_header.takes_images and not own:
        names = {"model": "AutoModelForImageTextToText", "processor": "AutoProcessor"}
    else:
        names = {"model": "AutoModel" if own else "AutoModelForCausalLM", "tokenizer": "AutoTokenizer"}
    code = ", trust_remote_code=True" if own else ""
    lines = [f'{name} = {kind}.from_pretrained("{PLACE}"{code})' for name, kind in names.items()]
    return "\n".join([f"from transformers import {', '.join(names.values())}", "", *lines])


def _aim(plan: Plan) -> str:
    """Return the objective of the coefficients as a clause, and what they multiply if not whole task vectors."""
    if not plan.config.has_targets:
        aim = "the merged model's predictions have the least entropy\n([AdaMerging](https://arxiv.org/abs/2310.02575))"
    else:
        aim = (
            "the merged model's hidden states and logits match the expert's\n"
            "([Expert Merging](https://arxiv.org/abs/2509.25712))"
        )
    if plan.orthogonal:
        multiplied = {
            "orthogonal": "orthogonal task vectors ([TSV-Merge](https://arxiv.org/abs/2412.00081))",
            "swudi": "the shares of the experts in\n[SWUDI](https://arxiv.org/abs/2606.07289)",
        }
        aim += f"; the coefficients of matrices multiply\n{multiplied[plan.config.parameters.task_vectors]}, times 4"
    return aim


def _chunks(plan: Plan, learned: Coefficients) -> str:
    """Return what the coefficients of a matrix multiply if its chunks are groups of singular directions, or nothing."""
    if not learned.layout.spectral:
        return ""
    what = (
        "one singular direction" if plan.config.parameters.chunks == "direction" else "a group of singular directions"
    )
    return f"A coefficient of a matrix belongs to {what} of the expert's task vector."
