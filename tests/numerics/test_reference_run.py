"""Six steps of sd-scripts' trainer and of raylora's, from the same weights, batches and noise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from raylora.adapt.attach import Adapter, Attachment
from raylora.adapt.keys import kohya_name
from raylora.data.steps import SampleRef
from raylora.diffusion.losses import LossOptions, make_loss
from raylora.families.sd15 import Sd15, Sd15Options
from raylora.networks.lora import LoraOptions, network
from raylora.optim.optimizers import OptimizerOptions, make_optimizer
from raylora.optim.schedules import ScheduleOptions, make_schedule
from raylora.training import step as step_module
from raylora.training.parts import Parts
from raylora.training.reduce import Alone
from raylora.training.shares import Shares
from raylora.training.step import train_step

GOLDEN = Path(__file__).parents[1] / "golden" / "train"
RECORDED: dict[str, Any] = json.loads((GOLDEN / "train.json").read_text())
RUN: dict[str, Any] = RECORDED["runs"]["lin"]
STEPS = len(RUN["losses"])
UNET = {
    "_class_name": "UNet2DConditionModel",
    **RECORDED["unet"],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 8,
}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [1] * 4, "latent_channels": 4}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass
class FixedBatches:
    """In the loader's place: every step's two images as recorded."""

    batches: dict[str, Tensor]

    def take(self, step: int) -> tuple[list[SampleRef], list[dict[str, Any]], int]:
        samples = [SampleRef(row=i, repeat=0, number=i, bucket=(64, 64)) for i in range(2)]
        words = {"latents": "latents", "text": "context"}
        tensors = [
            {word: self.batches[held][step][i].numpy() for word, held in words.items()}
            for i in range(2)
        ]
        return samples, tensors, 2


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Sd15:
    folder = tmp_path_factory.mktemp("base")
    for part, config in (("unet", UNET), ("vae", VAE)):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.symlink_to(GOLDEN / "unet_fp16.safetensors")
    return Sd15(folder, Sd15Options(weights=str(folder)))


@pytest.fixture
def parts(family: Sd15, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    """The trainer's parts with the reference's start weights, batches, noise and timesteps."""
    batches = load_file(GOLDEN / "batches.safetensors")

    def recorded(word: str) -> Any:
        return lambda *_, step, samples, **__: batches[word][step][list(samples)]

    monkeypatch.setattr(step_module, "draw_noise", recorded("noise"))
    monkeypatch.setattr(step_module, "draw_timesteps", recorded("timesteps"))
    device = torch.device("cpu")
    denoiser = family.load_denoiser(dtype=torch.float32, device=device)
    sites = family.sites(denoiser, "attention_mlp")
    start = load_file(GOLDEN / "lora_init_lin.safetensors")
    assert {kohya_name(site.name) for site in sites} == {key.split(".")[0] for key in start}
    initial = {
        site.name: {
            word: start[f"{kohya_name(site.name)}.lora_{word}.weight"].flatten(1).double().numpy()
            for word in ("down", "up")
        }
        for site in sites
    }
    scale = LoraOptions(rank=RUN["dim"], alpha=RUN["alpha"]).scale
    scales = {site.name: scale for site in sites}
    adapter = Adapter(network, sites, initial, scales, dtype=torch.float32, device=device)
    rate = OptimizerOptions(
        learning_rate=RUN["lr"], weight_decay=RUN["weight_decay"], max_grad_norm=0
    )
    yield Parts(
        denoiser=denoiser,
        attachment=Attachment(denoiser, family.component, adapter),
        adapter=adapter,
        predict=family.predict,
        process=family.process,
        loss=make_loss(LossOptions(), family.process),
        optimizer=make_optimizer(rate, adapter.values),
        factor=make_schedule(ScheduleOptions(), STEPS),
        learning_rate=rate.learning_rate,
        max_grad_norm=rate.max_grad_norm,
        loader=FixedBatches(batches),  # type: ignore[arg-type]
        group=Alone(),
        shares=Shares(1),
        micro_batch=2,
        seed=0,
        timesteps=(0, 1000),
        dtype=torch.float32,
        device=device,
    )


def by_key(adapter: Adapter, gradients: bool) -> dict[str, Tensor]:
    """Weights or gradients as sd-scripts' files name them, matrices two-dimensional."""
    return {
        f"{kohya_name(site)}.lora_{word}.weight": (leaf.grad if gradients else leaf).detach()
        for site, held in adapter.parameters.items()
        for word, leaf in held.items()
    }


def golden(name: str) -> dict[str, Tensor]:
    held = load_file(GOLDEN / name)
    return {key: tensor.flatten(1) for key, tensor in held.items() if not key.endswith("alpha")}


@pytest.mark.slow
def test_the_first_prediction_is_sd_scripts(parts: Parts):
    batch = {word: tensor[0] for word, tensor in parts.loader.batches.items()}  # type: ignore[attr-defined]
    noisy = parts.process.noisy(batch["latents"], batch["noise"], batch["timesteps"])
    conditions = {"text": batch["context"]}
    with torch.no_grad():
        prediction = parts.predict(parts.denoiser, noisy, batch["timesteps"], conditions)
    # fp32 through some 200 layers, in another order of sums
    assert_close(prediction, load_file(GOLDEN / "pred0_lin.safetensors")["pred"], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_six_steps_end_where_sd_scripts_ends(parts: Parts, micro_batch: int):
    parts = replace(parts, micro_batch=micro_batch)
    for number in range(STEPS):
        result = train_step(parts, number)
        assert float(result.loss) == pytest.approx(RUN["losses"][number], rel=1e-5)
        assert float(result.gradient_norm) == pytest.approx(RUN["grad_norm"][number], rel=1e-3)
        if number == 0:
            gradients = by_key(parts.adapter, gradients=True)
            assert_close(gradients, golden("grad0_lin.safetensors"), rtol=1e-3, atol=1e-6)
    assert_close(
        by_key(parts.adapter, gradients=False),
        golden("lora_final_lin.safetensors"),
        rtol=0,
        atol=1e-5,
    )
