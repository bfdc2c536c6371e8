"""ProCo's contrast against scipy's Bessel functions, and its running averages."""

from __future__ import annotations

import copy

import pytest
import scipy.special
import torch
from torch import Tensor

from benchmarks.memory import allocated_peak
from gclkern import LogitAdjustedLoss, ProCoLoss
from gclkern.losses.proco import vmf_contrast
from tests.support import oracle
from tests.support.cases import cosines, labels

# numpy, which interprets the kernels, warns of what a GPU computes in silence and a later selection discards.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

COUNTS = [50, 20, 5, 1]
T = 0.1


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def vmf_backend(request: pytest.FixtureRequest) -> str:
    """The implementations of the contrast."""
    return str(request.param)


def exact(cosine: Tensor, concentration: Tensor, dim: int, temperature: float) -> tuple[Tensor, Tensor]:
    """F(k) - F(kappa) by scipy in float64, and its derivative for the cosine: I_{v+1}(k) / I_v(k) * kappa / (t k)."""
    v = dim / 2 - 1

    def log_f(k: Tensor) -> Tensor:
        return torch.from_numpy(scipy.special.ive(v, k.numpy())).log() + k - v * k.log()

    k = (concentration.square() + 1 / temperature**2 + 2 * concentration * cosine / temperature).sqrt()
    ratio = torch.from_numpy(scipy.special.ive(v + 1, k.numpy()) / scipy.special.ive(v, k.numpy()))
    return log_f(k) - log_f(concentration.expand_as(k).contiguous()), ratio * concentration / (temperature * k)


@pytest.mark.parametrize(("dim", "error"), [(16, 6e-4), (64, 4e-5), (128, 1e-5)])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_contrast_and_its_derivative(dim: int, error: float, temperature: float) -> None:
    cosine = torch.linspace(-0.99, 1.0, 41, dtype=torch.float64)[:, None].clone().requires_grad_()
    concentration = torch.tensor([3.0, 10.0, 100.0, 2000.0], dtype=torch.float64)
    value, slope = exact(cosine.detach(), concentration, dim, temperature)
    for column in range(4):
        found = vmf_contrast(cosine, concentration[column : column + 1], dim, temperature)
        assert (found.detach()[:, 0] - value[:, column]).abs().max() < error
        grad = torch.autograd.grad(found.sum(), cosine)[0][:, 0]
        torch.testing.assert_close(grad, slope[:, column], rtol=2e-3, atol=10 * error)


def test_contrast_in_many_dimensions() -> None:
    """As ProCo has them on the large sets; scipy's function is 0 there."""
    mpmath = pytest.importorskip("mpmath")
    order, inverse = 511, 1 / 0.07

    def log_f(k: float) -> float:
        return float(mpmath.log(mpmath.besseli(order, k)) - order * mpmath.log(k))

    for kappa in (3.0, 400.0, 2e4):
        cosine = torch.linspace(-0.95, 1.0, 5, dtype=torch.float64)[:, None]
        found = vmf_contrast(cosine, torch.tensor([kappa], dtype=torch.float64), 1024, 0.07)[:, 0]
        expected = [log_f((kappa**2 + inverse**2 + 2 * kappa * inverse * float(value)) ** 0.5) - log_f(kappa) for value in cosine]
        assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() < 2e-7


