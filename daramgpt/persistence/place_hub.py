"""A place on the Hugging Face hub: a private model repository, made where there is none.

A copy is one commit, which also removes older checkpoints: whoever reads finds the state before it or after it. What a
commit removes still counts until the history is dropped, and a private repository has little room, so the history is
dropped where the repository holds nothing but copies. The token is the one that the hub's library finds.
"""

from __future__ import annotations

import glob
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt.persistence.contents import (
    MANIFEST,
    Contents,
    Folder,
    Sums,
    checkpoint_fault,
    dump_sums,
    is_plain,
    is_small,
    older_than_kept,
    read_sums,
    steps_in,
    sums_of,
)
from daramgpt.persistence.place import Place, PlaceError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What the hub puts into a repository by itself, and what people put there to say what it is.
NO_COPIES = {".gitattributes", "README.md"}


class HubPlace(Place):
    """A model repository on the hub.

    Args:
        repo_id: ``user/name``.
    """

    def __init__(self, repo_id: str) -> None:
        self.repo_id, self.name = repo_id, f"huggingface.co/{repo_id}"
        self._is_made = False
        self._exported: dict[str, bytes] = {}

    def copy(self, contents: Contents, keep: int) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if contents.path is not None and (fault := checkpoint_fault(contents.path)):
            raise PlaceError(f"{contents.path.name} is not copied: {fault}")
        with _reaching(), _quiet():
            api = self._api()
            everything = set(api.list_repo_files(self.repo_id))
            there = _of_run(everything, contents.run)
            small, folders = dict(contents.small), self._changed(contents, there)
            small[MANIFEST] = dump_sums({**self._sums_of_others(contents, there), **sums_of(small)})
            adds: dict[str, Any] = dict(small)
            for folder in folders:
                adds |= {f"{folder.name}/{name}": file for name, file in folder.files.items()}
                adds[f"{folder.name}/{MANIFEST}"] = folder.manifest
            doomed = {
                name for folder in folders for name in there if name.startswith(f"{folder.name}/") and name not in adds
            }
            if contents.checkpoint is not None:
                steps = steps_in({*there, *adds}, contents.checkpoint.name.partition("checkpoints/")[0])
                for old in older_than_kept(steps, keep, contents.checkpoint.name):
                    doomed |= {name for name in there if name.startswith(f"{old}/")}
            title = contents.checkpoint.name if contents.checkpoint else "records"
            api.create_commit(
                self.repo_id,
                [
                    *(CommitOperationAdd(f"{contents.run}/{name}", data) for name, data in adds.items()),
                    *(CommitOperationDelete(f"{contents.run}/{name}", False) for name in sorted(doomed)),
                ],
                commit_message=f"{contents.run}: {title}",
            )
            self._exported |= {folder.name: folder.manifest for folder in contents.exports}
        if doomed and _holds_only_copies(everything):
            self._drop_history(api)

    def _drop_history(self, api: HfApi) -> None:
        try:
            with _reaching():
                api.super_squash_history(self.repo_id)
        except PlaceError as error:
            # The copy stands; that the repository grows is for the log.
            warnings.warn(f"{self.name}: its history could not be dropped, so it grows: {error}", stacklevel=2)

    def _changed(self, contents: Contents, there: set[str]) -> list[Folder]:
        """Folders to send; an export goes once a session, or where it is gone."""
        return [
            folder
            for folder in contents.folders
            if folder is contents.checkpoint
            or self._exported.get(folder.name) != folder.manifest
            or not {f"{folder.name}/{name}" for name in folder.files} <= there
        ]

    def _sums_of_others(self, contents: Contents, there: set[str]) -> Sums:
        """Of small files that this machine lacks: they stay as they are there."""
        others = {name for name in there if is_small(name) and name not in contents.small}
        if not others or MANIFEST not in there:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            brought = self._download(contents.run, [MANIFEST], Path(folder) / "manifest")
            try:
                sums = read_sums((brought / MANIFEST).read_bytes())
            except ValueError:
                return {}
        return {name: described for name, described in sums.items() if name in others}

    def files(self, run: str) -> set[str]:
        with _reaching():
            return _of_run(self._api().list_repo_files(self.repo_id), run)

    def bring(self, run: str, names: Iterable[str], into: Path) -> Path:
        names = list(names)
        for name in names:
            if not is_plain(name):
                raise PlaceError(f"{name!r} is no file of the run")
        with _reaching(), _quiet():
            return self._download(run, names, into)

    def _download(self, run: str, names: list[str], into: Path) -> Path:
        patterns = [glob.escape(f"{run}/{name}") for name in names]
        # A folder that is there already would be taken for the answer where the hub cannot be reached.
        assert not into.exists()
        self._api().snapshot_download(self.repo_id, allow_patterns=patterns, local_dir=into)
        return into / run

    def _api(self) -> HfApi:
        """The hub; makes the repository at first, which also shows whether the token may write.

        Without a token a private repository looks as if there were none: a place that cannot be read must not pass for
        one that is empty.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        if not self._is_made:
            api.create_repo(self.repo_id, private=True, exist_ok=True)
            self._is_made = True
        return api


def _of_run(names: Iterable[str], run: str) -> set[str]:
    return {name.removeprefix(f"{run}/") for name in names if name.startswith(f"{run}/")}


def _holds_only_copies(names: set[str]) -> bool:
    """Whether all files of a repository are of runs that were copied there."""
    runs = {name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(f"/{MANIFEST}")}
    return all(name in NO_COPIES or name.partition("/")[0] in runs for name in names)


@contextmanager
def _reaching() -> Iterator[None]:
    """Turn whatever the hub's library raises into a `PlaceError` of one line."""
    try:
        yield
    except PlaceError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        raise (PlaceError(number, text) if (number := getattr(error, "errno", None)) else PlaceError(text)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of the hub's library: they would run through the display of a training."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
