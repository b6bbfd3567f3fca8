"""Arrays of NumPy, torch, `__cuda_array_interface__` and DLPack as the library's matrices, without copies."""

import ctypes
import math
import sys

import numpy as np

from . import _abi, _dlpack

_NAMES = {
    _abi.PFC_F32: "float32",
    _abi.PFC_F16: "float16",
    _abi.PFC_BF16: "bfloat16",
    _abi.PFC_F64: "float64",
    _abi.PFC_I32: "int32",
    _abi.PFC_I64: "int64",
}
_CODES = {name: code for code, name in _NAMES.items()}
_SIZES = {
    _abi.PFC_F32: 4,
    _abi.PFC_F16: 2,
    _abi.PFC_BF16: 2,
    _abi.PFC_F64: 8,
    _abi.PFC_I32: 4,
    _abi.PFC_I64: 8,
}
#: Of a matrix of embeddings, gradients or class centers.
FLOATS = (_abi.PFC_F32, _abi.PFC_F16, _abi.PFC_BF16)
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}

_numpy_codes = {np.dtype(name): _CODES[name] for name in ("float32", "float16", "float64", "int32", "int64")}
_torch_codes: dict = {}
#: torch.Tensor, once one has been seen: the package does not import torch.
_Tensor = _strided = None


class View:
    """Where an array lies. `strides` are in elements; `place` is None for host memory, else a GPU's number."""

    __slots__ = ("address", "code", "dtype", "place", "readonly", "shape", "source", "strides")

    def __init__(self, address, code, dtype, shape, strides, place, readonly, source):
        self.address = address
        self.code = code
        self.dtype = dtype
        self.shape = shape
        self.strides = strides
        self.place = place
        self.readonly = readonly
        #: Keeps the memory.
        self.source = source

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * _SIZES[self.code]


def _of_torch(torch, x) -> View:
    global _Tensor, _strided
    if _Tensor is None:
        _Tensor, _strided = torch.Tensor, torch.strided
        _torch_codes.update((getattr(torch, name), code) for name, code in _CODES.items())
    if x.layout is not torch.strided:
        raise TypeError(f"is a tensor of layout {x.layout}; it must be torch.strided")
    kind = x.device.type
    if kind not in ("cpu", "cuda"):
        raise TypeError(f"is on device {x.device}")
    place = None if kind == "cpu" else x.device.index
    return View(x.data_ptr(), _torch_codes.get(x.dtype), x.dtype, x.shape, x.stride(), place, False, x)


def _of_numpy(x: np.ndarray) -> View:
    address, readonly = x.__array_interface__["data"]
    dtype = x.dtype
    code = _numpy_codes.get(dtype)
    if code is None and dtype.name == "bfloat16":
        code = _abi.PFC_BF16
    return View(address, code, dtype, x.shape, _elements(x.strides, dtype.itemsize), None, readonly, x)


