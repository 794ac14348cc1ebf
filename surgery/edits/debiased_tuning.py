"""Fine-tuning on texts by CrAWD or one of its baselines: cross-entropy, and what each method adds or changes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.edits import debiasing
from surgery.edits.debiased_methods import FORMS, METHODS, Method, factors_of
from surgery.edits.four_bit import check_four_bit
from surgery.edits.reference_projection import about_mean, reference_rows
from surgery.edits.supervised import Row, adapters, factors, target_batch, target_names, token_losses
from surgery.edits.warmup import merged
from surgery.errors import SurgeryError
from surgery.forward.batching import Batch
from surgery.modules import cross_attention
from surgery.modules.projection import Projection
from surgery.moved import Moved
from surgery.progress import Advance
from surgery.training import Log, Plan, train, trainable

# What a method adds to the cross-entropy of each row of a batch, of which the marked tokens are targets.
Term = Callable[
    [Float[Tensor, "batch pos vocab"], Batch, Bool[Tensor, "batch pos"]],
    Float[Tensor, " batch"],
]


@dataclass(frozen=True)
class Tuned:
    """What training found: differences of the base and of which kind they are, the module if there is one, the losses.

    ``differences`` are LoRA factors (kind "lora") or whole differences ("dense"), as ``surgery.delta.make`` takes them.
    """

    differences: dict[str, Tensor]
    kind: str
    module: cross_attention.Weights | Projection | None
    losses: list[float]
    parameters: int
    moved: Moved | None = None
    """How far the training moved its objective."""


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    method: Method,
    plan: Plan,
    *,
    seed: int,
    state: Path | None = None,
    log: Log | None = None,
    step_done: Advance | None = None,
) -> Tuned:
    """Train by ``method`` on ``rows``; ``model`` is left as it was.

    Deep Soft Debias is post hoc (CrAWD 5.3): the embeddings are debiased after the plain fine-tuning. Where embedding
    and head are tied that changes the head, too.

    Raises ``SurgeryError`` for an unknown method, a method without anything to train, a weight for a method that has
    no term, words that do not fit the tokenizer, and when the loss is not finite.
    """
    device = model.device
    if method.form == "projected":
        check(model, tokenizer, method, seed=seed)  # refused now rather than after training
        given: Any = {"seed": seed, "state": state, "log": log, "step_done": step_done}
        return with_projection(
            model, tokenizer, rows, method, tune(model, tokenizer, rows, factors_of(method), plan, **given)
        )
    with _prepared(model, tokenizer, method, seed) as (term, layers, module, pairs):
        fixed = method.form == "projection"  # then nothing of the module learns
        own = (".lora_",) if fixed else (".lora_", "cross_attention.")
        names = [n for n, _ in model.named_parameters() if any(part in n for part in own)]

        def losses(called: nn.Module, chosen: Sequence[int]) -> Tensor | dict[str, Tensor]:
            batch, target_mask = target_batch(rows, chosen, device)
            logits = called(**batch.inputs(), use_cache=False).logits
            plain = token_losses(logits, batch.ids, target_mask)
            if term is None:
                return plain
            return {"cross-entropy": plain, method.name: method.weight * term(logits, batch, target_mask)}

        rates = {name: method.module_rate for name in names if name.startswith("cross_attention.")}
        options: Any = {"seed": seed, "state": state, "log": log, "step_done": step_done, "rates": rates}
        with trainable(model, names) as parameters:
            done, far = train(model, parameters, losses, len(rows), plan, **options)
            model.eval()  # the reference states are taken without dropout
            weights = None if module is None else _as_stored(cross_attention.weights_of(module), method.form)
            count = sum(parameter.numel() for parameter in parameters.values())
            found = factors(layers)
        tuned = Tuned(found, "lora" if weights is None else "module", weights, done, count, far)
    return _softened(model, tuned, pairs, method, seed) if pairs else tuned


def with_projection(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], method: Method, factors: Tuned
) -> Tuned:
    """The form projected: the trained ``factors`` with a projection about the mean state that ``rows`` have with them.

    ``model`` is in 16 or 32 bits, and is left as it was.
    """
    words, decay = debiasing.word_forms(tokenizer, method.reference), method.module.get("decay", 0.2)
    with merged(model, {name: tensor.to(model.device) for name, tensor in factors.differences.items()}):
        projection = about_mean(model, words, tuple(row.ids for row in rows), decay)
    return replace(factors, kind="module", module=projection)


@contextmanager
def _prepared(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method, seed: int) -> Iterator[Any]:
    """Inside, the model is ready for ``tune``: (the method's term, its LoRA layers, its module, pairs of words)."""
    if method.name not in METHODS:
        raise SurgeryError(f"method: got {method.name!r}, expected one of {', '.join(METHODS)}")
    if method.form not in FORMS or (method.form != "printed" and method.name != "crawd"):
        raise SurgeryError(f"form: got {method.form!r} for {method.name}, expected one of {', '.join(FORMS)}, of crawd")
    if method.form in ("projection", "projected") and method.lora is None:
        raise SurgeryError(f"form {method.form}: nothing to train without LoRA; a projection is fixed; set lora")
    if method.lora is None and method.name != "crawd":
        raise SurgeryError(f"method {method.name}: nothing to train without LoRA; only crawd trains its module alone")
    if method.weight and method.name == "vanilla":
        raise SurgeryError(f"weight: got {method.weight}, but vanilla adds nothing to the cross-entropy; leave it at 0")
    pairs = debiasing.word_pairs(tokenizer, method.reference) if method.name == "deep_soft_debias" else []
    with ExitStack() as stack:
        term = stack.enter_context(_term(model, tokenizer, method))
        layers = stack.enter_context(adapters(model, method.lora, seed)) if method.lora else {}
        module = None
        if method.form == "projected":
            debiasing.word_forms(tokenizer, method.reference)  # refused now rather than after training
        elif method.name == "crawd":
            live = method.lora is not None
            settings: dict[str, Any] = {"reference": method.reference, "seed": seed, "live": live} | method.module
            module = stack.enter_context(cross_attention.attached(model, tokenizer, **settings))
            _start(model, tokenizer, module, method, seed)
        yield term, layers, module, pairs


@torch.no_grad()
def _start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    module: cross_attention.CrossAttention,
    method: Method,
    seed: int,
) -> None:
    """The map from [H_x, H_cross] where it does not start as [I, 0]: ``fusion`` is what stands beside [I, 0]."""
    fusion, width = module.fusion.weight, module.width
    if method.form == "projection":
        basis = reference_rows(model, debiasing.word_forms(tokenizer, method.reference))
        fusion[:, :width] = -(1 - module.decay) * (basis.T @ basis).to(fusion)
    elif method.form == "wide_head":
        generator = torch.Generator().manual_seed(seed)
        drawn = nn.init.xavier_uniform_(torch.empty(fusion.shape), generator=generator).to(fusion)
        fusion.copy_(drawn)
        fusion[:, :width] -= torch.eye(width).to(fusion)


