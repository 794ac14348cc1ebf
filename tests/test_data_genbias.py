"""The prompt data: the paper's counts, splits, balance of hints, users' own sets, neutral text, errors."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import pytest

from surgery.data import genbias, genhint, neutral
from surgery.data.checking import report
from surgery.data.prompts import (
    SHIPPED,
    PromptSet,
    WordSet,
    dropped_professions,
    load_prompt_set,
    professions,
)
from surgery.errors import SurgeryError

# fmt: off
GENDERED = {
    "he", "she", "his", "her", "hers", "him", "himself", "herself", "man", "woman", "men", "women", "boy",
    "girl", "boys", "girls", "father", "mother", "son", "daughter", "brother", "sister", "husband", "wife",
    "uncle", "aunt", "king", "queen", "lord", "lady", "sir", "madam", "mr", "mrs", "ms", "male", "female",
    "gentleman", "grandfather", "grandmother", "nephew", "niece", "prince", "princess",
}
# fmt: on
MINIMAL = {
    "name": "mine",
    "words": ["red", "blue"],
    "templates": [{"name": "a", "text": "The {profession} likes"}],
}


def digest(rows: list) -> str:
    return sha256("\n".join(row.text for row in rows).encode()).hexdigest()[:16]


def write(tmp_path: Path, content: dict) -> Path:
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content), "utf-8")
    return path


# ---- professions -------------------------------------------------------------------------------------------


def test_262_kept_and_58_dropped_with_reasons():
    kept, dropped = [p.name for p in professions()], dropped_professions()
    assert (len(set(kept)), len(dropped), len(set(kept) | set(dropped))) == (262, 58, 320)
    assert {"mobster", "nurse", "preacher", "caretaker", "footballer", "lyricist"} <= set(kept)
    assert {"actress", "salesman", "nun", "hooker", "soft spoken"} <= set(dropped)
    assert not [name for name in kept if "_" in name]
    assert {reason.split(":")[0] for reason in dropped.values()} == {
        "spelling",
        "meaning",
        "not an occupation",
    }


def test_no_kept_name_breaks_the_recorded_rule():
    for person in professions():
        assert person.definitional_score is not None and abs(person.definitional_score) < 0.5, person
        assert not re.search(r"(man|wife|lord|master|ess)$", person.name), person


@pytest.mark.skipif("SURGERY_DATA" not in os.environ, reason="SURGERY_DATA (development data) is unset")
def test_names_and_scores_are_those_of_the_source():
    source = json.loads((Path(os.environ["SURGERY_DATA"]) / "bolukbasi" / "professions.json").read_text())
    scores = {name.replace("_", " "): (d, s) for name, d, s in source}
    shipped = json.loads(files("surgery.data").joinpath("professions.json").read_text("utf-8"))
    rows = shipped["kept"] + [row[:3] for row in shipped["dropped"]]
    assert {name: (d, s) for name, d, s in rows} == scores


# ---- GenBiasEval -------------------------------------------------------------------------------------------


def test_templates_end_in_because_three_per_scale():
    shipped = load_prompt_set()
    assert Counter(t.scale for t in shipped.templates) == {"word": 3, "phrase": 3, "sentence": 3}
    texts = [t.text for t in shipped.templates + shipped.hint_templates]
    assert all(re.fullmatch(r"The \{profession\} [a-zA-Z{} ]+ because", text) for text in texts)
    assert not GENDERED & {word.lower() for text in texts for word in text.split()}
    words = {s: [len(t.text.split()) for t in shipped.templates if t.scale == s] for s in ("word", "sentence")}
    assert set(words["word"]) == {4} and min(words["sentence"]) >= 10


def test_sizes_and_disjointness_of_the_paper_split():
    parts = {part: genbias.records("pairs", part) for part in genbias.PARTS}
    assert {k: len(v) for k, v in parts.items()} == {"train": 943, "dev": 471, "test": 944, "all": 2358}
    texts = [{r.text for r in parts[part]} for part in ("train", "dev", "test")]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 2358


def test_profession_split_keeps_professions_apart():
    people = [{r.profession for r in genbias.records("profession", part)} for part in ("train", "dev", "test")]
    assert [len(p) for p in people] == [105, 52, 105] and len(set.union(*people)) == 262
    assert [len(genbias.records("profession", part)) for part in ("train", "dev", "test")] == [945, 468, 945]
    hints = [{r.profession for r in genhint.records(part)} for part in ("train", "dev", "test")]
    assert hints == people


def test_splits_are_the_recorded_ones_and_follow_the_seed():
    assert digest(genbias.records("pairs", "train")[:20]) == "63f0c764edccd152"
    assert digest(genbias.records("profession", "test")[:20]) == "fe626a65777925a2"
    assert digest(genhint.records("test")[:20]) == "a8a62161a6045243"
    assert genbias.records("pairs", "test", seed=1) != genbias.records("pairs", "test")
    assert genbias.records("pairs", "test", seed=1) == genbias.records("pairs", "test", seed=1)


def test_order_does_not_depend_on_the_hash_seed_and_no_torch_is_imported():
    code = (
        "import sys; from surgery.data import genbias, genhint, neutral; "
        "print(genbias.records('pairs', 'dev')[7].text, 'torch' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=env | {"PYTHONHASHSEED": s},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for s in ("1", "2")
    }
    assert seen == {f"{genbias.records('pairs', 'dev')[7].text} False\n"}


def test_record_carries_the_scores():
    record = next(r for r in genbias.records() if r.text == "The nurse smiled because")
    assert dataclasses.astuple(record)[1:] == ("nurse", "word", "smiled", -0.9, -0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.text = ""


# ---- GenHintEval -------------------------------------------------------------------------------------------


def test_hints_are_balanced_by_template_and_once_per_prompt():
    rows = genhint.records()
    assert Counter(r.hint for r in rows) == {0: 393, 1: 393}
    assert set(Counter((r.template, r.hint) for r in rows).values()) == {131}
    assert len({(r.profession, r.template) for r in rows}) == 786
    for part in ("train", "dev", "test"):
        counts = Counter((r.template, r.hint) for r in genhint.records(part))
        assert max(counts.values()) - min(counts.values()) <= 1
        assert set(genhint.records(part)) <= set(rows)


def test_hint_words_agree_with_the_expected_word():
    rows = genhint.records(both=True)
    assert len(rows) == len(set(rows)) == 1572
    for row in rows:
        assert (row.hint_word, row.expected) == (("his", "he"), ("her", "she"))[row.hint]
        assert row.text.split().count(row.hint_word) == 1 and row.text.endswith(" because")


def test_three_pronouns_go_round():
    three = dataclasses.replace(load_prompt_set(), words=WordSet(("he", "she", "they")))
    rows = genhint.records(prompts=three)
    assert Counter(r.hint_word for r in rows) == {"his": 262, "her": 262, "their": 262}
    assert len(genhint.records(both=True, prompts=three)) == 3 * 786


# ---- users' own sets ---------------------------------------------------------------------------------------


def test_every_shipped_file_loads_as_a_user_file_too(tmp_path):
    assert set(SHIPPED.values()) >= {f"examples/{p.name}" for p in files("surgery.data").joinpath("examples").iterdir()}
    for name, place in SHIPPED.items():
        copy = tmp_path / Path(place).name
        copy.write_text(files("surgery.data").joinpath(place).read_text("utf-8"), "utf-8")
        assert load_prompt_set(copy) == load_prompt_set(name) and isinstance(load_prompt_set(name), PromptSet)
    race = load_prompt_set("race")
    assert race.words == WordSet(("white", "black", "Asian")) and race.words.hints == ()
    assert len(genbias.records("profession", "test", prompts=race)) == 105 * 2


def test_own_subjects_and_hints(tmp_path):
    hint = {"name": "h", "text": "With {hint} paint the {profession} drew in"}
    own = MINIMAL | {
        "subjects": [f"child {i}" for i in range(10)],
        "hints": ["ruby", "navy"],
        "hint_templates": [hint],
    }
    mine = load_prompt_set(write(tmp_path, own))
    assert [len(genbias.records(part=p, prompts=mine)) for p in genbias.PARTS] == [4, 2, 4, 10]
    first = genbias.records(prompts=mine)[0]
    assert first.scale == "sentence" and first.stereotype_score is None and first.text.startswith("The child ")
    assert {r.text for r in genhint.records(both=True, prompts=mine)} >= {"With ruby paint the child 3 drew in"}


TEMPLATE = MINIMAL["templates"][0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"word": ["a", "b"]}, "did you mean 'words'"),
        ({"words": ["red"]}, "at least 2"),
        ({"words": ["red", "red"]}, "'red' twice"),
        ({"words": ["red", " blue"]}, "' blue'"),
        ({"words": "he she"}, "expected a list"),
        ({"hints": ["x"]}, "one hint per word"),
        ({"subjects": []}, "at least 1"),
        ({"subjects": ["a", "a"]}, "'a' twice"),
        ({"subjects": "doctors"}, "'doctors'"),
        ({"templates": []}, "at least one"),
        ({"templates": [{"name": "a", "text": "The doctor likes"}]}, "{profession}"),
        ({"templates": [{"name": "a", "text": "The {profession} and {x} like"}]}, "unknown placeholder"),
        ({"templates": [TEMPLATE, TEMPLATE]}, "'a' twice"),
        ({"templates": [TEMPLATE, TEMPLATE | {"name": "b"}]}, "twice"),
        ({"templates": [TEMPLATE | {"scale": "long"}]}, "'long'"),
        ({"templates": [{"name": "a"}]}, "'text'"),
        ({"templates": [TEMPLATE | {"text": "The {profession} likes "}]}, "single spaces"),
        ({"hint_templates": [{"name": "h", "text": "The {profession} likes"}]}, "{hint}"),
        ({"hint_templates": [{"name": "h", "text": "The {profession} likes {hint}"}]}, "add hints"),
    ],
)
def test_bad_sets_are_refused_in_one_line_that_names_the_file(tmp_path, change, says):
    path = write(tmp_path, MINIMAL | change)
    with pytest.raises(SurgeryError) as caught:
        load_prompt_set(path)
    message = str(caught.value)
    assert says in message and "got" in message and "expected" in message and "\n" not in message
    assert str(path) in message or "the word set" in message


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.toml", b"words = [", "malformed"),
        ("a.json", b"[1]", "malformed"),
        ("a.yaml", b"a: 1", "'.yaml'"),
        ("a.json", b"\xff\xfe\x00", "UTF-8"),
        ("a.json", b"{}", "missing key"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SurgeryError, match=re.escape(says)):
        load_prompt_set(tmp_path / name)


def test_unknown_names_are_refused(tmp_path):
    tiny = load_prompt_set(write(tmp_path, MINIMAL | {"subjects": ["a", "b"]}))
    for call, says in [
        (lambda: genbias.records(part="tests"), "'tests'"),
        (lambda: genbias.records(split="random"), "'random'"),
        (lambda: genbias.records(seed="0"), "integer"),
        (lambda: genbias.records(part="dev", prompts=tiny), "empty part"),
        (lambda: genhint.records(part="valid"), "'valid'"),
        (lambda: genhint.records(prompts=load_prompt_set("race")), "no hints in the prompt set race"),
        (lambda: load_prompt_set("gender"), "genbias, race"),
        (lambda: load_prompt_set(tmp_path), "no such file"),
        (lambda: WordSet(("x", "y"), ("a",)), "one hint per word"),
    ]:
        with pytest.raises(SurgeryError, match=re.escape(says)):
            call()


# ---- neutral text ------------------------------------------------------------------------------------------


def test_neutral_sentences_are_200_unique_and_name_nobody():
    found = neutral.sentences()
    assert len(found) == len(set(found)) == 200
    people = "|".join(re.escape(p.name) + "s?" for p in professions())
    for sentence in found:
        assert 12 <= len(sentence.split()) <= 30 and sentence.isascii() and sentence[-1] in '."', sentence
        assert not GENDERED & set(re.findall(r"[a-z]+", sentence.lower())), sentence
        assert not re.search(rf"\b({people})\b", sentence, re.IGNORECASE), sentence


def test_neutral_files_of_a_user(tmp_path):
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("One.\n\nTwo.\n", "utf-8")
    rows.write_text('{"text": "One.", "id": 1}\n{"text": "Two\u2028lines."}\n', "utf-8")
    assert neutral.sentences(text) == ["One.", "Two."]
    assert neutral.sentences(rows) == ["One.", "Two\u2028lines."]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"txt": "One."}\n')
    (tmp_path / "a.csv").write_text("One.\n")
    for name, says in [
        ("empty.txt", "an empty file"),
        ("bad.jsonl", "'text'"),
        ("a.csv", "unknown ending"),
        ("none.txt", "no such file"),
    ]:
        with pytest.raises(SurgeryError, match=says):
            neutral.sentences(tmp_path / name)


def test_a_slot_may_have_any_name(tmp_path):
    own = MINIMAL | {
        "templates": [{"name": "n", "text": "The {nationality} neighbour said that"}],
        "subjects": [f"place {i}" for i in range(10)],
        "hints": ["ruby", "navy"],
        "hint_templates": [{"name": "h", "text": "With {hint} paint the {nationality} artist drew in"}],
    }
    mine = load_prompt_set(write(tmp_path, own))
    assert {"The place 3 neighbour said that"} <= {row.text for row in genbias.records(prompts=mine)}
    assert "With navy paint the place 0 artist drew in" in {
        row.text for row in genhint.records(both=True, prompts=mine)
    }


def test_a_check_names_tokens_parts_and_what_is_wrong(tmp_path):
    own = MINIMAL | {
        "words": ["red", "dark blue"],
        "subjects": [f"thing {i}" for i in range(10)],
        "templates": [{"name": "a", "scale": "word", "text": "The {thing} is big and"}],
    }
    lines = list(report(load_prompt_set(write(tmp_path, own)), str.split))
    said = "\n".join(lines)
    assert "word 'red': 1 token ['red']" in said and "Warning: 'dark blue' is several tokens" in said
    assert "split 'pairs': train 4 prompts of 4 subjects, dev 2 prompts of 2 subjects, test 4 prompts" in said
    assert "Warning: 4 test subjects; with fewer than 30" in said
    assert "word, a: 'The thing 0 is big and' ends in the token 'and'" in said and "no hint templates" in said
    two = own | {"templates": [*own["templates"], {"name": "b", "text": "{x} is big and"}]}
    two["subjects"] = [*(f"thing {i}" for i in range(10)), *(f"The thing {i}" for i in range(10))]
    said = "\n".join(report(load_prompt_set(write(tmp_path, two)), str.split))
    assert "Warning: 10 texts stand in the set twice, for example 'The thing 0 is big and'" in said
    assert "test subjects stand in training too" in said
