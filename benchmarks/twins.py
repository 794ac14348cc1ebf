"""Which gradients tell a stereotype from its twin: a grid of probes, places, layers and optimisers beside TF-IDF.

    python -m benchmarks.twins MODEL --data DIR [--json F] [--seed N] [--rows N] [--pairs N] [--epochs N] [--lr X]

The warm-up of recipes/bias_diff runs on a mixture; at the original model ("base"), after the last epoch ("last") and
summed over the epochs by learning rate ("all") every way of attribution scores the mixture's rows and the test pairs.
One pass for each place and optimiser: scores are sums over layers, so that every choice of layers comes out of it.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import surgery
from hooks.gradient_influence import (
    Influence,
    Masked,
    Moments,
    Probe,
    content_tokens,
    influence,
    influence_probe,
)
from recipes.bias_diff.dataset import Material, encoded, of_folder
from surgery.attribution.scoring import InfluenceConfig, opened
from surgery.attribution.select import coverage, select, twin_auc
from surgery.attribution.tfidf import similarity
from surgery.data.mixtures import build
from surgery.edits.supervised import Lora, Row
from surgery.edits.warmup import Epoch, read_epoch, usual_targets, warm_up
from surgery.metrics.metric import Metric
from surgery.training import Plan

PLACES = (("lora", "none"), ("lora", "frozen_v"), ("lora", "less"), ("weights", "none"))
PROBES = ("plain", "contrast", "contrast, directions equal")
TOP = 0.35


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """Print a line for each way, best twin AUC first; ``--json`` keeps all of them."""
    asked = _asked(arguments)
    if asked.data is None:
        print("twins: needs CrowS-Pairs; run: python -m benchmarks.twins MODEL --data DIR")
        return
    torch.manual_seed(0)
    model, tokenizer = surgery.load(asked.model)
    with tempfile.TemporaryDirectory() as scratch:
        build(asked.mixture, asked.data, Path(scratch) / "mix", seed=asked.seed, rows=asked.rows)
        material = of_folder(Path(scratch) / "mix", f"{asked.mixture}, seed {asked.seed}")
        material = material.limited(probe=asked.pairs, test=asked.pairs)

        def coded(texts: Sequence[str], length: int = 2**20) -> list[Row]:
            return encoded(tokenizer, texts, max_length=length, what="text")[0]

        def looked_at(texts: Sequence[str], length: int = 2**20) -> Sequence[Any]:
            if not asked.content:
                return coded(texts, length)
            masked = content_tokens(tokenizer, texts)
            return [Masked(row.ids[:length], tuple(at for at in row.counted if at < length)) for row in masked]

        rows = coded(material.texts, asked.max_length)
        lora = Lora(16, 32.0, usual_targets(model), 0.05)
        plan = Plan(asked.lr, asked.epochs, 16, "adamw", 0.001, True, "linear", 0.2)
        trained = warm_up(model, rows, plan, lora, seed=asked.seed, folder=Path(scratch) / "warm")
        print(f"warmed up: loss {trained.losses[0]:.3f} to {np.mean(trained.losses[-10:]):.3f}", file=sys.stderr)
        epochs = [read_epoch(Path(scratch) / "warm", number) for number in range(1, asked.epochs + 1)]
        texts = [
            *looked_at(material.texts, asked.max_length),
            *looked_at([pair.text for pair in material.test]),
            *looked_at([pair.anti for pair in material.test]),
        ]
        sides = {
            part: [(pair.text, pair.anti) for pair in material.probe if pair.direction == part]
            for part in ("stereo", "antistereo")
        }
        probes = {
            part: tuple(looked_at(list(side)) for side in zip(*pairs, strict=True)) for part, pairs in sides.items()
        }
        found = list(_controls(material))
        for at, _, optimizer in (place.partition(":") for place in asked.places):
            way = InfluenceConfig(at, (), optimizer, batch_tokens=asked.batch_tokens)
            states: list[Epoch | None] = [*epochs, *([None] if optimizer == "none" else [])]
            passes = {
                epoch.number if epoch else 0: _pass(model, tokenizer, texts, probes, lora, epoch, way, asked.seed)
                for epoch in states
            }
            print(f"{at}, {optimizer}: {len(passes)} passes done", file=sys.stderr)
            for when, parts in _states(passes, epochs):
                found += _ways(parts, material, sides, at=at, optimizer=optimizer, model=when)
    _tell(found, asked)


def _asked(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.twins")
    parser.add_argument("model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--mixture", default="crows_agnews")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=0, help="of the mixture; 0 is as large as the files allow")
    parser.add_argument("--pairs", type=int, default=0, help="of probe and test each; 0 is all")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--content", action="store_true", help="the loss of content words alone (hooks.content_tokens)")
    parser.add_argument(
        "--places", nargs="*", default=[":".join(place) for place in PLACES], help="where and optimizer"
    )
    return parser.parse_args(list(arguments))


def _tell(found: list[dict[str, Any]], asked: argparse.Namespace) -> None:
    """Every way's line, the best first; what its choice is worth on other pairs; and the file, where one is named."""
    found.sort(key=lambda each: -each["twin_auc"]["value"])
    for each in found:
        print(_line(each))
    # The best of hundreds is best by luck too: what was chosen on every second pair is judged on the others.
    for key in ("twin_auc", "balanced"):
        chosen = max(found, key=lambda each: each["halves"][0][key])
        print(
            f"highest {key} on every second pair {chosen['halves'][0][key]:.3f}, on the others "
            f"{chosen['halves'][1][key]:.3f}: {_line(chosen)}"
        )
    if asked.json:
        asked.json.write_text(json.dumps({"settings": vars(asked), "found": found}, indent=1, default=str) + "\n")


