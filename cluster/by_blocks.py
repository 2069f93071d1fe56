"""Solving the layers of a merged model block by block on expert actors, before its weight files are written.

The shards store the merged model in the state, a file a tensor. Then, for part after part of the model, each expert
contributes its share in the equations of the part's layers, and these are solved. A part is finished before the next
one begins, so the driver goes on from the last part that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cluster.attempt import Attempt
from engine.calibration.samples import Sample
from engine.checkpoints.writer import OutputFile
from engine.correction.files import MERGED, LayerGroup, end_part, load_solved_parts, merged_file
from engine.correction.rules import Rule
from engine.output.model_folder import output_files
from engine.planning.plan import Plan

MERGING, PHASE = "merging", "solving blocks"
# Tensors between two reports of progress.
STEP = 50
Samples = Sequence[Sequence[Sample]]
# Calls a shard to write one file, and returns the reference.
Ask = Callable[[Any, OutputFile], Any]


def solve_blocks(attempt: Attempt, crew: Any, samples: Samples, rule: Rule, write: Ask) -> None:
    """Store the merged model and its solved tensors in the state. What an earlier attempt stored is kept.

    Args:
        attempt: The attempt at the merge.
        crew: Starts and dismisses the actors.
        samples: The samples of each expert.
        rule: How layers are solved.
        write: Writes one file of the merged model into the state.

    Raises:
        CheckpointError: a model does not run block by block, or computes what is not finite.
    """
    _merge(attempt, crew, write)
    folder, state = attempt.folder, attempt.folder.state
    named = [
        [(sample, folder.inputs(sample) if sample.inputs else None) for sample in of_expert] for of_expert in samples
    ]
    done, parts = load_solved_parts(state)
    if done == parts:
        return
    experts = [k for k, of_expert in enumerate(samples) if of_expert]
    actors = crew.experts(len(experts))

    def contribute(actor: Any, task: tuple[int, int]) -> Any:
        part, k = task
        return actor.contribute.remote(k, part, named[k], rule, state)

    def solve(actor: Any, task: tuple[int, LayerGroup, list[int]]) -> Any:
        return actor.solve.remote(*task, rule, state)

    begun = False
    while done != parts:
        # There and back, so that an actor with several experts goes on with the one that it holds.
        turn = 1 if done % 2 == 0 else -1
        tasks = [(done, k) for k in experts[::turn]]
        answers = attempt.watch.hand_out(tasks, actors[::turn], contribute, PHASE)
        found = {k: contribution for (_, k), contribution in answers}
        parts = found[experts[0]].parts
        if not begun:
            attempt.progress.phase(PHASE, parts, done)
            begun = True
        groups: dict[LayerGroup, list[int]] = {}
        for k in experts:
            for group in found[k].groups:
                groups.setdefault(group, []).append(k)
        layers = [(done, group, having) for group, having in groups.items()]
        for _ in attempt.watch.hand_out(layers, actors, solve, PHASE):
            pass
        folder.held()
        end_part(state, done, parts)
        done += 1
        attempt.progress.advance(PHASE, done)
    for actor in actors:
        attempt.report(actor)
        crew.dismiss(actor)


def _merge(attempt: Attempt, crew: Any, write: Ask) -> None:
    """Store the merged model in the state. Its files of an earlier attempt are kept if they are not damaged."""
    state, files = attempt.folder.state, _merged_files(attempt.plan)
    stored = attempt.intact(crew.shards, state, sorted(state.names(MERGED) & {file.name for file in files}))
    missing = [file for file in files if file.name not in stored]
    attempt.progress.phase(MERGING, len(files), len(files) - len(missing))
    written = attempt.watch.hand_out(missing, crew.shards, write, MERGING)
    for done, _ in enumerate(written, start=len(files) - len(missing) + 1):
        if done % STEP == 0 or done == len(files):
            attempt.progress.advance(MERGING, done)


def _merged_files(plan: Plan) -> list[OutputFile]:
    """Return the files of the merged model in the state. Merged tensors are float32: they are rounded at the end."""
    tensors = (tensor for file in output_files(plan) for tensor in file.tensors)
    exact = (
        replace(tensor, dtype="F32", nbytes=4 * plan.numels[tensor.name]) if tensor.name in plan.merged_set else tensor
        for tensor in tensors
    )
    return [OutputFile(merged_file(tensor.name), (tensor,)) for tensor in exact]
