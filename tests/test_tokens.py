"""What a tokenizer adds by itself: prompts, words, continuations and sentences under every convention that there is."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from families import build

import hooks
from hooks.errors import Note
from hooks.tokens import added, ids_of, reads_whole, text_tokens, word_pieces
from surgery.data.capability import Question
from surgery.forward.next_token import next_words, token_losses
from surgery.forward.shown import shown
from surgery.forward.tokens import answered, encode, word_ids
from surgery.metrics.association import states
from surgery.metrics.multiple_choice import score
from surgery.metrics.sentences import sentence_scores

PROMPT = "the nurse said that"
WORDS = ["the", "nurse", "doctor", "said", "that", "he", "she", "a"]
SPACES = ("words", "bytes", "bytes with a first space", "metaspace", "metaspace always", "llama2")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def tokenizer(spaces: str, bos: bool = False, eos: bool = False, template: str | None = None) -> Any:
    """A tokenizer of ``WORDS`` that treats spaces and beginnings in one of the field's ways."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    mark = {"words": "", "bytes": "Ġ", "bytes with a first space": "Ġ"}.get(spaces, "▁")
    pieces = list(SPECIAL.values()) + sorted({"▁", "Ġ", *"abcdefghijklmnopqrstuvwxyz<>/ "})
    if spaces == "words":
        vocabulary = dict.fromkeys([*pieces, *WORDS])
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        merges, known = [], dict.fromkeys(pieces)
        for word in [mark + word for word in WORDS] + WORDS:
            for end in range(2, len(word) + 1):
                merges.append((word[: end - 1], word[end - 1]))
                known[word[:end]] = None
        model = models.BPE({w: i for i, w in enumerate(known)}, list(dict.fromkeys(merges)), unk_token="<unk>")
        inner = Tokenizer(model)
        if mark == "Ġ":
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="first" in spaces)
        elif spaces == "llama2":
            inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        else:
            scheme = "always" if "always" in spaces else "first"
            inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    ids = [("<s>", inner.token_to_id("<s>")), ("</s>", inner.token_to_id("</s>"))]
    single = f"{'<s> ' * bos}$A{' </s>' * eos}"
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    found = PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)
    found.chat_template = template
    return found


@pytest.mark.parametrize(("spaces", "bos", "eos"), list(product(SPACES, (False, True), (False, True))))
def test_every_convention_gives_the_tokens_of_the_text_and_its_beginning(spaces: str, bos: bool, eos: bool) -> None:
    tok = tokenizer(spaces, bos, eos)
    start, end = ((tok.bos_token_id,) if bos else ()), ((tok.eos_token_id,) if eos else ())
    assert added(tok) == (start, end)
    own = tuple(tok(PROMPT, add_special_tokens=False)["input_ids"])
    assert len(own) == 4 and tok.convert_ids_to_tokens(own[-1]).strip("Ġ▁") == "that"
    assert encode(tok, [PROMPT]) == ((*start, *own),)  # the last token is the prompt's own
    assert encode(tok, [PROMPT], closed=True) == (tuple(tok(PROMPT)["input_ids"]),)
    # A chat template that writes BOS, and a text that ends in EOS, get no second one; their own stays.
    assert text_tokens(tok, [f"<s>{PROMPT}"])[0].count(tok.bos_token_id) == 1
    assert text_tokens(tok, [f"{PROMPT}</s>"])[0][-1] == tok.eos_token_id
    assert text_tokens(tok, [f"{PROMPT}</s>"], closed=True)[0].count(tok.eos_token_id) == 1
    # A word is what stands behind other text, one token here; and a continuation is what is added to its prompt.
    for word in ("he", "she", "doctor"):
        (token,) = word_pieces(tok, word)
        assert word_ids(tok, [word]) == [token]
        assert (*own, token) == ids_of(tok, [f"{PROMPT} {word}"])[0]
    ids, begin = answered(tok, PROMPT, " he said")
    assert ids[:begin] == (*start, *own)
    assert [piece.strip("Ġ▁") for piece in tok.convert_ids_to_tokens(list(ids[begin:]))] == ["he", "said"]
    assert answered(tok, "", PROMPT) == ((*start, *own), len(start))


@pytest.fixture(scope="module")
def closing() -> Any:
    """A tiny model, its tokenizer that puts BOS before and EOS behind a text, and the logits of the plain pass."""
    model, tok = build("llama"), tokenizer("words", bos=True, eos=True)

    @torch.no_grad()
    def logs(text: str) -> torch.Tensor:
        ids = [tok.bos_token_id, *tok(text, add_special_tokens=False)["input_ids"]]
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    return model, tok, logs


