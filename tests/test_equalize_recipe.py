"""The recipe equalize on a tiny checkpoint: the folder it leaves, what it trains on and measures, what it refuses."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import state
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import surgery
from recipes import equalize
from recipes.equalize import dataset, holding, measuring, recipe, work
from recipes.equalize.report import verdict
from recipes.equalize.work import blocks_of
from surgery.data import facts_of_gender, genbias, genhint, locality, neutral, shapes
from surgery.data.prompts import WordSet, load_prompt_set
from surgery.data.shares import read_shares
from surgery.errors import SurgeryError
from surgery.forward.generation import own_texts
from surgery.forward.next_token import next_words
from surgery.forward.precision import matrix_products
from surgery.metrics.material import material
from surgery.progress import Progress
from surgery.runs.words_report import verdict as printed

QUICK = {"lr": 3e-3, "epochs": 1, "batch_size": 128, "each": 2, "shapes": 100, "controls": []}
QUICK |= {"hints": 100, "settled": 200, "facts": 100, "block": [2, 3]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that knows every word of the training and test prompts, so that no two of them look alike."""
    path, prompts = tmp_path_factory.mktemp("models") / "tiny", load_prompt_set()
    texts = [row.text for row in genbias.records()] + [row.text for row in genhint.records(both=True)]
    texts += neutral.sentences() + shapes.texts()
    texts += holding.settled(prompts, people=shapes.people("train"), seed=0, split="profession", count=100, each=2)
    texts += dataset.hints(prompts, people=shapes.people("train"), seed=0, each=4)
    for part in ("train", "test"):
        texts += [text.replace("{subject}", "") for text in shapes.shapes(part, 100)] + list(shapes.people(part))
    texts += [text for kind in shapes.OTHERS for text in shapes.others(kind, "test")]
    found = sorted({piece for text in texts for piece in re.findall(r"\w+|[^\w\s]+", text)} | {"he", "she", "they"})
    vocabulary = {"<pad>": 0, "<unk>": 1} | {word: place for place, word in enumerate(found, 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=len(vocabulary), initializer_range=0.3, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(path)
    return path


def operate(checkpoint: Path, out: Path, **settings: Any) -> dict[str, Any]:
    model, tokenizer = surgery.load(checkpoint, device="cpu")
    ready = equalize.Settings(**({"model": str(checkpoint)} | QUICK | settings))
    before = state(model)
    found = equalize.run(model, tokenizer, ready, out=out).summary
    assert state(model) == before
    return found


def test_the_whole_operation(checkpoint: Path, tmp_path: Path) -> None:
    """Each term has its texts, LFTF stands beside the edit, three distances are measured before and after."""
    summary = operate(checkpoint, tmp_path / "run", controls=["lftf"])
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == json.loads(json.dumps(summary))
    assert set(summary["edit"]["terms"]) == {"words", "hints", "settled", "facts", "texts"}
    assert summary["edit"]["terms"]["hints"] == 100
    assert summary["edit"]["blocks"] == [2, 3]
    assert summary["controls"]["lftf"]["edit"]["blocks"] == [3]
    for when in (summary["before"], summary["after"], summary["controls"]["lftf"]["after"]):
        assert set(when["distances"]) == {"unseen templates", "unseen hints", *shapes.OTHERS}
        assert set(when["distances"]["unseen hints"]) == {"ub", "mass"}
        assert when["genbias"]["relative_gap"]["all"]["n"] == 945
    page = (tmp_path / "run" / "report.html").read_text()
    assert "unseen templates" in page
    assert "Beside it, lftf" in page
    assert any(line.startswith("Beside it, lftf") for line in printed(summary)), "the terminal says what the page says"
    assert "kl" not in summary["before"]["locality"]["things"]
    assert summary["after"]["locality"]["things"]["kl"]["value"] > 0


def test_lftf_starts_from_the_stream_kept_with_the_targets(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all its prompts are among what is equalised; else from a pass of its own, to the same result."""
    passes: list[int] = []

    def counted(model: Any, ids: Any, *given: Any, **how: Any) -> Any:
        passes.append(len(ids))
        return next_words(model, ids, *given, **how)

    monkeypatch.setattr("recipes.equalize.work.next_words", counted)
    few: dict[str, Any] = {"controls": ["lftf"], "test_rows": 40, "test_texts": 5}
    kept = operate(checkpoint, tmp_path / "kept", **few)
    assert not passes
    operate(checkpoint, tmp_path / "some", **few, own=200)
    assert passes == [945]
    monkeypatch.setattr(work.Work, "_kept_for_lftf", lambda *_: [])
    anew = operate(checkpoint, tmp_path / "anew", **few)
    assert passes == [945, 945]
    one, other = (run["controls"]["lftf"]["after"]["genbias"]["relative_gap"] for run in (kept, anew))
    assert one["all"]["value"] == pytest.approx(other["all"]["value"], abs=1e-5)
    assert kept["after"]["perplexity"]["n"] == 5


def test_so_many_people_stand_beside_the_sets_own(checkpoint: Path) -> None:
    """In the shapes, in the set's templates, with hints, and where they are introduced; 0 takes all."""
    few: dict[str, Any] = {"shapes": 100, "each": 1, "own_each": 1}
    some, every = (
        recipe.texts_of(load_prompt_set(), equalize.Settings(**few, people=count), "profession") for count in (4, 0)
    )
    people = shapes.people("train")
    for name in ("words", "hints", "settled"):
        assert any(person in text for text in some[name] for person in people[:4])
        assert len(some[name]) < len(every[name])
    # Each that is left out once in the set's templates and once in a shape.
    assert len(every["words"]) - len(some["words"]) == 2 * len(people[4:])


def test_texts_that_the_model_writes_are_held_beside_the_shipped_ones(checkpoint: Path, tmp_path: Path) -> None:
    """Each begins as the tokenizer begins any text; a tokenizer that begins none is refused before anything runs."""
    model, tokenizer = surgery.load(checkpoint, device="cpu")
    with pytest.raises(SurgeryError, match="samples: got 5, and this tokenizer has no token to begin a text"):
        operate(checkpoint, tmp_path / "run", samples=5)
    settings = equalize.Settings(model=str(checkpoint), samples=5, seed=3)
    with pytest.raises(SurgeryError, match="samples: got 5, and this tokenizer has no token to begin a text"):
        equalize.tune(model, tokenizer, settings, few=True, out=tmp_path / "tune")
    assert not list(tmp_path.glob("tune*"))
    tokenizer.bos_token, begin = "The", tokenizer.convert_tokens_to_ids("The")
    op: Any = SimpleNamespace(model=model, once=lambda name, compute: compute(), progress=Progress(quiet=True))
    written = own_texts(model, 5, begin=begin, ends=[tokenizer.pad_token_id], seed=3)
    lines = {"texts": shapes.texts()[:2], "settled": []}
    assert dataset.encoded(op, tokenizer, settings, lines)["texts"][2:] == tuple(written), "no text begins with a token"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="The $A", special_tokens=[("The", begin)])
    found = dataset.encoded(op, tokenizer, settings, lines)
    assert set(found) == {"texts"} and found["texts"][2:] == tuple((begin, *row) for row in written)
    off = settings.model_copy(update={"hold_texts": 0.0})
    assert dataset.encoded(op, tokenizer, off, lines)["texts"] == found["texts"][:2]


def test_only_streams_of_the_untouched_model_are_kept(checkpoint: Path) -> None:
    """An edit may begin at block 0; what stands beside it is measured on the streams from before all the same."""
    model, tokenizer = surgery.load(checkpoint, device="cpu")
    asked = material(model, tokenizer, load_prompt_set(), suites=["genhint", "locality"])
    by = measuring.Measuring(model, asked, {}, asked.words, Progress(quiet=True), keep=[3])
    before = by.before()
    kept = by.suites[3]["words"].flat.clone()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    after = by.scores("after", 0)
    assert torch.equal(by.suites[3]["words"].flat, kept)
    assert after["locality"]["things"]["kl"]["value"] > 0
    by.take_up(json.loads(json.dumps(before)))  # as an interrupted run does
    assert by.scores("again", 0)["locality"]["things"]["kl"] == after["locality"]["things"]["kl"]


def test_fewer_rows_are_a_sample_with_every_template(checkpoint: Path) -> None:
    model, tokenizer = surgery.load(checkpoint, device="cpu")
    asked = material(model, tokenizer, load_prompt_set())
    far = measuring.distances(tokenizer, load_prompt_set(), 0)
    few, near = measuring.fewer(asked, far, 90, 30, 0)
    assert {name: len(rows) for name, rows in few.ids.items()} == {
        name: min(len(rows), {"genbias": 90, "genhint": 90, "perplexity": 30, "perplexity_pronouns": 30}.get(name, 999))
        for name, rows in asked.ids.items()
    }
    own = dict(zip((row.text for row in asked.prompts), asked.ids["genbias"], strict=True))
    assert [own[row.text] for row in few.prompts] == list(few.ids["genbias"]), "a prompt keeps its tokens"
    assert Counter(row.template for row in few.prompts) == dict.fromkeys({row.template for row in asked.prompts}, 10)
    assert all(len(rows) == len(ids) == 90 for rows, ids in near.values())
    # Numbers of 90 rows and of all are told apart by what they are of; of other seeds they are one kind.
    assert few.names["genbias"] == f"{asked.names['genbias']}, 90 of {len(asked.prompts)} with seed 0"
    assert few.names["locality"] == asked.names["locality"]
    assert measuring.fewer(asked, far, 0, 0, 0) == (asked, far)


def test_products_are_rounded_while_training_and_not_while_measuring(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}
    for module, name in ((work, "prepare_each"), (work, "equalize"), (measuring, "measure")):
        own = getattr(module, name)

        def watched(*args: Any, name: str = name, call: Any = own, **more: Any) -> Any:
            seen.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return call(*args, **more)

        monkeypatch.setattr(module, name, watched)
    summary = operate(checkpoint, tmp_path / "run", own=90, each=0, hold_settled=0.0, split="pairs", matmul="medium")
    assert seen == {"prepare_each": {"medium"}, "equalize": {"medium"}, "measure": {"highest"}}
    assert summary["edit"]["matmul"] == "medium"
    with pytest.raises(ValueError), matrix_products("medium"):
        raise ValueError
    assert torch.get_float32_matmul_precision() == "highest"


def test_factors_and_three_words(checkpoint: Path, tmp_path: Path) -> None:
    given = {"method": "lora", "words": ["he", "she", "they"], "shares": [0.4, 0.4, 0.2], "split": "profession"}
    summary = operate(checkpoint, tmp_path / "run", own=90, each=0, hold_settled=0.0, block="auto", **given)
    assert summary["edit"]["blocks"] == [summary["edit"]["located"]["block"]]
    assert summary["delta"]["kind"] == "lora"
    assert summary["shares"] == [0.4, 0.4, 0.2]


def test_named_matrices_train_beside_as_many_random_ones(checkpoint: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"block_part": "auto", "part_size": 4000, "controls": ["random"], "split": "pairs"}
    assert equalize.Settings(**given).lr == 1e-3
    summary = operate(checkpoint, tmp_path / "run", own=90, each=0, hold_settled=0.0, **given)
    edit, random = summary["edit"], summary["controls"]["random"]["edit"]
    names = edit["located"]["names"]
    delta = surgery.Delta.load(tmp_path / "run" / "delta.safetensors")
    assert set(delta.shapes) == set(names) and all(name.split(".")[2] in "23" for name in names)
    assert 2000 < edit["parameters"] <= 4000 and 2000 < random["parameters"] <= 4000
    assert edit["blocks"] == sorted({int(name.split(".")[2]) for name in names})
    assert "with the most natural gain for each number" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_part": "auto", "part_size": 100}, "part_size: got 100, less than the smallest matrix .*1,024 numbers"),
        ({"shares": [0.5, 0.6]}, "shares: got .0.5, 0.6. .sum 1.1. for 2 words"),
        ({"words": ["he", "she or"]}, "word 'she or'.*surgery eval --words-as continuations"),
        ({"words_as": "continuations"}, "words_as: got continuations, which are measured and not trained"),
        ({"shares": ["nowhere.toml"]}, "cannot read nowhere.toml"),
        ({"shares": ["a.toml", 0.4]}, "expected a number for each word, or the name of one file"),
        ({"controls": ["other"]}, "controls: got 'other', expected some of lftf, random, no_hold"),
        ({"block": [9]}, "blocks 0 to 3"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SurgeryError, match=message):
        operate(checkpoint, tmp_path / "run", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"he": 0.6}', "expected a share for each of he, she and for nothing else, but 'she' is missing"),
        ("a.toml", "he = 0.5\nshe = 0.25\nthey = 0.25", "but 'they' is another word"),
        ("a.toml", "he = 0.5\nshe = 'half'", "gives 'she' the share 'half', expected a number"),
        ("a.toml", "he = ", "malformed"),
        ("a.csv", "he,0.5", "expected .toml or .json"),
    ],
)
def test_shares_of_a_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text("she = 0.4\nhe = 0.6" if name.endswith("toml") else '{"she": 0.4, "he": 0.6}')
    if name != "a.csv":
        assert read_shares([str(file)], ("he", "she")) == [0.6, 0.4], "by word, not by their order in the file"
    file.write_text(text)
    with pytest.raises(SurgeryError, match=re.escape(message)):
        read_shares([str(file)], ("he", "she"))


