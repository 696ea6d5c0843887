"""`python -m keras_remote_airflow.testing`: run the local Cloud Storage server."""

import argparse
import errno
import shlex
import signal
import sys
import threading
from collections.abc import Sequence

from .errors import ApiError
from .server import StorageServer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m keras_remote_airflow.testing",
        description="A local Cloud Storage server for tests. It has no authentication.",
    )
    parser.add_argument("--port", type=int, default=9023, help="0 takes a free one (default 9023)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1)")
    parser.add_argument(
        "--bucket", action="append", default=[], help="create this bucket; may be repeated"
    )
    parser.add_argument("--dir", help="keep buckets and objects in this folder")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="delay of every answer")
    args = parser.parse_args(argv)
    try:
        server = StorageServer(
            args.bucket,
            port=args.port,
            host=args.host,
            directory=args.dir,
            latency=args.latency_ms / 1000,
        )
        server.start()
    except (ApiError, OSError) as exc:
        taken = isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE
        hint = ": choose another --port, or 0 for any free one" if taken else ""
        print(f"cannot start: {exc}{hint}", file=sys.stderr)
        return 1
    lines = [f"export {name}={shlex.quote(value)}" for name, value in server.env().items()]
    print(*lines, sep="\n", flush=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
