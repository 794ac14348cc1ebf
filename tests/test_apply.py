"""Apply to a checkpoint on disk: every row of the table of targets, what is preserved, and what is
reported."""

import errno
import json
import os
import subprocess
import sys

import deltakit as kit
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from surgery import SurgeryError
from surgery import delta as deltas
from surgery.apply import apply, inspect


@pytest.fixture
def base(tmp_path):
    return kit.save(tmp_path / "base", kit.weights())


def refused(tmp_path, delta, target, match, **options):
    """The refusal's text matches, nothing was created, and the target is as it was."""
    before, names = kit.hashes(target), sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SurgeryError, match=match) as caught:
        apply(delta, target, tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert kit.hashes(target) == before and sorted(p.name for p in tmp_path.iterdir()) == names


# ---- the table of targets: what is applied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_resharded_and_other_dtype(base, tmp_path, dtype):
    delta = kit.edit(base)
    source = {name: value.to(dtype) for name, value in kit.weights().items()}
    report = apply(delta, kit.save(tmp_path / "target", source, shards=3), tmp_path / "out")
    result = kit.load(tmp_path / "out")
    for name, value in source.items():
        change = torch.from_numpy(delta.tensors[name]) if name in delta.tensors else torch.zeros(())
        assert torch.equal(result[name], (value.float() + change).to(dtype)), name
    assert report.verdict == "same" and report.distance <= 0.002


@settings(max_examples=8, deadline=None)
@given(shards=st.integers(2, 6), how=st.sampled_from(["nearest", "stochastic"]), seed=st.integers(0, 2**40))
def test_resharded_result_equals_unsharded(tmp_path_factory, shards, how, seed):
    tmp = tmp_path_factory.mktemp("reshard")
    one = kit.save(tmp / "one", kit.weights())
    many = kit.save(tmp / "many", kit.weights(), shards=shards)
    delta = kit.edit(one, (kit.DOWN, kit.NORM, kit.EMBED))
    apply(delta, one, tmp / "a", rounding=how, seed=seed)
    apply(delta, many, tmp / "b", rounding=how, seed=seed)
    left, right = kit.load(tmp / "a"), kit.load(tmp / "b")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_extended_vocabulary_that_the_delta_does_not_touch(base, tmp_path):
    target = kit.save(tmp_path / "target", extended(), vocab_size=44)
    apply(kit.edit(base), target, tmp_path / "out")
    assert kit.load(tmp_path / "out")[kit.EMBED].shape == (44, 16)


def extended():
    rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    source = kit.weights()
    return source | {name: torch.cat([source[name], rows]) for name in (kit.EMBED, kit.HEAD)}


def test_extended_vocabulary_that_the_delta_touches(tmp_path):
    tokens = [f"t{i}" for i in range(40)]
    base = kit.save(tmp_path / "base", kit.weights(), tokens=tokens)
    delta = kit.edit(base, (kit.EMBED, kit.DOWN))
    target = kit.save(tmp_path / "t1", extended(), vocab_size=44, tokens=[*tokens, "a", "b", "c", "d"])
    refused(tmp_path, delta, target, r"has 44 rows \(tokens\).*base 40.*--vocabulary first")
    shifted = kit.save(tmp_path / "t2", extended(), vocab_size=44, tokens=["a", *tokens, "b", "c", "d"])
    refused(tmp_path, delta, shifted, "first 40 tokens.*differ", vocabulary="first")
    without = kit.save(tmp_path / "t3", extended(), vocab_size=44)
    refused(tmp_path, delta, without, "cannot be compared", vocabulary="first")
    apply(delta, target, tmp_path / "first", vocabulary="first")
    before, after = extended()[kit.EMBED], kit.load(tmp_path / "first")[kit.EMBED]
    assert torch.equal(after[40:], before[40:])
    assert torch.equal(after[:40], (before[:40].float() + torch.from_numpy(delta.tensors[kit.EMBED])).bfloat16())
    shorter = kit.weights() | {kit.EMBED: torch.zeros(36, 16, dtype=torch.bfloat16)}
    less = kit.save(tmp_path / "t4", shorter, vocab_size=36, tokens=tokens[:36])
    refused(tmp_path, delta, less, r"shape \[36, 16\].*base \[40, 16\]", vocabulary="first")


# ---- tying


def test_tied_delta_to_an_untied_target(tmp_path):
    tied_weights = kit.weights(tie_word_embeddings=True)
    base = kit.save(tmp_path / "base", tied_weights, tie_word_embeddings=True)
    delta = kit.edit(base, (kit.EMBED,))
    untied = tied_weights | {kit.HEAD: tied_weights[kit.EMBED].clone()}
    target = kit.save(tmp_path / "target", untied)
    refused(tmp_path, delta, target, "embedding and head are separate.*--tied embed, head or both")
    edited = (tied_weights[kit.EMBED].float() + torch.from_numpy(delta.tensors[kit.EMBED])).bfloat16()
    for choice, names in (("embed", [kit.EMBED]), ("head", [kit.HEAD]), ("both", [kit.EMBED, kit.HEAD])):
        apply(delta, target, tmp_path / choice, tied=choice)
        result = kit.load(tmp_path / choice)
        for name in (kit.EMBED, kit.HEAD):
            assert torch.equal(result[name], edited if name in names else untied[name]), (choice, name)
    with pytest.raises(SurgeryError, match="tied 'all': expected one of embed, head, both"):
        apply(delta, target, tmp_path / "x", tied="all")


def test_untied_delta_to_a_tied_target(tmp_path):
    source = kit.weights() | {kit.HEAD: kit.weights()[kit.EMBED].clone()}
    base = kit.save(tmp_path / "base", source)
    delta = kit.edit(base, (kit.EMBED, kit.HEAD))
    stored = {name: value for name, value in source.items() if name != kit.HEAD}
    target = kit.save(tmp_path / "target", stored, tie_word_embeddings=True)
    refused(tmp_path, delta, target, "embedding and head are one tensor.*--tied embed, head or both")
    changes = {name: torch.from_numpy(delta.tensors[name]) for name in (kit.EMBED, kit.HEAD)}
    wanted = {
        "embed": changes[kit.EMBED],
        "head": changes[kit.HEAD],
        "both": changes[kit.EMBED] + changes[kit.HEAD],
    }
    for choice, change in wanted.items():
        apply(delta, target, tmp_path / choice, tied=choice)
        expected = (source[kit.EMBED].float() + change).bfloat16()
        assert torch.equal(kit.load(tmp_path / choice)[kit.EMBED], expected), choice
    only_embed = kit.edit(base, (kit.EMBED,))
    refused(
        tmp_path,
        only_embed,
        target,
        "--tied head, but the delta changes only model.embed_tokens",
        tied="head",
    )


@pytest.mark.parametrize("stored", [[kit.HEAD], [kit.EMBED, kit.HEAD]])
def test_tied_target_that_stores_the_head_or_both(tmp_path, stored):
    tied = kit.weights(tie_word_embeddings=True)
    base = kit.save(tmp_path / "base", tied, tie_word_embeddings=True)
    delta = kit.edit(base, (kit.EMBED,))
    rest = {name: value for name, value in tied.items() if name != kit.EMBED}
    target = rest | {name: tied[kit.EMBED].clone() for name in stored}
    apply(delta, kit.save(tmp_path / "target", target, tie_word_embeddings=True), tmp_path / "out")
    expected = (tied[kit.EMBED].float() + torch.from_numpy(delta.tensors[kit.EMBED])).bfloat16()
    assert all(torch.equal(kit.load(tmp_path / "out")[name], expected) for name in stored)


# ---- names


def test_prefixed_names_are_refused_with_the_map_that_fits(base, tmp_path):
    delta = kit.edit(base)
    inside = {"language_model." + name: value for name, value in kit.weights().items()}
    inside["vision.0.weight"] = torch.zeros(2, 2)
    target = kit.save(tmp_path / "target", inside)
    refused(tmp_path, delta, target, r"prefix '' becomes 'language_model.'.*--rename =language_model\.")
    # Rounded by chance, too: what the target calls a tensor changes no number.
    apply(delta, target, tmp_path / "out", rename=("", "language_model."), rounding="stochastic")
    plain = apply(delta, base, tmp_path / "plain", rounding="stochastic")
    assert plain.changed > 0
    left, right = kit.load(tmp_path / "plain"), kit.load(tmp_path / "out")
    assert all(torch.equal(value, right["language_model." + name]) for name, value in left.items())


def test_prefix_that_moved_inside(base, tmp_path):
    moved = {name.replace("model.", "model.language_model.", 1): v for name, v in kit.weights().items()}
    target = kit.save(tmp_path / "target", moved)
    refused(tmp_path, kit.edit(base), target, r"--rename model\.=model\.language_model\.")
    apply(kit.edit(base), target, tmp_path / "out", rename=("model.", "model.language_model."))


def test_ambiguous_or_no_prefix_is_refused(base, tmp_path):
    delta = kit.edit(base)
    twice = {p + name: value.clone() for p in ("a.", "b.") for name, value in kit.weights().items()}
    refused(tmp_path, delta, kit.save(tmp_path / "t1", twice), "no single change of prefix explains it")
    missing = kit.weights()
    del missing[kit.DOWN]
    refused(
        tmp_path,
        delta,
        kit.save(tmp_path / "t2", missing),
        r"no 'model.layers.1.mlp.down_proj.weight' \(1 of 2",
    )


# ---- broken and foreign targets


def test_quantised_targets(base, tmp_path):
    delta = kit.edit(base)
    config = {"quant_method": "gptq", "bits": 4}
    marked = kit.save(tmp_path / "t1", kit.weights(), quantization_config=config)
    refused(tmp_path, delta, marked, "quantised by gptq, whose codes .* two ways remain")
    packed = kit.weights()
    packed[kit.DOWN.replace("weight", "qweight")] = torch.zeros(2, 24, dtype=torch.int32)
    del packed[kit.DOWN]
    refused(
        tmp_path,
        delta,
        kit.save(tmp_path / "t2", packed),
        "down_proj.qweight.*quantised in a way that is not known; two ways",
    )
    eight = kit.weights() | {kit.DOWN: torch.zeros(16, 24, dtype=torch.int8)}
    refused(tmp_path, delta, kit.save(tmp_path / "t3", eight), "down_proj.weight' is stored as I8")
    float8 = kit.weights() | {kit.DOWN: torch.zeros(16, 24).to(torch.float8_e4m3fn)}
    refused(tmp_path, delta, kit.save(tmp_path / "t4", float8), "is stored as F8_E4M3")
    double = kit.weights() | {kit.DOWN: torch.zeros(16, 24, dtype=torch.float64)}
    refused(tmp_path, delta, kit.save(tmp_path / "t5", double), "is stored as F64")


def test_wrong_shape(base, tmp_path):
    wide = kit.weights() | {kit.DOWN: torch.zeros(16, 25, dtype=torch.bfloat16)}
    refused(
        tmp_path,
        kit.edit(base),
        kit.save(tmp_path / "t", wide),
        r"shape \[16, 25\], the delta's base \[16, 24\]",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_target(base, tmp_path, value):
    broken = kit.weights()
    broken[kit.DOWN][3, 3] = value
    refused(tmp_path, kit.edit(base), kit.save(tmp_path / "t", broken), "down_proj.weight' holds NaN or infinity")


def test_truncated_target(base, tmp_path):
    delta = kit.edit(base)
    target = kit.save(tmp_path / "t", kit.weights())
    data = (target / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        (target / "model.safetensors").write_bytes(data[:size])
        refused(tmp_path, delta, target, "truncated|outside the file")
    (target / "model.safetensors").write_bytes(data + b"x")
    refused(tmp_path, delta, target, "with a tail")


def test_one_name_in_two_shards(base, tmp_path):
    target = kit.save(tmp_path / "t", kit.weights(), shards=2)
    for path in sorted(target.glob("*.safetensors")):
        content = {kit.DOWN: kit.weights()[kit.DOWN]}
        with safe_open(path, "pt") as file:
            content |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(content, path)
    refused(tmp_path, kit.edit(base), target, "stands in both model-00001-of-00002.safetensors and model-00002")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../x", ".."])
def test_index_that_points_outside(base, tmp_path, name):
    target = kit.save(tmp_path / "t", kit.weights(), shards=2)
    path = target / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][kit.DOWN] = name
    path.write_text(json.dumps(index))
    refused(tmp_path, kit.edit(base), target, "lies outside the directory")


def test_index_that_lies(base, tmp_path):
    target = kit.save(tmp_path / "t", kit.weights(), shards=2)
    path = target / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = set(index["weight_map"].values())
    index["weight_map"][kit.DOWN] = (files - {index["weight_map"][kit.DOWN]}).pop()
    path.write_text(json.dumps(index))
    refused(tmp_path, kit.edit(base), target, "which does not hold it")
    index["weight_map"][kit.DOWN] = "model-00009-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refused(tmp_path, kit.edit(base), target, "model-00009-of-00002.safetensors' is missing")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rope_theta": 500000.0}, "rope: the delta's base has rope_theta 10000.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope: .*factor 2.0"),
        ({"rms_norm_eps": 1e-6}, "norm_eps: the delta's base has 1e-05, the target 1e-06"),
        ({"num_key_value_heads": 4}, "kv_heads: the delta's base has 2, the target 4"),
        ({"head_dim": 8}, "head_dim: the delta's base has 4, the target 8"),
        ({"num_hidden_layers": 3}, "layers"),
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_act": "gelu"}, "activation"),
    ],
)
def test_other_architecture(base, tmp_path, change, text):
    target = kit.save(tmp_path / "t", kit.weights(), **change)
    refused(tmp_path, kit.edit(base), target, text)
    refused(tmp_path, kit.edit(base), target, text, force=True)


