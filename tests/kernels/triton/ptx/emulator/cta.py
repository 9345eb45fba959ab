# ruff: noqa
"""One CTA: memory, warps, barriers, asynchronous units, and what is wrong with how they meet.

Happens-before is kept in vector clocks, so a race is found whatever the order in which the emulator happens to run the
warps. Agents: each warp; for each warp its wgmma, its cp.async and its bulk stores; each TMA load on its own.
VC[w] is what warp w knows of; VA[w] is what operations of the async proxy that w issues may see (fence.proxy.async).
"""

from __future__ import annotations
import random
import numpy as np
from .formats import u1, u2, u4, u8, i4, i8, f4, f8, decode, SIZE

SB = 1024  # shared memory starts here, as on Hopper
GB = 0x7F1000000000  # global memory
PB = 0x7E0000000000  # parameters
SHARED_WINDOW = 0x7D0000000000  # shared memory as generic addresses
AR = {n: np.arange(n, dtype=i8) for n in (1, 2, 4, 8, 12, 16, 32, 128)}
LANE = np.arange(32)
MAX_TMA = 6000


class Fault(Exception):
    pass


class Deadlock(Fault):
    pass


class Global:
    """Device memory: allocations with red zones between them."""

    def __init__(self, size=1 << 20):
        self.mem = np.full(size, 0xEE, u1)
        self.ok = np.zeros(size, bool)
        self.top = 4096
        self.blocks = []
        self.desc = {}  # address of a tensormap -> (warp, clock) that published it, acquired

    def alloc(self, nbytes, name=""):
        size = (nbytes + 255) // 256 * 256 + 1024
        while self.top + size > len(self.mem):
            self.mem = np.concatenate([self.mem, np.full(len(self.mem), 0xEE, u1)])
            self.ok = np.concatenate([self.ok, np.zeros(len(self.ok), bool)])
        at = self.top
        self.top += size
        self.ok[at : at + nbytes] = True
        self.blocks.append((at, nbytes, name))
        return GB + at

    def whose(self, addr):
        at = int(addr) - GB
        for start, n, name in self.blocks:
            if start - 512 <= at < start + n + 512:
                return f"{name}{'+' if at >= start else ''}{at - start} of {n}"
        return hex(int(addr))


class Mbar:
    def __init__(self, count, na):
        self.count = count
        self.pending = count
        self.tx = 0
        self.phase = 0
        self.cur = np.zeros(na, i4)
        self.cura = np.zeros(na, i4)
        self.vc = np.zeros(na, i4)
        self.va = np.zeros(na, i4)

    def check(self):
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.count
            np.maximum(self.vc, self.cur, out=self.vc)
            np.maximum(self.va, self.cura, out=self.va)


class Warp:
    def __init__(self, cta, i):
        self.cta, self.i = cta, i
        self.pc = 0
        self.pcs = None  # per lane once they diverge
        self.state = "ready"
        self.wake = None
        self.why = ""
        self.tid = (np.arange(32) + 32 * i).astype(u4)
        self.wg_open, self.wg_groups, self.wg_seq, self.wg_done = [], [], 0, 0
        self.cp_open, self.cp_groups, self.cp_seq, self.cp_done = [], [], 0, 0
        self.bk_open, self.bk_groups, self.bk_seq, self.bk_done = [], [], 0, 0
        self.at = None  # instruction being executed (for messages), set by side-effect ops
        self.regs = None
        self.wgmmas = 0
        self.nregs = 0
        self.steps = 0


