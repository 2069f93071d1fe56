"""The model card (README.md) of a merged model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.config.mergekit_yaml import as_yaml
from engine.methods.options import Method
from engine.output.names import code, dump, markdown, public_config, public_name, yaml_block
from engine.output.resolved_config import versions
from engine.planning.plan import Plan
from engine.task_vectors.coefficients import Coefficients


def write_weight_space_card(path: Path, plan: Plan, method: Method) -> None:
    """Write the README.md of a weight-space merge: the models, the method, and the config that repeats the merge."""
    front = {"base_model": _models(plan), "library_name": "transformers", "tags": ["merge", method.name]}
    made_with = ", ".join(f"{name} {number}" for name, number in versions().items())
    output = "One model per expert, each in a folder of its name" if method.outputs == "experts" else "One model"
    path.write_text(
        f"""---
{dump(front)}---

# A merge of {plan.described_models} by {method.name}

{output}: {method.summary}, `{method.formula}` ({method.source}). {len(plan.merged)} tensors are merged; all other
tensors are those of {code(public_name(plan.base.address))}.

{_slices(plan)}{_notes(plan)}{yaml_block(as_yaml(public_config(plan.resolved)))}

`merge/` holds the same config with the paths and hashes of the inputs, and the peak memory of every process. Made with
{made_with}.
""",
        encoding="utf-8",
    )


def _slices(plan: Plan) -> str:
    """Return the slices of the output as a list, or nothing."""
    lines = [f"- {markdown(line)}" for line in plan.stacked]
    return "\n".join(["The layers of the output, from the first to the last:", "", *lines, "", ""]) if lines else ""


def _notes(plan: Plan) -> str:
    """Return the notes on the models as a list, or nothing."""
    lines = [f"- {markdown(owner)}: {markdown(note)}" for owner, note in plan.notes]
    return "\n".join(["On the models:", "", *lines, "", ""]) if lines else ""


def _models(plan: Plan) -> list[str]:
    """Return the base and the experts as the hub names them: ids without a revision, once each.

    Outputs of other merges of the same file are not among them.
    """
    made = {document.place for document in plan.documents}
    models = [model for model in (plan.base.model, *(expert.model for expert in plan.experts)) if model not in made]
    return list(dict.fromkeys(public_name(model).partition("@")[0] for model in models))


def _loading(plan: Plan) -> str:
    """Return the Python lines that load the merged model and its tokenizer or processor."""
    own = plan.config.trust_remote_code and "auto_map" in plan.base_header.config
    if plan.base_header.takes_images and not own:
        names = {"model": "AutoModelForImageTextToText", "processor": "AutoProcessor"}
    else:
        names = {"model": "AutoModel" if own else "AutoModelForCausalLM", "tokenizer": "AutoTokenizer"}
    code = ", trust_remote_code=True" if own else ""
    lines = [f'{name} = {kind}.from_pretrained("PATH-OF-THIS-FOLDER"{code})' for name, kind in names.items()]
    return "\n".join([f"from transformers import {', '.join(names.values())}", "", *lines])


def _aim(plan: Plan) -> str:
    """Return the objective of the coefficients as a clause; with orthogonal task vectors also what they multiply."""
    if not plan.config.has_targets:
        aim = "the merged model's predictions have the least entropy\n([AdaMerging](https://arxiv.org/abs/2310.02575))"
    else:
        aim = (
            "the merged model's hidden states and logits match the expert's\n"
            "([Expert Merging](https://arxiv.org/abs/2509.25712))"
        )
    if plan.orthogonal:
        aim += (
            "; the coefficients of matrices multiply\northogonal task vectors "
            "([TSV-Merge](https://arxiv.org/abs/2412.00081)), times 4"
        )
    return aim


def _chunks(plan: Plan, learned: Coefficients) -> str:
    """Return what the coefficients of a matrix multiply if its chunks are groups of singular directions, or nothing."""
    if not learned.layout.spectral:
        return ""
    what = (
        "one singular direction" if plan.config.parameters.chunks == "direction" else "a group of singular directions"
    )
    return f"\nA coefficient of a matrix belongs to {what} of the expert's task vector.\n"


def write_card(path: Path, plan: Plan, learned: Coefficients) -> None:
    """Write the README.md of a learned merge: the experts, the method, and how to load the model."""
    method = {"expert_merging_pp": "Expert Merging++", "adamerging": "AdaMerging"}.get(
        plan.config.merge_method, "Expert Merging"
    )
    front = {"base_model": _models(plan), "library_name": "transformers", "tags": ["merge", plan.config.merge_method]}
    rows = [
        f"| {markdown(expert.name)} | {expert.kind} | {prior:g} | {values.mean():.3f} "
        f"| {values.min():.3f} to {values.max():.3f} |"
        for expert, prior, values in zip(
            plan.experts, plan.priors, learned.values[:, learned.layout.learned_columns], strict=True
        )
    ]
    made_with = ", ".join(f"{name} {number}" for name, number in versions().items())
    tied = plan.config.merge_method == "adamerging" and plan.config.parameters.granularity == "task"
    base = code(public_name(plan.base.model))
    total = 1 if tied else int(np.sum(learned.layout.learned_columns))
    path.write_text(
        f"""---
{dump(front)}---

# A merge of {len(plan.experts)} experts by {method}

{len(plan.experts)} fine-tuned experts of {base} in one model. For each expert {total} coefficients were
learned on unlabelled samples, so that {_aim(plan)}. {len(plan.merged)} tensors are merged; all other tensors are the
base's.
{_chunks(plan, learned)}
| expert | given as | prior | mean learned coefficient | range |
|---|---|---|---|---|
{chr(10).join(rows)}

{_notes(plan)}## Load it

```python
{_loading(plan)}
```

## Options

{yaml_block(as_yaml(plan.config)["parameters"])}

`merge/` holds the whole config with the hashes of the inputs, every coefficient, the importance of every tensor, the
losses of every step, and the peak memory of every process. Made with {made_with}.
""",
        encoding="utf-8",
    )
