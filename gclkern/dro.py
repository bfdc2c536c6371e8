"""The DRO-LT bound (Samuel and Chechik, Distributional Robustness Loss for Long-tail Learning, ICCV 2021): torch operators, function and module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gclkern.autograd import without_autocast
from gclkern.backend import BACKENDS, resolve_backend
from gclkern.counts import Vector, check_class_counts, device_of
from gclkern.debug import values_may_be_read
from gclkern.kernels.terms import refuse_second_derivative
from gclkern.precision import PreciseBuffers
from gclkern.validation import REDUCTIONS, check_choice, check_matrix, check_number, check_same_device, check_target, class_vector, refuse_gradient

_INITIAL_EPSILON = 0.5


def dro_lt_loss(
    features: Tensor,  # (N, D)
    target: Tensor,  # (N,)
    centroids: Tensor,  # (C, D)
    epsilon: Tensor | float,  # (), (C,)
    *,
    temperature: float = 1.0,
    class_weight: Tensor | None = None,  # (C,)
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""The DRO-LT bound: each class centroid mu_c should find the samples of its class nearest, out to a distance of 2 epsilon_c (ICCV 2021).

    The softmax runs over the SAMPLES of the batch B, with y_j the class of sample j:

        l_cj   = -(\|mu_c - z_j\|_2 + 2 epsilon_c [y_j == c]) / temperature
        loss_c = mean over i in B with y_i = c of (logsumexp_{j in B} l_cj - l_ci)
        loss   = sum_{c in B} w_c loss_c / sum_{c in B} w_c

    Distances are direct differences in float32: a sample at its centroid has distance 0 and gradient 0, and features far from the origin keep their digits.
    Runs are bitwise repeatable on one device, and nothing waits for the GPU.

    Args:
        features: z (N, D), float32, bfloat16, float16 or float64, of any strides.
        target: class of each sample (N,), int64, in [0, C).
        centroids: mu (C, D), see :func:`gclkern.functional.class_centroids` and :class:`gclkern.ClassCentroids`. They are statistics: no gradient
            is defined for them.
        epsilon: radius of the ball around the centroid, >= 0: a number, or a tensor () or (C,), which may require a gradient. That gradient is never
            negative: it is 2 / temperature times a sum of probabilities, so descent only ever shrinks epsilon.
        temperature: T; 1 in the paper.
        class_weight: w_c (C,), >= 0; None weighs all classes alike. A class of weight 0 stays out: its samples have no term and do not count in the
            mean, whatever its row of `centroids` holds, but they remain among the samples that other classes tell apart. Give weight 0 to a
            class whose centroid was never seen: ``class_weight=(counts > 0).float()`` with the counts that :func:`gclkern.functional.class_centroids` returns.
        reduction: "mean" is the formula above; "sum" leaves out its division, so it is sum_c w_c loss_c; "none" returns each sample's part of that sum,
            w_c / n_c * (logsumexp_j l_cj - l_ci) with n_c samples of class c = y_i in the batch.
        backend: "auto" (kernels on a GPU, of NVIDIA's from compute capability 8.0 on; torch elsewhere and for float64), "triton" or "torch".

    Returns:
        The loss, float32 (float64 for float64 features): () for "mean" and "sum", (N,) for "none". When all samples stay out: 0 for "sum", NaN for "mean".

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and its value. On a GPU labels are not read (that would synchronise): a label out of
            range makes that sample's term and gradient NaN, while it remains among the samples of the others. :func:`gclkern.set_debug` has labels read.

    Gradients exist for `features` and `epsilon`; backward may be repeated, a second derivative is not supported. Features that are NaN reach every term,
    because every softmax runs over all samples.

    Example:
        >>> import torch
        >>> from gclkern.functional import class_centroids, dro_lt_loss
        >>> features = torch.tensor([[0.0, 1.0], [0.0, 3.0], [4.0, 2.0]])
        >>> target = torch.tensor([0, 0, 2])
        >>> centroids, counts = class_centroids(features, target, num_classes=3)
        >>> loss = dro_lt_loss(features.requires_grad_(), target, centroids, 0.1, class_weight=(counts > 0).float())
        >>> round(loss.item(), 4)
        0.3809
    """
    check_matrix("features", features)
    check_matrix("centroids", centroids)
    rows, dim = features.shape
    num_classes = centroids.shape[0]
    if centroids.shape[1] != dim:
        raise ValueError(f"centroids must have the {dim} columns of features, got shape {tuple(centroids.shape)}")
    check_same_device("centroids", centroids, "features", features)
    refuse_gradient("centroids", centroids)
    check_choice("reduction", reduction, REDUCTIONS)
    temperature = check_number("temperature", temperature, 0.0, open_low=True)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    weight = class_vector("class_weight", class_weight, num_classes, "features", features, dtype)
    if weight is not None:
        _check_values("class_weight", weight)
    radius = _radius(epsilon, num_classes, features, dtype)
    target = check_target("target", target, rows, num_classes, None, "features", features)
    chosen = resolve_backend(backend, features)
    if chosen == "triton":
        import gclkern.kernels.dro_lt  # noqa: F401 (registers the operators)
    return _DROLTBound.apply(features, radius, target, centroids.detach().to(dtype), weight, temperature, reduction, chosen)


