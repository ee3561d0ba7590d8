"""Micro-batches on the device, read and copied while it computes the ones before.

One thread reads, in the order of the feed, a few micro-batches ahead: a page of a shard that has to come from the disk
delays nobody. To a GPU they go through pinned memory on a stream of their own; the host waits for neither. What comes
out is what the feed gives, whatever was read ahead: a step that is fed again makes the thread start there again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from daramgpt.shards.feed import Feed

if TYPE_CHECKING:
    import torch

# One that is on its way while the one before it waits.
BATCHES_AHEAD = 2


class Prefetch:
    """The micro-batches of a feed, one step after another.

    Args:
        feed: what is read.
        device: where the tensors are wanted.
    """

    def __init__(self, feed: Feed, device: torch.device) -> None:
        import torch

        self._feed, self._device = feed, device
        self._num_batches = feed.num_steps * feed.micro_batches
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        # Numbers of micro-batches through the whole run, in order, and what the thread makes of them.
        self._ahead: deque[tuple[int, Future[tuple[torch.Tensor, torch.Tensor]]]] = deque()

    def batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The micro-batches of a step; ids and labels as from `Feed.batch`, on the device.

        Raises:
            Exception: whatever reading raised, when the micro-batch that it was read for is due.
        """
        first = step * self._feed.micro_batches
        for number in range(first, first + self._feed.micro_batches):
            yield self._take(number)

    def close(self) -> None:
        """End the thread; what it has read is forgotten."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def _take(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._ahead and self._ahead[0][0] != number:
            for _, future in self._ahead:
                future.cancel()
            self._ahead.clear()
        following = self._ahead[-1][0] + 1 if self._ahead else number
        for later in range(following, min(number + BATCHES_AHEAD + 1, self._num_batches)):
            self._ahead.append((later, self._thread.submit(self._read, later)))
        batch = self._ahead.popleft()[1].result()
        if self._stream is not None:
            import torch

            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in batch:
                # Its memory is not to be given to the next copy while the kernels that read it wait in the queue.
                tensor.record_stream(current)
        return batch

    def _read(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids, labels = self._feed.batch(*divmod(number, self._feed.micro_batches))
        if self._stream is None:
            return input_ids, labels
        import torch

        with torch.cuda.stream(self._stream):
            return (
                input_ids.pin_memory().to(self._device, non_blocking=True),
                labels.pin_memory().to(self._device, non_blocking=True),
            )
