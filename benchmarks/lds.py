"""Do influence estimates foretell what training on other texts would do? The linear datamodeling score (LDS).

The model is trained anew on many random halves of the texts. For each query text the losses that these models have are
ranked beside what an estimate says: the sum of its scores over the half (Park et al. 2023, TRAK, Definition 2.3; the
score is Spearman's correlation over the halves, the mean over queries, with a bootstrap interval over queries). What
two trainings of the same halves in another order agree on is the ceiling for one training.

    python -m benchmarks lds --data DIR --texts 200 --queries 32 --subsets 48 --json lds.json
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import hooks
import surgery
from hooks.gradient_influence import Masked
from surgery.attribution import tfidf
from surgery.data import bios
from surgery.data.texts import Example
from surgery.edits.supervised import Row, encode_rows, evaluate, row_losses, target_names
from surgery.training import Plan, train, trainable

Scores = Float[np.ndarray, "texts queries"]


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """Print the table; ``--json`` keeps it with the losses of every model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks lds")
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="the data folder, for Bias in Bios")
    for name, default in (("texts", 200), ("queries", 32), ("subsets", 48), ("orders", 2), ("length", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--json")
    chosen = parser.parse_args(arguments)
    model, tokenizer = surgery.load(chosen.model)
    people = [each.text for each in bios.load(chosen.data)]
    order = np.random.default_rng(0).permutation(len(people))
    texts, queries = (
        [people[n] for n in part] for part in np.split(order[: chosen.texts + chosen.queries], [chosen.texts])
    )
    work = Work(model, tokenizer, texts, queries, Plan(chosen.lr, chosen.epochs, 20, "adamw"), chosen.length)
    draw = np.random.default_rng(0)
    halves = [np.sort(draw.choice(len(texts), len(texts) // 2, replace=False)) for _ in range(chosen.subsets)]
    losses = np.array([[work.retrained(half, order) for half in halves] for order in range(chosen.orders)])
    print(f"{len(texts)} texts, {len(queries)} queries, {len(halves)} halves in {chosen.orders} orders", flush=True)
    estimates = work.estimates()
    found = {"two orders of training": lds(losses[:1].mean(0), -losses[1:].mean(0))} if chosen.orders > 1 else {}
    for name, scores in estimates.items():
        predicted = np.array([scores[half].sum(0) for half in halves])
        found[name] = lds(losses.mean(0), predicted)
    for name, each in found.items():
        low, high = interval(each)
        print(f"{name:60} LDS {each.mean():+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)
    if chosen.json:
        with open(chosen.json, "w") as file:
            plain = {name: each.tolist() for name, each in found.items()}
            json.dump({"settings": vars(chosen), "lds": plain, "losses": losses.tolist()}, file)


class Work:
    """Trainings on some of the texts, and estimates of what each text does to each query."""

    def __init__(
        self, model: Any, tokenizer: Any, texts: Sequence[str], queries: Sequence[str], plan: Plan, length: int
    ) -> None:
        self.model, self.tokenizer, self.plan, self.length = model, tokenizer, plan, length
        kept = [
            encode_rows(tokenizer, [Example("", text) for text in given], max_length=length).rows
            for given in (texts, queries)
        ]
        self.texts, self.queries, self.plain = *kept, (list(texts), list(queries))
        self.names = [f"{name}.weight" for name in target_names(model, ())]

    @contextmanager
    def trained(self, rows: Sequence[Row], order: int) -> Iterator[hooks.gradient_influence.Moments | None]:
        """Inside, the linear layers of the blocks are trained on the rows; yields Adam's moments at the end."""
        kept: list[torch.optim.Optimizer] = []

        def losses(module: nn.Module, chosen: Sequence[int]) -> Tensor:
            return row_losses(module, rows, chosen, self.model.device)

        def after(_: int, optimizer: torch.optim.Optimizer | None) -> bool:
            kept[:] = [optimizer] if optimizer else []
            return False

        with trainable(self.model, self.names) as parameters:
            train(self.model, parameters, losses, len(rows), self.plan, seed=order, after=after)
            moments = hooks.gradient_influence.adam_moments(self.model, kept.pop()) if kept else None
            self.model.eval()
            yield moments

    def retrained(self, half: Int[np.ndarray, " places"], order: int) -> Float[np.ndarray, " queries"]:
        """The queries' losses after training on one half of the texts."""
        with self.trained([self.texts[place] for place in half], order):
            return evaluate(self.model, self.queries)

    def estimates(self) -> dict[str, Scores]:
        """What each way says a text does for a query: more is a lower loss."""
        texts, queries = self.plain
        content: Any = [hooks.content_tokens(self.tokenizer, given) for given in self.plain]
        content = [[Masked(row.ids[: self.length], row.counted) for row in part] for part in content]
        found = {f"untouched model, {how}": self._influence(how) for how in ("dot", "cosine")}
        found["untouched model, content tokens, dot"] = self._influence("dot", content)
        with self.trained(self.texts, 0) as moments:
            over: Any = {"optimizer": "frozen_v", "moments": moments}
            for how in ("dot", "cosine"):
                found[f"after training on all, {how}"] = self._influence(how)
                found[f"after training on all, over Adam's v, {how}"] = self._influence(how, **over)
            found["after training on all, content tokens, dot"] = self._influence("dot", content)
            found["after training on all, content tokens, over Adam's v, dot"] = self._influence("dot", content, **over)
        for how in ("dot", "cosine"):
            found[f"untouched model, over Adam's v, {how}"] = self._influence(how, **over)
        both = (f"{model}, over Adam's v, dot" for model in ("untouched model", "after training on all"))
        found["sum of both models, over Adam's v, dot"] = sum(found[name] for name in both)  # type: ignore[assignment]
        found["TF-IDF"] = np.stack([tfidf.similarity(texts, [query]) for query in queries], 1)
        return found

    def _influence(self, normalise: Any, texts: Any = None, **options: Any) -> Scores:
        """Of every token, or of what ``texts`` (those trained on, and the queries) count."""
        given, asked = texts or [[list(row.ids) for row in part] for part in (self.texts, self.queries)]
        probes = {str(number): [each] for number, each in enumerate(asked)}
        probe = hooks.influence_probe(self.model, self.tokenizer, probes, mean="plain")
        return hooks.influence(self.model, self.tokenizer, given, probe, normalise=normalise, **options).scores


def lds(losses: Float[np.ndarray, "halves queries"], predicted: Float[np.ndarray, "halves queries"]) -> np.ndarray:
    """Spearman's correlation over the halves of minus the loss and the prediction, for each query."""
    one, two = (values.argsort(0).argsort(0).astype(float) for values in (-losses, predicted))
    one, two = one - one.mean(0), two - two.mean(0)
    return (one * two).sum(0) / np.sqrt((one**2).sum(0) * (two**2).sum(0))


def interval(each: Float[np.ndarray, " queries"]) -> tuple[float, float]:
    """95 % of the means of 2,000 draws of queries."""
    draw = np.random.default_rng(0)
    means = each[draw.integers(len(each), size=(2000, len(each)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
