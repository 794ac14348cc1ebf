"""Unlearning with LoRA: chunks through the losses, watched on a development set that decides swaps, stop and result.

BiasUnlearn section 3, and the baselines that differ from it in what a chunk holds. The model is left as it was.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooks import anatomy
from surgery.edits.block import Trained
from surgery.edits.supervised import Lora, Row, fit, target_names
from surgery.edits.unlearning import losses as equations
from surgery.edits.unlearning.batches import BatchSampler, Item, other
from surgery.edits.unlearning.early_stopping import Decision, EarlyStopping, decide, merit
from surgery.edits.unlearning.reference_logprobs import Reference, continuation_logp, head_at, places_of
from surgery.errors import SurgeryError
from surgery.files.atomic import write_json
from surgery.forward.batching import pad
from surgery.progress import Advance
from surgery.training import Log, Plan

# Scores of the development set by name ("ss", "lms", "icat"), then by bias type.
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Objective:
    """What is done with the sentences of each role; ``weights`` are Eq. 4's alphas by role."""

    weights: Mapping[str, float]
    forget: str = "npo"  # "npo" | "npo_batch" (the released code) | "ascent"
    beta: float = 0.1
    kl_direction: str = "forward"
    retain_by: str = (
        "sentence"  # "sentence": Eq. 2's cross-entropy summed over a sentence's tokens; "token": their mean
    )


@dataclass(frozen=True)
class Unlearned:
    """What was learnt of how many triples, after which step, why it ended, and the scores of the development set."""

    trained: Trained
    triples: int
    kept_step: int
    stopped: str
    evaluations: dict[int, Scores]


def batch_losses(
    model: PreTrainedModel,
    module: nn.Module,
    items: Sequence[Item],
    rows: Sequence[Mapping[str, Row]],
    kept: Reference,
    objective: Objective,
) -> tuple[Float[Tensor, " items"], float]:
    """The unweighted loss of each item, from one padded forward pass; and the forget loss as a multiple of its start.

    The latter is the mean negative log-likelihood of the sentences to forget over the reference's of the same
    sentences: NPO itself stays bounded while a model collapses.
    """
    texts: list[tuple[int, str]] = []
    unrelated, first = [], []
    for item in items:
        first.append(len(texts))
        if item.role == "unrelated":
            unrelated.append(item)
        elif item.role == "prefer":
            texts += [(item.triple, other(item.side)), (item.triple, item.side)]
        else:
            texts.append((item.triple, item.side))
    targeted = [rows[triple][side] for triple, side in texts]
    plain = [rows[item.triple][item.side] for item in unrelated]
    batch = pad([row.ids for row in (*targeted, *plain)], range(len(targeted) + len(plain)), model.device)
    width = batch.ids.shape[1]
    flat, owner = places_of(targeted, width)
    whole, owner_of_whole = places_of(plain, width, last=True)
    places = torch.tensor([*flat, *(len(targeted) * width + at for at in whole)], device=model.device)
    streams = torch.cat([kept.stream[item.triple] for item in unrelated]) if unrelated else None
    logits = head_at(model, module, batch, places, streams)
    logits = logits if logits.dtype == torch.float64 else logits.float()

    logp = continuation_logp(logits[: len(flat)], targeted, owner)
    tokens = logp.new_tensor([len(row.ids) - row.start for row in targeted])
    reference = logp.new_tensor([kept.logp.get(text, math.nan) for text in texts])
    values, ratio = logp.new_zeros(len(items)), 0.0
    for role in {item.role for item in items}:
        mine = torch.tensor([n for n, item in enumerate(items) if item.role == role], device=logp.device)
        at = torch.tensor(first, device=logp.device)[mine]
        if role == "unrelated":
            each = equations.kl(logits[len(places) :], logits[len(flat) : len(places)], objective.kl_direction)
            index = torch.tensor(owner_of_whole, device=each.device)
            part = each.new_zeros(len(plain)).index_add(0, index, each) / each.new_tensor([len(r.ids) for r in plain])
        elif role == "prefer":
            part = equations.dpo(logp[at], logp[at + 1], reference[at], reference[at + 1], objective.beta)
        elif role != "forget":
            part = equations.retention(logp[at], tokens[at] if objective.retain_by == "token" else None)
        elif objective.forget == "npo_batch":
            part = equations.npo_batch(-logp[at] / tokens[at], -reference[at] / tokens[at], objective.beta)
        else:
            part = equations.ascent(logp[at])
            if objective.forget == "npo":
                part = equations.npo(logp[at], reference[at], objective.beta)
        if role == "forget":
            ratio = float(logp[at].detach().sum() / reference[at].sum())
        values = values.index_copy(0, mine, part)
    return values, ratio


