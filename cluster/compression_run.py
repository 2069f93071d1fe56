"""The command `compress` on a cluster: a mixture of experts with fewer of them.

An expert actor runs the samples through the model and compresses layer after layer; then shards write the files.
"""

from __future__ import annotations

from cluster.attempt import Attempt
from cluster.crew import Crew
from cluster.placement import Devices, machines
from cluster.progress import Progress
from cluster.ray_watch import RayWatch
from cluster.session import nodes
from cluster.statistics import Samples
from engine.compression.model import CompressedModel
from engine.errors import CalibrationError
from engine.output.card import add_memory
from engine.output.compression_record import write_compression_record
from engine.output.model_folder import output_files, write_companions, write_json
from engine.planning.costs.patience import patience
from engine.planning.open_models import base_folder
from engine.planning.plan import Plan
from engine.run.run_folder import RunFolder

PHASE, WRITING = "compressing blocks", "writing"


class CompressionRun(Attempt):
    """One attempt at a smaller model (`python cli.py compress`)."""

    def __init__(self, plan: Plan, samples: Samples, folder: RunFolder, progress: Progress, losses: int = 0) -> None:
        super().__init__(plan, folder, progress, RayWatch(progress.say), losses)
        (self._samples,) = samples

    def run(self) -> None:
        """Compress every layer, and write the files of the smaller model. What an earlier attempt stored is kept."""
        if not self._samples:
            raise CalibrationError("the calibration files have no records", str(self.plan.experts[0].calibration[0]))
        layout, plan, state = self.await_layout(lambda: self.seats(nodes())), self.plan, self.folder.state
        here, tokens = machines(nodes(), plan.config, Devices(0, 0)), [[sample.tokens for sample in self._samples]]
        self.bound(patience(plan, here, len(layout.shards), tokens=tokens))
        compressed = CompressedModel(plan, state)
        with Crew(plan, state, layout, self.watch) as crew:
            digests = self.digests(crew.shards)
            if not all(compressed.is_stored(layer) for layer in compressed.layout.layers):
                self._compress(crew)
            files = output_files(compressed.smaller)
            self.folder.start_output([file.name for file in files])
            missing = [file for file in files if file.name not in self.folder.written()]
            ask = lambda shard, file: shard.compressed.remote(self.folder.weights, file)  # noqa: E731
            self.spread(WRITING, crew.shards, missing, ask, len(files) - len(missing))
            for shard in crew.shards:
                self.report(shard)
        write_companions(self.folder.composed, compressed.smaller, base_folder(plan), files)
        names = [file.name for file in files]
        write_compression_record(self.folder.composed, compressed, self.folder.identity.encode(), digests, names)
        memory = self._memory()
        write_json(self.folder.composed / "merge" / "memory.json", memory)
        add_memory(self.folder.composed / "README.md", memory)
        self.folder.finish()

    def _compress(self, crew: Crew) -> None:
        """Compress part after part on an expert actor."""
        (actor,) = crew.experts(1)
        ask = lambda actor, part: actor.compress.remote(part, self._samples, self.folder.state)  # noqa: E731
        done, parts = 0, 1
        while done < parts:
            [(_, answer)] = self.watch.hand_out([done], [actor], ask, PHASE)
            if not done:
                self.progress.phase(PHASE, answer)
            parts, done = answer, done + 1
            self.folder.held()
            self.progress.advance(PHASE, done)
        self.report(actor)
        crew.dismiss(actor)
