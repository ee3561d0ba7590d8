"""The sides of the prepare measurement, each a fresh process that writes its figures as JSON to stdout.

    python -m benchmarks.prepare_sides prepare|tokenizer|splitter RECIPE.toml TOKENIZER RUN

``prepare`` is what ``python -m daramgpt prepare`` does once it knows its recipe. ``tokenizer`` encodes the same units
and nothing else: reading is not timed, batches are large, the library uses its threads as it likes. ``splitter`` cuts
whole paragraphs on one core. A fault that the user can mend ends the process with code 2 and is written as
``{"fault", "mend"}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.process_tree import PeakOfTree
from daramgpt import corpora
from daramgpt import recipe as recipes
from daramgpt.corpora import ReadReport
from daramgpt.curriculum import find_corpora
from daramgpt.curriculum import stages as stages_of
from daramgpt.errors import UserError
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory

# Large enough to keep all cores busy, small enough that its encodings are no matter of memory.
BATCH_UNITS, BATCH_BYTES = 8192, 4_000_000
WARM_UP_UNITS = 1024
# Of each corpus, at most: the splitter's speed depends on the kind of text, not on how much there is.
SPLITTER_BYTES = 20_000_000
ROOT = Path(__file__).parents[1]
LOG_LINES_SHOWN = 20


@dataclass(frozen=True)
class Ended:
    """A side that has ended.

    Attributes:
        seconds: from the start of its process to its end.
        peak_memory_bytes: of the process and its descendants, pages that they share counted once; 0 if not watched.
        stages: what it measured of each.
    """

    seconds: float
    peak_memory_bytes: int
    stages: list[dict[str, Any]]

    @property
    def text_bytes(self) -> int:
        return sum(stage["text_bytes"] for stage in self.stages)

    @property
    def stage_seconds(self) -> float:
        """Seconds of the stages alone, without what comes before and after."""
        return sum(stage["seconds"] for stage in self.stages)


def run_side(side: str, recipe: Recipe, folder: Path, watches_memory: bool = False) -> Ended:
    """Run a side in a fresh process to its end.

    Args:
        side: a key of `SIDES`.
        recipe: its teacher is the folder of the tokenizer.
        folder: takes what the side writes, which is removed afterwards.
        watches_memory: whether to fill ``peak_memory_bytes``, which costs the side some of its speed.

    Raises:
        UserError: as the side raised it, or this system does not say how memory is shared.
        RuntimeError: the side failed; its last words.
    """
    assert recipe.teacher is not None and recipe.teacher.model is not None
    with tempfile.TemporaryDirectory(prefix=f"{side}-", dir=folder) as own:
        recipe_file, log, run = Path(own) / "recipe.toml", Path(own) / "log.txt", Path(own) / "run"
        recipe_file.write_text(recipes.dump(recipe), encoding="utf-8")
        line = [
            sys.executable,
            # Not as a module: the processes that prepare starts would import it again, as those of a user do not.
            "-c",
            "import sys; from benchmarks.prepare_sides import main; sys.exit(main(*sys.argv[1:]))",
            side,
            str(recipe_file),
            recipe.teacher.model,
            str(run),
        ]
        search_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": search_path}
        with log.open("wb") as errors:
            begin = time.monotonic()
            process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=errors)
            memory = PeakOfTree(process.pid)
            with process, memory if watches_memory else nullcontext():
                output, _ = process.communicate()
                seconds = time.monotonic() - begin
        if process.returncode == 2:
            raise UserError(**json.loads(output))
        if process.returncode:
            last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:])
            raise RuntimeError(f"the side {side} ended with exit code {process.returncode}:\n{last}")
        return Ended(seconds, memory.peak_bytes, json.loads(output))


def prepare(recipe: Recipe, tokenizer_dir: Path, run: RunDirectory) -> list[dict[str, Any]]:
    """Write the shards: of each stage ``name``, ``text_bytes``, ``tokens``, ``seconds``, held-out text included."""
    from daramgpt import shards

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    stages = shards.prepare(recipe, run, tokenizer_dir, recipe.curriculum.context_tokens, say)
    return [
        {
            "name": stage["name"],
            "text_bytes": stage["text_bytes"] + stage["heldout_text_bytes"],
            "tokens": stage["tokens"] + stage["heldout_tokens"],
            "seconds": stage["seconds"],
        }
        for stage in stages
    ]


def time_tokenizer(recipe: Recipe, tokenizer_dir: Path, run: RunDirectory) -> list[dict[str, Any]]:
    """The tokenizer alone: of each stage ``name``, ``text_bytes`` and the ``seconds`` of the encode calls."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True

    def encode(units: list[str]) -> float:
        begin = time.perf_counter()
        # Kept until the clock has stopped: freeing them is not the tokenizer's work.
        encodings = tokenizer.encode_batch_fast(units, add_special_tokens=False)
        seconds = time.perf_counter() - begin
        assert len(encodings) == len(units)
        return seconds

    is_warm, stages = False, []
    for stage, texts in stages_of(recipe, _corpus_dir(recipe)):
        text_bytes, seconds = 0, 0.0
        units = (unit for text in texts for unit in text.units.texts)
        for batch, batch_bytes in _batches(units, BATCH_UNITS, BATCH_BYTES):
            if not is_warm:
                # The first call starts the threads and fills the cache of words.
                encode(batch[:WARM_UP_UNITS])
                is_warm = True
            seconds += encode(batch)
            text_bytes += batch_bytes
        stages.append({"name": stage.name, "text_bytes": text_bytes, "seconds": seconds})
    return stages


