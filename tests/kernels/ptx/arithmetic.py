"""Instructions of one thread that touch registers only."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from .block import TYPES, Block
from .memory import PtxError
from .parse import Instruction

Values = np.ndarray
COMPARE: dict[str, Callable] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def compare(name: str, a: Values, b: Values) -> Values:
    """A comparison; a trailing `u` also holds where one side is not a number."""
    if name in COMPARE:
        return COMPARE[name](a, b)
    return COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)


def wide(a: Values) -> Values:
    """Twice the width, same sign."""
    return a.astype({"i4": np.int64, "u4": np.uint64, "i2": np.int32, "u2": np.uint32}[a.dtype.str[1:]])


def product(block: Block, i: Instruction) -> Values:
    """mul and mad of integers: the low half, the high half or all of a product."""
    kind, form = i.opcode[-1], i.opcode[1]
    a, b = block.read(i.operands[1], kind), block.read(i.operands[2], kind)
    if form == "lo":
        return a * b
    full = wide(a) * wide(b)
    return full if form == "wide" else (full >> full.dtype.type(32)).astype(a.dtype)


def shifted(block: Block, i: Instruction) -> Values:
    """shl and shr: by more than the width gives zero, or the sign."""
    value = block.read(i.operands[1], i.opcode[-1])
    by, width = block.read(i.operands[2], "u32").astype(np.int64), 8 * value.itemsize
    inside = np.minimum(by, width - 1).astype(value.dtype)
    result = value << inside if i.opcode[0] == "shl" else value >> inside
    keeps_sign = i.opcode[0] == "shr" and value.dtype.kind == "i"
    return result if keeps_sign else np.where(by >= width, 0, result).astype(value.dtype)


def converted(block: Block, i: Instruction) -> Values:
    """cvt: a float to an integer rounds to nearest even and saturates, NaN gives 0."""
    to, source = i.opcode[-2], i.opcode[-1]
    value = block.read(i.operands[1], source)
    if TYPES[to].kind in "iu" and TYPES[source].kind == "f":
        if i.opcode[1] != "rni":
            raise PtxError(f"rounding mode: {i.text}")
        limits = np.iinfo(TYPES[to])
        value = np.clip(np.nan_to_num(np.rint(value.astype(np.float64)), nan=0.0), limits.min, limits.max)
    return value.astype(TYPES[to])


def permuted(block: Block, i: Instruction) -> Values:
    """prmt: each result byte is one of the eight of two registers, or that byte's sign repeated."""
    a, b, selector = (block.read(operand, "b32") for operand in i.operands[1:4])
    pool = np.stack([a, b], axis=1).view(np.uint8)  # (lanes, 8)
    result = np.zeros((block.threads, 4), np.uint8)
    for byte in range(4):
        choice = (selector >> np.uint32(4 * byte)) & np.uint32(0xF)
        picked = pool[np.arange(block.threads), (choice & 7).astype(np.int64)]
        result[:, byte] = np.where(choice & 8, np.where(picked & 0x80, 0xFF, 0), picked)
    return result.view(np.uint32).ravel()


def inserted(block: Block, i: Instruction) -> Values:
    """bfi: `length` bits of a at `position` of b."""
    a, b = (
        block.read(i.operands[1], "u32").astype(np.uint64),
        block.read(i.operands[2], "u32").astype(np.uint64),
    )
    position, length = (block.read(operand, "u32").astype(np.uint64) & np.uint64(0xFF) for operand in i.operands[3:5])
    field = (((np.uint64(1) << length) - np.uint64(1)) << position) & np.uint64(0xFFFFFFFF)
    return ((b & ~field) | ((a << position) & field)).astype(np.uint32)


