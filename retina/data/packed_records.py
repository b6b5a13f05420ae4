"""Annotation records in a tenth of the memory that dictionaries take. Beside the road."""

import marshal
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

_KEPT = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore")
"""What is looked at of an annotation, beside the begin of a polygon and an angle."""


class PackedRecords:
    """The records of `annotations`, in their order, in pieces that are unpacked one at a time."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._starts = [0]
        self.is_usual = True
        """Whether all ids are whole numbers."""

    def __len__(self) -> int:
        return self._starts[-1]

    def append(self, records: list[Any]) -> None:
        """Packs some more, without what nobody looks at: polygons, keypoints, attributes, texts."""
        kept = [_without_ballast(record) for record in records]
        self.is_usual = self.is_usual and all(
            type(record.get(key)) is int for record in kept if isinstance(record, dict) for key in _KEPT[1:3]
        )
        self._pieces.append(_pack(kept))
        self._starts.append(len(self) + len(kept))

    def pieces(self) -> Iterator[tuple[int, list[Any]]]:
        """The position of a piece's first record, and the records."""
        for start, piece in zip(self._starts, self._pieces, strict=False):
            yield start, _unpack(piece)

    def rewrite(self, change: Callable[[list[Any]], int]) -> int:
        """Lets records be changed in place; the sum of what `change` returns, which is 0 where nothing was."""
        total = 0
        for number, piece in enumerate(self._pieces):
            records = _unpack(piece)
            if count := change(records):
                self._pieces[number] = _pack(records)
                total += count
        return total

    def at(self, positions: Collection[int]) -> dict[int, Any]:
        """The records of these positions."""
        wanted = {*positions}
        found: dict[int, Any] = {}
        for first, records in self.pieces() if wanted else ():
            found |= {position: record for position, record in enumerate(records, first) if position in wanted}
        return found


def _pack(records: list[Any]) -> bytes:
    return zlib.compress(marshal.dumps(records), 1)


def _unpack(piece: bytes) -> list[Any]:
    return marshal.loads(zlib.decompress(piece))


def _without_ballast(record: Any) -> Any:
    if not isinstance(record, dict):
        return record
    kept = {key: record[key] for key in _KEPT if key in record}
    polygons, attributes = record.get("segmentation"), record.get("attributes")
    if isinstance(polygons, list) and polygons and isinstance(polygons[0], list):
        kept["segmentation"] = [polygons[0][:6]]
    if isinstance(attributes, dict) and "rotation" in attributes:
        kept["attributes"] = {"rotation": attributes["rotation"]}
    return kept
