"""Steering by cross-validation: every term of the training source is scored by a training that never saw it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from recipes.bias_unlearn.measuring import scores_of
from recipes.bias_unlearn.settings import Settings
from recipes.bias_unlearn.training import train
from surgery.data.pairs import folds, of_triples
from surgery.data.stereoset import Triple, Triples
from surgery.edits.unlearning import Dataset, Scores
from surgery.metrics.stereoset import TripleScores, score, triple_scores
from surgery.metrics.suite import plain
from surgery.operation import Operation
from surgery.training import Log

Table = dict[str, Any]


def parts_of(rows: tuple[Triple, ...], settings: Settings) -> list[list[int]]:
    """The rows in ``settings.folds`` parts with no target term in two; raises ``SurgeryError`` where terms are few."""
    purpose = "to steer by folds; lower folds, or use steer=part"
    return folds(of_triples(rows), settings.folds, seed=settings.seed, least=settings.folds, purpose=purpose)


def cross_validate(
    op: Operation, tokenizer: PreTrainedTokenizerBase, given: Dataset, settings: Settings
) -> dict[int, Table]:
    """SS, LMS, ICAT and margin of all training triples at each evaluation, by ``step``; 0 is the untouched model.

    Each fold is scored by a training on the others that goes its own way: its own fold decides what it swaps, and it
    never stops early. A fold is one step of the run: an interrupted one begins anew.
    """
    rows, parts = given.train, parts_of(given.train, settings)
    scored: dict[int, list[Any]] = {}
    for number, part in enumerate(parts):
        one = partial(_fold, op, tokenizer, given, settings, part, f"fold {number + 1} of {len(parts)}")
        for step, values in op.once(f"fold-{number}", one).items():
            whole = scored.setdefault(int(step), [None] * len(rows))
            for place, value in zip(part, values, strict=True):
                whole[place] = value
    name = f"{given.watched.name}, each term unseen in training"
    return {step: _table(rows, np.array(values), settings.scorer, name) for step, values in sorted(scored.items())}


def _fold(
    op: Operation,
    tokenizer: PreTrainedTokenizerBase,
    given: Dataset,
    settings: Settings,
    part: list[int],
    name: str,
) -> dict[int, list[list[float]]]:
    left_out = set(part)
    held = Triples(tuple(given.train[place] for place in part), (), name)
    others = tuple(row for place, row in enumerate(given.train) if place not in left_out)
    found: dict[int, list[list[float]]] = {}

    def evaluate(step: int) -> Scores:
        found[step] = _scored(op, tokenizer, held, settings.scorer)
        return scores_of(_table(held.rows, np.array(found[step]), settings.scorer, name))

    log: Log = lambda row: op.folder.log({"edit": name, **row})  # noqa: E731
    with op.progress.work(f"train {name}", settings.steps) as step:
        evaluate(0)
        fold = replace(given, train=others, watched=held)
        free = settings.model_copy(update={"early_stop": False})
        train(op, tokenizer, fold, free, evaluate, {"state": None, "log": log, "step_done": step})
    return found


def _scored(op: Operation, tokenizer: PreTrainedTokenizerBase, triples: Triples, scorer: str) -> list[list[float]]:
    values = triple_scores(op.model, tokenizer, triples, scorer=scorer)
    return [[float(f"{value:.7g}") for value in row] for row in np.concatenate(values, axis=1).tolist()]


def _table(rows: tuple[Triple, ...], values: np.ndarray, scorer: str, name: str) -> Table:
    found = TripleScores(*np.split(values, 3, axis=1))
    given = Triples(rows, (), name)
    return score(given, found.main, data=name, scorer=scorer, related=found.related, margins=found.margins)


def steering(found: Mapping[int, Table]) -> dict[int, Scores]:
    """What steers the training on all terms: at each step the scores that folds gave."""
    return {step: scores_of(table) for step, table in found.items()}


def unseen(table: Table) -> dict[str, Any]:
    """The scores of one step as a development set's, for JSON."""
    return {"stereoset": plain(table)}
