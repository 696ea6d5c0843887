"""Hand a dataset over to a training task, in one line for each kind of task.

    GKEStartPodOperator(..., **gcsfuse_pod_kwargs(upload, "/data"))
    CreateCustomJobOperator(..., **vertex_custom_job_kwargs(upload, custom_job))

Every function returns keyword arguments for an operator. They make that task depend on the upload,
and give its container two environment variables (with `name="train"`: KERAS_REMOTE_TRAIN_PATH):

    KERAS_REMOTE_DATA_PATH  the directory: the dataset itself, or the one that holds the single file
    KERAS_REMOTE_DATA_REF   the ref, as JSON

`upload` is always a DataUploadOperator, a CacheSensor, any other task that returns a ref, such a
task's `.output`, or a ref that is known when the DAG is written. Values from a task's output are
filled in when templates are rendered.

A keras-kinetic function doesn't need these functions: with `layout="kinetic"` it takes the ref.
(docs/consumers.md has all of this as a cookbook.)
"""

import json
import os
import posixpath
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from keras_remote_airflow._compat import Context, ResolveMixin
from keras_remote_airflow.arguments import refuse_several, to_template
from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.refs import REF_VARIABLE, DataRef, parse_data_ref
from keras_remote_airflow.failures import permanent_errors_fail_the_task

# Where an init container sees the volume. The data goes into a directory inside, because a mount
# point cannot be renamed into place.
_VOLUME_PATH = "/keras-remote"
_STARTUP_TIMEOUT = 3600  # seconds
_MAP_BOTH = "put both tasks into a task group, and map that"
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


