"""Devices: where the rows of a head live and where it computes."""

import ctypes

from ._handles import Handle
from ._library import check, lib


class Device(Handle):
    """A CPU or a GPU. `Device.cpu()` and `Device.cuda()` make one."""

    _what = "device"
    _free = "pfc_device_free"

    #: The GPU's number, or None for a CPU.
    ordinal: int | None
    #: The CUDA stream that the device was made with; 0 is the legacy default stream.
    stream: int

    def __init__(self, address: ctypes.c_void_p, ordinal: int | None, stream: int):
        self._own(address)
        self.ordinal = ordinal
        self.stream = stream

    @classmethod
    def cpu(cls, threads: int = 0) -> "Device":
        """A CPU with its own pool of threads. Results have the same bits with any number of them.

        Args:
            threads: computing threads, 0 to 4096, the calling one among them; 0: one for each core that the
                process may use.
        """
        out = ctypes.c_void_p()
        check(lib.pfc_device_cpu(_uint32("threads", threads), ctypes.byref(out)))
        return cls(out, None, 0)

    @classmethod
    def cuda(cls, ordinal: int = 0, stream: int = 0) -> "Device":
        """A GPU, on a stream of the caller's and in its context.

        Args:
            ordinal: the GPU, as the CUDA driver numbers it.
            stream: a cudaStream_t as a number, such as `torch.cuda.current_stream().cuda_stream`; it must
                outlive the device. 0: the legacy default stream.

        Raises:
            PartialFCError: UNSUPPORTED without a driver, with one older than 525 or than the nvcc that built the kernels, or in a build without
                kernels for this GPU.
        """
        out = ctypes.c_void_p()
        check(lib.pfc_device_cuda(ordinal, stream or None, ctypes.byref(out)))
        return cls(out, ordinal, stream)

    @property
    def info(self) -> str:
        """One line, such as "cpu: 2 threads, avx512"."""
        return lib.pfc_device_info(self._address).decode()

    def __repr__(self) -> str:
        return "<partialfc.Device, closed>" if self.closed else f"<partialfc.Device {self.info}>"


def _uint32(name: str, value: int) -> int:
    """ctypes would cut a number that does not fit."""
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must be 0 to 4294967295, got {value}")
    return value
