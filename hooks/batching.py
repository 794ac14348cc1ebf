"""Whether rows may stand beside each other in a batch, and how many tokens a model takes: found out, not listed.

Rows are padded on the right, where a causal model does not look, and no positions are passed, so that each model
derives its own, wherever they start. What is left (a mixture of experts with a capacity, a model that ignores the
mask of an encoder) shows when a few short rows are run together and alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hooks import trace_modules as probe
from hooks.errors import HookError, Note
from hooks.wider import errs_more

_LENGTHS = (7, 4, 2)  # tokens of the rows that are compared
_LONGER = (29, 18, 11)  # and of others, since some mix only where there is more than a few tokens to choose from
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class _Cache(WeakKeyDictionary):
    """What was found out, by model; sent elsewhere (`hooks.remote`), it starts empty."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Cache, ()


_cache = _Cache()


def remembered(model: nn.Module, key: str, find: Any) -> Any:
    """`find()`, kept for this model until its modules change.

    Meanwhile products of float32 matrices are exact: what a caller allows itself for a while (TF32 on an accelerator,
    bfloat16 on a CPU) makes rows differ by more than their neighbours do, and would be kept as a fault of the model.
    """
    fingerprint = probe.fingerprint(model)
    held = _cache.setdefault(model, {})
    if key not in held or held[key][0] != fingerprint:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            held[key] = (fingerprint, find())
        finally:
            torch.set_float32_matmul_precision(precision)
    return held[key][1]


def why_alone(model: nn.Module) -> str | None:
    """Why rows of this model must not share a batch, or None. Found out once a model, and said as a note.

    Compares the states of three short rows, padded on the right under a mask, with those of each row alone; then of
    three longer ones, as far as the model takes and mixes such (`mixes_beyond`).
    """

    def compared(rows: list[list[int]]) -> str | None:
        try:
            together = _batched(model, rows)
            if not together[0].isfinite().all():  # the longest row, unpadded: broken weights, which their reader names
                return None
            return errs_more(together, list(_alone(model, rows)), lambda: _alone(model, rows), _dtype(model))
        except HookError:
            raise
        except Exception as error:  # an unknown architecture may break anywhere; the reason is said
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"

    def find() -> str | None:
        if probe.input_device(probe.pretrained(model)).type == "meta":
            return None
        reason = compared(short_rows(model))
        most = min((limit for limit in (context_limit(model), mixes_beyond(model)) if limit), default=max(_LONGER))
        if reason is None and most >= max(_LONGER):
            reason = compared(short_rows(model, _LONGER))
        if reason:
            name = type(probe.pretrained(model)).__name__
            warnings.warn(f"{name}: a row changes with what stands beside it, so rows run alone ({reason})", Note, 2)
        return reason

    found: str | None = remembered(model, "alone", find)
    return found


def takes_positions(model: nn.Module) -> bool:
    """Whether rows padded on the left need `position_ids` counted from their first token (else: none are passed).

    Found out once a model by comparison with rows alone. Raises HookError where neither gives what a row gives alone.
    """

    def find() -> bool | None:
        core = probe.pretrained(model)
        accepted = "position_ids" in probe.forward_arguments(probe.body(core))
        if probe.input_device(core).type == "meta":
            return accepted
        rows = short_rows(model)
        alone = list(_alone(model, rows))
        for positions in (True, False) if accepted else (False,):
            try:
                quick = _batched(model, rows, left=True, positions=positions)
            except Exception:  # a family may refuse one of the two ways in any manner; then the other is tried
                continue
            if errs_more(quick, alone, lambda: _alone(model, rows), _dtype(model)) is None:
                return positions
        return None

    found: bool | None = remembered(model, "left", find)
    if found is None:
        raise HookError(
            f"{type(probe.pretrained(model)).__name__}: rows padded on the left give other values than the same rows "
            "alone; expected rows padded on the right: set tokenizer.padding_side = 'right'"
        )
    return found


def positions_limit(model: nn.Module) -> int | None:
    """The longest text where positions are a learned table; None for rotary, relative and ALiBi positions."""
    core = probe.pretrained(model)
    limit = getattr(core.config.get_text_config(), "max_position_embeddings", None)
    words = core.get_input_embeddings()
    tables = [m for m in core.modules() if isinstance(m, nn.Embedding) and m is not words]
    # OPT and BART leave out two rows and have them besides; RoBERTa's positions begin behind its padding row.
    room = [
        min(limit, table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))
        for table in tables
        if limit is not None and table.num_embeddings in (limit, limit + 2)
    ]
    return min(room) if room else None


