"""Match the tensor names of one checkpoint or model with those of another: prefixes, old names, tied heads."""

import re
from collections.abc import Collection, Iterable

from surgery.files.architecture import is_embedding, is_head

# What transformers still reads under an older name, of models that are otherwise the same.
_OLDER = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
        (r"\.weight_g$", ".parametrizations.weight.original0"),
        (r"\.weight_v$", ".parametrizations.weight.original1"),
        (r"^(model\.language_model|language_model\.model)\.model\.", "model.language_model."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(vision_tower|vision_model|multi_modal_projector)\.", r"model.\1."),
    )
)
# In front of the names of a model with a head, and not of the same model without: `base_model_prefix` in transformers.
_BASE_MODEL = (
    "model.",
    "transformer.",
    "bert.",
    "roberta.",
    "distilbert.",
    "electra.",
    "deberta.",
    "gpt_neox.",
    "backbone.",
)
_BUFFER = re.compile(
    r"(^|\.)(inv_freq|masked_bias|position_ids|token_type_ids|num_batches_tracked|embed_positions_sin|embed_positions_cos)$"
)
_MASK = re.compile(r"(^|\.)(attn|attention|self_attention)\.bias$")


def spelling(name: str) -> str:
    """The name that transformers 5 gives a tensor which older versions stored under another."""
    for old, new in _OLDER:
        name = old.sub(new, name)
    return name


def is_leftover(name: str, shape: tuple[int, ...]) -> bool:
    """True for what older versions stored and no model learns: rotary frequencies, position numbers, causal masks."""
    return _BUFFER.search(name) is not None or (_MASK.search(name) is not None and len(shape) == 4)


def same_tensors(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """{name: the known name of the same tensor}, of the names that are known, in an older spelling or without the
    prefix of a base model (or with it, where `names` have none); other names are left out."""
    names = list(names)
    known = set(known)
    found = {name: name for name in names if name in known}
    modern: dict[str, list[str]] = {}
    for other in known:
        modern.setdefault(spelling(other), []).append(other)
    for name in names:
        others = modern.get(spelling(name), [])
        if name not in found and len(others) == 1:
            found[name] = others[0]
    lost = [name for name in names if name not in found]
    for old, new in [*((prefix, "") for prefix in _BASE_MODEL), *(("", prefix) for prefix in _BASE_MODEL)]:
        moved = {name: modern.get(translate(spelling(name), (old, new)), []) for name in lost}
        if lost and all(name.startswith(old) and len(others) == 1 for name, others in moved.items()):
            return found | {name: others[0] for name, others in moved.items()}
    return found


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


def resolve_tied(name: str, known: Collection[str], tied: bool) -> str | None:
    """The one stored vocabulary matrix that `name`, itself not stored, is tied to; None when no such help is
    needed, or none is possible.

    Checkpoints of tied models store either the embedding (usual) or the head. tied: whether embedding and head may be
    one matrix; where they are two, an absent head is stored under another name, and is not the embedding.
    """
    if name in known or not is_vocabulary(name):
        return None
    stored = [other for other in known if is_vocabulary(other)]
    if len(stored) != 1 or (not tied and is_head(name) != is_head(stored[0])):
        return None
    return stored[0]


def is_vocabulary(name: str) -> bool:
    """True for the matrices whose rows are tokens: input embedding and output head."""
    return is_embedding(name) or (is_head(name) and name.endswith(".weight"))
