"""Two processes on the CPU (gloo) train to the same result as one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import build

from surgery.edits.block import fine_tune
from surgery.forward.next_token import next_words
from surgery.training import Plan

IDS = tuple(tuple(range(3 + row, 9 + row)) for row in range(7))
WORDS = (5, 11)
PLAN = Plan(lr=1e-2, epochs=2, batch_size=3)  # the last batch has one row for two processes

WORKER = """
import sys, torch
from accelerate import PartialState
from families import build
from test_distributed import IDS, PLAN, WORDS
from surgery.edits.block import fine_tune
from surgery.forward.next_token import next_words

state = PartialState(cpu=True)
assert state.num_processes == 2
model = build("llama")
prefix = next_words(model, IDS, WORDS, keep=[1]).prefixes[1]
trained = fine_tune(model, IDS, WORDS, PLAN, blocks=[1], seed=0, prefix=prefix)
torch.save((trained.losses, trained.differences), f"{sys.argv[1]}/{state.process_index}.pt")
"""


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "worker.py").write_text(WORKER)
    here = Path(__file__).parent
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{here}:{here.parent}", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), str(tmp_path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    model = build("llama")
    prefix = next_words(model, IDS, WORDS, keep=[1]).prefixes[1]
    alone = fine_tune(model, IDS, WORDS, PLAN, blocks=[1], seed=0, prefix=prefix)
    for rank in range(2):
        losses, differences = torch.load(tmp_path / f"{rank}.pt")
        assert losses == pytest.approx(alone.losses, abs=1e-5)
        for name, difference in alone.differences.items():
            assert torch.allclose(differences[name], difference, atol=1e-5), name
