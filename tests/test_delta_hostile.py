"""Files from the internet: each attack is refused in bounded time and memory, and nothing is created."""

import json
import os
import resource
import struct
import subprocess
import sys

import deltakit as kit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from surgery import SurgeryError
from surgery.apply import apply, inspect
from surgery.delta import Delta, open_delta
from surgery.files.safetensors_io import MAX_HEADER_BYTES, header_bytes, read_header


def file_of(header, data=b"", length=None):
    """A file with any header (bytes, or something for json) and any data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(name="a", dtype="F32", shape=(2,), offsets=(0, 8)):
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


EIGHT = bytes(8)
ATTACKS = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"1234567", "truncated"),
    "header length beyond the file": (file_of(one(), EIGHT, length=10_000), "truncated"),
    "header length of 2**63": (file_of(one(), EIGHT, length=2**63), "truncated"),
    "header length zero": (file_of(one(), EIGHT, length=0), "truncated"),
    "header that is a list": (file_of([1, 2], EIGHT), "does not start with"),
    "header that is text": (file_of(b"hello", EIGHT), "does not start with"),
    "header cut in the middle": (file_of(json.dumps(one()).encode()[:-4], EIGHT), "not JSON"),
    "wrong UTF-8": (file_of(b'{"\xff\xfe":1}', EIGHT), "not UTF-8"),
    "duplicate name": (file_of(b'{"a":1,"a":2}', EIGHT), "'a' stands there twice"),
    "duplicate field": (file_of(b'{"a":{"dtype":"F32","dtype":"F16"}}', EIGHT), "'dtype' stands there twice"),
    "offsets out of the file": (file_of(one(shape=(4,), offsets=(0, 16)), EIGHT), "outside the file"),
    "offsets backwards": (file_of(one(offsets=(8, 0)), EIGHT), "outside the file"),
    "negative offset": (file_of(one(offsets=(-8, 0)), EIGHT), "outside the file"),
    "offset that is a float": (file_of(one(offsets=(0, 8.0)), EIGHT), "outside the file"),
    "offset that is true": (
        file_of(one(dtype="U8", shape=(1,), offsets=(0, True)), b"x"),
        "outside the file",
    ),
    "three offsets": (file_of(one(offsets=(0, 4, 8)), EIGHT), "outside the file"),
    "overlap": (file_of(one() | one("b", offsets=(4, 12)), bytes(12)), "it overlaps"),
    "same place twice": (file_of(one() | one("b"), EIGHT), "it overlaps"),
    "hole": (file_of(one(offsets=(4, 12)), bytes(12)), "leaves a hole"),
    "tail": (file_of(one(), bytes(9)), "with a tail"),
    "shape that does not fill": (file_of(one(shape=(3,)), EIGHT), "does not fill"),
    "shape of 2**40 x 2**40": (file_of(one(shape=(2**40, 2**40)), EIGHT), "impossible shape"),
    "shape that multiplies to zero": (file_of(one(shape=(2**61, 2**61, 0)), EIGHT), "impossible shape"),
    "shape below zero": (file_of(one(shape=(-1, -2)), EIGHT), "impossible shape"),
    "shape of 100 dimensions": (file_of(one(shape=(1,) * 100), EIGHT), "impossible shape"),
    "shape with text": (file_of(one(shape=("2",)), EIGHT), "impossible shape"),
    "integer of 5000 digits": (file_of(b'{"a":' + b"9" * 5000 + b"}", EIGHT), "not JSON"),
    "lone surrogate in a value": (file_of(b'{"__metadata__":{"a":"\\udc00"}}'), "not UTF-8"),
    "NaN in the header": (file_of(b'{"a":NaN}', EIGHT), "not a number"),
    "unknown dtype": (file_of(one(dtype="Q7"), EIGHT), "unknown dtype"),
    "dtype that is a list": (
        file_of(one() | {"b": {"dtype": [], "shape": [], "data_offsets": [8, 8]}}, EIGHT),
        "dtype",
    ),
    "extra field": (file_of({"a": {**one()["a"], "x": 1}}, EIGHT), "not described by"),
    "path as a name": (file_of(one("../../x"), EIGHT), "no tensor name"),
    "absolute path as a name": (file_of(one("/etc/passwd"), EIGHT), "no tensor name"),
    "Windows path as a name": (file_of(one("a\\..\\x"), EIGHT), "no tensor name"),
    "control characters in a name": (file_of(one("a\x1b[31m"), EIGHT), "no tensor name"),
    "newline in a name": (file_of(one("a\nb"), EIGHT), "no tensor name"),
    "empty name": (file_of(one(""), EIGHT), "no tensor name"),
    "name of a megabyte": (file_of(one("x" * 2**20), EIGHT), "no tensor name"),
    "lone surrogate in a name": (file_of(b'{"\\uD800":1}', EIGHT), "not UTF-8"),
    "metadata that is a list": (file_of({"__metadata__": [1]}), "not a map of strings"),
    "metadata with a number": (file_of({"__metadata__": {"a": 1}}), "not a map of strings"),
    "deep JSON": (file_of(b'{"a":' + b"[" * 200_000, EIGHT), "nested too deeply|not JSON"),
    "a safetensors file, but no delta": (file_of(one(), EIGHT), "no 'surgery' in its metadata"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("hostile")
    base = kit.save(tmp / "base", kit.weights())
    kit.edit(base).save(tmp / "good.safetensors")
    return tmp


def refused_everywhere(place, data, match):
    """As a delta and as a checkpoint's weights: one line, and nothing created."""
    path, target = place / "bad.safetensors", place / "target"
    path.write_bytes(data)
    names = sorted(p.name for p in place.iterdir())
    for attempt in (open_delta, Delta.load, inspect, lambda p: apply(p, place / "base", place / "out")):
        with pytest.raises(SurgeryError, match=match) as caught:
            attempt(path)
        assert "\n" not in str(caught.value) and str(caught.value).isprintable()
        assert len(str(caught.value)) < 400 + len(str(path))
    assert sorted(p.name for p in place.iterdir()) == names
    if match.startswith("no 'surgery'"):
        return
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(kit.CONFIG))
    (target / "model.safetensors").write_bytes(data)
    with pytest.raises(SurgeryError, match=match):
        apply(place / "good.safetensors", target, place / "out")
    assert not (place / "out").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(place, attack):
    data, match = ATTACKS[attack]
    refused_everywhere(place, data, match)


