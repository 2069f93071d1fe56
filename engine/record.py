"""What a merge tells of itself beside its weights: resolved config, metrics and model card. Knows no weights."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml

from engine.checkpoint import weight_files
from engine.coefficients import Array, Coefficients, write_coefficients
from engine.config import CalibrationFile, Expert
from engine.importance import write_importance
from engine.mergekit_yaml import as_yaml
from engine.methods.spec import Method
from engine.objects import Address
from engine.plan import ExpertPlan, ModelPlan, Plan
from engine.storage import cache_folder, is_uri

PACKAGES = ("expert-merging", "torch", "transformers", "ray", "safetensors", "numpy")
METRICS = pa.schema(
    [
        ("stage", pa.int8()),
        ("step", pa.int32()),
        ("model", pa.string()),
        ("sample", pa.int32()),
        ("kl", pa.float64()),
        ("hidden", pa.float64()),
        ("entropy", pa.float64()),
        ("regularization", pa.float64()),
        ("grad_norm", pa.float64()),
        ("learning_rate", pa.float64()),
        ("seconds", pa.float64()),
    ]
)


def versions() -> dict[str, str]:
    """What computed the result."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def resolved_config(plan: Plan) -> dict[str, Any]:
    """The config with every default filled in and every path absolute; it runs from anywhere."""
    paths = {"base_model": plan.base.model, "models": []}
    experts = [
        given.model_copy(
            update={
                "model": expert.model if expert.adapter is None else f"{expert.model}+{expert.adapter.model}",
                "calibration": _located(given, expert),
            }
        )
        for given, expert in zip(plan.config.models, plan.experts, strict=True)
    ]
    tokenizer = {"tokenizer_source": plan.tokenizer} if plan.tokenizer else {}
    return as_yaml(plan.config.model_copy(update=paths | {"models": tuple(experts)} | tokenizer))


def input_files(plan: Plan) -> dict[str, list[str]]:
    """Every file that a result depends on, by path or URI, of each model: weights, and the samples of an expert."""
    files = {model.model: _weights(model) for model in (plan.base, plan.rows) if model is not None}
    images = plan.images or [()] * len(plan.experts)
    return files | {
        expert.name: [*_weights(expert), *(file.path for file in _located(given, expert)), *seen]
        for given, expert, seen in zip(plan.config.models, plan.experts, images, strict=True)
    }


def _located(given: Expert, expert: ExpertPlan) -> tuple[CalibrationFile, ...]:
    """The files of an expert's samples, as another node finds them. A method that learns nothing reads none."""
    pairs = zip(given.calibration, expert.calibration, strict=False)
    return tuple(file if is_uri(file.path) else file.model_copy(update={"path": str(path)}) for file, path in pairs)


def _weights(model: ModelPlan) -> list[str]:
    if isinstance(model, ExpertPlan) and model.adapter is not None:
        return [*_weights(ModelPlan(model.model, model.header)), *_weights(model.adapter)]
    files = weight_files(model)
    if not is_uri(model.model):
        return [str(file) for file in files]
    address = Address.of(model.model)
    return [str(address / str(file.relative_to(cache_folder() / address.local))) for file in files]


def write_record(
    folder: Path,
    plan: Plan,
    identity: str,
    digests: Mapping[str, str],
    stages: Sequence[Coefficients],
    importance_L: Array | None,
    metrics: Sequence[Mapping[str, Any]],
) -> None:
    """The model card, and all of `merge/` but the memory figures.

    `digests` are the SHA-256 of the inputs' files; `importance_L` belongs to the layout of the last stage.
    """
    record = folder / "merge"
    names = [expert.name for expert in plan.experts]
    priors = {"priors": dict(zip(names, plan.priors, strict=True))}
    write_config(record / "config.yaml", plan, identity, _hashed(plan, digests), priors)
    write_coefficients(record / "coefficients.parquet", stages, names)
    if importance_L is not None:
        write_importance(record / "importance.parquet", stages[-1].layout, importance_L)
    write_metrics(record / "metrics.parquet", metrics)
    write_card(folder / "README.md", plan, stages[-1])


def write_weight_space_record(
    folder: Path, plan: Plan, method: Method, identity: str, digests: Mapping[str, str]
) -> None:
    """The model card and merge/config.yaml of a merge that learned nothing."""
    write_config(folder / "merge" / "config.yaml", plan, identity, _hashed(plan, digests))
    write_weight_space_card(folder / "README.md", plan, method)


