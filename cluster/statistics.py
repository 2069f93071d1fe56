"""The collection of statistics on expert actors, one model a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.attempt import Attempt
from engine.calibration.samples import Sample
from engine.run.keys import Computing, Keys
from engine.shards.statistics import check_given, folder_name, given_folder, hashes, kinds_of, model_of
from engine.statistics.files import HEADER

PHASE = "statistics"
Samples = Sequence[Sequence[Sample]]


def collect_statistics(attempt: Attempt, crew: Any, samples: Samples, digests: Mapping[str, str]) -> None:
    """Collect the statistics that a merge needs into its state, and check those that its config names.

    An expert runs on its own samples, the base on those of all experts. What an earlier attempt collected is kept.

    Args:
        attempt: The attempt at the merge.
        crew: Starts and dismisses the actors.
        samples: The samples of each expert.
        digests: SHA-256 of the input files, by path or URI.

    Raises:
        CheckpointError: See `check_given`; or a model does not run block by block.
    """
    plan, folder = attempt.plan, attempt.folder
    models = [k for k in (*range(len(plan.experts)), None) if kinds_of(plan, k)]
    for k in models:
        if given_folder(plan, k) is not None:
            check_given(plan, k, digests)
    wanted = [k for k in models if given_folder(plan, k) is None]
    keys, computing = Keys(plan, folder.identity), Computing(folder.load_devices() or {}, ())

    def of(k: int | None) -> list[Sample]:
        return [sample for of_expert in samples for sample in of_expert] if k is None else list(samples[k])

    for k in wanted:
        folder.reuse.bring_statistics(folder_name(k), keys.statistics(k, of(k), computing))
    missing = [k for k in wanted if not folder.state.exists(f"{folder_name(k)}/{HEADER}")]
    if not missing:
        return
    base = hashes(plan.base, digests)

    def ask(actor: Any, k: int | None) -> Any:
        facts = {"base": base, "model": hashes(model_of(plan, k), digests)}
        named = [(sample, folder.inputs(sample) if sample.inputs else None) for sample in of(k)]
        return actor.statistics.remote(k, named, kinds_of(plan, k), folder.state, folder_name(k), facts)

    actors = crew.experts(len(missing))
    attempt.spread(PHASE, actors, missing, ask, len(wanted) - len(missing))
    for k in missing:
        folder.reuse.keep_statistics(folder_name(k), keys.statistics(k, of(k), computing))
    for actor in actors:
        attempt.report(actor)
        crew.dismiss(actor)
