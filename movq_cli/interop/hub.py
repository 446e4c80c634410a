"""Repositories of the Hugging Face hub: an address `hf://owner/name` stands for the local path of what it names.

Nothing that is downloaded is executed. This module needs no torch, and it imports huggingface_hub at the first use.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from movq_cli.errors import BadRequestError, FailureError, MovqError
from movq_cli.files import sha256_once
from movq_cli.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Path("hf://owner/name") has one slash, as every path on the command line.
_SCHEME = re.compile(r"hf:(/+|$)")
_ADDRESS = re.compile(r"hf:/+(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<path>.+?))?/*")
_STORAGE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
}
"""Error numbers of the folder in which downloads are stored."""
_TIMEOUT = 20.0  # seconds without an answer of the hub
_LONGEST_CHAIN = 50  # causes of an error; a chain of causes can be a circle
_LOG_IN = "For a private repository, run `hf auth login`, or set HF_TOKEN to a token that may read it."


@dataclass(frozen=True)
class Address:
    """An address on the hub: `hf://owner/name[@revision][/path]`."""

    repository: str
    """Owner and name, `owner/name`."""
    revision: str | None
    """Branch, tag or commit; None = the main branch."""
    path: str
    """File or folder in the repository; empty = all of it."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{revision}{f'/{self.path}' if self.path else ''}"


@dataclass(frozen=True)
class Repository:
    """A folder in a repository, at one commit, whose files can be downloaded one by one."""

    address: Address
    """Address of the folder, or of a file in it."""
    commit: str
    folder: str
    """Path of the folder in the repository; empty = all of it."""
    file: str | None
    """Name of the file that the address names; None if it names the folder."""
    files: Mapping[str, str | None]
    """The files in the folder and below it, by their paths relative to it, with the SHA-256 that the hub states."""
    snapshot: Path | None
    """Folder of the files that were downloaded before, if the hub cannot be reached; else None."""

    @property
    def pinned(self) -> str:
        """The address with the commit in place of a branch, so that it names the same files for ever."""
        return str(Address(self.address.repository, self.commit, self.address.path))

    def download(self, name: str) -> Path:
        """Return the path of a file in the cache of huggingface_hub, after a download if it is not there.

        Args:
            name: One of `files`.

        Raises:
            BadRequestError: The repository cannot be read.
            FailureError: The download fails, or what arrives is not the file that the hub states.
        """
        path = f"{self.folder}/{name}" if self.folder else name
        if self.snapshot is not None:
            return self.snapshot / path
        local = self._fetch(path)
        stated = self.files[name]
        if stated is not None and sha256_once(local) != stated:
            local = self._fetch(path, again=True)  # The file in the cache may have been damaged after its download.
            if sha256_once(local) != stated:
                for name_in_cache in (local.resolve(), local):  # So that no other program takes it for the file.
                    name_in_cache.unlink(missing_ok=True)
                raise FailureError(
                    f"{path} in {self.address.repository} arrived with another content than the hub states",
                    "Run the command again; a proxy in between may have replaced the file.",
                )
        return local

    def _fetch(self, path: str, *, again: bool = False) -> Path:
        with _failures(self.address):
            # With the branch in place of the commit, the cache can later answer for the branch without a network.
            local = Path(
                _api().hf_hub_download(
                    self.address.repository, path, revision=self.address.revision, force_download=again
                )
            )
        if self.commit not in local.parts:
            raise FailureError(f"{self.address} was changed during the download", "Run the command again.")
        return local


def address_of(path: str | Path | None) -> Address | None:
    """Return the address that a path stands for; None if it is a local path.

    Raises:
        BadRequestError: The path begins like an address, and is none.
    """
    if path is None or not _SCHEME.match(str(path)):
        return None
    match = _ADDRESS.fullmatch(str(path))
    if match is None:
        text = _SCHEME.sub("hf://", str(path), count=1)
        raise BadRequestError(
            f"{text} is no address on the Hugging Face hub", "Write hf://owner/name[@revision][/path]."
        )
    return Address(match["repository"], match["revision"], match["path"] or "")


