"""Fine-tuning a sequence classifier: plain, against an adversary, with IBM's or CBE's term, or with CrAWD's module.

A model is a transformers sequence classifier (BERT and its like); groups are numbers, -1 where a row is of none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hooks.activations import model_inputs
from surgery.edits import debiasing
from surgery.errors import SurgeryError
from surgery.forward.batching import batches_for
from surgery.forward.evaluation import evaluating
from surgery.modules import cross_attention
from surgery.moved import Moved
from surgery.progress import Advance
from surgery.training import Log, Plan, train, trainable

METHODS = ("crawd", "vanilla", "adversarial", "ibm", "cbe")


@dataclass(frozen=True)
class Examples:
    """Texts as token ids with their special tokens, the class of each, and the group it is about (-1: none)."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Method:
    """How to train: ``weight`` is that of the adversary (``adversarial``) or of the added term (``ibm``, ``cbe``)."""

    name: str = "crawd"
    reference: tuple[str, ...] = ()
    weight: float = 0.0
    module: dict[str, Any] = field(default_factory=dict)
    """Settings of ``cross_attention.attached``."""


@dataclass(frozen=True)
class Fitted:
    """Differences of the classifier (trained minus before), CrAWD's module if there is one, the loss of each step."""

    differences: dict[str, Tensor]
    module: cross_attention.Weights | None
    losses: list[float]
    parameters: int
    moved: Moved | None = None
    """How far the training moved its objective."""


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -strength (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def reverse(values: Tensor, strength: float) -> Tensor:
    """``values``; what comes back as their gradient is multiplied by ``-strength``."""
    return cast(Tensor, _Reverse.apply(values, strength))


class Adversary(nn.Module):
    """Guesses the group from what the classifier's last layer reads; the encoder learns to make that impossible.

    One hidden layer of the same width. Of the rows of class 1 alone, since equality of opportunity asks for equal true
    positive rates (CrAWD 5.3 after Zhao et al. 2018; Zhang et al. 2018, section 3). Neither says more of its shape.
    """

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, groups)

    def forward(self, pooled: Float[Tensor, "batch width"], strength: float) -> Float[Tensor, "batch group"]:
        """Logits over the groups, through the gradient's reversal."""
        return self.outer(torch.relu(self.inner(reverse(pooled, strength))))


class _Judged(nn.Module):
    """The classifier and its adversary as one module, so that one call of it computes both."""

    def __init__(self, model: PreTrainedModel, adversary: Adversary | None) -> None:
        super().__init__()
        self.model, self.adversary = model, adversary

    def forward(self, inputs: Mapping[str, Tensor], strength: float) -> tuple[Tensor, Tensor | None]:
        if self.adversary is None:
            return self.model(**inputs).logits, None
        with _head_input(self.model) as read:
            logits = self.model(**inputs).logits
            return logits, self.adversary(read(), strength)


def open_classifier(directory: Path | str, classes: int, *, seed: int, device: Any = "cpu") -> PreTrainedModel:
    """The encoder of a checkpoint with a new classifier behind it, in float32; ``seed`` draws what is new.

    Raises ``SurgeryError`` where transformers has no sequence classifier for this architecture.
    """
    level = logging.get_verbosity()
    try:
        logging.set_verbosity_error()  # it warns that the classifier is new, which is what was asked for
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                directory, num_labels=classes, dtype=torch.float32
            )
    except (OSError, ValueError, KeyError) as error:
        raise SurgeryError(
            f"{directory}: transformers gives no sequence classifier for it ({str(error).splitlines()[0][:160]}); "
            "expected an encoder such as BERT"
        ) from error
    finally:
        logging.set_verbosity(level)
    return cast(PreTrainedModel, nn.Module.to(model, device).eval())


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    method: Method,
    plan: Plan,
    *,
    seed: int,
    state: Path | None = None,
    log: Log | None = None,
    step_done: Advance | None = None,
) -> Fitted:
    """Train all of the classifier (and the module, or against an adversary); ``model`` is left as it was.

    Raises ``SurgeryError`` for an unknown method, an adversary without two groups among the rows of class 1, and
    when the loss is not finite.
    """
    if method.name not in METHODS:
        raise SurgeryError(f"method: got {method.name!r}, expected one of {', '.join(METHODS)}")
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    device = model.device
    labels = torch.tensor(examples.labels, device=device)
    # The adversary sees class 1 alone; -100 is what cross_entropy leaves out.
    seen = [g if label == 1 and g >= 0 else -100 for g, label in zip(examples.groups, examples.labels, strict=True)]
    groups = torch.tensor(seen, device=device)
    with ExitStack() as stack:
        module = None
        if method.name == "crawd":
            settings: dict[str, Any] = {"reference": method.reference, "seed": seed, "live": True} | method.module
            module = stack.enter_context(cross_attention.attached(model, tokenizer, **settings))
        penalty = stack.enter_context(_penalty(model, tokenizer, examples, method))
        adversary = _adversary(model, seen, seed) if method.name == "adversarial" else None
        judged = _Judged(model, adversary)

        def losses(called: nn.Module, chosen: Sequence[int]) -> Tensor:
            inputs = _batch(model, examples.ids, chosen)
            rows = list(chosen)
            logits, guessed = called(inputs, method.weight)
            loss = nn.functional.cross_entropy(logits.float(), labels[rows], reduction="none")
            if guessed is not None:
                # The reversal carries the weight: the adversary itself learns at full strength.
                loss = loss + nn.functional.cross_entropy(guessed.float(), groups[rows], reduction="none")
            return loss if penalty is None else loss + method.weight * penalty(inputs)

        parameters = stack.enter_context(trainable(judged, [name for name, _ in judged.named_parameters()]))
        done, far = train(
            judged, parameters, losses, len(examples.ids), plan, seed=seed, state=state, log=log, step_done=step_done
        )
        model.eval()
        weights = cross_attention.weights_of(module) if module is not None else None
        with torch.no_grad():
            named = {name.removeprefix("model."): parameter for name, parameter in parameters.items()}
            differences = {name: (named[name].detach() - was.float()).cpu() for name, was in base.items()}
        count = sum(parameter.numel() for name, parameter in parameters.items() if name.startswith("model."))
    return Fitted(differences, weights, done, count, far)