def metadata_of(place):
    path = place / "good.safetensors"
    header = read_header(path)
    return json.loads(header.metadata["surgery"]), header, path.read_bytes()


def rewritten(place, change):
    """The good delta with changed metadata."""
    metadata, header, data = metadata_of(place)
    change(metadata)
    spec = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    head, order = header_bytes(spec, {"surgery": text})
    return head + b"".join(data[header.tensors[name].begin : header.tensors[name].end] for name in order)


def nested(depth):
    tree = {}
    for _ in range(depth):
        tree = {"a": tree}
    return tree


def tensor(metadata):
    return metadata["tensors"][kit.DOWN]


METADATA = {
    "format 2": (lambda m: m.update(format=2), "delta format '2', expected 1"),
    "kind unknown": (lambda m: m.update(kind="rm -rf"), "kind 'rm -rf', expected one of"),
    "kind of a list": (lambda m: m.update(kind=[]), "no proper 'kind'"),
    "no recipe": (lambda m: m.pop("recipe"), "no proper 'recipe'"),
    "tower of maps": (lambda m: m.update(measured=nested(900)), "nested too deeply"),
    "terminal commands": (lambda m: m.update(recipe="\x1b[2J"), "control characters"),
    "terminal commands in a name": (lambda m: m.update(measured={"a": [{"\x9b": 1}]}), "control characters"),
    "seed true": (lambda m: m.update(seed=True), "no proper 'seed'"),
    "parents of numbers": (lambda m: m.update(parents=[1]), "no proper 'parents'"),
    "tensor missing": (lambda m: m["tensors"].pop(kit.DOWN), "but not in both"),
    "tensor more": (lambda m: m["tensors"].update(x=tensor(m)), "but not in both"),
    "tensor that is a list": (lambda m: m["tensors"].update({kit.DOWN: []}), "no proper 'shape'"),
    "shape transposed": (lambda m: tensor(m).update(shape=[24, 16]), r"is \[16, 24\], its base \[24, 16\]"),
    "shape zero": (lambda m: tensor(m).update(shape=[0]), "no proper 'shape'"),
    "norm below zero": (lambda m: tensor(m).update(norm=-1), "no proper 'norm'"),
    "norm as text": (lambda m: tensor(m).update(norm="1"), "no proper 'norm'"),
    "norm of 400 digits": (lambda m: tensor(m).update(norm=10**400), "no proper 'norm'"),
    "sketch short": (lambda m: tensor(m).update(sketch="AAAA"), "no proper 'sketch'"),
    "sketch no base64": (lambda m: tensor(m).update(sketch="ä" * 344), "no proper 'sketch'"),
    "sketch of NaN": (
        lambda m: tensor(m).update(sketch=__import__("base64").b64encode(b"\xff" * 256).decode()),
        "no proper 'sketch'",
    ),
    "architecture of a list": (lambda m: m.update(architecture=[]), "no proper 'architecture'"),
    "lora without factors": (lambda m: (m.update(kind="lora"), tensor(m).update(shape=[4])), "its base"),
}


