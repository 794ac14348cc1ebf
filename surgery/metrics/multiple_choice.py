"""One multiple-choice scorer: the log-likelihood of every option's text after its question's prompt.

Conventions are those of lm-eval (``HFLM._encode_pair``, ``ConfigurableTask.process_results``): white space at the end
of the prompt belongs to the option; the tokens of an option are those of prompt + option after as many as the prompt
alone has; ``sum`` is lm-eval's ``acc`` (largest summed log-likelihood), ``characters`` its ``acc_norm`` (that sum over
the option's number of characters, without the white space before it).
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit, remembered
from hooks.errors import Note
from hooks.tokens import ids_of, text_tokens
from hooks.wider import errs_more
from surgery.data.capability import Question
from surgery.errors import SurgeryError
from surgery.forward.batching import batches_for, pad
from surgery.forward.evaluation import evaluating
from surgery.forward.residual_cache import shortcut
from surgery.metrics.metric import Metric, mean_metric
from surgery.progress import Advance

Norm = Literal["sum", "characters"]
Finish = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Scores:
    """Summed log-likelihood (nats) of each option, one array a question; how many prompts were cut to fit."""

    questions: tuple[Question, ...]
    sums: tuple[Float[np.ndarray, " options"], ...]
    cut: int

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
    """Token ids of prompt + option for each option, where the options' tokens start, how many tokens all share."""

    options: tuple[tuple[int, ...], ...]
    start: int
    shared: int
    cut: bool


def accuracy(scores: Scores, norm: Norm, *, data: str) -> Metric:
    """Share of questions whose right option scores best; the scorer's name says which score is compared."""
    right = scores.chosen(norm) == np.array([question.answer for question in scores.questions])
    return mean_metric(
        right.astype(float),
        scorer=f"accuracy, option of the largest log-likelihood ({SCORERS[norm]})",
        data=data + (f", {scores.cut} prompts cut on the left to fit" if scores.cut else ""),
        ideal=1.0,
        direction="higher",
    )


SCORERS = {"sum": "sum over its tokens, lm-eval acc", "characters": "per character, lm-eval acc_norm"}


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    special: bool = True,
    share: bool = True,
    step: Advance | None = None,
) -> Scores:
    """Summed log-likelihood of every option of every question; ``step`` is told of finished questions.

    Options of one token cost one pass over the prompt, with one position through the head. Longer options start from
    the cached keys and values of the tokens that all of them share, where the model keeps such a cache (``share``),
    else each option is a sequence of its own. ``special=False`` where the prompts hold their special tokens already
    (a chat template); they are then taken with the white space at their end. A prompt too long for the model is cut
    on the left, as lm-eval does, and counted.

    Raises ``SurgeryError`` for a blank prompt or option, an answer out of range, an option longer than the context, or
    scores that are not finite.
    """
    if not questions:
        raise SurgeryError("multiple choice: got no question, expected at least 1; check the file and the limit")
    encoded = _encode(model, tokenizer, questions, special)
    sums = [np.full(len(question.options), np.nan) for question in questions]
    single: list[int] = []
    several: list[int] = []
    for row, each in enumerate(encoded):
        one = each.shared == each.start and all(len(ids) == each.start + 1 for ids in each.options)
        (single if one else several).append(row)
    finish = partial(_finish, sums, step)
    with evaluating(model):
        _single(model, encoded, single, finish)
        cached = [row for row in several if share and encoded[row].shared > 1]
        cached = cached if _trusts_cache(model, encoded, cached) else []
        _cached(model, encoded, cached, finish)
        _whole(model, encoded, [row for row in several if row not in set(cached)], finish)
    for row, values in enumerate(sums):
        if not np.isfinite(values).all():
            raise SurgeryError(
                f"{type(model).__name__}: options of question {row} ({questions[row].prompt[:40]!r}...) have scores "
                f"{values.tolist()}; expected finite numbers; the weights or the dtype are broken, try float32"
            )
    return Scores(tuple(questions), tuple(sums), sum(each.cut for each in encoded))


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], special: bool
) -> list[_Encoded]:
    limit = context_limit(model)
    texts: list[str] = []
    for row, question in enumerate(questions):
        if not question.prompt.strip() or not all(option.strip() for option in question.options):
            raise SurgeryError(f"question {row} ({question.prompt[:40]!r}): a blank prompt or option; remove it")
        if not 0 <= question.answer < len(question.options):
            raise SurgeryError(f"question {row}: answer {question.answer} of {len(question.options)} options; mend it")
        # Behind a chat template white space is part of the template.
        stripped = question.prompt.rstrip() if special else question.prompt
        texts += [stripped, *(question.prompt + option for option in question.options)]
    ids = iter(text_tokens(tokenizer, texts) if special else ids_of(tokenizer, texts))
    found = []
    for row, question in enumerate(questions):
        start = len(next(ids))
        options = [next(ids) for _ in question.options]
        # A token may reach over the boundary; as in lm-eval the option is what stands after the prompt's own count.
        if any(len(option) <= start for option in options):
            raise SurgeryError(
                f"question {row} ({question.prompt[-40:]!r}): an option adds no token; begin it with a space"
            )
        longest = max(map(len, options))
        excess = max(0, longest - limit) if limit is not None else 0
        if excess >= start:
            raise SurgeryError(f"question {row}: an option alone has {longest - start} tokens, the model takes {limit}")
        options = [option[excess:] for option in options]
        start -= excess
        shared = next((at for at in range(start) if len({option[at] for option in options}) > 1), start)
        found.append(_Encoded(tuple(options), start, shared, excess > 0))
    return found


