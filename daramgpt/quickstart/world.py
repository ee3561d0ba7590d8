"""A small world whose facts never change: people, towns, organisations, works.

Every document draws its people and places from here, the well-known ones more often, so a fact told in one document
(where someone was born, what a town is known for) holds in all the others: something for a language model to remember.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from daramgpt.quickstart import lexicon
from daramgpt.quickstart.lexicon import Topic
from daramgpt.quickstart.topics import TOPICS

T = TypeVar("T")


class Chance:
    """Reproducible choices, built on ``random()`` alone: its sequence is the one Python promises never to change."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed).random

    def pick(self, items: Sequence[T]) -> T:
        """Any of the items, all alike."""
        return items[int(self.random() * len(items))]

    def skewed(self, items: Sequence[T], power: float = 2.0) -> T:
        """One of the items, the first ones much more often (for power 2 the k-th about as 1 / sqrt k)."""
        return items[int(self.random() ** power * len(items))]

    def flip(self, probability: float) -> bool:
        return self.random() < probability

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self.random() * (high - low + 1))

    def weighted(self, items: Sequence[tuple[int, T]]) -> T:
        """One of the (weight, item) pairs' items."""
        point = self.random() * sum(weight for weight, _ in items)
        for weight, item in items:
            point -= weight
            if point < 0:
                return item
        return items[-1][1]


@dataclass(frozen=True, slots=True)
class Town:
    name: str
    region: str
    speciality: str
    population: int
    founded: int
    festival_month: int


@dataclass(frozen=True, slots=True)
class Organisation:
    name: str
    town: Town
    founded: int
    members: int
    topic: Topic


@dataclass(frozen=True, slots=True)
class Person:
    name: str
    birth_year: int
    town: Town
    topic: Topic
    job: str
    thing: str
    hobby: str
    organisation: Organisation
    debut_year: int
    work: str

    @property
    def given_name(self) -> str:
        return self.name[1:]


class World:
    """The facts, a pure function of the seed.

    Attributes:
        people: the best known first; so with the rest.
    """

    def __init__(self, seed: int, num_people: int = 500, num_towns: int = 80, num_organisations: int = 160) -> None:
        chance = Chance(f"world {seed}")
        names: dict[str, None] = {}
        while len(names) < num_towns:
            names.setdefault(chance.pick(lexicon.TOWN_STEMS) + chance.skewed(lexicon.TOWN_SUFFIXES))
        self.towns = [
            Town(
                name,
                chance.pick(lexicon.REGIONS),
                chance.pick(lexicon.SPECIALITIES),
                chance.between(12, 2400) * 100,
                chance.between(1905, 1996),
                chance.between(3, 11),
            )
            for name in names
        ]
        kinds = ("협회", "재단", "연구소", "산업", "문화원", "조합", "학원", "모임")
        names = {}
        while len(names) < num_organisations:
            names.setdefault(
                f"{chance.pick(lexicon.ORGANISATION_STEMS)} {chance.pick(TOPICS).name} {chance.pick(kinds)}"
            )
        by_name = {topic.name: topic for topic in TOPICS}
        self.organisations = [
            Organisation(
                name,
                chance.skewed(self.towns),
                chance.between(1950, 2012),
                chance.between(2, 90) * 5,
                by_name[name.split()[1]],
            )
            for name in names
        ]
        names = {}
        while len(names) < num_people:
            names.setdefault(
                chance.skewed(lexicon.SURNAMES) + chance.pick(lexicon.GIVEN_FIRST) + chance.pick(lexicon.GIVEN_LAST)
            )
        self.people = [self._person(name, chance) for name in names]

    def _person(self, name: str, chance: Chance) -> Person:
        organisation = chance.skewed(self.organisations)
        topic = organisation.topic
        birth_year = chance.between(1940, 1990)
        return Person(
            name,
            birth_year,
            chance.skewed(self.towns),
            topic,
            chance.pick(topic.nouns["role"]),
            chance.pick(topic.nouns["thing"]),
            chance.pick(lexicon.HOBBIES),
            organisation,
            birth_year + chance.between(20, 25),
            f"{chance.pick(lexicon.TITLE_FIRST)} {chance.pick(lexicon.TITLE_LAST)}",
        )


_TOPIC_BY_NAME = {topic.name: topic for topic in TOPICS}


def topic_of(name: str) -> Topic:
    """The topic with this name."""
    return _TOPIC_BY_NAME[name]
