"""What fitted scales did: a child's test prompts untouched, with the delta as it is, and with the fitted one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from surgery.data.genbias import SEED
from surgery.data.prompts import PromptSet
from surgery.delta import Delta
from surgery.metrics.material import material
from surgery.metrics.metric import flat
from surgery.metrics.suite import measure
from surgery.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUITES = ("genbias", "facts_of_gender", "perplexity")


def measured(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: PromptSet,
    deltas: Mapping[str, Delta],
    *,
    start: int = 0,
    split_seed: int = SEED,
    progress: Progress,
) -> dict[str, list[str]]:
    """{place of a number: it untouched and with each delta, with its interval}; all change blocks from ``start`` on."""
    asked = material(model, tokenizer, prompts, suites=SUITES, seed=split_seed)
    first = measure(model, asked, keep=[start] if start else [], progress=progress, label="measure untouched")
    seen = [flat(first.scores)]
    for name, delta in deltas.items():
        with delta.applied(model):
            found = measure(
                model, asked, prefixes=first.prefixes.get(start), progress=progress, label=f"measure {name}"
            )
        seen.append(flat(found.scores))
    places = [place for place in seen[0] if place.endswith(".all") or place.startswith("perplexity")]
    return {place: [str(each[place]) for each in seen] for place in places}
