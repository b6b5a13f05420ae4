"""What the rows of a class layer stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights

from retina.errors import CheckpointError, ConfigError
from retina.model.formats.foreign import Foreign
from retina.model.formats.shapes import CLASS_LAYER, shape_of


def coco_rows() -> list[str | None]:
    """COCO's name of category 0, 1, 2, ... 90, as torchvision lists them; None where there is none (0 is torchvision's
    background)."""
    names = RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    return [None if name in ("__background__", "N/A") else name for name in names]


@dataclass(frozen=True)
class ClassRows:
    """Which rows of the class layer are kept, for each anchor, and what they stand for."""

    kept: list[int]
    names: list[str]
    ids: list[int]
    note: str


def class_rows(
    foreign: Foreign, file: Path, state: dict[str, Tensor], anchors: int, given: Sequence[str] | None
) -> ClassRows:
    (total,) = shape_of(state, f"{CLASS_LAYER}.bias", 1, file)
    count, rest = divmod(total, anchors)
    if rest or not count:
        raise CheckpointError(f"{file}: {total} class logits per cell for {anchors} anchors - give another file")
    coco = coco_rows()
    names: list[str | None]
    if given is not None:
        names = list(given)
        if foreign.background_first and len(names) == count - 1:
            names = [None, *names]
        if len(names) != count:
            raise ConfigError(
                f"classes: {len(names)} names for {count} classes of {file} - name them all, in its order"
            )
        why = "as given"
    elif foreign.classes is not None and len(foreign.classes) == count:
        names, why = foreign.classes, "as the file says"
    elif foreign.background_first and count == len(coco):
        names, why = coco, "COCO's by their category ids; rows of the background and of ids COCO does not use left out"
    elif count == 80:
        names, why = [name for name in coco if name], "COCO's, because there are 80"
    else:
        names, why = [f"class {k}" for k in range(count)], "numbered: the file does not name them, give classes=[...]"
    kept = [row for row, name in enumerate(names) if name is not None]
    found = [name for name in names if name is not None]
    if len(set(found)) < len(found):
        raise ConfigError(f"classes: some of {file} have the same name - give classes=[...] with {count} of their own")
    ids = [foreign.first_id + row for row in kept]
    if set(found) <= set(coco) and count in (80, len(coco)):
        ids = [coco.index(name) for name in found]
    return ClassRows(kept, found, ids, f"classes: {len(found)}, {why}")
