"""Strings out of a NumPy object array, without ever unpickling it.

An array of dtype object is stored as a pickle: a program that builds the array and could run anything else as well.
Here the program is only read (`pickletools.genops` lists its instructions and executes none) and followed on a stack
of plain values. What numpy writes for an array of strings uses five kinds of instruction: constants, tuples and
lists, the memo, the three names below, and a call of them, which is noted down and not made. Anything else is refused.

    np.array(["a/b.wav", "c.wav"], dtype=object)
 -> _reconstruct(ndarray, (0,), b"b"), then its state (1, (2,), dtype("O8"), False, ["a/b.wav", "c.wav"])
 -> ["a/b.wav", "c.wav"]
"""

from __future__ import annotations

import io
import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAX_BYTES = 4 << 30  # of one unpacked array
NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # protocol 2 writes bytes as encode("b", "latin1")
}
CONSTANTS = {
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BININT", "BININT1", "BININT2", "LONG1", "INT"),
}
SINGLE = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
IGNORED = {"PROTO", "FRAME", "STOP"}


class Name(NamedTuple):
    """A function or class that the program names."""

    which: str


class Made(NamedTuple):
    """A call that the program asks for."""

    name: str
    arguments: tuple[Any, ...]
    state: list[Any]  # what it then sets, once


class _Mark:
    """Where a tuple or list on the stack begins."""


def read_strings(npz: Path, member: str) -> list[str]:
    """The strings of one array of an .npz file: of dtype object, or of fixed width.

    Raises ValueError for anything else, and for a file that is no .npz.
    """
    try:
        with zipfile.ZipFile(npz) as archive:
            if archive.getinfo(f"{member}.npy").file_size > MAX_BYTES:
                raise ValueError(f"{npz}: array {member!r} unpacks to more than {MAX_BYTES} bytes")
            content = io.BytesIO(archive.read(f"{member}.npy"))
    except (KeyError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{npz}: array {member!r} cannot be read ({error})") from error
    try:
        version = np.lib.format.read_magic(content)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(content)
        if dtype.kind == "O":
            found = strings_of_pickle(content.read())
        elif dtype.kind == "U":
            content.seek(0)
            found = np.lib.format.read_array(content, allow_pickle=False).tolist()
        else:
            raise ValueError(f"its dtype is {dtype}; allowed are strings")
        if shape != (len(found),):
            raise ValueError(f"its shape is {shape}, but it holds {len(found)} strings")
    except (ValueError, TypeError, EOFError, MemoryError) as error:
        raise ValueError(f"{npz}: array {member!r}: {error}") from error
    return found


def strings_of_pickle(program: bytes) -> list[str]:
    """The strings that a pickled array of strings holds. Raises ValueError for any other pickle."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, position in pickletools.genops(program):
            _step(opcode.name, argument, position, stack, memo)
        return _strings(stack[-1])
    except (IndexError, KeyError, TypeError, UnicodeError, OverflowError) as error:
        raise ValueError(f"a pickle that no array of strings has ({error!r:.80})") from error


def _step(name: str, argument: Any, position: int | None, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in CONSTANTS:
        stack.append(argument)
    elif name in SINGLE:
        stack.append(SINGLE[name])
    elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if argument is None else argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        path = tuple(argument.split(" ")) if name == "GLOBAL" else (stack.pop(-2), stack.pop())
        if path not in NAMES:
            raise ValueError(f"names {'.'.join(map(str, path))} at byte {position}, which arrays of strings do not")
        stack.append(Name(NAMES[path]))
    elif name == "MARK":
        stack.append(_Mark())
    elif name in ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        size = 0 if name == "EMPTY_TUPLE" else int(name[-1])
        items = tuple(stack[len(stack) - size :])
        del stack[len(stack) - size :]
        stack.append(items)
    elif name == "TUPLE":
        stack.append(tuple(_since_mark(stack)))
    elif name == "EMPTY_LIST":
        stack.append([])
    elif name == "APPEND":
        item = stack.pop()
        _list(stack).append(item)
    elif name == "APPENDS":
        items = tuple(_since_mark(stack))
        _list(stack).extend(items)
    elif name == "REDUCE":
        arguments, called = stack.pop(), stack.pop()
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise ValueError(f"a call of something else at byte {position}")
        stack.append(Made(called.which, arguments, []))
    elif name == "BUILD":
        state = stack.pop()
        if not isinstance(stack[-1], Made):
            raise ValueError(f"a state for something else at byte {position}")
        stack[-1].state.append(state)
    elif name not in IGNORED:
        raise ValueError(f"instruction {name} at byte {position}, which arrays of strings do not have")


def _list(stack: list[Any]) -> list[Any]:
    if not isinstance(stack[-1], list):
        raise ValueError("items for something that is no list")
    return stack[-1]


def _since_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1
    while not isinstance(stack[at], _Mark):
        at -= 1
        if at < 0:
            raise ValueError("the end of something that was not begun")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _strings(made: Any) -> list[str]:
    if not isinstance(made, Made) or made.name != "reconstruct" or len(made.state) != 1:
        raise ValueError("not an array")
    _, _, dtype, _, items = made.state[0]
    if not isinstance(dtype, Made) or dtype.name != "dtype" or dtype.arguments[:1] not in (("O8",), ("O4",), ("O",)):
        raise ValueError("not an array of objects")
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("an array of something else than strings")
    return items
