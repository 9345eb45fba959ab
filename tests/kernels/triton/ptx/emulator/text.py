"""PTX text -> one kernel: its parameters, registers, labels and instructions.

Every directive is known or an error, with its line; nothing is skipped except debug information (``.file``, ``.loc``,
``.section``), of which the source lines are kept for messages.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field

__all__ = ["Instruction", "Kernel", "Label", "PtxError", "parse", "split_operands"]

#: Bits of a register or parameter of each fundamental type.
BITS = {"pred": 1} | {
    f"{kind}{bits}": bits
    for kind, widths in (
        ("b", (8, 16, 32, 64, 128)),
        ("s", (8, 16, 32, 64)),
        ("u", (8, 16, 32, 64)),
        ("f", (16, 32, 64)),
    )
    for bits in widths
}
_NAME = r"[%$\w]+"


class PtxError(Exception):
    """A program that cannot be loaded: text that is not understood, or an opcode that is not emulated."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        name: opcode with modifiers.
        operands: as text; registers of inner scopes have names of their own.
        predicate: register that guards it, ``None`` without.
        negated: whether it runs where the predicate is false.
        line: of the PTX text, from 1.
        source: ``file:line`` of what it was compiled from.
        text: as it was written.
    """

    name: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    line: int
    source: str
    text: str


@dataclass(frozen=True)
class Label:
    """A place to jump to."""

    name: str


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: where it lies among the parameters, in bytes."""

    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """What a module says about its only entry."""

    name: str
    target: str
    params: list[Parameter] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    body: list[Instruction | Label] = field(default_factory=list)
    tables: dict[str, list[str]] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    maxnreg: int | None = None
    threads: int | None = None


def split_operands(text: str) -> list[str]:
    """Splits at the commas outside of all brackets."""
    out, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            out.append(text[begin:i].strip())
            begin = i + 1
    last = text[begin:].strip()
    return [*out, last] if last else out


