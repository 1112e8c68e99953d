"""A job is checked whole before anything starts: each kind of bad input gets one clear message."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitpareto import methods
from vitpareto.methods import BadInput
from vitpareto.search.errors import UserError
from vitpareto.search.study.job import IDENTITY, TRAINING_IDENTITY, SearchConfig, read_job

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


def refused(given: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as caught:
        SearchConfig.of(given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"modell": "x"}, "a job has no key 'modell': did you mean 'model'?"),
        ({"gpus-per-trial": 1}, "no key 'gpus-per-trial': did you mean 'gpus_per_trial'?"),
        ({3: "x"}, "a job has no key 3"),
        ({"methods": ["tomee"]}, "unknown method 'tomee': did you mean 'tome'?"),
        ({"methods": "rajni,topkk"}, "unknown method 'topkk': did you mean 'topk'?"),
        ({"methods": ["tome", "tnt"]}, "job.methods names tnt, which needs training"),
        ({"methods": "tnt"}, "prepare_epochs is 0: give prepare_epochs, as in --prepare-epochs 5"),
        ({"methods": "nvit", "train_epochs": 3}, "names nvit, which needs training, and prepare_"),
        ({"methods": "dynamicvit"}, "train_epochs is 0: give train_epochs, as in --train-epochs 5"),
        ({"methods": "revit", "prepare_epochs": 3}, "names revit, which needs training, and train"),
        ({"methods": ["tome", "tome"]}, "job.methods is ['tome', 'tome']: accepted is each"),
        ({"methods": 3}, "job.methods is 3: accepted is a list of names"),
        ({"methods": ["tome", 3]}, "job.methods is ['tome', 3]: accepted is a list of names"),
        ({"objectives": ["top1", "gmac"]}, "unknown objective 'gmac': did you mean 'gmacs'?"),
        ({"objectives": ["gmacs"]}, "job.objectives is ['gmacs']: top1 and others, each once"),
        ({"objectives": "top1,gmacs,gmacs"}, "each once"),
        ({"objectives": []}, "job.objectives is []: top1"),
        ({"objectives": ["top1", "top5"]}, "a cost is missing"),
        ({"sampler": "tpee"}, "job.sampler is 'tpee': did you mean 'tpe'?"),
        ({"sampler": 3}, "job.sampler is 3: accepted is one of 'tpe', 'nsga2', 'random'"),
        ({"dtype": "bfloat61"}, "job.dtype is 'bfloat61': did you mean 'bfloat16'?"),
        ({"latency": "frnt"}, "job.latency is 'frnt': did you mean 'front'?"),
        ({"latency": True}, "job.latency is True: accepted is one of 'front', 'off'"),
        ({"trials": 0}, "job.trials is 0: accepted is a whole number, 1 <= trials"),
        ({"trials": 2.5}, "job.trials is 2.5: accepted is a whole number"),
        ({"trials": True}, "job.trials is True"),
        ({"trials": "many"}, "job.trials is 'many'"),
        ({"seed": -1}, "job.seed is -1"),
        ({"workers": 0}, "job.workers is 0"),
        ({"batch": 0}, "job.batch is 0"),
        ({"images": 0}, "job.images is 0"),
        ({"latency_batch": 0}, "job.latency_batch is 0"),
        ({"train_epochs": -1}, "job.train_epochs is -1"),
        ({"prepare_epochs": 1.5}, "job.prepare_epochs is 1.5"),
        ({"train_batch": 0}, "job.train_batch is 0"),
        ({"lr": 0}, "job.lr is 0: accepted is a number, 0 < lr"),
        ({"profile": 3}, "job.profile is 3: accepted is text"),
        ({"gpus_per_trial": 0}, "job.gpus_per_trial is 0: accepted is a number, 0 < "),
        ({"gpus_per_trial": 1.5}, "a fraction of one GPU, or whole GPUs"),
        ({"min_gmacs": -1}, "job.min_gmacs is -1"),
        ({"max_gmacs": float("nan")}, "job.max_gmacs is nan"),
        ({"max_gmacs": float("inf")}, "job.max_gmacs is inf"),
        ({"min_gmacs": 3, "max_gmacs": 2}, "min_gmacs 3 is above max_gmacs 2"),
        ({"name": ""}, "job.name is ''"),
        ({"name": "a/b"}, "job.name is 'a/b': accepted is a plain folder name"),
        ({"name": ".."}, "job.name is '..'"),
        ({"name": ".hidden"}, "job.name is '.hidden'"),
        ({"name": "a\nb"}, "job.name is 'a\\nb'"),
        ({"name": "a\0b"}, "job.name is"),
        ({"name": "x" * 300}, "job.name is"),
        ({"name": 12}, "job.name is 12: accepted is text"),
        ({"model": ["deit"]}, "job.model is ['deit']: accepted is text"),
        ({"device": "gpu"}, "job.device is 'gpu': accepted is auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, "job.device is 'cuda:x'"),
        ({"space": ["rajni.gamma"]}, "job.space is ['rajni.gamma']: accepted is a mapping"),
        ({"time": "soon"}, "job.time is 'soon': accepted is a number with s, m or h, as in 90s"),
        ({"time": "0h"}, "job.time is '0h': accepted is a number"),
        ({"patience": 0}, "job.patience is 0: accepted is a whole number, 1 <= patience"),
        ({"race": "perhaps"}, "job.race is 'perhaps'; known: off, on"),
        ({"race_error": 0}, "job.race_error is 0"),
        ({"objectives": "top1,top5,gmacs"}, "job.race is 'on', and top5 is an objective"),
        ({"snap": "steps"}, "no latency table whose steps they would be: give profile"),
        ({"snap": "8", "profile": "p.json"}, "job.snap is '8'; known: off, steps"),
        ({"fixed": "tome.inflection"}, "job.fixed is 'tome.inflection': accepted is a mapping"),
    ],
    ids=str,
)
def test_bad_input_is_named(given: dict[str, Any], said: str) -> None:
    assert said in refused(given)


def test_a_full_job_is_taken_as_it_is() -> None:
    config = SearchConfig.of(GOOD)
    assert set(GOOD) == {f.name for f in fields(SearchConfig)}, "every key is tried here"
    for key, value in GOOD.items():
        got = getattr(config, key)
        assert (list(got) if isinstance(got, tuple) else got) == value, key
    assert isinstance(config.max_gmacs, float)
    assert {*IDENTITY, *TRAINING_IDENTITY} <= set(GOOD)


@pytest.mark.parametrize("given", [GOOD, {}, {"methods": "topk, tome", "max_gmacs": 3}])
def test_round_trip_through_plain_and_yaml(given: dict[str, Any]) -> None:
    config = SearchConfig.of(given)
    assert SearchConfig.of(config.plain()) == config
    assert SearchConfig.of(yaml.safe_load(yaml.safe_dump(config.plain()))) == config


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


def test_what_is_searched_by_default_needs_no_training() -> None:
    searched = SearchConfig.of({}).study_methods
    assert "dense" not in searched
    assert {"random", "centre", "resize", "topk", "rajni", "tome"} <= set(searched)
    assert all(methods.get(n).training != "required" for n in searched)
    assert SearchConfig.of({"methods": "dense,tome"}).study_methods == ("tome",)


def test_epochs_bring_in_the_methods_that_they_train() -> None:
    """TNT and NViT are prepared once; what else needs training has it in its trials."""
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
    config = SearchConfig.of(read_job(path, sets, {"batch": 10, "trials": None}))
    assert (config.trials, config.seed, config.batch) == (10, 2, 10)
    assert config.space == {
        "rajni.gamma": [0.01, 0.1], "topk.first": [0.2, 0.3], "topk.keep_rate": [0.5, 0.9],
    }  # fmt: skip
    assert config.fixed == {"tome.inflection": 0}
    assert config.methods == ("topk", "rajni", "tome")


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("batch=9", {"batch": 10}, "batch is given twice: 10 by --batch, 9 by --set batch=9"),
        ("max_gmacs=2e0", {"max_gmacs": 3.0},
         "max_gmacs is given twice: 3.0 by --max-gmacs, 2.0 by --set max_gmacs=2e0"),
        ("methods=[topk, tome]", {"methods": "topk"},
         "methods is given twice: 'topk' by --methods, ['topk', 'tome'] by --set methods=[topk"),
        ("latency=off", {"latency": "front"}, "'front' by --latency, False by --set latency=off"),
        ("trials=null", {"trials": 5}, "trials is given twice: 5 by --trials, None by --set"),
        ("weights=null", {"weights": "w.pth"}, "'w.pth' by --weights, None by --set weights=null"),
    ],
)  # fmt: skip
def test_an_option_and_a_set_that_differ_are_refused(
    text: str, options: dict[str, Any], said: str
) -> None:
    """Whichever silently won, a study would be another than one of them asked for."""
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_job(None, ["seed=3", text], {"name": "s", **options})
    assert "accepted is one of them" in str(caught.value)


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
def test_an_option_and_a_set_that_mean_the_same_are_taken(
    text: str, options: dict[str, Any]
) -> None:
    key = text.partition("=")[0]
    by_set = SearchConfig.of(read_job(None, [text], {}))
    assert SearchConfig.of(read_job(None, [text], options)) == by_set
    assert getattr(by_set, key) != getattr(SearchConfig.of({}), key)


def test_numbers_with_an_exponent_and_a_bare_off_mean_what_they_say(tmp_path: Path) -> None:
    """YAML 1.1 reads 5e-3 as text and `off` as false."""
    path = job_file(tmp_path, "latency: off\nspace: {rajni.gamma: [5e-3, 1e-1]}\n")
    config = SearchConfig.of(read_job(path, ["max_gmacs=2e0", "trials=1e3"], {}))
    assert (config.latency, config.max_gmacs, config.trials) == ("off", 2.0, 1000)
    assert config.space == {"rajni.gamma": [0.005, 0.1]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "must hold keys and values, got ['a', 'b']"),
        ("", "must hold keys and values, got None"),
        ("a: [1\n", "is not YAML"),
        ("name: 2024-13-45\n", "is not YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_job_files_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    path = job_file(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_job(path, [], {})
    assert str(path) in str(caught.value)


def test_job_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="job file .*none.yaml cannot be read: No such file"):
        read_job(tmp_path / "none.yaml", [], {})
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_job(tmp_path, [], {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa\x00")
    with pytest.raises(UserError, match="binary.yaml is not YAML"):
        read_job(tmp_path / "binary.yaml", [], {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trials", "--set takes KEY=VALUE, got 'trials'"),
        ("trials=[1", "--set trials: '[1' is not a YAML value"),
        ("name=2024-13-45", "--set name: '2024-13-45' is not a YAML value"),
        ("space=3", "job.space is 3"),
        ("trails=3", "a job has no key 'trails': did you mean 'trials'?"),
        ("trials.x=3", "a job has no key 'trials.x'"),
    ],
)
def test_bad_sets(text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        SearchConfig.of(read_job(None, [text], {}))


def test_places_are_kept_whole_so_that_a_study_continues_from_any_folder(
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
        ({"patience": 9}, None, None, "until 9 trials bring the front nothing"),
    ],
)
def test_when_a_search_stops(
    given: dict[str, Any], trials: int, seconds: float, until: str
) -> None:
    config = SearchConfig.of(given)
    assert (config.budget, config.seconds, config.until) == (trials, seconds, until)


def test_a_database_holds_optunas_trials_only_when_asked_and_no_password_is_kept() -> None:
    url = "postgresql+psycopg://me@host:5432/trials"
    assert SearchConfig.of({"storage": url}).storage == url
    assert SearchConfig.of({"storage": "journal"}).storage is None
    with pytest.raises(UserError, match="leave the password out") as refused:
        SearchConfig.of({"storage": "postgresql+psycopg://me:secret@host/trials"})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    ["s3://KEY:SECRET@bucket/studies", "s3://bucket/studies?access_key=KEY&secret_key=SECRET"],
)
@pytest.mark.parametrize("key", ["store", "data"])
def test_credentials_in_an_address_are_refused(key: str, address: str) -> None:
    """A job is kept, shown in MLflow and logged."""
    with pytest.raises(UserError, match="holds credentials.*AWS_ACCESS_KEY_ID") as said:
        SearchConfig.of({key: address})
    assert "SECRET@" not in str(said.value) and "=SECRET" not in str(said.value)
    assert SearchConfig.of({key: "s3://bucket/studies"})
