"""Instruments: observe a live model by TransformerLens site names, and leave it exactly as it was."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

# name -> (module, attribute or None for the module itself); imported on first use (PEP 562), so that
# `import hooks` is quick and loads no torch
_EXPORTS = {
    "anatomy": ("hooks.anatomy", None),
    "capture": ("hooks.capture", "capture"),
    "edit": ("hooks.edit", "edit"),
    "run_base": ("hooks.capture", "run_base"),
    "model_inputs": ("hooks.capture", "model_inputs"),
    "record": ("hooks.engines", "record"),
    "bmi": ("hooks.bmi", "bmi"),
    "robustness": ("hooks.bmi", "robustness"),
    "BmiReducer": ("hooks.bmi", "BmiReducer"),
    "BlockImportance": ("hooks.bmi", "BlockImportance"),
    "Robustness": ("hooks.bmi", "Robustness"),
    "stream": ("hooks.stream", "stream"),
    "compare": ("hooks.compare", "compare"),
    "mean_ablation": ("hooks.ablation", "mean_ablation"),
    "token_batches": ("hooks.stream", "token_batches"),
    "Mean": ("hooks.stream", "Mean"),
    "lens": ("hooks.lens", "lens"),
    "Lens": ("hooks.lens", "Lens"),
    "patch": ("hooks.patching", "patch"),
    "attribute": ("hooks.patching", "attribute"),
    "counterfactual_pairs": ("hooks.patching", "counterfactual_pairs"),
    "Patching": ("hooks.patching", "Patching"),
    "attention_to": ("hooks.sensitivity", "attention_to"),
    "cross_attention": ("hooks.cross_attention", "cross_attention"),
    "cross_attention_weights": ("hooks.cross_attention", "cross_attention_weights"),
    "Sensitivity": ("hooks.running_means", "Sensitivity"),
    "influence": ("hooks.influence", "influence"),
    "influence_probe": ("hooks.influence", "influence_probe"),
    "influence_windows": ("hooks.influence", "influence_windows"),
    "token_influence": ("hooks.influence", "token_influence"),
    "example_gradients": ("hooks.influence", "example_gradients"),
    "adam_moments": ("hooks.influence", "adam_moments"),
    "Influence": ("hooks.influence", "Influence"),
    "Probe": ("hooks.influence", "Probe"),
    "Moments": ("hooks.influence", "Moments"),
    "plots": ("hooks.plots", None),
    "Ranking": ("hooks.ranking", "Ranking"),
    "HookError": ("hooks.errors", "HookError"),
}


class _Package(ModuleType):
    """Python binds an imported submodule to its package; `hooks.capture` is to stay the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and _EXPORTS.get(name, (None, None))[1] is not None):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hooks' has no attribute {name!r}; it has {', '.join(sorted(_EXPORTS))}")
    module_name, attribute = _EXPORTS[name]
    module = importlib.import_module(module_name)
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)


sys.modules[__name__].__class__ = _Package
