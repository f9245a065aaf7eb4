"""Runs PTX with NumPy, all threads at once: operations round as IEEE 754 says.

Of threads that a branch has set apart, those that are hindmost go on first, which brings them
together again. What a GPU would do silently is an error: accesses out of bounds, not aligned, or of
two threads at one place without a barrier between them.
"""

import re

import numpy as np

from tests.support.cuda.memory import AccessError
from tests.support.cuda.ptx_program import DTYPES

BLOCKS_AT_ONCE = 32

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "rem": np.remainder,  # of numbers that are not negative
}
_UNARY = {"sqrt": np.sqrt, "neg": np.negative, "abs": np.abs}
_ROUNDS = {"add", "sub", "mul", "div", "sqrt"}
_INEXACT = {"ftz", "approx", "full", "sat"}
_NUMBER = re.compile(r"-?(0x)?[0-9A-Fa-f]+U?$")


class UnknownInstructionError(Exception):
    """The interpreter does not run such an instruction, or must not."""


class Machine:
    """Runs a program on memory.

    Args:
        program: A kernel.
        memory: What it may access.
    """

    def __init__(self, program, memory):
        self.program, self.memory = program, memory

    def launch(self, blocks, threads, argument):
        """Run blocks 0 to ``blocks``, of so many threads each, with the bytes of the argument."""
        assert len(argument) == self.program.params_nbytes, "the structs differ"
        for first in range(0, blocks, BLOCKS_AT_ONCE):
            numbers = np.arange(first, min(first + BLOCKS_AT_ONCE, blocks))
            _Grid(self, numbers, threads, argument).run()


