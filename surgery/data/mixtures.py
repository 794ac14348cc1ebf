"""The mixtures of BIAS DIFF (appendix C) from the files at hand, with CrowS-Pairs dealt into disjoint parts.

A mixture is a folder: ``mixture.jsonl`` (see ``surgery.data.mix``), the pairs that probe the gradients
(``probe.jsonl``), the pairs that measure the bias (``test.jsonl``), those whose stereotypes stand in the mixture
(``injected.jsonl``, where CrowS-Pairs is what is injected) and ``mix.json``, what they were made of. A pair is a JSON
line: ``text`` (the stereotype), ``anti`` (its twin, the anti-stereotype), ``group`` (the type of bias), ``direction``
("stereo" or "antistereo", as in CrowS-Pairs) and ``id``. No sentence stands in two of the parts.
"""

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.data import stereoset
from surgery.data.mix import Source, labelled, sizes, write_shuffled
from surgery.data.texts import table
from surgery.errors import SurgeryError
from surgery.files.atomic import check_destination, publish, temporary, write_json

CROWS = "crows_pairs/crows_pairs_anonymized.csv"
AGNEWS = "factual/ag_news_test.csv"
TOXIC = "toxicity/realtoxicityprompts_toxic_993.jsonl"
TREX = "factual/trex_pararel"
STEREOSET_TRAIN = "stereoset/stereoset_train_union.jsonl"
STEREOSET_DEV = "stereoset/stereoset_dev.jsonl"
PROBES = ("crows_pairs", "stereoset")
SHARES = (0.3, 0.7)  # biased to neutral: "a 3:7 ratio" (appendix C)

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """A stereotype, its anti-stereotype twin, and where the pair comes from."""

    text: str
    anti: str
    group: str
    direction: str
    id: str


@dataclass(frozen=True)
class Preset:
    """A mixture of the paper: what is injected into what."""

    biased: str
    neutral: str


PRESETS = {
    "crows_agnews": Preset("crows_pairs", "ag_news"),
    "rtp_agnews": Preset("real_toxicity_prompts", "ag_news"),
    "crows_trex": Preset("crows_pairs", "trex"),
}


def build(name: str, data: Path, out: Path, *, seed: int, rows: int = 0, probe: str = "crows_pairs") -> dict[str, Any]:
    """Write the preset ``name`` from the files under ``data`` to the new folder ``out``; returns ``mix.json``.

    ``rows`` is the size of the mixture (0: as large as the files allow, 3 biased rows to 7 neutral ones). Where
    CrowS-Pairs is injected it is dealt into thirds, else into halves, the same share of each type of bias in each part.
    ``probe`` "stereoset" probes with StereoSet's training source instead, and its dev file gives the twins
    (``twins.jsonl``): their sentences share the group's word and differ in what is said of it. CrowS-Pairs is then
    dealt into one part less, so that more pairs test.

    Raises ``SurgeryError`` for an unknown name, a file that is missing or holds too few rows, and an ``out`` that
    exists.
    """
    if probe not in PROBES:
        raise SurgeryError(f"probe: got {probe!r}, expected one of {', '.join(PROBES)}")
    if name not in PRESETS:
        raise SurgeryError(
            f"mixture {name!r}: no such mixture; expected one of {', '.join(PRESETS)}, or PATH,key=value"
        )
    check_destination(out)
    preset = PRESETS[name]
    generator = np.random.default_rng(seed)
    pairs, repeated = crows_pairs(data / CROWS)
    injecting = preset.biased == "crows_pairs"
    dealt = [*(["probe"] if probe == "crows_pairs" else []), "test", *(["injected"] if injecting else [])]
    parts = dict(zip(dealt, deal(pairs, len(dealt), generator), strict=True))
    if probe == "stereoset":
        parts["probe"], parts["twins"] = (_stereoset(data / file) for file in (STEREOSET_TRAIN, STEREOSET_DEV))
    pool = parts["injected"] if injecting else None
    biased = _stereotypes(pool) if pool else _toxic(data)
    neutral = {"ag_news": _news, "trex": _facts}[preset.neutral](data)
    want = sizes(
        [Source(data, name=preset.biased, share=SHARES[0]), Source(data, name=preset.neutral, share=SHARES[1])],
        [len(biased), len(neutral)],
        rows,
    )
    taken = [generator.permutation(len(rows))[:count] for rows, count in zip((biased, neutral), want, strict=True)]
    if pool:
        parts["injected"] = [pool[place] for place in sorted(taken[0])]
    chosen = [biased[place] for place in taken[0]] + [neutral[place] for place in taken[1]]
    summary = {
        "mixture": name,
        "seed": seed,
        "probe": probe,
        "rows": {preset.biased: want[0], preset.neutral: want[1]},
        "pairs": {part: len(rows) for part, rows in parts.items()},
        "repeated_pairs_left_out": repeated,
    }
    with temporary(out, folder=True) as folder:
        write_shuffled(folder / "mixture.jsonl", chosen, len(chosen), generator)
        for part, rows_of in parts.items():
            lines = [json.dumps(vars(pair), ensure_ascii=False) + "\n" for pair in rows_of]
            (folder / f"{part}.jsonl").write_text("".join(lines), "utf-8")
        write_json(folder / "mix.json", summary)
        publish(folder, out)
    return summary


