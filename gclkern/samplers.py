"""Re-balancing samplers for torch's DataLoader: reproducible, resumable in mid-epoch and aware of ranks.

    InstanceBalancedSampler   every sample once, shuffled                                      p_j ~ n_j
    ClassBalancedSampler      a class, then one of its samples                                 p_j = 1 / C
    SquareRootSampler         a class by the root of its count, then one of its samples        p_j ~ sqrt(n_j)
    ProgressiveSampler        from instance-balanced to class-balanced over the epochs         (1 - t/T) n_j / N + (t/T) / C
    EffectiveNumberSampler    by effective numbers                                             p_j ~ n_j (1 - beta) / (1 - beta^n_j)
    ReversedSampler           a class, more often if it is rare, then a sample of it           p_j ~ 1 / n_j
    CBENSampler               by effective numbers whose beta grows with the cloud             p_j ~ n_j (1 - beta_j) / (1 - beta_j^n_j)
    ClassAwareSampler         the classes in turn, k samples of each, without replacement      p_j = 1 / C

p_j is the share of class j among the drawn samples. The order of an epoch is a pure function of (labels, seed, epoch), from the same Philox generator as the
noise: equal for every number of workers and ranks, every platform and every version of torch. Iterating changes no state.

    sampler.set_epoch(epoch)                   before each epoch: without it every epoch has the same order
    sampler.set_epoch(epoch, position=done)    to resume: this rank has trained on `done` samples of the epoch, that is steps * batch size

The caller counts `done`, because a DataLoader's workers prefetch. Of R ranks, rank r takes draws r, r + R, r + 2R, ... of the epoch. So all ranks together see
the samples of a single process, the first `position` samples of all ranks are the first R * position draws, and a run may resume with another number of ranks.
Every rank has ceil(num_samples / R) samples; if R does not divide num_samples, the first draws of the epoch are repeated, as in torch's DistributedSampler.

Frameworks that start the processes:

    Lightning, Fabric             nothing to do: the samplers are DistributedSamplers, which Lightning does not wrap and whose set_epoch it calls
    Accelerate, Hugging Face's    build the sampler with num_replicas=1, rank=0: `accelerator.prepare` splits the batches of every sampler over the ranks, and
    Trainer                       splitting one rank's share again would skip most of the data. To resume use accelerator.skip_first_batches
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from gclkern.torch_backend.noise import philox_words
from gclkern.validation import Vector, as_vector, check_int, resolve_seed
from gclkern.weights import cben_weights, check_beta, inverse_effective_number

# Purposes of random numbers. Each is a value of the group word in the generator's counter, so their numbers are independent.
_DRAW, _CLASS_ORDER, _SAMPLE_ORDER = range(3)
# Makes the samplers' numbers independent of the noise that a loss draws with the same seed.
_STREAM = 0x5A3D7B1E9C64F208


class _Groups(NamedTuple):
    """Samples by group: the members of group g are members[starts[g] : starts[g] + counts[g]]."""

    members: Tensor  # (N,)
    starts: Tensor  # (G,)
    counts: Tensor  # (G,)


def _by_class(labels: Vector) -> _Groups:
    """The samples by class, for the classes that occur."""
    vector = as_vector("labels", labels, "one class for each sample")
    if vector.is_floating_point():
        raise TypeError(f"labels must be integers, one class for each sample, got {vector.dtype}")
    vector = vector.to("cpu", torch.int64)
    if bool((vector < 0).any()):
        index = int((vector < 0).nonzero()[0])
        raise ValueError(f"labels[{index}] is {int(vector[index])}, but a class must be at least 0; leave samples without a class out of the data set")
    ordered, members = vector.sort(stable=True)
    counts = ordered.unique_consecutive(return_counts=True)[1]
    return _Groups(members, counts.cumsum(0) - counts, counts)


class _EpochSampler(DistributedSampler[int]):
    """Base class of the samplers: arguments, position in the epoch, and splitting over ranks.

    It uses nothing of DistributedSampler. The base class only tells frameworks that the sampler splits samples over ranks.
    """

    def __init__(self, labels: Vector, *, num_samples: int | None = None, seed: int = 0, num_replicas: int | None = None, rank: int | None = None) -> None:
        self._groups = _by_class(labels)
        self.num_samples = self._groups.members.numel() if num_samples is None else check_int("num_samples", num_samples, 1, 2**32)
        self.seed = check_int("seed", seed, -(2**63), 2**64 - 1)
        self._num_replicas = None if num_replicas is None else check_int("num_replicas", num_replicas, 1)
        self._rank = None if rank is None else check_int("rank", rank, 0, None if num_replicas is None else num_replicas - 1)
        self.epoch = 0
        self.position = 0

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """The number of ranks. Looked up on use, because a sampler may be created before the process group."""
        if self._num_replicas is not None:
            return self._num_replicas
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:  # type: ignore[override]
        """This rank."""
        rank = self._rank
        if rank is None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return check_int("rank", rank, 0, self.num_replicas - 1)

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Choose the epoch of the next iteration, and where in it to begin.

        Args:
            epoch: counted from 0.
            position: samples of this rank to skip, at most len(self): finished steps times batch size. Workers of a DataLoader prefetch, so the caller counts.

        Raises:
            TypeError, ValueError: not an int, or out of range.
        """
        self.epoch = check_int("epoch", epoch, 0, 2**31 - 1)
        self.position = check_int("position", position, 0, len(self))

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch. It ignores `position`, because learning rate schedules depend on it."""
        return -(-self.num_samples // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        with torch.device("cpu"):  # independent of torch's default device
            places = torch.arange(self.position, len(self)) * self.num_replicas + self.rank
            return iter(self._order()[places % self.num_samples].tolist())

    def _order(self) -> Tensor:
        """The samples (num_samples,) that all ranks together draw in this epoch."""
        raise NotImplementedError

    def _words(self, use: int, high: Tensor | int, low: Tensor) -> Tensor:
        """Four random words for each of `low` (n,), as (n, 4) int64 below 2^32: a pure function of the seed, `use`, `high` and `low`."""
        key = resolve_seed(self.seed, torch.device("cpu")) ^ _STREAM
        return philox_words(key, (torch.as_tensor(high) << 32) | low, torch.tensor([use])).view(-1, 4).to(torch.int64) & 0xFFFFFFFF

    def _without_replacement(self, groups: _Groups, group: Tensor, number: Tensor, per_epoch: int) -> Tensor:
        """Samples (n,): entry i is draw number `number[i]` from group `group[i]`.

        The draws of a group are numbered through all epochs: those of this epoch are epoch * per_epoch, ..., (epoch + 1) * per_epoch - 1. They make passes over
        its members: pass p of a group of k has the draws p * k, ..., p * k + k - 1, and these are all members once, in a random order. A pass may begin in one
        epoch and end in the next.
        """
        # All passes that this epoch takes a part of, group by group.
        first_pass = self.epoch * per_epoch // groups.counts  # (G,)
        passes = ((self.epoch + 1) * per_epoch - 1) // groups.counts - first_pass + 1  # (G,), how many
        row = passes.cumsum(0) - passes  # (G,), the place of a group's first pass in the next three lists
        group_of = torch.arange(groups.counts.numel()).repeat_interleave(passes)
        pass_of = first_pass[group_of] + torch.arange(group_of.numel()) - row[group_of]
        start = groups.counts[group_of].cumsum(0) - groups.counts[group_of]  # of the pass in the lists that follow
        # Their members, pass by pass. Sorting by the pass, then by a random key, shuffles each pass by itself.
        pass_row = torch.arange(group_of.numel()).repeat_interleave(groups.counts[group_of])
        member = groups.members[groups.starts[group_of][pass_row] + torch.arange(pass_row.numel()) - start[pass_row]]
        keys = self._words(_SAMPLE_ORDER, pass_of[pass_row], member)[:, 0]
        shuffled = member[(pass_row << 32 | keys).argsort(stable=True)]
        # A draw is a pass of its group and a place in it.
        count = groups.counts[group]
        return shuffled[start[row[group] + number // count - first_pass[group]] + number % count]


_EpochSampler.__init__.__qualname__ = "Sampler.__init__"  # a misspelt argument is refused in this name


class InstanceBalancedSampler(_EpochSampler):
    """Every sample once, shuffled: the usual sampling, used in stage 1.

    (Kang et al., "Decoupling representation and classifier for long-tailed recognition", ICLR 2020, Eq. 1 with q = 1.)

    Call ``sampler.set_epoch(epoch)`` before each epoch, else all epochs have the same order, and ``sampler.set_epoch(epoch, position=done)`` to resume after
    this rank has seen `done` samples of it. This holds for all samplers.

    Args:
        labels: class of each sample (N,), integers of at least 0: a sequence, a numpy array or a tensor. Classes need not be dense.
        num_samples: draws in an epoch of all ranks together; default N. With another number, an epoch continues the shuffled list where the last one stopped.
        seed: an int of up to 64 bits, the same on all ranks.
        num_replicas, rank: number of ranks and this one; default torch.distributed's where it is initialised, else 1 and 0.

    Raises:
        TypeError, ValueError: labels that are empty or not integers of at least 0; another argument that is not an int or is out of range.

    Example:
        >>> sampler = InstanceBalancedSampler([0, 0, 0, 1])
        >>> sorted(sampler)
        [0, 1, 2, 3]
    """

    def _order(self) -> Tensor:
        everything = _Groups(self._groups.members.sort().values, torch.tensor([0]), torch.tensor([self._groups.members.numel()]))
        draws = torch.arange(self.num_samples)
        return self._without_replacement(everything, torch.zeros_like(draws), self.epoch * self.num_samples + draws, self.num_samples)


class _WeightedSampler(_EpochSampler):
    """Draws with replacement: a class by its probability, then one of its samples."""

    def _class_mass(self, counts: Tensor) -> Tensor:
        """Unnormalised probability of each class, float64 (C,), from its float64 count."""
        raise NotImplementedError

    def _order(self) -> Tensor:
        members, starts, counts = self._groups
        upper = self._class_mass(counts.double()).cumsum(0)
        upper = upper / upper[-1]
        words = self._words(_DRAW, self.epoch, torch.arange(self.num_samples))
        # 53 bits each, because a class's probability may be below 2^-32. The float64 sum is exact and below 1, so no draw is beyond the last class, and its
        # product with a count rounds to less than the count.
        uniform = ((words[:, 0::2] >> 5).double() * 2.0**26 + (words[:, 1::2] >> 6)) * 2.0**-53
        drawn = torch.searchsorted(upper, uniform[:, 0].contiguous(), right=True)
        return members[starts[drawn] + (uniform[:, 1] * counts[drawn]).to(torch.int64)]


class ClassBalancedSampler(_WeightedSampler):
    """A class with probability 1 / C, then one of its samples, all equally likely, with replacement (Kang et al., ICLR 2020, Eq. 1 with q = 0): cRT's sampler.

    Args:
        labels, seed, num_replicas, rank: as in :class:`InstanceBalancedSampler`.
        num_samples: draws in an epoch of all ranks together; default the number of labels.

    Raises:
        TypeError, ValueError: as :class:`InstanceBalancedSampler`.

    Example:
        >>> sampler = ClassBalancedSampler([0] * 90 + [1] * 10, num_samples=1000)
        >>> 450 < sum(index >= 90 for index in sampler) < 550
        True
    """

    def _class_mass(self, counts: Tensor) -> Tensor:
        return torch.ones_like(counts)


class SquareRootSampler(_WeightedSampler):
    """Every class with a probability proportional to sqrt(n_j), and then one of its samples, with replacement.

    (Mahajan et al., "Exploring the limits of weakly supervised pretraining", ECCV 2018; Kang et al., ICLR 2020, Eq. 1 with q = 1/2.)

    Args:
        labels, seed, num_replicas, rank: as in :class:`InstanceBalancedSampler`.
        num_samples: draws in an epoch of all ranks together; default the number of labels.

    Raises:
        TypeError, ValueError: as :class:`InstanceBalancedSampler`.

    Example:
        >>> sampler = SquareRootSampler([0] * 90 + [1] * 10, num_samples=1000)
        >>> 200 < sum(index >= 90 for index in sampler) < 300
        True
    """

    def _class_mass(self, counts: Tensor) -> Tensor:
        return counts.sqrt()


class ProgressiveSampler(_WeightedSampler):
    r"""From instance-balanced in the first epoch to nearly class-balanced in the last, with replacement (Kang et al., ICLR 2020, Eq. 2).

        p_j(t) = (1 - t / T) n_j / N + (t / T) / C,    t the epoch from 0, T = epochs

    Args:
        labels, seed, num_replicas, rank: as in :class:`InstanceBalancedSampler`.
        epochs: T, the epochs of the training; later ones are class-balanced.
        num_samples: draws in an epoch of all ranks together; default the number of labels.

    Raises:
        TypeError, ValueError: as :class:`InstanceBalancedSampler`; epochs below 1.

    Example:
        >>> sampler = ProgressiveSampler([0] * 90 + [1] * 10, epochs=2, num_samples=1000)
        >>> sampler.set_epoch(1)
        >>> 250 < sum(index >= 90 for index in sampler) < 350
        True
    """

    def __init__(
        self, labels: Vector, *, epochs: int, num_samples: int | None = None, seed: int = 0, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        super().__init__(labels, num_samples=num_samples, seed=seed, num_replicas=num_replicas, rank=rank)
        self.epochs = check_int("epochs", epochs, 1)

    def _class_mass(self, counts: Tensor) -> Tensor:
        done = min(1.0, self.epoch / self.epochs)
        return (1 - done) * counts / counts.sum() + done / counts.numel()


class ReversedSampler(_WeightedSampler):
    r"""Every class with a probability proportional to 1 / n_j, and then one of its samples, with replacement: the sampler of BBN's second branch.

    (Zhou, Cui, Wei and Chen, "BBN: bilateral-branch network with cumulative learning for long-tailed visual recognition", CVPR 2020, section 4.2.) The rarest
    class is drawn most: with an imbalance of 100, a hundred times as often as the most frequent one.

    Args:
        labels, seed, num_replicas, rank: as in :class:`InstanceBalancedSampler`.
        num_samples: draws in an epoch of all ranks together; default the number of labels.

    Raises:
        TypeError, ValueError: as :class:`InstanceBalancedSampler`.

    Example:
        >>> sampler = ReversedSampler([0] * 90 + [1] * 10, num_samples=1000)
        >>> 850 < sum(index >= 90 for index in sampler) < 950
        True
    """

    def _class_mass(self, counts: Tensor) -> Tensor:
        return 1 / counts


class EffectiveNumberSampler(_WeightedSampler):
    r"""Every sample with a probability proportional to its weight, the inverse of its class's effective number, with replacement.

        weight of a sample of class j = (1 - beta) / (1 - beta^n_j)

    (Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019, section 4; as a sampler in GCL, CVPR 2022, Table 5.)

    Args:
        labels, seed, num_replicas, rank: as in :class:`InstanceBalancedSampler`.
        beta: in [0, 1); 0 is instance-balanced, close to 1 is class-balanced. 0.9999 is the smallest beta of CBEN.
        num_samples: draws in an epoch of all ranks together; default the number of labels.

    Raises:
        TypeError, ValueError: as :class:`InstanceBalancedSampler`; beta out of range.

    Example:
        >>> sampler = EffectiveNumberSampler([0] * 90 + [1] * 10, num_samples=1000)
        >>> 450 < sum(index >= 90 for index in sampler) < 550
        True
    """

    def __init__(
        self, labels: Vector, *, beta: float = 0.9999, num_samples: int | None = None, seed: int = 0, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        super().__init__(labels, num_samples=num_samples, seed=seed, num_replicas=num_replicas, rank=rank)
        self.beta = check_beta(beta)

    def _class_mass(self, counts: Tensor) -> Tensor:
        return counts * inverse_effective_number(counts, counts.new_tensor(self.beta))


class CBENSampler(_WeightedSampler):
    r"""Class-based effective numbers, with replacement: the sampler of GCL's second stage.

        beta_j = 0.9999 + 0.00001 * cloud_sizes(class_counts)_j,    weight of a sample of class j = (1 - beta_j) / (1 - beta_j^n_j)

    (Li, Cheung and Lu, "Long-tailed visual recognition via Gaussian clouded logit adjustment", CVPR 2022, Eq. 13 and 14.) The release's README samples
    class-balanced; the paper's Table 5 prefers CBEN.

    Args:
        labels, seed, num_replicas, rank: as in :class:`InstanceBalancedSampler`.
        num_samples: draws in an epoch of all ranks together; default the number of labels.

    Raises:
        TypeError, ValueError: as :class:`InstanceBalancedSampler`.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0] * 90 + [1] * 10)
        >>> sampler = CBENSampler(labels, seed=1)
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(labels), batch_size=20, sampler=sampler)
        >>> sampler.set_epoch(0)
        >>> whole = [batch for (batch,) in loader]
        >>> sampler.set_epoch(0, position=3 * 20)
        >>> torch.equal(torch.cat([batch for (batch,) in loader]), torch.cat(whole[3:]))
        True
    """

    def _class_mass(self, counts: Tensor) -> Tensor:
        return counts * cben_weights(counts)


class ClassAwareSampler(_EpochSampler):
    """The classes in turn, `samples_per_class` samples of each, with a new order of classes every round. No sample repeats before its whole class was drawn.

    (Shen, Lin and Huang, "Relay backpropagation for effective learning of deep convolutional neural networks", ECCV 2016.) DRO-LT trains with 4 samples per
    class and num_samples = n_max * C.

    Args:
        labels, seed, num_replicas, rank: as in :class:`InstanceBalancedSampler`.
        samples_per_class: k, consecutive samples of a class; 1 is the paper's. DRO-LT needs more, because its loss pulls samples of a class together.
        num_samples: draws in an epoch of all ranks together; default the number of labels. The last round of an epoch may end early.

    Raises:
        TypeError, ValueError: as :class:`InstanceBalancedSampler`.

    Example:
        >>> sampler = ClassAwareSampler([0, 0, 0, 0, 1, 1], samples_per_class=2, num_samples=8)
        >>> order = list(sampler)
        >>> [sum(index >= 4 for index in order[start : start + 4]) for start in (0, 4)]
        [2, 2]
        >>> sorted(index for index in order if index < 4)
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        labels: Vector,
        *,
        samples_per_class: int = 1,
        num_samples: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(labels, num_samples=num_samples, seed=seed, num_replicas=num_replicas, rank=rank)
        self.samples_per_class = check_int("samples_per_class", samples_per_class, 1)

    def _order(self) -> Tensor:
        num_classes, each = self._groups.counts.numel(), self.samples_per_class
        # In a round every class has its turn, `each` consecutive draws. Rounds are numbered through all epochs.
        rounds = -(-self.num_samples // (num_classes * each))
        round_number = self.epoch * rounds + torch.arange(rounds)
        keys = self._words(_CLASS_ORDER, round_number.repeat_interleave(num_classes), torch.arange(num_classes).repeat(rounds))[:, 0]
        class_order = keys.view(rounds, num_classes).argsort(dim=1, stable=True).view(-1)
        draws = torch.arange(self.num_samples)
        number = round_number[draws // (num_classes * each)] * each + draws % each
        return self._without_replacement(self._groups, class_order[draws // each], number, rounds * each)
