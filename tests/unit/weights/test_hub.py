"""The real client of the model hub against a small server on loopback."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import originals
import pytest
import torch
from bases import random_folder

from raylora.base.errors import WeightsError
from raylora.weights import short_names
from raylora.weights.base import open_base
from raylora.weights.short_names import SHORT_NAMES

COMMIT = hashlib.sha1(b"the commit").hexdigest()
TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories; `gated` ones to holders of the token alone."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folders: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.sent: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *words: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.server.folders.get(name)
        if folder is None:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif name in self.server.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            # Of a gated repository anyone sees the list of files, and not the files.
            if api:
                self._list(name, folder, rest)
            else:
                self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif api:
            self._list(name, folder, rest)
        else:
            self._file(folder, "/".join(rest[2:]))

    def _list(self, name: str, folder: Path, rest: list[str]) -> None:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [str(file.relative_to(folder)) for file in files]
        if rest[:1] == ["tree"]:
            answer: object = [
                {"type": "file", "path": one, "size": file.stat().st_size, "oid": _tag(file)}
                for one, file in zip(names, files, strict=True)
            ]
        else:
            siblings = [{"rfilename": one} for one in names]
            answer = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, folder: Path, name: str) -> None:
        file = folder / name
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.sent.append(name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_tag(file)}"'}
        self._send(200, file.read_bytes(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for word, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(word, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _tag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def close(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nobody answers."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.slow
def test_a_repository_is_fetched_once_and_as_far_as_it_is_needed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    hub.folders["someone/base"] = folder = random_folder("sdxl")
    base = open_base("someone/base", kind="sdxl")
    assert base.config("unet")["addition_embed_type"] == "text_time"
    assert not [name for name in hub.sent if name.endswith(".safetensors")]
    found = base.weights("text_encoder_2")
    expected = originals.component(folder, "text_encoder_2")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    sent = [name for name in hub.sent if name.endswith(".safetensors")]
    assert sent == ["text_encoder_2/model.safetensors"]
    assert base.tokenizer("tokenizer_2")("a cat").input_ids
    assert base.name == "someone/base"
    hub.sent.clear()
    again = open_base("someone/base", kind="sdxl")
    assert again.fingerprint("text_encoder_2") == base.fingerprint("text_encoder_2")
    assert hub.sent == []
    close(hub, monkeypatch)
    alone = open_base("someone/base", kind="sdxl")
    assert alone.fingerprint("text_encoder_2") == base.fingerprint("text_encoder_2")
    assert alone.license is None


@pytest.mark.slow
def test_a_gated_repository_asks_for_terms_and_token(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.folders["someone/gated"] = random_folder("sd15")
    hub.gated.add("someone/gated")
    with pytest.raises(
        WeightsError,
        match=r"family\.weights: the repository someone/gated is gated\. Accept .* set HF_TOKEN",
    ):
        open_base("someone/gated", kind="sd15")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_base("someone/gated", kind="sd15").config("vae")["latent_channels"] == 4


@pytest.mark.slow
def test_what_the_hub_has_not_is_told_under_the_options_name(hub: Hub):
    with pytest.raises(
        WeightsError,
        match=r"family\.weights: there is no folder no/such here, and the model hub shows no",
    ):
        open_base("no/such", kind="sd15")
    with pytest.raises(WeightsError, match=r"family\.vae: there is no folder no/such here"):
        open_base(str(random_folder("sd15")), kind="sd15", parts={"vae": "no/such"}).config("vae")


@pytest.mark.slow
def test_without_a_connection_the_cache_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    close(hub, monkeypatch)
    with pytest.raises(
        WeightsError, match=r"the model hub cannot be reached, and some/base .* cache, .*home/hub\."
    ):
        open_base("some/base", kind="sd15")


@pytest.mark.slow
def test_a_short_name_brings_its_licence_and_says_so_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(short_names, "_shown", set())
    monkeypatch.setattr(logging.getLogger("raylora"), "propagate", True)
    hub.folders[SHORT_NAMES["flux-dev"].repository] = random_folder("flux1")
    with caplog.at_level(logging.INFO, "raylora"):
        for _ in range(2):
            base = open_base("flux-dev", kind="flux1")
    assert base.license == "flux-1-dev-non-commercial-license"
    assert base.name == "black-forest-labs/FLUX.1-dev"
    # By identity: another test's handlers may hand one record to the fixture twice.
    records = {id(one): one.getMessage() for one in caplog.records}
    (line,) = [text for text in records.values() if "flux-dev" in text]
    assert "Non-Commercial" in line
    assert "HF_TOKEN" in line


@pytest.mark.slow
def test_a_single_file_takes_the_tokenizer_of_the_usual_base(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = random_folder("sd15")
    path = originals.save(originals.checkpoint("sd15", folder), tmp_path / "made.safetensors")
    base = open_base(path, kind="sd15")
    with pytest.raises(
        WeightsError, match=r"made\.safetensors holds no tokenizer.*Set family\.parts\.tokenizer"
    ):
        base.tokenizer("tokenizer")
    hub.folders[SHORT_NAMES["sd15"].repository] = folder
    whole = open_base(str(folder), kind="sd15")
    assert base.tokenizer_hash("tokenizer") == whole.tokenizer_hash("tokenizer")
    assert not [name for name in hub.sent if name.endswith(".safetensors")]


@pytest.mark.slow
def test_a_vae_comes_from_a_repository_of_its_own(hub: Hub):
    hub.folders["someone/vae"] = random_folder("sdxl") / "vae"
    base = open_base(str(random_folder("sd15")), kind="sd15", parts={"vae": "someone/vae"})
    assert base.config("vae")["scaling_factor"] == 0.13025
    assert base.weights("vae").keys() == originals.component(random_folder("sdxl"), "vae").keys()
