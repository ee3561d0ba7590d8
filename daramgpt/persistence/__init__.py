"""Copies of a run outside of its machine: free sessions lose their disk.

A *place* holds ``<run name>/`` like the run directory: recipe, plan, ledger, metrics and the newest checkpoints, of the
run and of its parts, and what a part exported; shards are made anew. `Persister` copies after each save, in a thread of
its own; `fetch` brings back what is newest when a session begins. A `Hook` is given each checkpoint and does what it
likes with it.
"""

from __future__ import annotations

from daramgpt.persistence.fetching import fetch
from daramgpt.persistence.hook import Hook
from daramgpt.persistence.persister import Persister
from daramgpt.persistence.place import Place, Target
from daramgpt.persistence.place_directory import DirectoryPlace
from daramgpt.persistence.place_hub import HubPlace

__all__ = ["DirectoryPlace", "Hook", "HubPlace", "Persister", "Place", "Target", "fetch"]
