"""To the Hub: a protected model's folder, or the metric, in one commit that is the whole folder and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import validate_repo_id

from ..metrics import SLC_AUC
from ..run_folder import file_digest
from .card import card_repo_ids
from .hub_requests import REQUEST_TIMEOUT, HubError, bounded_requests, explained
from .record import RECORD_FILE, SIGNATURE_FILE
from .signing import check_signed_files
from .verify import verify_folder

_GIT_ATTRIBUTES = ".gitattributes"
# The Hub leaves out files that a .gitignore names, one that is there already included; one without patterns stops it.
_IGNORE_NOTHING = "# everything is published\n"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    gated: Literal["auto", "manual", False] = False,
    token: str | bool | None = None,
    branch: str | None = None,
    commit_message: str = "Upload protected model",
    public_key: str | Path | None = None,
    timeout: float = REQUEST_TIMEOUT,
) -> CommitInfo:
    """Publish the folder of a protected model: afterwards the branch holds exactly this folder.

    The folder is verified first. A new repository starts private, is gated if asked for, receives all files in one
    commit and only then becomes public if asked for: weights are never open that should not be, and no half model is
    ever seen. After a failure the same call can be repeated; what is there already is not sent again. Earlier commits
    of the repository stay in its history.

    Args:
        folder: Folder with an authorization record.
        repo_id: Such as "org/model"; made when missing.
        private: False makes the repository public, as the last step.
        gated: Whether readers have to ask for access: "auto" or "manual" approval. False leaves this setting of the
            repository as it is: gates are opened by hand only.
        token: Token with write access; default: the one of `hf auth login`.
        branch: Made from the main branch when missing; default: the main branch.
        commit_message: First line of the commit.
        public_key: Check the signature with this key as well.
        timeout: Seconds that a request may make no progress.

    Raises:
        RecordError: If there is no record, the folder is not the one it speaks of, or the signature does not fit:
            without a key, it is checked that it is of these files, and not whose it is.
        ValueError: If ``repo_id`` is no name, or the card's metadata is invalid or it names another repository or
            none, or the repository is public and ``private`` was not set to False.
        HubError: If the Hub cannot be reached or refuses; the branch is as it was before, unless the message says
            otherwise.
    """
    if gated not in ("auto", "manual", False):
        raise ValueError(f"found gated={gated!r}; needed: 'auto', 'manual' or False")
    validate_repo_id(repo_id)
    verified = verify_folder(folder, public_key)
    signature = Path(folder) / SIGNATURE_FILE
    if public_key is None and signature.exists():
        record = {RECORD_FILE: file_digest(Path(folder) / RECORD_FILE)}
        check_signed_files(signature, verified.record["files"] | record)
    named, repo_id = card_repo_ids(folder), full_repo_id(repo_id, token, timeout)
    if named and repo_id not in named:
        raise ValueError(
            f"the card in {folder} tells people to load {named[0]!r}; needed: {repo_id!r}. Run hf-ntp report {folder} "
            f"--repo_id {repo_id} first, then sign the folder if it was signed."
        )
    names = [*verified.record["files"], RECORD_FILE]
    # No part of the record: the Hub keeps the latter itself where a folder has none.
    names += [name for name in (SIGNATURE_FILE, _GIT_ATTRIBUTES) if (Path(folder) / name).is_file()]
    push = _Push(_api(token), repo_id, "model", branch, timeout)
    return push.run({name: Path(folder) / name for name in names}, commit_message, private, gated)


def push_metric(
    repo_id: str,
    *,
    private: bool = True,
    token: str | bool | None = None,
    commit_message: str = "Upload SLC-AUC metric",
    timeout: float = REQUEST_TIMEOUT,
) -> CommitInfo:
    """Publish the SLC-AUC metric as a Space: its page, and ``evaluate.load(repo_id)`` where hf_ntp is installed.

    Args:
        repo_id: Named "slc_auc", such as "org/slc_auc"; made when missing.
        private: False makes the Space public, as the last step; `evaluate` loads from public ones only.
        token: Token with write access; default: the one of `hf auth login`.
        commit_message: First line of the commit.
        timeout: Seconds that a request may make no progress.

    Raises:
        ValueError: If the name does not fit, or the Space is public and ``private`` was not set to False.
        HubError: See :func:`push_folder`.
    """
    folder = Path(SLC_AUC)
    if repo_id.rpartition("/")[2] != folder.name:
        raise ValueError(
            f"found repo_id={repo_id!r}; needed: a repository named {folder.name!r}, as evaluate.load looks for a "
            f"script of the repository's name. Pass 'your-name/{folder.name}'."
        )
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    return _Push(_api(token), repo_id, "space", None, timeout).run(files, commit_message, private, False)


def full_repo_id(repo_id: str, token: str | bool | None = None, timeout: float = REQUEST_TIMEOUT) -> str:
    """Return the name of a repository with its owner: one without stands for one's own.

    Raises:
        HubError: If the Hub has to be asked who that is, and cannot be reached or refuses.
    """
    if "/" in repo_id:
        return repo_id
    with bounded_requests(timeout), explained(f"asking whose {repo_id} is"):
        return _api(token).get_full_repo_name(repo_id)


class _Push:
    """One upload; see :func:`push_folder` for what it promises."""

    def __init__(self, api: HfApi, repo_id: str, repo_type: str, branch: str | None, timeout: float) -> None:
        self.api = api
        self.repo: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
        self.branch = branch
        self.timeout = timeout

    def run(
        self, files: Mapping[str, Path], message: str, private: bool, gated: Literal["auto", "manual", False]
    ) -> CommitInfo:
        """Publish these files, by path in the repository."""
        doing = f"publishing {self.repo['repo_id']}"
        with bounded_requests(self.timeout):
            with explained(doing, "Nothing was published; the same call can be repeated."):
                self._make(private)
                self._gate(gated)
                head = self._head()
                additions = [CommitOperationAdd(name, path) for name, path in files.items()]
                self.api.preupload_lfs_files(
                    additions=additions,
                    revision=self.branch,
                    free_memory=False,
                    gitignore_content=_IGNORE_NOTHING,
                    **self.repo,
                )
            with explained(doing, "The commit is there as a whole or not at all; the same call can be repeated."):
                commit = self._commit(additions, head, message)
            if not private:
                with explained(f"making {self.repo['repo_id']} public", "It is complete, but private still."):
                    self._publicize()
        return commit

    def _make(self, private: bool) -> None:
        # Private whatever was asked for: what is to be public becomes so when it is complete.
        sdk = "gradio" if self.repo["repo_type"] == "space" else None
        made = self.api.create_repo(private=True, exist_ok=True, space_sdk=sdk, **self.repo)
        # A name without an owner stands for one's own.
        self.repo["repo_id"] = made.repo_id
        if private and not self._info().private:
            raise ValueError(
                f"{self.repo['repo_id']} is public; needed: a private repository. Pass private=False (hf-ntp push "
                "--public) to publish for everybody, make it private in its settings, or choose another name."
            )

    def _gate(self, gated: Literal["auto", "manual", False]) -> None:
        if not gated or self._info().gated == gated:
            return
        self.api.update_repo_settings(gated=gated, **self.repo)
        found = self._info().gated
        if found != gated:
            raise HubError(
                f"{self.repo['repo_id']} should be gated ({gated!r}) and the Hub accepted that, but says gated="
                f"{found!r}. Nothing was published. Set the gate in the repository's settings, then call it again."
            )

    def _head(self) -> Any:
        if self.branch not in (None, "main"):
            self.api.create_branch(branch=self.branch, exist_ok=True, **self.repo)
        return self._info(self.branch)

    def _commit(self, additions: list[CommitOperationAdd], head: Any, message: str) -> CommitInfo:
        # Not upload_folder: it may split an upload into several commits, and a half model would be seen in between.
        kept = {addition.path_in_repo for addition in additions} | {_GIT_ATTRIBUTES}
        stale = [file.rfilename for file in head.siblings or [] if file.rfilename not in kept]
        return self.api.create_commit(
            operations=[*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=message,
            revision=self.branch,
            # What is deleted was decided on this state; a commit by somebody else in between is refused.
            parent_commit=head.sha,
            **self.repo,
        )

    def _publicize(self) -> None:
        if self._info().private:
            self.api.update_repo_settings(private=False, **self.repo)

    def _info(self, revision: str | None = None) -> Any:
        return self.api.repo_info(revision=revision, **self.repo)


def _api(token: str | bool | None) -> HfApi:
    return HfApi(token=token, library_name="hf_ntp", library_version=version("hf-ntp"))
