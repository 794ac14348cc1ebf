"""What equalising pairs trains on: the pairs, and what is held beside them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit
from hooks.tokens import ids_of
from surgery.data.pairs import Pair
from surgery.data.prompts import load_prompt_set
from surgery.edits.equalize.dose import Dose
from surgery.edits.equalize.pairs import STARTS, pairs_term
from surgery.edits.equalize.terms import Ids, Term, hold_term
from surgery.errors import SurgeryError
from surgery.forward.tokens import start_token, word_ids

if TYPE_CHECKING:
    from recipes.equalize import Settings


def terms_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: "Settings",
    texts: Mapping[str, Sequence[str]],
    pairs: Sequence[Pair],
    doses: Mapping[str, Dose],
    own: Sequence[Sequence[int]] = (),
    apart: Ids = (),
) -> list[Term]:
    """The pairs' term, and what is held: unrelated sentences and texts, with a start token and without one.

    (On Gemma 3 270M a hold with the start token only left the other form to drift.) ``texts`` are ordinary ones and
    those that end where the pronoun is ``settled``, which are held there. ``own`` are token ids of texts that the model
    wrote, of which every other one has its start token. A held sentence that is also a side of a pair, or stands among
    the sides that are ``apart`` (of pairs that judge this training), is left out.

    Raises ``SurgeryError`` for a held text that is longer than the model takes.
    """
    begin, longest = start_token(tokenizer), context_limit(model)
    starts = STARTS if begin is not None else (False,)
    found = [pairs_term(tokenizer, repeated(pairs, settings.repeat), doses, starts=starts, longest=longest)]
    taken = {tuple(row) for row in (*found[0].ids, *apart)}
    held = {
        "unrelated": ([pair.unrelated for pair in pairs if pair.unrelated], settings.hold_unrelated),
        "texts": (texts["texts"], settings.hold_texts),
        "settled": (texts["settled"], settings.hold_settled),
    }
    for name, (lines, weight) in held.items():
        plain_rows = ids_of(tokenizer, list(lines))
        rows = [*([(begin, *row) for row in plain_rows] if begin is not None else []), *plain_rows]
        if name == "texts" and begin is not None:
            rows += [(begin, *row) if number % 2 else tuple(row) for number, row in enumerate(own)]
        kept = [row for row in dict.fromkeys(rows) if row and row not in taken] if weight else []
        taken.update(kept)
        long = max((len(row) for row in kept), default=0)
        if longest and long > longest:
            raise SurgeryError(f"hold of {name}: a text has {long} tokens, the model takes {longest}; shorten it")
        if kept:
            at: dict[str, Any] = {"positions": settings.hold_positions}
            if name == "settled":
                words = word_ids(tokenizer, load_prompt_set().words.words) if settings.hold_emphasis else ()
                at = {"positions": "last", "words": words, "emphasis": settings.hold_emphasis}
            found.append(hold_term(name, kept, weight=weight, top=settings.kept_tokens, **at))
    return found


def repeated(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """The pairs, those of a bias type of which another has k times as many k times (rounded), but at most ``most``."""
    counts = Counter(pair.bias_type for pair in pairs)
    times = {kind: min(most, round(max(counts.values()) / count)) for kind, count in counts.items()}
    return [pair for pair in pairs for _ in range(times[pair.bias_type])]
