"""Checks and preparation before any actor starts: models and records against the plan, and the inputs of the samples.

A sample is prepared once in the life of a run. Its pixel inputs are stored in the run's state, from which experts and
trainer read the same tensors.

What only a learned merge needs is imported in the functions: transformers takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.calibration.records import Records, read_records
from engine.calibration.samples import Sample, make_samples
from engine.checkpoints.find import ROOT
from engine.checkpoints.vocabulary import untie
from engine.correction.rules import rule_of
from engine.errors import CalibrationError, CheckpointError, InputError
from engine.learning.targets import save_target, without_targets
from engine.planning.open_models import base_folder, load_base_config, open_expert
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.run.identity import Identity
from engine.run.inputs import IMAGE, identity
from engine.run.keys import Keys
from engine.run.run_folder import RunFolder
from engine.task_vectors.experts import CheckpointWithAdapter, FullExpert
from engine.untrusted import listed


def settle(plan: Plan) -> tuple[Plan, Records, Identity]:
    """Check the inputs, and return the plan with the images of the records, the records and the merge's identity.

    All three are of the same files, although these are read at different times: the headers when the plan was made,
    the records here.

    Raises:
        InputError: an input changed after the plan was made; or see `check_inputs`.
    """
    before = identity(plan)
    again = make_plan(plan.resolved, ROOT)
    if replace(again, config=plan.config, documents=plan.documents) != plan:
        pairs = zip((plan.base, *plan.experts), (again.base, *again.experts), strict=True)
        raise _changed([f"{old.model} changed" for old, new in pairs if old.header != new.header])
    records: Records = []
    if plan.config.uses_samples:
        plan, records = check_inputs(plan)
    now = identity(plan)
    # Images are known only since the records were read.
    without_images = {name: file for name, file in now.files.items() if not name.startswith(IMAGE)}
    if differences := before.changed_files(replace(now, files=without_images)):
        raise _changed(differences)
    return plan, records, now


def _changed(differences: list[str]) -> InputError:
    what = f"not as they were when this command began: {listed(differences or ['a model changed'], '; ')}"
    return InputError(what, "the inputs", do="run the same command again")


def check_inputs(plan: Plan) -> tuple[Plan, Records]:
    """Check the models and the calibration records of a merge that runs models.

    Returns:
        The plan with the images of the records, and the records.

    Raises:
        ConfigError: see `rule_of`.
        CheckpointError: transformers cannot load a model, or a tensor does not fit the model's modules.
        CalibrationError: a record is invalid.
    """
    from engine.learning.frozen_expert import check_models

    rule_of(plan)
    records = read_records(plan)
    check_models(plan)
    images = tuple(tuple(str(image) for record in mine for image in record.images) for mine in records)
    return replace(plan, images=images), records


def check_heads(plan: Plan) -> None:
    """Check that the heads that only experts have equal the embeddings to which the base's head is tied.

    The weights of the two are compared, of each expert that has such a head.

    Raises:
        CheckpointError: a head differs, so that it cannot be left out.
    """
    for expert in plan.experts:
        weights = open_expert(expert)
        for head, embedding in expert.match.tied.items():
            assert isinstance(weights, FullExpert | CheckpointWithAdapter)
            if not torch.equal(weights.checkpoint.read(head), weights.checkpoint.read(embedding)):
                raise CheckpointError(
                    f"its head {head!r} differs from its embedding, and the base has no head of its own",
                    f"expert {expert.name!r} ({expert.model})",
                    f"a head equal to {embedding!r}",
                    f"give the base a head of its own, and use it as `base_model`: {untie(plan.base_header)}",
                )


def prepare(plan: Plan, records: Records, run: RunFolder) -> list[list[Sample]]:
    """Return the samples of each expert, with their pixel inputs stored in the run's state.

    Samples that an earlier start of the run prepared are returned as they are.

    Raises:
        CheckpointError: the tokenizer, the processor or the model's own code is missing or invalid.
        CalibrationError: a record or one of its images cannot be used.
    """
    from engine.calibration.encoder import bounded_encoder

    prepared = run.samples(plan)
    if prepared is not None:
        return prepared

    def keep(sample: Sample, inputs: Mapping[str, Tensor]) -> None:
        save_target(without_targets(sample, inputs), run.state, run.inputs(sample))

    reused: list[list[Sample] | None] = [None] * len(records)
    if run.reuse.on:
        reused = run.reuse.samples(Keys(plan, run.identity), records)
    # Experts without records have no samples here.
    missing = [[] if mine is not None else own for mine, own in zip(reused, records, strict=True)]
    made: list[list[Sample]] = [[] for _ in missing]
    if any(missing):
        with bounded_encoder(plan, records) as encoder:
            made = make_samples(missing, encoder, plan, keep)
    samples = [own if mine is None else mine for mine, own in zip(reused, made, strict=True)]
    check_positions(plan, samples)
    run.keep_samples(samples)
    return samples


def check_positions(plan: Plan, samples: Sequence[Sequence[Sample]]) -> None:
    """Check that no sample is longer than the model's table of positions, if it has one.

    Raises:
        CalibrationError: a sample is longer, or would be with the response that the expert generates.
    """
    from engine.models.names import positions_of
    from engine.models.skeleton import build_generation_skeleton

    longest = max((sample for mine in samples for sample in mine), key=lambda sample: sample.tokens, default=None)
    if longest is None:
        return
    config = load_base_config(plan)
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if type(most) is not int or longest.tokens <= most:
        return
    dtype = getattr(torch, plan.dtype)
    model, _ = build_generation_skeleton(config, plan.base_header.tensors, dtype, base_folder(plan))
    if positions_of(model) is not None:
        raise CalibrationError(
            f"the sample may have {longest.tokens:,} tokens, and the model has {most:,} positions",
            longest.where,
            f"at most {most:,} tokens",
            f"set `calibration.max_length: {most}`; longer samples are truncated",
        )
