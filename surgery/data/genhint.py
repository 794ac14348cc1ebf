"""GenHintEval (LFTF section 3.2): 262 professions x 3 templates whose hint (his, her) settles the pronoun.

The paper does not say how hints are dealt out. A model that always says "he" must score 0 on UB-Score, so
hints are balanced here: 393 prompts with his and 393 with her, 131 and 131 for each template.
"""

from dataclasses import dataclass

from surgery.data.genbias import SEED, part_of, subject_order
from surgery.data.prompts import PromptSet, load_prompt_set
from surgery.errors import SurgeryError


@dataclass(frozen=True)
class HintPrompt:
    """One GenHintEval prompt; ``hint`` indexes the word set's words and hints: 0 is he/his, 1 is she/her."""

    text: str
    profession: str
    template: str
    hint: int
    hint_word: str
    expected: str


def records(
    part: str = "all", seed: int = SEED, both: bool = False, prompts: PromptSet | None = None
) -> list[HintPrompt]:
    """Each profession with each hint template once (786 prompts), hints balanced, or with every hint (1,572).

    ``part`` cuts by profession exactly as ``genbias.records(split="profession")`` does with the same seed, so
    that the hint prompts of "test" are about professions unseen in its training part; a prompt has the same
    hint in every part. In a part with an odd number of professions the hints of a template differ by one.
    With k words the hints go round: 0, 1, .., k-1, 0, ...

    Raises SurgeryError for an unknown part, an empty part, a bad seed, or a prompt set without hints.
    """
    chosen = prompts if prompts is not None else load_prompt_set("genbias")
    words, hints = chosen.words.words, chosen.words.hints
    if not chosen.hint_templates or not hints:
        raise SurgeryError(
            f"no hints in the prompt set {chosen.name}: got {len(chosen.hint_templates)} hint templates and "
            f"hints {hints}, expected at least one template and a hint per word; add hint_templates and hints"
        )
    order = subject_order(chosen, seed)
    members = set(part_of(order, part, chosen.name))
    return [
        HintPrompt(template.fill(name, hints[hint]), name, template.name, hint, hints[hint], words[hint])
        for place, name in enumerate(order)
        if name in members
        for column, template in enumerate(chosen.hint_templates)
        # The order of names is random already, so going round deals each template its hints evenly.
        for hint in (range(len(words)) if both else [(place + column) % len(words)])
    ]
