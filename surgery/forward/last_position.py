"""The last position alone: where only the next token is asked, most of the last block and the head need no other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooks import anatomy
from hooks.gradient_influence.jobs import plain_head
from hooks.logit_difference import forward_as
from surgery.errors import SurgeryError
from surgery.forward.batching import Batch
from surgery.forward.last_query import cut_queries, queries
from surgery.forward.word_logs import words_of_head


def headless(model: nn.Module) -> SurgeryError:
    """What is said of a model that gives no next word."""
    said = f"{type(model).__name__} has no language-model head, so it gives no next word"
    return SurgeryError(f"{said}; expected a causal language model")


def head_of(model: PreTrainedModel) -> str:
    """The name of the module that gives the logits. Raises ``SurgeryError`` where there is none."""
    head = anatomy.find(model).head
    if head is None:
        raise headless(model)
    return head


def cut_to_last(
    model: PreTrainedModel, running: list[Batch], stack: ExitStack, depth: int, words: Sequence[int] | None
) -> bool:
    """Until ``stack`` closes, the last block's writers and the head see each prompt's last position only.

    ``depth`` 2: so do its queries; 3: so do the norms before its MLP and before the head. Whether the head gives the
    log-probabilities of ``words`` in place of logits.
    """
    early = depth > 2
    parts, head_name = anatomy.find(model), head_of(model)
    # Found out before anything of the model is changed.
    done, asking = words is not None and _in_one(model, head_name), queries(model) if depth > 1 else []
    final = parts.final_norm if early else None
    if final:
        stack.callback(_cut(model, final, lambda stream: running[-1].at_last(stream)[:, None]).remove)
    # A contiguous 2-D input to the head: a 3-D slice takes a slow matrix product, 8 x slower on a CPU.
    flat = (lambda stream: stream.flatten(0, 1)) if final else lambda stream: running[-1].at_last(stream)
    stack.callback(_cut(model, head_name, flat).remove)
    head: Any = model.get_submodule(head_name)
    if words is not None and done:
        stack.enter_context(replaced(head, lambda stream: words_of_head(stream, head.weight, words), as_tuple=False))
    elif type(head) is nn.Linear and head.weight.device.type == "cpu":
        stack.enter_context(replaced(head, partial(_few_rows, head), as_tuple=False))
    for entry, name in _last_only(parts, early):
        stack.callback(_cut(model, entry, lambda stream: running[-1].only_last(stream)).remove)
        stack.callback(_placed(model, name, lambda stream: running[-1].placed(stream)).remove)
    if depth > 1:
        cut_queries(model, asking, running, stack)
    return done


def _in_one(model: PreTrainedModel, name: str) -> bool:
    """Whether ``words_of_head`` is the quicker way: on a CPU, where the head is a matrix that does not train."""
    head: Any = model.get_submodule(name)
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return False
    wide = head.weight.dtype in (torch.float32, torch.float64)
    return wide and head.weight.device.type == "cpu" and plain_head(model, name)


def _few_rows(head: nn.Linear, stream: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch vocab"]:
    """The head's own product the other way round: for a batch of rows a CPU does it, and its gradient, 1.4 x faster.

    With the few rows laid out as columns it takes a fifth less again.
    """
    logits = (head.weight @ stream.T.contiguous()).T
    return logits if head.bias is None else logits + head.bias


def _last_only(parts: anatomy.Anatomy, early: bool) -> list[tuple[str, str]]:
    """Of the last block: modules whose input may be cut to the last position, and those that add to the stream.

    ``early``: the MLP's norm is cut before it. Keys and values still see every position.
    """
    block = parts.blocks[-1]
    mlp = block.mid if early and block.mlp and block.mid in block.norms else block.mlp
    found = [(block.attention_writer, block.attention_writer), (mlp, block.mlp)] if block.additive else []
    return [(entry, name) for entry, name in found if entry and name]


def _cut(model: nn.Module, name: str, cut: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (cut(args[0]), *args[1:])

    return model.get_submodule(name).register_forward_pre_hook(hook)


def _placed(model: nn.Module, name: str, place: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (place(output[0]), *output[1:]) if isinstance(output, tuple) else place(output)

    return model.get_submodule(name).register_forward_hook(hook)


@contextmanager
def replaced(module: nn.Module, replacement: Callable[..., Tensor], as_tuple: bool) -> Iterator[None]:
    """Replace ``module.forward`` on this one object, and put back what stood there."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = replacement(*args, **kwargs)
        return (out,) if as_tuple else out

    with forward_as(module, forward):
        yield
