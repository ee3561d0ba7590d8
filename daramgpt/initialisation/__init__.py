"""The weights that a student begins with, where they are not random.

`projection` makes the nearest thing to its teacher that its shape can be, `pruning` a part of the teacher that is
chosen by importance, `layers` takes blocks of another model of its width. `hidden_states` fits what a loss of hidden
states compares them by. `checks` says by configurations alone whether a recipe can have that.
"""

from __future__ import annotations

from daramgpt.initialisation.calibration import calibration_rows
from daramgpt.initialisation.checks import (
    check,
    check_layers,
    check_recipe,
    check_tokenizer,
    find,
    of_init_model,
    read_config,
    settled,
)
from daramgpt.initialisation.hidden_states import fit_projections
from daramgpt.initialisation.layers import take_layers
from daramgpt.initialisation.projection import project
from daramgpt.initialisation.pruning import prune
from daramgpt.vector_math import choose_kernels

__all__ = [
    "calibration_rows",
    "check",
    "check_layers",
    "check_recipe",
    "check_tokenizer",
    "find",
    "fit_projections",
    "of_init_model",
    "project",
    "prune",
    "read_config",
    "settled",
    "take_layers",
]

choose_kernels()
