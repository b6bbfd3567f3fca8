"""Instructions as C++ statements: a function of class Instructions for each opcode.

Each names the modifiers and types that it takes, and all else is refused: nothing is done nearly."""

from ptx_operands import TYPES

INTEGERS = {"u16", "u32", "u64", "s16", "s32", "s64"}
WIDE_INTEGERS = {"u32", "u64", "s32", "s64"}
BIT_TYPES = {"b16", "b32", "b64"}
FLOATS = {"f32", "f64"}
# setp's comparisons in C++. Of floats the first six are false where a NaN is, so that ne is none of C++'s; those that end in u are true
# there.
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}
SPACES = {"global", "shared", "param"}


class Instructions:
    """Translates the instructions of one entry."""

    def __init__(self, operands):
        self.operands = operands

    def emit(self, statement):
        """The C++ statement of a PTX statement."""
        o = self.operands
        o.line = statement.line
        self.statement = statement
        self.opcode, self.modifiers, self.texts = statement.opcode[0], statement.opcode[1:], statement.operands
        known = getattr(self, f"op_{self.opcode}", None)
        if known is None:
            self.refuse_opcode()
        if statement.used_bytes is not None and self.opcode != "ld":
            o.refuse("used_bytes_mask before anything but ld")
        text = known()
        if not statement.predicate:
            return text
        negated, name = statement.predicate.startswith("!"), statement.predicate.lstrip("!")
        condition = o.value(name, TYPES["pred"])
        return f"if ({'!' if negated else ''}{condition}) {{ {text} }}"

    def refuse_opcode(self):
        self.operands.refuse(".".join(self.statement.opcode))

    # What an opcode expects of its modifiers and operands.

    def typed(self, allowed, prefixes=((),), count=None):
        """The last modifier, a type of `allowed`; those before it must be one of `prefixes`."""
        *before, name = self.modifiers or [""]
        if name not in allowed or tuple(before) not in prefixes:
            self.refuse_opcode()
        if count is not None:
            self.expect(count)
        return TYPES[name]

    def expect(self, count):
        if len(self.texts) != count:
            self.operands.refuse(f"{'.'.join(self.statement.opcode)} with {len(self.texts)} operands")

    def read(self, at, kind):
        return self.operands.value(self.texts[at], kind)

    def write(self, kind, value, wider=False):
        return self.operands.target(self.texts[0], kind, wider)(value)

    def exactly(self, *modifiers):
        if tuple(self.modifiers) not in modifiers:
            self.refuse_opcode()

    # Moves.

    def op_mov(self):
        o = self.operands
        kind = self.typed({"u16", "u32", "u64", "b16", "b32", "b64", "f32", "f64", "pred"}, count=2)
        to, source = self.texts
        if to.startswith("{"):
            return self.unpack(to, source, kind)
        if source.startswith("{"):
            return self.pack(source, kind)
        if source in o.module.dynamic_shared:
            if kind.name not in ("u32", "b32"):
                o.refuse(f"the address of {source} as .{kind.name}")
            return self.write(kind, "own_shared")
        if source in o.parameters:
            if kind.name not in ("u64", "b64"):
                o.refuse(f"the address of {source} as .{kind.name}")
            return self.write(kind, f"{o.parameters[source].offset}ull")
        return self.write(kind, self.read(1, kind))

    def unpack(self, to, source, kind):
        o = self.operands
        if kind.name not in ("b32", "b64"):
            self.refuse_opcode()
        half = TYPES[f"b{kind.bits // 2}"]
        statements = [f"const {kind.cpp} whole = {o.value(source, kind)};"]
        for i, name in enumerate(o.list(to, 2)):
            statements.append(o.target(name, half)(f"ptx::element<{half.cpp}>(whole, {i})"))
        return f"{{ {' '.join(statements)} }}"

    def pack(self, source, kind):
        o = self.operands
        if kind.name not in ("b32", "b64"):
            self.refuse_opcode()
        half = TYPES[f"b{kind.bits // 2}"]
        low, high = (o.value(name, half) for name in o.list(source, 2))
        return self.write(kind, f"{kind.cpp}({low}) | {kind.cpp}({high}) << {half.bits}")

    def op_selp(self):
        kind = self.typed(INTEGERS | BIT_TYPES | FLOATS, count=4)
        return self.write(kind, f"{self.read(3, TYPES['pred'])} ? {self.read(1, kind)} : {self.read(2, kind)}")

    def op_cvta(self):
        self.exactly(("to", "global", "u64"))
        self.expect(2)
        return self.write(TYPES["u64"], f"ptx::to_global({self.read(1, TYPES['u64'])})")

    # Memory.

    def access(self):
        """(space, elements, type) of a load or a store."""
        modifiers = list(self.modifiers)
        space = modifiers.pop(0) if modifiers and modifiers[0] in SPACES else "generic"
        if space == "global" and self.opcode == "ld" and modifiers and modifiers[0] == "nc":
            modifiers.pop(0)
        elements = int(modifiers.pop(0)[1]) if modifiers and modifiers[0] in ("v2", "v4") else 1
        if len(modifiers) != 1 or modifiers[0] not in INTEGERS | FLOATS | BIT_TYPES:
            self.refuse_opcode()
        kind = TYPES[modifiers[0]]
        if elements * kind.bits > 128:
            self.refuse_opcode()
        self.expect(2)
        return space, elements, kind

    def op_ld(self):
        o = self.operands
        space, elements, kind = self.access()
        names = o.list(self.texts[0], elements) if elements > 1 else [self.texts[0]]
        size = elements * kind.bits // 8
        if space == "param":
            return self.load_parameter(names, kind, size)
        address = o.address(self.texts[1], space)
        if elements == 1:
            return o.target(names[0], kind, wider=True)(f"ptx::load<{kind.cpp}>({address})")
        loaded = f"ptx::load<{word(size)}>({address})"
        if self.statement.used_bytes is not None:
            loaded = f"ptx::load_used({address}, {size}, {self.statement.used_bytes}u)"
        statements = [f"const auto whole = {loaded};"]
        for i, name in enumerate(names):
            statements.append(o.target(name, kind)(from_bits(kind, f"ptx::element<{kind.unsigned}>(whole, {i})")))
        return f"{{ {' '.join(statements)} }}"

    def load_parameter(self, names, kind, size):
        statements, each = [], kind.bits // 8
        for i, name in enumerate(names):
            value = from_bits(kind, self.operands.parameter(self.texts[1], i * each, each, size))
            statements.append(self.operands.target(name, kind, wider=True)(value))
        return " ".join(statements)

    def op_st(self):
        o = self.operands
        space, elements, kind = self.access()
        if space == "param":
            self.refuse_opcode()
        address = o.address(self.texts[0], space)
        if elements == 1:
            # A wider register gives its low bits.
            return f"ptx::store<{kind.unsigned}>({address}, {self.low_bits(self.texts[1], kind)});"
        size = elements * kind.bits // 8
        values = [f"uint64_t({self.low_bits(name, kind)})" for name in o.list(self.texts[1], elements)]
        each = 64 // kind.bits
        words = [" | ".join(f"{v} << {i * kind.bits}" for i, v in enumerate(values[first:first + each]))
                 for first in range(0, elements, each)]
        whole = f"ptx::Bits128{{{', '.join(words)}}}" if size == 16 else f"{word(size)}({words[0]})"
        return f"ptx::store<{word(size)}>({address}, {whole});"

    def low_bits(self, text, kind):
        of = self.operands.kind(text)
        if kind.kind != "f" and of in BIT_TYPES and TYPES[of].bits > kind.bits:
            return f"{kind.unsigned}({text[1:]})"
        value = self.operands.value(text, kind)
        return f"ptx::bits({value})" if kind.kind == "f" else f"{kind.unsigned}({value})"

    def op_atom(self):
        if len(self.modifiers) != 3 or self.modifiers[0] not in ("global", "shared"):
            self.refuse_opcode()
        space, operation, name = self.modifiers
        model = {("add", "u32"): "atomic_add", ("add", "u64"): "atomic_add", ("or", "b32"): "atomic_or",
                 ("min", "u32"): "atomic_min"}.get((operation, name))
        if model is None:
            self.refuse_opcode()
        self.expect(3)
        kind = TYPES[name]
        address = self.operands.address(self.texts[1], space)
        return self.write(kind, f"simt::{model}(ptx::pointer<{kind.cpp}>({address}), {self.read(2, kind)})")

    def op_prefetch(self):
        self.exactly(("global", "L2"))
        self.expect(1)
        return f"ptx::prefetch_global({self.operands.address(self.texts[0], 'global')});"

    # Hints for the second-level cache, of which the models know nothing: a value that only cp.async takes.
    def op_createpolicy(self):
        self.exactly(("fractional", "L2::evict_first", "b64"), ("fractional", "L2::evict_last", "b64"))
        self.expect(2)
        if self.texts[1] != "1.0":
            self.operands.refuse(f"createpolicy.fractional of {self.texts[1]}")
        return self.write(TYPES["b64"], f"ptx::kPolicy{'First' if 'L2::evict_first' in self.modifiers else 'Last'}")

    # cp.async and its groups.
    def op_cp(self):
        o = self.operands
        modifiers = tuple(self.modifiers)
        if modifiers == ("async", "commit_group"):
            self.expect(0)
            return "simt::copy_async_commit();"
        if modifiers == ("async", "wait_group"):
            self.expect(1)
            if not self.texts[0].isdigit():
                o.refuse(f"cp.async.wait_group {self.texts[0]}")
            return f"simt::copy_async_wait({self.texts[0]});"
        copies = ("async", "cg", "shared", "global")
        self.exactly(copies, (*copies, "L2::cache_hint"))
        self.expect(len(modifiers))
        if self.texts[2] != "16":
            o.refuse(f"cp.async.cg of {self.texts[2]} bytes")
        to, source = o.address(self.texts[0], "shared"), o.address(self.texts[1], "global")
        copy = f"ptx::copy_async({to}, {source}, {self.read(3, TYPES['u32'])});"
        return f"ptx::check_policy({self.read(4, TYPES['b64'])}); {copy}" if len(modifiers) == 5 else copy

    # Integers.

    def arithmetic(self, sign):
        kind = self.typed(INTEGERS | FLOATS, ((), ("rn",)), count=3)
        if kind.kind != "f" and len(self.modifiers) > 1:
            self.refuse_opcode()
        if kind.kind == "f":
            return self.write(kind, f"{self.read(1, kind)} {sign} {self.read(2, kind)}")
        raw = TYPES[f"u{kind.bits}"]
        return self.write(raw, f"{self.read(1, raw)} {sign} {self.read(2, raw)}")

    def op_add(self):
        return self.arithmetic("+")

    def op_sub(self):
        return self.arithmetic("-")

    def op_mul(self):
        form = self.modifiers[0] if self.modifiers else ""
        if form not in ("lo", "hi", "wide"):
            kind = self.typed(FLOATS, ((), ("rn",)), count=3)
            return self.write(kind, f"{self.read(1, kind)} * {self.read(2, kind)}")
        kind = self.typed({"hi": {"u32"}, "lo": WIDE_INTEGERS, "wide": {"u32", "s32"}}[form], (("lo",), ("hi",), ("wide",)), count=3)
        if form == "wide":
            wide = TYPES[f"{kind.kind}64"]
            return self.write(wide, f"{wide.cpp}({self.read(1, kind)}) * {wide.cpp}({self.read(2, kind)})")
        raw = TYPES[f"u{kind.bits}"]
        if form == "hi":
            return self.write(raw, f"ptx::multiply_high({self.read(1, raw)}, {self.read(2, raw)})")
        return self.write(raw, f"{self.read(1, raw)} * {self.read(2, raw)}")

    def op_mad(self):
        kind = self.typed(WIDE_INTEGERS, (("lo",),), count=4)
        raw = TYPES[f"u{kind.bits}"]
        return self.write(raw, f"{self.read(1, raw)} * {self.read(2, raw)} + {self.read(3, raw)}")

    def op_div(self):
        kind = self.typed({"u32", "u64"} | FLOATS, ((), ("rn",)), count=3)
        if (kind.kind == "f") != (self.modifiers[0] == "rn"):
            self.refuse_opcode()
        if kind.kind == "f":
            return self.write(kind, f"{self.read(1, kind)} / {self.read(2, kind)}")
        return self.write(kind, f"ptx::divide({self.read(1, kind)}, {self.read(2, kind)})")

    def op_rem(self):
        kind = self.typed({"u32", "u64"}, count=3)
        return self.write(kind, f"ptx::remainder({self.read(1, kind)}, {self.read(2, kind)})")

    def op_min(self):
        kind = self.typed(WIDE_INTEGERS | FLOATS, count=3)
        return self.write(kind, f"ptx::least({self.read(1, kind)}, {self.read(2, kind)})")

    def op_max(self):
        kind = self.typed(WIDE_INTEGERS | FLOATS, count=3)
        return self.write(kind, f"ptx::greatest({self.read(1, kind)}, {self.read(2, kind)})")

    def logic(self, sign):
        kind = self.typed(BIT_TYPES | {"pred"}, count=3)
        return self.write(kind, f"{self.read(1, kind)} {sign} {self.read(2, kind)}")

    def op_and(self):
        return self.logic("&")

    def op_or(self):
        return self.logic("|")

    def op_xor(self):
        return self.logic("^")

    def op_not(self):
        kind = self.typed(BIT_TYPES | {"pred"}, count=2)
        return self.write(kind, f"{'!' if kind.kind == 'p' else '~'}{self.read(1, kind)}")

    def op_shl(self):
        kind = self.typed(BIT_TYPES, count=3)
        return self.write(kind, f"ptx::shift_left({self.read(1, kind)}, {self.read(2, TYPES['u32'])})")

    def op_shr(self):
        kind = self.typed(INTEGERS | BIT_TYPES, count=3)
        return self.write(kind, f"ptx::shift_right({self.read(1, kind)}, {self.read(2, TYPES['u32'])})")

    def op_bfi(self):
        kind = self.typed({"b32", "b64"}, count=5)
        place = f"{self.read(3, TYPES['u32'])}, {self.read(4, TYPES['u32'])}"
        return self.write(kind, f"ptx::bit_field_insert({self.read(1, kind)}, {self.read(2, kind)}, {place})")

    def op_prmt(self):
        kind = self.typed({"b32"}, count=4)
        return self.write(kind, f"ptx::permute({self.read(1, kind)}, {self.read(2, kind)}, {self.read(3, kind)})")

    def op_bfind(self):
        kind = self.typed({"u32"}, (("shiftamt",),), count=2)
        return self.write(kind, f"ptx::find_shift({self.read(1, kind)})")

    def op_brev(self):
        kind = self.typed({"b32"}, count=2)
        return self.write(kind, f"ptx::reverse({self.read(1, kind)})")

    def op_popc(self):
        kind = self.typed({"b32"}, count=2)
        return self.write(kind, f"ptx::count_ones({self.read(1, kind)})")

    # Floats.

    def op_fma(self):
        kind = self.typed(FLOATS, (("rn",),), count=4)
        return self.write(kind, f"ptx::fma({self.read(1, kind)}, {self.read(2, kind)}, {self.read(3, kind)})")

    def op_neg(self):
        kind = self.typed({"s32", "s64"} | FLOATS, count=2)
        if kind.kind == "f":
            return self.write(kind, f"ptx::negative({self.read(1, kind)})")
        raw = TYPES[f"u{kind.bits}"]
        return self.write(raw, f"{raw.cpp}(0) - {self.read(1, raw)}")

    def op_abs(self):
        kind = self.typed(FLOATS, count=2)
        return self.write(kind, f"ptx::absolute({self.read(1, kind)})")

    def op_copysign(self):
        kind = self.typed({"f64"}, count=3)
        return self.write(kind, f"ptx::copy_sign({self.read(1, kind)}, {self.read(2, kind)})")

    def op_sqrt(self):
        kind = self.typed(FLOATS, (("rn",),), count=2)
        return self.write(kind, f"ptx::square_root({self.read(1, kind)})")

    def op_rcp(self):
        self.exactly(("rn", "f64"), ("approx", "ftz", "f64"))
        kind = self.typed({"f64"}, (("rn",), ("approx", "ftz")), count=2)
        if self.modifiers[0] == "rn":
            return self.write(kind, f"1.0 / {self.read(1, kind)}")
        return self.write(kind, f"ptx::reciprocal_approximate({self.read(1, kind)})")

    def op_rsqrt(self):
        kind = self.typed({"f64"}, (("approx", "ftz"),), count=2)
        return self.write(kind, f"ptx::reciprocal_root_approximate({self.read(1, kind)})")

    def op_ex2(self):
        kind = self.typed({"f32"}, (("approx", "ftz"),), count=2)
        return self.write(kind, f"ptx::exp2_approximate({self.read(1, kind)})")

    # Comparisons and conversions.

    def op_setp(self):
        self.expect(3)
        if len(self.modifiers) != 2:
            self.refuse_opcode()
        comparison, name = self.modifiers
        if name not in INTEGERS | FLOATS | BIT_TYPES:
            self.refuse_opcode()
        kind = TYPES[name]
        a, b = self.read(1, kind), self.read(2, kind)
        if kind.kind == "b" and comparison not in ("eq", "ne"):
            self.refuse_opcode()
        if comparison in ("num", "nan") and kind.kind == "f":
            either = f"ptx::is_nan({a}) || ptx::is_nan({b})"
            condition = either if comparison == "nan" else f"!({either})"
        elif comparison in UNORDERED and kind.kind == "f":
            condition = f"ptx::is_nan({a}) || ptx::is_nan({b}) || {a} {UNORDERED[comparison]} {b}"
        elif comparison == "ne" and kind.kind == "f":
            condition = f"{a} < {b} || {a} > {b}"
        elif comparison in COMPARED:
            condition = f"{a} {COMPARED[comparison]} {b}"
        else:
            self.refuse_opcode()
        return self.write(TYPES["pred"], condition)

    def op_cvt(self):
        m = tuple(self.modifiers)
        if m == ("rn", "f16x2", "f32") or m == ("rn", "bf16x2", "f32"):
            self.expect(3)
            convert = "to_half" if m[1] == "f16x2" else "to_bfloat"
            # The first operand becomes the high half.
            high, low = self.read(1, TYPES["f32"]), self.read(2, TYPES["f32"])
            return self.write(TYPES["b32"], f"uint32_t(ptx::{convert}({high})) << 16 | ptx::{convert}({low})")
        self.expect(2)
        if m == ("rn", "f16", "f32"):
            return self.write(TYPES["b16"], f"ptx::to_half({self.read(1, TYPES['f32'])})")
        if m == ("rn", "bf16", "f32"):
            return self.write(TYPES["b16"], f"ptx::to_bfloat({self.read(1, TYPES['f32'])})")
        if m == ("f32", "f16"):
            return self.write(TYPES["f32"], f"ptx::from_half({self.read(1, TYPES['b16'])})")
        *rounding, to, source = m
        if to not in INTEGERS | FLOATS or source not in INTEGERS | FLOATS:
            self.refuse_opcode()
        to, source = TYPES[to], TYPES[source]
        value = self.read(1, source)
        if rounding == ["rni"] and (to.name, source.name) == ("f64", "f64"):
            return self.write(to, f"ptx::round_to_even({value})")
        # C++ rounds to nearest even where a float does not hold a number, as rn does.
        exact = to.kind == "f" and source.kind == "f" and to.bits > source.bits
        narrows = to.kind == "f" and (source.kind != "f" or to.bits < source.bits)
        if exact and not rounding or narrows and rounding == ["rn"]:
            return self.write(to, f"{to.cpp}({value})")
        if to.kind != "f" and source.kind == "f" and rounding == ["rzi"]:
            nan = "0" if source.bits != 64 and to.bits != 64 else f"1ull << {to.bits - 1}"
            return self.write(to, f"ptx::truncate<{to.cpp}>({value}, {to.cpp}({nan}))")
        if to.kind != "f" and source.kind != "f" and not rounding:
            return self.write(to, f"{to.cpp}({value})", wider=True)
        return self.refuse_opcode()

    # Control.

    def op_bra(self):
        self.exactly((), ("uni",))
        self.expect(1)
        if self.texts[0] not in self.operands.labels:
            self.operands.refuse(f"a branch to {self.texts[0]}, which is no label here,")
        return f"goto {label(self.texts[0])};"

    def op_ret(self):
        self.exactly(())
        self.expect(0)
        return "return;"

    def op_bar(self):
        if tuple(self.modifiers) == ("warp", "sync"):
            self.expect(1)
            return f"ptx::warp_barrier({self.read(0, TYPES['u32'])});"
        self.exactly(("sync",))
        if len(self.texts) == 1:
            # Another one would count all threads of the block, and the models know none such.
            if self.texts[0] != "0":
                self.operands.refuse(f"bar.sync {self.texts[0]}")
            return "ptx::barrier();"
        self.expect(2)
        return f"ptx::barrier_of({self.read(0, TYPES['u32'])}, {self.read(1, TYPES['u32'])});"

    # Warps.

    def op_shfl(self):
        o = self.operands
        if len(self.modifiers) != 3 or self.modifiers[0] != "sync" or self.modifiers[2] != "b32":
            self.refuse_opcode()
        model = {"bfly": "shuffle_xor", "idx": "shuffle_index", "up": "shuffle_up"}.get(self.modifiers[1])
        if model is None:
            self.refuse_opcode()
        self.expect(5)
        to, _, in_range = self.texts[0].partition("|")
        word32 = TYPES["b32"]
        values = ", ".join(self.read(i, word32) for i in range(1, 5))
        statements = [f"const ptx::Shuffled got = ptx::{model}({values});", o.target(to.strip(), word32)("got.value")]
        if in_range:
            statements.append(o.target(in_range.strip(), TYPES["pred"])("got.in_range"))
        return f"{{ {' '.join(statements)} }}"

    def op_vote(self):
        self.exactly(("sync", "ballot", "b32"), ("sync", "any", "pred"))
        self.expect(3)
        if self.modifiers[1] == "any":
            return self.write(TYPES["pred"], f"ptx::vote_ballot({self.read(1, TYPES['pred'])}, {self.read(2, TYPES['b32'])}) != 0")
        return self.write(TYPES["b32"], f"ptx::vote_ballot({self.read(1, TYPES['pred'])}, {self.read(2, TYPES['b32'])})")

    def op_ldmatrix(self):
        o = self.operands
        whole = ("sync", "aligned", "m8n8", "x4")
        self.exactly(whole + ("shared", "b16"), whole + ("trans", "shared", "b16"))
        self.expect(2)
        model = "matrices_transposed" if "trans" in self.modifiers else "matrices"
        statements = [f"const ptx::Four got = ptx::{model}({o.address(self.texts[1], 'shared')});"]
        for i, name in enumerate(o.list(self.texts[0], 4)):
            statements.append(o.target(name, TYPES["b32"])(f"got.r[{i}]"))
        return f"{{ {' '.join(statements)} }}"

    def op_mma(self):
        o = self.operands
        shape = ("sync", "aligned", "m16n8k16", "row", "col", "f32")
        self.exactly(shape + ("f16", "f16", "f32"), shape + ("bf16", "bf16", "f32"))
        self.expect(4)
        model = "mma_half" if "f16" in self.modifiers else "mma_bfloat"
        values = [o.value(name, TYPES["b32"]) for name in o.list(self.texts[1], 4) + o.list(self.texts[2], 2)]
        values += [o.value(name, TYPES["f32"]) for name in o.list(self.texts[3], 4)]
        statements = [f"const ptx::FourFloats got = ptx::{model}({', '.join(values)});"]
        for i, name in enumerate(o.list(self.texts[0], 4)):
            statements.append(o.target(name, TYPES["f32"])(f"got.r[{i}]"))
        return f"{{ {' '.join(statements)} }}"


def word(size):
    """The C++ type that moves so many bytes at once."""
    return {4: "uint32_t", 8: "uint64_t", 16: "ptx::Bits128"}[size]


def from_bits(kind, bits):
    """Bits as an expression of a type."""
    return f"ptx::{kind.name}({bits})" if kind.kind == "f" else f"{kind.cpp}({bits})"


def label(text):
    return text.replace("$", "_")
