"""Unlearning with LoRA: chunks through the losses, watched on a development set that decides swaps, stop and result.

BiasUnlearn section 3, and the baselines that differ from it in what a chunk holds. The model is left as it was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooks import anatomy
from surgery.edits.block import Trained
from surgery.edits.supervised import Lora, Row, fit, target_names
from surgery.edits.unlearning import losses as equations
from surgery.edits.unlearning.batches import BatchSampler, Item
from surgery.edits.unlearning.early_stopping import Decision, EarlyStopping
from surgery.edits.unlearning.objective import PUSHES, Objective, batch_losses, gradients_of_terms, push
from surgery.edits.unlearning.reference_logprobs import Reference
from surgery.edits.unlearning.watching import Scores, Watch
from surgery.errors import SurgeryError
from surgery.forward.evaluation import evaluating
from surgery.progress import Advance
from surgery.training import Log, Plan

SAME = 2  # chunks on which the gradients of the terms are measured


@dataclass(frozen=True)
class Unlearned:
    """What was learnt of how many triples, after which step, why it ended, and the scores of the development set.

    ``pushed``: by what the weights of what pushes were multiplied from step 2 on (``surgery.edits.unlearning.push``).
    """

    trained: Trained
    triples: int
    kept_step: int
    stopped: str
    evaluations: dict[int, Scores]
    pushed: float


def trained_names(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """The parameters that ``unlearn`` changes through factors; raises ``SurgeryError`` where the head is among them."""
    names = target_names(model, targets)
    if anatomy.find(model).head in names:
        raise SurgeryError("target_modules: got the head, with which the kept reference would change; leave it out")
    return [f"{name}.weight" for name in names]


def unlearn(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Row]],
    chunks: BatchSampler,
    kept: Reference,
    objective: Objective,
    control: EarlyStopping,
    plan: Plan,
    *,
    steps: int,
    lora: Lora,
    evaluate: Callable[[int], Scores],
    state: Path | None = None,
    log: Log | None = None,
    step_done: Advance | None = None,
) -> Unlearned:
    """Train LoRA factors on ``steps`` chunks (``plan`` says how fast), or fewer when ``control`` ends it.

    ``evaluate`` scores the development set with the model as it is after the step that it is told. With the directory
    ``state`` an interrupted call is continued by calling again with the same arguments, to the same result.

    Raises ``SurgeryError`` when a loss is not finite, when the forget loss explodes before there was a good
    checkpoint to keep, and for factors beside the head, with which the kept reference would change.
    """
    trained_names(model, lora.targets)
    if state:
        state.mkdir(parents=True, exist_ok=True)
    first = [item for step in range(min(SAME, steps)) for item in chunks.items(step)]
    watch = Watch(control, chunks, evaluate, steps, state, log, partial(_push, model, first, rows, kept, objective))
    factors = equations.batch_weights(chunks.sizes, objective.weights)

    def losses(module: nn.Module, places: Sequence[int], at_first: bool = False) -> dict[str, Tensor]:
        now = Decision() if at_first else watch.now
        items = chunks.items(places[0] // chunks.size, swapped=now.swapped, active=now.active)
        mine = [items[place % chunks.size] for place in places]
        each, ratio = batch_losses(model, module, mine, rows, kept, objective)
        watch.seen(mine, each.detach(), ratio)
        pushed = {role: watch.pushed for role in PUSHES if not at_first}
        weighted = each * each.new_tensor([factors[item.role] * pushed.get(item.role, 1.0) for item in mine])
        return {role: weighted * each.new_tensor([float(item.role == role) for item in mine]) for role in chunks.sizes}

    trained = fit(
        model,
        losses,
        steps * chunks.size,
        plan,
        seed=chunks.seed,
        lora=lora,
        state=state / "training.pt" if state else None,
        log=watch.written,
        step_done=step_done,
        after=watch.after,
        asked=partial(losses, at_first=True),
    )
    return Unlearned(trained, len(rows), watch.kept, watch.reason, watch.record, watch.pushed)


def _push(
    model: PreTrainedModel,
    first: Sequence[Item],
    rows: Sequence[Mapping[str, Row]],
    kept: Reference,
    objective: Objective,
    parameters: Sequence[Tensor],
) -> float:
    """``push`` of the gradients of the ``first`` items, of the model as it is now."""
    if not objective.ratio:
        return 1.0
    half = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    with evaluating(model), torch.autocast(model.device.type, dtype=half, enabled=half is not None):
        each = lambda items: batch_losses(model, model, items, rows, kept, objective)[0]  # noqa: E731
        return push(objective, gradients_of_terms(first, each, parameters))
