"""Where an index gets its rows: a model, what is looked at in it, and the fingerprints that tell another one apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.gradient_influence import Gradient, Job, Moments, Projected, example_gradients, influence_probe, job
from hooks.gradient_influence.examples import rows
from surgery.attribution.random_projection import RandomProjection
from surgery.files.architecture import facts


@dataclass(frozen=True, eq=False)
class Source:
    """Projected gradients of texts: those of the active LoRA factors, or of the linear layers of the blocks.

    The settings are those of ``hooks.example_gradients``.
    """

    model: nn.Module
    tokenizer: Any
    projection: RandomProjection
    targets: tuple[str, ...] | None = None
    loss: Literal["mean", "sum"] = "mean"
    cut: int | None = None
    optimizer: Literal["none", "less", "frozen_v"] = "none"
    moments: Moments | None = None
    batch_tokens: int = 2048
    checkpointing: bool = False

    def describe(self) -> dict[str, Any]:
        """What an index of this source can be compared with: sha256 fingerprints and settings, as JSON values.

        The batch size is there since it changes the last bits of a gradient, and with them the bytes of an index.
        """
        return {
            "model": fingerprint(self.model, adapter=False),
            "config": config_fingerprint(self.model),
            "adapter": fingerprint(self.model, adapter=True),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "projection": self.projection.to_dict(),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "layers": list(self._job().names),
            "targets": None if self.targets is None else list(self.targets),
            "loss": self.loss,
            "cut": self.cut,
            "optimizer": self.optimizer,
            "moments": None if self.moments is None else _digest({**self.moments.mean, **self.moments.square}),
            "batch_tokens": self.batch_tokens,
        }

    def check(self, texts: Iterable[str]) -> None:
        """Raises ``HookError`` for the first text that has no gradient: no token to predict, or too many."""
        for _ in rows(self.tokenizer, texts, limit=self._job().limit, cut=self.cut):
            pass

    def __call__(self, texts: Sequence[str]) -> Iterator[Projected]:
        """Projected gradients of the texts, batch by batch; ``places`` count from the first of them."""
        return example_gradients(
            self.model,
            self.tokenizer,
            texts,
            project=self._project,
            targets=self.targets,
            optimizer=self.optimizer,
            moments=self.moments,
            loss=self.loss,
            batch_tokens=self.batch_tokens,
            cut=self.cut,
            checkpointing=self.checkpointing,
            window=len(texts),
        )

    def probe(
        self, texts: Sequence[str], *, contrast: Sequence[str] | None = None, mean: Literal["unit", "plain"] = "unit"
    ) -> tuple[Float[Tensor, " dim"], float]:
        """The projected probe, and what a cosine divides its product with a unit gradient by.

        See ``hooks.influence_probe`` for ``contrast`` (twins of the texts) and ``mean``.
        """
        found = influence_probe(
            self.model,
            self.tokenizer,
            list(texts),
            targets=self.targets,
            contrast=None if contrast is None else list(contrast),
            mean=mean,
            loss=self.loss,
            batch_tokens=self.batch_tokens,
            cut=self.cut,
            checkpointing=self.checkpointing,
        )
        parts = [self.projection(name, vector)[0].cpu() for name, vector in found.vectors.items()]
        return torch.stack(parts).sum(0), float(found.scales[0])

    def _job(self) -> Job:
        return job(self.model, targets=self.targets, loss=self.loss, checkpointing=self.checkpointing)

    def _project(self, gradient: Gradient) -> Float[Tensor, "unit dim"]:
        return torch.cat([self.projection(part.layer.name, part.matrix()) for part in gradient.chunks()])


def fingerprint(model: nn.Module, *, adapter: bool) -> str | None:
    """sha256 of a model's weights without its LoRA factors, or of these alone (None where there are none).

    Names are those without PEFT's additions, so that a model and the same model with an adapter have one base.
    """
    found = {_plain(name): tensor for name, tensor in model.state_dict().items() if (".lora_" in name) == adapter}
    return _digest(found) if found else None


def config_fingerprint(model: Any) -> str:
    """sha256 of what makes a model with the same weights compute something else: rotary base, norm, activation, ..."""
    return hashlib.sha256(json.dumps(facts(model.config.to_dict()), sort_keys=True).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of everything that decides the token ids of a text."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        known: Any = {"kind": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        known = json.loads(inner.to_str())
        # These are left behind by the last call, and every call sets them anew.
        known = {key: value for key, value in known.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
