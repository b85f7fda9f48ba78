"""Manifests for KubeRay from settings: the part of an overlay that `octet k8s render` writes.

`base/rayservice.yaml` has two worker groups as patterns: `front` for nodes without a card, where
Ingresses and the Dispatcher run, and `card` for nodes with cards. Each kind of node in an overlay's
`nodes.yaml` becomes a copy of one of the two.

The head gets its size from how many nodes and replicas there may be, and pods get the container
images that the command names.

The rest is the config that `serve_config` makes, as for `octet serve`. Here the config also names
the address of the HTTP proxies, and the nodes of Ingresses and Dispatcher. Ingresses are spread
over the front pods. Ray Serve would put all of them into one pod, and a front pod without a replica
has no HTTP proxy and never becomes ready.

The config also states the smallest number of replicas of each pool. That matters because KubeRay
moves traffic to a new cluster as soon as its applications count as running. With the number stated,
a pool's application counts as running only when that many replicas are warm.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from cluster.cards import CARDS
from cluster.placement import CARD_LABEL, PRECISION_LABEL, Node, NodeRequirement, fits
from serve.deployments import DISPATCHER, INGRESS, JOBS
from serve.errors import SettingsError, did_you_mean
from serve.models.replica_bounds import other_needs
from serve.settings.application import Settings
from serve.settings.models import Frozen, Resources
from serve.settings.serve_config import LOGGING, serve_config

BASE = Path(__file__).with_name("base") / "rayservice.yaml"
MADE = "# Made by octet k8s render.\n"
ROLE_LABEL = "octet/role"
FRONT = {ROLE_LABEL: "front"}
ON_FRONT = INGRESS, DISPATCHER, JOBS  # deployments that run on nodes of this role
GPU = "nvidia.com/gpu"
# Seconds that a pod has for leaving, in addition to drain_timeout_s: Ray must learn that the pod
# leaves, and the HTTP proxies must stop sending requests.
LEAVE_S = 120
PULL_S = 1800  # for the first pull of the weights
JOIN = "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"
DIGEST = re.compile(r"\S+@sha256:[0-9a-f]{64}")
SPOT_TAINTS = (
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
    ("karpenter.sh/capacity-type", "spot"),
)


class NodeKind(Frozen):
    """A kind of node in nodes.yaml; one worker pod takes the whole of such a node.

    `card`: an id of cluster/cards.py, which the Kubernetes nodes carry as their label `octet/card`;
    None for nodes without a card. `gpus`: cards per node. `idle_s`: seconds after which an unused
    node is removed. `spot`: whether the provider may take such a node away.
    """

    name: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$")]
    card: str | None = None
    gpus: NonNegativeInt = 0
    cpus: PositiveInt
    memory_gib: PositiveFloat
    min_nodes: NonNegativeInt = 0
    max_nodes: PositiveInt
    idle_s: PositiveInt = 600
    spot: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> NodeKind:
        if self.card is not None and self.card not in CARDS:
            raise ValueError(f"card '{self.card}': {did_you_mean(self.card, CARDS)}")
        if bool(self.gpus) != bool(self.card):
            raise ValueError("card and gpus belong together: give both or neither")
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than max_nodes {self.max_nodes}")
        return self

    @property
    def labels(self) -> dict[str, str]:
        """Labels of these nodes in Ray."""
        if self.card is None:
            return FRONT
        precision = "fp8" if CARDS[self.card].has_fp8 else "fp16"
        return {ROLE_LABEL: "card", CARD_LABEL: self.card, PRECISION_LABEL: precision}

    @property
    def node(self) -> Node:
        """A node of this kind, as `cluster.placement` describes nodes."""
        return Node(self.name, self.labels, float(self.cpus), float(self.gpus))


def read_nodes(file: Path) -> tuple[NodeKind, ...]:
    """The kinds of nodes in a nodes.yaml.

    Raises `SettingsError`, with one line for each fault, if the file cannot be used.
    """
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        kinds = TypeAdapter(tuple[NodeKind, ...]).validate_python(data)
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        faults = (_node_fault(data, fault["loc"], fault["msg"]) for fault in error.errors())
        raise SettingsError("\n".join(f"{file}: {fault}" for fault in faults)) from None
    names = [kind.name for kind in kinds]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SettingsError(f"{file}: the name '{min(twice)}' is used twice")
    if not any(kind.min_nodes for kind in kinds if not kind.card):
        raise SettingsError(
            f"{file}: Ingresses and the Dispatcher need nodes without a card: add a kind with "
            "min_nodes 1 or more"
        )
    return kinds


def _node_fault(data: Any, place: Sequence[int | str], message: str) -> str:
    """One fault of a nodes.yaml, with the name of the kind of nodes that has it."""
    message = message.removeprefix("Value error, ")
    if not place or not isinstance(place[0], int):
        return f"expected a list of kinds of nodes: {message}"
    kind = data[place[0]]
    name = f"'{kind['name']}'" if isinstance(kind, dict) and "name" in kind else f"{place[0] + 1}"
    return f"kind of nodes {name}: {': '.join([*map(str, place[1:]), message])}"


class Images(NamedTuple):
    """The container images of the pods with cards, and of all others; None: the kustomization's."""

    card: str | None = None
    cpu: str | None = None

    def check_digests(self, kinds: Iterable[NodeKind]) -> None:
        """Raise `SettingsError` unless each image that pods use is given by its digest."""
        used = {"--cpu-image": self.cpu}
        if any(kind.card for kind in kinds):
            used["--image"] = self.card
        for option, image in used.items():
            if image is None or not DIGEST.fullmatch(image):
                raise SettingsError(
                    f"{option} {image or 'is missing'}: expected NAME@sha256: and 64 hexadecimal "
                    "digits, because a tag may come to mean another image"
                )


