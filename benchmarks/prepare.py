"""Speed and memory of prepare, beside the tokenizer alone on the same units.

    python -m benchmarks.prepare --corpus DIR --tokenizer DIR [--json FILE] [--repetitions N] [--salted-copies N]
                                 [--runs DIR]

The corpora of DIR but Wikipedia are prepared in one fresh process, from its start to the finished shards, and
Wikipedia, whose markup costs more than its tokens, in another; each is followed by the tokenizer alone in a fresh
process of its own. All rates are of text: UTF-8 bytes of the units, held-out ones included. ``text_…``,
``tokenizer_…`` and ``ratio_without_wiki`` are of the corpora without Wikipedia; where DIR holds nothing else, the first
two are of Wikipedia and the ratio is null. README.md defines every key.

This process imports no torch before it has measured: a library that it mapped as well would count by half in the peak
of the process that it watches.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import command, machine, salted_corpus
from benchmarks.prepare_sides import Ended, run_side
from benchmarks.process_tree import require_smaps_rollup
from daramgpt import corpora
from daramgpt import recipe as recipes
from daramgpt.errors import UserError
from daramgpt.recipe import Recipe

# In the order of the full recipe.
CORPORA = ("web", "unpublished", "wiki", "written")
PLAIN_FORMATS = ("text", "jsonl")
# More than any corpus has.
TAKE = "1000000GB"


def find_corpora(corpus_dir: Path) -> dict[str, str]:
    """Formats of the corpora in a folder, by name; plain text or JSON lines count where none of the four is there.

    Raises:
        UserError: no such folder, or nothing in it.
    """
    for names in (CORPORA, PLAIN_FORMATS):
        found = {}
        for name in names:
            try:
                found[name] = corpora.find(corpus_dir, name).format
            except UserError as error:
                missing = error
        if found:
            return found
    if not corpus_dir.is_dir():
        raise missing
    raise UserError(
        f"{corpus_dir} holds none of {', '.join((*CORPORA, *PLAIN_FORMATS))}",
        "name the folder of corpora with --corpus",
    )


def make_recipe(corpus_dir: Path, formats: dict[str, str], tokenizer_dir: Path) -> Recipe:
    """One stage a corpus, each to its end, in the units of the full recipe."""
    stages = [
        {"name": name, "corpus": name, "take": TAKE, "unit": "paragraph" if name == "written" else "sentence"}
        for name in formats
    ]
    data = {
        "name": "prepare-benchmark",
        "corpus": {"dir": str(corpus_dir.resolve()), "formats": formats},
        "curriculum": {"stages": stages},
        "teacher": {"model": str(tokenizer_dir.resolve())},
    }
    return recipes.validate(data, "the recipe of the benchmark")


def measure(
    corpus_dir: Path,
    tokenizer_dir: Path,
    folder: Path,
    num_repetitions: int = 1,
    num_copies: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The result without hardware; `folder` takes shards and copies while they are needed.

    Raises:
        UserError: a corpus, the tokenizer, or this system's account of memory is missing or unusable.
    """
    require_smaps_rollup()
    formats = find_corpora(corpus_dir)
    groups = [{name: formats[name] for name in formats if (name == "wiki") == is_wiki} for is_wiki in (False, True)]
    prepared: dict[str, list[Ended]] = {}
    alone: dict[str, list[Ended]] = {}
    for _ in range(num_repetitions):
        for group in filter(None, groups):
            # One after the other in each repetition: whatever else the machine does falls on both alike.
            recipe, what = make_recipe(corpus_dir, group, tokenizer_dir), ", ".join(group)
            say(f"prepare: {what}")
            prepared.setdefault(what, []).append(run_side("prepare", recipe, folder))
            say(f"tokenizer alone: {what}")
            alone.setdefault(what, []).append(run_side("tokenizer", recipe, folder))
            fed = [
                {stage["name"]: stage["text_bytes"] for stage in side[what][-1].stages} for side in (prepared, alone)
            ]
            assert fed[0] == fed[1], f"prepare and the tokenizer were not fed the same bytes: {fed}"
    everything = make_recipe(corpus_dir, formats, tokenizer_dir)
    say("splitter")
    splitter = run_side("splitter", everything, folder)
    # Watching takes a share of the cores, so it has a run of its own.
    say("peak memory: all corpora")
    watched = run_side("prepare", everything, folder, watches_memory=True)
    measured = result(list(prepared.values()), list(alone.values()), splitter, watched)
    if num_copies:
        measured |= measure_growth(corpus_dir, formats, tokenizer_dir, folder, num_copies, watched, say)
    return measured


