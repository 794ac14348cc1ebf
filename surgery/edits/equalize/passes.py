"""Which examples of a step go through the model together: texts of like length, and prompts apart from sentences."""

from collections.abc import Sequence

from surgery.edits.equalize.terms import Term

LONGER = {"cpu": 1.5}
"""The longest sequence of a pass is at most so many times as long as its shortest example's longest; elsewhere 4."""
PASS = {"cpu": 250}
"""What a pass costs beside its tokens, in tokens (measured on two cores, six blocks of SmolLM2-135M): on a processor
the weights are read once more, while tokens of padding cost as much as others. Elsewhere padding costs next to nothing.
"""

Example = tuple[int, int]  # term, its example


def passes(terms: Sequence[Term], chosen: Sequence[Example], device: str) -> list[dict[int, Example]]:
    """The examples by place in ``chosen``, those read at their last token only before the others, of like length."""
    last: dict[int, int] = {}
    whole: dict[int, int] = {}
    for place, (term, example) in enumerate(chosen):
        one = terms[term]
        rows = range(example * one.size, (example + 1) * one.size)
        only_last = all(one.places[row] == (len(one.ids[row]) - 1,) for row in rows)
        (last if only_last else whole)[place] = max(len(one.ids[row]) for row in rows)
    groups: list[list[int]] = cheapest(last, PASS[device]) if device in PASS else [list(last)]
    shortest, longer = 0, LONGER.get(device, 4.0)
    for place in sorted(whole, key=lambda place: whole[place]):
        if not shortest or whole[place] > longer * shortest:
            groups.append([])
            shortest = whole[place]
        groups[-1].append(place)
    return [{place: chosen[place] for place in group} for group in groups if group]


def cheapest(lengths: dict[int, int], extra: int) -> list[list[int]]:
    """The keys of ``lengths`` in groups by length, so that padded tokens and ``extra`` for each group are fewest.

    >>> cheapest({0: 5, 1: 20, 2: 5}, 9), cheapest({0: 5, 1: 20, 2: 5}, 90)
    ([[0, 2], [1]], [[0, 2, 1]])
    """
    order = sorted(lengths, key=lambda place: lengths[place])
    best: list[tuple[int, int]] = [(0, 0)]  # of the shortest 0, 1, 2, ...: the cost, and where the last group begins
    for end, place in enumerate(order, start=1):
        best.append(min((best[start][0] + (end - start) * lengths[place] + extra, start) for start in range(end)))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.insert(0, order[best[end][1] : end])
        end = best[end][1]
    return groups
