"""Files with random damage, decoded in processes of their own: none dies or hangs, all that is raised is DataError."""

import io
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retina.data.images import image_size, read_image
from retina.errors import DataError

# format, mode and what else `Image.save` takes
KINDS: dict[str, list[tuple[str, dict[str, object]]]] = {
    "JPEG": [
        ("RGB", {}),
        ("L", {}),
        ("CMYK", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"restart_marker_blocks": 1}),
    ],
    "PNG": [("RGB", {}), ("RGBA", {}), ("P", {"transparency": 1}), ("1", {}), ("I;16", {})],
    "WEBP": [("RGB", {}), ("RGBA", {}), ("RGB", {"lossless": True})],
    "GIF": [("P", {}), ("L", {"transparency": 3}), ("P", {"save_all": True})],
    "BMP": [("RGB", {}), ("P", {}), ("1", {}), ("RGBA", {})],
    "TIFF": [("RGB", {}), ("CMYK", {}), ("I;16", {})]
    + [("RGB", {"compression": how}) for how in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")]
    + [("1", {"compression": "group4"})],
    "PPM": [("RGB", {}), ("L", {}), ("1", {}), ("I;16", {})],
}
Record = Callable[[str, object], None]
WORDS = [b"\x00" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80", b"\x01\x00\x00\x00"]


@cache
def sound_files(kind: str) -> list[bytes]:
    """Images of 24 x 31 pixels with an EXIF orientation, as bytes."""
    smooth = np.add.outer(np.arange(24) * 5, np.arange(31) * 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for mode, options in KINDS[kind]:
        pixels = np.stack([smooth, smooth.T.copy().reshape(24, 31), 255 - smooth], axis=-1).astype(np.uint8)
        image = (
            Image.fromarray((smooth * 200).astype(np.uint16))
            if mode == "I;16"
            else Image.fromarray(pixels).convert(mode)
        )
        if options.get("save_all"):
            options = {**options, "append_images": [image.rotate(180)]}
        if kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            options = {**options, "exif": exif}
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        files.append(stream.getvalue())
    return files


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes, half of them among the first bytes, where the structure is."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        end = max(1, min(len(data), 200) if rng.random() < 0.5 else len(data))
        at = int(rng.integers(end))
        how = rng.integers(6)
        if how == 0:
            data[at : at + 1] = bytes([rng.integers(256)])
        elif how == 1:
            data[at : at + 1] = bytes([data[at] ^ (1 << rng.integers(8))]) if data else b""
        elif how == 2:
            data[at : at + 4] = WORDS[rng.integers(len(WORDS))]
        elif how == 3:
            del data[at : at + int(rng.integers(1, 40))]
        elif how == 4:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        else:
            del data[max(at, 8) :]
    return bytes(data)


def outcomes(kind: str, seed: int, count: int, file: Path) -> Iterator[tuple[str, bytes]]:
    """What becomes of each damaged file: "same size", "error", or what must not be."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        content = mutated(sound_files(kind)[number % len(KINDS[kind])], rng)
        file.write_bytes(content)
        results: list[object] = []
        for read in (image_size, read_image):
            try:
                result = read(file, max_pixels=4_000_000)
                results.append(result.shape[:2] if isinstance(result, np.ndarray) else result)
            except DataError as error:
                line = str(error)
                results.append(error if "\n" not in line and " - " in line else f"no line: {line!r}")
            except BaseException as error:
                results.append(f"{read.__name__}: {error!r}")
        size, shape = results
        if isinstance(shape, DataError):
            yield "error", content
        else:
            yield "same size" if size == shape else f"{size} and {shape}", content


def fuzz(kind: str, seed: int, count: int, file: Path, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (500, 500))
    counts: dict[str, int] = {}
    for outcome, content in outcomes(kind, seed, count, file):
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome not in ("error", "same size"):
            file.with_name(f"{kind}_{seed}_{sum(counts.values())}").write_bytes(content)
    answer.send(counts)


def check(kind: str, seed: int, count: int, folder: Path) -> dict[str, int]:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    file = folder / "damaged.jpg"
    process = fork.Process(target=fuzz, args=(kind, seed, count, file, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(1000), f"hangs on {file}"
        counts: dict[str, int] = ours.recv()
    except EOFError:
        process.join(10)
        pytest.fail(f"a process died with {process.exitcode} on {file}")
    finally:
        process.kill()
        process.join()
    assert set(counts) <= {"error", "same size"}, f"{counts}, files in {folder}"
    assert sum(counts.values()) == count
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_are_read(kind: str, tmp_path: Path) -> None:
    """Otherwise a fuzz that finds only errors would prove nothing."""
    for content in sound_files(kind):
        (tmp_path / "a.jpg").write_bytes(content)
        assert read_image(tmp_path / "a.jpg").shape[:2] == image_size(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_or_a_picture(kind: str, tmp_path: Path, record_property: Record) -> None:
    record_property("tried", 80)
    counts = check(kind, 0, 80, tmp_path)
    assert min(counts["error"], counts["same size"]) >= 3, "the damage is neither always fatal nor never"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage_is_an_error_or_a_picture(kind: str, seed: int, tmp_path: Path, record_property: Record) -> None:
    record_property("tried", 1000)
    check(kind, seed, 1000, tmp_path)
