"""One exact strategy further when memory runs out, or back when there was more than predicted."""

from __future__ import annotations

from raylora.memory.candidates import checkpointings_of
from raylora.memory.options import MemoryOptions
from raylora.memory.plan import CardPlan
from raylora.memory.setting import CHECKPOINTINGS, Setting

FREES = 0.9
"""A rung must be predicted to take less than this part of what the present setting takes: memory
that ran out by a little for one reason runs out again for the next."""
WORTH = 0.97
"""A faster setting must be predicted to take less than this part of the time, for each is tried."""
STREAMS = 0.2
"""By which the streamed share grows where no plan says better."""


def next_down(
    setting: Setting, allowed: MemoryOptions, plan: CardPlan | None = None
) -> Setting | None:
    """The next setting that needs less memory; None: nothing that is allowed is left.

    No strategy is ever taken back on the way, so that it ends.

    Args:
        plan: whose predictions choose the fastest of what frees enough; without one, or where it
            does not know the setting, strategies follow one another from the cheapest.
    """
    if plan is not None and (found := _down_by_plan(setting, allowed, plan)) is not None:
        return found
    return _down(setting, allowed)


def _down_by_plan(setting: Setting, allowed: MemoryOptions, plan: CardPlan) -> Setting | None:
    now = plan.known(setting)
    if now is None:
        return None
    most = FREES * now.peaks["train"]
    for one in plan.rungs:
        if one.peaks["train"] <= most and is_below(one.setting, setting, allowed):
            return one.setting
    return None


def is_below(lower: Setting, setting: Setting, allowed: MemoryOptions) -> bool:
    """Whether it only adds strategies, and only such as may be chosen freely."""
    again = CHECKPOINTINGS.index
    one_batch = allowed.fused
    free = {
        "checkpointing": allowed.checkpointing == "auto",
        "streamed": allowed.streaming == "auto",
        "offload": allowed.offload_inputs == "auto",
        "host_states": allowed.host_states == "auto" and not one_batch,
        "micro_batch": not one_batch,
    }
    old, new = setting.plain(), lower.plain()
    return (
        lower != setting
        and all(free[word] or old[word] == new[word] for word in old)
        and again(lower.checkpointing) >= again(setting.checkpointing)
        and lower.streamed >= setting.streamed
        and lower.offload >= setting.offload
        and lower.host_states >= setting.host_states
        and lower.micro_batch <= setting.micro_batch
    )


def _down(setting: Setting, allowed: MemoryOptions) -> Setting | None:
    one_batch = allowed.fused
    if setting.micro_batch > 1 and not one_batch:
        return setting.but(micro_batch=setting.micro_batch // 2)
    again = CHECKPOINTINGS.index
    stronger = [
        kind for kind in checkpointings_of(allowed) if again(kind) > again(setting.checkpointing)
    ]
    if stronger and allowed.checkpointing == "auto":
        return setting.but(checkpointing=stronger[0])
    recomputed = setting.checkpointing != "none" or setting.streamed > 0
    if not setting.offload and recomputed and allowed.offload_inputs == "auto":
        return setting.but(offload=True)
    if setting.streamed < 1 and allowed.streaming == "auto" and not allowed.compile:
        return setting.but(streamed=min(1.0, round(setting.streamed + STREAMS, 3)))
    if not setting.host_states and allowed.host_states == "auto" and not one_batch:
        return setting.but(host_states=True)
    return None


def next_up(plan: CardPlan, setting: Setting, observed_peak: int) -> Setting | None:
    """A faster setting that fits by what was observed; None: there is none.

    Args:
        observed_peak: bytes that training took in this setting; what it took beyond the prediction
            is added to every other's.
    """
    now = plan.known(setting)
    if now is None:
        return None
    off = observed_peak - now.peaks["train"]
    for one in plan.rungs:
        if one.seconds_per_image > WORTH * now.seconds_per_image:
            return None
        others = [peak for phase, peak in one.peaks.items() if phase != "train"]
        # What training showed says little of other phases, unless they may be larger too.
        most = max([one.peaks["train"] + off, *(peak + max(0, off) for peak in others)])
        if most <= plan.budget_bytes:
            return one.setting
    return None
