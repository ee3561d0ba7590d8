"""Which model a directory holds, wherever it lies: a run goes on with the teacher that it was begun with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from daramgpt.errors import UserError

# Of a file of weights: two fine-tunings of one model may differ in a few layers only.
SAMPLES, SAMPLE_BYTES = 256, 4096
# Keys of a config that say nothing about what is computed, and change with the version of transformers.
_UNSAID = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def fingerprint(model_dir: Path) -> str:
    """sha256 over the config and over names, sizes and samples of the weights' files; takes milliseconds.

    Args:
        model_dir: a Hugging Face directory.

    Raises:
        UserError: its config cannot be read.
    """
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        keys = {key: value for key, value in config.items() if key not in _UNSAID}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"teacher.model: {path}: {error}", "give the folder of a Hugging Face model") from None
    digest = hashlib.sha256(json.dumps(keys, sort_keys=True).encode())
    for path in sorted(model_dir.glob("*.safetensors")) or sorted(model_dir.glob("*.bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
