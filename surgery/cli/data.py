"""Commands on data: ``mix`` draws a labelled mixture from any files, ``check`` looks at a prompt set."""

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.app import MODEL_HELP, Debug, Quiet, command, examples, group
from surgery.cli.models import check_opening, import_libraries
from surgery.errors import SurgeryError
from surgery.seeds import SEEDS

data = group("data", "Make data sets and look at them: mix, check.")


@command(
    data,
    epilog=examples(
        "surgery data mix crows_agnews --data DIR --out mixture --seed 1",
        "surgery data mix crows.csv,column=sent_more,share=3,biased=true,group=bias_type "
        "news.csv,column=2+3,header=false,share=7 --rows 1000 --seed 1 --out mixture.jsonl",
        "surgery data mix hate.txt,count=300,biased=true facts.jsonl,count=700 --out mixture.jsonl",
    ),
)
def mix(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC...",
            help="Files, each as PATH[,key=value]... with the keys column (several: a+b), name, share or count, biased "
            "(true or false), group (a column), header. Or one mixture of the paper: crows_agnews, rtp_agnews, "
            "crows_trex.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="The .jsonl file; for a mixture of the paper, a folder. Must not exist.")
    ],
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEEDS, help="Draws, deals and shuffles the rows.")] = 0,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Size of a mixture of shares; 0: the largest.")] = 0,
    folder: Annotated[
        Path | None, typer.Option("--data", help="Where the files of a mixture of the paper stand.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw a shuffled, labelled mixture from files, or build one of the paper with its probe and test pairs."""
    from surgery.data import mix as mixing
    from surgery.data import mixtures
    from surgery.progress import Progress

    preset = next((name for name in sources if name in mixtures.PRESETS), None)
    if preset is not None:
        if len(sources) > 1:
            raise SurgeryError(f"{preset} is a whole mixture; expected it alone, got {len(sources)} sources")
        if folder is None:
            raise SurgeryError(f"{preset}: needs the folder with its files; give --data DIR")
        made = mixtures.build(preset, folder, out, seed=seed, rows=rows)
        counts = made["rows"]
        Progress(quiet).say("pairs: " + ", ".join(f"{part} {count:,}" for part, count in made["pairs"].items()))
    else:
        counts = mixing.mix([mixing.parse(spec) for spec in sources], out, seed=seed, rows=rows)
    print(f"{out}: {sum(counts.values()):,} rows ({', '.join(f'{name} {n:,}' for name, n in counts.items())})")


@command(data, epilog=examples("surgery data check age.toml", "surgery data check race --model ./checkpoint"))
def check(
    prompts: Annotated[str, typer.Argument(help="Prompt set: a shipped one, or a .toml / .json file.")],
    model: Annotated[str, typer.Option("--model", help=f"Whose tokenizer reads it. {MODEL_HELP}")] = "demo",
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=SEEDS, help="Of the split, as in a recipe's split_seed.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Show what a prompt set gives: tokens of its words, sizes of its parts, leaks between them, examples."""
    from surgery.data.checking import report
    from surgery.data.prompts import load_prompt_set

    chosen = load_prompt_set(prompts)
    check_opening(model, None)
    import_libraries()
    from transformers import AutoTokenizer

    from surgery.checkpoints import checkpoint_dir

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir(model))

    def tokens(text: str) -> list[str]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [str(tokenizer.decode([one])) for one in ids]

    for line in report(chosen, tokens, seed=seed):
        print(line)