@pytest.mark.parametrize("attack", METADATA)
def test_attack_in_the_metadata(place, attack):
    change, match = METADATA[attack]
    path = place / "bad.safetensors"
    path.write_bytes(rewritten(place, change))
    for attempt in (open_delta, Delta.load, lambda p: apply(p, place / "base", place / "out")):
        with pytest.raises(SurgeryError, match=match):
            attempt(path)
    assert not (place / "out").exists()


def test_values_that_are_not_finite(place):
    _, header, data = metadata_of(place)
    for value in (np.nan, np.inf, -np.inf):
        broken = bytearray(data)
        at = header.tensors[kit.DOWN].begin + 40
        broken[at : at + 4] = np.float32(value).tobytes()
        (place / "bad.safetensors").write_bytes(broken)
        for attempt in (Delta.load, inspect, lambda p: apply(p, place / "base", place / "out")):
            with pytest.raises(SurgeryError, match="holds NaN or infinity"):
                attempt(place / "bad.safetensors")
    assert not (place / "out").exists()


def test_pipes_folders_and_absent_files(place):
    pipe = place / "pipe"
    os.mkfifo(pipe)
    for path, text in (
        (pipe, "not a regular file"),
        (place / "base", "not a regular|cannot be"),
        (place / "no", "No such"),
    ):
        with pytest.raises(SurgeryError, match=text):
            open_delta(path)
    pipe.unlink()


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes(place, data):
    path = place / "random.safetensors"
    path.write_bytes(data)
    with pytest.raises(SurgeryError):
        Delta.load(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_are_sound(place, data):
    """Any few bytes of a good delta changed: refused, or read without any error but ours, and applied whole."""
    good = bytearray((place / "good.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del good[data.draw(st.integers(0, len(good))) :]
    path = place / "damaged.safetensors"
    path.write_bytes(good)
    try:
        delta = Delta.load(path)
    except SurgeryError:
        return
    assert all(np.isfinite(array).all() for array in delta.tensors.values())
    assert {name: array.shape for name, array in delta.tensors.items()} == delta.shapes


naturals = st.integers(-1, 40) | st.sampled_from([2**31, 2**63, 2**64])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64", "F7"]),
        "shape": st.lists(naturals, max_size=3),
        "data_offsets": st.lists(naturals, min_size=2, max_size=2),
    }
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.sampled_from("abc"), entries, max_size=3), size=st.integers(0, 40))
def test_what_we_accept_the_safetensors_library_accepts(place, header, size):
    path = place / "header.safetensors"
    path.write_bytes(file_of(header, bytes(size)))
    try:
        ours = {name: (e.dtype, list(e.shape)) for name, e in read_header(path).tensors.items()}
    except SurgeryError:
        return
    with safe_open(path, "np") as file:
        theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: (part.get_dtype(), part.get_shape()) for name, part in theirs.items()} == ours


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(st.characters(categories=["L", "N", "P"], exclude_characters="/\\"), min_size=1, max_size=8),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        max_size=4,
    )
)
def test_what_we_write_the_safetensors_library_reads(place, shapes):
    shapes = {name: shape for name, shape in shapes.items() if name not in ("__metadata__", "..")}
    head, order = header_bytes({name: ("F32", shape) for name, shape in shapes.items()}, {"b": "1", "a": "ü"})
    path = place / "written.safetensors"
    path.write_bytes(head + b"".join(bytes(4 * int(np.prod(shapes[name]))) for name in order))
    assert read_header(path).metadata == {"b": "1", "a": "ü"}
    try:
        with safe_open(path, "np") as file:
            assert {name: file.get_tensor(name).shape for name in file.keys()} == shapes  # noqa: SIM118
    except SafetensorError as error:  # pragma: no cover
        pytest.fail(str(error))


