"""Which tensors of a checkpoint a live model holds under which names, as transformers itself reads and writes them.

transformers renames tensors while it reads (BERT's gamma, GPT-NeoX's embed_out) and joins or splits some (one tensor
for each expert on disk, one for all in memory). Its own table and operations are used here, both ways; they move
numbers about and change none, so that a difference may go through them as well as a weight.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.delta.config import may_tie
from surgery.errors import SurgeryError
from surgery.files.checkpoint_files import CheckpointFiles
from surgery.files.tensor_names import common_prefix, resolve_tied, translate

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Joined:
    """Parameters that are made of several tensors of a checkpoint, or of parts of one.

    held: the parameters. stored: {what transformers calls a tensor between reading and joining: its name on disk}.
    """

    held: tuple[str, ...]
    stored: dict[str, str]
    converter: Any
    model: Any

    def split(self, held: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """{name on disk: its numbers}, from all parameters `held`. Raises: SurgeryError."""
        made = _run(self.converter.reverse_transform(), held, self.model, self.held[0])
        lost = next((key for key in self.stored if key not in made), None)
        if lost is not None:
            raise SurgeryError(
                f"{self.held[0]}: transformers does not write it as {self.stored[lost]!r} again; save the checkpoint "
                "with save_pretrained and start from the copy"
            )
        return {self.stored.get(key, key): tensor for key, tensor in made.items()}

    def join(self, stored: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """{parameter: its numbers}, from all tensors that `split` gives."""
        keys = {name: key for key, name in self.stored.items()}
        return _run(self.converter, {keys.get(name, name): value for name, value in stored.items()}, self.model, "")


def _run(converter: Any, tensors: "Mapping[str, Tensor]", model: Any, what: str) -> "dict[str, Tensor]":
    from transformers.core_model_loading import dot_natural_key

    converter, layer = deepcopy(converter), ""
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = converter.rename_source_key(name)
        if pattern is None:
            raise SurgeryError(f"{what or name}: transformers does not read {name!r} into it; another architecture?")
        layer = layer or target
        converter.add_tensor(target, name, pattern, tensors[name])
    made = converter.convert(layer, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Names:
    """Names on disk against parameters of a model: pairs (on disk, parameter), and what is joined or split.

    prefix: what the model's names have in front of the checkpoint's, where that is all that differs. called: {parameter
    as `joined` names it: as the model does}, where a model of another class than the checkpoint's was asked about.
    """

    plain: tuple[tuple[str, str], ...]
    joined: tuple[Joined, ...] = ()
    prefix: str = ""
    called: Mapping[str, str] = field(default_factory=dict)


def read_as(model: "nn.Module", stored: Iterable[str]) -> Names:
    """The parameters of `model` that tensors with the names `stored` are read into; unknown names are left out."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return Names(())
    table = get_model_conversion_mapping(inner)
    converters = [item for item in table if isinstance(item, WeightConverter)]
    renamings = [item for item in table if isinstance(item, WeightRenaming)]
    patterns = {pattern: item for item in converters for pattern in item.source_patterns}
    known = dict.fromkeys(inner.state_dict(), True)
    plain: list[tuple[str, str]] = []
    groups: dict[str, tuple[Any, dict[str, str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        held, pattern = rename_source_key(name, renamings, converters, inner.base_model_prefix, known)
        if held not in known and name in known:
            held, pattern = rename_source_key(name, [], [], inner.base_model_prefix, known)
        if held not in known:
            continue
        if pattern is None:
            plain.append((name, held))
            continue
        key = rename_source_key(name, renamings, [])[0]
        own = rename_source_key(key, [], converters)[0]  # before the base model's prefix was added or taken away
        if held != own:
            key = held[: -len(own)] + key if held.endswith(own) else key[len(own) - len(held) :]
        groups.setdefault(held, (patterns[pattern], {}))[1][key] = name
    joined = []
    for first, (converter, members) in groups.items():
        targets = converter.target_patterns
        held_names = [first.replace(targets[0], target) for target in targets]
        joined.append(Joined(tuple(name for name in held_names if name in known), members, converter, inner))
    return Names(tuple(plain), tuple(joined))


def place(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], stored: CheckpointFiles) -> Names:
    """Where the checkpoint has the parameters `names` of a live model of it.

    shapes: of those whose shape is known. transformers is asked only where the names are not simply the checkpoint's,
    with or without a prefix.

    Raises:
        SurgeryError: a parameter that no tensor of the checkpoint becomes.
    """
    tied = {name: resolve_tied(name, stored.places, may_tie(stored.config)) for name in names}
    plain = [name for name in names if tied.get(name) is None]
    change = common_prefix(plain, stored.places)
    if change is not None:
        found = {name: tied.get(name) or translate(name, change) for name in names}
        if all(stored.entry(found[name]).shape == shape for name, shape in shapes.items()):
            return Names(tuple((found[name], name) for name in names), (), change[0] if not change[1] else "")
    model = skeleton(stored)
    read = read_as(model, stored.places)
    change = common_prefix(plain, [held for held in model.state_dict()]) or ("", "")
    own = {translate(name, change): name for name in plain}
    chosen = [(name, own[held]) for name, held in read.plain if held in own]
    joined = tuple(item for item in read.joined if any(held in own for held in item.held))
    covered = {held for _, held in chosen} | {own[held] for item in joined for held in item.held if held in own}
    lost = next((name for name in plain if name not in covered), None)
    if lost is not None:
        raise SurgeryError(
            f"{stored.path}: has no tensor {lost!r}, none that transformers reads into it, and no single change of "
            f"prefix explains it; it has, for example, {sorted(stored.places)[0]!r}"
        )
    chosen += [(on_disk, name) for name, on_disk in tied.items() if on_disk is not None]
    return Names(tuple(chosen), joined, change[0] if not change[1] else "", own)


def skeleton(stored: CheckpointFiles) -> Any:
    """The model that the checkpoint's config.json describes, without weights. Raises: SurgeryError."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(stored.path)
        name = (config.architectures or [""])[0]
        known = getattr(transformers, name, None)
        with torch.device("meta"):
            return known(config) if known else transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a config that no class of transformers understands makes it raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SurgeryError(
            f"{stored.path}: names of the model are not those of the checkpoint, and transformers cannot say how they "
            f"belong together ({line}); check config.json"
        ) from error


def held_by(model: "nn.Module", wanted: Collection[str]) -> Names:
    """Where a live model holds the checkpoint tensors `wanted`. Raises: SurgeryError when it does not."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    config = getattr(model, "config", None)
    ties = config is None or may_tie(config.to_dict())
    tied = {name: resolve_tied(name, parameters, ties) for name in wanted}
    plain = [name for name in wanted if tied[name] is None]
    change = common_prefix(plain, parameters)
    if change is not None:
        return Names(tuple((name, tied[name] or translate(name, change)) for name in wanted))
    read = read_as(model, wanted)
    covered = {*(name for name, _ in read.plain), *(name for item in read.joined for name in item.stored.values())}
    lost = next((name for name in plain if name not in covered), None)
    if lost is not None:
        raise SurgeryError(f"the model has no parameter {lost!r}; the delta belongs to another architecture")
    return Names(read.plain + tuple((name, held) for name, held in tied.items() if held is not None), read.joined)
