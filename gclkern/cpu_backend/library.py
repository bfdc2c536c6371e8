"""The compiled library of this package: finding it, checking that it can be used, and calling its functions.

setup.py compiles native/*.c into a shared library beside this file, which ctypes loads; it links against neither Python nor torch. Where it was compiled with
Python's headers, it is a module of Python too, whose functions gclkern.ready calls. Rows are distributed over torch's own threads by `torch_parallel_for` of
torch's stable C interface, so the process has one pool of threads, whose size torch.set_num_threads sets.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import struct
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}


def _structure(members: str) -> struct.Struct:
    """A structure of native.h from the names of its members: `*` marks a pointer, `.` a double; others are int64. Its `pack` takes their values."""
    return struct.Struct("".join({"*": "P", ".": "d"}.get(member[-1], "q") for member in members.split()))


Logits = _structure(
    "num_rows num_classes target* target_b* lam* cloud* margin* bias* weight* smoothing* seed* scale. gamma. label_smoothing. focal_detach ignore_index "
    "row_offset class_offset reduction angular difficulty_margin easy_margin weight_sum. divisor. matrix* dtype row_stride class_stride class_factor* "
    "kept* block_peaks* sums* first_class num_columns statistics* losses* top1* loss* gradient* over_factor threads"
)
Product = _structure("num_rows num_columns made* grad_loss* grad_stride gradient* dtype scale. grad_bias* partial_sums* strips threads")
Rows = _structure("num_rows dim matrix* dtype row_stride column_stride no_direction. inverse* products* factor* out* out_dtype threads")
Noise = _structure("num_rows num_classes seed* row_offset class_offset out* threads")
Bound = _structure(
    "num_samples num_classes dim max_rows features* target* centroids* epsilon* epsilon_stride class_weight* temperature. reduction distance* statistics* "
    "classes* label* members* losses* loss* grad_loss* grad_stride pull* grad_features* grad_epsilon* row_epsilon* threads"
)
Segments = _structure("num_rows num_classes dim features* dtype row_stride column_stride target* order* starts* parts* num_parts sums* counts* means threads")
Contrast = _structure(
    "num_samples num_keys dim num_classes features* dtype row_stride column_stride prototypes* prototype_dtype prototype_row_stride prototype_column_stride "
    "target* class_counts* temperature. include_samples include_own_class reduction unit* statistics* order* label* first* last* sums* loss* tile* "
    "top bottom left right parts* has_exponentials pull* grad_loss* grad_stride rates* unit_gradient* grad_features* grad_prototypes* threads"
)

_FUNCTIONS = (
    "logit_loss", "logit_forward", "logit_finish", "logit_backward", "logit_gradient", "gradient_times", "inverse_norms", "project", "noise", "bound_forward",
    "bound_backward", "segment_sums", "contrast_begin", "contrast_sums", "contrast_pull", "contrast_rows",
)  # fmt: skip
_RESULTS = ("logit_loss", "segment_sums")  # the functions that return one of these:
DONE, WRONG_VALUES, NO_MEMORY = range(3)


def source_hash(folder: Path = _FOLDER / "native") -> str:
    """The hash of the sources, which the compiled library stores, so that an outdated one is not used; empty without sources."""
    sources = sorted(folder.glob("*.[ch]"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()[:16] if sources else ""


def _parallel_for() -> int | None:
    """The address of torch's function; if it is None everything runs in the caller's thread."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, set up for this process."""
    library = ctypes.CDLL(str(path))
    for name in _FUNCTIONS:
        function = getattr(library, f"gclkern_{name}")
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64 if name in _RESULTS else None
    library.gclkern_instructions.restype = library.gclkern_sources.restype = ctypes.c_char_p
    library.gclkern_setup.argtypes, library.gclkern_setup.restype = [ctypes.c_void_p], None
    library.gclkern_setup(_parallel_for())
    # a forked process has none of its parent's threads, but OpenMP would wait for them forever
    os.register_at_fork(after_in_child=lambda: library.gclkern_setup(None))
    return library


def module_of(library: ctypes.CDLL | None) -> ModuleType | None:
    """The library as a module of Python; None if it was compiled without Python's headers."""
    spec = None if library is None else importlib.util.spec_from_file_location("_native", library._name)
    if spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        return None
    return module


def _find() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none. A checkout without a compiled library uses that of an installation with equal sources."""
    sources = source_hash()
    folders = [_FOLDER, *(Path(entry, *_FOLDER.parts[-2:]) for entry in sys.path if sources)]
    candidates = [path for folder in folders for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").exists()]
    if not candidates:
        return None, "its loops are not compiled: install a C compiler, then `pip install .`, or `python setup.py build_ext --inplace` in a checkout"
    reasons = []
    for path in candidates:
        try:
            library = load(path)
        except (OSError, AttributeError) as error:
            reasons.append(f"{path} cannot be loaded: {error}")
            continue
        if sources in ("", library.gclkern_sources().decode()):
            return library, ""
        reasons.append(f"{path} was compiled from other sources: run `python setup.py build_ext --inplace` again")
    warnings.warn(f"compiled loops are not used: {reasons[0]}", stacklevel=2)
    return None, reasons[0]


# Looked up once, on import, because a function that torch.compile traces cannot search for files. `missing` says why there is no library, and the remedy.
_library, missing = _find()
is_available = _library is not None


def summary() -> str:
    """The code that is used for tensors on a CPU, in one line."""
    if _library is None:
        return f"torch operators ({missing})"
    return f"compiled loops ({_library.gclkern_instructions().decode()}) on {torch.get_num_threads()} threads"


def call(name: str, arguments: bytes) -> Any:
    """Runs the library's function `name`, which does not write to the packed structure `arguments`."""
    if _library is None:
        raise RuntimeError(missing)
    return getattr(_library, f"gclkern_{name}")(arguments)


NULL = 0


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element. The tensor is contiguous, or its strides are passed too."""
    return NULL if tensor is None else tensor.data_ptr()
