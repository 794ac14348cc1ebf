"""StereoSet dev by the default scorer: all its sentences at once against one sentence per pass."""

import os
import platform
import random
import time
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import surgery
from surgery.data import stereoset
from surgery.metrics.sentences import sentence_scores, start_token

SAMPLE = 40  # triples that go through one sentence a pass on a CPU


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """Seconds of both, the largest difference of their scores, and the ratio. Reads the folder SURGERY_DATA."""
    (spec,) = arguments
    folder, device = os.environ.get("SURGERY_DATA"), os.environ.get("BENCH_DEVICE", "cpu")
    if folder is None:
        print("not run: set SURGERY_DATA to the folder that holds stereoset/stereoset_dev.jsonl")
        return
    model, tokenizer = surgery.load(spec, device=device)
    triples = stereoset.load(folder)
    texts = [text for row in triples.rows for text in row.sentences]
    chosen = range(len(triples.rows))
    if device == "cpu":
        chosen = sorted(random.Random(0).sample(chosen, min(SAMPLE, len(chosen))))
    places = [3 * row + column for row in chosen for column in range(3)]
    print(f"{spec}, {model.dtype}, {device}, {torch.get_num_threads()} threads, {platform.processor() or 'cpu'}")
    # Half of the slow passes before and half after, so that a machine that grows slower or faster is fair to both.
    half = len(places) // 2
    first, before = timed(lambda: one_by_one(model, tokenizer, [texts[place] for place in places[:half]]), model)
    fast, seconds = timed(lambda: sentence_scores(model, tokenizer, texts), model)
    last, after = timed(lambda: one_by_one(model, tokenizer, [texts[place] for place in places[half:]]), model)
    slow, plain = np.concatenate([first, last]), (before + after) * len(texts) / len(places)
    how = (
        ""
        if len(places) == len(texts)
        else f" (scaled from a seeded sample of {len(places)} that took {before + after:.1f} s)"
    )
    print(f"{triples.name}: {len(texts)} sentences of {len(triples.rows)} triples, scorer bias-bench")
    print(f"one sentence per pass {plain:8.1f} s{how}")
    print(f"all at once           {seconds:8.1f} s   {plain / seconds:.1f} x")
    print(f"largest difference of a score {np.abs(slow - fast[places]).max():.1e}")


@torch.no_grad()
def one_by_one(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> np.ndarray:
    """bias-bench's scorer as it stands there: a pass for each sentence, the start token's distribution once."""
    start = torch.tensor([[start_token(tokenizer, "bias-bench")]], device=model.device)
    alone = model(start).logits[0, -1].softmax(-1)
    scores = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        later = model(ids).logits[0].softmax(-1)
        p = torch.cat([alone[ids[0, :1]], later[:-1].gather(-1, ids[0, 1:, None])[:, 0]])
        scores.append(2 ** p.log2().mean().item())
    return np.array(scores)


def timed(work, model: PreTrainedModel):  # type: ignore[no-untyped-def]
    """What ``work`` gives, and its seconds."""
    start = time.perf_counter()
    found = work()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - start
