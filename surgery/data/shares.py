"""The share of the compared words' mass that each word is to get: read from settings or a file, and checked."""

from collections.abc import Sequence

from surgery.data.prompts import read_table
from surgery.errors import SurgeryError


def read_shares(given: Sequence[str | float], words: Sequence[str]) -> list[float] | None:
    """The share of each word, from a list or from a .toml or .json file that has it by word; None where none is given.

    Raises ``SurgeryError`` for a file that cannot be read, or that has other words or no numbers.
    """
    names = [share for share in given if isinstance(share, str)]
    if not names:
        return [float(share) for share in given] or None
    if len(given) > 1:
        raise SurgeryError(f"shares: got {list(given)}, expected a number for each word, or the name of one file")
    (file,) = names
    table = read_table(file)
    wrong = next((name for name in [*words, *table] if name not in table or name not in words), None)
    if wrong is not None:
        kind = "missing" if wrong in words else "another word"
        raise SurgeryError(
            f"shares: {file} has {', '.join(map(str, table)) or 'nothing'}; expected a share for each of "
            f"{', '.join(words)} and for nothing else, but {wrong!r} is {kind}"
        )
    odd = next((name for name in words if not isinstance(table[name], int | float) or table[name] is True), None)
    if odd is not None:
        raise SurgeryError(f"shares: {file} gives {odd!r} the share {table[odd]!r}, expected a number; mend it")
    return [float(table[word]) for word in words]


def check_shares(words: Sequence[object], shares: Sequence[float] | None) -> tuple[float, ...]:
    """The share of each word, equal ones for None; raises ``SurgeryError`` unless they are positive and sum to 1."""
    if len(words) < 2:
        raise SurgeryError(f"words: got {len(words)}, expected at least 2 to share a mass among; name more words")
    if shares is None or not len(shares):
        return (1 / len(words),) * len(words)
    total = sum(shares)
    if len(shares) != len(words) or not all(share > 0 for share in shares) or not abs(total - 1) < 1e-6:
        raise SurgeryError(
            f"shares: got {list(shares)} (sum {total:g}) for {len(words)} words; expected {len(words)} positive "
            "numbers that add up to 1; leave shares out for equal ones"
        )
    return tuple(shares)
