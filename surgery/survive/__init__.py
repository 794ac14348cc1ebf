"""What is left of an edit after what happens to checkpoints: other number formats, more training, merging, prompts."""

from surgery.survive.carry_out import Survival, check_kind, survive
from surgery.survive.question import Question, kind_of, pairs_question, prompts_of, question_of, words_question
from surgery.survive.share import Share, share

__all__ = [
    "Question",
    "Share",
    "Survival",
    "check_kind",
    "kind_of",
    "pairs_question",
    "prompts_of",
    "question_of",
    "share",
    "survive",
    "words_question",
]