def test_a_held_text_that_is_also_a_prompt_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("The sun is hot.\n" + genbias.records("profession", "train")[3].text + "\n")
    with pytest.raises(SurgeryError, match=r"mine\.txt: 'The .* because' is also a training prompt"):
        operate(checkpoint, tmp_path / "run", hold_file=str(file))


def test_no_test_prompt_is_a_training_text(checkpoint: Path) -> None:
    """Of the set's own templates other professions, of the distances other people and other templates."""
    prompts, (_, tokenizer) = load_prompt_set(), surgery.load(checkpoint, device="cpu")
    given: dict[str, Any] = {"seed": 0, "split": "profession", "own": 0, "own_each": 2, "count": 400, "each": 8}
    given["people"] = shapes.people("train")
    trained = set(dataset.prompts_to_equalize(prompts, **given))
    assert len(trained) > 4500
    person = shapes.people("train")[0]
    templates = {template.fill(person) for template in prompts.templates}
    assert len(templates & trained) == 2  # in so many of the set's own templates, beside the shapes
    held = set(dataset.hints(prompts, people=given["people"], seed=0, each=2))
    held |= set(holding.settled(prompts, people=given["people"], seed=0, split="profession", count=400, each=2))
    tested = {row.text for row in genbias.records("profession", "test")}
    for rows, _ in measuring.distances(tokenizer, prompts, 0).values():
        tested |= {row.text for row in rows}
    assert not tested & (trained | held)
    assert not trained & held


