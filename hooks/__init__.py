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
    from hooks.conversations import Generated, capture_generation, chat
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
        content_tokens,
        example_gradients,
        highlighted,
        influence,
        influence_probe,
        influence_windows,
        token_influence,
    )
    from hooks.head_ablation import ablate_heads
    from hooks.interventions import edit
    from hooks.logit_lens import Lens, lens
    from hooks.natural_gain import GainConfig, gain
    from hooks.patching import Patching, attribute, attribution_patch, patch
    from hooks.rank_correlation import Comparison, compare, rank_map
    from hooks.ranking import Ranking
    from hooks.reference_attention import CrossWeights, cross_attention, cross_attention_weights
    from hooks.running_means import Sensitivity
    from hooks.sensitivity import attention_to
    from hooks.steering import Steering, steering_vector
    from hooks.streaming import Mean, stream, token_batches
    from hooks.views import attention_view, sae_features

_NAMES = {
    "ablation": ("Ablation", "mean_ablation"),
    "activations": ("capture", "model_inputs", "run_base"),
    "block_importance": ("BlockImportance", "BmiReducer", "Robustness", "bmi", "robustness"),
    "conversations": ("Generated", "capture_generation", "chat"),
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
        "content_tokens",
        "example_gradients",
        "highlighted",
        "influence",
        "influence_probe",
        "influence_windows",
        "token_influence",
    ),
    "head_ablation": ("ablate_heads",),
    "interventions": ("edit",),
    "logit_lens": ("Lens", "lens"),
    "natural_gain": ("GainConfig", "gain"),
    "patching": ("Patching", "attribute", "attribution_patch", "patch"),
    "rank_correlation": ("Comparison", "compare", "rank_map"),
    "ranking": ("Ranking",),
    "reference_attention": ("CrossWeights", "cross_attention", "cross_attention_weights"),
    "running_means": ("Sensitivity",),
    "sensitivity": ("attention_to",),
    "steering": ("Steering", "steering_vector"),
    "streaming": ("Mean", "stream", "token_batches"),
    "views": ("attention_view", "sae_features"),
}
__all__ = [
    "Ablation",
    "BlockImportance",
    "BmiReducer",
    "Comparison",
    "CrossWeights",
    "Gain",
    "GainConfig",
    "Generated",
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
    "Steering",
    "TokenInfluence",
    "ablate_heads",
    "adam_moments",
    "anatomy",
    "attention_to",
    "attention_view",
    "attribute",
    "attribution_patch",
    "bmi",
    "capture",
    "capture_generation",
    "chat",
    "combine",
    "compare",
    "content_tokens",
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
    "sae_features",
    "steering_vector",
    "stream",
    "token_batches",
    "token_influence",
]

__getattr__, __dir__ = lazily(__name__, _NAMES, ["anatomy", "plots"])
