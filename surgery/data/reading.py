"""A user's file as text and as JSON: what cannot be read is refused by the file and line that it stands in."""

import json
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError


def read_text(path: Path) -> str:
    """The UTF-8 text of a user's file, or a SurgeryError that says why it cannot be read."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise SurgeryError(
            f"cannot read {path}: got {type(err).__name__} ({err}), expected a UTF-8 text file; "
            f"check the file, its permissions and its encoding"
        ) from err


def json_value(text: str) -> Any:
    """The value of a JSON text. Raises ``ValueError`` where it is none, or holds a string that no file can hold.

    Half of a surrogate pair ("\\ud83d" alone, of an emoji that was cut) is legal in JSON, and no character: neither a
    tokenizer nor a file takes it.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()  # a UnicodeEncodeError is a ValueError
    return value


def json_object(line: str, at: str) -> dict[str, Any]:
    """The object on a line of a JSON-lines file; raises ``SurgeryError`` naming ``at``, where it stands."""
    try:
        value = json_value(line)
    except UnicodeEncodeError as error:
        raise SurgeryError(f"{at}: holds {error.object[error.start]!r}, half of a character; mend that line") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise SurgeryError(f"{at}: got {line[:60]!r}, expected a JSON object on one line; mend that line")
    return value
