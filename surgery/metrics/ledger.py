"""The spillover ledger: every axis that an edit could spoil, in a form that costs little, and which data is at hand."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from surgery.catalogue import FOLDER_SUITES, SUITES
from surgery.data import bbq, bios, capability, crows_pairs, facts, seat, stereoset
from surgery.errors import SurgeryError

LEDGER = (
    *SUITES, "stereoset", "crows_pairs", "bbq", "seat", "cloze", "capability", "wikitext", "gas", "free_text",
)  # fmt: skip
ROWS = {
    "stereoset": 200, "crows_pairs": 200, "bbq": 120, "seat": 12, "cloze": 100, "capability": 25, "wikitext": 80,
    "free_text": 48, "gas": 60, "bios": 100,
}  # fmt: skip
"""Of the quick form: triples, pairs, questions, sentences a set, facts, questions a task, sentences, starts."""
BRIEF = {
    "genbias": 105, "genhint": 35, "locality": 85, "facts_of_gender": 60, "perplexity": 40, "stereoset": 60,
    "crows_pairs": 60, "bbq": 16, "seat": 6, "cloze": 36, "capability": 2, "wikitext": 30, "free_text": 12, "gas": 4,
    "bios": 30,
}  # fmt: skip
"""The same on two cores, where both sides together should add little to a run; only larger harm shows in so few."""

_READS: dict[str, Callable[[Path], Any]] = {
    "stereoset": lambda folder: stereoset.load(folder, kind="intrasentence"),
    "crows_pairs": crows_pairs.load,
    "bbq": bbq.load,
    "seat": lambda folder: [seat.load(folder, name) for names in seat.SEAT.values() for name in names],
    "weat": lambda folder: [seat.load(folder, name) for names in seat.WEAT.values() for name in names],
    "cloze": facts.load,
    "capability": lambda folder: [capability.load(task, folder) for task in capability.FILES],
    "gas": lambda folder: _texts("gas").prompts(folder),
    "bios": lambda folder: bios.load(folder, "test", 0),
    "wikitext": lambda folder: _texts("wikitext").texts(folder),
}


def _texts(judge: str) -> Any:
    """The module of a judge that reads its own texts; it imports torch."""
    return import_module(f"surgery.metrics.{judge}")


def absent(suites: Sequence[str], folder: str | Path) -> dict[str, str]:
    """Those of ``suites`` whose data is not in the folder, and why; each file is read once, as the judge would."""
    found = {}
    for name in (name for name in suites if name in FOLDER_SUITES):
        if not str(folder):
            found[name] = "no data folder was named"
            continue
        try:
            _READS[name](Path(folder))
        except SurgeryError as error:
            found[name] = " ".join(str(error).split())
    return found