def test_with_endings_a_beginning_gives_several_prompts() -> None:
    """Of people in the grammar's shapes alone: the set's own prompts and what is held are as they were."""
    few: dict[str, Any] = {"shapes": 100, "each": 1, "own": 20}
    plain, ended = (
        recipe.texts_of(load_prompt_set(), equalize.Settings(**few, endings=ends), "profession") for ends in (1, 4)
    )
    assert {name: lines for name, lines in plain.items() if name != "words"} == {
        name: lines for name, lines in ended.items() if name != "words"
    }
    assert set(plain["words"]) < set(ended["words"]) and plain["words"][:20] == ended["words"][:20]
    assert 2.5 * len(plain["words"]) < len(ended["words"]) <= 4 * len(plain["words"])


def test_with_endings_what_is_held_stands_behind_fewer_beginnings() -> None:
    """As many lines as before of facts, introductions and hints, which stay in pairs; things stand as they were."""
    subjects = {"things": "The lamp {} broke", "introduced": "Ms. Ek, the vet {}, sat down", "nouns": "The aunt {} ran"}
    kinds = {f"{text.format(n)} because": kind for n in range(12) for kind, text in subjects.items()}
    plain, ended = (holding.apart(kinds, 0, 0, ends, 0) for ends in (1, 3))
    assert plain == {name: [x for x in kinds if (kinds[x] == "nouns") == (name == "facts")] for name in plain}
    assert ended["settled"][:12] == [line for line in kinds if kinds[line] == "things"]
    for lines in (ended["settled"][12:], ended["facts"]):
        begun = Counter(re.split(" (?=broke)|(?<=down)|(?<=ran)", line)[0] for line in lines)
        assert set(begun.values()) == {3} and len(begun) == 4 and len(set(lines)) == 12
    asked: dict[str, Any] = {"shapes": 100, "each": 1, "own": 20, "hints": 120}
    few, many = (
        recipe.texts_of(load_prompt_set(), equalize.Settings(**asked, hold_endings=ends), "profession")
        for ends in (1, 3)
    )
    assert few["words"] == many["words"] and len(many["hints"]) == pytest.approx(120, abs=6)
    hint = re.compile(r"\b(his|her|him|he|she|himself|herself)\b")
    for his, her in zip(many["hints"][::2], many["hints"][1::2], strict=True):
        assert his != her and hint.sub("", his) == hint.sub("", her)


