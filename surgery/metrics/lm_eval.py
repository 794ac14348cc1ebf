"""Whole benchmarks through lm-eval (an extra: ``pip install model-surgery[lm-eval]``), as this package's numbers."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.catalogue import check_lm_eval
from surgery.errors import SurgeryError
from surgery.forward.evaluation import evaluating
from surgery.forward.generation import plain_generation
from surgery.metrics.metric import Metric


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | dict[str, Any]],
    *,
    limit: int = 0,
    seed: int = 0,
    shots: int | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """``{task: {metric: Metric}}`` of lm-eval's ``tasks`` (names or its task dictionaries) on the opened model.

    ``limit`` takes the first so many rows of each task, as lm-eval does; ``shots`` overrides a task's number of
    examples. An interval is the value plus or minus 1.96 of lm-eval's standard errors; where it gives none, it has no
    width and the scorer says so. What a task generates follows the task's settings, not the checkpoint's. Task files
    and data come from where lm-eval gets them (mostly the hub).

    Raises ``SurgeryError`` where lm-eval is not installed, knows no such task, or fails.
    """
    check_lm_eval()
    lm_eval, wrapper = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    with evaluating(model), plain_generation(model):
        try:
            held = wrapper.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = lm_eval.simple_evaluate(
                model=held,
                tasks=list(tasks),
                num_fewshot=shots,
                limit=limit or None,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except Exception as error:  # lm-eval raises whatever its tasks, the hub or the data loader raise
            names = ", ".join(str(task) if isinstance(task, str) else str(task.get("task")) for task in tasks)
            raise SurgeryError(
                f"lm-eval {names}: {type(error).__name__}: {error}; expected tasks that lm-eval lists (lm-eval ls "
                "tasks) and data that it can load"
            ) from error
    return metrics_of(found, getattr(lm_eval, "__version__", "unknown version"))


def metrics_of(results: dict[str, Any], version: str) -> dict[str, Any]:
    """The numbers of ``simple_evaluate``'s result, by task (or group of tasks) and lm-eval's own metric name.

    Raises ``SurgeryError`` where there is none.
    """
    tables: dict[str, Any] = {}
    for task, row in (results["results"] | results.get("groups", {})).items():
        counts = results.get("n-samples", {}).get(task) or {}
        shots = results.get("n-shot", {}).get(task)
        about = f"{task}" + (f", {shots}-shot" if shots is not None else "")
        for key, value in row.items():
            metric, comma, chosen_by = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{chosen_by}")
            known = isinstance(error, int | float)
            wide = 1.96 * float(error) if known else 0.0
            higher = results.get("higher_is_better", {}).get(task, {}).get(metric, True)
            name = metric if chosen_by == "none" else f"{metric} {chosen_by}"
            tables.setdefault(task, {})[name] = Metric(
                value=float(value),
                low=float(value) - wide,
                high=float(value) + wide,
                n=int(counts.get("effective", 0)),
                scorer=f"lm-eval {version}, {name}, "
                + ("1.96 standard errors" if known else "no standard error given"),
                data=about,
                ideal=1.0 if higher or metric.endswith("perplexity") else 0.0,
                direction="higher" if higher else "lower",
            )
    if not tables:
        raise SurgeryError("lm-eval gave no number; expected at least one task with a metric")
    return tables