AS_KUSTOMIZED = Images()


def rendered(
    settings: Settings, kinds: Iterable[NodeKind], images: Images = AS_KUSTOMIZED
) -> dict[str, str]:
    """The texts of the rendered files, by file name.

    `rayservice.yaml` is a patch of the base's RayService. `settings.yaml` holds the settings as a
    ConfigMap. Raises `SettingsError` for settings that cannot work on these nodes.
    """
    kinds = tuple(kinds)
    service = yaml.safe_load(BASE.read_text(encoding="utf-8"))
    cluster = service["spec"]["rayClusterConfig"]
    patterns = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    _check(settings, kinds, patterns)
    grace_s = ceil(settings.drain_timeout_s) + LEAVE_S
    patch = {
        **{key: service[key] for key in ("apiVersion", "kind", "metadata")},
        "spec": {
            "rayClusterDeletionDelaySeconds": grace_s,
            "serveConfigV2": _text(serve_config_v2(settings, kinds)),
            "rayClusterConfig": {
                "autoscalerOptions": _autoscaler(settings, cluster["autoscalerOptions"]),
                "headGroupSpec": _head(settings, kinds, cluster["headGroupSpec"], images.cpu),
                "workerGroupSpecs": [
                    _worker_group(
                        kind,
                        patterns["card" if kind.card else "front"],
                        grace_s,
                        images,
                        loads=_loads(settings, kind),
                    )
                    for kind in kinds
                ],
            },
        },
    }
    given = settings.model_dump(mode="json", exclude_unset=True)
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "octet-settings"},
        "data": {"settings.yaml": _text(given)},
    }
    return {"rayservice.yaml": MADE + _text(patch), "settings.yaml": MADE + _text(config_map)}


def serve_config_v2(settings: Settings, kinds: Iterable[NodeKind]) -> dict[str, Any]:
    """The config that `serve_config` makes, with what a cluster of pods needs in addition.

    The module's docstring lists the additions.
    """
    config = serve_config(settings, pools_start_empty=False)
    deployments = {d["name"]: d for one in config["applications"] for d in one["deployments"]}
    deployments[INGRESS]["ray_actor_options"] = {
        **settings.ingress.ray_actor_options,
        "label_selector": FRONT,
    }
    deployments[INGRESS]["max_replicas_per_node"] = ingresses_per_pod(settings, kinds)
    deployments[DISPATCHER]["ray_actor_options"] = {
        "num_cpus": settings.dispatcher_num_cpus,
        "label_selector": FRONT,
    }
    if settings.runs_jobs:
        deployments[JOBS]["ray_actor_options"] = {
            "num_cpus": settings.job_runner.num_cpus,
            "label_selector": FRONT,
        }
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": settings.http.port},  # noqa: S104 - all addresses of the pod
        "logging_config": LOGGING,
        **config,
    }


def ingresses_per_pod(settings: Settings, kinds: Iterable[NodeKind]) -> int:
    """How many Ingresses a front pod may hold, so that the smallest number of them fills all pods.

    These are the front pods that always run.
    """
    pods = sum(kind.min_nodes for kind in kinds if not kind.card)
    return ceil(settings.ingress.least / pods)


