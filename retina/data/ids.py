"""Ids as other tools write them: 7.0, "7", or text such as the image's name. Beside the road."""

from collections.abc import Iterator, Sequence
from itertools import chain
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
    for section, key in (("images", "image_id"), ("categories", "category_id")):
        ids = ((record, "id") for record in document[section] if isinstance(record, dict))
        others = ((record, key) for record in document["annotations"] if isinstance(record, dict))
        as_text = section == "images" and any(isinstance(record.get("id"), str) for record, _ in ids)
        usual = str if as_text else int
        ids = ((record, "id") for record in document[section] if isinstance(record, dict))
        count = 0
        for record, name in chain(ids, others):
            value = record.get(name)
            if type(value) is not usual and (new := settled(value, as_text=as_text)) is not value:
                record[name] = new
                count += 1
        if count:
            problem = f"{count} ids are not written as the others: read as {'text' if as_text else 'whole numbers'}"
            yield f"{file}: {section}: {problem} - nothing to do here; other tools may not take 7, 7.0 and '7' for one"


def id_column(ids: Sequence[int | str]) -> Shaped[np.ndarray, "N"]:
    """Ids of one type as an array: int64, or text."""
    return np.array(ids, dtype=np.str_ if ids and isinstance(ids[0], str) else np.int64)
