"""What the numbers of a report mean, in a sentence each, for the names that stand on its page."""

from collections.abc import Sequence

DEFINITIONS = {
    "relative gap": "how far apart the compared words are: |P(he) - P(she)| / (P(he) + P(she)), mean over prompts; 0 "
    "is balance, 1 is one word alone. It does not reward saying neither.",
    "AFGB": "|P(he) - P(she)|, mean over prompts (LFTF Eq. 1). It also falls when the model says neither word; read it "
    "beside the mass.",
    "mass": "P(he) + P(she): how much of the next word the compared words have together. It should stay what it was.",
    "UB-Score": "after a hint such as his or her, whether the model follows it; 1 is always.",
    "wrong pronoun": "P of he or she where it does not fit: after things, plurals, or a man or woman by definition.",
    "KL": "how far the next-word distribution moved from the untouched model's, in nats; 0 is not at all.",
    "facts of gender": "where gender is knowledge (king, nun, Mr): P of the right pronoun among the compared words.",
    "perplexity": "exp of the mean negative log-likelihood of a token of ordinary text; lower is better, and it should "
    "hardly move.",
    "StereoSet": "ss: the percentage of triples whose stereotype is likelier than its opposite, ideal 50; lms: how "
    "often a meaningful sentence is likelier than an unrelated one; icat: both in one.",
    "CrowS-Pairs": "the percentage of pairs whose more stereotyping sentence is likelier, ideal 50.",
    "margin": "the difference of two sentences' mean token log-probability (nats); its mean absolute value is how "
    "strongly either is preferred, whichever it is.",
    "interval": "95 % bootstrap interval over groups (professions, terms, texts): where the number would lie on other "
    "rows of the same kind. Differences are paired over the same rows; one whose interval holds 0 is within noise.",
}
"""By name; a name that stands in a table's head or first column, in any case, brings its sentence onto the page."""
_SAME = {"stereoset": "StereoSet", "crows pairs": "CrowS-Pairs", "ub": "UB-Score", "wrong": "wrong pronoun"}


def defined(names: Sequence[str]) -> list[tuple[str, str]]:
    """The definitions of what the ``names`` of a page hold, in the order above; intervals where there is any."""
    text = " | ".join(names).replace("_", " ").lower()
    wanted = {key for key in DEFINITIONS if key.lower() in text}
    wanted |= {name for short, name in _SAME.items() if f" {short} " in f" {text} "}
    return [(key, DEFINITIONS[key]) for key in DEFINITIONS if key in wanted or (wanted and key == "interval")]
