"""Supervised fine-tuning: which tokens are learnt, the loss, both methods, the file reader, and what is refused."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, state
from safetensors import safe_open

import surgery
from hooks.errors import Note
from recipes import finetune
from recipes.finetune import recipe
from surgery.data.texts import Columns, Example, examples
from surgery.edits.supervised import Lora, Row, adapters, encode_rows, evaluate, fine_tune, target_names, token_losses
from surgery.errors import SurgeryError
from surgery.metrics.metric import from_dict
from surgery.runs.folder import Folder
from surgery.training import Plan

JOBS = (
    "nurse",
    "engineer",
    "guard",
    "doctor",
    "lawyer",
    "teacher",
    "dancer",
    "farmer",
    "judge",
    "poet",
    "chef",
    "maid",
)
TEXTS = [f"The {job} said that {word} is kind." for job in JOBS for word in ("he", "she")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def learn(tiny: Any, checkpoint: Path, texts: Path, out: Path, **settings: Any) -> dict[str, Any]:
    ready = finetune.Settings(**({"model": str(checkpoint), "file": str(texts), "lr": 3e-3, "epochs": 3} | settings))
    return finetune.run(*tiny, ready, out=out).summary


# The file


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    pairs = [Example("Is it, so?", " Yes,\nit is."), Example('Say "no".', " No\u2028no.")]
    as_json = [json.dumps({"prompt": e.prompt, "answer": e.answer, "more": 1}) for e in pairs]
    quoted = [(e.prompt.replace('"', '""'), e.answer) for e in pairs]
    written = {
        "a.jsonl": "\n".join(as_json) + "\n\n",
        "a.csv": "prompt,answer\n" + "".join(f'"{one}","{two}"\n' for one, two in quoted),
        "a.tsv": "answer\tprompt\r\n" + "".join(f'"{two}"\t"{one}"\r\n' for one, two in quoted),
    }
    for name, content in written.items():
        (tmp_path / name).write_bytes(content.encode())
        assert examples(tmp_path / name) == pairs, name
        assert examples(tmp_path / name, limit=1) == pairs[:1]
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert examples(tmp_path / "a.txt") == [Example("", "one"), Example("", " two ")]


def test_columns_have_the_names_that_the_user_gives(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("text,question,reply\nx\u2028y,Who?,Me.\n")
    columns = Columns(text="", prompt="question", answer="reply")
    assert examples(tmp_path / "q.csv", columns=columns) == [Example("Who?", "Me.")]
    assert examples(tmp_path / "q.csv") == [Example("", "x\u2028y")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "\n \n", "got no row"),
        ("a.doc", "x", "got the ending '.doc'"),
        ("a.jsonl", '{"text": "x"}\n["x"]\n', "line 2: got"),
        ("a.jsonl", '{"text": "x"}\n{"prompt": "x"}\n', "line 2: got 'prompt', expected 'text', or 'prompt' and"),
        ("a.jsonl", '{"text": 3}\n', "line 1: 'text' is '3'"),
        ("a.jsonl", '{"text": "x", "prompt": "y"}\n', "has both 'text' and 'prompt'"),
        ("a.jsonl", "[" * 100_000, "expected a JSON object"),
        ("a.csv", "prompt,answer\na,b\nc\n", "line 3: got 1 cells, expected 2"),
        ("a.csv", "first,second\na,b\n", "line 2: got 'first, second'"),
        ("a.csv", "text,text\na,b\n", "two columns are named 'text'"),
        ("a.csv", 'text\n"a" b\n', "line 2: malformed"),
        ("a.csv", "prompt,answer\na, \n", "line 2: 'answer' is ' '"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SurgeryError, match=message) as error:
        examples(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_undecodable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="no such file"):
        examples(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(SurgeryError, match="UTF-8"):
        examples(tmp_path / "latin.txt")


# The tokens


class Pieces:
    """A tokenizer of two-character pieces with a begin token: pieces of a joined text straddle odd boundaries."""

    eos_token_id = 1

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, list[Any]]:
        if isinstance(text, list):
            return {"input_ids": [self(each, add_special_tokens)["input_ids"] for each in text]}
        ids = [hash_of(text[at : at + 2]) for at in range(0, len(text), 2)]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}


def hash_of(piece: str) -> int:
    return 2 + sum(ord(letter) * 7**place for place, letter in enumerate(piece))


def test_the_prompt_ends_at_a_token() -> None:
    tokenizer: Any = Pieces()
    for prompt, answer in (("abcd", "ef"), ("abc", "defg"), ("a", "b")):
        (row,) = encode_rows(tokenizer, [Example(prompt, answer)], max_length=99).rows
        asked = tokenizer(prompt)["input_ids"]
        assert row.ids[: row.start] == tuple(asked)
        assert row.ids[row.start :] == tuple(tokenizer(answer, add_special_tokens=False)["input_ids"])
    (text,) = encode_rows(tokenizer, [Example("", "abcd")], max_length=99).rows
    assert text == Row((0, hash_of("ab"), hash_of("cd")), 1)
    (ended,) = encode_rows(tokenizer, [Example("ab", "cd")], max_length=99, end=True).rows
    assert ended == Row((0, hash_of("ab"), hash_of("cd"), 1), 2)


def test_long_rows_are_cut_and_counted_and_empty_ones_left_out() -> None:
    tokenizer: Any = Pieces()
    given = [Example("", "abcdefgh"), Example("abcdefgh", "ij"), Example("", "abcd")]
    encoded = encode_rows(tokenizer, given, max_length=3)
    assert [len(row.ids) for row in encoded.rows] == [3, 3]
    assert (encoded.cut, encoded.left_out) == (2, 1)
    with pytest.raises(SurgeryError, match="none of 1 rows"):
        encode_rows(tokenizer, given[1:2], max_length=3)


# The loss


def test_the_loss_is_the_mean_over_the_learnt_tokens_only() -> None:
    logits = torch.full((2, 4, 5), 0.0)
    logits[0, 1, 3] = math.log(6.0)  # P(3) = 6 / 10 at the place before the last but one
    ids = torch.tensor([[0, 2, 3, 4], [1, 1, 2, 3]])
    learnt = torch.tensor([[False, False, True, False], [False, False, True, True]])
    assert token_losses(logits, ids, learnt).tolist() == pytest.approx([-math.log(0.6), math.log(5)])


def test_the_prompt_gets_no_gradient_as_a_target_and_padding_changes_nothing() -> None:
    model: Any = build("llama")
    rows = [Row((5, 6, 7, 8, 9), 3), Row((5, 6), 1), Row((9, 8, 7, 6, 5, 4, 3), 1)]
    alone = [evaluate(model, [row])[0] for row in rows]
    assert evaluate(model, rows).tolist() == pytest.approx(alone, abs=1e-5)
    dropping: Any = build("gpt2")
    quiet = evaluate(dropping, rows).tolist()
    assert evaluate(dropping.train(), rows).tolist() == quiet and dropping.training
    given = torch.tensor([rows[0].ids])
    with torch.no_grad():
        logs = model(given).logits.log_softmax(-1)[0]
    assert alone[0] == pytest.approx(-(logs[2, 8] + logs[3, 9]).item() / 2, abs=1e-5)
    # transformers' own loss with the prompt's labels at -100
    labels = torch.tensor([[-100, -100, -100, 8, 9]])
    assert alone[0] == pytest.approx(model(given, labels=labels).loss.item(), abs=1e-5)


def test_one_step_is_transformers_and_torch_s_own() -> None:
    model, rows = build("llama"), [Row((5, 6, 7, 8), 2), Row((9, 8, 7, 6), 2)]
    trained = fine_tune(model, rows, Plan(1e-2, 1, 2, "adamw"), seed=0)  # type: ignore[arg-type]
    other: Any = build("llama")
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    ids = torch.tensor([row.ids for row in rows])
    loss = other(ids, labels=ids.clone().index_fill_(1, torch.tensor([0, 1]), -100)).loss
    loss.backward()
    optimizer.step()
    assert trained.losses == pytest.approx([loss.item()], abs=1e-5)
    base = dict(build("llama").named_parameters())
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(trained.differences[name], parameter - base[name], rtol=1e-3, atol=1e-4)


# LoRA


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_factors_are_the_difference_that_the_adapter_made(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the products of the factors added, the plain model answers like the one with PEFT's layers."""
    model: Any = build(family)
    before, rows, seen = state(model), [Row((5, 6, 7, 8), 1), Row((9, 8, 7), 1)], []
    monkeypatch.setattr("surgery.edits.supervised._factors", watching(seen, model, rows))
    found = fine_tune(model, rows, Plan(1e-2, 5, 2), seed=0, lora=Lora(rank=3, alpha=5)).differences
    assert state(model) == before
    untouched = evaluate(model, rows)
    with torch.no_grad():
        for name in {name.removesuffix(".lora_A") for name in found if name.endswith(".lora_A")}:
            left, right = found[f"{name}.lora_B"], found[f"{name}.lora_A"]
            assert left.shape[1] == right.shape[0] == 3
            model.get_parameter(name).add_(left @ right)
    assert evaluate(model, rows).tolist() == pytest.approx(seen[0], abs=1e-4)
    assert (evaluate(model, rows) < untouched).all()


