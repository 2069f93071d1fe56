"""A loaded model that takes the weights of any merge of a plan's structure, streamed into its memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoints.find import ROOT, find_model
from engine.checkpoints.headers import FLOATS
from engine.checkpoints.writer import OutputTensor, torch_dtype
from engine.correction.steps import TensorSteps, steps_around
from engine.evaluation.subject import Options, Subject
from engine.models.devices import device_map
from engine.models.internvl import set_image_token
from engine.models.loading import load_model_config
from engine.models.names import positions_of
from engine.models.skeleton import build_generation_skeleton, fill, set_weights
from engine.output.model_folder import output_files, write_companions
from engine.planning.open_models import base_folder, open_task_vectors
from engine.planning.plan import Plan
from engine.shards.prepasses import known_of, measured
from engine.shards.statistics import MergeStatistics
from engine.shards.weight_space import WeightSpace
from engine.task_vectors.pieces import pieces
from engine.task_vectors.pipeline import stream


def entries_of(plan: Plan) -> list[OutputTensor]:
    """Return the tensors of the output of a plan, in its order."""
    return [entry for file in output_files(plan) for entry in file.tensors]


class MergedModel(Subject):
    """The output of a plan as a model under evaluation, whose weights no file has.

    The weights are those that a merge would write, so that the model scores as the written merge does. They are in
    memory once on the CPU; on a GPU, also on the CPU.

    Args:
        plan: A plan of a weight-space method. Other plans that `fits` accepts can be merged into the model as well.
        folder: An empty folder for the output's files beside the weights.
        options: Options of the evaluation.
        device: The device of the model.

    Raises:
        CheckpointError: transformers cannot load the output.
    """

    def __init__(self, plan: Plan, folder: Path, options: Options, device: torch.device) -> None:
        tokenizer = find_model(plan.tokenizer, ROOT) if plan.tokenizer else None
        write_companions(folder, plan, base_folder(plan), output_files(plan), tokenizer)
        self.folder, self.options, self._device = folder, options, device
        self.header = replace(plan.base_header, folder=folder)
        self._entries = entries_of(plan)
        sizes: Counter[str] = Counter()
        for entry in self._entries:
            if entry.dtype in FLOATS:
                sizes[FLOATS[entry.dtype]] += entry.nbytes
        self.dtype_name = sizes.most_common(1)[0][0] if options.dtype == "auto" else options.dtype
        config = load_model_config(folder, options.remote_code)
        self.model, self._places = build_generation_skeleton(config, self.header.tensors, self._dtype, folder)
        self._devices = device_map(self.model, self._dtype, device)
        self.positions = positions_of(self.model)
        self._weights: dict[str, Tensor] = {}

    def fits(self, plan: Plan) -> bool:
        """Return whether the output of a plan has the same tensors and config."""
        header = plan.base_header
        return entries_of(plan) == self._entries and replace(header, folder=self.folder) == self.header

    def merge(self, plan: Plan, threads: int) -> None:
        """Set the model to the merge of a plan.

        Raises:
            RunError: A merged weight is not finite.
        """
        streams, first = open_task_vectors(plan, threads), not self._weights
        try:
            space, statistics = WeightSpace(plan, streams), MergeStatistics(plan, None)
            known = known_of(
                plan,
                lambda method, index, names, known: [
                    measured(plan, method, index, (space.tensor(name, known) for name in names), threads)
                ],
            )
            steps = TensorSteps(plan, steps_around(plan)[0], streams, statistics)
            # What is copied from the base stays the same.
            wanted = [entry for entry in self._entries if first or entry.name in plan.merged_set]
            jobs = [steps.after(space.job(entry, torch_dtype(entry.dtype), known, None)) for entry in wanted]
            parts = stream(jobs, streams.pool, threads)
            for entry, job in zip(wanted, jobs, strict=True):
                weight = self._weights.setdefault(entry.name, torch.empty(entry.shape, dtype=job.dtype)).view(-1)
                of_entry = list(pieces(entry.name, entry.shape))
                for piece, merged_N in zip(of_entry, islice(parts, len(of_entry)), strict=True):
                    weight[piece.start : piece.stop].copy_(merged_N)
        finally:
            streams.pool.shutdown()
        if first:
            fill(self.model, self._places, self._devices, self._dtype, self._weights.__getitem__)
            set_image_token(self.model, self.folder)
        else:
            set_weights(self.model, self._places, self._devices, self._dtype, self._weights.__getitem__)
            self.model.requires_grad_(False)
