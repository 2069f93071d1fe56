"""The algorithm over the cluster: targets, stage 1, importance, stage 2, write. Holds references and small tables."""

from __future__ import annotations

from cluster.learned_merge import LearnedMerge, Samples
from cluster.progress import Progress
from cluster.session import connect
from cluster.telemetry import Telemetry, check_trackers
from cluster.watch import until_done
from cluster.weight_space_merge import WeightSpaceMerge
from engine.calibration.records import Records
from engine.planning.plan import Plan
from engine.run.identity import identity
from engine.run.preparation import check_inputs, prepare
from engine.run.run_folder import RunFolder, check_output, open_run


def merge(plan: Plan, out: str, address: str | None = None, fresh: bool = False, debug: bool = False) -> bool:
    """Merge by the plan into `out`, a folder or a URI; False where that very merge is there already.

    After a loss the merge is attempted again on the nodes that are left, from the state that the folder keeps.

    Raises:
        MergeError: the input, the cluster or the run is at fault.
    """
    check_trackers(plan.config, out)
    records: Records = []
    if plan.config.learned:
        plan, records = check_inputs(plan)
    plan_identity = identity(plan)
    if check_output(out, plan_identity, fresh):
        if RunFolder(out).exists():  # a driver that died after its last act but one
            with open_run(out, plan_identity, fresh=False) as run:
                run.discard()
        return False
    with open_run(out, plan_identity, fresh) as run:
        samples = prepare(plan, records, run) if plan.config.learned else []
        with (
            connect(address, debug),
            Telemetry(run.name(), plan.config, out) as telemetry,
            Progress(telemetry) as progress,
        ):
            if plan.config.unused:
                progress.say(f"not used by {plan.config.merge_method}: {', '.join(plan.config.unused)}")
            run.keep_plan(plan)
            until_done(lambda: attempt(plan, samples, run, progress, plan_identity), run.progress_marker, progress.say)
    return True


def attempt(plan: Plan, samples: Samples, run: RunFolder, progress: Progress, plan_identity: str) -> None:
    """The merge from where its state is to its end, on the nodes that there are."""
    kind = LearnedMerge(plan, samples, run, progress) if plan.config.learned else WeightSpaceMerge(plan, run, progress)
    kind.run(plan_identity)
