"""The grammar of sentence starts: parts that share nothing, prompts that are English, nothing gendered in a shape."""

import re

import pytest

from surgery.data import genbias, locality, neutral, shapes
from surgery.data.prompts import load_prompt_set
from surgery.data.shapes import PARTS, _grammar
from surgery.errors import SurgeryError


def test_the_parts_share_no_shape_and_no_person() -> None:
    for key in ("openings", "actions", "frames", "before", "hints"):
        parts = [set(_grammar()[key][part]) - {""} for part in PARTS]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    drawn = [set(shapes.shapes(part, 120)) for part in PARTS]
    people = [set(shapes.people(part)) for part in PARTS]
    for found in (drawn, people):
        assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    every = {*_grammar()["people"], *_grammar()["trained people"]}
    assert sum(map(len, people)) == len(_grammar()["people"]) + len(_grammar()["trained people"]) == len(every)
    # "lab assistant" would teach what is asked of "assistant".
    judged = {row.profession for part in ("dev", "test") for row in genbias.records("profession", part)}
    judged |= people[1] | people[2]
    more = _grammar()["trained people"]
    assert [name for name in more if any(name.endswith(f" {other}") for other in judged)] == []
    more = _grammar()["more people"]
    assert shapes.people("train", more=True) == (*shapes.people("train"), *more)
    assert shapes.people("dev", more=True) == shapes.people("dev")
    assert len({*more, *every, *(subject.name for subject in load_prompt_set("genbias").subjects)}) == (
        len(more) + len(every) + len(load_prompt_set("genbias").subjects)
    )
    assert [name for name in more if any(f" {other} " in f" {name} " for other in judged)] == []


def test_hundreds_of_shapes_about_people_beyond_the_262() -> None:
    prompts = load_prompt_set("genbias")
    assert len(set(shapes.shapes("train", 1500))) == 1500
    assert not {subject.name for subject in prompts.subjects} & {name for part in PARTS for name in shapes.people(part)}
    known = {template.text.replace("{profession}", "{subject}") for template in prompts.templates}
    assert not known & {text for part in PARTS for text in shapes.shapes(part, 150)}


def test_no_shape_says_who_it_is_about() -> None:
    """A pronoun or a gendered word in a shape would settle the gender of the person."""
    every = [text for part in PARTS for text in shapes.shapes(part, 300)]
    every += [text for kind in shapes.OTHERS for part in ("dev", "test") for text in shapes.others(kind, part)]
    gendered = re.compile(r"\b(he|she|his|her|him|hers|man|woman|girl|boy|mother|father|sister|brother)\b", re.I)
    assert [text for text in every if gendered.search(text)] == []
    assert all(text.count("{subject}") == 1 and "  " not in text and " ," not in text for text in every)


def test_what_holds_is_no_text_of_a_judge() -> None:
    assert not set(shapes.texts()) & (set(neutral.sentences()) | {row.text for row in locality.records("test")})


def test_a_shape_is_filled_and_dealt_evenly() -> None:
    assert shapes.fill("A {subject} met an {subject}"[:11], "usher") == "An usher"
    templates = shapes.shapes("dev", 40)
    found = shapes.prompts(templates, shapes.people("dev"), 10)
    counts = [sum(row.template == template for row in found) for template in templates]
    assert len({row.text for row in found}) == len(found)
    assert min(counts) >= 1
    assert max(counts) <= 3 * len(found) / len(templates)
    assert [row.text for row in found] == [row.text for row in shapes.prompts(templates, shapes.people("dev"), 10)]


def test_endings_differ_in_the_connective_alone() -> None:
    lines = ["The potter sat down; in fact,", "Ask the potter whether", "He left, and then", "She left, and then"]
    assert shapes.with_endings(lines, 1) == lines
    found = shapes.with_endings(lines, 4)
    begun = [[line for line in found if line.startswith(begin)] for begin in ("The potter sat", "Ask", "He", "She")]
    assert [len(some) for some in begun] == [4, 1, 4, 4]
    assert found[:4] == begun[0] and found[0] == lines[0] and len(set(found)) == len(found)
    ends = {line.removeprefix("The potter sat down") for line in begun[0]}
    assert ends.isdisjoint(line.removeprefix("He left") for line in begun[2][1:])  # they go round
    assert all(" ," not in line and " ;" not in line for line in found)


def test_as_many_lines_stand_behind_fewer_beginnings() -> None:
    """One in three of those that end in a connective, each with three; lines in pairs stay in pairs."""
    lines = [f"The {name} left because" for name in ("potter", "baker", "smith", "tailor", "usher", "cook")]
    assert shapes.of_fewer_beginnings([*lines, "Ask him whether"], 1) == [*lines, "Ask him whether"]
    found = shapes.of_fewer_beginnings([*lines, "Ask him whether"], 3)
    assert found[-1] == "Ask him whether" and len(set(found)) == len(found) == 7
    assert [line.startswith("The potter left") for line in found[:6]] == [True] * 3 + [False] * 3
    assert all(line.startswith("The tailor left") for line in found[3:6])
    pairs = [f"The {name} tied {word} hair when" for name in ("potter", "baker") for word in ("his", "her")]
    both = shapes.of_fewer_beginnings(pairs, 2, 2)
    assert both[:2] == pairs[:2] and both[2:] == [
        line.replace(" when", both[2][len("The potter tied his hair") :]) for line in pairs[:2]
    ]


def test_shapes_are_of_so_many_words_at_most() -> None:
    """Those among all that are short enough, in the same order; where there are not as many, that is said."""
    short = [text for text in shapes.shapes("train", 1000) if len(text.split()) <= 7]
    assert shapes.shapes("train", len(short), longest=7) == short
    assert all("{subject}" in text for text in short)
    with pytest.raises(SurgeryError, match=r"got \d+ of 1000 of at most 4 words; .* ask for fewer, or for longer ones"):
        shapes.shapes("train", 1000, longest=4)


@pytest.mark.parametrize("call", [lambda: shapes.shapes("all", 3), lambda: shapes.others("name", "train")])
def test_what_does_not_exist_is_refused(call: object) -> None:
    with pytest.raises(SurgeryError, match="expected one of"):
        call()  # type: ignore[operator]


def test_more_shapes_than_there_are_is_refused() -> None:
    with pytest.raises(SurgeryError, match="ask for fewer"):
        shapes.shapes("dev", 100000)
