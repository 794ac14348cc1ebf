"""Work on pieces a few at a time, with results in the order of the pieces; numpy, hashlib and zlib free the GIL."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")
MOST = 8  # threads; more only wait for the memory


def in_order(work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
    """``work(piece)`` of each piece, in order; no more than a few pieces are ahead, so that memory stays flat."""
    threads = max(1, min(MOST, len(os.sched_getaffinity(0))))
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for piece in pieces:
                waiting.append(pool.submit(work, piece))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()
