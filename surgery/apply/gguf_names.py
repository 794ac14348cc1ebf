"""What the tensors of a delta are called in a GGUF file, by the gguf library's tables, and whether the file fits it."""

import re

from surgery.apply.targets import Tied
from surgery.delta.differences import Differences
from surgery.errors import SurgeryError
from surgery.files.architecture import differences, is_embedding, is_head
from surgery.files.gguf import GgufFile
from surgery.files.tensor_names import is_vocabulary

# model_type of a config.json where the GGUF architecture is not the same word without _ and -
_ARCHITECTURES = {
    "mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "phi": "phi2", "gpt_bigcode": "starcoder",
    "gemma3n_text": "gemma3n", "qwen3_5_text": "qwen35", "llama4_text": "llama4", "cohere": "commandr",
}  # fmt: skip
EXPERT = re.compile(r"\.experts\.(\d+)\.")  # in a delta's name, which expert
_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", "model."))


def check_architecture(delta: Differences, file: GgufFile) -> None:
    """Raises ``SurgeryError`` where the file says that it holds another model than the delta's base."""
    base = delta.metadata["architecture"]
    model = str(base.get("model_type", ""))
    wanted = _ARCHITECTURES.get(model, model.replace("_", "").replace("-", ""))
    if wanted != file.architecture.replace("_", "").replace("-", ""):
        raise SurgeryError(
            f"{file.path}: holds a {file.architecture!r} model, the delta's base is {model!r}; it cannot fit"
        )
    odd = differences(base, file.facts)
    theta, rope = file.keys.get(f"{file.architecture}.rope.freq_base"), base.get("rope") or {}
    stated = rope.get("rope_theta") if isinstance(rope, dict) else None
    if isinstance(theta, int | float) and isinstance(stated, int | float) and abs(theta - stated) > 1e-5 * abs(stated):
        odd.append(f"rope theta: the delta's base has {stated}, the target {theta}")
    if odd:
        raise SurgeryError(f"{file.path}: another architecture than the delta's base ({'; '.join(odd)}); it cannot fit")


def names_in_file(delta: Differences, file: GgufFile, tied: Tied | None) -> dict[str, tuple[str, ...]]:
    """{tensor of the file: the delta's tensors to add}, by the gguf library's tables.

    Raises ``SurgeryError`` for an architecture that the library does not know, and a tensor that the file lacks.
    """
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture), None)
    if arch is None:
        raise SurgeryError(f"{file.path}: architecture {file.architecture!r} is unknown to the gguf library; update it")
    table = get_tensor_name_map(arch, int(file.facts.get("layers", 0)))
    base_tied, here_tied = bool(delta.metadata["architecture"].get("tied")), bool(file.facts["tied"])
    found: dict[str, tuple[str, ...]] = {}
    for name in delta.shapes:
        if is_vocabulary(name) and base_tied != here_tied:
            for target in _untied(file, name, base_tied, tied):
                found[target] = (*found.get(target, ()), name)
            continue
        name_of_all = EXPERT.sub(".experts.", name)  # one tensor holds the experts of a layer there
        spelled = [name, name_of_all] + [new + name.removeprefix(old) for old, new in _PREFIXES if name.startswith(old)]
        mapped = filter(None, (table.get_name(text, (".weight", ".bias")) for text in spelled))
        wanted = "token_embd.weight" if is_vocabulary(name) and here_tied else next(mapped, "")
        if wanted not in file.tensors:
            what = f"{wanted!r}, which {name!r} is there" if wanted else f"a place for {name!r} in the library's table"
            experts = " (experts lie in one tensor there)" if ".experts." in name else ""
            raise SurgeryError(f"{file.path}: holds no {what}{experts}; apply the delta before converting to GGUF")
        found[wanted] = (*found.get(wanted, ()), name)
    return found


def _untied(file: GgufFile, name: str, base_tied: bool, tied: Tied | None) -> list[str]:
    if tied is None:
        one, two = ("the delta's base", "the file") if base_tied else ("the file", "the delta's base")
        raise SurgeryError(
            f"{file.path}: embedding and head are one tensor in {one} and two in {two} ({name}); say which with --tied "
            "embed, head or both"
        )
    if base_tied:
        wanted = {"embed": ["token_embd.weight"], "head": ["output.weight"]}
        return wanted.get(tied, ["token_embd.weight", "output.weight"])
    test = {"embed": is_embedding, "head": is_head}.get(tied, is_vocabulary)
    return ["token_embd.weight"] if test(name) else []
