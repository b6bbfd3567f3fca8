"""Class centers of other trainers into a checkpoint, and those of a checkpoint out of it: `python -m partialfc convert`.

Rows move a few at a time, so that files may be larger than memory; of torch's files that is true of those that torch can map.
"""

import contextlib
import json
import math
import os
import pathlib
import struct
import tempfile
import typing
import zlib

import numpy as np

from .head import Head

#: Bytes of a checkpoint that have a checksum of their own.
_BLOCK = 1 << 20
#: Bytes of rows that are on their way at a time.
_STAGED = 16 << 20
_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_SUFFIXES = (".npy", ".fvecs")
#: What class centers are called: by torch's modules, and in insightface's checkpoint_gpu_0.pt.
_USUAL = ("weight", "state_dict_softmax_fc.weight")


def convert(sources, target, *, tensor=None, dtype="f32", optimizer="sgd", storage=None, raw=False, progress=None):
    """Writes the class centers of files to a checkpoint, or, if the target is a .npy or .fvecs file, those of a checkpoint to it.

    Args:
        sources: the files of the ranks, in their order, of which the classes follow each other: .npy, .safetensors, or what
            torch.save wrote, which needs torch; or one checkpoint.
        target: the directory of a checkpoint that is not there yet; or a .npy file of (C, d) float32; or a .fvecs file, which
            has for each row its d as int32 and then d float32, as search indices read it. A file that is there is replaced.
        tensor: the name of the tensor in a .safetensors file or in a dictionary that torch.save wrote, with points between the
            names of dictionaries within dictionaries. None: "weight", or insightface's "state_dict_softmax_fc.weight", or the
            file's only tensor of two dimensions.
        dtype: of the checkpoint's class centers and optimizer state, f32 or bf16.
        optimizer: of the checkpoint; its state is zero.
        storage: a directory for rows that are larger than memory; None: they are in memory.
        raw: writes the rows of a checkpoint as they are, and not their directions.
        progress: called with the rows that are done and how many there are.

    Raises:
        ValueError: a file that is not what its name says, or of another dimension than those before it; a class center that
            has no direction.
        PartialFCError: what the library refuses.
    """
    tell = progress if progress is not None else lambda done, total: None
    sources, target = [pathlib.Path(source) for source in sources], pathlib.Path(target)
    if target.suffix in _SUFFIXES:
        if len(sources) != 1:
            raise ValueError(f"{len(sources)} sources for {target}: that takes one, the directory of a checkpoint")
        _export(sources[0], target, raw, tell)
    else:
        _import(sources, target, tensor, {"weight_dtype": dtype, "state_dtype": dtype, "optimizer": optimizer}, storage, tell)


