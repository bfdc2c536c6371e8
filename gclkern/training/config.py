"""The settings of a run, as the user gave them: :class:`RunConfig`.

Error messages of the training library put settings in backticks, such as `lr` or `amp=bf16`, so that train.py can replace them by its flags.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from gclkern.training.data import CIFAR
from gclkern.training.data.files import DEFAULT_WORKERS

# Settings that a resumed run may change, since they do not affect its results. That the data is the same is checked separately, by its identity.
MAY_CHANGE_ON_RESUME = frozenset({"data_dir", "train_list", "test_list", "download", "workers", "device", "checkpoint_seconds", "pictures", "logger"})
# Settings that stage 1 does not depend on: runs that differ only in these can share it.
STAGE_1_IGNORES = MAY_CHANGE_ON_RESUME | {"stage1", "eval_every", "retrain", "sampler", "retrain_epochs", "retrain_batch_size", "retrain_lr", "tau", "baseline"}


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run; None is the published setting of the method and the data set, or what the comment says.

    Example:
        >>> RunConfig(method="ce", lr=0.05).changed_from(RunConfig())
        ['lr', 'method']
    """

    data: str = "digits-lt"
    data_dir: str = "data"
    download: bool = False
    imbalance: float | None = None  # 20 for digits, 100 for CIFAR
    profile: str = "exp"
    holdout: float | None = None  # 0.1 for sets of one's own that are large enough, 0 for others
    train_list: str | None = None
    test_list: str | None = None
    image_size: int | None = None  # 224 for the published sets, the images' usual size for other sets
    workers: int = DEFAULT_WORKERS
    skip_corrupt: bool = False

    method: str = "gcl"
    retrain: str | None = None
    stage1: str | None = None  # checkpoint of a finished stage 1; None trains one
    sampler: str | None = None
    robust_layers: str | None = None
    cloud: str | None = None
    noise_mul: float | None = None  # for all phases whose loss has it, like the next two
    margin: float | None = None
    scale: float | None = None
    stage1_sampler: str | None = None
    mixup: float | None = None
    augment: str | None = None
    baseline: bool | None = None  # only on digits-lt
    model: str | None = None
    pretrained: bool | None = None
    train: str | None = None

    epochs: int | None = None
    epochs_scale: float = 1.0
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    retrain_epochs: int | None = None
    retrain_batch_size: int | None = None
    retrain_lr: float | None = None
    tau: float | None = None  # searched on the held-out images; 1 without them
    accumulate: int = 1
    ema: float = 0.0
    seed: int = 0

    device: str = "auto"
    amp: str = "off"
    compile: bool = False
    capture: bool | None = None  # where possible
    shard_classes: bool = False
    channels_last: bool = False
    deterministic: bool = False

    eval_every: int | None = None  # a twentieth of the phase
    checkpoint_seconds: float = 30.0
    pictures: bool = True
    logger: str | None = None  # beside TensorBoard

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: `values` does not have exactly the fields of this class; the message names those that differ.
        """
        names = {field.name for field in fields(cls)}
        if different := sorted(names ^ values.keys()):
            settings = ", ".join(different)
            raise ValueError(f"it was written by another version of gclkern, whose settings differ from this one's ({settings}); use the version that wrote it")
        return cls(**values)

    def changed_from(self, other: RunConfig) -> list[str]:
        """Names of the fields whose values differ, in alphabetical order."""
        return sorted(field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name))

    def resumed(self, changes: dict[str, Any]) -> RunConfig:
        """The settings of a resumed run, with some of them changed.

        Raises:
            ValueError: a change that would alter the results.
        """
        config = replace(self, **changes)
        for name in config.changed_from(self):
            if name not in MAY_CHANGE_ON_RESUME:
                old, new = getattr(self, name), getattr(config, name)
                raise ValueError(f"`{name}`: the run was started with {old}, now it is {new}; leave `{name}` out or start a new run")
        return config

    def check_used(self, given: Iterable[str]) -> None:
        """Raise an error for settings that were given explicitly but have no effect on this run, since they are mistakes.

        Raises:
            ValueError: a setting of `given` has no effect.
        """
        files = self.data != "digits-lt" and self.data not in CIFAR
        lists = files and self.data != "folder"
        used = {"train_list": lists, "test_list": lists, "image_size": files, "skip_corrupt": files, "imbalance": not files, "profile": not files}
        used |= {"data_dir": self.data != "digits-lt", "workers": files, "download": self.data in CIFAR, "tau": self.retrain in ("tau-norm", "post-hoc-la")}
        for name in given:
            if not used.get(name, True):
                choice = "without `retrain=tau-norm` or `retrain=post-hoc-la`" if name == "tau" else f"with `data={self.data}`"
                of_files = self.data == "digits-lt" and name in ("data_dir", "image_size", "skip_corrupt", "workers")
                raise ValueError(f"`{name}` does nothing {choice}; {'for images of your own add `data=folder`' if of_files else 'leave it out'}")
