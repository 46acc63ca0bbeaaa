"""PTX text -> kernels as lists of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ENTRY = re.compile(r"\.entry\s+(\w+)\(\s*(.*?)\)([^{]*)\{(.*?)\n\}", re.DOTALL)
PARAMETER = re.compile(r"\.param\s+\.(\w+)(?:\s+\.\w+(?:\s+\d+)?)*\s+(\w+)")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%[a-z]+)")
STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)$", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
REGISTER_BYTES = {"pred": 0, "b16": 2, "b32": 4, "f32": 4, "b64": 8, "f64": 8}


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands;` with the opcode split at its dots."""

    guard: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


@dataclass
class Program:
    """One kernel."""

    name: str
    parameters: list[tuple[str, str]]  # type, name
    limits: dict[str, int]  # maxntid, minnctapersm
    registers: dict[str, int]  # bytes of a register by its prefix, such as %rd; 0 for predicates
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> dict[str, Program]:
    """Every kernel of a PTX text by name."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"\{ \.reg \.b16 tmp; (.*?)tmp(.*?) \}", r"\1_\2", text)  # half of a register, thrown away
    programs = {}
    for name, parameters, directives, body in ENTRY.findall(text):
        limits = {key: int(value) for key, value in re.findall(r"\.(maxntid|minnctapersm)\s+(\d+)", directives)}
        registers = {prefix: REGISTER_BYTES[kind] for kind, prefix in REGISTERS.findall(body)}
        program = Program(name, PARAMETER.findall(parameters), limits, registers)
        for line in body.split("\n"):
            _parse_line(line.strip(), program)
        programs[name] = program
    return programs


def _parse_line(line: str, program: Program) -> None:
    if label := re.match(r"(\$\w+):\s*(.*)$", line):
        program.labels[label[1]] = len(program.code)
        line = label[2]
    if not line or line.startswith("."):
        return
    for statement in line.split(";"):
        statement = statement.strip()
        if not statement:
            continue
        match = STATEMENT.match(statement)
        assert match, f"not understood: {statement}"
        operands = tuple(operand.strip() for operand in OPERAND.findall(match[4]))
        opcode = tuple(match[3].split("."))
        program.code.append(Instruction(match[2], match[1] == "!", opcode, operands, statement))


def names(braced: str) -> list[str]:
    """`{%r1, %r2}` or `%r1` -> the register names."""
    return [name.strip() for name in braced.strip("{}").split(",")]
