"""Kubernetes manifests: valid, rendered by the code, and consistent with settings and plan."""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from cluster.cards import CARDS
from cluster.packing import plan
from cluster.placement import fits, selectors
from cluster.pools import planned_pools
from cluster.serving_options import CardGroup
from k8s.render import LEAVE_S, Images, NodeKind, read_nodes, rendered, serve_config_v2
from serve import app
from serve.cli.main import app as cli
from serve.cli.plan_inputs import encoder_gib, only_encoder, planned_models_of
from serve.errors import SettingsError
from serve.launch import ENVIRONMENT
from serve.settings.application import Settings
from serve.settings.file import load_settings

from ..kubernetes import ROOT, faults, kustomize
from ..unit.test_placement import matches

OVERLAYS = "dev-cpu", "single-gpu", "mixed-gpu"
MADE_BY_HAND = {"octet-secrets", "octet-tenants", "octet-hub", "octet-bucket"}
NOT_CORE = {"PodMonitor", "PrometheusRule"}  # kinds without a schema here

over_all = pytest.mark.parametrize("overlay", OVERLAYS)


def folder(overlay: str) -> Path:
    return ROOT / "k8s" / "overlays" / overlay


def settings_of(overlay: str) -> Settings:
    return load_settings(folder(overlay) / "settings.yaml", {})


@functools.cache
def built(overlay: str) -> tuple[dict[str, Any], ...]:
    return tuple(kustomize(folder(overlay)))


def of_kind(overlay: str, kind: str) -> list[dict[str, Any]]:
    return [copy.deepcopy(one) for one in built(overlay) if one["kind"] == kind]


def ray_service(overlay: str) -> dict[str, Any]:
    (service,) = of_kind(overlay, "RayService")
    found: dict[str, Any] = service["spec"]
    return found


def worker_groups(overlay: str) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = ray_service(overlay)["rayClusterConfig"]["workerGroupSpecs"]
    return groups


def pods(overlay: str) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """The labels, completed like by KubeRay, and the spec of every pod."""
    cluster = ray_service(overlay)["rayClusterConfig"]
    groups = [("head", cluster["headGroupSpec"])] + [("worker", g) for g in worker_groups(overlay)]
    for node_type, group in groups:
        labels = {"ray.io/node-type": node_type, "ray.io/is-ray-node": "yes"}
        yield {**labels, **group["template"]["metadata"]["labels"]}, group["template"]["spec"]
    for kind in ("StatefulSet", "Deployment"):
        for one in of_kind(overlay, kind):
            template = one["spec"]["template"]
            yield template["metadata"]["labels"], template["spec"]


# -- whole and valid ------------------------------------------------------------------------------


@over_all
def test_committed_manifests_are_what_the_code_renders(overlay: str) -> None:
    files = rendered(settings_of(overlay), read_nodes(folder(overlay) / "nodes.yaml"))
    for name, text in files.items():
        there = (folder(overlay) / "rendered" / name).read_text(encoding="utf-8")
        assert there == text, f"octet k8s render {overlay}/settings.yaml --overlay {overlay}"


@over_all
def test_every_manifest_is_valid(overlay: str) -> None:
    manifests = [one for one in built(overlay) if one["kind"] not in NOT_CORE]
    assert len(manifests) > 10
    found = {one["kind"]: faults(one) for one in manifests if faults(one)}
    assert found == {}


def test_the_check_finds_faults() -> None:
    service = of_kind("dev-cpu", "RayService")[0]
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    group["idleTimeoutSecond"] = 5
    del group["template"]
    group["template"] = {"spec": {"container": []}}
    found = "\n".join(faults(service))
    assert "idleTimeoutSecond" in found
    assert "'containers' is a required property" in found
    assert "'container' was unexpected" in found
    (budget,) = of_kind("mixed-gpu", "PodDisruptionBudget")
    budget["spec"]["minAvailabel"] = 1
    assert "minAvailabel" in faults(budget)[0]