def watching(seen: list[Any], model: Any, rows: list[Row]) -> Any:
    from surgery.edits.supervised import _factors

    def wrapped(name: str, layer: Any) -> Any:
        seen.append(evaluate(model, rows).tolist())
        return _factors(name, layer)

    return wrapped


def test_adapters_leave_nothing_behind_after_an_exception() -> None:
    model: Any = build("llama")
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    before = state(model)
    with pytest.raises(ValueError), adapters(model, Lora(targets=("q_proj",)), 0) as layers:
        assert len(layers) == 3 and state(model) != before
        raise ValueError
    assert state(model) == before


def test_targets_are_matched_at_the_dot() -> None:
    model: Any = build("llama")
    assert target_names(model, ("q_proj", "1.mlp.up_proj")) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.2.self_attn.q_proj",
    ]
    assert len(target_names(model, ())) == 21  # seven matrices in each of three blocks, and not the head
    for wrong in ("proj", "embed_tokens"):
        with pytest.raises(SurgeryError, match=f"got '{wrong}', expected linear layers such as down_proj"):
            target_names(model, (wrong,))


# The recipe


def test_the_whole_run_and_its_child(tiny: Any, checkpoint: Path, file: Path, tmp_path: Path) -> None:
    before = state(tiny[0])
    suites = ["perplexity", "genbias"]
    summary = learn(tiny, checkpoint, file, tmp_path / "run", keep_checkpoint=True, suites=suites)
    assert state(tiny[0]) == before
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "recipe.toml", "delta.safetensors", "report.html", "log.jsonl", "checkpoint"}
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["rows"]["trained"] == 22 and summary["rows"]["held_out"] == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert "0 cut to 128 tokens" in lines[0]["note"]
    assert sum("step" in line for line in lines) == summary["edit"]["steps"] == 9
    was, now = (from_dict(summary[when]["held_out_loss"]) for when in ("before", "after"))
    assert now.value < 0.8 * was.value and was.n == 2
    assert summary["after"]["perplexity"]["n"] == 200
    assert summary["after"]["genbias"]["relative_gap"]["all"]["value"] >= 0
    delta = surgery.Delta.load(tmp_path / "run" / "delta.safetensors")
    assert delta.metadata["recipe"] == (tmp_path / "run" / "recipe.toml").read_text()
    assert delta.kind == "dense" and "model.embed_tokens.weight" in delta.tensors
    weights = (checkpoint / "model.safetensors").stat().st_size
    assert summary["delta"]["bytes"] < weights + 30_000  # two bytes a number, and what is told of each tensor
    assert "held out loss" in (tmp_path / "run" / "report.html").read_text()


