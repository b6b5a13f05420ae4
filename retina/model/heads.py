"""Our own heads by name. Beside the road."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from retina.errors import ConfigError, check_choice
from retina.model.head import Head
from retina.model.task_aligned_head import TaskAlignedHead


def build_head(
    name: str | None, outputs: Mapping[str, Any], anchor_sides: Float[Tensor, "L N 2"], **common: Any
) -> Head | TaskAlignedHead:
    """The paper's head (None) or `task_aligned`, made with the arguments that both know.

    outputs: `head_quality`, `box_bins` and `guided_quality` of `retinanet`, which only the paper's can have.
    anchor_sides: width and height of a cell's anchors on each level, in strides.

    Raises ConfigError for an unknown name and for outputs that a head does not have."""
    check_choice(name, (None, "task_aligned"), "head")
    if name is None:
        quality, bins, guided = (outputs[key] for key in ("head_quality", "box_bins", "guided_quality"))
        return Head(**common, quality=quality, bins=bins, guided=guided)
    for key, value in outputs.items():
        if value:
            problem = f"{value} - the task-aligned head has no such output: leave the setting out (model=tood)"
            raise ConfigError(problem, code="contradiction", key=key)
    num_anchors = common.pop("num_anchors")
    assert num_anchors == anchor_sides.shape[1]
    return TaskAlignedHead(**common, anchor_sides=anchor_sides)