def test_same_architecture_in_other_words(base, tmp_path):
    """transformers 5 writes rope_parameters, GGUF keeps 1e-5 as fp32, and head_dim may be left out."""
    target = kit.save(
        tmp_path / "t", kit.weights(), rope_theta=None, head_dim=None, rms_norm_eps=float(np.float32(1e-5)),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_scaling=None,
    )  # fmt: skip
    assert apply(kit.edit(base), target, tmp_path / "out").notes == ()


# ---- relatedness


@pytest.mark.parametrize("size", [1.0, 0.05, 20.0])
def test_unrelated_weights_are_refused_even_with_force(base, tmp_path, size):
    """Freshly initialised weights are smaller than trained ones; that must not bring them nearer."""
    target = kit.save(tmp_path / "t", {name: size * value for name, value in kit.weights(seed=9).items()})
    for force in (False, True):
        refused(tmp_path, kit.edit(base), target, "of its norm away.*these are other weights", force=force)
    view = kit.edit(base).save(tmp_path / "d.safetensors") and inspect(tmp_path / "d.safetensors", target)
    assert view.verdict == "unrelated" and 1.0 < view.distance < 2.0


def test_distant_weights_need_force(base, tmp_path):
    noisy = {
        name: (value.float() + 0.7 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3))).bfloat16()
        for name, value in kit.weights().items()
    }
    target = kit.save(tmp_path / "t", noisy)
    refused(tmp_path, kit.edit(base), target, "repeat with --force")
    report = apply(kit.edit(base), target, tmp_path / "out", force=True)
    assert report.verdict == "distant" and 0.5 < report.distance <= 1.0


