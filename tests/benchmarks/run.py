"""The benchmark: ours beside keras-kinetic 0.0.4 and what else stores files on Cloud Storage.

    make bench                                        all of it, about twenty minutes
    make bench BENCH_ARGS='--quick'                   a look whether it works, in a minute
    make bench BENCH_ARGS='--only "upload/*" --rounds 1'

Every measurement is a process of its own (worker.py) against a server in another process that
starts empty. Rounds are interleaved: A B C A B C. Timings never decide anything: the exit status
says whether every contender could be measured.
"""

import argparse
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

from contenders import BUCKET, Job
from corpora import FULL, MIB, QUICK, Corpus, Scale, make
from journeys import JOURNEYS, PAIR, UNREPORTED, WITH_INDEX, Journey
from report import case_table, targets_table, to_json
from results import Measured, Results

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
ROUNDS = 3
# No measurement takes a tenth of this.
_TIMEOUT_SECONDS = 600
# Downloads go into memory: what it takes to create a file on a disk varies tenfold with what was
# deleted there before, and the disk's own work afterwards slows whoever comes next.
_SCRATCH = "/dev/shm" if os.path.isdir("/dev/shm") else None
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_PAIR_STEPS = ("hash", "hit", "index", "unchanged", "materialize")
_NOTHING = Corpus("", "", 0, 0)


class WorkerError(Exception):
    """A contender could not be measured."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", metavar="CASE", help="such as 'upload/*', hash/S"
    )
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}, 1 with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them here (PNG)")
    parser.add_argument("--quick", action="store_true", help="tiny corpora")
    parser.add_argument("--data", type=Path, default=REPOSITORY / ".bench", help="working folder")
    parser.add_argument("--list", action="store_true", help="list the cases")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)

    journeys = [j for j in JOURNEYS if _wanted(j, arguments.only)]
    if arguments.list or not journeys:
        print("\n".join(case for journey in JOURNEYS for case in journey.cases()))
        return not journeys
    scale = QUICK if arguments.quick else FULL
    rounds = arguments.rounds or (1 if arguments.quick else ROUNDS)
    bench = Bench(arguments.data.resolve(), scale, rounds, arguments.only)
    started = time.monotonic()
    try:
        for journey in journeys:
            bench.run(journey)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(targets_table(bench.results))
    print(f"\n{time.monotonic() - started:.0f} s, {rounds} rounds, scale {scale.name}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps(to_json(bench.results, scale, rounds), indent=1) + "\n"
        )
    if arguments.plot:
        from plot import draw

        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(bench.results, arguments.plot)
    return bool(bench.results.failures)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _wanted(journey: Journey, patterns: list[str] | None) -> bool:
    return any(_selected(case, patterns) for case in journey.cases())


def _selected(case: str, patterns: list[str] | None) -> bool:
    return not patterns or any(fnmatch(case, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Server:
    """A running local server."""

    url: str
    pid: int

    def cpu(self) -> float:
        """CPU seconds it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS


