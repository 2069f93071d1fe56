"""Scores of a merge, kept in its output: merge/evaluation.parquet, which the report shows, and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.checkpoints.find import CARD, check_inside
from engine.errors import ConfigError, InputError, OutputError
from engine.evaluation.items import unique
from engine.evaluation.results import Row, check_replaceable, save_results
from engine.evaluation.tables import SCORES as SHARES
from engine.evaluation.tables import tables_of
from engine.output.names import markdown, public_name
from engine.run.contents import is_as_written, read_bounded, read_manifest
from engine.run.ownership import RECORD, SCORES
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.paths import is_uri, locate, open_folder
from engine.storage.scores import with_scores


def outputs_among(models: Sequence[str]) -> list[Folder]:
    """Return the folders of the models that are outputs of merges.

    Raises:
        ConfigError: none is.
        OutputError: an output has something else in the place of its scores.
    """
    places = [model if is_uri(model) else str(locate(model, Path.cwd(), OutputError)) for model in models]
    folders = [folder for folder in map(open_folder, places) if _is_output(folder)]
    if not folders:
        raise ConfigError("no MODEL is the output folder of a merge", "--record", f"a folder that contains {RECORD}")
    for folder in folders:
        check_replaceable(folder, SCORES)
    return folders


def record_scores(rows: Sequence[Row], folder: Folder) -> bool:
    """Write scores into the output of a merge.

    Returns:
        Whether the card shows them: a card that was changed since the merge stays as it is.
    """
    save_results(rows, folder, SCORES)
    written = read_manifest(folder).get(CARD)
    if written is None or not is_as_written(folder, CARD, written):
        return False
    card = read_bounded(folder, CARD)
    assert card is not None
    folder.write(CARD, with_scores(card.decode(), scores_text(rows)).encode())
    return True


def scores_text(rows: Sequence[Row]) -> str:
    """Return scores as a section of a model card: a table per metric, of shares alone if there are any."""
    names = list(dict.fromkeys(name for row in rows for name in (row.model, row.expert) if name is not None))
    public = dict(zip(names, unique(list(map(public_name, names))), strict=True))
    shown = [replace(row, model=public[row.model], expert=public[row.expert] if row.expert else None) for row in rows]
    tables = tables_of(shown)
    tables = [table for table in tables if table.metric.partition(",")[0] in SHARES] or tables
    parts = ["## Scores", "Measured by `evaluate` of expert-merging, which its documentation defines."]
    for table in tables:
        head = ["<br>".join(map(markdown, cell.split("\n"))) for cell in table.head()]
        lines = [[markdown(cell) for cell in line] for line in table.lines()]
        ruled = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in ruled))
    return "\n\n".join(parts)


def _is_output(folder: Folder) -> bool:
    """Return whether a folder has the record of a merge, and no link leads out of it."""
    if isinstance(folder, LocalFolder):
        try:
            check_inside(folder.path / RECORD, folder.path)
            check_inside(folder.path / SCORES, folder.path)
        except InputError:
            return False
    return folder.exists(RECORD)
