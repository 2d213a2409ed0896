"""A limit of the size of requests, for any ASGI application."""

import json

from .limits import MEGABYTE


class BodyLimit:
    """Answers 413 to a request whose body is larger than a limit, before it is read into memory.

    Args:
        app: The ASGI application.
        upload_mb: The limit for uploads of files, whose path ends with /upload.
        other_mb: The limit for all other requests.
    """

    def __init__(self, app, upload_mb: int, other_mb: int = 1):
        self.app, self.upload_mb, self.other_mb = app, upload_mb, other_mb

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit_mb = self.upload_mb if scope["path"].rstrip("/").endswith("/upload") else self.other_mb
        limit = limit_mb * MEGABYTE + 64 * 1024  # the borders of a multipart body
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            await _refuse(send, limit_mb)
            return
        received = 0

        async def counted():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:  # without a length, or with a wrong one
                raise _TooLarge
            return message

        started = False

        async def watched(message):
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, counted, watched)
        except _TooLarge:
            if not started:
                await _refuse(send, limit_mb)


class _TooLarge(Exception):
    pass


async def _refuse(send, limit_mb: int):
    body = json.dumps({"detail": f"the request is larger than the limit of {limit_mb} MB. Make it smaller."}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
