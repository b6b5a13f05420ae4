"""The loop of one's own learns, and needs nothing but torch and the public names of retina."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import retina

FILE = Path(__file__).parents[2] / "examples" / "train_custom.py"
sys.path.insert(0, str(FILE.parent))
import train_custom  # noqa: E402


def test_the_loop_runs_on_a_data_set_in_cocos_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retina.write_shapes(tmp_path / "shapes", num_train=4, num_val=2, image_size=(64, 64))
    torch.manual_seed(0)
    ap = train_custom.main(str(tmp_path / "shapes"), epochs=2, batch_size=2, short_side=64)
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.partition("loss ")[2].partition(",")[0]) for line in lines)
    assert 0 < last < first
    assert 0 <= ap <= 1


def test_it_is_short_and_imports_two_packages() -> None:
    tree = ast.parse(FILE.read_text())
    assert {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names} == {
        "torch",
        "retina",
    }
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert len(ast.unparse(body).splitlines()) <= 30


def test_the_readme_shows_it() -> None:
    root = Path(__file__).parents[2]
    code = (root / "examples" / "train_custom.py").read_text()
    shown = code[code.index("import torch\n") : code.index('if __name__ == "__main__":')].rstrip()
    assert f"```python\n{shown}\n```" in (root / "README.md").read_text()
