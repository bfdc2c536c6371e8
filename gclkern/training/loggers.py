"""Where the curves of a run go beside metrics.csv: TensorBoard wherever it is installed, and Weights & Biases or MLflow on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gclkern.training.extras import need

_PROJECT = "gclkern"  # the project of Weights & Biases, the experiment of MLflow


class LoggerError(RuntimeError):
    """Weights & Biases or MLflow has refused or failed, for example because nobody is logged in or the server does not answer."""


class Logger(Protocol):
    """Receives the curves of a run while it trains, and its results at the end."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The values of an epoch; `step` counts the epochs of all phases."""

    def finish(self, folder: Path, config: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The settings with their results, and the pictures in the folder of the run; nothing follows."""


class TensorBoard:
    """Event files in the folder of the run."""

    def __init__(self, folder: Path, step: int) -> None:
        """A resumed run overwrites the steps from `step` on."""
        self._writer = need("torch.utils.tensorboard.writer", "TensorBoard").SummaryWriter(str(folder), purge_step=step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, folder: Path, config: Mapping[str, Any], results: Mapping[str, float]) -> None:
        for picture in sorted(folder.glob("*.png")):
            with need("PIL.Image", "pictures in TensorBoard").open(picture) as image:
                self._writer.add_image(picture.stem, np.asarray(image.convert("RGB")), dataformats="HWC")
        settings = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in config.items()}
        self._writer.add_hparams(settings, {f"final/{name}": value for name, value in results.items()}, run_name=".")  # in the run's own folder
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; its own environment variables choose the server, or none with WANDB_MODE=offline."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._wandb = need("wandb", "`logger=wandb`")
        known = _known_run(folder / "wandb-run.txt")
        self._run = self._wandb.init(project=_PROJECT, name=folder.name, id=known, resume="allow", dir=str(folder), config=dict(config))
        (folder / "wandb-run.txt").write_text(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, folder: Path, config: Mapping[str, Any], results: Mapping[str, float]) -> None:
        self._run.log({picture.stem: self._wandb.Image(str(picture)) for picture in sorted(folder.glob("*.png"))})
        self._run.summary.update(dict(results))
        self._run.finish()


class MLflow:
    """A run of MLflow, on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._mlflow = need("mlflow", "`logger=mlflow`")
        self._mlflow.set_experiment(_PROJECT)
        run = self._mlflow.start_run(run_id=_known_run(folder / "mlflow-run.txt"), run_name=folder.name)
        (folder / "mlflow-run.txt").write_text(run.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def finish(self, folder: Path, config: Mapping[str, Any], results: Mapping[str, float]) -> None:
        self._mlflow.log_params(dict(config))
        self._mlflow.log_metrics({f"final/{name}": value for name, value in results.items()})
        for picture in sorted(folder.glob("*.png")):
            self._mlflow.log_artifact(str(picture))
        self._mlflow.end_run()


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


class Chosen:
    """A logger of LOGGERS, whose errors become :class:`LoggerError`."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._name = name
        with self._errors():
            self._logger = LOGGERS[name](folder, config)

    def log(self, values: Mapping[str, float], step: int) -> None:
        with self._errors():
            self._logger.log(values, step)

    def finish(self, folder: Path, config: Mapping[str, Any], results: Mapping[str, float]) -> None:
        with self._errors():
            self._logger.finish(folder, config, results)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ImportError:  # its message has the remedy
            raise
        except Exception as error:  # each of these libraries has errors of its own
            raise LoggerError(f"`logger={self._name}` failed ({str(error).strip()}); put that right, or pass `logger=none`") from error


def open_loggers(chosen: str | None, folder: Path, config: Mapping[str, Any], step: int) -> list[Logger]:
    """TensorBoard where it is installed, and the logger `chosen` of LOGGERS.

    Raises:
        ImportError: the package of the chosen logger is not installed; the message has the command.
        LoggerError: the chosen logger cannot start.
    """
    loggers: list[Logger] = []
    with suppress(ImportError):
        loggers.append(TensorBoard(folder, step))
    return loggers if chosen is None else [*loggers, Chosen(chosen, folder, config)]


def _known_run(path: Path) -> str | None:
    """The identifier of the run that is resumed; None for a new one."""
    return path.read_text() if path.exists() else None
