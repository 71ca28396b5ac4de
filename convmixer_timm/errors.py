"""What goes wrong on the way to the Hub and back, told in one line with what to do."""

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError

__all__ = ["NETWORK", "HubError", "hub_reason", "hub_status"]

# What huggingface_hub lets through: httpx's errors are no OSErrors, those of requests, which it used before 1.0, are.
NETWORK = (OSError, HTTPError)


class HubError(OSError):
    """What went wrong between here and the Hub, and what to do, in one line."""


def hub_status(error: BaseException) -> int | None:
    """The status that the Hub answered with; None for what is no answer of it."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def hub_reason(error: Exception) -> str:
    """What happened, without addresses: those of uploads are signed."""
    if isinstance(error, HfHubHTTPError):
        said = f" ({' '.join(error.server_message.split())})" if error.server_message else ""
        return f"the Hub answered {hub_status(error)}{said}"
    return f"no answer from {constants.ENDPOINT} ({type(error).__name__})"
