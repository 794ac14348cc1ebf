"""What an attribution starts from: training texts (perhaps labelled), sentences of the bias, and pairs that test it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase

from surgery.data.mixtures import Pair, deal, read_pairs
from surgery.data.rows import label_of
from surgery.data.texts import Example, table
from surgery.edits.supervised import Row, encode_rows
from surgery.errors import SurgeryError
from surgery.forward.tokens import answered


@dataclass(frozen=True)
class Material:
    """``biased`` are the labels of ``texts``, None where the file has none; a probe's ``anti`` may be empty.

    ``test`` are pairs that measure the bias and serve as twins; no sentence of theirs probes.
    """

    texts: tuple[str, ...]
    biased: Bool[np.ndarray, " texts"] | None
    probe: tuple[Pair, ...]
    test: tuple[Pair, ...]
    name: str
    twins: tuple[Pair, ...] = ()
    """Pairs by which the scores are told apart, where they are not the test pairs."""
    twin_of: Mapping[str, str] = field(default_factory=dict)
    """The twins of training texts, where they are known: {stereotype: anti-stereotype}."""

    @property
    def twinned(self) -> bool:
        """Whether the probe has anti-stereotypes, so that it can be a contrast."""
        return bool(self.probe) and all(pair.anti for pair in self.probe)

    def limited(self, *, probe: int = 0, test: int = 0) -> "Material":
        """With so many probe and test pairs; 0 leaves all."""
        return replace(self, probe=_some(self.probe, probe), test=_some(self.test, test), twins=_some(self.twins, test))

    @property
    def told(self) -> tuple[Pair, ...]:
        """The pairs whose stereotypes should score above their twins."""
        return self.twins or self.test


def _some(pairs: tuple[Pair, ...], count: int) -> tuple[Pair, ...]:
    """``count`` of the pairs at even distances: they are sorted by type and direction, whose shares so remain."""
    if not 0 < count < len(pairs):
        return pairs
    return tuple(pairs[place] for place in np.linspace(0, len(pairs) - 1, count).round().astype(int))


def of_folder(folder: Path, name: str) -> Material:
    """The mixture that ``surgery.data.mixtures.build`` or ``surgery data mix PRESET`` wrote to ``folder``."""
    texts, biased = _texts(folder / "mixture.jsonl", "text", "biased")
    probe, test = (tuple(read_pairs(folder / f"{part}.jsonl")) for part in ("probe", "test"))
    injected = folder / "injected.jsonl"
    twin_of = {pair.text: pair.anti for pair in read_pairs(injected)} if injected.is_file() else {}
    twins = tuple(read_pairs(folder / "twins.jsonl")) if (folder / "twins.jsonl").is_file() else ()
    return Material(texts, biased, probe, test, name, twins, twin_of)


def of_files(file: Path, probe: Path, test: Path | None, *, text: str, label: str, seed: int) -> Material:
    """A user's own files: ``file`` has the column ``text`` and perhaps the true-or-false column ``label``.

    ``probe`` and ``test`` have the columns "text" (the stereotype) and "anti" (its twin); a probe may lack the twins.
    Without ``test`` half of a probe's pairs, drawn by ``seed``, test instead of probing.

    Raises ``SurgeryError`` for what cannot be read, a label on some rows only, and a probe of fewer than two pairs
    where half of them must test.
    """
    texts, biased = _texts(file, text, label)
    pairs = _probe(probe)
    tested: Sequence[Pair] = read_pairs(test) if test else ()
    if not test and all(pair.anti for pair in pairs):
        if len(pairs) < 2:
            raise SurgeryError(
                f"{probe}: got 1 pair, expected at least 2, since half of them test; add pairs, or a test"
            )
        pairs, tested = deal(pairs, 2, np.random.default_rng(seed))
    return Material(texts, biased, tuple(pairs), tuple(tested), file.name)


def _texts(file: Path, text: str, label: str) -> tuple[tuple[str, ...], Bool[np.ndarray, " texts"] | None]:
    found: list[str] = []
    labels: list[bool] = []
    for at, row in table(file):
        value = row.get(text)
        if not isinstance(value, str) or not value.strip():
            raise SurgeryError(f"{at}: {text!r} is {str(value)[:60]!r}, expected text that is not blank; mend that row")
        found.append(value)
        if label and label in row:
            labels.append(label_of(row[label], label, at))
    if labels and len(labels) != len(found):
        raise SurgeryError(f"{file}: {len(labels)} of {len(found)} rows have {label!r}; label all of them, or none")
    return tuple(found), np.array(labels) if labels else None


def _probe(path: Path) -> list[Pair]:
    rows = list(table(path))
    if any("anti" in row for _, row in rows):
        return read_pairs(path)
    for at, row in rows:
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise SurgeryError(f"{at}: 'text' is {str(row.get('text'))[:60]!r}, expected a biased sentence")
    return [Pair(row["text"], "", "", "", str(number)) for number, (_, row) in enumerate(rows)]


def encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int, what: str
) -> tuple[list[Row], int]:
    """The rows of ``texts``, one for each, and how many were cut to ``max_length`` tokens.

    Raises ``SurgeryError`` naming the first text that has no token to learn.
    """
    given = [Example("", text) for text in texts]
    if not given:
        raise SurgeryError(f"{what}: got none, expected at least 1")
    found = encode_rows(tokenizer, given, max_length=max_length)
    if found.left_out:
        for number, example in enumerate(given):
            if len(answered(tokenizer, "", example.answer)[0]) < 2:
                raise SurgeryError(
                    f"{what} {number} ({example.answer[:40]!r}) has no token that another stands before, so nothing of "
                    "it can be learnt; remove it"
                )
    return list(found.rows), found.cut


def refuse_shared(rows: Sequence[Row], probe: Sequence[Row]) -> None:
    """Raises ``SurgeryError`` for a training text that also probes: its score would be that of itself."""
    known = {row.ids for row in probe}
    for place, row in enumerate(rows):
        if row.ids in known:
            raise SurgeryError(
                f"text {place} is also a text of the probe; its score would be that of a text with itself: remove it "
                "from one of them"
            )