def predict(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], *, step: Advance | None = None
) -> Float[np.ndarray, "rows classes"]:
    """Probabilities of the classes for each text; the model is left in the mode that it was in.

    Raises ``SurgeryError`` for no text.
    """
    found: np.ndarray | None = None
    with evaluating(model):
        for chosen in batches_for(model, ids, tokens=8192):
            values = model(**_batch(model, ids, chosen)).logits.float().softmax(-1).cpu().numpy()
            found = np.empty((len(ids), values.shape[1])) if found is None else found
            found[chosen] = values
            if step:
                step(len(chosen))
    if found is None:
        raise SurgeryError("predict: got no text, expected at least 1")
    return found


def _batch(model: PreTrainedModel, ids: Sequence[Sequence[int]], chosen: Sequence[int]) -> dict[str, Any]:
    """Padded on the right, since classifiers read the first token; padding is token 0 under mask 0."""
    width = max(len(ids[row]) for row in chosen)
    filled = torch.tensor([[*ids[row], *[model.config.pad_token_id or 0] * (width - len(ids[row]))] for row in chosen])
    mask = torch.tensor([[1] * len(ids[row]) + [0] * (width - len(ids[row])) for row in chosen])
    return model_inputs(model, {"input_ids": filled, "attention_mask": mask})


def _head(model: PreTrainedModel) -> nn.Linear:
    """The last linear layer, which gives the logits."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    if not linear:
        raise SurgeryError(f"{type(model).__name__}: no linear layer of {model.config.num_labels} outputs found")
    return linear[-1]


@contextmanager
def _head_input(model: PreTrainedModel) -> Iterator[Callable[[], Tensor]]:
    """Inside, the function gives what the last linear layer read in the newest pass: (batch width)."""
    held: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        held[:] = [args[0]]

    handle = _head(model).register_forward_pre_hook(keep)
    try:
        yield lambda: held.pop()
    finally:
        handle.remove()


def _adversary(model: PreTrainedModel, groups: Sequence[int], seed: int) -> Adversary:
    if len({group for group in groups if group >= 0}) < 2:
        raise SurgeryError("adversarial: rows of class 1 are of fewer than two groups; expected groups to tell apart")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Adversary(_head(model).in_features, max(groups) + 1).to(model.device)


@contextmanager
def _penalty(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, method: Method
) -> Iterator[Callable[[Mapping[str, Tensor]], Tensor] | None]:
    """What IBM and CBE add: how much of a quantity of tokens the last block attends to."""
    if method.name not in ("ibm", "cbe") or not method.weight:
        yield None
        return
    embedding = cast(Tensor, model.get_input_embeddings().weight)
    if method.name == "ibm":
        of_token = debiasing.word_similarity(embedding, debiasing.word_forms(tokenizer, method.reference))
    else:
        of_token = debiasing.bias_energy(examples.ids, examples.groups, len(embedding)).to(embedding.device)
    with debiasing.last_attention(model) as attention:
        yield lambda inputs: debiasing.attention_similarity(
            attention(), of_token[inputs["input_ids"]], inputs["attention_mask"].bool()
        )
