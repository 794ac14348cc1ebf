"""The names that a user chooses among, without torch: a wrong one is answered before anything heavy is imported.

Each tuple stands beside the room that carries the names out, which takes them from here.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec

from surgery.errors import SurgeryError

RANKINGS = ("gain", "bmi", "lens", "patching", "attribution", "sensitivity")
"""Ways to rank blocks (``surgery.locate``)."""
PAIR_OBJECTIVES = ("npo", "dpo")
OBJECTIVES = ("equalize", "log", *PAIR_OBJECTIVES)
"""Whose gain is measured (``surgery.locate.objectives``): of words, of words or pairs, of pairs of sentences alone."""
SUITES = ("genbias", "genhint", "locality", "facts_of_gender", "perplexity")
"""Judges that need no data folder (``surgery.metrics.material``)."""
FOLDER_SUITES = {
    "stereoset": "StereoSet: stereotype score, language modelling score, ICAT",
    "crows_pairs": "CrowS-Pairs: metric, stereotype and anti-stereotype score",
    "bbq": "BBQ: accuracy and bias scores of question answering",
    "capability": "BoolQ, PIQA, OpenBookQA, CommonsenseQA, MMLU, HellaSwag",
    "seat": "SEAT: association effect sizes of sentence embeddings",
    "weat": "WEAT: association effect sizes of word embeddings",
    "cloze": "T-REx facts as cloze questions",
    "gas": "GAS: gendered words in continuations",
    "bios": "Bias in Bios: gaps between genders by profession",
    "wikitext": "perplexity of Wikipedia's sentences",
}
"""Judges that read files of the user's data folder, and what each measures. The module of the same name in
``surgery.metrics`` has ``evaluate(model, tokenizer, folder, *, limit, seed, step) -> nested dictionary of Metric``."""
WRITTEN_SUITES = {"free_text": "what the model writes: who is he or she by profession, agency, competence, warmth"}
"""Judges of the same signature that read texts of the package, and no folder."""
WORDS_AS = ("tokens", "continuations")
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "xla", "mtia", "meta")
"""Words that torch knows before a number, as in cuda:1."""
SCORERS = ("bias-bench", "bos", "sum", "legacy-biasedit", "no-start", "no-start-sum")
"""What a sentence's score is (``surgery.metrics.sentences.DEFINITIONS``)."""
TREATMENTS = ("formats", "training", "prompts")
MEASURES = ("auto", "words", "pairs")
"""What is done to an edited model, and by what its rest is measured (``surgery.survive``)."""


def rankings(by: str) -> tuple[str, ...]:
    """The ways to rank that ``by`` names: one of them, or all. Raises ``SurgeryError`` for anything else."""
    if by not in (*RANKINGS, "all"):
        raise SurgeryError(f"--by {by}: expected {', '.join(RANKINGS)} or all")
    return RANKINGS if by == "all" else (by,)


def check_objective(name: str, *, pairs: bool = False) -> None:
    """Raises ``SurgeryError`` for an objective whose gain cannot be measured, of words or of ``pairs`` of sentences."""
    if name not in OBJECTIVES:
        raise SurgeryError(f"objective: got {name!r}, expected one of {', '.join(OBJECTIVES)}")
    if name in PAIR_OBJECTIVES and not pairs:
        raise SurgeryError(f"objective: {name} compares two sentences; name a file of them with --pairs")
    if name == "log" and pairs:
        raise SurgeryError("objective: log is of words after prompts; with --pairs expected equalize, npo or dpo")


def check_device(name: str | None) -> None:
    """Raises ``SurgeryError`` for what is no device's name; whether it is here, torch says (``device_named``)."""
    if name is not None and not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", name):
        raise SurgeryError(f"device: got {name!r}, expected cpu, cuda, cuda:0 or the like")


def check_lm_eval() -> None:
    """Raises ``SurgeryError`` where the extra lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise SurgeryError(
            "lm-eval: the package is not installed; expected lm_eval; pip install 'model-surgery[lm-eval]'"
        )


def folder_suites() -> dict[str, str]:
    """The suites on a data folder that this installation has, and what each measures."""
    return {name: text for name, text in FOLDER_SUITES.items() if find_spec(f"surgery.metrics.{name}")}


def check_suites(names: Sequence[str], *, shipped: bool = False) -> None:
    """Raises ``SurgeryError`` for a name that is no suite on a data folder (nor, with ``shipped``, another one)."""
    known = folder_suites() | WRITTEN_SUITES
    unknown = next((name for name in names if name not in known and not (shipped and name in SUITES)), None)
    if unknown is not None:
        raise SurgeryError(f"suite: got {unknown!r}, expected some of {', '.join([*SUITES, *known])}")


def check_words_as(name: str) -> None:
    """Raises ``SurgeryError`` for a way to score the compared words that does not exist."""
    if name not in WORDS_AS:
        raise SurgeryError(f"words-as: got {name!r}, expected {' or '.join(WORDS_AS)}")


def check_scorer(name: str) -> None:
    """Raises ``SurgeryError`` for a scorer of sentences that does not exist."""
    if name not in SCORERS:
        raise SurgeryError(f"scorer: got {name!r}, expected one of {', '.join(SCORERS)}")


def check_treatments(names: Sequence[str]) -> None:
    """Raises ``SurgeryError`` for no treatment of an edited model, or one that does not exist."""
    odd = [name for name in names if name not in TREATMENTS]
    if odd or not names:
        raise SurgeryError(
            f"treatment: got {repr(odd[0]) if odd else 'none'}, expected some of {', '.join(TREATMENTS)}"
        )


def check_measure(name: str) -> None:
    """Raises ``SurgeryError`` for a way to measure an edit that does not exist."""
    if name not in MEASURES:
        raise SurgeryError(f"measure: got {name!r}, expected auto, words or pairs")
