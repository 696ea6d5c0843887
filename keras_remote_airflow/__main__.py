"""The command `keras-remote-data`, also `python -m keras_remote_airflow`; it needs no Airflow.

    get [A] [DEST]      download a dataset, verify it, print its local path

Results go to stdout, everything else to stderr. Exit codes:

    0   done
    1   failed; trying again may help
    2   failed for good: bad input, a conflict, an unreadable marker (`PERMANENT_ERRORS`)
    130 interrupted (143: by SIGTERM)
"""

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial

from keras_remote_airflow.core.datasets.materialize import materialize
from keras_remote_airflow.core.errors import PERMANENT_ERRORS, InvalidInputError, KerasRemoteError
from keras_remote_airflow.core.layout import cache_key_from_uri
from keras_remote_airflow.core.refs import REF_VARIABLE, DataRef, parse_data_ref

_GET = f"""\
Download a dataset, verify it, and print its local path.

  A       the dataset: a data ref as JSON, its gs:// URI in the cache, or - for
          standard input; without A, it is the ref in ${REF_VARIABLE};
          other data on Cloud Storage: a gs:// URI with --dir or --file, or one
          that ends in / (a directory)
  DEST    the directory that becomes the dataset, or that gets the single file
          under its own name; a dataset that is there already is verified and
          reused, another one is replaced only with --replace; without DEST, it
          is the ref's mount_path, else a directory named by the content in the
          system's temporary directory

One argument alone is DEST if it begins with /, ./, ../ or ~, else it is A.
"""
# What tells a local path from every spelling of a dataset.
_LOCAL_PATH = re.compile(r"/|~|\.\.?(/|$)")
# What may be the name of a destination, and is neither JSON nor a URI.
_NAME = re.compile(r"[\w.][\w./-]{,199}")

# How messages about arguments of `materialize` are told here.
_OPTIONS = {
    "replace=True": "--replace",
    "or leave out replace:": "or leave out --replace:",
    "Pass dest or cache_dir": "Pass DEST",
    "cannot write to cache_dir": "cannot write",
    "Pass a ref, made with make_data_ref(uri, is_dir)": "Pass --dir or --file",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or the process's own; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="keras-remote-data",
        description="Datasets on Cloud Storage, under the hash of their content.",
        allow_abbrev=False,
    )
    _add_get(parser.add_subparsers(metavar="COMMAND", required=True))
    # What no argument of the command takes is `rest`, for the command to use or to refuse.
    args, rest = parser.parse_known_args(argv)

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    # The kernel ignores a SIGTERM for a container's first process unless that handles it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    try:
        # A path is bytes, which need not be text of this locale.
        sys.stdout.buffer.write(os.fsencode(args.run(args, rest)) + b"\n")
        sys.stdout.flush()
    except PERMANENT_ERRORS as exc:
        return _fail(2, exc)
    except (KerasRemoteError, OSError) as exc:
        return _fail(1, exc)
    except KeyboardInterrupt:
        return _fail(128 + signal.SIGINT, "interrupted")
    return 0


def _add_get(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "get",
        help="download a dataset, verify it, and print its local path",
        usage="%(prog)s [-h] [--dir | --file] [--replace] [--project ID] [--user-project ID]"
        " [A] [DEST]",
        description=_GET,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("places", nargs="*", help=argparse.SUPPRESS)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--dir", action="store_true", help="the gs:// URI is a directory")
    kind.add_argument("--file", action="store_true", help="the gs:// URI is a single file")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="replace another dataset at DEST, if this command or materialize put it there and "
        "nothing has changed since",
    )
    parser.add_argument("--project", metavar="ID", help="Google Cloud project")
    parser.add_argument(
        "--user-project",
        metavar="ID",
        help="project to bill, if the bucket uses Requester Pays",
    )
    parser.set_defaults(run=partial(_get, parser))


def _get(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> str:
    # argparse stops collecting positional arguments at the first option behind one: those that
    # follow are in `rest`.
    places = args.places + rest
    if len(places) > 2 or any(re.match("-.", place) for place in rest):
        parser.error(f"unrecognized arguments: {' '.join(places[2:] or rest)}")
    a, dest = _split(places)
    return materialize(
        _read_ref(a, is_dir=args.dir, is_file=args.file),
        dest,
        replace=args.replace,
        project=args.project,
        user_project=args.user_project,
    )


def _split(places: list[str]) -> tuple[str | None, str | None]:
    """Return which of at most two arguments is the dataset, and which the destination."""
    if len(places) == 1 and _LOCAL_PATH.match(places[0]):
        return None, places[0]
    a, dest, *_ = [*places, None, None]
    return a, dest


def _read_ref(a: str | None, *, is_dir: bool, is_file: bool) -> DataRef | str:
    """Return the ref, or the URI of a dataset whose marker has to be asked what it is."""
    text = os.environ.get(REF_VARIABLE, "") if a is None else a
    text = (sys.stdin.read() if text == "-" else text).strip()
    # UTF-8 in any locale.
    text = os.fsencode(text).decode(errors="surrogateescape")
    if not text:
        raise InvalidInputError(f"no data ref: pass one, or set {REF_VARIABLE}")
    if not text.startswith("gs://"):
        if is_dir or is_file:
            raise InvalidInputError("--dir and --file are for gs:// URIs: a data ref says itself")
        if a and _NAME.fullmatch(a):
            raise InvalidInputError(
                f"not a data ref: {a!r}. If it is the destination, write ./{a}, else pass a ref "
                "or a gs:// URI."
            )
        return parse_data_ref(text)
    if not (is_dir or is_file):
        if cache_key_from_uri(text):
            return text
        if not text.endswith("/"):
            raise InvalidInputError(
                "not the URI of a dataset, which ends in /data-cache/ and 64 hex digits; for other "
                f"data pass --dir or --file, or end it with / for a directory: {text}"
            )
    return DataRef(text, is_dir=not is_file)


def _fail(code: int, error: object) -> int:
    text = " ".join(str(error).split())
    for argument, option in _OPTIONS.items():
        text = text.replace(argument, option)
    print("error:", text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
