"""What a search takes, from its config and the records alone, as `plan` prints it."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.documents import Document
from engine.config.search.settings import Search
from engine.planning.plan import Plan
from engine.search.objective import Objective, read_objective
from engine.search.space import Space, check_method

# The names of keys that a line has.
NAMED = 4


def search_lines(document: Document, search: Search, plan: Plan) -> list[str]:
    """Check the search of a config, and return what it is: its space, its objective and the number of evaluations.

    Raises:
        ConfigError: The space is not valid, or the method cannot be searched.
        CalibrationError: The records cannot be read.
    """
    check_method(plan.config, str(document.path))
    space = Space.of(document, search)
    space.check()
    return list(_lines(search, space, read_objective(search, plan, document.path.absolute())))


def _lines(search: Search, space: Space, objective: Objective) -> Iterator[str]:
    names = list(space.places)
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    what = f"{len(names):,} keys: " if len(names) > 1 else ""
    yield f"search: {search.trials:,} merges by {search.algorithm}, over {what}{', '.join(names[:NAMED])}{more}"
    for part in objective.parts:
        weight = f", of weight {part.weight:g}" if part.weight != 1 else ""
        yield f"search: {part.metric} on {len(part.data.items):,} records of {part.data.name}{weight}"
    total = f"search: {search.trials:,} merges score at most {objective.total(search.trials, False):,} records"
    if search.rungs > 1:
        total += (
            f", and about {objective.total(search.trials, True):,} if a third go on after each of {search.rungs} rungs"
        )
    yield total
