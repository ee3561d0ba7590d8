"""Measurements: each module prints a table and, with ``--json FILE``, writes it with hardware and versions."""
