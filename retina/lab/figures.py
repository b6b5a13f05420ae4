"""Figures without a screen, written whole."""

import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from retina.errors import ConfigError
from retina.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
_MARK = "retina tools/lab.py"


def check_format(output: Path, key: str) -> None:
    """Raises ConfigError for a file that is neither PNG nor SVG, or is there and no figure of the lab."""
    if output.suffix not in FORMATS:
        raise ConfigError(f"{key}: {output} is of no known format - end it in {' or '.join(FORMATS)}")
    if (output.exists() or output.is_symlink()) and not (output.is_file() and _MARK.encode() in output.read_bytes()):
        raise ConfigError(f"{key}: {output} is there already and is no figure of the lab - choose another file")


def check_folder(folder: Path, key: str) -> None:
    """Raises ConfigError for a folder that cannot be made or written into. Leaves nothing behind."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryDirectory(dir=there):
            return
    except OSError as fault:
        raise ConfigError(f"{key}: {folder} cannot be written ({fault.strerror}) - choose another folder") from None


def save(figure: "Figure", output: Path) -> None:
    """PNG or SVG, by the suffix; the same figure makes the same bytes. Raises OSError."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    marks: dict[str, str | None] = {"Software": _MARK} if output.suffix == ".png" else {"Creator": _MARK, "Date": None}
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "retina"}):
        figure.savefig(buffer, format=output.suffix[1:], dpi=150, metadata=marks)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, buffer.getvalue())
