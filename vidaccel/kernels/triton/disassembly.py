"""Reads disassembled machine code: its instructions, and which of them are in a loop."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["ANY_PRODUCT", "Instruction", "amdgcn", "argument_stores", "loops_of", "sass"]

#: A mnemonic of the tensor cores, of every generation: mma, wgmma, tcgen05 and AMD's mfma.
ANY_PRODUCT = r"(HG|QG|IG|H|Q|I|D)MMA\b|UTC[HIQ]MMA\b|v_s?mfma"


@dataclass(frozen=True)
class Instruction:
    """One instruction: the labels before it, those it may jump to, and whether the next may follow."""

    mnemonic: str
    labels: tuple[str, ...]
    targets: tuple[str, ...]
    falls_through: bool


def sass(text: str) -> list[Instruction]:
    """The instructions of NVIDIA's machine code as ``nvdisasm`` prints it; lines that are none are passed over."""
    lines, labels = [], []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+|\$\w+):", line):
            labels.append(label.group(1))
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@\S+)?\s*([A-Z][A-Za-z0-9_.]*)(.*)", line):
            predicate, mnemonic, operands = found.groups()
            name = mnemonic.split(".")[0]
            jumps = name in ("BRA", "BRX", "BRXU")
            ends = name in ("EXIT", "RET", "BRA", "BRX", "BRXU")
            conditional = predicate is not None or re.match(r"\s*!?UP\d|\s*UR\d+,", operands) is not None
            targets = tuple(re.findall(r"\.L_\w+", operands)) if jumps else ()
            lines.append(Instruction(mnemonic, tuple(labels), targets, conditional or not ends))
            labels = []
    return lines


def amdgcn(text: str) -> list[Instruction]:
    """The instructions of AMD's assembly as LLVM writes it; lines that are none are passed over."""
    lines, labels = [], []
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels.append(label.group(1))
        elif found := re.match(r"\t([a-z]\w+)(.*)", line):
            mnemonic, operands = found.groups()
            targets = tuple(re.findall(r"\.L\w+", operands)) if "branch" in mnemonic else ()
            lines.append(Instruction(mnemonic, tuple(labels), targets, mnemonic not in ("s_branch", "s_endpgm")))
            labels = []
    return lines


def argument_stores(code: Iterable[Instruction]) -> int:
    """Stores to local memory that a call follows before any jump."""
    found = pending = 0
    for line in code:
        name = line.mnemonic.split(".")[0]
        if line.labels or line.targets or not line.falls_through:
            pending = 0
        if name == "STL":
            pending += 1
        elif name == "CALL":
            found, pending = found + pending, 0
    return found


def loops_of(code: Sequence[Instruction]) -> tuple[tuple[Counter[str], ...], Counter[str]]:
    """Instruction counts of each natural loop, and of the main one.

    A wait that rarely repeats stands behind the end of the program and jumps back, so text order says nothing; a loop
    is what can reach a jump to a block through which every path to that jump leads.
    """
    where = {label: i for i, line in enumerate(code) for label in line.labels}
    starts = sorted({0, *where.values(), *(i + 1 for i, x in enumerate(code) if x.targets or not x.falls_through)})
    starts = [i for i in starts if i < len(code)]
    block_of = {start: block for block, start in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    following: list[set[int]] = []
    for end in ends:
        last = code[end - 1]
        following.append({block_of[where[target]] for target in last.targets if target in where})
        if last.falls_through and end in block_of:
            following[-1].add(block_of[end])
    before: list[set[int]] = [set() for _ in starts]
    for block, nexts in enumerate(following):
        for other in nexts:
            before[other].add(block)
    bodies: dict[int, set[int]] = {}
    for tail, head in _back_edges(following, before):
        body, todo = bodies.setdefault(head, {head}), [tail]
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo.extend(before[block])
    counts = {
        head: Counter(line.mnemonic for block in body for line in code[starts[block] : ends[block]])
        for head, body in sorted(bodies.items())
    }
    products = {h: sum(n for name, n in c.items() if re.match(ANY_PRODUCT, name)) for h, c in counts.items()}
    most = max(products.values(), default=0)
    heads = [h for h in counts if not most or products[h]]
    inner = [h for h in heads if not any(bodies[other] < bodies[h] for other in heads)]
    main = max(inner, key=lambda h: (products[h], counts[h].total()), default=None)
    return tuple(counts.values()), Counter() if main is None else counts[main]


def _back_edges(following: list[set[int]], before: list[set[int]]) -> Iterator[tuple[int, int]]:
    """Edges (tail, head) of a graph of blocks where every path from block 0 to the tail leads through the head."""
    order, seen = [], {0}
    stack = [(0, iter(following[0]))]
    while stack:
        block, nexts = stack[-1]
        other = next((n for n in nexts if n not in seen), None)
        if other is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(other)
            stack.append((other, iter(following[other])))
    order.reverse()
    through = {block: set(order) for block in order}
    through[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = set.intersection(*(through[b] for b in before[block] if b in seen)) | {block}
            if common != through[block]:
                through[block], changed = common, True
    for tail in order:
        yield from ((tail, head) for head in following[tail] if head in through[tail])
