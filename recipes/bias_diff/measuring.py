"""What is measured before, between and after the phases of BIAS DIFF: CrowS-Pairs by pair, perplexity, suites."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit
from recipes.bias_diff.dataset import Material
from surgery.data import crows_pairs as pairs_of
from surgery.data.neutral import sentences
from surgery.forward.next_token import token_losses
from surgery.forward.tokens import encode
from surgery.metrics import crows_pairs, perplexity
from surgery.metrics.metric import mean_metric
from surgery.metrics.removed import share_removed
from surgery.metrics.sentences import DEFINITIONS, sentence_scores
from surgery.metrics.suite import evaluate_suites, plain
from surgery.progress import Progress


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    material: Material,
    *,
    scorer: str,
    neutral: str = "",
    suites: Sequence[str] = (),
    data: str = "",
    limit: int = 0,
    seed: int = 0,
    prompt: str = "",
    progress: Progress | None = None,
    when: str = "",
) -> dict[str, Any]:
    """``{"scores": metrics as plain dictionaries, "pairs": [[stereotype's, twin's log score]]}`` of the test pairs.

    Beside CrowS-Pairs' scores stands their "margin", the mean difference of the two log scores: it moves where a
    preference grows without turning over. Perplexity is that of the file ``neutral``, or of the shipped sentences;
    ``suites`` need the folder ``data``; ``limit`` rows are taken. With a ``prompt`` before each sentence only the pairs
    are measured. Raises ``SurgeryError`` as the metrics do.
    """
    progress = progress or Progress(quiet=True)
    scores: dict[str, Any] = {}
    logs: list[list[float]] = []
    if material.test:
        scores["crows_pairs"], logs = _pairs(model, tokenizer, material, scorer, prompt, progress, when)
    if not prompt:
        every = sentences(neutral or None)
        lines = every[: limit or None]
        most = context_limit(model)
        with progress.work(f"perplexity {when}", len(lines)) as step:
            sums, counts, _ = token_losses(model, encode(tokenizer, lines, limit=most), step=step)
        name = neutral or "neutral sentences shipped with the package"
        name += f", the first {len(lines)} of {len(every)}" if len(lines) < len(every) else ""
        scores["perplexity"] = perplexity.score(sums, counts, data=name)
        scores |= evaluate_suites(model, tokenizer, suites, data, limit=limit, seed=seed, progress=progress)
    return {"scores": _metrics_only(plain(scores, samples=True)), "pairs": logs}


def _pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    material: Material,
    scorer: str,
    prompt: str,
    progress: Progress,
    when: str,
) -> tuple[dict[str, Any], list[list[float]]]:
    data = f"{material.name}: {len(material.test)} test pairs"
    rows = tuple(
        pairs_of.Pair(pair.text, pair.anti, pair.direction, pair.group, pair.id, pair.id) for pair in material.test
    )
    texts = [text for row in rows for text in (row.sent_more, row.sent_less)]
    before = [prompt.strip()] * len(texts) if prompt else None
    with progress.work(f"CrowS-Pairs {when}", len(texts)) as step:
        found = sentence_scores(model, tokenizer, texts, scorer=scorer, contexts=before, step=step).reshape(-1, 2)
    scored = crows_pairs.score(pairs_of.Pairs(rows, (), data), found, data=data, scorer=scorer)
    logs = found if DEFINITIONS[scorer].pool == "sum" else np.log(found)
    scores: dict[str, Any] = {key: kinds["overall"] for key, kinds in scored.items() if kinds}
    scores["margin"] = mean_metric(
        logs[:, 0] - logs[:, 1],
        scorer=f"log score of the stereotype minus its twin's (nats), {scorer}",
        data=data,
        ideal=0.0,
        direction="nearer",
    )
    return scores, logs.tolist()


def _metrics_only(scores: Any) -> Any:
    """A tree of scores without what is not a number with an interval (such as the lists of skipped rows)."""
    if isinstance(scores, dict) and "value" not in scores:
        return {key: _metrics_only(value) for key, value in scores.items() if isinstance(value, dict)}
    return scores


def injected(before: Any, warmed: Any) -> dict[str, Any] | None:
    """How much the margin of a stereotype over its twin rose, pair by pair; None without test pairs."""
    if not before["pairs"]:
        return None
    was, now = (np.array(each["pairs"]) for each in (before, warmed))
    margin = before["scores"]["crows_pairs"]["margin"]
    return mean_metric(
        (now[:, 0] - now[:, 1]) - (was[:, 0] - was[:, 1]),
        scorer=f"rise of the {margin['scorer']}",
        data=margin["data"],
        ideal=0.0,
        direction="nearer",
    ).to_dict()


STANDARD_ERRORS = 5.0  # that the injected margin should be away from 0, or little can be said of its removal


def standard_errors(injected: Mapping[str, Any]) -> float:
    """How many standard errors the injected margin is away from 0, by its 95 % interval."""
    error = (injected["high"] - injected["low"]) / (2 * 1.96)
    return float(injected["value"] / error) if error else float("inf")


def beyond(main: Any, other: Any) -> dict[str, Any] | None:
    """How much lower the margin is after ``main`` than after ``other``, pair by pair; None without test pairs."""
    if not main["pairs"]:
        return None
    ours, others = (np.array(each["pairs"]) for each in (main, other))
    margin = main["scores"]["crows_pairs"]["margin"]
    return mean_metric(
        (others[:, 0] - others[:, 1]) - (ours[:, 0] - ours[:, 1]),
        scorer=f"further fall of the {margin['scorer']}",
        data=margin["data"],
        ideal=0.0,
        direction="higher",
    ).to_dict()


def removed(material: Material, before: Any, warmed: Any, after: Any) -> dict[str, dict[str, Any]]:
    """``share_removed`` of the CrowS-Pairs scores and of the margin, from three results of ``measure``.

    What the warm-up did not raise has no entry. Of the anti-stereotype score there is none: what is injected are
    stereotypes. Empty without test pairs.
    """
    if not before["pairs"]:
        return {}
    logs = [np.array(each["pairs"]) for each in (before, warmed, after)]
    margins = [each[:, 0] - each[:, 1] for each in logs]
    wins = [100.0 * (each > 0) for each in margins]
    stereo = np.array([pair.direction == "stereo" for pair in material.test])
    data = f"{material.name}: test pairs"
    found = {
        "metric": share_removed(*wins, scorer="metric score", data=data),
        "margin": share_removed(*margins, scorer="margin", data=data),
    }
    if stereo.any():
        found["stereotype"] = share_removed(*wins, scorer="stereotype score", data=data, chosen=stereo)
    return {key: metric.to_dict() for key, metric in found.items() if metric}
