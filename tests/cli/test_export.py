"""Exported files: that they find what the detector finds, prove it, and say so where they do not.

One export of the tiny detector serves all slow tests here; it is made in a process of its own, because the shape checks
of tests would fix the sizes that must stay free."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands import Capture, Tool, digest, refused_by_tool
from retina.model.retinanet import retinanet
from retina.model.weights import load_detector, save_detector

ROOT = Path(__file__).parents[2]
Start = Callable[..., "subprocess.Popen[str]"]
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MISSING = [name for name in PACKAGES if find_spec(name) is None]


@pytest.fixture
def export(tool: Tool) -> Tool:
    return partial(tool, "export")


def run(start: Start, *words: object, cwd: Path) -> tuple[int, str, str]:
    process = start(*words, cwd=cwd)
    out, err = process.communicate(timeout=1200)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def exported(trained_run: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `mine.onnx`, its proof, and what the program said."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)} (retina-detect[export])")
    folder = tmp_path_factory.mktemp("exported")
    words = [f"checkpoint={trained_run}", "output=mine.onnx", "score_threshold=0.3"]
    code, out, err = run(start, ROOT / "tools" / "export.py", *words, cwd=folder)
    assert code == 0, out + err
    (folder / "out.txt").write_text(out)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_export_proves_itself(exported: Path, tiny_data: Path) -> None:
    proof = json.loads((exported / "mine.proof.json").read_text())
    assert proof["sha256"] == digest(exported)["mine.onnx"]
    assert proof["matched"] > 50
    assert proof["pixels"] <= 0.25
    assert proof["score"] <= 0.005
    assert len({tuple(image["size"]) for image in proof["images"]}) >= 3
    assert proof["ap"]["images"] == 5
    assert proof["ap"]["file"] == pytest.approx(proof["ap"]["retina"], abs=0.02)
    assert proof["milliseconds"]["file"]["median"] > 0
    out = (exported / "out.txt").read_text()
    assert "mine.onnx" in out
    assert f"{proof['matched']} detections" in out


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_verify_repeats_it_without_torch(exported: Path, start: Start, tmp_path: Path) -> None:
    file = shutil.copy(exported / "mine.onnx", tmp_path)
    script = f"""
import sys
sys.modules["torch"] = None  # to import it is an ImportError
sys.argv = ["retina", "verify", {str(file)!r}]
from retina.cli.main import main
main()
"""
    code, out, err = run(start, "-c", script, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert f"verified: {file}" in out


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_verify_tells_other_images_and_other_files(
    exported: Path, tool: Tool, tiny_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = Path(shutil.copy(exported / "mine.onnx", tmp_path))
    photos = Path(shutil.copytree(tiny_data / "val", tmp_path / "photos"))
    assert tool("verify", f"file={file}", f"images={photos}") == 0
    image = sorted(photos.iterdir())[0]
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(image)
    capsys.readouterr()
    assert tool("verify", f"file={file}", f"images={photos}") == 2
    refused_by_tool(capsys, "other-image", image)
    image.unlink()
    assert tool("verify", f"file={file}", f"images={photos}") == 2
    refused_by_tool(capsys, "no-file", image)
    shutil.copy(exported / "mine.proof.json", tmp_path)
    beside = tmp_path / "mine.proof.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"sha256": "0" * 64}))
    assert tool("verify", f"file={file}", f"images={tiny_data / 'val'}") == 2
    refused_by_tool(capsys, "damaged-file", file)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_example_needs_no_torch(
    exported: Path, trained_run: Path, start: Start, tiny_data: Path, tmp_path: Path
) -> None:
    import retina

    images = sorted((tiny_data / "val").iterdir())
    script = f"""
