"""Several processes give what one gives, bit for bit; one writes; where one ends, the others end."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from families import build
from gloo import together
from typer.testing import CliRunner

import surgery.cli
from surgery import processes
from surgery.data.capability import Question
from surgery.edits.block import fine_tune
from surgery.edits.equalize import equalize, hold_term, words_term
from surgery.errors import SurgeryError
from surgery.forward import token_logprobs
from surgery.forward.next_token import next_words, rank_blocks, token_losses
from surgery.forward.token_logprobs import token_log_probabilities
from surgery.metrics.association import states
from surgery.metrics.gas import Sampling, generate
from surgery.metrics.multiple_choice import score
from surgery.operation import Edit, Made, Summary, operation
from surgery.runs.settings import Settings
from surgery.training import Plan

draw = torch.Generator().manual_seed(0)
IDS = tuple(
    tuple(torch.randint(3, 60, (length,), generator=draw).tolist())
    for length in torch.randint(5, 25, (160,), generator=draw).tolist()
)  # more than one batch
FEW = IDS[:7]
WORDS = (5, 11)
PLAN = Plan(lr=1e-2, epochs=2, batch_size=3, parts=2)  # the last step has one example


def digest(*values: Any) -> str:
    """sha256 of the bytes of arrays and tensors, one after the other."""
    found = hashlib.sha256()
    for value in values:
        found.update(np.array(value.detach() if isinstance(value, torch.Tensor) else value).tobytes())
    return found.hexdigest()


def in_pieces(model: Any) -> list[np.ndarray]:
    """Log-probabilities whose trees are laid out by whoever it is, a piece of the sequences each."""
    with patch.object(token_logprobs, "PLANNED", 33):
        return token_log_probabilities(model, IDS)


def everything(tiny: Any) -> dict[str, str]:
    """The digest of what each shared step gives."""
    model = build("llama")
    ranked = rank_blocks(model, IDS, WORDS, keep=[1])
    seen = next_words(model, IDS, WORDS)
    prefix = next_words(model, FEW, WORDS, keep=[1]).prefixes[1]  # fewer batches than processes
    trained = fine_tune(model, FEW, WORDS, PLAN, blocks=[1], seed=0, prefix=prefix)
    terms = [words_term(IDS[:70], WORDS), hold_term("texts", IDS[70:140], positions="all")]
    equal = equalize(model, terms, Plan(lr=1e-2, epochs=1, batch_size=64, parts=3), blocks=[1], seed=0)
    opened, tokenizer = tiny
    questions = [
        Question("The nurse smiled because", (" he", " she"), 0),
        Question("The cook", (" said that", " ran"), 1),
    ]
    texts = generate(opened, tokenizer, ["The nurse", "The cook said that"], Sampling(length=4))
    return {
        "ranking": digest(ranked.importance.raw.scores, ranked.importance.raw.errors, ranked.prefixes[1].flat),
        "next words": digest(seen.probabilities),
        "losses": digest(*token_losses(model, IDS)[:2]),
        "two prompts": digest(next_words(model, IDS[:2], WORDS).probabilities),  # and up to three processes
        "log-probabilities": digest(*token_log_probabilities(model, IDS), *in_pieces(model)),
        "trained": digest(trained.losses, *trained.differences.values()),
        "equalised": digest(equal.losses, *equal.differences.values()),
        "options": digest(*score(opened, tokenizer, questions).sums),
        "states": digest(states(opened, tokenizer, ["The nurse", "A cook said that"] * 20)),
        "texts": digest(np.array(list("\0".join(texts).encode()))),
    }


def test_the_result_is_that_of_any_number_of_processes(tiny: Any, tmp_path: Path) -> None:
    alone = everything(tiny)
    assert together(2, lambda _: everything(tiny), tmp_path) == [alone] * 2
    assert together(3, lambda _: everything(tiny), tmp_path) == [alone] * 3


def test_the_parts_of_a_step_are_the_whole_to_rounding() -> None:
    model = build("llama")
    one, two = (
        fine_tune(model, FEW, WORDS, Plan(lr=1e-2, epochs=2, batch_size=3, parts=parts), blocks=[1], seed=0)
        for parts in (1, 2)
    )
    assert one.losses == pytest.approx(two.losses, abs=1e-5)
    assert all(torch.allclose(two.differences[name], value, atol=1e-5) for name, value in one.differences.items())


NAME = "model.layers.1.mlp.up_proj.weight"


def test_a_run_has_one_folder_which_the_first_process_writes(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        model, _ = tiny
        with operation("toy", model, Settings(model="toy"), checkpoint=checkpoint, out=tmp_path / "run") as op:
            measure = lambda: {"row": model.get_parameter(NAME)[0].tolist()}  # noqa: E731
            edit = Edit(blocks=[1], parameters=1)
            made = Made({NAME: torch.full_like(model.get_parameter(NAME), 0.3)}, edit)
            before = op.once("before", lambda: {"written by": rank})
            main = op.carry_out("toy", lambda _: made, measure, trains=[NAME], steps=1)
            summary = Summary(**op.about(main), before=before, after=main.measured)
            run = op.finish(summary, lambda folder, values, recipe: (folder / "report.html").write_text(f"{rank}"))
        return run.summary, processes.gathered(rank)

    (one, ranks), (two, _) = together(2, work, tmp_path)
    assert one == two and one["before"] == {"written by": 0} and ranks == [0, 1]
    assert (tmp_path / "run" / "report.html").read_text() == "0"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "delta.safetensors", "log.jsonl", "recipe.toml", "run.json", "report.html"
    }  # fmt: skip


@pytest.mark.parametrize("how", ["killed", "killed in a meeting", "refused"])
def test_where_one_process_ends_the_others_end_with_one_line(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "BEAT", 0.1)
    monkeypatch.setattr(processes, "SILENCE", 1.0)

    def work(rank: int) -> None:
        processes.wait()
        if rank == 1 and how != "refused":
            os._exit(9)
        if rank == 1:
            raise SurgeryError("this one cannot go on")
        if how == "killed in a meeting":
            processes.joined(np.ones(3))
        time.sleep(60)

    began = time.monotonic()
    (code, said), (other, _) = together(2, work, tmp_path)
    assert time.monotonic() - began < 30 and code == 1 and other == (1 if how == "refused" else 9)
    line = "error: process 1 of 2 has ended, so the others end, too; look at its own messages\n"
    assert said == ("" if how == "refused" else line)  # what was refused was said by the one that refused it


def test_what_does_not_share_its_work_refuses_several_processes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    found = CliRunner().invoke(surgery.cli.app, ["card", str(tmp_path / "delta.safetensors")])
    assert found.exit_code == 1 and "got 2 processes, which would all do the same; expected one" in found.output
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(processes, "count", lambda: 2)
    found = CliRunner().invoke(surgery.cli.app, ["run", "finetune", "--model", str(checkpoint)])
    assert found.exit_code == 1 and "finetune: got 2 processes, and this recipe works in one" in found.output


def test_the_next_batch_goes_to_whoever_is_ready(tmp_path: Path) -> None:
    def work(rank: int) -> list[list[int]]:
        found = []
        for _ in range(2):
            deal = processes.dealt(range(12))
            own = [next(deal)] if rank == 0 else []  # which then takes long
            processes.wait()
            own += deal if rank == 1 else []
            processes.wait()
            found.append([*own, *deal])
        return found

    assert together(2, work, tmp_path) == [[[0]] * 2, [list(range(1, 12))] * 2]
