"""The output of an inference, image by image."""

import json
from pathlib import Path
from typing import Any


def images_found(output: Path) -> list[dict[str, Any]]:
    """A record for each image that was looked at: name, size, names of pictures and crops, boxes (xyxy), scores and
    class names."""
    about, results = (json.loads((output / name).read_text()) for name in ("inference.json", "detections.json"))
    images = {one["id"]: one | {"boxes": [], "scores": [], "classes": []} for one in about["images"]}
    assert isinstance(results, list)
    for one in results:
        image = images[one["image_id"]]
        assert {key: image[key] for key in ("file_name", "width", "height")}.items() <= one.items()
        x, y, width, height = one["bbox"]
        image["boxes"].append([x, y, x + width, y + height])
        image["scores"].append(one["score"])
        image["classes"].append(one["category"])
    return list(images.values())
