"""The workers of a training run: who they are, their device, and how they share the model.

Own helpers instead of Ray's: those assume that a reserved GPU is a CUDA device, scale gradients
by the number of workers, and hide what is wrapped.
"""

import contextlib
import functools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor, distribute_tensor

from beit.mae import PixelLoss
from beit.objectives import Objective, TokenLoss
from beit.vit import Block
from pipelines.config import common
from pipelines.errors import InputError

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}

HEARTBEAT = 2.0
"""Seconds; stalls are told after 10 at the earliest."""

Result = TypeVar("Result")

# Moments of AdamW, and its own step count, as they are named in optimizer.state.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class World:
    """This worker among all workers. Without a process group it is the only one."""

    rank: int
    size: int
    device: torch.device
    in_ray: bool = False
    """Whether these are workers of Ray Train."""

    @property
    def grouped(self) -> bool:
        """Whether there is a process group (also for a group of one)."""
        return dist.is_available() and dist.is_initialized()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor on `device` over the workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: float) -> float:
        """The largest of the workers' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float32, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def broadcast(self, value: Any) -> Any:
        """The value of worker 0: JSON-like and small."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors (equal shape) of all workers, by rank."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def on_first(self, work: Callable[[], Result]) -> Result | None:
        """What `work` gives, done by worker 0; None for the others, who wait however long it takes.

        They hear of it every few seconds: a collective that lasts as long as `work` would be taken
        for a stall, and end them.
        """
        if self.size == 1:
            return work()
        if self.rank > 0:
            while self.broadcast(None):
                pass
            return None
        # Threads of torch are set for each thread, and figures must not depend on this one.
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(1, "first", torch.set_num_threads, (threads,)) as pool:
            future = pool.submit(work)
            while self.broadcast(bool(wait([future], HEARTBEAT).not_done)):
                pass
            return future.result()

    def barrier(self) -> None:
        """Waits for all workers."""
        if self.size > 1:
            self.sum(torch.zeros(1, device=self.device))


def check_device(scaling: common.ScalingConfig) -> None:
    """Refuses a GPU that this process was asked to train on and does not have.

    Raises:
        InputError: there is none.
    """
    here = scaling.worker_range[1] == 0
    if scaling.use_gpu and here and not torch.cuda.is_available():
        raise InputError(
            f"scaling.use_gpu = True: torch {torch.__version__} finds no CUDA device on this "
            "machine; install a CUDA build of torch, or pass --scaling.use_gpu false"
        )


def join_world(*, use_gpu: bool, in_ray: bool) -> World:
    """This process's place; in a Ray Train worker the process group exists already.

    Raises:
        InputError: a GPU that Ray counts (a CPU build of torch, no driver) is none.
    """
    device = torch.device("cpu")
    if use_gpu and in_ray and not torch.cuda.is_available():
        raise InputError(
            f"scaling.use_gpu = True: torch {torch.__version__} on node {platform.node()} finds no "
            "CUDA device, although Ray counts GPUs there; install a CUDA build of torch, or start "
            "Ray there with --num-gpus 0"
        )
    if use_gpu and torch.cuda.is_available():
        index = 0
        if in_ray:
            from ray.train.torch import get_device

            index = get_device().index or 0
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if not in_ray:
        return World(rank=0, size=1, device=device)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device, in_ray=True)


def resolve_precision(scaling: common.ScalingConfig, world: World) -> str:
    """float32, bf16 or fp16, equal on all workers: `auto` looks at what their devices have."""
    if scaling.precision != "auto":
        return scaling.precision
    if world.device.type != "cuda":
        return "float32"
    lacks_bf16 = not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp16" if world.largest(lacks_bf16) else "bf16"


def autocast(world: World, precision: str) -> torch.autocast:
    """Computes what is inside in `precision`, as far as it bears that."""
    low = LOW_PRECISION.get(precision)
    return torch.autocast(world.device.type, low, enabled=low is not None)


def wrap_model(
    model: nn.Module, world: World, *, strategy: str, compiled: bool, precision: str = "float32"
) -> nn.Module:
    """The model as training calls it: DDP, FSDP2, or itself; compiled first if asked for.

    Gradients are summed over workers, not averaged: the loss is already a share of the global
    mean. With FSDP2 the parameters of `model.network` become sharded, and blocks are gathered in
    `precision` (see `autocast`).
    """
    if compiled:
        _compile(model)
    if strategy == "fsdp":
        _shard(model.get_submodule("network"), world, precision)
        return model
    if not world.grouped:
        return model
    wrapped = nn.parallel.DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    if world.device.type == "cpu" and world.size > 2:
        wrapped.register_comm_hook(world.size, _sum_in_rank_order)
    else:
        wrapped.register_comm_hook(None, _sum)
    return wrapped


