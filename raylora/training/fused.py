"""Moving the adapter within the backward pass, so that gradients need no memory of their own.

As soon as the last gradient of a leaf (or of a bundle of leaves) has arrived, the optimizer moves
it and the gradient is dropped. That is the plain step's arithmetic in another order, so it is for
optimizers in which no parameter's step asks for another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raylora.adapt.attach import Adapter
from raylora.memory.host import host_tensor
from raylora.optim.groups import Group as ParameterGroup
from raylora.training.reduce import Group


class Fused:
    """The sums of a step whose gradients are moved by and dropped as they come.

    In a step: `prepare`, then `begin`, backward and `take` for each micro-batch as any `Sums`, then
    `finish`. Of several micro-batches only the last one moves; memory is then saved there alone.
    Backward passes outside of a step leave nothing. `begin` for the second time in a step, as after
    running out of memory, puts back what was moved.

    Args:
        optimizer: over the adapter's leaves, in the groups of `groups`.
        bundles: leaves are moved in so many parts of about equal bytes, neighbours in the backward
            pass together as far as it is known; None is each by itself.
    """

    def __init__(
        self,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[ParameterGroup],
        *,
        bundles: int | None = None,
    ) -> None:
        adapter.keep_no_gradients()
        self._adapter = adapter
        self._optimizer = optimizer
        self._groups = list(groups)
        self._loss = adapter.gradients.new_zeros(())
        self.held: tuple[Tensor, ...] = (self._loss,)
        self._before = _Before(adapter, optimizer)
        self._group_of = {
            leaf: number for number in range(len(groups)) for leaf in adapter.leaves(number)
        }
        self._wanted = bundles
        self._came: dict[Tensor, None] = {}  # leaves in the order of their gradients
        self._ordered = 0
        self._bundle(_in_backward_order(adapter))
        for leaf in self._bundle_of:
            leaf.register_post_accumulate_grad_hook(self._arrived)
        self._images: int | None = None  # None outside of a step
        self._still: set[int] = set()
        self._left = 1
        self._norms: list[Tensor] = []
        self._moved: set[Tensor] = set()
        self._waiting: list[list[Tensor]] = [[] for _ in self._bundles]

    def prepare(self, images: int, rates: Mapping[str, float], *, text_stopped: bool) -> None:
        """A step begins: `images` in all, at these rates by group."""
        for held, rate in zip(self._optimizer.param_groups, rates.values(), strict=True):
            if "lr" in held and held["lr"] is not None:
                held["lr"] = rate
        self._images = images
        self._still = {
            number
            for number, group in enumerate(self._groups)
            if text_stopped and group.part == "text_encoder"
        }
        self._before.forget()

    def begin(self, batches: int = 1) -> None:
        """Forget what was taken of this step, and put back what was moved.

        Args:
            batches: micro-batches of which the last moves the adapter.
        """
        if self._images is not None:
            self._before.keep_or_put_back()
        self._loss.zero_()
        self._clear(batches)

    def take(self, losses: Tensor, *, scale: float = 1.0) -> None:
        """Take (B,) losses; their gradients are gone already."""
        assert scale == 1.0
        self._loss += losses.detach().sum()
        self._left -= 1

    def add_up(self, group: Group, *, stop: bool) -> tuple[Tensor, Tensor]:
        """Nothing to add: there is one worker."""
        assert group.size == 1
        return self._loss.clone(), self._loss.new_full((), float(stop))

    def finish(self) -> None:
        """End the step: what no gradient has reached moves by a gradient of zero, as it would."""
        moved = set(self._moved)
        try:
            for bundle in self._bundles:
                rest = [leaf for leaf in bundle if leaf not in moved and self._moves(leaf)]
                for leaf in rest:
                    if leaf.grad is None:
                        leaf.grad = torch.zeros_like(leaf)
                self._move(rest)
        except torch.OutOfMemoryError:
            self._moved = moved  # whoever asks for the end again has put back what it did
            raise
        self._images = None

    @property
    def moved_all(self) -> bool:
        """Whether the backward pass has moved all that this step moves."""
        return all(leaf in self._moved or not self._moves(leaf) for leaf in self._bundle_of)

    def gradient_norm(self) -> Tensor:
        """Of the whole step's gradient, what waits for the end of the step with it."""
        late = [leaf.grad for one in self._waiting for leaf in one if leaf.grad is not None]
        norms = [*self._norms]
        if late:
            assert self._images is not None
            norms.append(torch.nn.utils.get_total_norm(late) / self._images)
        if not norms:
            return torch.zeros_like(self._loss)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def _bundle(self, leaves: Sequence[Tensor], unreached: Sequence[Tensor] = ()) -> None:
        # Apart, for what no gradient reaches keeps those that share a bundle with it until the end.
        self._bundles = [*_bundled(leaves, self._wanted), *([list(unreached)] if unreached else [])]
        self._bundle_of = {leaf: number for number, one in enumerate(self._bundles) for leaf in one}

    def _clear(self, batches: int) -> None:
        if len(self._came) > self._ordered:  # backward passes have told more of the order
            self._ordered = len(self._came)
            rest = [leaf for leaf in self._bundle_of if leaf not in self._came]
            self._bundle([*self._came], rest)
        self._left = batches
        self._norms = []
        self._moved = set()
        self._waiting = [[] for _ in self._bundles]
        for leaf in self._bundle_of:
            leaf.grad = None

    def _moves(self, leaf: Tensor) -> bool:
        return self._group_of[leaf] not in self._still

    def _arrived(self, leaf: Tensor) -> None:
        if self._wanted is not None:
            self._came.setdefault(leaf)
        if self._images is None:
            leaf.grad = None
            return
        if self._left > 1:
            return
        number = self._bundle_of[leaf]
        waiting = self._waiting[number]
        waiting.append(leaf)
        if len(waiting) == sum(self._moves(one) for one in self._bundles[number]):
            self._move(waiting)
            waiting.clear()

    @torch.no_grad()
    def _move(self, leaves: Sequence[Tensor]) -> None:
        """One step of the optimizer over these leaves alone."""
        if not leaves:
            return
        assert self._images is not None
        self._before.wait()
        narrowed: dict[int, list[Tensor]] = {}
        gradients = []
        for leaf in leaves:
            assert leaf.grad is not None
            gradients.append(leaf.grad.div_(self._images))
            narrowed.setdefault(self._group_of[leaf], []).append(leaf)
        self._norms.append(torch.nn.utils.get_total_norm(gradients))
        for number, some in narrowed.items():
            if self._groups[number].sign < 0:  # a negative rate: the same way, backwards
                for leaf in some:
                    leaf.grad.neg_()  # type: ignore[union-attr]
        whole = self._optimizer.param_groups
        self._optimizer.param_groups = [
            {**whole[number], "params": some} for number, some in narrowed.items()
        ]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = whole
        self._moved.update(leaves)
        for leaf in leaves:
            leaf.grad = None