class Bench:
    """Runs journeys and gathers what they give.

    Args:
        folder: for corpora and everything temporary.
        scale: how large the corpora are.
        rounds: how often each journey is made.
        patterns: which cases to record; None for all.
    """

    def __init__(self, folder: Path, scale: Scale, rounds: int, patterns: list[str] | None) -> None:
        self.results = Results()
        self._folder = folder
        self._scale = scale
        self._rounds = rounds
        self._patterns = patterns
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, journey: Journey) -> None:
        """Make all rounds of a journey, and print its tables."""
        steps = self._steps(journey)
        if not steps:
            return
        # A look whether it works need not start Airflow five times.
        everybody = self._scale is not QUICK or journey.name == "S"
        names = [name for name in journey.contenders if everybody or name in PAIR]
        corpora = {name: self._corpus(journey, name) for name in names}
        self._progress(f"{journey.name}: {', '.join(steps)} ")
        repeat = 1 if self._scale is QUICK else journey.repeat
        for _ in range(self._rounds * repeat):
            for contender, corpus in corpora.items():
                self._one(journey, steps, contender, corpus)
                self._progress(".")
        self._progress("\n")
        for case in journey.cases():
            if case in self.results.cases or case in self.results.failures:
                print(case_table(case, self.results), end="\n\n", flush=True)

    def _steps(self, journey: Journey) -> list[str]:
        """The steps up to the last one that was asked for."""
        steps = [s for s in journey.steps if s not in WITH_INDEX or _has_stat_index()]
        while steps and not _selected(f"{steps[-1]}/{journey.name}", self._patterns):
            steps.pop()
        return steps

    def _corpus(self, journey: Journey, contender: str) -> Corpus:
        name = journey.parts.get(contender, journey.corpus)
        if name is None:
            return _NOTHING
        if not (self._folder / self._scale.name / name).exists():
            self._progress(f"Making {name} ...\n")
        corpus = make(name, self._scale, self._folder)
        if corpus.bytes > MIB and "plan" not in journey.steps:
            _warm(corpus.path)
        return corpus

    def _one(self, journey: Journey, steps: list[str], contender: str, corpus: Corpus) -> None:
        """Make one contender's journey once."""
        mine = [s for s in steps if contender in PAIR or s not in _PAIR_STEPS]
        if contender != "ours":
            mine = [s for s in mine if s != "index"]
        with (
            tempfile.TemporaryDirectory(dir=_SCRATCH) as scratch,
            _server(journey, contender) as server,
        ):
            uri = ""
            for step in mine:
                case = f"{step}/{journey.name}"
                if contender in self.results.failures.get(case, {}):
                    return
                is_dir = os.path.isdir(corpus.path)
                job = Job(contender, step, corpus.path, is_dir, uri, scratch)
                before = server.cpu() if server else 0.0
                try:
                    answer = _work(job, self._environment(server, scratch))
                except WorkerError as exc:
                    self.results.failures.setdefault(case, {})[contender] = str(exc)
                    return
                server_cpu = server.cpu() - before if server else 0.0
                uri = uri or answer["result"] or ""
                if step not in UNREPORTED and _selected(case, self._patterns):
                    self._record(case, contender, corpus, answer, server_cpu)

    def _record(
        self, case: str, contender: str, corpus: Corpus, answer: dict[str, Any], server_cpu: float
    ) -> None:
        contenders = self.results.cases.setdefault(case, {})
        fresh = Measured(corpus.name, corpus.files, corpus.bytes)
        measured = contenders.setdefault(contender, fresh)
        measured.seconds.append(answer["seconds"])
        measured.cpus.append(answer["cpu"])
        measured.peaks.append(answer["peak"])
        measured.server_cpus.append(server_cpu)

    def _environment(self, server: Server | None, scratch: str) -> dict[str, str]:
        # Nothing of the caller's own Airflow or cloud account takes part.
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AIRFLOW", "GOOGLE_", "KERAS_", "KINETIC_", "CLOUDSDK_"))
        }
        connection = {
            "conn_type": "google_cloud_platform",
            "extra": {"is_anonymous": True, "project": "bench"},
        }
        return kept | {
            "STORAGE_EMULATOR_HOST": server.url if server else "http://127.0.0.1:9",
            "AIRFLOW_HOME": str(self._folder / "airflow"),
            "AIRFLOW_CONN_GOOGLE_CLOUD_DEFAULT": json.dumps(connection),
            "NO_GCE_CHECK": "true",  # nor the machine's own service account
            "GCE_METADATA_HOST": "127.0.0.1:9",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "TMPDIR": scratch,
            # Or gcsfs spends minutes asking for the bucket's type over gRPC.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def _progress(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)


def _has_stat_index() -> bool:
    from keras_remote_airflow.core.datasets.upload import upload_data

    return "hash_index" in inspect.signature(upload_data).parameters


def _warm(path: str) -> None:
    """Read the data once, so that the first contender does not pay for a cold disk."""
    paths = [path] if os.path.isfile(path) else [str(p) for p in Path(path).rglob("*.*")]
    for name in paths:
        with open(name, "rb") as file:
            while file.read(MIB):
                pass


@contextmanager
def _server(journey: Journey, contender: str) -> Iterator[Server | None]:
    """Start an empty server for a journey that needs one."""
    if "upload" not in journey.steps:
        yield None
        return
    program = ["-m", "keras_remote_airflow.testing"]
    if contender == "obstore":
        program = [str(HERE / "xml_server.py")]
    latency = ["--latency-ms", str(journey.latency_ms)]
    with subprocess.Popen(
        [sys.executable, *program, "--port", "0", "--bucket", BUCKET, *latency],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "=" not in line:
                raise WorkerError("the local server did not start")
            yield Server(line.strip().partition("=")[2], process.pid)
        finally:
            process.kill()


def _work(job: Job, environment: dict[str, str]) -> dict[str, Any]:
    """Have one job done in a process of its own."""
    with tempfile.TemporaryFile("w+", dir=job.scratch) as said:
        try:
            done = subprocess.run(
                [sys.executable, str(HERE / "worker.py"), json.dumps(asdict(job))],
                env=environment,
                cwd=job.scratch,
                stdout=subprocess.PIPE,
                stderr=said,
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise WorkerError(f"not done after {_TIMEOUT_SECONDS} s") from None
        if done.returncode:
            said.seek(0)
            errors = [line for line in said if "Error" in line[:80]]
            raise WorkerError((errors or ["no reason given"])[-1].strip()[:500])
    shutil.rmtree(os.path.join(job.scratch, "out"), ignore_errors=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    sys.exit(main())
