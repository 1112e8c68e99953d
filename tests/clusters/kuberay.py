"""KubeRay's RayJob (ray.io/v1) as a JSON schema in which no unknown field is allowed.

Written after the operator's type definitions (ray-operator/apis/ray/v1): the fields of RayJobSpec,
RayClusterSpec, the head's and the workers' groups and the autoscaler's options. Pod templates are
Kubernetes' own and are checked against its schema.
"""

from __future__ import annotations

from typing import Any

_TEXT, _WHOLE, _YES = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_ANY: dict[str, Any] = {"type": "object"}


def _closed(required: tuple[str, ...], **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


_AUTOSCALER = _closed(
    (),
    resources=_ANY,
    image=_TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    env={"type": "array"},
    envFrom={"type": "array"},
    volumeMounts={"type": "array"},
    securityContext=_ANY,
    idleTimeoutSeconds=_WHOLE,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    version={"enum": ["v1", "v2"]},
)
_HEAD = _closed(
    ("template",),
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
    headService=_ANY,
    enableIngress=_YES,
    rayStartParams=_TEXTS,
    resources=_TEXTS,
    labels=_TEXTS,
    template=_ANY,
)
_WORKERS = _closed(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=_TEXT,
    suspend=_YES,
    replicas=_WHOLE,
    minReplicas=_WHOLE,
    maxReplicas=_WHOLE,
    idleTimeoutSeconds=_WHOLE,
    numOfHosts=_WHOLE,
    rayStartParams=_TEXTS,
    resources=_TEXTS,
    labels=_TEXTS,
    template=_ANY,
    scaleStrategy=_closed((), workersToDelete={"type": "array", "items": _TEXT}),
)
_CLUSTER = _closed(
    ("headGroupSpec",),
    authOptions=_closed((), mode={"enum": ["disabled", "token"]}, secretName=_TEXT),
    suspend=_YES,
    managedBy=_TEXT,
    autoscalerOptions=_AUTOSCALER,
    headServiceAnnotations=_TEXTS,
    enableInTreeAutoscaling=_YES,
    gcsFaultToleranceOptions=_ANY,
    headGroupSpec=_HEAD,
    rayVersion=_TEXT,
    workerGroupSpecs={"type": "array", "items": _WORKERS},
)
RAYJOB = _closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_closed(("name",), name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS),
    spec=_closed(
        (),
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        waitingTtlSeconds=_WHOLE,
        backoffLimit=_WHOLE,
        rayClusterSpec=_CLUSTER,
        submitterPodTemplate=_ANY,
        metadata=_TEXTS,
        clusterSelector=_TEXTS,
        submitterConfig=_closed((), backoffLimit=_WHOLE),
        managedBy=_TEXT,
        deletionStrategy=_ANY,
        entrypoint=_TEXT,
        runtimeEnvYAML=_TEXT,
        jobId=_TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        entrypointResources=_TEXT,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        ttlSecondsAfterFinished=_WHOLE,
        shutdownAfterJobFinishes=_YES,
        suspend=_YES,
    ),
)
#: prometheus-operator's PodMonitor, as far as it is used here
PODMONITOR = _closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "monitoring.coreos.com/v1"},
    kind={"const": "PodMonitor"},
    metadata=_closed(("name",), name=_TEXT, namespace=_TEXT, labels=_TEXTS),
    spec=_closed(
        ("selector", "podMetricsEndpoints"),
        jobLabel=_TEXT,
        selector=_closed((), matchLabels=_TEXTS),
        namespaceSelector=_ANY,
        podMetricsEndpoints={
            "type": "array",
            "items": _closed(
                (),
                port=_TEXT,
                path=_TEXT,
                interval={"type": "string", "pattern": r"^\d+[smh]$"},
                relabelings={
                    "type": "array",
                    "items": _closed(
                        (),
                        sourceLabels={"type": "array", "items": _TEXT},
                        targetLabel=_TEXT,
                        regex=_TEXT,
                        replacement=_TEXT,
                        action=_TEXT,
                    ),
                },
            ),
        },
    ),
)
