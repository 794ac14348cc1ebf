"""Scoring training texts by their gradients: cost against a plain forward pass, and memory, beside other ways."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SENTENCES, REPEATS, PROBES, TOKENS = 128, 3, 16, 2048
WAYS = ("streamed", "streamed, LESS's Adam", "streamed, recomputing", "loop of one (LESS)", "vmap (TRAK)", "bergson")


@dataclass(frozen=True)
class Cost:
    """Seconds of processor time, in multiples of a plain forward pass, and bytes above the weights."""

    ratios: list[float]
    plain: float
    peak: int
    scores: list[float]


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """Each way in a process of its own on one thread, taking turns with a plain forward pass of the same batches.

    Processor time instead of time on the wall, so that other work on the machine does not count.
    """
    (spec,) = arguments
    print(f"{SENTENCES} sentences, LoRA rank 16 on q_proj and v_proj, float32, one thread, batches of {TOKENS} tokens")
    scores: dict[str, Tensor] = {}
    for way in WAYS:
        if way == "bergson" and find_spec("bergson") is None:
            print(f"{way:24} not run: it is not installed here (pip install bergson)")
            continue
        command = [sys.executable, "-m", "benchmarks.influence", spec, way]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            print(f"{way:24} failed (exit code {done.returncode}); its message is above")
            continue
        cost = Cost(**json.loads(done.stdout.splitlines()[-1]))
        scores[way] = torch.tensor(cost.scores)
        low, high = min(cost.ratios), max(cost.ratios)
        error = ""
        if "Adam" not in way and way != WAYS[0]:
            error = f"   largest difference from {WAYS[0]} {(scores[way] - scores[WAYS[0]]).abs().max():.0e}"
        print(
            f"{way:24} {statistics.median(cost.ratios):5.2f} x forward ({low:.2f} to {high:.2f}; forward "
            f"{cost.plain:.1f} s)   peak {cost.peak / 1e6:6.0f} MB above the weights{error}",
            flush=True,
        )


def worker(spec: str, way: str) -> None:
    """One way: memory in its first call, then turns with the plain pass."""
    import surgery
    from surgery.data import genbias, neutral
    from surgery.edits.supervised import Lora, adapters

    torch.set_num_threads(1)
    model, tokenizer = surgery.load(spec, device="cpu", dtype="float32")
    half = SENTENCES // 2
    texts = neutral.sentences()[:half] + [row.text for row in genbias.records()][:half]
    given = neutral.sentences()[half : half + PROBES]
    ids = [list(tokenizer(text)["input_ids"]) for text in texts]
    with adapters(model, Lora(rank=16, targets=("q_proj", "v_proj")), 0):
        perturbed(model)
        run = WORK[way](model, [list(tokenizer(text)["input_ids"]) for text in given], ids)
        with peak_memory() as peak:
            scores = run()
        ratios, plains = [], []
        for _ in range(REPEATS if "loop" not in way else 1):
            start = time.process_time()
            plain(model, ids)
            middle = time.process_time()
            run()
            plains.append(middle - start)
            ratios.append((time.process_time() - middle) / (middle - start))
    print(json.dumps(asdict(Cost(ratios, statistics.median(plains), peak[0], scores.tolist()))))


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


def _direction(model: Any, given: list[list[int]]) -> Tensor:
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
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    yield


def _loop(model: Any, given: list[list[int]], ids: list[list[int]]) -> Run:
    direction = _direction(model, given)

    def run() -> Tensor:
        with only_factors(model):
            found = [gradient_of_one(model, row) for row in ids]
        return torch.stack([gradient @ direction / gradient.norm() for gradient in found])

    return run


def _vmap(model: Any, given: list[list[int]], ids: list[list[int]]) -> Run:
    from torch.func import functional_call, grad, vmap

    direction = _direction(model, given)

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


WORK: dict[str, Callable[..., Run]] = {
    "streamed": _streamed,
    "streamed, LESS's Adam": _adam,
    "streamed, recomputing": lambda *given: _streamed(*given, checkpointing=True),
    "loop of one (LESS)": _loop,
    "vmap (TRAK)": _vmap,
    "bergson": _bergson,
}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Inside, what the process holds at most above what it held before."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    base, peak, stop = resident(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], resident() - base)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def gpu(texts: int = 10_000, sample: int = 100, tokens: int = 8192, **config: Any) -> None:
    """An 8B-shaped Llama of random weights in bfloat16, LoRA on q_proj and v_proj: streamed against a loop of one.

    python -c "from benchmarks import influence; influence.gpu()"

    The texts are random ids of 16 to 128 tokens. The loop goes over a sample of them, and its time is scaled.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    import hooks
    from surgery.edits.supervised import Lora, adapters

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192} | config
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 129, (texts + PROBES,), generator=generator).tolist()
    rows = [torch.randint(10, shape["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
    ids, given = rows[PROBES:], rows[:PROBES]

    def timed(work: Callable[[], Any]) -> tuple[Any, float, int]:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        found = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        return found, time.perf_counter() - start, peak

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}, torch {torch.__version__}: {count / 1e9:.1f}B parameters, bfloat16, {sum(lengths):,} tokens")
    with adapters(model, Lora(rank=16, targets=("q_proj", "v_proj")), 0):
        perturbed(model)
        weights = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        probe = hooks.influence_probe(model, None, given, batch_tokens=tokens)
        hooks.influence(model, None, ids[:64], probe, batch_tokens=tokens)  # kernels are chosen in the first calls
        plain(model, ids[:64], tokens)
        part = ids[: max(sample, texts // 10)]
        _, seconds, peak = timed(lambda: plain(model, part, tokens))
        forward = seconds / len(part)
        print(
            f"plain forward pass   {1 / forward:8.1f} texts/s   1.00 x  peak "
            f"{(peak - weights) / 1e9:5.1f} GB above the weights"
        )
        results = {}
        for label, options in (("streamed", {}), ("streamed, recomputing", {"checkpointing": True})):
            given_ids = ids if not options else part
            found, seconds, peak = timed(
                lambda: hooks.influence(model, None, given_ids, probe, batch_tokens=tokens, **options)  # noqa: B023
            )
            results[label] = found
            print(
                f"{label:21}{len(given_ids) / seconds:8.1f} texts/s  {seconds / len(given_ids) / forward:5.2f} x  peak "
                f"{(peak - weights) / 1e9:5.1f} GB   {len(given_ids):,} texts in {seconds:.1f} s",
                flush=True,
            )
        direction = _direction(model, given)
        with only_factors(model):
            gradient_of_one(model, ids[0])
            alone, seconds, peak = timed(lambda: _cosines(model, ids[:sample], direction))
        print(
            f"loop of one          {sample / seconds:8.1f} texts/s  {seconds / sample / forward:5.2f} x  peak "
            f"{(peak - weights) / 1e9:5.1f} GB   {sample} texts in {seconds:.1f} s, "
            f"{texts * seconds / sample:.0f} s for {texts:,}"
        )
        error = (alone.cpu() - torch.from_numpy(results["streamed"].scores[:sample, 0])).abs().max()
        print(f"largest difference of a cosine {error:.1e} (bfloat16)")


def _cosines(model: Any, ids: list[list[int]], direction: Tensor) -> Tensor:
    scores = []
    for row in ids:
        gradient = gradient_of_one(model, row)
        scores.append(gradient @ direction / gradient.norm())
    return torch.stack(scores)


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2])
