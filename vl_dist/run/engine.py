"""What takes the step: the same calls whether the model is whole on every rank or DeepSpeed keeps it in shares.

Both sides take the mean of gradients over ranks, once a step or as the step goes, and the caller's loss is scaled for that
(`Ranks.loss_scale`). Neither divides by the number of packs.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from vl_dist.data.collate import Batch
from vl_dist.model.packed import PackedModel
from vl_dist.run.distributed import Ranks
from vl_dist.run.idle import Packs
from vl_dist.run.launched import Launch
from vl_dist.run.optim import clip_gradients, gradient_norm, make_optimizer, parameter_groups, set_lr
from vl_dist.settings import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
INITIAL_MICRO_STEP = -1  # deepspeed.runtime.zero.stage_1_and_2.INITIAL_MICRO_STEP_ID


@dataclass(frozen=True, slots=True)
class Trained:
    """What training changes, whole and on the CPU, by parameter name."""

    weights: dict[str, torch.Tensor]  # by the name in the PEFT model
    moments: dict[str, torch.Tensor]  # by that name and `.exp_avg` or `.exp_avg_sq`


class Engine(Protocol):
    """The model under training with its optimizer. All methods are for all ranks."""

    def begin_step(self, packs: Sequence[Batch]) -> None:
        """Before the first of this rank's packs of a step."""

    def __call__(self, pack: Batch) -> torch.Tensor:
        """The loss summed over one pack's targets, with a graph."""

    def gradient_sync(self, *, last: bool) -> AbstractContextManager[Any]:
        """Surrounds one pack of a step; what needs to be done once a step is done for the last one."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a pack's gradient."""

    def gradient_sizes(self) -> torch.Tensor:
        """[any] norms of what this rank holds of the step's gradient, not read; a number that is none makes them none."""

    def clip_and_step(self) -> torch.Tensor:
        """One optimizer step on clipped gradients, which are then gone; their norm over all ranks before clipping."""

    def drop_gradient(self) -> None:
        """The gradients are gone without a step, and the optimizer is as it was."""

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step: the language model's, to which those of other parts have a fixed ratio."""

    def trained(self) -> Trained | None:
        """Weights and moments, gathered if need be; None on ranks other than 0, which only take part."""

    def restore_moments(self, moments: Mapping[str, torch.Tensor], step: int) -> None:
        """Puts the optimizer where it was after `step` steps. Weights are restored before the engine is made."""

    def whole_model(self) -> AbstractContextManager[Any]:
        """Inside, every rank holds the whole model and can run it alone, as often as it likes."""


def make_engine(model: PackedModel, ranks: Ranks, settings: OptimConfig, launch: Launch) -> Engine:
    """The engine that the launcher's configuration asks for (all ranks)."""
    if launch.deepspeed is None:
        return PlainEngine(model, ranks, settings)
    return ZeroEngine(model, ranks, settings, launch)


class PlainEngine:
    """One process, or data parallel: every rank holds the whole model and takes the same optimizer step."""

    def __init__(self, model: PackedModel, ranks: Ranks, settings: OptimConfig) -> None:
        self._ranks = ranks
        self._parameters = model.lora_parameters
        self._pack = Packs(model)
        self._max_grad_norm = settings.max_grad_norm
        self._norm: torch.Tensor | None = None  # of the gradient that is there, once asked for
        self._optimizer = make_optimizer(parameter_groups(self._parameters, settings), settings)
        self._wrapped: nn.Module = ranks.accelerator.prepare_model(model)

    def begin_step(self, packs: Sequence[Batch]) -> None:
        """Nothing to do."""

    def __call__(self, pack: Batch) -> torch.Tensor:
        """The loss summed over one pack's targets, with a graph."""
        loss: torch.Tensor = self._wrapped(self._pack(pack))
        return loss

    def gradient_sync(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over ranks only in the backward of a step's last pack."""
        return contextlib.nullcontext() if last else self._ranks.accelerator.no_sync(self._wrapped)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a pack's gradient."""
        loss.backward()  # type: ignore[no-untyped-call]

    def gradient_sizes(self) -> torch.Tensor:
        """[1] the norm of the whole gradient."""
        self._norm = gradient_norm(self._parameters.values())
        return self._norm[None]

    def clip_and_step(self) -> torch.Tensor:
        """One optimizer step; the gradient's norm before clipping, not read."""
        norm = gradient_norm(self._parameters.values()) if self._norm is None else self._norm
        clip_gradients(self._parameters.values(), self._max_grad_norm, norm)
        self._optimizer.step()
        self.drop_gradient()
        return norm

    def drop_gradient(self) -> None:
        """The gradients are gone without a step."""
        self._norm = None
        self._optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""
        set_lr(self._optimizer, lr)

    def trained(self) -> Trained | None:
        """Weights and moments on rank 0, which has them all; None elsewhere."""
        if not self._ranks.is_main:
            return None
        weights = {name: _on_cpu(parameter) for name, parameter in self._parameters.items()}
        moments = {
            f"{name}.{moment}": _on_cpu(self._optimizer.state[parameter].get(moment, torch.zeros_like(parameter)))
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }
        return Trained(weights, moments)

    def restore_moments(self, moments: Mapping[str, torch.Tensor], step: int) -> None:
        """Puts the optimizer where it was after `step` steps."""
        for name, parameter in self._parameters.items():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{moment: moments[f"{name}.{moment}"].to(parameter.device) for moment in MOMENTS},
            }

    def whole_model(self) -> AbstractContextManager[Any]:
        """Nothing to do."""
        return contextlib.nullcontext()


