"""A proxy in front of the S3 server that counts requests and does them harm when asked to.

Each connection carries one request (`Connection: close` goes to both sides). All other headers,
the signed Host among them, pass unchanged. Keys are those in the bucket, without its name; a
listing counts as method "LIST" with its prefix as key.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["reset", "reset_after", "slow", "short"] | str
"""Or an HTTP status such as "503", or "503_after"; see `FaultProxy.fail_next`."""


@dataclass
class _Fault:
    left: int
    pattern: str
    method: str
    kind: Kind
    seconds: float
    code: str


@dataclass
class _Hook:
    pattern: str
    after_bytes: int
    callback: Callable[[str], object]
    cut: bool


@dataclass(frozen=True)
class _Request:
    head: bytes
    method: str
    key: str
    body_bytes: int


class FaultProxy:
    """Runs in a thread of its own; use it as a context manager around `server_port`."""

    def __init__(self, server_port: int) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """Requests by (method, key); add them up with `count`."""
        self._server_port = server_port
        self._faults: list[_Fault] = []
        self._hooks: list[_Hook] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """What AWS_ENDPOINT_URL must be."""
        return f"http://127.0.0.1:{self.port}"

    def count(self, method: str = "*", pattern: str = "*") -> int:
        """How many requests came, by method and key pattern ('*' also matches '/')."""
        with self._lock:
            items = list(self.counts.items())
        return sum(
            number
            for (seen, key), number in items
            if fnmatchcase(seen, method) and fnmatchcase(key, pattern)
        )

    def reset_counts(self) -> None:
        with self._lock:
            self.counts.clear()

    def fail_next(
        self,
        n: int,
        *,
        pattern: str = "*",
        kind: Kind,
        method: str = "*",
        seconds: float = 0.5,
        code: str = "SlowDown",
    ) -> None:
        """Do harm to the next `n` requests whose key and method match.

        Args:
            kind: "503" (or any status) answers so with the error `code` and forwards nothing;
                "503_after" lets the server do it all before; "reset" breaks the connection and
                forwards nothing; "reset_after" lets the server do it all before; "slow" holds
                back the second half of both bodies for `seconds`; "short" closes the connection
                in the middle of the answer's body.
        """
        with self._lock:
            self._faults.append(_Fault(n, pattern, method, kind, seconds, code))

    def unspent(self) -> list[str]:
        """Patterns of faults that no request has met yet."""
        with self._lock:
            return [fault.pattern for fault in self._faults if fault.left > 0]

    def on_put(
        self,
        pattern: str,
        after_bytes: int,
        callback: Callable[[str], object],
        *,
        cut: bool = True,
    ) -> None:
        """Call `callback(key)` once, inside the next upload to a matching key.

        It runs in a thread while the server has got the first `after_bytes` of the body, and at
        least one byte less than all of it. With `cut` both connections are broken afterwards, since
        what a killed client left in the kernel would still arrive; else the rest is passed on.
        """
        with self._lock:
            self._hooks.append(_Hook(pattern, after_bytes, callback, cut))

    def clear(self) -> None:
        """Forget faults, hooks and counts."""
        with self._lock:
            self._faults.clear()
            self._hooks.clear()
            self.counts.clear()

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.port = int(server.sockets[0].getsockname()[1])
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            _break(writer)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = _parsed(await reader.readuntil(b"\r\n\r\n"))
        fault = self._note(request)
        if fault and fault.kind == "reset":
            return _break(writer)
        if b"100-continue" in request.head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault and fault.kind.isdigit():
            async for _ in _body(reader, request):
                pass
            return await _send(writer, _refusal(request.method, fault))
        pause = fault.seconds if fault and fault.kind == "slow" else 0.0
        to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        try:
            answer = await self._forward(request, reader, *to_server, pause)
        except _Cut:
            return _break(writer)
        finally:
            to_server[1].close()
        if fault and fault.kind == "reset_after":
            return _break(writer)
        if fault and fault.kind.endswith("_after"):
            return await _send(writer, _refusal(request.method, fault))
        middle = (answer.find(b"\r\n\r\n") + 4 + len(answer)) // 2
        await _send(writer, answer[:middle])
        await asyncio.sleep(pause)
        if not (fault and fault.kind == "short"):
            await _send(writer, answer[middle:])
        return None

    async def _forward(
        self,
        request: _Request,
        reader: asyncio.StreamReader,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
        pause: float,
    ) -> bytes:
        """Pass the request on, with its pause or hook in the middle of the body; the answer."""
        hook = self._hook_for(request)
        middle = min(hook.after_bytes, request.body_bytes - 1) if hook else request.body_bytes // 2
        await _send(to_server, _for_server(request.head))
        passed = 0
        async for piece in _body(reader, request):
            if passed <= middle < passed + len(piece):
                await _send(to_server, piece[: middle - passed])
                await asyncio.sleep(pause)
                if hook:
                    await asyncio.to_thread(hook.callback, request.key)
                    if hook.cut:
                        _break(to_server)
                        raise _Cut
                await _send(to_server, piece[middle - passed :])
            else:
                await _send(to_server, piece)
            passed += len(piece)
        return await from_server.read()

    def _note(self, request: _Request) -> _Fault | None:
        with self._lock:
            self.counts[request.method, request.key] += 1
            for fault in self._faults:
                matches = fnmatchcase(request.method, fault.method)
                if fault.left and matches and fnmatchcase(request.key, fault.pattern):
                    fault.left -= 1
                    return fault
        return None

    def _hook_for(self, request: _Request) -> _Hook | None:
        with self._lock:
            for hook in self._hooks:
                if request.method == "PUT" and fnmatchcase(request.key, hook.pattern):
                    self._hooks.remove(hook)
                    return hook
        return None


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _Cut(Exception):
    """A hook was there, and the upload ends with it."""


def _parsed(head: bytes) -> _Request:
    method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
    url = urlsplit(target)
    key = unquote(url.path).lstrip("/").partition("/")[2]
    query = parse_qs(url.query, keep_blank_values=True)
    if "list-type" in query:
        method, key = "LIST", query.get("prefix", [""])[0]
    length = re.search(rb"\r\n(?:x-amz-decoded-)?content-length: *(\d+)", head, re.IGNORECASE)
    return _Request(head, method, key, int(length[1]) if length else 0)


def _for_server(head: bytes) -> bytes:
    head = re.sub(rb"\r\n(?:connection|expect):[^\r]*", b"", head, flags=re.IGNORECASE)
    return head[:-2] + b"Connection: close\r\n\r\n"


def _refusal(method: str, fault: _Fault) -> bytes:
    body = f"<Error><Code>{fault.code}</Code><Message>asked for by a test</Message></Error>"
    head = (
        f"HTTP/1.1 {fault.kind[:3]} Refused\r\nContent-Type: application/xml\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return (head if method == "HEAD" else head + body).encode()


async def _body(reader: asyncio.StreamReader, request: _Request) -> AsyncIterator[bytes]:
    """The body as it goes over the wire, piece by piece; in chunks, as pyarrow sends it, too."""
    if b"\r\ntransfer-encoding: chunked" in request.head.lower():
        while (line := await reader.readuntil(b"\r\n")) != b"0\r\n":
            yield line + await reader.readexactly(int(line, 16) + 2)
        trailer = line
        while line != b"\r\n":
            line = await reader.readuntil(b"\r\n")
            trailer += line
        yield trailer
        return
    left = request.body_bytes
    while left:
        piece = await reader.read(min(left, 65536))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def _break(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side sees a connection reset, not a polite end."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
