"""The preview endpoint over HTTP, as a reviewer's program meets it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from raylora.base.errors import OptionError, UserError
from raylora.base.storage import Storage, open_storage
from raylora.job import Job
from raylora.serving.options import ServeOptions

# Ray's own classes, at import.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")

HEART, DOG = "ink icon, red heart, symbol", "ink icon, dog face, animal"
MAX_QUEUED = 4


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def detail(self) -> str:
        """The sentence of a refusal."""
        return str(json.loads(self.body)["detail"])


@dataclass(frozen=True)
class Endpoint:
    """The server under test."""

    url: str
    token: str
    token_file: Path
    store: Storage

    def ask(self, path: str, body: Any = None, *, token: str | None = "right") -> Answer:
        """GET, or POST where there is a body."""
        token = self.token if token == "right" else token
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, _lower(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, _lower(error.headers), error.read())

    def draw(self, **words: Any) -> bytes:
        """The PNG of a request that is expected to work."""
        answer = self.ask("/render", {"prompt": HEART, **words})
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"] == "image/png"
        return answer.body

    def sample(self, step: int, number: int) -> bytes:
        """What training drew at that step."""
        return self.store.read(f"runs/small/samples/{step:06d}/{number:03d}.png")


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@pytest.fixture(scope="module")
def store(small_run: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, and "other": the same adapters trained on another base."""
    folder = tmp_path_factory.mktemp("serve")
    shutil.copytree(small_run.store, folder, dirs_exist_ok=True)
    run = folder / "runs" / "other"
    shutil.copytree(folder / "runs" / "small", run)
    base = folder / "bases" / "other"
    shutil.copytree(small_run.family.weights, base)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 0.97 for name, tensor in load_file(weights).items()}, weights)
    job = yaml.safe_load((run / "job.yaml").read_text())
    job["name"], job["family"]["weights"] = "other", str(base)
    (run / "job.yaml").write_text(yaml.safe_dump(job))
    return folder


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, store: Path, tmp_path_factory) -> Iterator[Endpoint]:
    """`raylora serve --json` on the tests' cluster; SIGTERM at the end must leave nothing of it."""
    import ray

    home = tmp_path_factory.mktemp("home")
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAYLORA_HOME": str(home),
    }
    environment.pop("RAYLORA_SERVE_TOKEN", None)
    choices = ["base=small", "cpus_only=true", f"max_queued={MAX_QUEUED}"]
    command = [sys.executable, "-m", "raylora.cli", "serve", str(store), "--port", "0", "--json"]
    command += [word for choice in choices for word in ("--set", choice)]
    told = home / "stderr"
    with (
        told.open("wb") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment) as server,
    ):
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line, told.read_text()
        where = json.loads(line)
        file = Path(where["token_file"])
        token = file.read_text()
        yield Endpoint(where["url"], token, file, open_storage(str(store)))
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, told.read_text()
        assert server.stdout.read() == b""
    assert token not in told.read_text()
    assert list(home.iterdir()) == [told]
    actors = ray.util.list_named_actors(all_namespaces=True)
    assert not [actor for actor in actors if actor["namespace"] == "serve"]


def test_only_the_health_check_is_open(endpoint):
    assert endpoint.ask("/healthz", token=None).status == 200
    for path in ("/adapters", "/render", "/docs", "/openapi.json", "/", "/healthz/", "//healthz"):
        for token in (None, "", "wrong", endpoint.token[:-1], endpoint.token + "x"):
            answer = endpoint.ask(path, token=token)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert endpoint.ask("/render", {"prompt": HEART}, token=None).status == 401
    assert endpoint.ask("/nothing").status == 404
    assert endpoint.ask("/docs").status == 404


def test_the_token_is_in_its_file_alone(endpoint):
    assert stat.S_IMODE(endpoint.token_file.stat().st_mode) == 0o600
    assert len(endpoint.token) >= 40
    logs = Path(os.environ["RAY_TMPDIR"]) / "ray" / "session_latest" / "logs"
    files = [path for path in logs.rglob("*") if path.is_file()]
    assert any("serve" in path.parts for path in files)
    assert not [path for path in files if endpoint.token.encode() in path.read_bytes()]


def test_a_render_is_the_preview_that_training_drew(endpoint):
    for number, prompt in enumerate((HEART, DOG)):
        words = {"prompt": prompt, "stream": number}
        assert endpoint.draw(**words) == endpoint.sample(0, number)
        for step in (3, 6):
            drawn = endpoint.draw(**words, adapter=f"small/{step}")
            assert drawn == endpoint.sample(step, number)


