"""The command eval: measure a checkpoint, or two checkpoints on the same rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.app import MODEL_HELP, Debug, Device, JsonFile, Model, Part, Quiet, Rows, Scorer, command, examples
from surgery.cli.models import check_opening, import_libraries, open_model
from surgery.errors import SurgeryError
from surgery.seeds import SEEDS


@command(
    shared=True,
    name="eval",
    epilog=examples(
        "surgery eval demo",
        "surgery eval demo --delta delta.safetensors --json after.json",
        "surgery eval ./edited --against demo",
        "surgery eval demo --suite stereoset --suite crows_pairs --data ./data --scorer bias-bench",
        "surgery eval demo --data jobs.toml --words-as continuations",
        "surgery eval demo --lm-eval mmlu,hellaswag --limit 200",
        "accelerate launch --num_processes 4 -m surgery eval ./checkpoint --suite stereoset --data ./data",
    ),
)
def evaluate(
    model: Model,
    delta: Annotated[list[Path] | None, typer.Option("--delta", help="Apply this delta in memory first.")] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help=f"Measure this one too, and the paired differences from it. {MODEL_HELP}"),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            help="A suite; default: those that need no data folder, with --against all.",
        ),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="Prompt set (genbias, race, or a .toml / .json file), or the data folder.")
    ] = "genbias",
    split: Annotated[str, typer.Option("--split", help="profession or pairs.")] = "profession",
    part: Part = "test",
    words_as: Annotated[
        str, typer.Option("--words-as", help="Compared words: tokens (each is one), or continuations (any number).")
    ] = "tokens",
    texts: Annotated[Path | None, typer.Option("--texts", help="Texts for perplexity, .txt or .jsonl.")] = None,
    scorer: Scorer = "bias-bench",
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", help="Tasks of lm-eval (an extra), such as mmlu,hellaswag; then no default."),
    ] = None,
    limit: Rows = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEEDS, help="Draws the rows of --limit.")] = 0,
    json_file: JsonFile = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto, the checkpoint's own.")
    ] = "float32",
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a checkpoint by the chosen suites: every number with its scorer, its data and its interval.

    With --against the same rows are measured on a second one; what got worse stands first, and the intervals of the
    differences are widened so that all of them hold together. Without --suite that is the ledger: every axis in a quick
    form, those whose data is not in --data left out by name.
    """
    from dataclasses import replace

    from surgery.files.atomic import write_json
    from surgery.metrics.metric import differences
    from surgery.progress import Progress
    from surgery.runs.report import leaves

    tasks = tuple(task.strip() for task in (lm_eval or "").split(",") if task.strip())
    progress = Progress(quiet)
    asked: dict[str, Any] = {"split": split, "part": part, "texts": texts, "scorer": scorer, "limit": limit}
    asked |= {"seed": seed, "tasks": tasks, "words_as": words_as}
    judges = _judges(suite or [], data, asked, progress, whole=against is not None)
    judges.check("--data")
    for spec in (model, against):
        if spec is not None:
            check_opening(spec, device)
    _check_files(delta or [])
    import_libraries()
    from surgery.delta import open_delta
    from surgery.metrics.judges import split_seed_of
    from surgery.metrics.suite import plain

    if delta:
        judges = replace(judges, split_seed=split_seed_of(*(open_delta(file).metadata for file in delta)))

    def measured_on(spec: str, deltas: list[Path]) -> dict[str, Any]:
        opened = open_model(spec, quiet, dtype=dtype, device=device, deltas=deltas)
        return judges.judge(*opened, progress=progress)

    reference = measured_on(against, []) if against is not None else None
    measured = measured_on(model, delta or [])
    scores: dict[str, Any] = plain(measured)
    found: dict[str, Any] = {}
    if reference is not None:
        pairs = sum(1 for _ in leaves(differences(reference, measured)))
        found = differences(reference, measured, axes=pairs)
    if reference is None:
        _print_scores(scores)
    else:
        _print_differences(plain(reference), scores, found)
    if json_file:
        about = {"model": model, "dtype": dtype, "deltas": [str(path) for path in delta or []]}
        second = {"against": {"model": against, "scores": plain(reference)}, "differences": found}
        write_json(json_file, scores | about | (second if reference is not None else {}))


def _judges(suites: list[str], data: str, asked: dict[str, Any], progress: Any, *, whole: bool) -> Any:
    """The judges of the named suites; without names the usual ones, or (``whole``) the ledger where its data is."""
    from surgery.catalogue import FOLDER_SUITES, SUITES
    from surgery.metrics.judges import Judges, ledger

    folder = data if Path(data).is_dir() or set(suites) & set(FOLDER_SUITES) else ""
    prompts = "genbias" if folder else data
    if whole and not suites and not asked["tasks"]:
        judges, missing = ledger(folder, prompts=prompts, **asked)
        for name, reason in missing.items():
            progress.say(f"without the judge {name}: {reason}")
        return judges
    names = tuple(dict.fromkeys(suites or ([] if asked["tasks"] else SUITES)))
    return Judges(suites=names, prompts=prompts, folder=folder, **asked)


def _check_files(files: list[Path]) -> None:
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise SurgeryError(f"{missing}: no such file; expected a delta that surgery run, diff or import wrote")


def _print_scores(scores: Mapping[str, Any]) -> None:
    """A line for every number."""
    from surgery.metrics.metric import ideal_of
    from surgery.runs.report import leaves

    for keys, metric in leaves(scores):
        print(
            f"{' '.join(keys).replace('_', ' '):34} {metric['value']:10.4f}  [{metric['low']:.4f}, "
            f"{metric['high']:.4f}]  n {metric['n']}, ideal {ideal_of(metric)}; {metric['scorer']}; {metric['data']}"
        )


def _print_differences(before: Mapping[str, Any], after: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """A line for every number, what got worse first, the most first; those not paired stand last, without a verdict."""
    from surgery.metrics.metric import points
    from surgery.runs.report import leaves

    old, pairs = dict(leaves(before)), dict(leaves(found))
    order = {"worse": 0, "better": 1, "within noise": 2, "not paired": 3}
    rows = [(pairs[keys]["verdict"] if keys in pairs else "not paired", keys, now) for keys, now in leaves(after)]
    far = {keys: abs(points(now, pairs[keys]["value"])) if keys in pairs else 0.0 for _, keys, now in rows}
    print(f"{'':34} {'against':>10} {'this':>10}  difference [95 %, over all {len(pairs)} together]")
    for verdict, keys, now in sorted(rows, key=lambda row: (order[row[0]], -far[row[1]])):
        was = f"{old[keys]['value']:10.4f}" if keys in old else f"{'-':>10}"
        change = "-"
        if keys in pairs:
            one = pairs[keys]
            change = f"{one['value']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]"
        print(
            f"{' '.join(keys).replace('_', ' '):34} {was} {now['value']:10.4f}  {change}  {verdict}; n {now['n']}; "
            f"{now['scorer']}"
        )
