"""What was measured, and the figures that come of it."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

# Above this share of one core the local server, not the client, sets the pace: it has one thread.
_SERVER_LIMIT = 0.9


@dataclass
class Measured:
    """One contender's rounds of one case; every figure over the rounds is their median.

    Attributes:
        corpus: what it worked on; may be a part of what the others had.
        files: in the corpus.
        bytes: in the corpus.
        seconds: wall clock, one per round.
        cpus: CPU seconds of the client.
        server_cpus: CPU seconds of the server.
        peaks: bytes of memory over the interpreter with its imports.
    """

    corpus: str
    files: int
    bytes: int
    seconds: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    server_cpus: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def per_file(self) -> float:
        return self.median / max(self.files, 1)

    @property
    def rate(self) -> float:
        """Files a second."""
        return self.files / self.median

    @property
    def throughput(self) -> float:
        """Bytes a second."""
        return self.bytes / self.median

    @property
    def cpu_per_1000(self) -> float:
        """Client CPU seconds for 1,000 files."""
        return 1000 * median(self.cpus) / max(self.files, 1)

    @property
    def peak(self) -> float:
        return median(self.peaks)

    @property
    def server_share(self) -> float:
        """CPU seconds of the server for each second of the run."""
        return median(cpu / wall for cpu, wall in zip(self.server_cpus, self.seconds, strict=True))

    @property
    def server_limits(self) -> bool:
        return self.server_share >= _SERVER_LIMIT

    def to_json(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus,
            "files": self.files,
            "bytes": self.bytes,
            "seconds": [round(value, 4) for value in self.seconds],
            "median_seconds": round(self.median, 4),
            "files_per_second": round(self.rate, 1),
            "bytes_per_second": round(self.throughput),
            "client_cpu_seconds_per_1000": round(self.cpu_per_1000, 4),
            "peak_bytes": round(self.peak),
            "server_cpu_share": round(self.server_share, 3),
            "server_limits": self.server_limits,
        }


class Results:
    """Measurements by case and contender, in the order they were first made."""

    def __init__(self) -> None:
        self.cases: dict[str, dict[str, Measured]] = {}
        self.failures: dict[str, dict[str, str]] = {}

    def get(self, case: str, contender: str) -> Measured | None:
        return self.cases.get(case, {}).get(contender)

    def ratio(self, case: str, contender: str = "ours") -> float | None:
        """How many times as fast as kinetic, file by file."""
        one, kinetic = self.get(case, contender), self.get(case, "kinetic")
        return kinetic.per_file / one.per_file if one and kinetic else None
