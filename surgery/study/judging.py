"""One list of judges for every cell of a study, on the same rows, kept on disk with the draws that pair them."""

import difflib
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.data.prompts import load_prompt_set
from surgery.errors import SurgeryError
from surgery.files.atomic import write_json
from surgery.metrics.judges import Judges, ledger
from surgery.metrics.metric import Difference, flat, from_dict
from surgery.metrics.suite import plain
from surgery.progress import Progress
from surgery.study.cells import Cell, Flat, Judged
from surgery.study.settings import PROMPT_SUITES, WRITING_SUITES, Method, Study, settings_for
from surgery.study.streams import Streams, blocks_to_keep


def check(study: Study) -> tuple[Judges, dict[str, str]]:
    """The study's judges, and those of the ledger that are left out with the reason, where the study names none.

    Raises ``SurgeryError`` for named judges whose data is not there, which would be missing after an hour.
    """
    asked: dict[str, Any] = {"prompts": study.data, "scorer": study.scorer, "limit": study.limit}
    if not study.suites:
        return ledger(study.folder, rows=study.rows, **asked)
    judges = Judges(suites=tuple(dict.fromkeys(study.suites)), folder=study.folder, rows=study.rows, **asked)
    judges.check("folder =")
    return judges, {}


def check_axes(study: Study, found: Collection[str]) -> None:
    """Raises ``SurgeryError`` for a number that is to decide and is not among the ``found`` of the untouched model."""
    for key, places in (("bias", study.bias), ("cost", study.cost)):
        for place in (one for one in places if one not in found):
            near = difflib.get_close_matches(place, found, 3, 0.3) or list(found)[:3]
            raise SurgeryError(
                f"{key}: got {place!r}, expected some of the {len(found)} numbers that the study measures, such as "
                f"{', '.join(near)}"
            )


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judges: Judges,
    method: Method | None,
    *,
    details: dict[str, Any],
    streams: Streams,
    first: int = 0,
    progress: Progress,
) -> Flat:
    """Every number of the judges for ``model`` as it is now, of those that fit the method.

    A preamble stands before prompts only; another way to decode changes no text that is written. ``details`` is filled
    with what the page shows of it (``Judges.judge``). The streams of the untouched model are kept, and an edit whose
    first block is ``first`` is judged from there.
    """
    preamble = method.preamble if method else ""
    suites = [name for name in judges.suites if not preamble or name in PROMPT_SUITES]
    if method and method.decoding:
        suites = [name for name in suites if name not in WRITING_SUITES]
    asked = replace(judges, suites=tuple(suites))
    keep = blocks_to_keep(model) if method is None and asked.shipped else ()
    given: Any = {"details": details, "keep": keep, "prefixes": streams.until(model, first), "progress": progress}
    found = flat(asked.judge(model, tokenizer, preamble=preamble, **given))
    streams.kept |= details.pop("streams", {})
    return found


def kept(cell: Cell, study: Study, judges: Judges) -> Judged | None:
    """What ``keep`` wrote for the same judges, model and method, or None."""
    known = written(cell.folder)
    return None if known is None or known["judges"] != identity(cell, study, judges) else _read(cell, known)


def judged_in(cell: Cell) -> Judged:
    """What ``keep`` wrote into the cell's folder, by whatever judges. Raises ``SurgeryError`` where nothing is."""
    known = written(cell.folder)
    if known is None:
        raise SurgeryError(f"{cell.folder}: is not judged; was it removed meanwhile? run the command again")
    return _read(cell, known)


def written(folder: Path) -> dict[str, Any] | None:
    """What ``keep`` wrote into ``folder`` as plain JSON, or None. Raises ``SurgeryError`` where it is damaged."""
    return _json(folder / "judged.json", ("judges", "scores"))


def _read(cell: Cell, known: Mapping[str, Any]) -> Judged:
    pairs, file = known.get("differences"), cell.folder / "judged.npz"
    try:
        with np.load(file) as draws:
            scores = {
                place: replace(from_dict(one), samples=draws.get(place)) for place, one in known["scores"].items()
            }
        differences = None if pairs is None else {place: Difference(**one) for place, one in pairs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile, EOFError) as error:
        raise _damaged(file, error) from None
    return Judged(cell, scores, differences=differences)


def _json(file: Path, keys: Sequence[str] = ()) -> dict[str, Any] | None:
    """The table in ``file``, or None where there is no such file."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # no JSON, no UTF-8
        raise _damaged(file, error) from None
    if not isinstance(found, dict) or any(key not in found for key in keys):
        raise _damaged(file, f"expected a table with {', '.join(keys) or 'names'}")
    return found


def _damaged(file: Path, why: object) -> SurgeryError:
    return SurgeryError(
        f"{file}: is damaged ({why}); copy the folder anew, or remove {file.parent} to measure it again"
    )


def keep(one: Judged, study: Study, judges: Judges, details: Mapping[str, Any]) -> None:
    """Write the numbers, beside them the bootstrap's draws, by which two cells are paired, and what the page shows."""
    folder = one.cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    draws = {place: metric.samples for place, metric in one.scores.items() if metric.samples is not None}
    part = folder / "judged.npz.part"
    with part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **draws)
    part.rename(folder / "judged.npz")
    write_json(folder / "details.json", dict(details))
    pairs = None if one.differences is None else {place: asdict(pair) for place, pair in one.differences.items()}
    found = {"judges": identity(one.cell, study, judges), "scores": plain(one.scores)}
    write_json(folder / "judged.json", found if pairs is None else found | {"differences": pairs})


def details_of(folder: Path) -> dict[str, Any]:
    """What ``keep`` wrote for the page; nothing where the cell was not judged."""
    return _json(folder / "details.json") or {}


def identity(cell: Cell, study: Study, judges: Judges) -> dict[str, Any]:
    """All that a number depends on, as plain JSON values: the judges, the model, and how it was edited."""
    method = cell.method
    edit: dict[str, Any] = (
        method.model_dump(exclude={"name", "about", "seeds", "deterministic", "by_model"}) if method else {}
    )
    if method and method.recipe:
        edit["settings"] = settings_for(method, cell.model)
    if method and method.delta:
        edit["sha256"] = hashlib.sha256(Path(method.delta).read_bytes()).hexdigest()
    found = {
        "model": cell.model,
        "edit": edit,
        "suites": list(judges.suites),
        "data": asdict(load_prompt_set(study.data)) | {"name": study.data},
        "folder": study.folder,
        "scorer": study.scorer,
        "limit": study.limit,
        "rows": dict(judges.rows),
        "dtype": study.dtype,
    }
    plainly: dict[str, Any] = json.loads(json.dumps(found))
    return plainly
