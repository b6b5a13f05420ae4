"""Pickles that hold numpy arrays and nothing else: detectron2's `.pkl` files, of Python 2 as well.

Not even numpy is driven by the file. Where the pickle asks for one of the few functions with which numpy (1 or 2)
pickles arrays in protocols 0 to 5, it gets a description in its place; arrays are made from the descriptions once those
have been checked against the bytes that are there. Every other name ends the reading, before anything is imported.

Source: `numpy.ndarray.__reduce_ex__`, which gives `_reconstruct` and a state, or from protocol 5 on `_frombuffer`.
"""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np

_NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


class _Shut:
    """Refuses whatever a pickle would like to set on it."""

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("sets the state of something that has none")


class _NdarrayType(_Shut):
    """Stands for `numpy.ndarray` among the arguments of `_reconstruct`."""


class _Text(_Shut):
    """`_codecs.encode`, with which Python 3 writes bytes in protocols 0 to 2."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes in {encoding!r:.20}")
        return text.encode("latin1")


class _NoBytes(_Shut):
    """`bytes()`, which is how those protocols write none at all."""

    def __new__(cls) -> bytes:  # type: ignore[misc]
        return b""


class _Dtype:
    """`numpy.dtype(name, align, copy)`, and its byte order in the state."""

    def __init__(self, name: str, align: object = False, copy: object = False) -> None:
        if name not in _NUMBERS:
            raise pickle.UnpicklingError(f"an array of {name!r:.20}, which are no numbers")
        self.name = name
        self.order: Literal["<", ">", "|", "="] = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("an unknown byte order")
        self.order = state[1]


class _Array:
    """`_reconstruct(ndarray, (0,), b"b")`; all that matters follows as a state."""

    def __init__(self, *ignored: object) -> None:
        self.parts: tuple[object, object, object, object] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.parts = data, dtype, shape, "F" if fortran else "C"

    @property
    def num_bytes(self) -> int:
        data = self.parts[0] if self.parts else None
        return len(data) if isinstance(data, (str, bytes, bytearray)) else 0

    def array(self) -> np.ndarray:
        if self.parts is None:
            raise pickle.UnpicklingError("an array without numbers")
        data, dtype, shape, order = self.parts
        if isinstance(data, str):  # Python 2's str
            data = data.encode("latin1")
        if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _Dtype) or order not in ("C", "F"):
            raise pickle.UnpicklingError("an array that is none")
        if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
            raise pickle.UnpicklingError("an array without a shape")
        kind = np.dtype(dtype.name).newbyteorder(dtype.order)
        if math.prod(shape) * kind.itemsize != len(data):
            raise pickle.UnpicklingError("an array of another size than its bytes")
        flat = np.frombuffer(data, dtype=kind)
        return flat.reshape(shape, order=order).astype(kind.newbyteorder("="))  # a copy that can be written to


class _FromBuffer(_Array):
    """`_frombuffer(buffer, dtype, shape, order)`."""

    def __init__(self, data: object, dtype: object, shape: object, order: object) -> None:
        self.parts = data, dtype, shape, order

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("sets the state of an array that has one")


_KNOWN: dict[tuple[str, str], type] = {("numpy", "ndarray"): _NdarrayType, ("numpy", "dtype"): _Dtype}
_KNOWN |= {(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")}
_KNOWN |= {(f"numpy.{core}.numeric", "_frombuffer"): _FromBuffer for core in ("core", "_core")}
_KNOWN |= {("_codecs", "encode"): _Text, ("__builtin__", "bytes"): _NoBytes}

SHARED_TIMES = 4
"""Arrays may have this many times the bytes of the pickle."""

_NEEDED = (  # and no others
    """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE
    INT LONG LONG1 LONG4 BININT BININT1 BININT2 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD"""
)


class _Unpickler(pickle._Unpickler):  # in Python: the one in C reserves as much memory as a file asks for
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    append: Callable[[object], None]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _NEEDED.split()
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"names {module}.{name}"[:100] + ", which is no part of a numpy array")
        return _KNOWN[module, name]

    def _set(self, items: list[Any]) -> None:
        if not all(isinstance(key, str) for key in items[::2]):  # to hash what is deeply nested crashes Python
            raise pickle.UnpicklingError("a key that is no text")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    dispatch |= {pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items, pickle.DICT[0]: _dict}


def load_arrays(data: bytes) -> Any:
    """What a pickle holds: dicts, lists, tuples, strings, bytes, numbers and numpy arrays of numbers.

    Text that Python 2 wrote is read as latin1. Raises pickle.UnpicklingError for anything else, and for what is no
    pickle."""
    try:
        memo: dict[int, Any] = {}
        return _arrays(_Unpickler(io.BytesIO(data), encoding="latin1").load(), memo, [SHARED_TIMES * len(data)])
    except pickle.UnpicklingError:
        raise
    except KeyError as fault:
        raise pickle.UnpicklingError(f"an instruction that no array needs ({fault})") from None
    except (Exception, RecursionError, MemoryError) as fault:  # such as calls of what cannot be called
        raise pickle.UnpicklingError(f"{type(fault).__name__}: {fault}"[:100]) from None


def _arrays(value: Any, memo: dict[int, Any], left: list[int], depth: int = 0) -> Any:
    """The value with arrays for their descriptions. What a file repeats by reference is made once.

    left: the bytes that arrays may still take, in a list of one; several may share the bytes of the file."""
    if id(value) in memo:
        return memo[id(value)]
    if depth > 20:
        raise pickle.UnpicklingError("too many values within each other")
    if isinstance(value, _Array):
        left[0] -= value.num_bytes
        if left[0] < 0:
            raise pickle.UnpicklingError("arrays of many times the bytes of the file")
        result: Any = value.array()
    elif isinstance(value, dict):
        result = {key: _arrays(item, memo, left, depth + 1) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        result = type(value)(_arrays(item, memo, left, depth + 1) for item in value)
    elif value is None or isinstance(value, (str, bytes, bytearray, int, float)):
        return value
    else:
        raise pickle.UnpicklingError(f"holds a {type(value).__name__.strip('_')}, which is no array")
    memo[id(value)] = result
    return result
