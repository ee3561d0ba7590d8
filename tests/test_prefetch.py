"""Reading ahead changes nothing but when micro-batches are read."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from daramgpt.shards.prefetch import BATCHES_AHEAD, Prefetch

CPU = torch.device("cpu")
DEADLINE_SECONDS = 30


class CountedFeed:
    """Three steps of two micro-batches, that say which they are; notes what is read, and by whom."""

    num_steps, micro_batches = 3, 2

    def __init__(self, broken: tuple[int, int] | None = None) -> None:
        self.broken = broken
        self.read: list[tuple[int, int]] = []
        self.readers: set[int] = set()

    def batch(self, step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.read.append((step, micro))
        self.readers.add(threading.get_ident())
        if (step, micro) == self.broken:
            raise OSError("the disk is gone")
        return torch.full((1, 4), 10 * step + micro), torch.full((1, 4), -(10 * step + micro))


def numbers(prefetch: Prefetch, step: int) -> list[int]:
    found = []
    for input_ids, labels in prefetch.batches(step):
        assert torch.equal(input_ids, -labels)
        found.append(int(input_ids[0, 0]))
    return found


def wait_until_read(feed: CountedFeed, num_batches: int) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while len(feed.read) < num_batches and time.monotonic() < end:
        time.sleep(0.001)


def make(feed: CountedFeed, device: torch.device = CPU) -> Prefetch:
    return Prefetch(feed, device)  # type: ignore[arg-type]


def test_every_micro_batch_comes_in_its_turn_and_is_read_once() -> None:
    feed = CountedFeed()
    prefetch = make(feed)
    assert [numbers(prefetch, step) for step in range(3)] == [[0, 1], [10, 11], [20, 21]]
    prefetch.close()
    assert feed.read == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert threading.get_ident() not in feed.readers and len(feed.readers) == 1


def test_it_reads_ahead_into_the_next_step_and_no_farther() -> None:
    feed = CountedFeed()
    prefetch = make(feed)
    batches = prefetch.batches(0)
    next(batches)
    wait_until_read(feed, 1 + BATCHES_AHEAD)
    time.sleep(0.05)
    assert feed.read == [(0, 0), (0, 1), (1, 0)]
    prefetch.close()


def test_a_step_that_is_fed_again_gets_its_own_rows() -> None:
    feed = CountedFeed()
    prefetch = make(feed)
    assert [numbers(prefetch, step) for step in (1, 1, 1, 2, 0)] == [[10, 11]] * 3 + [[20, 21], [0, 1]]
    prefetch.close()


def test_a_fault_of_reading_is_raised_where_its_micro_batch_is_due() -> None:
    feed = CountedFeed(broken=(1, 0))
    prefetch = make(feed)
    assert numbers(prefetch, 0) == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        numbers(prefetch, 1)
    prefetch.close()


def test_closing_ends_the_thread() -> None:
    feed = CountedFeed()
    before = threading.active_count()
    prefetch = make(feed)
    next(prefetch.batches(0))
    assert threading.active_count() == before + 1
    prefetch.close()
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_reaches_a_gpu_is_what_was_read() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    prefetch = make(CountedFeed(), device)
    for step in range(3):
        for micro, (input_ids, labels) in enumerate(prefetch.batches(step)):
            assert input_ids.device == labels.device == device
            assert input_ids.unique().item() == 10 * step + micro
    prefetch.close()
