"""`partialfc.convert`: class centers into a checkpoint and out of it, and files that are not what they should be."""

import json
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import partialfc.convert
from partialfc.convert import convert

DIM = 96
#: The rows of two ranks: 2.9 MB on each of two, of which a checkpoint has blocks of 1 MiB.
RANKS = [np.random.default_rng(rank).standard_normal((rows, DIM), dtype=np.float32) for rank, rows in enumerate((10_000, 5_000))]
ALL = np.concatenate(RANKS)


def bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves, which is the nearest where the lower ones are zero."""
    return (values.view("<u4") >> 16).astype("<u2")


def safetensors(path, **tensors):
    """A file as the format's description has it, each tensor with the name of its type."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, values) in tensors.items():
        end = len(data) + values.nbytes
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), end]}
        data += values.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def loaded(checkpoint, **options):
    head = partialfc.Head(len(ALL), DIM, 4, **options)
    head.load(checkpoint)
    return head


def directions(values):
    return values / np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)


def exported_fvecs(path):
    records = np.fromfile(path, np.dtype([("dim", "<i4"), ("row", "<f4", (DIM,))]))
    assert (records["dim"] == DIM).all()
    return records["row"]


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(partialfc.convert, "_STAGED", 1_500_000)


@pytest.fixture
def checkpoint(tmp_path):
    """Of two files, each of several blocks."""
    comms = partialfc.Comm.threads(2)

    def save(rank):
        head = partialfc.Head(len(ALL), DIM, 4, comm=comms[rank])
        first, count = head.shard
        head.write_centers(ALL[first : first + count])
        head.save(tmp_path / "checkpoint")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(save, range(2)))
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("storage", [None, "rows"])
def test_files_of_ranks_become_a_checkpoint(tmp_path, storage):
    paths = [tmp_path / f"rank{rank}.npy" for rank in range(2)]
    for path, rows in zip(paths, RANKS):
        np.save(path, rows)
    told = []
    storage = storage and tmp_path / storage
    convert(paths, tmp_path / "checkpoint", storage=storage, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(ALL), len(ALL)) and told == sorted(told)
    head = loaded(tmp_path / "checkpoint")
    np.testing.assert_array_equal(head.read_centers(), ALL)
    assert not head.read_state().any() and head.read_progress() == (0, 0)
    assert storage is None or not list(storage.iterdir()), "the rows' file goes"


def test_types_and_optimizers(tmp_path):
    exact = (np.round(ALL * 8) / 8).astype(np.float32)
    files = {
        "half": ("F16", exact.astype(np.float16)),
        "brain": ("BF16", bf16(exact)),
        "single": ("F32", exact),
    }
    for name, tensor in files.items():
        path = safetensors(tmp_path / f"{name}.safetensors", bias=("F32", np.zeros(7, np.float32)), weight=tensor)
        convert([path], tmp_path / name, dtype="bf16", optimizer="adamw")
        head = loaded(tmp_path / name, weight_dtype="bf16", optimizer="adamw")
        np.testing.assert_array_equal(head.read_centers(), exact, err_msg=name)
        assert not head.read_state("second_moment").any()
    # A kernel of [d, C], transposed: its rows do not lie side by side.
    np.save(tmp_path / "double.npy", np.asfortranarray(exact.astype(np.float64)))
    convert([tmp_path / "double.npy"], tmp_path / "double")
    np.testing.assert_array_equal(loaded(tmp_path / "double").read_centers(), exact)


def test_what_torch_saved(tmp_path):
    torch = pytest.importorskip("torch")
    rows = torch.from_numpy(ALL)
    # insightface's, as examples/11_insightface writes it.
    checkpoint = {
        "global_step": 3,
        "state_dict_backbone": {"fc.weight": rows[:5], "fc.bias": rows[0]},
        "state_dict_softmax_fc": {"weight": rows.half(), "momentum": rows},
        "state_optimizer": {"state": {0: {"momentum_buffer": rows[:5]}}},
    }
    torch.save(checkpoint, tmp_path / "checkpoint_gpu_0.pt")
    convert([tmp_path / "checkpoint_gpu_0.pt"], tmp_path / "checkpoint")
    np.testing.assert_array_equal(loaded(tmp_path / "checkpoint").read_centers(), ALL.astype(np.float16))
    torch.save({"a": rows, "b": rows.T.contiguous().T}, tmp_path / "two.pt")
    for tensor in (None, "c"):
        with pytest.raises(ValueError, match="of two dimensions; it has a, b"):
            convert([tmp_path / "two.pt"], tmp_path / "other", tensor=tensor)
    convert([tmp_path / "two.pt"], tmp_path / "other", tensor="b")
    np.testing.assert_array_equal(loaded(tmp_path / "other").read_centers(), ALL)
    torch.save(rows.int(), tmp_path / "whole.pt")
    (tmp_path / "broken.pt").write_bytes((tmp_path / "two.pt").read_bytes()[:1000])
    for name, message in (("whole.pt", "torch.int32"), ("broken.pt", "no file that torch.load takes")):
        with pytest.raises(ValueError, match=message):
            convert([tmp_path / name], tmp_path / "more")


