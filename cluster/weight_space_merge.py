"""A merge by a weight-space method: shards, on Ray or on this machine alone, combine base and experts file by file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from cluster.attempt import Attempt
from cluster.by_blocks import Ask, solve_blocks
from cluster.placement import Devices, machines
from cluster.progress import Progress
from cluster.seats import Node, Seating
from cluster.statistics import collect_statistics
from cluster.watch import Watch
from engine.calibration.samples import Sample
from engine.correction.rules import rule_of
from engine.methods.prepass import Array
from engine.methods.registry import get_method, prepasses
from engine.output.merge_record import write_weight_space_record
from engine.planning.costs.patience import patience
from engine.planning.plan import Plan, slices
from engine.run.run_folder import RunFolder
from engine.shards.prepasses import Known, known_of
from engine.shards.projections import known_fits
from engine.statistics.fits import described
from engine.storage.folder import Folder


class Hosts(Protocol):
    """Where the shards of a merge run: `cluster.crew.RayCluster` or `cluster.processes.OneMachine`."""

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive."""

    def watch(self, say: Callable[[str], None]) -> Watch:
        """Return a watch of the shards, which prints lines with `say`."""

    def crew(self, plan: Plan, state: Folder, layout: Seating, watch: Watch) -> AbstractContextManager[Any]:
        """Return a context in which the shards run, with their handles in `shards`."""


class WeightSpaceMerge(Attempt):
    """One attempt at a merge by a weight-space method."""

    def __init__(
        self,
        plan: Plan,
        samples: Sequence[Sequence[Sample]],
        folder: RunFolder,
        progress: Progress,
        hosts: Hosts,
        losses: int = 0,
    ) -> None:
        super().__init__(plan, folder, progress, hosts.watch(progress.say), losses)
        self._hosts, self._samples = hosts, samples

    def run(self) -> None:
        """Run the merge to its end: prepasses over the whole model, if the method has any, then every file."""
        method = get_method(self.plan.config.merge_method)
        written = len(self.folder.written())
        if written:
            self.progress.say(f"resuming; {written} of {len(self.weight_files())} weight files kept")
        layout = self.await_layout(lambda: self.seats(self._hosts.nodes()))
        here = machines(self._hosts.nodes(), self.plan.config, Devices(0, 0))
        tokens = [[sample.tokens for sample in of_expert] for of_expert in self._samples]
        self.bound(patience(self.plan, here, len(layout.shards), tokens=tokens))
        with self._hosts.crew(self.plan, self.folder.state, layout, self.watch) as crew:
            self.answers("starting", [shard.report.remote() for shard in crew.shards])
            if self.plan.config.statistics or self.plan.config.statistics_of_base:
                collect_statistics(self, crew, self._samples, self.digests(crew.shards))
            known = self._known(crew.shards)
            if fits := known_fits(self.plan, known):
                self.progress.say(described(fits))
            if (rule := rule_of(self.plan)) is not None:
                state = self.folder.state
                merge: Ask = lambda shard, file: shard.combine.remote(state, file, known)  # noqa: E731
                solve_blocks(self, crew, self._samples, rule, merge)
            self.folder.start_output(self.weight_files())
            for k, model in enumerate(self.models):
                self._write(crew.shards, known, k if model else None, model)
            digests = self.digests(crew.shards)
            for shard in crew.shards:
                self.report(shard)
        result = self.folder.identity.encode(), digests, self.weight_files(), fits
        write_weight_space_record(self.folder.composed, self.plan, method, *result)
        self.finish()

    def _write(self, shards: Sequence[Any], known: Known, only: int | None, expert: str) -> None:
        weights = self.folder.weights
        ask: Ask = lambda shard, file: shard.combine.remote(weights, file, known, only)  # noqa: E731
        self.write_files(shards, ask if rule_of(self.plan) is None else self.write_solved, expert)

    def _known(self, shards: Sequence[Any]) -> Known:
        """Return what the methods have to know of the whole model first, measured by the shards."""

        def measure(method: str, index: int, names: Sequence[str], known: Known) -> list[dict[str, Array]]:
            owned = zip(shards, slices(self.plan, len(shards), names), strict=True)
            asked = [shard.measure.remote(method, index, mine, known) for shard, mine in owned if mine]
            return self.answers(prepasses(method)[index].about, asked)

        return known_of(self.plan, measure)
