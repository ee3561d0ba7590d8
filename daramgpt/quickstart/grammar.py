"""From clauses to sentences to runs of sentences that hang together.

A :class:`Scene` is the memory of one document: its topic, its people and the nouns it keeps coming back to. Clauses are
templates (see :mod:`.lexicon`); a scene fills their slots from that memory and inflects the last predicate. Sentences
follow each other as the acts of a topic do, as effect follows cause, or as a judgement follows what was judged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from daramgpt.quickstart import phrases
from daramgpt.quickstart.lexicon import Topic, inflect
from daramgpt.quickstart.morphology import final_of, particle
from daramgpt.quickstart.world import Chance

_TIMELESS = ("=이다", "싶다", "있다", "같다", "아깝다")
_SLOT = re.compile(r"\{(\w+)(?::(\w+))?\}")


@lru_cache(maxsize=20_000)
def _parse(clause: str) -> tuple[tuple[str, ...], str]:
    """A clause as (literal, slot, particle, literal, slot, particle, …, literal) and its last predicate."""
    clause = " ".join(clause.split())
    lemma = ""
    if clause.endswith("다"):
        clause, _, lemma = clause.rpartition(" ")
    return tuple(part or "" for part in _SLOT.split(clause + " " if clause and lemma else clause)), lemma


@dataclass(frozen=True, slots=True)
class Register:
    """How sentences end: endings with weights, for what happened, for how things are."""

    past: tuple[tuple[int, str], ...]
    present: tuple[tuple[int, str], ...]


PLAIN = Register(((1, "았다"),), ((1, "는다"),))
FORMAL = Register(((1, "았습니다"),), ((1, "습니다"),))
POLITE = Register(
    ((9, "았어요"), (2, "았거든요"), (1, "았답니다"), (1, "았는데요")),
    ((6, "아요"), (3, "네요"), (2, "더라고요"), (1, "거든요")),
)
INTIMATE = Register(((8, "았어"), (2, "았지"), (1, "았거든")), ((6, "아"), (1, "거든"), (1, "지")))


@dataclass(frozen=True, slots=True)
class Text:
    """A finished document: a title (may be empty) and paragraphs of sentences."""

    title: str
    paragraphs: tuple[tuple[str, ...], ...]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the paragraphs, sentences joined by a space, paragraphs by a line end."""
        return len("\n".join(" ".join(paragraph) for paragraph in self.paragraphs).encode())


