"""Progress rows from the workers to the terminal of whoever started the run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import ray

from raylora.training.report import Row, Sink

POLL_SECONDS = 0.5


class _Mailbox:
    """Holds rows until the driver takes them."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def put(self, row: Row) -> None:
        self._rows.append(row)

    def take(self) -> list[Row]:
        rows, self._rows = self._rows, []
        return rows


_MailboxActor: Any = ray.remote(num_cpus=0)(_Mailbox)


class Progress:
    """Hands rows that workers send to the driver's sinks, while the driver waits for the run.

    `sender` travels to the workers; sending never waits for an answer.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self._mailbox: Any = _MailboxActor.remote()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._forward, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=10)
        self._deliver()
        ray.kill(self._mailbox)

    @property
    def sender(self) -> Any:
        """What a worker calls `sender.put.remote(row)` on."""
        return self._mailbox

    def _forward(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self._deliver()

    def _deliver(self) -> None:
        for row in ray.get(self._mailbox.take.remote()):
            for sink in self._sinks:
                sink(row)