class ZeroEngine:
    """DeepSpeed ZeRO 1, 2 or 3 (Rajbhandari et al., 2020), stepped by hand.

    `Accelerator.backward` would clip and step by itself whenever it thinks that a step is over; here the plan knows.
    """

    def __init__(self, model: PackedModel, ranks: Ranks, settings: OptimConfig, launch: Launch) -> None:
        self._ranks = ranks
        self._parameters = model.lora_parameters
        self._stage = launch.zero_stage
        self._pack = Packs(model)
        optimizer = make_optimizer(parameter_groups(self._parameters, settings), settings)
        self._engine, _ = ranks.accelerator.prepare(model, optimizer)
        self._stepped = False  # the optimizer has moments to give

    def begin_step(self, packs: Sequence[Batch]) -> None:
        """Layers of stage 3 are gathered by all ranks together, so all must run the tower, or none."""
        if self._stage == 3:
            self._pack.all_or_none(packs, self._ranks)

    def __call__(self, pack: Batch) -> torch.Tensor:
        """The loss summed over one pack's targets, with a graph."""
        loss: torch.Tensor = self._engine(self._pack(pack))
        return loss

    def gradient_sync(self, *, last: bool) -> AbstractContextManager[Any]:
        """Tells DeepSpeed, which would count packs otherwise, whether this one ends the step."""
        self._engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a pack's gradient."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradient_sizes(self) -> torch.Tensor:
        """[any] norms of this rank's shares of the gradient, in DeepSpeed's buffers."""
        zero = self._engine.optimizer
        shares = [share for group in zero.averaged_gradients.values() for share in group or () if share is not None]
        flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else []
        shares += [share.grad for share in flat if share.grad is not None]  # where they are when the optimizer is offloaded
        return torch.stack([norm.to(self._ranks.device) for norm in torch._foreach_norm(shares)])

    def drop_gradient(self) -> None:
        """What DeepSpeed does itself where it finds that a gradient overflowed, which in bfloat16 it does not look for."""
        zero = self._engine.optimizer
        if self._stage == 3:
            zero._pre_step()
            zero._partition_all_parameters()
            zero._overflow_clean_up(None)
            return
        zero.micro_step_id = INITIAL_MICRO_STEP
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        for group in list(zero.averaged_gradients):
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None

    def clip_and_step(self) -> torch.Tensor:
        """One optimizer step, clipped by DeepSpeed to its `gradient_clipping`; the gradient's norm before."""
        self._engine.step()
        if not self._stepped and self._stage != 3:
            self._link_moments()  # DeepSpeed has, after its first group of parameters, when the others had none yet
        self._stepped = True
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self._ranks.device)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""
        set_lr(self._engine.optimizer, lr)

    def trained(self) -> Trained | None:
        """Weights and moments, gathered one by one; None on ranks other than 0."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        trained = Trained({}, {})
        for name, parameter in self._parameters.items():
            weight = safe_get_full_fp32_param(parameter)
            whole = {
                moment: safe_get_full_optimizer_state(parameter, moment) if self._stepped else torch.zeros_like(weight)
                for moment in MOMENTS
            }
            if self._ranks.is_main:
                trained.weights[name] = _on_cpu(weight)
                trained.moments.update({f"{name}.{moment}": _on_cpu(tensor) for moment, tensor in whole.items()})
        return trained if self._ranks.is_main else None

    def restore_moments(self, moments: Mapping[str, torch.Tensor], step: int) -> None:
        """Puts the optimizer where it was after `step` steps: this rank's share of it."""
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = self._engine.optimizer
        shares = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for share in shares:  # AdamW makes its state in the first step, which was taken before
            zero.optimizer.state[share] = {
                "step": torch.tensor(float(step), device=share.device),
                **{moment: torch.zeros_like(share) for moment in MOMENTS},
            }
        self._stepped = True
        if self._stage != 3:
            self._link_moments()
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                value = moments[f"{name}.{moment}"]
                if self._stage == 3:
                    self._set_share(parameter, value, moment)
                else:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)

    def _link_moments(self) -> None:
        """Tells each parameter of stage 1 or 2 where its moments are, as DeepSpeed does once a step was taken."""
        zero = self._engine.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()

    def _set_share(self, parameter: nn.Parameter, value: torch.Tensor, moment: str) -> None:
        """This rank's part of a moment. The last rank's may be padded, which DeepSpeed's own setter does not foresee."""
        from deepspeed.utils import safe_get_local_optimizer_state

        share = safe_get_local_optimizer_state(parameter, moment)
        whole = functional.pad(value.flatten(), (0, share.numel() * self._ranks.world_size - value.numel()))
        share.copy_(whole.narrow(0, share.numel() * self._ranks.rank, share.numel()))

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[None]:
        """Stage 3 gathers all parameters once, and its hooks, which gather layer by layer, are off."""
        if self._stage != 3:
            yield
            return
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(self._engine):
            yield


def num_values(parameter: nn.Parameter) -> int:
    """Entries of a parameter, however little of it this rank holds."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()
