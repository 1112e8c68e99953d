"""The shipped cluster files, as far as they can be checked without a cloud."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.clusters.kuberay import PODMONITOR, RAYJOB
from vitpareto.search.study.job import SearchConfig

CLUSTERS = Path(__file__).parents[2] / "clusters"
KUBERAY = CLUSTERS / "kuberay"
#: Kubernetes' version whose schema its own objects are checked against
KUBERNETES = "1.32"


def documents() -> list[dict[str, Any]]:
    """All Kubernetes objects that are shipped, but for kustomize's own and the job."""
    apart = ("kustomization.yaml", "job.yaml")
    return [
        document
        for path in sorted(KUBERAY.glob("*.yaml"))
        if path.name not in apart
        for document in yaml.safe_load_all(path.read_text())
    ]


def named(kind: str) -> list[dict[str, Any]]:
    return [d for d in documents() if d["kind"] == kind]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template, by what it is."""
    (job,) = named("RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    for deployment in named("Deployment"):
        yield deployment["metadata"]["name"], deployment["spec"]["template"]


def check(document: dict[str, Any]) -> None:
    """Against its schema, unknown fields forbidden."""
    import kubernetes_validate

    if document["kind"] == "RayJob":
        jsonschema.validate(document, RAYJOB)
    elif document["kind"] == "PodMonitor":
        jsonschema.validate(document, PODMONITOR)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_every_object_matches_its_schema() -> None:
    kinds = [d["kind"] for d in documents()]
    assert {"RayJob", "Deployment", "Service", "NetworkPolicy", "PodMonitor"} <= set(kinds)
    for document in documents():
        check(document)
    for name, template in pods():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template}
        pod["metadata"] = {"name": name, **template.get("metadata", {})}
        check(pod)


def test_the_schemas_refuse_unknown_fields() -> None:
    """The schemas refuse what they do not know: otherwise they would prove nothing."""
    (job,) = named("RayJob")
    wrong = copy.deepcopy(job)
    wrong["spec"]["shutdownAfterJobFinished"] = True
    with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinished"):
        check(wrong)
    wrong = copy.deepcopy(job)
    wrong["spec"]["rayClusterSpec"]["authOptions"]["mod"] = "token"
    with pytest.raises(jsonschema.ValidationError, match="mod"):
        check(wrong)
    (policy, *_) = named("NetworkPolicy")
    wrong = {**policy, "spec": {**policy["spec"], "podSelektor": {}}}
    with pytest.raises(Exception, match="podSelektor"):
        check(wrong)


def test_the_job_is_deleted_at_its_end_and_requires_a_token() -> None:
    (job,) = named("RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0 and spec["backoffLimit"] > 0
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    import ray

    assert cluster["rayVersion"] == ray.__version__, "the image's"
    SearchConfig.of(yaml.safe_load((KUBERAY / "job.yaml").read_text()))


def test_files_hold_no_secrets_and_pin_every_image() -> None:
    """Secrets are named, never written; kustomize makes them from files that git ignores."""
    assert not named("Secret")
    kustomization = yaml.safe_load((KUBERAY / "kustomization.yaml").read_text())
    made = {s["name"] for s in kustomization["secretGenerator"]}
    sources = [f for s in kustomization["secretGenerator"] for f in s.get("files", s.get("envs"))]
    assert all(f.rpartition("=")[2].startswith("secrets/") for f in sources)
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", KUBERAY / "secrets" / "storage.env"], cwd=CLUSTERS
    )
    assert ignored.returncode in (0, 128), "git ignores it (or this is no checkout)"
    for name, template in pods():
        for container in template["spec"]["containers"]:
            assert container["image"] == "vitpareto", f"{name}: kustomize pins it"
            for variable in container.get("env", ()):
                assert not re.search("TOKEN|PASSWORD|KEY|SECRET", variable["name"]), name
            used = {s["secretRef"]["name"] for s in container.get("envFrom", ())}
            assert used <= made, name
            confined = container["securityContext"]
            assert not confined["allowPrivilegeEscalation"]
            assert confined["capabilities"] == {"drop": ["ALL"]}
        assert template["spec"]["securityContext"]["runAsNonRoot"]
    (image,) = kustomization["images"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", str(image["newTag"]))
    assert {r for r in kustomization["resources"]} == {
        p.name for p in KUBERAY.glob("*.yaml") if p.name not in ("kustomization.yaml", "job.yaml")
    }


def test_ports_are_closed_to_other_pods() -> None:
    policies = {p["metadata"]["name"]: p["spec"] for p in named("NetworkPolicy")}
    for name, template in pods():
        labels = template["metadata"]["labels"]
        assert any(
            policy["podSelector"]["matchLabels"].items() <= labels.items()
            and policy["policyTypes"] == ["Ingress"]
            for policy in policies.values()
        ), name
    for policy in policies.values():
        assert all(rule["from"] for rule in policy["ingress"]), "nobody is not everybody"
    (monitor,) = named("PodMonitor")
    ports = {
        p["name"]
        for _, template in list(pods())[:2]
        for c in template["spec"]["containers"]
        for p in c["ports"]
    }
    assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} <= ports


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, to run kustomize")
def test_kustomize_builds_the_manifests(tmp_path: Path) -> None:
    place = shutil.copytree(KUBERAY, tmp_path / "kuberay")
    (place / "secrets").mkdir(exist_ok=True)
    for name in (
        "optuna.env",
        "storage.env",
        "mlflow-client.env",
        "mlflow-server.env",
    ):
        (place / "secrets" / name).write_text("A=b\n")
    done = subprocess.run(
        ["kubectl", "kustomize", str(place)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    assert all(d["metadata"]["namespace"] == "vitpareto" for d in made if d["kind"] != "Namespace")
    assert "image: REGISTRY/vitpareto:" in done.stdout and "image: vitpareto\n" not in done.stdout
    for document in made:
        check(document)


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_launcher_accepts_its_files(cloud: str) -> None:
    """As Ray's launcher reads them: head without trials, spot workers, one image, a token, and
    nothing installed over the image.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((CLUSTERS / f"{cloud}.yaml").read_text()))
    validate_config(config)
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[commands] == []
    assert re.fullmatch(r"REGISTRY/vitpareto:\d+\.\d+\.\d+", config["docker"]["image"])
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    head, gpu = (config["available_node_types"][k] for k in ("head", "gpu"))
    assert head["resources"]["CPU"] == 0 and gpu["resources"]["GPU"] == 1
    assert gpu["min_workers"] == 0 and gpu["max_workers"] > 1
    spot = str(gpu["node_config"]).lower()
    assert "spot" in spot and "spot" not in str(head["node_config"]).lower()
    starts = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in starts and "--port=6379" in starts
    wrong = yaml.safe_load((CLUSTERS / f"{cloud}.yaml").read_text())
    wrong["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(wrong))


def tool(name: str) -> Path:
    """A linter of the test extra, beside this Python."""
    return Path(sys.executable).parent / name


def test_linters_accept_the_slurm_script_and_the_dockerfile() -> None:
    for command in (
        [tool("shellcheck"), "--severity=style", CLUSTERS / "slurm.sh"],
        [tool("hadolint"), CLUSTERS / "Dockerfile"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
    text = (CLUSTERS / "Dockerfile").read_text()
    version = re.search(r"^FROM python:(\d+\.\d+)\.\d+-slim", text, re.MULTILINE)
    assert version is not None, "pinned"
    assert "RAY_AUTH_MODE=token" in text and re.search(r"^USER [1-9]", text, re.MULTILINE)
    script = (CLUSTERS / "slurm.sh").read_text()
    assert "ray symmetric-run" in script and "RAY_AUTH_MODE=token" in script
