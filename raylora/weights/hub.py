"""Repositories of the model hub, fetched to this machine's cache as far as they are needed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from raylora.base.errors import WeightsError
from raylora.base.fetch import cache_home, keep_text

Found = TypeVar("Found")


class HubRepository:
    """A model's repository by its id, at the commit that its main branch is at when it is opened.

    Configs are fetched when it is opened, other files when they are asked for. Where the hub cannot
    be reached, what was fetched before is used.

    Args:
        repository: "owner/name".
        word: the option that names it, for errors.
    """

    def __init__(self, repository: str, *, word: str) -> None:
        self.name = repository
        self._word = word

    @cached_property
    def _folder(self) -> Path:
        return self._download(None, ["*.json", "README.md"])

    def names(self) -> frozenset[str]:
        """Of its files, as the commit has them; asked for once on a machine."""
        from huggingface_hub import HfApi

        commit = self._folder.name
        kept = cache_home() / "hub-files" / self.name / f"{commit}.json"
        if not kept.exists():
            api = HfApi(endpoint=_endpoint())
            found = self._asked(lambda: api.list_repo_files(self.name, revision=commit))
            keep_text(kept, json.dumps(found))
        return frozenset(json.loads(kept.read_text()))

    def fetch(self, names: Iterable[str]) -> Path:
        """The commit's folder in the cache."""
        return self._download(self._folder.name, list(names))

    def _download(self, revision: str | None, names: list[str]) -> Path:
        from huggingface_hub import snapshot_download

        def download() -> Path:
            return Path(
                snapshot_download(
                    self.name,
                    revision=revision,
                    allow_patterns=names,
                    cache_dir=_cache(),
                    endpoint=_endpoint(),
                )
            )

        return self._asked(download)

    def _asked(self, ask: Callable[[], Found]) -> Found:
        """What the hub answers; its refusals as sentences that say what to do."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        try:
            return ask()
        except GatedRepoError:
            raise WeightsError(
                f"{self._word}: the repository {self.name} is gated. Accept its terms on its page "
                "at the model hub, and set HF_TOKEN to a token of the account that did."
            ) from None
        except RepositoryNotFoundError:
            raise WeightsError(
                f"{self._word}: there is no folder {self.name} here, and the model hub shows no "
                "repository of that name. Check it; for a private one set HF_TOKEN."
            ) from None
        except LocalEntryNotFoundError:
            raise WeightsError(
                f"{self._word}: the model hub cannot be reached, and {self.name} is not whole in "
                f"this machine's cache, {_cache()}. Fetch it once with a connection, or give a "
                "folder that has it."
            ) from None
        except HfHubHTTPError as error:
            raise WeightsError(
                f"{self._word}: the model hub refuses {self.name} ({error}). Try again later, or "
                "check HF_TOKEN."
            ) from None


def _cache() -> Path:
    return cache_home() / "hub"


def _endpoint() -> str | None:
    """The client reads it once, at its import; a job's environment may come later."""
    return os.environ.get("HF_ENDPOINT")
