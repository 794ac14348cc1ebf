"""Unlearning of selected training texts (BIAS DIFF 2.4): NPO, NPO with what is to be kept beside it, or ascent.

The model that is given is the warmed-up one, and the reference of NPO: LoRA factors learn beside it, so that the
reference is the model without them. It is left as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from surgery.edits.block import Trained
from surgery.edits.supervised import Lora, Row, fit, target_batch
from surgery.edits.unlearning import losses as equations
from surgery.errors import SurgeryError
from surgery.forward.token_logprobs import token_log_probabilities
from surgery.progress import Advance
from surgery.training import Log, Plan

KINDS = ("npo", "multi", "ascent")
FORMS = ("original", "printed")


@dataclass(frozen=True)
class Forgetting:
    """Which loss a text to forget has.

    npo, "original": -2/beta log sigma(-beta log pi/pi_ref) of each text (Zhang et al. 2024, Eq. 3), "printed": the same
    with 1/beta (Eq. 7). multi adds ``retain`` times the cross-entropy of a text to keep; "printed" is Eq. 8, which
    has no pi_ref, a sigmoid for each token, and sums over tokens (its beta_t are nowhere defined: 1). ascent is the
    log-likelihood itself, which nothing bounds.
    """

    kind: str = "npo"
    form: str = "original"
    beta: float = 0.1
    retain: float = 1.0


def forget(
    model: PreTrainedModel,
    selected: Sequence[Row],
    kept: Sequence[Row],
    plan: Plan,
    how: Forgetting,
    *,
    seed: int,
    lora: Lora,
    state: Path | None = None,
    log: Log | None = None,
    step_done: Advance | None = None,
) -> Trained:
    """Train factors beside ``model`` so that it forgets the ``selected`` rows; ``kept`` rows matter to "multi" only.

    An epoch of ``plan`` is one pass over ``selected``, each with one of ``kept``, drawn anew. The order depends on the
    seed. With ``state`` an interrupted call is continued to the same result. The differences are to ``model``.

    Raises ``SurgeryError`` for no rows, an unknown kind or form, and a loss that is not finite.
    """
    if how.kind not in KINDS or how.form not in FORMS:
        raise SurgeryError(
            f"mitigation: got {how.kind!r} in the form {how.form!r}, expected one of {', '.join(KINDS)} "
            f"and one of {', '.join(FORMS)}"
        )
    if not selected or (how.kind == "multi" and not kept):
        raise SurgeryError(f"{how.kind}: {len(selected)} texts to forget, {len(kept)} to keep; expected some of each")
    reference = torch.tensor(
        [
            float(logs.sum())
            for logs in token_log_probabilities(model, [r.ids for r in selected], starts=[r.start for r in selected])
        ]
    )
    order = _order(len(selected), len(kept), plan.epochs, seed)

    def losses(module: nn.Module, places: Sequence[int]) -> Tensor | dict[str, Tensor]:
        pairs = [order[place] for place in places]
        forgotten = [first for first, _ in pairs]
        if how.kind != "multi":
            logs, scored = token_logs(module, selected, forgotten, model.device)
            return _forgetting(logs, scored, reference[forgotten].to(logs.device), how)
        # One forward pass for both, so that a distributed wrapper sees one.
        rows = [*(selected[first] for first in forgotten), *(kept[second] for _, second in pairs)]
        logs, scored = token_logs(module, rows, range(len(rows)), model.device)
        half = len(pairs)
        forgetting = _forgetting(logs[:half], scored[:half], reference[forgotten].to(logs.device), how)
        retention = -logs[half:].sum(1)
        # Eq. 8 sums over the tokens of y; the mean per token weighs a long text as much as a short one.
        retention = retention if how.form == "printed" else retention / scored[half:].sum(1)
        return {"forget": forgetting, "retain": how.retain * retention}

    once = replace(plan, epochs=1, shuffle=False)
    return fit(model, losses, len(order), once, seed=seed, lora=lora, state=state, log=log, step_done=step_done)


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
