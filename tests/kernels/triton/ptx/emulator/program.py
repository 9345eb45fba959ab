# ruff: noqa
"""A kernel as Python functions: one for each stretch of instructions, in a full and a masked version."""

from __future__ import annotations
import re
import numpy as np
from . import formats as fmt
from .formats import u1, u2, u4, u8, i1, i2, i4, i8, f2, f4, f8
from .cta import SB, GB, PB, SHARED_WINDOW, LANE, Fault, mma, AR
from .text import Instr, Kernel, PtxError, split_args

NP = {
    "b8": "u1",
    "u8": "u1",
    "s8": "i1",
    "b16": "u2",
    "u16": "u2",
    "s16": "i2",
    "f16": "f2",
    "bf16": "u2",
    "b32": "u4",
    "u32": "u4",
    "s32": "i4",
    "f32": "f4",
    "b64": "u8",
    "u64": "u8",
    "s64": "i8",
    "f64": "f8",
    "tf32": "u4",
    "f16x2": "u4",
    "bf16x2": "u4",
    "e4m3x2": "u2",
    "e5m2x2": "u2",
}
SIZE = {"u1": 1, "i1": 1, "u2": 2, "i2": 2, "f2": 2, "u4": 4, "i4": 4, "f4": 4, "u8": 8, "i8": 8, "f8": 8}
STORE = {8: "u1", 16: "u2", 32: "u4", 64: "u8"}
END = 1 << 40
BLOCKING = (
    "bar.sync",
    "barrier.sync",
    "bar.cta",
    "barrier.cta",
    "mbarrier.try_wait",
    "mbarrier.test_wait",
    "wgmma.wait_group",
    "cp.async.wait_group",
    "cp.async.wait_all",
    "setmaxnreg",
)


def where(m, a, b):
    return np.where(m, a, b)