def _finish(sums: list[np.ndarray], step: Advance | None, row: int, option: int, value: Tensor) -> None:
    sums[row][option] = float(value)
    if step and option == len(sums[row]) - 1:
        step(1)


def _budget(model: PreTrainedModel) -> tuple[int, int]:
    """Tokens a batch, and tokens a batch whose logits are all held (256 MB in float32 on a CPU, 2 GB elsewhere)."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    small = model.device.type == "cpu"
    return (2048, max(1, 2**26 // vocabulary)) if small else (16384, max(1, 2**29 // vocabulary))


def _single(model: PreTrainedModel, encoded: Sequence[_Encoded], chosen: Sequence[int], finish: Finish) -> None:
    """Options of one token each: the next token after the prompt."""
    prompts = [encoded[row].options[0][: encoded[row].shared] for row in chosen]
    with shortcut(model) as run:
        for rows in batches_for(model, prompts, tokens=_budget(model)[0]):
            logs = run(pad(prompts, rows, model.device)).float().log_softmax(-1)
            for place, row in enumerate(rows):
                last = [ids[-1] for ids in encoded[chosen[row]].options]
                for option, value in enumerate(logs[place, last].cpu()):
                    finish(chosen[row], option, value)


def _cached(model: PreTrainedModel, encoded: Sequence[_Encoded], chosen: Sequence[int], finish: Finish) -> None:
    """The shared tokens once a question; then all options of a batch of questions from the cached keys and values.

    Only prompts of equal length stand together, so that nothing is padded between a prompt and its options.
    """
    kept = [_kept(encoded[row]) for row in chosen]
    prompts = [encoded[row].options[0][:at] for row, at in zip(chosen, kept, strict=True)]
    tails = [[ids[at:] for ids in encoded[row].options] for row, at in zip(chosen, kept, strict=True)]
    tokens, full = _budget(model)
    # A model whose head always sees all positions is given smaller batches.
    keep: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}
    for group in batches_for(model, prompts, tokens=tokens if keep else min(tokens, full), equal=True):
        for rows in _split(group, tails, full):
            batch = pad(prompts, rows, model.device)
            cache = model(**batch.inputs(), use_cache=True, **keep).past_key_values
            if not isinstance(cache, DynamicCache):
                _whole(model, encoded, [chosen[row] for row in rows], finish)
                continue
            owners = [place for place, row in enumerate(rows) for _ in tails[row]]
            cache.batch_select_indices(torch.tensor(owners, device=model.device))
            sequences = [tail for row in rows for tail in tails[row]]
            given = pad(sequences, range(len(sequences)), model.device)
            mask = torch.cat([batch.mask[owners], given.mask[:, :-1]], dim=1)
            logits = model(
                input_ids=given.ids[:, :-1], attention_mask=mask, past_key_values=cache, use_cache=True
            ).logits
            places = iter(_log_likelihoods(logits, given.ids[:, 1:]))
            for row in rows:
                first = encoded[chosen[row]].start - kept[row] - 1
                for option, tail in enumerate(tails[row]):
                    finish(chosen[row], option, next(places)[first : len(tail) - 1].sum())


def _kept(one: _Encoded) -> int:
    """How many of the shared tokens go into the cache: a multiple of 8, so that more prompts are of equal length.

    At least one stays with the options, so that their first token's logits come from the same pass.
    """
    most = one.shared - 1
    return most if most < 8 else most // 8 * 8


def _trusts_cache(model: PreTrainedModel, encoded: Sequence[_Encoded], chosen: Sequence[int]) -> bool:
    """Whether options after a cached prompt score as whole sequences do; two short questions show it, once a model."""

    def find() -> str | None:
        few = sorted(chosen, key=lambda row: max(map(len, encoded[row].options)))[:2]

        def by(way: Callable[..., None]) -> list[Tensor]:
            found = [np.full(len(each.options), np.nan) for each in encoded]
            way(model, encoded, few, partial(_finish, found, None))
            return [torch.from_numpy(found[row]) for row in few]

        try:
            return errs_more(by(_cached), by(_whole), lambda: by(_whole), model.dtype)
        except Exception as error:  # an unknown kind of cache may break anywhere; every option is run whole
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]

    if not chosen or model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return False
    reason: str | None = remembered(model, "cache", find)
    if reason:
        warnings.warn(f"{type(model).__name__}: every option runs with its whole prompt: {reason}", Note, stacklevel=3)
    return reason is None


def _split(rows: Sequence[int], tails: Sequence[Sequence[Sequence[int]]], tokens: int) -> list[list[int]]:
    """``rows`` in batches whose options take at most ``tokens`` tokens with padding (at least one row)."""
    batches: list[list[int]] = []
    count = width = 0
    for row in rows:
        wider = max(width, *map(len, tails[row]))
        if batches and (count + len(tails[row])) * wider <= tokens:
            batches[-1].append(row)
            count, width = count + len(tails[row]), wider
        else:
            batches.append([row])
            count, width = len(tails[row]), max(map(len, tails[row]))
    return batches


def _whole(model: PreTrainedModel, encoded: Sequence[_Encoded], chosen: Sequence[int], finish: Finish) -> None:
    """Every option as a sequence of its own."""
    owners = [(row, option) for row in chosen for option in range(len(encoded[row].options))]
    ids = [encoded[row].options[option] for row, option in owners]
    with shortcut(model, last=False) as run:
        for rows in batches_for(model, ids, tokens=_budget(model)[1]):
            batch = pad(ids, rows, model.device)
            logs = _log_likelihoods(run(batch)[:, :-1], batch.ids[:, 1:])
            for place, row in enumerate(rows):
                question, option = owners[row]
                finish(question, option, logs[place, encoded[question].start - 1 : len(ids[row]) - 1].sum())


def _log_likelihoods(logits: Float[Tensor, "batch pos vocab"], targets: Int[Tensor, "batch pos"]) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)).double().cpu()


def _parameters(model: PreTrainedModel) -> Sequence[str]:
    return list(inspect.signature(type(model).forward).parameters)
