"""The terms of one training: sequences, the places whose next token counts, a target from the untouched model, a loss.

>>> terms = [words_term(ids, he_she), hold_term("hints", hint_ids), hold_term("texts", text_ids, positions="all")]
>>> trained = equalize(model, terms, plan, blocks=(25,), seed=0)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.data.shares import check_shares
from surgery.edits.equalize.target import TOP, among, divergence, even_out, imbalance, keep, raised, share_out
from surgery.errors import SurgeryError

Ids = Sequence[Sequence[int]]
Target = tuple[Tensor, ...]
SPANS = {"last": (-1, None), "all": (0, None), "inner": (0, -1)}


@dataclass(frozen=True)
class Term:
    """One term of the loss: ``weight`` times ``loss``, for examples of ``size`` consecutive sequences each.

    ``places[i]`` are the positions of sequence i whose next-token logits are needed. ``target`` is called once, with
    the untouched model's logits at the places of some sequences, and gives what to keep, each tensor with a row for
    each place (nothing: an empty tuple). ``loss`` is called with the model's logits at the places of the sequences of
    some examples, what was kept of them, and the numbers of these sequences; it gives one loss an example.
    """

    name: str
    weight: float
    ids: Ids
    places: tuple[tuple[int, ...], ...]
    target: Callable[[Float[Tensor, "places vocab"]], Target]
    loss: Callable[[Float[Tensor, "places vocab"], Target, Sequence[int]], Float[Tensor, " examples"]]
    size: int = 1
    untouched: bool = True
    """Whether ``target`` keeps anything; where it does not, the untouched model need not run for it."""
    together: Callable[[Sequence[Target]], Sequence[Target]] | None = None
    """Called once, with what was kept of all sequences, where a target depends on other sequences; gives it anew."""

    def __post_init__(self) -> None:
        if not self.ids or len(self.ids) % self.size or len(self.places) != len(self.ids):
            raise SurgeryError(
                f"term {self.name!r}: got {len(self.ids)} sequences and places of {len(self.places)}; expected a "
                f"positive multiple of {self.size}, each with its places; give it texts, or leave it out"
            )
        if not 0 < self.weight < float("inf"):
            raise SurgeryError(
                f"term {self.name!r}: got weight {self.weight}, expected a positive number; leave it out for 0"
            )

    @property
    def only_last(self) -> bool:
        """Whether every sequence is read at its last token alone."""
        return all(at == (len(row) - 1,) for at, row in zip(self.places, self.ids, strict=True))

    @property
    def count(self) -> int:
        """How many examples there are."""
        return len(self.ids) // self.size


def words_term(
    ids: Ids,
    words: Sequence[int],
    *,
    shares: Sequence[float] | None = None,
    weight: float = 1.0,
    emphasis: float = 0.0,
    power: float = 1.0,
    name: str = "words",
    top: int = TOP,
) -> Term:
    """KL(target || model) after the last token, the mass of ``words`` shared out by ``shares`` (default: equally).

    That KL counts a gap by the mass of the words. ``emphasis`` times the KL among the words alone comes on top, which
    counts the gap of every prompt alike; it has the same optimum. ``power`` is that of the mass's odds (``share_out``).
    """
    chosen = check_shares(words, shares)

    def aim(logp: Float[Tensor, "places vocab"]) -> Float[Tensor, "places vocab"]:
        return share_out(logp, words, chosen, power)

    return _term(name, weight, ids, "last", aim, words, emphasis, top)


def hold_term(
    name: str,
    ids: Ids,
    *,
    positions: str = "last",
    weight: float = 1.0,
    words: Sequence[int] = (),
    emphasis: float = 0.0,
    power: float = 1.0,
    top: int = TOP,
) -> Term:
    """KL(untouched || model): the mean over all positions of each text, the last one, or all but that (``inner``).

    ``words`` are always among the tokens kept of a target, however unlikely; ``emphasis`` is as in ``words_term``. With
    another ``power`` than 1 their ratios are held to that power, at the mass that they have.

    Raises ``SurgeryError`` for unknown ``positions``, and ``emphasis`` or ``power`` on fewer than two words.
    """
    if positions not in SPANS:
        raise SurgeryError(f"positions of {name}: got {positions!r}, expected one of {', '.join(SPANS)}")
    if emphasis and len(words) < 2:
        raise SurgeryError(f"emphasis of {name}: got {emphasis:g} and {len(words)} words; expected at least 2 of them")
    if power != 1 and len(words) < 2:
        raise SurgeryError(f"power of {name}: got {power:g} and {len(words)} words; expected at least 2 of them")

    def aim(logp: Float[Tensor, "places vocab"]) -> Float[Tensor, "places vocab"]:
        return logp if power == 1 else raised(logp, words, power)

    return _term(name, weight, ids, positions, aim, words, emphasis, top)


def hints_term(
    name: str,
    ids: Ids,
    words: Sequence[int],
    *,
    shares: Sequence[float] | None = None,
    weight: float = 1.0,
    emphasis: float = 0.0,
    power: float = 1.0,
    top: int = TOP,
) -> Term:
    """KL(target || model) after prompts whose hint settles the word, each prompt with every hint, one after the other.

    The target is ``even_out``: the preference goes that all hints of a prompt have in common, and of what is left the
    words' ratios are held to ``power``. ``emphasis`` is as in ``words_term``.

    Raises ``SurgeryError`` for a number of prompts that is no multiple of the number of words.
    """
    if len(ids) % len(words):
        raise SurgeryError(
            f"term {name!r}: got {len(ids)} prompts for {len(words)} hints; expected each prompt with every hint"
        )
    held = hold_term(name, ids, weight=weight, words=words, emphasis=emphasis, top=top)
    return replace(held, together=partial(_even, words=words, shares=shares, power=power))


def _even(
    targets: Sequence[Target], *, words: Sequence[int], shares: Sequence[float] | None, power: float
) -> Sequence[Target]:
    """The targets of prompts, with ``even_out`` at the words."""
    tokens, logs = (torch.cat([target[part] for target in targets]) for part in (0, 1))
    at = (tokens[:, None] == torch.tensor(words, device=tokens.device)[:, None]).int().argmax(-1)  # prompts words
    evened = even_out(logs.gather(1, at).unflatten(0, (-1, len(words))), shares, power).flatten(0, 1)
    logs = logs.scatter(1, at, evened)
    ratios = evened.log_softmax(-1)
    return [
        (target[0], logs[row : row + 1], *(ratios[row : row + 1] for _ in target[2:]))
        for row, target in enumerate(targets)
    ]


def _term(
    name: str,
    weight: float,
    ids: Ids,
    positions: str,
    aim: Callable[[Tensor], Tensor],
    words: Sequence[int],
    emphasis: float,
    top: int,
) -> Term:
    places = tuple(tuple(range(len(row)))[slice(*SPANS[positions])] for row in ids)

    def target(logits: Float[Tensor, "places vocab"]) -> Target:
        log_q = aim((logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1))
        return (*keep(log_q, words, top), *((among(log_q, words),) if emphasis else ()))

    def loss(logits: Float[Tensor, "places vocab"], kept: Target, rows: Sequence[int]) -> Float[Tensor, " examples"]:
        each = divergence((kept[0], kept[1]), logits)
        if emphasis:
            each = each + emphasis * imbalance(kept[2], logits, words)
        counts = torch.tensor([len(places[row]) for row in rows], device=each.device)
        owner = torch.repeat_interleave(torch.arange(len(rows), device=each.device), counts)
        return each.new_zeros(len(rows)).index_add(0, owner, each) / counts

    return Term(name, weight, ids, places, target, loss)