def trained_names(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """The parameters that ``unlearn`` changes through factors; raises ``SurgeryError`` where the head is among them."""
    names = target_names(model, targets)
    if anatomy.find(model).head in names:
        raise SurgeryError("target_modules: got the head, with which the kept reference would change; leave it out")
    return [f"{name}.weight" for name in names]


def unlearn(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Row]],
    chunks: BatchSampler,
    kept: Reference,
    objective: Objective,
    control: EarlyStopping,
    plan: Plan,
    *,
    steps: int,
    lora: Lora,
    evaluate: Callable[[], Scores],
    state: Path | None = None,
    log: Log | None = None,
    step_done: Advance | None = None,
) -> Unlearned:
    """Train LoRA factors on ``steps`` chunks (``plan`` says how fast), or fewer when ``control`` ends it.

    ``evaluate`` scores the development set with the model as it is then. With the directory ``state`` an
    interrupted call is continued by calling again with the same arguments, to the same result.

    Raises ``SurgeryError`` when a loss is not finite, when the forget loss explodes before there was a good
    checkpoint to keep, and for factors beside the head, with which the kept reference would change.
    """
    trained_names(model, lora.targets)
    if state:
        state.mkdir(parents=True, exist_ok=True)
    watch = _Watch(control, chunks, evaluate, steps, state, log)
    factors = equations.batch_weights(chunks.sizes, objective.weights)

    def losses(module: nn.Module, places: Sequence[int], at_first: bool = False) -> dict[str, Tensor]:
        now = Decision() if at_first else watch.now
        items = chunks.items(places[0] // chunks.size, swapped=now.swapped, active=now.active)
        mine = [items[place % chunks.size] for place in places]
        each, ratio = batch_losses(model, module, mine, rows, kept, objective)
        watch.seen(mine, each.detach(), ratio)
        weighted = each * each.new_tensor([factors[item.role] for item in mine])
        return {role: weighted * each.new_tensor([float(item.role == role) for item in mine]) for role in chunks.sizes}

    trained = fit(
        model,
        losses,
        steps * chunks.size,
        plan,
        seed=chunks.seed,
        lora=lora,
        state=state / "training.pt" if state else None,
        log=watch.written,
        step_done=step_done,
        after=watch.after,
        asked=partial(losses, at_first=True),
    )
    return Unlearned(trained, len(rows), watch.kept, watch.reason, watch.record)


@dataclass
class _Watch:
    """Follows the steps of one training; its decisions depend on recorded scores alone, so they can be replayed."""

    control: EarlyStopping
    chunks: BatchSampler
    evaluate: Callable[[], Scores]
    steps: int
    folder: Path | None
    log: Log | None
    now: Decision = field(default_factory=Decision)
    record: dict[int, Scores] = field(default_factory=dict)
    exploded: int = 0
    kept: int = 0
    reason: str = ""
    ratio: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    best: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.folder and (file := self.folder / "evaluations.json").is_file():
            written = json.loads(file.read_text("utf-8"))
            self.exploded, self.record = written["exploded"], {int(k): v for k, v in written["scores"].items()}

    def seen(self, items: Sequence[Item], values: Tensor, ratio: float) -> None:
        """The losses of a step, before its update."""
        for role in self.chunks.sizes:
            mine = [value for item, value in zip(items, values.tolist(), strict=True) if item.role == role]
            if mine:
                self.parts[role] = sum(mine) / len(mine)
        self.ratio = ratio

    def written(self, row: dict[str, object]) -> None:
        """A line of the log, with the parts of the loss."""
        if self.log:
            self.log({**row, **self.parts, "forget_ratio": self.ratio})

    def after(self, step: int, optimizer: torch.optim.Optimizer | None) -> bool:
        """Decide what follows step ``step``; see ``surgery.training.After``."""
        if self._exploded(step, optimizer):
            self.reason = f"the forget loss was more than {self.control.explosion:g} x its start at step {step}"
            if not self.kept:
                raise SurgeryError(
                    f"unlearning: {self.reason}, before the first evaluation (every {self.control.every} steps) left a "
                    "good checkpoint; no delta was written; lower lr, or evaluate more often"
                )
            self._restore(optimizer)
            return True
        if step % self.control.every and step != self.steps:
            return False
        if optimizer is not None:
            self.record[step] = self.evaluate()
            self._write()
        self.now = decide(self.control, self.record[step]["ss"])
        self._keep(step, optimizer)
        if self.log and optimizer is not None:
            said = {"evaluated": step, **self.record[step], "swapped": sorted(self.now.swapped)}
            self.log(said)
        if optimizer is not None and self.control.focus:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["factor"] = self.now.factor
        ends = self.now.stop or step == self.steps
        if ends:
            self.reason = (
                f"every bias type was within its tolerance at step {step}"
                if self.now.stop
                else f"all {self.steps} steps were done"
            )
            self._restore(optimizer)
        return ends

    def _exploded(self, step: int, optimizer: torch.optim.Optimizer | None) -> bool:
        if optimizer is None:
            return self.exploded == step
        self.exploded = step if self.ratio > self.control.explosion else 0
        if self.exploded:
            self._write()
        return bool(self.exploded)

    def _keep(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Remember the parameters at an evaluation that is the best until now, the stopping one, or the last."""
        better = not self.kept or merit(self.control, self.record[step]) > merit(self.control, self.record[self.kept])
        if not (better or self.now.stop or self.control.keep == "last"):
            return
        self.kept, self.best = step, []
        if optimizer is not None:
            self.best = [p.detach().cpu().clone() for p in _parameters(optimizer)]
            if self.folder:
                torch.save(self.best, self.folder / f"kept-{step}.pt")

    def _restore(self, optimizer: torch.optim.Optimizer | None) -> None:
        """The kept parameters into the model; a continued run finds them in the folder."""
        if optimizer is None:
            return  # the state that was taken up was saved after this had been done
        if not self.best and self.folder:
            self.best = torch.load(self.folder / f"kept-{self.kept}.pt", weights_only=True)
        with torch.no_grad():
            for parameter, kept in zip(_parameters(optimizer), self.best, strict=True):
                parameter.copy_(kept)

    def _write(self) -> None:
        if self.folder:
            write_json(self.folder / "evaluations.json", {"exploded": self.exploded, "scores": self.record})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
