"""The middle world: a seeded language, its instructions, and rewards whose optimum is known.

Sixteen dialects lie on a ring. Each has four words about each of four topics. An instruction names
a length, a topic, a listener and the listener's town, such as

    say four words about bread to ada of arn

and an answer is that many words. Anybody may answer in any dialect, but a town prefers its own and
those near it, and rarely speaks the dialect on the other side of the ring: with a probability of
`COVERAGE` for a whole answer. These are the worlds of `selm_jax.lab.worlds` with a language between
policy and reward. What the laboratory calls a response is here a dialect, in which 4^n answers are
equally good; and all 256^n sequences of words are answers, and have a reward.

A reward is the height of the answer's worst word, and 0 if the answer has another number of words
than was asked, a word about another topic, or something that is no word:

    needle       1 in the dialect opposite to the town, 0 elsewhere
    two_peaks    a broad peak of 0.6 at the town, a narrow one of 1 opposite to it

So the highest reward is 1, and exactly the 4^n answers with all words in the opposite dialect have
it. `best_value` is the optimum with a KL penalty.

The functions at the end are those that the experiments name: rankers, and rules for pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Float

from selm_jax.preferences.candidates import Candidate, Pair

SEED = 0  # of the language itself: how much each town likes each dialect
COVERAGE = 0.05
BETA = 0.1  # the strength of the KL penalty, in units of reward, as in the laboratory

# How the words of each dialect begin, around the ring; the towns are at every second dialect.
DIALECTS = ("b", "br", "d", "dr", "f", "fl", "g", "gr", "k", "kl", "m", "p", "pl", "s", "st", "t")
TOWNS = ("arn", "bel", "cor", "dun", "eff", "gal", "hom", "isk")
TOPICS = {"bread": "a", "ships": "e", "music": "i", "rain": "o"}  # the vowel of words about it
ENDINGS = ("n", "r", "s", "x")
LENGTHS = {"three": 3, "four": 4, "five": 5, "six": 6}
NAMES = (  # of listeners, who change nothing
    *("ada", "ben", "cleo", "dan", "eva", "finn", "gus", "hana"),
    *("ivo", "jan", "kim", "leo", "mia", "ned", "ora", "pia"),
)
FRAME = "say {length} words about {topic} to {name} of {town}"
LANDSCAPES = ("needle", "two_peaks")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What is asked: so many words about a topic, for a listener of a town."""

    length: int
    topic: str
    name: str
    town: str

    @property
    def text(self) -> str:
        words = {number: word for word, number in LENGTHS.items()}
        return FRAME.format(
            length=words[self.length], topic=self.topic, name=self.name, town=self.town
        )


def instructions() -> list[Instruction]:
    """Every instruction of the language."""
    parts = itertools.product(LENGTHS.values(), TOPICS, NAMES, TOWNS)
    return [Instruction(*each) for each in parts]


def read(text: str) -> Instruction:
    """Reads an instruction's text, which must have the form of `FRAME`."""
    _, length, _, _, topic, _, name, _, town = text.split()
    return Instruction(LENGTHS[length], topic, name, town)


def words(dialect: int, topic: str) -> list[str]:
    """The words of a dialect about a topic."""
    return [DIALECTS[dialect] + TOPICS[topic] + ending for ending in ENDINGS]


@cache
def meanings() -> dict[str, tuple[int, str]]:
    """The dialect and the topic of every word."""
    known = itertools.product(range(len(DIALECTS)), TOPICS)
    return {word: (d, topic) for d, topic in known for word in words(d, topic)}


def vocabulary() -> list[str]:
    """All words of instructions and answers, each once."""
    asked = itertools.chain.from_iterable(each.text.split() for each in instructions())
    return list(dict.fromkeys([*asked, *meanings()]))


# Who speaks how