class Scene:
    """One document in the making.

    Args:
        chance: the source of every choice.
        topic: what the document is about.
        register: how its sentences end.
        subject: who acts, with the particle to come, e.g. ``"김민수 씨"``; empty for a speaker who is understood.
    """

    def __init__(self, chance: Chance, topic: Topic, register: Register, subject: str = "") -> None:
        self.chance, self.topic, self.register, self.subject = chance, topic, register, subject
        self.bound: dict[str, str] = {}
        # What may stand before a subject's name, by subject.
        self.epithets: dict[str, tuple[str, ...]] = {}
        # A document keeps to a few nouns of each set; the first is its favourite.
        self._focus = {slot: [chance.skewed(nouns, 1.4) for _ in range(3)] for slot, nouns in topic.nouns.items()}
        self._seen: list[str] = []

    def noun(self, slot: str) -> str:
        """The noun for a slot: what is bound to it, else mostly one the document has used before."""
        bound = self.bound.get(slot)
        if bound is not None:
            return bound
        if slot == "tool2":
            return next(noun for noun in self.topic.nouns["tool"] if noun not in self._focus["tool"])
        focus = self._focus[slot]
        return self.chance.skewed(focus, 1.7) if self.chance.flip(0.7) else self.chance.pick(self.topic.nouns[slot])

    def _described(self, slot: str, before: str) -> str:
        """The noun for a slot with what may stand before it, unless the clause has an adnominal form there already."""
        noun = self.noun(slot)
        if slot in self.bound or not self.chance.flip(0.3) or final_of(before.rstrip()) == "ㄴ":
            return noun
        modifiers = phrases.modifiers(slot, self.topic.name)
        return f"{self.chance.pick(modifiers)} {noun}" if modifiers else noun

    def fill(self, template: str) -> str:
        """A template without a predicate to inflect, its slots filled."""
        parts, lemma = _parse(template)
        return self._filled(parts) + lemma

    def _filled(self, parts: tuple[str, ...]) -> str:
        text = parts[0]
        for at in range(1, len(parts), 3):
            noun = self._described(parts[at], text)
            text += (particle(noun, parts[at + 1]) if parts[at + 1] else noun) + parts[at + 2]
        return text

    def say(self, clause: str, ending: str) -> str:
        """A clause with its last predicate in the given ending.

        An ending may be an auxiliary construction: ``"고 싶다:았다"`` is the ending 고, then 싶다 in the ending 았다.
        """
        parts, lemma = _parse(clause)
        if "{" in lemma:
            lemma = _SLOT.sub(lambda slot: self.noun(slot[1]), lemma)
        construction, _, last = ending.rpartition(":")
        if not construction:
            return self._filled(parts) + inflect(lemma, ending)
        first, _, rest = construction.partition(" ")
        middle, _, auxiliary = rest.rpartition(" ")
        link = inflect(lemma, first) + " " + (middle + " " if middle else "")
        return self._filled(parts) + link + inflect(auxiliary, last)

    def past(self, clause: str, auxiliary: str = "") -> str:
        """A finished sentence about what happened."""
        return self.say(clause, auxiliary + self.chance.weighted(self.register.past)) + "."

    def tell(self, clause: str) -> str:
        """A finished sentence in the tense that suits its predicate: what is or is wished for now, else what was."""
        return (self.present if clause.endswith(_TIMELESS) else self.past)(clause)

    def present(self, clause: str, auxiliary: str = "") -> str:
        """A finished sentence about how things are."""
        return self.say(clause, auxiliary + self.chance.weighted(self.register.present)) + "."

    def fresh(self, items: tuple[str, ...]) -> str:
        """One of the phrases, not one of the last few used."""
        for _ in range(6):
            item = self.chance.pick(items)
            if item not in self._seen:
                break
        self._seen = [*self._seen[-11:], item]
        return item

    def named(self, probability: float, form: str = "은") -> str:
        """The subject with its particle and a space, or nothing, as Korean leaves out what is understood."""
        if self.subject and self.chance.flip(probability):
            epithets = self.epithets.get(self.subject)
            epithet = self.chance.pick(epithets) + " " if epithets and self.chance.flip(0.35) else ""
            return epithet + particle(self.subject, form) + " "
        return ""

    def acts(self, num_sentences: int, reflective: bool = True) -> list[str]:
        """Sentences that walk through the topic's acts in their order, with asides if reflective."""
        chance, acts = self.chance, self.topic.acts
        at = chance.between(0, max(0, len(acts) - 1 - num_sentences))
        sentences = []
        for number in range(num_sentences):
            if at >= len(acts):
                break
            lead = chance.pick(phrases.THEN if number else phrases.TIMES) + " " if chance.flip(0.5) else ""
            lead += (subject := self.named(0.75 if number == 0 else 0.3))
            lead += chance.pick(phrases.MANNERS) + " " if chance.flip(0.4) else ""
            first = acts[at]
            second = acts[at + 1] if at + 1 < len(acts) else ""
            if second and chance.flip(0.6):
                sentences.append(lead + self._joined(first, second))
                at += 2
            else:
                asides = (phrases.REFLECTIONS if subject else phrases.ASIDES) if reflective else ()
                sentences.append(lead + self._single(first, asides))
                at += 1
            if chance.flip(0.25):
                at += 1
        return sentences

    def _joined(self, first: str, second: str) -> str:
        style = self.chance.weighted(phrases.JOINTS)
        intended = "기로 하다:" if self.chance.flip(0.1) else ""
        if style == "기 전에":
            return self.say(second, "기") + " 전에 " + self.past(first, intended)
        link, _, tail = style.partition(" ")
        return self.say(first, link) + (" " + tail if tail else "") + " " + self.past(second, intended)

    def _outcome(self, clause: str) -> str:
        return self.past(clause, self.chance.weighted(phrases.OUTCOMES))

    def _single(self, clause: str, asides: tuple[tuple[str, str], ...]) -> str:
        chance = self.chance
        if not asides or chance.flip(0.5):
            return self._outcome(clause)
        link, rest = chance.pick(asides)
        return self.say(clause, link) + " " + self.past(rest)

    def cause(self, good: bool | None = None) -> tuple[bool, list[str]]:
        """Something and what came of it, in one sentence or two; also whether it was good."""
        chance = self.chance
        choices = [c for c in self.topic.causes if good is None or c.good == good]
        cause = chance.pick(choices)
        effect = chance.skewed(cause.effects, 1.5)
        lead = chance.pick(phrases.CAUSE_TIMES) + " " if chance.flip(0.5) else ""
        style = chance.between(0, 7)
        if style <= 1:
            link = chance.pick(phrases.SO_GOOD if cause.good else phrases.SO_BAD)
            return cause.good, [lead + self.past(cause.clause), link + " " + self.past(effect)]
        if style == 2 or (style == 6 and not cause.good):
            return cause.good, [lead + self.say(cause.clause, "아서") + " " + self.past(effect)]
        if style <= 4:
            link = "덕분에" if cause.good else "탓에"
            return cause.good, [lead + self.say(cause.clause, "은") + f" {link} " + self.past(effect)]
        if style == 5:
            reason = self.say(cause.clause, "았기 때문=이다:" + self.register.present[0][1])
            return cause.good, [lead + self.past(effect), reason + "."]
        if style == 6:
            return cause.good, [lead + self.say(cause.clause, "자") + " " + self.past(effect)]
        other = next((e for e in cause.effects if e != effect), effect)
        links = phrases.SO_GOOD if cause.good else phrases.SO_BAD
        both = self.say(effect, "고") + " " + self.past(other) if other != effect else self.past(effect)
        return cause.good, [lead + self.past(cause.clause), chance.pick(links) + " " + both]

    def state(self, past: bool = False) -> str:
        """One quality of something, or two."""
        chance = self.chance
        finish = self.past if past else self.present
        head = chance.pick(phrases.STATE_HEADS) + " " if chance.flip(0.45) else ""
        first = self.fresh(self.topic.states)
        if chance.flip(0.4):
            second = self.fresh(self.topic.states)
            if second != first:
                link = "고" if first.startswith("-") == second.startswith("-") else "지만"
                return head + self.say(first.lstrip("-"), link) + " " + finish(second.lstrip("-"))
        return head + finish(first.lstrip("-"))

    def feeling(self, good: bool) -> str:
        """How the speaker or the subject felt."""
        pool = phrases.GLAD if good else phrases.SORRY
        head = self.chance.pick(phrases.FEELING_HEADS) + " " if self.chance.flip(0.4) else ""
        return head + self.past(self.fresh(pool))