def test_people_are_introduced_but_for_those_whose_introduction_judges() -> None:
    """Everybody once, with both titles and a surname; nobody who is introduced in the development or test part."""
    found = holding.introduced(["plumber", "potter", "nurse", "potter", "juggler", "baker"])
    assert found == ["Mr. Dalton, the potter,", "Ms. Dalton, the juggler,", "Mr. Weber, the baker,"]
    held = holding.settled(
        load_prompt_set(), people=shapes.people("train"), seed=0, split="profession", count=100, each=2
    )
    people = shapes.people("train")
    assert all(any(f", the {name}," in text for text in held) for name in people[:20])


def test_more_nouns_stand_in_the_shapes_beside_the_others() -> None:
    """Each in so many shapes as another noun, and in none of the sets' own prompts."""
    asked: dict[str, Any] = {
        "seed": 0,
        "split": "profession",
        "count": 100,
        "each": 2,
        "people": shapes.people("train"),
    }
    few, many = (holding.settled(load_prompt_set(), nouns=more, **asked) for more in (False, True))
    standing = [text for text in many if re.search(r"\b(ringmasters?|doyennes?)\b", text)]
    assert len(standing) == 4 and not set(standing) & set(few)
    assert len(many) - len(few) == pytest.approx(2 * len(facts_of_gender.more_nouns()), abs=5)


