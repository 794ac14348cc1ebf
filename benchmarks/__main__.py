"""Run the benchmarks named on the command line, or all of them, and print one table each."""

import sys
from importlib import import_module
from pathlib import Path

import surgery

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def main() -> None:
    """`python -m benchmarks block hooks`."""
    chosen = sys.argv[1:] or NAMES
    unknown = [name for name in chosen if name not in NAMES]
    if unknown:
        sys.exit(f"benchmark {unknown[0]!r}: expected some of {', '.join(NAMES)}")
    for name in chosen:
        print(f"== {name}", flush=True)
        # The first argument is the checkpoint; bigger and other ones are given to a benchmark run by itself.
        spec = str(surgery.checkpoint_dir("demo"))
        import_module(f"benchmarks.{name}").main([spec])


main()