def _compile(model: nn.Module) -> None:
    """By block, and the loss; or whole where there is no block.

    Of a network compiled whole the first gradient is ready when the last is: nothing would be left
    to exchange them beside. Blocks of one kind share their compiled code.
    """
    pieces = (Block, TokenLoss, PixelLoss)
    parts: list[nn.Module] = [part for part in model.modules() if isinstance(part, pieces)]
    for part in parts or [model]:
        part.compile()


def _sum(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return cast(
        "torch.futures.Future[Tensor]", work.get_future().then(lambda done: done.value()[0])
    )


def _sum_in_rank_order(size: int, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """A sum whose rounding does not depend on how gradients fall into buckets.

    Gloo's ring adds each chunk in another order, and DDP arranges the buckets anew after its first
    step, so with three or more workers a resumed run would round differently.
    """
    buffer = bucket.buffer()
    parts = [torch.empty_like(buffer) for _ in range(size)]
    work = dist.all_gather(parts, buffer, async_op=True)
    return cast(
        "torch.futures.Future[Tensor]",
        work.get_future().then(lambda _: functools.reduce(torch.add, parts)),
    )


def _shard(network: nn.Module, world: World, precision: str) -> None:
    """In bf16, weights of blocks are gathered as autocast would round them: half of the traffic.

    Shards are float32, and so are gradients when they are summed, and what enters a block. In fp16
    the gradients of what is small (layer scale) would overflow sooner than those of matrices.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in [module for module in network.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        if precision == "bf16":
            block.register_forward_pre_hook(_in_float32)
    fully_shard(network, mesh=mesh)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def _in_float32(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What enters a block. Patches of autocast are bf16, and small weights no longer widen them."""
    return args[0].float(), *args[1:]


@contextlib.contextmanager
def unsharded(objective: Objective, spare: Objective | None) -> Iterator[Objective]:
    """The objective for probes and pictures: itself, or, where it is sharded, `spare`.

    That is a copy, made before sharding; it gets all weights, in float32, and is on the device for
    as long as this lasts. All workers must enter.
    """
    if spare is None:
        yield objective
        return
    spare.to(next(objective.parameters()).device)
    with torch.no_grad():
        for mine, sharded in zip(spare.parameters(), objective.parameters(), strict=True):
            mine.copy_(whole(sharded))
    yield spare
    spare.cpu()


def without_sync(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch: gradients are exchanged after the last one only."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        return cast("AbstractContextManager[None]", model.no_sync())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last, recurse=False)
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with nothing sharded; all workers must call it for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of model and optimizer state on the CPU, by parameter name.

    All workers call it (sharded tensors are collected); those with `keep` false get nothing. The
    optimizer's entries are named `exp_avg.blocks.0.mlp.fc1.weight` and so on.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        _copy(parameter, name, weights if keep else None)
        for moment, value in sorted(optimizer.state[parameter].items()):
            _copy(value, f"{moment}.{name}", moments if keep else None)
    # Every worker must take the same path here: collecting a sharded tensor is a rendezvous.
    names = {name for name, _ in model.named_parameters()}
    for name, buffer in model.state_dict().items():
        if name not in names:
            _copy(buffer, name, weights if keep else None)
    return weights, moments


def _copy(tensor: Tensor, name: str, into: dict[str, Tensor] | None) -> None:
    full = whole(tensor.detach())
    if into is not None:
        into[name] = full.to("cpu", copy=True).contiguous()


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> None:
    """Takes over what `snapshot` gave, whatever the number of workers then and now.

    Raises:
        KeyError: a tensor is missing.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_like(weights[name], parameter))
            state: dict[str, Tensor] = {}
            for moment in MOMENTS:
                key = f"{moment}.{name}"
                if key not in moments:  # a checkpoint of step 0 has none
                    continue
                value = moments[key]
                state[moment] = (
                    value.to(parameter.device)
                    if moment == "step"
                    else _like(value, parameter).clone()
                )
            optimizer.state[parameter] = state
        buffers = dict(model.named_buffers())
        for name in weights.keys() & buffers.keys():
            buffers[name].copy_(weights[name])


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return value


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Scales the gradients to norm `limit`; returns the norm before, on the device, unsynced."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
