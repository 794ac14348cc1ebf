"""Run the benchmarks named on the command line, or those that need nothing but a model, and print one table each."""

import os
import sys
from importlib import import_module
from pathlib import Path

import surgery

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
USUAL = ("apply", "block", "cross_attention", "gain", "hooks", "scoring", "unlearning")


def main() -> None:
    """`python -m benchmarks block hooks`; or one of them with options of its own, `scale --shape 8b`."""
    first = next((place for place, word in enumerate(sys.argv) if word.startswith("-")), len(sys.argv))
    chosen, options = sys.argv[1:first] or USUAL, sys.argv[first:]
    if options and len(chosen) != 1:
        sys.exit(f"{options[0]}: name the one benchmark that it is an option of, before it")
    unknown = [name for name in chosen if name not in NAMES]
    if unknown:
        sys.exit(f"benchmark {unknown[0]!r}: expected some of {', '.join(NAMES)}")
    for name in chosen:
        if os.environ.get("RANK", "0") == "0":
            print(f"== {name}", flush=True)
        # The first argument is the checkpoint; bigger and other ones are given to a benchmark run by itself.
        spec = os.environ.get("BENCH_MODEL") or str(surgery.checkpoint_dir("demo"))
        import_module(f"benchmarks.{name}").main([spec, *options])


main()
