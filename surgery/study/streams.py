"""The streams of the untouched model's prompts, from which a cell is judged where its edit begins further up."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from hooks import anatomy
from surgery.delta import Delta
from surgery.delta.live import touched
from surgery.forward.residual_cache import ResidualCache, why_not

Suites = Mapping[str, ResidualCache]


@dataclass
class Streams:
    """Streams that enter a few blocks, by block and suite; filled when the untouched model is judged."""

    kept: dict[int, dict[str, ResidualCache]] = field(default_factory=dict)

    def until(self, model: PreTrainedModel, first: int) -> Suites | None:
        """The streams entering the last kept block that is not behind block ``first``, the first edited one.

        None where none was kept, or this architecture does not go on from there as in a plain pass.
        """
        block = max((block for block in self.kept if block <= first), default=0)
        if not block:
            return None
        suites = self.kept[block]
        return None if why_not(model, next(iter(suites.values()))) else suites


def blocks_to_keep(model: PreTrainedModel) -> tuple[int, ...]:
    """Two thirds up, five sixths up, and the last block, for edits of upper blocks, of the last one and of the head."""
    count = len(anatomy.find(model).blocks)
    return tuple(sorted({2 * count // 3, 5 * count // 6, count - 1} - {0}))


def first_edited(model: PreTrainedModel, delta: Delta) -> int:
    """The first block that a delta changes: 0 where it changes what stands before them, or anything unknown."""
    blocks = anatomy.find(model).blocks
    behind = [anatomy.find(model).final_norm, anatomy.find(model).head]
    embedding = model.get_input_embeddings().weight
    first = len(blocks) - 1  # a module, or the head
    for name, parameter in touched(delta, model).parameters.items():
        inside = [place for place, block in enumerate(blocks) if name.startswith(f"{block.name}.")]
        if inside:
            first = min(first, *inside)
        elif parameter is embedding or not any(part and name.startswith(f"{part}.") for part in behind):
            return 0
    return first
