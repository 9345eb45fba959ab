# ruff: noqa
"""PTX text -> one kernel: registers, parameters, labels, instructions."""

from __future__ import annotations
import re
from dataclasses import dataclass, field


class PtxError(Exception):
    pass


@dataclass
class Instr:
    op: list[str]  # opcode split at dots
    args: list[str]  # operands as text; registers renamed to be unique
    pred: str | None
    neg: bool
    line: int  # line of the PTX text
    loc: str  # source file:line
    text: str = ""

    @property
    def name(self) -> str:
        return ".".join(self.op)


@dataclass
class Kernel:
    name: str
    target: str
    params: list[tuple[str, int, int, int]] = field(default_factory=list)  # name, offset, size, align
    regs: dict[str, int] = field(default_factory=dict)  # name -> bits (1 for predicates)
    body: list = field(default_factory=list)  # Instr or label text "name:"
    tables: dict[str, list[str]] = field(default_factory=dict)
    maxnreg: int | None = None
    reqntid: int = 0


_BITS = {
    "pred": 1,
    "b8": 8,
    "s8": 8,
    "u8": 8,
    "b16": 16,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "b32": 32,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "b64": 64,
    "u64": 64,
    "s64": 64,
    "f64": 64,
    "f16x2": 32,
    "b128": 128,
}


def split_args(text: str) -> list[str]:
    out, depth, cur = [], 0, ""
    for c in text:
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        if c == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += c
    if cur.strip():
        out.append(cur.strip())
    return out


def parse(text: str, name: str | None = None) -> Kernel:
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M))
    target = re.search(r"\.target\s+(\w+)", text).group(1)
    m = re.search(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.S)
    if not m:
        raise PtxError("no entry")
    k = Kernel(m.group(1), target)
    off = 0
    for p in split_args(re.sub(r"//.*", "", m.group(2))):
        words = p.split()
        nm = words[-1]
        arr = re.match(r"(\S+)\[(\d+)\]$", nm)
        if arr:
            nm, size = arr.group(1), int(arr.group(2))
            al = int(words[words.index(".align") + 1])
        else:
            size = al = _BITS[words[1][1:]] // 8
        off = (off + al - 1) // al * al
        k.params.append((nm, off, size, al))
        off += size
    head = m.group(3)
    if mm := re.search(r"\.maxnreg\s+(\d+)", head):
        k.maxnreg = int(mm.group(1))
    if mm := re.search(r"\.reqntid\s+(\d+)", head):
        k.reqntid = int(mm.group(1))
    # the body, statement by statement; scopes of inline assembly get their own names
    body_start = m.end()
    line_no = text.count("\n", 0, body_start) + 1
    scopes: list[tuple[int, dict[str, str]]] = [(0, {})]
    nscope = 0
    loc = "?"
    stmt = ""
    pos_line = line_no
    depth_stmt = 0
    lines = text[body_start:].split("\n")
    done = False
    for n, raw in enumerate(lines):
        ln = line_no + n
        s = re.sub(r"//.*", "", raw).strip()
        if not s:
            continue
        if s.startswith(".loc"):
            w = s.split()
            loc = f"{files.get(w[1], w[1]).split('/')[-1]}:{w[2]}"
            continue
        i = 0
        while i < len(s):
            c = s[i]
            if not stmt.strip():
                if c in " \t":
                    i += 1
                    continue
                if c == "{":
                    nscope += 1
                    # local labels are known before they are declared
                    scopes.append((nscope, {}))
                    i += 1
                    continue
                if c == "}":
                    scopes.pop()
                    i += 1
                    if not scopes:
                        done = True
                        break
                    continue
                lm = re.match(r"([\w$]+)\s*:(?!:)", s[i:])
                if lm:
                    nm = lm.group(1)
                    rest = s[i + lm.end() :].strip()
                    if rest.startswith(".branchtargets"):
                        stmt = f"{nm}: "
                        i += lm.end()
                        pos_line = ln
                        continue
                    if len(scopes) > 1 and not nm.startswith("$"):
                        scopes[-1][1][nm] = f"{nm}@{scopes[-1][0]}"
                        nm = scopes[-1][1][nm]
                    k.body.append(nm + ":")
                    i += lm.end()
                    continue
                pos_line = ln
            if c == ";":
                _statement(k, stmt.strip(), scopes, pos_line, loc)
                stmt = ""
                i += 1
                continue
            stmt += c
            i += 1
        if done:
            break
        if stmt:
            stmt += " "
    return k


def _lookup(scopes, nm):
    for _, names in reversed(scopes):
        if nm in names:
            return names[nm]
    return nm


def _statement(k: Kernel, s: str, scopes, line: int, loc: str) -> None:
    if not s:
        return
    if ".branchtargets" in s:
        nm, rest = s.split(":", 1)
        k.tables[nm.strip()] = [t.strip() for t in rest.replace(".branchtargets", "").split(",")]
        return
    if s.startswith(".reg"):
        mm = re.match(r"\.reg\s+\.(\w+)\s+(.*)", s, re.S)
        bits = _BITS[mm.group(1)]
        for nm in split_args(mm.group(2)):
            r = re.match(r"(%?[\w$]+)<(\d+)>", nm)
            if r:
                for j in range(int(r.group(2))):
                    k.regs[f"{r.group(1)}{j}"] = bits
            else:
                unique = nm
                if len(scopes) > 1:
                    unique = f"{nm}@{scopes[-1][0]}"
                    scopes[-1][1][nm] = unique
                k.regs[unique] = bits
        return
    if s.startswith("."):
        if s.startswith(".pragma"):
            return
        raise PtxError(f"line {line}: directive {s!r}")
    pred, neg = None, False
    mm = re.match(r"@(!?)(%?[\w$]+)\s+(.*)", s, re.S)
    if mm:
        neg, pred, s = bool(mm.group(1)), _lookup(scopes, mm.group(2)), mm.group(3)
    mm = re.match(r"([\w.:]+)\s*(.*)", s, re.S)
    args = []
    for a in split_args(mm.group(2)):
        a = re.sub(r"(%?[A-Za-z_$][\w$.]*)", lambda t: _lookup(scopes, t.group(1)), a)
        args.append(a)
    k.body.append(Instr(mm.group(1).split("."), args, pred, neg, line, loc, s))
