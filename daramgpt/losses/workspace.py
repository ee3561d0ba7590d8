"""Buffers that outlive a call: on a CPU the page faults of large temporaries cost more than the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Workspace:
    """Buffers by name, grown when needed."""

    _buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def take(self, name: str, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[num_rows, num_columns] of the buffer of that name, grown when needed; its content is arbitrary."""
        key, size = (name, dtype, device), num_rows * num_columns
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            self._buffers.pop(key, None)
            # A buffer born in inference mode could not be written in training.
            with torch.inference_mode(False):
                buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(num_rows, num_columns)

    def borrow(self, name: str, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `take`, of what outlives the call: nobody else gets it until it is given back."""
        tensor = self.take(name, num_rows, num_columns, dtype, device)
        del self._buffers[name, dtype, device]
        return tensor

    def give_back(self, name: str, tensor: Tensor) -> None:
        """A contiguous tensor that was borrowed under that name."""
        buffer = tensor.view(-1)
        self._buffers.setdefault((name, tensor.dtype, tensor.device), buffer)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
