import math

import pytest

from retina.errors import ConfigError
from retina.interop.foreign import Conventions, changed_conventions


def test_what_is_given_takes_the_place_of_the_usual() -> None:
    told = changed_conventions(Conventions(bgr=True), {"std": [1, 1, 1], "norm_eps": 0, "anchor_offset": None})
    assert (told.bgr, told.std, told.norm_eps, told.anchor_offset) == (True, [1.0, 1.0, 1.0], 0.0, 0.0)


@pytest.mark.parametrize(
    "given",
    [
        {"bgr": 1},
        {"std": 1.0},
        {"std": [1.0, 1.0]},
        {"std": [1.0, 1.0, 0.0]},
        {"mean": ["a", "b", "c"]},
        {"mean": [-1.0, 0.0, 0.0]},
        {"mean": [123.0, 116.0, 256.0]},
        {"mean": [math.nan, 1.0, 1.0]},
        {"norm_eps": -1.0},
        {"norm_eps": math.inf},
        {"norm_eps": True},
        {"short_side": 0},
        {"short_side": 1334},
        {"pad_multiple": 0},
        {"max_detections": 1.5},
        {"anchor_sizes": []},
        {"anchor_sizes": [0, 0, 0, 0, 0]},
        {"anchor_sizes": [math.inf, 1, 1, 1, 1]},
        {"anchor_sizes": [10**400, 1, 1, 1, 1]},
        {"anchor_scales": [-1, 1, 2]},
        {"anchor_ratios": [0, 1, 2]},
        {"anchor_offset": math.nan},
        {"colour": "red"},
    ],
)
def test_wrong_conventions_are_one_line(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"^conventions\.{next(iter(given))}[^\n]* - [^\n]*$"):
        changed_conventions(Conventions(), given)
