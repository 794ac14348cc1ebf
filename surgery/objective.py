"""How far a training moved its objective: each term on the same examples before and after it, and the gradients' norms.

A loss that is smaller at the last step than at the first may be that of an easier batch. Here the first examples that
the training takes up are asked twice, without dropout, so that the difference is the training's. A term whose gradient
is a hundredth of another's has no say, whatever its weight.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.moved import Moved, Term

ASKED = 32  # examples, in whole batches
ONLY = "loss"  # the name of a term that stands alone

# Losses of the examples ``rows``, computed by calling ``module`` (the model, or a distributed wrapper around it): one
# tensor, or one for each weighted term by its name, whose sum is the loss.
Losses = Callable[[nn.Module, Sequence[int]], "Float[Tensor, ' rows'] | Mapping[str, Float[Tensor, ' rows']]"]


@dataclass(frozen=True)
class Asked:
    """The terms on the examples asked, at one moment: a value an example, and the norm of each mean's gradient."""

    values: Mapping[str, Float[np.ndarray, " examples"]]
    gradients: Mapping[str, float]


def terms_of(found: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a ``Losses`` gave, as terms."""
    return found if isinstance(found, Mapping) else {ONLY: found}


def total(found: Tensor | Mapping[str, Tensor]) -> Float[Tensor, " rows"]:
    """What a ``Losses`` gave, added up."""
    return torch.stack(list(found.values())).sum(0) if isinstance(found, Mapping) else found


def ask(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    losses: Losses,
    batches: Sequence[Sequence[int]],
    *,
    half: torch.dtype | None = None,
) -> Asked:
    """The terms of ``losses`` on the examples of ``batches``, each batch in one call as in a training.

    ``half``: the dtype of automatic mixed precision, None for none. No ``.grad`` and no random state changes; the
    module stays in evaluation mode.
    """
    module.eval()
    wanted = list(parameters.values())
    count = sum(len(rows) for rows in batches)
    values: dict[str, list[np.ndarray]] = {}
    sums: dict[str, list[Tensor | None]] = {}
    for rows in batches:
        with torch.autocast(wanted[0].device.type, dtype=half, enabled=half is not None):
            terms = terms_of(losses(module, rows))
        for place, (name, each) in enumerate(terms.items()):
            values.setdefault(name, []).append(each.detach().double().cpu().numpy())
            held = sums.setdefault(name, [None] * len(wanted))
            if not each.requires_grad:
                continue
            more = place + 1 < len(terms)
            found = torch.autograd.grad(each.float().sum() / count, wanted, retain_graph=more, allow_unused=True)
            for number, gradient in enumerate(found):
                old = held[number]
                held[number] = old if gradient is None else gradient if old is None else old + gradient
    norms = {name: _norm([each for each in held if each is not None]) for name, held in sums.items()}
    return Asked({name: np.concatenate(each) for name, each in values.items()}, norms)


def moved(before: Asked, after: Asked) -> Moved:
    """Two moments of one training; a term that only one of them has counts as 0 in the other."""
    names = list(dict.fromkeys([*before.values, *after.values]))
    first, last = (sum(each.values.values()) for each in (before, after))
    change = np.asarray(last) - np.asarray(first)
    error = 1.96 * float(change.std(ddof=1)) / len(change) ** 0.5 if len(change) > 1 else None

    def of(one: Asked, name: str) -> tuple[float, float]:
        return (float(one.values[name].mean()), one.gradients[name]) if name in one.values else (0.0, 0.0)

    terms = {}
    for name in names:
        (was, gradient_before), (now, gradient_after) = of(before, name), of(after, name)
        terms[name] = Term(was, now, gradient_before, gradient_after)
    mean = float(change.mean())
    low, high = (None, None) if error is None else (mean - error, mean + error)
    return Moved(float(np.mean(first)), float(np.mean(last)), low, high, len(change), terms)


def check_gradient(asked: Asked, count: int) -> None:
    """Raises ``SurgeryError`` where no term has a gradient in any of the ``count`` trained parameters."""
    if not any(asked.gradients.values()):
        names = ", ".join(asked.gradients)
        raise SurgeryError(
            f"training: the objective ({names}) has no gradient in any of the {count} trained parameters on the first "
            f"{len(next(iter(asked.values.values())))} examples, so no step would change anything; give a term that "
            "asks for a change a weight above 0"
        )


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.stack([each.float().norm() for each in gradients]).norm()) if gradients else 0.0
