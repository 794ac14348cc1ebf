"""Looking costs little: BMI over a data set against a plain forward pass and run_with_cache, time and memory."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

PROMPTS, REPEATS = 1000, 3
WAYS = ("plain", "bmi", "bmi_10x", "run_with_cache")

WORKER = """
import json, os, resource, sys, threading, time
import torch
import surgery
from surgery.data import genbias
from surgery.forward.batching import pad, by_length
from surgery.forward.tokens import encode

spec, way, count, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model, tokenizer = surgery.load(spec, device="cpu")
texts = [row.text for row in genbias.records("pairs", "all")]
texts = (texts * 10)[: count * (10 if way == "bmi_10x" else 1)]
ids = encode(tokenizer, texts)

if way == "run_with_cache":
    from transformer_lens.model_bridge import TransformerBridge
    bridge = TransformerBridge.boot_transformers(spec, device="cpu", dtype=torch.float32)

import hooks

def work(given):
    if way.startswith("bmi"):
        return hooks.bmi(model, None, given)
    with torch.no_grad():
        for rows in by_length(given, tokens=4096):
            batch = pad(given, rows, "cpu")
            if way == "plain":
                model(**batch.inputs())
            else:
                bridge.run_with_cache(batch.ids, attention_mask=batch.mask)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

work(ids[:1])  # what the libraries load and set up at their first call belongs to no way
base, peak, stop = resident(), [0], []
def watch():
    while not stop:
        peak[0] = max(peak[0], resident())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
times = []
for _ in range(repeats):
    start = time.perf_counter()
    work(ids)
    times.append(time.perf_counter() - start)
stop.append(1)
thread.join()
print(json.dumps({"seconds": sorted(times)[len(times) // 2], "bytes": peak[0] - base, "prompts": len(ids)}))
"""


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """Each way in a process of its own, one after the other, so that memory is its own."""
    (spec,) = arguments
    results = {}
    for way in WAYS:
        repeats = 1 if way in ("bmi_10x", "run_with_cache") else REPEATS
        command = [sys.executable, "-c", WORKER, spec, way, str(PROMPTS), str(repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{way:15} failed (exit code {done.returncode}); its message is above")
            continue
        results[way] = json.loads(done.stdout.splitlines()[-1])
        plain = results["plain"]
        row = results[way]
        per_prompt = row["seconds"] / row["prompts"] / (plain["seconds"] / plain["prompts"])
        print(
            f"{way:15} {row['prompts']:6} prompts {row['seconds']:8.1f} s  {per_prompt:5.2f} x a plain forward pass   "
            f"peak above weights {row['bytes'] / 1e6:7.0f} MB  {row['bytes'] / plain['bytes']:5.2f} x",
            flush=True,
        )


def gpu(prompts: int = 1000, repeats: int = 3) -> None:
    """The same on an accelerator for a model of the shape of Llama 3 8B with random weights, in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import hooks
    from surgery.forward.batching import by_length, pad

    shape = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    device = torch.accelerator.current_accelerator()
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(shape).eval()
        torch.set_default_dtype(torch.float32)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 20, (10 * prompts,), generator=draw).tolist()
    ids = [torch.randint(0, 128256, (length,), generator=draw).tolist() for length in lengths]

    def plain(given: list[list[int]]) -> None:
        with torch.no_grad():
            for rows in by_length(given, tokens=4096):
                model(**pad(given, rows, device).inputs())

    def seconds(work: Callable[[list[list[int]]], object], given: list[list[int]]) -> tuple[float, float]:
        work(given[:300])
        weights = torch.accelerator.memory_allocated()
        times = []
        for _ in range(repeats):
            torch.accelerator.reset_peak_memory_stats()
            torch.accelerator.synchronize()
            start = time.perf_counter()
            work(given)
            torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times)[repeats // 2], (torch.accelerator.max_memory_allocated() - weights) / 1e9

    base = seconds(plain, ids[:prompts])
    for name, given in (("bmi", ids[:prompts]), ("bmi, 10 x", ids)):
        took, peak = seconds(lambda rows: hooks.bmi(model, None, rows), given)
        per = took / len(given) / (base[0] / prompts)
        print(
            f"{name:10} {len(given):6} prompts {took:7.3f} s  {per:5.2f} x a plain forward pass ({base[0]:.3f} s)   "
            f"peak above weights {peak:.2f} GB  {peak / base[1]:.2f} x"
        )
