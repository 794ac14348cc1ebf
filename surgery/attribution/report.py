"""From the scores of an index to a selection on disk, and to what is said of it beside the controls."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.attribution.index import Index, text_hash
from surgery.attribution.select import Chosen, Comparison, Scores, compare, controls
from surgery.attribution.source import Source
from surgery.attribution.tfidf import similarity
from surgery.data.rows import label_of
from surgery.data.texts import table
from surgery.errors import SurgeryError
from surgery.files.atomic import publish, temporary


def rows_of(index: Index, data: Path, column: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(place, text, the whole row) of the file that was indexed, one at a time.

    Raises ``SurgeryError`` where the file is not the one that was indexed, naming the first row that differs.
    """
    hashes, place = index.column("text"), -1
    for place, (at, row) in enumerate(table(data)):
        text = row.get(column)
        if not isinstance(text, str) or place >= len(hashes) or text_hash(text) != int(hashes[place]):
            raise SurgeryError(f"{at}: is not row {place} of {index.path}; give the file that was indexed")
        yield place, text, row
    if place + 1 != len(hashes):
        raise SurgeryError(f"{data}: has {place + 1} rows, {index.path} has {len(hashes)}; give the file indexed")


def labels_of(index: Index, data: Path, column: str, label: str) -> Chosen | None:
    """Which rows are biased, by the column ``label`` (``data.rows.truth``); None where there is no such column."""
    found = np.zeros(len(index), bool)
    for place, _, row in rows_of(index, data, column):
        if label not in row:
            return None
        found[place] = label_of(row[label], label, f"{data}, row {place}")
    return found


def twin_scores(
    source: Source,
    probe: Float[Tensor, " dim"],
    scale: float,
    texts: Sequence[str],
    antis: Sequence[str],
    *,
    normalise: str = "cosine",
) -> tuple[Scores, Scores]:
    """Scores of stereotypes and of their twins, as an index would give them. ``probe`` is that of ``Source.probe``."""
    scores = torch.zeros(len(texts) + len(antis))
    for batch in source([*texts, *antis]):
        products = batch.values.float().cpu() @ probe
        size = batch.norms.float().cpu().clamp(min=torch.finfo(torch.float32).tiny) * scale
        scores[list(batch.places)] = products if normalise == "dot" else products / size
    found = scores.double().numpy()
    return found[: len(texts)], found[len(texts) :]


def against_controls(
    index: Index,
    data: Path,
    column: str,
    label: str,
    methods: Mapping[str, Scores],
    probe: Sequence[str],
    *,
    share: float = 0.0,
    threshold: float | None = None,
    seed: int = 0,
    pairs: tuple[Sequence[str], Sequence[str]] | None = None,
    twins: Mapping[str, tuple[Scores, Scores]] | None = None,
) -> Comparison | None:
    """The selection by each of ``methods`` beside every control; None where the rows carry no label.

    ``pairs`` are the texts of the twin test and ``twins`` their scores by the methods; TF-IDF is tested on them too.
    """
    labels = labels_of(index, data, column, label)
    if labels is None:
        return None

    def texts() -> Iterator[str]:
        return (text for _, text, _ in rows_of(index, data, column))

    first = next(iter(methods.values()))
    others = controls(first, index.column("loss"), similarity(texts, probe), seed=seed)
    tested = dict(twins or {})
    if pairs is not None:
        # The weights of the words are those of the pairs and the probe: a handful of texts beside the data.
        both = similarity([*pairs[0], *pairs[1]], probe)
        tested["tfidf"] = (both[: len(pairs[0])], both[len(pairs[0]) :])
    return compare(methods, others, labels, data=data.name, share=share, threshold=threshold, twins=tested, seed=seed)


def write_selected(data: Path, column: str, index: Index, chosen: Chosen, out: Path, rest: Path | None = None) -> int:
    """Write the rows that are chosen to ``out`` and the others to ``rest`` (.jsonl), both complete or neither.

    The order is that of the file. Returns the number of chosen rows.
    """
    with ExitStack() as stack:
        paths = [path for path in (out, rest) if path is not None]
        parts = [stack.enter_context(temporary(path, folder=False)) for path in paths]
        files = [stack.enter_context(part.open("w", encoding="utf-8")) for part in parts]
        for place, _, row in rows_of(index, data, column):
            which = 0 if chosen[place] else 1
            if which < len(files):
                files[which].write(json.dumps(row, ensure_ascii=False) + "\n")
        for file in files:
            file.close()
        for part, path in zip(parts, paths, strict=True):
            publish(part, path)
    return int(chosen.sum())
