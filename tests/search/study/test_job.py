"""A job is checked as a whole before anything starts, and each bad input is refused by its key."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import BadInput
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.errors import UserError
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.job_files import read_job
from vitpareto.search.study.job_request import JobRequest

GOOD: dict[str, Any] = {
    "name": "deit-s", "model": "deit_small_patch16_224", "data": "/imagenet/val",
    "storage": "postgresql+psycopg://me@host/trials", "tracking_uri": "http://127.0.0.1:5000",
    "weights": "/w/w.safetensors", "trials": 200, "methods": ["rajni", "tome"],
    "objectives": ["top1", "gmacs", "params_m"], "sampler": "nsga2", "seed": 7, "workers": 3,
    "device": "cuda:1", "dtype": "bfloat16", "batch": 32, "gpus_per_trial": 0.25, "images": 500,
    "min_gmacs": 1.5, "max_gmacs": 4, "latency": "off", "latency_batch": 8,
    "latency_runtime": "cudagraph", "max_latency_ms": 4.5, "latency_on": "accelerator:H200",
    "space": {"rajni.gamma": [0.005, 0.1]}, "fixed": {"tome.inflection": 0},
    "train_epochs": 3, "prepare_epochs": 2, "lr": 0.001, "train_batch": 64, "profile": "/p.json",
    "snap": "steps", "time": "90m", "patience": 40, "race": "off", "race_error": 0.01,
    "certify": "off",
    "store": "/studies", "cache": "/cache",
}  # fmt: skip


BAD: list[tuple[dict[Any, Any], Code, dict[str, Any]]] = [
    ({"modell": "x"}, Code.UNKNOWN_NAME, {"key": "modell"}),
    ({"gpus-per-trial": 1}, Code.UNKNOWN_NAME, {"key": "gpus-per-trial"}),
    ({3: "x"}, Code.UNKNOWN_NAME, {"key": 3}),
    ({"methods": ["tome", "tnt"]}, Code.MISSING, {"key": "prepare_epochs", "method": "tnt"}),
    ({"methods": "tnt"}, Code.MISSING, {"key": "prepare_epochs", "method": "tnt"}),
    ({"methods": "nvit", "train_epochs": 3}, Code.MISSING, {"key": "prepare_epochs"}),
    ({"methods": "dynamicvit"}, Code.MISSING, {"key": "train_epochs", "method": "dynamicvit"}),
    ({"methods": "revit", "prepare_epochs": 3}, Code.MISSING, {"key": "train_epochs"}),
    ({"methods": ["tome", "tome"]}, Code.DUPLICATE, {"key": "methods", "got": "tome"}),
    ({"objectives": ["top1", "gmac"]}, Code.UNKNOWN_NAME, {"key": "objectives", "got": "gmac"}),
    ({"objectives": ["gmacs"]}, Code.MISSING, {"key": "objectives", "name": "top1"}),
    ({"objectives": "top1,gmacs,gmacs"}, Code.DUPLICATE, {"key": "objectives", "got": "gmacs"}),
    ({"objectives": []}, Code.MISSING, {"key": "objectives", "name": "top1"}),
    ({"objectives": ["top1", "top5"]}, Code.MISSING, {"key": "objectives", "name": "cost"}),
    ({"min_gmacs": 3, "max_gmacs": 2}, Code.CONFLICT, {"keys": ("min_gmacs", "max_gmacs")}),
    ({"objectives": "top1,top5,gmacs"}, Code.CONFLICT, {"keys": ("race", "objectives")}),
    ({"snap": "steps"}, Code.MISSING, {"key": "profile"}),
    ({"gpus_per_trial": 1.5}, Code.OUT_OF_RANGE, {"key": "gpus_per_trial", "got": 1.5}),
]
#: one key and a value that it does not accept
BAD_VALUES: list[tuple[str, Any, Code]] = [
    ("methods", 3, Code.WRONG_TYPE),
    ("methods", ["tome", 3], Code.WRONG_TYPE),
    ("sampler", "tpee", Code.OUT_OF_RANGE),
    ("sampler", 3, Code.WRONG_TYPE),
    ("dtype", "bfloat61", Code.OUT_OF_RANGE),
    ("latency", "frnt", Code.OUT_OF_RANGE),
    ("latency", True, Code.WRONG_TYPE),
    ("trials", 0, Code.OUT_OF_RANGE),
    ("trials", 2.5, Code.WRONG_TYPE),
    ("trials", True, Code.WRONG_TYPE),
    ("trials", "many", Code.WRONG_TYPE),
    ("seed", -1, Code.OUT_OF_RANGE),
    ("workers", 0, Code.OUT_OF_RANGE),
    ("batch", 0, Code.OUT_OF_RANGE),
    ("images", 0, Code.OUT_OF_RANGE),
    ("latency_batch", 0, Code.OUT_OF_RANGE),
    ("train_epochs", -1, Code.OUT_OF_RANGE),
    ("prepare_epochs", 1.5, Code.WRONG_TYPE),
    ("train_batch", 0, Code.OUT_OF_RANGE),
    ("lr", 0, Code.OUT_OF_RANGE),
    ("profile", 3, Code.WRONG_TYPE),
    ("gpus_per_trial", 0, Code.OUT_OF_RANGE),
    ("min_gmacs", -1, Code.OUT_OF_RANGE),
    ("max_gmacs", float("inf"), Code.WRONG_TYPE),
    ("name", "", Code.OUT_OF_RANGE),
    ("name", "a/b", Code.OUT_OF_RANGE),
    ("name", "..", Code.OUT_OF_RANGE),
    ("name", ".hidden", Code.OUT_OF_RANGE),
    ("name", "a\nb", Code.OUT_OF_RANGE),
    ("name", "a\0b", Code.OUT_OF_RANGE),
    ("name", "x" * 300, Code.OUT_OF_RANGE),
    ("name", 12, Code.WRONG_TYPE),
    ("model", ["deit"], Code.WRONG_TYPE),
    ("device", "gpu", Code.OUT_OF_RANGE),
    ("device", "cuda:x", Code.OUT_OF_RANGE),
    ("space", ["rajni.gamma"], Code.WRONG_TYPE),
    ("time", "soon", Code.OUT_OF_RANGE),
    ("time", "0h", Code.OUT_OF_RANGE),
    ("patience", 0, Code.OUT_OF_RANGE),
    ("race", "perhaps", Code.OUT_OF_RANGE),
    ("race_error", 0, Code.OUT_OF_RANGE),
    ("snap", "8", Code.OUT_OF_RANGE),
    ("fixed", "tome.inflection", Code.WRONG_TYPE),
]


@pytest.mark.parametrize(("given", "code", "details"), BAD, ids=str)
def test_a_bad_job_is_refused(given: dict[Any, Any], code: Code, details: dict[str, Any]) -> None:
    with refused(code, UserError, **details) as caught:
        SearchConfig.of(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value", "code"), BAD_VALUES, ids=str)
def test_a_bad_value_is_refused_with_its_rule(key: str, value: Any, code: Code) -> None:
    with refused(code, UserError, key=key, got=value) as caught:
        SearchConfig.of({key: value})
    assert caught.value.details["accepted"], "the rule"
    assert "\n" not in str(caught.value)


def test_nan_is_refused() -> None:
    with refused(Code.WRONG_TYPE, UserError, key="max_gmacs"):  # nan is unequal to itself
        SearchConfig.of({"max_gmacs": float("nan")})


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ({"modell": "x"}, "model"),
        ({"gpus-per-trial": 1}, "gpus_per_trial"),
        ({"methods": ["tomee"]}, "tome"),
        ({"methods": "rajni,topkk"}, "topk"),
        ({"objectives": ["top1", "gmac"]}, "gmacs"),
        ({"sampler": "tpee"}, "tpe"),
        ({"dtype": "bfloat61"}, "bfloat16"),
        ({"latency": "frnt"}, "front"),
    ],
)
def test_the_nearest_match_is_suggested(given: dict[str, Any], near: str) -> None:
    with pytest.raises(BadInput) as caught:
        SearchConfig.of(given)
    assert caught.value.details["closest"] == near
    assert near in str(caught.value), "the message names it"


def test_a_full_job_stays_as_given() -> None:
    config = SearchConfig.of(GOOD)
    assert set(GOOD) == {f.name for f in fields(SearchConfig)}, "GOOD must give every key"
    for key, value in GOOD.items():
        got = getattr(config, key)
        assert (list(got) if isinstance(got, tuple) else got) == value, key
    assert isinstance(config.max_gmacs, float)


@pytest.mark.parametrize("given", [GOOD, {}, {"methods": "topk, tome", "max_gmacs": 3}])
def test_round_trip_through_plain_and_yaml(given: dict[str, Any]) -> None:
    config = SearchConfig.of(given)
    assert SearchConfig.of(config.plain()) == config
    assert SearchConfig.of(yaml.safe_load(yaml.safe_dump(config.plain()))) == config


def test_what_the_identity_of_a_study_holds() -> None:
    """As earlier versions wrote it: a key that came later only where it is not the default."""
    always = {"model", "dtype", "images", "seed", "objectives", "methods", "space", "fixed",
              "min_gmacs", "max_gmacs", "batch", "latency_batch", "sampler"}  # fmt: skip
    assert set(SearchConfig.of({"race": "off"}).identity(trained=False)) == always
    raced = SearchConfig.of({}).identity(trained=True)
    assert set(raced) == always | {
        "race_error", "train_epochs", "prepare_epochs", "lr", "train_batch",
    }  # fmt: skip
    assert (raced["images"], raced["objectives"]) == (None, ["top1", "gmacs"])
    later = {k: GOOD[k] for k in ("snap", "latency_runtime", "max_latency_ms", "latency_on")}
    full = SearchConfig.of(GOOD).identity(trained=False)
    assert set(full) == always | set(later) and {k: full[k] for k in later} == later


def test_a_request_keeps_unknown_keys_until_it_is_checked() -> None:
    """The job of another version can be shown; a search that continues it is refused."""
    request = JobRequest({"model": "digits", "shape": 3})
    assert (request.model, request.data, request.objectives) == ("digits", "", ())
    assert request.certifies and request.budget == 100 and request.tracking_uri is None
    with refused(Code.UNKNOWN_NAME, UserError, key="shape"):
        request.config()
    assert request.without("shape").config(model=None) == SearchConfig.of({})


def test_defaults_and_none_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITPARETO_STORE", raising=False)
    config = SearchConfig.of({f.name: None for f in fields(SearchConfig)})
    assert config == SearchConfig.of({})
    assert (config.model, config.data, config.store) == ("digits", "digits", "studies")
    assert config.cache


def test_store_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITPARETO_STORE", "/shared/studies")
    assert SearchConfig.of({}).store == "/shared/studies"
    assert SearchConfig.of({"store": "mine"}).store == "mine"


def test_methods_searched_by_default_need_no_training() -> None:
    searched = SearchConfig.of({}).study_methods
    assert "dense" not in searched
    assert {"random", "centre", "resize", "topk", "rajni", "tome"} <= set(searched)
    assert all(methods.get(n).training != "required" for n in searched)
    assert SearchConfig.of({"methods": "dense,tome"}).study_methods == ("tome",)


def test_epochs_add_the_methods_that_they_train() -> None:
    """TNT and NViT are prepared once per study; other methods are trained in their trials."""
    free = set(SearchConfig.of({}).study_methods)
    both = SearchConfig.of({"train_epochs": 1, "prepare_epochs": 1})
    assert set(both.study_methods) == set(methods.names()) - {"dense"} and not both.untrained
    prepared = SearchConfig.of({"prepare_epochs": 1})
    assert set(prepared.study_methods) - free == {"nvit", "tnt"}
    assert prepared.untrained == {
        n: "train_epochs" for n in methods.names() if n not in {*prepared.study_methods, "dense"}
    }
    assert SearchConfig.of({"methods": "tnt", "prepare_epochs": 1}).study_methods == ("tnt",)


# --- job file, --set, options


def job_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_options_and_set_beat_the_file(tmp_path: Path) -> None:
    path = job_file(
        tmp_path,
        "trials: 10\nseed: 1\nbatch: 8\n"
        "space: {rajni.gamma: [0.01, 0.1], topk.first: [0.1, 0.2]}\n",
    )
    sets = ["seed=2", "space.topk.keep_rate=[0.5,0.9]", "space.topk.first=[0.2,0.3]",
            "fixed.tome.inflection=0", "methods=[topk, rajni, tome]"]  # fmt: skip
    config = read_job(path, sets, {"batch": 10, "trials": None}).config()
    assert (config.trials, config.seed, config.batch) == (10, 2, 10)
    assert config.space == {
        "rajni.gamma": [0.01, 0.1], "topk.first": [0.2, 0.3], "topk.keep_rate": [0.5, 0.9],
    }  # fmt: skip
    assert config.fixed == {"tome.inflection": 0}
    assert config.methods == ("topk", "rajni", "tome")


@pytest.mark.parametrize(
    ("text", "options", "by_set"),
    [
        ("batch=9", {"batch": 10}, 9),
        ("max_gmacs=2e0", {"max_gmacs": 3.0}, 2.0),
        ("methods=[topk, tome]", {"methods": "topk"}, ["topk", "tome"]),
        ("latency=off", {"latency": "front"}, False),
        ("trials=null", {"trials": 5}, None),
        ("weights=null", {"weights": "w.pth"}, None),
    ],
)
def test_an_option_and_a_set_that_differ_are_refused(
    text: str, options: dict[str, Any], by_set: Any
) -> None:
    """Neither wins silently: the study would be another than one of them asks for."""
    ((key, value),) = options.items()
    with refused(Code.CONFLICT, UserError, key=key, option=value, set=by_set):
        read_job(None, ["seed=3", text], {"name": "s", **options})


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("batch=10", {"batch": 10}),
        ("batch=10", {"batch": None}),
        ("max_gmacs=3", {"max_gmacs": 3.0}),
        ("methods=[topk, tome]", {"methods": "topk,tome"}),
        ("latency=off", {"latency": "off"}),
    ],
)
def test_an_option_and_a_set_with_the_same_meaning_are_accepted(
    text: str, options: dict[str, Any]
) -> None:
    key = text.partition("=")[0]
    by_set = read_job(None, [text], {}).config()
    assert read_job(None, [text], options).config() == by_set
    assert getattr(by_set, key) != getattr(SearchConfig.of({}), key)


def test_numbers_with_an_exponent_and_a_bare_off_are_read_as_such(tmp_path: Path) -> None:
    """YAML 1.1 reads 5e-3 as text and `off` as false."""
    path = job_file(tmp_path, "latency: off\nspace: {rajni.gamma: [5e-3, 1e-1]}\n")
    config = read_job(path, ["max_gmacs=2e0", "trials=1e3"], {}).config()
    assert (config.latency, config.max_gmacs, config.trials) == ("off", 2.0, 1000)
    assert config.space == {"rajni.gamma": [0.005, 0.1]}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("- a\n- b\n", Code.WRONG_TYPE),
        ("", Code.WRONG_TYPE),
        ("a: [1\n", Code.UNREADABLE),
        ("name: 2024-13-45\n", Code.UNREADABLE),
        ("model: !!python/object/apply:os.system ['true']\n", Code.UNREADABLE),
    ],
)
def test_an_invalid_job_file_is_refused(tmp_path: Path, text: str, code: Code) -> None:
    path = job_file(tmp_path, text)
    with refused(code, UserError, path=str(path)):
        read_job(path, [], {})


def test_job_files_that_cannot_be_read(tmp_path: Path) -> None:
    with refused(Code.NOT_FOUND, UserError, path=str(tmp_path / "none.yaml")):
        read_job(tmp_path / "none.yaml", [], {})
    with refused(Code.UNREADABLE, UserError, path=str(tmp_path)):
        read_job(tmp_path, [], {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa\x00")
    with refused(Code.UNREADABLE, UserError, path=str(tmp_path / "binary.yaml")):
        read_job(tmp_path / "binary.yaml", [], {})


@pytest.mark.parametrize(
    ("text", "code", "details"),
    [
        ("trials", Code.WRONG_TYPE, {"key": "set", "got": "trials"}),
        ("trials=[1", Code.UNREADABLE, {"key": "trials", "got": "[1"}),
        ("name=2024-13-45", Code.UNREADABLE, {"key": "name"}),
        ("space=3", Code.WRONG_TYPE, {"key": "space", "got": 3}),
        ("trails=3", Code.UNKNOWN_NAME, {"key": "trails"}),
        ("trials.x=3", Code.UNKNOWN_NAME, {"key": "trials.x"}),
    ],
)
def test_bad_sets(text: str, code: Code, details: dict[str, Any]) -> None:
    with refused(code, UserError, **details):
        read_job(None, [text], {}).config()


def test_paths_are_absolute_so_that_a_study_continues_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "val").mkdir()
    monkeypatch.chdir(tmp_path)
    config = SearchConfig.of({"data": "val", "weights": "w.pth"})
    assert config.data == str(tmp_path / "val") and config.weights == str(tmp_path / "w.pth")
    assert SearchConfig.of({"data": "cifar10"}).data == "cifar10"
    named = SearchConfig.of({"data": "imagenette:sets"}).data
    assert named == f"imagenette:{tmp_path / 'sets'}"


@pytest.mark.parametrize(
    ("given", "trials", "seconds", "until"),
    [
        ({}, 100, None, "100 trials"),
        ({"trials": 7}, 7, None, "7 trials"),
        ({"time": "1.5h"}, None, 5400, "for 1.5h"),
        ({"time": "90 s", "trials": 7}, 7, 90, "7 trials or for 90 s"),
        ({"patience": 9}, None, None, "until 9 trials without improvement of the front"),
    ],
)
def test_when_a_search_stops(
    given: dict[str, Any], trials: int, seconds: float, until: str
) -> None:
    config = SearchConfig.of(given)
    assert (config.budget, config.seconds, config.until) == (trials, seconds, until)


def test_a_database_is_optional_and_its_password_is_not_stored() -> None:
    url = "postgresql+psycopg://me@host:5432/trials"
    assert SearchConfig.of({"storage": url}).storage == url
    assert SearchConfig.of({"storage": "journal"}).storage is None
    for key, address in (("storage", url.replace("me@", "me:hidden@")),
                         ("tracking_uri", "https://me:hidden@host")):  # fmt: skip
        with refused(Code.SECRET, UserError, key=key) as caught:
            SearchConfig.of({key: address})
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["s3://KEY:SECRET@bucket/studies", "s3://bucket/studies?access_key=KEY&secret_key=SECRET"],
)
@pytest.mark.parametrize("key", ["store", "data"])
def test_credentials_in_an_address_are_refused(key: str, address: str) -> None:
    """A job is stored, shown in MLflow and logged."""
    with refused(Code.SECRET, UserError, key=key) as caught:
        SearchConfig.of({key: address})
    assert "SECRET@" not in str(caught.value) and "=SECRET" not in str(caught.value)
    assert SearchConfig.of({key: "s3://bucket/studies"})
