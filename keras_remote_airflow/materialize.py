"""`python -m keras_remote_airflow.materialize`: put the data that a ref names on the local disk.

For containers that get a ref and want files; it needs no Airflow. Prints the local path on stdout,
logs to stderr. Exit code 0; 2 for bad input, which no retry will mend; 1 for everything else.

As a module to import this is nothing: see the end.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

from keras_remote_airflow.core.errors import InvalidInputError, KerasRemoteError
from keras_remote_airflow.core.datasets.materialize import materialize
from keras_remote_airflow.core.refs import REF_VARIABLE, make_data_ref


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m keras_remote_airflow.materialize",
        description="Download data from Cloud Storage, verify it, and print its local path.",
    )
    parser.add_argument(
        "ref",
        nargs="?",
        help="a data ref as JSON, a gs:// URI (one that ends in / is a directory), or - for "
        f"standard input (default: ${REF_VARIABLE})",
    )
    parser.add_argument(
        "--dest",
        help="directory that becomes the dataset, or gets the single file under its own name; one "
        "that holds the data already is verified and reused (default: the ref's mount_path, else "
        "a directory named by the content in the system's temporary directory)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--dir", action="store_true", help="the gs:// URI is a directory")
    kind.add_argument("--file", action="store_true", help="the gs:// URI is a single file")
    parser.add_argument("--project", help="Google Cloud project id")
    args = parser.parse_args(argv)

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    # As a container's first process we would not be ended by SIGTERM otherwise.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    try:
        path = materialize(_read_ref(args), args.dest, project=args.project)
    except InvalidInputError as exc:
        return _fail(2, exc)
    except (KerasRemoteError, OSError) as exc:
        return _fail(1, exc)
    print(path)
    return 0


def _read_ref(args: argparse.Namespace) -> object:
    text = os.environ.get(REF_VARIABLE, "") if args.ref is None else args.ref
    text = (sys.stdin.read() if text == "-" else text).strip()
    if not text:
        raise InvalidInputError(f"no data ref: pass one, or set {REF_VARIABLE}")
    if not text.startswith("gs://"):
        if args.dir or args.file:
            raise InvalidInputError("--dir and --file are for gs:// URIs: a data ref says itself")
        return text
    if not (args.dir or args.file or text.endswith("/")):
        raise InvalidInputError(
            f"{text} may be a directory or a single file: pass --dir or --file, or end it with /"
        )
    return make_data_ref(text, is_dir=not args.file)


def _fail(code: int, error: Exception) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
else:
    # Importing a submodule binds it to its name in the package, and that name is the function's.
    # The import system binds what it finds here, so it binds the function.
    sys.modules[__name__] = materialize  # type: ignore[assignment]  # no module, on purpose