def gcsfuse_pod_kwargs(
    upload: Any,
    mount_path: str | os.PathLike[str] | None = None,
    *,
    name: str = "data",
    mount_options: str = "",
    user_project: str | None = None,
    add_to: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Mount the dataset read-only with Cloud Storage FUSE, for a pod on GKE.

    For KubernetesPodOperator, GKEStartPodOperator and @task.kubernetes. Nothing is copied and
    nothing is verified: the container reads the objects below the dataset's prefix, and no others.

    Args:
        upload: the dataset, see the module.
        mount_path: absolute path of the dataset in the container; None takes that of the ref.
        name: tells several datasets of one pod apart: a DNS label, at most 32 characters.
        mount_options: further mount options of Cloud Storage FUSE, separated by commas.
        user_project: id of the project to bill for reads, if the bucket uses Requester Pays.
        add_to: keyword arguments of the operator to add to, such as another call's, or
            {"pod_template_dict": ...} with a template of your own. They are not changed.

    Returns:
        `add_to` with `pod_template_dict`.
    """
    source = _parse_upload(upload)
    pod = _Pod(add_to, name)
    pod.metadata.setdefault("annotations", {})["gke-gcsfuse/volumes"] = "true"
    billing = f"billing-project={user_project}" if user_project else ""
    more = ",".join(filter(None, [billing, mount_options]))
    attributes = {
        "bucketName": _fill_in(source, "bucket", lambda ref: ref.bucket),
        "mountOptions": _fill_in(source, "mount options", lambda ref: _mount_options(ref, more)),
    }
    csi = {
        "driver": "gcsfuse.csi.storage.gke.io",
        "readOnly": True,
        "volumeAttributes": attributes,
    }
    pod.add(source, {"csi": csi}, mount_path)
    return pod.kwargs


def materialize_pod_kwargs(
    upload: Any,
    mount_path: str | os.PathLike[str] | None = None,
    *,
    image: str,
    name: str = "data",
    volume: Mapping[str, Any] | None = None,
    container: Mapping[str, Any] | None = None,
    user_project: str | None = None,
    add_to: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Download and verify the dataset in an init container, for a pod on any cluster.

    For KubernetesPodOperator, GKEStartPodOperator and @task.kubernetes. The training container
    starts only if the data is, byte for byte, what the ref names, and sees it read-only.

    Args:
        upload: the dataset, see the module.
        mount_path: absolute path of the dataset in the container; None takes that of the ref.
        image: an image for the init container that has this package; it needs no Airflow.
        name: tells several datasets of one pod apart: a DNS label, at most 32 characters.
        volume: the source of the volume that holds the data, as in a pod's YAML; None is an
            emptyDir, on the disk of the node.
        container: more fields of the init container, as in a pod's YAML, such as `resources`.
        user_project: id of the project to bill for the download, see `connection`.
        add_to: as for `gcsfuse_pod_kwargs`.

    Returns:
        `add_to` with `pod_template_dict`; `init_container_logs`, so that what goes wrong shows in
        the task's log; and `startup_timeout_seconds`, unless it has that: an hour, because the pod
        counts as starting while it downloads (the operator's own default is two minutes).
    """
    source = _parse_upload(upload)
    pod = _Pod(add_to, name)
    dest = posixpath.join(_VOLUME_PATH, "data")
    init: dict[str, Any] = {
        "name": pod.label,
        "image": image,
        "command": [*_command(user_project), dest],
        **_copy_tree(container or {}),
    }
    init.setdefault("env", []).extend(_env(source, {REF_VARIABLE: _to_json}))
    init.setdefault("volumeMounts", []).append({"name": pod.label, "mountPath": _VOLUME_PATH})
    pod.spec.setdefault("initContainers", []).append(init)
    pod.add(source, volume or {"emptyDir": {}}, mount_path, subPath=posixpath.basename(dest))
    pod.kwargs["init_container_logs"] = True
    pod.kwargs.setdefault("startup_timeout_seconds", _STARTUP_TIMEOUT)
    return pod.kwargs


def vertex_command_kwargs(
    upload: Any,
    command: Sequence[Any],
    *,
    name: str = "data",
    materialize_at: str | os.PathLike[str] | None = None,
    user_project: str | None = None,
) -> dict[str, Any]:
    """Hand the dataset to a Vertex AI training job that is described by its container's command.

    For CreateCustomContainerTrainingJobOperator, whose `args` and `environment_variables` are not
    templated. The image needs `env`, as practically every image has it.

    Args:
        upload: the dataset, see the module.
        command: what the container is to run. The operator's `args` still follow.
        name: tells several datasets of one job apart: a DNS label, at most 32 characters.
        materialize_at: absolute path in the container that becomes the dataset, downloaded and
            verified before the command is run (the image needs `sh` and this package); None
            reads it through the mount at /gcs, unverified.
        user_project: id of the project to bill for the download, see `connection`;
            only with `materialize_at`.

    Returns:
        `command`.
    """
    source = _parse_upload(upload)
    variables, first = _vertex_parts(name, materialize_at, user_project)
    assignments = [
        _fill_in(source, variable, partial(_assign, variable, make))
        for variable, make in variables.items()
    ]
    return {"command": ["env", *assignments, *first, *command]}


def vertex_custom_job_kwargs(
    upload: Any,
    custom_job: Mapping[str, Any],
    *,
    name: str = "data",
    materialize_at: str | os.PathLike[str] | None = None,
    user_project: str | None = None,
) -> dict[str, Any]:
    """Hand the dataset to every worker of a Vertex AI custom job.

    For CreateCustomJobOperator.

    Args:
        upload: the dataset, see the module.
        custom_job: the job, as a dict. It is not changed. For several datasets, pass the job that
            another call returned.
        name: tells several datasets of one job apart: a DNS label, at most 32 characters.
        materialize_at: absolute path in the containers that becomes the dataset, downloaded and
            verified before their commands are run (every worker pool needs a `container_spec` with
            a `command`, its image needs `sh` and this package); None reads it through the mount at
            /gcs, unverified.
        user_project: as for `vertex_command_kwargs`.

    Returns:
        `custom_job`.
    """
    source = _parse_upload(upload)
    # Not deepcopy: it would copy the tasks that an earlier call's values are to be filled in from.
    job = _copy_tree(custom_job)
    variables, first = _vertex_parts(name, materialize_at, user_project)
    pools = (job.get("job_spec") or {}).get("worker_pool_specs") if isinstance(job, dict) else None
    if not pools:
        raise InvalidInputError(
            f"custom_job is a {type(custom_job).__name__} without job_spec and worker_pool_specs: "
            "pass the job as a dict, with a container_spec"
        )
    for number, pool in enumerate(pools):
        spec = pool.get("container_spec") or pool.get("python_package_spec")
        if spec is None:
            if not pool:
                continue  # Vertex AI's way to leave a pool out
            raise InvalidInputError(
                f"worker pool {number} of custom_job has neither a container_spec nor a "
                "python_package_spec: give it one of them"
            )
        env = spec.setdefault("env", [])
        if any(entry["name"] in variables for entry in env):
            raise InvalidInputError(
                f"custom_job has a dataset named {name!r} already: pass another name"
            )
        env += _env(source, variables)
        if first:
            if not spec.get("command"):
                raise InvalidInputError(
                    f"worker pool {number} of custom_job names no command, so nothing can be run "
                    "before it: give its container_spec the image's entrypoint as `command`, or "
                    "leave out materialize_at"
                )
            spec["command"] = [*first, *spec["command"]]
    return {"custom_job": job}


class _FilledIn(ResolveMixin):
    """Text that is made of the upload's ref when the task's templates are rendered.

    Airflow treats it as an XComArg, so it sets the dependency. That works in a mapped task group
    too, where a Jinja template would need the map index.
    """

    def __init__(self, output: Any, what: str, make: Callable[[DataRef], str]) -> None:
        self._output = output
        self._what = what
        self._make = make

    def iter_references(self) -> Any:
        return self._output.iter_references()

    def resolve(self, context: Context, **_: Any) -> str:
        with permanent_errors_fail_the_task():
            value = self._output.resolve(context)
            refuse_several("upload", value, _MAP_BOTH)
            return self._make(parse_data_ref(value))

    def __repr__(self) -> str:
        # Goes into the serialized DAG, so it must be the same at every parse.
        tasks = ", ".join(task.task_id for task, _ in self.iter_references())
        return f"<{self._what} from {tasks}>"


def _parse_upload(upload: Any) -> DataRef | ResolveMixin:
    """Return the ref, or the output that will be one when templates are rendered."""
    refuse_several("upload", upload, _MAP_BOTH)
    if isinstance(upload, Mapping | str):
        return parse_data_ref(upload)
    output = upload if isinstance(upload, ResolveMixin) else getattr(upload, "output", None)
    if not isinstance(output, ResolveMixin):
        raise InvalidInputError(
            f"upload is a {type(upload).__name__}; expected a DataUploadOperator, a CacheSensor, "
            "the output of a task that returns a ref, or a ref"
        )
    return output


def _fill_in(source: DataRef | ResolveMixin, what: str, make: Callable[[DataRef], str]) -> Any:
    return make(source) if isinstance(source, DataRef) else _FilledIn(source, what, make)


class _Pod:
    """A copy of an operator's keyword arguments, with a pod template to add a dataset to."""

    def __init__(self, kwargs: Mapping[str, Any] | None, name: str) -> None:
        _check_name(name)
        self.label = f"keras-remote-{name}"
        self._name = name
        self.kwargs = dict(kwargs or {})
        if self.kwargs.get("pod_template_file"):
            raise InvalidInputError(
                "pod_template_file makes the operator ignore the template this function returns: "
                "load the file and pass its content as pod_template_dict in add_to"
            )
        template = _copy_tree(self.kwargs.get("pod_template_dict") or {})
        self.kwargs["pod_template_dict"] = template
        self.metadata = template.setdefault("metadata", {})
        self.spec = template.setdefault("spec", {})
        # The operator merges its own container with the template's first, and names it.
        containers = self.spec.setdefault("containers", [])
        if not containers:
            containers.append({"name": "base"})
        self._base = containers[0]

    def add(
        self,
        source: DataRef | ResolveMixin,
        volume: Mapping[str, Any],
        mount_path: Any,
        **mount: Any,
    ) -> None:
        volumes = self.spec.setdefault("volumes", [])
        if any(volume["name"] == self.label for volume in volumes):
            raise InvalidInputError(
                f"the pod has a dataset named {self._name!r} already: pass another name"
            )
        volumes.append({"name": self.label, **volume})
        where = _absolute("mount_path", mount_path) or _fill_in(source, "mount path", _mount_path)
        self._base.setdefault("volumeMounts", []).append(
            {"name": self.label, "mountPath": where, "readOnly": True, **mount}
        )
        path, ref = _variables(self._name)
        self._base.setdefault("env", []).append({"name": path, "value": where})
        self._base["env"] += _env(source, {ref: _to_json})


def _variables(name: str) -> tuple[str, str]:
    stem = f"KERAS_REMOTE_{name.upper().replace('-', '_')}"
    return f"{stem}_PATH", f"{stem}_REF"


def _check_name(name: str) -> None:
    if not _DNS_LABEL.fullmatch(name):
        raise InvalidInputError(
            f"invalid name {name!r}: expected at most 32 lower-case letters, digits and hyphens, "
            "such as 'train'"
        )


def _vertex_parts(
    name: str, materialize_at: Any, user_project: str | None
) -> tuple[dict[str, Callable[[DataRef], str]], list[str]]:
    """Return how to make the variables of a ref, and the start of the container's command."""
    _check_name(name)
    where = _absolute("materialize_at", materialize_at)
    path, ref = _variables(name)
    variables: dict[str, Callable[[DataRef], str]] = {
        path: lambda data_ref: where or _gcs_path(data_ref),
        ref: _to_json,
    }
    if not where:
        if user_project:
            raise InvalidInputError(
                "user_project is for downloads: pass materialize_at too, or leave it out"
            )
        return variables, []
    # No $(...): Vertex AI takes it for a reference to an environment variable. The command prints
    # a path, which would be taken for output of the job's own.
    script = f'{shlex.join(_command(user_project))} "${ref}" "${path}" >&2 && exec "$@"'
    return variables, ["sh", "-c", script, "sh"]


def _absolute(name: str, path: Any) -> str | None:
    text: str | None = to_template(name, path)
    if text is not None and not text.startswith("/"):
        raise InvalidInputError(f"expected an absolute path, found {name}={text!r}")
    return text


def _command(user_project: str | None) -> list[str]:
    options = ["--user-project", user_project] if user_project else []
    return ["python", "-m", "keras_remote_airflow", "get", *options]


def _env(
    source: DataRef | ResolveMixin, makes: Mapping[str, Callable[[DataRef], str]]
) -> list[dict[str, Any]]:
    return [{"name": name, "value": _fill_in(source, name, make)} for name, make in makes.items()]


def _assign(variable: str, make: Callable[[DataRef], str], ref: DataRef) -> str:
    return f"{variable}={make(ref)}"


def _to_json(ref: DataRef) -> str:
    return _escaped(json.dumps(ref.to_dict()))


def _mount_path(ref: DataRef) -> str:
    if not ref.mount_path or not ref.mount_path.startswith("/"):
        raise InvalidInputError(
            f"expected an absolute path, found mount_path={ref.mount_path!r} in the ref: pass "
            "mount_path, or set it on the upload"
        )
    return ref.mount_path


def _gcs_path(ref: DataRef) -> str:
    return _escaped(posixpath.join("/gcs", ref.bucket, _folder(ref)))


def _mount_options(ref: DataRef, more: str) -> str:
    folder = _folder(ref)
    if "," in folder:
        raise InvalidInputError(
            f"Cloud Storage FUSE cannot mount {ref.gcs_uri} alone: its mount options are separated "
            "by commas. Choose a namespace_prefix without one."
        )
    # implicit-dirs: the cache has no objects that stand for directories.
    return ",".join(filter(None, ["implicit-dirs", folder and f"only-dir={folder}", more]))


def _folder(ref: DataRef) -> str:
    """Return the prefix in the bucket that is the dataset or holds the single file."""
    return ref.object_name.rstrip("/") if ref.is_prefix else posixpath.dirname(ref.object_name)


def _escaped(text: str) -> str:
    """Keep Kubernetes, and Vertex AI on top of it, from expanding `$(NAME)`."""
    return text.replace("$", "$$")


def _copy_tree(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy_tree(item) for item in value]
    return value
