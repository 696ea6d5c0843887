"""What Airflow, and a DAG file, see of the package before any task runs."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from keras_remote_airflow import _requirements
from keras_remote_airflow.provider_info import get_provider_info

REPOSITORY = Path(__file__).parents[2]


def run(code, env, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


NEED_AIRFLOW = ["assets", "consumers", "decorators", "links", "operators", "sensors", "triggers"]
AIRFLOW = "apache-airflow"
CORE = "apache-airflow-core"
GOOGLE = "apache-airflow-providers-google"

# -S: nothing of what is installed is seen, only our package and the folder with the distributions.
IMPORT_ALL = """
import importlib, json, sys
sys.path += sys.argv[1:3]
said = {}
for name in sys.argv[3:]:
    try:
        importlib.import_module(f"keras_remote_airflow.{name}")
    except ImportError as exc:
        said[name] = str(exc)
try:
    from keras_remote_airflow import DataUploadOperator
except ImportError as exc:
    said["DataUploadOperator"] = str(exc)
import keras_remote_airflow
# What looks at every name of every module expects nothing else than an AttributeError.
assert not hasattr(keras_remote_airflow, "CacheSensor")
print(json.dumps([said, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def install(folder, **versions):
    """Make distributions of which only the metadata is there."""
    for name, version in versions.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n\nVersion: of a README"
        (info / "METADATA").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("installed", "facts"),
    [
        ({}, [AIRFLOW, _requirements.MIN_AIRFLOW, "none"]),
        ({AIRFLOW: "2.10.5", GOOGLE: "19.0.0"}, [AIRFLOW, _requirements.MIN_AIRFLOW, "2.10.5"]),
        ({AIRFLOW: "2.9.3+composer"}, [AIRFLOW, _requirements.MIN_AIRFLOW, "2.9.3+composer"]),
        ({AIRFLOW: "2.11.0"}, [GOOGLE, _requirements.MIN_GOOGLE_PROVIDER, "none"]),
        ({CORE: "3.3.2"}, [GOOGLE, _requirements.MIN_GOOGLE_PROVIDER, "none"]),
        ({CORE: "3.10.0", GOOGLE: "18.1.0"}, [GOOGLE, _requirements.MIN_GOOGLE_PROVIDER, "18.1.0"]),
    ],
    ids=str,
)
def test_where_it_cannot_work_one_line_says_what_to_install(installed, facts, tmp_path):
    folder = install(tmp_path, **installed)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", IMPORT_ALL, str(REPOSITORY), str(folder), *NEED_AIRFLOW],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said, imported = json.loads(done.stdout)
    assert said.keys() == {*NEED_AIRFLOW, "DataUploadOperator"}
    (message,) = set(said.values())
    assert len(message.splitlines()) == 1
    for fact in [*facts, "pip install 'keras-remote-airflow[airflow]'"]:
        assert fact in message
    assert not {"airflow", "google"}.intersection(imported), "metadata is enough"


@pytest.mark.parametrize("installed", [{}, {AIRFLOW: "2.10.5"}], ids=str)
def test_plugin_and_provider_info_load_where_the_package_cannot_work(installed, tmp_path):
    code = """
import json, sys
sys.path += sys.argv[1:]
from keras_remote_airflow.plugin import KerasRemotePlugin
from keras_remote_airflow.provider_info import get_provider_info
print(json.dumps([KerasRemotePlugin.name, get_provider_info()]))
"""
    folder = install(tmp_path, **installed)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(REPOSITORY), str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    name, info = json.loads(done.stdout)
    assert (name, info["package-name"]) == ("keras_remote", "keras-remote-airflow")
    assert "keras_remote_airflow." not in str(info), "Airflow might import it"


def test_the_lower_bounds_are_those_of_the_extra():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    required = project["dependencies"] + project["optional-dependencies"].get("airflow", [])
    bounds = dict(requirement.split(">=") for requirement in required)
    assert bounds[AIRFLOW] == _requirements.MIN_AIRFLOW
    assert bounds[GOOGLE] == _requirements.MIN_GOOGLE_PROVIDER


STARTED_PYTEST = """
import sys
loaded = sorted(sys.modules)

def pytest_sessionstart(session):
    print("LOADED", *loaded)
"""


def test_starting_pytest_imports_neither_airflow_nor_what_talks_to_cloud_storage(tmp_path):
    (tmp_path / "conftest.py").write_text(STARTED_PYTEST)
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = re.findall(r"^LOADED (.*)$", done.stdout, re.MULTILINE)
    loaded = set(line.split())
    assert "keras_remote_airflow.testing.plugin" in loaded
    # Not "google" itself, which some environments load at start-up as a namespace.
    heavy = {"airflow", "aiohttp", "google_crc32c", "google.auth", "google.cloud.storage"}
    assert not heavy & loaded


# What is seen of the package in one process that has only just imported Airflow.
SEEN = """
import importlib, json, os, pkgutil, sys, warnings

def imported():
    return [name for name in sys.argv[1:] if name in sys.modules and name not in already]

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import keras_remote_airflow._compat
    already = set(sys.modules)
    seen = {}

    import keras_remote_airflow.plugin
    seen["by a plugin"] = imported()

    from keras_remote_airflow import *
    from keras_remote_airflow import consumers, decorators, sensors
    CacheSensor(task_id="a", content_hash="", bucket_name="b")
    DataUploadOperator(task_id="b", data="", bucket_name="b")
    consumers.gcsfuse_pod_kwargs(make_data_ref("gs://bucket/c/", True), "/data")
    seen["by a DAG file"] = imported()

    for default in "true", "false":
        os.environ["AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE"] = default
        importlib.reload(sensors)
        kinds = {}, {"deferrable": True}, {"deferrable": False}
        seen[f"deferrable by default: {default}"] = [
            sensors.CacheSensor(task_id="a", content_hash="", bucket_name="b", **kind).deferrable
            for kind in kinds
        ]

    for module in pkgutil.walk_packages(keras_remote_airflow.__path__, "keras_remote_airflow."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    from keras_remote_airflow._compat import make_gcs_hook
seen["warnings"] = [str(w.message) for w in caught if "keras_remote_airflow" in w.filename]
print(json.dumps(seen))
"""
HEAVY = [
    "airflow.providers.google.cloud.hooks.gcs",
    "aiohttp",
    "google.cloud.storage",
    "google_crc32c",
    "requests",
    "tqdm",
    "keras_remote_airflow.core.disk.hashing",
    "keras_remote_airflow.core.cloud.gcs",
    "keras_remote_airflow.core.cloud.transport",
]


@pytest.fixture(scope="module")
def seen(airflow_home):
    return json.loads(run(SEEN, airflow_home, *HEAVY))


def test_no_module_of_ours_warns_on_import(seen):
    assert seen["warnings"] == []


@pytest.mark.parametrize("user", ["a DAG file", "a plugin"])
def test_neither_a_dag_file_nor_airflow_pays_for_the_google_provider_or_the_transfer_code(
    seen, user
):
    assert seen[f"by {user}"] == []


@pytest.mark.parametrize("default", [True, False])
def test_a_sensor_defers_by_airflows_default_unless_it_is_told(seen, default):
    assert seen[f"deferrable by default: {str(default).lower()}"] == [default, True, False]


BARE = """
import json, sys
import airflow.configuration  # which lists the providers
for name in sys.argv[2:]:
    sys.modules[name] = None  # from here on to import it is an error
from types import SimpleNamespace
from keras_remote_airflow import DataUploadOperator
from keras_remote_airflow.lineage import describe_upload
upload = DataUploadOperator(task_id="upload", data=sys.argv[1], bucket_name="test-bucket")
ti = SimpleNamespace(xcom_push=lambda key, value: None, try_number=1)
print(json.dumps(upload.execute({"ti": ti})))
"""


def test_what_is_optional_is_not_needed(airflow_home, gcs_server, dataset):
    optional = [
        "airflow.providers.cncf.kubernetes",
        "airflow.providers.openlineage",
        "openlineage",
        "statsd",
    ]
    ref = run(BARE, airflow_home | gcs_server.env(), str(dataset), *optional)
    assert json.loads(ref)["is_dir"] is True


@pytest.fixture
def airflow_lists(run_airflow):
    """`airflow_lists("plugins", **env)` returns what Airflow lists, and what it logs besides."""

    def run(*command, **env):
        said = run_airflow(*command, "--output", "json", **env)
        start, end = said.find("[{"), said.rfind("}]") + 2
        assert start >= 0, said
        return json.loads(said[start:end]), said[:start] + said[end:]

    return run


def test_airflow_lists_the_provider(airflow_lists):
    providers, _ = airflow_lists("providers", "list")
    assert "keras-remote-airflow" in [provider["package_name"] for provider in providers]


def test_airflow_passes_over_the_plugin_in_silence_where_the_package_cannot_work(
    airflow_home, tmp_path
):
    folder = install(tmp_path, **{GOOGLE: "18.1.0"})
    path = os.pathsep.join([str(folder), airflow_home["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "airflow", "plugins", "--output", "json"],
        env=airflow_home | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "keras_remote" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("lazy", ["True", "False"])
def test_airflow_lists_the_plugin_whether_or_not_it_loads_those_of_providers(airflow_lists, lazy):
    plugins, log = airflow_lists("plugins", AIRFLOW__CORE__LAZY_DISCOVER_PROVIDERS=lazy)
    assert [plugin["name"] for plugin in plugins].count("keras_remote") == 1, log
    assert "keras_remote" not in log


def test_provider_info_names_things_that_exist():
    from importlib import import_module

    info = get_provider_info()
    decorators = [decorator["class-name"] for decorator in info["task-decorators"]]
    for path in [*info["extra-links"], *decorators]:
        module, _, name = path.rpartition(".")
        assert hasattr(import_module(module), name)
    for group in info["triggers"]:
        for module in group["python-modules"]:
            import_module(module)


@pytest.mark.parametrize("name", ["CacheSensor", "DataUploadOperator"])
def test_every_template_field_is_an_argument(name):
    import inspect

    import keras_remote_airflow

    kind = getattr(keras_remote_airflow, name)
    assert set(kind.template_fields) <= set(inspect.signature(kind).parameters)
