"""Progress of long work: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from surgery import processes

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Progress:
    """Where a command says what it is doing; always standard error, so that results can be piped."""

    quiet: bool = False

    def say(self, line: str) -> None:
        """One plain line."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def work(self, label: str, total: int | None) -> Iterator[Advance]:
        """Inside, the yielded function is told of finished items; ``total`` is how many there are, if it is known."""
        if self.quiet:
            yield lambda n: None
        elif sys.stderr.isatty():
            from rich import progress as bars
            from rich.console import Console

            columns = (
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeRemainingColumn(),
            )
            with bars.Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task(label, total=total)
                yield lambda n: bar.advance(task, n)
        else:
            start, done = time.monotonic(), [0]

            def count(n: int) -> None:
                done[0] += n

            yield count
            amount = f"{done[0]} in "
            if total is not None and done[0] != total:  # stopped early, taken up again, or a part of what is shared
                amount = f"{done[0]} of {total} in " if processes.count() == 1 else ""
            self.say(f"{label}: {amount}{time.monotonic() - start:.1f} s")


def in_proportion(step: Advance, parts: int, things: int) -> Advance:
    """Tells ``step`` of things, in proportion to how many of all ``parts`` are finished, such as questions' options."""
    done = told = 0

    def finished(count: int) -> None:
        nonlocal done, told
        done += count
        now = done * things // parts
        step(now - told)
        told = now

    return finished
