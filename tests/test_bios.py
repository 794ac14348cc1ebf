"""Bias in Bios, HateCheck and Davidson: their rows, splits that do not leak, and one whole measurement."""

import os
from collections import Counter
from pathlib import Path

import pytest
from families import build
from letters import letters

from surgery.data import bios, hate
from surgery.errors import SurgeryError
from surgery.metrics import bios as metric

NEEDS_DATA = pytest.mark.skipif("SURGERY_DATA" not in os.environ, reason="needs SURGERY_DATA, the data sets' directory")
FOLDER = Path(os.environ.get("SURGERY_DATA", ""))
PARTS = ("train", "dev", "test")


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def test_biographies_are_read_once_with_readable_professions(tmp_path: Path) -> None:
    head = "hard_text,profession,gender\n"
    write(tmp_path, bios.FILE, head + '"She runs,\nand runs. ",yoga_teacher,Female\n"She runs,\nand runs.",dj,Female\n')
    found = bios.load(tmp_path)
    assert found == [bios.Biography("She runs,\nand runs.", "yoga teacher", "Female")]
    write(tmp_path, bios.FILE, head + "Runs.,dj,X\n")
    with pytest.raises(SurgeryError, match=r"row 1: gender 'X'.*expected Female or Male"):
        bios.load(tmp_path)
    write(tmp_path, bios.FILE, "hard_text,profession,gender\nRuns.,dj\n")
    with pytest.raises(SurgeryError, match="line 2: got 2 cells, expected 3"):
        bios.load(tmp_path)
    with pytest.raises(SurgeryError, match=r"part: got 'training', expected one of train, dev, test, all"):
        write(tmp_path, bios.FILE, head + "Runs.,dj,Male\n")
        bios.load(tmp_path, "training")


def test_hate_rows_are_labelled_and_their_templates_stay_together(tmp_path: Path) -> None:
    lines = ["functionality,case_id,test_case,label_gold,target_ident,templ_id"]
    for template in range(40):
        lines += [f"f,{template},I like {g} {template}.,non-hateful,{g},{template}" for g in ("women", "Muslims")]
    write(tmp_path, hate.HATECHECK, "\n".join(lines))
    parts = [hate.hatecheck(tmp_path, name, 3) for name in PARTS]
    assert sum(map(len, parts)) == 80 and sorted(map(len, parts)) == [16, 16, 48]
    assert all(
        Counter(row.group for row in rows) == dict.fromkeys(("women", "Muslims"), len(rows) // 2) for rows in parts
    )
    assert {row.label for rows in parts for row in rows} == {0}
    write(tmp_path, hate.HATECHECK, lines[0] + "\nf,1,x,maybe,women,1\n")
    with pytest.raises(SurgeryError, match="row 1: label 'maybe'"):
        hate.hatecheck(tmp_path)
    write(tmp_path, hate.DAVIDSON, "class,tweet\n0,one\n1,two\n3,three\n")
    with pytest.raises(SurgeryError, match="row 3: class '3'"):
        hate.davidson(tmp_path)


@NEEDS_DATA
def test_the_files_at_hand() -> None:
    cases = hate.hatecheck(FOLDER)
    counts = Counter((row.group, row.label) for row in cases)
    assert len(cases) == 3728 and counts["women", 1] == 373 and counts["women", 0] == 136
    assert counts["", 0] + counts["", 1] == 292
    tweets = hate.davidson(FOLDER)
    assert Counter(row.label for row in tweets) == {0: 1430, 1: 19190, 2: 4163}
    assert sum(row.label for row in hate.davidson(FOLDER, binary=True)) == 1430
    people = bios.load(FOLDER)
    assert Counter(row.gender for row in people) == {"Male": 155, "Female": 125} and len(bios.professions(people)) == 28
    assert len(bios.load(FOLDER, files=(bios.FILE, bios.ACCOUNTANTS))) == 1278  # two texts stand in both
    for load, total in ((hate.hatecheck, 3728), (hate.davidson, 24783), (bios.load, 280)):
        parts = [load(FOLDER, name, 0) for name in PARTS]
        assert sum(map(len, parts)) == total
        texts = [{row.text for row in rows} for rows in parts]
        if load is not hate.hatecheck:  # whose few equal texts come from different templates
            assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
        assert load(FOLDER, "test", 0) == parts[2] != load(FOLDER, "test", 1)


def test_a_measurement_has_accuracy_gap_and_perplexity(tmp_path: Path) -> None:
    rows = [
        f"{s} is {j} number {n}.,{j}_x,{g}"
        for n in range(5)
        for j in ("dj", "poet")
        for s, g in (("She", "Female"), ("He", "Male"))
    ]
    write(tmp_path, bios.FILE, "\n".join(["hard_text,profession,gender", *rows]))
    found = metric.evaluate(build("llama", max_position_embeddings=256), letters(), tmp_path, part="all")
    assert found["accuracy"].n == found["perplexity"].n == 20 and found["tpr_gap"]["max"].n == 20
    assert found["accuracy"].value in [n / 20 for n in range(21)] and found["perplexity"].value > 20
    assert "20 of 20 rows" in found["accuracy"].data and "per character" in found["accuracy"].data
    few = metric.evaluate(build("llama", max_position_embeddings=256), letters(), tmp_path, part="all", limit=3)
    assert few["accuracy"].n == 10 and "10 of 20 rows" in few["accuracy"].data  # a whole profession
    asked = metric.questions(bios.load(tmp_path)[:1], ["dj x", "poet x"])[0]
    assert asked.prompt.endswith("Answer:") and asked.options == (" dj x", " poet x") and asked.answer == 0
    alone = [f"She is cook number {n}.,cook,Female" for n in range(4)]  # of one gender: a gap of it says nothing
    write(tmp_path, bios.FILE, "\n".join(["hard_text,profession,gender", *alone, *rows]))
    for seed in range(4):
        chosen = metric._professions(bios.load(tmp_path), 20, seed)
        assert {row.profession for row in chosen} == {"dj x", "poet x"}
