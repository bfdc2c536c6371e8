"""Seeds of everything random in a run.

The order of the samples, their augmentation, mixup, the noise of the loss and dropout are pure functions of (seed of the run, phase, epoch, step). A checkpoint
therefore stores no generator state, and a run that resumes from any step produces bitwise the same results as one that never stopped.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: object) -> int:
    """A seed of 63 bits for a purpose, such as ("noise", epoch, step); unrelated for different seeds and purposes.

    Example:
        >>> derive_seed(0, "noise", 1) == derive_seed(0, "noise", 1), derive_seed(0, "noise", 1) == derive_seed(0, "noise", 2)
        (True, False)
    """
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
