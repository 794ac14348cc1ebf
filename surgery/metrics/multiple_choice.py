"""One multiple-choice scorer: the log-likelihood of every option's text after its question's prompt.

Conventions are those of lm-eval (``HFLM._encode_pair``, ``ConfigurableTask.process_results``): white space at the end
of the prompt belongs to the option; the tokens of an option are those of prompt + option after as many as the prompt
alone has; ``sum`` is lm-eval's ``acc`` (largest summed log-likelihood), ``characters`` its ``acc_norm`` (that sum over
the option's number of characters, without the white space before it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit
from hooks.conversations import chat
from hooks.tokens import ids_of, text_tokens
from surgery.data.capability import Question
from surgery.errors import SurgeryError
from surgery.forward.token_logprobs import summed, token_log_probabilities
from surgery.metrics.metric import Metric, mean_metric
from surgery.processes import together
from surgery.progress import Advance, in_proportion

Norm = Literal["sum", "characters"]
Tokens = tuple[int, ...]
TREE = 512  # tokens run in one row: prompts are longer than the sentences of the default


@dataclass(frozen=True)
class Scores:
    """Summed log-likelihood (nats) of each option, one array a question; whether its prompt was cut to fit."""

    questions: tuple[Question, ...]
    sums: tuple[Float[np.ndarray, " options"], ...]
    cut: tuple[bool, ...]

    def part(self, first: int, behind: int) -> "Scores":
        """Those of the questions from ``first`` to before ``behind``."""
        return Scores(self.questions[first:behind], self.sums[first:behind], self.cut[first:behind])

    def normed(self, norm: Norm) -> list[Float[np.ndarray, " options"]]:
        """The scores that are compared: ``sum``, or ``characters``: divided by the option's length as stripped."""
        if norm == "sum":
            return list(self.sums)
        lengths = [np.array([len(option.strip()) for option in q.options]) for q in self.questions]
        return [sums / length for sums, length in zip(self.sums, lengths, strict=True)]

    def chosen(self, norm: Norm) -> Int[np.ndarray, " questions"]:
        """The place of the best option of each question, the first among equals."""
        return np.array([int(scores.argmax()) for scores in self.normed(norm)])


@dataclass(frozen=True)
class _Encoded:
    """Token ids of prompt + option for each option, where the options' tokens start, whether it was cut."""

    options: tuple[Tokens, ...]
    start: int
    cut: bool


def accuracy(scores: Scores, norm: Norm, *, data: str) -> Metric:
    """Share of questions whose right option scores best; the scorer's name says which score is compared."""
    right = scores.chosen(norm) == np.array([question.answer for question in scores.questions])
    return mean_metric(
        right.astype(float),
        scorer=f"accuracy, option of the largest log-likelihood ({SCORERS[norm]})",
        data=data + (f", {sum(scores.cut)} prompts cut on the left to fit" if any(scores.cut) else ""),
        ideal=1.0,
        direction="higher",
    )


SCORERS = {"sum": "sum over its tokens, lm-eval acc", "characters": "per character, lm-eval acc_norm"}


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    chat: bool = False,
    share: bool = True,
    step: Advance | None = None,
) -> Scores:
    """Summed log-likelihood of every option of every question; ``step`` is told of finished questions.

    What options, and questions after one context, begin alike is run once (``surgery.forward.token_logprobs``), where
    the model takes that and with ``share``; else each option is a sequence of its own. ``chat`` puts each prompt into
    the tokenizer's chat template, as the user's turn; the option then begins the answer.
    A prompt too long for the model is cut on the left, as lm-eval does, and counted.

    Raises ``SurgeryError`` for a blank prompt or option, an answer out of range, an option longer than the context, or
    scores that are not finite, and for ``chat`` where the tokenizer has no template.
    """
    if not questions:
        raise SurgeryError("multiple choice: got no question, expected at least 1; check the file and the limit")
    if chat and not tokenizer.chat_template:
        raise SurgeryError(
            f"multiple choice: the tokenizer {tokenizer.name_or_path} has no chat template; expected one; chat=False"
        )
    asked = _encode(model, tokenizer, questions, chat)
    owners = [row for row, each in enumerate(asked) for _ in each.options]
    logs = token_log_probabilities(
        model,
        [ids for each in asked for ids in each.options],
        starts=[asked[row].start for row in owners],
        size=TREE,
        share=share,
        step=step and in_proportion(step, len(owners), len(questions)),
    )
    flat, ends = summed(logs), np.cumsum([len(each.options) for each in asked]).tolist()
    sums = tuple(flat[end - len(each.options) : end] for each, end in zip(asked, ends, strict=True))
    return Scores(tuple(questions), sums, tuple(each.cut for each in asked))


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], chat: bool
) -> list[_Encoded]:
    limit = context_limit(model)
    for row, question in enumerate(questions):
        if not question.prompt.strip() or not all(option.strip() for option in question.options):
            raise SurgeryError(f"question {row} ({question.prompt[:40]!r}): a blank prompt or option; remove it")
        if not 0 <= question.answer < len(question.options):
            raise SurgeryError(f"question {row}: answer {question.answer} of {len(question.options)} options; mend it")
    found = []
    for row, (start, stem, tails) in enumerate(together(questions, partial(_tokens, tokenizer, chat))):
        options = [stem + tail for tail in tails]
        # A token may reach over the boundary; as in lm-eval the option is what stands after the prompt's own count.
        if any(len(option) <= start for option in options):
            raise SurgeryError(
                f"question {row} ({questions[row].prompt[-40:]!r}): an option adds no token; begin it with a space"
            )
        longest = max(map(len, options))
        excess = max(0, longest - limit) if limit is not None else 0
        if excess >= start:
            raise SurgeryError(f"question {row}: an option alone has {longest - start} tokens, the model takes {limit}")
        found.append(_Encoded(tuple(option[excess:] for option in options), start - excess, excess > 0))
    return found


def _tokens(
    tokenizer: PreTrainedTokenizerBase, with_template: bool, questions: Sequence[Question]
) -> list[tuple[int, Tokens, list[Tokens]]]:
    """How many tokens each prompt has; those with which prompt + option begins for every option, and how each goes on.

    So a beginning is sent once to the other processes.
    """
    texts: list[str] = []
    for question in questions:
        prompt = chat(tokenizer, question.prompt) if with_template else question.prompt
        # Behind a chat template white space is part of the template.
        texts += [prompt if with_template else prompt.rstrip(), *(prompt + option for option in question.options)]
    ids = iter((ids_of if with_template else text_tokens)(tokenizer, texts))
    found = []
    for question in questions:
        start, options = len(next(ids)), [next(ids) for _ in question.options]
        stem = options[0][:start]
        if any(option[:start] != stem for option in options):  # a token reaches over the boundary
            stem = ()
        found.append((start, stem, [option[len(stem) :] for option in options]))
    return found
