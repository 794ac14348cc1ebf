"""Block fine-tuning (LFTF section 4.2): chosen blocks learn to give the compared words equal probability.

Nothing else trains, the blocks before are computed once (``surgery.forward.residual_cache``), and the model is
left as it was.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooks import anatomy
from surgery.errors import SurgeryError
from surgery.forward.batching import Batch, pad
from surgery.forward.residual_cache import ResidualCache, shortcut
from surgery.forward.word_logs import word_logs
from surgery.moved import Moved
from surgery.training import Log, Plan, train, trainable

OBJECTIVES = ("log", "as_printed")
PARTS = ("all", "matrices", "vectors", "attention", "mlp", "writers", "without_attention", "without_mlp")


@dataclass(frozen=True)
class Trained:
    """What training gave: float32 differences (trained minus base) under the model's parameter names."""

    differences: dict[str, Tensor]
    losses: list[float]
    moved: Moved | None = None
    """How far the training moved its objective."""

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        return sum(tensor.numel() for tensor in self.differences.values())


def word_loss(
    logits: Float[Tensor, "batch vocab"], words: Sequence[int], objective: str = "log"
) -> Float[Tensor, " batch"]:
    """The LFTF loss of each prompt, from the next token's logits.

    ``"log"``: -log P(he) - log P(she), whose only optimum is P(he) = P(she) = 1/2. The paper's own results
    (0.5009 / 0.4982 in the case study, AFGB 0.9999 with one term left out) are those of this form.
    ``"as_printed"``: P(he) + P(she), Eq. 5 as printed, which is smallest when the model says neither word.
    """
    return loss_of(word_logs(logits, words), objective)


def loss_of(chosen: Float[Tensor, "batch words"], objective: str = "log") -> Float[Tensor, " batch"]:
    """``word_loss`` from the words' log-probabilities.

    Raises ``SurgeryError`` for an unknown objective.
    """
    if objective == "log":
        return -chosen.sum(-1)
    if objective == "as_printed":
        return chosen.exp().sum(-1)  # Eq. 5
    raise SurgeryError(f"objective: got {objective!r}, expected one of {', '.join(OBJECTIVES)}")


def names_of(model: PreTrainedModel, blocks: Sequence[int] | None, part: str = "all") -> list[str]:
    """Parameter names of ``part`` of ``blocks``; for None of the whole model, embedding and last norm among them.

    ``part``: all, only attention or mlp, or (LFTF Table 8) without_attention, without_mlp: norms stay trained there.
    matrices: norms and biases are frozen, so that an adapter can hold the whole edit; vectors: they alone train.
    writers: the projections by which attention and MLP add to the stream (W_O and W_out; of fused experts the MLP).

    A parameter that several blocks share (Zamba's attention) is named once, and only where all of them are chosen.

    Raises ``SurgeryError`` for a block that does not exist, an unknown part, a part without parameters, or one that a
    block which was not chosen shares.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if part not in PARTS:
        raise SurgeryError(f"part: got {part!r}, expected one of {', '.join(PARTS)}")
    if blocks is None and part in ("all", "matrices"):
        return [name for name, p in model.named_parameters() if part == "all" or p.ndim > 1]
    parts = anatomy.find(model).blocks
    blocks = range(len(parts)) if blocks is None else blocks
    chosen: list[str] = []
    for index in blocks:
        if not 0 <= index < len(parts):
            raise SurgeryError(f"block {index}: the model has blocks 0 to {len(parts) - 1}; choose one of them")
        block = parts[index]
        attention = _under(names, [block.attention] if block.attention else [])
        mlp = _under(names, [block.mlp] if block.mlp else block.mlp_modules)
        whole = _under(names, [block.name])
        chosen += {
            "all": whole,
            "matrices": [name for name in whole if model.get_parameter(name).ndim > 1],
            "vectors": [name for name in whole if model.get_parameter(name).ndim == 1],
            "attention": attention,
            "mlp": mlp,
            "writers": _under(names, [name for name in (block.attention_writer, block.mlp_writer) if name]),
            "without_attention": [name for name in whole if name not in attention],
            "without_mlp": [name for name in whole if name not in mlp],
        }[part]
    if not chosen:
        raise SurgeryError(
            f"{part} of blocks {list(blocks)}: no parameters found; see hooks.anatomy.find(model).table()"
        )
    return _once(model, chosen, {index: block.name for index, block in enumerate(parts)}, blocks)


def _once(model: PreTrainedModel, chosen: Sequence[str], holders: dict[int, str], blocks: Sequence[int]) -> list[str]:
    """``chosen``, each parameter under its first name. holders: {block: its module}; ``blocks``: those chosen."""
    called: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        called.setdefault(parameter, []).append(name)
    aliases = {name: names for names in called.values() for name in names}
    for name in chosen:
        users = [index for index, module in holders.items() if _under(aliases[name], [module])]
        if not set(users) <= set(blocks):
            raise SurgeryError(
                f"{name}: blocks {', '.join(map(str, users))} share this parameter, so an edit of one of them changes "
                f"all; choose them together (block = {sorted({*blocks, *users})}), or a block or part that shares none"
            )
    return list(dict.fromkeys(aliases[name][0] for name in chosen))


def _under(names: Sequence[str], modules: Sequence[str]) -> list[str]:
    return [name for name in names if any(name.startswith(module + ".") for module in modules)]


def fine_tune(
    model: PreTrainedModel,
    ids: Sequence[Sequence[int]],
    words: Sequence[int],
    plan: Plan,
    *,
    blocks: Sequence[int] | None,
    part: str = "all",
    objective: str = "log",
    seed: int,
    prefix: ResidualCache | None = None,
    state: Path | None = None,
    log: Log | None = None,
    step_done: Callable[[int], None] | None = None,
) -> Trained:
    """Train ``part`` of ``blocks`` (None: all parameters) on prompts ``ids``; the model is left as it was.

    ``prefix`` is the stream entering the first trained block: with it a step starts there and computes the last
    position only; without it each step is the plain forward pass. Both give the same losses.

    Raises ``SurgeryError`` for wrong blocks, parts or objectives, and when the loss is not finite.
    """
    if objective not in OBJECTIVES:
        raise SurgeryError(f"objective: got {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    names = names_of(model, blocks, part)
    if prefix is not None and (blocks is None or prefix.block > min(blocks)):
        raise SurgeryError(f"the prefix enters block {prefix.block}, behind the first trained one; keep it earlier")
    if prefix is not None:
        prefix.refuse_others(ids)
    base = {name: parameter.detach() for name, parameter in model.named_parameters() if name in set(names)}
    with ExitStack() as stack:
        parameters = stack.enter_context(trainable(model, names))
        step = prefix.steps(model) if prefix else None
        run = stack.enter_context(shortcut(model, start=prefix.block, words=words)) if prefix else None

        def losses(module: nn.Module, rows: Sequence[int]) -> Tensor:
            if step and run:
                return loss_of(run(step(rows)), objective)
            batch: Batch = pad(ids, rows, model.device)
            return word_loss(batch.at_last(module(**batch.inputs(), use_cache=False).logits), words, objective)

        losses_of_steps, far = train(
            model, parameters, losses, len(ids), plan, seed=seed, state=state, log=log, step_done=step_done
        )
        with torch.no_grad():
            differences = {
                name: (parameter.detach() - base[name].float()).cpu() for name, parameter in parameters.items()
            }
    return Trained(differences, losses_of_steps, far)
