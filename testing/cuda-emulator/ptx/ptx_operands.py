"""Operands as C++: registers of any class of their width, literals, special registers, addresses."""

import re

from ptx_parse import BITS, Label, Refused, Registers

# The C++ type of a register, of an instruction's type, and of the bits of a width.
REGISTER_TYPES = {"pred": "bool", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t", "f32": "float", "f64": "double"}
SPECIAL = {"%tid.x": "thread_x", "%ntid.x": "threads_x", "%ctaid.x": "block_x", "%nctaid.x": "blocks_x"}


class Type:
    """The type that an instruction names: u32, s64, b16, f32, pred."""

    def __init__(self, name):
        self.name, self.kind = name, name[0] if name != "pred" else "p"
        self.bits = 1 if name == "pred" else int(name[1:])

    @property
    def cpp(self):
        if self.kind == "p":
            return "bool"
        if self.kind == "f":
            return {32: "float", 64: "double"}[self.bits]
        return f"{'' if self.kind == 's' else 'u'}int{self.bits}_t"

    @property
    def unsigned(self):
        """The C++ type of its bits."""
        return f"uint{self.bits}_t"


TYPES = {name: Type(name) for name in ["pred", "b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"]}


class Operands:
    """The names that are visible at an instruction, and what they are in C++."""

    def __init__(self, module, entry, name):
        self.module, self.entry, self.name = module, entry, name
        self.scopes = [{}]
        self.parameters = {p.name: p for p in entry.parameters}
        self.parameter_bytes = entry.lay_out()
        self.labels = {item.name for item in entry.body if isinstance(item, Label)}
        self.line = entry.line

    def refuse(self, what):
        raise Refused(f"{self.name}:{self.line}: {what} is not translated")

    def declare(self, registers: Registers):
        for register in registers.names:
            if register in self.scopes[-1]:
                self.refuse(f"{register}, declared twice,")
            self.scopes[-1][register] = registers.kind

    def enter(self, opens):
        """A brace."""
        self.scopes.append({}) if opens else self.scopes.pop()

    def kind(self, register):
        """The class of a register, or None where it is none."""
        for scope in reversed(self.scopes):
            if register in scope:
                return scope[register]
        return None

    def value(self, text, kind):
        """An operand that is read as `kind`, as a C++ expression of that type."""
        of = self.kind(text)
        if of is not None:
            if BITS[of] != kind.bits:
                self.refuse(f"{text} of type .{of} as .{kind.name}")
            return cast(text[1:], of, kind)
        if text in SPECIAL:
            if kind.bits != 32 or kind.kind == "f":
                self.refuse(f"{text} as .{kind.name}")
            return f"{kind.cpp}({SPECIAL[text]})"
        return self.literal(text, kind)

    def literal(self, text, kind):
        match = re.fullmatch(r"0([fFdD])([0-9A-Fa-f]+)", text)
        if match:
            bits = 32 if match.group(1) in "fF" else 64
            if kind.kind != "f" or kind.bits != bits or len(match.group(2)) != bits // 4:
                self.refuse(f"{text} as .{kind.name}")
            return f"ptx::f{bits}(0x{match.group(2)}{'u' if bits == 32 else 'ull'})"
        if kind.kind == "f" or not re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|[1-9]\d*|0)", text):
            self.refuse(f"the operand {text} as .{kind.name}")
        value = int(text, 0)
        if kind.kind == "p":
            if value not in (0, -1, 1):
                self.refuse(f"the predicate {text}")
            return "true" if value else "false"
        if not -(1 << (kind.bits - 1)) <= value < 1 << kind.bits:
            self.refuse(f"{text}, too large for .{kind.name},")
        return f"{kind.cpp}({value % (1 << kind.bits)}{'ull' if kind.bits == 64 else 'u'})"

    def target(self, text, kind, wider=False):
        """How a register takes a C++ expression of type `kind`: a function from that to a statement. `wider`: the register may be so,
        and is extended."""
        of = self.kind(text)
        if of is None:
            self.refuse(f"the destination {text}")
        bits = BITS[of]
        if bits != kind.bits and not (wider and of[0] == "b" and kind.kind != "f" and bits > kind.bits):
            self.refuse(f"the destination {text} of type .{of} of an instruction of .{kind.name}")
        name = text[1:]
        if of[0] == "f" and kind.kind != "f":
            return lambda value: f"{name} = ptx::{of}({kind.unsigned}({value}));"
        if of[0] == "b" and kind.kind == "f":
            return lambda value: f"{name} = ptx::bits({value});"
        if of == "pred" or of[0] == "f":
            return lambda value: f"{name} = {value};"
        # By the instruction's own type first, so that a signed value extends its sign.
        if bits != kind.bits:
            return lambda value: f"{name} = uint{bits}_t({kind.cpp}({value}));"
        return lambda value: f"{name} = uint{bits}_t({value});"

    def list(self, text, count):
        """The operands between braces."""
        if not (text.startswith("{") and text.endswith("}")):
            self.refuse(f"{text}, where {count} operands in braces belong,")
        parts = [part.strip() for part in text[1:-1].split(",")]
        if len(parts) != count:
            self.refuse(f"{text}, not {count} operands,")
        return parts

    def address_parts(self, text):
        match = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if not match:
            self.refuse(f"the address {text}")
        return match.group(1), int(match.group(2) or "0", 0)

    def address(self, text, space):
        """An address as a uint64_t of the host."""
        base, offset = self.address_parts(text)
        of = self.kind(base)
        if space == "shared":
            if base in self.module.dynamic_shared:
                value = "own_shared"
            elif of == "b32":
                value = base[1:]
            else:
                self.refuse(f"the address {text} in .shared")
            return f"ptx::shared(shared_begin, {value} + {offset % (1 << 32)}u)" if offset else f"ptx::shared(shared_begin, {value})"
        if of != "b64":
            self.refuse(f"the address {text}")
        return f"({base[1:]} + {offset % (1 << 64)}ull)" if offset else base[1:]

    def parameter(self, text, at, size, whole):
        """`size` bytes of a parameter, `at` bytes after an address of which `whole` bytes are read, as unsigned bits. An address in
        .param is the distance from the first parameter."""
        base, offset = self.address_parts(text)
        if self.kind(base) == "b64":
            return f"ptx::parameter_{8 * size}(parameters, {base[1:]} + {offset % (1 << 64)}ull, {whole}, {at}, {self.parameter_bytes})"
        parameter = self.parameters.get(base)
        if parameter is None:
            self.refuse(f"the parameter {text}")
        if offset < 0 or offset + whole > parameter.size:
            self.refuse(f"{text}, past the parameter's {parameter.size} bytes,")
        if parameter.align % whole != 0 and parameter.align < whole or offset % whole != 0:
            self.refuse(f"{text}, {whole} bytes that are not aligned so,")
        return f"ptx::parameter_{8 * size}(parameters, {parameter.offset + offset}, {whole}, {at}, {self.parameter_bytes})"


def cast(name, of, kind):
    """A register of class `of` as an expression of a type of the same width."""
    if of == "pred" or kind.kind == "p":
        return name
    if of[0] == "f":
        return name if kind.kind == "f" else f"{kind.cpp}(ptx::bits({name}))"
    if kind.kind == "f":
        return f"ptx::{kind.name}({name})"
    return f"{kind.cpp}({name})" if kind.kind == "s" else name