@pytest.mark.parametrize("component", ["kueue", "kai-scheduler", "cache-redis"])
def test_components_can_be_added(component: str, tmp_path: Path) -> None:
    relative = Path("../" * len(tmp_path.parts[1:])) / str(ROOT / "k8s").lstrip("/")
    overlay, added = relative / "overlays/dev-cpu", relative / "components" / component
    text = {"resources": [str(overlay)], "components": [str(added)], "namespace": "octet"}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(text))
    more = [one for one in kustomize(tmp_path) if one not in built("dev-cpu")]
    assert more
    assert [fault for one in more for fault in faults(one)] == []

    if component == "kueue":  # which refuses clusters that Ray's autoscaler changes
        (service,) = (one for one in more if one["kind"] == "RayService")
        assert service["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"] is False


# -- the application ------------------------------------------------------------------------------


def imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@over_all
@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
def test_ray_serve_accepts_the_config_and_every_name_in_it_exists(overlay: str) -> None:
    config = yaml.safe_load(ray_service(overlay)["serveConfigV2"])
    applications = ServeDeploySchema.model_validate(config).applications
    assert callable(imported(ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]))
    for application in applications:
        assert imported(application.import_path) is app.build
        assert callable(imported(application.autoscaling_policy["policy_function"]))
        deployed = {d.name for d in deployments(app.build(application.args))}
        assert {d.name for d in application.deployments} == deployed
    settings = settings_of(overlay)
    assert len(applications) == 2 + len(settings.text_encoders) + sum(
        len(model.pools) for model in settings.models
    )
    assert config["proxy_location"] == "EveryNode"


def deployments(application: Any) -> list[Any]:
    """All deployments of an application that `build` returned, also nested ones."""
    from ray.serve._private.build_app import build_app

    built = build_app(application, name="octet", default_runtime_env=None)
    return list(built.deployments)


@over_all
def test_an_application_counts_as_running_when_every_model_has_a_replica(overlay: str) -> None:
    """KubeRay moves traffic to a cluster as soon as its application runs."""
    settings = settings_of(overlay)
    config = yaml.safe_load(ray_service(overlay)["serveConfigV2"])
    least = {
        one["name"]: one["autoscaling_config"]["min_replicas"]
        for application in config["applications"]
        for one in application["deployments"]
        if one["name"].startswith("Generator-")
    }
    assert least == {
        f"Generator-{model.pool_name(pool)}": pool.least
        for model in settings.models
        for pool in model.pools
    }
    served = {name.removeprefix("Generator-") for name in least if least[name]}
    assert all(served & {m.pool_name(p) for p in m.pools} for m in settings.models)


@pytest.mark.parametrize("overlay", ["single-gpu", "mixed-gpu"])
def test_pools_and_nodes_are_those_of_the_plan(overlay: str) -> None:
    settings = settings_of(overlay)
    cards = {
        group["labels"]["octet/card"]: group
        for group in worker_groups(overlay)
        if "octet/card" in group["labels"]
    }
    groups = [
        CardGroup(CARDS[card], int(group["resources"]["GPU"]) * group["maxReplicas"])
        for card, group in cards.items()
    ]
    gib = encoder_gib(only_encoder(settings), settings)
    planned = {
        (p.model, p.card, "fp8" if p.recipe == "fp8" else "fp16" if p.model else ""): (
            p.replicas,
            p.slots if p.model else 1,
            p.num_gpus,
            pytest.approx(p.memory_gib, abs=0.001),
        )
        for p in planned_pools(plan(groups, planned_models_of(settings), encoder_gib=gib))
    }
    config = yaml.safe_load(ray_service(overlay)["serveConfigV2"])
    ingress, _ = config["applications"][0]["deployments"]
    deployed = Settings.model_validate(ingress["user_config"])
    found: dict[Any, Any] = {
        (model.id, pool.card, pool.precision): (
            pool.replicas,
            pool.slots,
            pool.num_gpus,
            pool.memory_gib,
        )
        for model in deployed.models
        for pool in model.pools
    }
    for encoder in deployed.text_encoders:
        key = None, encoder.card, ""
        found[key] = encoder.replicas, 1, encoder.num_gpus, encoder.memory_gib
    assert found == planned
    for group in cards.values():
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == group["resources"]["GPU"]
        assert container["resources"]["requests"]["cpu"] == group["resources"]["CPU"]


