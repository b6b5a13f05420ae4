"""How much memory is left, by limits as the system tells them."""

from pathlib import Path

import pytest

from retina.engine.probe import group_bytes

OWN = "batch/job_7/step_0"


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    """Of both versions at once, as on many machines."""
    (tmp_path / "cgroup").write_text(f"5:devices:/\n4:cpu,memory:/{OWN}\n0::/{OWN}\n")
    return tmp_path / "cgroup"


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


def test_groups_of_the_second_version(tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "fs"
    assert group_bytes(root, membership) is None
    write(root / OWN, memory_max="max", memory_current=1000, memory_stat="active_file 5")
    assert group_bytes(root, membership) is None, "no limit"
    pages = "anon 600\ninactive_file 250\nactive_file 50"
    write((root / OWN).parent, memory_max=2000, memory_current=1500, memory_stat=pages)
    assert group_bytes(root, membership) == 800
    write(root, memory_max=900, memory_current=800, memory_stat="active_file 0")
    assert group_bytes(root, membership) == 100, "the closest limit on the way to the root"
    assert group_bytes(root, tmp_path / "none") is None


def test_groups_of_the_first_version(tmp_path: Path, membership: Path) -> None:
    """A container sees its own group at the root, though it is called otherwise outside."""
    write(tmp_path / "fs/memory", memory_stat="total_inactive_file 70\ninactive_file 1")
    (tmp_path / "fs/memory/memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "fs/memory/memory.usage_in_bytes").write_text("400\n")
    assert group_bytes(tmp_path / "fs", membership) == 670
