"""The merges of one file on a cluster, one after the other, each into a folder from which the next ones read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import yaml

from cluster.driver import merge
from engine.config.documents import Document
from engine.config.reader import parse_recorded
from engine.errors import InputError, OutputError
from engine.output.outline import outlined, places_of
from engine.planning.plan import MergedDocument, Plan
from engine.planning.planner import make_plan
from engine.run.contents import changed_in, names_of, read_bounded, strangers
from engine.run.identity import Identity, decode
from engine.run.ownership import RECORD, RECORDED_IDENTITY, EarlierMerge, check_state, read_identity, resumes
from engine.run.place import check_apart, check_place
from engine.run.preparation import settle
from engine.run.run_folder import RunFolder, check_output
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.paths import is_uri, open_folder
from engine.untrusted import listed, parse_json

IDENTITIES = "merge/documents.json"
Say = Callable[[str], None]


def merge_documents(
    documents: Sequence[Document],
    out: str,
    kept: str | None,
    say: Say,
    address: str | None = None,
    fresh: bool = False,
    debug: bool = False,
) -> bool:
    """Make the merges of a file, the last into `out`; see `cluster.driver.merge`, which makes each.

    All are planned before the first is made. A merge that is complete is not made again, so the same command resumes.

    Args:
        documents: The merges, each after those that it uses.
        out: The output folder, an absolute path or a URI.
        kept: The folder or URI of the other outputs, which are kept there. None: they are written beside `out`, and
            removed when `out` is complete.
        say: Called with lines for the user.
        address, fresh, debug: See `cluster.driver.merge`.

    Returns:
        False if `out` already holds this merge, else True.
    """
    config = documents[0].path.absolute()
    places = places_of(documents, out, kept)
    for place in (*places.values(), out):
        check_place(place)
    if _is_made(documents, config, places, out, fresh) and kept is None:
        _remove(places.values(), say)
        return False
    made: dict[str, MergedDocument] = {}
    merged = False
    for number, document in enumerate(documents, 1):
        place = out if document.name is None else places[document.name]
        plan = make_plan(document.config(places), config.parent)
        check_apart(plan, place, config)
        plan = replace(plan, documents=_below(document, documents, made))
        say(f"{document.label} ({number} of {len(documents)})")
        # With `fresh`, a start that was cut off goes on: what it has made is not made again.
        again = fresh and (document.name is None or not _holds(place, plan))
        merged = merge(plan, place, address, again, debug)
        if document.name is not None:
            made[document.name] = _made(document.name, place)
    if kept is None:
        _remove(places.values(), say)
    return merged


def _below(
    document: Document, documents: Sequence[Document], made: Mapping[str, MergedDocument]
) -> tuple[MergedDocument, ...]:
    """Return the merges on which a merge builds, in the order in which they were made."""
    uses = {one.name: one.uses for one in documents}
    needed, waiting = set[str](), set(document.uses)
    while waiting:
        needed |= waiting
        waiting = {name for user in waiting for name in uses[user]} - needed
    return tuple(one for name, one in made.items() if name in needed)


def _made(name: str, place: str) -> MergedDocument:
    """Return the record of a merge that is complete."""
    folder = open_folder(place)
    config = parse_recorded(folder.read(RECORD).decode(), f"{place}/{RECORD}")
    text = yaml.safe_dump({"name": name, **config}, sort_keys=False, allow_unicode=True)
    return MergedDocument(name, place, text, folder.read(RECORDED_IDENTITY).decode())


def _holds(place: str, plan: Plan) -> bool:
    try:
        return check_output(place, settle(plan)[2], fresh=False)
    except OutputError:
        return False


def _is_made(documents: Sequence[Document], config: Path, places: Mapping[str, str], out: str, fresh: bool) -> bool:
    """Plan all merges, and return whether `out` holds the last one, made from the others as they are described now.

    The outputs of the others need not be there any more.

    Raises:
        MergeError: A merge cannot be made, or `out` or the state of its run is of another merge and not `fresh`.
    """
    now: dict[str | None, Identity] = {}
    with outlined(documents, config.parent) as outlines:
        folders = {outlines.folders[name]: place for name, place in places.items()}
        for document, plan in zip(documents, outlines.plans, strict=True):
            check_apart(plan, out if document.name is None else places[document.name], config)
            now[document.name] = _from_outside(settle(plan)[2], folders)
    folder, state = open_folder(out), RunFolder(out).state
    check_state(state)
    merge = EarlierMerge.read(folder)
    differences = _differences(documents, _recorded(folder), now, list(places.values()))
    if merge is not None and merge.identity is not None and not fresh and differences:
        what = f"the output folder is in use: it holds another merge: {listed(differences, '; ')}"
        raise OutputError(what, out, do="give another --out, or --fresh to replace it")
    # The files of the outputs of other merges, as they were.
    before = merge.identity if merge is not None else read_identity(state)
    seen = {name: file for name, file in before.files.items() if _inside(name, places.values())} if before else {}
    last = replace(now[None], files={**now[None].files, **seen})
    done = check_output(out, last, fresh)
    if not done and merge is None:
        resumes(state, last, fresh)
    return done


def _differences(
    documents: Sequence[Document],
    before: Mapping[str, Identity],
    now: Mapping[str | None, Identity],
    places: Sequence[str],
) -> list[str]:
    """Return how the merges on which the last one builds differ from those that its output recorded, in words."""
    nothing, same = Identity({}, {}, {}), {place: place for place in places}
    return [
        f"{name}: {difference}"
        for name in (document.name for document in documents)
        if name is not None and any(name in document.uses for document in documents)
        for difference in _from_outside(before.get(name, nothing), same).differences(now[name])
    ]


def _from_outside(identity: Identity, folders: Mapping[str, str]) -> Identity:
    """Return an identity without the files of other merges' outputs, which are in `folders`.

    The options name the folder to which `folders` maps each.
    """
    options = dict(identity.options)
    for folder, place in folders.items():
        old, new = json.dumps(folder)[1:-1], json.dumps(place)[1:-1]
        options = {key: value.replace(old, new) for key, value in options.items()}
    files = {name: file for name, file in identity.files.items() if not _inside(name, folders)}
    return Identity(options, identity.versions, files)


def _inside(file: str, folders: Iterable[str]) -> bool:
    return file.startswith(tuple(f"{place.partition('?')[0] if is_uri(place) else place}/" for place in folders))


def _recorded(folder: Folder) -> dict[str, Identity]:
    """Return the identities of the other merges that an output recorded; none if it recorded none, or damaged ones."""
    data = read_bounded(folder, IDENTITIES)
    try:
        raw = parse_json(data.decode(), IDENTITIES, InputError) if data is not None else {}
        return {str(name): decode(text.encode(), IDENTITIES) for name, text in raw.items()}
    except (InputError, ValueError, AttributeError):
        return {}


def _remove(places: Iterable[str], say: Say) -> None:
    """Remove complete merges, the record of each last, so that a removal that is cut off goes on with the next start.

    A merge beside which there is anything else, or of which a file was changed, stays.
    """
    for place in places:
        folder = open_folder(place)
        merge = EarlierMerge.read(folder)
        if merge is None:
            continue
        if isinstance(folder, LocalFolder) and folder.path.is_symlink():
            continue
        if others := [*strangers(folder, merge.files), *changed_in(folder, merge.written)]:
            say(f"{place}: not removed, because it holds more than the merge: {names_of(others)}")
            continue
        for name in sorted(merge.files & folder.entries(), key=lambda name: (name == RECORD, name)):
            folder.remove(name)
        if isinstance(folder, LocalFolder):
            inner = sorted((path for path in folder.path.rglob("*") if path.is_dir()), reverse=True)
            with suppress(OSError):  # somebody has put a file there, or this is not the last merge
                for path in (*inner, folder.path, folder.path.parent):
                    path.rmdir()
