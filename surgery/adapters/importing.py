"""A PEFT adapter directory as a delta: peft itself reads it, so that the delta is what peft makes of it, or a refusal.

Two ways. An adapter that is a plain sum of products is read onto a model without weights, and its factors are kept.
Everything else (initialisations that move the base, DoRA, IA3, whole modules, ...) is merged by peft into the
checkpoint's weights, and the delta is the difference; the merged model must give the logits of the model that peft
builds from checkpoint and adapter, which is not so where, say, one side of a tied matrix was trained.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.adapters import CONFIG, ROOT, WEIGHTS
from surgery.checkpoints import model_class
from surgery.delta.extract import make
from surgery.delta.format import Delta
from surgery.errors import SurgeryError
from surgery.files.architecture import read_json
from surgery.files.safetensors_io import read_header

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

NAME = "default"  # what peft calls an adapter that is alone
# The fields of a LoraConfig that a plain product may set, because peft reads them with the layers or they say
# nothing about the result; any other that is not at its default goes by the merge.
_PLAIN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout", "init_lora_weights", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # of init_lora_weights: these leave the base as it is
_KINDS = ("auto", "lora", "dense")
TOLERANCE = 1e-4  # of the largest logit: the merged model's against peft's, both fp32


def import_peft(
    adapter: Path | str,
    checkpoint: Path | str,
    *,
    base: str | None = None,
    kind: str = "auto",
    recipe: str = "",
) -> Delta:
    """The delta of a PEFT adapter directory, for the checkpoint it was trained on.

    kind "auto" keeps the factors where the adapter is a plain product (delta kind "lora"; alpha / r is folded into
    lora_B) and is dense else; "lora" refuses what is no plain product; "dense" multiplies the factors out.

    Raises:
        SurgeryError: no adapter, or broken; names or shapes that the checkpoint does not have; what peft cannot
            merge (prompts, parts that look at the input); a merge that is not what peft's own model computes.
    """
    adapter, checkpoint = Path(adapter), Path(checkpoint)
    if kind not in _KINDS:
        raise SurgeryError(f"kind {kind!r}: expected one of {', '.join(_KINDS)}")
    config = _read_config(adapter)
    if config.is_prompt_learning:
        raise SurgeryError(
            f"{adapter / CONFIG}: peft_type {config.peft_type.value} puts vectors before the prompt and changes no "
            "weight; a delta cannot hold it"
        )
    with _one_line(adapter):
        reason, factors = _factors(adapter, config, checkpoint)
        if reason and kind == "lora":
            raise SurgeryError(f"{adapter}: {reason}, which is no plain product of factors; repeat with kind 'dense'")
        differences = factors if not reason else _merged(adapter, config, checkpoint, reason)
    if not reason and kind == "dense":
        stems = [name.removesuffix(".lora_B") for name in factors if name.endswith(".lora_B")]
        differences = {stem: factors[stem + ".lora_B"] @ factors[stem + ".lora_A"] for stem in stems}
    name = base or str(config.base_model_name_or_path or checkpoint.name)
    how = "dense" if reason or kind == "dense" else "lora"
    return make(differences, checkpoint, base=name, recipe=recipe, seed=0, kind=how)


def _read_config(adapter: Path) -> Any:
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if not (adapter / CONFIG).is_file():
        raise SurgeryError(f"{adapter}: holds no {CONFIG}; give the folder of a PEFT adapter")
    content = read_json(adapter / CONFIG)
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind not in {str(known.value) for known in PEFT_TYPE_TO_TUNER_MAPPING}:
        raise SurgeryError(f"{adapter / CONFIG}: peft_type {str(kind)[:40]!r}; expected a type of peft's, such as LORA")
    if not (adapter / "adapter_model.bin").is_file() and not read_header(adapter / WEIGHTS).tensors:
        raise SurgeryError(f"{adapter / WEIGHTS}: holds no tensors; save the adapter again")
    with _one_line(adapter):
        return PeftConfig.from_pretrained(str(adapter))


@contextmanager
def _one_line(adapter: Path) -> Iterator[None]:
    """Whatever peft, transformers or torch raise about a stranger's adapter, as one line; their warnings unprinted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except SurgeryError:
        raise
    except Exception as error:  # three libraries raise all kinds of errors about a stranger's files
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise SurgeryError(
            f"{adapter}: peft cannot read it onto this checkpoint ({text}); name its own base"
        ) from error


