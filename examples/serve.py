"""An example of a service: POST an image, get detections as JSON. One file, the standard library, this machine only.

    python examples/serve.py runs/mine 8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000/

Requests that come at the same time are looked at together. What is too large, too slow or no image is one line. There
is no password and no encryption: put a real server before it, or write one around `Batcher`.
"""

import json
import queue
import sys
import tempfile
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore, Thread
from typing import Any

import retina
from retina.errors import RetinaError

MOST_BYTES, MOST_PIXELS = 20_000_000, 50_000_000
SECONDS = 10.0
"""For a client to send, and for an answer."""
BATCH_SIZE, WAIT, MOST_CLIENTS = 8, 0.005, 64


class Batcher:
    """Looks at the images of many threads together, as many as have come while others were looked at."""

    def __init__(self, detector: Any, score_threshold: float | None = None) -> None:
        self.detector, self.score_threshold = detector, score_threshold
        self.waiting: queue.Queue[tuple[Any, Future[Any]] | None] = queue.Queue(MOST_CLIENTS)
        self.batches: list[int] = []
        """Images of each batch so far."""
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, image: Any) -> "Future[Any]":
        """Raises queue.Full where too many wait."""
        future: Future[Any] = Future()
        self.waiting.put_nowait((image, future))
        return future

    def close(self) -> None:
        self.waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while first := self.waiting.get():
            batch = [first]
            while len(batch) < BATCH_SIZE:
                try:
                    item = self.waiting.get(timeout=WAIT)
                except queue.Empty:
                    break
                if item is None:
                    self.waiting.put(None)
                    break
                batch.append(item)
            batch = [item for item in batch if not item[1].cancelled()]
            self.batches.append(len(batch))
            try:
                images = [image for image, _ in batch]
                found = self.detector.predict(images, score_threshold=self.score_threshold, batch_size=BATCH_SIZE)
            except Exception as fault:
                for _, future in batch:
                    future.set_exception(fault)
                continue
            for (_, future), detections in zip(batch, found, strict=True):
                if future.set_running_or_notify_cancel():
                    future.set_result(detections)


class Handler(BaseHTTPRequestHandler):
    """One request; a thread each."""

    server: "Server"
    timeout = SECONDS  # of the socket

    def do_POST(self) -> None:
        if not self.server.clients.acquire(blocking=False):
            return self.answer(503, {"error": "too many requests at the same time - try again"})
        try:
            self.answer(*self.detect())
        except (TimeoutError, ConnectionError):  # whoever sends so slowly, or has gone, gets no answer
            self.close_connection = True
        finally:
            self.server.clients.release()

    def detect(self) -> tuple[int, dict[str, Any]]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return 411, {"error": "Content-Length is missing - send the image as the body"}
        if int(length) > MOST_BYTES:
            return 413, {"error": f"{length} bytes are more than {MOST_BYTES} - send a smaller image"}
        with tempfile.NamedTemporaryFile() as file:  # read as any file of a stranger: by content, within limits
            file.write(self.rfile.read(int(length)))
            file.flush()
            try:
                image = self.server.batcher.detector.read(file.name, MOST_PIXELS)
                detections = self.server.batcher.submit(image).result(SECONDS)
            except RetinaError as fault:
                return 400, {"error": str(fault).replace(file.name, "image")}
            except queue.Full:
                return 503, {"error": "too many images wait - try again"}
            except TimeoutError:
                return 503, {"error": f"not looked at within {SECONDS:g} s - try again"}
        classes = self.server.batcher.detector.classes
        fields = {"boxes": detections.boxes.tolist(), "scores": detections.scores.tolist()}
        return 200, fields | {"classes": [classes[label] for label in detections.labels.tolist()]}

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: names of strangers' requests do not belong on a terminal."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, batcher: Batcher, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.batcher, self.clients = batcher, BoundedSemaphore(MOST_CLIENTS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that has gone is no fault
            super().handle_error(request, client_address)


if __name__ == "__main__":
    server = Server(Batcher(retina.load(sys.argv[1])), int(sys.argv[2]))
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}/\n")
    server.serve_forever()