class _Reader:
    """A position in the text, and what is in scope there."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r"//[^\n]*", lambda m: " " * len(m.group()), text)
        self.at = 0
        self.newlines = [m.start() for m in re.finditer("\n", text)]
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M))
        self.kernel: Kernel | None = None
        self.scopes: list[dict[str, str]] = []
        self.inner = 0
        self.source = "?"
        self.dynamic: str | None = None

    def line(self, at: int | None = None) -> int:
        return bisect.bisect_left(self.newlines, self.at if at is None else at) + 1

    def error(self, what: str, at: int | None = None) -> PtxError:
        return PtxError(f"line {self.line(at)}: {what}")

    def match(self, pattern: str) -> re.Match[str] | None:
        found = re.compile(pattern, re.S).match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    # -- the module ------------------------------------------------------------------------------------------------
    def module(self) -> Kernel:
        target = ""
        while self.match(r"\s*") and self.at < len(self.text):
            if self.match(r"\.version\s+[\d.]+|\.address_size\s+64\b|\.file\b[^\n]*"):
                continue
            if m := self.match(r"\.target\s+(\w+)[^\n]*"):
                target = m.group(1)
            elif self.match(r"\.section\s+[.\w]+\s*\{[^}]*\}"):
                continue
            elif m := self.match(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\s*\[\s*\]\s*;"):
                self.dynamic = m.group(1)
            elif self.match(r"\.global\s+\.align\s+1\s+\.b8\s+[$\w]+\[\d+\]\s*=\s*\{[\d,\s]*\}\s*;"):
                continue  # a string, of LLVM's own use; no instruction can name it, so nothing needs its address
            elif m := self.match(r"\.visible\s+\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{"):
                if self.kernel:
                    raise self.error("a second entry; one kernel a module is emulated")
                self.entry(Kernel(m.group(1), target), m.group(2), m.group(3))
            else:
                raise self.error(f"not known outside of a kernel: {self.text[self.at :].splitlines()[0].strip()!r}")
        if self.kernel is None:
            raise PtxError("the module has no .visible .entry")
        return self.kernel

    def entry(self, kernel: Kernel, params: str, head: str) -> None:
        self.kernel = kernel
        if self.dynamic:
            kernel.shared[self.dynamic] = 0
        offset = 0
        for text in split_operands(params):
            m = re.fullmatch(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?"
                r"\s+(\w+)(?:\[(\d+)\])?",
                " ".join(text.split()),
            )
            if not m or m.group(2) not in BITS:
                raise self.error(f"parameter {' '.join(text.split())!r}")
            width = BITS[m.group(2)] // 8
            size = width * int(m.group(4) or 1)
            align = int(m.group(1) or width)
            offset = -(-offset // align) * align
            kernel.params.append(Parameter(m.group(3), offset, size))
            offset += size
        for name, value in re.findall(r"\.(\w+)\s*([\d,\s]*)", head):
            if name == "maxnreg":
                kernel.maxnreg = int(value)
            elif name == "reqntid":
                if any(int(n) != 1 for n in value.split(",")[1:]):
                    raise self.error(f".reqntid {value}: threads in more than one dimension are not emulated")
                kernel.threads = int(value.split(",")[0])
            elif name not in ("minnctapersm", "maxntid", "noreturn"):
                raise self.error(f"directive .{name} of a kernel is not known")
        self.scopes = [{}]
        while self.scopes:
            self.statement()

    # -- the body --------------------------------------------------------------------------------------------------
    def statement(self) -> None:
        kernel = self.kernel
        assert kernel is not None
        self.match(r"\s*")
        begin = self.at
        if self.match(r"\{"):
            self.inner += 1
            self.scopes.append({"": f"@{self.inner}"})
        elif self.match(r"\}"):
            self.scopes.pop()
        elif self.match(r";"):
            pass
        elif m := self.match(r"\.loc\s+(\d+)\s+(\d+)[^\n]*"):
            self.source = f"{self.files.get(m.group(1), m.group(1)).split('/')[-1]}:{m.group(2)}"
        elif self.match(r'\.pragma\s+"(nounroll|used_bytes_mask \w+)"\s*;'):
            pass
        elif m := self.match(r"\.reg\s+\.(\w+)\s+([^;]+);"):
            self.declare(m.group(1), m.group(2), begin)
        elif m := self.match(rf"({_NAME})\s*:\s*\.branchtargets\s+([^;]+);"):
            kernel.tables[m.group(1)] = [name.strip() for name in m.group(2).split(",")]
        elif m := self.match(rf"({_NAME})\s*:(?!:)"):
            kernel.body.append(Label(self.own(m.group(1))))
        elif m := self.match(rf"(?:@(!?)({_NAME})\s+)?([a-z][\w.:]*)([^;]*);"):
            operands = tuple(re.sub(_NAME + r"(?![\w.]*\()", self.visible, o) for o in split_operands(m.group(4)))
            guard = self.renamed(m.group(2)) if m.group(2) else None
            text = " ".join(self.text[begin : self.at - 1].split())
            kernel.body.append(
                Instruction(m.group(3), operands, guard, bool(m.group(1)), self.line(begin), self.source, text)
            )
        else:
            raise self.error(f"not understood: {self.text[self.at :].splitlines()[0].strip()!r}")

    def own(self, name: str) -> str:
        """A name of the innermost scope, unique in the kernel."""
        if len(self.scopes) == 1 or name.startswith("$"):
            return name
        return self.scopes[-1].setdefault(name, name + self.scopes[-1][""])

    def declare(self, kind: str, names: str, at: int) -> None:
        assert self.kernel is not None
        if kind not in BITS:
            raise self.error(f"register of type .{kind}", at)
        for name in (n.strip() for n in names.split(",")):
            if m := re.fullmatch(r"(%?[\w$]+)<(\d+)>", name):
                self.kernel.registers.update({f"{m.group(1)}{i}": BITS[kind] for i in range(int(m.group(2)))})
            else:
                self.kernel.registers[self.own(name)] = BITS[kind]

    def visible(self, m: re.Match[str]) -> str:
        return self.renamed(m.group())

    def renamed(self, name: str) -> str:
        for names in reversed(self.scopes):
            if name in names and name:
                return names[name]
        # a label of a scope may be used before it is declared
        if (
            len(self.scopes) > 1
            and re.match(r"[A-Za-z_]\w*$", name)
            and re.search(rf"\b{name}\s*:", self.text[self.at : self.text.find("}", self.at) + 1])
        ):
            return self.own(name)
        return name


def parse(text: str) -> Kernel:
    """The kernel of a module.

    Raises:
        PtxError: for what is not understood, with its line.
    """
    return _Reader(text).module()
