"""What a reader can look at himself: every subject before and after, the likeliest next words, how texts go on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery.data.genbias import Prompt
from surgery.data.prompts import PromptSet
from surgery.runs.report import Table

Summary = Mapping[str, Any]
ASKED = ("he", "she", "they")
"""Words whose P stands beside the likeliest ones, with the compared words."""


def cases(prompts: Sequence[Prompt], before: Any, after: Any) -> list[dict[str, Any]]:
    """Every subject of ``prompts``, the widest gap before first: mean P(word) over its prompts before and after.

    ``before`` and ``after`` are P(word) by prompt, or None where that was not measured: then there are no cases.
    """
    if before is None or after is None:
        return []
    subjects = np.array([prompt.profession for prompt in prompts])
    rows = []
    for subject in dict.fromkeys(subjects.tolist()):
        chosen = subjects == subject
        was, now = np.array(before)[chosen], np.array(after)[chosen]
        rows.append(
            {
                "profession": subject,
                "gap": float((was.max(1) - was.min(1)).mean()),
                "before": was.mean(0).tolist(),
                "after": now.mean(0).tolist(),
                "prompts": int(chosen.sum()),
            }
        )
    return sorted(rows, key=lambda row: -row["gap"])


def texts_to_show(prompts: Sequence[Prompt], before: Any, hints: Sequence[str], settled: Sequence[str]) -> list[str]:
    """Prompts of the three subjects with the widest gap before, a hint prompt, and one that nothing should move."""
    found = []
    for row in cases(prompts, before, before)[:3]:
        own = [number for number, prompt in enumerate(prompts) if prompt.profession == row["profession"]]
        spread = [max(before[number]) - min(before[number]) for number in own]
        found.append(prompts[own[int(np.argmax(spread))]].text)
    return [*found, *hints[:1], *settled[:1]]


def words_to_show(prompts: PromptSet) -> tuple[str, ...]:
    """The compared words, and he, she and they where these are among them."""
    compared = prompts.words.words
    return tuple(dict.fromkeys([*compared, *(ASKED if set(compared) & set(ASKED) else ())]))


def tables(summary: Summary) -> list[Table]:
    """The sections on all this, of ``run.json``; those of which it has nothing are left out."""
    found = []
    if summary.get("cases"):
        found.append(_subjects(summary))
    if summary.get("shown"):
        found += [*_next_words(summary["shown"]), _continuations(summary["shown"])]
    return found


def _subjects(summary: Summary) -> Table:
    words = summary["words"]
    head = ["subject", *(f"P({word}) {when}" for word in words for when in ("before", "after"))]
    head += ["gap before", "gap after", "prompts"]
    rows = []
    for case in summary["cases"]:
        gaps = [max(case[when]) - min(case[when]) for when in ("before", "after")]
        pairs = [case[when][place] for place in range(len(words)) for when in ("before", "after")]
        rows.append([case["profession"], *(f"{p:.4f}" for p in [*pairs, *gaps]), f"{case['prompts']}"])
    note = (
        "Means over the subject's test prompts, no interval: single subjects have few prompts. The widest gap before "
        "the edit stands first; a click on a head sorts by it."
    )
    return Table(f"Every subject of the test part ({len(rows)})", head, rows, note)


def _next_words(shown: Mapping[str, Any]) -> list[Table]:
    found = []
    for was, now in zip(shown["before"], shown["after"], strict=True):
        rows = [
            [f"{place}", *(f"{one['next'][place - 1][0]!r} {one['next'][place - 1][1]:.3f}" for one in (was, now))]
            for place in range(1, min(len(was["next"]), len(now["next"])) + 1)
        ]
        chances = ", ".join(f"P({word}) {p:.3f} to {now['words'][word]:.3f}" for word, p in was["words"].items())
        caption = f"The likeliest next words of {was['text']!r}"
        found.append(Table(caption, ["rank", "before", "after"], rows, f"{chances}." if chances else "", folded=True))
    return found


def _continuations(shown: Mapping[str, Any]) -> Table:
    rows = [
        [was["text"], was["goes_on"], now["goes_on"]] for was, now in zip(shown["before"], shown["after"], strict=True)
    ]
    note = (
        "Each next token is the likeliest one. The prompts are the most biased ones before the edit, one with a hint "
        "and one that the edit should leave alone: examples to look at, not a measurement."
    )
    return Table("How the model goes on", ["text", "before", "after"], rows, note, texts=True)