def _unplain(config: Any) -> str | None:
    """The first setting by which the adapter is no plain sum of products, as `name value`."""
    from peft import LoraConfig

    if type(config) is not LoraConfig:
        return f"peft_type {config.peft_type.value}"
    start = config.init_lora_weights
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_STARTS):
        return f"init_lora_weights {start!r}"
    default = LoraConfig()
    for field, value in sorted(vars(config).items()):
        plain = field in _PLAIN or field.startswith("_") or value == getattr(default, field, None)
        if not plain and value not in (None, False, [], {}, ()):
            return f"{field} {str(value)[:60]}"
    return None


def _factors(adapter: Path, config: Any, checkpoint: Path) -> tuple[str | None, "dict[str, np.ndarray | torch.Tensor]"]:
    """(None, factors of each tensor NAME as NAME.lora_B and NAME.lora_A, scaled), or the reason why there are none."""
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear
    from peft.utils import load_peft_weights, set_peft_model_state_dict
    from transformers import AutoConfig

    reason = _unplain(config)
    if reason:
        return reason, {}
    own = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = model_class(own)._from_config(own)
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    peft = PeftModel(model, config, NAME, low_cpu_mem_usage=True)
    inner: Any = peft.base_model.model
    layers: dict[str, Any] = {name: part for name, part in inner.named_modules() if isinstance(part, LoraLayer)}
    for name, layer in layers.items():
        weight = getattr(layer.get_base_layer(), "weight", None)
        if owners.count(id(weight)) > 1:
            return f"{name} is tied to another matrix of this checkpoint", {}
        if type(layer) is not Linear or layer.lora_variant or weight is None:
            return f"{name} is a {type(layer).__name__} of peft's", {}
        layer.lora_A.to_empty(device="cpu")
        layer.lora_B.to_empty(device="cpu")
    given = load_peft_weights(str(adapter), device="cpu")
    odd = [key for key in given if ".lora_A." not in key and ".lora_B." not in key]
    if odd:  # base matrices that were saved beside the factors, magnitudes, ...
        return f"{odd[0]} is no factor", {}
    result: Any = set_peft_model_state_dict(peft, given)
    if result.unexpected_keys:
        return f"{result.unexpected_keys[0]} is read by no layer of the model", {}
    _refuse_missing(result.missing_keys, adapter)
    factors: dict[str, np.ndarray | torch.Tensor] = {}
    for name, layer in layers.items():
        a, b = layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()
        b = b * layer.scaling[NAME]
        left, right = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
        factors[f"{name}.weight.lora_B"], factors[f"{name}.weight.lora_A"] = left, right
    return None, factors


def _refuse_missing(keys: "list[str]", adapter: Path) -> None:
    missing = sorted(key for key in keys if f".{NAME}" in key)
    if missing:
        raise SurgeryError(
            f"{adapter}: its config wants {missing[0].replace('.' + NAME, '')}, which the file does not hold "
            f"({len(missing)} are missing); it is incomplete, or of another peft version"
        )