def _import(sources, target, tensor, options, storage, tell):
    if (target / "manifest.json").exists():
        raise ValueError(f"{target} has a checkpoint already; choose another directory")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; the last name is that of the checkpoint's directory")
    if any(source.is_dir() for source in sources):
        raise ValueError(f"the target of a checkpoint is a file that ends in {' or '.join(_SUFFIXES)}, and {target} does not")
    files = [_open(source, tensor) for source in sources]
    if not files:
        raise ValueError("there is no source")
    dim = files[0].shape[1]
    for source, file in zip(sources, files):
        if file.shape[1] != dim or dim == 0:
            raise ValueError(f"{source} has rows of dimension {file.shape[1]}, and {sources[0]} of {dim}")
    total, at_once = sum(file.shape[0] for file in files), max(1, _STAGED // (4 * dim))
    with contextlib.ExitStack() as stack:
        if storage is not None:
            os.makedirs(storage, exist_ok=True)
            rows = stack.enter_context(tempfile.TemporaryDirectory(prefix="convert-", dir=storage))
            options = {**options, "residency": "file", "storage_path": rows}
        head = Head(total, dim, 1, sample_rate=0.0, **options)
        stack.callback(head.close)
        first = 0
        for file in files:
            for begin in range(0, file.shape[0], at_once):
                part = _floats(file[begin : begin + at_once])
                head.write_centers(part, first)
                first += len(part)
                tell(first, total)
        head.save(target)


def _floats(rows):
    """Rows as float32. bfloat16, here as uint16, is its upper half."""
    if rows.dtype == _DTYPES["BF16"]:
        return (rows.astype("<u4") << 16).view("<f4")
    return np.array(rows, np.float32, order="C")


def _open(path, tensor):
    """The rows of a file, (count, d), read as they are asked for."""
    if path.suffix == ".npy":
        rows = np.load(path, mmap_mode="r")
        kinds = (np.float16, np.float32, np.float64)
    elif path.suffix == ".safetensors":
        rows = _tensors(path, tensor)
        kinds = tuple(_DTYPES.values())
    else:
        return _TorchRows(path, tensor)
    if rows.ndim != 2 or rows.dtype not in kinds:
        raise ValueError(f"{path} has {rows.dtype} of shape {rows.shape}; it must be floating-point numbers of two dimensions")
    return rows


class _Tensor(typing.NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: list
    data_offsets: list


def _header(file, path):
    """The tensors of a safetensors file, and where their bytes begin."""
    (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    if not 2 <= length <= os.path.getsize(path) - 8:
        raise ValueError(f"{path} is no safetensors file: its header would have {length} bytes")
    try:
        header = json.loads(file.read(length))
        tensors = {name: _Tensor(**entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    return tensors, 8 + length


def _choose(path, shapes, tensor):
    """The name of the tensor with the class centers."""
    tables = [name for name, shape in shapes.items() if len(shape) == 2]
    if tensor is not None:
        candidates = [name for name in tables if name == tensor]
    else:
        candidates = next(([name] for name in _USUAL if name in tables), tables)
    if len(candidates) != 1:
        wanted = "one tensor" if tensor is None else f"a tensor {tensor!r}"
        raise ValueError(f"{path} must have {wanted} of two dimensions; it has {', '.join(tables) or 'none'}")
    return candidates[0]


def _tensors(path, tensor):
    with path.open("rb") as file:
        header, begin = _header(file, path)
    name = _choose(path, {name: entry.shape for name, entry in header.items()}, tensor)
    entry = header[name]
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise ValueError(f"{path}: tensor {name!r} is {entry.dtype}; it must be {', '.join(_DTYPES)}")
    first, last = entry.data_offsets
    if last - first != dtype.itemsize * math.prod(entry.shape) or begin + last > os.path.getsize(path):
        raise ValueError(f"{path} is cut short, or is no safetensors file: tensor {name!r} is not whole")
    return np.memmap(path, dtype, "r", begin + first, tuple(entry.shape))


class _TorchRows:
    """The rows of a file that torch.save wrote; a slice of them is float32."""

    def __init__(self, path, tensor):
        try:
            import torch
        except ImportError:
            raise ValueError(f"{path} is no .npy or .safetensors file, and torch, which may read it, is not installed") from None
        try:
            loaded = _load(torch, str(path))
        except OSError:
            raise
        except Exception as error:  # Of pickle, of zip files, of torch.
            raise ValueError(f"{path} is no file that torch.load takes with weights_only: {error}") from error
        if not isinstance(loaded, torch.Tensor):
            found = {name: value for name, value in _flat(loaded) if isinstance(value, torch.Tensor)}
            loaded = found[_choose(path, {name: value.shape for name, value in found.items()}, tensor)]
        if loaded.ndim != 2 or not loaded.is_floating_point():
            raise ValueError(f"{path} has {loaded.dtype} of shape {tuple(loaded.shape)}; it must be floating-point numbers of two dimensions")
        self.rows, self.shape = loaded.detach(), tuple(loaded.shape)

    def __getitem__(self, part):
        return self.rows[part].float().numpy()


def _load(torch, path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # What torch cannot map, of before its version 1.6.
        return torch.load(path, map_location="cpu", weights_only=True)


def _flat(tree, prefix=""):
    """The leaves of dictionaries within dictionaries, by their names with points between."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _export(checkpoint, target, raw, tell):
    manifest = _manifest(checkpoint)
    classes, dim = manifest["num_classes"], manifest["embedding_dim"]
    unfinished = target.with_name(target.name + ".unfinished")
    try:
        # Written, not mapped: a full disk is an error then, and not a signal.
        with unfinished.open("wb") as file:
            if target.suffix == ".npy":
                header = {"descr": "<f4", "fortran_order": False, "shape": (classes, dim)}
                np.lib.format.write_array_header_1_0(file, header)
            done = 0
            for named in manifest["files"]:
                for rows in _rows(checkpoint / named["name"], named, dim):
                    if not raw:
                        _normalize(rows, done)
                    file.write(rows if target.suffix == ".npy" else _records(rows))
                    done += len(rows)
                    tell(done, classes)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _records(rows):
    """Rows of a .fvecs file."""
    records = np.empty(len(rows), np.dtype([("dim", "<i4"), ("row", "<f4", rows.shape[1:])]))
    records["dim"], records["row"] = rows.shape[1], rows
    return records


def _normalize(rows, first):
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    without = ~(np.isfinite(norms) & (norms > 0))
    if without.any():
        raise ValueError(f"class {first + int(np.argmax(without))} has no direction: its class center is zero or not finite")
    np.divide(rows, norms, out=rows, casting="unsafe")


def _manifest(checkpoint):
    path = checkpoint / "manifest.json"
    if not path.exists():
        raise ValueError(f"{checkpoint} has no checkpoint: there is no {path}")
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        manifest = sealed["manifest"]
        formats = manifest["format"]
        compact = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False).encode()
        whole = zlib.crc32(compact) == sealed["crc32"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of a checkpoint: {error!r}") from error
    if formats not in (1, 2):
        raise ValueError(f"{path}: the checkpoint has format {formats}; this version reads formats 1 and 2")
    if not whole:
        raise ValueError(f"{path}: the manifest is not the one that was written")
    return manifest


def _rows(path, named, dim):
    """The class centers of one of a checkpoint's files, a few at a time, after a check of the blocks that they are in."""
    with path.open("rb") as file:
        header, begin = _header(file, path)
        weight, checksums_at = header.get("weight"), header.get("checksums")
        if weight is None or checksums_at is None or weight.shape != [named["rows"], dim] or weight.dtype not in _DTYPES:
            raise ValueError(f"{path} is no file of this checkpoint's rows")
        dtype, checked = _DTYPES[weight.dtype], begin + checksums_at.data_offsets[0]
        file.seek(checked)
        checksums = file.read()
        if zlib.crc32(checksums) != named["checksums_crc32"]:
            raise ValueError(f"{path}: the checksums from byte {checked} on are not those that were written")
        file.seek(0)
        first, last = (begin + offset for offset in weight.data_offsets)
        row, staged = dtype.itemsize * dim, bytearray()
        for number, (expected,) in enumerate(struct.iter_unpack("<I", checksums)):
            at = number * _BLOCK
            if at >= last:
                break
            block = file.read(min(_BLOCK, checked - at))
            if zlib.crc32(block) != expected:
                raise ValueError(f"{path}: bytes {at} to {at + len(block) - 1} are not those that were written")
            staged += block[max(0, first - at) : last - at]
            whole = len(staged) // row * row
            if whole >= _STAGED or at + len(block) >= last:
                yield _floats(np.frombuffer(bytes(staged[:whole]), dtype).reshape(-1, dim))
                del staged[:whole]