def test_header_does_not_depend_on_the_order_of_what_is_written():
    tensors = {name: ("U8", (1,)) for name in ("b", "A", "a", "_")}
    texts = {"y": "1", "x": "2"}
    turned = [dict(reversed(each.items())) for each in (tensors, texts)]
    assert header_bytes(tensors, texts) == header_bytes(*turned)
    assert header_bytes(tensors, texts)[0][8:].startswith(b'{"A":{"data_offsets":[0,1],"dtype":"U8"')


def test_hostile_headers_take_bounded_memory_and_time(place):
    """The worst headers we know, each in a process with 1 GB of address space and 20 s of processor time."""
    half = MAX_HEADER_BYTES // 2
    cases = {
        "lists": b'{"a":[' + b"[]," * (half // 3) + b"[]]}",
        "maps": b'{"a":[' + b"{}," * (half // 3) + b"{}]}",
        "depth": b'{"a":' + b'{"a":' * (half // 5),
        "names": b"{" + b",".join(b'"%d":1' % n for n in range(half // 12)) + b"}",
        "digits": b'{"a":' + b"1" * half + b"}",
        "longer than we read": b"{" + b" " * (MAX_HEADER_BYTES + 1) + b"}",
    }
    code = """if True:
        import sys
        from surgery import SurgeryError
        from surgery.delta import open_delta
        try:
            open_delta(sys.argv[1])
        except SurgeryError as error:
            sys.exit(3)
    """

    def limits():
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))

    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    for name, header in cases.items():
        path = place / "large.safetensors"
        path.write_bytes(file_of(header, EIGHT))
        command = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, preexec_fn=limits, capture_output=True, text=True, env=environment)
        assert done.returncode == 3, (name, done.stderr[-500:])
    # A file of 1 TB that is mostly a hole: the claim is checked, not allocated.
    with open(place / "sparse.safetensors", "wb") as file:
        file.write(file_of(one(shape=(2**38,), offsets=(0, 2**40))))
        try:
            file.truncate(file.tell() + 2**40)
        except OSError:
            pytest.skip("this file system has no files of 1 TB")
    with pytest.raises(SurgeryError, match="no delta"):
        Delta.load(place / "sparse.safetensors")
