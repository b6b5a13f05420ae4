"""Ids as other tools write them: 7.0, "7", or text such as the image's name. Beside the road."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

LARGEST_ID = 2**63 - 1
_LONGEST = 200
"""Characters of an id. All ids of a file take as much memory as its longest one."""


def is_id(value: Any) -> bool:
    """Whether it is a whole number that fits an array, or a text that does."""
    if isinstance(value, str):
        return 0 < len(value) <= _LONGEST and "\0" not in value
    return type(value) is int and abs(value) <= LARGEST_ID


def settled(value: Any, *, as_text: bool) -> Any:
    """7 for 7.0 and "7", or "7" for 7 and 7.0 where ids are text; anything else as it is."""
    if type(value) is float and value.is_integer():
        value = int(value)
    if as_text:
        return str(value) if type(value) is int else value
    is_whole = isinstance(value, str) and len(value) < 20 and value.isascii() and value.isdigit()
    return int(value) if is_whole and str(int(value)) == value else value


def settle_ids(file: Path, document: dict[str, Any]) -> Iterator[str]:
    """Gives all ids of images one type, text if any image has one of that, and categories numbers, in place.

    Yields a warning for what other tools would not take for equal."""
    records = document["annotations"]
    for section, key in (("images", "image_id"), ("categories", "category_id")):
        ids = (record.get("id") for record in document[section] if isinstance(record, dict))
        as_text = section == "images" and any(isinstance(value, str) for value in ids)
        count = _settle(document[section], "id", as_text=as_text)
        if as_text or not records.is_usual:
            count += records.rewrite(partial(_settle, key=key, as_text=as_text))
        if count:
            problem = f"{count} ids are not written as the others: read as {'text' if as_text else 'whole numbers'}"
            yield f"{file}: {section}: {problem} - nothing to do here; other tools may not take 7, 7.0 and '7' for one"


def _settle(records: list[Any], key: str, *, as_text: bool) -> int:
    """Gives the ids under that key their type, in place; how many had another."""
    usual = str if as_text else int
    count = 0
    for record in records:
        value = record.get(key) if isinstance(record, dict) else None
        if value is not None and type(value) is not usual and (new := settled(value, as_text=as_text)) is not value:
            record[key] = new
            count += 1
    return count


def id_column(ids: Sequence[int | str]) -> Shaped[np.ndarray, "N"]:
    """Ids of one type as an array: int64, or text."""
    return np.array(ids, dtype=np.str_ if ids and isinstance(ids[0], str) else np.int64)