def _elements(strides, size):
    """Strides in elements; None where one is no whole number of them."""
    return tuple(stride // size if stride % size == 0 else None for stride in strides)


def _fill(matrix: _abi.pfc_matrix, address: int, code: int, rows: int, cols: int, stride: int) -> None:
    matrix.data = address
    matrix.dtype = code
    matrix.rows = rows
    matrix.cols = cols
    matrix.row_stride = stride
    #: Keeps what DLPack lent.
    matrix.source = None


def _contiguous(shape):
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def _of_cuda_array(x, interface: dict, stream: int) -> View:
    dtype = np.dtype(interface["typestr"])
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    address, readonly = interface["data"]
    other = interface.get("stream")
    if other == 0:
        raise TypeError("names stream 0 in its __cuda_array_interface__, which that forbids")
    if other is not None and other != stream:
        _synchronize(other)
    strides = _contiguous(shape) if strides is None else _elements(strides, dtype.itemsize)
    return View(address, _numpy_codes.get(dtype), dtype, shape, strides, _ordinal(address), readonly, x)


def _driver():
    return ctypes.CDLL("libcuda.so.1")


def _synchronize(stream: int) -> None:
    """Waits for what another library has enqueued on its stream."""
    if _driver().cuStreamSynchronize(ctypes.c_void_p(stream)) != 0:
        raise RuntimeError(f"stream {stream:#x} of its __cuda_array_interface__ does not synchronize")


def _ordinal(address: int) -> int:
    """The GPU that memory is of."""
    ordinal = ctypes.c_int(0)
    device_ordinal = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    try:
        _driver().cuPointerGetAttribute(ctypes.byref(ordinal), device_ordinal, ctypes.c_uint64(address or 0))
    except OSError:
        pass  # No driver: the library says so, in its own words.
    return ordinal.value


def _of_dlpack(x, stream: int) -> View:
    kind, index = x.__dlpack_device__()
    on_gpu = int(kind) in (_dlpack.CUDA, _dlpack.CUDA_MANAGED)
    if not on_gpu and int(kind) not in (_dlpack.CPU, _dlpack.CUDA_HOST):
        raise TypeError(f"is on DLPack device type {int(kind)}")
    tensor, readonly, capsule = _dlpack.read(x, stream if on_gpu else None)
    code = tensor.dtype
    name = f"{_DLPACK_KINDS.get(code.code, code.code)}{code.bits}"
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else _contiguous(shape)
    address = (tensor.data or 0) + tensor.byte_offset
    known = _CODES.get(name) if code.lanes == 1 else None
    return View(address, known, name, shape, strides, index if on_gpu else None, readonly, (x, capsule))


class Reader:
    """Reads the arguments of one rank on one device; its errors name the argument, what it is, and the rank."""

    def __init__(self, rank: int, ordinal: int | None, stream: int):
        #: For messages.
        self.at = f" on rank {rank}"
        self.ordinal = ordinal
        #: As DLPack counts them: 1 is the legacy default stream.
        self.stream = stream or 1

    def view(self, x, name: str) -> View:
        torch = sys.modules.get("torch")
        try:
            if torch is not None and isinstance(x, torch.Tensor):
                view = _of_torch(torch, x)
            elif isinstance(x, np.ndarray):
                view = _of_numpy(x)
            elif (interface := getattr(x, "__cuda_array_interface__", None)) is not None:
                view = _of_cuda_array(x, interface, self.stream)
            elif hasattr(x, "__dlpack__"):
                view = _of_dlpack(x, self.stream)
            else:
                raise TypeError(f"is a {type(x).__name__}; it must be an array of NumPy, torch, or one with DLPack")
        except (TypeError, BufferError) as error:
            raise TypeError(f"{name} {error}{self.at}") from error
        if view.place is not None and view.place != self.ordinal:
            mine = "the CPU" if self.ordinal is None else f"GPU {self.ordinal}"
            raise TypeError(f"{name} is in the memory of GPU {view.place}{self.at}; this head is on {mine}")
        return view

    def matrix(self, x, name: str, cols: int, target: _abi.pfc_matrix, codes=FLOATS, write: bool = False) -> int:
        """Fills `target` with a matrix of the caller's, who keeps its memory. The number of its rows."""
        known = self._known(x, write)
        if known is not None:
            address, code, shape = known
            if len(shape) == 2 and shape[1] == cols and code in codes:
                _fill(target, address, code, shape[0], cols, cols)
                return shape[0]
        return self._matrix(x, name, cols, target, codes, write)

    def _known(self, x, write: bool):
        """(address, code, shape) of a contiguous array of the kinds that loops have, in the shortest time; or None."""
        kind = type(x)
        if kind is np.ndarray:
            if x.flags.c_contiguous:
                address, readonly = x.__array_interface__["data"]
                if not (write and readonly):
                    return address, _numpy_codes.get(x.dtype), x.shape
        elif kind is _Tensor and x.layout is _strided and x.is_contiguous() and self._here(x):
            if not (write and x.requires_grad):
                return x.data_ptr(), _torch_codes.get(x.dtype), x.shape
        return None

    def _here(self, tensor) -> bool:
        ordinal = self.ordinal
        return tensor.is_cpu if ordinal is None else tensor.is_cuda and tensor.get_device() == ordinal

    def _matrix(self, x, name, cols, target, codes, write) -> int:
        view = self.view(x, name)
        if view.code not in codes:
            wanted = " or ".join(_NAMES[code] for code in codes)
            raise TypeError(f"{name} is {view.dtype}{self.at}; it must be {wanted}")
        if len(view.shape) != 2 or view.shape[1] != cols:
            raise ValueError(f"{name} has shape {tuple(view.shape)}{self.at}; it must be (rows, {cols})")
        if write:
            self._writable(x, view, name)
        rows = view.shape[0]
        stride, step = view.strides
        if rows and cols > 1 and step != 1:
            raise ValueError(f"{name} has rows that are not contiguous{self.at}: from one element to the next are {step}, must be 1")
        if rows <= 1:
            stride = cols
        elif stride is None or stride < cols:
            raise ValueError(f"{name} has a stride of {stride} elements from row to row{self.at}; it must be {cols} or more")
        _fill(target, view.address, view.code, rows, cols, stride)
        target.source = view.source
        return rows

    def vector(self, x, name: str, count: int | None = None):
        """The address and the length of a contiguous int64 vector, or of a matrix of one column, as loaders give
        labels; and what keeps its memory."""
        known = self._known(x, False)
        if known is not None:
            address, code, shape = known
            if len(shape) == 1 and code == _abi.PFC_I64 and (count is None or shape[0] == count):
                return address, shape[0], x
        view = self.view(x, name)
        if view.code != _abi.PFC_I64:
            raise TypeError(f"{name} is {view.dtype}{self.at}; it must be int64")
        shape = view.shape
        if len(shape) != 1 and not (len(shape) == 2 and shape[1] == 1):
            raise ValueError(f"{name} has shape {tuple(shape)}{self.at}; it must be (rows,) or (rows, 1)")
        if count is not None and shape[0] != count:
            raise ValueError(f"{name} has {shape[0]} rows{self.at}; it must have {count}")
        if shape[0] > 1 and view.strides[0] != 1:
            raise ValueError(f"{name} is not contiguous{self.at}: from one element to the next are {view.strides[0]}, must be 1")
        return view.address, shape[0], view.source

    def flat(self, x, name: str, codes=None, code: int | None = None, count: int | None = None, write: bool = False) -> View:
        """A contiguous array of any shape, as its elements."""
        view = self.view(x, name)
        codes = (code,) if code is not None else codes or tuple(_NAMES)
        if view.code not in codes:
            raise TypeError(f"{name} is {view.dtype}{self.at}; it must be {' or '.join(_NAMES[code] for code in codes)}")
        shape = tuple(view.shape)
        if 0 not in shape and not _same_memory(shape, view.strides):
            raise ValueError(f"{name} is not contiguous{self.at}")
        if count is not None and view.count != count:
            raise ValueError(f"{name} has {view.count} elements{self.at}; it must have {count}")
        if write:
            self._writable(x, view, name)
        return view

    def block(self, x, name: str, shape: tuple, code: int, write: bool = True) -> View:
        """A contiguous matrix."""
        view = self.view(x, name)
        if view.code != code:
            raise TypeError(f"{name} is {view.dtype}{self.at}; it must be {_NAMES[code]}")
        if tuple(view.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(view.shape)}{self.at}; it must be {shape}")
        if 0 not in shape and not _same_memory(shape, view.strides):
            raise ValueError(f"{name} is not contiguous{self.at}")
        if write:
            self._writable(x, view, name)
        return view

    def _writable(self, x, view: View, name: str) -> None:
        if view.readonly:
            raise ValueError(f"{name} is read-only{self.at}")
        if getattr(x, "requires_grad", False):
            raise ValueError(f"{name} requires a gradient{self.at}, so it cannot be written to; detach() it")


def _same_memory(shape, strides) -> bool:
    """Whether strides are contiguous but for axes of one element, whose stride means nothing."""
    return all(extent == 1 or stride == step for extent, stride, step in zip(shape, strides, _contiguous(shape)))


def like(x, shape: tuple, name: str):
    """A new array of x's kind, place and type, or of the type `name`, such as "float32"."""
    if isinstance(x, np.ndarray):
        return np.empty(shape, x.dtype if name is None else name)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return torch.empty(shape, dtype=x.dtype if name is None else getattr(torch, name), device=x.device)
    namespace = getattr(x, "__array_namespace__", None)
    if namespace is None:
        raise TypeError(f"a {type(x).__name__} does not say how to make one more; give the array to write to")
    namespace = namespace()
    return namespace.empty(shape, dtype=x.dtype if name is None else getattr(namespace, name), device=x.device)
