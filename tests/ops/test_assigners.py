import pytest

from retina.ops.assigners import MaxIoU


def test_thresholds_out_of_order_are_refused():
    with pytest.raises(ValueError, match="negative_iou <= positive_iou"):
        MaxIoU(positive_iou=0.3)