class _Grid:
    """Some blocks of a launch, which run to their end together."""

    def __init__(self, machine, blocks, threads, argument):
        self.program, self.memory = machine.program, machine.memory
        self.argument = np.frombuffer(argument, np.uint8)
        self.numel = len(blocks) * threads
        self.special = {
            "%tid.x": np.tile(np.arange(threads), len(blocks)),
            "%ctaid.x": np.repeat(blocks, threads),
        }
        self.registers = {}
        self.shared = _Shared(len(blocks), threads, self.program.shared_nbytes)

    def run(self):
        """Run all threads to their end."""
        code, end = self.program.code, len(self.program.code)
        counter, waits = np.zeros(self.numel, np.int64), np.zeros(self.numel, bool)
        while True:
            runs = ~waits & (counter < end)
            if not runs.any():
                if not waits.any():
                    return
                waits[:] = False  # all that have not ended have come to the barrier
                self.shared.num_barriers += 1
                continue
            here = int(counter[runs].min())
            threads = np.flatnonzero(runs & (counter == here))
            instruction = code[here]
            counter[threads] += 1
            if instruction.guard:
                flag = self.registers[instruction.guard][threads] != instruction.is_negated
                threads = threads[flag]
            if instruction.op == "bra":
                counter[threads] = self.program.labels[instruction.operands[-1]]
            elif instruction.op in ("ret", "exit"):
                counter[threads] = end
            elif instruction.op in ("bar", "barrier"):
                waits[threads] = True
            elif threads.size:
                with np.errstate(all="ignore"):
                    self._execute(instruction, threads)

    # -- registers ---------------------------------------------------------------------------------

    def _get(self, operand, kind, threads):
        dtype = DTYPES[kind]
        if operand in self.registers:
            raw = self.registers[operand][threads]
        elif operand in self.special:
            return self.special[operand][threads].astype(dtype)
        elif operand.startswith("0f"):
            return np.full(threads.size, int(operand[2:], 16), np.uint32).view(np.float32)
        elif operand.startswith("0d"):
            return np.full(threads.size, int(operand[2:], 16), np.uint64).view(np.float64)
        else:
            raw = np.full(threads.size, self._constant(operand), np.uint64)
        return raw.astype(f"u{dtype.itemsize}").view(dtype)

    def _constant(self, operand):
        for offsets in (self.program.shared, self.program.params):
            if operand in offsets:
                return offsets[operand]
        if not _NUMBER.match(operand):
            raise UnknownInstructionError(f"{operand} has no value")
        return int(operand.rstrip("U"), 0) & 0xFFFFFFFFFFFFFFFF

    def _set(self, register, values, threads):
        if register == "_":
            return
        whole = self.registers.setdefault(register, np.zeros(self.numel, np.uint64))
        if values.dtype != bool:
            values = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
        whole[threads] = values

    def _address(self, operand, threads):
        base, _, offset = operand.strip("[]").partition("+")
        kind = "u32" if base in self.program.shared else "u64"
        return self._get(base.strip(), kind, threads).astype(np.int64) + int(offset or 0)

    # -- instructions ------------------------------------------------------------------------------

    def _execute(self, i, threads):
        _require_one_rounding(i)
        if i.op in _BINARY:
            first, second = (self._get(each, i.type, threads) for each in i.operands[1:])
            self._set(i.operands[0], _BINARY[i.op](first, second), threads)
        elif i.op in _UNARY:
            value = self._get(i.operands[1], i.type, threads)
            self._set(i.operands[0], _UNARY[i.op](value), threads)
        elif (handler := getattr(self, f"_do_{i.op}", None)) is None:
            raise UnknownInstructionError(i.text)
        else:
            handler(i, threads)

    def _do_ld(self, i, threads):
        names, dtype = i.names(0), DTYPES[i.type]
        nbytes = len(names) * dtype.itemsize
        memory, places = self._places(i, i.operands[1], nbytes, threads)
        loaded = memory[places[:, None] + np.arange(nbytes)]
        for name, part in zip(names, np.split(loaded, len(names), 1), strict=True):
            values = np.ascontiguousarray(part).view(dtype).reshape(-1)
            self._set(name, values, threads)

    def _do_st(self, i, threads):
        names = i.names(1)
        values = [self._get(name, i.type, threads).reshape(-1, 1).view(np.uint8) for name in names]
        packed = np.concatenate(values, 1)
        memory, places = self._places(i, i.operands[0], packed.shape[1], threads)
        if memory is self.memory.room and np.unique(places).size != places.size:
            raise AccessError(f"two threads store to one place: {i.text}")
        memory[places[:, None] + np.arange(packed.shape[1])] = packed

    def _places(self, i, operand, nbytes, threads):
        """Return a memory, and where in it each thread begins to access so many bytes."""
        addresses, space = self._address(operand, threads), i.modifiers[0]
        if space.startswith("param"):
            return self.argument, addresses
        if space.startswith("shared"):
            return self.shared.bytes, self.shared.places(i, addresses, nbytes, threads)
        if not space.startswith("global"):
            raise UnknownInstructionError(f"of no known memory: {i.text}")
        return self.memory.room, self.memory.offsets(addresses, nbytes, i.op)

    def _do_mov(self, i, threads):
        to, source = i.operands
        nbits = 8 * DTYPES[i.type].itemsize
        if to.startswith("{"):
            names, value = i.names(0), self._get(source, i.type, threads).astype(np.uint64)
            width = nbits // len(names)
            for k, name in enumerate(names):
                self._set(name, (value >> np.uint64(k * width)).astype(f"u{width // 8}"), threads)
        elif source.startswith("{"):
            names, value = i.names(1), np.zeros(threads.size, np.uint64)
            width = nbits // len(names)
            for k, name in enumerate(names):
                part = self._get(name, f"u{width}", threads).astype(np.uint64)
                value |= part << np.uint64(k * width)
            self._set(to, value, threads)
        else:
            self._set(to, self._get(source, i.type, threads), threads)

    _do_cvta = _do_mov

    def _do_mul(self, i, threads):
        if "hi" in i.modifiers:
            raise UnknownInstructionError(i.text)
        kind = _wide(i.type) if "wide" in i.modifiers else i.type
        first, second = (
            self._get(each, i.type, threads).astype(DTYPES[kind]) for each in i.operands[1:]
        )
        self._set(i.operands[0], first * second, threads)

    def _do_mad(self, i, threads):
        if "hi" in i.modifiers or i.type[0] == "f":
            raise UnknownInstructionError(i.text)
        kind = _wide(i.type) if "wide" in i.modifiers else i.type
        first, second = (
            self._get(each, i.type, threads).astype(DTYPES[kind]) for each in i.operands[1:3]
        )
        self._set(i.operands[0], first * second + self._get(i.operands[3], kind, threads), threads)

    def _do_div(self, i, threads):
        first, second = (self._get(each, i.type, threads) for each in i.operands[1:])
        divide = np.divide if i.type[0] == "f" else np.floor_divide
        self._set(i.operands[0], divide(first, second), threads)

    def _do_not(self, i, threads):
        value = self._get(i.operands[1], i.type, threads)
        self._set(i.operands[0], value == 0 if i.type == "pred" else ~value, threads)

    def _shift(self, i, threads, shift):
        value = self._get(i.operands[1], i.type, threads)
        count = self._get(i.operands[2], "u32", threads)
        limit = 8 * value.dtype.itemsize - 1
        shifted = shift(value, np.minimum(count, limit).astype(value.dtype))
        if value.dtype.kind == "u" or shift is np.left_shift:
            shifted = np.where(count > limit, value.dtype.type(0), shifted)
        self._set(i.operands[0], shifted, threads)

    def _do_shl(self, i, threads):
        self._shift(i, threads, np.left_shift)

    def _do_shr(self, i, threads):
        self._shift(i, threads, np.right_shift)

    def _do_prmt(self, i, threads):
        low, high, selector = (self._get(each, "u32", threads) for each in i.operands[1:])
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        picked = np.zeros(threads.size, np.uint64)
        for k in range(4):
            place = (selector >> np.uint32(4 * k)).astype(np.uint64) & np.uint64(15)
            if (place > 7).any():
                raise UnknownInstructionError(i.text)
            picked |= (both >> np.uint64(8) * place & np.uint64(255)) << np.uint64(8 * k)
        self._set(i.operands[0], picked.astype(np.uint32), threads)

    def _do_bfi(self, i, threads):
        kind = f"u{i.type[1:]}"
        field, base = (self._get(each, kind, threads) for each in i.operands[1:3])
        start, length = map(int, i.operands[3:])
        mask = field.dtype.type(((1 << length) - 1) << start)
        moved = field << field.dtype.type(start)
        self._set(i.operands[0], base & ~mask | moved & mask, threads)

    def _do_selp(self, i, threads):
        flag = self._get(i.operands[3], "pred", threads).astype(bool)
        yes, no = (self._get(each, i.type, threads) for each in i.operands[1:3])
        self._set(i.operands[0], np.where(flag, yes, no), threads)

    def _do_setp(self, i, threads):
        if len(i.operands) != 3:
            raise UnknownInstructionError(i.text)
        test = i.modifiers[0]
        first, second = (self._get(each, i.type, threads) for each in i.operands[1:])
        if test in ("nan", "num"):
            result = (np.isnan(first) | np.isnan(second)) == (test == "nan")
        elif i.type[0] == "f" and test.endswith("u"):
            result = _COMPARE[test[:-1]](first, second) | np.isnan(first) | np.isnan(second)
        else:
            result = _COMPARE[test](first, second)
        self._set(i.operands[0], result, threads)

    def _do_testp(self, i, threads):
        if i.modifiers[0] != "finite":
            raise UnknownInstructionError(i.text)
        value = self._get(i.operands[1], i.type, threads)
        self._set(i.operands[0], np.isfinite(value), threads)

    def _do_cvt(self, i, threads):
        target, source = i.modifiers[-2:]
        if target in _PAIRS:
            high, low = (_PAIRS[target](self._get(each, "f32", threads)) for each in i.operands[1:])
            self._set(i.operands[0], high << np.uint32(16) | low, threads)
        else:
            value = self._get(i.operands[1], source, threads)
            self._set(i.operands[0], value.astype(DTYPES[target]), threads)

    def _do_red(self, i, threads):
        if i.modifiers[-2:] != ["min", "s64"]:
            raise UnknownInstructionError(i.text)
        address, value = i.operands[-2:]
        offsets = self.memory.offsets(self._address(address, threads), 8, "red")
        values = self._get(value, "s64", threads)
        np.minimum.at(self.memory.room.view(np.int64), offsets // 8, values)

    _do_atom = _do_red  # what it returns is not used


class _Shared:
    """The shared memory of some blocks, and which thread wrote each byte of it."""

    def __init__(self, num_blocks, threads, nbytes):
        self.bytes = np.zeros(num_blocks * nbytes, np.uint8)
        self.num_barriers = 0
        self._nbytes, self._threads = nbytes, threads
        self._writer = np.full(self.bytes.size, -1)
        self._written_at = np.zeros(self.bytes.size, np.int64)

    def places(self, i, addresses, nbytes, threads):
        if (addresses < 0).any() or (addresses + nbytes > self._nbytes).any():
            raise AccessError(f"out of the shared memory: {i.text}")
        places = addresses + threads // self._threads * self._nbytes
        touched = places[:, None] + np.arange(nbytes)
        is_fresh = (self._writer[touched] >= 0) & (self._written_at[touched] == self.num_barriers)
        if (is_fresh & (self._writer[touched] != threads[:, None])).any():
            raise AccessError(f"another thread wrote there since the last barrier: {i.text}")
        if i.op == "st":
            if np.unique(places).size != places.size:
                raise AccessError(f"two threads store to one place: {i.text}")
            self._writer[touched], self._written_at[touched] = threads[:, None], self.num_barriers
        return places


def _require_one_rounding(i):
    """Refuse what ptxas may fuse, and what rounds otherwise than to the nearest, ties to even."""
    types = [each for each in i.modifiers if each in DTYPES or each in _PAIRS]
    is_narrowing = i.op == "cvt" and (types[0] in _PAIRS or types == ["f32", "f64"])
    must_round = is_narrowing or (i.type[0] == "f" and i.op in _ROUNDS)
    if (must_round and "rn" not in i.modifiers) or _INEXACT.intersection(i.modifiers):
        raise UnknownInstructionError(f"does not round once: {i.text}")


def _wide(kind):
    return f"{kind[0]}{2 * int(kind[1:])}"


def _bfloat_bits(values):
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded >> np.uint32(16))


def _half_bits(values):
    bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7FFF), bits)


_PAIRS = {"bf16x2": _bfloat_bits, "f16x2": _half_bits}
