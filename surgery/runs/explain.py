"""The settings of a recipe as a person reads them, for its help."""

import json

from pydantic import BaseModel


def explain(kind: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """(key, type, default, what it is) of every setting, as a person reads them."""
    found = []
    for key, field in kind.model_fields.items():
        annotation = field.annotation
        words = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        words = words.removeprefix("typing.").replace("Literal[", "one of [")
        default = "needed" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
        # A recipe that changes a shared key's default alone leaves its description to the shared class.
        kinds = [base for base in kind.__mro__ if issubclass(base, BaseModel) and key in base.model_fields]
        told = next((text for base in kinds if (text := base.model_fields[key].description)), "")
        found.append((key, words, default, " ".join(told.split())))
    return found
