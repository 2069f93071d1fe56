"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def training_order(counts: Sequence[int], epochs: int) -> list[tuple[int, int]]:
    """The order of samples, as (expert, index): round robin over the experts, a shorter list starting again until the
    longest is done; that once an epoch.
    """
    longest = max(counts)
    once = [(expert, turn % count) for turn in range(longest) for expert, count in enumerate(counts)]
    return once * epochs


def windows(order: Sequence[tuple[int, int]], size: int) -> list[Sequence[tuple[int, int]]]:
    """The order cut into windows of `size` samples, one optimiser step each; the last holds what is left."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def passes(tokens: Sequence[int], limit: int, alone: Collection[int] = ()) -> list[list[int]]:
    """Which samples of a window go through the model together, by their places in it; `tokens` are theirs.

    Those in `alone` have images, which each family lays out in its own way, so none shares a pass with another sample.

    As many as have, filled up to the longest of them, no more tokens than `limit`, or than the window's longest sample
    where that has more. The longest come first, so that little is filled up.
    """
    others = [place for place in range(len(tokens)) if place not in alone]
    limit = max([limit, *(tokens[place] for place in others)])
    together: list[list[int]] = []
    for place in sorted(others, key=lambda place: -tokens[place]):
        if together and tokens[together[-1][0]] * (len(together[-1]) + 1) <= limit:
            together[-1].append(place)
        else:
            together.append([place])
    return [[place] for place in sorted(alone)] + together
