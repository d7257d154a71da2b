"""What `docker/` promises, checked without an engine: linters and schemas, and that its files agree with the code and each other.

Nothing here builds an image or starts a container.
"""

from __future__ import annotations

import ast
import fnmatch
import io
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from serving.arguments import Arguments, settings_of
from serving.settings import Settings
from waver_core import __version__
from waver_core.config import load_config
from waver_core.ray_environment import prepare_private_cluster

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
IN_IMAGE = "/opt/openwaver/"
PLANES = ("curation", "training", "serving")
DEVICES = ("cpu", "cuda")
MODELS = ("text", "base", "refiner", "autoencoder")
API_KEYS = "/etc/openwaver/keys/api_keys.yaml"
MANIFESTS = ("kuberay-curation-rayjob.yaml", "kuberay-training-rayjob.yaml", "kuberay-serving-rayservice.yaml")
GIVEN = {"DATA": "/data", "RAY_AUTH_TOKEN": "token"}


def filled_in(value: Any, **environment: str) -> Any:
    """A value of the compose file with its variables replaced as Compose does: ${A}, ${A-b}, ${A:-b}, ${A:+b}, ${A:?told}."""
    if isinstance(value, dict):
        return {k: filled_in(v, **environment) for k, v in value.items()}
    if isinstance(value, list):
        return [filled_in(v, **environment) for v in value]
    if not isinstance(value, str):
        return value
    given = {**GIVEN, **environment}

    def replaced(found: re.Match[str]) -> str:
        name, operator, word = found.groups()
        if operator == ":+":
            return word if given.get(name) else ""
        if operator == ":-":
            return given.get(name) or word
        if operator == "-":
            return given.get(name, word)
        return given[name]

    return re.sub(r"\$\{(\w+)(?:(:?[-+?])([^}]*))?\}", replaced, value)


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return loaded


def cluster_of(loaded: dict[str, Any]) -> dict[str, Any]:
    cluster: dict[str, Any] = loaded["spec"].get("rayClusterSpec") or loaded["spec"]["rayClusterConfig"]
    return cluster


