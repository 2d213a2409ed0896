"""The limit of requests, with an ASGI application that reads all of its body."""

import asyncio

import pytest

from samlight_hf.app.body_limit import BodyLimit


MB = 2**20


def status_of(path: str, chunks: list[bytes], length: str | None = None) -> tuple[int, int]:
    """Return the status of the answer, and the number of bytes that the application got."""
    received, answers, waiting = bytearray(), [], list(chunks)

    async def application(scope, receive, send):
        more = True
        while more:
            message = await receive()
            received.extend(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        chunk = waiting.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}

    async def send(message):
        answers.append(message)

    headers = [] if length is None else [(b"content-length", length.encode())]
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(BodyLimit(application, upload_mb=3)(scope, receive, send))
    return answers[0]["status"], len(received)


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [
        ("/gradio_api/upload", 3 * MB, 200), ("/gradio_api/upload/", 3 * MB, 200), ("/gradio_api/upload", 4 * MB, 413),
        ("/gradio_api/queue/join", MB, 200), ("/gradio_api/queue/join", 2 * MB, 413), ("/uploads", 2 * MB, 413),
    ],
)  # fmt: skip
def test_sizes(path, size, status):
    assert status_of(path, [bytes(size)], str(size))[0] == status
    assert status_of(path, [bytes(65536)] * (size // 65536))[0] == status, "without a length"
    assert status_of(path, [bytes(65536)] * (size // 65536), "1")[0] == status, "with a wrong one"


def test_a_body_that_is_too_large_is_not_read():
    assert status_of("/x", [bytes(65536)] * 99, str(99 * 65536)) == (413, 0)
    status, received = status_of("/x", [bytes(65536)] * 99)
    assert status == 413 and received <= MB + 65536
    assert status_of("/x", [b""], "-5")[0] == 413


def test_other_connections_pass():
    seen = []

    async def application(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(BodyLimit(application, upload_mb=1)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]
