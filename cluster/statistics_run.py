"""The command `stats` on a cluster: statistics of a config's models, each in a folder of its name."""

from __future__ import annotations

from cluster.attempt import Attempt
from cluster.crew import Crew
from cluster.placement import Devices, machines
from cluster.progress import Progress
from cluster.ray_watch import RayWatch
from cluster.session import nodes
from cluster.statistics import Samples, collect_statistics
from engine.output.merge_record import write_statistics_record
from engine.planning.costs.patience import patience
from engine.planning.plan import Plan
from engine.run.run_folder import RunFolder
from engine.shards.statistics import FOLDER, folder_name
from engine.statistics.files import HEADER, read_header
from engine.storage.cache import move_out

# The folder of the base's statistics.
BASE = "base"


class StatisticsRun(Attempt):
    """One attempt at the statistics of a config's models, each in a folder of its name (`python cli.py stats`)."""

    def __init__(self, plan: Plan, samples: Samples, folder: RunFolder, progress: Progress, losses: int = 0) -> None:
        super().__init__(plan, folder, progress, RayWatch(progress.say), losses)
        self._samples = samples

    def run(self) -> None:
        """Collect the statistics, and move them into the output."""
        layout, plan = self.await_layout(lambda: self.seats(nodes())), self.plan
        here, tokens = machines(nodes(), plan.config, Devices(0, 0)), [[s.tokens for s in own] for own in self._samples]
        self.bound(patience(plan, here, len(layout.shards), tokens=tokens))
        with Crew(plan, self.folder.state, layout, self.watch) as crew:
            digests = self.digests(crew.shards)
            collect_statistics(self, crew, self._samples, digests)
        self.folder.start_output([])
        for k in (*range(len(plan.experts)), *([None] if plan.config.collect_base else [])):
            name, stored = BASE if k is None else plan.experts[k].name, folder_name(k)
            # The header first: an expert that a stop leaves without it is collected again.
            for file in (HEADER, *sorted(read_header(self.folder.state.child(stored)).files)):
                move_out(self.folder.state, f"{stored}/{file}", self.folder.composed / name / file)
        self.folder.state.remove(FOLDER)
        write_statistics_record(self.folder.composed, plan, self.folder.identity.encode(), digests)
        self.folder.finish()
