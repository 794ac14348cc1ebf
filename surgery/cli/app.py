"""What the commands share: the application, the options, and one clear line for every failure."""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery import processes
from surgery.errors import SurgeryError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find where a language model holds a bias, cut there and nowhere else, prove what changed, carry it over.",
)


def _version(asked: bool) -> None:
    """Print what a report of a fault should name, and end."""
    if asked:
        from importlib.metadata import version
        from platform import python_version

        from surgery import __version__

        with_these = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
        print(f"model-surgery {__version__} (Python {python_version()}, {with_these})")
        raise typer.Exit


@app.callback()
def _every(
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions and end.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Of the command line as a whole."""


MODEL_HELP = "A checkpoint directory, a hub name, a .gguf file, or demo."
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, ...; default: the accelerator if there is one; all: several."),
]
SILENT = {"quiet": True, "json_file": None, "plot": None}  # options of the processes beside the first


def _file(path: Path | None) -> Path | None:
    """What no file can be written to is wrong usage, which is said before the work and not behind it."""
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise typer.BadParameter(f"got {path}, but {path.parent} is no folder that takes files; create it first")
    if path is not None and path.exists() and not path.is_file():
        raise typer.BadParameter(f"got {path}, which is no plain file; give a name that is free, or a file's")
    return path


def _picture(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"got {path}, expected a name that ends in .png (or .svg, .pdf)")
    return _file(path)


def to_write(name: str, text: str, callback: Callable[[Path | None], Path | None] = _file) -> Any:
    """An option ``name`` for a file that the command writes at its end."""
    return typer.Option(name, help=text, dir_okay=False, writable=True, callback=callback)


JsonFile = Annotated[Path | None, to_write("--json", "Write the numbers to this JSON file.")]
Plot = Annotated[Path | None, to_write("--plot", "Write a picture to this PNG file.", _picture)]
PromptSet = Annotated[str, typer.Option("--data", help="Prompt set: genbias, race, or a .toml / .json file.")]
Part = Annotated[str, typer.Option("--part", help="test, dev, train or all.")]
Scorer = Annotated[
    str, typer.Option("--scorer", help="Of stereoset and crows_pairs: bias-bench, bos, sum or legacy-biasedit.")
]
Rows = Annotated[int, typer.Option("--limit", min=0, help="So many rows of each suite's prompts or files; 0 for all.")]


def group(name: str, text: str) -> typer.Typer:
    """A word that commands stand under, such as ``data`` in ``surgery data mix``; hand it to ``command``."""
    found = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=text)
    app.add_typer(found, name=name)
    return found


def command(
    under: typer.Typer = app, *, shared: bool = False, **kwargs: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose failures are one line on standard error and exit code 1, and whose notes are a line each.

    ``under``: a ``group``; without one the command stands on its own. ``shared``: processes that ``accelerate launch``
    started share its work, and the first one prints and writes; any other command refuses to run several times at once.
    """

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def guarded(*args: Any, **options: Any) -> None:
            from hooks.errors import HookError, Note

            def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
                if not issubclass(category, Note):
                    plain(message, category, *rest, **more)
                elif not options.get("quiet"):
                    print(f"note: {' '.join(str(message).split())}", file=sys.stderr)

            plain, warnings.showwarning = warnings.showwarning, show
            try:
                if not shared:
                    _refuse_several(function.__name__)
                with processes.started(options.get("device")):
                    _by_the_first(function)(*args, **options)
            except (SurgeryError, HookError) as error:
                if options.get("debug"):
                    raise
                if processes.says():
                    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                raise typer.Exit(1) from None
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                raise typer.Exit(1) from None
            except OSError as error:  # of a path that was given: too long, not to be looked into, on a disk that fails
                if options.get("debug") or error.errno is None:
                    raise
                said = f"{error.filename}: {error.strerror}; check the path and its permissions, or see --debug"
                if error.filename is None:
                    said = f"{error.strerror} while something was written; make room on the disk, or see --debug"
                print(f"error: {' '.join([said, *getattr(error, '__notes__', ())])}", file=sys.stderr)
                raise typer.Exit(1) from None
            except Exception as error:
                if options.get("debug") or type(error).__name__ != "OutOfMemoryError":  # torch's, not imported here
                    raise
                kept = "; ".join(["", *getattr(error, "__notes__", ())])
                said = ". ".join(str(error).split(". ")[:2])  # what was asked for; behind it the whole of the card
                print(f"error: {said}; free memory on the accelerator, or take --device cpu{kept}", file=sys.stderr)
                raise typer.Exit(1) from None
            finally:
                warnings.showwarning = plain

        return under.command(**kwargs)(guarded)

    return wrap


def _refuse_several(name: str) -> None:
    if processes.wanted() > 1:
        raise SurgeryError(
            f"{name}: got {processes.wanted()} processes, which would all do the same; expected one: start it without "
            "accelerate launch (run, eval and attribute build share their work)"
        )


def _by_the_first(function: Callable[..., None]) -> Callable[..., None]:
    """The command as this process carries it out: only the first says anything and writes the user's files."""
    if processes.first():
        return function

    def silent(*args: Any, **options: Any) -> None:
        silenced = {key: value for key, value in SILENT.items() if key in options}
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            function(*args, **(options | silenced))

    return silent


def examples(*lines: str) -> str:
    """The end of a help text."""
    return "Examples:\n\n" + "\n\n".join(f"  {line}" for line in lines)


def local(spec: str) -> Path:
    """The checkpoint directory of ``spec``; torch is needed only when it has to be fetched or converted first."""
    from surgery.files.converted import check_model, ready

    check_model(spec)
    if (found := ready(spec)) is not None:
        return found
    from surgery.checkpoints import checkpoint_dir

    return checkpoint_dir(spec)
