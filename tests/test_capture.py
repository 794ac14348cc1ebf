"""hooks.capture and hooks.edit: the right tensors under the right names, and a model left as it was."""

from __future__ import annotations

import ast
import copy
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hooks
from hooks import HookError, anatomy
from hooks import trace_modules as probe
from tests.families import FAMILIES, REFUSED, VOCABULARY, batch, build, state

KNOWN = [name for name in FAMILIES if name not in REFUSED]


def test_import_is_light_and_names_are_functions() -> None:
    code = (
        "import sys, hooks; assert 'torch' not in sys.modules\n"
        "from hooks.interventions import edit\n"
        "assert callable(hooks.capture) and callable(hooks.bmi) and callable(hooks.record)\n"
        "assert hooks.edit is edit and hooks.anatomy.find\n"
        "assert 'transformer_lens' not in sys.modules and 'nnsight' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["hooks", "surgery"])
def test_editors_see_what_python_gives(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__ or "").read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(homes) == set(module.__all__) and set(homes) <= set(dir(module))
    for name, home in homes.items():
        given = importlib.import_module(f"{home}.{name}") if name in ("anatomy", "plots") else None
        assert getattr(module, name) is (given or getattr(importlib.import_module(home or ""), name))


def test_no_file_of_hooks_has_the_name_of_a_function() -> None:
    files = {path.stem for path in (Path(hooks.__file__).parent).iterdir()} - {"anatomy", "plots"}
    assert not files & set(hooks.__all__)


@pytest.mark.parametrize("name", KNOWN)
def test_equal_to_what_transformers_reports(name: str) -> None:
    model, found = build(name), anatomy.find(build(name))
    inputs = batch(model)
    before = state(model)
    with torch.no_grad(), hooks.capture(model, "*") as store:
        model(**inputs)
    assert state(model) == before
    with torch.no_grad(), probe.eager(model):
        theirs = model(**inputs, output_hidden_states=True, output_attentions=True)
    for stack in found.stacks:
        kind = stack.prefix.replace("blocks", "") if len(found.stacks) == 2 else ""
        states, weights = getattr(theirs, f"{kind}hidden_states"), getattr(theirs, f"{kind}attentions")
        for i, block in enumerate(stack.blocks):
            assert torch.equal(store[f"{block.site}.hook_resid_pre"], states[i])
            assert torch.equal(store[f"{block.site}.attn.hook_pattern"], weights[i])
            if i + 1 < len(stack.blocks):
                assert torch.equal(store[f"{block.site}.hook_resid_post"], states[i + 1])
            total = store[f"{block.site}.hook_resid_pre"] + store[f"{block.site}.hook_attn_out"]
            if block.mid:
                torch.testing.assert_close(store[f"{block.site}.hook_resid_mid"], total, rtol=1e-5, atol=1e-5)
            if block.additive:
                total = total + store.get(f"{block.site}.hook_cross_attn_out", 0)
                total = total + store[f"{block.site}.hook_mlp_out"].reshape(total.shape)
                torch.testing.assert_close(store[f"{block.site}.hook_resid_post"], total, rtol=1e-4, atol=1e-4)
        last = stack.prefix.replace("blocks", "ln_final") + ".hook_out"
        last = last if stack.final_norm else f"{stack.blocks[-1].site}.hook_resid_post"
        assert torch.equal(store[last], states[-1])


@pytest.mark.parametrize("name", KNOWN)
def test_looking_at_patterns_does_not_change_what_is_computed(name: str) -> None:
    model = build(name)
    inputs, found = batch(model), anatomy.find(model)
    with torch.no_grad(), hooks.capture(model, "*.hook_resid_post") as without:
        model(**inputs)
    with torch.no_grad(), hooks.capture(model, ["*.hook_resid_post", "*.attn.hook_pattern"]) as store:
        model(**inputs)
    for site, value in without.items():  # T5's streams are large, hence relative to the largest entry
        torch.testing.assert_close(store[site], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    bidirectional = "bert" in name or name in ("electra", "deberta_v2")
    for block in found.blocks:
        pattern = store[f"{block.site}.attn.hook_pattern"]
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
        assert bool((pattern.triu(1) > 0).any()) == bidirectional


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert", "mixtral", "t5"])
def test_z_times_the_writer_is_the_attention_output(name: str) -> None:
    model, found = build(name), anatomy.find(build(name))
    with torch.no_grad(), hooks.capture(model, ["*.attn.hook_z", "*.hook_attn_out"]) as store:
        model(**batch(model))
    block = found.blocks[1]
    z = store[f"{block.site}.attn.hook_z"]
    assert z.shape[2:] == (4, 8)
    writer = model.get_submodule(block.attention_writer)
    torch.testing.assert_close(writer(z.flatten(2)), store[f"{block.site}.hook_attn_out"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_normalized_times_weight_is_the_norm(name: str) -> None:
    model, found = build(name), anatomy.find(build(name))
    with torch.no_grad(), hooks.capture(model, "*ln_final*") as store:
        model(**batch(model))
    norm = model.get_submodule(found.final_norm)
    prefix = "decoder_ln_final" if name == "t5" else "ln_final"
    bias = norm.bias if getattr(norm, "bias", None) is not None else 0.0
    value = store[f"{prefix}.hook_normalized"] * norm.weight + bias
    torch.testing.assert_close(value, store[f"{prefix}.hook_out"])


# BART's encoder has learned positions and no argument for them: padding must be on the right there.
@pytest.mark.parametrize("name", [n for n in KNOWN if "bart" not in n and n != "t5_classifier"])
def test_padding_sides_agree_and_batched_equals_single(name: str) -> None:
    model = build(name)
    pad = model.config.pad_token_id
    pad = 0 if pad is None else pad
    rows = [torch.randint(4, VOCABULARY - 4, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 4, 6)]

    def run(rows: list[Tensor], left: bool) -> dict[str, Tensor]:
        width = max(map(len, rows))
        side = (lambda row: (width - len(row), 0)) if left else (lambda row: (0, width - len(row)))
        ids = torch.stack([torch.nn.functional.pad(row, side(row), value=pad) for row in rows])
        mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), side(row)) for row in rows])
        inputs = hooks.model_inputs(model, {"input_ids": ids, "attention_mask": mask})
        wanted = ["*.hook_resid_p*", "*.attn.hook_z"]
        with torch.no_grad(), hooks.capture(model, wanted, positions="last") as store:
            hooks.run_base(model, inputs)
        return store

    right, left = run(rows, left=False), run(rows, left=True)
    for i, row in enumerate(rows):
        single = run([row], left=False)
        for site, value in single.items():
            if site.startswith("decoder"):
                continue
            torch.testing.assert_close(right[site][i], value[0], rtol=1e-4, atol=1e-4, msg=f"right {site}")
            torch.testing.assert_close(left[site][i], value[0], rtol=1e-4, atol=1e-4, msg=f"left {site}")