@over_all
def test_labels_of_nodes_and_selectors_of_pools_agree(overlay: str) -> None:
    settings, kinds = settings_of(overlay), read_nodes(folder(overlay) / "nodes.yaml")
    labels = {group["groupName"]: group["labels"] for group in worker_groups(overlay)}
    assert labels == {kind.name: kind.labels for kind in kinds}
    for model in settings.models:
        for pool in model.pools:
            need = pool.need
            if not need.num_gpus:
                continue
            by_ray = {
                name
                for name, given in labels.items()
                if any(matches(selector, given) for selector in selectors(need))
            }
            assert by_ray == {kind.name for kind in kinds if fits(need, kind.node)}
            assert by_ray
    config = serve_config_v2(settings, kinds)
    for one in config["applications"][0]["deployments"]:
        if selector := one.get("ray_actor_options", {}).get("label_selector"):
            held = [k for k in kinds if matches(selector, labels[k.name]) and k.min_nodes]
            assert held, one["name"]


@over_all
def test_each_front_pod_that_always_runs_gets_an_ingress(overlay: str) -> None:
    config = yaml.safe_load(ray_service(overlay)["serveConfigV2"])
    (ingress,) = (
        one for one in config["applications"][0]["deployments"] if one["name"] == "Ingress"
    )
    kinds = read_nodes(folder(overlay) / "nodes.yaml")
    pods_ = sum(kind.min_nodes for kind in kinds if not kind.card)
    least, most = settings_of(overlay).ingress.least, ingress["max_replicas_per_node"]
    # So many on a pod that the smallest number fits on the pods that are there, and not one more.
    assert most * pods_ >= least > (most - 1) * pods_
    assert least >= pods_


@over_all
def test_only_pods_whose_replicas_load_weights_pull_them(overlay: str) -> None:
    for group in worker_groups(overlay):
        (pull,) = group["template"]["spec"]["initContainers"]
        loads = group["labels"]["octet/role"] == "card" or overlay == "dev-cpu"
        assert ("--structures" in pull["command"][-1]) is not loads


