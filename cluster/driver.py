"""The entry points of a merge: `merge` prepares the run, `attempt` computes the result.

An attempt is a `LearnedMerge` (targets, stage 1, importance, stage 2, output), a `WeightSpaceMerge` (output only) or a
`StatisticsRun` or `CompressionRun`.
The driver holds references and small tables, never a tensor of a model. What a merge without learning on this machine
does not need is imported in the functions: Ray, the other actors and the trackers take seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import TYPE_CHECKING

from cluster.processes import OneMachine
from cluster.progress import Progress
from cluster.watch import until_done
from cluster.weight_space_merge import Hosts, WeightSpaceMerge
from engine.calibration.samples import Sample
from engine.errors import MergeError, RunError
from engine.planning.costs.disk import check_disk, disk_needs
from engine.planning.differences import left_out
from engine.planning.factors import factored
from engine.planning.plan import Plan
from engine.planning.preflight import doubts, remarks
from engine.run.ownership import check_state
from engine.run.place import check_apart, check_place
from engine.run.preparation import check_heads, prepare, settle
from engine.run.run_folder import RunFolder, check_output, open_run
from engine.run.starts import Start, keep_doubts, keep_left_out
from engine.shards.settings import check_settings
from engine.storage.address import addresses_in

if TYPE_CHECKING:
    from cluster.telemetry import Telemetry

Samples = Sequence[Sequence[Sample]]


def merge(plan: Plan, out: str, address: str | None = None, fresh: bool = False, debug: bool = False) -> bool:
    """Merge according to the plan into `out`.

    After the loss of a node, or if an actor hangs, the merge is attempted again with new actors on the remaining nodes,
    from the state in `OUT.run/`.

    Args:
        plan: The plan of the merge.
        out: The output folder, an absolute path or a URI.
        address: The address of a running Ray cluster; None uses RAY_ADDRESS or, if `needs_ray`, starts Ray on this
            machine.
        fresh: Discard the state of an earlier start without `fresh`, and replace an earlier merge.
        debug: Show the actors' own output.

    Returns:
        False if `out` already holds this merge, else True.

    Raises:
        InputError: the config, a model, a calibration file or the output folder is wrong.
        ClusterError: the cluster cannot be reached or lacks resources, or the output's disk lacks space.
        RunError: the merge failed; its state is kept.
    """
    with Progress() as progress:
        return _merge(plan, out, address, fresh, debug, progress)


def _merge(plan: Plan, out: str, address: str | None, fresh: bool, debug: bool, progress: Progress) -> bool:
    """Merge; see `merge`."""
    progress.wait("checking models and data")
    check_place(out)
    check_apart(plan, out)
    check_state(RunFolder(out).state)
    if plan.config.log_with:
        from cluster.telemetry import check_trackers

        check_trackers(plan.config, out)
    check_heads(plan)
    if not (plan.config.learned or plan.config.collect):
        check_settings(plan)
    plan, records, now = settle(plan)
    check_apart(plan, out)  # now with the images of the records
    if check_output(out, now, fresh):
        if RunFolder(out).exists():
            # The output was renamed into place, but the driver died before it removed OUT.run.
            with open_run(out, now, fresh=False) as run:
                run.discard()
        return False
    with open_run(out, now, fresh) as run:
        progress.start = Start(run.state)
        run.share(plan.config)
        samples = prepare(plan, records, run) if plan.config.uses_samples else []
        # As on GPUs, where stored task vectors take the least. The attempt checks again when it knows the devices.
        least = factored(plan, True, plan.config.cluster.factors)
        tokens = [[sample.tokens for sample in of_expert] for of_expert in samples]
        check_disk(disk_needs(plan, tokens, least, run.has_task_vectors(plan)), out)
        on_ray = needs_ray(plan, out, address)
        progress.wait("starting Ray" if on_ray else "starting")
        with (
            _hosts(on_ray, address, debug, run, progress) as hosts,
            _telemetry(plan, run, on_ray) as progress.telemetry,
        ):
            progress.wait("working")
            try:
                _run(plan, samples, run, progress, hosts)
            finally:
                run.reuse.trim()
    return True


def _run(plan: Plan, samples: Samples, run: RunFolder, progress: Progress, hosts: Hosts) -> None:
    """Attempt the merge until it is done."""
    shares, found = left_out(plan), doubts(plan)
    keep_left_out(run.state, shares)
    keep_doubts(run.state, found)
    for line in remarks(plan, shares, found):
        progress.say(line)
    run.say = progress.say
    run.keep_plan(plan)
    losses = count()
    try:
        until_done(
            lambda: attempt(plan, samples, run, progress, hosts, next(losses)), run.progress_marker, progress.lost
        )
    except MergeError:
        run.check_unchanged(plan)  # if an input has changed, this is the error to show
        raise


def needs_ray(plan: Plan, out: str, address: str | None) -> bool:
    """Return whether a merge needs Ray: it runs models, a cluster is asked for, or object storage is read or written.

    A process that is connected to a Ray asks for it.
    """
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    asked = connected or address or os.environ.get("RAY_ADDRESS") or plan.config.cluster.labels
    # The cache is used by this process alone.
    config = plan.resolved.model_dump(mode="json", exclude={"cache"})
    return bool(plan.config.uses_samples or asked or [*addresses_in([out, config])])


@contextmanager
def _hosts(on_ray: bool, address: str | None, debug: bool, run: RunFolder, progress: Progress) -> Iterator[Hosts]:
    """Yield the connected Ray, or this machine."""
    if not on_ray:
        yield OneMachine(debug)
        return
    from cluster.crew import RayCluster
    from cluster.session import connect

    try:
        with connect(address, debug, run.log, progress.say):
            yield RayCluster()
    except RunError:
        if run.log.exists():
            progress.say(f"what Ray and the actors printed is in {run.log}")
        raise


def _telemetry(plan: Plan, run: RunFolder, on_ray: bool) -> AbstractContextManager[Telemetry | None]:
    """Return the context of gauges, which need Ray, and trackers; an empty one if there are neither."""
    if not on_ray and not plan.config.log_with:
        return nullcontext()
    from cluster.telemetry import Telemetry

    return Telemetry(run.name(), plan.config, run.out, gauges=on_ray)


def attempt(plan: Plan, samples: Samples, run: RunFolder, progress: Progress, hosts: Hosts, losses: int = 0) -> None:
    """Complete the merge from its stored state, on the nodes that are alive, after a number of lost attempts.

    Raises:
        Lost: a node or an object was lost, or an actor hangs; the merge can be attempted again.
        MergeError: the merge cannot continue.
    """
    if plan.config.collect or plan.config.compress:
        from cluster.model_runs import model_run

        model_run(plan)(plan, samples, run, progress, losses).run()
        return
    if not plan.config.learned:
        WeightSpaceMerge(plan, samples, run, progress, hosts, losses).run()
        return
    from cluster.learned_merge import LearnedMerge

    LearnedMerge(plan, samples, run, progress, losses).run()
