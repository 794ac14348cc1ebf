"""Ways to score texts by their gradients at an adapter's factors, and the forward pass that they are compared with."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PROBES, TOKENS = 16, 2048


def perturbed(model: nn.Module) -> None:
    """A fresh adapter's B is zero, and then so is the gradient of A."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.02)
    model.eval()


def batches(ids: Sequence[list[int]], tokens: int = TOKENS) -> list[list[int]]:
    """Places of the texts, by length, as the scorer packs them."""
    found: list[list[int]] = []
    for place in sorted(range(len(ids)), key=lambda place: -len(ids[place])):
        if found and (len(found[-1]) + 1) * len(ids[found[-1][0]]) <= tokens:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def padded(ids: Sequence[list[int]], places: Sequence[int], device: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded on the right."""
    width = max(len(ids[place]) for place in places)
    rows = [ids[place] + [0] * (width - len(ids[place])) for place in places]
    mask = [[1] * len(ids[place]) + [0] * (width - len(ids[place])) for place in places]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def plain(model: Any, ids: Sequence[list[int]], tokens: int = TOKENS) -> None:
    """One forward pass over the texts, logits and all."""
    for places in batches(ids, tokens):
        rows, mask = padded(ids, places, model.device)
        model(input_ids=rows, attention_mask=mask, use_cache=False)


Run = Callable[[], Tensor]


def _streamed(model: Any, given: list[list[int]], ids: list[list[int]], **options: Any) -> Run:
    import hooks

    probe = hooks.influence_probe(model, None, given)
    return lambda: torch.from_numpy(
        hooks.influence(model, None, ids, probe, batch_tokens=TOKENS, **options).scores[:, 0]
    )


def _adam(model: Any, given: list[list[int]], ids: list[list[int]]) -> Run:
    import hooks

    named = {name: torch.full_like(p, 1e-4) for name, p in model.named_parameters() if ".lora_" in name}
    return _streamed(model, given, ids, optimizer="less", moments=hooks.Moments(named, named))


def _factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def direction_of(model: Any, given: list[list[int]]) -> Tensor:
    """The probe's unit gradient at all factors, one behind the other."""
    import hooks

    vectors = hooks.influence_probe(model, None, given).vectors
    return torch.cat([vectors[name.removesuffix(".weight")][0].flatten() for name in _factors(model)])


def gradient_of_one(model: Any, row: list[int]) -> Tensor:
    """The gradient of one text at the factors, as a loop with a batch of one gets it."""
    found = torch.tensor([row], device=model.device)
    loss = functional.cross_entropy(model(input_ids=found, use_cache=False).logits[0, :-1].float(), found[0, 1:])
    gradients = torch.autograd.grad(loss, list(_factors(model).values()))
    return torch.cat([gradient.flatten().float() for gradient in gradients])


@contextmanager
def only_factors(model: nn.Module) -> Iterator[None]:
    """Inside, gradients for the factors and nothing else, as in training them."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def cosines(model: Any, ids: list[list[int]], direction: Tensor) -> Tensor:
    """Of each text's gradient with the direction, text by text."""
    scores = []
    for row in ids:
        gradient = gradient_of_one(model, row)
        scores.append(gradient @ direction / gradient.norm())
    return torch.stack(scores)


def _loop(model: Any, given: list[list[int]], ids: list[list[int]]) -> Run:
    direction = direction_of(model, given)

    def run() -> Tensor:
        with only_factors(model):
            return cosines(model, ids, direction)

    return run


def _vmap(model: Any, given: list[list[int]], ids: list[list[int]]) -> Run:
    from torch.func import functional_call, grad, vmap

    direction = direction_of(model, given)

    def loss(factors: dict[str, Tensor], row: Tensor, mask: Tensor) -> Tensor:
        # A mask would make transformers look at its values, which vmap forbids; on the right of a causal model
        # padding changes nothing that is learnt.
        places = torch.arange(len(row))[None]
        arguments = {"input_ids": row[None], "position_ids": places, "use_cache": False}
        logits = functional_call(model, factors, (), arguments).logits[0, :-1]
        each = functional.cross_entropy(logits, row[1:], reduction="none")
        return (each * mask[1:]).sum() / mask[1:].sum()

    def run() -> Tensor:
        scores = torch.zeros(len(ids))
        factors = {name: parameter.detach() for name, parameter in _factors(model).items()}
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")  # the fused kernels have no batching rule
        for places in batches(ids):
            rows, mask = padded(ids, places, "cpu")
            found = vmap(grad(loss), in_dims=(None, 0, 0))(factors, rows, mask)
            gradients = torch.cat([part.flatten(1) for part in found.values()], 1)
            scores[places] = gradients @ direction / gradients.norm(dim=1)
        model.set_attn_implementation(before)
        return scores

    return run


def _bergson(model: Any, given: list[list[int]], ids: list[list[int]]) -> Run:
    import hooks

    bergson: Any = __import__("bergson")
    from bergson.score.score_writer import InMemorySequenceScoreWriter  # type: ignore[import-not-found,unused-ignore]
    from datasets import Dataset

    vectors = hooks.influence_probe(model, None, given).vectors
    queries = {name.removeprefix("model."): vector.flatten(1) for name, vector in vectors.items()}
    data = Dataset.from_dict({"input_ids": ids, "length": [len(row) for row in ids]})

    def run() -> Tensor:
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)  # as bergson itself sets a model up
        writer = InMemorySequenceScoreWriter(len(ids), 1)
        scorer = bergson.Scorer(queries, list(queries), writer, torch.device("cpu"), torch.float32, unit_normalize=True)
        with tempfile.TemporaryDirectory() as folder:
            config = bergson.IndexConfig(run_path=str(Path(folder) / "run"), loss_reduction="mean")
            config.partial_run_path.mkdir(parents=True, exist_ok=True)
            bergson.collect_gradients(
                model, data, bergson.GradientProcessor(), config,
                batches=batches(ids), target_modules=set(queries), scorer=scorer,
            )  # fmt: skip
        return writer.scores[:, 0]

    return run


WAYS: dict[str, Callable[..., Run]] = {
    "streamed": _streamed,
    "streamed, LESS's Adam": _adam,
    "streamed, recomputing": lambda *given: _streamed(*given, checkpointing=True),
    "loop of one (LESS)": _loop,
    "vmap (TRAK)": _vmap,
    "bergson": _bergson,
}
