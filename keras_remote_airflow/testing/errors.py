"""Answers other than success, as the JSON API gives them.

https://cloud.google.com/storage/docs/json_api/v1/status-codes
"""


class ApiError(Exception):
    """`reason` is the JSON API's word for the error; `plain` asks for text instead of JSON."""

    plain = False

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message


class PlainError(ApiError):
    """The upload endpoint answers some errors in plain text."""

    plain = True


class RangeError(PlainError):
    """416, with the header that says how long the object is."""

    def __init__(self, size: int) -> None:
        super().__init__(416, "requestedRangeNotSatisfiable", "Request range not satisfiable")
        self.size = size


def invalid(message: str) -> ApiError:
    return ApiError(400, "invalid", message)


def required(parameter: str) -> ApiError:
    return ApiError(400, "required", f"Required parameter: {parameter}")


def not_found(message: str = "Not Found") -> ApiError:
    return ApiError(404, "notFound", message)


def forbidden(permission: str) -> ApiError:
    """403, as for an account whose roles lack `permission`."""
    return ApiError(
        403,
        "forbidden",
        f"The caller does not have {permission} access to the Google Cloud Storage resource. "
        f"Permission '{permission}' denied on resource (or it may not exist).",
    )


def unsupported(feature: str) -> ApiError:
    """400 and not 501: some clients try again for a minute after a status of 500 and more."""
    return ApiError(400, "notImplemented", f"Not supported by the local server: {feature}.")
