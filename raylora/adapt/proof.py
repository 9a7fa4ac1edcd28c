"""Proof of export: each saved LoRA is read back as others read it, in a process of its own.

A file that loads and means something else is the worst way to lose a training run. So what is
about to be published is converted by a reader raylora did not write, diffusers', where that reads
such files; by formulas apart from training's where it does not. Every module's change of weight is
compared with the weights in training.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from raylora.adapt.onto import Names
from raylora.adapt.safetensors_format import pack
from raylora.adapt.trained import Trained
from raylora.base.errors import ExportError

_STDERR_TAIL = 2000
_PACKAGE_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class ProofReport:
    """A file that came back as it was trained.

    Attributes:
        modules: compared.
        by_diffusers: how many of them diffusers read; the rest it has no reader for.
        worst_error: largest ‖change read - change trained‖ / ‖change trained‖ of a module.
        worst_module: where that is; "" when all are equal.
        seconds: the proof took, waiting for the reader's start included.
    """

    modules: int
    by_diffusers: int
    worst_error: float
    worst_module: str
    seconds: float


class ExportProver:
    """Owns the reader's process, which is started once and serves all saves of a run.

    The process runs on the CPU with one thread, uses no GPU, and ends when this object is closed
    or this process dies, by whatever signal. A reader that died is started anew by the next proof.
    """

    def __init__(self, *, timeout_seconds: float = 600.0) -> None:
        self._timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def start(self) -> None:
        """Start the reader now, so that its imports are done by the first save."""
        if self._process is not None:
            return
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "raylora.adapt.proof_worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_reader_environment(),
            # Ctrl-C and a scheduler's SIGTERM to the group must leave it alive for the last save.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def prove(self, file_bytes: bytes, trained: Trained, names: Names) -> ProofReport:
        """Have the file read by others and compare every module.

        Args:
            file_bytes: the whole LoRA file, as it is about to be published.
            names: what files call the layers of the base.

        Raises:
            ExportError: modules differ, are missing or too many (the worst are named), diffusers
                refuses the file, or the reader died or did not answer.
        """
        started = time.monotonic()
        self.start()
        deadline = started + self._timeout_seconds
        try:
            for blob in (file_bytes, packed(trained, names)):
                self._send(len(blob).to_bytes(8, "little"), deadline)
                self._send(blob, deadline)
            answer = json.loads(self._receive(deadline))
        except TimeoutError:
            self.close()
            raise ExportError(
                f"The proof of export took over {self._timeout_seconds:g} s and was stopped."
            ) from None
        except (BrokenPipeError, EOFError):
            raise ExportError(f"The proof of export died: {self._last_words()}") from None
        if answer["problems"]:
            raise ExportError(
                "The saved file, read back, is not what was trained: "
                + "; ".join(answer["problems"])
            )
        return ProofReport(
            modules=answer["modules"],
            by_diffusers=answer["by_diffusers"],
            worst_error=answer["worst"],
            worst_module=answer["worst_module"],
            seconds=time.monotonic() - started,
        )

    def close(self) -> None:
        """End the reader; harmless when none runs."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, data: bytes, deadline: float) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        pipe, rest = self._process.stdin.fileno(), memoryview(data)
        while rest:
            if not select.select([], [pipe], [], max(0.0, deadline - time.monotonic()))[1]:
                raise TimeoutError
            rest = rest[os.write(pipe, rest) :]

    def _receive(self, deadline: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, data, count = self._process.stdout.fileno(), bytearray(), 8
        while len(data) < count:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(pipe, 1 << 16)
            if not piece:
                raise EOFError
            data += piece
            if len(data) >= 8:
                count = 8 + int.from_bytes(data[:8], "little")
        return bytes(data[8:])

    def _last_words(self) -> str:
        """How a dead reader ended, with the end of what it printed; then forget it."""
        assert self._process is not None
        assert self._stderr is not None
        try:
            ended = f"exit code {self._process.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            ended = "it closed its pipes and hangs"
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL))
        tail = self._stderr.read().decode(errors="replace").strip()
        self.close()
        return f"{ended}. {tail}" if tail else f"{ended}, and it printed nothing."


def packed(trained: Trained, names: Names) -> bytes:
    """All that the far side needs to know of what was trained, and where."""
    numbers = {site.name: number for number, site in enumerate(trained.sites)}
    tensors = {
        f"{numbers[name]}|{word}": held
        for name, parameters in trained.parameters.items()
        for word, held in parameters.items()
    }
    about = {
        "network": trained.kind,
        "family": names.kind,
        "config": dict(names.config),
        "sites": [asdict(site) for site in trained.sites],
        "places": [asdict(names.place(site.name)) for site in trained.sites],
        "scales": [trained.scales[site.name] for site in trained.sites],
    }
    return pack(tensors, {"about": json.dumps(about)})


def _reader_environment() -> dict[str, str]:
    """This process's environment, but on the CPU, with one thread, and asking no network."""
    python_path = [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