def _pass(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Any],
    probes: dict[str, Any],
    lora: Lora,
    epoch: Epoch | None,
    way: InfluenceConfig,
    seed: int,
) -> tuple[Influence, dict[str, np.ndarray]]:
    """Dot products by layer with three probes (plain, contrast of either direction); each probe's norm by layer.

    The latter has a further row for the contrast of either kind of sum, since norms do not add up.
    """
    options: Any = {"batch_tokens": way.batch_tokens}
    with opened(model, lora, epoch, way, seed=seed):
        plain = influence_probe(
            model, tokenizer, {"plain": [row for side, _ in probes.values() for row in side]}, **options
        )
        other = influence_probe(
            model,
            tokenizer,
            {part: stereotypes for part, (stereotypes, _) in probes.items()},
            contrast={part: antis for part, (_, antis) in probes.items()},
            **options,
        )
        count = np.array(other.count) / sum(other.count)
        vectors, lengths = {}, {name: [] for name in PROBES}  # type: ignore[var-annotated]
        for name, vector in plain.vectors.items():
            first, second = other.vectors[name]
            # Both sums in one probe, so that their norms by layer are known.
            sums = torch.stack([vector[0], count[0] * first + count[1] * second, (first + second) / 2])
            vectors[name] = sums
            for probe, length in zip(PROBES, sums.flatten(1).norm(dim=1).tolist(), strict=True):
                lengths[probe].append(length)
        both = Probe(PROBES, vectors, torch.ones(3), (1, 1, 1), plain.digests | other.digests, plain.settings)
        moments = Moments(epoch.exp_avg, epoch.exp_avg_sq) if epoch and way.optimizer != "none" else None
        result = influence(
            model,
            tokenizer,
            texts,
            both,
            optimizer=way.optimizer,
            moments=moments,
            normalise="dot",
            batch_tokens=way.batch_tokens,
        )
    return result, {name: np.array(values) for name, values in lengths.items()}


def _states(passes: dict[int, Any], epochs: Sequence[Epoch]) -> Iterator[tuple[str, list[tuple[float, Any]]]]:
    """Which passes are added with which weights: base, last, all, and what the warm-up changed (last minus base)."""
    last, rates = epochs[-1].number, np.array([epoch.rate for epoch in epochs])
    yield "last", [(1.0, passes[last])]
    yield "all", [(rate, passes[epoch.number]) for rate, epoch in zip(rates / rates.sum(), epochs, strict=True)]
    if 0 in passes:
        yield "base", [(1.0, passes[0])]
        yield "last minus base", [(1.0, passes[last]), (-1.0, passes[0])]


