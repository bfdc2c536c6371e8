"""One training step: from a batch to updated weights, with mixup, accumulation, autocast, an average of the weights, several ranks, or as a CUDA graph."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gclkern.distributed import ShardedCosineLinear, ShardedLinearGCLLoss
from gclkern.losses import DROLTLoss, GCLLoss, LinearGCLLoss
from gclkern.training.config import RunConfig
from gclkern.training.network import Network, shard_classifier, whole_state
from gclkern.training.processes import Processes
from gclkern.training.recipes import Phase, build_loss
from gclkern.training.seeds import derive_seed

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingStep(nn.Module):
    """From images to the loss, as one module: what is compiled, captured or run on several ranks."""

    loss: Any

    def __init__(self, network: Network, loss: nn.Module, *, trains: str, robust: DROLTLoss | None = None, robust_weight: float = 0.0) -> None:
        super().__init__()
        self.network, self.loss, self.robust = network, loss, robust
        self.trains, self.robust_weight = trains, robust_weight

    def _learning(self) -> list[nn.Module]:
        """The modules that learn."""
        head, backbone = self.network.head, self.network.backbone
        if self.trains != "last-block":
            return {"all": [self.network], "backbone": [backbone], "head": [head], "scale": [head]}[self.trains]
        if not isinstance(getattr(backbone, "layer4", None), nn.Module):
            raise ValueError(f"only torchvision's ResNets have a last block to train alone, {type(backbone).__name__} has not; take `train=all`")
        return [backbone.layer4, head]

    def learn(self) -> list[nn.Parameter]:
        """Set requires_grad as the phase wants it and return what learns. Epsilon of DRO-LT is among it, and so in the group that decays."""
        self.network.requires_grad_(False)
        for module in self._learning():
            for name, parameter in module.named_parameters():
                parameter.requires_grad_((name == "factor") is (self.trains == "scale"))
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> TrainingStep:
        """Parts that do not learn stay in eval mode: their batch normalisation would drift otherwise."""
        super().train(mode)
        self.network.eval()
        for module in self._learning():
            module.train(mode)
        return self

    def forward(
        self,
        images: Tensor,  # (N, C, H, W)
        target: Tensor,  # (N,)
        seed: Tensor,  # ()
        row_offset: int,
        target_b: Tensor | None = None,  # (N,)
        lam: Tensor | None = None,  # ()
        centroids: Tensor | None = None,  # (C, D)
        counts: Tensor | None = None,  # (C,)
    ) -> Tensor:
        with torch.set_grad_enabled(self.trains not in ("head", "scale") and torch.is_grad_enabled()):
            features = self.network.backbone(images)
        mixed: dict[str, Any] = {"target_b": target_b, "lam": lam}
        if isinstance(self.loss, ShardedLinearGCLLoss):
            row_offset -= self.loss.ranks.rank * len(target)  # it counts from the first process's samples
        if isinstance(self.loss, GCLLoss | LinearGCLLoss):
            mixed |= {"seed": seed, "row_offset": row_offset}
        if isinstance(self.loss, LinearGCLLoss):
            loss = self.loss(features, self.network.head.weight, target, **mixed)
        else:
            loss = self.loss(self.network.classify(features), target, **mixed)
        if self.robust is not None:
            assert centroids is not None
            loss = loss + self.robust_weight * self.robust(features, target, centroids, counts)
        return loss


def mixup(images: Tensor, target: Tensor, alpha: float, seed: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed images, their second targets and the share of the first (Zhang et al., ICLR 2018), a pure function of the seed and the block of the batch.

    The share is one number for the whole batch, Beta(alpha, alpha), as in the releases of MiSLAS and GCL, so all blocks of a seed have the same.
    """
    share = random.Random(seed).betavariate(alpha, alpha)
    order = torch.randperm(images.shape[0], generator=torch.Generator().manual_seed(derive_seed(seed, block)))
    if images.device.type == "cuda":
        order = order.pin_memory()  # else the copy would wait for the device
    order = order.to(images.device, non_blocking=True)
    return images.mul(share).add_(images[order], alpha=1 - share), target[order], torch.full((), share, device=images.device)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move an exponential average of the weights; it begins with a shorter memory, (1 + step) / (10 + step), to forget the initial weights."""
    decay = min(decay, (1 + step) / (10 + step))
    kept, new = ([*module.parameters(), *module.buffers()] for module in (average, network))
    moving = [(old, value) for old, value in zip(kept, new, strict=True) if old.is_floating_point()]
    torch._foreach_lerp_([old for old, _ in moving], [value for _, value in moving], 1 - decay)
    for old, value in zip(kept, new, strict=True):
        if not old.is_floating_point():
            old.copy_(value)


def parallel(module: TrainingStep) -> nn.Module:
    """The step with gradients averaged over the processes, but those of a classifier whose classes are spread over them: they are complete."""
    own = {"network.head.weight"} if isinstance(module.network.head, ShardedCosineLinear) else set()
    if not any(parameter.requires_grad for name, parameter in module.named_parameters() if name not in own):
        return module
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, own)
    return nn.parallel.DistributedDataParallel(module)


class CapturedStep:
    """Forward, backward and optimizer step as one CUDA graph: small networks are bound by the launch of their kernels, not by the kernels.

    The first calls run as they are, on a side stream, and are ordinary training steps; the next one captures. Shapes stay the same from call to call.

    The step comes with every call and is not kept: it belongs to a trainer that holds this object, and a circle of the two would outlive its phase, with all
    the memory of the graph, until Python's collector comes by, perhaps amid the next capture.
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
            # what other threads do is no part of the graph: one that pins the next batch's memory, as a loader's does, would end a capture that minds it
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.loss = run(**self.inputs)
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return self.loss.clone()


