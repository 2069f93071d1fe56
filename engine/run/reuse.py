"""What merges have computed and another one needs again: brought from a cache into a run's state, and kept there.

A file that was brought is like one that an earlier start of the run computed, so the run goes on from it. Without its
cache, or when that fails, a merge computes everything itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from engine.calibration.records import Record, Records
from engine.calibration.samples import Sample
from engine.config.schema import Config
from engine.errors import DamagedError, InputError, MergeError, StorageError
from engine.planning.factors import decomposed
from engine.planning.plan import Plan
from engine.run.identity import Identity
from engine.run.kept_state import MAGNITUDES, PRIOR, READERS, REUSED, KeptState, rows_file, stage_file
from engine.run.keys import Computing, Keys, digest_key
from engine.run.state import StageState, decode_samples_of, encode_samples, encode_stage
from engine.shards.orthogonal import FOLDER, file_name
from engine.shards.parts import record_file, tensor_groups
from engine.statistics.files import HEADER, read_header
from engine.storage.content_cache import OFF, ContentCache, default_place
from engine.storage.sealed import digest_name, keep_digest, read_sealed, seal, write_sealed

# Into a cache that its config does not name, a merge copies at most this part of the size of the cache where files
# cannot be linked: no one asked for a second copy of many gigabytes.
COPIED = 10
# What is said about reused files, by the kind of cache entries. Others come along with these.
ABOUT = {
    "samples": "prepared samples",
    "targets": "targets",
    "statistics": "models' statistics",
    "surveys": "surveyed groups of tensors",
    "factors": "matrices of task vectors",
    "priors": "priors",
    "metrics": "optimiser steps",
}


def open_cache(config: Config, say: Callable[[str], None]) -> ContentCache | None:
    """Return the cache of a merge, or None with `cache: off`. One that the config does not name may fail.

    Raises:
        ConfigError: The config names a folder that holds something else.
        StorageError: It names one that cannot be created or read.
    """
    try:
        where, copies = config.cache or default_place(), config.cache_size // (1 if config.cache else COPIED)
        return None if where == OFF else ContentCache(where, config.cache_size, copies)
    except (InputError, StorageError) as error:
        if config.cache is not None:
            raise
        say(f"without a cache of earlier merges: {error}")
        return None


class Reuse:
    """The files that a run shares with other merges through a cache; None: through none.

    A failure of the cache is said once, and ends its use.
    """

    def __init__(self, kept: KeptState, cache: ContentCache | None = None) -> None:
        self._kept, self._cache = kept, cache

    @property
    def on(self) -> bool:
        """Whether there is a cache."""
        return self._cache is not None

    @property
    def counts(self) -> dict[str, int]:
        """How much was reused in the life of the run, by ABOUT."""
        reused = self._kept.reused()
        return {about: len(reused[kind]) for kind, about in ABOUT.items() if reused.get(kind)}

    def digests(self, identity: Identity) -> dict[str, str]:
        """Return the SHA-256 of weight files that a merge hashed as they are now, by name."""
        found: dict[str, str] = {}
        for name, file in identity.files.items() if self._cache else ():
            if file.sha256 is None:
                with self._sparing() as cache:
                    content = cache.read("digests", digest_key(name, file)) if cache else None
                    found |= {name: content.decode()} if content is not None and len(content) == 64 else {}
        return found

    def keep_digests(self, identity: Identity, weights: Sequence[str]) -> None:
        """Keep the SHA-256 of weight files, which must be those of the files as the identity describes them."""
        for name in weights if self._cache else ():
            file = identity.files.get(name)
            if file is not None and file.sha256 is not None:
                with self._sparing() as cache:
                    if cache is not None:
                        cache.write("digests", digest_key(name, file), file.sha256.encode())

    def samples(self, keys: Keys, records: Records) -> list[list[Sample] | None]:
        """Return the prepared samples of each expert, None where they are not kept; bring their pixel inputs."""
        return [self._samples_of(keys, k, mine) for k, mine in enumerate(records)]

    def bring(self, keys: Keys, samples: Sequence[Sequence[Sample]], computing: Computing) -> None:
        """Bring targets, task vectors with their magnitudes, and surveys, as far as the state lacks them."""
        if self._cache is None:
            return
        self._bring("targets", self._targets(keys, samples, computing))
        files = self._task_vectors(keys, computing)
        for name, sha256 in self._bring("factors", files).items():
            keep_digest(self._kept.state, name, sha256)
        stored = self._kept.state.names(FOLDER) if files else set()
        if files.keys() <= stored:
            self._bring("magnitudes", {MAGNITUDES: keys.magnitudes(computing)})
        if not self._kept.state.exists(MAGNITUDES):
            self._bring("surveys", _surveys(keys, computing))

    def keep(self, keys: Keys, samples: Sequence[Sequence[Sample]], computing: Computing) -> None:
        """Keep samples, and what `bring` brings, as far as the run has computed it. Its inputs must be unchanged."""
        if self._cache is None:
            return
        for k, of_expert in enumerate(samples):
            self._keep_samples(keys, k, of_expert)
        self._keep("targets", self._targets(keys, samples, computing))
        task_vectors = self._task_vectors(keys, computing)
        for name, key in task_vectors.items():
            try:
                sha256 = read_sealed(self._kept.state, digest_name(name)).decode()
            except (FileNotFoundError, DamagedError):
                continue
            self._keep("factors", {name: key}, sha256)
        self._keep("magnitudes", {MAGNITUDES: keys.magnitudes(computing)})
        self._keep("surveys", _surveys(keys, computing))

    def bring_statistics(self, folder: str, key: str | None) -> None:
        """Bring the statistics of a model into this folder of the state, if all of their files are kept."""
        header = f"{folder}/{HEADER}"
        if key is None or not self._bring("statistics", {header: key}):
            return
        files = read_header(self._kept.state.child(folder)).files
        wanted = {f"{folder}/{name}": sha256 for name, sha256 in files.items()}
        self._bring("moments", wanted)
        if not wanted.keys() <= self._kept.state.names(folder):
            self._kept.state.remove(header)

    def keep_statistics(self, folder: str, key: str | None) -> None:
        """Keep the statistics of a model that this folder of the state holds. Each file's key is its SHA-256."""
        if self._cache is None or key is None:
            return
        for name, sha256 in read_header(self._kept.state.child(folder)).files.items():
            self._keep("moments", {f"{folder}/{name}": sha256})
        self._keep("statistics", {f"{folder}/{HEADER}": key})

    def bring_prior(self, key: str | None) -> None:
        """Bring the losses of the candidates for the prior."""
        self._bring("priors", {PRIOR: key})

    def keep_prior(self, key: str | None) -> None:
        """Keep the losses of all candidates for the prior."""
        self._keep("priors", {PRIOR: key})

    def bring_steps(self, stage: int, keys: Sequence[str]) -> None:
        """Bring the state of a stage after the most steps, with the metrics of all of them, if the run has none.

        `keys`: those of the states after each step.
        """
        cache, name = self._cache, stage_file(stage)
        if cache is None or self._kept.state.exists(name):
            return
        for steps in range(len(keys), 0, -1):
            if self._cache is None:
                return
            # Looked up in memory, but for the first time.
            with self._sparing():
                there = cache.has("steps", keys[steps - 1]) and all(cache.has("metrics", key) for key in keys[:steps])
                if not there:
                    continue
                rows = {rows_file(stage, step + 1): key for step, key in enumerate(keys[:steps])}
                self._bring("metrics", rows)
                if rows.keys() <= self._kept.state.names("metrics") and self._bring("steps", {name: keys[steps - 1]}):
                    return

    def keep_steps(self, stage: int, keys: Sequence[str], states: Mapping[int, StageState]) -> None:
        """Keep these states of a stage, by the number of steps before them, with the metrics of all steps."""
        if not keys or not states:
            return
        self._keep("metrics", {rows_file(stage, step + 1): key for step, key in enumerate(keys)})
        for steps, state in states.items():
            with self._sparing() as cache:
                if cache is not None:
                    cache.write("steps", keys[steps - 1], seal(encode_stage(state)))

    def trim(self) -> None:
        """Bring the cache within its limits."""
        with self._sparing() as cache:
            if cache is not None:
                cache.trim()

    def said(self) -> str:
        """Return what was reused in a line; empty if nothing was."""
        counts = ", ".join(f"{count} {about}" for about, count in self.counts.items())
        where = self._cache.where if self._cache is not None else "the cache"
        return f"reused from {where}: {counts}" if counts else ""

    def _samples_of(self, keys: Keys, k: int, records: Sequence[Record]) -> list[Sample] | None:
        key, content = keys.samples(k), None
        with self._sparing() as cache:
            content = cache.read("samples", key) if cache is not None and key is not None else None
        if content is None:
            return None
        try:
            found = decode_samples_of(content, keys.plan, k, f"samples/{key}")
        except DamagedError:
            return None
        inputs = {self._kept.inputs(sample): keys.inputs(k, sample.index) for sample in found if sample.inputs}
        self._bring("inputs", inputs)
        if len(found) != len(records) or not inputs.keys() <= self._kept.state.names("inputs"):
            return None
        self._note("samples", [f"{k}-{sample.index}" for sample in found])
        given = zip(found, records, strict=True)
        return [replace(sample, where=one.where, loss_weight=one.loss_weight) for sample, one in given]

    def _keep_samples(self, keys: Keys, k: int, samples: Sequence[Sample]) -> None:
        plain = [replace(sample, expert=0, where="", loss_weight=1.0) for sample in samples]
        with self._sparing() as cache:
            if cache is not None and (key := keys.samples(k)) is not None:
                cache.write("samples", key, encode_samples([plain]))
        inputs = [sample for sample in samples if sample.inputs]
        self._keep("inputs", {self._kept.inputs(sample): keys.inputs(k, sample.index) for sample in inputs})

    def _targets(self, keys: Keys, samples: Sequence[Sequence[Sample]], computing: Computing) -> dict[str, str | None]:
        wanted = samples if keys.plan.config.has_targets else []
        return {self._kept.target(one): keys.target(one, computing) for of_expert in wanted for one in of_expert}

    def _task_vectors(self, keys: Keys, computing: Computing) -> dict[str, str | None]:
        return {file_name(name): key for name, key in keys.task_vectors(computing).items()}

    def _bring(self, kind: str, wanted: Mapping[str, str | None]) -> dict[str, str]:
        """Bring the files that the state lacks, and return the SHA-256 of those that were there, by name."""
        brought: dict[str, str] = {}
        if self._cache is None or not any(wanted.values()):
            return brought
        there, state = self._kept.state.names(), self._kept.state
        missing = [(name, key) for name, key in wanted.items() if key is not None and name not in there]
        with self._sparing() as cache, ThreadPoolExecutor(READERS) as threads:
            assert cache is not None
            missing = [(name, key) for name, key in missing if cache.has(kind, key)]
            taken = threads.map(lambda pair: cache.take(kind, pair[1], state, pair[0]), missing)
            for (name, _), sha256 in zip(missing, taken, strict=True):
                brought |= {name: sha256} if sha256 is not None else {}
        self._note(kind, list(brought))
        return brought

    def _keep(self, kind: str, have: Mapping[str, str | None], sha256: str | None = None) -> None:
        for name, key in have.items():
            with self._sparing() as cache:
                if cache is not None and key is not None:
                    cache.give(kind, key, self._kept.state, name, sha256)

    def _note(self, kind: str, names: list[str]) -> None:
        """Store which files of the state the run has not computed itself."""
        if names:
            reused = self._kept.reused()
            reused[kind] = sorted({*reused.get(kind, []), *names})
            write_sealed(self._kept.state, REUSED, json.dumps(reused).encode())

    @contextmanager
    def _sparing(self) -> Iterator[ContentCache | None]:
        """Yield the cache, and go on without it if it fails in the context."""
        cache = self._cache
        try:
            yield cache
        except (StorageError, InputError, OSError) as error:
            if cache is None:
                raise
            self._cache = None
            cause = f"{error.where}: {error.what}" if isinstance(error, MergeError) else str(error)
            self._kept.say(f"the cache is not used any more, which changes no result: {cause}")


def _surveys(keys: Keys, computing: Computing) -> dict[str, str | None]:
    """Return the keys of the records of surveys by file; none if surveys decompose matrices.

    Then the records are of use only with the parts of the matrices, which take as much space as the task vectors.
    """
    plan: Plan = keys.plan
    if decomposed(plan):
        return {}
    groups = list(enumerate(tensor_groups(plan)))
    return {
        record_file(k, number): keys.survey(k, names, computing)
        for k in range(len(plan.experts))
        for number, names in groups
    }
