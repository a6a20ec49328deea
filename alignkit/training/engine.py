"""DeepSpeed, and nothing else, happens here: processes, optimizers, backward with the right divisor, reductions.

Losses arrive as sums and counts. `Engine.backward` divides by the count of the whole optimizer step over all ranks
and undoes DeepSpeed's mean over ranks, so neither the micro-batch size nor the number of ranks changes the objective.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import InputError, RunError
from alignkit.core.fields import num
from alignkit.core.types import Loss, Metrics
from alignkit.training import kernels, rendezvous
from alignkit.training.zero import ZeRO

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass
class Optimizer:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = num(1e-4, gt=0, le=1)  # at the end of the warm-up
    betas: tuple[float, float] = num((0.9, 0.999), ge=0, lt=1)  # of the running means of gradient and square
    eps: float = num(1e-5, gt=0)  # as in lm-human-preferences and its successors; 1e-8 is torch's default
    weight_decay: float = num(0.0, ge=0)
    max_grad_norm: float = num(1.0, ge=0)  # clip the gradient norm here; 0: do not clip
    schedule: str = "linear"  # linear (to 0) | cosine (to 0) | constant
    warmup_steps: int = num(0, ge=0)  # optimizer-schedule steps from 0 to learning_rate

    def factor(self, step: int, total: int) -> float:
        """Learning-rate factor of the update `step` (from 0) of `total`: 1 - step/total when linear, never 0."""
        import math

        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        if self.schedule == "constant":
            return 1.0
        return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """torch's AdamW over `parameters`."""
        import torch

        return torch.optim.AdamW(
            parameters, lr=self.learning_rate, betas=tuple(self.betas), eps=self.eps, weight_decay=self.weight_decay
        )

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "cosine", "constant"):
            raise InputError(f"optimizer.schedule={self.schedule!r}: expected linear, cosine or constant")
        if len(self.betas) != 2:
            raise InputError(f"optimizer.betas={list(self.betas)}: expected two numbers, as [0.9,0.999]")


@dataclass
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, element by element; the argument is left as it is."""
        import torch.distributed as dist

        result = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(result)
        return result

    def gather(self, item: Any) -> list[Any]:
        """One picklable object a rank, in rank order, on every rank."""
        import torch.distributed as dist

        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        """Wait for every rank."""
        import torch.distributed as dist

        if self.size > 1:
            dist.barrier()

    def reduce_metrics(self, metrics: Metrics) -> dict[str, float]:
        """{name: (sum, count)} of this rank -> {name: mean over all ranks}, one collective for all names.

        A name that ends in `_max` is reduced by maximum instead; its count is ignored. A name with a global count
        of 0 is nan. Every rank must bring the same names.
        """
        import torch
        import torch.distributed as dist

        names = sorted(metrics)
        rows = [[float(x) for x in metrics[name]] for name in names]
        pairs = torch.tensor(rows, dtype=torch.float64, device=self.device).reshape(-1, 2)
        top = pairs[:, 0].clone()
        pairs = self.sum(pairs)
        if self.size > 1 and names:
            dist.all_reduce(top, op=dist.ReduceOp.MAX)
        means = pairs[:, 0] / pairs[:, 1]
        return {n: float(top[i] if n.endswith("_max") else means[i]) for i, n in enumerate(names)}


def start(note: Callable[[str], None] = print) -> World:
    """Join the process group that the launcher described in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    `note`: tells the person who waits.
    """
    root = kernels.folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)  # before DeepSpeed is imported
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    cuda = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        local_rank = rendezvous.own_device(local_rank, torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed, accelerate and vLLM take the device of that number
        torch.cuda.set_device(local_rank)
    size = int(os.environ["WORLD_SIZE"])
    if size == 1:  # nothing is reduced: its kernel is neither built nor waited for
        deepspeed.ops.__compatible_ops__[kernels.SHARED_MEMORY] = False
    device = torch.device(get_accelerator().device_name(local_rank) if cuda else "cpu")
    with kernels.telling(root, note):
        if size > 1 and not cuda and deepspeed.ops.__compatible_ops__.get(kernels.SHARED_MEMORY):
            builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
            type(builder)._loaded_ops[builder.name] = kernels.load(root, builder.name, kernels.versions(), builder.load)
        rendezvous.join("nccl" if cuda else "gloo", device if cuda else None, note)
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    torch.distributed.barrier()  # every rank has opened the buffers of all: their names are not needed any more
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_{local_rank}"):
        buffer.unlink(missing_ok=True)  # DeepSpeed leaves 64 MiB of memory a rank behind otherwise
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), local_rank, device)


def stop() -> None:
    """Leave the process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