class _Before:
    """The adapter and what the optimizer remembers, as they were before the step, on the host.

    On a GPU they are copied on a stream of their own, beside the forward pass.
    """

    def __init__(self, adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
        self._values = adapter.values.data
        self._optimizer = optimizer
        device = self._values.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: dict[tuple[int, str], Tensor] = {}
        self._states: dict[Tensor, dict[str, object]] = {}
        self._kept = False
        self._copying: torch.cuda.Event | None = None

    def forget(self) -> None:
        """Another step begins."""
        self._kept = False

    def keep_or_put_back(self) -> None:
        """Keep everything at a step's first try, and put it back at each other."""
        if not self._kept:
            self._keep()
            self._kept = True
        else:
            self._put_back()

    def wait(self) -> None:
        """Before something is moved: what was there is copied."""
        if self._copying is not None:
            torch.cuda.current_stream(self._values.device).wait_event(self._copying)
            self._copying = None

    def _keep(self) -> None:
        if self._stream is None:
            self._copy_all()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._values.device))
        with torch.cuda.stream(self._stream):
            self._copy_all()
            self._copying = self._stream.record_event()

    @torch.no_grad()
    def _copy_all(self) -> None:
        self._copied((0, "values"), self._values)
        # bitsandbytes' maps of what 8 bits mean never change.
        self._states = {
            leaf: {
                key: self._copied((id(leaf), key), held) if isinstance(held, Tensor) else held
                for key, held in state.items()
                if not key.startswith("qmap")
            }
            for leaf, state in self._optimizer.state.items()
        }

    def _copied(self, place: tuple[int, str], tensor: Tensor) -> Tensor:
        if place not in self._places:
            self._places[place] = host_tensor(tensor.shape, tensor.dtype)
        return self._places[place].copy_(tensor, non_blocking=True)

    @torch.no_grad()
    def _put_back(self) -> None:
        self.wait()
        self._values.copy_(self._places[(0, "values")], non_blocking=True)
        for leaf in list(self._optimizer.state):
            before = self._states.get(leaf)
            if before is None:  # it had none
                del self._optimizer.state[leaf]
                continue
            state = self._optimizer.state[leaf]
            for key, held in before.items():
                if isinstance(held, Tensor):
                    state[key].copy_(held, non_blocking=True)
                else:
                    state[key] = held


def _in_backward_order(adapter: Adapter) -> list[Tensor]:
    """Leaves about as their gradients come, before any came: the last layer's first."""
    return [
        leaf
        for site in reversed(adapter.sites)
        for leaf in adapter.parameters[site.name].values()
        if leaf.requires_grad
    ]


def _bundled(leaves: Sequence[Tensor], bundles: int | None) -> list[list[Tensor]]:
    """Neighbours together, in so many parts of about equal bytes; fewer where leaves are few."""
    if bundles is None:
        return [[leaf] for leaf in leaves]
    whole, passed = sum(leaf.numel() for leaf in leaves), 0
    found: list[list[Tensor]] = [[] for _ in range(bundles)]
    for leaf in leaves:
        found[min(bundles - 1, passed * bundles // whole)].append(leaf)
        passed += leaf.numel()
    return [bundle for bundle in found if bundle]