def too_few(settings: Settings, kinds: Iterable[NodeKind]) -> list[str]:
    """A sentence for each shortage of cards, CPUs or front pods.

    A shortage means that replicas may take more of them than the nodes can have.
    """
    kinds = tuple(kinds)
    deployed = [*settings.text_encoders, *(p for model in settings.models for p in model.pools)]
    dispatcher = Resources(num_cpus=settings.dispatcher_num_cpus)
    runner = settings.job_runner
    jobs = Resources(num_cpus=runner.num_cpus, replicas=runner.replicas)
    front = dispatcher, settings.ingress, jobs
    found = []
    for card in dict.fromkeys(kind.card for kind in kinds):
        nodes = [kind for kind in kinds if kind.card == card]
        takers = [part for part in deployed if part.card == card] if card else front
        for unit, available, needed in (
            (
                "cards",
                sum(kind.max_nodes * kind.gpus for kind in nodes),
                sum(taker.replicas * taker.num_gpus for taker in takers),
            ),
            (
                "CPUs",
                sum(kind.max_nodes * kind.cpus for kind in nodes),
                sum(taker.replicas * taker.num_cpus for taker in takers),
            ),
        ):
            if needed > available:
                where = card or "nodes without a card"
                found.append(
                    f"{where}: the nodes have at most {available} {unit}, and replicas may take "
                    f"{needed:.4g}"
                )
    each = ingresses_per_pod(settings, kinds)
    places = each * sum(kind.max_nodes for kind in kinds if not kind.card)
    if settings.ingress.replicas > places:
        found.append(
            f"nodes without a card: they hold at most {places} Ingresses, {each} each, and there "
            f"may be {settings.ingress.replicas}"
        )
    return found


def _check(
    settings: Settings, kinds: tuple[NodeKind, ...], patterns: dict[str, dict[str, Any]]
) -> None:
    """Raise `SettingsError` for settings that cannot work on these nodes and in these pods."""
    if settings.auth == "none":
        raise SettingsError(
            "auth none: pods are reached from outside: set auth to keys or none-on-any-address"
        )
    front, card = (
        patterns[role]["template"]["spec"]["containers"][0] for role in ("front", "card")
    )
    ports = {port["name"]: port["containerPort"] for port in front["ports"]}
    if settings.http.port != ports["serve"]:
        raise SettingsError(
            f"http: port {settings.http.port}: pods listen on {ports['serve']}, so it must be that"
        )
    written = {
        "data_folder": settings.data_folder,
        "models_folder": settings.models_folder,
        "local_models_folder": settings.local_models_folder,
        "compiled_folder": settings.compiled_folder,
        "mps_folder": settings.mps_folder,
    }
    read = {
        "signing_key_file": settings.signing_key_file,
        "tenants_folder": settings.tenants_folder,
        "cache: redis_password_file": settings.cache and settings.cache.redis_password_file,
        "store: password_file": settings.store.password_file,
    }
    for key, path in {**written, **read}.items():
        mounts = (
            PurePosixPath(mount["mountPath"])
            for mount in (card if key == "local_models_folder" else front)["volumeMounts"]
            if key in read or not mount.get("readOnly")
        )
        if path and not any(PurePosixPath(path).is_relative_to(mount) for mount in mounts):
            raise SettingsError(
                f"{key} {path}: no volume of the pods is mounted there; see {BASE.name}"
            )
    if settings.database_is_of_one_node:
        raise SettingsError(
            "store: SQLite is a file of one node, but the Dispatcher may move to another: set the "
            "url of a PostgreSQL database, such as that of components/postgres"
        )
    sources = [m.source for m in settings.models] + [e.source for e in settings.text_encoders]
    if any(source.revision for source in sources) and not settings.models_folder:
        raise SettingsError("models_folder: must be set, because models are pulled from the hub")
    for name, need in _needs(settings):
        front = name in ON_FRONT
        if not any(fits(need, kind.node) for kind in kinds if not (front and kind.card)):
            raise SettingsError(f"{name}: none of the nodes can hold a replica")
    autoscaled = any(kind.min_nodes < kind.max_nodes for kind in kinds if kind.card)
    if autoscaled and not settings.autoscaling.node_wait_s:
        raise SettingsError(
            "autoscaling: node_wait_s 0: nodes are added only when they are needed. Set how many "
            "seconds that may take, or requests are refused meanwhile"
        )


