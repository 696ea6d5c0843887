"""The errors that this package raises: one class for each failure that callers handle differently.

Retrying does not mend an `InvalidInputError`, a `ConflictError` or a `MarkerError`: for these
(`PERMANENT_ERRORS`) the Airflow layer fails the task at once. It leaves the others to the task's
own retries.
"""


def printable(text: str) -> str:
    """Return text that can be logged, whatever file names it holds and whatever the locale is.

    Python keeps the bytes that it cannot decode as surrogates, which no log file can hold.
    """
    try:
        return text.encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:  # surrogates of another origin
        return text.encode(errors="backslashreplace").decode()


class KerasRemoteError(Exception):
    """Base of every error this package raises on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())


class InvalidInputError(KerasRemoteError, ValueError):
    """A path, name, bucket, namespace, hash or ref that cannot be used; nothing was written."""


class DataNotFoundError(InvalidInputError, FileNotFoundError):
    """The local path does not exist."""


class EmptyDataError(KerasRemoteError):
    """The data has too few files, or `gs://` data isn't there; nothing was sent.

    Retrying may mend it: a volume that is not mounted looks like an empty folder, and what writes
    to Cloud Storage may not be done.
    """


class DataChangedError(KerasRemoteError):
    """Local data changed while it was hashed or before it was uploaded; nothing was published."""


class ConflictError(KerasRemoteError):
    """An object that must not be overwritten holds other bytes than ours."""


class MarkerError(KerasRemoteError):
    """A marker that this version cannot read; nothing is concluded from it."""


class IntegrityError(KerasRemoteError):
    """Downloaded data is not what its reference names; nothing was left at the destination."""


class StoreError(KerasRemoteError):
    """Cloud Storage refused a request, or kept failing until the deadline.

    Attributes:
        status: the HTTP status, or None where no answer came at all.
        transient: whether the same request may well succeed later.
    """

    def __init__(self, message: str, *, status: int | None = None, transient: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.transient = transient


PERMANENT_ERRORS = (InvalidInputError, ConflictError, MarkerError)
