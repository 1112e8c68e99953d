"""A job as a user gave it or as job.yaml holds it, before it is checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vitpareto.search.study.job import SearchConfig, trials_in_all


@dataclass(frozen=True)
class JobRequest:
    """The keys of a job that were given. The properties read a study's job leniently: a study of
    another version can be shown even if its job can no longer be checked.

    Attributes:
        keys: values by key, as YAML has them. A key that this version does not know stays here
            until `config` refuses it.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> SearchConfig:
        """Check and complete the job, with other values of some keys; None: the default.

        Raises:
            UserError: names the key, the value and the rule.
        """
        return SearchConfig.of({**self.keys, **changes})

    def updated(self, later: JobRequest) -> JobRequest:
        """Return the job with the keys of a later one; the later ones win."""
        return JobRequest({**self.keys, **later.keys})

    def changed(self, **changes: Any) -> JobRequest:
        """Return the job with other values of some keys."""
        return JobRequest({**self.keys, **changes})

    def only(self, names: Collection[str]) -> JobRequest:
        """Return the job with these keys only."""
        return JobRequest({k: v for k, v in self.keys.items() if k in names})

    def without(self, *names: str) -> JobRequest:
        """Return the job without these keys."""
        return JobRequest({k: v for k, v in self.keys.items() if k not in names})

    def text(self, name: str) -> str:
        """Return a key's value as text; "" if it was not given."""
        value = self.keys.get(name)
        return "" if value is None else str(value)

    @property
    def model(self) -> str:
        """Name of the model; "" if it was not given."""
        return self.text("model")

    @property
    def data(self) -> str:
        """Name or folder of the images; "" if it was not given."""
        return self.text("data")

    @property
    def store(self) -> str:
        """Folder or address of the studies; "" if it was not given."""
        return self.text("store")

    @property
    def cache(self) -> str | None:
        """Folder of decoded images; None if it was not given."""
        return self.text("cache") or None

    @property
    def tracking_uri(self) -> str | None:
        """Address of the MLflow server; None if it was not given."""
        return self.text("tracking_uri") or None

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives; () if they were not given."""
        return tuple(self.keys.get("objectives") or ())

    @property
    def certifies(self) -> bool:
        """Whether the front is measured on the held-out images at the end of a search."""
        return self.keys.get("certify", "front") != "off"

    @property
    def budget(self) -> int | None:
        """Trials in total; None: unlimited."""
        return trials_in_all(*(self.keys.get(key) for key in ("trials", "time", "patience")))
