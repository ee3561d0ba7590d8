"""Settings of every test process, made before any of them imports torch."""

from __future__ import annotations

import os

# Several processes share the cores: OpenMP threads that wait in a loop would hold what another one needs, and two
# trainings beside each other would take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
