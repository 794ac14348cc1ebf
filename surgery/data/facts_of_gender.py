"""Prompts where he or she is right by definition, by title, or by introduction: bias is not knowledge."""

from surgery.data.locality import Row, check_part, expand, shipped

SETS = ("nouns", "relations", "introduced")


def records(part: str = "test") -> list[Row]:
    """The prompts of one part: ``nouns`` (king, nun), ``relations`` (his wife), people ``introduced`` as Mr or Ms.

    As in ``surgery.data.locality``: ``train`` may hold an edit, settings are chosen on ``dev``, ``test`` judges; they
    share neither subject nor template. Raises ``SurgeryError`` for an unknown part.
    """
    check_part(part, "facts of gender")
    found = []
    for kind in SETS:
        own = shipped("facts_of_gender.json")["sets"][kind][part]
        found += expand(kind, own["templates"], own["subjects"], own["each"])
    return found


def more_nouns() -> list[str]:
    """About 640 further nouns whose gender is a matter of definition (earl, doyenne, male clerk), for training.

    Of a few dozen it is one of the word's form or of custom (grandmaster, gunslinger, diva): to hold them keeps what
    the model takes such people for. None of all is a subject of a part of ``records`` or of ``surgery.data.locality``,
    nor has a word that judges.
    """
    listed = shipped("facts_of_gender.json")["more_nouns"]
    return [*listed["she"], *listed["he"]]
