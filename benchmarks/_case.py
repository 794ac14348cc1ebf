"""One case of docs/which_block.md measured anew: every block edited by two seeds, beside the rankings by gain."""

from typing import Any

import numpy as np
import torch

import surgery
from benchmarks.which_block import Case
from hooks import anatomy
from surgery.data import genbias, genhint
from surgery.data.prompts import load_prompt_set
from surgery.delta import make
from surgery.edits.equalize import equalize, hold_term, prepare, words_term
from surgery.forward.next_token import next_words
from surgery.forward.tokens import encode, word_ids
from surgery.locate.gain import gain_of
from surgery.training import Plan

STEPS, PROMPTS, HINTS, RATE = 60, 32, 16, 1e-4  # of an edit; examples of a step


def measured(spec: str, bias: str, *, steps: int = STEPS) -> Case:
    """Edit every block by itself with equalise and hold, by two seeds, beside the rankings by gain."""
    base = surgery.checkpoint_dir(spec)
    model, tokenizer = surgery.load(base, dtype=torch.float32)
    prompts = load_prompt_set("genbias" if bias == "he_she" else bias)
    words, hinted = word_ids(tokenizer, prompts.words.words), prompts if prompts.hint_templates else None
    train, dev = (genbias.records("profession", part, prompts=prompts) for part in ("train", "dev"))
    hints = genhint.records("train", prompts=hinted) if hinted else genhint.records("train")
    some = [row.text for row in train[: PROMPTS * steps]]
    terms = [
        words_term(encode(tokenizer, some), words),
        hold_term("hints", encode(tokenizer, [row.text for row in hints[: len(some) * HINTS // PROMPTS]])),
    ]
    asked = encode(tokenizer, [row.text for row in dev])
    plan = Plan(RATE, 1, PROMPTS + HINTS, "adam")

    def gap() -> float:
        chances: Any = np.asarray(next_words(model, asked, words).probabilities, dtype=float)
        return float(((chances.max(1) - chances.min(1)) / chances.sum(1)).mean())

    before, blocks = gap(), len(anatomy.find(model).blocks)
    reduction = np.zeros((2, blocks))
    for block in range(blocks):
        given = prepare(model, terms, start=block)
        for seed in (0, 1):
            edit = equalize(model, terms, plan, blocks=(block,), seed=seed, given=given)
            with make(edit.differences, base, base=spec, recipe="", seed=seed).applied(model):
                reduction[seed, block] = 1 - gap() / before
    found = gain_of(model, tokenizer, prompts, train[:256])
    scores = {"natural": found.ranking("natural").scores, "ratio": found.ranking("ratio").scores}
    scores |= {f"{name} attention": found.ranking(name, "attention").scores for name in ("natural", "ratio")}
    scores |= {name: found.ranking(name).scores for name in ("agreement", "inner", "snr", "rgn")}
    return Case(spec, bias, reduction, scores)