class Trainer:
    """The training steps of a phase: :class:`TrainingStep` with SGD (momentum 0.9) around it.

    Args:
        module: what computes the loss; its :meth:`TrainingStep.learn` says what is trained.
        processes: this process among all.
        weight_decay: of all that learns.
        mixup: alpha of the Beta distribution, 0 for none.
        accumulate: parts in which a batch is run.
        amp: torch.bfloat16 or torch.float16 for autocast, None for none.
        ema: decay of an average of the weights, 0 for none.
        compiled: whether torch.compile makes the step.
        capture: whether the step is a CUDA graph; None is where that is possible.
        channels_last: memory format of the images.

    Raises:
        ValueError: `capture` where it is not possible.
    """

    def __init__(
        self, module: TrainingStep, processes: Processes, *, weight_decay: float, mixup: float = 0.0, accumulate: int = 1, amp: torch.dtype | None = None,
        ema: float = 0.0, compiled: bool = False, capture: bool | None = None, channels_last: bool = False,
    ) -> None:  # fmt: skip
        device = processes.device
        possible = device.type == "cuda" and processes.world == 1 and accumulate == 1 and amp != torch.float16 and not compiled
        if capture and not possible:
            raise ValueError("`capture` needs a GPU, one process, `accumulate=1`, not `amp=fp16` and not `compile`; leave it out")
        capture = possible if capture is None else capture
        self.module, self.processes, self.channels_last = module, processes, channels_last
        self.mixup, self.accumulate, self.amp, self.ema = mixup, accumulate, amp, ema
        rate = torch.zeros((), device=device) if capture else 0.0  # a captured step reads the rate from the device
        # Not with a scaler: the fused kernel skips a step whose gradients overflow, as the first ones do, but its momentum then holds what the memory held.
        fused = device.type == "cuda" and amp != torch.float16
        self.optimizer = torch.optim.SGD(module.learn(), lr=rate, momentum=0.9, weight_decay=weight_decay, fused=fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        self.average = copy.deepcopy(module.network) if ema else None
        self.runnable: Any = parallel(module) if processes.world > 1 else module
        # The parts of a step add up on each process; only the last one's backward sends the gradients to the others.
        self.kept_here: Any = getattr(self.runnable, "no_sync", nullcontext)
        if compiled:
            self.runnable = torch.compile(self.runnable)
        self.captured = CapturedStep(self.optimizer) if capture else None

    def set_rate(self, rate: float) -> None:
        """The learning rate of the steps to come."""
        for group in self.optimizer.param_groups:
            # where a captured step reads it; the checkpoint of a run that was not captured has a number
            group["lr"] = rate if self.captured is None else torch.as_tensor(group["lr"], device=self.processes.device).fill_(rate)

    def step(self, images: Tensor, target: Tensor, seed: int, count: int, **centroids: Tensor) -> Tensor:
        """Train on this rank's images and return their loss: () float32. `seed` is for all that is random; `count` steps of the phase came before."""
        loss = torch.zeros((), device=self.processes.device)
        if self.captured is None:
            self.optimizer.zero_grad()
        for part in range(self.accumulate):
            # The draws of a step are dealt out to blocks in turn, so that two processes train as one does that accumulates two parts.
            block = part * self.processes.world + self.processes.rank
            torch.manual_seed(derive_seed(seed, "layers", block))  # for layers that draw, such as dropout
            inputs = {"images": images[part :: self.accumulate], "target": target[part :: self.accumulate], **centroids}
            if self.mixup:
                inputs["images"], inputs["target_b"], inputs["lam"] = mixup(inputs["images"], inputs["target"], self.mixup, seed, block)
            if self.channels_last:
                inputs["images"] = inputs["images"].contiguous(memory_format=torch.channels_last)
            inputs["seed"] = torch.full((), seed, device=self.processes.device)  # unlike torch.tensor it waits for nothing
            with self.kept_here() if part + 1 < self.accumulate else nullcontext():
                loss += self.captured(self._whole_step, **inputs) if self.captured else self._forward_backward(block * len(inputs["target"]), **inputs)
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
        """What is evaluated: the averaged network where there is one."""
        return self.module.network if self.average is None else self.average

    def _of_classes(self, optimizer: dict[str, Any], change: Callable[[ShardedCosineLinear, Tensor], Tensor]) -> dict[str, Any]:
        """An optimizer's state with what belongs to the weight of a sharded classifier changed; the state itself without one."""
        head = self.module.network.head
        place = next((i for i, parameter in enumerate(self.optimizer.param_groups[0]["params"]) if parameter is head.weight), None)
        if not isinstance(head, ShardedCosineLinear) or place not in optimizer["state"]:
            return optimizer
        changed = {name: change(head, value) for name, value in optimizer["state"][place].items()}
        return {**optimizer, "state": {**optimizer["state"], place: changed}}

    def state_dict(self) -> dict[str, Any]:
        """All but the network itself, with all classes; a collective call."""
        robust = self.module.robust
        optimizer = self._of_classes(self.optimizer.state_dict(), ShardedCosineLinear.gather)
        return {
            "optimizer": optimizer, "scaler": self.scaler.state_dict(), "robust": None if robust is None else robust.state_dict(),
            "average": None if self.average is None else whole_state(self.average),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(self._of_classes(state["optimizer"], lambda head, value: value[head.shards.mine]))
        for group in self.optimizer.param_groups:
            group["fused"] = self.optimizer.defaults["fused"]  # of this device; the run may have begun on another
        self.scaler.load_state_dict(state["scaler"])
        for module, name in ((self.module.robust, "robust"), (self.average, "average")):
            if module is not None:
                module.load_state_dict(state[name])


def build_trainer(phase: Phase, network: Network, class_counts: list[int], config: RunConfig, processes: Processes) -> Trainer:
    """The trainer of a phase. With `shard_classes` the network's classifier is spread over the processes.

    Raises:
        ValueError: a process would run fewer images at once than the network's batch normalisation can be trained on.
    """
    together = phase.batch_size // (processes.world * config.accumulate)
    if together < getattr(network.backbone, "fewest_images", 1) and phase.trains in ("all", "last-block", "backbone"):
        raise ValueError(
            f"{phase.name}: batch normalisation cannot be trained on {together} image, and at this image size the network has maps of a single pixel; "
            f"take a larger `batch_size`, a smaller `accumulate`, larger images or another `model`"
        )
    sharded = config.shard_classes and phase.loss == "gcl"
    if sharded:
        shard_classifier(network)
    loss: Any = build_loss(phase, class_counts, sharded=sharded).to(processes.device)
    network.scale.fill_(loss.scale)
    robust = DROLTLoss(class_counts).to(processes.device) if phase.robust else None
    return Trainer(
        TrainingStep(network, loss, trains=phase.trains, robust=robust, robust_weight=phase.robust), processes, weight_decay=phase.weight_decay,
        mixup=phase.mixup, accumulate=config.accumulate, amp=AMP[config.amp], ema=config.ema, compiled=config.compile, capture=config.capture,
        channels_last=config.channels_last,
    )  # fmt: skip
