"""What can be known before any actor starts: whether models and records fit a merge, and the samples' inputs.

A sample is prepared once in the life of a run: what it has beside its tokens is kept in the run's state, where experts
and trainer find the same. Knows no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from engine.calibration import Encoder, Sample, make_samples
from engine.checkpoint import open_base
from engine.encoding import TextEncoder
from engine.expert import check_models, unlabelled
from engine.headers import ROOT, ModelHeader, find_model
from engine.image_encoding import ImageEncoder
from engine.internvl_chat import ChatEncoder, is_original
from engine.model import load_model_config, load_tokenizer
from engine.plan import Plan
from engine.processors import load_processor
from engine.records import Record, read_records
from engine.run_folder import RunFolder

Records = Sequence[Sequence[Record]]


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
        run.state.write(run.inputs(sample), safetensors.torch.save(unlabelled(sample, inputs).tensors()))

    samples = make_samples(records, encoder(plan, records), plan, keep)
    run.keep_samples(samples)
    return samples


def encoder(plan: Plan, records: Records) -> Encoder:
    """What makes tokens of these records: the base's own way, by its files or those of `tokenizer_source`.

    Raises:
        CheckpointError: what is needed for it cannot be read.
    """
    folder = open_base(plan).folder
    words = find_model(plan.tokenizer, ROOT) if plan.tokenizer else folder
    everyone = [record for mine in records for record in mine]
    return encoder_of(plan.base_header, folder, words, plan.dtype, plan.config.trust_remote_code, everyone)


def encoder_of(
    header: ModelHeader, folder: Path, words: Path, dtype_name: str, code: bool, records: Sequence[Record]
) -> Encoder:
    """See `encoder`: of the model in `folder`, by the tokenizer in `words`. `code`: what comes with them may run."""
    fields, images = {record.field for record in records}, any(record.images for record in records)
    if header.takes_images:
        config, dtype = load_model_config(folder, code), getattr(torch, dtype_name)
        if is_original(config):
            return ChatEncoder(config, load_tokenizer(words, code), folder, dtype)
        if images:
            return ImageEncoder(load_processor(words, code), dtype)
    config = header.config
    names = [f"{kind}_token_{number}" for kind in ("image", "video") for number in ("id", "index")]
    seen = {number for name in names if type(number := config.get(name)) is int}
    return TextEncoder(load_tokenizer(words, code) if fields != {"input_ids"} else None, seen)
