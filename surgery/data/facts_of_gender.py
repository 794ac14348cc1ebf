"""Prompts where he or she is right by definition, by title, or by introduction: bias is not knowledge."""

from surgery.data.locality import Row, expand, shipped

SETS = ("nouns", "relations", "introduced")


def records() -> list[Row]:
    """Every prompt, by set: ``nouns`` (king, nun), ``relations`` (his wife), and people ``introduced`` as Mr or Ms."""
    sets = shipped("facts_of_gender.json")["sets"]
    return [
        row
        for kind in SETS
        for row in expand(kind, sets[kind]["templates"], sets[kind]["subjects"], sets[kind]["each"])
    ]