def _stereoset(path: Path) -> list[Pair]:
    """The intrasentence rows as pairs: one target, another attribute."""
    return [
        Pair(row.stereotype, row.anti_stereotype, row.bias_type, "", f"stereoset:{row.id}")
        for row in stereoset.load(path, least=1).rows
    ]


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of ``probe.jsonl``, ``test.jsonl`` or ``injected.jsonl``, or of any file with their columns.

    ``group``, ``direction`` and ``id`` may be missing. Raises ``SurgeryError`` for a row without ``text`` or ``anti``.
    """
    found = []
    for number, (at, row) in enumerate(table(path)):
        for name in ("text", "anti"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise SurgeryError(
                    f"{at}: {name!r} is {str(row.get(name))[:60]!r}, expected a sentence; a pair has the stereotype "
                    "as text and its twin as anti"
                )
        more = {name: str(row.get(name, "")) for name in ("group", "direction")}
        found.append(Pair(row["text"], row["anti"], id=str(row.get("id", number)), **more))
    return found


def crows_pairs(path: Path) -> tuple[list[Pair], int]:
    """The pairs of CrowS-Pairs and how many were left out because a sentence of theirs stood in an earlier pair.

    ``sent_more`` is always the more stereotyping sentence; ``stereo_antistereo`` says only whether the disadvantaged
    group is the one that it is about (Nangia et al. 2020).

    Raises ``SurgeryError`` for a file without its columns.
    """
    pairs, seen, repeated = [], set[str](), 0
    for number, (at, row) in enumerate(table(path)):
        try:
            texts = (row["sent_more"].strip(), row["sent_less"].strip())
            fields = (row["bias_type"], row["stereo_antistereo"])
        except KeyError as error:
            raise SurgeryError(f"{at}: no column {error}; expected the file of CrowS-Pairs") from None
        if seen & {normal(text) for text in texts}:
            repeated += 1
            continue
        seen |= {normal(text) for text in texts}
        pairs.append(Pair(*texts, *fields, id=f"crows_pairs:{row.get('') or number}"))
    return pairs, repeated


def normal(text: str) -> str:
    """The text as it is compared: lower case, runs of white space as one space."""
    return " ".join(text.lower().split())


def deal(pairs: list[Pair], parts: int, generator: np.random.Generator) -> list[list[Pair]]:
    """``parts`` disjoint random parts that differ by at most one pair in size, over all and within a type of bias."""
    order = [pairs[place] for place in generator.permutation(len(pairs))]
    order.sort(key=lambda pair: (pair.group, pair.direction))  # stable, so each type stays in random order
    return [order[part::parts] for part in range(parts)]


def _stereotypes(pairs: list[Pair]) -> Rows:
    return [labelled(pair.text, "crows_pairs", True, pair.group, int(pair.id.partition(":")[2])) for pair in pairs]


def _toxic(data: Path) -> Rows:
    rows = enumerate(table(data / TOXIC))
    return [labelled(row["text"].strip(), "real_toxicity_prompts", True, None, n) for n, (_, row) in rows]


def _news(data: Path) -> Rows:
    """Headline and first paragraph in one text, as the paper has them."""
    classes = {"1": "world", "2": "sports", "3": "business", "4": "technology"}
    return [
        labelled(_clean(f"{row['2']} {row['3']}"), "ag_news", False, classes.get(row["1"]), number)
        for number, (_, row) in enumerate(table(data / AGNEWS, header=False))
    ]


def _clean(text: str) -> str:
    """AG News as it was before its line breaks became backslashes and its "&#36;" became " #36;"."""
    text = text.replace("\\", " ").replace(" #39;", "'")
    return " ".join(html.unescape(re.sub(r"(?<![&\w])(#\d+|quot|amp|lt|gt);", r"&\1;", text)).split())


def _facts(data: Path) -> Rows:
    """Each fact of T-REx in the first pattern of its relation (ParaRel), such as "Paris is the capital of France.".

    One relation, P31, has facts but no pattern, and is left out.
    """
    rows: Rows = []
    for file in sorted((data / TREX / "facts").glob("P*.jsonl")):
        if not (patterns := data / TREX / "patterns" / file.name).is_file():
            continue
        pattern = next(table(patterns))[1]["pattern"].replace(" .", ".")
        for _, fact in table(file):
            text = pattern.replace("[X]", fact["sub_label"]).replace("[Y]", fact["obj_label"])
            rows.append(labelled(text, "trex", False, file.stem, len(rows)))
    if not rows:
        raise SurgeryError(f"{data / TREX / 'facts'}: got no P*.jsonl, expected the facts of T-REx by relation")
    return rows