def pods(loaded: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every pod template of a manifest, by what it is."""
    cluster = cluster_of(loaded)
    found = {"head": cluster["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if "submitterPodTemplate" in loaded["spec"]:
        found["submitter"] = loaded["spec"]["submitterPodTemplate"]
    return found


def every_pod() -> list[Any]:
    found = [(name, role, pod) for name in MANIFESTS for role, pod in pods(manifest(name)).items()]
    return [pytest.param(name, pod, id=f"{name}-{role}") for name, role, pod in found]


# ---- the Dockerfile ----


@pytest.fixture(scope="module")
def stages() -> dict[str, list[dict[str, str]]]:
    """Stage -> its instructions, FROM first."""
    parsed = DockerfileParser(fileobj=io.BytesIO((DOCKER / "Dockerfile").read_bytes())).structure
    found: dict[str, list[dict[str, str]]] = {"": []}
    for step in parsed:
        if step["instruction"] == "FROM":
            found[step["value"].split()[-1]] = []
        if step["instruction"] != "COMMENT":
            list(found.values())[-1].append(step)
    return found


def steps_of(stages: dict[str, list[dict[str, str]]], target: str, device: str) -> list[dict[str, str]]:
    """All instructions that make up the final image of a target, those it builds on first."""
    parent = stages[target][0]["value"].split()[0].replace("${DEVICE}", device)
    return (steps_of(stages, parent, device) if parent in stages else []) + stages[target]


def values(steps: list[dict[str, str]], instruction: str) -> list[str]:
    return [step["value"] for step in steps if step["instruction"] == instruction]


def default_of(stages: dict[str, list[dict[str, str]]], argument: str) -> str:
    found = [
        v.partition("=")[2].strip('"') for steps in stages.values() for v in values(steps, "ARG") if v.startswith(f"{argument}=")
    ]
    assert len(found) == 1, argument
    return found[0]


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "hadolint"
    return subprocess.run([program, "--no-color", path], capture_output=True, text=True, check=False)


def test_dockerfile_passes_hadolint() -> None:
    done = hadolint(DOCKER / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_tell_of_an_image_without_tag(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install numpy\n")
    told = hadolint(tmp_path / "Dockerfile")
    assert told.returncode != 0
    assert {"DL3006", "DL3013"} <= set(re.findall(r"DL\d{4}", told.stdout))


def test_every_stage_builds_on_another_or_on_a_python_pinned_to_the_patch(stages: dict[str, list[dict[str, str]]]) -> None:
    named = set(stages)
    for name in filter(None, stages):
        base = stages[name][0]["value"].split()[0]
        assert base == "python:${PYTHON_TAG}" or {base.replace("${DEVICE}", d) for d in DEVICES} <= named, name
    version = re.fullmatch(r"(\d+\.\d+\.\d+)-slim-bookworm", default_of(stages, "PYTHON_TAG"))
    assert version is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(version[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plane", PLANES)
def test_image_runs_its_plane_as_a_user_without_rights(stages: dict[str, list[dict[str, str]]], plane: str, device: str) -> None:
    steps = steps_of(stages, plane, device)
    assert values(steps, "USER")[-1] == "1000:1000"
    copied = {source for value in values(steps, "COPY") for source in value.split()[:-1]}
    assert copied & set(PLANES) == {plane}, "an image has the code of its plane only"
    command = yaml.safe_load(values(steps, "CMD")[-1])
    assert command[0] == "python"
    assert (ROOT / command[1].removeprefix(IN_IMAGE)).is_file()
    assert "RAY_AUTH_MODE=token" in " ".join(values(steps, "ENV"))
    gpu = "NVIDIA_VISIBLE_DEVICES" in " ".join(values(steps, "ENV"))
    assert gpu == (device == "cuda")


def copied_from_the_tree(stages: dict[str, list[dict[str, str]]]) -> set[str]:
    lines = [shlex.split(v) for steps in stages.values() for v in values(steps, "COPY")]
    return {source for line in lines if not line[0].startswith("--from") for source in line[:-1]}


def ignored(path: str) -> bool:
    """Whether Docker's rules keep a path out of the build context: the last pattern that matches it decides."""
    out = False
    parts = path.split("/")
    for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        if pattern.startswith("**/"):
            hit = any(fnmatch.fnmatchcase(part, pattern[3:]) for part in parts)
        else:
            hit = any(fnmatch.fnmatchcase("/".join(parts[: n + 1]), pattern) for n in range(len(parts)))
        if hit:
            out = not line.startswith("!")
    return out


def test_what_is_copied_exists_and_reaches_the_build(stages: dict[str, list[dict[str, str]]]) -> None:
    sources = copied_from_the_tree(stages)
    assert {"pyproject.toml", "constraints.txt", "pipelines.yaml", *PLANES} <= sources
    assert [source for source in sorted(sources) if not (ROOT / source).exists() or ignored(source)] == []
    assert not ignored("serving/api/keys.py")


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".git/config",
        "out/a.mp4",
        "tests/conftest.py",
        "docker/compose.yaml",
        "serving/.env",
        "curation/__pycache__/a.pyc",
    ],
)
def test_nothing_else_reaches_the_build(path: str) -> None:
    assert ignored(path)


def test_packages_are_pinned_and_those_of_developers_left_out(stages: dict[str, list[dict[str, str]]]) -> None:
    installs = [v for steps in stages.values() for v in values(steps, "RUN") if "pip install" in v]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
    extras = set(default_of(stages, "EXTRAS").split(","))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"]
    assert extras <= set(known) - {"dev"}, "pip only warns of an extra that does not exist"
    names = {Requirement(text).name for text in [*project["dependencies"], *(text for extra in extras for text in known[extra])]}
    assert {"psycopg", "transformers", "ray"} <= names
    assert not names & {"pytest", "mypy", "ruff", "opencv-python"}


# ---- the compose file ----


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


def test_compose_files_keep_to_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    files = [DOCKER / "compose.yaml", DOCKER / "compose.cuda.yaml"]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_gives_every_ray_process_the_token(compose: dict[str, Any]) -> None:
    for plane in PLANES:
        given = compose["services"][plane]["environment"]
        assert given["RAY_AUTH_MODE"] == "token", plane
        assert given["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?"), f"{plane}: the token is never written down"


