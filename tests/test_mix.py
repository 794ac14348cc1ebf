"""Mixtures from any files and those of the paper: sizes, labels, disjoint parts, seeds, and refusals."""

import json
import os
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from recipes.bias_diff.dataset import of_files
from surgery.cli import app
from surgery.cli.score import _labels
from surgery.data import mix as mixing
from surgery.data import mixtures
from surgery.data.mix import Source, mix, parse, sizes
from surgery.data.rows import label_of, truth
from surgery.errors import SurgeryError

DATA = os.environ.get("SURGERY_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SURGERY_DATA is not set: the folder with CrowS-Pairs, AG News, T-REx")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """40 biased rows in a .csv with line breaks in cells, and 100 neutral ones in a .csv without names."""
    bad = tmp_path / "bad.csv"
    bad.write_text("worse,kind\n" + "".join(f'"bias, {n}\nline two",{"ab"[n % 2]}\n' for n in range(40)))
    news = tmp_path / "news.csv"
    news.write_text("".join(f'"3","title {n}","text {n}"\n' for n in range(100)))
    return bad, news


def specs(files: tuple[Path, Path], first: str = "share=3", second: str = "share=7") -> list[str]:
    return [
        f"{files[0]},column=worse,biased=true,group=kind,{first}",
        f"{files[1]},column=2+3,header=false,name=agnews,{second}",
    ]


def surgery(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_mixture_has_its_shares_labels_and_texts(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    code, stdout, _ = surgery("data", "mix", *specs(files), "--rows", 100, "--seed", 4, "--out", out)
    assert code == 0 and "100 rows (bad 30, agnews 70)" in stdout
    rows = read(out)
    assert Counter((row["source"], row["biased"]) for row in rows) == {("bad", True): 30, ("agnews", False): 70}
    assert len({row["id"] for row in rows}) == 100
    for row in rows:
        number = int(row["id"].partition(":")[2])
        if row["biased"]:
            assert row["text"] == f"bias, {number}\nline two" and row["group"] == "ab"[number % 2]
        else:
            assert row["text"] == f"title {number} text {number}" and row["group"] is None
    biased = [row["biased"] for row in rows]
    runs = sum(a != b for a, b in pairwise(biased))
    assert 25 < runs < 60  # 42 are expected of a shuffled file; a sorted one has 1


def test_the_seed_decides_and_nothing_else(files: tuple[Path, Path], tmp_path: Path) -> None:
    found = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for path, seed in zip(found, (1, 1, 2), strict=True):
        mix([parse(spec) for spec in specs(files)], path, seed=seed, rows=50)
    assert found[0].read_bytes() == found[1].read_bytes() != found[2].read_bytes()


def test_without_rows_the_largest_and_without_shares_everything(files: tuple[Path, Path], tmp_path: Path) -> None:
    sources = [parse(spec) for spec in specs(files)]
    assert mix(sources, tmp_path / "a.jsonl", seed=0) == {"bad": 40, "agnews": 93}
    counts = [parse(spec) for spec in specs(files, "count=5", "name=agnews")]
    assert mix(counts, tmp_path / "b.jsonl", seed=0) == {"bad": 5, "agnews": 100}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 500)), min_size=1, max_size=4), st.integers(0, 300))
def test_sizes_add_up_and_keep_the_shares(given_: list[tuple[int, int]], rows: int) -> None:
    sources = [Source(Path(f"{n}.txt"), share=share) for n, (share, _) in enumerate(given_)]
    total = sum(share for share, _ in given_)
    have = [held for _, held in given_]
    try:
        want = sizes(sources, have, rows)
    except SurgeryError as error:
        assert "the mixture needs" in str(error)
        return
    assert not rows or sum(want) == rows
    for (share, held), count in zip(given_, want, strict=True):
        assert 0 < count <= held
        assert abs(count - share / total * sum(want)) < 1


