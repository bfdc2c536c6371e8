"""One training step: from a batch to updated weights, with mixup, accumulation, autocast, an average of the weights, several ranks, or as a CUDA graph."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gclkern.distributed import ShardedCosineLinear
from gclkern.training.backbones import last_block
from gclkern.training.config import RunConfig
from gclkern.training.network import Network, shard_classifier, whole_state
from gclkern.training.objectives import Batch, Objective, Samples, build_objective
from gclkern.training.processes import Processes
from gclkern.training.recipes import FUSED, Phase
from gclkern.training.running_statistics import RunningStatistics
from gclkern.training.seeds import derive_seed

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


# Which kinds of a classifier's parameters are trained, for those values of `Phase.trains` that are parts of it; for the others, the weights.
_OF_HEAD = {"scale": {"scale"}, "head-and-scale": {"weights", "scale"}, "calibration": {"calibration"}}


def _kind(name: str) -> str:
    """The kind of a trained module's parameter."""
    return "scale" if name == "factor" else "calibration" if name.startswith("calibration.") else "weights"


class TrainingStep(nn.Module):
    """Samples to loss as one module, so that it can be compiled, captured or wrapped for data parallelism. It decides what is trained, and in which mode.

    Args:
        network: its parameters train as `trains` says; those of the objective always do, with weight decay.
        objective: computes the loss.
        trains, batch_norm: as in :class:`gclkern.training.recipes.Phase`.
    """

    def __init__(self, network: Network, objective: Objective, *, trains: str = "all", batch_norm: str = "train") -> None:
        super().__init__()
        self.network, self.objective = network, objective
        self.trains, self.batch_norm = trains, batch_norm

    def _learning(self) -> list[nn.Module]:
        """The trained modules."""
        head, backbone = self.network.head, self.network.backbone
        match self.trains:
            case "all":
                return [self.network]
            case "backbone":
                return [backbone]
            case "last-block" | "new-last-block":
                return [last_block(backbone), head]
            case "embedding":
                return [backbone.embedding, backbone.attention, head]
        assert self.trains in ("head", *_OF_HEAD), self.trains
        return [head]

    def learn(self, lr_factors: Mapping[str, float] = MappingProxyType({})) -> list[dict[str, Any]]:
        """Set requires_grad for the phase and return the trained parameters as an optimizer's groups, each with the factor on its learning rate.

        Args:
            lr_factors: factors by the beginning of a parameter's name here, such as "network.head.weight"; all others have 1.
        """
        self.network.requires_grad_(False)
        for module in self._learning():
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(_kind(name) in _OF_HEAD.get(self.trains, {"weights"}))
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                factor = next((factor for start, factor in lr_factors.items() if name.startswith(start)), 1.0)
                groups.setdefault(factor, []).append(parameter)
        return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]

    def train(self, mode: bool = True) -> TrainingStep:
        """Modules that are not trained stay in eval mode, because their batch-norm statistics would change; `batch_norm` makes exceptions."""
        super().train(mode)
        self.network.eval()
        for module in self._learning():
            module.train(mode)
        if self.batch_norm != "train":
            for module in (last_block(self.network.backbone) if self.batch_norm == "shifted-last-block" else self.network.backbone).modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train(mode and self.batch_norm != "frozen")
        return self

    def forward(self, row_offset: int, **samples: Tensor) -> Tensor:
        """The loss; `samples` are the other fields of :class:`gclkern.training.objectives.Batch`."""
        loss: Tensor = self.objective(self.network, Batch(row_offset=row_offset, **samples))
        return loss


def mixup(images: Tensor, target: Tensor, alpha: float, seed: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed images, second targets and the weight of the first (Zhang et al., ICLR 2018), as a pure function of the seed and the block of the batch.

    The weight is one number for the whole batch, from Beta(alpha, alpha), as in the releases of MiSLAS and GCL, so all blocks of a seed have the same.
    """
    share = random.Random(seed).betavariate(alpha, alpha)
    order = torch.randperm(images.shape[0], generator=torch.Generator().manual_seed(derive_seed(seed, block)))
    if images.device.type == "cuda":
        order = order.pin_memory()  # else the copy would wait for the device
    order = order.to(images.device, non_blocking=True)
    return images.mul(share).add_(images[order], alpha=1 - share), target[order], torch.full((), share, device=images.device)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move an exponential average of the weights; the decay starts lower, at (1 + step) / (10 + step), to forget the initial weights."""
    decay = min(decay, (1 + step) / (10 + step))
    kept, new = ([*module.parameters(), *module.buffers()] for module in (average, network))
    moving = [(old, value) for old, value in zip(kept, new, strict=True) if old.is_floating_point()]
    torch._foreach_lerp_([old for old, _ in moving], [value for _, value in moving], 1 - decay)
    for old, value in zip(kept, new, strict=True):
        if not old.is_floating_point():
            old.copy_(value)


def parallel(module: TrainingStep) -> nn.Module:
    """The step with gradients averaged over the processes, except those of a sharded classifier, which are complete on their process."""
    own = {"network.head.weight"} if isinstance(module.network.head, ShardedCosineLinear) else set()
    if not any(parameter.requires_grad for name, parameter in module.named_parameters() if name not in own):
        return module
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, own)
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)  # RunningStatistics makes them equal