def test_compose_services_are_closed_and_limited(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {*PLANES, "postgres"}
    for name, service in compose["services"].items():
        assert service["profiles"] == [name], "nothing starts unasked"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        # Compose can neither mount inline `configs` nor secrets from the environment where the root is read-only.
        assert "configs" not in service
    assert all(set(secret) == {"file"} for secret in compose["secrets"].values())


@pytest.mark.parametrize("device", DEVICES)
def test_compose_builds_the_images_of_the_dockerfile(
    compose: dict[str, Any], stages: dict[str, list[dict[str, str]]], device: str
) -> None:
    for plane in PLANES:
        service = filled_in(compose["services"][plane], DEVICE=device)
        assert service["image"] == f"openwaver/{plane}:{__version__}-{device}"
        build = service["build"]
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
        assert build["target"] == plane and plane in stages
        assert build["args"]["DEVICE"] == device
        assert default_of(stages, "TORCH_CPU_INDEX") == build["args"]["TORCH_CPU_INDEX"] == ""


def test_gpus_are_given_to_services_that_exist(compose: dict[str, Any]) -> None:
    with_gpus = yaml.safe_load((DOCKER / "compose.cuda.yaml").read_text())["services"]
    assert set(with_gpus) == set(PLANES)
    for service in with_gpus.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"


def test_volumes_and_secrets_that_services_use_are_declared(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        mounts = service["volumes"]
        named = {mount["source"] for mount in mounts if mount["type"] == "volume" and "source" in mount}
        assert named <= set(compose["volumes"])
        assert all(mount["bind"] == {"create_host_path": False} for mount in mounts if mount["type"] == "bind")
        assert {secret["source"] for secret in service.get("secrets", [])} <= set(compose["secrets"])
    (secret,) = compose["services"]["serving"]["secrets"]
    assert secret["target"] == API_KEYS


# ---- commands ----


def entry_of(command: str) -> tuple[str, list[str]]:
    """Path in the tree and arguments of `python /opt/openwaver/<path> ...`."""
    python, path, *arguments = shlex.split(command)
    assert python == "python" and path.startswith(IN_IMAGE)
    assert (ROOT / path.removeprefix(IN_IMAGE)).is_file()
    return path.removeprefix(IN_IMAGE), arguments


def parsed(app: typer.Typer, arguments: list[str]) -> dict[str, Any]:
    """The options as the script's own command line reads them; nothing is run."""
    with typer.main.get_command(app).make_context("test", list(arguments)) as context:
        assert not context.args
        return context.params


CURATION = ("", "--profile tiny", "--profile small --set funnel.passes.scores.gpus=0.5")
TRAINING = ("", "--profile full --workers 8 --set training.parallel.shard=8")


def curation_commands() -> list[str]:
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["curation"]
    given = [filled_in(service["command"], CURATION_ARGS=extra) for extra in CURATION]
    return [*given, manifest("kuberay-curation-rayjob.yaml")["spec"]["entrypoint"]]


def training_commands() -> list[str]:
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["training"]
    given = [filled_in(service["command"], TRAINING_ARGS=extra) for extra in TRAINING]
    return [*given, manifest("kuberay-training-rayjob.yaml")["spec"]["entrypoint"]]


@pytest.mark.parametrize("command", curation_commands())
def test_curation_takes_the_command(command: str) -> None:
    from curation.gates import tier_gates
    from curation.run_funnel import app
    from curation.stage import load_stages

    path, arguments = entry_of(command)
    assert path == "curation/run_funnel.py"
    options = parsed(app, arguments)
    assert options["input_uri"] == "/data/videos" and options["output"] == "/data/curated"
    settings = load_config(None, options["profile"] or [], options["set_"] or [])
    assert tier_gates(settings, load_stages(settings))


@pytest.mark.parametrize("command", training_commands())
def test_training_takes_the_command_and_its_workers_fit(command: str) -> None:
    from training.command_line import recipe_of
    from training.parallel.mesh import plan_mesh
    from training.stage import app

    path, arguments = entry_of(command)
    assert path == "training/stage.py"
    options = parsed(app, arguments)
    assert options["curated"] == ["/data/curated"] and options["output"] == "/data/training"
    sets = [*(options["set_"] or []), *([f"training.workers.count={options['workers']}"] if options["workers"] else [])]
    recipe = recipe_of(options["stage"], None, options["profile"], sets)
    plan = plan_mesh(recipe.workers.count, 24, recipe.parallel.shard, recipe.parallel.sequence)
    assert plan.world == recipe.workers.count


def test_training_workers_find_room_in_their_pods() -> None:
    from training.command_line import recipe_of
    from training.stage import app

    loaded = manifest("kuberay-training-rayjob.yaml")
    options = parsed(app, entry_of(loaded["spec"]["entrypoint"])[1])
    recipe = recipe_of(
        options["stage"], None, options["profile"], [*options["set_"], f"training.workers.count={options['workers']}"]
    )
    (group,) = cluster_of(loaded)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] * int(limits["nvidia.com/gpu"]) == recipe.workers.count * recipe.workers.gpus
    assert group["replicas"] * int(limits["cpu"]) >= recipe.workers.count * recipe.workers.cpus


# ---- serving ----


def serving_command(**environment: str) -> str:
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["serving"]
    return str(filled_in(service["command"], **environment))


def settings_of_command(command: str) -> Settings:
    """What serving/run.py makes of its command line in a container."""
    from serving.run import app

    path, arguments = entry_of(command)
    assert path == "serving/run.py"
    given = parsed(app, arguments)
    assert (given["host"], given["port"]) == ("0.0.0.0", 8000)
    names = ",".join(given["profile"] or ["embedded"])
    return settings_of(Arguments(profile=names, set=given["overrides"] or [], base=given["base"], refiner=given["refiner"]))


def settings_of_config(text: str) -> Settings:
    """What the app's builder makes of a Serve config, once Ray's own schema has taken it."""
    prepare_private_cluster()  # Ray reads its environment when it is imported, and other tests start one
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)
    assert (application.name, application.route_prefix) == ("waver", "/")
    assert application.deployments == [], "scaling is in our own settings"
    module, _, builder = application.import_path.partition(":")
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert builder in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    return settings_of(Arguments.model_validate(application.args))


