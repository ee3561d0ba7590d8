"""The largest micro-batch of a row under a cap of memory.

On a GPU steps are run, at twice the size until one does not fit and then between the two. On a CPU nothing refuses
memory, and large steps take minutes: there the peaks of steps of two sizes give a straight line. Its sizes are such
that what does not grow with the micro-batch, like the buffers of a fused loss, is in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# The search ends when it knows the answer so well.
RESOLUTION = 1 / 16
# A size that no measurement needs; a search that gets so far has no cap to find.
MOST_TOKENS = 2**22


def warm_up_sizes(micro_batch_tokens: int, chunk_tokens: int, unit_tokens: int, first_tokens: int) -> list[int]:
    """Sizes to run before the first repetition, the last of them its own.

    Args:
        micro_batch_tokens: of the repetitions.
        chunk_tokens: positions from which on the loss takes no more memory.
        unit_tokens: what a micro-batch larger than this is a multiple of.
        first_tokens: of the very first step, whose loss is compared between rows.
    """
    smaller = max(chunk_tokens, micro_batch_tokens // 4)
    if smaller > unit_tokens:
        smaller = -(-smaller // unit_tokens) * unit_tokens
    is_of_use = 2 * first_tokens <= smaller <= micro_batch_tokens // 2
    return [first_tokens, *([smaller] if is_of_use else []), micro_batch_tokens]


def later_sizes(micro_batch_tokens: int, chunk_tokens: int, measured: Sequence[int]) -> list[int]:
    """Sizes still to run for a line, after the last repetition."""
    return [] if len([size for size in measured if size >= chunk_tokens]) >= 2 else [2 * micro_batch_tokens]


def by_line(peaks: dict[int, int], chunk_tokens: int, cap_bytes: int, unit_tokens: int) -> int | None:
    """Positions at which a straight line through the outermost sizes reaches the cap; None where it does not rise.

    Args:
        peaks: most bytes held, by positions of the micro-batch.
        chunk_tokens: smaller sizes are left out.
        cap_bytes: of memory.
        unit_tokens: the result is a multiple of this.
    """
    sizes = sorted(size for size in peaks if size >= chunk_tokens)
    if len(sizes) < 2 or peaks[sizes[-1]] <= peaks[sizes[0]]:
        return None
    slope = (peaks[sizes[-1]] - peaks[sizes[0]]) / (sizes[-1] - sizes[0])
    tokens = sizes[0] + (cap_bytes - peaks[sizes[0]]) / slope
    return max(0, int(tokens // unit_tokens * unit_tokens))


def by_search(fits: Callable[[int], bool], start_tokens: int, unit_tokens: int) -> int:
    """Largest multiple of `unit_tokens` found to fit, to within `RESOLUTION`; 0 where not even one unit does.

    Args:
        fits: runs a step.
        start_tokens: tried first.
        unit_tokens: smallest step of the search.
    """

    def rounded(tokens: float) -> int:
        return max(unit_tokens, int(tokens // unit_tokens * unit_tokens))

    size, largest, smallest_unfit = rounded(start_tokens), 0, None
    while smallest_unfit is None and size <= MOST_TOKENS:
        if fits(size):
            largest, size = size, 2 * size
        else:
            smallest_unfit = size
    while smallest_unfit is not None:
        size = rounded((largest + smallest_unfit) / 2)
        if size in (largest, smallest_unfit) or smallest_unfit - largest <= largest * RESOLUTION:
            break
        if fits(size):
            largest = size
        else:
            smallest_unfit = size
    return largest
