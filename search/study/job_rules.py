"""The rules between the keys of a job, and those that need methods, objectives or addresses."""

from __future__ import annotations

import re
from pathlib import Path

from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.choices import SEARCHABLE_OBJECTIVES
from vitpareto.search.errors import UserError
from vitpareto.search.study.database_address import check_url
from vitpareto.search.study.job_keys import KEYS, JobKeys
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.training.preparation_cache import epochs_key


def check_rules(job: JobKeys) -> None:
    """Raise UserError for the first rule that the keys of a job break together."""
    _check_name(job.name)
    _check_methods(job)
    _check_objectives(job)
    _check_conflicts(job)
    _check_secrets(job)
    if job.storage is not None:
        check_url(job.storage)


def _check_methods(job: JobKeys) -> None:
    for name in job.methods:
        key = epochs_key(name)
        if key is not None and getattr(job, key) == 0:
            raise UserError(
                f"job.{key} must be at least 1 for {name}, which needs training (got 0): give "
                f"for example {KEYS[key].option} 5",
                Code.MISSING,
                key=key,
                method=name,
            )
    _check_unique("methods", job.methods)


def _check_objectives(job: JobKeys) -> None:
    for name in job.objectives:
        if name not in SEARCHABLE_OBJECTIVES:
            raise UserError.unknown(
                f"unknown objective {name!r}",
                name,
                SEARCHABLE_OBJECTIVES,
                key="objectives",
                got=name,
            )
    _check_unique("objectives", job.objectives)
    listed = ",".join(job.objectives) or "none"
    if "top1" not in job.objectives:
        raise UserError(
            f"job.objectives must include top1 (got {listed})",
            Code.MISSING,
            key="objectives",
            name="top1",
        )
    if all(OBJECTIVES[o].direction == "maximize" for o in job.objectives):
        raise UserError(
            f"job.objectives must include at least one cost, for example gmacs (got {listed})",
            Code.MISSING,
            key="objectives",
            name="cost",
        )
    if job.race == "on" and "top5" in job.objectives:
        raise UserError(
            "job.race must be off with the objective top5 (got on): trials are stopped early "
            "by top1 alone",
            Code.CONFLICT,
            keys=("race", "objectives"),
        )


def _check_conflicts(job: JobKeys) -> None:
    low, high = job.min_gmacs, job.max_gmacs
    if low is not None and high is not None and low > high:
        raise UserError(
            f"job.min_gmacs must not be above job.max_gmacs (got {low:g} and {high:g})",
            Code.CONFLICT,
            keys=("min_gmacs", "max_gmacs"),
        )
    if job.snap == "steps" and job.profile is None:
        raise UserError(
            "job.snap steps requires job.profile, a latency table of vitpareto profile",
            Code.MISSING,
            key="profile",
        )
    gpus = job.gpus_per_trial
    if gpus is not None and gpus > 1 and not gpus.is_integer():
        raise UserError(
            "job.gpus_per_trial must be a fraction of one GPU or a whole number of GPUs "
            f"(got {gpus:g})",
            Code.OUT_OF_RANGE,
            key="gpus_per_trial",
            got=gpus,
        )


def _check_secrets(job: JobKeys) -> None:
    """job.yaml stays in the store and is shown in MLflow and in logs."""
    if job.tracking_uri and re.search(r"//[^/@]*:[^/@]+@", job.tracking_uri):
        raise UserError(
            "job.tracking_uri must not contain a password, because job.yaml stores it: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole address as "
            "MLFLOW_TRACKING_URI, in the environment",
            Code.SECRET,
            key="tracking_uri",
        )
    for key, address in (("store", job.store), ("data", job.data)):
        if re.search(r"//[^/@]*@|[?&][^=]*(key|secret|token)=", address):
            raise UserError(
                f"job.{key} must not contain credentials, because job.yaml stores it: set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "GOOGLE_APPLICATION_CREDENTIALS, in the environment, or give nodes a role",
                Code.SECRET,
                key=key,
            )


def _check_name(name: str) -> None:
    plain = name == Path(name).name and name.isprintable()
    if not name or not plain or name.startswith(".") or len(name.encode()) > 200:
        rule = "a folder name without separators, of at most 200 bytes"
        raise UserError(
            f"job.name must be {rule} (got {name!r})",
            Code.OUT_OF_RANGE,
            key="name",
            got=name,
            accepted=rule,
        )


def _check_unique(key: str, names: tuple[str, ...]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"job.{key} must be unique (got {name!r} {names.count(name)} times)",
                Code.DUPLICATE,
                key=key,
                got=name,
            )