FIELDS = ("param", "exp_avg", "exp_avg_sq", "step")  # of a parameter, in AdamW


class Engine:
    """One optimizer over some parameters of a module that several engines may share."""

    def __init__(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        optimizer: Optimizer,
        zero: ZeRO,
        world: World,
        *,
        dtype: str,
        micro_batch_size: int,
        updates: int,
    ) -> None:
        """`updates`: how often `next_update` will be called, the length of the learning-rate schedule.

        Brings `module` to this rank's device; ZeRO-3 cuts all its parameters up, see `shard`.

        Raises:
            RunError: nothing to train.
        """
        import deepspeed

        if not parameters:
            raise RunError("no trainable parameters: the optimizer would be empty")
        config = zero.config(
            dtype=dtype,
            micro_batch_size=micro_batch_size,
            world=world.size,
            accumulation=1,
            max_grad_norm=optimizer.max_grad_norm,
        )
        self.schedule, self.world, self.updates, self.update = optimizer, world, updates, 0
        self.trained = parameters
        self.shards = shard(module, config, dtype) if zero.stage == 3 else None
        module.to(world.device)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=_only(parameters, module),
            optimizer=optimizer.build(parameters),
            model_parameters=parameters,
            config=config,
            dist_init_required=False,
        )
        self._set_learning_rate()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A training forward."""
        return self.engine(*args, **kwargs)

    def backward(self, losses: list[tuple[Loss, float]], last: bool) -> None:
        """Accumulate the gradient of the sum of `loss.total / count`.

        Args:
            losses: (loss, count): the sum over this micro-batch on this rank, and how many tokens (or sequences) the
                whole optimizer step sums over, on all ranks.
            last: whether this is the step's last micro-batch on this rank.

        DeepSpeed averages gradients over ranks; multiplying by the world size makes it a sum
        (Σ_local l / N · world, mean over world = Σ_global l / N).
        """
        total = sum(loss.total * (self.world.size / max(count, 1.0)) for loss, count in losses)
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(total, scale_wrt_gas=False)
        if self.shards is not None:  # blocks whose inputs need no gradient do not let go of their weights by themselves
            self.shards.release_backward_leftovers()

    def step(self) -> float:
        """One optimizer step; the gradient norm before clipping."""
        import torch

        norm = None
        if not self.engine.zero_optimization():  # DeepSpeed tells none
            grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def discard(self) -> None:
        """Forget the gradient accumulated since the last step, as DeepSpeed does after an overflow."""
        self.engine.zero_grad()
        self.engine.optimizer.zero_grad()
        for group in getattr(self.engine.optimizer, "averaged_gradients", {}):
            self.engine.optimizer.averaged_gradients[group] = None
        if self.shards is None and hasattr(self.engine.optimizer, "micro_step_id"):
            # Or gradients on the host would be added to; stage 3 has set its own to 0 by now.
            self.engine.optimizer.micro_step_id = -1

    def next_update(self) -> None:
        """Move the learning-rate schedule by one rollout round in which this engine learned (not by one optimizer step)."""
        self.at_update(self.update + 1)

    def at_update(self, update: int) -> None:
        """Set the schedule to the rate after so many rounds."""
        self.update = update
        self._set_learning_rate()

    def save(self, folder: Path) -> None:
        """Whole float32 weights and Adam moments, a file a field, whatever the ZeRO stage; called by every rank.

        DeepSpeed's own checkpoints are pickles of each rank's shard. Its universal checkpoint, which turns them into whole
        tensors, takes none of stage 0. These are the tensors that it would make, read with DeepSpeed's accessors.
        Rank 0 holds one field in host memory at a time.
        """
        from safetensors.torch import save_file

        for field in FIELDS:
            tensors = {str(i): found for i in range(len(self.trained)) if (found := self._get(i, field)) is not None}
            if self.world.rank == 0:
                folder.mkdir(exist_ok=True)
                save_file(tensors, folder / f"{field}.safetensors")

    def load(self, folder: Path, update: int) -> None:
        """Put back what `save` wrote, by any number of ranks, at the `update` of the schedule."""
        import torch
        from safetensors.torch import load_file

        saved = {field: load_file(folder / f"{field}.safetensors") for field in FIELDS}
        sharded = self.engine.zero_optimization()
        inner = self._torch_optimizer()
        masters = [p for group in inner.param_groups for p in group["params"]]
        for i, master in enumerate(masters):  # sharded: one flat tensor a group
            steps = next(iter(saved["step"].values()), None) if sharded else saved["step"].get(str(i))
            if steps is not None:
                inner.state[master] = {f: torch.zeros_like(master) for f in FIELDS[1:3]} | {"step": steps.clone()}
        if sharded and inner.state:
            self.optimizer._lazy_init_hp_params_optimizer_state()
        for field in FIELDS[:3]:
            for i, value in saved[field].items():
                self._set(int(i), field, value.to(self.world.device))
        self.at_update(update)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """torch's own optimizer inside DeepSpeed's."""
        import torch

        found = self.optimizer
        while not isinstance(found, torch.optim.Optimizer):
            found = found.optimizer
        return found

    def _get(self, i: int, field: str) -> Tensor | None:
        """`field` of the i-th parameter, whole and on the host; None where no step was taken yet. A collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        inner = self._torch_optimizer()
        if not self.engine.zero_optimization():
            master = [p for group in inner.param_groups for p in group["params"]][i]
            found = master if field == "param" else inner.state[master].get(field) if master in inner.state else None
        elif field == "param":
            found = safe_get_full_fp32_param(self.trained[i])
        elif field == "step":
            found = next((state["step"] for state in inner.state.values()), None)
        else:
            found = safe_get_full_optimizer_state(self.trained[i], field) if inner.state else None
        return None if found is None else found.detach().cpu().clone()

    def _set(self, i: int, field: str, value: Tensor) -> None:
        """Overwrite `field` of the i-th parameter, on this rank's share of it."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        inner = self._torch_optimizer()
        if not self.engine.zero_optimization():
            master = [p for group in inner.param_groups for p in group["params"]][i]
            (master.data if field == "param" else inner.state[master][field]).copy_(value)
        elif field == "param":
            safe_set_full_fp32_param(self.trained[i], value)
        else:
            safe_set_full_optimizer_state(self.trained[i], value, field)
        if field == "param":
            self.trained[i].data.copy_(value)

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _set_learning_rate(self) -> None:
        rate = self.schedule.learning_rate * self.schedule.factor(min(self.update, self.updates - 1), self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def shard(module: nn.Module, config: dict, dtype: str) -> Any:
    """Cut every parameter of `module` up among the ranks; a layer's are gathered for its forward and its backward.

    DeepSpeed's engine for inference does it, on the module itself: each role's forward, with gradients or without,
    gathers what it meets. The optimizers are made afterwards, each over its own parameters, which are cut by then.
    DeepSpeed's order of layers is never recorded (its root is not called): roles take turns, so there is no one order.
    Every rank must run as many forwards of the same roles as the others.

    Returns:
        DeepSpeed's keeper of the parts; the same one for the same module.
    """
    import deepspeed
    import torch
    from torch import nn

    if not hasattr(module, "shards"):
        root = nn.Module()
        root.whole = module
        for parameter in module.parameters():
            if parameter.requires_grad:  # DeepSpeed casts no parameter that is cut already
                parameter.data = parameter.data.to(getattr(torch, dtype))
        plain = config | {"bf16": {"enabled": False}}  # frozen heads keep their float32
        deepspeed.zero.Init(module=module, config_dict_or_path=plain)  # one parameter after the other to the device
        module.shards = deepspeed.initialize(model=root, config=plain, dist_init_required=False)[0].optimizer
    return module.shards


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Inside, every parameter of the modules is whole on every rank, also where ZeRO-3 has cut it up. Called by all ranks;
    no forward may run inside."""
    cut = [p for module in modules for p in module.parameters() if hasattr(p, "ds_id")]
    if not cut:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(cut):
        yield


@contextmanager
def recomputed(module: nn.Module, on: bool) -> Iterator[None]:
    """Inside, where `on`, the blocks of all transformers models in `module` keep their inputs only and are computed again
    in backward. They do so in training mode alone, which changes nothing else in a model without dropout."""
    hfs = [part for part in module.modules() if on and hasattr(part, "gradient_checkpointing_enable")]
    for hf in hfs:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    training = module.training
    module.train(on or training)
    try:
        yield
    finally:
        module.train(training)
        for hf in hfs:
            hf.gradient_checkpointing_disable()


def _only(parameters: list[nn.Parameter], module: nn.Module) -> nn.Module:
    """`module` as DeepSpeed sees it: with these parameters and no others, so that engines over one module do not cast,
    clip, reduce or clear what belongs to another."""
    from torch import nn

    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trained = nn.ParameterList(parameters)
            self.whole = [module]  # in a list: not a submodule

        def forward(self, *args, **kwargs):
            return self.whole[0](*args, **kwargs)

    return View()