def every_serving(stages: dict[str, list[dict[str, str]]]) -> dict[str, Settings]:
    """The settings of each way to serve that is written down here."""
    return {
        "image": settings_of_command(shlex.join(yaml.safe_load(values(stages["serving"], "CMD")[-1]))),
        "compose": settings_of_command(serving_command()),
        "serve.yaml": settings_of_config((DOCKER / "serve.yaml").read_text()),
        "kuberay": settings_of_config(manifest("kuberay-serving-rayservice.yaml")["spec"]["serveConfigV2"]),
    }


def test_all_ways_to_serve_agree_on_folders_and_keys(stages: dict[str, list[dict[str, str]]]) -> None:
    for name, settings in every_serving(stages).items():
        assert settings.cascade.base is not None and settings.cascade.base.startswith("/checkpoints/"), name
        assert settings.storage.folder == "/jobs", name
        assert settings.http.api_keys == API_KEYS, name


def test_compose_serves_the_tiny_model_on_cpus_and_sqlite() -> None:
    settings = settings_of_command(serving_command())
    assert settings.cascade.base == "/checkpoints/t2v_192p_12fps/export"
    assert settings.cascade.refiner is None
    assert settings.database_url == "sqlite:////jobs/jobs.sqlite"
    assert {settings.deployments.base.gpus, settings.deployments.autoencoder.gpus} == {0}
    assert settings.deployments.base.ranks == 1


def test_compose_takes_other_settings_from_the_environment() -> None:
    url = "postgresql+psycopg://waver@postgres/waver"
    given = {"BASE": "sft/export", "REFINER": "refine_1080p/export", "DATABASE_URL": url, "GPU_SHARE": "0.25"}
    command = serving_command(**given, SERVING_ARGS="--set serving.queue.max_queued=8 --set serving.deployments.base.gpus=1")
    settings = settings_of_command(command)
    assert settings.cascade.base == "/checkpoints/sft/export"
    assert settings.cascade.refiner == "/checkpoints/refine_1080p/export"
    assert settings.database_url == url
    assert settings.queue.max_queued == 8
    models = [getattr(settings.deployments, name).gpus for name in MODELS]
    assert models == [0.25, 1, 0.25, 0.25], "the last one wins"


def test_compose_serves_the_sizes_of_the_report_without_a_profile() -> None:
    assert settings_of_command(serving_command(PROFILE="")).deployments.base.ranks == 8


# ---- KubeRay ----


@pytest.mark.parametrize(("name", "pod"), every_pod())
def test_pod_is_valid_closed_and_limited(name: str, pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "test"}, "spec": spec}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= set(container["resources"]["limits"]) & set(container["resources"]["requests"])
    plane = name.split("-")[1]
    assert re.fullmatch(rf"openwaver/{plane}:{re.escape(__version__)}-(cpu|cuda)", container["image"])
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert not gpus or container["image"].endswith("-cuda")
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) <= {volume["name"] for volume in spec["volumes"]}
    assert mounted["scratch"] == "/tmp"


