"""How long the Hub's answers are waited for while publishing, and what is said meanwhile."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import utils

from ..errors import HubTimeout, timeout_cause

__all__ = ["limit_waiting"]

_SILENCE = 5.0  # seconds after which a line tells what is waited for


@contextlib.contextmanager
def limit_waiting(seconds: float) -> Iterator[None]:
    """Lets huggingface_hub's client wait so long for each answer, and say what it waits for, within the block.

    By itself it waits for ever for most answers, or asks again up to five times for as long. Here an answer that
    doesn't come ends it; after one that says no it may ask again as before.
    """

    def limited(session: Any) -> Any:
        session.send = _send(session.send, seconds)
        return session

    if hasattr(utils, "configure_http_backend"):  # before 1.0, on requests
        configure, factory = utils.configure_http_backend, "_GLOBAL_BACKEND_FACTORY"
    else:
        configure, factory = huggingface_hub.set_client_factory, "_GLOBAL_CLIENT_FACTORY"
    own = getattr(utils._http, factory)  # the user's, with a proxy or a certificate, or the library's

    def client() -> Any:
        made = limited(own())
        made.timeout = seconds
        return made

    configure(client)
    try:
        yield
    finally:
        configure(own)


def _send(send: Any, seconds: float) -> Any:
    def patient(request: Any, *args: Any, **kwargs: Any) -> Any:
        address = urlsplit(str(request.url))  # of which the query may be a signature
        what = "take a file" if request.method == "PUT" else f"answer {request.method} {address.path}"
        said = f"waiting for {address.hostname} to {what}, for at most {seconds:g} s"
        timer = threading.Timer(_SILENCE, print, [said], {"file": sys.stderr, "flush": True})
        timer.daemon = True
        timer.start()
        try:
            if "timeout" in kwargs:  # requests
                kwargs["timeout"] = kwargs["timeout"] or seconds
            return send(request, *args, **kwargs)
        except Exception as error:
            if timeout_cause(error) is None:
                raise
            raise HubTimeout(f"no answer within {seconds:g} s (Timeout): {address.hostname} didn't {what}") from error
        finally:
            timer.cancel()

    return patient
