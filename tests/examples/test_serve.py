"""The example of a service finds what the detector finds, also for many at the same time, and survives the rest."""

import http.client
import json
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import retina

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import serve


@pytest.fixture
def server(trained_run: Path) -> Iterator[serve.Server]:
    server = serve.Server(serve.Batcher(retina.load(trained_run, device="cpu")))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.batcher.close()
    server.server_close()


def post(server: serve.Server, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=1000)
    try:
        connection.request("POST", "/", body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_what_is_sent_at_the_same_time_is_looked_at_together(server: serve.Server, tiny_data: Path) -> None:
    images = sorted((tiny_data / "val").iterdir())
    expected = {file: server.batcher.detector.predict(file)[0] for file in images}
    with ThreadPoolExecutor(16) as threads:
        answers = [*threads.map(lambda file: post(server, file.read_bytes()), images * 8)]
    for file, (status, found) in zip(images * 8, answers, strict=True):
        assert status == 200
        assert len(found["scores"]) == len(expected[file].scores) > 0
        assert found["boxes"][0] == pytest.approx(expected[file].boxes[0].tolist(), abs=1e-2)
        assert found["classes"][0] == server.batcher.detector.classes[int(expected[file].labels[0])]
    assert sum(server.batcher.batches) == len(answers)
    assert max(server.batcher.batches) > 1
    assert server.server_address[0] == "127.0.0.1"


def test_the_rest_is_one_line(
    server: serve.Server, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = next((tiny_data / "val").iterdir()).read_bytes()
    monkeypatch.setattr(serve, "MOST_BYTES", len(good))
    for status, body in ((400, b""), (400, b"no image"), (400, good[:500]), (413, good + b"!")):
        answer = post(server, body)
        assert answer[0] == status
        assert list(answer[1]) == ["error"]
        assert "\n" not in answer[1]["error"]
        assert "/tmp" not in answer[1]["error"]
    monkeypatch.setattr(serve, "MOST_PIXELS", 100)
    assert post(server, good)[0] == 400
    monkeypatch.undo()
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.0 411")
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\nhalf of it")  # and goes away
    monkeypatch.setattr(serve.Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\nhalf of it")
        assert client.recv(100) == b"", "whoever is too slow is cut off"
    assert post(server, good)[0] == 200
    assert capsys.readouterr() == ("", "")