def test_last_position_of_all_is_last() -> None:
    model = build("llama")
    ids = torch.randint(3, 90, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    inputs = hooks.model_inputs(model, {"input_ids": ids, "attention_mask": mask})
    sites = ["blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"]
    with torch.no_grad(), hooks.capture(model, sites) as everything:
        model(**inputs)
    with torch.no_grad(), hooks.capture(model, sites, positions="last") as last:
        model(**inputs)
    for row, place in enumerate((3, 5)):
        assert torch.equal(last[sites[0]][row], everything[sites[0]][row, place])
        assert torch.equal(last[sites[1]][row], everything[sites[1]][row, :, place])


def test_reducer_sees_everything_and_nothing_is_kept() -> None:
    model, inputs = build("gpt2"), batch(build("gpt2"))
    seen: dict[str, Tensor] = {}
    shapes = set()

    def reducer(site: str, tensor: Tensor, mask: Tensor) -> None:
        seen[site] = tensor.clone()
        shapes.add((tuple(mask.shape), mask.dtype))

    with torch.no_grad(), hooks.capture(model, "blocks.*.hook_mlp_out", reducer=reducer) as store:
        model(**inputs)
    with torch.no_grad(), hooks.capture(model, "blocks.*.hook_mlp_out") as kept:
        model(**inputs)
    assert not store and shapes == {((3, 9), torch.bool)}
    assert list(seen) == list(kept) and all(torch.equal(seen[k], kept[k]) for k in kept)


def test_stop_after_ends_the_pass() -> None:
    model, inputs = build("llama"), batch(build("llama"))
    anatomy.find(model)
    ran, before = [], state(model)
    handle = model.model.layers[2].register_forward_pre_hook(lambda *a: ran.append(1))
    with torch.no_grad(), hooks.capture(model, "blocks.1.hook_resid_post", stop_after=1) as store:
        model(**inputs)
        ran.append(2)
    handle.remove()
    assert ran == [] and store["blocks.1.hook_resid_post"].shape == (3, 9, 32)
    assert state(model) == before
    with (
        pytest.raises(HookError, match="stop_after is 3; the model has blocks 0 to 2"),
        hooks.capture(model, "*", stop_after=3),
    ):
        pass


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("blocks.*.hook_resid_pots", r"nearest are .*blocks\.\*\.hook_resid_post"),
        ("blocks.3.hook_resid_post", r"blocks\.0 to blocks\.2.*nearest are"),
        ("hook_attn_out", r"nearest are .*hook_attn_out"),
        ([], "no site was asked for"),
    ],
)
def test_unknown_site_registers_nothing(site: str, message: str) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(HookError, match=message), hooks.capture(model, site):
        pass
    assert state(model) == before