def test_a_checkpoints_centers_come_out_normalized(checkpoint, tmp_path):
    convert([checkpoint], tmp_path / "centers.npy")
    np.testing.assert_allclose(np.load(tmp_path / "centers.npy"), directions(ALL), rtol=1e-6)
    convert([checkpoint], tmp_path / "centers.fvecs")
    np.testing.assert_array_equal(exported_fvecs(tmp_path / "centers.fvecs"), np.load(tmp_path / "centers.npy"))
    convert([checkpoint], tmp_path / "raw.npy", raw=True)
    np.testing.assert_array_equal(np.load(tmp_path / "raw.npy"), ALL)


def test_a_checkpoint_in_bfloat16_comes_out_as_it_is_stored(checkpoint, tmp_path):
    head = loaded(checkpoint, weight_dtype="bf16")
    head.save(tmp_path / "narrow")
    convert([tmp_path / "narrow"], tmp_path / "raw.npy", raw=True)
    np.testing.assert_array_equal(np.load(tmp_path / "raw.npy"), head.read_centers())


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "at", "message"),
    [
        ("rows-1-1-of-2.safetensors", 4096, r"rows-1-1-of-2.safetensors: bytes 0 to 1048575 are not those that were written"),
        ("rows-1-0-of-2.safetensors", 2_100_000, r"bytes 2097152 to 3145727 are not those that were written"),
        ("rows-1-0-of-2.safetensors", -5, "checksums from byte"),
        ("rows-1-0-of-2.safetensors", 3, "would have"),
        ("manifest.json", 60, "manifest"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path, file, at, message):
    before = sorted(tmp_path.iterdir())
    flip(checkpoint / file, at)
    with pytest.raises(ValueError, match=message):
        convert([checkpoint], tmp_path / "centers.npy")
    assert sorted(tmp_path.iterdir()) == before, "nothing half done stays"


def test_what_cannot_be_converted_is_named(checkpoint, tmp_path):
    def refused(sources, target, message, **options):
        with pytest.raises((ValueError, partialfc.PartialFCError), match=message):
            convert(sources, target, **options)

    paths = {name: tmp_path / f"{name}.npy" for name in ("good", "flat", "narrow", "whole", "nan")}
    bad = ALL.copy()
    bad[3, 5] = np.nan
    for path, rows in zip(paths.values(), (ALL, ALL[0], ALL[:, :7], ALL.astype(np.int32), bad)):
        np.save(path, rows)
    out = tmp_path / "out"
    refused([paths["good"]], checkpoint, "has a checkpoint already")
    refused([paths["good"], paths["narrow"]], out, re.escape("dimension 7") + ".* of 96")
    refused([paths["flat"]], out, r"float32 of shape \(96,\)")
    refused([paths["whole"]], out, "int32")
    refused([paths["nan"]], out, r"row 3 \(class 3\) contains a NaN")
    refused([checkpoint, checkpoint], tmp_path / "a.npy", "2 sources")
    refused([tmp_path], tmp_path / "a.npy", "has no checkpoint")
    short = safetensors(tmp_path / "short.safetensors", weight=("F32", ALL))
    short.write_bytes(short.read_bytes()[:-1])
    refused([short], out, "cut short")
    (tmp_path / "no.safetensors").write_bytes(b"what?")
    refused([tmp_path / "no.safetensors"], out, "no safetensors file")
    ids = safetensors(tmp_path / "ids.safetensors", weight=("I64", np.zeros((2, 2), np.int64)))
    refused([ids], out, "is I64")
    zero = ALL.copy()
    zero[9600] = 0
    np.save(paths["good"], zero)
    convert([paths["good"]], tmp_path / "zero")
    refused([tmp_path / "zero"], tmp_path / "a.fvecs", "class 9600 has no direction")
    (tmp_path / "file").touch()
    refused([paths["good"]], tmp_path / "file", "file is a file")
    refused([checkpoint], tmp_path / "centers.f32", r"ends in .npy or .fvecs, and .*centers.f32 does not")
    refused([safetensors(tmp_path / "named.safetensors", a=("F32", ALL))], out, "must have a tensor 'b'", tensor="b")
    assert not (tmp_path / "a.fvecs").exists() and not list(out.glob("manifest.json"))


def test_the_command(tmp_path):
    np.save(tmp_path / "rank0.npy", RANKS[0])
    np.save(tmp_path / "rank1.npy", RANKS[1])

    def command(*words, code=0):
        words = [sys.executable, "-m", "partialfc", "convert", *words]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert command("rank0.npy", "rank1.npy", "checkpoint") == "checkpoint: 15,000 class centers\n"
    assert command("checkpoint", "centers.npy") == "centers.npy: 15,000 class centers\n"
    np.testing.assert_allclose(np.load(tmp_path / "centers.npy"), directions(ALL), rtol=1e-6)
    assert command("nowhere", "b.npy", code=1).startswith("python -m partialfc convert: nowhere has no checkpoint")
    assert "No such file" in command("nowhere.npy", "c", code=1)
