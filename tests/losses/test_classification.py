import pytest

from retina.losses.classification import Focal


@pytest.mark.parametrize(("settings", "message"), [({"alpha": 1.5}, "alpha"), ({"gamma": -1.0}, "gamma")])
def test_settings_out_of_range_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Focal(**settings)
