"""Answers other than success, as the JSON API gives them.

https://cloud.google.com/storage/docs/json_api/v1/status-codes
"""

from collections.abc import Mapping


class ApiError(Exception):
    """`reason` is the JSON API's word for the error; `plain` asks for text instead of JSON.

    The upload endpoint answers some errors in plain text.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        plain: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.plain = plain
        self.headers = headers or {}


def invalid(message: str) -> ApiError:
    return ApiError(400, "invalid", message)


def required(parameter: str) -> ApiError:
    return ApiError(400, "required", f"Required parameter: {parameter}")


def not_found(message: str = "Not Found") -> ApiError:
    return ApiError(404, "notFound", message)


def not_allowed(method: str) -> ApiError:
    return ApiError(405, "methodNotAllowed", f"{method} is not supported here.")


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
