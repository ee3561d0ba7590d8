"""Compose the corpus: how much of each kind of text, in which order, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from daramgpt.errors import UserError
from daramgpt.quickstart import containers, texts, web_texts
from daramgpt.quickstart.grammar import Text
from daramgpt.quickstart.topics import TOPICS
from daramgpt.quickstart.world import Chance, World

# Shares of the text: the sources stand in the order of the curriculum, all large enough to be held out from.
SHARES = {"web": 0.40, "unpublished": 0.08, "wiki": 0.18, "written": 0.34}
_NEWS_SHARE = 0.25
_MANIFEST = "quickstart.json"

Kind = Callable[[World, Chance], Text]


def write_corpus(out_dir: Path, text_megabytes: float = 6.5, seed: int = 0) -> dict[str, int]:
    """Write the corpus under ``out_dir`` in ``web unpublished wiki written``, or find it there already.

    The same arguments give the same bytes on every machine. The folder appears whole or not at all; one that holds an
    older edition is replaced. One process may write at a time.

    Returns:
        UTF-8 bytes of pure text, by source: sentences joined by spaces, paragraphs by line ends, no titles, no markup.

    Raises:
        UserError: ``out_dir`` holds something that is not a quickstart corpus, or the size is not above zero.
    """
    if text_megabytes <= 0:
        raise UserError(f"a corpus of {text_megabytes} MB was asked for", "ask for a size above 0")
    wanted = {"edition": _edition(), "text_megabytes": text_megabytes, "seed": seed}
    if out_dir.exists():
        manifest = _read_manifest(out_dir)
        if manifest is not None and {key: manifest.get(key) for key in wanted} == wanted:
            return {source: int(size) for source, size in manifest["text_bytes"].items()}
        if manifest is None and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise UserError(f"{out_dir} exists and is no quickstart corpus", "name another folder or move it away")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out_dir.parent / f".{out_dir.name}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    text_bytes = _write(unfinished, round(text_megabytes * 1e6), seed)
    (unfinished / _MANIFEST).write_text(
        json.dumps({**wanted, "text_bytes": text_bytes}, indent=2) + "\n", encoding="utf-8"
    )
    shutil.rmtree(out_dir, ignore_errors=True)
    unfinished.replace(out_dir)
    return text_bytes


def _edition() -> str:
    """A fingerprint of the grammar's own source: another grammar makes another corpus."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _read_manifest(folder: Path) -> dict | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "text_bytes" in manifest else None


def _write(folder: Path, total_bytes: int, seed: int) -> dict[str, int]:
    megabytes = total_bytes / 1e6
    world = World(seed, num_people=150 + int(170 * megabytes), num_organisations=60 + int(20 * megabytes))
    share = {source: round(total_bytes * part) for source, part in SHARES.items()}
    news = _until(
        share["web"] * _NEWS_SHARE, _mixture(world, Chance(f"news {seed}"), (0.65, web_texts.news, web_texts.petition))
    )
    forum = _until(
        share["web"] * (1 - _NEWS_SHARE),
        _mixture(world, Chance(f"forum {seed}"), (0.7, web_texts.review, web_texts.forum_post)),
    )
    unpublished = _until(
        share["unpublished"], _mixture(world, Chance(f"unpublished {seed}"), (0.7, texts.diary, texts.letter))
    )
    wiki = _until(share["wiki"], _articles(world, Chance(f"wiki {seed}")))
    written = _until(share["written"], _mixture(world, Chance(f"written {seed}"), (0.65, texts.story, texts.essay)))
    containers.write_web(folder / "web", news, forum, Chance(f"web layout {seed}"))
    containers.write_unpublished(folder / "unpublished", unpublished, Chance(f"unpublished layout {seed}"))
    containers.write_wiki(folder / "wiki", wiki, Chance(f"wiki layout {seed}"))
    containers.write_written(folder / "written", written, Chance(f"written layout {seed}"))
    made = {"web": news + forum, "unpublished": unpublished, "wiki": wiki, "written": written}
    return {source: sum(text.num_bytes for text in source_texts) for source, source_texts in made.items()}


def _until(num_bytes: float, source: Iterator[Text]) -> list[Text]:
    taken: list[Text] = []
    while num_bytes > 0:
        taken.append(next(source))
        num_bytes -= taken[-1].num_bytes
    return taken


def _mixture(world: World, chance: Chance, kinds: tuple[float, Kind, Kind]) -> Iterator[Text]:
    """Texts of two kinds, the first with the given probability, without end."""
    probability, first, second = kinds
    while True:
        yield (first if chance.flip(probability) else second)(world, chance)


def _articles(world: World, chance: Chance) -> Iterator[Text]:
    """An article on everything in the world, in mixed order; then a second on each under a title of its own."""
    makers: list[Callable[[], Text]] = [
        *(partial(texts.person_article, world, chance, person) for person in world.people),
        *(partial(texts.town_article, world, chance, town) for town in world.towns),
        *(partial(texts.organisation_article, world, chance, organisation) for organisation in world.organisations),
        *(partial(texts.concept_article, world, chance, thing, t.name) for t in TOPICS for thing in t.nouns["thing"]),
    ]
    order = sorted(range(len(makers)), key=lambda _: chance.random())
    volume = 1
    while True:
        for index in order:
            text = makers[index]()
            yield text if volume == 1 else Text(f"{text.title} ({volume}권)", text.paragraphs)
        volume += 1
