"""Which images look the same, and which are of one scene."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retina.data.alike import follows, scenes, thumbnails, twins


def picture(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Soft blobs, another for each seed."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def saved(folder: Path, *seeds: int) -> list[Path]:
    files = [folder / f"{seed}.png" for seed in seeds]
    for seed, file in zip(seeds, files, strict=True):
        picture(seed).save(file)
    return files


@pytest.mark.parametrize(
    "change",
    [
        lambda image, file: image.save(file, "JPEG", quality=40),
        lambda image, file: image.resize((150, 113)).save(file, "PNG"),
        lambda image, file: image.resize((700, 500)).save(file, "WEBP"),
        lambda image, file: image.point(lambda value: value * 0.7 + 20).save(file, "PNG"),
        lambda image, file: image.convert("L").save(file, "BMP"),
    ],
)
def test_the_same_picture_in_another_form(tmp_path: Path, change: object) -> None:
    ones = thumbnails(saved(tmp_path, *range(30)))
    others = [tmp_path / f"other{seed}" for seed in (3, 17, 99)]  # 99 is not among them
    for seed, file in zip((3, 17, 99), others, strict=True):
        change(picture(seed), file)  # type: ignore[operator]
    assert twins(ones, thumbnails(others)) == {0: 3, 1: 17}


def test_exif_is_applied_and_what_says_nothing_is_like_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (40, 30)).save(tmp_path / "black.png")
    Image.new("RGB", (40, 30), "white").save(tmp_path / "white.png")
    (tmp_path / "none.png").write_bytes(b"no image")
    paths = [*saved(tmp_path, 0), *(tmp_path / name for name in ("black.png", "none.png", "gone.png"))]
    others = [tmp_path / "turned.jpg", tmp_path / "white.png", tmp_path / "black.png", tmp_path / "none.png"]
    assert twins(thumbnails(paths), thumbnails(others)) == {0: 0}
    assert twins(thumbnails([]), thumbnails(others)) == {}
    assert follows(thumbnails(paths)).tolist() == [False, False, False]


def test_thumbnails_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINA_CACHE", str(tmp_path / "cache"))
    paths = saved(tmp_path, 0, 1) * 150
    first = thumbnails(paths)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    np.testing.assert_array_equal(thumbnails(paths), first)
    picture(2, (300, 200)).save(paths[0])
    assert not np.array_equal(thumbnails(paths), first)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_scenes(tmp_path: Path) -> None:
    def frame(name: str, seed: int, shift: int = 0) -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(seed).rotate(shift, expand=False).save(tmp_path / name)
        return tmp_path / name

    paths = [
        *(frame(f"walk_{number}.png", 5, number) for number in (9, 10, 8)),  # in the order 8, 9, 10
        *(frame(f"IMG_{number}.jpg", 20 + number) for number in range(4)),  # photographs that have numbers too
        frame("x/walk_11.png", 5, 11),  # in another folder
        *(frame(f"cat.rf.{letter}.jpg", 40 + k) for k, letter in enumerate("abc")),  # flipped and cut copies of one
    ]
    numbers = scenes([*paths, None, None]).tolist()
    groups = {number: [row for row, other in enumerate(numbers) if other == number] for number in numbers}
    assert sorted(groups.values()) == [[0, 1, 2], [3], [4], [5], [6], [7], [8, 9, 10], [11], [12]]
