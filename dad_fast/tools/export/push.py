"""Upload of an export to the Hugging Face hub, or a dry run without a login."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import dad_fast
from dad_fast.errors import EnvironmentProblem, UsageError
from dad_fast.models.weights.hub import is_reachable, quiet, reason_of
from dad_fast.tools.export.card import RunFacts

CARD = "README.md"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


class Push:
    """Upload to the repository USER/REPO. Raises UsageError for another name."""

    def __init__(self, repository: str) -> None:
        self.repository = repository
        self.token: str | None = None
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise UsageError(f"--push {repository}: {reason_of(error)}") from None
        if "/" not in repository:
            raise UsageError(
                f"--push {repository}: write USER/REPO: your name or an organisation on the hub, "
                "and the repository"
            )

    def check(self, source: Path, weights: str, facts: RunFacts) -> None:
        """Check the results and, with a login, the hub before anything is written.

        Raises UsageError without results of these weights; EnvironmentProblem if the hub cannot be
        reached or refuses the token.
        """
        if not facts.results.get("suites"):
            raise UsageError(
                f"--push {self.repository}: no results of {source} ({weights}) for the model card; "
                "name the folder of a finished run, without --weights raw"
            )
        self.token = get_token()
        if self.token is None:
            return
        later = "leave --push out, or unset HF_TOKEN for a dry run"
        if constants.HF_HUB_OFFLINE:
            raise EnvironmentProblem(
                f"--push {self.repository}: HF_HUB_OFFLINE is set; unset it, or {later}"
            )
        with quiet():
            if not is_reachable():
                raise EnvironmentProblem(
                    f"--push {self.repository}: {constants.ENDPOINT} cannot be reached; check the "
                    f"network, HTTPS_PROXY and HF_ENDPOINT, or {later}"
                )
            try:
                self._api().whoami()
            except Exception as error:
                # The client's errors change with its HTTP library.
                raise EnvironmentProblem(
                    f"--push {self.repository}: the login could not be checked "
                    f"({reason_of(error)}); {LOGIN}"
                ) from None

    def upload(self, folder: Path) -> None:
        """Upload all files of `folder` in one commit; without a login, print the plan.

        Raises EnvironmentProblem if the upload fails.
        """
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if self.token is None:
            self._print_plan(folder, files)
            return
        api = self._api()
        additions = [CommitOperationAdd(path.name, str(path)) for path in files]
        try:
            with quiet():
                api.create_repo(self.repository, exist_ok=True)
                commit = api.create_commit(
                    self.repository,
                    additions,
                    commit_message=f"Upload an export of dad-fast {dad_fast.__version__}",
                )
        except Exception as error:
            # The client's errors change with its HTTP library.
            raise EnvironmentProblem(
                f"--push {self.repository}: not uploaded ({reason_of(error)}); {folder} is written: "
                "check the network and that the token may write there, then add --overwrite"
            ) from None
        print(f"uploaded to {constants.ENDPOINT}/{self.repository}: {commit.commit_url}")

    def _api(self) -> HfApi:
        return HfApi(endpoint=constants.ENDPOINT, token=self.token)

    def _print_plan(self, folder: Path, files: list[Path]) -> None:
        print(f"nothing was uploaded: no login. To {constants.ENDPOINT}/{self.repository} would go")
        for path in files:
            print(f"  {path.name:<20} {path.stat().st_size:>13,} bytes")
        lines = (folder / CARD).read_text(encoding="utf-8").splitlines()
        front_matter = lines[: lines.index("---", 1) + 1]
        print(f"\n{CARD} starts with")
        print("\n".join(f"  {line}" for line in front_matter))
        print(f"\nto upload: {LOGIN}; then run the same command with --overwrite")
