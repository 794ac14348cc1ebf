"""Cloze accuracy on T-REx facts: whether the true object is likelier than others of its relation.

BIAS DIFF's T-Rex score asks a chat model for the missing words of sentences that are not public, and does not say
how an answer is matched. Here the object competes with other objects of the same relation (a typed query, Kassner et
al. 2021), by summed log-likelihood: that needs no instruction following, has a known chance level, works for objects
of several tokens, and is steadier on a small model than whether greedy decoding hits the words exactly.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.data.capability import Question
from surgery.data.facts import Facts, load
from surgery.data.rows import sample
from surgery.errors import SurgeryError
from surgery.metrics.metric import mean_metric
from surgery.metrics.multiple_choice import score
from surgery.progress import Advance


def questions(facts: Facts, *, choices: int = 10, limit: int = 0, seed: int = 0) -> list[Question]:
    """Each fact as a question of its object and ``choices - 1`` other objects of its relation (all, where fewer).

    The others are drawn with ``seed`` among the relation's objects, without those that are true of the same subject
    too; the object's place is drawn as well. A fact without any other object is left out. ``limit`` facts over the
    relations in proportion, 0 is all.

    Raises ``SurgeryError`` for fewer than two choices.
    """
    if choices < 2:
        raise SurgeryError(f"cloze choices: got {choices}, expected at least 2")
    objects: dict[str, dict[str, None]] = defaultdict(dict)  # in order, each once
    true: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in facts.rows:
        objects[fact.relation][fact.object] = None
        true[fact.relation, fact.subject].add(fact.object)
    lists = {relation: list(found) for relation, found in objects.items()}
    found: list[Question] = []
    for fact in sample(facts.rows, limit, seed, lambda fact: fact.relation):
        generator = np.random.default_rng([seed, len(found)])
        known = true[fact.relation, fact.subject]
        others = [text for text in lists[fact.relation] if text not in known]
        if not others:
            continue
        drawn = generator.choice(len(others), size=min(choices - 1, len(others)), replace=False)
        options = [others[place] for place in drawn]
        answer = int(generator.integers(len(options) + 1))
        options.insert(answer, fact.object)
        found.append(Question(fact.prompt, tuple(f" {text}" for text in options), answer))
    return found


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    limit: int = 0,
    seed: int = 0,
    step: Advance | None = None,
    choices: int = 10,
) -> dict[str, Any]:
    """``{"accuracy": Metric}``: share of facts whose object is likelier than its rivals (``questions``).

    The metric's data says the chance level, and which relations have no pattern that ends in the object.
    """
    facts = load(folder)
    asked = questions(facts, choices=choices, limit=limit, seed=seed)
    scores = score(model, tokenizer, asked, step=step)
    right = scores.chosen("sum") == np.array([question.answer for question in asked])
    chance = float(np.mean([1 / len(question.options) for question in asked]))
    skipped = f"; {facts.skipped} facts of {', '.join(facts.relations_skipped)} skipped, no pattern ends in the object"
    return {
        "accuracy": mean_metric(
            right.astype(float),
            scorer=f"object likelier than up to {choices - 1} others of its relation (summed log-likelihood), "
            f"chance {chance:.3f}",
            data=f"T-REx facts by ParaRel patterns, {len(asked)} of {len(facts.rows)}, seed {seed}"
            + (skipped if facts.skipped else ""),
            ideal=1.0,
            direction="higher",
        )
    }
