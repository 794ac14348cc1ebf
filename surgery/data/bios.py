"""Bias in Bios (De-Arteaga et al. 2019): short biographies with a profession and a gender, in seeded splits."""

from dataclasses import dataclass
from pathlib import Path

from surgery.data.rows import find_file, part, read_rows
from surgery.errors import SurgeryError

FILE = "bias_in_bios/bios_28_professions.csv"
ACCOUNTANTS = "bias_in_bios/accountant_complete.csv"


@dataclass(frozen=True)
class Biography:
    """A biography without its first sentence, which names the profession; ``profession`` has spaces."""

    text: str
    profession: str
    gender: str  # "Female" | "Male"


def load(
    folder: str | Path, wanted: str = "all", seed: int = 0, *, files: tuple[str, ...] = (FILE,)
) -> list[Biography]:
    """The ``train`` (60 %), ``dev``, ``test`` (20 % each) or ``all`` biographies of ``files``, each text once.

    Each part has professions and genders in their proportions. The default is the file of 28 professions with ten
    rows each; ``ACCOUNTANTS`` adds 1,000 of one profession, for training or perplexity.

    Raises ``SurgeryError`` for a missing or malformed file, and a gender other than Female or Male.
    """
    found: dict[str, Biography] = {}
    for name in files:
        path = find_file(folder, name)
        for number, row in enumerate(read_rows(path, ("hard_text", "profession", "gender")), 1):
            if row["gender"] not in ("Female", "Male") or not all(row[k].strip() for k in ("hard_text", "profession")):
                raise SurgeryError(
                    f"{path}, row {number}: gender {row['gender']!r}, profession {row['profession']!r}; expected "
                    "Female or Male, a profession and a text; mend that row"
                )
            text = row["hard_text"].strip()
            found.setdefault(text, Biography(text, row["profession"].replace("_", " ").strip(), row["gender"]))
    rows = list(found.values())
    return part(rows, wanted, seed, stratum=lambda row: (row.profession, row.gender))


def professions(rows: list[Biography]) -> list[str]:
    """The professions of ``rows``, in alphabetical order."""
    return sorted({row.profession for row in rows})
