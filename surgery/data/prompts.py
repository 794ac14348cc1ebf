"""Prompt sets: subjects, templates and the words compared, shipped with the package or a user's own file.

A prompt set is one TOML or JSON file, so that another bias (LFTF A.3: race, religion) is a settings file and
not new code; ``genbias.json`` and ``examples/race.toml`` beside this file show the keys.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from surgery.data.reading import json_value, read_text
from surgery.errors import SurgeryError

SCALES = ("word", "phrase", "sentence")
POSSESSIVES = {"he": "his", "she": "her", "they": "their"}
EXAMPLES = ("race", "religion", "nationality", "age", "he_she_they")
SHIPPED = {"genbias": "genbias.json"} | {name: f"examples/{name}.toml" for name in EXAMPLES}
_PACKAGE = "surgery.data"
_SLOT = re.compile(r"\{(\w+)\}")
_KEYS = ("name", "about", "words", "hints", "subjects", "templates", "hint_templates")


@dataclass(frozen=True)
class WordSet:
    """The words whose next-token probabilities are compared, and the hint that announces each of them.

    Without ``hints`` the possessives of he, she and they are filled in; other words then have no hints.
    Raises SurgeryError for fewer than two words, repeated or blank words, or a wrong number of hints.

    >>> WordSet(("he", "she", "they")).hints
    ('his', 'her', 'their')
    """

    words: tuple[str, ...] = ("he", "she")
    hints: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", _strings(self.words, "words", "the word set", least=2))
        if self.hints is None:
            known = all(word in POSSESSIVES for word in self.words)
            object.__setattr__(self, "hints", tuple(POSSESSIVES[w] for w in self.words) if known else ())
            return
        hints = _strings(self.hints, "hints", "the word set", least=0)
        if hints and len(hints) != len(self.words):
            raise SurgeryError(
                f"wrong number of hints in the word set: got {hints} for the words {self.words}, "
                f"expected one hint per word in the same order; add or remove hints"
            )
        object.__setattr__(self, "hints", hints)


@dataclass(frozen=True)
class Subject:
    """Who a prompt is about; the two scores (-1 she to 1 he, Bolukbasi et al. 2016) are None if unrated."""

    name: str
    definitional_score: float | None = None
    stereotype_score: float | None = None


@dataclass(frozen=True)
class Template:
    """A sentence start with one slot for the subject, such as ``{profession}`` or ``{nationality}``, and its scale.

    A hint template has ``{hint}`` as well.
    """

    name: str
    scale: str
    text: str

    def fill(self, profession: str, hint: str = "") -> str:
        """The prompt text; ``hint`` is ignored where the template has no ``{hint}``."""
        return _SLOT.sub(lambda slot: hint if slot[1] == "hint" else profession, self.text)


@dataclass(frozen=True)
class PromptSet:
    """Everything GenBiasEval and GenHintEval need; ``dataclasses.replace(s, words=...)`` swaps the words."""

    name: str
    words: WordSet
    subjects: tuple[Subject, ...]
    templates: tuple[Template, ...]
    hint_templates: tuple[Template, ...] = ()


@cache
def professions() -> tuple[Subject, ...]:
    """The 262 kept professions with both scores, in the order of the source (alphabetical)."""
    return tuple(Subject(name, float(d), float(s)) for name, d, s in _professions_file()["kept"])


@cache
def dropped_professions() -> dict[str, str]:
    """The 58 professions of the 320 that are left out, each with its reason."""
    return {name: reason for name, _, _, reason in _professions_file()["dropped"]}


def load_prompt_set(spec: str | Path = "genbias") -> PromptSet:
    """Read a shipped prompt set by name (``genbias``, ``race``) or a user's ``.toml`` or ``.json`` file.

    Raises SurgeryError for an unknown name, an unreadable or malformed file, unknown or missing keys,
    a template without its placeholder, repeated names or texts, and empty lists.
    """
    if isinstance(spec, str) and spec in SHIPPED:
        return _shipped(spec)
    path = Path(spec)
    if not path.is_file():
        raise SurgeryError(
            f"no prompt set {str(spec)!r}: got no such file, expected a .toml or .json file or one of "
            f"{', '.join(SHIPPED)}; check the spelling, or start from a copy of examples/race.toml"
        )
    return _prompt_set(read_table(path), str(path))


@cache
def _shipped(name: str) -> PromptSet:
    resource = files(_PACKAGE).joinpath(SHIPPED[name])
    return _prompt_set(_parse(resource.read_text("utf-8"), Path(SHIPPED[name]).suffix, name), name)


@cache
def _professions_file() -> dict[str, Any]:
    return json.loads(files(_PACKAGE).joinpath("professions.json").read_text("utf-8"))


def read_table(path: str | Path) -> dict[str, Any]:
    """The named values of a user's .toml or .json file. Raises ``SurgeryError`` that says why there are none."""
    return _parse(read_text(Path(path)), Path(path).suffix.lower(), str(path))