def test_a_pod_with_a_misspelt_field_would_be_told() -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "test"},
        "spec": {"containers": [{"name": "a", "imagine": "b"}]},
    }
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_claims_are_valid_and_those_that_pods_mount() -> None:
    claims = list(yaml.safe_load_all((DOCKER / "kuberay-storage.yaml").read_text()))
    for claim in claims:
        kubernetes_validate.validate(claim, kubernetes_validate.latest_version(), strict=True)
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = [v for name in MANIFESTS for pod in pods(manifest(name)).values() for v in pod["spec"]["volumes"]]
    mounted = {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v}
    assert mounted == {claim["metadata"]["name"] for claim in claims}


@pytest.mark.parametrize("name", MANIFESTS)
def test_cluster_takes_the_token_from_a_secret_and_names_the_pinned_ray(name: str) -> None:
    loaded = manifest(name)
    cluster = cluster_of(loaded)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "openwaver-ray-token"}
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = cluster["workerGroupSpecs"]
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups)
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    assert any("nvidia.com/gpu" in limit for limit in limits), "a group with GPUs"


def test_serving_pods_are_probed_and_have_what_the_settings_name() -> None:
    loaded = manifest("kuberay-serving-rayservice.yaml")
    settings = settings_of_config(loaded["spec"]["serveConfigV2"])
    for role, pod in pods(loaded).items():
        (container,) = pod["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == 8000
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        probe = container["readinessProbe"]["httpGet"]
        assert probe == ({"path": "/api/healthz", "port": 52365} if role == "head" else {"path": "/healthz", "port": 8000})
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert mounts["/checkpoints"]["readOnly"] is True
        assert not mounts[settings.storage.folder].get("readOnly")
        assert mounts[str(Path(API_KEYS).parent)]["readOnly"] is True
        assert [variable["name"] for variable in container["env"]] == ["PGPASSWORD"]
    assert re.fullmatch(r"postgresql\+psycopg://\w+@[\w-]+/\w+", settings.database_url), "no password in it"


def test_serving_fits_into_its_pod_and_uses_all_gpus() -> None:
    from serving.deployments import options_of

    loaded = manifest("kuberay-serving-rayservice.yaml")
    parts = settings_of_config(loaded["spec"]["serveConfigV2"]).deployments
    cpus, gpus = 0.0, 0.0
    for name in (*MODELS, "http", "dispatcher", "rewriter"):
        options = options_of(getattr(parts, name), name=name, ongoing=1)
        actor = options["ray_actor_options"]
        bundles = options.get("placement_group_bundles", [{"CPU": actor["num_cpus"], "GPU": actor["num_gpus"]}])
        cpus += options["num_replicas"] * sum(bundle["CPU"] for bundle in bundles)
        gpus += options["num_replicas"] * sum(bundle.get("GPU", 0) for bundle in bundles)
    limits = pods(loaded)["gpu"]["spec"]["containers"][0]["resources"]["limits"]
    assert gpus == int(limits["nvidia.com/gpu"])
    assert cpus <= int(limits["cpu"])


# ---- all of them ----


def test_port_is_the_same_everywhere(stages: dict[str, list[dict[str, str]]], compose: dict[str, Any]) -> None:
    port = yaml.safe_load((DOCKER / "serve.yaml").read_text())["http_options"]["port"]
    assert values(stages["serving"], "EXPOSE") == [str(port)]
    (health,) = values(stages["serving"], "HEALTHCHECK")
    assert f"http://127.0.0.1:{port}/healthz" in health
    assert f"--port={port}" in yaml.safe_load(values(stages["serving"], "CMD")[-1])
    (published,) = filled_in(compose["services"]["serving"]["ports"])
    assert published == f"127.0.0.1:{port}:{port}"


@pytest.mark.parametrize("path", sorted(DOCKER.iterdir()), ids=lambda path: path.name)
def test_no_secret_no_host_and_no_floating_tag(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r":latest\b", text)
    assert "https://" not in text, "images and packages come from wherever the user's tools look"
    assert not re.search(r"^kind: Secret", text, re.MULTILINE), "secrets are made by a command and never stand in a file"
    for plane, tag in re.findall(r"openwaver/(\w+):(\S+)", text):
        assert plane in PLANES
        assert re.fullmatch(rf"{re.escape(__version__)}-(cpu|cuda|\$\{{DEVICE:-cpu\}})", tag), tag
