"""One list of judges for every cell of a study, on the same rows, kept on disk with the draws that pair them."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.data.prompts import load_prompt_set
from surgery.files.atomic import write_json
from surgery.metrics.judges import Judges
from surgery.metrics.metric import flat, from_dict
from surgery.metrics.suite import SUITES, plain
from surgery.progress import Progress
from surgery.study.cells import Flat
from surgery.study.settings import PROMPT_SUITES, Study


def check(study: Study) -> None:
    """Name at the start what would be missing after an hour. Raises ``SurgeryError``."""
    _asked(study, _suites(study)).check("folder =")


def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, study: Study, *, preamble: str, progress: Progress
) -> Flat:
    """Every number of the study's suites for ``model`` as it is now; a ``preamble`` stands before prompts only."""
    names = [name for name in _suites(study) if not preamble or name in PROMPT_SUITES]
    return flat(_asked(study, names).judge(model, tokenizer, preamble=preamble, progress=progress))


def kept(folder: Path, study: Study) -> Flat | None:
    """What ``keep`` wrote for the same judges, or None."""
    try:
        known = json.loads((folder / "judged.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    if known["judges"] != json.loads(json.dumps(_judges(study))):
        return None
    with np.load(folder / "judged.npz") as draws:
        return {
            place: replace(from_dict(fields), samples=draws.get(place)) for place, fields in known["scores"].items()
        }


def keep(folder: Path, study: Study, scores: Flat) -> None:
    """Write the numbers, and beside them the bootstrap's draws, by which two cells are paired."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = {place: metric.samples for place, metric in scores.items() if metric.samples is not None}
    part = folder / "judged.npz.part"
    with part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **draws)
    part.rename(folder / "judged.npz")
    write_json(folder / "judged.json", {"judges": _judges(study), "scores": plain(scores)})


def _suites(study: Study) -> list[str]:
    return list(dict.fromkeys(study.suites or SUITES))


def _asked(study: Study, names: list[str]) -> Judges:
    return Judges(suites=tuple(names), prompts=study.data, folder=study.folder, scorer=study.scorer, limit=study.limit)


def _judges(study: Study) -> dict[str, Any]:
    """All that a number depends on beside the weights."""
    return {
        "suites": _suites(study),
        "data": asdict(load_prompt_set(study.data)) | {"name": study.data},
        "folder": study.folder,
        "scorer": study.scorer,
        "limit": study.limit,
        "dtype": study.dtype,
    }
