"""StereoSet (Nadeem et al. 2021): sentences of a stereotype, its opposite and something unrelated, about one target.

Three forms are read: a JSON object a line (``type``, ``target``, ``bias_type``, ``context`` and the three sentences),
the official JSON (``data.intrasentence[].sentences[].gold_label``; also as a bare list, and with the ``data``
shortcut of BiasEdit's files), and the hub's data set through ``datasets``.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surgery.data.reading import json_object, json_value, read_text
from surgery.errors import SurgeryError

Kind = Literal["intrasentence", "intersentence", "all"]
KINDS = ("intrasentence", "intersentence")
LABELS = ("stereotype", "anti-stereotype", "unrelated")
HUB_LABELS = ("anti-stereotype", "stereotype", "unrelated")  # the hub's gold_label is a number into these
FILE = "stereoset/stereoset_dev.jsonl"  # inside the user's data folder
LEAST = 20  # rows of a bias type: one row of fewer moves its score by more than 5 points

# The first digits of some sentence ids of the official dev file whose gold label is stereotype. BiasEdit's and
# EditBias's gender_test.json keep the ids and swap stereotype with anti-stereotype in all their rows.
STEREOTYPES = frozenset(
    (
        "6b561535", "6a1ae2b3", "013516d2", "23a8b78e", "8a3bd4ce", "07255ab8", "e70c9f80", "5cc2cf2a",
        "a91b8208", "9383eb0b", "49ca49c0", "190cf9a4", "fe3d6c3d", "67a530f8", "06fedbe7", "bf5af21e",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Triple:
    """One row. ``context`` contains BLANK (intrasentence; the three are whole sentences) or comes before the three."""

    target: str
    bias_type: str
    context: str
    stereotype: str
    anti_stereotype: str
    unrelated: str
    id: str
    kind: str
    where: str

    @property
    def sentences(self) -> tuple[str, str, str]:
        """Stereotype, anti-stereotype, unrelated: the order of the columns of every table of scores."""
        return self.stereotype, self.anti_stereotype, self.unrelated


@dataclass(frozen=True)
class Triples:
    """The rows that can be used, and one line with file, row and reason for each that cannot."""

    rows: tuple[Triple, ...]
    skipped: tuple[str, ...]
    name: str


def load(path: str | Path, *, kind: Kind = "intrasentence", least: int = LEAST) -> Triples:
    """The triples of a file, of a data folder (its ``stereoset/stereoset_dev.jsonl``), or of a hub data set.

    A hub name (``McGill-NLP/stereoset``) or a local copy of that data set is read by ``datasets``, its validation
    split. A row is skipped, with its reason in ``skipped``, when one of the three sentences is missing, empty or twice
    there, the context of an intrasentence row has no BLANK, a label is unknown, its annotators say the opposite of
    its gold labels, or its bias type has fewer than ``least`` rows.

    Raises ``SurgeryError`` for a path that is none of these, a malformed file, one without any usable row, and for
    files known to have stereotype and anti-stereotype swapped (by the official sentence ids, where the file has
    them). A file without ids and annotators' labels can be swapped unnoticed: a model of the usual kind then has an SS
    below 50.
    """
    if kind not in (*KINDS, "all"):
        raise SurgeryError(f"kind: got {kind!r}, expected intrasentence, intersentence or all")
    kinds = KINDS if kind == "all" else (kind,)
    path = Path(path)
    name, found = _raw(path, kinds)
    rows, skipped, others = [], [], 0
    for where, raw in found:
        if isinstance(raw, Mapping) and raw.get("type") in KINDS and raw["type"] not in kinds:
            others += 1
            continue
        row = _triple(raw, where)
        if isinstance(row, str):
            skipped.append(f"{where}: {row}")
        else:
            rows.append(row)
    counts = Counter(row.bias_type for row in rows)
    skipped += [
        f"{row.where}: bias type {row.bias_type!r} has {counts[row.bias_type]} {kind} rows, fewer than {least}"
        for row in rows
        if counts[row.bias_type] < least
    ]
    rows = [row for row in rows if counts[row.bias_type] >= least]
    if not rows:
        reason = skipped[0] if skipped else f"{others} rows are of another kind"
        raise SurgeryError(f"{path}: no {kind} triple to use, expected at least {least}; {reason}")
    return Triples(tuple(rows), tuple(skipped), f"{name} {kind}")


def _raw(path: Path, kinds: Sequence[str]) -> tuple[str, Iterator[tuple[str, Any]]]:
    """The name of the data and its rows as they stand there, each with file and place."""
    if path.is_dir() and (path / FILE).is_file():
        path = path / FILE
    if path.is_file():
        return path.name, iter(list(_lines(path) if path.suffix.lower() == ".jsonl" else _official(path, kinds)))
    if path.is_dir() or (not path.exists() and len(path.parts) == 2 and not path.is_absolute() and not path.suffix):
        return path.name, iter(list(_hub(str(path), kinds)))
    raise SurgeryError(
        f"{path}: no such file; expected a StereoSet file (.jsonl or the official .json), a folder that holds {FILE}, "
        "or the hub's data set; check the path"
    )


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            at = f"{path}, line {number}"
            yield at, json_object(line, at)


def _official(path: Path, kinds: Sequence[str]) -> Iterator[tuple[str, Any]]:
    try:
        content = json_value(read_text(path))
    except ValueError as error:
        raise SurgeryError(f"{path}: malformed ({error}), expected the official StereoSet JSON; mend it") from None
    if isinstance(content, list):
        content = {"data": {"intrasentence": content}}
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict) or not any(isinstance(data.get(kind), list) for kind in KINDS):
        raise SurgeryError(f'{path}: expected {{"data": {{"intrasentence": [...], "intersentence": [...]}}}} or a list')
    for kind in kinds:
        for number, row in enumerate(data.get(kind) or [], 1):
            yield f"{path}, {kind} row {number}", {"type": kind, **row} if isinstance(row, dict) else row


def _hub(name: str, kinds: Sequence[str]) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    for kind in kinds:
        try:
            rows = load_dataset(name, kind, split="validation")
        except Exception as error:  # the library's own errors are of many kinds
            raise SurgeryError(
                f"{name}: datasets cannot load its {kind!r} validation split ({str(error).splitlines()[0][:150]}); "
                f"expected the hub's StereoSet, a copy of it, or a folder that holds {FILE}"
            ) from error
        for number, row in enumerate(rows, 1):
            columns = row["sentences"]
            listed = (
                [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
                if isinstance(columns, dict)
                else columns
            )
            yield f"{name}, {kind} row {number}", {**row, "type": kind, "sentences": listed}


def _triple(raw: Any, where: str) -> Triple | str:
    """The row as a triple, or why it is none."""
    if not isinstance(raw, Mapping):
        return f"got {str(raw)[:40]!r}, expected an object"
    if raw.get("type") not in KINDS and raw.get("type") is not None:
        return f"type is {raw['type']!r}, expected intrasentence or intersentence"
    kind = raw.get("type") or "intrasentence"
    found = _sentences(raw)
    if isinstance(found, str):
        return found
    fields: dict[str, Any] = {name: raw.get(name) for name in ("target", "bias_type", "context")} | found
    for name, text in fields.items():
        if not isinstance(text, str) or not text.strip():
            return f"{name} is {'missing' if text is None else repr(text)}, expected text"
    if kind == "intrasentence" and "BLANK" not in fields["context"]:
        return f"the context {fields['context'][:60]!r} has no BLANK"
    if len(set(found.values())) < len(LABELS):
        return "two of the three sentences are the same, so the labels say nothing"
    return Triple(
        target=fields["target"],
        bias_type=fields["bias_type"].strip().lower(),
        context=fields["context"],
        stereotype=found["stereotype"],
        anti_stereotype=found["anti-stereotype"],
        unrelated=found["unrelated"],
        id=str(raw.get("id") or where),
        kind=kind,
        where=where,
    )


def _sentences(raw: Mapping[str, Any]) -> dict[str, str] | str:
    """Label to sentence, or what is wrong with them."""
    listed = raw.get("sentences")
    if isinstance(raw.get("data"), Mapping) and not isinstance(listed, list):
        listed = [{"gold_label": label, **cell} for label, cell in raw["data"].items() if isinstance(cell, Mapping)]
    if not isinstance(listed, list):
        return {label: raw.get(label) for label in LABELS}  # type: ignore[misc]
    found: dict[str, str] = {}
    opposed = 0
    for cell in listed:
        label = _label(cell.get("gold_label")) if isinstance(cell, Mapping) else None
        if label not in LABELS:
            got = cell.get("gold_label") if isinstance(cell, Mapping) else cell
            return f"the label {str(got)[:40]!r} is unknown, expected {', '.join(LABELS)}"
        if label in found:
            return f"two sentences are labelled {label}"
        found[label] = cell.get("sentence")
        if label == "anti-stereotype" and str(cell.get("id", ""))[:8] in STEREOTYPES:
            raise SurgeryError(
                f"sentence {cell['id']} is labelled anti-stereotype; in StereoSet it is the stereotype. This file's "
                "labels are swapped (BiasEdit's and EditBias's gender_test.json); use the official dev file"
            )
        opposed += _opposed(label, cell.get("labels"))
    if opposed == 2:
        return "most annotators call its stereotype an anti-stereotype and the other way round: its labels are swapped"
    return {label: found.get(label) for label in LABELS}  # type: ignore[misc]


def _label(value: Any) -> Any:
    """A label's name; the hub writes numbers."""
    return HUB_LABELS[value] if isinstance(value, int) and 0 <= value < len(HUB_LABELS) else value


def _opposed(label: str, votes: Any) -> bool:
    """Whether most annotators gave the opposite of this stereotype or anti-stereotype label."""
    if isinstance(votes, Mapping):  # the hub's columns
        votes = [{"label": value} for value in votes.get("label", [])]
    given = [_label(vote.get("label")) for vote in votes or [] if isinstance(vote, Mapping)]
    opposite = {"stereotype": "anti-stereotype", "anti-stereotype": "stereotype"}.get(label)
    return 2 * given.count(opposite) > len(given)