def test_the_held_out_loss_is_that_of_the_saved_child(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Measured again on the directory, opened from nothing."""
    file = tmp_path / "texts.jsonl"
    rows = [{"prompt": "The nurse said that", "answer": answer} for answer in ["he is.", "she is."] * 6]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = learn(tiny, checkpoint, file, tmp_path / "run", keep_checkpoint=True, held_out=0.5)
    child, tokenizer = surgery.load(tmp_path / "run" / "checkpoint", device="cpu")
    encoded = encode_rows(tokenizer, examples(file), max_length=128).rows
    assert {row.start for row in encoded} == {4}
    settings = finetune.Settings(file=str(file), held_out=0.5)
    learnt, held = recipe._divide(encoded, settings)
    assert not set(learnt) & set(held)  # copies of a row stand on one side
    assert len(learnt) == len(held) == 6
    assert evaluate(child, held).mean() == pytest.approx(summary["after"]["held_out_loss"]["value"], abs=1e-4)


def test_lora_runs_write_factors_or_their_product(tiny: Any, checkpoint: Path, file: Path, tmp_path: Path) -> None:
    before = state(tiny[0])
    more = {"method": "lora", "rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "lr": 1e-2}
    factors = learn(tiny, checkpoint, file, tmp_path / "a", **more)
    whole = learn(tiny, checkpoint, file, tmp_path / "b", merge=True, **more)
    assert state(tiny[0]) == before
    one, two = (surgery.Delta.load(tmp_path / name / "delta.safetensors") for name in "ab")
    assert (one.kind, two.kind) == ("lora", "dense")
    assert sorted(one.shapes) == sorted(two.shapes) and len(one.shapes) == 8
    for name, shape in one.shapes.items():
        size = math.prod(shape)
        assert one.read(name, 0, size).tolist() == two.read(name, 0, size).tolist()
    assert factors["after"] == whole["after"]
    assert factors["after"]["held_out_loss"]["value"] < factors["before"]["held_out_loss"]["value"]
    assert factors["delta"]["bytes"] < whole["delta"]["bytes"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_written_recipe_gives_the_same_delta(
    tiny: Any, checkpoint: Path, file: Path, tmp_path: Path, method: str
) -> None:
    torch.manual_seed(98)
    first = learn(tiny, checkpoint, file, tmp_path / "a", method=method, seed=3, epochs=1)
    torch.manual_seed(99)
    values = surgery.runs.recipe_files.read_toml(tmp_path / "a" / "recipe.toml")
    assert values.pop("recipe") == "finetune"
    again = finetune.run(
        *tiny, surgery.runs.recipe_files.build(finetune.Settings, values, "recipe"), out=tmp_path / "b"
    )
    assert first["delta"]["sha256"] == again.summary["delta"]["sha256"]
    other = learn(tiny, checkpoint, file, tmp_path / "c", method=method, seed=4, epochs=1)
    assert first["delta"]["sha256"] != other["delta"]["sha256"]


def test_an_interrupted_run_continues_to_the_same_delta(
    tiny: Any, checkpoint: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(tiny, checkpoint, file, tmp_path / "whole", method="lora")
    monkeypatch.setattr("surgery.training_state.SAVE_EVERY", 0.0)
    write, before = Folder.log, state(tiny[0])

    def interrupt(folder: Any, row: dict[str, Any]) -> None:
        write(folder, row)
        if row.get("step") == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("surgery.runs.folder.Folder.log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            learn(tiny, checkpoint, file, tmp_path / "cut", method="lora")
    assert state(tiny[0]) == before
    ready = finetune.Settings(model=str(checkpoint), file=str(file), lr=3e-3, epochs=3, method="lora")
    rest = finetune.run(*tiny, ready, out=tmp_path / "cut", resume=True).summary
    assert rest["delta"]["sha256"] == whole["delta"]["sha256"]
    assert not (tmp_path / "cut" / "state").exists()


def test_the_learning_rate_follows_the_method() -> None:
    assert finetune.Settings().lr == 2e-5 and finetune.Settings(method="lora").lr == 2e-4
    assert finetune.Settings(method="lora", lr=1e-3).lr == 1e-3
    assert "lr = 0.0002" in surgery.runs.recipe_files.dump("finetune", finetune.Settings(method="lora"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"file": ""}, "no file to learn from"),
        ({"file": "nowhere.txt"}, "nowhere.txt: got no such file"),
        ({"limit": 1}, "1 row to learn, expected at least 2"),
        ({"suites": ["blimp"]}, "got blimp, expected some of genbias"),
        ({"end": True}, "no end token"),
        ({"method": "lora", "target_modules": ["c_attn"]}, "got 'c_attn', expected linear layers such as down_proj"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_left(
    tiny: Any, checkpoint: Path, file: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    before = state(tiny[0])
    with pytest.raises(SurgeryError, match=message):
        learn(tiny, checkpoint, file, tmp_path / "x", **settings)
    assert list(tmp_path.iterdir()) == [file] and state(tiny[0]) == before


def test_the_delta_is_of_the_checkpoint_s_tensors(tiny: Any, checkpoint: Path, file: Path, tmp_path: Path) -> None:
    learn(tiny, checkpoint, file, tmp_path / "run")
    delta = surgery.Delta.load(tmp_path / "run" / "delta.safetensors")
    with safe_open(checkpoint / "model.safetensors", "pt") as stored:
        assert sorted(delta.tensors) == sorted(stored.keys())


def test_lora_says_that_a_mixtures_experts_have_no_part() -> None:
    model = build("qwen3_moe")
    said = r"LoRA: the experts' matrices .*experts\.gate_up_proj.* of the blocks' parameters"
    with pytest.warns(Note, match=said), adapters(model, Lora(rank=2), 0) as layers:
        assert not any(".experts" in name for name in layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        with adapters(model, Lora(rank=2, targets=("q_proj",)), 0), adapters(build("llama"), Lora(rank=2), 0):
            pass
