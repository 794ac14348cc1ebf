"""Unlearning of selected training texts (BIAS DIFF 2.4): NPO, alone or beside what is to be kept; ascent; the margin.

The model that is given is the warmed-up one, and the reference of NPO: LoRA factors learn beside it, so that the
reference is the model without them. It is left as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from surgery.edits.block import Trained
from surgery.edits.supervised import Lora, Row, evaluate, fit, target_batch
from surgery.edits.unlearning import losses as equations
from surgery.errors import SurgeryError
from surgery.forward.token_logprobs import summed, token_log_probabilities
from surgery.progress import Advance
from surgery.training import After, Log, Plan

KINDS = ("npo", "multi", "ascent", "margin")
MARGIN = 10.0  # squares of tenths of a nat are small beside a mean cross-entropy of some nats
UNITS = ("text", "token")
WATCHED = 96  # selected texts that are asked whether they are back where the original model had them
EVERY = 4  # steps between two such questions
FORMS = ("original", "printed")


@dataclass(frozen=True)
class Forgetting:
    """Which loss a text to forget has.

    npo, "original": -2/beta log sigma(-beta log pi/pi_ref) of each text (Zhang et al. 2024, Eq. 3), "printed": the same
    with 1/beta (Eq. 7). multi adds ``retain`` times the cross-entropy of a text to keep; "printed" is Eq. 8, which
    has no pi_ref, a sigmoid for each token, and sums over tokens (its beta_t are nowhere defined: 1). ascent is the
    log-likelihood itself, which nothing bounds.

    margin is ours: 10 (m - m0)^2, m being the mean token log-likelihood of a text minus that of its twin, and m0 what
    it was in the original model; beside it, as in multi, what is kept. NPO lowers a stereotype and its twin alike, so
    the preference between them hardly moves.
    """

    kind: str = "npo"
    form: str = "original"
    beta: float = 0.1
    retain: float = 1.0
    retain_by: str = "text"
    """text: the cross-entropy of what is kept summed over its tokens, as NPO's argument is. token: their mean, beside
    which a summed forgetting has about thirty times the gradient. margin is per token, and so is what it keeps."""


def forget(
    model: PreTrainedModel,
    selected: Sequence[Row],
    kept: Sequence[Row],
    plan: Plan,
    how: Forgetting,
    *,
    seed: int,
    lora: Lora,
    twins: Sequence[Row] = (),
    original: Float[np.ndarray, " selected"] | None = None,
    state: Path | None = None,
    log: Log | None = None,
    step_done: Advance | None = None,
) -> Trained:
    """Train factors beside ``model`` so that it forgets the ``selected`` rows; "multi" and "margin" keep ``kept`` rows.

    An epoch of ``plan`` is one pass over ``selected``, each with one of ``kept``, drawn anew. The order depends on the
    seed. With ``state`` an interrupted call is continued to the same result. The differences are to ``model``.

    ``original`` is the mean token log-likelihood (nats) of each selected row in the original model, for "margin" minus
    that of its row in ``twins`` (``likelihoods``). Training ends before the plan's epochs where the mean over the first
    ``WATCHED`` of the seed's order is back there, looked at every ``EVERY`` steps.

    Raises ``SurgeryError`` for no rows, an unknown kind, form or unit, "margin" without its twins and originals, a
    weight of 0 for what "multi" keeps, and a loss that is not finite.
    """
    _check(selected, kept, how, twins, original)
    starts = [row.start for row in selected]
    reference = torch.from_numpy(summed(token_log_probabilities(model, [r.ids for r in selected], starts=starts)))
    order = _order(len(selected), len(kept), plan.epochs, seed)
    goal = torch.tensor([] if original is None else original, dtype=torch.float32)

    def losses(module: nn.Module, places: Sequence[int]) -> Tensor | dict[str, Tensor]:
        pairs = [order[place] for place in places]
        forgotten = [first for first, _ in pairs]
        if how.kind == "margin":
            rows = [source[n] for source in (selected, twins) for n in forgotten]
            rows += [kept[second] for _, second in pairs]
            logs, scored = token_logs(module, rows, range(len(rows)), model.device)
            own, other, rest = (logs.sum(1) / scored.sum(1)).view(3, -1)
            wanted = goal[forgotten].to(logs.device)
            return {"margin": MARGIN * (own - other - wanted).square(), "retain": -how.retain * rest}
        if how.kind != "multi":
            logs, scored = token_logs(module, selected, forgotten, model.device)
            return _forgetting(logs, scored, reference[forgotten].to(logs), how)
        # One forward pass for both, so that a distributed wrapper sees one.
        rows = [*(selected[first] for first in forgotten), *(kept[second] for _, second in pairs)]
        logs, scored = token_logs(module, rows, range(len(rows)), model.device)
        half = len(pairs)
        forgetting = _forgetting(logs[:half], scored[:half], reference[forgotten].to(logs), how)
        retention = -logs[half:].sum(1)
        if how.form == "original" and how.retain_by == "token":
            retention = retention / scored[half:].sum(1)
        return {"forget": forgetting, "retain": how.retain * retention}

    once = replace(plan, epochs=1, shuffle=False)
    after = None if original is None else _back(model, selected, twins, original, [first for first, _ in order], state)
    options: dict[str, Any] = {"state": state, "log": log, "step_done": step_done, "after": after}
    return fit(model, losses, len(order), once, seed=seed, lora=lora, **options)


def likelihoods(model: PreTrainedModel, rows: Sequence[Row], twins: Sequence[Row] = ()) -> Float[np.ndarray, " rows"]:
    """The mean token log-likelihood (nats) of each row, minus that of its twin where ``twins`` are given."""
    found = -evaluate(model, rows)
    return found + evaluate(model, twins) if twins else found


def _check(
    selected: Sequence[Row],
    kept: Sequence[Row],
    how: Forgetting,
    twins: Sequence[Row],
    original: Float[np.ndarray, " selected"] | None,
) -> None:
    if how.kind not in KINDS or how.form not in FORMS or how.retain_by not in UNITS:
        raise SurgeryError(
            f"mitigation: got {how.kind!r} in the form {how.form!r}, kept by {how.retain_by!r}; expected one of "
            f"{', '.join(KINDS)}, one of {', '.join(FORMS)}, and one of {', '.join(UNITS)}"
        )
    keeps = how.kind in ("multi", "margin")
    if not selected or (keeps and not kept):
        raise SurgeryError(f"{how.kind}: {len(selected)} texts to forget, {len(kept)} to keep; expected some of each")
    if how.kind == "multi" and not how.retain:
        raise SurgeryError("retain: got 0, with which multi is npo; give what is kept a weight above 0, or take npo")
    if how.kind == "margin" and (len(twins) != len(selected) or original is None):
        raise SurgeryError(
            f"margin: {len(selected)} texts to forget, {len(twins)} twins; expected a twin of each, and what the "
            "margin was in the original model"
        )


def _back(
    model: PreTrainedModel,
    selected: Sequence[Row],
    twins: Sequence[Row],
    original: Float[np.ndarray, " selected"],
    order: Sequence[int],
    state: Path | None,
) -> After:
    """Ends the training where the watched rows are back at ``original`` or below; remembered beside ``state``."""
    watched = list(dict.fromkeys(order))[:WATCHED]
    rows, others = [selected[n] for n in watched], [twins[n] for n in watched] if twins else []
    aim = float(np.mean([original[n] for n in watched]))
    decided = state.with_name(state.name + ".ended") if state else None

    def after(step: int, optimizer: torch.optim.Optimizer | None) -> bool:
        if optimizer is None:  # a step of before an interruption
            return decided is not None and decided.is_file() and int(decided.read_text()) == step
        if step % EVERY:
            return False
        ended = float(likelihoods(model, rows, others).mean()) <= aim
        if ended and decided:
            decided.write_text(str(step))
        return ended

    return after


def steps_to_forget(count: int, plan: Plan) -> int:
    """How many optimiser steps ``forget`` takes for ``count`` selected rows."""
    return -(-count * plan.epochs // plan.batch_size)


def _order(selected: int, kept: int, epochs: int, seed: int) -> list[tuple[int, int]]:
    """(row to forget, row to keep) of every place: each epoch all of the first in a new order; the others in turn."""
    generator = np.random.default_rng([seed, 1])
    first = np.concatenate([generator.permutation(selected) for _ in range(epochs)])
    turns = -(-len(first) // kept) if kept else 0
    second = np.concatenate([np.zeros(0, int), *(generator.permutation(kept) for _ in range(turns))])
    return [(int(row), int(second[place]) if kept else 0) for place, row in enumerate(first)]


def token_logs(
    module: nn.Module, rows: Sequence[Row], chosen: Sequence[int], device: torch.device
) -> tuple[Float[Tensor, "chosen pos"], Bool[Tensor, "chosen pos"]]:
    """log P(token | tokens before) in nats of the targets of the rows numbered ``chosen``, else 0; and which."""
    batch, target_mask = target_batch(rows, chosen, device)
    logits = module(**batch.inputs(), use_cache=False).logits[:, :-1]
    # Flattened: the transposed form of cross_entropy has a hundred times the gradient error on a CPU.
    each = -cross_entropy(logits.float().flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    scored = target_mask[:, 1:]
    return each.view(scored.shape) * scored, scored


def _forgetting(
    logs: Float[Tensor, "rows pos"],
    scored: Bool[Tensor, "rows pos"],
    reference: Float[Tensor, " rows"],
    how: Forgetting,
) -> Float[Tensor, " rows"]:
    if how.kind == "ascent":
        return equations.ascent(logs.sum(1))
    if how.kind == "multi" and how.form == "printed":
        # Eq. 8: a sigmoid for each token, and no reference.
        return (equations.npo(logs, torch.zeros_like(logs), how.beta) * scored).sum(1)
    npo = equations.npo(logs.sum(1), reference, how.beta)
    return npo / 2 if how.form == "printed" else npo  # Eq. 7 has 1/beta
