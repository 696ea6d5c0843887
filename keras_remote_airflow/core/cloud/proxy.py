"""The proxy between here and Cloud Storage: which one, whom to trust, what it refuses."""

import os
import ssl
import stat
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from yarl import URL

from keras_remote_airflow.core.cloud.retry import RETRYABLE, RefusedError, RetryableError
from keras_remote_airflow.core.errors import StoreError


def find_proxy(url: str) -> str | None:
    """Return the proxy that the environment names for `url`, as the requests library reads it.

    Asked once: aiohttp's own `trust_env` asks for every request, in a thread, which costs more
    than the request.
    """
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    if not proxy:
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    if not proxy.startswith(("http://", "https://")):
        scheme = proxy.partition("://")[0]
        raise StoreError(
            f"the environment names a {scheme} proxy for {url}: only HTTP proxies can be used. Set "
            "HTTPS_PROXY to one, or exempt the host with NO_PROXY."
        )
    return proxy


def trusted(*urls: str | None) -> ssl.SSLContext | Literal[True]:
    """Return what to trust at `urls`: the system's authorities, and those that requests trusts.

    So that a proxy that inspects traffic is trusted here as it is when tokens are fetched.
    """
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if not bundle or not any(url and url.startswith("https://") for url in urls):
        return True
    try:
        state = os.stat(bundle)
        return _trusting(bundle, stat.S_ISDIR(state.st_mode), state.st_mtime)
    except OSError as exc:
        raise StoreError(
            f"the CA certificates cannot be used ({exc.strerror or exc}): {bundle}. Correct or "
            "unset REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE."
        ) from exc


# Reading the certificates takes longer than a look into the cache of data. By its time of
# modification a bundle that was replaced is read again.
@lru_cache(1)
def _trusting(bundle: str, is_dir: bool, _modified: float) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.load_verify_locations(**{"capath" if is_dir else "cafile": bundle})
    return context


def is_from_proxy(status: int, headers: Iterable[str], body: bytes) -> bool:
    """Tell whether a refusal comes from a proxy or a firewall, and not from Cloud Storage.

    Args:
        status: the HTTP status.
        headers: names of the answer's headers.
        body: the beginning of its body.
    """
    if status != 403:
        return status == 407
    # Cloud Storage refuses in JSON; a download in words, which name the permission.
    if (body.lstrip().startswith(b"{") and b'"error"' in body) or b"storage.objects." in body:
        return False
    return not any(name.lower().startswith(("x-goog-", "x-guploader-")) for name in headers)


def proxy_refusal(status: int, reason: str, proxy: str | None) -> RetryableError | RefusedError:
    """Return the error for a proxy's own answer to a request.

    Args:
        status: the HTTP status.
        reason: the words beside it.
        proxy: URL of the proxy, if the environment names one; its password is not told.
    """
    name = "a proxy or firewall on the way"
    if proxy:
        name = f"the proxy {URL(proxy).host}:{URL(proxy).port}"
    if status == 407:
        remedy = "Put name and password into HTTPS_PROXY: http://NAME:PASSWORD@HOST:PORT."
    else:
        remedy = "Have it allow Cloud Storage, or go round it with NO_PROXY."
    error = RefusedError(f"{name} refused the request (HTTP {status} {reason})", status, remedy)
    return RetryableError(str(error), status) if status in RETRYABLE else error
