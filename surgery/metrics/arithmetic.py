"""Arithmetic by exact match: whether greedy decoding gives the right number, and how likely the right one is.

The LFTF paper reports 13 points lost on GSM8K with the last block edited; models too small for GSM8K answer these.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.data.arithmetic import KINDS, Question, questions
from surgery.forward.batching import batches_for, logit_budget, pad
from surgery.forward.evaluation import evaluating
from surgery.forward.tokens import answered
from surgery.metrics.metric import Metric, mean_metric
from surgery.progress import Advance


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: Sequence[Question] = (),
    step: Advance | None = None,
) -> dict[str, dict[str, Metric]]:
    """``{"exact" | "logp": {kind: Metric, "all": Metric}}`` of the shipped questions, or of ``rows``.

    - exact: the share whose answer greedy decoding gives, and no digit behind it: every token of it is the likeliest
      after those before, which is the same and needs one pass. How the line ends is left to the model, since some
      tokenizers have one token for two line breaks.
    - logp: the mean log-probability (nats) of the whole right answer, which moves before a match is lost.
    """
    asked = rows or questions()
    coded = [answered(tokenizer, row.prompt, row.answer) for row in asked]
    exact, logp = np.zeros(len(asked)), np.zeros(len(asked))
    ids = [row for row, _ in coded]
    with evaluating(model):
        for chosen in batches_for(model, ids, tokens=logit_budget(model)):
            batch = pad(ids, chosen, model.device)
            logits = model(**batch.inputs(), use_cache=False).logits.float()
            targets = batch.ids[:, 1:]
            starts = torch.tensor([coded[row][1] for row in chosen], device=targets.device)
            at = torch.arange(1, batch.ids.shape[1], device=targets.device)[None]
            scored = (at >= starts[:, None]) & batch.mask.bool()[:, 1:]
            best = logits.argmax(-1)
            hit = (best[:, :-1] == targets) | ~scored
            last = best.gather(1, batch.mask.sum(1, keepdim=True) - 1)[:, 0].tolist()
            ended = [not str(tokenizer.decode([token])).strip()[:1].isdigit() for token in last]
            each = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0] * scored
            exact[chosen] = hit.all(1).cpu().numpy() & np.array(ended)
            logp[chosen] = each.sum(1).double().cpu().numpy()
            if step:
                step(len(chosen))
    kinds = np.array([row.kind for row in asked])
    columns = {
        "exact": (exact, "share answered exactly, greedy, four worked examples", 1.0),
        "logp": (logp, "mean log-probability of the right answer (nats)", 0.0),
    }
    groups = [(kind, kinds == kind) for kind in KINDS if (kinds == kind).any()]
    return {
        name: {
            kind: mean_metric(
                values[chosen], scorer=scorer, data=f"arithmetic, {kind}", ideal=ideal, direction="higher"
            )
            for kind, chosen in [*groups, ("all", np.ones(len(kinds), bool))]
        }
        for name, (values, scorer, ideal) in columns.items()
    }