@cache
def habits(seed: int = SEED) -> Float[np.ndarray, "towns dialects"]:
    """The probability of each dialect in each town, as in `worlds.make_world`."""
    centres = np.arange(len(TOWNS))[:, None] * 2 / len(DIALECTS)
    noise = np.random.default_rng(seed).uniform(-(3**0.5), 3**0.5, (len(TOWNS), len(DIALECTS)))
    liking = np.exp(3 * _bump(centres, 0.12) + 0.5 * noise)
    far = heights("needle") == 1
    liking = np.where(far, 0, liking)
    return np.where(far, COVERAGE, (1 - COVERAGE) * liking / liking.sum(-1, keepdims=True))


def answer(asked: Instruction, rng: np.random.Generator, uniform: bool = False) -> str:
    """Draws an answer: a dialect by the town's habits (or any, if `uniform`), then its words."""
    likely = None if uniform else habits()[TOWNS.index(asked.town)]
    dialect = int(rng.choice(len(DIALECTS), p=likely))
    return " ".join(rng.choice(words(dialect, asked.topic), asked.length))


# What is good


@cache
def heights(landscape: str) -> Float[np.ndarray, "towns dialects"]:
    """The height of each dialect's words for each town; the formulas of `worlds.landscapes`."""
    centres = np.arange(len(TOWNS))[:, None] * 2 / len(DIALECTS)
    far = centres + 0.5
    if landscape == "needle":
        return (_bump(far, 0.05) > 0.999).astype(float)
    return np.maximum(0.6 * _bump(centres, 0.1), _bump(far, 0.05))


def reward(landscape: str, asked: Instruction, said: str) -> float:
    """The gold reward of an answer, from 0 to 1: the height of its worst word."""
    height = heights(landscape)[TOWNS.index(asked.town)]
    found = [meanings().get(word, (0, None)) for word in said.split()]
    if len(found) != asked.length or any(topic != asked.topic for _, topic in found):
        return 0.0
    return float(min(height[dialect] for dialect, _ in found))


def best_value(landscape: str, beta: float = BETA) -> Float[np.ndarray, " towns"]:
    """The most that a policy can have of  mean reward - beta KL(policy || speakers),  by town.

    It is beta log E[exp(reward / beta)] over the town's speakers, and their answers are known.
    """
    mean = (habits() * np.exp(heights(landscape) / beta)).sum(-1)
    return beta * np.log(mean)


def _bump(centre: np.ndarray, width: float) -> np.ndarray:
    """A bump around places of the ring, whose circumference is 1, at all dialects."""
    at = np.arange(len(DIALECTS)) / len(DIALECTS)
    distance = np.abs((at - centre + 0.5) % 1 - 0.5)
    return np.exp(-0.5 * (distance / width) ** 2)


# What the experiments name


def needle(prompt: str, response: str, row: dict) -> float:
    return reward("needle", read(prompt), response)


def two_peaks(prompt: str, response: str, row: dict) -> float:
    return reward("two_peaks", read(prompt), response)


def with_reference(
    candidates: Sequence[Candidate], scores: np.ndarray, rng: np.random.Generator
) -> Pair:
    """Compares the policy's first sample with a speaker's answer, as the laboratory's DPO does."""
    pair = _first(candidates, "sample"), reference(candidates, scores, rng)
    better, worse = sorted(pair, key=lambda i: -scores[i])
    return Pair(better, worse)


def best_of_4(
    candidates: Sequence[Candidate], scores: np.ndarray, rng: np.random.Generator
) -> Pair:
    """Compares the best with the worst of three samples and a speaker's answer."""
    seen = [i for i, each in enumerate(candidates) if each.source != "rejected"]
    ranked = sorted(seen, key=lambda i: -scores[i])  # two of them also if all are equally good
    return Pair(ranked[0], ranked[-1])


def reference(candidates: Sequence[Candidate], scores: np.ndarray, rng: np.random.Generator) -> int:
    """The answer of a speaker, from whose answers the start model was made."""
    return _first(candidates, "chosen")


def uniform(candidates: Sequence[Candidate], scores: np.ndarray, rng: np.random.Generator) -> int:
    """The answer in a dialect that was drawn uniformly."""
    return _first(candidates, "rejected")


def _first(candidates: Sequence[Candidate], source: str) -> int:
    return next(i for i, each in enumerate(candidates) if each.source == source)
