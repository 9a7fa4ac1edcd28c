"""What of a job's memory options does not go with the rest of it."""

from __future__ import annotations

from collections.abc import Iterator

from raylora.memory.options import MemoryOptions
from raylora.networks import NetworkOptions, get_network
from raylora.optim.options import OptimizerOptions
from raylora.optim.states import states_problem
from raylora.training.options import MICRO_BATCH, TrainingOptions


def memory_problems(
    memory: MemoryOptions,
    optimizer: OptimizerOptions,
    training: TrainingOptions,
    network: NetworkOptions,
    *,
    workers: int,
    preserved: bool = False,
) -> list[str]:
    """One sentence for each pair of options that cannot work together.

    Args:
        workers: `fleet.count`.
        preserved: what the base draws of some images is kept (`output_preservation`).
    """
    states = states_problem(optimizer, memory.states)
    return [
        *([states] if states else []),
        *_paged_problems(memory, optimizer),
        *fused_problems(memory, optimizer, training, workers=workers),
        *compile_problems(memory, network),
        *_graph_problems(memory, training, network, preserved=preserved),
    ]


def _paged_problems(memory: MemoryOptions, optimizer: OptimizerOptions) -> Iterator[str]:
    if memory.host_states is True and optimizer.kind.paged:
        yield (
            f"memory.host_states has the optimizer's states on the host, and {optimizer.name} "
            f"moves them there by itself. Choose {optimizer.name.removeprefix('paged_')}, or leave "
            "memory.host_states out."
        )


def fused_problems(
    memory: MemoryOptions, optimizer: OptimizerOptions, training: TrainingOptions, *, workers: int
) -> list[str]:
    """What of a job a fused backward pass cannot do, one sentence each; none where it is off."""
    if not memory.fused:
        return []
    word = "fused_backward" if memory.fused_backward else "fused_groups"
    why = f"memory.{word} moves the adapter within the backward pass"
    told = _not_fused(memory, optimizer, training, workers)
    return [f"{why}, {what}, or leave memory.{word} out." for what in told]


def _not_fused(
    memory: MemoryOptions, optimizer: OptimizerOptions, training: TrainingOptions, workers: int
) -> Iterator[str]:
    if workers > 1:
        yield (
            f"before {workers} workers could add their gradients up (fleet.workers). Train with 1"
        )
    if training.sums == "exact":
        yield "and training.sums: exact adds gradients up before. Choose fast"
    together = memory.max_micro_batch or MICRO_BATCH
    if training.sums == "fast" and training.images_per_step > together:
        yield (
            f"and the {training.images_per_step} images of a step (training.images_per_step) come "
            f"in micro-batches of {together}, whose gradients are added up before. Set "
            f"memory.max_micro_batch: {training.images_per_step}, lower images_per_step"
        )
    if optimizer.max_grad_norm > 0:
        yield (
            "before the length of the whole gradient is known, and optimizer.max_grad_norm is "
            f"{optimizer.max_grad_norm:g}. Set it to 0"
        )
    if training.precision == "fp16":
        yield (
            "and in training.precision fp16 a step may have to be done again with its loss scaled "
            "otherwise. Choose bf16 or fp32"
        )
    if training.on_nan == "skip":
        yield (
            "before it is known whether the whole gradient is finite, and training.on_nan is skip. "
            "Choose stop"
        )
    if not optimizer.kind.moves_alone:
        yield (
            f"one part after another, and optimizer.name {optimizer.name} is not known to move "
            "each part by its own gradient alone. Choose adamw, lion, adafactor or sgd_nesterov"
        )
    if memory.host_states is True:
        yield "on the device, and memory.host_states moves it on the host. Leave that out"


def compile_problems(memory: MemoryOptions, network: NetworkOptions) -> Iterator[str]:
    """What of a job compiled blocks cannot do; nothing where nothing is compiled."""
    if not memory.compile:
        return
    drawn = [
        word for word in ("dropout", "rank_dropout", "module_dropout") if getattr(network, word)
    ]
    if drawn:
        yield (
            f"memory.compile compiles the blocks once, and network.{drawn[0]} draws anew in each "
            "of them at every step. Leave one of them out."
        )
    if get_network(network.kind).unit(network):
        yield (
            f"memory.compile compiles the blocks once, and network.kind {network.kind} trains "
            "other ranks at every step. Leave one of them out."
        )
    if isinstance(memory.streaming, float | int) and memory.streaming > 0:
        yield (
            "memory.compile is for blocks whose weights stay on the device, and memory.streaming "
            f"is {memory.streaming:g}. Set it to 0, or leave compile out."
        )
    if memory.checkpointing == "mlp":
        yield (
            "memory.compile compiles blocks whole, and memory.checkpointing: mlp computes a part "
            "of each again. Choose none, alternate or all."
        )


def graph_obstacles(
    memory: MemoryOptions, training: TrainingOptions, network: NetworkOptions, *, preserved: bool
) -> Iterator[str]:
    """Why micro-batches of a job cannot be recorded as CUDA graphs, as ends of a sentence.

    Args:
        preserved: as `memory_problems` has it.
    """
    if network.trains_text:
        yield "text encoders that are trained read captions anew in each. Leave network.train out"
    for word in ("dropout", "rank_dropout", "module_dropout"):
        if getattr(network, word):
            yield f"network.{word} draws anew in each. Leave it out"
    if get_network(network.kind).unit(network):
        yield f"network.kind {network.kind} trains other ranks in each. Choose another"
    if memory.fused:
        yield "memory.fused_backward and fused_groups step the optimizer in it. Leave them out"
    if memory.compile:
        yield "memory.compile makes its own. Leave that out"
    if memory.offload_inputs is True:
        yield "memory.offload_inputs asks for host memory in it. Set that to false"
    if preserved:
        yield "output_preservation predicts twice where images ask for it. Leave that out"
    if training.precision == "fp64":
        yield "training.precision fp64 is for tests on CPUs. Choose another"


def _graph_problems(
    memory: MemoryOptions, training: TrainingOptions, network: NetworkOptions, *, preserved: bool
) -> Iterator[str]:
    if memory.cuda_graphs is True:
        for why in graph_obstacles(memory, training, network, preserved=preserved):
            yield (
                "memory.cuda_graphs records the kernels of a micro-batch once, and "
                f"{why}, or leave memory.cuda_graphs out."
            )