def _merged(adapter: Path, config: Any, checkpoint: Path, reason: str) -> "dict[str, torch.Tensor]":
    """{parameter: merged - base, fp32} of every parameter that peft's own merge changes; reason: why it is needed.

    Raises:
        SurgeryError: the type has no merge; parameters appear or vanish; the adapter starts from random numbers
            that it does not hold; the merged model's logits are not the adapter's.
    """
    import torch

    where = f"{adapter}: {reason}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = base_of(checkpoint)
        before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
        peft: Any = _attached(base, adapter)
        wanted = logits(peft)
        try:
            merged = peft.merge_and_unload()
        except (AttributeError, NotImplementedError) as error:
            raise SurgeryError(f"{where}, which peft cannot merge into weights ({error}); no delta holds it") from None
        after = dict(merged.named_parameters())
        if after.keys() != before.keys() or any(after[name].shape != before[name].shape for name in before):
            odd = next((name for name in (*after, *before) if (name in after) != (name in before)), "a shape")
            raise SurgeryError(f"{where}, which changes what parameters there are ({odd}); a delta cannot hold that")
        got = logits(merged)
        torch.manual_seed(1)
        again = logits(_attached(base_of(checkpoint), adapter))
    limit = TOLERANCE * max(1.0, float(wanted.abs().max()))
    if not float((again - wanted).abs().max()) <= limit:
        raise SurgeryError(f"{where}, for which peft draws random numbers anew at each loading; the file lacks them")
    gap = float((got - wanted).abs().max())
    if not gap <= limit:
        raise SurgeryError(
            f"{where}; merged into the weights by peft it gives other logits than peft's own model (by {gap:.2g}), so "
            "that a delta of it would be wrong"
        )
    return {
        name: after[name].detach().float() - value.float()
        for name, value in before.items()
        if not torch.equal(after[name].detach(), value)
    }


def base_of(checkpoint: Path) -> "PreTrainedModel":
    """The model of a checkpoint in float32 on the CPU. Raises: SurgeryError where its weights are not whole."""
    import torch
    from transformers import AutoConfig

    opened: Any = model_class(AutoConfig.from_pretrained(checkpoint)).from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    model, report = opened
    if report["missing_keys"]:
        name = sorted(report["missing_keys"])[0]
        raise SurgeryError(
            f"{checkpoint}: has no {name!r}, so peft's result would be random; give the whole checkpoint"
        )
    return model.eval()


def _all_named(adapter: Path) -> bool:
    """Whether the file has all of every module that its config names, each by its whole name.

    Of experts and routers peft then still asks for factors in every block, and starts those at products of zero.
    """
    config, held = read_json(adapter / CONFIG), read_header(adapter / WEIGHTS).tensors
    trained, saved = config.get("target_modules"), config.get("modules_to_save") or []
    if not isinstance(trained, list) or not trained or config.get("init_lora_weights", True) is not True:
        return False
    ends = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
    factors = all(any(all(f"{ROOT}{name}{end}" in held for end in pair) for pair in ends) for name in trained)
    return factors and all(f"{ROOT}{name}.weight" in held for name in saved)


def _attached(base: "PreTrainedModel", adapter: Path) -> "nn.Module":
    """peft's own model of base and adapter. Raises: SurgeryError where peft only warns that tensors are missing, or
    leaves some of the file's out without a word."""
    from peft import PeftModel
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(base, str(adapter))
    for warning in said:
        text = " ".join(str(warning.message).split())
        if "missing adapter keys" in text and not _all_named(adapter):
            raise SurgeryError(f"{adapter}: {text[:240]} It is incomplete, or of another peft version; save it again")
    result: Any = set_peft_model_state_dict(peft, load_peft_weights(str(adapter), device="cpu"))
    if result.unexpected_keys:
        raise SurgeryError(
            f"{adapter}: {result.unexpected_keys[0].replace('.' + NAME, '')} is read by no layer that its config names "
            f"({len(result.unexpected_keys)} such tensors), so peft would leave it out; mend target_modules"
        )
    return peft.eval()


def logits(model: "nn.Module") -> "torch.Tensor":
    """The model's first output on a fixed row of tokens (float32)."""
    import torch

    config: Any = model.config
    size = config.get_text_config().vocab_size
    ids = torch.arange(2, 18).remainder(size)[None]
    more: Mapping[str, torch.Tensor] = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more)[0].float()
