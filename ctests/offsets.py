"""Prints where ctypes has every field of every struct, as offsets.c does for C.

offsets.py python/partialfc/_abi.py fields.inc
"""

import ctypes
import re
import runpy
import sys

declarations = runpy.run_path(sys.argv[1])
with open(sys.argv[2], encoding="ascii") as requests:
    for kind, struct, field in re.findall(r"(\w+)\((\w+)(?:, (\w+))?\)", requests.read()):
        if kind == "STRUCT":
            print(struct, ctypes.sizeof(declarations[struct]))
        else:
            descriptor = getattr(declarations[struct], field)
            print(f"{struct}.{field} {descriptor.offset} {descriptor.size}")
