"""A detector within a program that lives long, has threads and forks."""

import resource
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import retina
from children import in_child
from retina.data.images import read_image
from retina.inference import Detector


@pytest.fixture
def detector(trained_run: Path) -> Detector:
    return retina.load(trained_run, device="cpu")


@pytest.fixture
def images(tiny_data: Path) -> list[Path]:
    return sorted((tiny_data / "val").iterdir())


def found(detector: Detector, image: Path) -> list[bytes]:
    """What is detected, bit for bit."""
    (detections,) = detector.predict([image])
    assert len(detections.scores)
    return [tensor.numpy().tobytes() for tensor in detections.tensors]


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("number", [60, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_inferences_in_a_row_find_the_same_in_constant_memory(
    detector: Detector, images: list[Path], number: int
) -> None:
    expected = [found(detector, image) for image in images]
    for k in range(number):
        if k == number // 3:
            before = resident()
        assert found(detector, images[k % len(images)]) == expected[k % len(images)]
    assert resident() - before < 20_000_000


def test_eight_threads_find_what_one_does(detector: Detector, images: list[Path]) -> None:
    expected = [found(detector, image) for image in images]
    with ThreadPoolExecutor(8) as threads:
        seen = list(threads.map(lambda image: found(detector, image), images * 8))
    assert seen == expected * 8


def test_a_fork_finds_what_its_parent_does(detector: Detector, images: list[Path]) -> None:
    expected = [found(detector, image) for image in images]

    def task() -> None:
        assert [found(detector, image) for image in images] == expected

    assert in_child(task) == 0
    assert in_child(lambda: in_child(task) and sys.exit(1)) == 0


def test_a_fork_reads_while_the_threads_of_its_parent_do(images: list[Path]) -> None:
    """Whatever locks they hold at that instant."""
    stop = threading.Event()

    def read_on() -> None:
        while not stop.is_set():
            read_image(images[0])

    def task() -> None:
        signal.alarm(60)
        for image in images:
            read_image(image)

    with ThreadPoolExecutor(8) as threads:
        for _ in range(8):
            threads.submit(read_on)
        try:
            assert [in_child(task) for _ in range(8)] == [0] * 8
        finally:
            stop.set()


def test_batches_go_on_where_they_began_and_not_in_a_fork(detector: Detector, images: list[Path]) -> None:
    batches = detector.predict_batches(images * 4, batch_size=2)
    next(batches)

    def task() -> None:
        signal.alarm(60)
        with pytest.raises(RuntimeError):
            next(batches)
        assert len([*detector.predict_batches(images, batch_size=2)]) == 3

    assert in_child(task) == 0
    assert len([*batches]) == 9


def test_a_fork_does_not_wait_for_the_threads_that_its_parent_computes_with(
    detector: Detector, images: list[Path]
) -> None:
    def task() -> None:
        signal.alarm(100)
        for one, other in zip(detector.predict(images), expected, strict=True):
            torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=1e-2)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = detector.predict(images)
        assert in_child(task) == 0
    finally:
        torch.set_num_threads(before)
