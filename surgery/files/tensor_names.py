"""Match the tensor names of one checkpoint or model with those of another: prefixes, and tied heads."""

from collections.abc import Collection

from surgery.files.architecture import is_embedding, is_head


def translate(name: str, change: tuple[str, str]) -> str:
    """`name` with the prefix change[0] replaced by change[1]; other names stay."""
    old, new = change
    return new + name[len(old) :] if name.startswith(old) else name


def common_prefix(names: Collection[str], known: Collection[str]) -> tuple[str, str] | None:
    """The one change of prefix (old, new) that turns every name into a known one; ("", "") when all are
    known.

    As little as possible is cut off, and never a number: block 1 is not another spelling of block 0. None
    when no change fits, or several do: `h.0.weight` could be the text or the vision tower's.
    """
    known = set(known)
    if all(name in known for name in names):
        return "", ""
    parts = min(names).split(".")
    for cut in range(len(parts)):
        if cut and parts[cut - 1].isdigit():
            return None
        old, tail = "".join(part + "." for part in parts[:cut]), ".".join(parts[cut:])
        prefixes = {other[: len(other) - len(tail)] for other in known if ("." + other).endswith("." + tail)}
        fitting = [
            (old, new)
            for new in prefixes
            if all(name.startswith(old) and translate(name, (old, new)) in known for name in names)
        ]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def resolve_tied(name: str, known: Collection[str]) -> str | None:
    """The one stored vocabulary matrix that `name`, itself not stored, is tied to; None when no such help is
    needed.

    Checkpoints of tied models store either the embedding (usual) or the head.
    """
    if name in known or not is_vocabulary(name):
        return None
    stored = [other for other in known if is_vocabulary(other)]
    return stored[0] if len(stored) == 1 else None


def is_vocabulary(name: str) -> bool:
    """True for the matrices whose rows are tokens: input embedding and output head."""
    return is_embedding(name) or (is_head(name) and name.endswith(".weight"))
