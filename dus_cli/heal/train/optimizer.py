"""AdamW over the weights that this worker holds: fp32 masters and moments, gradients summed in
fp32.

The weights that the model computes with stay in bf16. Of the fp32 master of each only the lower
half is kept beside it (Split-SGD, arXiv:2005.04680), and a gradient and two moments: 16 bytes a
parameter with the weight itself, split over the workers. Without masters the bf16 weights are
rounded stochastically, so that small updates are not lost on average (arXiv:2010.06192).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from dus_cli.heal.run import RecipePlan
from dus_cli.heal.train.gains import Gains
from dus_cli.heal.train.masters import joined, split, stochastically_rounded
from dus_cli.heal.train.schedule import gain_rate
from dus_cli.models.team import Team

_EPSILON = 1e-8

# Elements whose masters are held at a time: few on a CPU, whose cache they fit.
_PART = {"cpu": 1 << 20}
_PART_ELSEWHERE = 1 << 24


@dataclass
class _Slot:
    """One parameter's part on this worker. `lower` is what a bf16 weight lacks of its fp32 master,
    None where there is no master or the weight is one itself.

    `scale` is a factor of its learning rates. `is_stale` says that `gradient` is of a step that is
    over: the next one takes its place instead of being added.
    """

    parameter: nn.Parameter
    weight: Tensor
    lower: Tensor | None
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    scale: float
    is_stale: bool = False

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a checkpoint must hold; a split parameter's tensors have the whole parameter's
        shape.
        """
        named = {
            f"model.{name}": self.weight,
            f"exp_avg.{name}": self.exp_avg,
            f"exp_avg_sq.{name}": self.exp_avg_sq,
        }
        if self.lower is not None:
            named[f"lower.{name}"] = self.lower
        return {key: whole(self.parameter, tensor) for key, tensor in named.items()}

    def parts(self) -> Iterator[_Slot]:
        """The slot cut along its first dimension, so that few masters are held at a time. An update
        moves the step of a part, not that of the slot.
        """
        size = _PART.get(self.weight.device.type, _PART_ELSEWHERE)
        rows = len(self.weight) if self.weight.ndim else 1
        at_once = max(1, rows * size // max(1, self.weight.numel()))
        for start in range(0, rows, at_once):
            at = slice(start, start + at_once) if self.weight.ndim else ()
            yield replace(
                self,
                weight=self.weight[at],
                lower=None if self.lower is None else self.lower[at],
                gradient=self.gradient[at],
                exp_avg=self.exp_avg[at],
                exp_avg_sq=self.exp_avg_sq[at],
                step=self.step.clone(),
            )

    def values(self) -> Tensor:
        """The fp32 master, or the weight; the weight itself only if that is fp32."""
        return self.weight.float() if self.lower is None else joined(self.weight, self.lower)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this worker holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(parameter: Tensor, part: Tensor) -> Tensor:
    """A worker's part, as the tensor that it is a part of; split as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class Optimizer:
    """Gradients are added up over micro-batches by hooks; `step` clips, updates and clears them."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        recipe: RecipePlan,
        team: Team,
        *,
        masters: bool,
        num_replicas: int,
        stored: Callable[[str], Tensor | None] = lambda _: None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        """Args:
        parameters: all of the model, by name; those without requires_grad never learn.
        recipe: rates, betas, decay, clip.
        team: who else holds parts of them.
        masters: keep fp32 copies of bf16 weights.
        num_replicas: how many workers hold the same part.
        stored: a worker's part of a parameter in fp32, where the file has it in more than bf16.
        scales: what each parameter's learning rates are multiplied by; None is 1.
        """
        self._parameters = parameters
        self._recipe = recipe
        self._team = team
        self._masters = masters
        self._stored = stored
        self._scales = scales or {}
        self._num_replicas = num_replicas
        self._slots: dict[str, _Slot] = {}
        self._gains = Gains(parameters) if recipe.gain_lr > 0 else None
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        for parameter in (p for p in parameters.values() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(self._collect)  # type: ignore[no-untyped-call]

    def _collect(self, parameter: Any) -> None:
        """Add a micro-batch's gradient to the sum in fp32, and free it."""
        slot = self._slots[self._names[id(parameter)]]
        if slot.is_stale:
            slot.gradient.copy_(local(parameter.grad))
            slot.is_stale = False
        else:
            slot.gradient.add_(local(parameter.grad))
        parameter.grad = None

    def prepare(self, names: Iterable[str]) -> None:
        """Allocate state for the parameters that learn from now on; those that have it keep it."""
        for name in names:
            if name in self._slots:
                continue
            parameter = self._parameters[name]
            weight = local(parameter.detach())
            lower: Tensor | None = None
            if weight.dtype != torch.float32 and self._masters:
                lower = torch.zeros_like(weight, dtype=torch.int16)
                if (stored := self._stored(name)) is not None:
                    split(stored.to(weight.device), weight, lower)
            gradient, exp_avg, exp_avg_sq = (
                torch.zeros_like(weight, dtype=torch.float32) for _ in range(3)
            )
            step = torch.zeros((), device=weight.device)
            self._slots[name] = _Slot(
                parameter,
                weight,
                lower,
                gradient=gradient,
                exp_avg=exp_avg,
                exp_avg_sq=exp_avg_sq,
                step=step,
                scale=self._scales.get(name, 1.0),
            )

    def gradient_norm(self) -> float:
        """The norm of the summed gradient over all parameters and workers."""
        squares = sum(
            float(torch.linalg.vector_norm(s.gradient, dtype=torch.float32)) ** 2
            for s in self._learning()
        )
        return float((self._team.sum([squares])[0] / self._num_replicas) ** 0.5)

    def _learning(self) -> list[_Slot]:
        learning = [
            slot
            for slot in self._slots.values()
            if slot.parameter.requires_grad and slot.gradient.numel()
        ]
        for slot in learning:
            if slot.is_stale:  # this step gave no gradient: an expert to which no token was routed
                slot.gradient.zero_()
                slot.is_stale = False
        return learning

    def step(self, share: float, norm: float, step: int) -> None:
        """Update what learns.

        Args:
            share: of the recipe's learning rates, as the schedule says: 0…1.
            norm: the gradient's.
            step: numbers the run's steps and seeds the rounding.
        """
        clip = self._recipe.grad_clip
        factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
        learning = self._learning()
        # not the team's, where it is offloaded
        device = learning[0].weight.device if learning else torch.device("cpu")
        rounding = torch.Generator(device).manual_seed(self._recipe.seed * 1_000_003 + step)
        gains = self._gain_factors(factor, share * gain_rate(self._recipe, step))
        divisor = None if factor == 1.0 else torch.tensor(1 / factor, device=device)
        for slot in learning:
            for part in slot.parts():
                values = part.values()
                self._update(part, values, share * self._recipe.lr * slot.scale, divisor)
                if (gain := gains.get(id(slot), 1.0)) != 1.0:
                    values.mul_(gain)
                if part.lower is not None:
                    split(values, part.weight, part.lower)
                elif values is not part.weight:
                    part.weight.copy_(stochastically_rounded(values, rounding))
            slot.step += 1
        self.clear()

    def _gain_factors(self, clip: float, rate: float) -> dict[int, float]:
        """What each matrix that writes to the residual stream is multiplied by, by its slot's
        id.
        """
        if self._gains is None:
            return {}
        slots = [self._slots.get(name) for name in self._gains.names]
        learn = [slot is not None and slot.parameter.requires_grad for slot in slots]
        products = [
            self._product(slot) if slot is not None and is_on else 0.0
            for slot, is_on in zip(slots, learn, strict=True)
        ]
        totals = [clip * total / self._num_replicas for total in self._team.sum(products)]
        known = [total if is_on else None for total, is_on in zip(totals, learn, strict=True)]
        rates = [0.0 if slot is None else rate * slot.scale for slot in slots]
        factors = self._gains.factors(known, rates)
        return {id(slot): factor for slot, factor in zip(slots, factors, strict=True)}

    def _product(self, slot: _Slot) -> float:
        return sum(
            float(torch.dot(part.gradient.flatten(), part.values().flatten()))
            for part in slot.parts()
        )

    def _update(self, slot: _Slot, values: Tensor, lr: float, divisor: Tensor | None) -> None:
        adamw(
            [values],
            [slot.gradient],
            [slot.exp_avg],
            [slot.exp_avg_sq],
            [],
            [slot.step],
            fused=True,
            grad_scale=divisor,  # clips while it reads the gradient, which spares a pass over it
            amsgrad=False,
            beta1=self._recipe.betas[0],
            beta2=self._recipe.betas[1],
            lr=lr,
            # Norms and biases are not decayed, as in GPT-3 and all that followed.
            weight_decay=self._recipe.weight_decay if slot.parameter.ndim > 1 else 0.0,
            eps=_EPSILON,
            maximize=False,
        )

    def clear(self) -> None:
        """Forget the gradients."""
        for slot in self._slots.values():
            slot.is_stale = True

    def trained(self, name: str) -> Tensor | None:
        """A parameter as trained, in the best precision there is; None if it never learned."""
        slot = self._slots.get(name)
        if slot is None:
            return None
        trained = slot.weight if slot.lower is None else slot.values()
        return whole(slot.parameter, trained)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, by name."""
        slots = {
            key: tensor
            for name, slot in self._slots.items()
            for key, tensor in slot.tensors(name).items()
        }
        return slots | (self._gains.tensors() if self._gains is not None else {})

    def steps(self) -> dict[str, int]:
        """Updates that each parameter has had: Adam's bias correction needs them."""
        return {name: int(slot.step) for name, slot in self._slots.items()}

    def resume(self, steps: dict[str, int]) -> None:
        """Make the slots of a checkpoint, for its tensors to be read into."""
        self.prepare(steps)
        for name, count in steps.items():
            self._slots[name].step.fill_(count)
