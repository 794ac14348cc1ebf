"""Prompts in batches: padded on the right, of like length, and alone where a model cannot take several at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hooks.batching import mixes_beyond, why_alone

Ids = Sequence[Sequence[int]]
TOKENS = 2048  # of a batch, with padding: beyond, a CPU gains nothing


@dataclass(frozen=True)
class Batch:
    """Prompts on the model's device, padded on the right; which row of the data each is."""

    rows: tuple[int, ...]
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    stream: Float[Tensor, "batch pos d_model"] | None = None

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for the model. No positions: each row begins in the first column, wherever that counts."""
        return {"input_ids": self.ids, "attention_mask": self.mask}

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """The column of each prompt's last token."""
        return self.mask.sum(1) - 1

    def at_last(self, tensor: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch *rest"]:
        """What stands at each prompt's last token."""
        return tensor[torch.arange(len(self.ids), device=tensor.device), self.last.to(tensor.device)]

    def only_last(self, tensor: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch 1 *rest"]:
        """The same with a dimension for the position: what a block need compute where only the next token is asked."""
        return self.at_last(tensor)[:, None]

    def placed(self, tensor: Float[Tensor, "batch 1 *rest"]) -> Float[Tensor, "batch 1 *rest"]:
        """What was computed of ``only_last``, to be added to the whole stream: as it is here, by broadcasting."""
        return tensor

    def places(self) -> list[tuple[int, ...]]:
        """Where the tokens of each row stand in the flattened batch."""
        width = self.ids.shape[1]
        lengths = self.mask.sum(1).tolist()
        return [tuple(range(row * width, row * width + length)) for row, length in enumerate(lengths)]


def pad(ids: Ids, rows: Sequence[int], device: torch.device | str) -> Batch:
    """The prompts ``rows`` as one batch; padding is token 0 under mask 0."""
    width = max(len(ids[row]) for row in rows)
    filled = [[*ids[row], *[0] * (width - len(ids[row]))] for row in rows]
    masks = [[1] * len(ids[row]) + [0] * (width - len(ids[row])) for row in rows]
    return Batch(tuple(rows), torch.tensor(filled, device=device), torch.tensor(masks, device=device))


def by_length(ids: Ids, *, tokens: int = TOKENS) -> list[list[int]]:
    """All row numbers in batches of similar length, each of at most ``tokens`` tokens with padding (at least one row).

    On a CPU 2048 tokens a batch is as fast as any more, and stays within a few hundred MB.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(ids)), key=lambda row: len(ids[row])):
        # Sorted upwards, so the newest row is the longest and sets the batch's width.
        if batches and (len(batches[-1]) + 1) * len(ids[row]) <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def batches_for(model: PreTrainedModel, ids: Ids, *, tokens: int = TOKENS, equal: bool = False) -> list[list[int]]:
    """``by_length``, and one row a batch where rows of this model must not stand together (``hooks.batching``).

    ``equal`` puts only rows of one length together, so that nothing is padded.
    """
    if len(ids) > 1 and why_alone(model):
        return [[row] for row in sorted(range(len(ids)), key=lambda row: len(ids[row]))]
    border = mixes_beyond(model)
    found: list[list[int]] = []
    for rows in by_length(ids, tokens=tokens):
        groups: dict[int, list[int]] = {}
        for row in rows:
            length = len(ids[row])
            groups.setdefault(length if equal or (border is not None and length > border) else 0, []).append(row)
        found += groups.values()
    return found


def logit_budget(model: PreTrainedModel) -> int:
    """How many positions may go through the head at once: 256 MB of float32 logits on a CPU, 1 GB elsewhere."""
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, (2**26 if model.device.type == "cpu" else 2**28) // vocabulary)


def sent(numbers: Any, device: torch.device | str) -> Tensor:
    """Whole numbers as a tensor on the device. A CUDA device gets them when it comes to it, and nobody waits for it."""
    found = torch.as_tensor(numbers)
    return found.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else found.to(device)
