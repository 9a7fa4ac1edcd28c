"""Event files for TensorBoard, in any store.

    tensorboard/events.out.tfevents.<attempt>-<number>.raylora

Objects cannot be appended to, and a TensorBoard that is open does not look again into a file that
was replaced. So what was gathered is written as one more file, which it then finds, also when it
looks at a folder.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping

from raylora.base.errors import OptionError
from raylora.base.storage import Storage

FIRST_SECONDS = 15.0
LATER_PART = 0.02
"""A file every 15 seconds, later every 2 % of the time so far: some 300 in a day."""


class TensorBoardFiles:
    """A tracker that writes numbered event files.

    Args:
        attempt: of this process; each has files of its own.
    """

    def __init__(self, storage: Storage, *, attempt: int) -> None:
        try:
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.proto.summary_pb2 import Summary
            from tensorboardX.record_writer import masked_crc32c
        except ImportError:
            raise OptionError(
                'log.tensorboard needs tensorboardX: `pip install "raylora[tensorboard]"`.'
            ) from None
        self._event, self._session, self._summary = Event, SessionLog, Summary
        self._checksum = masked_crc32c
        self._storage, self._attempt = storage, attempt
        self._number = 0
        self._records: list[bytes] = []
        self._began = self._flushed = time.monotonic()

    def begin(self, done: int) -> None:
        """Readers drop what an earlier attempt said of the steps that are done again."""
        restart = self._session(status=self._session.START)
        self._take(session_log=restart, step=done + 1 if done else 0)

    def add(self, done: int, numbers: Mapping[str, float]) -> None:
        """One event with all of them."""
        values = [self._summary.Value(tag=tag, simple_value=v) for tag, v in numbers.items()]
        self._take(summary=self._summary(value=values), step=done)
        now = time.monotonic()
        if now - self._flushed >= max(FIRST_SECONDS, LATER_PART * (now - self._began)):
            self.flush()

    def flush(self) -> None:
        """Write what was gathered, if anything, as one more file."""
        if not self._records:
            return
        version = self._record(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        name = f"events.out.tfevents.{self._attempt:04d}-{self._number:06d}.raylora"
        self._storage.write(f"tensorboard/{name}", b"".join([version, *self._records]))
        self._records.clear()
        self._number += 1
        self._flushed = time.monotonic()

    def close(self, *, finished: bool) -> None:
        """Nothing is left behind."""
        self.flush()

    def _take(self, **fields: object) -> None:
        self._records.append(self._record(self._event(wall_time=time.time(), **fields)))

    def _record(self, event: object) -> bytes:
        """Length, its checksum, data, its checksum: a TFRecord."""
        data: bytes = event.SerializeToString()  # type: ignore[attr-defined]
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (length, data)]
        return b"".join([length, checksums[0], data, checksums[1]])
