"""The calls that move all rows of a head, to and from a directory or to other classes: their options, and a function of the caller's."""

import ctypes
import operator
import os

import numpy as np

from . import _abi
from ._library import PartialFCError, check, lib


def save(head, directory, progress) -> None:
    options = _options(_abi.pfc_save_options, lib.pfc_save_options_init_sized)
    _call(head, lib.pfc_head_save, options, progress, (None,), lambda _hold: (_path(head, directory),))


def save_start(head, directory, progress) -> None:
    options = _options(_abi.pfc_save_options, lib.pfc_save_options_init_sized)
    _call(head, lib.pfc_head_save_start, options, progress, (None,), lambda _hold: (_path(head, directory),))


def save_poll(head, progress) -> bool:
    options = _options(_abi.pfc_save_options, lib.pfc_save_options_init_sized)
    done = ctypes.c_int32()
    _call(head, lib.pfc_head_save_poll, options, progress, (None,), lambda _hold: (ctypes.byref(done),))
    return bool(done.value)


def load(head, directory, progress, class_map, class_weights) -> None:
    options = _options(_abi.pfc_load_options, lib.pfc_load_options_init_sized)

    def arguments(hold):
        path = _path(head, directory)
        if class_map is not None:
            table = _vector(head, class_map, "class_map", np.int64, "iu", "integers")
            options.class_map, options.class_map_count = hold(table), len(table)
        _weigh(head, options, class_weights, hold)
        return (path,)

    _call(head, lib.pfc_head_load, options, progress, (None,), arguments)


def resize(head, num_classes, progress) -> None:
    options = _options(_abi.pfc_remap_options, lib.pfc_remap_options_init_sized)
    _call(head, lib.pfc_head_resize, options, progress, (0,), lambda _hold: (_count(head, num_classes),), head._has_classes)


def remap(head, class_map, num_classes, progress, class_weights) -> None:
    options = _options(_abi.pfc_remap_options, lib.pfc_remap_options_init_sized)

    def arguments(hold):
        table = _vector(head, class_map, "class_map", np.int64, "iu", "integers")
        classes = int(table.max(initial=-1)) + 1 if num_classes is None else _count(head, num_classes)
        _weigh(head, options, class_weights, hold)
        return classes, hold(table), len(table)

    _call(head, lib.pfc_head_remap, options, progress, (0, None, 0), arguments, lambda classes, *_: head._has_classes(classes))


def merge(head, pairs, progress, class_weights) -> np.ndarray:
    options = _options(_abi.pfc_remap_options, lib.pfc_remap_options_init_sized)
    class_map = np.empty(head.num_classes, np.int64)

    def arguments(hold):
        table = np.asarray(list(pairs.items()) if hasattr(pairs, "items") else pairs)
        table = table.reshape(-1, 2).astype(np.int64) if table.size == 0 else table
        if table.ndim != 2 or table.shape[1] != 2 or table.dtype.kind not in "iu":
            raise TypeError(
                f"pairs is {table.dtype} of shape {table.shape}{head._reader.at}; it must be pairs of classes: which goes, into which"
            )
        from_, into = (np.ascontiguousarray(table[:, side], np.int64) for side in (0, 1))
        _weigh(head, options, class_weights, hold)
        return hold(from_), hold(into), len(table), class_map.ctypes.data, len(class_map)

    _call(head, lib.pfc_head_merge, options, progress, (None, None, 1, None, 0), arguments, lambda *_: head._has_classes(class_map.max() + 1))
    return class_map


def _options(kind, init):
    options = kind()
    check(init(ctypes.byref(options), ctypes.sizeof(options)))
    return options


def _count(head, num_classes) -> int:
    count = operator.index(num_classes)
    if not 0 <= count < 2**64:
        raise ValueError(f"num_classes is {count}{head._reader.at}; it must be a number of classes")
    return count


def _path(head, directory) -> bytes:
    path = os.fsencode(directory)
    if b"\0" in path:
        raise ValueError(f"directory is {directory!r}{head._reader.at}; a path has no zero byte")
    return path


def _vector(head, values, name: str, dtype, kinds: str, what: str) -> np.ndarray:
    vector = np.ascontiguousarray(values)
    if vector.ndim != 1 or vector.dtype.kind not in kinds:
        raise TypeError(f"{name} is {vector.dtype} of shape {vector.shape}{head._reader.at}; it must be a vector of {what}")
    return vector.astype(dtype, copy=False)


def _weigh(head, options, class_weights, hold) -> None:
    if class_weights is not None:
        weights = _vector(head, class_weights, "class_weights", np.float32, "iuf", "numbers")
        options.class_weights, options.class_weights_count = hold(weights), len(weights)


def _call(head, function, options, progress, none, arguments, done=lambda *_: None) -> None:
    """Calls a function with what `arguments` gives, and the options behind it. Where that raises, with `none`: no rank may wait.

    `arguments` is given a function that keeps an array until the call is over, and gives its address. `done` is called with the arguments
    where the library has succeeded, whatever `progress` has raised.
    """
    raised, held, at = [], [], head._reader.at

    def hold(array):
        held.append(array)
        return array.ctypes.data

    def tell(_user, done, total):
        try:
            if not raised:
                progress(done, total)
        except BaseException as error:  # ctypes would only print it.
            raised.append(error)

    try:
        given = arguments(hold)
        if progress is not None:
            if not callable(progress):
                raise TypeError(f"progress is a {type(progress).__name__}{at}; it must be a function of two numbers")
            options.progress = type(options.progress)(tell)
    except BaseException:  # Also of a path's own __fspath__.
        head._refuse(function, *none, None)
        raise
    try:
        head._call(function, *given, ctypes.byref(options), later=progress is not None)
    except PartialFCError as error:
        if not raised:
            raise
        if not isinstance(raised[0], Exception):  # SystemExit.
            raise raised[0] from error
        raise error from raised[0]
    done(*given)
    if raised:
        raise raised[0]
