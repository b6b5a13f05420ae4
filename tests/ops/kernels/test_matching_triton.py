"""The kernels without a GPU: run by Triton's interpreter, and compiled for a GPU that is not there."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # for the process of its own
import matching_cases
from programs import interpret

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def test_interpreted_kernels_equal_the_matrix():
    interpret(__file__, cwd=Path(__file__).parent)


def interpret_and_compare() -> None:
    from retina.ops.kernels.matching import match_on_gpu

    for seed in range(16):
        case = matching_cases.random_case(seed, largest=32, most_objects=6)
        anchors, *rest = case
        matching_cases.assert_same(
            match_on_gpu(torch.cat(list(anchors)), *rest), matching_cases.from_matrix(case), seed
        )


@pytest.mark.parametrize("kernel", ["_match", "_rescue"])
def test_no_product_is_fused_into_a_sum(kernel: str, tmp_path, monkeypatch):
    """A fused multiply-add rounds once where PyTorch rounds twice, and equal IoUs would no longer be equal."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert "fma." in assembly(kernel, enable_fp_fusion=True)
    text = assembly(kernel, enable_fp_fusion=False)
    assert "fma." not in text
    assert "div.rn.f32" in text


def assembly(kernel: str, *, enable_fp_fusion: bool) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from retina.ops.kernels import matching as matching_triton

    types = {"anchors": "*fp32", "boxes": "*fp32", "index": "*i64", "best_of_object": "*i32"}
    types |= dict.fromkeys(("valid", "crowd", "inside", "positive", "negative"), "*i1")
    types |= dict.fromkeys(("num_anchors", "num_objects"), "i32") | dict.fromkeys(
        ("positive_iou", "negative_iou"), "fp32"
    )
    constants = {"low_quality": True, "masked": True, "block": 256}
    function = getattr(matching_triton, kernel)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(function, signature, {name: constants[name] for name in signature if name in constants})
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": enable_fp_fusion}).asm["ptx"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_result_is_that_of_the_matrix_and_nothing_waits():
    for seed in range(100):
        case = matching_cases.random_case(seed)
        expected = matching_cases.from_matrix(case)
        levels = tuple(level.cuda() for level in case.anchors)
        there = case._replace(anchors=levels, boxes=case.boxes.cuda(), valid=case.valid.cuda(), crowd=case.crowd.cuda())
        there = there._replace(inside=None if case.inside is None else case.inside.cuda())
        torch.cuda.set_sync_debug_mode("error")
        try:
            matches = matching_cases.from_matrix(there)  # on a GPU by the kernels
        finally:
            torch.cuda.set_sync_debug_mode("default")
        matching_cases.assert_same(tuple(part.cpu() for part in matches), expected, seed)


if __name__ == "__main__":
    interpret_and_compare()
