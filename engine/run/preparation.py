"""What can be known before any actor starts: whether models and records fit a merge, and the samples' inputs.

A sample is prepared once in the life of a run: what it has beside its tokens is kept in the run's state, where experts
and trainer find the same. Knows no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import safetensors.torch
from torch import Tensor

from engine.calibration.encoder import encoder
from engine.calibration.records import Records, read_records
from engine.calibration.samples import Sample, make_samples
from engine.learning.frozen_expert import check_models
from engine.learning.targets import without_targets
from engine.planning.plan import Plan
from engine.run.run_folder import RunFolder


def check_inputs(plan: Plan) -> tuple[Plan, Records]:
    """The records of a merge that learns, and the plan with their images; names that meet the modules'.

    Raises:
        CheckpointError, CalibrationError: naming the tensor or the record at fault.
    """
    records = read_records(plan)
    check_models(plan)
    seen = tuple(tuple(str(image) for record in mine for image in record.images) for mine in records)
    return replace(plan, images=seen), records


def prepare(plan: Plan, records: Records, run: RunFolder) -> list[list[Sample]]:
    """The samples, their inputs kept in the run's state; those of an earlier start where it has prepared them.

    Raises:
        CalibrationError: naming the record, and the image, at fault.
    """
    kept = run.samples()
    if kept is not None:
        return kept

    def keep(sample: Sample, inputs: Mapping[str, Tensor]) -> None:
        run.state.write(run.inputs(sample), safetensors.torch.save(without_targets(sample, inputs).tensors()))

    samples = make_samples(records, encoder(plan, records), plan, keep)
    run.keep_samples(samples)
    return samples
