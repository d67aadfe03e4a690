"""Made-up request traces for `bench.policy`: who asks for which model, when and for how long.

Six kinds, because policies differ in what they are good at: independent requests by popularity,
conversations, bursts, day and night, popularity that drifts, and tasks that call several models in
turn. Popularity follows Zipf's law throughout and has nothing to do with size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from random import Random

from smartproxy.types import GIB

#: a day is shortened to four hours, or no trace would see a night
DAY_S = 4 * 3600.0
#: what models of 1 to 70 billion weights take on a GPU, quantized, with their context
SIZES_GB = (0.7, 1.2, 2.0, 2.8, 3.5, 5.0, 5.6, 6.5, 8.2, 9.4, 11.0, 14.0, 17.5, 20.0, 27.0, 36.0)
#: of the machine's memory, what its models would take if all were loaded
CROWDING = 3.0
ZIPF = 0.9

#: (time, model) without end, in order but for what one conversation or burst spans
Asks = Iterator[tuple[float, int]]
#: each model's share of the requests at a time
Popularity = Callable[[float], Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    at: float
    #: index of the model
    model: int
    #: how long the server works on it
    duration_s: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What is asked of one machine."""

    kind: str
    seed: int
    cards_gb: tuple[int, ...]
    #: bytes on one GPU, overhead included, by model
    sizes: tuple[int, ...]
    #: in order of time
    requests: tuple[Request, ...]
    #: for a policy that is told
    popularity: Popularity