def _parse(text: str, suffix: str, where: str) -> dict[str, Any]:
    if suffix not in (".toml", ".json"):
        raise SurgeryError(
            f"unknown type of {where}: got {suffix or 'no ending'!r}, expected .toml or .json; convert it"
        )
    try:
        found = tomllib.loads(text) if suffix == ".toml" else json_value(text)
    except ValueError as err:  # both parsers' errors are ValueErrors
        raise SurgeryError(
            f"malformed {where}: got {' '.join(str(err).split())}, expected {suffix[1:].upper()}; mend it"
        ) from err
    if not isinstance(found, dict):
        raise SurgeryError(f"malformed {where}: got a {type(found).__name__}, expected named keys")
    return found


def _prompt_set(raw: Mapping[str, Any], where: str) -> PromptSet:
    _check_keys(raw, _KEYS, ("name", "words", "templates"), where)
    name = _text(raw["name"], "name", where)
    hints = _strings(raw["hints"], "hints", where, least=0) if "hints" in raw else None
    words = WordSet(_strings(raw["words"], "words", where, least=2), hints)
    subjects = raw.get("subjects", "professions")
    if isinstance(subjects, str) and subjects != "professions":
        raise SurgeryError(
            f"unknown subjects in {where}: got {subjects!r}, expected 'professions' or a list of names; "
            f"write subjects = [{subjects!r}, ...] for names of your own"
        )
    people = (
        professions()
        if subjects == "professions"
        else tuple(Subject(s) for s in _strings(subjects, "subjects", where, least=1))
    )
    templates = _templates(raw["templates"], "templates", False, where)
    hint_templates = _templates(raw.get("hint_templates"), "hint_templates", True, where)
    if hint_templates and not words.hints:
        raise SurgeryError(
            f"hint templates without hints in {where}: got words {words.words} and no hints, "
            f"expected one hint per word; add hints = [...] in the order of words"
        )
    return PromptSet(name, words, people, templates, hint_templates)


def _templates(raw: Any, key: str, hinted: bool, where: str) -> tuple[Template, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list) or not raw or not all(isinstance(row, dict) for row in raw):
        raise SurgeryError(f"bad {key} in {where}: got {raw!r}, expected a list of at least one table")
    found = []
    for number, row in enumerate(raw, 1):
        spot = f"{where}, {key}[{number}]"
        _check_keys(row, ("name", "scale", "text"), ("name", "text"), spot)
        text, scale = _text(row["text"], "text", spot), row.get("scale", "sentence")
        if scale not in SCALES:
            raise SurgeryError(f"unknown scale in {spot}: got {scale!r}, expected one of {', '.join(SCALES)}")
        slots = _SLOT.findall(text)
        if slots.count("hint") != hinted or len(slots) != 1 + hinted or set("{}") & set(_SLOT.sub("", text)):
            raise SurgeryError(
                f"missing or unknown placeholder in {spot}: got {', '.join(slots) or 'none'} in {text!r}, expected "
                f"exactly one for the subject, such as {{profession}}{', and one {hint}' if hinted else ''}, "
                "and no other braces; write it where it belongs"
            )
        found.append(Template(_text(row["name"], "name", spot), scale, text))
    _strings([t.name for t in found], f"names of {key}", where, least=1)
    _strings([t.text for t in found], f"texts of {key}", where, least=1)
    return tuple(found)


def _check_keys(raw: Mapping[str, Any], known: Iterable[str], needed: Iterable[str], where: str) -> None:
    known = tuple(known)
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            step = f"did you mean {near[0]!r}?" if near else "remove it"
            raise SurgeryError(f"unknown key in {where}: got {key!r}, expected {', '.join(known)}; {step}")
    for key in needed:
        if key not in raw:
            raise SurgeryError(
                f"missing key in {where}: got {', '.join(raw) or 'nothing'}, expected also {key!r}; add it"
            )


def _text(value: Any, what: str, where: str) -> str:
    """A non-blank string on one line; white space at the end would change the next token."""
    if not isinstance(value, str) or not value or value != " ".join(value.split()):
        raise SurgeryError(
            f"bad {what} in {where}: got {value!r}, expected text that is not blank, "
            f"on one line and with single spaces between words; mend it"
        )
    return value


def _strings(values: Any, what: str, where: str, least: int) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)) or len(values) < least:
        raise SurgeryError(
            f"bad {what} in {where}: got {values!r}, expected a list of at least {least} text(s); add more"
        )
    found = tuple(_text(value, what, where) for value in values)
    twice = next((value for value in found if found.count(value) > 1), None)
    if twice is not None:
        raise SurgeryError(f"repeated {what} in {where}: got {twice!r} twice, expected each once; remove one")
    return found
