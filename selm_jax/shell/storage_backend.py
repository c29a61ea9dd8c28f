"""Opens obstore's handle of a place in a bucket, and says in words why a request failed."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

_NO_CREDENTIALS = re.compile(r"token request|[Cc]redential|security-credentials")
_SIGN_IN = {
    "gs": "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to "
    "the file of a service account; on a Cloud machine, give it a service account",
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role",
}
_ROLE = {
    "gs": "Storage Object User",
    "s3": "s3:GetObject, PutObject, DeleteObject, ListBucket",
}
_IN_MEMORY: dict[str, Any] = {}


class StorageError(RuntimeError):
    """A bucket cannot be used. The message says why, and what to do."""


def obstore() -> Any:
    """The package that speaks with stores.

    Raises:
      StorageError: it is not installed.
    """
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise StorageError("Buckets need obstore: pip install 'selm_jax[bucket]'") from None
    return obstore


def opened(url: str, *, limit: float, timeout: float, waits: tuple[float, float]) -> Any:
    """Opens the place that a url names; sends no request.

    Args:
      limit: seconds for which a request that failed is sent again.
      timeout: seconds for one request.
      waits: the shortest and the longest time between two tries, in seconds.

    Raises:
      StorageError: the url does not name a place in a bucket.
    """
    parts, stores = urlsplit(url), obstore().store
    prefix = unquote(parts.path).strip("/")
    if parts.scheme == "file" and not parts.netloc:
        return stores.LocalStore(prefix=f"/{prefix}", mkdir=True)
    if parts.scheme == "memory":
        if url not in _IN_MEMORY:
            _IN_MEMORY[url] = stores.MemoryStore()
        return _IN_MEMORY[url]
    if parts.scheme not in ("gs", "s3") or not parts.netloc or parts.query or parts.fragment:
        raise StorageError(
            f"{url} is not a place in a bucket: expected gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"
        )
    first, longest = (timedelta(seconds=each) for each in waits)
    client: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    options: dict[str, Any] = {
        "prefix": prefix or None,
        "client_options": client,
        "retry_config": {
            "max_retries": 1000,
            "retry_timeout": timedelta(seconds=limit),
            "backoff": {"init_backoff": first, "max_backoff": longest},
        },
    }
    if parts.scheme == "s3":
        client["allow_http"] = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
        return stores.S3Store(parts.netloc, **options)
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        options["base_url"] = emulator if "://" in emulator else f"http://{emulator}"
        options["bearer_token"] = "emulator"  # it wants one, and takes any
        client["allow_http"] = True
    return stores.GCSStore(parts.netloc, **options)


def passes(error: Exception) -> bool:
    """Says whether a request may succeed if sent again: a server's fault, or the network's."""
    told = str(error)
    if "NoSuchUpload" in told:  # the upload's last answer was lost; a new one is sent
        return True
    if type(error) is not obstore().exceptions.GenericError:
        return False
    if _NO_CREDENTIALS.search(told) or "builder error" in told:
        return False
    status = re.search(r"status code: (\d{3})", told)
    return not status or status[1][0] == "5" or status[1] in ("408", "409", "429")


def no_bucket(what: str, error: Exception) -> bool:
    """Says whether a request failed because there is no such bucket; `what` is as for `failure`."""
    missing = isinstance(error, FileNotFoundError) and what == "write"
    named = re.search(r"NoSuchBucket|bucket does not exist", str(error))
    return bool(named or missing and not re.search(r"NoSuch(Key|Upload)", str(error)))


def failure(url: str, what: str, key: str, error: Exception, limit: float) -> StorageError:
    """Makes the message about a request that failed for good.

    Args:
      url, key: the store's url, and the object's key in it.
      what: what was asked: "read", "write", "list", "look at" or "delete".
      limit: seconds for which it was tried.
    """
    exceptions, parts = obstore().exceptions, urlsplit(url)
    told, bucket = str(error).split("\n")[0], parts.netloc
    if no_bucket(what, error):
        advice = f"There is no bucket {bucket!r}. Make it, or correct the name"
    elif isinstance(error, exceptions.PermissionDeniedError):
        role = _ROLE.get(parts.scheme, "")
        advice = f"These credentials may not do this. Give them {role} on {bucket!r}"
    elif isinstance(error, exceptions.UnauthenticatedError) or _NO_CREDENTIALS.search(told):
        advice = f"There are no valid credentials. {_SIGN_IN.get(parts.scheme, '')}"
    elif passes(error):
        advice = (
            f"The store was not reachable, or too busy, for {limit:.0f} s. Start again once it is; "
            "nothing is lost"
        )
    else:
        advice = "The store refuses the request"
    where = f"{url}/{key}".rstrip("/")
    return StorageError(f"{where}: cannot {what} this. {advice}. The answer was: {told}")
