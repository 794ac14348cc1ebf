"""Work shared over processes that ``accelerate launch`` or ``torchrun`` started; alone, all of this does nothing.

Every process runs the same command on the same model. Whole batches are shared out (``mine``, ``dealt``), each computed
as it would be alone, and joined by adding arrays that are 0 where another process computed (``joined``): that is exact,
so that no number depends on how many processes there are. What is decided or written, the first process decides and
writes (``told``, ``first``). ``started`` puts a watch beside the work: where one process ends, the others end with it.
"""

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from surgery.errors import SurgeryError

Item = TypeVar("Item")
Found = TypeVar("Found")
Key = TypeVar("Key", bound=Hashable)
Array = TypeVar("Array")
_deals = itertools.count()
BEAT, SILENCE = 2.0, 40.0  # seconds between two signs of life, and without one until a process counts as ended


def _distributed() -> Any:
    """``torch.distributed`` where processes were brought together, else None; torch is not imported for it."""
    torch = sys.modules.get("torch")
    found = torch.distributed if torch else None
    return found if found and found.is_available() and found.is_initialized() else None


def index() -> int:
    """The number of this process, from 0."""
    found = _distributed()
    return int(found.get_rank()) if found else 0


def count() -> int:
    """How many processes share the work."""
    found = _distributed()
    return int(found.get_world_size()) if found else 1


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return index() == 0


def mine(items: Sequence[Item]) -> list[Item]:
    """Those of the items, such as batches, that this process computes; there may be none."""
    return list(items[index() :: count()])


def dealt(items: Sequence[Item]) -> Iterator[Item]:
    """Of the items, one after the other, each goes to the process that is first ready for it; for small ones last.

    Which process that is changes from run to run, so that what is found must not depend on it (``joined``).
    """
    if count() == 1:
        yield from items
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store, deal = _get_default_store(), f"surgery dealt {next(_deals)}"  # all processes deal in the same order
    while (taken := _meeting(lambda: store.add(deal, 1))) <= len(items):
        yield items[taken - 1]


def joined(found: Array) -> Array:
    """The sum over the processes of a numpy array or tensor that is 0 wherever another process has the value."""
    if count() == 1:
        return found
    import numpy as np
    import torch
    from accelerate import PartialState
    from accelerate.utils import reduce

    array: Any = found
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    own = tensor.to(PartialState().device)
    whole = _meeting(lambda: reduce(own, "sum")).to(tensor.device)
    return whole.numpy() if isinstance(array, np.ndarray) else whole


def gathered(found: Item) -> list[Item]:
    """What each process found, in their order: small things, which are pickled."""
    if count() == 1:
        return [found]
    from accelerate.utils import gather_object

    return list(_meeting(lambda: gather_object([found])))


