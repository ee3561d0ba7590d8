"""torch's elementwise functions on a CPU, made to give the same at their first call as at every other.

torch has Intel's MKL compute them, a share of the elements a thread, and MKL looks up which kernel a function has when
it is called for the first time. In oneMKL 2024, which comes with torch's wheels for x86, threads that are there at the
same moment may be given the least exact kernel of all for that one call: with two threads, in 10 to 40 % of processes
half of the first exponentials were wrong by up to 1.5e-4 of their value, so that a training's first step was another
one (https://github.com/pytorch/pytorch/issues/188792). One element at a time has no other thread beside it.
"""

from __future__ import annotations

import functools

import torch

# Those that models, losses and optimizers call.
FUNCTIONS = ("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid", "erf", "sin", "cos")


@functools.cache
def choose_kernels() -> None:
    """Call every function once, alone; to be done before anything is computed with several threads."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(one)
