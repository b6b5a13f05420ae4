"""Our own heads by name. Beside the road."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from retina.errors import ConfigError, check_choice
from retina.model.head import Head, Outputs
from retina.model.task_aligned_head import TaskAlignedHead
from retina.ops.anchors import AnchorGenerator


def build_head(
    name: str | None, outputs: Mapping[str, Any], anchors: AnchorGenerator, strides: Sequence[int], **common: Any
) -> Head | TaskAlignedHead:
    """The paper's head (None) or `task_aligned`, made with the arguments that both know.

    outputs: `head_quality`, `box_bins` and `guided_quality` of `retinanet`, which only the paper's can have.

    Raises ConfigError for an unknown name and for outputs that a head does not have."""
    check_choice(name, (None, "task_aligned"), "head")
    if name is None:
        keys = ("head_quality", "box_bins", "guided_quality")
        return Head(**common, outputs=Outputs(*(outputs[key] for key in keys)))
    for key, value in outputs.items():
        if value:
            problem = f"{value} - the task-aligned head has no such output: leave the setting out (model=tood)"
            raise ConfigError(problem, code="contradiction", key=key)
    del common["num_anchors"]
    with torch.device("cpu"):  # they become numbers, also of a model that is only sized up
        anchor_sides = anchors.sides(strides)
    return TaskAlignedHead(**common, anchor_sides=anchor_sides)