def _hashed(plan: Plan, digests: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """model → file → SHA-256."""
    return {model: {file: digests[file] for file in files} for model, files in input_files(plan).items()}


def write_config(
    path: Path,
    plan: Plan,
    identity: str,
    inputs: Mapping[str, Mapping[str, str]],
    found: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """merge/config.yaml: the resolved config; date, versions, `inputs` (model → file → SHA-256), what was `found`."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"identity": identity, "date": date, "versions": versions(), "inputs": inputs, **found}
    text = yaml.safe_dump({**resolved_config(plan), "record": record}, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """merge/metrics.parquet: a row a sample of each optimiser step."""
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows), schema=METRICS), path)


def write_weight_space_card(path: Path, plan: Plan, method: Method) -> None:
    """README.md of a merge that learned nothing: what was merged, how, and the config to do it again."""
    front = {
        "base_model": list(dict.fromkeys([plan.base.model, *(expert.model for expert in plan.experts)])),
        "library_name": "transformers",
        "tags": ["merge", method.name],
    }
    config = yaml.safe_dump(resolved_config(plan), sort_keys=False, allow_unicode=True)
    made_with = ", ".join(f"{name} {number}" for name, number in versions().items())
    what = "One model an expert, each in a folder of its name" if method.outputs == "experts" else "One model"
    path.write_text(
        f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# A merge of {len(plan.experts)} models by {method.name}

{what}: {method.summary}, `{method.formula}` ({method.source}). {len(plan.merged)} tensors are merged; all others are
those of `{plan.base.model}`.

```yaml
{config}```

`merge/` holds the same config with the hashes of the inputs, and the memory of every process. Made with {made_with}.
""",
        encoding="utf-8",
    )


def _loading(plan: Plan) -> str:
    """The lines of Python that load the merged model and what makes its inputs."""
    own = plan.config.trust_remote_code and "auto_map" in plan.base_header.config
    if plan.base_header.takes_images and not own:
        names = {"model": "AutoModelForImageTextToText", "processor": "AutoProcessor"}
    else:
        names = {"model": "AutoModel" if own else "AutoModelForCausalLM", "tokenizer": "AutoTokenizer"}
    code = ", trust_remote_code=True" if own else ""
    lines = [f'{name} = {kind}.from_pretrained("PATH-OF-THIS-FOLDER"{code})' for name, kind in names.items()]
    return "\n".join([f"from transformers import {', '.join(names.values())}", "", *lines])


def _aim(plan: Plan) -> str:
    """What coefficients are learned for, and what they multiply where that is not the experts' own task vectors."""
    if not plan.config.labelled:
        aim = "the merged model's predictions have the least entropy\n([AdaMerging](https://arxiv.org/abs/2310.02575))"
    else:
        aim = (
            "the merged model's hidden states and logits match the expert's\n"
            "([Expert Merging](https://arxiv.org/abs/2509.25712))"
        )
    if plan.orthogonal:
        aim += (
            "; those of matrices multiply task vectors\nthat were made orthogonal to each other "
            "([TSV-Merge](https://arxiv.org/abs/2412.00081)), times 4"
        )
    return aim


def write_card(path: Path, plan: Plan, learned: Coefficients) -> None:
    """README.md: what was merged, how, and how to load it."""
    method = {"expert_merging_pp": "Expert Merging++", "adamerging": "AdaMerging"}.get(
        plan.config.merge_method, "Expert Merging"
    )
    front = {
        "base_model": [plan.base.model, *(expert.model for expert in plan.experts)],
        "library_name": "transformers",
        "tags": ["merge", plan.config.merge_method],
    }
    rows = [
        f"| {expert.name} | {expert.kind} | {prior:g} | {values.mean():.3f} "
        f"| {values.min():.3f} to {values.max():.3f} |"
        for expert, prior, values in zip(
            plan.experts, plan.priors, learned.values[:, learned.layout.learned_columns], strict=True
        )
    ]
    options = yaml.safe_dump(resolved_config(plan)["parameters"], sort_keys=False)
    made_with = ", ".join(f"{name} {number}" for name, number in versions().items())
    tied = plan.config.merge_method == "adamerging" and plan.config.parameters.granularity == "task"
    total = 1 if tied else int(np.sum(learned.layout.learned_columns))
    path.write_text(
        f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# A merge of {len(plan.experts)} experts by {method}

{len(plan.experts)} fine-tuned experts of `{plan.base.model}` in one model. For each expert {total} coefficients were
learned on unlabelled samples, so that {_aim(plan)}. {len(plan.merged)} tensors are merged; all others are the base's.

| expert | given as | prior | mean learned coefficient | range |
|---|---|---|---|---|
{chr(10).join(rows)}

## Load it

```python
{_loading(plan)}
```

## Options

```yaml
{options}```

`merge/` holds the whole config with the hashes of the inputs, every coefficient, the importance of every tensor, the
losses of every step, and the memory of every process. Made with {made_with}.
""",
        encoding="utf-8",
    )