def test_people_stand_in_the_plural_and_every_kind_is_drawn_alike() -> None:
    """But for plurals that judge; and a few that are held are no longer nearly all of the largest kind."""
    named = ["potter", "nurse", "notary", "midwife", "officer of the day"]
    assert holding.several(named) == ["potters", "notaries", "midwives"]
    asked: dict[str, Any] = {
        "seed": 0,
        "split": "profession",
        "count": 200,
        "each": 2,
        "people": shapes.people("train"),
    }
    whole = holding.settled(load_prompt_set(), **asked)
    some = holding.alike(whole, 300, 1)
    for name in holding.several(shapes.people("train")[:20]):
        assert any(name in text for text in whole)
    assert len(some) == 300
    assert [text for text in whole if text in set(some)] == some
    kinds = {row.text: row.kind for row in locality.records("train")}
    counts = Counter(kinds[text] for text in some if text in kinds)
    assert counts["text"] == 20  # all that there are
    drawn = holding.alike({str(place): "many" if place % 10 else "few" for place in range(100)}, 14, 0)
    assert sum(int(line) % 10 == 0 for line in drawn) == 7


def test_facts_are_a_term_of_their_own() -> None:
    """So many of each kind, none among the settled; 0 takes all."""
    kinds = {f"{kind} {place}": kind for kind in ("nouns", "relations", "things", "names") for place in range(20)}
    held = holding.apart(kinds, 6, 10, 1, 0)
    assert Counter(kinds[line] for line in held["facts"]) == {"nouns": 5, "relations": 5}
    assert Counter(kinds[line] for line in held["settled"]) == {"things": 3, "names": 3}
    every = holding.apart(kinds, 0, 0, 1, 0)
    assert {name: len(lines) for name, lines in every.items()} == {"settled": 40, "facts": 40}
    whole = holding.settled(
        load_prompt_set(), people=shapes.people("train"), seed=0, split="profession", count=100, each=2
    )
    assert set(holding.FACTS) <= set(whole.values()), "kinds that exist"