def test_nothing_is_read_behind_an_end_token_that_the_tokenizer_adds(closing: Any) -> None:
    model, tok, logs = closing
    he, she = tok.convert_tokens_to_ids(["he", "she"])
    right = logs(PROMPT)[-1]
    seen = next_words(model, encode(tok, [PROMPT]), word_ids(tok, ("he", "she")))
    np.testing.assert_allclose(seen.probabilities[0], right[[he, she]].exp(), atol=1e-6)
    np.testing.assert_allclose(
        score(model, tok, [Question(PROMPT, (" he", " she"), 0)]).sums[0], right[[he, she]], atol=1e-5
    )
    several = score(model, tok, [Question(PROMPT, (" he said", " she"), 0)]).sums[0]
    said = logs(f"{PROMPT} he")[-1][tok.convert_tokens_to_ids("said")]
    np.testing.assert_allclose(several, [right[he] + said, right[she]], atol=1e-5)
    sums, counts, _ = token_losses(model, encode(tok, [PROMPT]))
    own = tok(PROMPT, add_special_tokens=False)["input_ids"]
    assert counts[0] == len(own)
    assert sums[0] == pytest.approx(-logs(PROMPT)[range(len(own)), own].sum().item(), abs=1e-4)
    (said,) = shown(model, tok, [PROMPT], ["he", "she"], length=2)
    assert list(said["words"].values()) == pytest.approx(right[[he, she]].exp().tolist(), abs=1e-6)
    lens = hooks.lens(model, tok, [PROMPT], ("he", "she"))
    assert float(lens.difference) == pytest.approx((right[he] - right[she]).item(), abs=1e-4)
    with torch.no_grad():
        stream = model.model(torch.tensor([[tok.bos_token_id, *own]])).last_hidden_state[0]
    np.testing.assert_allclose(states(model, tok, [PROMPT], pool="last")[0], stream[-1], atol=1e-5)
    np.testing.assert_allclose(states(model, tok, [PROMPT], pool="mean")[0], stream.mean(0), atol=1e-5)


def test_instruments_see_the_text_that_an_open_tokenizer_gives(closing: Any) -> None:
    model, tok, _ = closing
    ids = encode(tok, [PROMPT, "the doctor said"])
    pairs = (["the nurse said"], ["the doctor said"])
    for text, given in ((PROMPT, ids[:1]), ("the doctor said", ids[1:])):
        np.testing.assert_array_equal(
            hooks.bmi(model, tok, [text]).raw.scores, hooks.bmi(model, None, given).raw.scores
        )
    coded = [encode(tok, side) for side in pairs]
    words = word_ids(tok, ("he", "she"))
    by_text = hooks.patch(model, tok, *pairs, ("he", "she"), unit="block").effects
    np.testing.assert_array_equal(by_text, hooks.patch(model, None, *coded, words, unit="block").effects)
    tokens = hooks.attention_to(model, tok, ["the nurse said that she said that"], ["she"]).tokens
    assert set(tokens) == {"said", "that"}


def test_models_that_read_a_whole_text_keep_its_end() -> None:
    for family, whole in (("llama", False), ("llama_headless", False), ("gpt2_headless", False), ("bert", True)):
        assert reads_whole(build(family)) == whole
    for family in ("t5", "bart", "bert_classifier", "llama_classifier"):
        assert reads_whole(build(family))
    model, tok = build("bert"), tokenizer("words", bos=True, eos=True)
    whole = torch.tensor(tok([PROMPT])["input_ids"])
    with torch.no_grad():
        expected = model.bert(whole).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(states(model, tok, [PROMPT])[0], expected, atol=1e-5)


def test_a_scorer_without_the_start_token_says_so_where_the_tokenizer_puts_one() -> None:
    model = build("llama")
    with pytest.warns(Note, match="'bias-bench' leaves out the start token .* scorer 'bos' keeps it"):
        sentence_scores(model, tokenizer("words", bos=True), ["the nurse said"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sentence_scores(model, tokenizer("words", bos=True), ["the nurse said"], scorer="bos")
        sentence_scores(model, tokenizer("words"), ["the nurse said"])
    code = (
        "import warnings\nfrom hooks.errors import Note\nfrom surgery.cli.app import app, command\n"
        "@command()\ndef say() -> None:\n    warnings.warn('left out\\n the start', Note)\n"
        "@command()\ndef other() -> None: ...\napp(['say'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "note: left out the start\n")
