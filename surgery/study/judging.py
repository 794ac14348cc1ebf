"""One list of judges for every cell of a study, on the same rows, kept on disk with the draws that pair them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.data.prompts import load_prompt_set
from surgery.errors import SurgeryError
from surgery.files.atomic import write_json
from surgery.metrics.metric import Metric, from_dict
from surgery.metrics.sentences import check_scorer
from surgery.metrics.suite import SUITES, check_suites, evaluate_suites, material, measure, plain
from surgery.progress import Progress
from surgery.study.cells import Flat
from surgery.study.settings import PROMPT_SUITES, Study


def check(study: Study) -> None:
    """Name at the start what would be missing after an hour. Raises ``SurgeryError``."""
    names = _suites(study)
    others = [name for name in names if name not in SUITES]
    check_suites(others)
    check_scorer(study.scorer)
    load_prompt_set(study.data)
    if others and not (study.folder and Path(study.folder).is_dir()):
        raise SurgeryError(f"suite {others[0]}: folder = {study.folder!r} is no folder; give the one with its files")


def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, study: Study, *, preamble: str, progress: Progress
) -> Flat:
    """Every number of the study's suites for ``model`` as it is now; a ``preamble`` stands before prompts only."""
    names = [name for name in _suites(study) if not preamble or name in PROMPT_SUITES]
    shipped = [name for name in names if name in SUITES]
    scores: dict[str, Any] = {}
    if shipped:
        prompts = load_prompt_set(study.data)
        given = material(model, tokenizer, prompts, suites=shipped, preamble=preamble)
        scores |= measure(model, given, progress=progress).scores
    scores |= evaluate_suites(
        model,
        tokenizer,
        [name for name in names if name not in SUITES],
        study.folder,
        limit=study.limit,
        progress=progress,
        options={name: {"scorer": study.scorer} for name in ("stereoset", "crows_pairs")},
    )
    return dict(_flat(scores))


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


def _flat(scores: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Metric]]:
    for key, value in scores.items():
        if isinstance(value, Metric):
            yield ".".join((*path, key)), value
        elif isinstance(value, Mapping):
            yield from _flat(value, (*path, key))