def _check_values(name: str, value: Tensor) -> None:
    if values_may_be_read(value):
        wrong = ~(value >= 0)
        if bool(wrong.any()):
            raise ValueError(f"{name} must not be negative, got {float(value[wrong].flatten()[0])}")


def _radius(epsilon: Tensor | float, num_classes: int, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Epsilon as a tensor () or (C,) in the dtype of the statistics."""
    if not isinstance(epsilon, Tensor):
        return torch.full((), check_number("epsilon", epsilon, 0.0), dtype=dtype, device=features.device)
    if not epsilon.dtype.is_floating_point:
        raise TypeError(f"epsilon must be a number or a floating-point tensor, got {epsilon.dtype}")
    if epsilon.shape not in ((), (num_classes,)):
        raise ValueError(f"epsilon must be a number, or a tensor of shape () or ({num_classes},), got {tuple(epsilon.shape)}")
    check_same_device("epsilon", epsilon, "features", features)
    _check_values("epsilon", epsilon.detach())
    return epsilon.to(dtype).contiguous()


class _DROLTBound(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, epsilon: Tensor, target: Tensor, centroids: Tensor, class_weight: Tensor | None,
        temperature: float, reduction: str, backend: str,
    ) -> Tensor:  # fmt: skip
        operator = torch.ops.gclkern.dro_lt_forward if backend == "triton" else torch.ops.gclkern.torch_dro_lt_forward
        with without_autocast(features.device.type):
            loss, saved = operator(features, target, centroids, epsilon, class_weight, temperature, reduction)
        ctx.save_for_backward(features, epsilon, target, centroids, *saved)
        ctx.temperature, ctx.reduction, ctx.backend = temperature, reduction, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        features, epsilon, target, centroids, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        operator = torch.ops.gclkern.dro_lt_backward if ctx.backend == "triton" else torch.ops.gclkern.torch_dro_lt_backward
        with without_autocast(features.device.type):
            grads = operator(grad_loss, features, target, centroids, epsilon, saved, ctx.temperature, ctx.reduction, *wanted)
        grad_features, grad_epsilon = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return grad_features, grad_epsilon, *(None,) * 6


def _anchors(target: Tensor, class_weight: Tensor | None, num_classes: int) -> tuple[Tensor, Tensor]:
    """The classes with a term, ascending, in min(N, C) places, found without asking a GPU how many they are; each sample's class. "None" is num_classes."""
    inside = target.clamp(0, num_classes - 1)
    absent = inside != target
    if class_weight is not None:
        absent |= class_weight.index_select(0, inside) == 0
    label = target.masked_fill(absent, num_classes)
    in_order = label.sort().values
    place = torch.zeros_like(in_order)
    torch.cumsum(in_order[1:] != in_order[:-1], 0, out=place[1:])
    return torch.full_like(target, num_classes).scatter_(0, place, in_order)[:num_classes].clone(), label


class _Rows(NamedTuple):
    """The rows of the softmax, R of them, over the batch's samples."""

    classes: Tensor  # (R,)
    unused: Tensor | None  # (R, 1) whether the row is no class of the batch; None where all are
    own: Tensor  # (R, N) whether the sample is of the row's class
    centroids: Tensor  # (R, D), 0 where unused
    distance: Tensor  # (R, N)
    stats: Tensor  # (4, R): peak, around, rest, share, as in gclkern.kernels.dro_lt

    @classmethod
    def of(cls, saved: list[Tensor], centroids: Tensor) -> _Rows:
        """On a CPU as many as the batch has classes, elsewhere as many as it could have: that costs nothing but work."""
        distance, stats, classes, label = saved
        unused = (classes == centroids.shape[0])[:, None]
        if classes.device.type == "cpu":
            count = classes.shape[0] - int(unused.sum())
            classes = classes[:count]
            return cls(classes, None, label == classes[:, None], centroids.index_select(0, classes), distance[:count], stats[:, :count])
        own = (label == classes[:, None]).masked_fill_(unused, False)
        classes = classes.clamp(max=centroids.shape[0] - 1)
        return cls(classes, unused, own, centroids.index_select(0, classes).masked_fill_(unused, 0.0), distance, stats)

    def used(self, values: Tensor) -> Tensor:
        """The values (R, ...), which become 0 where the row is unused."""
        return values if self.unused is None else values.masked_fill_(self.unused if values.dim() == 2 else self.unused[:, 0], 0.0)

    def logits(self, epsilon: Tensor, temperature: float) -> Tensor:
        radius = 2.0 * (epsilon if epsilon.dim() == 0 else epsilon.index_select(0, self.classes)[:, None])
        return torch.where(self.own, self.distance + radius, self.distance).div_(-temperature)


def _saved(features: Tensor, target: Tensor, centroids: Tensor) -> list[Tensor]:
    """Room for distances (R, N), statistics (4, R), classes (R,) and labels (N,); what is not needed stays untouched."""
    samples = features.shape[0]
    rows = torch.sym_min(samples, centroids.shape[0])
    return [centroids.new_empty((rows, samples)), centroids.new_empty((4, rows)), target.new_empty(rows), target.new_empty(samples)]


@torch.library.custom_op(
    "gclkern::torch_dro_lt_forward",
    mutates_args=(),
    schema="(Tensor features, Tensor target, Tensor centroids, Tensor epsilon, Tensor? class_weight, float temperature, str reduction) -> (Tensor, Tensor[])",
)
def torch_dro_lt_forward(
    features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, class_weight: Tensor | None, temperature: float, reduction: str
) -> tuple[Tensor, list[Tensor]]:
    """The twin of gclkern.kernels.dro_lt.dro_lt_forward."""
    num_classes = centroids.shape[0]
    distance, stats, *_ = _saved(features, target, centroids)
    saved = [distance, stats, *_anchors(target, class_weight, num_classes)]
    rows = _Rows.of(saved, centroids)
    # this mode takes differences; the other expands the square, which loses digits
    rows.distance.copy_(torch.cdist(rows.centroids, features.to(centroids.dtype), compute_mode="donot_use_mm_for_euclid_dist"))
    logits = rows.logits(epsilon, temperature)
    peak = logits.amax(1, keepdim=True)
    at_peak = logits == peak
    exponential = (logits - peak).exp_()
    around = exponential.masked_fill(at_peak, 0.0).sum(1, keepdim=True) + (at_peak.sum(1, keepdim=True) - 1)
    rest = exponential.masked_fill_(rows.own, 0.0).sum(1)
    weight = rows.used(torch.ones_like(rest) if class_weight is None else class_weight.index_select(0, rows.classes))
    share = weight / rows.own.sum(1).clamp(min=1)
    terms = (peak - logits).add_(around.log1p()).mul_(share[:, None]).masked_fill_(~rows.own, 0.0).sum(0)
    terms = terms.masked_fill_(target.clamp(0, num_classes - 1) != target, float("nan"))
    denominator = weight.sum() if reduction == "mean" else 1.0
    rows.stats.copy_(torch.stack((peak[:, 0], around[:, 0], rest, share / denominator)))
    return terms if reduction == "none" else terms.sum() / denominator, saved


@torch_dro_lt_forward.register_fake
def _(
    features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, class_weight: Tensor | None, temperature: float, reduction: str
) -> tuple[Tensor, list[Tensor]]:
    return centroids.new_empty((features.shape[0],) if reduction == "none" else ()), _saved(features, target, centroids)


@torch.library.custom_op(
    "gclkern::torch_dro_lt_backward",
    mutates_args=(),
    schema="(Tensor grad_loss, Tensor features, Tensor target, Tensor centroids, Tensor epsilon, Tensor[] saved, float temperature, str reduction, "
    "bool features_grad, bool epsilon_grad) -> (Tensor, Tensor)",
)
def torch_dro_lt_backward(
    grad_loss: Tensor, features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, saved: list[Tensor],
    temperature: float, reduction: str, features_grad: bool, epsilon_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The twin of gclkern.kernels.dro_lt.dro_lt_backward."""
    num_classes = centroids.shape[0]
    rows = _Rows.of(saved, centroids)
    peak, around, rest, share = rows.stats[:, :, None]
    logits = rows.logits(epsilon, temperature)
    total = 1.0 + around
    probability = (logits - peak).exp_().div_(total)
    upstream = torch.where(rows.own, grad_loss * share, 0.0)
    mass = upstream.sum(1, keepdim=True)
    grad_features, grad_epsilon = features.new_empty(0), epsilon.new_empty(0)
    if features_grad:
        label = target.clamp(0, num_classes - 1)
        missed = torch.where(logits == peak, around / total, 1.0 - probability)
        # of a lone member nothing is left of mass - upstream: its gradient is -missed with all its digits
        grad_logits = (mass - upstream).mul_(probability).sub_(upstream * missed)
        pull = rows.used(grad_logits.div_(rows.distance).div_(-temperature).masked_fill_(rows.distance == 0.0, 0.0))
        grad_features = _features_gradient(features.to(centroids.dtype), rows, pull, centroids.index_select(0, label))
        grad_features = grad_features.masked_fill_((label != target)[:, None], float("nan")).to(features.dtype)
    if epsilon_grad:
        per_row = rows.used((2.0 / temperature * mass * (rest / total))[:, 0])
        # rows that are not used add 0 to the last class
        grad_epsilon = per_row.sum() if epsilon.dim() == 0 else torch.zeros_like(epsilon).index_add_(0, rows.classes, per_row)
    return grad_features, grad_epsilon


def _features_gradient(features: Tensor, rows: _Rows, pull: Tensor, own_centroids: Tensor) -> Tensor:
    """sum over rows r of pull_rj * (z_j - mu_r).

    A sample may be arbitrarily close to its own centroid, so that difference is taken as it stands. The other rows are one matrix product, after
    the origin has moved to where the data are: what is left to cancel there is the spread of the centroids over the distance to a foreign one.
    """
    own_pull = torch.where(rows.own, pull, 0.0).sum(0)
    pull = pull.masked_fill(rows.own, 0.0)
    origin = rows.centroids.sum(0) / (max(rows.classes.shape[0], 1) if rows.unused is None else (~rows.unused).sum().clamp(min=1))
    centred = rows.used(rows.centroids - origin)
    grad = (features - origin).mul_(pull.sum(0)[:, None]).sub_(pull.T @ centred)
    return grad.add_(torch.where((own_pull != 0.0)[:, None], own_pull[:, None] * (features - own_centroids), 0.0))


@torch_dro_lt_backward.register_fake
def _(
    grad_loss: Tensor, features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, saved: list[Tensor],
    temperature: float, reduction: str, features_grad: bool, epsilon_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_features = features.new_empty(tuple(features.shape) if features_grad else (0,))
    return grad_features, epsilon.new_empty(tuple(epsilon.shape) if epsilon_grad else (0,))


torch_dro_lt_backward.register_autograd(refuse_second_derivative)


class DROLTLoss(PreciseBuffers):
    r"""The DRO-LT bound as a module: :func:`gclkern.functional.dro_lt_loss` with epsilon, weights and temperature in one place.

    The robust loss of a training step is used beside a cross entropy: the paper weighs the two lam and 1 - lam, the released recipe 1 and 1.

    How this differs from the released code, beside being the formula of the paper:

    - The paper's bound has 2 epsilon; the release subtracts epsilon once. So the learned epsilon starts at 0.5 here, where the release starts at 1.
    - max(epsilon, 0) is used. The release lets epsilon go negative, where the bound no longer holds.
    - Samples get the epsilon of their class. The release subtracts epsilon in batch order under a mask that runs class by class, which is another class's.
    - The logarithm of the sum of exponentials is stable. The release takes log(sum(exp)), which is -inf for distances over about 100 temperatures.
    - Class weights are normalised over the classes of the batch, not over absent ones too.
    - Centroids are an argument. The release computes them from all features in every batch; :class:`gclkern.ClassCentroids` does once an epoch.

    The gradient of a learned epsilon has one sign, 2 / temperature times a sum of probabilities: descent only ever shrinks it, until it is 0. Weight decay
    shrinks it too and is part of the recipe: give this parameter to the optimizer in the group that is decayed, although it is a vector.

    Args:
        class_counts: training images of each class (C,), all positive.
        epsilon: "learned", one parameter for each class (the module then owns a parameter: give it to an optimizer); "sqrt", the constants
            base_epsilon / sqrt(class_counts); or a number >= 0 for all classes.
        temperature: T > 0; 1 in the paper.
        base_epsilon: where "learned" starts, or the numerator of "sqrt"; None is 0.5, which equals the release's 1 subtracted once.
        class_weight: weight of each class (C,), >= 0; None weighs all alike.
        reduction: "mean", "sum" or "none", see :func:`gclkern.functional.dro_lt_loss`.
        backend: "auto", "triton" or "torch".

    Shapes: features (N, D), target (N,) int64, centroids (C, D), counts (C,) or None -> loss () for "mean" and "sum", (N,) for "none".

    Example:
        >>> import torch
        >>> from gclkern import ClassCentroids, DROLTLoss
        >>> features, target = torch.randn(8, 16, requires_grad=True), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
        >>> centroids = ClassCentroids(num_classes=3, dim=16)
        >>> centroids.update(features, target)
        >>> loss = DROLTLoss([500, 50, 5])(features, target, *centroids.compute())
        >>> loss.backward()
        >>> features.grad.shape
        torch.Size([8, 16])
    """

    class_weight: Tensor | None
    epsilon: Tensor

    def __init__(
        self,
        class_counts: Vector,
        *,
        epsilon: str | float = "learned",
        temperature: float = 1.0,
        base_epsilon: float | None = None,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        counts = check_class_counts(class_counts).to(device_of(class_counts))
        if isinstance(epsilon, str):
            check_choice("epsilon", epsilon, ("learned", "sqrt"))
            base = _INITIAL_EPSILON if base_epsilon is None else check_number("base_epsilon", base_epsilon, 0.0)
        elif base_epsilon is not None:
            raise ValueError(f'base_epsilon is given ({base_epsilon}) but serves only epsilon="learned" or "sqrt", and epsilon is {epsilon}')
        if epsilon == "learned":
            self.epsilon = nn.Parameter(torch.full_like(counts, base, dtype=torch.float32))
        else:
            value = base / counts.sqrt() if epsilon == "sqrt" else counts.new_tensor(check_number("epsilon", epsilon, 0.0))
            self.register_buffer("epsilon", value.to(torch.float32), persistent=False)
        weight = class_vector("class_weight", class_weight, counts.numel(), "class_counts", counts, torch.float32)
        if weight is not None:
            _check_values("class_weight", weight)
        self.register_buffer("class_weight", None if weight is None else weight.detach().clone(), persistent=False)
        self.mode = epsilon if isinstance(epsilon, str) else "constant"
        self.num_classes = counts.numel()
        self.temperature = check_number("temperature", temperature, 0.0, open_low=True)
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction = reduction
        check_choice("backend", backend, BACKENDS)
        self.backend = backend

    def forward(
        self,
        features: Tensor,  # (N, D)
        target: Tensor,  # (N,)
        centroids: Tensor,  # (C, D)
        counts: Tensor | None = None,  # (C,)
    ) -> Tensor:
        """The loss of a batch. With the `counts` that come with the centroids, a class whose centroid was never seen stays out of the loss."""
        if isinstance(centroids, Tensor) and centroids.dim() == 2 and centroids.shape[0] != self.num_classes:
            raise ValueError(f"centroids must have {self.num_classes} rows, one for each of class_counts, got shape {tuple(centroids.shape)}")
        weight = self.class_weight
        if counts is not None:
            if not isinstance(counts, Tensor):
                raise TypeError(f"counts must be a tensor or None, got {type(counts).__name__}")
            if counts.shape != (self.num_classes,):
                raise ValueError(f"counts must have shape ({self.num_classes},), one for each class, got {tuple(counts.shape)}")
            seen = counts > 0
            weight = seen.to(torch.float32) if weight is None else torch.where(seen, weight, 0.0)
        epsilon = self.epsilon.clamp(min=0.0)
        options = {"temperature": self.temperature, "class_weight": weight, "reduction": self.reduction, "backend": self.backend}
        return dro_lt_loss(features, target, centroids, epsilon, **options)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        epsilon = f"{float(self.epsilon):g}" if self.mode == "constant" else repr(self.mode)
        return f"num_classes={self.num_classes}, epsilon={epsilon}, temperature={self.temperature:g}, reduction={self.reduction!r}, backend={self.backend!r}"