def test_each_adapter_step_strength_seed_and_prompt_gives_its_own_picture(endpoint):
    base = endpoint.draw()
    drawn = [
        base,
        endpoint.draw(adapter="small/3"),
        endpoint.draw(adapter="small/6"),
        endpoint.draw(adapter="small/6", strength=0.5),
        endpoint.draw(adapter="small/6", strength=-1),
        endpoint.draw(adapter="small/6", seed=1),
        endpoint.draw(adapter="small/6", prompt=DOG),
        endpoint.draw(adapter="small/6", guidance=1),
        endpoint.draw(adapter="small/6", negative="red"),
        endpoint.draw(adapter="small/6", width=80, height=48),
    ]
    assert len(set(drawn)) == len(drawn)
    assert Image.open(io.BytesIO(drawn[-1])).size == (80, 48)
    assert endpoint.draw(adapter="small/6", strength=0) == base
    assert endpoint.draw(adapter="small") == drawn[2]


def test_the_headers_say_what_drew_the_picture(endpoint):
    answer = endpoint.ask("/render", {"prompt": HEART, "adapter": "small", "seed": 7})
    file = endpoint.store.read("runs/small/checkpoints/000006/adapter.safetensors")
    assert answer.headers["x-raylora-adapter"] == hashlib.sha256(file).hexdigest()
    assert answer.headers["x-raylora-checkpoint"] == "small/6"
    assert answer.headers["x-raylora-seed"] == "7"
    bare = endpoint.ask("/render", {"prompt": HEART})
    assert bare.headers["x-raylora-adapter"] == "base"


def test_the_catalogue_names_every_checkpoint(endpoint):
    rows = json.loads(endpoint.ask("/adapters").body)
    names = [row["adapter"] for row in rows]
    assert names == ["other/3", "other/6", "small/3", "small/6"]
    assert rows[2]["hash"] == rows[0]["hash"] != rows[3]["hash"]
    assert (rows[2]["run"], rows[2]["trained_steps"], rows[2]["total_steps"]) == ("small", 3, 6)
    assert rows[0]["base"] != rows[2]["base"]


def test_a_run_is_drawn_with_its_own_base(endpoint):
    first = endpoint.draw(adapter="small/6")
    other = endpoint.draw(adapter="other/6")
    bare = endpoint.draw(adapter="other/6", strength=0)
    assert len({first, other, bare, endpoint.draw()}) == 4
    assert endpoint.draw(adapter="small/6") == first


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        ({"adapter": "smal"}, 404, "adapter 'smal': no such run. Near: small."),
        ({"adapter": "small/4"}, 404, "no such checkpoint. Near: small/"),
        ({"width": 70}, 422, "70x64: this base needs multiples of 16 pixels."),
        ({"steps": 1000}, 422, "steps is 1000; this server draws at most 100."),
        ({"strenght": 1}, 422, "strenght: no such option. Did you mean 'strength'?"),
        ({"prompt": "x" * 70_000}, 413, "more than 65536 bytes"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(endpoint, words, status, sentence):
    answer = endpoint.ask("/render", {"prompt": HEART, **words})
    assert answer.status == status
    assert sentence in answer.detail


def test_parallel_requests_for_different_adapters_do_not_mix(endpoint):
    asked = [
        {"adapter": "small/3"},
        {"adapter": "small/6"},
        {},
        {"adapter": "small", "strength": 2},
    ]
    alone = [endpoint.draw(**words) for words in asked]
    with ThreadPoolExecutor(MAX_QUEUED) as pool:
        together = list(pool.map(lambda words: endpoint.draw(**words), asked * 4))
    assert together == alone * 4


def test_too_many_requests_are_told_when_to_come_again(endpoint):
    ready = threading.Barrier(20)

    def ask(number: int) -> Answer:
        ready.wait()
        return endpoint.ask("/render", {"prompt": HEART, "seed": number, "steps": 30})

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
        healthy = endpoint.ask("/healthz", token=None)
    refused = [answer for answer in answers if answer.status == 503]
    assert {answer.status for answer in answers} == {200, 503}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert healthy.status == 200


def test_a_second_server_on_the_cluster_is_refused(endpoint):
    from raylora.on_ray.serve import serving

    store, taken = endpoint.store.url, int(endpoint.url.rpartition(":")[2])
    with pytest.raises(UserError, match="already runs on this cluster"):
        serving(store, ServeOptions(port=0)).__enter__()
    with pytest.raises(OptionError, match="Give another --port; 0 takes a free one"):
        serving(store, ServeOptions(port=taken)).__enter__()
