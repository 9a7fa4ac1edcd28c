"""What a worker does to fit its device, and how it goes on with less when memory runs out.

One mechanism for all of training: what ran out is begun again, with one exact strategy more. None
changes what is computed, so the step that comes out is the step that was meant.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch

from raylora.base.errors import MemoryPlanError
from raylora.base.log import get_logger
from raylora.memory.ladder import next_down
from raylora.memory.options import MemoryOptions
from raylora.memory.plan import CardPlan
from raylora.memory.setting import Setting
from raylora.training.memory import DeviceMemory

log = get_logger("memory")

T = TypeVar("T")
Tell = Callable[..., None]
"""Keeps an event: (kind, **facts)."""


class Fits(Protocol):
    """What a setting is applied to: a placed model, the optimizer's states."""

    def apply(self, setting: Setting) -> None:
        """Do as the setting says, between two passes."""


class Fitting:
    """A worker's setting, and the way down from it.

    Attributes:
        setting: now.
        options: what may be done; words that are not `auto` stay as they are.
        plan: what was foreseen for this card; None where nothing was planned.
        limited: the device may run out of memory, so that what cannot be repeated is guarded.

    Args:
        memory: of the device.
        retries: memory may be there once what is cached of it is given back, as on a GPU: the
            first time it runs out in a setting, the same is tried again.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        options: MemoryOptions | None = None,
        plan: CardPlan | None = None,
        memory: DeviceMemory | None = None,
        limited: bool = False,
        retries: bool = False,
    ) -> None:
        self.setting = setting
        self.plan = plan
        self.limited = limited
        self._around = memory.limited if memory else nullcontext
        self._tell: Tell | None = None
        self._untold: list[tuple[str, dict[str, Any]]] = []
        self.options = options if options is not None else MemoryOptions()
        self._parts: list[Fits] = []
        self._spare: Callable[[], bool] = lambda: False
        self._retries = retries
        self._retried = False

    def tell_to(self, tell: Tell) -> None:
        """Keep what happens there from now on, and what happened so far."""
        self._tell = tell
        for kind, facts in self._untold:
            tell(kind, **facts)
        self._untold.clear()

    def tell(self, kind: str, **facts: Any) -> None:
        """Keep an event."""
        if self._tell is None:
            self._untold.append((kind, facts))
        else:
            self._tell(kind, **facts)

    @property
    def does_more(self) -> bool:
        """Whether anything is done, or may have to be, but for the size of micro-batches."""
        return self.limited or self.setting != Setting(micro_batch=self.setting.micro_batch)

    def take(self, parts: Sequence[Fits]) -> None:
        """Be in charge of these too, and apply the setting to them; before the run begins.

        Raises:
            MemoryPlanError: they fit in no setting.
        """
        self._parts += parts
        with self._around():
            self.again(lambda: self.apply(self.setting), "placing the models")

    def spare(self, give_up: Callable[[], bool]) -> None:
        """Where memory runs out, call this before a strategy is added: it gives memory up that only
        made steps faster, and says whether there was any."""
        self._spare = give_up

    def apply(self, setting: Setting) -> None:
        """Do as another setting says from now on; between two passes."""
        if setting != self.setting:
            self._retried = False
        self.setting = setting
        for part in self._parts:
            part.apply(setting)

    def again(self, action: Callable[[], T], where: str) -> T:
        """What an action gives, begun anew with less each time memory runs out.

        Args:
            action: must be right when it is begun again after a part of it was done, and speak to
                no other worker.
            where: for people.

        Raises:
            MemoryPlanError: nothing is left to do with less.
        """
        while True:
            try:
                return action()
            except torch.OutOfMemoryError as error:
                said = str(error).partition("\n")[0]
            # Not within `except`, whose traceback holds tensors.
            self._get_by_with_less(where, said)

    def _get_by_with_less(self, where: str, said: str) -> None:
        before = self.setting
        given_up = self._spare()
        free_unused()
        if given_up:
            self._say(where, "the same again, without recorded steps", said)
            return
        if self._retries and not self._retried:
            self._retried = True
            self._say(where, "the same again, with what was cached given back", said)
            return
        below = next_down(before, self.options, self.plan)
        while below is not None:
            try:
                self.apply(below)
            except torch.OutOfMemoryError:
                pass
            else:
                self._say(where, difference(before, below), said)
                return
            free_unused()
            below = next_down(below, self.options, self.plan)
        raise MemoryPlanError(
            f"Out of memory at {where}, with every strategy that the job allows on "
            f"({described(self.setting)}): {said}. Leave words of memory on auto, choose a smaller "
            "memory.base or data.resolution under another `name`, or free the device of other "
            "programs."
        )

    def _say(self, where: str, done: str, said: str) -> None:
        log.warning("out of memory at %s: %s", where, done)
        self.tell("out of memory", at=where, done=done, said=said, setting=self.setting.plain())


@contextmanager
def told_in_words(where: str, advice: str) -> Iterator[None]:
    """Within it, running out of memory where nothing can be done with less is a person's to mend.

    Args:
        advice: what to change.

    Raises:
        MemoryPlanError: it ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).partition("\n")[0]
        raise MemoryPlanError(f"Out of memory at {where}: {said}. {advice}") from error


def free_unused() -> None:
    """Give back device memory that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def described(setting: Setting) -> str:
    """`checkpointing all, 40 % of the blocks streamed, micro-batch 2`."""
    words = [f"checkpointing {setting.checkpointing}"]
    if setting.streamed:
        words.append(f"{setting.streamed:.0%} of the blocks streamed")
    if setting.offload:
        words.append("their inputs offloaded")
    if setting.host_states:
        words.append("optimizer's states on the host")
    return ", ".join([*words, f"micro-batch {setting.micro_batch}"])


def difference(before: Setting, after: Setting) -> str:
    """What another setting does otherwise, for people: `micro_batch 4 -> 2`."""
    old, new = before.plain(), after.plain()
    changed: list[tuple[str, Any, Any]] = [
        (word, old[word], new[word]) for word in old if old[word] != new[word]
    ]
    return ", ".join(f"{word} {was} -> {now}" for word, was, now in changed)
