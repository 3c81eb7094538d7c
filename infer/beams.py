"""Beam search: which continuations of which beams go on, and which sequences are the best in the end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from infer.request import Request
from infer.scheduler import Scheduler

__all__ = ["BeamSearch", "Branch", "Hypothesis", "branch"]


class Branch(NamedTuple):
    """A beam of the next step: beam ``parent`` of this one, and a token more."""

    parent: int
    token: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence that has ended.

    Attributes:
        score: sum of log-probabilities, divided by the number of tokens to the power of the length penalty.
        tokens: what was generated, with the token that ended it.
        stopped: it ended itself; otherwise it is as long as it may be.
    """

    score: float
    tokens: tuple[int, ...]
    stopped: bool


class BeamSearch:
    """The search of one prompt; it knows of log-probabilities, not of pages.

    At each step, of all continuations of all beams the best are looked at. Those that end are kept if they are among
    the first ``width``, those that do not end become the beams of the next step. It is the search of `transformers`
    ``generate(num_beams=width)``: same candidates, same scores, same end.

    Args:
        width: beams, and sequences that are kept.
        longest: most tokens to generate.
        ends: tokens that end a sequence.
        length_penalty: above 0 favours long sequences, below 0 short ones.
        early_stopping: True: the search is over as soon as ``width`` sequences have ended; False: as soon as the best
            beam, at its present length, would not be better than the worst of them; "never": as soon as no beam can
            become better.
        stopped: whether tokens end with a stop string; None: there is none.

    Attributes:
        done: the search is over.
        scores: of the beams, best first: sums of log-probabilities.
        sequences: of the beams, what was generated.
    """

    def __init__(
        self,
        width: int,
        *,
        longest: int,
        ends: Collection[int] = (),
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        stopped: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self.width, self.longest, self.ends = width, longest, frozenset(ends)
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.done = False
        self.scores: list[float] = [0.0]
        self.sequences: list[tuple[int, ...]] = [()]
        self._stopped = stopped
        self._ended: list[Hypothesis] = []

    @property
    def candidates(self) -> int:
        """How many of its likeliest tokens :meth:`advance` needs of each beam."""
        return max(2, 1 + len(self.ends)) * self.width

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """The sequences that have ended, best first; at most ``width``."""
        return list(self._ended)

    def advance(self, found: Sequence[Sequence[tuple[int, float]]]) -> list[Branch]:
        """One step: the beams of the next, best first; none if the search is over.

        Args:
            found: for each beam its likeliest tokens with their log-probabilities, at least :attr:`candidates` of them,
                or as many as there are. Equal scores are ordered by beam, then as they are given.
        """
        assert not self.done and len(found) == len(self.scores)
        best = sorted(
            (
                (-(score + logprob), beam, place, token)
                for beam, (score, tokens) in enumerate(zip(self.scores, found, strict=True))
                for place, (token, logprob) in enumerate(tokens)
            ),
        )[: self.candidates]
        ended: list[Hypothesis] = []
        going: list[tuple[Branch, float, tuple[int, ...]]] = []
        for rank, (negative, beam, _place, token) in enumerate(best):
            tokens = (*self.sequences[beam], token)
            stopped = token in self.ends or (self._stopped is not None and self._stopped(tokens))
            if not stopped and len(tokens) < self.longest:
                going.append((Branch(beam, token), -negative, tokens))
            elif rank < self.width:
                ended.append(Hypothesis(self._scored(-negative, len(tokens)), tokens, stopped))
        if not (self.early_stopping is True and len(self._ended) == self.width):
            self._ended = sorted(self._ended + ended, key=lambda one: -one.score)[: self.width]
        del going[self.width :]
        self.scores = [score for _branch, score, _tokens in going]
        self.sequences = [tokens for _branch, _score, tokens in going]
        self.done = not going or self._is_over()
        return [] if self.done else [way for way, _score, _tokens in going]

    def _scored(self, total: float, length: int) -> float:
        return total / length**self.length_penalty

    def _is_over(self) -> bool:
        if len(self._ended) < self.width:
            return False
        if self.early_stopping is True:
            return True
        far = self.early_stopping == "never" and self.length_penalty > 0
        length = self.longest if far else len(self.sequences[0])
        return self._scored(self.scores[0], length) <= self._ended[-1].score


def branch(
    scheduler: Scheduler, beams: Sequence[Request], branches: Sequence[Branch], number: Callable[[], int]
) -> list[Request]:
    """Let the scheduler's requests follow a step of the search: the requests of the new beams, in their order.

    The first branch of a beam goes on with its request, each other one with a fork of it; a beam without a branch ends.

    Args:
        scheduler: that the requests belong to.
        beams: ``external`` requests, all of which wait to be extended.
        branches: from :meth:`BeamSearch.advance`.
        number: gives an id that is not taken.
    """
    first: dict[int, int] = {}
    for place, way in enumerate(branches):
        first.setdefault(way.parent, place)
    for place, request in enumerate(beams):
        if place not in first:
            scheduler.finish(request, "abort")
    following = [
        beams[way.parent]
        if first[way.parent] == place
        else scheduler.fork(beams[way.parent], number(), then=[way.token])
        for place, way in enumerate(branches)
    ]
    for parent, place in first.items():
        scheduler.extend(beams[parent], branches[place].token)
    return following
