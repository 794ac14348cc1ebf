"""Hate speech with a label and the group it is about: HateCheck's test cases and Davidson's tweets."""

from dataclasses import dataclass
from pathlib import Path

from surgery.data.rows import find_file, part, read_rows
from surgery.errors import SurgeryError

HATECHECK = "toxicity/hatecheck_test_suite_cases.csv"
DAVIDSON = "toxicity/davidson_labeled_data.csv"
CLASSES = ("hate", "offensive", "neither")


@dataclass(frozen=True)
class Labelled:
    """A text to classify. ``label`` 1 is hateful; ``group`` is whom it is about, "" where it is about no group."""

    text: str
    label: int
    group: str


@dataclass(frozen=True)
class _Case:
    row: Labelled
    template: str


def hatecheck(folder: str | Path, wanted: str = "all", seed: int = 0) -> list[Labelled]:
    """HateCheck (Röttger et al. 2021): 3,728 written cases, 2,563 of them hateful, about seven groups or none.

    ``wanted``: train (60 %), dev, test (20 % each) or all. Cases that are made from one template for several groups
    stay in one part, so that no part has seen a test case with another group's name in it.

    Raises ``SurgeryError`` for a missing or malformed file, and for an unknown label.
    """
    path = find_file(folder, HATECHECK)
    cases = []
    rows = read_rows(path, ("test_case", "label_gold", "target_ident", "functionality", "templ_id"))
    for number, row in enumerate(rows, 1):
        if row["label_gold"] not in ("hateful", "non-hateful"):
            raise SurgeryError(f"{path}, row {number}: label {row['label_gold']!r}; expected hateful or non-hateful")
        label = int(row["label_gold"] == "hateful")
        cases.append(_Case(Labelled(row["test_case"].strip(), label, row["target_ident"]), row["templ_id"]))
    found = part(cases, wanted, seed, stratum=lambda c: (c.row.label, bool(c.row.group)), unit=lambda c: c.template)
    return [case.row for case in found]


def davidson(folder: str | Path, wanted: str = "all", seed: int = 0, *, binary: bool = False) -> list[Labelled]:
    """Davidson et al. (2017): 24,783 tweets labelled 0 hate, 1 offensive, 2 neither (``CLASSES``); no group is given.

    ``binary``: 1 hate against 0 anything else. ``wanted``: train (60 %), dev, test (20 % each) or all; copies of one
    text stay in one part.

    Raises ``SurgeryError`` for a missing or malformed file, and for an unknown class.
    """
    path = find_file(folder, DAVIDSON)
    found = []
    for number, row in enumerate(read_rows(path, ("class", "tweet")), 1):
        if row["class"] not in ("0", "1", "2"):
            raise SurgeryError(f"{path}, row {number}: class {row['class']!r}; expected 0, 1 or 2")
        label = int(row["class"] == "0") if binary else int(row["class"])
        found.append(Labelled(row["tweet"], label, ""))
    return part(found, wanted, seed, stratum=lambda row: row.label, unit=lambda row: row.text)
