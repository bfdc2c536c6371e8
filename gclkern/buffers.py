"""Tensors of a module that are not parameters: class vectors that keep their dtype and values, and sums over one rank's samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class PreciseBuffers(nn.Module):
    """A module whose buffers follow ``.to(device)`` but keep their dtype under ``.half()`` and ``.to(dtype)``, also when a model that contains it is converted.

    Losses and sums compute in float32 or better, and a vector that was rounded to 16 bits would stay rounded after ``.float()``. The buffers follow from the
    arguments of the module, so they keep their values under ``.to_empty()``, and get their initial values when the module leaves the meta device.
    """

    _initial_buffers: dict[str, Tensor | None]

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        self.__dict__.setdefault("_initial_buffers", {})[name] = None if tensor is None else tensor.detach().to("cpu", copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, vector in before.items():
            moved = self._buffers[name]
            kept = self._initial_buffers[name] if vector is not None and vector.is_meta else vector
            if kept is not None and moved is not None:
                self._buffers[name] = kept.to(moved.device)
        return self


class RankState(nn.Module):
    """A module that adds up this rank's own samples in the tensors that `add_state` registers.

    They are not buffers, because DistributedDataParallel would overwrite buffers with those of rank 0. They follow ``.to(device)``, keep their dtype, are part
    of the state dict, and are 0 when the module leaves the meta device.
    """

    _state_names: list[str]

    def add_state(self, name: str, value: Tensor) -> None:
        self._state_names = [*self.__dict__.get("_state_names", ()), name]
        setattr(self, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self._state_names:
            value = getattr(self, name)
            device = fn(value).device
            setattr(self, name, torch.zeros_like(value, device=device) if value.is_meta else value.to(device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._state_names:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]
    ) -> None:
        for name in self._state_names:
            own, loaded = getattr(self, name), state_dict.pop(prefix + name, None)
            if loaded is None:
                if strict:
                    missing_keys.append(prefix + name)
            elif loaded.shape != own.shape:
                error_msgs.append(f"size mismatch for {prefix + name}: {tuple(loaded.shape)} in the state dict, {tuple(own.shape)} here")
            elif local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, loaded)
            else:
                with torch.no_grad():
                    own.copy_(loaded)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
