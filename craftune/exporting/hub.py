"""Upload an export to the Hugging Face hub; only ever when asked."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from craftune.errors import UserError


@runtime_checkable
class Api(Protocol):
    """The part of `huggingface_hub.HfApi` that an upload needs."""

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> Any:
        """Make the model repository unless it is there."""
        ...

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        """All files as one commit."""
        ...


def push(folder: Path, repo: str, api: Api | None = None) -> str:
    """Upload a finished export as one commit. Returns the repository's address.

    The token comes from the environment (HF_TOKEN) or from `hf auth login`; it is not stored.

    Args:
        repo: "owner/name"; made, if it is not there, as the account's settings say.
        api: stands in for the hub.

    Raises:
        UserError: no connection, no token, or no right to write; the export stays where it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # of the hub's HTTP library, which changed from release to release
        LocalTokenNotFoundError,
    )

    hub: Api = api or HfApi()
    try:
        hub.create_repo(repo, exist_ok=True)
        hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Model exported by craftune"
        )
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo!r}: not a name of the hub: {_line(error)}") from None
    except LocalTokenNotFoundError:
        raise UserError(
            f"--push-to-hub {repo!r}: no token; run `hf auth login` or set HF_TOKEN, then the same "
            f"command again; the export stays in {folder}"
        ) from None
    except (HTTPError, OSError) as error:
        raise UserError(
            f"--push-to-hub {repo!r}: the hub did not take it ({_line(error)}); the export stays "
            f"in {folder}, the same command tries again"
        ) from None
    return f"https://huggingface.co/{repo}"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
