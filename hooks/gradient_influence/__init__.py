"""How far each training text's gradient points along a bias: influence by module hooks, streamed (BIAS DIFF Eq. 5).

probe = hooks.influence_probe(model, tokenizer, biased_sentences)
result = hooks.influence(model, tokenizer, training_texts, probe)
result.top(10)  # [(place in the data, score), ...]
"""

from hooks.gradient_influence.content import Masked, content_tokens
from hooks.gradient_influence.examples import Text, WithMask, WithTargets
from hooks.gradient_influence.gradients import Gradient
from hooks.gradient_influence.jobs import Job, job
from hooks.gradient_influence.layers import Layer, Moments, adam_moments, find_layers, left_out
from hooks.gradient_influence.projections import Projected, example_gradients
from hooks.gradient_influence.query import Probe, influence_probe
from hooks.gradient_influence.scores import (
    Influence,
    check_texts,
    combine,
    influence,
    influence_windows,
)
from hooks.gradient_influence.tokens import TokenInfluence, highlighted, token_influence

__all__ = [
    "Gradient",
    "Influence",
    "Job",
    "Layer",
    "Masked",
    "Moments",
    "Probe",
    "Projected",
    "Text",
    "TokenInfluence",
    "WithMask",
    "WithTargets",
    "adam_moments",
    "check_texts",
    "combine",
    "content_tokens",
    "example_gradients",
    "find_layers",
    "highlighted",
    "influence",
    "influence_probe",
    "influence_windows",
    "job",
    "left_out",
    "token_influence",
]