def _ways(
    parts: list[tuple[float, Any]], material: Material, sides: dict[str, Any], **said: str
) -> Iterator[dict[str, Any]]:
    names = parts[0][1][0].layer_names
    for chosen_name, chosen in _layers(names).items():
        for number, probe in enumerate(PROBES):
            for weighing in ("summed", "equal"):
                for normalise in ("cosine", "dot"):
                    scores = 0.0
                    for weight, (result, lengths) in parts:
                        length = lengths[probe][chosen]
                        share = 1 / np.maximum(length, 1e-30) if weighing == "equal" else np.ones(len(length))
                        dots = result.layers[:, number, chosen] @ share
                        # The norm is that over all layers: of the chosen ones alone it is not kept.
                        scores = scores + weight * (dots / result.norms if normalise == "cosine" else dots)
                    ways = {"layers": chosen_name, "probe": probe, "weighing": weighing, "normalise": normalise}
                    yield said | ways | _judged(np.asarray(scores), material)


def _layers(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Subsets of the layers: all, attention or MLP, lower and upper half of the blocks."""
    numbers = np.array([int(re.search(r"\.(\d+)\.", name).group(1)) for name in names])  # type: ignore[union-attr]
    mlp = np.array([bool(re.search(r"mlp|fc|feed_forward|dense_h|dense_4h", name)) for name in names])
    upper = numbers > numbers.max() // 2
    subsets = {
        "all": np.full(len(names), True),
        "lower half": ~upper,
        "upper half": upper,
        "last block": numbers == numbers.max(),
    }
    if mlp.any() and not mlp.all():
        subsets |= {"attention": ~mlp, "mlp": mlp, "upper mlp": mlp & upper, "upper attention": ~mlp & upper}
    return subsets


def _controls(material: Material) -> Iterator[dict[str, Any]]:
    every = [*material.texts, *(pair.text for pair in material.test), *(pair.anti for pair in material.test)]
    near = similarity(every, [pair.text for pair in material.probe])
    yield {"probe": "TF-IDF"} | _judged(near, material)
    away = similarity(every, [pair.anti for pair in material.probe])
    yield {"probe": "TF-IDF contrast"} | _judged(near - away, material)


def _judged(scores: np.ndarray, material: Material) -> dict[str, Any]:
    """Twin AUC over all pairs, by direction, and their mean; coverage of the labelled rows in the top 35 %."""
    count, pairs = len(material.texts), len(material.test)
    stereotypes, antis = scores[count : count + pairs], scores[count + pairs :]
    directions = np.array([pair.direction for pair in material.test])
    wins = (stereotypes > antis) + 0.5 * (stereotypes == antis)
    found: dict[str, Metric] = {"twin_auc": twin_auc(stereotypes, antis, data=material.name)}
    for part in ("stereo", "antistereo"):
        mine = directions == part
        found[f"twin_auc_{part}"] = twin_auc(stereotypes[mine], antis[mine], data=f"{material.name}, {part} pairs")
    assert material.biased is not None
    taken = select(scores[:count], share=TOP)
    found["coverage"] = coverage(taken, material.biased, scorer="coverage", data=material.name)
    halves = [_means(wins[half::2], directions[half::2]) for half in (0, 1)]
    return (
        {key: metric.to_dict() for key, metric in found.items()}
        | _means(wins, directions)
        | {
            "twin_auc": found["twin_auc"].to_dict(),
            "halves": halves,
        }
    )


def _means(wins: np.ndarray, directions: np.ndarray) -> dict[str, float]:
    """The share of wins, and the mean of that of both directions: chance for what only sees the groups' words."""
    by = [float(wins[directions == part].mean()) for part in ("stereo", "antistereo") if (directions == part).any()]
    return {"twin_auc": float(wins.mean()), "balanced": float(np.mean(by))}


def _line(each: dict[str, Any]) -> str:
    keys = ("probe", "at", "optimizer", "model", "layers", "weighing", "normalise")
    twin, stereo, anti, covered = (
        each[key] for key in ("twin_auc", "twin_auc_stereo", "twin_auc_antistereo", "coverage")
    )
    return (
        f"twin AUC {twin['value']:.3f} [{twin['low']:.3f}, {twin['high']:.3f}]  stereo {stereo['value']:.3f}  "
        f"antistereo {anti['value']:.3f}  mean of both {each['balanced']:.3f}  coverage {covered['value']:.3f}  "
        + ", ".join(each[key] for key in keys if key in each)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
