"""A merge that learns nothing, over the cluster: the shards combine base and experts, file by file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.run import Run
from engine.methods.registry import get_method
from engine.methods.selection import Counts, Threshold
from engine.plan import slices
from engine.record import write_weight_space_record
from engine.weight_space import model_thresholds


class Combine(Run):
    """One merge by a weight-space method."""

    def run(self, plan_identity: str) -> None:
        """The whole algorithm: thresholds over the whole model where the method asks for them, and then every file."""
        method = get_method(self.plan.config.merge_method)
        with self.crew.shards() as shards:
            self.answers("starting", [shard.report.remote() for shard in shards])
            thresholds = self._thresholds(shards)
            folder = self.folder.start_output()
            if method.outputs == "experts":
                for k, expert in enumerate(self.plan.experts):
                    self._write(shards, folder / expert.name, thresholds, k)
            else:
                self._write(shards, folder, thresholds, None)
            digests = self.digests(shards)
            for shard in shards:
                self.report(shard)
        write_weight_space_record(folder, self.plan, method, plan_identity, digests)
        self.write_memory(folder)
        self.folder.finish()

    def _write(
        self, shards: Sequence[Any], folder: Path, thresholds: Sequence[Threshold] | None, only: int | None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.write_files(
            shards,
            folder,
            lambda shard, file: shard.combine.remote(folder, file, thresholds, only),
            "writing" if only is None else f"writing {self.plan.experts[only].name}",
        )

    def _thresholds(self, shards: Sequence[Any]) -> list[Threshold] | None:
        """Of each expert's whole task vector, where `trim` says so: counted by the shards, each over its tensors."""
        owned = [names for names in slices(self.plan, len(shards)) if names]

        def count(high: Counts | None) -> Counts:
            asked = [shard.count.remote(names, high) for shard, names in zip(shards, owned, strict=False)]
            parts: list[Counts] = self.answers("counting by size" if high is None else "counting again", asked)
            total: Counts = np.stack(parts).sum(axis=0)
            return total

        return model_thresholds(self.plan, count)