def test_parallel_blocks_have_no_mid() -> None:
    with (
        pytest.raises(HookError, match=r"no site 'blocks\.\*\.hook_resid_mid'"),
        hooks.capture(build("gpt_neox"), "blocks.*.hook_resid_mid"),
    ):
        pass


@pytest.mark.parametrize("name", ["llama", "falcon_new", "t5"])
def test_left_as_it_was_after_an_exception(name: str) -> None:
    model = build(name).train()
    before = state(model)
    with pytest.raises(ZeroDivisionError), hooks.capture(model, "*"):
        assert model.config._attn_implementation == "eager"
        raise ZeroDivisionError
    assert state(model) == before
    with pytest.raises(ZeroDivisionError), hooks.edit(model, {"*.hook_mlp_out": lambda x: 1 / 0}):
        hooks.run_base(model, batch(model))
    before["random"] = state(model)["random"]  # dropout drew numbers until the exception
    assert state(model) == before


def test_transformers_hidden_states_before_during_and_after() -> None:
    model, inputs = build("llama"), batch(build("llama"))
    with torch.no_grad():
        first = model(**inputs, output_hidden_states=True).hidden_states
        with hooks.capture(model, "blocks.*.hook_resid_pre") as store:
            second = model(**inputs, output_hidden_states=True).hidden_states
        third = model(**inputs, output_hidden_states=True).hidden_states
    assert len(first) == len(second) == len(third) == 4
    for i in range(3):
        assert torch.equal(store[f"blocks.{i}.hook_resid_pre"], first[i])
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(first, second, third, strict=True))


def test_edits_reach_hidden_states_that_were_asked_for_before() -> None:
    model, inputs = build("llama"), batch(build("llama"))
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)  # installs transformers' own hooks first
        with hooks.edit(model, {"blocks.1.hook_resid_post": torch.zeros_like}):
            states = model(**inputs, output_hidden_states=True).hidden_states
    assert states[2].abs().max() == 0.0


def test_falcon_adds_in_place_and_the_copy_is_safe() -> None:
    model, inputs = build("falcon_new"), batch(build("falcon_new"))
    with torch.no_grad(), hooks.capture(model, "blocks.0.hook_*") as store:
        model(**inputs)
    total = sum(store[f"blocks.0.{name}"] for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"))
    torch.testing.assert_close(total, store["blocks.0.hook_resid_post"])


def test_nan_is_named_with_its_first_site() -> None:
    model, inputs = build("llama"), batch(build("llama"))
    broken = copy.deepcopy(model)
    anatomy.find(broken)
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    before = state(model)["hooks"]
    with pytest.raises(HookError, match=r"^blocks\.1\.hook_mlp_out holds NaN"), hooks.capture(broken, "*"):
        broken(**inputs)
    assert state(broken)["hooks"] == before
    with pytest.raises(HookError, match=r"first NaN or infinite value comes out of model\.layers\.1\.mlp\.down_proj"):
        anatomy.find(copy.deepcopy(broken))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[:, 6:] = 0  # NaN at padding is nobody's fault
    poisoned = inputs | {"attention_mask": mask}

    def poison(x: Tensor) -> Tensor:
        return x.masked_fill(~mask.bool()[:, :, None], float("nan"))

    with (
        hooks.edit(model, {"blocks.2.hook_mlp_out": poison}),
        hooks.capture(model, "blocks.2.hook_resid_post"),
    ):
        model(**poisoned)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "bloom", "olmo2", "bert", "t5", "mixtral", "gptj"])
