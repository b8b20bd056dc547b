"""ModelScope as another source of the same files: what a repository there holds.

It gives a SHA-256 for each file. No token is sent: what is fetched from there is public. The host is www.modelscope.cn,
or that of MODELSCOPE_DOMAIN, which ModelScope's own programs read as well.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from wan_loader import HubError
from wan_pipeline.hub.remote import MAX_FILES, Listing, checked_file, explain

if TYPE_CHECKING:
    from wan_pipeline.hub.remote import RemoteFile

__all__ = ["list_on_modelscope"]

_HOST = "www.modelscope.cn"
_BRANCH = "master"
_TIMEOUT_S = 60


def list_on_modelscope(repository: str, revision: str | None) -> Listing:
    """List what a repository holds.

    Raises:
        HubError: ModelScope does not tell, or tells what cannot be trusted; says why.
    """
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    if not all(part.strip(".") for part in repository.split("/")) or repository.count("/") != 1:
        raise HubError.because(f"{repository} is not a name of a repository", "write OWNER/NAME")
    endpoint, name, branch = _endpoint(), quote(repository), quote(revision or _BRANCH, safe="")
    url = f"{endpoint}/api/v1/models/{name}/repo/files?Revision={branch}&Recursive=true"
    try:
        answer = get_session().get(url, timeout=_TIMEOUT_S)
        status = answer.status_code
        document: Any = answer.json() if status == 200 else None
    except Exception as error:
        raise explain(error, repository, revision, url=url) from error
    if status != 200:
        reason = f"{repository} is not to be had: {url.split('/')[2]} answers {status}"
        raise HubError(f"{reason}: check the name and --revision", status=status, reason=reason)
    files = _files(repository, document)
    return Listing(repository, revision or _BRANCH, files, f"{endpoint}/models/{name}/resolve/{branch}")


def _endpoint() -> str:
    domain = os.environ.get("MODELSCOPE_DOMAIN") or _HOST
    return domain.rstrip("/") if "://" in domain else f"https://{domain}"


def _files(repository: str, document: Any) -> tuple[RemoteFile, ...]:
    try:
        rows = [row for row in document["Data"]["Files"] if row["Type"] != "tree"]
        found = [(row["Path"], row["Size"], f"sha256:{row['Sha256']}") for row in rows]
    except (KeyError, TypeError) as error:
        reason = f"ModelScope's answer about {repository} is not one about a model's files"
        raise HubError.because(reason, "try again later, or leave out --source") from error
    if len(found) > MAX_FILES:
        raise HubError.because(f"{repository} has more than {MAX_FILES} files")
    return tuple(checked_file(repository, *row) for row in found)
