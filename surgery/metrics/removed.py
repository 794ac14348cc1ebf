"""How much of a bias that a training put in was taken out again, pair by pair (BIAS DIFF's "28 % reduction")."""

import numpy as np
from jaxtyping import Bool, Float

from surgery.errors import SurgeryError
from surgery.metrics.metric import RESAMPLES, Metric


def share_removed(
    before: Float[np.ndarray, " pairs"],
    warmed: Float[np.ndarray, " pairs"],
    after: Float[np.ndarray, " pairs"],
    *,
    scorer: str,
    data: str,
    chosen: Bool[np.ndarray, " pairs"] | None = None,
    seed: int = 0,
) -> Metric | None:
    """(warmed - after) / (warmed - before) of the means: the part of the INJECTED increase that is gone again.

    It is how the paper's 28 % comes about: (70.16 - 68.68) / (70.16 - 64.88). 1 is all of it; more than 1 is below
    the original. The values are one number for each pair, of the same pairs in all three; the interval resamples
    pairs, all three together. None where the warm-up raised nothing, for nothing can then be removed; where a
    resample shows no increase its share is infinite, so the interval is cut at -10 and 10.

    Raises ``SurgeryError`` for no pairs or different numbers of them.
    """
    values = [np.asarray(each, dtype=np.float64) for each in (before, warmed, after)]
    if len({each.shape for each in values}) != 1 or values[0].ndim != 1:
        raise SurgeryError(f"{scorer}: got {[each.shape for each in values]}, expected the same pairs three times")
    table = np.stack(values, 1)
    if chosen is not None:
        table = table[chosen]
    if not len(table):
        raise SurgeryError(f"{scorer} on {data}: no pairs to measure; expected at least 1")

    def share(means: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "..."]:
        start, top, end = np.moveaxis(means, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.clip(np.nan_to_num((top - end) / (top - start), nan=0.0), -10, 10)

    means = table.mean(0)
    if means[1] <= means[0]:
        return None
    generator = np.random.default_rng(seed)
    each = np.full(len(table), 1 / len(table))
    resampled = generator.multinomial(len(table), each, size=RESAMPLES) @ table / len(table)
    shares = share(resampled)
    # A resample in which the warm-up raised nothing says that the share may be anything.
    flat = resampled[:, 1] <= resampled[:, 0]
    low, high = np.quantile(np.where(flat, -10, shares), 0.025), np.quantile(np.where(flat, 10, shares), 0.975)
    return Metric(
        value=float(share(means)),
        low=float(low),
        high=float(high),
        n=len(table),
        scorer=f"(warmed - after) / (warmed - before) of the {scorer}",
        data=data,
        ideal=1.0,
        direction="higher",
    )