class Program:
    def __init__(self, k: Kernel, source_lines=None):
        self.k = k
        self.reg = {n: i for i, n in enumerate(k.regs)}
        self.bits = list(k.regs.values())
        self.consts, self._ck = [], {}
        self.ins: list[Instr] = [b for b in k.body if isinstance(b, Instr)]
        self.segments()
        self.check_fences()
        self.full, self.masked = {}, {}
        self.ns = dict(
            np=np,
            where=np.where,
            K=self.consts,
            I=self.ins,
            fmt=fmt,
            mma=mma,
            LANE=LANE,
            AR=AR,
            Fault=Fault,
            END=END,
            **HELPERS,
            **{n: getattr(fmt, n) for n in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")},
        )

    # -- structure -------------------------------------------------------------------------------------------------
    def segments(self):
        """Segments of instruction indices; labels start one, branches and waits end one."""
        self.seg, self.label = [[]], {}
        n = 0
        for b in self.k.body:
            if isinstance(b, str):
                if self.seg[-1]:
                    self.seg.append([])
                self.label[b[:-1]] = len(self.seg) - 1
                continue
            blocking = b.name.startswith(BLOCKING)
            if blocking and self.seg[-1]:
                self.seg.append([])
            self.seg[-1].append(n)
            n += 1
            if blocking or b.op[0] in ("bra", "brx", "ret", "exit"):
                self.seg.append([])
        if not self.seg[-1]:
            self.seg.pop()

    def check_fences(self):
        """Static: registers of a wgmma that something else writes between the last wgmma.fence and it."""
        self.unfenced = []
        dirty = None
        for seg in self.seg:
            dirty = None if dirty is None else dirty
            for j in seg:
                b = self.ins[j]
                if b.name.startswith("wgmma.fence"):
                    dirty = set()
                elif b.name.startswith("wgmma.mma_async"):
                    regs = set(re.findall(r"%\w+", b.args[0])) | (
                        set(re.findall(r"%\w+", b.args[1])) if b.args[1].startswith("{") else set()
                    )
                    if dirty is None:
                        self.unfenced.append(f"line {b.line} ({b.loc}): wgmma without wgmma.fence before it")
                    elif (
                        b.args[2] != "0"
                        and dirty & regs
                        and b.args[1].startswith("{")
                        and dirty & set(re.findall(r"%\w+", b.args[1]))
                    ):
                        self.unfenced.append(
                            f"line {b.line} ({b.loc}): A registers written after wgmma.fence: {sorted(dirty & regs)[:3]}"
                        )
                elif dirty is not None:
                    if b.args and b.op[0] not in ("st", "bra", "red"):
                        dirty |= set(re.findall(r"%\w+", b.args[0]))
                    if b.op[0] in ("bra", "brx", "ret") or b.name.startswith(("wgmma.wait_group",)):
                        dirty = None

    # -- operands --------------------------------------------------------------------------------------------------
    def const(self, value, t):
        key = (value, t)
        if key not in self._ck:
            dt = getattr(fmt, t)
            if t[0] == "f":
                a = np.full(32, value, dt)
            else:
                bits = SIZE[t] * 8
                v = value & ((1 << bits) - 1)
                a = np.full(32, v, getattr(fmt, "u" + t[1])).view(dt)
            a.flags.writeable = False
            self._ck[key] = len(self.consts)
            self.consts.append(a)
        return f"K[{self._ck[key]}]"

    def symbol(self, s):
        if s == "global_smem":
            return SB
        for nm, off, size, al in self.k.params:
            if nm == s:
                return PB + off
        raise PtxError(f"symbol {s}")

    def value(self, a, t):
        """Python expression of operand ``a`` as array of numpy type ``t`` (e.g. "f4")."""
        a = a.strip()
        if a in self.reg:
            i = self.reg[a]
            b = self.bits[i]
            if b == 1:
                return f"R[{i}]"
            st = STORE[b]
            if SIZE[t] == SIZE[st]:
                return f"R[{i}]" if t == st else f"R[{i}].view({t})"
            if SIZE[t] < SIZE[st]:
                base = f"R[{i}].astype({'u' + t[1]})"
                return base if t[0] == "u" else f"{base}.view({t})"
            base = f"R[{i}].view({'i' if t[0] == 'i' else 'u'}{st[1]}).astype({t})"
            return base
        if a.startswith("0f") or a.startswith("0F"):
            v = int(a[2:], 16)
            c = self.const(v, "u4")
            return f"{c}.view(f4)" if t == "f4" else f"{c}.view({t})"
        if a.startswith("0d") or a.startswith("0D"):
            return f"{self.const(int(a[2:], 16), 'u8')}.view({t})"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", a):
            v = int(a.rstrip("U"), 0)
            if t[0] == "f":
                return f"{self.const(v, 'u' + t[1])}.view({t})"
            return self.const(v, t)
        if a.startswith("%"):
            special = {
                "%tid.x": "w.tid",
                "%tid.y": "Z",
                "%tid.z": "Z",
                "%laneid": "LANE.astype(u4)",
                "%warpid": f"np.full(32, w.i, u4)",
                **{f"%ctaid.{d}": f"np.full(32, w.cta.ctaid[{i}], u4)" for i, d in enumerate("xyz")},
                **{f"%nctaid.{d}": f"np.full(32, w.cta.nctaid[{i}], u4)" for i, d in enumerate("xyz")},
                "%ntid.x": "np.full(32, 32*w.cta.nw, u4)",
                "%clusterid.x": "np.full(32, w.cta.ctaid[0], u4)",
                "%cluster_ctarank": "np.zeros(32,u4)",
            }
            if a in special:
                e = special[a].replace("Z", "np.zeros(32,u4)") if special[a] == "Z" else special[a]
                return e if t in ("u4",) else f"{e}.astype({t})"
            raise PtxError(f"register {a}")
        return self.const(self.symbol(a), t)

    def address(self, a, t="u8"):
        """[reg+imm] -> expression"""
        a = a.strip()
        assert a[0] == "[" and a[-1] == "]", a
        a = a[1:-1].strip()
        m = re.match(r"(.*?)\s*\+\s*(-?\d+)$", a)
        base, off = (m.group(1), int(m.group(2))) if m else (a, 0)
        if base not in self.reg:
            if re.fullmatch(r"-?\d+", base):
                return self.const(int(base) + off, t)
            return self.const(self.symbol(base) + off, t)
        e = self.value(base, STORE[self.bits[self.reg[base]]])
        return f"({e} + {self.const(off, STORE[self.bits[self.reg[base]]])})" if off else e

    def regs_of(self, a):
        a = a.strip()
        return [x.strip() for x in a[1:-1].split(",")] if a.startswith("{") else [a]

    # -- code ------------------------------------------------------------------------------------------------------
    def function(self, s, masked):
        lines = []
        seg = self.seg[s]
        nxt = s + 1 if s + 1 < len(self.seg) else END
        ret = None
        for j in seg:
            b = self.ins[j]
            m = None
            if b.pred:
                p = f"R[{self.reg[b.pred]}]"
                m = f"(~{p})" if b.neg else p
            if b.op[0] in ("bra", "brx", "ret", "exit"):
                ret = self.branch(b, m, nxt, masked)
                break
            if masked:
                m = f"(M & {m})" if m else "M"
            try:
                code = self.emit(b, j, m, nxt)
            except (KeyError, NotImplementedError, PtxError, IndexError) as e:
                code = [
                    f"raise Fault('not emulated: line {b.line} ' + I[{j}].text + ' ' + {str(type(e).__name__ + ' ' + str(e))!r})"
                ]
            lines += code
        lines.append(f"return {ret}" if ret is not None else f"return {nxt}")
        src = f"def f(R, w, C{', M' if masked else ''}):\n" + "\n".join("    " + x for x in lines) + "\n"
        loc = {}
        exec(compile(src, f"<segment {s}{'m' if masked else ''}>", "exec"), self.ns, loc)
        return loc["f"]

    def branch(self, b, m, nxt, masked):
        if b.op[0] in ("ret", "exit"):
            if m is None:
                return "END" if not masked else "w.jump(M, END)"
            return f"w.split({m}, END, {nxt})" if not masked else f"w.msplit(M, {m}, END, {nxt})"
        if b.op[0] == "brx":
            table = [self.label[t] for t in self.k.tables[b.args[1]]]
            assert m is None
            return f"brx(w, {self.value(b.args[0], 'u4')}, {table}, {'M' if masked else 'None'})"
        t = self.label[b.args[0]]
        if m is None:
            return str(t) if not masked else f"w.jump(M, {t})"
        return f"w.split({m}, {t}, {nxt})" if not masked else f"w.msplit(M, {m}, {t}, {nxt})"

    def put(self, d, expr, m):
        """Assign array of the storage type to register d."""
        if d == "_":
            return []
        i = self.reg[d]
        return [f"R[{i}] = {expr}"] if m is None else [f"R[{i}] = where({m}, {expr}, R[{i}])"]

    def put_t(self, d, expr, t, m):
        """expr has numpy type t; the register may be wider."""
        if d == "_":
            return []
        i = self.reg[d]
        b = self.bits[i]
        if b == 1:
            return self.put(d, expr, m)
        st = STORE[b]
        if SIZE[t] == SIZE[st]:
            e = expr if t == st else f"({expr}).view({st})"
        elif SIZE[t] < SIZE[st]:
            e = (
                f"({expr}).astype({'i' if t[0] == 'i' else 'u'}{st[1]}).view({st})"
                if t[0] != "f"
                else f"({expr}).view(u{t[1]}).astype({st})"
            )
        else:
            e = f"({expr}).astype({st})"
        return self.put(d, e, m)

    def emit(self, b: Instr, j: int, m, nxt):
        op, a = b.op, b.args
        o = op[0]
        N = b.name
        V, put = self.value, self.put_t
        M = m or "None"
        last = op[-1]
        t = NP.get(last)
        if o in (
            "add",
            "sub",
            "mul",
            "mad",
            "fma",
            "min",
            "max",
            "div",
            "neg",
            "abs",
            "ex2",
            "lg2",
            "rcp",
            "sqrt",
            "rsqrt",
            "sin",
            "cos",
            "tanh",
            "selp",
            "and",
            "or",
            "xor",
            "not",
            "shl",
            "shr",
            "bfe",
        ):
            odd = set(op[1:-1]) - {"rn", "ftz", "full", "approx", "lo", "hi", "wide", "NaN", "relu"}
            if odd:
                raise NotImplementedError(f"modifier {sorted(odd)}")
        if last in ("bf16", "bf16x2", "f16", "f16x2") and o in ("add", "sub", "mul", "fma", "min", "max", "abs", "neg"):
            u = "u4" if last.endswith("x2") else "u2"
            kind = last.removesuffix("x2")
            return put(a[0], f"half({o!r}, {kind!r}, {u}, {'relu' in op}, {', '.join(V(x, u) for x in a[1:])})", u, m)
        if last in ("bf16", "bf16x2", "f16x2") and o in ("setp", "ex2", "tanh", "set"):
            raise NotImplementedError(N)
        if o == "mov":
            if last == "pred":
                return self.put(
                    a[0],
                    f"np.full(32, {int(a[1]) != 0})" if re.fullmatch(r"-?\d+", a[1]) else f"R[{self.reg[a[1]]}]",
                    m,
                )
            if a[0].startswith("{"):
                d = self.regs_of(a[0])
                part = {2: "u2", 4: "u4"}[SIZE[t] // len(d)] if SIZE[t] // len(d) in (2, 4) else "u1"
                if SIZE[t] // len(d) == 1:
                    part = "u1"
                code = [f"t_ = np.ascontiguousarray({V(a[1], t)}).view({part}).reshape(32, {len(d)})"]
                for i, x in enumerate(d):
                    code += put(x, f"t_[:, {i}].copy()", part, m)
                return code
            if a[1].startswith("{"):
                s = self.regs_of(a[1])
                part = {1: "u1", 2: "u2", 4: "u4"}[SIZE[t] // len(s)]
                cols = ", ".join(V(x, part) for x in s)
                return put(a[0], f"np.stack([{cols}], axis=1).view(u{SIZE[t]}).ravel()", "u" + str(SIZE[t]), m)
            return put(a[0], V(a[1], "u" + t[1]), "u" + t[1], m)
        if (
            o in ("add", "sub", "mul", "min", "max", "div", "rem")
            and t
            and not (o == "mul" and op[1] in ("wide", "hi"))
        ):
            x, y = V(a[1], t), V(a[2], t)
            if t[0] == "f":
                if o in ("min", "max"):
                    f = {
                        "min": "np.minimum" if "NaN" in op else "np.fmin",
                        "max": "np.maximum" if "NaN" in op else "np.fmax",
                    }[o]
                    e = f"{f}({x}, {y})"
                else:
                    e = f"({x} {dict(add='+', sub='-', mul='*', div='/')[o]} {y})"
                if last == "bf16":
                    raise NotImplementedError
                if "ftz" in op:
                    e = f"ftz({e})"
            elif last == "bf16" or last.endswith("x2"):
                raise NotImplementedError
            elif o in ("min", "max"):
                e = f"np.{o}imum({x}, {y})"
            elif o == "div":
                e = f"idiv({x}, {y})"
            elif o == "rem":
                e = f"irem({x}, {y})"
            else:
                e = f"({x} {dict(add='+', sub='-', mul='*')[o]} {y})"
            return put(a[0], e, t, m)
        if o == "mul":
            s = {"u2": "u4", "i2": "i4", "u4": "u8", "i4": "i8"}
            if op[1] == "wide":
                return put(a[0], f"({V(a[1], t)}.astype({s[t]}) * {V(a[2], t)}.astype({s[t]}))", s[t], m)
            if t in s:
                return put(
                    a[0],
                    f"(({V(a[1], t)}.astype({s[t]}) * {V(a[2], t)}.astype({s[t]})) >> {s[t]}({SIZE[t] * 8})).astype({t})",
                    t,
                    m,
                )
            return put(a[0], f"mulhi64({V(a[1], t)}, {V(a[2], t)})", t, m)
        if o == "mad":
            s = {"u2": "u4", "i2": "i4", "u4": "u8", "i4": "i8"}
            if op[1] == "wide":
                return put(
                    a[0], f"({V(a[1], t)}.astype({s[t]}) * {V(a[2], t)}.astype({s[t]}) + {V(a[3], s[t])})", s[t], m
                )
            if op[1] == "lo":
                return put(a[0], f"({V(a[1], t)} * {V(a[2], t)} + {V(a[3], t)})", t, m)
            raise NotImplementedError
        if o == "fma":
            x, y, z = (V(q, t) for q in a[1:4])
            if t == "f4":
                e = f"({x}.astype(f8) * {y} + {z}).astype(f4)"
            elif t == "f8":
                e = f"({x} * {y} + {z})"
            else:
                raise NotImplementedError
            return put(a[0], f"ftz({e})" if "ftz" in op else e, t, m)
        if o == "neg":
            return put(a[0], f"(-{V(a[1], t)})", t, m)
        if o == "abs":
            return put(a[0], f"np.abs({V(a[1], t)})", t, m)
        if o in ("and", "or", "xor"):
            s = {"and": "&", "or": "|", "xor": "^"}[o]
            if last == "pred":
                return self.put(a[0], f"({V(a[1], 'u1')} {s} {V(a[2], 'u1')})", m)
            return put(a[0], f"({V(a[1], t)} {s} {V(a[2], t)})", t, m)
        if o == "not":
            return self.put(a[0], f"(~{V(a[1], 'u1')})", m) if last == "pred" else put(a[0], f"(~{V(a[1], t)})", t, m)
        if o in ("shl", "shr"):
            return put(a[0], f"{o}({V(a[1], t)}, {V(a[2], 'u4')})", t, m)
        if o == "shf":
            return put(
                a[0], f"shf_{op[1]}({V(a[1], 'u4')}, {V(a[2], 'u4')}, {V(a[3], 'u4')}, {op[2] == 'wrap'})", "u4", m
            )
        if o == "lop3":
            return put(a[0], f"lop3({V(a[1], 'u4')}, {V(a[2], 'u4')}, {V(a[3], 'u4')}, {int(a[4], 0)})", "u4", m)
        if o == "bfe" and re.fullmatch(r"\d+", a[2]) and re.fullmatch(r"\d+", a[3]) and t[1] in "48":
            p, l, bits = int(a[2]), int(a[3]), SIZE[t] * 8
            if p + l <= bits and l > 0:
                if t[0] == "u":
                    return put(a[0], f"(({V(a[1], t)} >> {t}({p})) & {t}({(1 << l) - 1}))", t, m)
                return put(a[0], f"(({V(a[1], t)} << {t}({bits - p - l})) >> {t}({bits - l}))", t, m)
        if o == "bfe":
            return put(a[0], f"bfe({V(a[1], t)}, {V(a[2], 'u4')}, {V(a[3], 'u4')})", t, m)
        if o == "bfi":
            return put(a[0], f"bfi({V(a[1], t)}, {V(a[2], t)}, {V(a[3], 'u4')}, {V(a[4], 'u4')})", t, m)
        if o == "prmt":
            if len(op) > 2:
                raise NotImplementedError
            return put(a[0], f"prmt({V(a[1], 'u4')}, {V(a[2], 'u4')}, {V(a[3], 'u4')})", "u4", m)
        if o in ("popc", "clz", "brev"):
            return put(a[0], f"{o}({V(a[1], t)})", "u4", m)
        if o == "setp":
            rel = op[1]
            boolop = op[2] if op[2] in ("and", "or", "xor") else None
            x, y = V(a[1], t), V(a[2], t)
            base = rel
            if t[0] == "f":
                if rel == "num":
                    e = f"~(np.isnan({x}) | np.isnan({y}))"
                elif rel == "nan":
                    e = f"(np.isnan({x}) | np.isnan({y}))"
                elif rel in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
                    neg = {
                        "equ": f"(({x} < {y}) | ({x} > {y}))",
                        "neu": f"({x} == {y})",
                        "ltu": f"({x} >= {y})",
                        "leu": f"({x} > {y})",
                        "gtu": f"({x} <= {y})",
                        "geu": f"({x} < {y})",
                    }[rel]
                    e = f"(~{neg})"
                elif rel == "ne":
                    e = f"(({x} < {y}) | ({x} > {y}))"
                else:
                    e = f"({x} {dict(eq='==', lt='<', le='<=', gt='>', ge='>=')[rel]} {y})"
            else:
                base = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(rel, rel)
                e = f"({x} {dict(eq='==', ne='!=', lt='<', le='<=', gt='>', ge='>=')[base]} {y})"
            if boolop:
                p = a[3]
                q = f"(~R[{self.reg[p[1:]]}])" if p.startswith("!") else f"R[{self.reg[p]}]"
                e = f"({e} {dict(zip(('and', 'or', 'xor'), '&|^'))[boolop]} {q})"
            ds = a[0].split("|")
            code = self.put(ds[0].strip(), e, m)
            if len(ds) > 1:
                code += self.put(ds[1].strip(), f"(~({e}))", m)
            return code
        if o == "selp":
            p = V(a[3], "u1")
            return put(a[0], f"where({p}, {V(a[1], 'u' + t[1])}, {V(a[2], 'u' + t[1])})", "u" + t[1], m)
        if o == "cvt":
            return self.cvt(b, m)
        if o == "cvta":
            if "shared" in op:
                return put(a[0], f"({V(a[1], 'u8')} {'-' if 'to' in op else '+'} u8({SHARED_WINDOW}))", "u8", m)
            return put(a[0], V(a[1], "u8"), "u8", m)
        if o in ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"):
            f = {
                "ex2": "np.exp2",
                "lg2": "np.log2",
                "rcp": "(f4(1)/",
                "rsqrt": "rsqrt",
                "sqrt": "np.sqrt",
                "sin": "np.sin",
                "cos": "np.cos",
                "tanh": "np.tanh",
            }[o]
            x = V(a[1], t)
            if "ftz" in op:
                x = f"ftz({x})"
            e = f"{f}{x})" if o == "rcp" else f"{f}({x})"
            return put(a[0], f"ftz({e})" if "ftz" in op else e, t, m)
        if o == "ld":
            return self.load(b, j, m)
        if o == "st":
            return self.store(b, j, m)
        if o == "shfl":
            mode = op[2]
            ds = a[0].split("|")
            code = [f"t_, q_ = shfl_{mode}(w, {V(a[1], 'u4')}, {V(a[2], 'u4')}, {V(a[3], 'u4')}, {M}, I[{j}])"]
            code += put(ds[0].strip(), "t_", "u4", m)
            if len(ds) > 1:
                code += self.put(ds[1].strip(), "q_", m)
            return code
        if o == "vote":
            if op[2] == "ballot":
                return put(a[0], f"ballot({V(a[1], 'u1')}, {M})", "u4", m)
            return self.put(a[0], f"vote_{op[2]}({V(a[1], 'u1')}, {M})", m)
        if o == "redux":
            return put(a[0], f"redux_{op[2]}({V(a[1], t)}, {M})", t, m)
        if o == "elect":
            d, p = (x.strip() for x in a[0].split("|"))
            code = [f"q_ = elect({M})"]
            return code + put(d, "np.full(32, int(q_.argmax()), u4)", "u4", m) + self.put(p, "q_", m)
        if o == "activemask":
            return put(a[0], f"ballot(np.ones(32,bool), {M})", "u4", m)
        if o == "ldmatrix":
            n = {"x1": 1, "x2": 2, "x4": 4}[op[4]]
            d = self.regs_of(a[0])
            code = [f"t_ = ldmatrix(C, w, I[{j}], {self.address(a[1], 'u4')}, {n}, {'trans' in op}, {M})"]
            for i, x in enumerate(d):
                code += put(x, f"t_[{i}]", "u4", m)
            return code
        if o == "stmatrix":
            d = self.regs_of(a[1])
            return [
                f"stmatrix(C, w, I[{j}], {self.address(a[0], 'u4')}, [{', '.join(V(x, 'u4') for x in d)}], {'trans' in op}, {M})"
            ]
        if o == "mma":
            shape = op[3]
            dt, ak, bk, ct = op[-4:]
            k = int(shape.split("k")[1])
            d = self.regs_of(a[0])
            L = lambda s: "[" + ", ".join(V(x, "u4") for x in self.regs_of(s)) + "]"
            if not shape.startswith("m16n8") or dt not in ("f32", "s32"):
                raise NotImplementedError
            code = [f"C.stats['mma'] += 1", f"t_ = mma({L(a[1])}, {L(a[2])}, {L(a[3])}, {ak!r}, {bk!r}, {dt!r})"]
            if m is not None:
                code.insert(0, f"w.whole({M}, I[{j}])")
            for i, x in enumerate(d):
                code += put(x, f"t_[{i}]", "u4", None)
            return code
        if o == "wgmma":
            return self.wgmma(b, j, m, nxt)
        if N.startswith(("bar.sync", "barrier.sync", "bar.cta.sync", "barrier.cta.sync")):
            ident = f"int({V(a[0], 'u4')}[0])"
            n = f"int({V(a[1], 'u4')}[0])" if len(a) > 1 else "C.nw*32"
            return ([f"w.whole({M}, I[{j}])"] if m else []) + [f"if not C.bar_sync(w, I[{j}], {ident}, {n}): return -2"]
        if N.startswith("bar.warp.sync"):
            return [f"w.whole({M}, I[{j}])"] if m else []
        if o == "setmaxnreg":
            return [f"if not C.setmaxnreg(w, I[{j}], {int(a[0])}, {op[1] == 'inc'}): return -2"]
        if o == "mbarrier":
            return self.mbarrier(b, j, m)
        if o == "fence" or o == "membar":
            if N.startswith("fence.proxy.async"):
                return (
                    [f"C.VA[w.i] = np.maximum(C.VA[w.i], C.VC[w.i]); C.tick(w)"]
                    if m is None
                    else [f"if ({M}).any():", f"    C.VA[w.i] = np.maximum(C.VA[w.i], C.VC[w.i]); C.tick(w)"]
                )
            if N.startswith("fence.proxy.tensormap"):
                return [f"C.map_acquire(w, I[{j}], {self.address(a[0])}, {M})"]
            return []
        if o == "tensormap":
            if op[1] == "cp_fenceproxy":
                return [f"C.map_publish(w, I[{j}], {self.address(a[0])}, {self.address(a[1])}, {M})"]
            field = op[3]
            if field in ("box_dim", "element_stride", "global_dim", "global_stride"):
                return [f"C.map_replace(w, I[{j}], {field!r}, {self.address(a[0])}, {int(a[1], 0)}, {V(a[2], t)}, {M})"]
            return [f"C.map_replace(w, I[{j}], {field!r}, {self.address(a[0])}, None, {V(a[1], t)}, {M})"]
        if N.startswith("cp.async.bulk.tensor"):

            def inside(s):
                x = split_args(s.strip()[1:-1])
                return x[0], self.regs_of(x[1])

            if op[5] == "global":  # store
                mp, co = inside(a[0])
                return [
                    f"C.tma_store(w, I[{j}], {V(mp, 'u8')}, [{', '.join(V(c, 'u4') for c in co)}], {self.address(a[1], 'u4')}, {M})"
                ]
            mp, co = inside(a[1])
            return [
                f"C.tma_load(w, I[{j}], {self.address(a[0], 'u4')}, {V(mp, 'u8')}, [{', '.join(V(c, 'u4') for c in co)}], {self.address(a[2], 'u4')}, {M})"
            ]
        if N.startswith("cp.async.bulk.commit_group"):
            return [f"C.bk_commit(w, I[{j}], {M})"]
        if N.startswith("cp.async.bulk.wait_group"):
            return (
                [f"C.bk_wait(w, I[{j}], {int(a[0])})"]
                if m is None
                else [f"if ({M}).any(): C.bk_wait(w, I[{j}], {int(a[0])})"]
            )
        if N.startswith("cp.async.commit_group"):
            return [f"C.cp_commit(w, I[{j}])"]
        if N.startswith("cp.async.wait_group"):
            return [f"C.cp_wait(w, I[{j}], {int(a[0])})"]
        if N.startswith("cp.async.wait_all"):
            return [f"C.cp_wait(w, I[{j}], None)"]
        if N.startswith("cp.async"):
            n = int(a[2], 0)
            size = V(a[3], "u4") if len(a) > 3 else "None"
            return [f"C.cp_async(w, I[{j}], {self.address(a[0], 'u4')}, {self.address(a[1])}, {n}, {size}, {M})"]
        if o in ("atom", "red"):
            if "cas" in op or "global" not in op:
                raise NotImplementedError
            kind = next(x for x in op if x in ("add", "max", "min", "exch", "or", "and"))
            u = "u" + t[1]
            if o == "red":
                return [f"C.atom(w, I[{j}], {self.address(a[0])}, {V(a[1], u)}, {kind!r}, {t}, {M})"]
            return put(a[0], f"C.atom(w, I[{j}], {self.address(a[1])}, {V(a[2], u)}, {kind!r}, {t}, {M})", u, m)
        if o == "trap":
            return [f"raise Fault('trap')"] if m is None else [f"if ({M}).any(): raise Fault('trap')"]
        if o in ("griddepcontrol", "prefetch", "nanosleep", "discard", "applypriority"):
            return []
        raise NotImplementedError(N)

    def cvt(self, b, m):
        op, a = b.op, b.args
        V, put = self.value, self.put_t
        names = [x for x in op[1:] if x in NP]
        d, s = names[0], names[1]
        sat = "satfinite" in op
        if d in ("bf16x2", "f16x2", "e4m3x2", "e5m2x2") and s == "f32":
            hi, lo = V(a[1], "f4"), V(a[2], "f4")
            if d == "bf16x2":
                return put(a[0], f"(fmt.to_bf16({hi}).astype(u4) << u4(16)) | fmt.to_bf16({lo})", "u4", m)
            if d == "f16x2":
                return put(a[0], f"({hi}.astype(f2).view(u2).astype(u4) << u4(16)) | {lo}.astype(f2).view(u2)", "u4", m)
            if d == "e4m3x2" and sat:
                return put(a[0], f"(fmt.to_e4m3({hi}).astype(u2) << u2(8)) | fmt.to_e4m3({lo})", "u2", m)
            raise NotImplementedError
        if d == "f16x2" and s in ("e4m3x2", "e5m2x2"):
            tab = "fmt.E4M3" if s[0:4] == "e4m3" else "fmt.E5M2"
            x = V(a[1], "u2")
            return put(
                a[0],
                f"({tab}[({x} >> u2(8))].astype(f2).view(u2).astype(u4) << u4(16)) | {tab}[({x} & u2(255))].astype(f2).view(u2)",
                "u4",
                m,
            )
        if d == "tf32":
            return put(a[0], f"fmt.to_tf32({V(a[1], 'f4')})", "u4", m)
        if d == "bf16" and s == "f32":
            return put(a[0], f"fmt.to_bf16({V(a[1], 'f4')})", "u2", m)
        if s == "bf16" and d == "f32":
            return put(a[0], f"fmt.from_bf16({V(a[1], 'u2')})", "f4", m)
        if d == "e4m3x2" and s == "f16x2" and sat:
            x = V(a[1], "u4")
            f = lambda e: f"fmt.to_e4m3(({e}).astype(u2).view(f2).astype(f4))"
            return put(a[0], f"({f(f'{x} >> u4(16)')}.astype(u2) << u2(8)) | {f(f'{x} & u4(65535)')}", "u2", m)
        if d == "f16" and s == "f32" and "rz" in op:
            return put(a[0], f"f16_rz({V(a[1], 'f4')}).view(u2)", "u2", m)
        if (
            {d, s} & {"bf16", "bf16x2", "f16x2", "e4m3x2", "e5m2x2", "tf32"}
            or set(op[1:]) - {d, s, "rn", "rni", "rzi", "rmi", "rpi", "rz", "ftz", "sat"}
            or ("sat" in op and "f" in d)
        ):
            raise NotImplementedError(b.name)
        dt, st = NP[d], NP[s]
        if "rz" in op and NP[d][0] == "f":
            raise NotImplementedError(b.name)
        x = V(a[1], st)
        if dt[0] == "f" and st[0] == "f":
            e = f"{x}.astype({dt})"
            for r, f in (("rni", "np.rint"), ("rzi", "np.trunc"), ("rmi", "np.floor"), ("rpi", "np.ceil")):
                if r in op:
                    e = f"{f}({x}).astype({dt})"
            return put(a[0], e, dt, m)
        if dt[0] == "f":
            return put(a[0], f"{x}.astype({dt})", dt, m)
        if st[0] == "f":
            f = next(
                f
                for r, f in (("rni", "np.rint"), ("rzi", "np.trunc"), ("rmi", "np.floor"), ("rpi", "np.ceil"))
                if r in op
            )
            lo, hi = {
                "i4": (-(2**31), 2**31 - 1),
                "u4": (0, 2**32 - 1),
                "i2": (-(2**15), 2**15 - 1),
                "u2": (0, 65535),
                "i1": (-128, 127),
                "u1": (0, 255),
                "i8": (-(2**63), 2**63 - 1025),
                "u8": (0, 2**64 - 2049),
            }[dt]
            return put(a[0], f"np.clip(np.nan_to_num({f}({x}.astype(f8)), nan=0.0), {lo}, {hi}).astype({dt})", dt, m)
        if "sat" in op:
            lo, hi = {
                "i1": (-128, 127),
                "u1": (0, 255),
                "i2": (-(2**15), 2**15 - 1),
                "u2": (0, 65535),
                "i4": (-(2**31), 2**31 - 1),
            }[dt]
            return put(a[0], f"np.clip({x}.astype(i8), {lo}, {hi}).astype({dt})", dt, m)
        # integers: the source is read with its own sign
        w = "i8" if st[0] == "i" else "u8"
        return put(a[0], f"{x}.astype({w}).astype({dt})", dt, m)

    def load(self, b, j, m):
        op, a = b.op, b.args
        t = NP[op[-1]]
        d = self.regs_of(a[0])
        n = SIZE[t] * len(d)
        M = m or "None"
        space = next((x for x in op if x.split("::")[0] in ("param", "shared", "global", "local", "const")), None)
        space = space.split("::")[0] if space else None
        code = []
        if space == "param":
            mm = re.match(r"\[\s*([\w$]+)(?:\s*\+\s*(\d+))?\s*\]", a[1])
            off = self.symbol(mm.group(1)) - PB + int(mm.group(2) or 0)
            code.append(
                f"t_ = np.broadcast_to(C.params[{off}:{off + n}].view({'u' + str(SIZE[t])}), (32, {len(d)})).view({t})"
            )
        else:
            f = {"shared": "ld_s", "global": "ld_g"}.get(space)
            if f is None:
                raise NotImplementedError(b.name)
            code.append(f"t_ = C.{f}(w, I[{j}], {self.address(a[1])}, {n}, {M}).view({t})")
        if len(d) > 1:
            code.append("t_ = np.ascontiguousarray(t_.T)")
            for i, x in enumerate(d):
                code += self.put_t(x, f"t_[{i}]", t, m)
        else:
            code += self.put_t(d[0], "t_[:, 0].copy()", t, m)
        return code

    def store(self, b, j, m):
        op, a = b.op, b.args
        t = NP[op[-1]]
        s = self.regs_of(a[1])
        u = f"u{SIZE[t]}"
        space = next(x.split("::")[0] for x in op if x.split("::")[0] in ("shared", "global"))
        f = {"shared": "st_s", "global": "st_g"}[space]
        data = ", ".join(self.value(x, u) for x in s)
        return [f"C.{f}(w, I[{j}], {self.address(a[0])}, np.stack([{data}], axis=1).view(u1), {m or 'None'})"]

    def wgmma(self, b, j, m, nxt):
        op, a = b.op, b.args
        N = b.name
        pre = [f"w.whole({m}, I[{j}])"] if m else []
        if op[1] == "fence":
            return pre
        if op[1] == "commit_group":
            return pre + [f"C.wgmma_commit(w, I[{j}])"]
        if op[1] == "wait_group":
            return pre + [f"C.wgmma_wait(w, I[{j}], {int(a[0])})"]
        mm = re.match(r"m64n(\d+)k(\d+)", op[4])
        n = int(mm.group(1))
        dt, ak, bk = op[5], op[6], op[7]
        if dt not in ("f32", "s32"):
            raise NotImplementedError(N)
        d = self.regs_of(a[0])
        assert len(d) == n // 2
        V = self.value
        if a[1].startswith("{"):
            A = "[" + ", ".join(V(x, "u4") for x in self.regs_of(a[1])) + "]"
            ta, rest = 0, a[4:]
            tb = int(rest[2]) if len(rest) > 2 else 0
        else:
            A = f"same({V(a[1], 'u8')}, w, I[{j}])"
            rest = a[4:]
            ta, tb = (int(rest[2]), int(rest[3])) if len(rest) > 2 else (0, 0)
        if rest[:2] not in (["1", "1"], []):
            if dt == "f32":
                raise NotImplementedError("negated operands")
        acc = a[3]
        accx = f"bool({V(acc, 'u1')}.all())" if acc in self.reg else str(int(acc, 0) != 0)
        code = pre + [
            f"c_ = [{', '.join(f'R[{self.reg[x]}]' for x in d)}]",
            f"d_ = np.full(({len(d)}, 32), 0x7FC0DEAD, u4)",
            f"C.wgmma(w, I[{j}], dict(kind={bk!r}, akind={ak!r}, n={n}, a={A}, b=same({V(a[2], 'u8')}, w, I[{j}]), ta={ta}, tb={tb}, acc={accx}, c=c_, d=d_, dt={dt!r}))",
        ]
        code += [f"{', '.join(f'R[{self.reg[x]}]' for x in d)} = d_"]
        return code

    def mbarrier(self, b, j, m):
        op, a = b.op, b.args
        V = self.value
        M = m or "None"
        if op[1] == "init":
            return [f"C.mbar_init(w, I[{j}], {self.address(a[0], 'u4')}, {V(a[1], 'u4')}, {M})"]
        if op[1] == "inval":
            return [f"C.mbar_inval(w, I[{j}], {self.address(a[0], 'u4')}, {M})"]
        if op[1] == "arrive" and op[2] == "expect_tx":
            return [f"C.mbar_arrive(w, I[{j}], {self.address(a[1], 'u4')}, None, {V(a[2], 'u4')}, {M})"]
        if op[1] == "arrive":
            if a[0] != "_":
                raise NotImplementedError("state of arrive")
            return [
                f"C.mbar_arrive(w, I[{j}], {self.address(a[1], 'u4')}, {V(a[2], 'u4') if len(a) > 2 else 'None'}, None, {M})"
            ]
        if op[1] == "expect_tx":
            return [f"C.mbar_expect(w, I[{j}], {self.address(a[0], 'u4')}, {V(a[1], 'u4')}, {M})"]
        if op[1] in ("try_wait", "test_wait"):
            if op[2] != "parity":
                raise NotImplementedError
            code = [
                f"t_ = C.mbar_wait(w, I[{j}], {self.address(a[1], 'u4')}, {V(a[2], 'u4')}, {M})",
                "if not t_: return -2",
            ]
            return code + self.put(a[0], "np.ones(32, bool)", m)
        raise NotImplementedError(b.name)

    # -- running a warp --------------------------------------------------------------------------------------------
    def start(self, w):
        w.regs = [POISON[b] for b in self.bits]

    def step(self, C, w, budget):
        R = w.regs
        if R is None:
            self.start(w)
            R = w.regs
        full, masked = self.full, self.masked
        while budget > 0:
            budget -= 1
            w.steps += 1
            pc = w.pc
            if w.pcs is None:
                if pc >= END:
                    w.state = "done"
                    return
                f = full.get(pc)
                if f is None:
                    f = full[pc] = self.function(pc, False)
                C.stats["instructions"] += len(self.seg[pc])
                n = f(R, w, C)
                if n >= 0:
                    w.pc = n
                elif n == -2:
                    w.state = "blocked"
                    return
                # -1: diverged
            else:
                live = w.pcs < END
                if not live.any():
                    w.state = "done"
                    return
                pc = int(w.pcs[live].min())
                M = w.pcs == pc
                if M.all():
                    w.pc, w.pcs = pc, None
                    continue
                f = masked.get(pc)
                if f is None:
                    f = masked[pc] = self.function(pc, True)
                C.stats["instructions"] += len(self.seg[pc])
                n = f(R, w, C, M)
                if n == -2:
                    w.state = "blocked"
                    return
                if n >= 0:
                    w.pcs = np.where(M, n, w.pcs)


POISON = {
    1: np.zeros(32, bool),
    8: np.full(32, 0xBA, u1),
    16: np.full(32, 0x7FFB, u2),
    32: np.full(32, 0x7FC0BEEF, u4),
    64: np.full(32, 0x7FF80000DEADBEEF, u8),
}


# -- warp control, bound to Warp -----------------------------------------------------------------------------------
def _split(w, c, t, f):
    if c.all():
        return t
    if not c.any():
        return f
    w.pcs = np.where(c, t, f).astype(i8)
    return -1


def _msplit(w, M, c, t, f):
    w.pcs = np.where(M, np.where(c, t, f), w.pcs)
    return -1


def _jump(w, M, t):
    w.pcs = np.where(M, t, w.pcs)
    return -1


def _whole(w, m, ins):
    if m is not None and not m.all():
        w.at = ins
        w.cta.fault(w, f"executed by part of the warp ({int(m.sum())} lanes)", True)


def brx(w, index, table, M):
    t = np.array(table + [END], i8)[np.minimum(index, len(table))]
    if M is None:
        if (t == t[0]).all():
            return int(t[0])
        w.pcs = t
        return -1
    w.pcs = np.where(M, t, w.pcs)
    return -1


from .cta import Warp  # noqa: E402

Warp.split, Warp.msplit, Warp.jump, Warp.whole = _split, _msplit, _jump, _whole


# -- helpers of the generated code -----------------------------------------------------------------------------------
def ftz(x):
    return x * (np.abs(x) >= f4(1.17549435e-38)) if x.dtype == f4 else x


def f16_rz(x):
    """float32 -> float16 towards zero."""
    h = (
        np.clip(x, -65504, 65504).astype(f2)
        if not np.isinf(x).any()
        else np.where(np.isinf(x), x, np.clip(x, -65504, 65504)).astype(f2)
    )
    return np.where(np.abs(h.astype(f4)) > np.abs(x), np.nextafter(h, f2(0)), h)


def half(op, kind, u, relu, *xs):
    """16-bit float arithmetic, one or two to a register: exact in float64, rounded once."""
    if op in ("abs", "neg"):
        m = {u2: 0x7FFF, u4: 0x7FFF7FFF}[u]
        return xs[0] & u(m) if op == "abs" else xs[0] ^ u(~m & ((1 << (16 if u is u2 else 32)) - 1))
    v = [fmt.from_bf16(x.view(u2)).astype(f8) if kind == "bf16" else x.view(f2).astype(f8) for x in xs]
    r = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
        "min": np.fmin,
        "max": np.fmax,
    }[op](*v)
    if relu:
        r = np.maximum(r, 0)
    return (fmt.to_bf16(r.astype(f4)) if kind == "bf16" else r.astype(f2).view(u2)).view(u)


def idiv(x, y):
    if x.dtype.kind == "u":
        return np.where(y == 0, np.iinfo(x.dtype).max, x // np.where(y == 0, 1, y)).astype(x.dtype)
    z = np.where(y == 0, 1, y)
    q = np.abs(x) // np.abs(z)
    return np.where(y == 0, -1, np.where((x < 0) != (z < 0), -q, q)).astype(x.dtype)


def irem(x, y):
    return (x - idiv(x, y) * y).astype(x.dtype)


def mulhi64(x, y):
    return np.array([(int(p) * int(q)) >> 64 for p, q in zip(x, y)], x.dtype)


def shl(x, n):
    bits = x.dtype.itemsize * 8
    return np.where(n >= bits, x.dtype.type(0), x << np.minimum(n, bits - 1).astype(x.dtype))


def shr(x, n):
    bits = x.dtype.itemsize * 8
    r = x >> np.minimum(n, bits - 1).astype(x.dtype)
    return r if x.dtype.kind == "i" else np.where(n >= bits, x.dtype.type(0), r)


def shf_l(a, b, c, wrap):
    n = (c & u4(31) if wrap else np.minimum(c, u4(32))).astype(u8)
    v = (b.astype(u8) << u8(32)) | a
    return ((v << n) >> u8(32)).astype(u4)


def shf_r(a, b, c, wrap):
    n = (c & u4(31) if wrap else np.minimum(c, u4(32))).astype(u8)
    v = (b.astype(u8) << u8(32)) | a
    return (v >> n).astype(u4)


def lop3(a, b, c, lut):
    out = np.zeros(32, u4)
    for i in range(8):
        if lut >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def bfe(x, pos, n):
    bits = x.dtype.itemsize * 8
    v = np.array([(int(p) & ((1 << bits) - 1)) for p in x], object) if False else None
    ux = x.view("u" + str(x.dtype.itemsize)).astype(u8)
    p, l = (pos & u4(255)).astype(u8), (n & u4(255)).astype(u8)
    r = shr(ux, p) & np.where(l >= 64, u8(0xFFFFFFFFFFFFFFFF), (u8(1) << np.minimum(l, u8(63))) - u8(1))
    if x.dtype.kind == "i":
        msb = np.minimum(p + l - u8(1), u8(bits - 1))
        s = np.where(l == 0, u8(0), shr(ux, msb) & u8(1))
        fill = np.where(l >= 64, u8(0), u8(0xFFFFFFFFFFFFFFFF) << np.minimum(l, u8(63)))
        r = np.where(s == 1, r | fill, r)
    return r.astype("u" + str(x.dtype.itemsize)).view(x.dtype)


def bfi(a, b, pos, n):
    d = b.dtype.type
    mask = ((1 << np.minimum(n, 31).astype(object)) - 1) << pos.astype(object)
    mask = np.array([int(x) & ((1 << (8 * b.dtype.itemsize)) - 1) for x in mask], b.dtype)
    return (b & ~mask) | (shl(a, pos) & mask)


def prmt(a, b, c):
    by = np.stack([a, b], axis=1).view(u1)  # [32, 8]
    out = np.empty((32, 4), u1)
    for i in range(4):
        s = (c >> u4(4 * i)) & u4(15)
        v = by[LANE, (s & u4(7)).astype(i8)]
        out[:, i] = np.where(s & u4(8), np.where(v & u1(128), u1(255), u1(0)), v)
    return out.view(u4).ravel()


def popc(x):
    return np.array([bin(int(v)).count("1") for v in x.view("u" + str(x.dtype.itemsize))], u4)


def clz(x):
    n = x.dtype.itemsize * 8
    return np.array([n - int(v).bit_length() for v in x.view("u" + str(x.dtype.itemsize))], u4)


def brev(x):
    return np.array([int(f"{int(v):032b}"[::-1], 2) for v in x], u4)


def rsqrt(x):
    return (1 / np.sqrt(x)).astype(x.dtype)


def _shfl(w, x, src, valid, m, ins):
    if m is not None and not m.all():
        act = m
        if (valid & ~act[src] & act).any():
            w.at = ins
            w.cta.fault(w, "shfl reads a lane that does not take part", True)
    return np.where(valid, x[np.where(valid, src, LANE)], x), valid


def shfl_bfly(w, x, b, c, m, ins):
    seg, cl = (c >> u4(8)).astype(i8) & 31, c.astype(i8) & 31
    mx = (LANE & seg) | (cl & ~seg)
    j = LANE ^ (b.astype(i8) & 31)
    return _shfl(w, x, j, j <= mx, m, ins)


def shfl_idx(w, x, b, c, m, ins):
    seg, cl = (c >> u4(8)).astype(i8) & 31, c.astype(i8) & 31
    mx = (LANE & seg) | (cl & ~seg)
    j = (LANE & seg) | ((b.astype(i8) & 31) & ~seg)
    return _shfl(w, x, j, j <= mx, m, ins)


def shfl_up(w, x, b, c, m, ins):
    seg, cl = (c >> u4(8)).astype(i8) & 31, c.astype(i8) & 31
    mx = (LANE & seg) | (cl & ~seg)
    j = LANE - (b.astype(i8) & 31)
    return _shfl(w, x, j, j >= mx, m, ins)


def shfl_down(w, x, b, c, m, ins):
    seg, cl = (c >> u4(8)).astype(i8) & 31, c.astype(i8) & 31
    mx = (LANE & seg) | (cl & ~seg)
    j = LANE + (b.astype(i8) & 31)
    return _shfl(w, x, j, j <= mx, m, ins)


def ballot(p, m):
    p = p if m is None else p & m
    return np.full(32, int((p.astype(u8) << LANE.astype(u8)).sum()), u4)


def vote_any(p, m):
    return np.full(32, bool((p if m is None else p[m]).any()))


def vote_all(p, m):
    return np.full(32, bool((p if m is None else p[m]).all()))


def _redux(f):
    return lambda x, m: np.full(32, f(x if m is None else x[m]), x.dtype)


redux_add = _redux(lambda v: v.sum(dtype=v.dtype))
redux_min, redux_max = _redux(np.min), _redux(np.max)
redux_or, redux_and, redux_xor = (
    _redux(np.bitwise_or.reduce),
    _redux(np.bitwise_and.reduce),
    _redux(np.bitwise_xor.reduce),
)


def elect(m):
    q = np.zeros(32, bool)
    q[0 if m is None else int(np.argmax(m))] = True
    return q


def same(x, w, ins):
    if (x != x[0]).any():
        w.at = ins
        w.cta.fault(w, "matrix descriptor differs between lanes", True)
    return int(x[0])


def ldmatrix(C, w, ins, addr, n, trans, m):
    w.whole(m, ins)
    w.at = ins
    a = C.saddr(w, addr[: 8 * n], 16, None)
    idx = a[:, None] + AR[16]
    C.rd(w, idx.ravel())
    v = C.S[idx].reshape(n, 8, 16)
    out = []
    g, t = LANE >> 2, LANE & 3
    for i in range(n):
        e = np.ascontiguousarray(v[i]).view(u2)  # [8, 8]
        pair = np.stack([e[2 * t, g], e[2 * t + 1, g]], 1) if trans else np.stack([e[g, 2 * t], e[g, 2 * t + 1]], 1)
        out.append(np.ascontiguousarray(pair).view(u4).ravel())
    return out


def stmatrix(C, w, ins, addr, regs, trans, m):
    w.whole(m, ins)
    n = len(regs)
    g, t = LANE >> 2, LANE & 3
    rows = np.empty((n, 8, 8), u2)
    for i, r in enumerate(regs):
        p = np.ascontiguousarray(r).view(u2).reshape(32, 2)
        if trans:
            rows[i, 2 * t, g], rows[i, 2 * t + 1, g] = p[:, 0], p[:, 1]
        else:
            rows[i, g, 2 * t], rows[i, g, 2 * t + 1] = p[:, 0], p[:, 1]
    data = rows.reshape(8 * n, 8).view(u1)
    mask = LANE < 8 * n
    full = np.zeros((32, 16), u1)
    full[: 8 * n] = data
    C.st_s(w, ins, addr, full, None if n == 4 else mask)


HELPERS = {
    n: g
    for n, g in list(globals().items())
    if callable(g)
    and n not in ("Program", "parse")
    and not n.startswith("_")
    and n not in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "mma", "Fault", "where")
}
