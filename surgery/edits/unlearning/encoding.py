"""StereoSet triples as token ids in which exactly the continuation is learnt: from BLANK's filler to the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from hooks.tokens import added
from surgery.data.stereoset import Triple
from surgery.edits.supervised import Row
from surgery.errors import SurgeryError
from surgery.forward.tokens import start_token

BLANK = "BLANK"
STEREOTYPE, ANTI, UNRELATED = "stereotype", "anti_stereotype", "unrelated"
SIDES = (STEREOTYPE, ANTI, UNRELATED)
Start = Literal["tokenizer", "always", "never"]


@dataclass(frozen=True)
class EncodedTriples:
    """Rows of each triple by side; ``kept`` are the numbers of the triples, ``skipped`` says why others are not."""

    rows: tuple[dict[str, Row], ...]
    kept: tuple[int, ...]
    skipped: tuple[str, ...]


def boundary(context: str, sentence: str) -> int | None:
    """Where ``sentence`` leaves the part of ``context`` before BLANK, in characters; None where it does not begin so.

    Case and the amount of white space may differ, as they do in a quarter of StereoSet's rows. White space before
    the filler counts as context.

    >>> boundary("the poet can  BLANK.", "The poet can rhyme.")
    13
    """
    at = 0
    for word in context.partition(BLANK)[0].split():
        while at < len(sentence) and sentence[at].isspace():
            at += 1
        if sentence[at : at + len(word)].casefold() != word.casefold():
            return None
        at += len(word)
    while at < len(sentence) and sentence[at].isspace():
        at += 1
    return at if at < len(sentence) else None


def encode_sentences(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], begins: Sequence[int], *, start: Start = "tokenizer"
) -> list[Row]:
    """Token ids of each sentence, learnt from the first token that holds a character at or behind its ``begins``.

    So no character of the continuation is lost where a token straddles the boundary (a word with its leading space,
    say), and no token of the context alone is learnt. ``start``: a start token where the tokenizer puts one by
    itself, always, or never; the first token of a sentence that has none before it cannot be predicted, so there
    one is always put.

    Raises ``SurgeryError`` for a tokenizer without character offsets, or without any start token where one is needed.
    """
    if not tokenizer.is_fast:
        raise SurgeryError(
            f"{type(tokenizer).__name__}: gives no character offsets, so the context cannot be masked exactly; "
            "expected a fast tokenizer; convert it (tokenizer.json)"
        )
    token = start_token(tokenizer)
    usual = [] if start == "never" else list(added(tokenizer)[0])
    if start == "always" and not usual and token is not None:
        usual = [token]
    coded = tokenizer(list(sentences), return_offsets_mapping=True, add_special_tokens=False)
    rows = []
    for ids, spans, begin, sentence in zip(coded["input_ids"], coded["offset_mapping"], begins, sentences, strict=True):
        first = next((at for at, (_, end) in enumerate(spans) if end > begin), len(ids))
        needed = not usual and (first == 0 or start == "always")
        if needed and token is None:
            raise SurgeryError(
                f"{type(tokenizer).__name__}: no begin and no end token, so the first token of {sentence[:40]!r} "
                "cannot be predicted; set tokenizer.bos_token"
            )
        opening = [token] if needed and token is not None else usual
        rows.append(Row((*opening, *ids), len(opening) + first))
    return rows


def encode_triples(
    tokenizer: PreTrainedTokenizerBase,
    triples: Sequence[Triple],
    *,
    max_length: int,
    start: Start = "tokenizer",
    whole: bool = False,
) -> EncodedTriples:
    """Every triple's three sentences; of the unrelated one every token counts (Eq. 3), so its row starts at 1.

    With ``whole`` so do those of the others, as the scorers count them, not those of the continuation alone.

    A triple whose sentences do not begin with its context, or are longer than ``max_length`` tokens, is skipped
    and said so. Raises ``SurgeryError`` when none is left.
    """
    skipped: dict[int, str] = {}
    begins: dict[tuple[int, str], int] = {}
    for number, triple in enumerate(triples):
        for side in SIDES:
            begin = boundary(triple.context, getattr(triple, side))
            if begin is None:
                skipped[number] = f"{side} {getattr(triple, side)[:40]!r} does not go on from its context"
            else:
                begins[number, side] = begin
    sentences = [getattr(triples[number], side) for number, side in begins]
    coded = dict(zip(begins, encode_sentences(tokenizer, sentences, list(begins.values()), start=start), strict=True))
    for (number, side), row in coded.items():
        if len(row.ids) > max_length:
            skipped[number] = f"{side} has {len(row.ids)} tokens, more than {max_length}"
    kept = tuple(number for number in range(len(triples)) if number not in skipped)
    said = tuple(f"triple {number} ({why})" for number, why in sorted(skipped.items()))
    if not kept:
        raise SurgeryError(f"none of {len(triples)} triples can be learnt: {said[0] if said else 'none given'}")
    rows = []
    for number in kept:
        sides = {side: coded[number, side] for side in SIDES}
        rows.append({side: Row(row.ids, 1) if whole or side == UNRELATED else row for side, row in sides.items()})
    return EncodedTriples(tuple(rows), kept, said)
