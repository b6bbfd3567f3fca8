"""The main loop of a kernel, as its machine code has it, and a model of how fast an SM can run it. kernels/gates reads it.

The main loop is the innermost loop with tensor instructions (HMMA). The model takes an SM as four things that work side by side, and
the loop as long as the one that it keeps busy longest:

  tensor  floating-point operations of HMMA, at the rate of mma.sync
  shared  bytes that ldmatrix (LDSM), loads and stores (LDS, STS) and the fill by cp.async (LDGSTS) move through shared memory
  L2      bytes of the fill, which come from the second-level cache
  issue   all instructions, four a clock

All are counted for one warp and one turn of the loop: the number of warps does not change the model. It leaves out latencies, barriers,
bank conflicts and the clock under load, so that it is a limit and no prediction. Instructions that branches or predicates skip are
counted as if they ran, but for those that never run (@!PT).
"""

import collections
import re

FUNCTION = re.compile(r"\s*Function : (\S+)")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
TARGET = re.compile(r"(?:^|[\s,])0x([0-9a-f]+)\s*$")
LANES = 32

# Bytes a clock of an SM's shared memory: 32 banks of 4 (CUDA C++ programming guide, compute capabilities 8.x and 9.0).
SHARED_BYTES = 128
# Instructions a clock of an SM: one for each of its four schedulers (the same).
ISSUED = 4

Rates = collections.namedtuple("Rates", "tensor l2")
# For an SM and clock: operations of mma.sync with 16-bit operands and float32 sums, and bytes from the second-level cache.
RATES = {
    # A100's white paper: 1024 multiply-adds; the cache's 5120 bytes a clock, for 108 SMs.
    "80": Rates(2048, 5120 / 108),
    # H100's white paper: 4096 by wgmma. Of that mma.sync reaches 63 to 65 % (arXiv 2501.12084, measured). The cache: DeepGEMM's
    # heuristics (csrc/jit_kernels/heuristics/sm90.hpp) take 6154 bytes a clock for 132 SMs, which is their estimate.
    "90a": Rates(0.63 * 4096, 6154 / 132),
}

Instruction = collections.namedtuple("Instruction", "address runs opcode operands")


def functions(text):
    """Each function's instructions, of what `cuobjdump -sass` writes."""
    found, current = {}, None
    for line in text.splitlines():
        function = FUNCTION.match(line)
        if function:
            current = found.setdefault(function[1], [])
            continue
        match = INSTRUCTION.match(line)
        if match and current is not None:
            address, predicate, opcode, operands = match.groups()
            current.append(Instruction(int(address, 16), predicate != "!PT", opcode, operands.strip()))
    return found


def operations(opcode):
    """Floating-point operations of a tensor instruction of a warp: HMMA.16816 multiplies 16 x 16 by 16 x 8 values."""
    shape = re.match(r"HMMA\.16(8)(8|16)\b", opcode)
    if not shape:
        raise ValueError(f"a shape of HMMA that the model does not know: {opcode}")
    return 2 * 16 * int(shape[1]) * int(shape[2])


def width(opcode):
    """Bytes that a lane moves."""
    bits = [int(part) for part in re.findall(r"\.[US]?(8|16|32|64|128)\b", opcode)]
    return bits[-1] // 8 if bits else 4


def matrices(opcode):
    """Matrices of 8 x 8 values of 16 bits that ldmatrix reads: LDSM.16.M88.4."""
    count = re.search(r"\.([24])$", opcode)
    return int(count[1]) if count else 1


class Loop:
    """What one turn of a loop does for a warp."""

    def __init__(self, body):
        self.tensor = self.operations = self.read = self.fill = self.waits = 0
        self.issued = len(body)
        for instruction in body:
            mnemonic = instruction.opcode.split(".")[0]
            if not instruction.runs:
                continue
            if mnemonic == "HMMA":
                self.tensor += 1
                self.operations += operations(instruction.opcode)
            elif mnemonic == "LDSM":
                self.read += 128 * matrices(instruction.opcode)
            elif mnemonic in ("LDS", "STS"):
                self.read += LANES * width(instruction.opcode)
            elif mnemonic == "LDGSTS":
                self.fill += LANES * width(instruction.opcode)
            elif mnemonic in ("BAR", "DEPBAR"):
                self.waits += 1

    def traffic(self):
        """Bytes through shared memory for 1000 floating-point operations."""
        return 1000 * (self.read + self.fill) / self.operations

    def clocks(self, rates):
        """Clocks of an SM for one turn of one warp, by what takes them."""
        return {
            "tensor": self.operations / rates.tensor,
            "shared": (self.read + self.fill) / SHARED_BYTES,
            "L2": self.fill / rates.l2,
            "issue": self.issued / ISSUED,
        }

    def rate(self, rates):
        """Floating-point operations of an SM and clock."""
        return self.operations / max(self.clocks(rates).values())


def main_loop(instructions):
    """The innermost loop with tensor instructions, of several the one with most of them; None where there is none."""
    loops = []
    for branch in instructions:
        target = TARGET.search(branch.operands) if branch.opcode.split(".")[0] == "BRA" else None
        if target and int(target[1], 16) <= branch.address:
            begin, end = int(target[1], 16), branch.address
            body = [instruction for instruction in instructions if begin <= instruction.address <= end]
            if any(instruction.opcode.startswith("HMMA") for instruction in body):
                loops.append((begin, end, Loop(body)))
    inner = [
        loop
        for begin, end, loop in loops
        if not any((begin, end) != (first, last) and begin <= first and last <= end for first, last, _ in loops)
    ]
    return max(inner, key=lambda loop: loop.tensor, default=None)


def key_loop(instructions):
    """Instructions of the shortest loop that makes random keys: in each of Philox's ten rounds a lane multiplies twice to 64 bits."""
    lengths = []
    for branch in instructions:
        target = TARGET.search(branch.operands) if branch.opcode.split(".")[0] == "BRA" else None
        if target and int(target[1], 16) <= branch.address:
            body = [instruction for instruction in instructions if int(target[1], 16) <= instruction.address <= branch.address]
            if sum(instruction.opcode.startswith("IMAD.WIDE") for instruction in body) >= 20:
                lengths.append(len(body))
    return min(lengths, default=None)


ROW = "{:<32} {:>6} {:>6} {:>8} {:>8} {:>6} {:>6} {:>8}  {:>7} {:>7} {:>7} {:>7}  {:<7} {:>10} {:>8}"


def report(loops):
    """Lines for main loops: {(entry, architecture): Loop}."""
    if not loops:
        return []
    lines = ["main loops, one turn of a warp: what it does, the clocks of an SM that it takes, and the limit"]
    heads = ("kernel", "arch", "HMMA", "read B", "fill B", "other", "waits", "B/kFLOP")
    lines.append(ROW.format(*heads, "tensor", "shared", "L2", "issue", "limit", "FLOP/clk", "of peak"))
    for (name, arch), loop in loops.items():
        rates = RATES.get(arch)
        model = [""] * 7
        if rates:
            clocks = loop.clocks(rates)
            model = [f"{clocks[what]:.1f}" for what in ("tensor", "shared", "L2", "issue")]
            model += [max(clocks, key=clocks.get), f"{loop.rate(rates):.0f}", f"{100 * loop.rate(rates) / rates.tensor:.0f} %"]
        counts = (loop.tensor, loop.read, loop.fill, loop.issued - loop.tensor, loop.waits, f"{loop.traffic():.1f}")
        lines.append(ROW.format(name, arch, *counts, *model).rstrip())
    return lines
