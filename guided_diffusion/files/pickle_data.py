"""Pickles as data: what the file says is written down, and nothing of it is run.

A pickle is a program. The machine here follows its instructions as far as they describe lists, dicts, text
and numbers; where one refers to a global, its name is put down in place of the thing, and a call becomes a
`Record` of what would have been called with what. There is no instruction that imports, calls or sets an
attribute, so there is nothing to escape from; names that the reader of the file did not allow end the reading
all the same, at the first one.

Every instruction costs a bounded amount of time and memory, so that a little file can never ask for much;
bytes stay in the file, as `Span`s. This module imports no other of the project.
"""

import pickle
import pickletools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

PERSISTENT_ID = (
    "a persistent id"  # to be allowed like a name; pickle asks its caller what such an id stands for
)

# Far above what a network's pickle has, far below what hurts.
_LONGEST_LINE, _MOST_BITS = 1 << 16, 128

_NEW = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple}
_NEW |= {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}
_OPERANDS = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPEND": 1,
    "SETITEM": 2,
    "STACK_GLOBAL": 2,
    "REDUCE": 2,
    "NEWOBJ": 2,
    "BUILD": 1,
}
_OPERANDS |= {"BINPERSID": 1}
_UP_TO_MARK = ("TUPLE", "LIST", "FROZENSET", "DICT", "APPENDS", "ADDITEMS", "SETITEMS")
_DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
_SETS = ("builtins.set", "__builtin__.set")
CONTAINERS = frozenset((*_DICTS, *_SETS))  # allowed names whose calls make a dict and a list


class RefusedError(ValueError):
    """The pickle asks for something that it may not have; the message names it."""


class Span(NamedTuple):
    """Bytes that stay in the file."""

    start: int
    length: int


@dataclass(frozen=True)
class Name:
    """A global that the pickle refers to: its name, not the thing."""

    name: str


@dataclass(eq=False)
class Record:
    """What the pickle would have made: by calling `name` with `args`, and giving the result `state`."""

    name: str
    args: tuple
    state: Any = None


class Window:
    """The bytes start .. end of an open file, as pickletools reads them; never asked for more memory than
    there are bytes.
    """

    def __init__(self, file: BinaryIO, start: int, end: int):
        self.file, self.end = file, end
        file.seek(start)

    def tell(self) -> int:
        return self.file.tell()

    def left(self) -> int:
        return self.end - self.file.tell()

    def read(self, n: int) -> bytes:
        if n > self.left():
            raise ValueError(f"{n:,} bytes announced where {self.left():,} are left")
        return self.file.read(n)

    def readline(self) -> bytes:
        return self.file.readline(min(_LONGEST_LINE, self.left()))


def read_pickle(
    window: Window, names: Collection[str], pattern: re.Pattern | None = None, *, most: int
) -> Any:
    """Read the pickle where `window` stands: None, bool, int, float, str, tuple, list (sets too), dict with
    str keys, Span, Name, Record.

    names, pattern: the globals that it may refer to, "module.name". most: how many instructions it may have.
    Raises RefusedError for another global, or another kind of request, and ValueError, IndexError, KeyError,
    AttributeError, TypeError, OverflowError or struct.error where the pickle is damaged.
    """
    return _Machine(window, names, pattern).run(most)


def expect(value: Any, kind: type) -> Any:
    """Return value if it is of this very type; raises ValueError if not."""
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def printable(text: str) -> str:
    """Text out of a file for a message: at most 120 characters of ASCII in one line."""
    return ascii(text[:120])[1:-1][:120]


class _Machine:
    def __init__(self, window, names, pattern):
        self.window, self.names, self.pattern = window, names, pattern
        self.stack = []
        self.below = []  # the stacks under the marks
        self.memo = {}

    def run(self, most):
        for count, (opcode, arg, _) in enumerate(pickletools.genops(self.window)):
            if count == most:
                raise ValueError(f"more than {most:,} instructions")
            if opcode.name in _NEW:
                self.stack.append(_NEW[opcode.name]())
            elif opcode.name in _OPERANDS:
                self._build(opcode.name, self._popped(_OPERANDS[opcode.name]))
            elif opcode.name in _UP_TO_MARK:
                values, self.stack = self.stack, self.below.pop()
                self._build(opcode.name, values)
            else:
                self._refer(opcode.name, arg)
        return self.stack.pop()  # genops ends at STOP, or raises

    def _build(self, instruction, values):
        """Make something of the operands, or add them to what is now on top of the stack."""
        match instruction:
            case "LIST" | "FROZENSET":
                self.stack.append(values)
            case "DICT":
                self.stack.append(_update({}, values))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                expect(self.stack[-1], list).extend(values)
            case "SETITEM" | "SETITEMS":
                _update(expect(self.stack[-1], dict), values)
            case "STACK_GLOBAL":
                module, name = values
                self.stack.append(self._name(f"{expect(module, str)}.{expect(name, str)}"))
            case "REDUCE" | "NEWOBJ":
                self.stack.append(_made(*values))
            case "BUILD":
                expect(self.stack[-1], Record).state = values[0]
            case "BINPERSID":
                self._allow(PERSISTENT_ID)
                self.stack.append(Record(PERSISTENT_ID, expect(values[0], tuple)))
            case _:  # TUPLE, TUPLE1, TUPLE2, TUPLE3
                self.stack.append(tuple(values))

    def _refer(self, instruction, arg):
        """What moves no operands: marks, the memo, names, and values that stand in the instruction."""
        match instruction:
            case "FRAME" | "STOP":
                pass
            case "PROTO":
                if arg > pickle.HIGHEST_PROTOCOL:
                    raise ValueError(f"pickle protocol {arg}")
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[arg])
            case "GLOBAL":
                self.stack.append(self._name(arg.replace(" ", ".", 1)))
            case "INST":
                self._name(arg.replace(" ", ".", 1))
                raise RefusedError("the instruction INST")
            case "EXT1" | "EXT2" | "EXT4":
                raise RefusedError(f"code {arg} of copyreg's extension registry ({instruction})")
            case "PERSID":
                raise RefusedError(f"{PERSISTENT_ID} ({printable(arg)})")
            case _:
                self.stack.append(self._literal(instruction, arg))

    def _literal(self, instruction, arg):
        if isinstance(arg, (bytes, bytearray)):
            return Span(self.window.tell() - len(arg), len(arg))
        if isinstance(arg, int) and arg.bit_length() > _MOST_BITS:
            raise ValueError(f"an integer of {arg.bit_length():,} bits")
        if (
            arg is None
        ):  # every instruction that is left and has no value: DUP, POP, OBJ, NEWOBJ_EX, NEXT_BUFFER, ...
            raise RefusedError(f"the instruction {instruction}")
        return arg

    def _name(self, name):
        if not (self.pattern and self.pattern.fullmatch(name)):
            self._allow(name)
        return Name(name)

    def _allow(self, name):
        if name not in self.names:
            raise RefusedError(printable(name))

    def _popped(self, count):
        if len(self.stack) < count:
            raise IndexError("an instruction lacks its operands")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values


def _made(function, args):
    """What stands for the result of a call. The arguments of containers are not copied: a little file could
    ask for that often.
    """
    name = expect(function, Name).name
    expect(args, tuple)
    if name in _DICTS:
        if args:
            raise ValueError(f"{name} with arguments")
        return {}
    if name in _SETS:
        (values,) = args
        return expect(values, list)
    return Record(name, args)


def _update(target, flat):
    """Set target's items to key, value, key, value, ... Keys are text, whose hashes cannot be aimed at each
    other.
    """
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        target[expect(key, str)] = value
    return target
