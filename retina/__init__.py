"""RetinaNet-style detectors: train, evaluate, infer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from retina.inference import Detector

__version__ = "0.1.0"


def load(checkpoint: str | Path, *, device: str = "auto") -> Detector:
    """A trained detector from a run folder or a `.safetensors` file; see `retina.inference.Detector`.

    Raises CheckpointError when there is none, it is damaged, or of another version."""
    from retina.inference import Detector  # torch takes seconds to load, and errors in settings should not wait for it

    return Detector.load(checkpoint, device=device)
