"""CrowS-Pairs (Nangia et al. 2020): pairs of sentences of which the first is the more stereotyping one."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from surgery.data.reading import read_text
from surgery.errors import SurgeryError

FILE = "crows_pairs/crows_pairs_anonymized.csv"  # inside the user's data folder
COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
DIRECTIONS = ("stereo", "antistereo")


@dataclass(frozen=True)
class Pair:
    """``sent_more`` is always the more stereotyping sentence.

    ``direction`` says whether the sentence about the disadvantaged group shows the stereotype ("stereo") or violates
    it ("antistereo"). ``number`` is the row number of the full file, "" where the file has none.
    """

    sent_more: str
    sent_less: str
    direction: str
    bias_type: str
    number: str
    where: str


@dataclass(frozen=True)
class Pairs:
    """The rows that can be used, and one line with file, row and reason for each that cannot."""

    rows: tuple[Pair, ...]
    skipped: tuple[str, ...]
    name: str


def load(path: str | Path) -> Pairs:
    """The pairs of a CSV file, or of a data folder (its ``crows_pairs/crows_pairs_anonymized.csv``).

    The original file, and the revised one of Neveol et al. Bias types are taken as they stand, in lower case: the
    revised file has a few noisy ones, which count in the overall scores. A row with a missing sentence, two equal ones
    or an unknown direction is skipped, with its reason in ``skipped``.

    Raises ``SurgeryError`` for a missing or malformed file and one without any usable row.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise SurgeryError(f"{path}: no such file; expected the CSV of CrowS-Pairs, or a folder that holds {FILE}")
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    rows, skipped = [], []
    try:
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise SurgeryError(f"{path}: no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            more, less, direction, bias_type = ((cells[name] or "").strip() for name in COLUMNS)
            if not (more and less):
                skipped.append(f"{where}: {'sent_less' if more else 'sent_more'} is empty, expected a sentence")
            elif more == less:
                skipped.append(f"{where}: both sentences are the same")
            elif direction not in DIRECTIONS:
                skipped.append(f"{where}: stereo_antistereo is {direction!r}, expected stereo or antistereo")
            else:
                rows.append(Pair(more, less, direction, bias_type.lower(), cells.get("") or "", where))
    except csv.Error as error:
        raise SurgeryError(f"{path}, line {reader.line_num + 1}: malformed ({error}); mend the quotes there") from None
    if not rows:
        raise SurgeryError(f"{path}: no pair to use; {skipped[0] if skipped else 'the file has no row'}")
    return Pairs(tuple(rows), tuple(skipped), path.name)
