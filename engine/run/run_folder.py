"""The files of a run: the state from which a merge resumes, and an output that appears whole or not at all.

`OUT.run/` stands next to the output `OUT` while a merge runs. It holds the targets, the state after each optimiser step
and the metrics, and is removed when the merge is complete. On a disk, the output is written in `OUT.run/` and renamed
at the end. Objects in object storage cannot be renamed, so there the output is written in its final place, and
merge/config.yaml, written last, marks it as complete.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from engine.compression.families import FOLDER as COMPRESSED
from engine.config.schema import Config
from engine.correction.files import MERGED, load_solved_parts
from engine.errors import CheckpointError, DamagedError, OutputError, RunError
from engine.planning.factors import decomposed
from engine.planning.plan import Plan
from engine.run.contents import write_manifest
from engine.run.identity import Identity
from engine.run.inputs import identity
from engine.run.kept_state import KeptState
from engine.run.ownership import (
    IDENTITY,
    MARKER,
    RECORD,
    Claim,
    EarlierMerge,
    changed,
    check_replaceable,
    check_state,
    clear,
    extend_claim,
    is_done,
    mark,
    read_identity,
    remove_files,
    resumes,
    write_identity,
)
from engine.run.place import check_place
from engine.run.reuse import Reuse, open_cache
from engine.shards.orthogonal import FOLDER, file_name
from engine.shards.parts import SURVEY
from engine.shards.statistics import FOLDER as STATISTICS
from engine.storage.address import Address
from engine.storage.cache import cache_folder
from engine.storage.folder import storing
from engine.storage.local_folder import LocalFolder, sweep
from engine.storage.paths import is_uri, open_folder
from engine.storage.private import check_private, make_private
from engine.storage.sealed import read_sealed, write_sealed

WRITING, LOG = "writing", "log"
# Where an earlier merge on a disk stays, in the state, from its replacement to the end of the run.
REPLACED = "replaced"
# Contents of WRITING: while an earlier merge is being removed from the output's place, and afterwards.
CLEARING, CLEARED = b"clearing", b"cleared"


def check_output(out: str, now: Identity, fresh: bool) -> bool:
    """Return whether `out` already holds the complete result of this merge; False with `fresh`, which redoes it.

    False too if an unfinished run of this merge, begun with `fresh`, is to replace what `out` holds.

    Raises:
        OutputError: `out` holds something other than a merge, or, without `fresh`, another merge; or no folder can be
            made there, or the folder of the run's state is not this program's own.
    """
    check_place(out)
    run = RunFolder(out)
    check_state(run.state)
    return is_done(open_folder(out), run.state, now, fresh)


class RunFolder(KeptState):
    """The folders of one run; `open_run` creates them.

    Attributes:
        out: The output, an absolute path or a URI.
        state: The folder of everything that is needed to resume.
        weights: The folder for the output's weight files.
        composed: The local folder for all other files of the output.
        log: The local file for what Ray prints; kept as long as the state, and after a run that failed.
        identity: The identity of the merge; set by `open_run`.
        reuse: What the run shares with other merges.
        held, say: See `KeptState`.
    """

    identity: Identity

    def __init__(self, out: str) -> None:
        self.out = out
        # The path to which the output is renamed; None where it is written in its final place.
        self._path = None if is_uri(out) else Path(out)
        if self._path is not None:
            super().__init__(open_folder(self._path.with_name(f"{self._path.name}.run")))
            self.weights = self.state.child("output")
            self.composed = Path(self.weights.where)
            self.log = self.composed.with_name(LOG)
        else:
            address = Address.of(out, OutputError)
            if not address.path:
                raise OutputError("the output is a whole bucket", out, str(replace(address, path="folder")))
            super().__init__(open_folder(str(replace(address, path=f"{address.path}.run"))))
            self.weights = open_folder(out)
            self.composed = cache_folder() / "composed" / hashlib.sha256(str(address).encode()).hexdigest()
            self.log = self.composed.with_suffix(f".{LOG}")
        self.reuse = Reuse(self)

    def begin(self, now: Identity) -> None:
        """Store the identity of the merge."""
        self.identity = now
        write_identity(self.state, now)

    def share(self, config: Config) -> None:
        """Share what the run computes with other merges, through the cache of the config.

        Raises:
            ConfigError, StorageError: See `open_cache`.
        """
        self.reuse = Reuse(self, open_cache(config, self.say))
        self.begin(self.identity.with_digests(self.reuse.digests(self.identity)))

    def check_unchanged(self, plan: Plan, digests: Mapping[str, str] | None = None) -> None:
        """Check that every input is as it was when the run began, and store the SHA-256 of those that were hashed.

        Raises:
            InputError: an input has changed. What was computed may be a mixture, so the next start begins again.
        """
        differences = self.identity.changed_files(identity(plan))
        if differences:
            self.state.remove(IDENTITY)
            raise changed(differences, "run the same command: it begins again, with the inputs as they are now")
        if digests:
            self.begin(self.identity.with_digests(digests))

    def name(self) -> str:
        """Return the run's name for gauges and trackers: the output's name and 8 random hex digits.

        It stays the same until the run is complete.
        """
        try:
            return read_sealed(self.state, "name").decode()
        except (FileNotFoundError, DamagedError):
            name = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', PurePosixPath(self.out).name)}-{uuid.uuid4().hex[:8]}"
            write_sealed(self.state, "name", name.encode())
            return name

    def has_task_vectors(self, plan: Plan) -> bool:
        """Return whether the task vectors of all matrices that are decomposed are stored."""
        return {file_name(name) for name in decomposed(plan)} <= self.state.names(FOLDER)

    def progress_marker(self) -> object:
        """Return a value that changes whenever the run makes progress."""
        folders = SURVEY, FOLDER, STATISTICS, MERGED, COMPRESSED
        of_experts = (len(self.stored_targets()), *(len(self.state.names(one)) for one in folders))
        return *of_experts, self.steps_taken(), load_solved_parts(self.state), len(self.written())

    def start_output(self, files: Iterable[str]) -> None:
        """Create the output's folders, and remove everything in them except weight files that this run wrote.

        Args:
            files: The names of the weight files that this run writes.

        Raises:
            OutputError: the output's place holds something that this run does not replace.
        """
        self.held()
        if not self._is_cleared():
            extend_claim(self.state, files)
            if not self.state.exists(WRITING):
                check_replaceable(self.weights, Claim.read(self.state))
            self.state.write(WRITING, CLEARING)
            remove_files(self.weights, Claim.read(self.state).old)
            self.state.write(WRITING, CLEARED)
        composed = LocalFolder(self.composed)
        for name in composed.names() - self.written():
            composed.remove(name)
        with storing(self.composed):
            (self.composed / "merge").mkdir(parents=True, exist_ok=True)

    def written(self) -> set[str]:
        """Return the names of the weight files that this run has written."""
        names = self.weights.names() if self._is_cleared() else set()
        if self._path is None and names:
            names &= set(Claim.read(self.state).own)
        return {name for name in names if name.endswith(".safetensors")}

    def start_anew(self, fresh: bool) -> None:
        """Remove the state of an earlier start, and its output if that is incomplete; claim the output's place."""
        if self._path is None and self.state.exists(WRITING) and not self.weights.exists(RECORD):
            claim = Claim.read(self.state)
            remove_files(self.weights, claim.own if self._is_cleared() else (*claim.own, *claim.old))
        clear(self.state)
        self._remove_log()
        Claim.to_replace(EarlierMerge.read(open_folder(self.out)) if fresh else None, fresh).write(self.state)

    def restore(self) -> None:
        """Put an earlier merge back in its place if a stop cut off its replacement in between."""
        replaced = self.composed.with_name(REPLACED)
        if self._path is not None and replaced.is_dir() and not self._path.exists():
            with storing(self._path):
                replaced.rename(self._path)

    def finish(self) -> None:
        """Move the complete output into its place, replacing an earlier merge, and remove the run's folder.

        Raises:
            OutputError: the output's place now holds something that this run does not replace.
        """
        self.held()
        write_manifest(LocalFolder(self.composed), self.weights, self.state, self.written())
        if self._path is None:
            self._upload()
        else:
            with storing(self._path):
                sweep(self.composed)
                check_replaceable(LocalFolder(self._path), Claim.read(self.state))
                self.state.remove(REPLACED)
                if self._path.exists():
                    self._path.rename(self.composed.with_name(REPLACED))
                self.composed.rename(self._path)
        self.discard()

    def discard(self) -> None:
        """Remove the run's folder; its marker last, so that what a stop leaves of it is known as this program's own."""
        self.held()
        clear(self.state)
        self.state.remove(MARKER)
        if self._path is None:
            shutil.rmtree(self.composed, ignore_errors=True)
            self._remove_log()

    def exists(self) -> bool:
        """Return whether the run has any files."""
        return bool(self.state.names())

    def computed(self, of_models: bool = True) -> bool:
        """Return whether the run has results from which a merge can resume.

        `of_models`: targets, surveys and stored task vectors count, too. What comes from a cache does not.
        """
        names = self.state.names().difference(*self.reused().values())
        of_work = "targets", SURVEY, FOLDER, STATISTICS, MERGED, COMPRESSED
        kept = ("stage-", *([f"{one}/" for one in of_work] if of_models else []))
        return any(name.startswith(kept) for name in names) or WRITING in names or bool(self.written())

    def _remove_log(self) -> None:
        for path in (self.log, self.log.with_name(f"{self.log.name}.1")):
            path.unlink(missing_ok=True)

    def _is_cleared(self) -> bool:
        """Return whether every file in the output's place belongs to this run."""
        return self._path is not None or (self.state.exists(WRITING) and self.state.read(WRITING) == CLEARED)

    def _upload(self) -> None:
        names = [path.relative_to(self.composed).as_posix() for path in self.composed.rglob("*") if path.is_file()]
        extend_claim(self.state, names)
        check_replaceable(self.weights, Claim.read(self.state))
        # config.json marks a model and the record marks a complete merge, so these two are written last.
        for name in sorted(names, key=lambda name: (name == RECORD, Path(name).name == "config.json", name)):
            self.weights.write(name, (self.composed / name).read_bytes())


@contextmanager
def open_run(out: str, now: Identity, fresh: bool) -> Iterator[RunFolder]:
    """Open the folders of a merge's run, new or as an earlier start left them, and lock them during the context.

    Raises:
        OutputError: another process holds the lock, or the folder holds the state of another merge.
        InputError: an input has changed since the run began.
    """
    run = RunFolder(out)
    state = run.state
    check_state(state)
    if isinstance(state, LocalFolder):
        check_private(state.path)
    with state.locked() as run.held:
        # Again under the lock: another run may have ended, or somebody put a file there.
        check_state(state)
        if isinstance(state, LocalFolder):
            make_private(state.path)
        mark(state)
        run.restore()
        before = None
        if run.computed() and resumes(state, now, fresh):
            before = read_identity(state)
        else:
            run.start_anew(fresh)
        run.begin(now.with_digests(before.digests if before else {}))
        failed = False
        try:
            yield run
        except RunError:
            failed = True
            raise
        except CheckpointError:
            # What was computed of the models is of no use if one of them has to be changed.
            if not run.computed(of_models=False):
                run.discard()
            raise
        finally:
            # A run that failed before it had results keeps what Ray printed.
            if not run.computed() and not (failed and run.log.exists()):
                run.discard()
