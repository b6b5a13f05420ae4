"""What an exported file says about itself, by one schema, because it may be a stranger's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retina.errors import CheckpointError, ConfigError
from retina.schema import check_type, parse_json

SCHEMA_VERSION = 1
_TYPES: Mapping[str, Any] = {
    "schema_version": int,
    "format": str,
    "raw": bool,
    "channels": int,
    "classes": list[str],
    "category_ids": list[int],
    "thresholds": list[float],
    "score_threshold": float,
    "candidates_per_level": int,
    "nms_iou": float,
    "max_detections": int,
    "class_agnostic": bool,
    "preprocessing": dict[str, Any],
    "precision": str,
    "proof": dict[str, Any],
}
_OF_PROOF: Mapping[str, Any] = {
    "folder": str,
    "tolerance": dict[str, float],
    "images": list[dict[str, Any]],
}
_OF_IMAGE: Mapping[str, Any] = {"name": str, "sha256": str, "size": list[int], "detections": list[list[float]]}


def parse_description(header: str | None, where: object) -> dict[str, Any]:
    """What stands under `HEADER` in a file. Raises CheckpointError if that is no description."""
    try:
        values = parse_json(header) if header else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        problem = "has no description of a detector - give a file that retina export wrote"
        raise CheckpointError(f"{where}: {problem}", code="no-card")
    return values


def check_description(values: dict[str, Any], file: Path) -> None:
    """Raises CheckpointError for the first value that is missing, of the wrong type or contradicts another."""
    try:
        _check(values, _TYPES, "")
        if values["schema_version"] != SCHEMA_VERSION:
            shown = f"is {values['schema_version']!r:.20}, this program reads {SCHEMA_VERSION}"
            raise ConfigError(shown, code="other-version", key="schema_version")
        if len(values["thresholds"]) != len(values["classes"]):
            raise ConfigError("are not one per class", code="bad-header", key="thresholds")
        proof = values["proof"]
        _check(proof, _OF_PROOF, "proof.")
        if set(proof["tolerance"]) - {"unmatched"} != {"pixels", "score"} or not proof["images"]:
            raise ConfigError("has no images, or no tolerance of pixels and score", code="bad-header", key="proof")
        for number, image in enumerate(proof["images"]):
            _check(image, _OF_IMAGE, f"proof.images.{number}.")
            sound = len(image["size"]) == 2 and all(side > 0 for side in image["size"])
            labels = [row[5] if len(row) == 6 else -1 for row in image["detections"]]
            if not (sound and set(image) == set(_OF_IMAGE) and all(0 <= k < len(values["classes"]) for k in labels)):
                raise ConfigError("is no image with detections", code="bad-header", key=f"proof.images.{number}")
    except ConfigError as fault:
        problem = f"{fault} - export it again" if " - " not in str(fault) else str(fault)
        raise CheckpointError(f"{file}: description: {problem}", code=fault.code) from None


def _check(values: Mapping[str, Any], types: Mapping[str, Any], prefix: str) -> None:
    for name, hint in types.items():
        if name not in values:
            raise ConfigError("is missing", code="bad-header", key=f"{prefix}{name}")
        check_type(values[name], hint, f"{prefix}{name}")