def test_the_derivative_is_that_of_the_series(device: torch.device) -> None:
    """Over more rows than a CPU's tile, against autograd through the series as it is written."""
    cosine = cosines(70, 1000).double().clamp(-1.0, 1.0).to(device).requires_grad_()
    concentration = torch.logspace(-2, 4, 1000, dtype=torch.float64, device=device)
    upstream = torch.linspace(-1.0, 2.0, 1000, dtype=torch.float64, device=device)
    expected = oracle.vmf_contrast(cosine, concentration, 32, T)
    found = vmf_contrast(cosine, concentration, 32, T)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    grads = (torch.autograd.grad((value * upstream).sum(), cosine)[0] for value in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_no_vector_of_a_sample_and_a_class_is_in_memory() -> None:
    """Of 64 samples, 2000 classes and 64 dimensions they would have 33 MB; a matrix over samples and classes has 0.5 MB."""
    criterion = ProCoLoss([1] * 2000, 64)
    features, target = torch.randn(64, 64, requires_grad=True), torch.arange(64)

    def step() -> Tensor:
        return torch.autograd.grad(criterion(features, target), features)[0]

    peak = allocated_peak(step, torch.device("cpu"))
    assert peak < 8 * 4 * 64 * 2000 + 4 * 4 * 2000 * 64


def test_a_concentration_has_no_gradient() -> None:
    with pytest.raises(ValueError, match="concentration"):
        vmf_contrast(cosines(2, 3), torch.ones(3, requires_grad=True), 16, T)


@pytest.mark.parametrize("dim", [16, 128, 1024])
def test_float32_keeps_its_digits(dim: int, vmf_backend: str, device: torch.device) -> None:
    """F itself is up to 1e5 there, of which float32 has 1e-2. More rows and classes than a kernel's tile, in columns of a larger matrix."""
    kappa = torch.tensor([0.0, 1e-3, 1.0, 50.0, 2e3, 1e5]).repeat(25)[:140]
    cosine = torch.linspace(-1.0, 1.0, 13 * 140).view(140, 13).T
    exact = cosine.double().clone().requires_grad_()
    expected = vmf_contrast(exact, kappa.double(), dim, T)
    upstream = torch.linspace(-1.0, 2.0, 140)
    (expected * upstream).sum().backward()

    leaf = cosine.to(device).requires_grad_()
    found = vmf_contrast(leaf, kappa.to(device), dim, T, vmf_backend)
    (found * upstream.to(device)).sum().backward()
    torch.testing.assert_close(found.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_operators(vmf_backend: str, device: torch.device) -> None:
    cosine, kappa = cosines(5, 7, device=device), torch.linspace(1.0, 50.0, 7, device=device)
    vmf_contrast(cosine, kappa, 32, T, vmf_backend)  # registers the operators
    name = "vmf_forward" if vmf_backend == "triton" else "torch_vmf_forward"
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.gclkern, name).default, (cosine, kappa, 15.0, T), test_utils=tests)
    torch.library.opcheck(getattr(torch.ops.gclkern, name.replace("forward", "backward")).default, (cosine, cosine, kappa, 15.0, T), test_utils=tests)


def test_a_second_derivative_is_refused() -> None:
    cosine = cosines(2, 3).requires_grad_()
    (grad,) = torch.autograd.grad(vmf_contrast(cosine, torch.ones(3), 16, T).sum(), cosine, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_a_class_without_spread_is_its_mean() -> None:
    """kappa to infinity: the mean of exp(<x, k> / t) is exp(cosine / t)."""
    cosine = cosines(5, 1).double()
    torch.testing.assert_close(vmf_contrast(cosine, torch.tensor([1e9]).double(), 128, T), cosine / T, rtol=1e-5, atol=1e-5)


def test_loss_is_logit_adjustment_over_the_contrast(backend: str, device: torch.device) -> None:
    features, target = cosines(12, 16, device=device).requires_grad_(), labels(12, 4).to(device)
    criterion = ProCoLoss(COUNTS, 16, backend=backend).to(device)
    criterion(cosines(40, 16, device=device, seed=4), labels(40, 4, seed=5).to(device))
    criterion.eval()
    mu, kappa = criterion.distributions()
    unit = features / features.norm(dim=1, keepdim=True)
    expected = LogitAdjustedLoss(COUNTS).to(device)(vmf_contrast(unit @ mu.T, kappa, 16, T), target)
    torch.testing.assert_close(criterion(features, target), expected, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(criterion(features, target), features)[0].isfinite().all()


def test_autocast_changes_nothing(device: torch.device) -> None:
    """A cosine of bfloat16 would be off by 2^-9, which a temperature of 0.1 makes 2% of a probability."""
    features, target = cosines(12, 16, device=device), labels(12, 4).to(device)
    criterion = ProCoLoss(COUNTS, 16).to(device)
    criterion(cosines(40, 16, device=device, seed=4), labels(40, 4, seed=5).to(device))
    criterion.eval()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = criterion(features, target)
    assert torch.equal(found, criterion(features, target))


def test_running_averages() -> None:
    features = torch.nn.functional.normalize(cosines(12, 16))
    target = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 0, 1, 2])  # class 3 is never seen
    criterion = ProCoLoss(COUNTS, 16)

    def mean(rows: slice, label: int) -> Tensor:
        return features[rows][target[rows] == label].mean(0)

    def check(rows: slice) -> None:
        mu, kappa = criterion.distributions()
        for label in range(3):
            expected = mean(rows, label)
            length = expected.norm()
            torch.testing.assert_close(mu[label], expected / length)
            torch.testing.assert_close(kappa[label], 16 * length / (1 - length**2))
        assert mu[3].eq(0).all() and kappa[3] == 0

    criterion(features[:9], target[:9])
    check(slice(0, 9))
    criterion.start_epoch()
    criterion(features[9:], target[9:])
    check(slice(0, 12))  # the last epoch and this one so far
    criterion.start_epoch()
    assert criterion.counts[0].tolist() == [1, 1, 1, 0] and criterion.counts[1].sum() == 0
    before = copy.deepcopy(criterion.state_dict())
    criterion.eval()(features, target)
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())


