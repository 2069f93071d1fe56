"""The command `search`: trials by Ray Tune on all nodes, their record, and the merge of the best.

Ray Tune places, starts and restarts the processes of trials, each of which keeps its loaded model from one trial to the
next. What is proposed, stopped and recorded is decided in the driver, by `engine.search`. A record is written when a
trial ends, so that after any loss the same command goes on with the trials that have ended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import yaml

from cluster.progress import Progress
from cluster.search_run import Prepared, SearchRun
from engine.config.documents import Document
from engine.errors import ConfigError, OutputError, RunError
from engine.evaluation.subject import Options, Reader, Subject
from engine.output.resolved_config import resolved_config
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.run.identity import Identity, decode
from engine.run.inputs import identity
from engine.run.place import check_apart
from engine.run.preparation import settle
from engine.run.run_folder import check_output
from engine.search.objective import model_name, read_objective
from engine.search.record import as_rows, best_of, discard, write_table
from engine.search.space import Space, check_method
from engine.storage.folder import LOCK, Folder
from engine.storage.paths import open_folder
from engine.untrusted import listed

# The files of a search beside those of `engine.search.record`, and the folder of the merge.
IDENTITY, BEST, MERGED = "search.json", "best.yaml", "merged"
# The keys of `search` that may change between two starts: they decide how much is done, and where.
FREE = {"trials", "parallel"}


def prepare(document: Document) -> Prepared:
    """Check all that can be checked before a process starts: the space, the models and the records.

    Raises:
        InputError: The config declares no search, the space or a config in it is not valid, or a model or a record is.
    """
    path = document.path.absolute()
    given = document.config({})
    search = given.search
    if search is None:
        do = "add `search: {space: …, trials: …}`; see docs/search.md"
        raise ConfigError("the config has no `search`", str(document.path), do=do)
    check_method(given, str(document.path))
    space = Space.of(document, search)
    space.check()
    plan = make_plan(given, path.parent)
    objective = read_objective(search, plan, path)
    longest, code = plan.config.calibration.max_length, plan.config.trust_remote_code
    options = Options(search.batch_size, search.max_new_tokens, longest, remote_code=code)
    subject = Subject(model_name(plan.experts[0], plan), options)
    for part in objective.parts:
        with Reader(subject, part.data) as reader:
            for item in part.data.items:
                reader.check(item)
    return Prepared(search, space, plan, objective, options)


def search(
    document: Document,
    out: str,
    address: str | None = None,
    fresh: bool = False,
    debug: bool = False,
    print_table: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> None:
    """Search for the best merge that a config declares, and write it into `out`.

    Args:
        document: The config.
        out: The output folder, an absolute path or a URI: the table of trials, the config of the best, and its merge.
        address: The address of a running Ray cluster; None uses RAY_ADDRESS or starts Ray on this machine.
        fresh: Discard the trials of an earlier start.
        debug: Show the processes' own output.
        print_table: Prints the rows of the table of trials.

    Raises:
        InputError: The config, a model, a record or the output is wrong.
        ClusterError: The cluster cannot be reached or lacks resources.
        RunError: The search failed; its trials are kept.
    """
    with Progress() as progress:
        progress.wait("checking models and data")
        prepared = prepare(document)
        check_apart(prepared.plan, out, document.path.absolute())
        folder = open_folder(out)
        _check_own(folder)
        with folder.locked():
            _open(folder, prepared, fresh)
            run = SearchRun(prepared, folder, progress)
            progress.phase("searching", run.wanted, min(run.wanted, len(run.trials)))
            if len(run.trials) < run.wanted:
                _run(run, address, debug)
            trials = sorted(run.trials, key=lambda trial: trial.number)
            rows = as_rows(trials, list(prepared.space.places))
            write_table(folder, rows)
            best = best_of(trials)
            if best is None:
                first = next((trial.why for trial in trials if trial.why), "")
                raise RunError(f"no trial could be scored: {first}", out, do="change the space, and run with --fresh")
            plan = prepared.trial_plan(best.values)
            text = yaml.safe_dump(resolved_config(plan), sort_keys=False, allow_unicode=True)
            folder.write(BEST, text.encode())
    print_table(rows)
    from cluster.driver import merge

    # What `merge best.yaml` does. The merge of an earlier best is replaced.
    merged = f"{out}/{MERGED}"
    merge(plan, merged, address, not _is_of(merged, plan), debug)


def _is_of(merged: str, plan: Plan) -> bool:
    """Return whether a folder holds the merge of a plan, or nothing."""
    try:
        check_output(merged, settle(plan)[2], fresh=False)
    except OutputError:
        return False
    return True


def _run(run: SearchRun, address: str | None, debug: bool) -> None:
    from cluster.search_trials import run_trials
    from cluster.session import connect

    run.progress.wait("starting Ray")
    with connect(address, debug, None, run.progress.say):
        run.progress.wait("working")
        run_trials(run, debug)
    if run.error is not None:
        raise run.error


def _check_own(folder: Folder) -> None:
    """Check that a folder holds a search, or nothing.

    Raises:
        OutputError: It holds something else.
    """
    strange = set() if folder.exists(IDENTITY) else folder.entries() - {LOCK}
    if strange:
        what = f"the folder exists and holds no search: {listed(sorted(strange), ', ')}"
        raise OutputError(what, folder.where, do="give another --out")


def _open(folder: Folder, prepared: Prepared, fresh: bool) -> None:
    """Begin a search in a folder, or go on with it.

    Raises:
        OutputError: The folder holds another search.
    """
    now = _identity(prepared)
    if folder.exists(IDENTITY):
        before = decode(folder.read(IDENTITY), f"{folder.where}/{IDENTITY}")
        differences = before.differences(now)
        if differences and not fresh:
            raise OutputError(
                f"the folder holds another search: {listed(differences, '; ')}",
                folder.where,
                do="give another --out, or run with --fresh to discard it",
            )
        if fresh:
            discard(folder)
            folder.remove(BEST)
    folder.write(IDENTITY, now.encode())


def _identity(prepared: Prepared) -> Identity:
    """Return what decides the trials: the config, the search, and the input files with the records."""
    base, section = identity(prepared.plan), prepared.search.model_dump(mode="json", exclude=FREE)
    options = {f"search.{key}": json.dumps(value, sort_keys=True) for key, value in section.items()}
    records = {
        f"records of {part.name}": json.dumps([whole.fields for item in part.data.items for whole in item.wholes])
        for part in prepared.objective.parts
    }
    hashes = {name: _sha256(text) for name, text in records.items()}
    return replace(base, options={**base.options, **options, **hashes})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