def open_repository(address: Address) -> Repository:
    """Return the folder of a repository that an address names; the files are only listed.

    If the hub cannot be reached, the files are those that were downloaded before.

    Raises:
        BadRequestError: There is no such repository, revision or path, or it is not public.
        FailureError: The hub cannot be reached, and nothing was downloaded before, or its answer is not one of a hub.
    """
    snapshot = None
    try:
        with _failures(address):
            info = _api().model_info(
                address.repository, revision=address.revision, files_metadata=True, timeout=_TIMEOUT
            )
            files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or ()}
            commit = str(info.sha)
    except FailureError:
        snapshot = _cached(address)
        if snapshot is None:
            raise
        names = (path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
        files, commit = dict.fromkeys(names), snapshot.name
    folder, file = address.path, None
    if folder in files:
        folder, _, file = folder.rpartition("/")
    beginning = f"{folder}/" if folder else ""
    inside = {name.removeprefix(beginning): stated for name, stated in files.items() if name.startswith(beginning)}
    if not inside:
        name = address.path or "file"
        raise BadRequestError(f"{address.repository} on the hub has no {name}", _files_hint(files))
    return Repository(address, commit, folder, file, inside, snapshot)


def download_weights(address: Address, name: str, beside: Collection[str] = ()) -> Path:
    """Download a weight file that movq wrote, and return its path.

    Args:
        address: Address of the file, or of its folder.
        name: Name of the file in the folder.
        beside: Names of further files in its folder, which are downloaded too, if they are there.

    Raises:
        BadRequestError: There is no such file.
        FailureError: The download fails.
    """
    repository = open_repository(address)
    chosen = repository.file or name
    if chosen not in repository.files:
        raise BadRequestError(
            f"{address} holds no {name}, the weight file of movq",
            f"Import weights of another project first: movq import {address} runs/NAME",
        )
    for other in beside:
        if other in repository.files and other != chosen:
            repository.download(other)
    return repository.download(chosen)


def upload(repository: str, files: Mapping[str, Path | bytes], *, private: bool | None) -> str:
    """Upload files to a repository in one commit; the repository is created if it does not exist.

    Args:
        repository: Owner and name, `owner/name`.
        files: Paths or contents of the files, by their names in the repository.
        private: Whether a new repository is private; None leaves it to the owner's settings.

    Returns:
        The web address of the commit.

    Raises:
        BadRequestError: The name is none, or the account may not write to the repository.
        FailureError: The upload fails.
    """
    address = address_of(f"hf://{repository}")
    if address is None or address.repository != repository:
        raise BadRequestError(f"{repository!r} is no name of a repository", "Write owner/name.")
    with _failures(address):
        api = _api()
        from huggingface_hub import CommitOperationAdd

        api.create_repo(repository, private=private, exist_ok=True)
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        commit = api.create_commit(repository, additions, commit_message=f"Upload with movq {__version__}")
    return str(commit.commit_url)


def _api() -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise BadRequestError("the Hugging Face hub needs huggingface_hub", "pip install 'movq[hub]'") from None
    return HfApi(library_name="movq", library_version=__version__)


@contextmanager
def _failures(address: Address) -> Iterator[None]:
    """Turn the errors of huggingface_hub, and of the packages that it uses, into one line."""
    handled = sys.exc_info()[1]
    try:
        yield
    except MovqError:
        raise
    except Exception as error:  # Its errors and those of the HTTP client have no base class, and changed with versions.
        raise _error(address, list(islice(_chain(error, handled), _LONGEST_CHAIN))) from None


def _chain(error: BaseException | None, handled: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, up to the error that the caller was handling before, which is none of them."""
    while error is not None and error is not handled:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _error(address: Address, chain: Sequence[BaseException]) -> MovqError:
    """Return what an error of huggingface_hub means; `chain` holds the error and its causes, the deepest one last."""
    from huggingface_hub import constants, errors

    error, cause = chain[0], chain[-1]
    for link in chain:
        if isinstance(link, errors.HfHubHTTPError):
            return _http_error(address, link, link.response.status_code)
    hub = constants.ENDPOINT
    if isinstance(error, errors.HFValidationError):
        return BadRequestError(f"{address} is no address on the Hugging Face hub: {_first_line(error)}")
    if isinstance(error, (ValueError, TypeError, KeyError, AttributeError)):
        return FailureError(
            f"{hub} does not answer like a hub: {_first_line(error)}", "Check HF_ENDPOINT and the proxy."
        )
    if isinstance(cause, OSError) and cause.errno in _STORAGE:
        return FailureError(f"{address} cannot be stored: {_first_line(cause)}", "Set HF_HOME to another folder.")
    return FailureError(
        f"{address} cannot be reached at {hub}: {_first_line(cause)}",
        "Check the network, or download the files on another machine and name their folder.",
    )


def _http_error(address: Address, error: BaseException, status: int) -> MovqError:
    """Return what an answer of the hub with an error's status means."""
    from huggingface_hub import constants, errors

    name, hub = address.repository, constants.ENDPOINT
    known = {
        errors.GatedRepoError: (f"access to {name} is restricted", f"Ask for it at {hub}/{name}. {_LOG_IN}"),
        errors.RepositoryNotFoundError: (
            f"there is no public repository {name} on {hub}",
            f"Check the name. {_LOG_IN}",
        ),
        errors.RevisionNotFoundError: (
            f"{name} on the hub has no revision {address.revision}",
            "Name a branch, a tag or a commit.",
        ),
    }
    for kind, (message, hint) in known.items():
        if isinstance(error, kind):
            return BadRequestError(message, hint)
    if status in {401, 403}:
        return BadRequestError(
            f"{hub} does not permit this for {name} ({_first_line(error)})",
            "Run `hf auth login`, or set HF_TOKEN to a token with the permission.",
        )
    return FailureError(f"{hub} failed for {name} ({_first_line(error)})", "Run the command again later.")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _cached(address: Address) -> Path | None:
    """Return the folder of the files that were downloaded before; None if there are none."""
    try:
        return Path(_api().snapshot_download(address.repository, revision=address.revision, local_files_only=True))
    except Exception:  # The error that made the search necessary is the one to report.
        return None


def _files_hint(files: Collection[str]) -> str:
    names = sorted(files)
    more = " ..." if len(names) > 8 else ""
    return f"It has {', '.join(names[:8])}{more}." if names else "It is empty."
