"""The calls that save a head and load it: their options, and functions of the caller's within them."""

import ctypes
import os

import numpy as np

from . import _abi
from ._library import PartialFCError, check, lib


def save(head, directory, progress) -> None:
    _call(head, lib.pfc_head_save, _options(_abi.pfc_save_options, lib.pfc_save_options_init_sized), directory, progress, None)


def load(head, directory, progress, class_map) -> None:
    _call(head, lib.pfc_head_load, _options(_abi.pfc_load_options, lib.pfc_load_options_init_sized), directory, progress, class_map)


def _options(kind, init):
    options = kind()
    check(init(ctypes.byref(options), ctypes.sizeof(options)))
    return options


def _call(head, function, options, directory, progress, class_map) -> None:
    raised, at = [], head._reader.at

    def tell(_user, done, total):
        try:
            if not raised:
                progress(done, total)
        except BaseException as error:  # ctypes would only print it.
            raised.append(error)

    try:
        path = os.fsencode(directory)
        if b"\0" in path:
            raise ValueError(f"directory is {directory!r}{at}; a path has no zero byte")
        if progress is not None:
            if not callable(progress):
                raise TypeError(f"progress is a {type(progress).__name__}{at}; it must be a function of two numbers")
            options.progress = type(options.progress)(tell)
        if class_map is not None:
            table = np.ascontiguousarray(class_map)
            if table.ndim != 1 or table.dtype.kind not in "iu":
                raise TypeError(f"class_map is {table.dtype} of shape {table.shape}{at}; it must be a vector of integers")
            table = table.astype(np.int64, copy=False)
            options.class_map = table.ctypes.data
            options.class_map_count = len(table)
    except BaseException:  # Also of the path's own __fspath__: no rank may wait.
        head._refuse(function, None, None)
        raise
    try:
        head._call(function, path, ctypes.byref(options), later=progress is not None)
    except PartialFCError as error:
        if not raised:
            raise
        if not isinstance(raised[0], Exception):  # SystemExit.
            raise raised[0] from error
        raise error from raised[0]
    if raised:
        raise raised[0]