def test_an_edit_that_changes_nothing_changes_nothing(name: str) -> None:
    model, inputs = build(name), batch(build(name))
    found = anatomy.find(model)
    sites = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    before = state(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        changes = {f"{found.blocks[1].site}.{site}": (lambda x: x.clone()) for site in sites}
        with hooks.edit(model, changes):
            assert torch.equal(model(**inputs).logits, plain)
        for site in sites:
            with hooks.edit(model, {f"{found.blocks[1].site}.{site}": lambda x: x.roll(1, -1) + 1.0}):
                assert not torch.allclose(model(**inputs).logits, plain, atol=1e-3), site
    assert state(model) == before


@pytest.mark.parametrize("name", ["gpt2", "llama", "olmo2", "bloom", "opt", "t5"])
def test_the_stream_can_be_replaced_in_the_middle_of_a_block(name: str) -> None:
    model, inputs = build(name), batch(build(name))
    site = anatomy.find(model).blocks[0].site
    new = torch.randn((*inputs.get("decoder_input_ids", inputs["input_ids"]).shape, 32))
    wanted = [f"{site}.hook_resid_mid", f"{site}.hook_mlp_out", f"{site}.hook_resid_post"]
    wanted += [f"{site}.hook_cross_attn_out"] if name == "t5" else []
    with (
        torch.no_grad(),
        hooks.edit(model, {f"{site}.hook_resid_mid": lambda x: new}),
        hooks.capture(model, wanted) as store,
    ):
        model(**inputs)
    torch.testing.assert_close(store[f"{site}.hook_resid_mid"], new, rtol=1e-4, atol=1e-4)
    rest = [store[s] for s in wanted[1:2] + wanted[3:]]
    torch.testing.assert_close(store[f"{site}.hook_resid_post"], new + sum(rest), rtol=1e-4, atol=1e-4)


def test_edit_refuses_what_would_do_nothing_or_break() -> None:
    model, inputs = build("llama"), batch(build("llama"))
    with (
        pytest.raises(HookError, match=r"hook_pattern can be read but not replaced.*hook_z"),
        hooks.edit(model, {"blocks.0.attn.hook_pattern": torch.zeros_like}),
    ):
        pass
    with (
        pytest.raises(HookError, match=r"returned \(3, 9\), expected a tensor of shape \(3, 9, 32\)"),
        hooks.edit(model, {"blocks.0.hook_mlp_out": lambda x: x[..., 0]}),
    ):
        model(**inputs)
    with (
        pytest.raises(HookError, match="returned NoneType"),
        hooks.edit(model, {"blocks.0.hook_mlp_out": lambda x: None}),  # type: ignore[dict-item]
    ):
        model(**inputs)


def test_gradients_with_respect_to_an_edited_activation() -> None:
    model, inputs = build("llama"), batch(build("llama"))
    kept: dict[str, Tensor] = {}
    with hooks.edit(model, {"blocks.1.attn.hook_z": lambda x: kept.setdefault("z", x)}):
        loss = model(**inputs).logits[:, -1].sum()
    (gradient,) = torch.autograd.grad(loss, kept["z"])
    assert gradient.shape == (3, 9, 4, 8) and gradient.abs().sum() > 0


def test_cached_generation_reads_the_newest_position() -> None:
    model = build("llama")
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (ids > 0).long()
    shapes = []
    with hooks.capture(
        model, "blocks.0.hook_resid_pre", reducer=lambda s, t, m: shapes.append((t.shape[1], m.shape[1]))
    ):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert shapes == [(5, 5), (1, 1), (1, 1)]


def test_a_row_without_tokens_is_named() -> None:
    model = build("llama")
    inputs = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]]),
    }
    with (
        pytest.raises(HookError, match="row 1 of attention_mask marks no token"),
        hooks.capture(model, "blocks.0.hook_resid_pre", positions="last"),
    ):
        model(**inputs)


def test_half_precision_and_offloaded_weights() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = build("llama")
    inputs = batch(plain)
    with torch.no_grad(), hooks.capture(plain, "*") as reference:
        plain(**inputs)
    half = build("llama").to(torch.bfloat16)
    with torch.no_grad(), hooks.capture(half, "blocks.2.hook_resid_post") as store:
        half(**inputs)
    value = store["blocks.2.hook_resid_post"]
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(value.float(), reference["blocks.2.hook_resid_post"], rtol=0.1, atol=0.3)
    offloaded = accelerate.cpu_offload(build("llama"), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    with torch.no_grad(), hooks.capture(offloaded, "*") as store:
        offloaded(**inputs)
    assert list(store) == list(reference)
    assert all(torch.equal(store[site], reference[site]) for site in reference)


def test_quantised_linear_layers() -> None:
    model = build("llama")
    inputs = batch(model)
    with torch.no_grad(), hooks.capture(model, "blocks.2.hook_resid_post") as reference:
        model(**inputs)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    found = anatomy.find(quantised)
    assert found.blocks[0].mlp_writer == "model.layers.0.mlp.down_proj"
    with torch.no_grad(), hooks.capture(quantised, "blocks.2.hook_resid_post") as store:
        quantised(**inputs)
    value, expected = store["blocks.2.hook_resid_post"], reference["blocks.2.hook_resid_post"]
    assert torch.cosine_similarity(value.flatten(), expected.flatten(), dim=0) > 0.9
