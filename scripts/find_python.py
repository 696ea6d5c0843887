"""Print the path of a Python of the given version ("3.12"), or fail: for the Makefile.

It may be on the PATH, or installed beside the Python that runs this, as pyenv does. A name on the
PATH proves nothing: pyenv puts a `python3.12` there that only runs where 3.12 is switched on.
"""

import glob
import os
import subprocess
import sys


def main() -> int:
    (wanted,) = sys.argv[1:]
    versions = [
        os.path.dirname(sys.base_prefix),
        os.path.join(os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv"), "versions"),
    ]
    beside = [f"{folder}/{wanted}*/bin/python{wanted}" for folder in versions]
    for candidate in [f"python{wanted}", *(path for each in beside for path in glob.glob(each))]:
        say = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
        try:
            answer = subprocess.check_output(
                [candidate, "-c", say], text=True, stderr=subprocess.DEVNULL
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        version, _, path = answer.strip().partition(" ")
        if version == wanted:
            print(path)
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
