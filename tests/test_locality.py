"""The locality suite: its word lists, and its numbers against values computed by hand."""

from surgery.data import locality
from surgery.data.prompts import professions


def test_parts_share_nothing_and_no_row_stands_twice() -> None:
    parts = {part: locality.records(part) for part in locality.PARTS}
    texts = {part: [row.text for row in rows] for part, rows in parts.items()}
    assert all(len(set(lines)) == len(lines) for lines in texts.values())
    assert not set(texts["train"]) & set(texts["test"])
    nouns = {p: {row.subject for row in rows if row.kind != "others"} for p, rows in parts.items()}
    assert not nouns["train"] & nouns["test"]
    jobs = {subject.name for subject in professions()}
    for rows in parts.values():
        assert {row.kind for row in rows} == set(locality.SETS)
        assert {row.right for row in rows} <= set(locality.PRONOUNS)
        assert not jobs & {row.subject for row in rows}, "a profession is what an edit is aimed at"
        assert all(row.text == " ".join(row.text.split()) and "{" not in row.text for row in rows)


def test_the_wrong_pronoun_is_the_other_one_or_both() -> None:
    by = {row.text: row for row in locality.records("test")}
    assert by["The car stopped because"].wrong == ("he", "she")
    assert by["The mother smiled because"].wrong == ("he",)
    assert next(row for row in by.values() if row.subject == "John").wrong == ("she",)
    assert by["We smiled because"].wrong == ("he", "she")
