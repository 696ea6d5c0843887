"""What is measured, and what we want of it.

A journey is one contender's steps against one server of its own, which starts empty. A case is a
step of a journey, named `step/journey`: `upload/S` is every contender's first upload of S.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from results import Results

EVERYBODY = (
    "kinetic",
    "ours",
    "transfer_manager",
    "gcsfs",
    "obstore",
    "plain loop",
    "Airflow operator",
)
PAIR = ("kinetic", "ours")
# Steps that only prepare the next.
UNREPORTED = frozenset({"index"})
# Steps that need `upload_data(hash_index=)`.
WITH_INDEX = frozenset({"index", "unchanged", "plan+index"})


@dataclass(frozen=True)
class Journey:
    """Steps that follow each other.

    Attributes:
        name: of the journey.
        steps: actions, see contenders.py; a contender takes part in those of `contenders`' that it
            has.
        contenders: who takes part, in turn.
        corpus: what is uploaded, see corpora.py; None for none.
        parts: smaller corpora for contenders that would take too long; their rates are compared.
        latency_ms: what the server adds to every answer.
        repeat: rounds are multiplied by this, for what takes no time.
    """

    name: str
    steps: tuple[str, ...]
    contenders: tuple[str, ...] = PAIR
    corpus: str | None = None
    parts: dict[str, str] = field(default_factory=dict)
    latency_ms: int = 0
    repeat: int = 1

    def cases(self) -> list[str]:
        return [f"{step}/{self.name}" for step in self.steps if step not in UNREPORTED]


_ALL_BUT_OBSTORE = tuple(name for name in EVERYBODY if name != "obstore")
_SECOND_RUNS = ("hit", "index", "unchanged")
_SLOW = {"transfer_manager": "S2000", "plain loop": "S2000", "Airflow operator": "S500"}
_SLOWER = {"transfer_manager": "S500", "plain loop": "S500", "Airflow operator": "S500"}

JOURNEYS = (
    Journey("import", ("package", "operator"), ("ours",), repeat=3),
    Journey("S", ("hash",), corpus="S", repeat=3),
    Journey("M", ("hash",), corpus="M", repeat=3),
    Journey("L", ("hash",), corpus="L"),
    Journey("W", ("hash",), corpus="W", repeat=3),
    Journey("N10k", ("plan",), ("ours",), "N10k", repeat=3),
    Journey("N100k", ("plan",), ("ours",), "N100k", repeat=2),
    Journey("N1M", ("plan", "plan+index"), ("ours",), "N1M"),
    Journey("W", ("upload", *_SECOND_RUNS, "materialize"), EVERYBODY, "W"),
    Journey("S", ("upload", *_SECOND_RUNS, "materialize"), EVERYBODY, "S", _SLOW),
    Journey("S+30ms", ("upload",), EVERYBODY, "S5000", _SLOWER, latency_ms=30),
    Journey("M", ("upload", *_SECOND_RUNS, "materialize"), EVERYBODY, "M"),
    # Without obstore: it would send 2 GiB from memory, as the local server takes no XML API parts.
    Journey("L", ("upload", *_SECOND_RUNS), _ALL_BUT_OBSTORE, "L"),
)


@dataclass(frozen=True)
class Target:
    """A figure we want to reach.

    Attributes:
        text: what it is.
        value: computes it; None while a case it needs was not run.
        bound: what it is to be.
        at_least: whether `bound` is a minimum, rather than a maximum.
        unit: printed behind both.
    """

    text: str
    value: Callable[[Results], float | None]
    bound: float
    at_least: bool
    unit: str

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def _ratio(text: str, case: str, bound: float) -> Target:
    return Target(f"{text} ({case})", lambda r: r.ratio(case), bound, True, "x kinetic")


def _at_most(text: str, case: str, figure: str, bound: float, unit: str, scale: float) -> Target:
    def value(results: Results) -> float | None:
        found = results.get(case, "ours")
        return None if found is None else scale * float(getattr(found, figure))

    return Target(f"{text} ({case})", value, bound, False, unit)


def _growth(results: Results) -> float | None:
    few, many = results.get("plan/N10k", "ours"), results.get("plan/N100k", "ours")
    return many.per_file / few.per_file if few and many else None


_MIB = 1 / (1 << 20)

TARGETS = (
    _ratio("content hash", "hash/S", 4),
    _ratio("content hash", "hash/M", 1.7),
    _ratio("content hash", "hash/L", 0.95),
    _ratio("upload of new data, hash included", "upload/S", 7),
    _ratio("the same, 5,000 files, 30 ms added to each request", "upload/S+30ms", 10),
    _at_most("client CPU per 1,000 small objects", "upload/S", "cpu_per_1000", 0.35, "s", 1),
    _ratio("upload of new data", "upload/M", 2),
    _ratio("upload of new data", "upload/L", 1.4),
    _ratio("unchanged data, with a stat index", "unchanged/S", 7),
    _ratio("unchanged data, with a stat index", "unchanged/M", 50),
    _ratio("unchanged data, with a stat index", "unchanged/L", 50),
    _ratio("download, ours verified", "materialize/S", 3),
    _ratio("download, ours verified", "materialize/M", 1),
    _at_most("peak memory", "upload/L", "peak", 150, "MiB", _MIB),
    _at_most("peak memory, a million files", "plan/N1M", "peak", 500, "MiB", _MIB),
    _at_most("the same with a hash index", "plan+index/N1M", "peak", 500, "MiB", _MIB),
    Target("time per file, 100,000 against 10,000 files", _growth, 1.15, False, "x"),
    _at_most("importing the package", "package/import", "median", 60, "ms", 1000),
    _at_most(
        "importing the operator after BaseOperator", "operator/import", "median", 150, "ms", 1000
    ),
)
