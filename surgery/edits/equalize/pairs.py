"""The pairs objective: neither of two sentences is preferred, per token, up to an offset that is the dose.

With m = mean log p(token | before) of the stereotyping sentence minus that of the other (nats), a pair costs
(m + dose)^2. A push in one direction (DPO, CDA) turns preferences round and leaves them as strong; a square makes
them small. What is learnt reaches unseen sentences in part, so without an offset they keep their sign: the dose,
chosen for each bias type on groups that training never saw (``surgery.edits.equalize.dose``), moves their balance.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from surgery.data.pairs import Pair
from surgery.edits.equalize.dose import Dose
from surgery.edits.equalize.terms import Target, Term
from surgery.errors import SurgeryError
from surgery.metrics.sentences import start_token

STARTS = (True, False)
"""Each pair is learnt with a start token (scorer ``bos``) and without (``bias-bench``, but for its first token)."""


def squared_margin(margin: Float[Tensor, " pairs"], dose: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """(m + dose)^2, smallest where the stereotype is ``dose`` nats a token less likely than its twin."""
    return (margin + dose).square()


def pairs_term(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    doses: Mapping[str, Dose],
    *,
    weight: float = 1.0,
    starts: Sequence[bool] = STARTS,
    longest: int | None = None,
) -> Term:
    """``squared_margin`` of each pair, once for each of ``starts``, with the dose of its bias type and form.

    Raises ``SurgeryError`` for a type without a dose, and a sentence without a token to score or beyond ``longest``.
    """
    missing = sorted({pair.bias_type for pair in pairs} - doses.keys())
    if missing:
        raise SurgeryError(f"dose: none for the bias type {missing[0]!r}; expected one of each type of the pairs")
    sides = [text for pair in pairs for text in (pair.more, pair.less)]
    coded = tokenizer(sides, add_special_tokens=False)["input_ids"] if sides else []
    ids: list[tuple[int, ...]] = []
    wanted: list[float] = []
    for begun in starts:
        before = [start_token(tokenizer, "bos")] if begun else []
        for number, pair in enumerate(pairs):
            both = [(*before, *coded[2 * number + side]) for side in range(2)]
            for row in both:
                if len(row) < 2 or (longest and len(row) > longest):
                    most = f" to {longest}" if longest else ""
                    raise SurgeryError(f"{pair.where}: a side has {len(row)} tokens, expected 2{most}; leave it out")
            ids += both
            dose = doses[pair.bias_type]
            wanted.append(dose[0 if begun else 1] if isinstance(dose, tuple) else dose)
    places = tuple(tuple(range(len(row) - 1)) for row in ids)

    def loss(logits: Float[Tensor, "places vocab"], _: Target, rows: Sequence[int]) -> Float[Tensor, " examples"]:
        next_ids = torch.tensor([token for row in rows for token in ids[row][1:]], device=logits.device)
        logs = logits.float().gather(1, next_ids[:, None])[:, 0] - logits.float().logsumexp(-1)
        counts = torch.tensor([len(places[row]) for row in rows], device=logits.device)
        owner = torch.repeat_interleave(torch.arange(len(rows), device=logits.device), counts)
        means = logs.new_zeros(len(rows)).index_add(0, owner, logs) / counts
        dose = torch.tensor([wanted[row // 2] for row in rows[::2]], device=logits.device)
        return squared_margin(means[::2] - means[1::2], dose)

    return Term("pairs", weight, ids, places, lambda logits: (), loss, size=2, untouched=False)