def _as_stored(weights: cross_attention.Weights, form: str) -> cross_attention.Weights:
    """The module as its form stores it: without the part of the cross-attention, or as the identity."""
    if form not in ("cross_off", "module_off"):
        return weights
    fusion = cross_attention.without(weights.tensors["fusion.weight"], form.removesuffix("_off"))
    return replace(weights, tensors={**weights.tensors, "fusion.weight": fusion})


def check(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method, *, seed: int, bits: int = 16
) -> None:
    """Raises ``SurgeryError`` now for what ``tune`` would refuse, and for ``bits`` = 4 where that cannot be."""
    if bits == 4:
        check_four_bit(model.device)
    with _prepared(model, tokenizer, method, seed):
        pass


def trained_names(model: PreTrainedModel, method: Method) -> list[str]:
    """The parameters of ``model`` that ``tune`` changes by ``method``; a new module is none of them."""
    names = [f"{name}.weight" for name in target_names(model, method.lora.targets)] if method.lora else []
    if method.name == "deep_soft_debias":
        embedding = _embedding(model)
        names += [name for name, parameter in model.named_parameters() if parameter is embedding]
    return names


@contextmanager
def _term(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method) -> Iterator[Term | None]:
    """What the method adds to each row's cross-entropy, or None; inside, the model is ready to have it computed."""
    words = method.penalised or method.reference
    if not method.weight or method.name == "deep_soft_debias":
        yield None
    elif method.name == "ibm":
        ids = debiasing.word_forms(tokenizer, words)
        similarity = debiasing.word_similarity(_embedding(model), ids)
        with debiasing.last_attention(model) as attention:
            yield lambda _, batch, __: debiasing.attention_similarity(
                attention(), similarity[batch.ids], batch.mask.bool()
            )
    else:
        ids = debiasing.word_forms(tokenizer, words)
        yield lambda logits, _, target_mask: debiasing.mention_loss(logits, ids, target_mask)


def _softened(
    model: PreTrainedModel, tuned: Tuned, pairs: Sequence[tuple[int, int]], method: Method, seed: int
) -> Tuned:
    """The fine-tuned differences multiplied out, with that of the debiased embeddings."""
    embedding = _embedding(model)
    # Four passes over the vocabulary in portions of 512: neither the paper nor Rakshit et al. as cited says how long.
    plan = Plan(lr=1e-3, epochs=4, batch_size=512, optimizer="adamw")
    change = debiasing.soft_debias(embedding, pairs, plan, weight=method.weight, seed=seed)
    name = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    stems = [key.removesuffix(".lora_B") for key in tuned.differences if key.endswith(".lora_B")]
    dense = {stem: tuned.differences[f"{stem}.lora_B"] @ tuned.differences[f"{stem}.lora_A"] for stem in stems}
    return replace(tuned, differences=dense | {name: change.cpu()}, kind="dense")


def _embedding(model: PreTrainedModel) -> Tensor:
    return cast(Tensor, model.get_input_embeddings().weight)
