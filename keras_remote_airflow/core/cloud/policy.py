"""When to try a failed request again: what users pass as `retry`. It imports nothing heavy."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again, and when to give up.

    Attributes:
        deadline: seconds a request may go on failing, counted from its first failure or its last
            progress. 120 is the google-cloud-storage client's own default.
        initial: seconds of the first pause at the most; each further one is twice as long, and
            each is drawn at random up to its bound ("full jitter").
        maximum: seconds of the longest pause.
        stall_timeout: seconds without a byte sent or received after which a request counts as
            failed.
    """

    deadline: float = 120.0
    initial: float = 0.5
    maximum: float = 30.0
    stall_timeout: float = 60.0

    def pause(self, failures: int) -> float:
        """Return how many seconds to wait after this many failures in a row."""
        bound = min(self.maximum, self.initial * 2.0 ** min(failures - 1, 30))
        return random.uniform(0, bound)  # noqa: S311 - jitter, not a secret