@over_all
def test_the_head_is_not_moved_to_save_a_node(overlay: str) -> None:
    head = ray_service(overlay)["rayClusterConfig"]["headGroupSpec"]["template"]["metadata"]
    assert head["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert head["annotations"]["karpenter.sh/do-not-disrupt"] == "true"


# -- pods -----------------------------------------------------------------------------------------


@over_all
def test_pods_have_few_rights(overlay: str) -> None:
    for labels, pod in pods(overlay):
        assert labels["app.kubernetes.io/part-of"] == "octet"
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        if labels.get("ray.io/node-type") != "head":
            assert pod["automountServiceAccountToken"] is False
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            confined = container["securityContext"]
            assert confined["readOnlyRootFilesystem"] is True
            assert confined["allowPrivilegeEscalation"] is False
            assert confined["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert ":" in container["image"]
    assert ray_service(overlay)["rayClusterConfig"]["authOptions"] == {"mode": "token"}


@over_all
def test_ray_pods_are_as_octet_serve_sets_ray_up(overlay: str) -> None:
    stays_s = settings_of(overlay).drain_timeout_s + LEAVE_S
    for labels, pod in pods(overlay):
        if "ray.io/node-type" not in labels:
            continue
        assert pod["enableServiceLinks"] is False, "OCTET_… variables would be read as settings"
        (container,) = pod["containers"]
        env = {one["name"]: one.get("value") for one in container["env"]}
        assert env.items() >= ENVIRONMENT.items()
        if labels["ray.io/node-type"] == "worker":
            assert pod["terminationGracePeriodSeconds"] >= stays_s
            *command, patience_s = container["lifecycle"]["preStop"]["exec"]["command"]
            assert command == ["octet", "k8s", "leave"]
            drain_s = settings_of(overlay).drain_timeout_s
            assert drain_s < int(patience_s) < pod["terminationGracePeriodSeconds"] - 30
    head = ray_service(overlay)["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]
    assert (head["num-cpus"], head["num-gpus"]) == ("0", "0")


@over_all
def test_the_head_has_room_for_the_largest_cluster_and_the_right_to_it(overlay: str) -> None:
    settings = settings_of(overlay)
    small, large = (
        rendered(
            settings,
            [
                kind.model_copy(update={"min_nodes": nodes, "max_nodes": nodes})
                for kind in nodes_of(overlay)
            ],
        )
        for nodes in (1, 1000)
    )
    sizes = []
    for files in (small, large):
        (head,) = head_of(files)["template"]["spec"]["containers"]
        sizes.append(int(head["resources"]["limits"]["memory"].removesuffix("Gi")))
    assert sizes[1] > sizes[0] + 10
    head = ray_service(overlay)["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert ("PriorityClass", head["priorityClassName"]) in {
        (one["kind"], one["metadata"]["name"]) for one in built(overlay)
    }
    (container,) = head["containers"]
    assert container["ports"]  # the whole container, because a patch replaces the list


@over_all
def test_rays_autoscaler_waits_as_long_for_a_pod_as_the_settings_say(overlay: str) -> None:
    options = ray_service(overlay)["rayClusterConfig"]["autoscalerOptions"]
    env = {one["name"]: one["value"] for one in options["env"]}
    wait_s = settings_of(overlay).autoscaling.node_wait_s
    assert int(env["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"]) == wait_s + 1800
    assert env["AUTOSCALER_CONSERVE_GPU_NODES"] == "1"


DIGEST = "@sha256:" + 64 * "0"


def test_images_are_given_by_digest_where_that_is_required() -> None:
    settings, kinds = settings_of("mixed-gpu"), nodes_of("mixed-gpu")
    by_digest = Images(f"r.example/octet{DIGEST}", f"r.example/octet-cpu{DIGEST}")
    by_digest.check_digests(kinds)
    Images(cpu=by_digest.cpu).check_digests([kind for kind in kinds if not kind.card])
    for images, words in (
        (Images(), "--cpu-image is missing"),
        (by_digest._replace(card="r.example/octet:1.0"), "--image r.example/octet:1.0: expected"),
        (by_digest._replace(card="octet@sha256:12"), "64 hexadecimal digits"),
    ):
        with pytest.raises(SettingsError, match=words):
            images.check_digests(kinds)
    files = rendered(settings, kinds, by_digest)
    cluster = yaml.safe_load(files["rayservice.yaml"])["spec"]["rayClusterConfig"]
    groups = [head_of(files), *cluster["workerGroupSpecs"]]
    found = [
        {one["image"] for key in ("containers", "initContainers") for one in pod.get(key, ())}
        for pod in (group["template"]["spec"] for group in groups)
    ]
    assert found[0] == {by_digest.cpu}
    for kind, images_of_pod in zip(kinds, found[1:], strict=True):
        assert images_of_pod == {by_digest.card if kind.card else by_digest.cpu}


def head_of(files: dict[str, str]) -> dict[str, Any]:
    head: dict[str, Any] = yaml.safe_load(files["rayservice.yaml"])["spec"]["rayClusterConfig"][
        "headGroupSpec"
    ]
    return head


def nodes_of(overlay: str) -> list[NodeKind]:
    return list(read_nodes(ROOT / "k8s" / "overlays" / overlay / "nodes.yaml"))


@over_all
def test_everything_that_pods_refer_to_exists(overlay: str) -> None:
    there = {(one["kind"], one["metadata"]["name"]) for one in built(overlay)}
    there |= {("Secret", name) for name in MADE_BY_HAND}
    services = {one["metadata"]["name"] for one in of_kind(overlay, "Service")}
    for _, pod in pods(overlay):
        for volume in pod.get("volumes", []):
            if secret := volume.get("secret"):
                assert ("Secret", secret["secretName"]) in there
                assert secret["defaultMode"] == 0o440, "keys that others can read are refused"
            if config_map := volume.get("configMap"):
                assert ("ConfigMap", config_map["name"]) in there
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in there
        if account := pod.get("serviceAccountName"):
            assert ("ServiceAccount", account) in there
        for container in pod["containers"]:
            sources = [one["secretRef"]["name"] for one in container.get("envFrom", [])]
            assert {("Secret", name) for name in sources} <= there
        names = {volume["name"] for volume in pod.get("volumes", [])} | {"data"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= names
    redis = ray_service(overlay)["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"]
    assert redis.partition(":")[0] in services
    cache = settings_of(overlay).cache
    if cache and cache.redis_url:
        assert re.split("[:/]+", cache.redis_url)[1] in services


@over_all
def test_policies_and_budgets_select_pods(overlay: str) -> None:
    labels = [given for given, _ in pods(overlay)]

    def selected(selector: dict[str, Any]) -> list[dict[str, str]]:
        return [one for one in labels if one.items() >= selector["matchLabels"].items()]

    for budget in of_kind(overlay, "PodDisruptionBudget"):
        assert {one["octet/role"] for one in selected(budget["spec"]["selector"])} == {"front"}
        fronts = [g for g in worker_groups(overlay) if g["labels"]["octet/role"] == "front"]
        least = sum(group["minReplicas"] for group in fronts)
        assert least > budget["spec"]["minAvailable"], "no node could be drained"
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(overlay, "NetworkPolicy")}
    assert all(selected(policy["podSelector"]) for policy in policies.values())
    assert selected(policies["octet-nobody"]["podSelector"]) == labels, "some are open to all"
    ports = {
        port["name"] for _, pod in pods(overlay) for c in pod["containers"] for port in c["ports"]
    }
    for policy in policies.values():
        for rule in policy.get("ingress", []):
            assert {port["port"] for port in rule.get("ports", [])} <= ports
    for service in of_kind(overlay, "Service"):
        assert selected({"matchLabels": service["spec"]["selector"]})


def test_the_image_has_what_pods_mount_into() -> None:
    dockerfile = (ROOT / "k8s" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / path).exists() for path in line.split())
    for _, pod in pods("mixed-gpu"):
        for mount in (m for c in pod["containers"] for m in c.get("volumeMounts", [])):
            if mount["mountPath"].startswith("/opt/octet"):
                assert f"mkdir -p {mount['mountPath']}" in dockerfile
    assert "\nUSER 1000:1000\n" in dockerfile
    images = re.findall(r"^FROM (\S+:\S+) AS", dockerfile, re.MULTILINE)
    assert len(images) == 2
    assert not any(image.endswith(":latest") for image in images)


# -- faults that are refused ----------------------------------------------------------------------


def render(tmp_path: Path, settings: str | None = None, nodes: str | None = None) -> str:
    """Render the CPU overlay with other settings or nodes; return the command's output."""
    (tmp_path / "settings.yaml").write_text(
        settings or (folder("dev-cpu") / "settings.yaml").read_text()
    )
    (tmp_path / "nodes.yaml").write_text(nodes or (folder("dev-cpu") / "nodes.yaml").read_text())
    command = ["k8s", "render", str(tmp_path / "settings.yaml"), "--overlay", str(tmp_path)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code in (0, 1), result.output
    return result.output


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("auth: none-on-any-address", "auth: none", "auth none: pods are reached from outside"),
        ("data_folder: /var/lib", "data_folder: /home", "data_folder /home/octet/data: no volume"),
        ("data_folder: /var/lib/octet", "data_folder: /etc/octet/settings", "no volume"),
        ("url: postgresql://octet@octet-postgres:5432/octet", "answer_s: 5", "no PostgreSQL"),
        ("secrets/postgres-password", "nowhere/x", "no volume of the pods is mounted there"),
        ("emulate_fp8", "http: {port: 9000}\nemulate_fp8", "port 9000: pods listen on 8000"),
        ("ingress: { num_cpus: 0.3", "ingress: { num_cpus: 30", "Ingress: none of the nodes can"),
        ("num_cpus: 0.3 }\n      -", "num_cpus: 30 }\n      -", "pool landscapes-fp8: none of"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    settings = (folder("dev-cpu") / "settings.yaml").read_text()
    assert old in settings
    assert words in render(tmp_path, settings.replace(old, new, 1))
    assert not (tmp_path / "rendered").exists()


def test_a_database_of_one_node_is_refused(tmp_path: Path) -> None:
    settings = yaml.safe_load((folder("dev-cpu") / "settings.yaml").read_text())
    del settings["store"]
    assert "SQLite is a file of one node" in render(tmp_path, yaml.safe_dump(settings))


def test_weights_of_the_hub_need_a_volume(tmp_path: Path) -> None:
    settings = (folder("mixed-gpu") / "settings.yaml").read_text()
    nodes = (folder("mixed-gpu") / "nodes.yaml").read_text()
    nowhere = settings.replace("models_folder: /var/lib/octet/models\n", "")
    assert "models_folder: must be set" in render(tmp_path, nowhere, nodes)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ("- {name: a, cpus: 2, memory_gib: 4, max_nodes: 1}", "need nodes without a card"),
        ("- {name: a, cpus: 2}", "Field required"),
        ("- {name: a, card: h1000, gpus: 1, cpus: 2, memory_gib: 4, max_nodes: 1}", "h100"),
        ("- {name: a, gpus: 1, cpus: 2, memory_gib: 4, max_nodes: 1}", "belong together"),
        ("- {name: a, cpus: 2, memory_gib: 4, min_nodes: 3, max_nodes: 1}", "more than max_nodes"),
        ("- {name: a, cpu: 2, memory_gib: 4, max_nodes: 1}", "unknown key 'cpu'"),
        ("5", "valid tuple"),
        ("{", "not YAML"),
    ],
)
def test_invalid_nodes_are_refused(tmp_path: Path, nodes: str, words: str) -> None:
    assert words in render(tmp_path, nodes=nodes)


def test_too_few_cards_and_a_node_wait_of_zero_are_reported(tmp_path: Path) -> None:
    settings = (folder("mixed-gpu") / "settings.yaml").read_text()
    nodes = (folder("mixed-gpu") / "nodes.yaml").read_text()
    output = render(tmp_path, settings, nodes.replace("max_nodes: 8, spot", "max_nodes: 2, spot"))
    assert "l4: the nodes have at most 2 cards, and replicas may take 7.914" in output
    assert "h100:" not in output
    few = nodes.replace("cpus: 4", "cpus: 1").replace("cpus: 12", "cpus: 2")
    output = render(tmp_path, settings, few)
    assert "nodes without a card: the nodes have at most 4 CPUs, and replicas may take 5" in output
    assert "h100: the nodes have at most 8 CPUs, and replicas may take 9" in output
    output = render(
        tmp_path,
        settings,
        nodes.replace("min_nodes: 2, max_nodes: 4", "min_nodes: 2, max_nodes: 3"),
    )
    assert "they hold at most 3 Ingresses, 1 each, and there may be 4" in output
    impatient = settings.replace("node_wait_s: 900", "node_wait_s: 0")
    assert "node_wait_s 0: nodes are added only when" in render(tmp_path, impatient, nodes)


def test_kinds_of_nodes_become_worker_groups() -> None:
    spot = NodeKind(name="x", card="l4", gpus=2, cpus=8, memory_gib=32, max_nodes=3, spot=True)
    front = NodeKind(name="front", cpus=4, memory_gib=16, min_nodes=1, max_nodes=2)
    files = rendered(settings_of("mixed-gpu"), [*read_nodes(folder("mixed-gpu") / "nodes.yaml")])
    assert yaml.safe_load(files["settings.yaml"])["data"]["settings.yaml"]
    made = rendered(settings_of("dev-cpu"), [front, spot])
    groups = yaml.safe_load(made["rayservice.yaml"])["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["front", "x"]
    pod = groups[1]["template"]["spec"]
    assert groups[1]["labels"] == {
        "octet/role": "card",
        "octet/card": "l4",
        "octet/precision": "fp8",
    }
    assert pod["nodeSelector"] == {"octet/card": "l4"}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= {t["key"] for t in pod["tolerations"]}
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert not mounts & {"/etc/octet/tenants", "/etc/octet/secrets", "/var/lib/octet/data"}
