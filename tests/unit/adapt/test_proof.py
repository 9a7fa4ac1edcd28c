"""The proof of export, with diffusers' real reader in its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from adapters import (
    SD15,
    SD15_MODULES,
    SHAPES,
    as_trained,
    file_bytes,
    kohya_name,
    random_adapter,
    random_module,
    raw_bytes,
    sd15_components,
)
from safetensors.torch import load
from torch import Tensor

from raylora.adapt.keys import Naming
from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterModule
from raylora.adapt.proof import ExportProver, ProofReport
from raylora.adapt.safetensors_format import pack
from raylora.base.errors import ExportError

pytestmark = pytest.mark.slow

MODULES = random_adapter()
Q, K, OUT, FF, PROJ, CONV, *TEXT = SHAPES
File = dict[str, Tensor]
NAMINGS: tuple[Naming, ...] = ("kohya", "diffusers")


def proved(
    prover: ExportProver, data: bytes, modules: list[AdapterModule] = MODULES
) -> ProofReport:
    return prover.prove(data, as_trained(modules), SD15)


@pytest.fixture(scope="module")
def prover() -> Iterator[ExportProver]:
    with ExportProver() as started:
        yield started


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_that_says_what_was_trained_is_proved(
    prover: ExportProver, dtype: torch.dtype
) -> None:
    report = proved(prover, file_bytes(MODULES, dtype=dtype))
    assert report.modules == len(MODULES)
    # Of two independent roundings, each at most u: 2u; 2.2 for the mean over few ranks.
    assert report.worst_error <= 2.2 * torch.finfo(dtype).eps / 2
    assert (report.worst_error > 1e-6) == (dtype != torch.float32)
    assert report.seconds > 0


@pytest.mark.parametrize("network", SD15_MODULES)
def test_diffusers_reads_every_sd15_module_of_sd_scripts(
    prover: ExportProver, network: str
) -> None:
    known = {
        kohya_name(name): name
        for component, model in sd15_components().items()
        for path, _ in model.named_modules()
        for name in (f"{component}.{path}", f"{component}.text_model.{path}")
    }
    generator = torch.Generator().manual_seed(0)
    modules = [
        AdapterModule(
            known[name],
            {
                DOWN: torch.randn(down, generator=generator),
                UP: torch.randn(up, generator=generator),
                ALPHA: torch.tensor(alpha),
            },
        )
        for name, (down, up, alpha) in SD15_MODULES[network].items()
    ]
    report = proved(prover, file_bytes(modules, dtype=torch.float16), modules)
    assert report.modules == report.by_diffusers == len(SD15_MODULES[network])


def tamper_alpha(file: File) -> None:
    file[f"{kohya_name(Q)}.{ALPHA}"] *= 1.1


def drop_alpha(file: File) -> None:
    del file[f"{kohya_name(Q)}.{ALPHA}"]


def swap(file: File) -> None:
    for part in (DOWN, UP):
        q, k = f"{kohya_name(Q)}.{part}", f"{kohya_name(K)}.{part}"
        file[q], file[k] = file[k], file[q]


def drop(file: File) -> None:
    for part in (DOWN, UP, ALPHA):
        del file[f"{kohya_name(CONV)}.{part}"]


def rename(file: File) -> None:
    for part in (DOWN, UP, ALPHA):
        file[f"lora_unet_mid_block_resnets_7_conv1.{part}"] = file.pop(f"{kohya_name(CONV)}.{part}")


def transpose(file: File) -> None:
    down, up = f"{kohya_name(Q)}.{DOWN}", f"{kohya_name(Q)}.{UP}"
    file[down], file[up] = file[up].T.contiguous(), file[down].T.contiguous()


def permute_rows(file: File) -> None:
    key = f"{kohya_name(TEXT[2])}.{UP}"
    file[key] = file[key].roll(1, 0)


def zero_half(file: File) -> None:
    file[f"{kohya_name(FF)}.{UP}"].zero_()


def unknown_key(file: File) -> None:
    file["lora_unet_mid_block_resnets_0_conv1.dora_magnitude"] = torch.ones(3)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (tamper_alpha, f"ΔW differs: {Q} by 10.0%"),
        (swap, f"ΔW differs: .*{Q} by 1.*%"),
        (drop, f"missing from the file: {CONV}"),
        (rename, f"missing from the file: {CONV}; in the file but never trained: unet.*resnets.7"),
        (transpose, f"ΔW differs: {Q} by "),
        (permute_rows, f"ΔW differs: {TEXT[2]} by 1..*%"),
        (zero_half, f"ΔW differs: {FF} by 100.0%"),
        (unknown_key, "dora_magnitude' is no key of a LoRA"),
    ],
)
def test_a_file_that_says_otherwise_is_found_out(
    prover: ExportProver, harm: Callable[[File], None], message: str
) -> None:
    file = load(file_bytes(MODULES))
    harm(file)
    with pytest.raises(ExportError, match=message):
        proved(prover, pack(file, {}))
    assert proved(prover, file_bytes(MODULES)).modules == len(MODULES)


def test_what_is_no_safetensors_file_is_not_proved(prover: ExportProver) -> None:
    with pytest.raises(ExportError, match="the file is not a safetensors file"):
        proved(prover, b"nonsense")


def test_an_alpha_that_diffusers_would_not_apply_is_found_out(prover: ExportProver) -> None:
    # diffusers 0.42 gives every attention layer the alpha that most modules have.
    modules = [*MODULES[1:], random_module(Q, SHAPES[Q], alpha=3.0)]
    with pytest.raises(ExportError, match=rf"diffusers would apply .*{Q} \(0\.5 for 0\.75\)"):
        proved(prover, raw_bytes(modules), modules)
    # Other layers' own alphas it does apply, and ranks may differ anywhere.
    modules = [*MODULES[:5], random_module(CONV, SHAPES[CONV], alpha=3.0), *MODULES[6:]]
    modules[0] = random_module(Q, SHAPES[Q], rank=7)
    assert proved(prover, raw_bytes(modules), modules).modules == len(modules)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_both_namings_with_mixed_ranks_and_alphas_are_proved(
    prover: ExportProver, naming: Naming, dtype: torch.dtype
) -> None:
    modules = [
        random_module(name, shape, rank=2 + index % 3, alpha=(0.07, 1.0, 30.0)[index % 3])
        for index, (name, shape) in enumerate(SHAPES.items())
    ]
    report = proved(prover, file_bytes(modules, dtype=dtype, naming=naming), modules)
    assert report.modules == len(modules)
    # Of two independent roundings, each at most u; down is 0.1 · 0.07 at least, no subnormal.
    assert report.worst_error <= 2.2 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_part_of_a_text_encoder_is_proved_with_what_completes_it(
    prover: ExportProver, naming: Naming
) -> None:
    name = {"kohya": TEXT[0], "diffusers": TEXT[2]}[naming]
    modules = [random_module(name, SHAPES[name])]
    data = file_bytes(modules, dtype=torch.float16, naming=naming)
    assert proved(prover, data, modules).modules == 1
    with pytest.raises(ExportError, match="diffusers cannot read the file"):
        proved(prover, raw_bytes(modules, naming), modules)


def test_a_changed_file_of_diffusers_naming_is_found_out(prover: ExportProver) -> None:
    file = load(file_bytes(MODULES, naming="diffusers"))
    down, up = f"{CONV}.lora_A.weight", f"{CONV}.lora_B.weight"
    with pytest.raises(ExportError, match=rf"ΔW differs: {CONV} by 1\.0%"):
        proved(prover, pack({**file, up: file[up] * 1.01}, {}))
    fewer = {key: tensor for key, tensor in file.items() if key not in (down, up)}
    with pytest.raises(ExportError, match=f"missing from the file: {CONV}"):
        proved(prover, pack(fewer, {}))
    more = {"unet.other.lora_A.weight": file[down], "unet.other.lora_B.weight": file[up]}
    with pytest.raises(ExportError, match=r"never trained: unet\.other"):
        proved(prover, pack({**file, **more}, {}))


def test_one_process_serves_all_saves(prover: ExportProver) -> None:
    data = file_bytes(MODULES)
    proved(prover, data)
    assert prover._process is not None
    process = prover._process.pid
    assert max(proved(prover, data).seconds for _ in range(3)) < 2
    assert prover._process.pid == process


def test_a_reader_that_dies_is_an_error_and_the_next_proof_starts_another(
    prover: ExportProver,
) -> None:
    data = file_bytes(MODULES)
    prover.start()
    assert prover._process is not None
    assert prover._stderr is not None
    os.write(prover._stderr.fileno(), b"out of memory, say")
    prover._process.send_signal(signal.SIGSEGV)
    with pytest.raises(ExportError, match=r"(?s)died: exit code -11\..*out of memory, say"):
        proved(prover, data * 100)
    assert proved(prover, data).modules == len(MODULES)


def test_a_reader_that_does_not_answer_is_stopped() -> None:
    with ExportProver(timeout_seconds=0.1) as prover:
        prover.start()
        process = prover._process
        assert process is not None
        with pytest.raises(ExportError, match=r"took over 0.1 s and was stopped"):
            proved(prover, file_bytes(MODULES))
        assert process.returncode == -signal.SIGKILL
    prover.close()


def test_the_reader_ends_with_its_parent_even_by_kill_9() -> None:
    # Also when a process forked off the parent still holds the pipe open.
    script = (
        "import os, sys, time\n"
        "from raylora.adapt.proof import ExportProver\n"
        "prover = ExportProver(); prover.start()\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(300)\n"
        "print(prover._process.pid, child, flush=True); time.sleep(300)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    reader, child = (int(word) for word in parent.stdout.readline().split())
    try:
        assert os.getsid(reader) == reader  # so Ctrl-C in the terminal does not reach it
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 60  # its imports come first
        while _alive(reader) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _alive(reader)
    finally:
        os.kill(child, signal.SIGKILL)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