def time_splitter(recipe: Recipe, tokenizer_dir: Path, run: RunDirectory) -> list[dict[str, Any]]:
    """The splitter alone, on one core, of each stage cut into sentences: ``name``, ``text_bytes``, ``seconds`` of CPU.

    Paragraphs are given to it whole; those that a corpus holds in pieces are joined first.
    """
    stages = []
    for stage in recipe.curriculum.stages:
        if stage.unit != "sentence":
            continue
        text_bytes, seconds = 0, 0.0
        for batch, batch_bytes in _batches(_paragraphs(recipe, stage.corpus), BATCH_UNITS, BATCH_BYTES):
            begin = time.process_time()
            for paragraph in batch:
                corpora.split_sentences(paragraph)
            seconds += time.process_time() - begin
            text_bytes += batch_bytes
            if text_bytes >= SPLITTER_BYTES:
                break
        stages.append({"name": stage.name, "text_bytes": text_bytes, "seconds": seconds})
    return stages


def _paragraphs(recipe: Recipe, corpus: str) -> Iterator[str]:
    for document in corpora.read(find_corpora(recipe, _corpus_dir(recipe))[corpus], ReadReport()):
        for pieces in document.paragraphs:
            yield " ".join(pieces)


def _batches(texts: Iterable[str], most_texts: int, most_bytes: int) -> Iterator[tuple[list[str], int]]:
    """Texts in batches, with the UTF-8 bytes of each; the text that passes `most_bytes` still belongs to its batch."""
    texts = iter(texts)
    while True:
        batch: list[str] = []
        batch_bytes = 0
        for text in islice(texts, most_texts):
            batch.append(text)
            batch_bytes += len(text.encode())
            if batch_bytes >= most_bytes:
                break
        if not batch:
            return
        yield batch, batch_bytes


def _corpus_dir(recipe: Recipe) -> Path:
    assert recipe.corpus.dir is not None
    return Path(recipe.corpus.dir)


SIDES: dict[str, Callable[[Recipe, Path, RunDirectory], list[dict[str, Any]]]] = {
    "prepare": prepare,
    "tokenizer": time_tokenizer,
    "splitter": time_splitter,
}


def main(side: str, recipe: str, tokenizer_dir: str, run: str) -> int:
    try:
        figures = SIDES[side](recipes.load(recipe), Path(tokenizer_dir), RunDirectory(Path(run)))
    except UserError as error:
        print(json.dumps({"fault": error.fault, "mend": error.mend}))
        return 2
    print(json.dumps(figures))
    return 0