def _needs(settings: Settings) -> Iterable[tuple[str, NodeRequirement]]:
    """Yield the name of each deployment, and what one replica of it needs of its node."""
    others = other_needs(settings)
    yield from ((name, others[name][0]) for name in ON_FRONT if name in others)
    for model in settings.models:
        for pool in model.pools:
            yield f"pool {model.pool_name(pool)}", pool.need
    for encoder in settings.text_encoders:
        yield f"text encoder {encoder.id}", encoder.need


def _loads(settings: Settings, kind: NodeKind) -> bool:
    """Return whether a replica that loads weights may run on nodes of this kind."""
    return any(fits(need, kind.node) for name, need in _needs(settings) if name not in ON_FRONT)


def _autoscaler(settings: Settings, pattern: dict[str, Any]) -> dict[str, Any]:
    """The environment of Ray's autoscaler.

    A pod that has not joined the cluster by the time that a node and the first pull of the weights
    may take is given up, and another one asked for.
    """
    joined_s = ceil(settings.autoscaling.node_wait_s) + PULL_S
    return {"env": [*pattern["env"], {"name": JOIN, "value": str(joined_s)}]}


def _head(
    settings: Settings, kinds: Iterable[NodeKind], pattern: dict[str, Any], image: str | None
) -> dict[str, Any]:
    """The head's containers: their image, and CPUs and memory for the largest cluster.

    Ray's control store and Serve's controller hold a record of every node and replica, and ask each
    replica for its health and metrics. The sizes are a rule of thumb, not measured on a cluster.
    """
    nodes = sum(kind.max_nodes for kind in kinds)
    pools = [pool for model in settings.models for pool in model.pools]
    parts = settings.ingress, *settings.text_encoders, *pools
    replicas = settings.job_runner.replicas + sum(part.replicas for part in parts)
    memory = f"{ceil(4 + (replicas + nodes) / 50)}Gi"
    (container,) = copy.deepcopy(pattern["template"]["spec"]["containers"])
    container["resources"] = {
        "requests": {"cpu": str(ceil(1 + (replicas + nodes) / 100)), "memory": memory},
        "limits": {"memory": memory},
    }
    container["image"] = image or container["image"]
    return {"template": {"spec": {"containers": [container]}}}


def _worker_group(
    kind: NodeKind, pattern: dict[str, Any], grace_s: int, images: Images, *, loads: bool
) -> dict[str, Any]:
    """A worker group of pods for a kind of node; a pod has `grace_s` seconds to end.

    `loads`: whether a replica that loads weights may run there.
    """
    group = copy.deepcopy(pattern)
    pod = group["template"]["spec"]
    if image := images.card if kind.card else images.cpu:
        for one in (*pod["containers"], *pod["initContainers"]):
            one["image"] = image
    pod["terminationGracePeriodSeconds"] = grace_s
    (container,), (pull,) = pod["containers"], pod["initContainers"]
    if not loads:
        pull["command"][-1] = pull["command"][-1].replace("octet pull", "octet pull --structures")
    patience_s = str(grace_s - LEAVE_S // 2)
    container["lifecycle"]["preStop"]["exec"]["command"][-1] = patience_s
    memory = f"{kind.memory_gib:g}Gi"
    gpus = {GPU: str(kind.gpus)} if kind.gpus else {}
    container["resources"] = {
        "requests": {"cpu": str(kind.cpus), "memory": memory, **gpus},
        "limits": {"memory": memory, **gpus},
    }
    if kind.card:
        pod["nodeSelector"] = {CARD_LABEL: kind.card}
        pod["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
    if kind.spot:
        pod.setdefault("tolerations", []).extend(
            {"key": key, "operator": "Equal", "value": value} for key, value in SPOT_TAINTS
        )
    return {
        **group,
        "groupName": kind.name,
        "replicas": kind.min_nodes,
        "minReplicas": kind.min_nodes,
        "maxReplicas": kind.max_nodes,
        "idleTimeoutSeconds": kind.idle_s,
        "labels": kind.labels,
        "resources": {"CPU": str(kind.cpus), "GPU": str(kind.gpus)},
    }


class _Dumper(yaml.SafeDumper):
    """Dumps YAML with multi-line texts as literal blocks (`|`), and without aliases."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def _text(data: dict[str, Any]) -> str:
    dumped: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)
    return dumped