def test_a_set_about_other_words_has_no_shapes_about_people() -> None:
    prompts = load_prompt_set("race")
    assert holding.settled(prompts, people=shapes.people("train"), seed=0, split="profession", count=100, each=2) == {}
    rows = genbias.records("profession", "train", 0, prompts)
    found = dataset.prompts_to_equalize(prompts, people=(), seed=0, split="profession", own=0, count=100, each=4)
    assert len(found) == len(rows)
    assert dataset.of_people(load_prompt_set())
    assert WordSet(("he", "they")).hints == ("his", "their")


def test_the_upper_blocks() -> None:
    assert blocks_of("upper", 30, 0) == tuple(range(20, 28))
    assert blocks_of("upper", 18, 0) == tuple(range(12, 17))
    assert blocks_of("upper", 2, 0) == (1,)
    assert blocks_of([1], 4, 0) == (1,)


def test_what_an_edit_took_with_it_stands_on_the_page() -> None:
    metric = {"scorer": "s", "data": "d", "n": 9, "low": 0.0, "high": 1.0, "ideal": 1.0, "direction": "higher"}
    scores = [{"facts_of_gender": {"right": {"all": metric | {"value": value}}}} for value in (0.75, 0.70)]
    edit = {"parameters": 5, "blocks": [1], "steps": 2, "terms": {"words": 3}}
    summary = {"words": ["he", "she"], "edit": edit, "applied": {"changed": 4, "entries": 5}, "controls": {}}
    lines = verdict(summary | {"before": scores[0], "after": scores[1]})
    assert any(line.startswith("Warning") and "0.750 to 0.700" in line for line in lines)
    assert not any(line.startswith("Warning") for line in verdict(summary | {"before": scores[0], "after": scores[0]}))


