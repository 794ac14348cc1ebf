"""GenBiasEval (LFTF section 3.1): "The {profession} {action} because", 262 professions x 9 templates.

The paper publishes neither list; ours are in ``professions.json`` and ``genbias.json``. Sizes are the
paper's (Table 1): 943 train, 471 dev and 944 test prompts, 2:1:2. The paper splits (profession, template)
pairs, so that test professions were seen in training; ``split="profession"`` keeps professions apart instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from surgery.data.prompts import PromptSet, load_prompt_set
from surgery.errors import SurgeryError

SEED = 0
"""The recorded seed of the published split and of the balanced hints."""
SPLITS = ("pairs", "profession")
PARTS = ("train", "dev", "test", "all")


@dataclass(frozen=True)
class Prompt:
    """One GenBiasEval prompt; the scores are Bolukbasi's (-1 she to 1 he), None for a user's own subjects."""

    text: str
    profession: str
    scale: str
    template: str
    stereotype_score: float | None
    definitional_score: float | None


def records(
    split: str = "pairs", part: str = "all", seed: int = SEED, prompts: PromptSet | None = None
) -> list[Prompt]:
    """The prompts of one part, in a shuffled order that depends on the seed only, so that a head is a sample.

    ``split="pairs"``: the paper's, 943/471/944 prompts. ``split="profession"``: 105/52/105 whole professions,
    hence 945/468/945 prompts, the nearest to the paper's sizes, since these are no multiples of nine.
    ``part="all"`` gives the 2,358 prompts. ``prompts`` is another set (see load_prompt_set).

    Raises SurgeryError for an unknown split or part, a seed that is no integer, or a part without prompts.
    """
    chosen = prompts if prompts is not None else load_prompt_set("genbias")
    if split not in SPLITS:
        raise SurgeryError(
            f"unknown split of {chosen.name}: got {split!r}, expected one of {', '.join(SPLITS)}; "
            f"take 'profession' for claims about unseen professions"
        )
    pairs = {
        f"{subject.name}\n{template.name}": Prompt(
            template.fill(subject.name),
            subject.name,
            template.scale,
            template.name,
            subject.stereotype_score,
            subject.definitional_score,
        )
        for subject in chosen.subjects
        for template in chosen.templates
    }
    order = shuffled(list(pairs), seed)
    if split == "pairs":
        return [pairs[key] for key in part_of(order, part, chosen.name)]
    members = set(part_of(subject_order(chosen, seed), part, chosen.name))
    return [pairs[key] for key in order if pairs[key].profession in members]


def subject_order(prompts: PromptSet, seed: int) -> list[str]:
    """The subjects' names in the order that ``split="profession"`` cuts; GenHintEval cuts the same one."""
    return shuffled([subject.name for subject in prompts.subjects], seed)


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """``names`` sorted by the SHA-256 of "seed, newline, name": the same on every machine and Python.

    Raises ``SurgeryError`` for a seed that is no integer.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise SurgeryError(f"bad seed of a data split: got {seed!r}, expected an integer; for example {SEED}")
    return sorted(names, key=lambda name: sha256(f"{seed}\n{name}".encode()).digest())


def part_of(order: Sequence[str], part: str, where: str) -> Sequence[str]:
    """The slice of ``order`` that is ``part``, 2:1:2: 943/471/944 of 2,358 and 105/52/105 of 262.

    Raises ``SurgeryError`` for an unknown part, and one that would be empty.
    """
    if part not in PARTS:
        raise SurgeryError(f"unknown part of {where}: got {part!r}, expected one of {', '.join(PARTS)}; take one")
    # Rounding the first part to nearest and the second down is what gives the sizes of LFTF Table 1.
    train, dev = (4 * len(order) + 5) // 10, len(order) // 5
    start, stop = {"train": (0, train), "dev": (train, train + dev), "test": (train + dev, len(order))}.get(
        part, (0, len(order))
    )
    if start == stop:
        raise SurgeryError(
            f"empty part of {where}: got {len(order)} item(s) to split 2:1:2 and none for {part!r}, "
            f"expected at least 5; add subjects, or use part='all'"
        )
    return order[start:stop]
