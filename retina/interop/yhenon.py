"""yhenon/pytorch-retinanet's state dicts.

Conventions (yhenon/pytorch-retinanet, retinanet/): images in RGB with ImageNet's mean and std, short side 608 and long
side at most 1024, padded to multiples of 32 (dataloader.py); statistics of norms fixed (`freeze_bn` in train.py); P6 of
C5 (model.py); anchors [ratio scale] around the middle of cells, (column + 1/2, row + 1/2) x stride, not rounded
(anchors.py); deltas that are multiplied with (0.1, 0.1, 0.2, 0.2) (utils.py, BBoxTransform); score above 0.05, NMS at
0.5, as many candidates and detections as there are (model.py); classes from 0 in the order of their category ids.
"""

import re
from collections.abc import Callable, Set

from retina.interop.foreign import Conventions, Foreign, Source, rename


def recognises(keys: Set[str]) -> bool:
    return {"conv1.weight", "classificationModel.output.weight"} <= keys


def read(source: Source) -> Foreign:
    def tower(ours: str) -> Callable[[re.Match[str]], str]:
        return lambda match: f"head.{ours}.convs.{2 * int(match[1]) - 2}.{match[2]}"

    def level(kind: str) -> Callable[[re.Match[str]], str]:
        return lambda match: f"fpn.{kind}.{int(match[1]) - 3}.{match[2]}"

    renamed = rename(
        source.state,
        [
            (r"((?:conv|bn)1\..+)", r"backbone.stem.\1"),
            (r"(layer[1-4]\..+)", r"backbone.\1"),
            (r"fpn\.P([345])_1\.(weight|bias)", level("lateral")),
            (r"fpn\.P([345])_2\.(weight|bias)", level("output")),
            (r"fpn\.P6\.(weight|bias)", r"fpn.extra.0.\1"),
            (r"fpn\.P7_2\.(weight|bias)", r"fpn.extra.1.\1"),
            (r"classificationModel\.conv(\d)\.(weight|bias)", tower("classification")),
            (r"regressionModel\.conv(\d)\.(weight|bias)", tower("box")),
            (r"classificationModel\.output\.(weight|bias)", r"head.classification.predict.\1"),
            (r"regressionModel\.output\.(weight|bias)", r"head.box.predict.\1"),
        ],
        [(r"fc\.(weight|bias)", "the classifier of the ImageNet weights it began with")],
    )
    return Foreign(
        program="yhenon's pytorch-retinanet",
        state=renamed.state,
        names=renamed.names,
        conventions=Conventions(
            norm_fixed=True,
            anchor_offset=0.5,
            delta_std=(0.1, 0.1, 0.2, 0.2),
            short_side=608,
            long_side=1024,
            candidates_per_level=10_000,
            max_detections=1000,
        ),
        unused=renamed.unused,
        unknown=renamed.unknown,
        notes=["it limits neither candidates nor detections: here to 10,000 per level and 1000"],
    )