def test_features_that_are_all_alike() -> None:
    criterion = ProCoLoss(COUNTS, 16)
    features = torch.ones(4, 16, requires_grad=True)
    loss = criterion(features, torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert loss.isfinite() and features.grad is not None and features.grad.isfinite().all()
    assert criterion.distributions()[1].eq(1e5).all()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dim": 15}, ValueError, ["dim", "15", "16"]),
        ({"dim": 16.0}, TypeError, ["dim", "16.0"]),
        ({"dim": None}, TypeError, ["dim", "None"]),
        ({"temperature": 0.0}, ValueError, ["temperature", "0.0"]),
        ({"temperature": float("nan")}, ValueError, ["temperature", "nan"]),
        ({"temperature": "0.1"}, TypeError, ["temperature", "'0.1'"]),
        ({"tau": float("inf")}, ValueError, ["tau must be a finite number, got inf"]),
        ({"tau": "1"}, TypeError, ["tau", "'1'"]),
        ({"reduction": "max"}, ValueError, ["reduction", "'max'"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'cuda'"]),
        ({"class_counts": [3, 0]}, ValueError, ["class_counts[1]", "0"]),
        ({"class_counts": [3, float("nan")]}, ValueError, ["class_counts[1]", "nan"]),
        ({"class_counts": []}, ValueError, ["class_counts", "empty"]),
        ({"class_counts": 5}, ValueError, ["class_counts", "()"]),
    ],
)
def test_refusals(arguments: dict[str, object], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        ProCoLoss(**{"class_counts": COUNTS, "dim": 16, **arguments})  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"features": torch.zeros(2, 5)}, ValueError, ["features", "16 columns", "(2, 5)"]),
        ({"features": torch.zeros(16)}, ValueError, ["features", "(16,)"]),
        ({"features": torch.zeros(0, 16)}, ValueError, ["features", "(0, 16)"]),
        ({"features": torch.zeros(2, 16, dtype=torch.int64)}, TypeError, ["features", "int64"]),
        ({"features": [[0.0] * 16] * 2}, TypeError, ["features", "list"]),
        ({"features": torch.zeros(2, 16, device="meta")}, ValueError, ["features", "meta", "cpu"]),
        ({"target": torch.tensor([0, 4])}, ValueError, ["target[1]", "4", "[0, 4)"]),
        ({"target": torch.tensor([-100, 1])}, ValueError, ["target[0]", "-100", "[0, 4)"]),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, ["target", "(2,)", "(3,)"]),
        ({"target": torch.zeros(2)}, TypeError, ["target", "float32"]),
        ({"target": torch.zeros(2, 4)}, TypeError, ["target", "no soft labels"]),
        ({"target": [0, 1]}, TypeError, ["target", "list"]),
        ({"target": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, ["target", "meta", "cpu"]),
    ],
)
def test_calls_that_are_refused_leave_the_averages_alone(changes: dict[str, object], error: type[Exception], words: list[str]) -> None:
    criterion = ProCoLoss(COUNTS, 16)
    with pytest.raises(error) as caught:
        criterion(**{"features": torch.ones(2, 16), "target": torch.tensor([0, 1]), **changes})  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not criterion.counts.any()
