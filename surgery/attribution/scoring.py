"""Scores of training texts and of twins at one epoch of a warm-up: influence on the probe, and on its contrast.

The contrast probe is the mean of the differences of stereotype and anti-stereotype gradients, each scaled to length 1:
what the two share (topic, style) cancels, and no pair outweighs the others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.gradient_influence import (
    Influence,
    Moments,
    Probe,
    TokenInfluence,
    influence,
    influence_probe,
    token_influence,
)
from surgery.edits.supervised import Lora, Row
from surgery.edits.warmup import Epoch, at_epoch, low_rank, merged
from surgery.errors import SurgeryError

METHODS = ("influence", "contrast")


@dataclass(frozen=True)
class InfluenceConfig:
    """Which gradients are compared, and how.

    ``at``: "lora" the factors that were trained (the paper), "weights" the linear layers of the blocks themselves.
    ``targets``: only layers whose names end so. ``optimizer``: what Adam makes of a text's gradient, see
    ``hooks.influence``; the plain weights have no moments, so "none" there. ``layers``: "summed" as they are, or
    "equal" with the probe's part in each layer scaled to length 1, so that the few layers with the largest gradients
    do not drown the others.
    """

    at: Literal["lora", "weights"] = "lora"
    targets: tuple[str, ...] = ()
    optimizer: Literal["none", "less", "frozen_v"] = "less"
    normalise: Literal["cosine", "dot"] = "cosine"
    layers: Literal["summed", "equal"] = "summed"
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.at == "weights" and self.optimizer != "none":
            raise SurgeryError(
                f"optimizer: got {self.optimizer!r} at the plain weights, whose Adam never ran; expected 'none' there"
            )


@dataclass(frozen=True)
class Probes:
    """The rows that say what the bias is. ``antis`` are the twins of ``texts``, in their order, or none."""

    texts: Sequence[Row]
    antis: Sequence[Row] = ()


@contextmanager
def opened(
    model: PreTrainedModel, lora: Lora, epoch: Epoch | None, config: InfluenceConfig, *, seed: int
) -> Iterator[None]:
    """Inside, the model is that of ``epoch`` (None: before the warm-up), with the layers of ``config`` to look at."""
    with ExitStack() as stack:
        if config.at == "lora":
            stack.enter_context(at_epoch(model, lora, epoch, seed=seed))
        elif epoch is not None:
            stack.enter_context(merged(model, low_rank(model, lora, epoch, seed=seed)))
        yield


def probe_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: Probes, config: InfluenceConfig
) -> Probe:
    """One probe with a vector for "influence" and, where there are twins, one for "contrast".

    Raises ``hooks.HookError`` for an empty probe or texts that cannot be learnt.
    """
    options: Any = {"targets": list(config.targets) or None, "batch_tokens": config.batch_tokens}
    plain = influence_probe(model, tokenizer, {"influence": given.texts}, **options)
    if not given.antis:
        return _weighed(plain, config)
    other = influence_probe(model, tokenizer, {"contrast": given.texts}, contrast={"contrast": given.antis}, **options)
    both = Probe(
        plain.names + other.names,
        {name: torch.cat([vector, other.vectors[name]]) for name, vector in plain.vectors.items()},
        torch.cat([plain.scales, other.scales]),
        plain.count + other.count,
        plain.digests | other.digests,
        {**plain.settings, "contrast": "of the second"},
    )
    return _weighed(both, config)


def _weighed(probe: Probe, config: InfluenceConfig) -> Probe:
    """The probe with its layers as ``config.layers`` says."""
    if config.layers == "summed":
        return probe
    vectors = {}
    for name, vector in probe.vectors.items():
        length = torch.linalg.vector_norm(vector.flatten(1), dim=1)
        vectors[name] = vector / length.clamp(min=1e-30)[:, None, None]
    return replace(probe, vectors=vectors, scales=torch.full_like(probe.scales, len(vectors) ** 0.5))


def scores_at(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    given: Probes,
    twins: Probes,
    lora: Lora,
    epoch: Epoch | None,
    config: InfluenceConfig,
    *,
    seed: int,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """``{"rows": {method: scores}, "twins": {method: (stereotypes', twins')}, "losses": nats per token}`` as lists.

    ``twins`` are pairs that are in neither the probe nor the data; they may be empty. A probe text among ``rows`` is
    refused (``hooks.HookError``), as are texts that cannot be learnt.
    """
    every = [*rows, *twins.texts, *twins.antis]
    moments = None
    if epoch is not None and config.optimizer != "none":
        moments = Moments(epoch.exp_avg, epoch.exp_avg_sq)
    with opened(model, lora, epoch, config, seed=seed):
        probe = probe_of(model, tokenizer, given, config)
        found: Influence = influence(
            model,
            tokenizer,
            every,
            probe,
            optimizer=config.optimizer if moments else "none",
            moments=moments,
            normalise=config.normalise,
            batch_tokens=config.batch_tokens,
            progress=progress,
        )
    count, pairs = len(rows), len(twins.texts)
    columns = dict(zip(found.names, found.scores.T.tolist(), strict=True))
    return {
        "rows": {name: column[:count] for name, column in columns.items()},
        "twins": {name: [column[count : count + pairs], column[count + pairs :]] for name, column in columns.items()}
        if pairs
        else {},
        "losses": found.losses[:count].astype(float).tolist(),
        "twin_losses": [found.losses[count : count + pairs].tolist(), found.losses[count + pairs :].tolist()],
    }


def combined(columns: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> dict[str, Any]:
    """``scores_at`` of several epochs as their mean weighted by the learning rates (Eq. 5, divided by their sum).

    The losses are those of the last epoch.
    """
    share = np.asarray(rates) / np.sum(rates)

    def mean(part: str, name: str) -> Any:
        return np.tensordot(share, np.array([column[part][name] for column in columns]), 1)

    last = columns[-1]
    return {
        # In the order of METHODS, whatever that of a file they were read from.
        **{part: {name: mean(part, name) for name in METHODS if name in last[part]} for part in ("rows", "twins")},
        "losses": np.array(last["losses"]),
        "twin_losses": np.array(last["twin_losses"]),
    }


def tokens_at(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    given: Probes,
    lora: Lora,
    epoch: Epoch | None,
    config: InfluenceConfig,
    *,
    method: str,
    seed: int,
) -> list[TokenInfluence]:
    """What each token of ``rows`` adds to the score of ``method``; LESS's Adam does not add up, so v alone stands in.

    ``values`` and ``score`` of the result have that one probe.
    """
    with opened(model, lora, epoch, config, seed=seed):
        probe = probe_of(model, tokenizer, given if method == "contrast" else Probes(given.texts), config)
        place = probe.names.index(method)
        one = Probe(
            (method,),
            {name: vector[place : place + 1] for name, vector in probe.vectors.items()},
            probe.scales[place : place + 1],
            probe.count[place : place + 1],
            probe.digests,
            probe.settings,
        )
        frozen = epoch is not None and config.optimizer != "none"
        return token_influence(
            model,
            tokenizer,
            rows,
            one,
            optimizer="frozen_v" if frozen else "none",
            moments=Moments(epoch.exp_avg, epoch.exp_avg_sq) if frozen and epoch else None,
            normalise=config.normalise,
            batch_tokens=config.batch_tokens,
        )