class CapturedStep:
    """Forward, backward and optimizer step as one CUDA graph: for small networks the launches of kernels take longer than the kernels.

    The first calls are ordinary training steps on a side stream; the next one captures. Shapes must not change between calls.

    The step is an argument of every call and is not stored: it belongs to a trainer that holds this object, and the reference cycle would keep the memory of
    the graph alive after its phase, until Python's garbage collector runs, perhaps during the next capture.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int = 3) -> None:
        self.optimizer, self.warmup = optimizer, warmup
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, Tensor] = {}
        self.loss: Tensor

    def __call__(self, run: Callable[..., Tensor], **inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.warmup:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = run(**inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return loss
        if self.graph is None:
            self.inputs = {name: value.clone() for name, value in inputs.items()}
            self.optimizer.zero_grad(set_to_none=True)
            self.graph = torch.cuda.CUDAGraph()
            # not the global mode: in it a data loader's thread that pins memory would abort the capture
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.loss = run(**self.inputs)
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return self.loss.clone()


class Trainer:
    """The training steps of a phase: :class:`TrainingStep` with SGD (momentum 0.9) around it.

    Args:
        module: computes the loss; its :meth:`TrainingStep.learn` selects the trained parameters.
        processes: this process among all.
        weight_decay, nesterov: of SGD, for all trained parameters.
        lr_factors: factors on the learning rate of some parameters, see :meth:`TrainingStep.learn`.
        mixup: alpha of the Beta distribution, 0 for none.
        accumulate: number of parts that a batch is split into.
        amp: torch.bfloat16 or torch.float16 for autocast, None for none.
        ema: decay of an average of the weights, 0 for none.
        compiled: whether to compile the step with torch.compile.
        capture: whether to run the step as a CUDA graph; None does where it is possible.
        channels_last: memory format of the images.

    Raises:
        ValueError: `capture` where it is not possible.
    """

    def __init__(
        self, module: TrainingStep, processes: Processes, *, weight_decay: float, nesterov: bool = False,
        lr_factors: Mapping[str, float] = MappingProxyType({}), mixup: float = 0.0, accumulate: int = 1, amp: torch.dtype | None = None,
        ema: float = 0.0, compiled: bool = False, capture: bool | None = None, channels_last: bool = False,
    ) -> None:  # fmt: skip
        device = processes.device
        possible = device.type == "cuda" and processes.world == 1 and accumulate == 1 and amp != torch.float16 and not compiled
        if capture and not possible:
            raise ValueError("`capture` needs a GPU, one process, `accumulate=1`, not `amp=fp16` and not `compile`; leave it out")
        capture = possible if capture is None else capture
        self.module, self.processes, self.channels_last = module, processes, channels_last
        self.mixup, self.accumulate, self.amp, self.ema = mixup, accumulate, amp, ema
        groups = module.learn(lr_factors)
        for group in groups:
            group["lr"] = torch.zeros((), device=device) if capture else 0.0  # a captured step reads the rate from the device
        # Not with a gradient scaler: on overflow, common in the first steps, the fused kernel skips the step but leaves the momentum buffer uninitialised.
        fused = device.type == "cuda" and amp != torch.float16
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay, nesterov=nesterov, fused=fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        self.average = copy.deepcopy(module.network) if ema else None
        self.runnable: Any = parallel(module) if processes.world > 1 else module
        # Gradients of the parts add up on each process; only the backward pass of the last part sends them to the others.
        self.no_sync: Any = getattr(self.runnable, "no_sync", nullcontext)
        if compiled:
            self.runnable = torch.compile(self.runnable)
        self.captured = CapturedStep(self.optimizer) if capture else None
        self.statistics = RunningStatistics(module.network, processes, accumulate)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self.optimizer.param_groups:
            own = rate * group["factor"]
            # a captured step reads this tensor; the checkpoint of a run without capture holds a number
            group["lr"] = own if self.captured is None else torch.as_tensor(group["lr"], device=self.processes.device).fill_(own)

    def step(self, samples: Samples, seed: int, count: int, **centroids: Tensor) -> Tensor:
        """Train on this process's samples and return their loss: () float32. All randomness depends on `seed`; `count` steps of the phase came before."""
        loss = torch.zeros((), device=self.processes.device)
        if self.captured is None:
            self.optimizer.zero_grad()
        self.statistics.begin_step()
        for part in range(self.accumulate):
            # Samples of a step are assigned to blocks in turn, so that two processes train as one process that accumulates two parts.
            block = part * self.processes.world + self.processes.rank
            torch.manual_seed(derive_seed(seed, "layers", block))  # for layers that draw, such as dropout
            inputs: dict[str, Tensor] = {name: value[part :: self.accumulate] for name, value in samples.items()}  # type: ignore[index]
            if self.mixup:
                inputs["images"], inputs["target_b"], inputs["lam"] = mixup(inputs["images"], inputs["target"], self.mixup, seed, block)
            if self.channels_last:
                inputs |= {name: value.contiguous(memory_format=torch.channels_last) for name, value in inputs.items() if value.dim() == 4}
            inputs |= centroids
            inputs["seed"] = torch.full((), seed, device=self.processes.device)  # unlike torch.tensor, this does not synchronise with the GPU
            with self.no_sync() if part + 1 < self.accumulate else nullcontext():
                loss += self.captured(self._whole_step, **inputs) if self.captured else self._forward_backward(block * len(inputs["target"]), **inputs)
            self.statistics.end_part()
        self.statistics.end_step()
        if self.captured is None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.average is not None:
            update_average(self.average, self.module.network, self.ema, count)
        return loss

    def _forward_backward(self, row_offset: int, **inputs: Tensor) -> Tensor:
        with torch.autocast(self.processes.device.type, dtype=self.amp, enabled=self.amp is not None, cache_enabled=self.captured is None):
            loss: Tensor = self.runnable(row_offset=row_offset, **inputs) / self.accumulate
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _whole_step(self, **inputs: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self._forward_backward(0, **inputs)
        self.optimizer.step()
        return loss

    @property
    def eval_network(self) -> Network:
        """The network to evaluate: the averaged one where there is one."""
        return self.module.network if self.average is None else self.average

    def _of_classes(self, optimizer: dict[str, Any], change: Callable[[ShardedCosineLinear, Tensor], Tensor]) -> dict[str, Any]:
        """An optimizer's state with `change` applied to the entries of a sharded classifier's weight; unchanged without one."""
        head = self.module.network.head
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        place = next((i for i, parameter in enumerate(parameters) if parameter is head.weight), None)
        if not isinstance(head, ShardedCosineLinear) or place not in optimizer["state"]:
            return optimizer
        changed = {name: change(head, value) for name, value in optimizer["state"][place].items()}
        return {**optimizer, "state": {**optimizer["state"], place: changed}}

    def state_dict(self) -> dict[str, Any]:
        """The state of everything but the network, with the sharded parts gathered; a collective call."""
        optimizer = self._of_classes(self.optimizer.state_dict(), ShardedCosineLinear.gather)
        return {
            "optimizer": optimizer, "scaler": self.scaler.state_dict(), "objective": self.module.objective.state_dict(),
            "average": None if self.average is None else whole_state(self.average),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(self._of_classes(state["optimizer"], lambda head, value: value[head.shards.mine]))
        for group in self.optimizer.param_groups:
            group["fused"] = self.optimizer.defaults["fused"]  # this device's; the run may have started on another
        self.scaler.load_state_dict(state["scaler"])
        self.module.objective.load_state_dict(state["objective"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def build_trainer(phase: Phase, network: Network, class_counts: list[int], config: RunConfig, processes: Processes) -> Trainer:
    """The trainer of a phase. With `shard_classes` the network's classifier is spread over the processes."""
    sharded = config.shard_classes and phase.loss in FUSED
    if sharded:
        shard_classifier(network)
    torch.manual_seed(derive_seed(config.seed, phase.name, "objective"))  # for the initial weights of its layers
    objective = build_objective(phase, class_counts, network.backbone.feature_dim, sharded=sharded).to(processes.device)
    network.scale.fill_(objective.scale)
    return Trainer(
        TrainingStep(network, objective, trains=phase.trains, batch_norm=phase.batch_norm), processes, weight_decay=phase.weight_decay,
        nesterov=phase.nesterov, lr_factors=phase.lr_factors, mixup=phase.mixup, accumulate=config.accumulate, amp=AMP[config.amp], ema=config.ema,
        compiled=config.compile, capture=config.capture, channels_last=config.channels_last,
    )  # fmt: skip
