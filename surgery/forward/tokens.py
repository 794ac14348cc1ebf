"""What a prompt, a word and a continuation look like in tokens, for every judge and every edit.

The rules are those of ``hooks.tokens``: what the tokenizer puts before a text by itself stands there once, what it
would put behind one is left out, so that the last token is the text's own.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from hooks.tokens import added, ids_of, text_tokens, word_pieces
from surgery.errors import SurgeryError

Ids = tuple[tuple[int, ...], ...]


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, limit: int | None = None, closed: bool = False
) -> Ids:
    """Token ids of each text as ``hooks.tokens.text_tokens`` gives them.

    ``closed`` keeps what the tokenizer puts behind a text (``hooks.tokens.reads_whole`` says for which models).

    Raises ``SurgeryError`` for no texts, a text that gives no token, or one longer than ``limit`` tokens.
    """
    if not texts:
        raise SurgeryError("prompts: got none, expected at least 1; check the data name and the split")
    ids = tuple(text_tokens(tokenizer, texts, closed=closed))
    for number, row in enumerate(ids):
        if not row:
            raise SurgeryError(f"text {number} ({texts[number]!r}) gives no token; expected at least 1; remove it")
        if limit is not None and len(row) > limit:
            raise SurgeryError(
                f"text {number} ({texts[number][:40]!r}...) has {len(row)} tokens, the model takes {limit}; shorten it"
            )
    return ids


def word_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """The one token of each word as it follows other text (``hooks.tokens.word_pieces``).

    Raises ``SurgeryError`` naming a word that is several tokens, or two words that are the same token.
    """
    found: list[int] = []
    for word in words:
        pieces = word_pieces(tokenizer, word)
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
            raise SurgeryError(
                f"word {word!r}: the tokenizer of {tokenizer.name_or_path or 'this model'} splits ' {word}' into "
                f"{len(pieces)} tokens {tokenizer.convert_ids_to_tokens(list(pieces))}; expected one; "
                "choose another word, or measure words as continuations (surgery eval --words-as continuations)"
            )
        if pieces[0] in found:
            raise SurgeryError(f"word {word!r}: same token as {words[found.index(pieces[0])]!r}; name each word once")
        found.append(pieces[0])
    return found


def continuation_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> Ids:
    """The tokens of each word as it follows other text, any number of them.

    Raises ``SurgeryError`` for a word that gives no token, or one that another begins with: saying the longer one
    would count for both.
    """
    found = tuple(word_pieces(tokenizer, word) for word in words)
    for word, pieces in zip(words, found, strict=True):
        if not pieces or tokenizer.unk_token_id in pieces:
            raise SurgeryError(f"word {word!r}: the tokenizer does not know it; choose another word")
        for other, longer in zip(words, found, strict=True):
            if other != word and longer[: len(pieces)] == pieces:
                raise SurgeryError(
                    f"word {word!r}: {other!r} begins with its tokens, so that one would count for both; name words "
                    "none of which begins another"
                )
    return found


def answered(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[tuple[int, ...], int]:
    """Token ids of ``prompt`` with ``answer`` behind it, and where the answer's tokens start.

    The prompt's tokens are those that it has alone, which is what stands before an answer when the model is used; no
    token holds a piece of both. Without a prompt the answer starts at 0, or behind what the tokenizer puts before it.
    """
    if not prompt:
        (ids,) = text_tokens(tokenizer, [answer])
        return ids, len(ids) - len(ids_of(tokenizer, [answer])[0])
    before, whole = text_tokens(tokenizer, [prompt, prompt + answer])
    # Encoded together where that leaves the prompt's tokens alone: some tokenizers begin each text anew.
    return (whole if whole[: len(before)] == before else before + ids_of(tokenizer, [answer])[0]), len(before)


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands for the beginning of a text: BOS, else EOS (GPT-2's are one), else None."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return None if found is None else int(found)


def leaves_out_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text without a start token is not what this model was trained on: its tokenizer puts BOS there."""
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in added(tokenizer)[0]