def together(items: Sequence[Item], compute: Callable[[Sequence[Item]], Sequence[Found]]) -> list[Found]:
    """``compute(items)``, one value an item, of which each process computes a share; the values are pickled.

    For work on a CPU of which no item's value depends on the others, such as encoding texts.

    >>> together([1, 2, 3], lambda some: [each**2 for each in some])
    [1, 4, 9]
    """
    processes = count()
    shares = gathered(list(compute(items[index() :: processes])))  # turn by turn, as neighbours are of like length
    return [shares[number % processes][number // processes] for number in range(len(items))]


def each_once(calls: Mapping[Key, Callable[[], Found]]) -> dict[Key, Found]:
    """What each call gives, made by one of the processes and known to all (``together``).

    >>> each_once({"a": lambda: 1, "b": lambda: 2})
    {'a': 1, 'b': 2}
    """
    found = together(list(calls.values()), lambda some: [call() for call in some])
    return dict(zip(calls, found, strict=True))


def told(decide: Callable[[], Item]) -> Item:
    """What ``decide`` gives in the first process, the only one that calls it."""
    if count() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [decide() if first() else None]
    _meeting(lambda: broadcast_object_list(found))
    return found[0]


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        from accelerate import PartialState

        _meeting(PartialState().wait_for_everyone)


def _meeting(meet: Callable[[], Item]) -> Item:
    """``meet()``. Where it breaks since another process has ended, the watch ends this one, too, with its one line."""
    try:
        return meet()
    except RuntimeError:
        time.sleep(SILENCE + 5 * BEAT)  # by then the watch knows who it was
        raise  # all are alive, so it was something else


def wanted() -> int:
    """How many processes the launcher started, whether they are together yet or not."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def started(device: str | None = None) -> Iterator[None]:
    """Inside, the processes that the launcher started are together, and a watch ends those whose others ended.

    ``device`` "cpu" keeps them off the accelerators. Raises ``SurgeryError`` where they do not find each other.
    """
    if wanted() == 1:
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is said here, in one line
    import torch
    from accelerate import PartialState

    cpu = device == "cpu" or not torch.accelerator.is_available()
    try:
        PartialState(cpu=cpu)
    except (RuntimeError, ValueError) as error:
        raise SurgeryError(
            f"process {os.environ.get('RANK', '?')} of {wanted()}: the processes do not find each other "
            f"({(str(error).splitlines() or [''])[0][:160]}); start them with accelerate launch"
        ) from None
    watch = _Watch()
    try:
        yield
        wait()  # nobody may take the end of a quicker one for a failure
    except BaseException:
        watch.say("failed")
        watch.let_the_first_speak()
        raise
    watch.say("done")
    torch.distributed.destroy_process_group()


def says() -> bool:
    """Whether this process has to say that it failed: not where the first one fails alike, which then says it."""
    return first() or not _Watch.first_failed


class _Watch:
    """Signs of life of every process in the store that brought them together, read by all the others."""

    first_failed = False

    def __init__(self) -> None:
        import torch
        from torch.distributed.distributed_c10d import _get_default_store

        # A connection of its own: what waits on the store elsewhere must not hold up a sign of life.
        self._store = torch.distributed.PrefixStore("surgery", _get_default_store().clone())  # type: ignore[attr-defined]
        self._own, self._count, self._over = index(), count(), threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def say(self, word: str) -> None:
        """The last sign of this process."""
        self._over.set()
        with suppress(RuntimeError):  # the process that holds the store may have ended before
            self._store.set(f"{self._own}", word)

    def let_the_first_speak(self) -> None:
        """Wait a moment for the first process to fail, too."""
        with suppress(RuntimeError):
            for _ in range(0 if first() else 10):
                time.sleep(0.1)
                _Watch.first_failed = self._store.check(["0"]) and self._store.get("0") == b"failed"
                if _Watch.first_failed:
                    return

    def _run(self) -> None:
        seen = {other: (b"", time.monotonic()) for other in range(self._count)}
        beat = 0
        while not self._over.wait(BEAT):
            beat += 1
            try:
                self._store.set(f"{self._own}", f"{beat}")
                for other, (sign, since) in seen.items():
                    now = self._store.get(f"{other}") if self._store.check([f"{other}"]) else b""
                    seen[other] = (now, since) if now == sign else (now, time.monotonic())
            except RuntimeError:
                self._end([0], "the first process, which holds the store, has ended")
            failed = [other for other, (sign, _) in seen.items() if sign == b"failed"]
            silent = [
                other
                for other, (sign, since) in seen.items()
                if sign != b"done" and time.monotonic() - since > SILENCE and other not in failed
            ]
            if (failed or silent) and not self._over.is_set():
                self._end(silent, f"process {silent[0]} of {self._count} has ended" if silent else "")

    def _end(self, gone: list[int], line: str) -> None:
        """End this process at once: it may wait for the others inside a library, where no exception reaches it."""
        if line and self._own == min(set(range(self._count)) - set(gone)):
            print(f"error: {line}, so the others end, too; look at its own messages", file=sys.stderr, flush=True)
        os._exit(1)
