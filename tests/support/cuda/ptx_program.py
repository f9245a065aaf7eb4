"""PTX as a list of instructions."""

import re
from collections import Counter

import numpy as np

DTYPES = {
    "pred": np.dtype(np.uint64),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    **{
        f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}")
        for kind in "bus"
        for bits in (8, 16, 32, 64)
    },
}
"""PTX's types; predicates are numbers that are 0 or 1."""

_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)$", re.S)
_OPERANDS = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*)")
_PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]")
_DIRECTIVE = re.compile(r"(?m)(^|\{)\s*\.(reg|shared|pragma|loc|local|file)\b[^;\n]*;?")
_LABEL = re.compile(r"(\$?\w+):(?!:)")


class Instruction:
    """One instruction.

    Attributes:
        text: As it stands in PTX.
        op: The operation, without modifiers.
        modifiers: What follows it, the types last.
        operands: Registers, numbers, ``[address]`` and ``{vectors}``; usually the target first.
        guard: The predicate that it depends on, or None.
        is_negated: Whether it runs where that predicate is false.
    """

    def __init__(self, text):
        negated, self.guard, opcode, operands = _INSTRUCTION.match(text).groups()
        self.text = text
        self.is_negated = negated == "!"
        self.op, *self.modifiers = opcode.replace("::", "_").split(".")
        self.operands = [operand.strip() for operand in _OPERANDS.findall(operands)]

    @property
    def type(self):
        """The last of its types."""
        return self.modifiers[-1]

    @property
    def opcode(self):
        """The operation with its modifiers."""
        return ".".join([self.op, *self.modifiers])

    def names(self, index):
        """Return the registers of an operand that may be a vector."""
        return [name.strip() for name in self.operands[index].strip("{}").split(",")]


class Program:
    """One kernel of a PTX module.

    Attributes:
        code: Its instructions.
        labels: Positions in ``code``.
        params: Where in the arguments each parameter begins.
        params_nbytes: Length of the arguments.
        shared: Where in the memory of a block each shared array begins.
        shared_nbytes: Length of that memory.
    """

    def __init__(self, ptx, name):
        ptx = re.sub(r"//[^\n]*", "", ptx)
        start = ptx.index(f".entry {name}(")
        header, rest = ptx[start:].split("{", 1)
        self.body = rest[: _end_of_block(rest)]
        self.params, self.params_nbytes = _layout(
            (int(align or DTYPES[kind].itemsize), each, int(count or 1) * DTYPES[kind].itemsize)
            for align, kind, each, count in _PARAM.findall(header)
        )
        self.shared, self.shared_nbytes = _layout(
            (int(align), each, int(nbytes))
            for align, each, nbytes in _SHARED.findall(ptx[:start] + self.body)
        )
        self.code, self.labels = [], {}
        for piece in _DIRECTIVE.sub(r"\1", self.body).split(";"):
            self._add(piece.strip())

    def _add(self, piece):
        while piece:
            if label := _LABEL.match(piece):
                self.labels[label[1]] = len(self.code)
                piece = piece[label.end() :].strip()
            elif piece[0] in "{}":  # of a scope; those of vectors follow an operation
                piece = piece[1:].strip()
            else:
                self.code.append(Instruction(" ".join(piece.split())))
                return

    def counts(self):
        """Return how often each opcode occurs."""
        return Counter(instruction.opcode for instruction in self.code)


def _end_of_block(text):
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return brace.start()
    raise ValueError("the block does not end")


def _layout(variables):
    offsets, end = {}, 0
    for align, name, nbytes in variables:
        offsets[name] = -(-end // align) * align
        end = offsets[name] + nbytes
    return offsets, end
