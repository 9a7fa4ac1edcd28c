"""Job + models -> Parts: what a worker computes its steps with, chosen once."""

from __future__ import annotations

from functools import partial

import torch

from raylora.adapt.attach import Adapter
from raylora.adapt.norm_cap import NormCap
from raylora.diffusion.losses import make_loss
from raylora.diffusion.noise import make_noise, trained_process
from raylora.diffusion.timesteps import make_timesteps
from raylora.families import Family
from raylora.fit import Fit, host_memory, make_fitting
from raylora.job import Job
from raylora.measure import is_recorded
from raylora.memory.attending import check_kernel, predicting_by
from raylora.memory.host import HostMemory, as_host
from raylora.memory.setting import Precision, States
from raylora.models import PRECISIONS, Adapted, load_adapted
from raylora.optim.groups import rates_at, text_stop_step
from raylora.optim.host_states import HostStates
from raylora.optim.optimizers import make_optimizer, sets_rate, wants_shapes
from raylora.optim.schedules import make_schedule
from raylora.optim.state import state_tensors
from raylora.optim.states import with_eight_bits
from raylora.training.ema import Ema
from raylora.training.fused import Fused
from raylora.training.graphs import Graphs
from raylora.training.loader import Loader
from raylora.training.loss_scale import LossScale
from raylora.training.memory import DeviceMemory
from raylora.training.parts import Mover, Parts, ReadText
from raylora.training.reduce import Group
from raylora.training.shares import Shares
from raylora.training.sums import ExactSums, RoundedSums, Sums


def make_parts(
    job: Job,
    family: Family,
    loader: Loader,
    group: Group,
    shares: Shares,
    total: int,
    device: torch.device,
    fit: Fit,
    memory: DeviceMemory,
    share_host: bool,
) -> Parts:
    """What one worker trains with, from models, adapter and optimizer to what fits them."""
    dtype, _ = PRECISIONS[job.training.precision]
    fitting = make_fitting(job, fit, device, memory)
    host = host_memory(family, fit, shared=share_host or group.size > 1)
    models = load_adapted(job, family, device, precision=fit.precision, fitting=fitting, host=host)
    adapter = models.adapter
    process = trained_process(family.process, job.noise)
    exact_sums = job.training.sums == "exact"
    if exact_sums and device.type == "cpu":
        # More threads cut a layer's own sums into other pieces.
        torch.set_num_threads(job.fleet.threads)
    check_kernel(job.memory.attention, models.denoiser, device=device, dtype=dtype)
    mover = _make_mover(job, models, total, fit.precision)
    fitting.take([HostStates(mover.optimizer, as_host)])
    fused = _make_fused(job, adapter, mover)
    sums: Sums = fused or (ExactSums(adapter) if exact_sums else RoundedSums(adapter))
    ema = Ema(job.ema, adapter.values.data) if job.ema.decay is not None else None
    if memory.budget:
        averages = [ema.average] if ema and job.ema.place == "device" else []
        flat = (adapter.values, adapter.gradients, adapter.constants, *sums.held, *averages)
        models_there = (models.denoiser, *models.text_encoders.values())
        memory.budget.watch(models_there, flat, partial(state_tensors, mover.optimizer))
        fitting.take([memory.budget])
    graphs = _make_graphs(job, models, device)
    fitting.take([graphs])
    fitting.spare(graphs.give_up)
    return Parts(
        denoiser=models.denoiser,
        text_encoders=models.text_encoders,
        attachments=models.attachments,
        adapter=adapter,
        predict=predicting_by(job.memory.attention, family.predict),
        read_text=_text_reader(family, models, dtype, device),
        process=process,
        loss=make_loss(
            job.loss,
            process,
            masked=any(options.masked for options in job.sets),
            weighed=any(options.is_reg for options in job.sets),
        ),
        noise=make_noise(job.noise),
        mover=mover,
        ema=ema,
        loss_scale=LossScale(on=job.training.precision == "fp16"),
        loader=loader,
        group=group,
        shares=shares,
        sums=sums,
        fitting=fitting,
        seed=job.seed,
        timesteps=make_timesteps(
            job.timesteps.with_usual(family.usual_draw, family.usual_shift),
            process,
            family.base.config("scheduler"),
            low=job.training.min_timestep,
            high=job.training.max_timestep,
        ),
        dtype=dtype,
        device=device,
        skip_broken=job.training.on_nan == "skip",
        under=models.under,
        fused=fused,
        graphs=graphs,
        leave_host=partial(_leave_host, models, host),
    )


def _leave_host(models: Adapted, host: HostMemory | None) -> None:
    if models.placed:
        models.placed.close()
    if host:
        host.close()


def _make_graphs(job: Job, models: Adapted, device: torch.device) -> Graphs:
    """What records micro-batches, on a GPU and where nothing stands against it."""
    return Graphs(
        possible=device.type == "cuda" and is_recorded(job),
        gradients=models.adapter.gradients,
        forget=models.placed.forget if models.placed else lambda: None,
    )


def adapter_optimizer(
    job: Job, models: Adapted, *, states: States = "full"
) -> torch.optim.Optimizer:
    """The optimizer over the adapter's groups, its states held as the run's precision says."""
    options = with_eight_bits(job.optimizer) if states == "8bit" else job.optimizer
    adapter, shapes = models.adapter, wants_shapes(options) or job.memory.fused
    return make_optimizer(
        options,
        [
            {
                "params": adapter.leaves(i) if shapes else [adapter.flat(i)],
                "rate": group.rate,
                "name": group.name,
            }
            for i, group in enumerate(models.groups)
        ],
    )


def _make_fused(job: Job, adapter: Adapter, mover: Mover) -> Fused | None:
    """Sums that move the adapter within the backward pass, where the job asks for them."""
    if not job.memory.fused:
        return None
    bundles = job.memory.fused_groups
    return Fused(adapter, mover.optimizer, mover.groups, bundles=bundles)


def _make_mover(job: Job, models: Adapted, total: int, precision: Precision) -> Mover:
    """The optimizer, and the rate of each group at every step."""
    options, groups = job.optimizer, models.groups
    factor = make_schedule(job.schedule, total, abs(options.rate))
    most = job.network.max_norm
    return Mover(
        optimizer=adapter_optimizer(job, models, states=precision.states),
        groups=groups,
        rates=(lambda step: rates_at(groups, factor, step, total, options))
        if sets_rate(options)
        else None,
        max_grad_norm=options.max_grad_norm,
        text_stops=text_stop_step(options, total),
        cap=NormCap(models.adapter, most) if most is not None else None,
    )


def _text_reader(
    family: Family, models: Adapted, dtype: torch.dtype, device: torch.device
) -> ReadText:
    """Captions of a batch as the prediction takes them: read by the encoder that is trained, or
    only brought to the device where they were encoded before."""
    encoders = models.text_encoders
    if encoders:
        return lambda tokens: family.read_tokens(encoders, tokens)
    return lambda texts: {
        name: tensor.to(device, dtype, non_blocking=True) for name, tensor in texts.items()
    }