def result(prepared: list[list[Ended]], alone: list[list[Ended]], splitter: Ended, watched: Ended) -> dict[str, Any]:
    """The result from its sides, of each of which the median repetition counts.

    Args:
        prepared: repetitions of prepare: of the corpora without wiki, if there are any, then of wiki, if it is there.
        alone: repetitions of the tokenizer alone, of the same.
        splitter: the splitter alone.
        watched: prepare of all corpora, its memory watched.
    """
    sides = [
        (_median(by_prepare, lambda ended: ended.seconds), _median(by_tokenizer, lambda ended: ended.stage_seconds))
        for by_prepare, by_tokenizer in zip(prepared, alone, strict=True)
    ]
    (first, first_alone), (last, _) = sides[0], sides[-1]
    is_wiki_there, is_wiki_alone = last.stages[-1]["name"] == "wiki", first.stages[0]["name"] == "wiki"
    text_rate = _megabytes_per_second(first.text_bytes, first.seconds)
    tokenizer_rate = _megabytes_per_second(first_alone.text_bytes, first_alone.stage_seconds)
    # Each by the tokenizer that ran right after it: a machine shared with others is faster at one time than at another.
    ratios = [
        tokenizer.stage_seconds / prepare.seconds for prepare, tokenizer in zip(prepared[0], alone[0], strict=True)
    ]
    return {
        "text_megabytes_per_second": text_rate,
        "tokenizer_megabytes_per_second": tokenizer_rate,
        "ratio_without_wiki": None if is_wiki_alone else statistics.median(ratios),
        "lowest_and_highest_ratio": None if is_wiki_alone else [min(ratios), max(ratios)],
        "wiki_megabytes_per_second": _megabytes_per_second(last.text_bytes, last.seconds) if is_wiki_there else None,
        "splitter_megabytes_per_second": (
            _megabytes_per_second(splitter.text_bytes, splitter.stage_seconds) if splitter.stages else None
        ),
        "peak_memory_bytes": watched.peak_memory_bytes,
        "repetitions": len(prepared[0]),
        "rows": [
            {
                **stage,
                "megabytes_per_second": _megabytes_per_second(stage["text_bytes"], stage["seconds"]),
                "tokenizer_megabytes_per_second": _megabytes_per_second(encoded["text_bytes"], encoded["seconds"]),
            }
            for by_prepare, by_tokenizer in sides
            for stage, encoded in zip(by_prepare.stages, by_tokenizer.stages, strict=True)
        ],
        "small": None,
        "large": None,
        "memory_growth": None,
    }


def measure_growth(
    corpus_dir: Path,
    formats: dict[str, str],
    tokenizer_dir: Path,
    folder: Path,
    num_copies: int,
    small: Ended,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """``small``, ``large`` and ``memory_growth``: prepare on all corpora, and on so many salted copies of them."""
    with tempfile.TemporaryDirectory(prefix="copies-", dir=folder) as copies:
        say(f"writing {num_copies} salted copies")
        salted_corpus.write_salted(corpus_dir, formats, num_copies, Path(copies))
        say("peak memory: all copies")
        large = run_side("prepare", make_recipe(Path(copies), formats, tokenizer_dir), folder, watches_memory=True)

    def figures(ended: Ended, times: int) -> dict[str, Any]:
        return {
            "copies": times,
            "text_bytes": ended.text_bytes,
            "seconds": ended.seconds,
            "peak_memory_bytes": ended.peak_memory_bytes,
        }

    return {
        "small": figures(small, 1),
        "large": figures(large, num_copies),
        "memory_growth": large.peak_memory_bytes / small.peak_memory_bytes,
    }


def format_result(result: dict[str, Any]) -> str:
    """The table and what stands below it."""
    header = ("corpus", "text MB", "tokens", "seconds", "MB/s", "tokenizer alone MB/s")
    cells = [
        (
            row["name"],
            f"{row['text_bytes'] / 1e6:,.1f}",
            f"{row['tokens']:,}",
            f"{row['seconds']:,.1f}",
            f"{row['megabytes_per_second']:.2f}",
            f"{row['tokenizer_megabytes_per_second']:.2f}",
        )
        for row in result["rows"]
    ]
    lines = [
        machine.format_table(header, cells),
        f"end to end {result['text_megabytes_per_second']:.2f} MB/s, tokenizer alone "
        f"{result['tokenizer_megabytes_per_second']:.2f} MB/s, "
        f"ratio without wiki {_shown(result['ratio_without_wiki'])}{_range(result['lowest_and_highest_ratio'])}",
        f"wiki end to end {_shown(result['wiki_megabytes_per_second'])} MB/s; "
        f"splitter on one core {_shown(result['splitter_megabytes_per_second'])} MB/s; "
        f"peak memory {result['peak_memory_bytes'] / 1e6:,.0f} MB",
    ]
    if result["memory_growth"] is not None:
        small, large = (
            f"{part['peak_memory_bytes'] / 1e6:,.0f} MB for {part['text_bytes'] / 1e6:,.1f} MB of text"
            for part in (result["small"], result["large"])
        )
        lines.append(f"peak memory {small}, {large}: {result['memory_growth']:.2f} times")
    return "\n".join(lines)


def _range(extremes: list[float] | None) -> str:
    return "" if extremes is None else " ({:.2f} to {:.2f})".format(*extremes)


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _median(repetitions: list[Ended], key: Callable[[Ended], float]) -> Ended:
    median = statistics.median_low(map(key, repetitions))
    return next(ended for ended in repetitions if key(ended) == median)


def _megabytes_per_second(num_bytes: int, seconds: float) -> float:
    return num_bytes / 1e6 / max(seconds, 1e-9)


def main() -> int:
    parser = command.parser("prepare", __doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that holds the corpora")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder that holds tokenizer.json")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--repetitions", type=int, default=1, help="of each side, in turn; the median counts")
    parser.add_argument(
        "--salted-copies", type=int, default=0, help="also compare peak memory with that for so many copies"
    )
    parser.add_argument("--runs", type=Path, help="folder for what is written meanwhile (default: the system's)")
    arguments = parser.parse_args()
    if arguments.repetitions < 1 or arguments.salted_copies < 0:
        parser.error("--repetitions is at least 1, --salted-copies at least 0")
    if arguments.runs is not None:
        arguments.runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="daramgpt-prepare-", dir=arguments.runs) as folder:
        return command.run(
            lambda: measure(
                arguments.corpus,
                arguments.tokenizer,
                Path(folder),
                arguments.repetitions,
                arguments.salted_copies,
                command.progress,
            ),
            format_result,
            arguments.json,
        )


if __name__ == "__main__":
    sys.exit(main())
