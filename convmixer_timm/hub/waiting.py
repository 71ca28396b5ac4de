"""How long the Hub's answers are waited for while publishing, and what is said meanwhile."""

import sys
import threading
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import utils

from ..errors import HubTimeout, timeout_cause

__all__ = ["limit_waiting"]

_SILENCE = 5.0  # seconds after which a line tells what is waited for


def limit_waiting(seconds: float) -> None:
    """Lets huggingface_hub's client wait so long for each answer, once, and say what it waits for.

    By itself it waits for ever for most answers, or asks again up to five times for as long.
    """

    def limited(session: Any) -> Any:
        session.send = _send(session.send, seconds)
        return session

    if hasattr(utils, "configure_http_backend"):  # before 1.0, on requests
        import requests

        utils.configure_http_backend(lambda: limited(requests.Session()))
        return

    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> Any:
        made = limited(default_client_factory())
        made.timeout = seconds
        return made

    set_client_factory(client)


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