def make(kind: str, cards_gb: Sequence[int], seed: int, count: int) -> Trace:
    """Return a trace of `count` requests; the same arguments give the same trace."""
    random = Random(f"{kind} {cards_gb} {seed}")
    sizes = _sizes(random, cards_gb)
    ranks = random.sample(range(len(sizes)), len(sizes))
    popularity, asks = KINDS[kind](random, ranks, 30.0 / len(cards_gb) ** 0.5)
    drawn = sorted(islice(asks, count + count // 4))[:count]
    requests = tuple(_request(random, at, model) for at, model in drawn)
    return Trace(
        kind=kind,
        seed=seed,
        cards_gb=tuple(cards_gb),
        sizes=sizes,
        requests=requests,
        popularity=popularity,
    )


def _sizes(random: Random, cards_gb: Sequence[int]) -> tuple[int, ...]:
    """Return models that want three times the memory together; each fits, some only split."""
    total, sizes = sum(cards_gb), list[float]()
    fitting = [size for size in SIZES_GB if size <= max(0.6 * total, max(cards_gb) * 0.8)]
    while sum(sizes) < CROWDING * total:
        sizes.append(random.choice(fitting) * random.uniform(0.9, 1.1))
    return tuple(int(size * GIB) for size in sizes)


def _request(random: Random, at: float, model: int) -> Request:
    duration_s = min(120.0, random.lognormvariate(1.0, 0.9))
    return Request(at=at, model=model, duration_s=duration_s, tokens=int(30 * duration_s))


def _zipf(ranks: Sequence[int]) -> list[float]:
    """Return each model's share of the requests; ranks[0] is the most popular model."""
    weights = [0.0] * len(ranks)
    for rank, model in enumerate(ranks):
        weights[model] = 1 / (rank + 1) ** ZIPF
    return [weight / sum(weights) for weight in weights]


def _draw(random: Random, weights: Sequence[float]) -> int:
    return random.choices(range(len(weights)), cum_weights=list(accumulate(weights)))[0]


# --- kinds -----------------------------------------------------------------------------------

Kind = Callable[[Random, list[int], float], tuple[Popularity, Asks]]


def _independent(random: Random, ranks: list[int], every_s: float) -> tuple[Popularity, Asks]:
    """Each request is drawn by itself."""
    weights = _zipf(ranks)

    def asks() -> Asks:
        now = 0.0
        while True:
            now += random.expovariate(1 / every_s)
            yield now, _draw(random, weights)

    return lambda _: weights, asks()


def _conversation(random: Random, start: float, model: int) -> Asks:
    """Yield the requests of one conversation: eight on average, half a minute apart."""
    now = start
    while True:
        yield now, model
        if random.random() < 1 / 8:
            return
        now += random.expovariate(1 / 30)


def _conversations(random: Random, ranks: list[int], every_s: float) -> tuple[Popularity, Asks]:
    """Models are asked for again and again for minutes, then left."""
    weights = _zipf(ranks)

    def asks() -> Asks:
        now = 0.0
        while True:
            now += random.expovariate(1 / (4 * every_s))
            yield from _conversation(random, now, _draw(random, weights))

    return lambda _: weights, asks()


def _bursts(random: Random, ranks: list[int], every_s: float) -> tuple[Popularity, Asks]:
    """Independent requests, and now and then forty of one model, any one, in two minutes."""
    weights = _zipf(ranks)

    def asks() -> Asks:
        now = 0.0
        while True:
            now += random.expovariate(1 / every_s)
            yield now, _draw(random, weights)
            if random.random() < 1 / 40:
                model = random.randrange(len(ranks))
                for _ in range(40):
                    yield now + random.uniform(0, 120), model

    return lambda _: weights, asks()


def _day_and_night(random: Random, ranks: list[int], every_s: float) -> tuple[Popularity, Asks]:
    """By day conversations, many of them; by night batches, with other models."""
    day, night = _zipf(ranks), _zipf(random.sample(ranks, len(ranks)))

    def popularity(now: float) -> Sequence[float]:
        return day if now % DAY_S < DAY_S / 2 else night

    def asks() -> Asks:
        now = 0.0
        while True:
            by_day = popularity(now) is day
            now += random.expovariate(1 / ((8 if by_day else 40) * every_s))
            model = _draw(random, popularity(now))
            if by_day:
                yield from _conversation(random, now, model)
            else:
                at = now
                for _ in range(random.randint(5, 30)):
                    yield at, model
                    at += random.expovariate(1 / 5)

    return popularity, asks()


def _drift(random: Random, ranks: list[int], every_s: float) -> tuple[Popularity, Asks]:
    """Conversations; every twenty minutes some model becomes the most popular one."""
    eras = [_zipf(ranks)]
    for _ in range(1000):
        ranks = ranks[:]
        ranks.insert(0, ranks.pop(random.randrange(len(ranks))))
        eras.append(_zipf(ranks))

    def popularity(now: float) -> Sequence[float]:
        return eras[min(int(now / 1200), len(eras) - 1)]

    def asks() -> Asks:
        now = 0.0
        while True:
            now += random.expovariate(1 / (4 * every_s))
            yield from _conversation(random, now, _draw(random, popularity(now)))

    return popularity, asks()


def _tasks(random: Random, ranks: list[int], every_s: float) -> tuple[Popularity, Asks]:
    """Tasks call two to four models in turn, several times over: plan, search, write, check."""
    teams = [random.sample(range(len(ranks)), random.randint(2, 4)) for _ in ranks]
    shares = _zipf(random.sample(range(len(teams)), len(teams)))
    weights = [
        sum(share / len(team) for share, team in zip(shares, teams, strict=True) if model in team)
        for model in range(len(ranks))
    ]

    def asks() -> Asks:
        now = 0.0
        while True:
            now += random.expovariate(1 / (6 * every_s))
            team, at = teams[_draw(random, shares)], now
            for _ in range(random.randint(2, 6)):
                for model in team:
                    yield at, model
                    at += random.expovariate(1 / 12)

    return lambda _: weights, asks()


KINDS: dict[str, Kind] = {
    "independent": _independent,
    "conversations": _conversations,
    "bursts": _bursts,
    "day and night": _day_and_night,
    "drift": _drift,
    "tasks": _tasks,
}
