"""What tests say about faults: their code and what they name, not their wording."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from retina.errors import RetinaError


@contextmanager
def refused(code: str, *named: object, kind: type[RetinaError] = RetinaError) -> Iterator[None]:
    """The block ends in a fault of that code, in one line that names the key, file or record at fault."""
    with pytest.raises(kind) as caught:
        yield
    line = str(caught.value)
    assert caught.value.code == code, line
    assert "\n" not in line
    assert [name for name in named if str(name) not in line] == [], line
