"""Prints where ctypes has every field of every struct, and the values of constants, as tests/capi/abi has them of Rust.

layouts.py python/partialfc/_abi.py names.txt
"""

import ctypes
import runpy
import sys

declarations = runpy.run_path(sys.argv[1])
with open(sys.argv[2], encoding="ascii") as names:
    for line in names:
        kind, name = line.split()
        struct, _, field = name.partition(".")
        if kind == "struct":
            print(kind, name, ctypes.sizeof(declarations[name]))
        elif kind == "field":
            descriptor = getattr(declarations[struct], field)
            print(kind, name, descriptor.offset, descriptor.size)
        else:
            print(kind, name, declarations[name])
