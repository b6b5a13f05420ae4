import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retina.interop.restricted_pickle import load_arrays

sys.path.insert(0, str(Path(__file__).parents[1] / "reliability"))
import hostile

PYTHON_2 = (  # what cPickle of Python 2 wrote, protocol 2: {'w': array([1, 2], dtype=float32)}
    b"\x80\x02}q\x01U\x01wq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
    b"(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02f4K\x00K\x01\x87Rq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00"
    b"tb\x89U\x08\x00\x00\x80?\x00\x00\x00@tbs."
)


def values() -> dict[str, Any]:
    return {
        "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big endian": np.array([1, 2], dtype=">i4"),
        "half": np.ones((1, 2, 3, 4), np.float16),
        "none": np.zeros((0, 3), np.float32),
        "one": np.array(7, np.int64),
        "bool": np.array([True, False]),
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_come_back_in_every_protocol(protocol: int) -> None:
    plain = {"text": "ü", "more": [1, (2.5, None), True, 2**70], "bytes": b"\xff"}
    found = load_arrays(pickle.dumps({"model": values(), "other": plain}, protocol))
    assert found["other"] == plain
    for name, array in values().items():
        one = found["model"][name]
        assert type(one) is np.ndarray
        assert one.dtype == array.dtype.newbyteorder("=")
        assert one.flags.writeable
        np.testing.assert_array_equal(one, array)


def test_arrays_of_python_2_and_of_numpy_1_come_back() -> None:
    assert load_arrays(PYTHON_2)["w"].tolist() == [1.0, 2.0]
    for protocol in (2, 5):
        text = pickle.dumps({"w": np.ones(3)}, protocol)
        assert (b"numpy._core" in text) != (b"numpy.core" in text)
        other = text.replace(b"numpy._core", b"numpy.core") if protocol == 2 else text
        assert load_arrays(other)["w"].tolist() == [1.0, 1.0, 1.0]


def test_nothing_is_ever_called(tmp_path: Path) -> None:
    payloads = hostile.payloads(tmp_path)
    assert len(payloads) >= 30
    for opcodes in payloads.values():
        with pytest.raises(pickle.UnpicklingError):
            load_arrays(hostile.as_pickle(opcodes))
    assert list(tmp_path.iterdir()) == []


class System:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_name_that_is_no_array_ends_the_reading(protocol: int) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"system, which is no part of a numpy array"):
        load_arrays(pickle.dumps({"w": np.ones(2), "x": System()}, protocol))


def raw(data: bytes) -> bytes:
    """Opcodes that leave these bytes on the stack."""
    return b"C%c" % len(data) + data


def reconstruct(state: object) -> bytes:
    """A pickle of an array with this state."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + hostile.push((0,)) + raw(b"b") + b"tR"
    return b"\x80\x02" + array + hostile.push(state) + b"b."


def state_of(shape: object, name: str, data: bytes) -> bytes:
    dtype = hostile.call("numpy.dtype", name, False, True) + hostile.push((3, "<", None, None, None, -1, -1, 0)) + b"b"
    return b"(" + hostile.push(1) + hostile.push(shape) + dtype + hostile.push(False) + raw(data) + b"t"


def test_descriptions_are_checked_against_their_bytes() -> None:
    assert load_arrays(reconstruct(state_of((2,), "f4", bytes(8)))).tolist() == [0.0, 0.0]
    for shape, name in (((3,), "f4"), ((2**62, 2**62), "f4"), ((-2,), "f4"), ([2], "f4"), ((2,), "O8"), ((2,), "V4")):
        with pytest.raises(pickle.UnpicklingError):
            load_arrays(reconstruct(state_of(shape, name, bytes(8))))
    for state in ((), 3, (1, (2,), "f4", False, bytes(8)), (1, (2,), None, False, bytes(8))):
        with pytest.raises(pickle.UnpicklingError):
            load_arrays(reconstruct(state))


LAUGHS = b"\x80\x02]q\x00" + b"".join(b"](" + b"h%c" % i * 1000 + b"eq%c" % (i + 1) for i in range(15)) + b"."


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        b"\x80\x02}(" + b")" + b"\x85" * 200_000 + b"K\x01u.",  # a key to hash, deeper than the stack
        b"\x80\x02](" + b"]" * 100 + b"a" * 99 + b"e.",
        b"\x80\x04}r\xff\xff\xff\xff.\x00",  # a place among the remembered that would need 32 GB
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00.",
        b"\x80\x05\x96" + b"\xff" * 6 + b"\x00\x00.",
        b"\x80\x02]q\x00h\x00a.",  # holds itself
        b"\x80\x02cnumpy\ndtype\n}b.",
        b"\x80\x02cnumpy\nndarray\n(tR}b.",
    ],
)
def test_damaged_and_exploding_pickles_are_refused(data: bytes) -> None:
    if data.startswith(b"\x80\x04}r"):
        assert load_arrays(data) == {}  # and needs none of it
        return
    with pytest.raises(pickle.UnpicklingError):
        load_arrays(data)


def test_what_is_repeated_is_made_once() -> None:
    assert len(load_arrays(LAUGHS)) == 1000
    many = load_arrays(pickle.dumps([np.zeros(10**6)] * 1000))
    assert len({id(array) for array in many}) == 1


def test_arrays_that_share_their_bytes_are_bounded_by_the_size_of_the_file() -> None:
    data = bytes(100_000)
    shared = {f"{i}": _Shared(data) for i in range(50)}
    with pytest.raises(pickle.UnpicklingError, match="bytes of the file"):
        load_arrays(pickle.dumps(shared, 5))


class _Shared:
    """One of many arrays whose bytes are in the file once."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return np._core.numeric._frombuffer, (self.data, np.dtype("u1"), (len(self.data),), "C")