import runpy, sys
sys.modules["torch"] = sys.modules["retina"] = None
sys.argv = ["onnx_only.py", {str(exported / "mine.onnx")!r}, *{[str(image) for image in images]!r}]
runpy.run_path({str(ROOT / "examples" / "onnx_only.py")!r}, run_name="__main__")
"""
    code, out, err = run(start, "-c", script, cwd=tmp_path)
    assert (code, err) == (0, "")
    detector = retina.load(trained_run, device="cpu", precision="fp32")
    expected = []
    for image, found in zip(images, detector.predict(images, score_threshold=0.3), strict=True):
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
        expected += [(str(image), detector.classes[label], score, *box) for label, score, box in rows]
    printed = [line.split() for line in out.splitlines()]
    assert [words[:2] for words in printed] == [[*row[:2]] for row in expected]
    numbers = np.array([words[2:] for words in printed], dtype=float)
    np.testing.assert_allclose(numbers, np.array([row[2:] for row in expected]), atol=0.02)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_program_of_torch_proves_itself_too(
    trained_run: Path, start: Start, tiny_data: Path, tool: Tool, tmp_path: Path, capsys: Capture
) -> None:
    """Raw outputs, in half precision, of a model whose strides depend on the canvas, as torchvision's v1's do."""
    model, card = load_detector(trained_run / "best.safetensors", torch.device("cpu"))
    card = replace(card, model=card.model | {"canvas_strides": True})
    save_detector(tmp_path / "a.safetensors", model.state_dict(), card)
    words = ["checkpoint=a.safetensors", f"images={tiny_data / 'val'}", "format=pt2", "raw=true", "precision=fp16"]
    code, out, err = run(start, ROOT / "tools" / "export.py", *words, "postprocess.class_agnostic=true", cwd=tmp_path)
    assert code == 0, out + err
    proof = json.loads((tmp_path / "a.proof.json").read_text())
    assert proof["matched"] > 50
    assert proof["ap"] is None
    assert tool("verify", f"file={tmp_path / 'a.pt2'}") == 0
    assert "verified" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("format", "precision"), [("onnx", "int8"), ("openvino", "fp32"), ("onnx", "fp16")])
def test_other_formats_and_precisions_prove_themselves(
    trained_run: Path, tiny_data: Path, start: Start, tool: Tool, tmp_path: Path, format: str, precision: str
) -> None:
    """Of a detector with norms over content and distributions, as the automatic recipe makes them."""
    packages = [*MISSING, *([] if format != "openvino" or find_spec("openvino") else ["openvino"])]
    if packages:
        pytest.skip(f"not installed: {', '.join(packages)} (retina-detect[export,openvino])")
    _, card = load_detector(trained_run / "best.safetensors", torch.device("cpu"))
    torch.manual_seed(0)
    changes = {"backbone": "resnet18_half", "head_norm": "group", "box_bins": 9, "head_scales": True}
    model = retinanet(**card.model | changes)
    with torch.no_grad():
        model.head.classification.predict.weight.normal_(std=1.0)
    save_detector(tmp_path / "a.safetensors", model.state_dict(), replace(card, model=model.arguments))
    output = tmp_path / f"mine.{'xml' if format == 'openvino' else 'onnx'}"
    words = ["checkpoint=a.safetensors", f"output={output}", f"format={format}", f"precision={precision}"]
    words += ["data=coco", f"data.root={tiny_data}"]
    code, out, err = run(start, ROOT / "tools" / "export.py", *words, cwd=tmp_path)
    assert code == 0, out + err
    proof = json.loads((tmp_path / "mine.proof.json").read_text())
    assert proof["matched"] > 50
    assert proof["faults"] <= 0.2 * (proof["matched"] + proof["faults"])
    assert proof["ap"]["file"] == pytest.approx(proof["ap"]["retina"], abs=0.05)
    assert tool("verify", f"file={output}") == 0
    if format == "openvino":
        (tmp_path / "mine.bin").write_bytes(b"")
        assert tool("verify", f"file={output}") == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_what_does_not_prove_itself_leaves_nothing(trained_run: Path, start: Start, tmp_path: Path) -> None:
    words = [f"checkpoint={trained_run}", "output=mine.pt2", "format=pt2", "tolerance.pixels=1e-9"]
    code, _, err = run(start, ROOT / "tools" / "export.py", *words, cwd=tmp_path)
    assert (code, "error[not-equal]" in err) == (2, True)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_weights_of_other_programs_are_exported_in_one_command(
    start: Start, tiny_data: Path, tmp_path: Path, tool: Tool
) -> None:
    """torchvision's layout, with weights drawn at random."""
    from torchvision.models.detection import retinanet_resnet50_fpn_v2

    torch.manual_seed(0)
    model = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "foreign.pth")
    words = ["checkpoint=foreign.pth", f"images={tiny_data / 'val'}", "format=pt2", "num_images=2", "classes=[a,b,c]"]
    words += ["score_threshold=0.005", "conventions.short_side=64", "conventions.long_side=96"]
    code, out, err = run(start, ROOT / "tools" / "export.py", *words, cwd=tmp_path)
    assert code == 0, out + err
    assert tool("verify", f"file={tmp_path / 'foreign.pt2'}") == 0


def test_the_example_is_short() -> None:
    text = (ROOT / "examples" / "onnx_only.py").read_text()
    assert len(text.splitlines()) <= 40
    assert "torch" not in text
    assert "import retina" not in text


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["format=coreml"], "unknown-value", "format"),
        (["output=mine.pt"], "bad-name", "output"),
        (["precision=bf16"], "unknown-value", "precision"),
        (["num_images=0"], "out-of-range", "num_images"),
        (["precision=int8", "format=pt2"], "contradiction", "precision"),
        (["format=hf", "license=a: b"], "out-of-range", "license"),
        (["tolerance.pixels=0"], "out-of-range", "tolerance.pixels"),
    ],
)
def test_wrong_settings_are_one_line(
    export: Tool, trained_run: Path, words: list[str], code: str, named: str, capsys: Capture
) -> None:
    assert export(f"checkpoint={trained_run}", *words) == 2
    refused_by_tool(capsys, code, named)


def test_an_output_is_replaced_only_if_asked(export: Tool, trained_run: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "mine.onnx"
    output.write_text("mine")
    assert export(f"checkpoint={trained_run}", f"output={output}") == 2
    refused_by_tool(capsys, "output-taken", output)
    output.rename(tmp_path / "mine.proof.json")
    assert export(f"checkpoint={trained_run}", f"output={output}") == 2
    refused_by_tool(capsys, "output-taken", tmp_path / "mine.proof.json")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.proof.json"]


@pytest.mark.skipif(not MISSING, reason="all of the packages are installed")
def test_a_missing_package_is_told(export: Tool, trained_run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert export(f"checkpoint={trained_run}", f"output={tmp_path / 'mine.onnx'}") == 2
    refused_by_tool(capsys, "missing-package", MISSING[0])
    assert not any(tmp_path.iterdir())


def test_verify_refuses_what_is_no_export(tool: Tool, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "mine.onnx"
    assert tool("verify", str(file)) == 2
    refused_by_tool(capsys, "no-file", file)
    file.write_bytes(b"no graph")
    assert tool("verify", str(file)) == 2
    refused_by_tool(capsys, "missing-package" if "onnxruntime" in MISSING else "unreadable-file")