def test_each_term_has_its_weight_and_counts_the_words_ratio_by_its_own() -> None:
    """Of all that is held by hold_emphasis, of facts by facts_emphasis on top; ordinary text compares no words."""
    ids = {name: ((1, 2), (3, 4)) for name in ("words", "hints", "settled", "facts", "texts")}
    logits, other = torch.randn(2, 9), torch.randn(2, 9)
    among = [rows[:, 5:7].log_softmax(-1) for rows in (logits, other)]
    apart = (among[0].exp() * (among[0] - among[1])).sum(-1)
    weights: dict[str, Any] = {"hold_hints": 2.5, "hold_settled": 3.5, "hold_texts": 0.5}
    found = []
    for ratios in ((0.0, 0.0), (2.0, 1.0)):
        settings = equalize.Settings(hold_emphasis=ratios[0], facts_emphasis=ratios[1], **weights)
        found.append({term.name: term for term in work.word_terms(settings, ids, (5, 6), (0.5, 0.5))})
    plain, more = found
    assert {name: term.weight for name, term in more.items()} == {
        **{"words": 1.0, "hints": 2.5, "settled": 3.5, "facts": 3.5, "texts": 0.5}
    }
    for name, ratio in {"settled": 2.0, "facts": 3.0}.items():
        losses = [terms[name].loss(other, terms[name].target(logits), (0, 1)) for terms in (plain, more)]
        torch.testing.assert_close(losses[1] - losses[0], ratio * apart)
    assert len(more["hints"].target(logits)) == 3 and len(more["texts"].target(logits)) == 2
    raised = work.word_terms(equalize.Settings(facts_power=2.0, hold_emphasis=1.0), ids, (5, 6), (0.5, 0.5))
    for term, power in zip(raised[2:4], (1.0, 2.0), strict=True):  # settled, facts
        ratio = torch.diff(term.target(logits)[2]) / torch.diff(logits[:, 5:7])
        torch.testing.assert_close(ratio, torch.full((2, 1), power))
    odds = []
    for power in (1.0, 2.0):
        words = work.word_terms(equalize.Settings(mass_power=power), ids, (5, 6), (0.5, 0.5))[0]
        tokens, logs = words.target(logits)[:2]
        odds.append((logs[:, :-1].exp() * torch.isin(tokens, torch.tensor([5, 6]))).sum(-1).logit())
    torch.testing.assert_close(odds[1], 2 * odds[0])
    without = equalize.Settings(hold_hints=0.0, hold_settled=0.0, hold_texts=0.0)
    assert [term.name for term in work.word_terms(without, ids, (5, 6), (0.5, 0.5))] == ["words"]


def test_hints_stand_with_every_hint_side_by_side() -> None:
    """Also when some are drawn; and only their targets depend on each other."""
    for words, hints in (("he", "she"), "his her"), (("he", "she", "they"), "his her their"):
        prompts = replace(load_prompt_set(), words=WordSet(words))
        found = dataset.hints(prompts, people=shapes.people("train"), seed=0, each=4)
        for lines in (found, dataset.some(found, 30, 1, size=len(words))):
            groups = [lines[at : at + len(words)] for at in range(0, len(lines), len(words))]
            assert all(
                len({re.sub(rf"\b({hints.replace(' ', '|')})\b", "_", one) for one in each}) == 1 for each in groups
            )
            assert all(f" {hint} " in one for each in groups for hint, one in zip(hints.split(), each, strict=True))
        assert len(set(found)) == len(found) and len(lines) == 30
    few = equalize.Settings(hints=10, shapes=50, each=0, settled_each=0)
    drawn = recipe.texts_of(load_prompt_set(), few, "profession")["hints"]
    assert [line.replace(" his ", " her ") for line in drawn[::2]] == drawn[1::2] and len(drawn) == 10
    ids = {name: ((1, 2), (3, 4)) for name in ("words", "hints", "settled", "facts", "texts")}
    terms = work.word_terms(equalize.Settings(), ids, (5, 6), (0.5, 0.5))
    assert [one.name for one in terms if one.together] == ["hints"]


def test_hints_of_unseen_templates_are_dealt_out_evenly() -> None:
    """Every template with every hint about equally often, and none about a person or in a template of training."""
    people = shapes.people("test")
    rows = measuring._hints(["he", "she"], ["his", "her"], people, "test")
    counts = Counter((row.template, row.hint) for row in rows)
    assert len(rows) == 2 * len(people) == len({row.text for row in rows})
    assert len(counts) == 2 * len(shapes.hint_templates("test")) and max(counts.values()) - min(counts.values()) <= 1
    assert not {row.template for row in rows} & set(shapes.hint_templates("train"))
    assert all(row.hint_word in row.text.split() and row.expected == ("he", "she")[row.hint] for row in rows)
