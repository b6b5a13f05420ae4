"""A document that is read a few bytes at a time is the one that json.loads reads, and so are its faults."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina.data import json_stream
from retina.data.columns import digest_of
from retina.data.json_stream import CutOffError, JsonStream
from retina.schema import unique_keys

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
documents = st.dictionaries(st.sampled_from(["images", "annotations", "info", "é"]), st.lists(values) | values)


def streamed(data: bytes, chunk: int, pieces: int = 3) -> tuple[Any, str]:
    """The document, put together again, and the digest."""
    lists: dict[str, list[Any]] = {}

    def take(key: str, piece: list[Any]) -> None:
        assert len(piece) <= pieces
        lists.setdefault(key, []).extend(piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        patch.setattr(json_stream, "_ELEMENTS", pieces)
        stream = JsonStream(io.BytesIO(data))
        document = stream.read(("images", "annotations"), take)
    return (document | lists if lists else document), stream.digest()


def loads(data: bytes) -> Any:
    return json.loads(data, object_pairs_hook=unique_keys)


def same(one: Any, other: Any) -> bool:
    return json.dumps(one) == json.dumps(other) and repr(one) == repr(other)  # of NaN too, 1 is not 1.0


@settings(deadline=None)
@given(documents, st.sampled_from([1, 2, 7, 50, 10_000]), st.sampled_from([None, 1]), st.booleans())
def test_documents_are_what_json_reads(document: dict[str, Any], chunk: int, indent: int | None, ascii: bool) -> None:
    data = json.dumps(document, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    read, _ = streamed(data, chunk)
    assert same(read, loads(data))
    assert list(read) == list(document)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings(encoding: str) -> None:
    data = json.dumps({"images": [{"name": "ü😀"}], "b": "ß"}, ensure_ascii=False).encode(encoding)
    assert streamed(data, 4)[0] == loads(data)


@pytest.mark.parametrize("text", ["[1, 2, 3]", ' "a" ', "12345", "-1.5e300", "null", "NaN", '{"a": Infinity}', "{}"])
def test_other_documents(text: str) -> None:
    for chunk in (4, 5, 100):
        assert same(streamed(text.encode(), chunk)[0], loads(text.encode()))


FAULTS = [
    '{"images": [1, 2',
    '{"images": [1, 2]',
    '{"images": [1 2]}',
    '{"images": [1,, 2]}',
    '{"images": [1,]}',
    '{"images": [{"a": 1, "a": 2}]}',
    '{"images": [], "images": []}',
    '{"a": {"b": 1, "b": 1}}',
    '{"images": [{"a" 1}]}',
    '{"images": ["\\x"]}',
    '{"images": ["a\nb"]}',
    '{"images": [tru]}',
    '{"images": []} x',
    '{"images": []}}',
    "{images: 1}",
    '{"a": 1,}',
    '{"a" 1}',
    '{"a": }',
    '{"a": 1 "b": 2}',
    "[1, 2",
    '{"a": "never ends',
    "{",
    "",
    "nul",
]


@pytest.mark.parametrize("text", FAULTS)
@pytest.mark.parametrize("chunk", [4, 6, 1000])
def test_faults_are_those_of_json(text: str, chunk: int) -> None:
    text = f"\n\n{text}" if text else text
    with pytest.raises(ValueError) as expected:  # noqa: PT011  # that is compared
        loads(text.encode())
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        streamed(text.encode(), chunk)
    expected_place = str(expected.value).partition(": line")[2]
    if isinstance(caught.value, CutOffError) or "Illegal trailing comma" in str(expected.value):
        return  # where it ends is told by the bytes
    assert str(caught.value).partition(": line")[2] == expected_place


def test_bytes_that_are_no_text_and_nesting_without_end() -> None:
    with pytest.raises(UnicodeDecodeError):
        streamed(b'{"images": ["\xff\xff\xff\xff"]}', 5)
    with pytest.raises(RecursionError):
        streamed(b'{"a": ' + b"[" * 100_000, 1000)


def test_the_digest_is_that_of_the_bytes() -> None:
    data = json.dumps({"images": ["x" * 1000] * 14_000}).encode()
    assert len(data) > 3 * json_stream.CHUNK
    stream = JsonStream(io.BytesIO(data))
    stream.read(("images",), lambda key, piece: None)
    assert stream.digest() == digest_of(memoryview(data))


def test_what_is_read_is_not_kept() -> None:
    """A list of many megabytes passes through a window of a few."""
    data = b'{"annotations": [' + b",".join([b'{"a": "' + b"x" * 1000 + b'"}'] * 20_000) + b"]}"
    stream = JsonStream(io.BytesIO(data))
    longest = 0

    def take(key: str, piece: list[Any]) -> None:
        nonlocal longest
        longest = max(longest, len(stream._text))

    stream.read(("annotations",), take)
    assert 0 < longest <= 3 * json_stream.CHUNK
