"""A study's answer in words: which edit to ship, what it breaks by more than a point, and why not another one."""

from collections.abc import Mapping, Sequence

from surgery.runs.report import Table
from surgery.study.settings import Study
from surgery.study.verdict import (
    Row,
    axes,
    chosen,
    objections,
    plain_words,
    ranking,
    removed,
    removed_between,
    unbeaten,
)

POINT = 1.0
NAMED = 6  # numbers in a sentence


def broken(row: Row) -> list[str]:
    """What got worse beyond noise by more than a point, the largest first."""
    found = [place for place in row.worse() if abs(row.points(place)) > POINT]
    return sorted(found, key=lambda place: -abs(row.points(place)))


def answer(found: Sequence[Row], study: Study) -> Table:
    """A row for each model: what to ship, how much of the bias that removes, and what it breaks."""
    best = {row.model: row for row in chosen(found, study, clean=True)}
    table = []
    for untouched in (row for row in found if row.method is None):
        row = best.get(untouched.model)
        if row is None:
            table.append([untouched.model, "nothing", "", _nearest(found, untouched, study)])
        else:
            table.append([row.model, row.name, _removed(row, untouched, study), _listed(row, broken(row)) or "nothing"])
    head = ["model", "ship", "bias removed", "it breaks"]
    note = (
        "It breaks what is worse by more than a point (1 of what runs to 100, 1 % of a perplexity, a hundredth of all "
        "else) with every seed, paired row by row with the untouched model, intervals widened so that all hold at 95 %."
    )
    return Table("The answer", head, table, note, first=True)


def _nearest(found: Sequence[Row], untouched: Row, study: Study) -> str:
    """Why there is nothing to ship, and what the method breaks that removes most of the bias."""
    bias, cost = axes(study, untouched.scores)
    ranked = ranking(found, untouched, bias)
    if untouched.refused or not ranked or removed(ranked[0], untouched, bias) <= 0:
        return "could not be measured" if untouched.refused else "no method removes anything"
    spoils = _listed(ranked[0], objections(ranked[0], cost, study.tolerance))
    return f"every method spoils a cost; {ranked[0].name} ({_removed(ranked[0], untouched, study)}): {spoils}"


def recommend(found: Sequence[Row], study: Study, commands: Mapping[str, str] | None = None) -> list[str]:
    """Which edit to ship on each model, why, and what speaks against it; or that none can be recommended.

    ``commands`` are those that ship it, by model.
    """
    lines: list[str] = []
    best = {row.model: row for row in chosen(found, study, clean=True)}
    for untouched in (row for row in found if row.method is None):
        if untouched.refused:
            lines.append(f"{untouched.model}: could not be measured as it is ({untouched.refused}).")
        elif (row := best.get(untouched.model)) is None:
            lines += _none(found, untouched, study)
        else:
            lines += _shipped(found, row, untouched, study, (commands or {}).get(row.model, ""))
    made = [(row, row.method) for row in found if row.method is not None and row.method.recipe and row.cells]
    few = dict.fromkeys(row.name for row, how in made if not how.deterministic and len(row.cells) < len(study.seeds))
    fixed = dict.fromkeys(row.name for row, how in made if how.deterministic)
    if len(study.seeds) == 1:
        lines.append("Warning: one seed each; how a method varies from seed to seed is not known.")
    elif few:
        lines.append(f"Warning: fewer than {len(study.seeds)} seeds: {', '.join(few)}.")
    lines += [
        f"Warning: not every seed of {row.name} on {row.model} was measured ({row.lacks})."
        for row in found
        if row.lacks
    ]
    if len(study.seeds) > 1 and fixed:
        lines.append(f"One seed stands for all where nothing is drawn: {', '.join(fixed)}.")
    return lines


def _none(found: Sequence[Row], untouched: Row, study: Study) -> list[str]:
    bias, cost = axes(study, untouched.scores)
    lines = [f"{untouched.model}: no method can be recommended."]
    for row in ranking(found, untouched, bias)[:2]:
        against = _listed(row, objections(row, cost, study.tolerance), NAMED) or "nothing"
        lines.append(f"{row.name} removes {_removed(row, untouched, study)} of the bias; it spoils {against}.")
    return lines


def _shipped(found: Sequence[Row], best: Row, untouched: Row, study: Study, command: str) -> list[str]:
    bias, cost = axes(study, untouched.scores)
    moved = ", ".join(f"{plain_words(p)} {_values(untouched, best, p)}" for p in bias if p in best.scores)
    worse, far = best.worse(), broken(best)
    count = len(best.differences[0]) if best.differences else 0
    if worse:
        less = f"; {len(worse) - len(far)} more by less" if len(worse) > len(far) else ""
        broke = f"{_listed(best, far, NAMED) or 'nothing by more than a point'}{less}; of {count} numbers"
    else:
        broke = f"nothing: of {count} numbers none got worse beyond noise"
    on, of = unbeaten(found, best.model, bias, cost).get(best.name, (0, 0))
    lines = [
        f"{best.model}: ship {best.name}. It removes {_removed(best, untouched, study)} of the bias ({moved}).",
        f"It makes worse: {broke}.",
        *([command] if command else []),
        f"Why: it removes more than any other method that spoils none of {', '.join(plain_words(p) for p in cost)} by "
        f"more than {_points(study.tolerance)}. On {on} of {of} pairs of a bias and a cost it is on the Pareto front: "
        "no other is better on both.",
    ]
    ranked = ranking(found, untouched, bias)
    for row in ranked[: ranked.index(best)]:
        spoils = _listed(row, objections(row, cost, study.tolerance), NAMED)
        lines.append(f"{row.name} removes {100 * removed(row, untouched, bias):.0f} %, but spoils {spoils}.")
    return lines


def _removed(row: Row, untouched: Row, study: Study) -> str:
    bias, _ = axes(study, untouched.scores)
    between = removed_between(row, untouched, bias)
    interval = f" [{100 * between[0]:.0f}, {100 * between[1]:.0f}]" if between else ""
    return f"{100 * removed(row, untouched, bias):.0f} %{interval}"


def _points(count: float) -> str:
    return "a point" if count == 1 else f"{count:g} points"


def _values(before: Row, after: Row, place: str) -> str:
    was, now = (row.scores[place]["value"] for row in (before, after))
    digits = 1 if abs(was) >= 10 else 3
    return f"{was:.{digits}f} to {now:.{digits}f}"


def _listed(row: Row, places: Sequence[str], most: int = 4) -> str:
    """Such as "perplexity +3.1 %, right pronoun after things -2.0 points and 3 others"."""
    said = []
    for place in places[:most]:
        percent = row.scores[place]["direction"] == "lower" and row.scores[place]["ideal"] == 1
        unit = "%" if percent else "points"
        said.append(f"{plain_words(place)} {row.points(place):+.1f} {unit}")
    more = f" and {len(places) - most} others" if len(places) > most else ""
    return ", ".join(said) + more
