"""A merge by a weight-space method on a cluster: the shards combine base and experts, file by file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.attempt import Attempt
from cluster.crew import Crew
from cluster.placement import Devices, lay_out_shards, machines
from cluster.session import await_layout, nodes
from engine.methods.arithmetic.selection import Counts, Threshold
from engine.methods.registry import get_method
from engine.output.merge_record import write_weight_space_record
from engine.planning.costs.patience import patience
from engine.planning.plan import slices
from engine.shards.weight_space import model_thresholds


class WeightSpaceMerge(Attempt):
    """One attempt at a merge by a weight-space method."""

    def run(self) -> None:
        """Run the merge to its end: thresholds over the whole model, if the method uses them, then every file."""
        method = get_method(self.plan.config.merge_method)
        written = len(self.folder.written())
        if written:
            self.progress.say(f"resuming; {written} of {len(self.weight_files())} weight files kept")
        wait = self.plan.config.cluster.wait
        layout = await_layout(lambda: lay_out_shards(nodes(), self.plan), wait, self.progress.say)
        here = machines(nodes(), self.plan.config, Devices(0, 0))
        self.bound(patience(self.plan, here, len(layout.shards)))
        with Crew(self.plan, self.folder.state, layout, self.watch) as crew:
            self.answers("starting", [shard.report.remote() for shard in crew.shards])
            thresholds = self._thresholds(crew.shards)
            self.folder.start_output(self.weight_files())
            for k, model in enumerate(self.models):
                self._write(crew.shards, thresholds, k if model else None, model)
            digests = self.digests(crew.shards)
            for shard in crew.shards:
                self.report(shard)
        identity = self.folder.identity.encode()
        write_weight_space_record(self.folder.composed, self.plan, method, identity, digests, self.weight_files())
        self.finish()

    def _write(
        self, shards: Sequence[Any], thresholds: Sequence[Threshold] | None, only: int | None, expert: str
    ) -> None:
        weights = self.folder.weights
        self.write_files(shards, lambda shard, file: shard.combine.remote(weights, file, thresholds, only), expert)

    def _thresholds(self, shards: Sequence[Any]) -> list[Threshold] | None:
        """Return the threshold of each expert's whole task vector, if `trim` needs it, from counts of the shards."""
        owned = [names for names in slices(self.plan, len(shards)) if names]

        def count(high: Counts | None) -> Counts:
            counted = [shard.count.remote(names, high) for shard, names in zip(shards, owned, strict=False)]
            parts: list[Counts] = self.answers("counting by size" if high is None else "counting again", counted)
            total: Counts = np.stack(parts).sum(axis=0)
            return total

        return model_thresholds(self.plan, count)
