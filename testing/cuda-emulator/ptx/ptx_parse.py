"""Reads PTX text: entries, their parameters and registers, and instructions with their lines.

What it does not know it refuses by name, with file and line."""

import re
import sys

BITS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}
# Bytes of each type that a parameter may have.
SIZES = {"u16": 2, "u32": 4, "u64": 8, "s16": 2, "s32": 4, "s64": 8, "b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8}


class Refused(Exception):
    """What the translator does not take."""


class Statement:
    """One instruction: `opcode` is a list of its parts between dots, `operands` are texts."""

    def __init__(self, line, predicate, opcode, operands):
        self.line, self.predicate, self.opcode, self.operands = line, predicate, opcode, operands
        # Of the pragma before it: which bytes of a vector load are used, as bits.
        self.used_bytes = None


class Label:
    def __init__(self, line, name):
        self.line, self.name = line, name


class Scope:
    """A brace: registers that are declared in it end with it."""

    def __init__(self, line, opens):
        self.line, self.opens = line, opens


class Registers:
    """A declaration: .reg .b32 %r<5> or .reg .b32 %temp."""

    def __init__(self, line, kind, names):
        self.line, self.kind, self.names = line, kind, names


class Parameter:
    def __init__(self, name, size, align):
        self.name, self.size, self.align = name, size, align
        self.offset = None


class Entry:
    def __init__(self, line, name):
        self.line, self.name = line, name
        self.parameters, self.max_threads, self.body = [], 1024, []

    def lay_out(self):
        """Each parameter at its own alignment, one after another; the bytes of all."""
        end = 0
        for parameter in self.parameters:
            end = (end + parameter.align - 1) // parameter.align * parameter.align
            parameter.offset = end
            end += parameter.size
        return end


class Module:
    def __init__(self):
        self.entries, self.dynamic_shared = [], set()


def pieces(text):
    """(line, text) of all that ends in ; { } or : of a label, and of module directives, which end in a line. Comments are left out."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    at, line, size = 0, 1, len(text)
    directive = re.compile(r"\.(version|target|address_size)\b[^\n]*")
    head = re.compile(r"(?:\.(?:visible|weak)\s+)?\.entry\b[^{]*")
    label = re.compile(r"[$\w]+:(?!:)")
    while True:
        while at < size and text[at].isspace():
            line += text[at] == "\n"
            at += 1
        if at == size:
            return
        match = directive.match(text, at) or head.match(text, at) or label.match(text, at)
        if match:
            piece = match.group()
        elif text[at] in "{}":
            piece = text[at]
        else:
            end = text.find(";", at)
            piece = text[at:end + 1] if end >= 0 else text[at:]
        yield line, piece.strip()
        line += piece.count("\n")
        at += len(piece)


def split_operands(text):
    """At commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for at, c in enumerate(text):
        if c in "{[":
            depth += 1
        elif c in "}]":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    rest = text[start:].strip()
    return parts + [rest] if rest else parts


PARAMETER = re.compile(r"\.param(?:\s+\.align\s+(\d+))?\s+\.(\w+)\s+(\w+)(?:\[(\d+)\])?$")


def parse_head(line, text, refuse):
    match = re.match(r"(?:\.(?:visible|weak)\s+)?\.entry\s+(\w+)\s*(?:\(([^)]*)\))?\s*(.*)$", text, re.S)
    if not match:
        refuse(line, "this entry")
    name, parameters, directives = match.groups()
    entry = Entry(line, name)
    for text in (parameters or "").split(","):
        text = text.strip()
        if not text:
            continue
        match = PARAMETER.match(text)
        if not match:
            refuse(line, f"parameter {text!r}")
        align, kind, parameter, count = match.groups()
        if kind == "b8" and count and align:
            entry.parameters.append(Parameter(parameter, int(count), int(align)))
        elif kind in SIZES and not count and not align:
            entry.parameters.append(Parameter(parameter, SIZES[kind], SIZES[kind]))
        else:
            refuse(line, f"parameter {text!r}")
    for directive in directives.split("\n"):
        words = directive.replace(",", " ").split()
        if not words or words[0] == ".minnctapersm":
            continue
        if words[0] != ".maxntid" or words[2:] not in ([], ["1"], ["1", "1"]):
            refuse(line, f"directive {directive.strip()!r}")
        entry.max_threads = int(words[1])
    return entry


def parse_statement(line, text, refuse):
    """What stands between two semicolons inside an entry."""
    match = re.match(r"\.reg\s+\.(\w+)\s+(.*);$", text, re.S)
    if match:
        kind, names = match.groups()
        if kind not in BITS:
            refuse(line, f"registers of type .{kind}")
        declared = []
        for name in names.split(","):
            several = re.match(r"\s*(%\w+)<(\d+)>\s*$", name)
            if several:
                declared += [f"{several.group(1)}{i}" for i in range(int(several.group(2)))]
            else:
                declared.append(name.strip())
        return Registers(line, kind, declared)
    if text.startswith("."):
        refuse(line, f"directive {text.split()[0]!r} inside an entry")
    match = re.match(r"(@!?%\w+\s+)?([a-z][\w.:]*)\s*(.*);$", text, re.S)
    if not match:
        refuse(line, repr(text))
    predicate, opcode, operands = match.groups()
    return Statement(line, (predicate or "").strip("@ \t\n"), opcode.split("."), split_operands(operands))


def parse(text, name):
    """A Module of the text of the file `name`."""

    def refuse(line, what):
        raise Refused(f"{name}:{line}: {what} is not translated")

    module, entry, depth, used = Module(), None, 0, None
    for line, piece in pieces(text):
        if entry is not None and depth > 0:
            if piece in "{}":
                depth += 1 if piece == "{" else -1
                if depth == 0:
                    module.entries.append(entry)
                    entry = None
                else:
                    entry.body.append(Scope(line, piece == "{"))
            elif piece.endswith(":"):
                entry.body.append(Label(line, piece[:-1]))
            elif piece == '.pragma "nounroll";':
                pass
            elif re.match(r'\.pragma "used_bytes_mask \w+";$', piece):
                used = int(re.search(r"mask (\w+)", piece).group(1), 0)
            else:
                statement = parse_statement(line, piece, refuse)
                if isinstance(statement, Statement):
                    statement.used_bytes, used = used, None
                entry.body.append(statement)
        elif entry is not None:
            if piece != "{":
                refuse(line, f"{piece!r} before an entry's body")
            depth = 1
        elif re.match(r"\.(version|target|address_size)\b", piece):
            if piece.startswith(".address_size") and piece.split()[1] != "64":
                refuse(line, piece)
        elif ".entry" in piece.split("(")[0]:
            entry = parse_head(line, piece, refuse)
        else:
            match = re.match(r"\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[\];$", piece)
            # The emulator gives 16 bytes on odd seeds.
            if not match or int(match.group(1)) > 16:
                refuse(line, repr(piece.split("\n")[0]))
            module.dynamic_shared.add(match.group(2))
    if entry is not None:
        refuse(entry.line, "an entry without an end")
    return module


def read(path):
    with open(path, encoding="utf-8") as file:
        return parse(file.read(), path)


if __name__ == "__main__":
    sys.exit("ptx_parse.py is a part of translate")