def test_related_weights_are_applied_and_reported(base, tmp_path):
    tuned = {name: (value.float() * 1.02).bfloat16() for name, value in kit.weights().items()}
    report = apply(kit.edit(base), kit.save(tmp_path / "t", tuned), tmp_path / "out")
    assert report.verdict == "related" and report.distance == pytest.approx(0.02, rel=0.3)
    assert report.farthest == kit.DOWN


# ---- what is preserved, and reported


def test_everything_else_is_preserved_byte_for_byte(base, tmp_path):
    source = kit.weights() | {"extra.buffer": torch.arange(5), "fp32.norm": torch.ones(3)}
    target = kit.save(tmp_path / "t", source, shards=3)
    (target / "sub").mkdir()
    (target / "sub" / "notes.txt").write_text("x")
    (target / "linked.txt").symlink_to(target / "README.md")
    delta = kit.edit(base, (kit.DOWN,))
    report = apply(delta, target, tmp_path / "out", undo="none")
    before, after = kit.hashes(target), kit.hashes(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and changed == {report.tensors[0].file}
    old, new = ((folder / report.tensors[0].file).read_bytes() for folder in (target, tmp_path / "out"))
    differing = [i for i in range(len(old)) if old[i] != new[i]]
    assert len(old) == len(new) and max(differing) - min(differing) < 16 * 24 * 2  # inside the one tensor
    assert not (tmp_path / "out" / "linked.txt").is_symlink()


def test_report_counts_what_rounding_lost(base, tmp_path):
    delta = kit.edit(base, size=0.002, rounding="auto")
    near = apply(delta, base, tmp_path / "near", rounding="nearest")
    old, new = kit.load(base)[kit.DOWN], kit.load(tmp_path / "near")[kit.DOWN]
    down = next(tensor for tensor in near.tensors if tensor.name == kit.DOWN)
    assert down.changed == int((old != new).sum()) and down.entries == 16 * 24
    assert down.lost == 16 * 24 - down.changed > 100
    drawn = apply(delta, base, tmp_path / "drawn", rounding="stochastic", seed=4)
    again = apply(delta, base, tmp_path / "again", rounding="auto", seed=4)
    assert (drawn.changed, drawn.lost) == (again.changed, again.lost)
    other = apply(delta, base, tmp_path / "other", rounding="auto", seed=5)
    hashes = [kit.hashes(report.out)["model.safetensors"] for report in (drawn, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert near.delta_sha256 == delta.sha256 and near.scale == 1.0


def test_scale_and_zero_scale(base, tmp_path):
    delta = kit.edit(base)
    apply(delta, base, tmp_path / "minus", scale=-1.5)
    expected = (kit.load(base)[kit.DOWN].float() + torch.from_numpy(delta.tensors[kit.DOWN]) * -1.5).bfloat16()
    assert torch.equal(kit.load(tmp_path / "minus")[kit.DOWN], expected)
    nothing = apply(delta, base, tmp_path / "zero", scale=0.0, rounding="stochastic")
    assert nothing.changed == nothing.lost == 0
    assert kit.hashes(tmp_path / "zero")["model.safetensors"] == kit.hashes(base)["model.safetensors"]


def test_overflow_of_fp16_leaves_nothing(tmp_path):
    source = {name: value.to(torch.float16) for name, value in kit.weights().items()}
    base = kit.save(tmp_path / "base", source)
    refused(tmp_path, kit.edit(base), base, "too large for F16; use a smaller --scale", scale=1e9)


def test_link_shares_only_the_untouched_shards(base, tmp_path):
    target = kit.save(tmp_path / "t", kit.weights(), shards=3)
    report = apply(kit.edit(base, (kit.DOWN,)), target, tmp_path / "out", link=True)
    for path in sorted(target.glob("*.safetensors")):
        shared = path.stat().st_ino == (tmp_path / "out" / path.name).stat().st_ino
        assert shared == (path.name != report.tensors[0].file)
    assert (tmp_path / "out" / "config.json").stat().st_ino != (target / "config.json").stat().st_ino


def test_copying_where_the_kernel_cannot(base, tmp_path, monkeypatch):
    """Between file systems copy_file_range fails with EXDEV; then the bytes are read and written."""

    def impossible(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    delta = kit.edit(base)
    apply(delta, base, tmp_path / "kernel")
    monkeypatch.setattr(os, "copy_file_range", impossible)
    apply(delta, base, tmp_path / "plain")
    assert kit.hashes(tmp_path / "plain") == kit.hashes(tmp_path / "kernel")


def test_hub_cache_layout_of_links(base, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    base.rename(blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    before = kit.hashes(blobs)
    apply(kit.edit(snapshot), snapshot, tmp_path / "out")
    assert kit.hashes(blobs) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_destinations(base, tmp_path):
    delta = kit.edit(base)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, text in (
        (base, "destination exists"),
        (tmp_path / "link", "symbolic link"),
        (base / "inside", "lies inside the checkpoint"),
        (tmp_path / "no" / "out", "no such folder"),
    ):
        with pytest.raises(SurgeryError, match=text):
            apply(delta, base, out)
    with pytest.raises(SurgeryError, match="rounding 'down'"):
        apply(delta, base, tmp_path / "out", rounding="down")
    with pytest.raises(SurgeryError, match="scale nan"):
        apply(delta, base, tmp_path / "out", scale=float("nan"))
    with pytest.raises(SurgeryError, match="undo 'maybe'"):
        apply(delta, base, tmp_path / "out", undo="maybe")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "link"]


def test_not_a_checkpoint(base, tmp_path):
    delta = kit.edit(base)
    (tmp_path / "empty").mkdir()
    refused(tmp_path, delta, tmp_path / "empty", "holds no config.json")
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, delta, tmp_path / "empty", "neither model.safetensors nor .*found pytorch_model.bin")
    with pytest.raises(SurgeryError, match="no such checkpoint directory"):
        apply(delta, base / "model.safetensors", tmp_path / "out")


def test_other_copies_of_the_weights_are_named(base, tmp_path):
    delta = kit.edit(base)
    (base / "consolidated.safetensors").write_bytes(b"x")
    report = apply(delta, base, tmp_path / "out")
    assert "consolidated.safetensors" in report.notes[0]


def test_progress_ends_at_the_total(base, tmp_path):
    calls = []
    apply(kit.edit(base), base, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == sum(p.stat().st_size for p in base.rglob("*") if p.is_file())


def test_apply_inspect_and_undo_import_no_torch(base, tmp_path):
    kit.edit(base).save(tmp_path / "d.safetensors")
    code = """if True:
        import sys
        from surgery.apply import apply, inspect, undo
        from surgery.delta import Delta, compose
        from surgery.delta.card import card
        inspect(sys.argv[1], sys.argv[2])
        apply(sys.argv[1], sys.argv[2], sys.argv[3], rounding="auto")
        compose([Delta.load(sys.argv[1]), Delta.load(sys.argv[1])])
        undo(sys.argv[3], sys.argv[3] + "-undone")
        card(Delta.load(sys.argv[1]))
        heavy = {"torch", "transformers", "safetensors", "pydantic", "typer"} & set(sys.modules)
        assert not heavy, heavy
    """
    paths = [str(tmp_path / name) for name in ("d.safetensors", "base", "out")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", ["auto", "nearest", "stochastic"])
def test_a_delta_applied_by_default_gives_the_checkpoint_that_was_measured(base, tmp_path, how):
    differences = {name: 0.01 * torch.randn(tensor.shape) for name, tensor in kit.load(base).items() if "mlp" in name}
    delta = deltas.make(differences, base, base="tiny", recipe="", seed=11, rounding=how)
    delta.save(tmp_path / "delta.safetensors")
    apply(delta, base, tmp_path / "measured", rounding=how, seed=11)
    again = apply(tmp_path / "delta.safetensors", base, tmp_path / "again")
    assert kit.hashes(tmp_path / "again") == kit.hashes(tmp_path / "measured")
    assert (again.rounding, again.seed) == (how, 11)
    assert apply(delta, base, tmp_path / "other", seed=12).changed > 0
    weights = [kit.hashes(tmp_path / name)["model.safetensors"] for name in ("other", "again")]
    assert (weights[0] == weights[1]) == (how == "nearest")


def test_what_diff_made_gives_the_edited_checkpoint_byte_for_byte(base, tmp_path):
    edited = {name: tensor + 0.01 * torch.randn(tensor.shape).to(tensor) for name, tensor in kit.load(base).items()}
    kit.save(tmp_path / "edited", edited)
    apply(deltas.diff(base, tmp_path / "edited"), base, tmp_path / "out")
    assert all(
        torch.equal(value, kit.load(tmp_path / "edited")[name]) for name, value in kit.load(tmp_path / "out").items()
    )


def test_the_rounding_a_delta_records_is_one_that_exists(base):
    with pytest.raises(SurgeryError, match="its rounding is 'down'"):
        deltas.make({kit.NORM: np.ones(16, np.float32)}, base, base="t", recipe="", seed=0, rounding="down")


@pytest.mark.parametrize("mode", ["record", "reference", "none"])
def test_a_delta_is_not_added_twice_by_mistake(base, tmp_path, mode):
    delta = kit.edit(base, (kit.DOWN, kit.Q), size=0.1)
    apply(delta, base, tmp_path / "once", undo=mode)
    with pytest.raises(SurgeryError, match=r"holds this delta already.*--force to add it once more"):
        apply(delta, tmp_path / "once", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    apply(delta, tmp_path / "once", tmp_path / "back", scale=-1.0)
    apply(delta, tmp_path / "back", tmp_path / "again")
    assert apply(delta, tmp_path / "once", tmp_path / "twice", force=True).changed
    other = kit.edit(base, (kit.DOWN, kit.Q), size=0.1, seed=2)
    assert apply(other, tmp_path / "once", tmp_path / "both").changed


def test_a_stranger_s_delta_is_refused_in_a_short_line(base, tmp_path):
    changes = {"model_type": "mistral", "hidden_act": "gelu", "rms_norm_eps": 1e-3, "rope_theta": 1.0, "head_dim": 8}
    with pytest.raises(SurgeryError, match=r"model_type: .*; .*; 3 more\)") as caught:
        apply(kit.edit(base), kit.save(tmp_path / "t", kit.weights(), **changes), tmp_path / "out")
    assert len(str(caught.value).replace(str(tmp_path), "")) < 300


def test_the_card_names_the_hash_of_the_file(base, tmp_path):
    """Also where effects were measured after the file was written."""
    from typer.testing import CliRunner

    from surgery.cli import app

    delta = kit.edit(base)
    sha256 = delta.save(tmp_path / "delta.safetensors")
    run = {"delta": {"sha256": sha256}, "before": {"gap": 0.5}, "after": {"gap": 0.1}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    text = CliRunner().invoke(app, ["card", str(tmp_path / "delta.safetensors")]).output
    assert f"sha256 of the file: `{sha256}`" in text and "| gap | 0.5 | 0.1 |" in text
