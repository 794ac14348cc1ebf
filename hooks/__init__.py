"""Instruments: observe a live model by TransformerLens site names, and leave it exactly as it was.

Names are loaded on first use (PEP 562), so that `import hooks` is quick and loads no torch. No file of the package has
the name of a function here: Python would put the file in the function's place.
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:
    from hooks import anatomy, plots
    from hooks.ablation import Ablation, mean_ablation
    from hooks.activations import capture, model_inputs, run_base
    from hooks.block_importance import BlockImportance, BmiReducer, Robustness, bmi, robustness
    from hooks.counterfactuals import counterfactual_pairs
    from hooks.engines import record
    from hooks.errors import HookError
    from hooks.gain_rankings import Gain
    from hooks.gradient_influence import (
        Influence,
        Moments,
        Probe,
        TokenInfluence,
        adam_moments,
        combine,
        example_gradients,
        highlighted,
        influence,
        influence_probe,
        influence_windows,
        token_influence,
    )
    from hooks.interventions import edit
    from hooks.logit_lens import Lens, lens
    from hooks.natural_gain import GainConfig, gain
    from hooks.patching import Patching, attribute, attribution_patch, patch
    from hooks.rank_correlation import Comparison, compare, rank_map
    from hooks.ranking import Ranking
    from hooks.reference_attention import CrossWeights, cross_attention, cross_attention_weights
    from hooks.running_means import Sensitivity
    from hooks.sensitivity import attention_to
    from hooks.streaming import Mean, stream, token_batches

_NAMES = {
    "ablation": ("Ablation", "mean_ablation"),
    "activations": ("capture", "model_inputs", "run_base"),
    "block_importance": ("BlockImportance", "BmiReducer", "Robustness", "bmi", "robustness"),
    "counterfactuals": ("counterfactual_pairs",),
    "engines": ("record",),
    "errors": ("HookError",),
    "gain_rankings": ("Gain",),
    "gradient_influence": (
        "Influence",
        "Moments",
        "Probe",
        "TokenInfluence",
        "adam_moments",
        "combine",
        "example_gradients",
        "highlighted",
        "influence",
        "influence_probe",
        "influence_windows",
        "token_influence",
    ),
    "interventions": ("edit",),
    "logit_lens": ("Lens", "lens"),
    "natural_gain": ("GainConfig", "gain"),
    "patching": ("Patching", "attribute", "attribution_patch", "patch"),
    "rank_correlation": ("Comparison", "compare", "rank_map"),
    "ranking": ("Ranking",),
    "reference_attention": ("CrossWeights", "cross_attention", "cross_attention_weights"),
    "running_means": ("Sensitivity",),
    "sensitivity": ("attention_to",),
    "streaming": ("Mean", "stream", "token_batches"),
}
__all__ = [
    "Ablation",
    "BlockImportance",
    "BmiReducer",
    "Comparison",
    "CrossWeights",
    "Gain",
    "GainConfig",
    "HookError",
    "Influence",
    "Lens",
    "Mean",
    "Moments",
    "Patching",
    "Probe",
    "Ranking",
    "Robustness",
    "Sensitivity",
    "TokenInfluence",
    "adam_moments",
    "anatomy",
    "attention_to",
    "attribute",
    "attribution_patch",
    "bmi",
    "capture",
    "combine",
    "compare",
    "counterfactual_pairs",
    "cross_attention",
    "cross_attention_weights",
    "edit",
    "example_gradients",
    "gain",
    "highlighted",
    "influence",
    "influence_probe",
    "influence_windows",
    "lens",
    "mean_ablation",
    "model_inputs",
    "patch",
    "plots",
    "rank_map",
    "record",
    "robustness",
    "run_base",
    "stream",
    "token_batches",
    "token_influence",
]

__getattr__, __dir__ = lazily(__name__, _NAMES, ["anatomy", "plots"])
