"""Plans of all merges of one file before any is made: the outlines of outputs stand in for the outputs themselves.

An outline is a model folder with the names, shapes, dtypes, config and tokenizer of an output. Its weights are zeros
that take no space on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.checkpoints.find import ROOT, find_model
from engine.checkpoints.writer import header_of
from engine.config.documents import Document
from engine.errors import ConfigError, MergeError
from engine.methods.registry import get_method
from engine.output.model_folder import output_files, write_companions
from engine.planning.open_models import base_folder
from engine.planning.plan import MergedDocument, Plan
from engine.planning.planner import make_plan
from engine.run.place import beside
from engine.shards.settings import check_settings
from engine.storage.address import Address
from engine.storage.paths import is_uri


@dataclass(frozen=True)
class Outlines:
    """The plans of a file's merges, in order, and the folders of the outlines by name of the merge."""

    plans: list[Plan]
    folders: Mapping[str, str]


@contextmanager
def outlined(documents: Sequence[Document], config_folder: Path) -> Iterator[Outlines]:
    """Plan all merges of a file, and keep the outlines of the outputs that others use during the context.

    Raises:
        MergeError: A merge cannot be made. The error names it.
    """
    used = {name for document in documents for name in document.uses}
    with TemporaryDirectory(prefix="expert-merging-") as temporary:
        folders = {document.name: f"{temporary}/{document.name}" for document in documents if document.name}
        plans = []
        for document in documents:
            try:
                plan = make_plan(document.config(folders), config_folder)
                if not plan.config.learned:
                    check_settings(plan)
                if document.name in used:
                    _check_is_model(plan, document)
                    write_outline(plan, Path(folders[str(document.name)]))
            except MergeError as error:
                raise _of_document(error, document, temporary) from error
            used_here = (MergedDocument(name, folders[name], "", "") for name in sorted(document.uses))
            plans.append(replace(plan, documents=tuple(used_here)))
        yield Outlines(plans, folders)


def places_of(documents: Sequence[Document], out: str, kept: str | None) -> dict[str, str]:
    """Return the folder or URI of each output but the last, by name.

    Raises:
        ConfigError: An output that no other merge uses would only be removed.
    """
    names = [document.name for document in documents if document.name is not None]
    lost = [name for name in names if kept is None and not any(name in document.uses for document in documents)]
    if lost:
        raise ConfigError(
            f"no other document uses the merge {lost[0]!r}",
            str(documents[0].path),
            do="keep it with `--intermediate-dir FOLDER`, or remove it",
        )
    folder = kept or beside(out, ".documents")
    return {name: str(Address.of(folder) / name) if is_uri(folder) else f"{folder}/{name}" for name in names}


def write_outline(plan: Plan, folder: Path) -> None:
    """Write the outline of a plan's output into a new folder."""
    folder.mkdir()
    files = output_files(plan)
    for file in files:
        header = header_of(file)
        with open(folder / file.name, "wb") as out:
            out.write(header)
            out.truncate(len(header) + sum(tensor.nbytes for tensor in file.tensors))
    tokenizer = find_model(plan.tokenizer, ROOT) if plan.tokenizer else None
    write_companions(folder, plan, base_folder(plan), files, tokenizer)


def _check_is_model(plan: Plan, document: Document) -> None:
    method = plan.config.merge_method
    if not plan.config.learned and get_method(method).outputs == "experts":
        raise ConfigError(
            f"{method} writes one model per expert, so that no other document can use its output",
            str(document.path),
            do="use another method in this document",
        )


def _of_document(error: MergeError, document: Document, temporary: str) -> MergeError:
    """Return an error that names the merge, and the outputs of others by their names."""
    where = f"{document.label}: {error.where}" if error.where else document.label
    parts = (error.what, where, error.expected, error.do)
    return type(error)(*(part.replace(f"{temporary}/", "") for part in parts))