class Cta:
    def __init__(
        self,
        prog,
        gmem,
        params,
        nwarps,
        smem,
        ctaid=(0, 0, 0),
        nctaid=(1, 1, 1),
        *,
        asynchronous="late",
        schedule="rr",
        seed=0,
        races=True,
        strict=True,
        maxreg=None,
    ):
        self.prog, self.g, self.nw = prog, gmem, nwarps
        self.params = params
        self.async_mode, self.schedule = asynchronous, schedule
        self.rng = random.Random(seed)
        self.races, self.strict = races, strict
        self.smem = smem
        self.S = np.full(SB + smem + 64, 0xCD, u1)
        n = len(self.S)
        self.NA = 4 * nwarps + MAX_TMA
        self.Wag = np.full(n, -1, np.int16)
        self.Wcl = np.zeros(n, i4)
        self.Rcl = np.zeros((4 * nwarps, n), i4)
        self.VC = [np.zeros(self.NA, i4) for _ in range(nwarps)]
        self.VA = [np.zeros(self.NA, i4) for _ in range(nwarps)]
        for w in range(nwarps):
            self.VC[w][w] = 1
        self.mbars: dict[int, Mbar] = {}
        self.bars: dict[int, dict] = {}
        self.tma = []  # pending TMA loads
        self.ntma = 0
        self.warps = [Warp(self, i) for i in range(nwarps)]
        self.ctaid, self.nctaid = ctaid, nctaid
        self.faults: list[str] = []
        self.stats = {"instructions": 0, "tma_bytes": 0, "wgmma": 0, "tma": 0, "mma": 0}
        self._seen = set()
        self._offsets = {}
        self.regpool = None
        if maxreg:
            self.regpool = 0
            for w in self.warps:
                w.nregs = maxreg

    # -- complaints --------------------------------------------------------------------------------------------
    def fault(self, w, text, fatal=False):
        at = w.at if w is not None else None
        where = f"warp {w.i} line {at.line} ({at.loc}) `{at.name}`" if at is not None else "?"
        msg = f"{where}: {text}"
        key = (at.line if at is not None else 0, text[:24])
        if key not in self._seen:
            self._seen.add(key)
            self.faults.append(msg)
        if fatal:
            raise Fault(msg)

    def agent(self, a):
        n = self.nw
        if a < 0:
            return "nobody"
        return (
            f"warp {a}"
            if a < n
            else f"wgmma of warp {a - n}"
            if a < 2 * n
            else f"cp.async of warp {a - 2 * n}"
            if a < 3 * n
            else f"bulk store of warp {a - 3 * n}"
            if a < 4 * n
            else f"TMA load {a - 4 * n}"
        )

    # -- happens-before ------------------------------------------------------------------------------------------
    def rd(self, w, idx, who=None, clock=None, known=None, proxy=None):
        """A read of bytes ``idx`` by agent ``who`` that knows ``known``; ``proxy``: what the async proxy may see."""
        if not self.races:
            return
        who = w.i if who is None else who
        known = self.VC[w.i] if known is None else known
        ag = self.Wag[idx]
        if (ag < 0).any():
            self.fault(w, f"reads shared bytes never written, first at {int(idx[np.argmax(ag < 0)]) - SB}")
            ag = np.maximum(ag, 0)
        cl = self.Wcl[idx]
        bad = cl > known[ag]
        if bad.any():
            j = int(np.argmax(bad))
            self.fault(
                w,
                f"race: {self.agent(who)} reads shared byte {int(idx[j]) - SB} that {self.agent(int(ag[j]))} wrote, not ordered",
            )
        elif proxy is not None:
            bad = cl > proxy[ag]
            if bad.any():
                j = int(np.argmax(bad))
                self.fault(
                    w,
                    f"proxy: {self.agent(who)} reads shared byte {int(idx[j]) - SB} that {self.agent(int(ag[j]))} wrote without fence.proxy.async",
                )
        self.Rcl[who, idx] = self.VC[w.i][w.i] if clock is None else clock

    def wr(self, w, idx, who=None, clock=None, known=None, proxy=None, data=None):
        if not self.races:
            return
        who = w.i if who is None else who
        known = self.VC[w.i] if known is None else known
        ag = np.maximum(self.Wag[idx], 0)
        cl = self.Wcl[idx]
        bad = cl > known[ag]
        if data is not None and bad.any():
            bad &= self.S[idx] != data  # several warps may store one and the same value
        if bad.any():
            j = int(np.argmax(bad))
            self.fault(
                w,
                f"race: {self.agent(who)} writes shared byte {int(idx[j]) - SB} that {self.agent(int(ag[j]))} wrote, not ordered",
            )
        elif proxy is not None and (cl > proxy[ag]).any():
            j = int(np.argmax(cl > proxy[ag]))
            self.fault(
                w,
                f"proxy: {self.agent(who)} overwrites shared byte {int(idx[j]) - SB} that {self.agent(int(ag[j]))} wrote without fence.proxy.async",
            )
        rb = self.Rcl[:, idx] > known[: 4 * self.nw, None]
        if who < 4 * self.nw:
            rb[who] = False
        if rb.any():
            a, j = np.unravel_index(int(np.argmax(rb)), rb.shape)
            self.fault(
                w,
                f"race: {self.agent(who)} writes shared byte {int(idx[j]) - SB} that {self.agent(int(a))} may still read",
            )
        self.Wag[idx] = who
        self.Wcl[idx] = self.VC[w.i][w.i] if clock is None else clock

    def tick(self, w):
        self.VC[w.i][w.i] += 1

    # -- shared memory -------------------------------------------------------------------------------------------
    def saddr(self, w, addr, n, m):
        a = addr.astype(i8)
        if m is not None:
            a = a[m]
        if a.size and a.max() >= SHARED_WINDOW:
            a = np.where(a >= SHARED_WINDOW, a - SHARED_WINDOW, a)
        if a.size:
            if (a % n).any():
                self.fault(w, f"shared address {int(a[(a % n) != 0][0])} not aligned to {n}", True)
            if a.min() < SB or a.max() + n > SB + self.smem:
                b = a[(a < SB) | (a + n > SB + self.smem)][0]
                self.fault(w, f"shared access at {int(b) - SB} of {self.smem}", True)
        return a

    def ld_s(self, w, ins, addr, n, m=None):
        w.at = ins
        a = self.saddr(w, addr, n, m)
        idx = a[:, None] + AR[n]
        self.rd(w, idx.ravel())
        v = self.S[idx]
        if m is not None:
            full = np.zeros((32, n), u1)
            full[m] = v
            return full
        return v

    def st_s(self, w, ins, addr, data, m=None):
        """data [32, n] uint8"""
        w.at = ins
        n = data.shape[1]
        a = self.saddr(w, addr, n, m)
        if not a.size:
            return
        if m is not None:
            data = data[m]
        idx = a[:, None] + AR[n]
        if self.races:
            u = np.sort(a)
            if (u[1:] < u[:-1] + n).any():  # lanes of one instruction write the same bytes: same values are harmless
                flat = idx.ravel()
                o = np.argsort(flat, kind="stable")
                same = flat[o][1:] == flat[o][:-1]
                d = data.ravel()[o]
                if (same & (d[1:] != d[:-1])).any():
                    self.fault(w, "lanes store different values to one shared address")
        f = idx.ravel()
        self.wr(w, f, data=data.ravel())
        if self.mbars:
            self.spare_barriers(w, a, n)
        self.S[idx] = data

    def spare_barriers(self, w, a, n):
        """A barrier whose bytes are overwritten is gone; whoever still uses it is told so."""
        for b in [b for b in self.mbars if ((a < b + 8) & (a + n > b)).any()]:
            del self.mbars[b]

    # -- global memory -------------------------------------------------------------------------------------------
    def gaddr(self, w, addr, n, m):
        a = addr if m is None else addr[m]
        if not a.size:
            return a.astype(i8)
        o = (a - u8(GB)).view(i8)
        if (o % n).any():
            self.fault(w, f"global address {self.g.whose(a[(o % n) != 0][0])} not aligned to {n}", True)
        bad = (o < 0) | (o + n > len(self.g.mem))
        if not bad.any():
            bad = ~(self.g.ok[o] & self.g.ok[o + n - 1])
        if bad.any():
            self.fault(w, f"global access out of bounds: {self.g.whose(a[bad][0])}", True)
        return o

    def ld_g(self, w, ins, addr, n, m=None):
        w.at = ins
        o = self.gaddr(w, addr, n, m)
        v = self.g.mem[o[:, None] + AR[n]]
        if m is not None:
            full = np.zeros((32, n), u1)
            full[m] = v
            return full
        return v

    def st_g(self, w, ins, addr, data, m=None):
        w.at = ins
        n = data.shape[1]
        o = self.gaddr(w, addr, n, m)
        self.g.mem[o[:, None] + AR[n]] = data if m is None else data[m]

    def atom(self, w, ins, addr, val, op, dt, m=None):
        w.at = ins
        n = np.dtype(dt).itemsize
        m = np.ones(32, bool) if m is None else m
        o = self.gaddr(w, addr, n, m)
        old = np.zeros(32, dt)
        for lane, at in zip(np.nonzero(m)[0], o):
            cell = self.g.mem[at : at + n].view(dt)
            old[lane] = cell[0]
            x = val.view(dt)[lane]
            cell[0] = {
                "add": lambda a, b: a + b,
                "max": max,
                "min": min,
                "exch": lambda a, b: b,
                "or": lambda a, b: a | b,
                "and": lambda a, b: a & b,
            }[op](cell[0], x)
        return old.view({4: u4, 8: u8}[n])

    def param(self, off, n):
        return self.params[off : off + n]

    def generic(self, w, addr, n):
        """n bytes at one generic address: parameters, shared or global."""
        a = int(addr)
        if PB <= a < PB + len(self.params):
            return self.params[a - PB : a - PB + n]
        if a >= GB:
            o = a - GB
            if not self.g.ok[o : o + n].all():
                self.fault(w, f"global access out of bounds: {self.g.whose(a)}", True)
            return self.g.mem[o : o + n]
        raise Fault(f"generic address {a:#x}")

    # -- barriers ------------------------------------------------------------------------------------------------
    def bar_sync(self, w, ins, ident, threads):
        """True once everybody came."""
        w.at = ins
        if threads % 32:
            self.fault(w, f"bar.sync of {threads} threads", True)
        b = self.bars.setdefault(ident, {"in": set(), "n": threads, "gen": 0, "lines": {}})
        key = (w.i, ident)
        if getattr(w, "bar", None) is None:
            if b["in"] and b["n"] != threads:
                self.fault(w, f"barrier {ident} with {threads} threads while others wait with {b['n']}")
            b["n"] = threads
            b["in"].add(w.i)
            w.bar = (ident, b["gen"])
            if len(b["in"]) * 32 > threads:
                self.fault(w, f"more threads than {threads} at barrier {ident}", True)
            if len(b["in"]) * 32 == threads:
                j = np.max([self.VC[i] for i in b["in"]], axis=0)
                ja = np.max([self.VA[i] for i in b["in"]], axis=0)
                for i in b["in"]:
                    self.VC[i] = j.copy()
                    self.VA[i] = ja.copy()
                    self.VC[i][i] += 1
                b["in"] = set()
                b["gen"] += 1
        ident, gen = w.bar
        if b["gen"] > gen:
            w.bar = None
            return True
        w.why = f"barrier {ident} ({len(b['in'])} of {b['n'] // 32} warps)"
        w.wake = lambda: b["gen"] > gen
        return False

    def mbar(self, w, addr, proxy=False):
        a = int(addr)
        if a >= SHARED_WINDOW:
            a -= SHARED_WINDOW
        b = self.mbars.get(a)
        if b is None:
            self.fault(w, f"no mbarrier is initialised at {a - SB}", True)
        if self.races:
            ag, cl = int(self.Wag[a]), self.Wcl[a]
            if cl > self.VC[w.i][ag]:
                self.fault(w, f"race: uses the mbarrier at {a - SB} that {self.agent(ag)} initialised, not ordered")
            elif proxy and cl > self.VA[w.i][ag]:
                self.fault(
                    w,
                    f"proxy: TMA uses the mbarrier at {a - SB} initialised by {self.agent(ag)} without fence.proxy.async",
                )
        return b

    def lanes(self, m):
        return range(32) if m is None else np.nonzero(m)[0]

    def mbar_init(self, w, ins, addr, count, m=None):
        w.at = ins
        for l in self.lanes(m):
            a = int(addr[l])
            if a % 8 or a < SB or a + 8 > SB + self.smem:
                self.fault(w, f"mbarrier at {a - SB}", True)
            self.wr(w, a + AR[8])
            self.mbars[a] = Mbar(int(count[l]), self.NA)

    def mbar_inval(self, w, ins, addr, m=None):
        w.at = ins
        for l in self.lanes(m):
            a = int(addr[l])
            self.mbar(w, a)
            self.wr(w, a + AR[8])
            del self.mbars[a]

    def mbar_arrive(self, w, ins, addr, count, tx, m=None):
        """count arrivals per lane after expecting tx bytes"""
        w.at = ins
        any_ = False
        for l in self.lanes(m):
            b = self.mbar(w, addr[l])
            any_ = True
            if tx is not None:
                b.tx += int(tx[l])
            n = 1 if count is None else int(count[l])
            if n > b.pending:
                self.fault(w, f"mbarrier at {int(addr[l]) - SB}: {n} arrivals, {b.pending} pending", True)
            np.maximum(b.cur, self.VC[w.i], out=b.cur)
            np.maximum(b.cura, self.VA[w.i], out=b.cura)
            b.pending -= n
            b.check()
        if any_:
            self.tick(w)

    def mbar_expect(self, w, ins, addr, tx, m=None):
        w.at = ins
        for l in self.lanes(m):
            self.mbar(w, addr[l]).tx += int(tx[l])

    def mbar_wait(self, w, ins, addr, parity, m=None):
        """Predicate of lanes, or None if the warp has to wait."""
        w.at = ins
        ls = self.lanes(m)
        a = {int(addr[l]) for l in ls}
        if len(a) != 1 or len({int(parity[l]) for l in ls}) != 1:
            self.fault(w, "try_wait on different barriers in one warp: not emulated", True)
        l = ls[0]
        b = self.mbar(w, addr[l])
        p = int(parity[l])
        if p > 1:
            self.fault(w, f"proxy: parity {p:#x} is not 0 or 1; the assembler takes bit 0")
            p &= 1
        if (b.phase & 1) != p:
            np.maximum(self.VC[w.i], b.vc, out=self.VC[w.i])
            np.maximum(self.VA[w.i], b.va, out=self.VA[w.i])
            return True
        w.why = f"mbarrier at {a.pop() - SB} (phase {b.phase}, {b.pending} of {b.count} arrivals pending, {b.tx} bytes pending), wants parity {p}"
        w.wake = lambda: (b.phase & 1) != p
        return False

    # -- wgmma ---------------------------------------------------------------------------------------------------
    def wgmma(self, w, ins, rec):
        w.at = ins
        rec["ins"] = ins
        rec["vc"], rec["va"] = self.VC[w.i].copy(), self.VA[w.i].copy()
        w.wg_open.append(rec)
        w.wgmmas += 1
        self.stats["wgmma"] += 1
        if self.async_mode == "early":
            self.wgmma_run(w, rec, w.wg_seq + 1)

    def wgmma_commit(self, w, ins):
        w.wg_seq += 1
        w.wg_groups.append((w.wg_seq, w.wg_open))
        w.wg_open = []

    def wgmma_wait(self, w, ins, n):
        w.at = ins
        if w.wg_open and self.strict:
            self.fault(w, "wgmma.wait_group while products are not committed")
        while len(w.wg_groups) > n:
            seq, ops = w.wg_groups.pop(0)
            if self.async_mode != "early":
                for rec in ops:
                    self.wgmma_run(w, rec, seq)
            w.wg_done = seq
        self.VC[w.i][self.nw + w.i] = w.wg_done
        self.VA[w.i][self.nw + w.i] = w.wg_done

    def smem_tile(self, w, desc, mn, kbytes, es, trans, rec, seq, rows=None):
        """[mn, kbytes/es elements] as bytes [mn, k, es] of an operand in shared memory."""
        start = (desc & 0x3FFF) << 4
        lbo = (desc >> 16 & 0x3FFF) << 4
        sbo = (desc >> 32 & 0x3FFF) << 4
        base_off = desc >> 49 & 7
        sw = {0: 0, 1: 3, 2: 2, 3: 1}[desc >> 62 & 3]
        key = (mn, kbytes, es, trans, lbo, sbo, sw, rows)
        off = self._offsets.get(key)
        if off is None:
            K = kbytes // es
            i = np.arange(mn)[:, None]
            if rows is not None:
                i = i[rows[0] : rows[1]]
            k = np.arange(K)[None, :]
            T = 16 // es
            if not trans:
                if sw == 0:
                    o = (i % 8) * 16 + (i // 8) * sbo + (k % T) * es + (k // T) * lbo
                else:
                    o = (i % 8) * (16 << sw) + (i // 8) * sbo + k * es
                    if kbytes > (16 << sw):
                        raise NotImplementedError
            else:
                if es != 2:
                    self.fault(w, "only 16-bit operands can be MN-major", True)
                if sw == 0:
                    o = (i % T) * es + (i // T) * sbo + (k % 8) * 16 + (k // 8) * lbo
                else:
                    S = 1 << sw
                    o = (i % (T * S)) * es + (i // (T * S)) * lbo + (k % 8) * (16 * S) + (k // 8) * sbo
            off = o[:, :, None] + np.arange(es)
            self._offsets[key] = off
        if base_off:
            raise NotImplementedError("matrix base offset")
        a = start + off
        if sw:
            a = a ^ (((a >> 7) & ((1 << sw) - 1)) << 4)
        if a.min() < SB or a.max() >= SB + self.smem:
            self.fault(w, f"operand reaches shared bytes {int(a.min()) - SB}..{int(a.max()) - SB} of {self.smem}", True)
        self.rd(w, a.ravel(), self.nw + w.i, seq, rec["vc"], rec["va"])
        return self.S[a]

    def wgmma_run(self, w, rec, seq):
        w.at = rec["ins"]
        kind, N, kb = rec["kind"], rec["n"], 32
        es = SIZE[kind]
        q = w.i % 4
        if isinstance(rec["a"], int):
            A = self.smem_tile(w, rec["a"], 64, kb, es, rec["ta"], rec, seq, (16 * q, 16 * q + 16)).reshape(16, kb)
            A = decode(A, rec.get("akind", kind))
        else:
            A = decode(gather_a(rec["a"]), rec.get("akind", kind))
        B = self.smem_tile(w, rec["b"], N, kb, es, rec["tb"], rec, seq).reshape(N, kb)
        B = decode(B, kind)
        D = A.astype(f8) @ B.astype(f8).T  # [16, N]
        r, c = frag_d(N)
        v = D[r, c]  # [N/2, 32]
        if rec["acc"]:
            old = np.stack(rec["c"])
            v = v + (old.view(i4) if rec["dt"] == "s32" else old.view(f4))
        rec["d"][:] = v.astype(f4).view(u4) if rec["dt"] == "f32" else v.astype(i8).astype(i4).view(u4)

    # -- cp.async ------------------------------------------------------------------------------------------------
    def cp_async(self, w, ins, dst, src, n, size, m=None):
        w.at = ins
        a = self.saddr(w, dst, n, m)
        if not a.size:
            return
        s = src if m is None else src[m]
        z = np.full(len(a), n) if size is None else (size if m is None else size[m]).astype(i8)
        rec = {"ins": ins, "a": a, "src": s.copy(), "n": n, "size": z, "vc": self.VC[w.i].copy()}
        w.cp_open.append(rec)
        if self.async_mode == "early":
            self.cp_run(w, rec, w.cp_seq + 1)

    def cp_run(self, w, rec, seq):
        w.at = rec["ins"]
        n = rec["n"]
        data = np.zeros((len(rec["a"]), n), u1)
        for size in np.unique(rec["size"]):
            if size == 0:
                continue
            mm = rec["size"] == size
            full = np.zeros(len(mm), bool)
            full[:] = mm
            o = (rec["src"][full] - u8(GB)).view(i8)
            bad = (o < 0) | (o + size > len(self.g.mem))
            if not bad.any():
                bad = ~(self.g.ok[o] & self.g.ok[o + size - 1])
            if bad.any():
                self.fault(w, f"global access out of bounds: {self.g.whose(rec['src'][full][bad][0])}", True)
            data[full, :size] = self.g.mem[o[:, None] + np.arange(size)]
        idx = rec["a"][:, None] + AR[n]
        self.wr(w, idx.ravel(), 2 * self.nw + w.i, seq, rec["vc"])
        self.S[idx] = data

    def cp_commit(self, w, ins):
        w.cp_seq += 1
        w.cp_groups.append((w.cp_seq, w.cp_open))
        w.cp_open = []

    def cp_wait(self, w, ins, n):
        w.at = ins
        if n is None:
            self.cp_commit(w, ins)
            n = 0
        while len(w.cp_groups) > n:
            seq, ops = w.cp_groups.pop(0)
            if self.async_mode != "early":
                for rec in ops:
                    self.cp_run(w, rec, seq)
            w.cp_done = seq
        self.VC[w.i][2 * self.nw + w.i] = w.cp_done

    # -- TMA -----------------------------------------------------------------------------------------------------
    def tensormap(self, w, addr):
        raw = self.generic(w, addr, 128)
        a = int(addr)
        if a >= GB and self.races:
            d = self.g.desc.get(a)
            if d is None:
                self.fault(w, "tensormap in global memory was never published")
            else:
                ww, clock, acquired = d
                if not acquired:
                    self.fault(w, "tensormap used without fence.proxy.tensormap acquire")
                if ww is not None and ww[0] is self and clock > self.VC[w.i][ww[1]]:
                    self.fault(w, "tensormap used before it was published")
        return TensorMap.read(bytes(raw))

    def tma_load(self, w, ins, dst, mapaddr, coords, mbar, m=None):
        w.at = ins
        for l in self.lanes(m):
            t = self.tensormap(w, mapaddr[l])
            t.check(self, w)
            b = self.mbar(w, mbar[l], proxy=True)
            rec = {
                "ins": ins,
                "w": w,
                "t": t,
                "dst": int(dst[l]),
                "at": [int(c[l].view(i4)) for c in coords],
                "bar": b,
                "vc": self.VC[w.i].copy(),
                "va": self.VA[w.i].copy(),
                "id": self.ntma,
            }
            if len(rec["at"]) != t.rank:
                self.fault(w, f"{len(rec['at'])} coordinates for a tensormap of rank {t.rank}", True)
            self.ntma += 1
            self.stats["tma"] += 1
            if self.async_mode == "early":
                self.tma_run(rec)
            else:
                self.tma.append(rec)

    def tma_idx(self, w, t, dst):
        n = t.bytes()
        span = {0: 16, 1: 32, 2: 64, 3: 128}[t.swizzle]
        if dst % (128 if t.swizzle else 16) or (t.swizzle and dst % (span * 8)):
            self.fault(w, f"tile at shared byte {dst - SB} is not aligned for swizzle {span}")
        if dst < SB or dst + n > SB + self.smem:
            self.fault(w, f"tile at shared bytes {dst - SB}..{dst - SB + n} of {self.smem}", True)
        a = dst + np.arange(n, dtype=i8)
        if t.swizzle:
            a = a ^ (((a >> 7) & ((1 << t.swizzle) - 1)) << 4)
        return a

    def tma_run(self, rec):
        w, t = rec["w"], rec["t"]
        w_at, w.at = w.at, rec["ins"]
        idx = self.tma_idx(w, t, rec["dst"])
        agent = 4 * self.nw + rec["id"]
        self.wr(w, idx, agent, 1, rec["vc"], rec["va"])
        self.S[idx] = t.gather(self, w, rec["at"])
        b = rec["bar"]
        b.cur[agent] = b.cura[agent] = 1
        b.tx -= len(idx)
        self.stats["tma_bytes"] += len(idx)
        if b.tx < -(1 << 20) + 1:
            self.fault(w, "mbarrier transaction count out of range")
        b.check()
        w.at = w_at

    def tma_store(self, w, ins, mapaddr, coords, src, m=None):
        w.at = ins
        for l in self.lanes(m):
            t = self.tensormap(w, mapaddr[l])
            t.check(self, w)
            rec = {
                "ins": ins,
                "t": t,
                "src": int(src[l]),
                "at": [int(c[l].view(i4)) for c in coords],
                "vc": self.VC[w.i].copy(),
                "va": self.VA[w.i].copy(),
            }
            w.bk_open.append(rec)
            if self.async_mode == "early":
                self.store_run(w, rec, w.bk_seq + 1)

    def store_run(self, w, rec, seq):
        w.at = rec["ins"]
        idx = self.tma_idx(w, rec["t"], rec["src"])
        self.rd(w, idx, 3 * self.nw + w.i, seq, rec["vc"], rec["va"])
        rec["t"].scatter(self, w, rec["at"], self.S[idx])

    def bk_commit(self, w, ins, m=None):
        if m is not None and not m.any():
            return
        w.bk_seq += 1
        w.bk_groups.append((w.bk_seq, w.bk_open))
        w.bk_open = []

    def bk_wait(self, w, ins, n):
        w.at = ins
        while len(w.bk_groups) > n:
            seq, ops = w.bk_groups.pop(0)
            if self.async_mode != "early":
                for rec in ops:
                    self.store_run(w, rec, seq)
            w.bk_done = seq
        self.VC[w.i][3 * self.nw + w.i] = w.bk_done

    def map_replace(self, w, ins, field, addr, where, value, m=None):
        w.at = ins
        for l in self.lanes(m):
            a = int(addr[l])
            a -= SHARED_WINDOW if a >= SHARED_WINDOW else 0
            off, size = TensorMap.place(field, where)
            idx = a + off + AR[size]
            self.wr(w, idx)
            self.S[idx] = np.frombuffer(int(value[l]).to_bytes(8, "little")[:size], u1)

    def map_publish(self, w, ins, dst, src, m=None):
        w.at = ins
        if m is not None and not m.all():
            if not m.any():
                return
            self.fault(w, ".sync.aligned with part of the warp", True)
        a = int(src[0])
        a -= SHARED_WINDOW if a >= SHARED_WINDOW else 0
        idx = a + AR[128]
        self.rd(w, idx)
        o = int(dst[0]) - GB
        if o % 128 or not self.g.ok[o : o + 128].all():
            self.fault(w, f"tensormap to {self.g.whose(int(dst[0]))}", True)
        self.g.mem[o : o + 128] = self.S[idx]
        self.g.desc[int(dst[0])] = ((self, w.i), int(self.VC[w.i][w.i]), False)
        self.tick(w)

    def map_acquire(self, w, ins, addr, m=None):
        w.at = ins
        if m is not None and not m.any():
            return
        a = int(addr[0])
        d = self.g.desc.get(a)
        if d is None:
            self.fault(w, "acquires a tensormap that was never published")
            return
        self.g.desc[a] = (d[0], d[1], True)

    # -- registers -----------------------------------------------------------------------------------------------
    def setmaxnreg(self, w, ins, n, inc):
        w.at = ins
        if self.regpool is None or not w.nregs:
            return True
        if inc:
            need = (n - w.nregs) * 32
            if need < 0:
                self.fault(w, f"setmaxnreg.inc to {n} from {w.nregs}")
            if need > self.regpool:
                w.why = f"setmaxnreg.inc to {n}: {need} registers wanted, {self.regpool} free"
                w.wake = lambda: self.regpool >= need
                return False
            self.regpool -= max(need, 0)
        else:
            if n > w.nregs:
                self.fault(w, f"setmaxnreg.dec to {n} from {w.nregs}")
            self.regpool += max(w.nregs - n, 0) * 32
        w.nregs = n
        return True

    # -- running -------------------------------------------------------------------------------------------------
    def run(self, limit=200000):
        nw = self.nw
        k = 0
        while True:
            ready = []
            for w in self.warps:
                if w.state == "ready":
                    ready.append(w)
                elif w.state == "blocked" and w.wake():
                    w.state = "ready"
                    ready.append(w)
            if not ready:
                if self.tma:
                    self.tma_run(self.tma.pop(self.rng.randrange(len(self.tma))))
                    continue
                if all(w.state == "done" for w in self.warps):
                    break
                lines = [
                    f"  warp {w.i}: {w.state}"
                    + (f" at line {w.at.line} ({w.at.loc}): {w.why}" if w.state == "blocked" else "")
                    for w in self.warps
                ]
                raise Deadlock("deadlock:\n" + "\n".join(lines))
            if self.schedule == "random":
                w = self.rng.choice(ready)
                self.prog.step(self, w, self.rng.randrange(1, 6))
                if self.tma and self.async_mode == "random" and self.rng.random() < 0.3:
                    self.tma_run(self.tma.pop(self.rng.randrange(len(self.tma))))
            else:
                w = ready[k % len(ready)]
                k += 1
                self.prog.step(self, w, 1 << 30)
            if w.steps > limit:
                raise Fault(f"warp {w.i} ran {limit} blocks: endless loop?")
        # what is left when everybody is gone
        for w in self.warps:
            w.at = None
            if w.wg_open or w.wg_groups:
                self.faults.append(f"warp {w.i} ends with products not waited for")
            for seq, ops in w.bk_groups + [(0, w.bk_open)]:
                if ops:
                    self.faults.append(f"warp {w.i} ends with bulk stores that still read shared memory")
                    for rec in ops:
                        self.store_run(w, rec, seq)
            if any(ops for _, ops in w.cp_groups) or w.cp_open:
                self.faults.append(f"warp {w.i} ends with cp.async not waited for")
        for a, b in self.mbars.items():
            if b.tx or b.pending != b.count:
                self.faults.append(
                    f"mbarrier at {a - SB} ends in the middle of phase {b.phase}: {b.pending} of {b.count} arrivals, {b.tx} bytes pending"
                )
        n = {w.wgmmas for w in self.warps if w.wgmmas}
        for g in range(0, nw, 4):
            if len({w.wgmmas for w in self.warps[g : g + 4]}) > 1:
                self.faults.append(f"warps {g}..{g + 3} issued different numbers of wgmma")
        return self


_FRAG = {}


def frag_d(n):
    if n not in _FRAG:
        r = np.array([(LANE >> 2) + 8 * (i >> 1 & 1) for i in range(n // 2)])
        c = np.array([(i >> 2) * 8 + (LANE & 3) * 2 + (i & 1) for i in range(n // 2)])
        _FRAG[n] = (r, c)
    return _FRAG[n]


def gather_a(regs):
    """Four registers of each lane -> the bytes of 16 rows of 32 bytes."""
    return np.concatenate(regs).view(u1)[mma_maps(len(regs), 2)[0]]


_MMA = {}


def mma_maps(na, nb):
    """Where the bytes of A [16, 8*na... ] and B lie in the stacked registers, for one gather each."""
    if (na, nb) not in _MMA:
        ka = 16 * (na // 2)
        ia = np.empty((16, ka), i8)
        ib = np.empty((8, 16 * nb), i8)
        g, t = LANE >> 2, LANE & 3
        for j in range(na):
            for byte in range(4):
                ia[g + 8 * (j & 1), 16 * (j >> 1) + 4 * t + byte] = j * 128 + LANE * 4 + byte
        for j in range(nb):
            for byte in range(4):
                ib[g, 16 * j + 4 * t + byte] = j * 128 + LANE * 4 + byte
        _MMA[na, nb] = ia, ib
    return _MMA[na, nb]


def mma(a, b, c, kind, bkind, dt):
    ia, ib = mma_maps(len(a), len(b))
    A = decode(np.concatenate(a).view(u1)[ia], kind)
    B = decode(np.concatenate(b).view(u1)[ib], bkind)
    D = A.astype(f8) @ B.astype(f8).T
    r, cc = frag_d(8)
    out = []
    for i in range(4):
        v = D[r[i], cc[i]]
        if dt == "f32":
            out.append((v + c[i].view(f4).astype(f8)).astype(f4).view(u4))
        else:
            out.append((v.astype(i8) + c[i].view(i4).astype(i8)).clip(-(2**31), 2**31 - 1).astype(i4).view(u4))
    return out


class TensorMap:
    """The fields of a tensormap. Its 128 bytes are opaque on the device; this order of them is the emulator's own."""

    ELEM = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2}
    FIELDS = {
        "global_address": (0, 8),
        "rank": (8, 4),
        "elemtype": (12, 4),
        "interleave_layout": (16, 4),
        "swizzle_mode": (20, 4),
        "fill_mode": (24, 4),
        "box_dim": (32, 4),
        "element_stride": (52, 4),
        "global_dim": (72, 4),
        "global_stride": (96, 8),
    }

    @classmethod
    def place(cls, field, where):
        off, size = cls.FIELDS[field]
        return off + size * (where or 0), size

    @classmethod
    def read(cls, raw):
        t = cls()
        get = lambda f, i=0: int.from_bytes(raw[cls.place(f, i)[0] : cls.place(f, i)[0] + cls.place(f, i)[1]], "little")
        t.base, t.rank, t.elem = get("global_address"), get("rank") + 1, get("elemtype")
        t.swizzle, t.inter, t.fill = get("swizzle_mode"), get("interleave_layout"), get("fill_mode")
        t.box = [get("box_dim", i) for i in range(t.rank)]
        t.estr = [get("element_stride", i) for i in range(t.rank)]
        t.dim = [get("global_dim", i) for i in range(t.rank)]
        t.stride = [get("global_stride", i) for i in range(t.rank - 1)]
        return t

    @classmethod
    def make(cls, base, elem, swizzle, box, shape, strides, fill=0):
        """Lists innermost first; strides in bytes without the innermost."""
        raw = bytearray(128)

        def put(f, v, i=0):
            o, s = cls.place(f, i)
            raw[o : o + s] = int(v).to_bytes(s, "little")

        (
            put("global_address", base),
            put("rank", len(shape) - 1),
            put("elemtype", elem),
            put("swizzle_mode", swizzle),
            put("fill_mode", fill),
        )
        for i in range(len(shape)):
            put("box_dim", box[i], i), put("element_stride", 1, i), put("global_dim", shape[i], i)
        for i in range(len(shape) - 1):
            put("global_stride", strides[i], i)
        return bytes(raw)

    @property
    def es(self):
        return self.ELEM[self.elem]

    def bytes(self):
        return int(np.prod(self.box)) * self.es

    def check(self, cta, w):
        bad = []
        if not 1 <= self.rank <= 5:
            bad.append(f"rank {self.rank}")
        if self.base % 16:
            bad.append("base is not a multiple of 16 bytes")
        if any(s % 16 or s >= 1 << 40 for s in self.stride):
            bad.append(f"strides {self.stride}")
        if any(not 1 <= b <= 256 for b in self.box):
            bad.append(f"box {self.box}")
        if any(not 1 <= d <= 1 << 32 for d in self.dim):
            bad.append(f"dimensions {self.dim}")
        inner = self.box[0] * self.es
        if inner % 16:
            bad.append(f"inner box of {inner} bytes")
        if self.swizzle and inner > {1: 32, 2: 64, 3: 128}[self.swizzle]:
            bad.append(f"inner box of {inner} bytes is wider than the swizzle")
        if any(e != 1 for e in self.estr) or self.inter:
            bad.append("element strides or interleaving: not emulated")
        if bad:
            cta.fault(w, "tensormap: " + "; ".join(bad), True)

    def offsets(self, at):
        """Byte offsets [box outer..., inner] from the base, and which are inside."""
        off = np.zeros((1,), i8)
        inside = np.ones((1,), bool)
        for d in range(self.rank - 1, -1, -1):
            i = at[d] + np.arange(self.box[d], dtype=i8)
            stride = self.es if d == 0 else self.stride[d - 1]
            off = (off[:, None] + i * stride).ravel()
            inside = (inside[:, None] & ((i >= 0) & (i < self.dim[d]))).ravel()
        return off, inside

    def gather(self, cta, w, at):
        off, inside = self.offsets(at)
        data = np.zeros((len(off), self.es), u1)
        if self.fill and self.es == 2:
            data[:] = np.array([0xFF, 0x7F], u1)
        o = self.base - GB + off[inside]
        if o.size:
            if (
                o.min() < 0
                or o.max() + self.es > len(cta.g.mem)
                or not (cta.g.ok[o].all() and cta.g.ok[o + self.es - 1].all())
            ):
                cta.fault(w, f"TMA reads out of bounds: {cta.g.whose(self.base + int(off[inside][0]))}", True)
            data[inside] = cta.g.mem[o[:, None] + np.arange(self.es)]
        return data.ravel()

    def scatter(self, cta, w, at, data):
        off, inside = self.offsets(at)
        o = self.base - GB + off[inside]
        if o.size:
            if (
                o.min() < 0
                or o.max() + self.es > len(cta.g.mem)
                or not (cta.g.ok[o].all() and cta.g.ok[o + self.es - 1].all())
            ):
                cta.fault(w, f"TMA writes out of bounds: {cta.g.whose(self.base + int(off[inside][0]))}", True)
            cta.g.mem[o[:, None] + np.arange(self.es)] = data.reshape(-1, self.es)[inside]