def test_every_row_is_as_likely_drawn_and_every_place_as_likely(tmp_path: Path, monkeypatch: Any) -> None:
    """Over 300 seeds, with buckets of 4 rows: each of 20 rows is drawn half the time, at any place."""
    monkeypatch.setattr(mixing, "BUCKET", 4)
    file = tmp_path / "all.txt"
    file.write_text("".join(f"{n}\n" for n in range(20)))
    drawn, first = Counter[str](), Counter[int]()
    for seed in range(300):
        mix([Source(file, count=10)], tmp_path / "out.jsonl", seed=seed)
        texts = [row["text"] for row in read(tmp_path / "out.jsonl")]
        assert len(set(texts)) == 10
        drawn.update(texts)
        first[int(texts[0]) // 5] += 1
        (tmp_path / "out.jsonl").unlink()
    assert all(abs(count - 150) < 40 for count in drawn.values()) and len(drawn) == 20
    assert all(abs(first[part] - 75) < 35 for part in range(4))


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(mixing, "BUCKET", 2_000)  # against which an open file's own buffer is small
    peaks = []
    for lines in (2_000, 12_000):
        file = tmp_path / f"{lines}.txt"
        file.write_text("".join(f"a line of some length, number {n}\n" for n in range(lines)))
        tracemalloc.start()
        mix([Source(file)], tmp_path / f"{lines}.jsonl", seed=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(1 for _ in (tmp_path / f"{lines}.jsonl").open()) == lines
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spec": "nowhere.csv,share=1"}, "nowhere.csv: got no such file"),
        ({"spec": "BAD,colum=worse"}, "got 'colum=worse', expected key=value with a key of column"),
        ({"spec": "BAD,share=much"}, "share is 'much', expected a number"),
        ({"spec": "BAD,share=nan"}, "share is 'nan', expected a number"),
        ({"spec": "BAD,biased=perhaps"}, "biased is 'perhaps', expected a true or false"),
        ({"spec": "BAD,column=text,share=1"}, "line 3: no column 'text'; expected one of worse, kind"),
        ({"spec": "BAD,column=worse,group=type"}, "no column 'type'"),
        ({"first": "count=5", "second": "share=1"}, "some sources have a share and some have not"),
        ({"first": "count=41", "second": "count=1"}, "has 40 rows, the mixture needs 41"),
        ({"rows": 1000}, "has 40 rows, the mixture needs 300"),
        ({"first": "name=agnews"}, "two sources are named 'agnews'"),
        ({"first": "count=1", "second": "count=1", "rows": 9}, "no source has a share"),
    ],
)
def test_what_cannot_be_mixed_is_refused_and_nothing_is_left(
    files: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    given_ = specs(files, change.get("first", "share=3"), change.get("second", "share=7"))
    if "spec" in change:
        given_ = [change["spec"].replace("BAD", str(files[0]))]
    out = tmp_path / "out.jsonl"
    code, _, stderr = surgery("data", "mix", *given_, "--rows", change.get("rows", 0), "--out", out)
    assert code == 1 and message in stderr and stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_a_blank_text_is_named_with_its_line_and_nothing_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": " "}\n')
    with pytest.raises(SurgeryError, match=r"a.jsonl, line 2: 'text' is .*, expected text that is not blank"):
        mix([Source(file)], tmp_path / "out.jsonl", seed=0)
    with pytest.raises(SurgeryError, match="the destination exists"):
        mix([Source(file)], file, seed=0)


# The paper's


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder laid out as the real one, with 60 pairs, one of them twice."""
    root = tmp_path / "data"
    for folder in ("crows_pairs", "factual/trex_pararel/facts", "factual/trex_pararel/patterns", "toxicity"):
        (root / folder).mkdir(parents=True)
    lines = [f'{n},"More {n}, x.",Less {n}.,{"stereo" if n % 3 else "antistereo"},{"ab"[n % 2]}' for n in range(60)]
    lines.append("60,less  5.,Other.,stereo,a")  # shares a sentence with pair 5
    (root / mixtures.CROWS).write_text(",sent_more,sent_less,stereo_antistereo,bias_type\n" + "\n".join(lines) + "\n")
    news = "".join(f'"{n % 4 + 1}","Head {n}","Dell #39;s \\ cost #36;{n} quot;ok quot;"\n' for n in range(80))
    (root / mixtures.AGNEWS).write_text(news)
    (root / mixtures.TOXIC).write_text("".join(json.dumps({"text": f"Toxic {n} "}) + "\n" for n in range(20)))
    trex = root / mixtures.TREX
    facts = "".join(json.dumps({"sub_label": f"S{n}", "obj_label": "O"}) + "\n" for n in range(70))
    (trex / "facts" / "P1.jsonl").write_text(facts)
    (trex / "facts" / "P2.jsonl").write_text(facts)
    (trex / "patterns" / "P1.jsonl").write_text('{"pattern": "[X] is in [Y] ."}\n{"pattern": "other"}\n')
    return root


@pytest.mark.parametrize("name", mixtures.PRESETS)
def test_the_parts_of_crows_pairs_are_disjoint(name: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixture"
    code, _, stderr = surgery("data", "mix", name, "--data", data, "--out", out, "--seed", 3)
    assert code == 0 and "pairs: probe" in stderr
    rows = read(out / "mixture.jsonl")
    summary = json.loads((out / "mix.json").read_text())
    parts = {path.stem: mixtures.read_pairs(path) for path in out.glob("*.jsonl") if path.stem != "mixture"}
    injecting = name.startswith("crows")
    assert set(parts) == ({"probe", "test", "injected"} if injecting else {"probe", "test"})
    assert summary["pairs"] == {part: len(pairs) for part, pairs in parts.items()}
    assert summary["repeated_pairs_left_out"] == 1
    sentences = [
        {mixtures.normal(text) for pair in pairs for text in (pair.text, pair.anti)} for pairs in parts.values()
    ]
    assert sum(len(part) for part in sentences) == len(set().union(*sentences))
    texts = {mixtures.normal(row["text"]) for row in rows}
    probe_and_test = {
        mixtures.normal(text) for part in ("probe", "test") for pair in parts[part] for text in (pair.text, pair.anti)
    }
    assert not texts & probe_and_test
    assert sum(row["biased"] for row in rows) / len(rows) == pytest.approx(0.3, abs=0.02)
    if injecting:
        assert {row["text"] for row in rows if row["biased"]} == {pair.text for pair in parts["injected"]}
        assert {row["id"] for row in rows if row["biased"]} == {pair.id for pair in parts["injected"]}
    for pairs in parts.values():  # each type of bias in each part
        assert abs(sum(pair.group == "a" for pair in pairs) - len(pairs) / 2) <= 2


def test_texts_of_the_paper_s_sources(data: Path, tmp_path: Path) -> None:
    mixtures.build("crows_trex", data, tmp_path / "a", seed=0)
    trex = [row for row in read(tmp_path / "a" / "mixture.jsonl") if row["source"] == "trex"]
    assert all(row["text"].endswith(" is in O.") and row["group"] == "P1" for row in trex)
    mixtures.build("rtp_agnews", data, tmp_path / "b", seed=0)
    rows = read(tmp_path / "b" / "mixture.jsonl")
    news = next(row for row in rows if row["id"] == "ag_news:7" or row["source"] == "ag_news")
    number = news["id"].partition(":")[2]
    assert news["text"] == f'Head {number} Dell\'s cost ${number} "ok "'
    assert {row["text"] for row in rows if row["biased"]} <= {f"Toxic {n}" for n in range(20)}


def test_a_preset_is_decided_by_its_seed_and_size(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        mixtures.build("crows_agnews", data, tmp_path / name, seed=seed, rows=40)
    same = [(tmp_path / name / "mixture.jsonl").read_bytes() for name in "abc"]
    assert same[0] == same[1] != same[2]
    rows = read(tmp_path / "a" / "mixture.jsonl")
    assert Counter(row["biased"] for row in rows) == {True: 12, False: 28}
    assert len(mixtures.read_pairs(tmp_path / "a" / "injected.jsonl")) == 12


@pytest.mark.parametrize(
    "words, message",
    [
        (["crows_agnews"], "needs the folder with its files; give --data DIR"),
        (["crows_agnews", "x.txt", "--data", "."], "is a whole mixture; expected it alone, got 2 sources"),
        (["crows_agnews", "--data", "."], "got no such file"),
        (["crows_agnews", "--data", "DATA", "--rows", "1000"], "the mixture needs 300"),
    ],
)
def test_presets_refuse_in_one_line(words: list[str], message: str, data: Path, tmp_path: Path) -> None:
    given_ = [word.replace("DATA", str(data)) for word in words]
    code, _, stderr = surgery("data", "mix", *given_, "--out", tmp_path / "out")
    assert code == 1 and message in stderr and list(tmp_path.iterdir()) == [data]


def test_pairs_without_a_twin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"text": "a", "anti": "b"}\n{"text": "a"}\n')
    with pytest.raises(SurgeryError, match="line 2: 'anti' is 'None'"):
        mixtures.read_pairs(tmp_path / "pairs.jsonl")


@needs_data
def test_the_real_files_give_the_paper_s_mixture(tmp_path: Path) -> None:
    made = mixtures.build("crows_agnews", Path(str(DATA)), tmp_path / "m", seed=1)
    assert made["rows"] == {"crows_pairs": 426, "ag_news": 994}
    assert made["pairs"] == {"probe": 427, "test": 426, "injected": 426} and made["repeated_pairs_left_out"] == 1
    rows = read(tmp_path / "m" / "mixture.jsonl")
    assert not any(mark in row["text"] for row in rows for mark in ("\\", "#39;", "quot;"))
    order = np.array([row["biased"] for row in rows])
    assert abs(order[:710].mean() - 0.3) < 0.06


def test_help_ends_in_examples() -> None:
    code, stdout, _ = surgery("data", "mix", "--help")
    assert code == 0 and "surgery data mix" in stdout[stdout.index("Examples:") :]


@pytest.mark.parametrize("word, means", [("yes", True), ("No", False), (" TRUE ", True), ("0", False), ("1", True)])
def test_a_label_means_the_same_to_every_reader(tmp_path: Path, word: str, means: bool) -> None:
    """One parser: ``yes`` was a label to one command, refused by another and unknown to the third."""
    file, data = tmp_path / "texts.jsonl", tmp_path / "probe.jsonl"
    file.write_text(json.dumps({"text": "The nurse.", "biased": word}) + "\n")
    data.write_text("".join(json.dumps({"text": f"He {n}.", "anti": f"She {n}."}) + "\n" for n in range(4)))
    assert parse(f"{file},share=1,biased={word}").biased == means
    assert _labels(file, "biased").tolist() == [means]
    assert of_files(file, data, None, text="text", label="biased", seed=0).biased.tolist() == [means]  # type: ignore[union-attr]
    with pytest.raises(SurgeryError, match=r"row 3: 'biased' is 'maybe', expected true or false \(yes or no, 1 or 0\)"):
        label_of("maybe", "biased", "row 3")
    assert truth(2) is None and truth(None) is None and truth(1.0) is True
