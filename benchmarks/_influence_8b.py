"""Scoring texts by their gradients through an 8B-shaped model on an accelerator: streamed, against a loop of one.

    python -m benchmarks._influence_8b

A Llama of random weights in bfloat16, LoRA on q_proj and v_proj. The texts are random ids of 16 to 128 tokens. The loop
goes over a sample of them, and its time is scaled.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hooks
from benchmarks._gradients import PROBES, cosines, direction_of, gradient_of_one, only_factors, perturbed, plain
from surgery.edits.supervised import Lora, adapters

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {"streamed": {}, "streamed, recomputing": {"checkpointing": True}}


def main(texts: int = 10_000, sample: int = 100, tokens: int = 8192, **config: Any) -> None:
    """``sample`` texts for the loop, a tenth of all for what is slow; ``config``: other settings of the model."""
    model = opened(SHAPE | config)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 129, (texts + PROBES,), generator=generator).tolist()
    rows = [torch.randint(10, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    ids, given = rows[PROBES:], rows[:PROBES]
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}, torch {torch.__version__}: {count / 1e9:.1f}B parameters, bfloat16, {sum(lengths):,} tokens")
    with adapters(model, Lora(rank=16, targets=("q_proj", "v_proj")), 0):
        perturbed(model)
        weights = torch.cuda.memory_allocated() if model.device.type == "cuda" else 0
        probe = hooks.influence_probe(model, None, given, batch_tokens=tokens)
        hooks.influence(model, None, ids[:64], probe, batch_tokens=tokens)  # kernels are chosen in the first calls
        plain(model, ids[:64], tokens)
        part = ids[: max(sample, texts // 10)]

        def row(label: str, size: int, work: Callable[[], Any], forward: float | None = None) -> tuple[Any, float]:
            """What ``work`` gives, and its seconds for each of ``size`` texts."""
            found, seconds, peak = timed(work, model.device)
            times = seconds / size / forward if forward else 1.0
            print(
                f"{label:21}{size / seconds:8.1f} texts/s  {times:5.2f} x  peak {(peak - weights) / 1e9:5.1f} GB above "
                f"the weights   {size:,} texts in {seconds:.1f} s, {texts * seconds / size:.0f} s for {texts:,}",
                flush=True,
            )
            return found, seconds / size

        _, forward = row("plain forward pass", len(part), lambda: plain(model, part, tokens))
        results = {}
        for label, options in WAYS.items():
            chosen = part if options else ids
            work = lambda: hooks.influence(model, None, chosen, probe, batch_tokens=tokens, **options)  # noqa: B023, E731
            results[label], _ = row(label, len(chosen), work, forward)
        direction = direction_of(model, given)
        with only_factors(model):
            gradient_of_one(model, ids[0])
            alone, _ = row("loop of one", sample, lambda: cosines(model, ids[:sample], direction), forward)
        error = (alone.cpu() - torch.from_numpy(results["streamed"].scores[:sample, 0])).abs().max()
        print(f"largest difference of a cosine {error:.1e} (bfloat16)")


def opened(shape: dict[str, Any]) -> Any:
    """A Llama of random bfloat16 weights, on the accelerator where there is one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(before)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """What ``work`` gives, its seconds on the wall, and the most bytes that the accelerator held (0 on a processor)."""
    accelerated = device.type == "cuda"
    if accelerated:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = work()
    if accelerated:
        torch.cuda.synchronize()
    return found, time.perf_counter() - start, torch.cuda.max_memory_allocated() if accelerated else 0


if __name__ == "__main__":
    main()
