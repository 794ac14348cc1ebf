"""Several processes on the CPU, brought together over gloo; forked, since starting Python anew takes most of a test."""

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from surgery import processes


def together(count: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``work(index)`` gives in each of ``count`` processes: its result, or ``(exit code, what it printed)``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sys.stdout.flush(), sys.stderr.flush()
    children = [os.fork() or _child(rank, count, port, work, folder) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [
        pickle.loads((folder / f"{rank}.pkl").read_bytes())
        if code == 0
        else (code, (folder / f"{rank}.txt").read_text())
        for rank, code in enumerate(codes)
    ]


def _child(rank: int, count: int, port: int, work: Callable[[int], Any], folder: Path) -> int:
    printed = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1), os.dup2(printed, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    PartialState._reset_state()
    try:
        with processes.started("cpu"):
            (folder / f"{rank}.pkl").write_bytes(pickle.dumps(work(rank)))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