def context_limit(model: nn.Module) -> int | None:
    """The most tokens that the model takes, or None where neither its positions nor its configuration has a limit."""
    limit = positions_limit(model)
    if limit is not None:
        return limit
    found = getattr(probe.pretrained(model).config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found and found > 0 else None


def mixes_beyond(model: nn.Module) -> int | None:
    """The length beyond which rows of different lengths change one another, or None.

    Rotary positions that are scaled by the longest row of a batch (dynamic NTK, LongRoPE) do so behind the length
    that the model was first trained on. Attention to the tokens or blocks of the highest scores (DeepSeek and MiniMax
    sparse attention) does so once there are more to choose from: which of several equal scores is taken depends on the
    width.
    """
    config = probe.pretrained(model).config.get_text_config()
    blocks = getattr(config, "index_topk_blocks", None)
    indexed = (getattr(config, "index_topk", None), blocks and blocks * getattr(config, "index_block_size", 1))
    lengths = [length for length in (_scaled_beyond(config), *indexed) if length is not None]
    return min(map(int, lengths), default=None)


def _scaled_beyond(config: Any) -> int | None:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type", each.get("type")) in ("dynamic", "longrope"):
            first = each.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return int(first or config.max_position_embeddings)
    return None


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in probe.pretrained(model).parameters() if p.is_floating_point())


def short_rows(model: nn.Module, lengths: Sequence[int] = _LENGTHS) -> list[list[int]]:
    """Short rows of ordinary tokens: none of the special ones, and none of the first few, which are often untrained."""
    core = probe.pretrained(model)
    config, size = core.config.get_text_config(), core.get_input_embeddings().weight.shape[0]
    special = {getattr(config, key, None) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    count = sum(lengths)
    spread = range(size // 4, size, max(1, size // (4 * count)))
    ids = [token for token in spread if token not in special] or [0]
    ids *= -(-count // len(ids))
    return [ids[sum(lengths[:n]) : sum(lengths[: n + 1])] for n in range(len(lengths))]


def _alone(model: nn.Module, rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """The states of each row from the model's own plain pass, one after the other: no padding, mask or positions."""
    for row in rows:
        yield from _states(model, {"input_ids": torch.tensor([row])}, [slice(0, len(row))])


def _batched(
    model: nn.Module, rows: Sequence[Sequence[int]], *, left: bool = False, positions: bool = False
) -> list[Tensor]:
    width, fill = max(map(len, rows)), getattr(probe.pretrained(model).config.get_text_config(), "pad_token_id", None)
    pad = [fill if isinstance(fill, int) and fill >= 0 else 0]
    blank = [width - len(row) for row in rows]
    ids = [pad * b + [*row] if left else [*row] + pad * b for row, b in zip(rows, blank, strict=True)]
    mask = [[0] * b + [1] * len(row) if left else [1] * len(row) + [0] * b for row, b in zip(rows, blank, strict=True)]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if positions:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    real = [slice(b, width) if left else slice(0, len(row)) for row, b in zip(rows, blank, strict=True)]
    return _states(model, inputs, real)


def _states(model: nn.Module, inputs: dict[str, Tensor], real: Sequence[slice]) -> list[Tensor]:
    """The last hidden states of each row at its real tokens; of an encoder-decoder the encoder's and the decoder's."""
    core = probe.pretrained(model)
    base, device = probe.body(core), probe.input_device(core)  # of BartForCausalLM the logits stand for its states
    accepted = probe.forward_arguments(base)
    given: dict[str, Any] = {key: value.to(device) for key, value in inputs.items() if key in accepted}
    given |= {"use_cache": False} if "use_cache" in accepted else {}
    if core.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.zeros(len(real), 1, dtype=torch.long, device=device)
    with probe.unchanged(model), unhooked(model):
        out = base(**given)
    if not core.config.is_encoder_decoder:
        return [out[0][row, place] for row, place in enumerate(real)]
    read = [out.encoder_last_hidden_state[row, place] for row, place in enumerate(real)]
    return [states for row in zip(out[0], read, strict=True) for states in row]


@contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Inside, the hooks that this package registered do not run: a pass beside the one that they watch."""
    held = []
    for module in model.modules():
        for kind in _FORWARD_HOOKS:
            hooked = module.__dict__[kind]
            ours = {key: hook for key, hook in hooked.items() if _ours(hook)}
            if ours:
                held.append((hooked, dict(hooked)))
                for key in ours:
                    del hooked[key]
    try:
        yield
    finally:
        for hooked, before in held:
            hooked.clear()
            hooked.update(before)


def _ours(hook: Any) -> bool:
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("hooks.")
