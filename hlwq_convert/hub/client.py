"""The client library: how it is reached, what its failures mean here, and that no token gets into what we say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hlwq_formats.errors import (
    HlwqError,
    HubBusy,
    HubFailed,
    HubMoved,
    HubRefused,
    HubUnreadable,
    Usage,
    escape,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([^\s@:?#\\]{1,200}))?", re.ASCII)
_SECRET = re.compile(r"(?i:bearer)\s+\S+|\bhf_\w+|\beyJ[\w.-]+")


def parse_id(text: str) -> tuple[str, str | None] | None:
    """(org/name, revision or None) of a Hub id "org/name[@revision]", or None for any other text."""
    match = _ID.fullmatch(text)
    return (match[1], match[2]) if match else None


def check_repo(text: str) -> str:
    """The text, when it names a repository; else Usage."""
    parsed = parse_id(text)
    if parsed is None or parsed[1] is not None:
        raise Usage(f"{escape(text)} is no repository: expected org/name")
    return text


def open_api() -> HfApi:
    """The client, with its own token, cache, endpoint and offline mode; Usage without the extra `hub`."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import logging
    except ImportError:
        raise Usage("the Hub needs huggingface_hub", hint='pip install "hlwq-convert[hub]"') from None
    logging.set_verbosity_error()  # its warnings hold signed addresses; what matters is raised
    from .. import __version__

    return HfApi(library_name="hlwq-convert", library_version=__version__)


def hide_progress() -> None:
    """No bars of the client on stderr, which it shows even where that is no terminal."""
    open_api()
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


@contextmanager
def hub_errors(repo: str, *, writing: bool = False) -> Iterator[None]:
    """Turn whatever the client raises into an error of ours that names `repo` and holds no token."""
    from huggingface_hub import errors

    try:
        yield
    except HlwqError:
        raise
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _translate(error, repo, writing) from None
    except (errors.LocalTokenNotFoundError, errors.OIDCError) as error:
        raise HubRefused(f"no token: {redact(str(error))}", file=repo, hint=LOG_IN) from None
    except (ValueError, RuntimeError) as error:  # what it finds wrong itself, and what failed in one of its threads
        if error.__cause__ is not None:
            raise _translate(error.__cause__, repo, writing) from None
        raise _refusal(repo, writing, redact(str(error))) from None
    except Exception as error:
        if not _is_transport(error):
            raise
        raise _translate(error, repo, writing) from None


LOG_IN = "set HF_TOKEN, or run `hf auth login`"


def redact(text: str) -> str:
    """A text of the server or the client on one line, short, without what looks like a token or a CI command."""
    text = _SECRET.sub("***", text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN"):
        if (secret := os.environ.get(name)) and len(secret) >= 4:
            text = text.replace(secret, "***")
    return escape(" ".join(text.split()), 160).replace("::", ":\\x3a")


def _is_transport(error: BaseException) -> bool:
    """Whether an error is one of the HTTP library under the client (httpx or httpx2, by its version)."""
    return any(kind.__module__.split(".")[0] in ("httpx", "httpx2") for kind in type(error).__mro__)


def _refusal(repo: str, writing: bool, problem: str) -> HlwqError:
    return HubRefused(problem, file=repo) if writing else HubUnreadable(problem, file=repo)


def _translate(error: BaseException, repo: str, writing: bool) -> HlwqError:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return _refusal(repo, writing, "the Hub is needed, and HF_HUB_OFFLINE is set")
    if isinstance(error, errors.LocalEntryNotFoundError):
        if error.__cause__ is not None and not isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            return _translate(error.__cause__, repo, writing)
        return HubUnreadable("not in the cache, and HF_HUB_OFFLINE is set", file=repo)
    response = getattr(error, "response", None)
    if response is None:
        if _is_transport(error):
            again = "; what was complete is not sent twice" if writing else ""
            problem = f"the connection to the Hub failed: {type(error).__name__}"
            return HubFailed(problem, file=repo, hint=f"try again{again}")
        return _refusal(repo, writing, redact(str(error)))
    status = int(response.status_code)
    if isinstance(error, errors.GatedRepoError):
        hint = f"ask for access at https://huggingface.co/{repo}, and set HF_TOKEN"
        return _refusal_with(repo, writing, "gated: this token may not read its files", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return _refusal(repo, writing, "no such revision")
    if isinstance(error, errors.EntryNotFoundError):
        return _refusal(repo, writing, "no such file")
    if status == 401:
        return _refusal_with(repo, writing, "no such repository, or one that needs a valid token", LOG_IN)
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return _refusal_with(repo, writing, "no such repository, or one that this token may not see", "check its name")
    if status == 412:
        return HubMoved("someone else committed meanwhile; nothing was published", file=repo, hint="try again")
    if status == 429:
        return HubBusy("the Hub asks for patience (429)", file=repo, hint="try again later")
    reason = redact(getattr(error, "server_message", None) or "")
    problem = f"the Hub answered {status}" + (f": {reason}" if reason else "")
    if status >= 500:
        return HubFailed(problem, file=repo, hint="try again later")
    return _refusal(repo, writing, problem)


def _refusal_with(repo: str, writing: bool, problem: str, hint: str) -> HlwqError:
    error = _refusal(repo, writing, problem)
    error.hint = hint
    return error
