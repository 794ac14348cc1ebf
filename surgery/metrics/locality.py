"""What an edit of the compared words did where it had no business: their mass, the wrong pronoun, and KL.

Every number is of the next token after the prompts of ``surgery.data.locality``. None has an ideal of its own but the
value before the edit, so each is read beside the untouched model's; differences are paired (``metric.difference``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from surgery.data.locality import PRONOUNS, SETS, Row
from surgery.metrics.metric import Metric, mean_metric
from surgery.processes import gathered, joined

TOP = 256
"""Tokens kept of the untouched model's distribution; KL of these and the rest as one is at most the whole KL."""


@dataclass(frozen=True)
class Reference:
    """The untouched model's next-token distributions: its likeliest tokens, and their logs with the rest's behind."""

    tokens: Int[Tensor, "prompts k"]
    logs: Float[Tensor, "prompts k+1"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"tokens": self.tokens.tolist(), "logs": self.logs.tolist()}

    @staticmethod
    def of(fields: Mapping[str, Any]) -> "Reference":
        """What ``to_dict`` wrote."""
        return Reference(torch.tensor(fields["tokens"]), torch.tensor(fields["logs"]))


class Distributions:
    """Takes the log-probabilities of batches of prompts, and keeps them small: as a reference, or their KL to one."""

    def __init__(self, count: int, reference: Reference | None = None) -> None:
        self.reference = reference
        self.rows: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * count
        self.kl = np.zeros(count)

    def __call__(self, rows: Sequence[int], logs: Float[Tensor, "batch vocab"]) -> None:
        """Take one batch, the prompts ``rows``."""
        if self.reference is None:
            kept, tokens = logs.topk(min(TOP, logs.shape[-1]))
            whole = torch.cat([kept, _rest(kept)], -1).cpu()
            for row, *pair in zip(rows, tokens.cpu(), whole, strict=True):
                self.rows[row] = (pair[0], pair[1])
            return
        tokens = self.reference.tokens[list(rows)].to(logs.device)
        target = self.reference.logs[list(rows)].to(logs.device)
        mine = logs.gather(1, tokens)
        whole = torch.cat([mine, _rest(mine)], -1)
        if tokens.shape[1] == logs.shape[1]:  # every token is kept, there is no rest
            target, whole = target[:, :-1], mine
        self.kl[list(rows)] = (target.exp() * (target - whole)).sum(-1).clamp(min=0).double().cpu().numpy()

    def join(self) -> None:
        """Take over what other processes were given."""
        self.kl = joined(self.kl)
        own = {row: pair for row, pair in enumerate(self.rows) if len(pair[0])}
        for others in gathered(own):
            for row, pair in others.items():
                self.rows[row] = pair

    def made(self) -> Reference:
        """The reference that the batches were; the given one where there was one."""
        if self.reference is not None:
            return self.reference
        return Reference(torch.stack([row[0] for row in self.rows]), torch.stack([row[1] for row in self.rows]))


def _rest(logs: Float[Tensor, "batch k"]) -> Float[Tensor, "batch 1"]:
    eps = torch.finfo(logs.dtype).eps
    return torch.log1p(-logs.exp().sum(-1, keepdim=True).clamp(max=1 - eps))


def score(
    probabilities: Float[np.ndarray, "prompts words"],
    pronouns: Float[np.ndarray, "prompts pronouns"],
    rows: Sequence[Row],
    *,
    words: Sequence[str],
    data: str,
    kl: Float[np.ndarray, " prompts"] | None = None,
) -> dict[str, dict[str, Metric]]:
    """``{set: {"mass" | "wrong" | "right" | "kl": Metric}}`` for each set that has rows, intervals over its subjects.

    - mass: sum of P of the compared ``words`` (the columns of ``probabilities``).
    - wrong: sum of P of those of he and she that do not fit; right: P of the pronoun that fits (columns ``PRONOUNS``).
    - kl: KL(untouched || model) in nats, where the untouched model is known.
    """
    at = {word: place for place, word in enumerate(PRONOUNS)}
    columns: dict[str, tuple[np.ndarray, str, str]] = {
        "mass": (probabilities.sum(axis=1), f"mean {' + '.join(f'P({word})' for word in words)}", "same"),
        "wrong": (
            np.array(
                [sum(chances[at[word]] for word in row.wrong) for chances, row in zip(pronouns, rows, strict=True)]
            ),
            "mean P of he, she where they do not fit",
            "lower",
        ),
        "right": (
            np.array([chances[at[row.right]] for chances, row in zip(pronouns, rows, strict=True)]),
            "mean P of the pronoun that fits",
            "same",
        ),
    }
    if kl is not None:
        columns["kl"] = (kl, f"mean KL(untouched || model), nats, its {TOP} likeliest tokens and the rest", "lower")
    kinds = np.array([row.kind for row in rows])
    subjects = np.array([row.subject for row in rows])
    found: dict[str, dict[str, Metric]] = {}
    for kind in SETS:
        chosen = kinds == kind
        if not chosen.any():  # of fewer rows than there are sets some have none
            continue
        found[kind] = {}
        for name, (values, scorer, direction) in columns.items():
            ideal = 0.0 if direction == "lower" else float(values[chosen].mean())
            found[kind][name] = mean_metric(
                values[chosen],
                groups=subjects[chosen],
                scorer=scorer,
                data=f"{data}, {kind}",
                ideal=ideal,
                direction=direction,
            )
    return found