def reversed_bits(value: Values) -> Values:
    bits = np.unpackbits(value.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    return np.packbits(bits[:, ::-1], axis=1).view(">u4").ravel().astype(np.uint32)


def leading_zeros(value: Values) -> Values:
    """bfind.shiftamt: the shift that brings the highest set bit to the top; all ones for zero."""
    bits = np.unpackbits(value.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    return np.where(value == 0, 0xFFFFFFFF, bits.argmax(axis=1)).astype(np.uint32)


def dot_4(block: Block, i: Instruction) -> Values:
    """dp4a of signed bytes."""
    a, b = (block.read(operand, "u32").view(np.int8).reshape(-1, 4).astype(np.int32) for operand in i.operands[1:3])
    return (a * b).sum(axis=1, dtype=np.int32) + block.read(i.operands[3], "s32")


def quotient(block: Block, i: Instruction) -> Values:
    kind = i.opcode[-1]
    a, b = block.read(i.operands[1], kind), block.read(i.operands[2], kind)
    if kind != "f32":
        return a // b
    if i.opcode[1] != "rn":
        raise PtxError(f"approximate division: {i.text}")
    return a / b


def smaller_or_larger(block: Block, i: Instruction) -> Values:
    kind = i.opcode[-1]
    a, b = block.read(i.operands[1], kind), block.read(i.operands[2], kind)
    if kind == "f32":  # a number wins over NaN
        return np.fmin(a, b) if i.opcode[0] == "min" else np.fmax(a, b)
    return np.minimum(a, b) if i.opcode[0] == "min" else np.maximum(a, b)


def on_predicates(block: Block, i: Instruction) -> Values:
    a = block.predicate(i.operands[1])
    if i.opcode[0] in ("mov", "not"):
        return a if i.opcode[0] == "mov" else ~a
    return LOGIC[i.opcode[0]](a, block.predicate(i.operands[2]))


def result(block: Block, i: Instruction) -> Values:
    """The value an arithmetic instruction gives, in all lanes."""
    name, kind = i.opcode[0], i.opcode[-1]
    if kind == "pred":
        return on_predicates(block, i)

    def a(n: int = 1) -> Values:
        return block.read(i.operands[n], kind)

    match name:
        case "add":
            return a() + a(2)
        case "sub":
            return a() - a(2)
        case "mul":
            return a() * a(2) if kind == "f32" else product(block, i)
        case "mad":
            total = product(block, i)
            return total + block.read(i.operands[3], {"i8": "s64", "u8": "u64"}.get(total.dtype.str[1:], kind))
        case "div":
            return quotient(block, i)
        case "sqrt" if i.opcode[1] == "rn":
            return np.sqrt(a())
        case "min" | "max":
            return smaller_or_larger(block, i)
        case "and" | "or" | "xor":
            return LOGIC[name](a(), a(2))
        case "not":
            return ~a()
        case "neg":
            return -a()
        case "abs":
            return np.abs(a())
        case "shl" | "shr":
            return shifted(block, i)
        case "setp":
            return compare(i.opcode[1], a(), a(2))
        case "selp":
            return np.where(block.predicate(i.operands[3]), a(), a(2))
        case "mov" | "cvta":
            return a()
        case "cvt":
            return converted(block, i)
        case "prmt":
            return permuted(block, i)
        case "bfi":
            return inserted(block, i)
        case "brev":
            return reversed_bits(a())
        case "bfind" if i.opcode[1] == "shiftamt":
            return leading_zeros(a())
        case "dp4a":
            return dot_4(block, i)
    raise PtxError(f"unknown instruction: {i.text}")


def packed_move(block: Block, i: Instruction, mask: Values) -> bool:
    """mov between one register and the parts of one in braces; False if it is another kind of mov."""
    to, source = i.operands
    if to.startswith("{"):
        parts = [name.strip() for name in to[1:-1].split(",")]
        values = block.read(source, i.opcode[-1]).view(
            {2: np.uint16, 4: np.uint32}[int(i.opcode[-1][1:]) // 8 // len(parts)]
        )
        for n, part in enumerate(parts):
            block.write(part, values.reshape(-1, len(parts))[:, n].copy(), mask)
        return True
    if source.startswith("{"):
        parts = [name.strip() for name in source[1:-1].split(",")]
        kind = f"b{int(i.opcode[-1][1:]) // len(parts)}"
        joined = np.stack([block.read(part, kind) for part in parts], axis=1)
        block.write(to, joined.view(TYPES[i.opcode[-1]]).ravel(), mask)
        return True
    return False


def calculate(block: Block, i: Instruction, mask: Values) -> None:
    """Execute an arithmetic instruction."""
    if i.opcode[0] == "mov" and packed_move(block, i, mask):
        return
    with np.errstate(all="ignore"):
        block.write(i.operands[0], result(block, i), mask)


NAMES = (
    *(
        "add",
        "sub",
        "mul",
        "mad",
        "div",
        "sqrt",
        "min",
        "max",
        "and",
        "or",
        "xor",
        "not",
        "neg",
        "abs",
        "shl",
        "shr",
    ),
    *("setp", "selp", "mov", "cvta", "cvt", "prmt", "bfi", "brev", "bfind", "dp4a"),
)
