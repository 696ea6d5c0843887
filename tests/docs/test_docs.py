"""What the documentation shows is run, and what it points to is there.

By the language of a fenced block in a page:

    python   executed, the blocks of a page one after the other as one script. A block that begins
             with a comment naming a file is saved there instead; files under tests/ are run by
             pytest. Blocks with @dag are DAG files, and parsed by Airflow, unless they need the
             Kubernetes provider and it is not installed; those that need nothing but a worker are
             run too, with data and a bucket that are there. (On Airflow 2 an import from
             airflow.sdk is replaced by the one its comment names.)
    console  run by bash, the blocks of a page in one session. The output shown must be found in
             the command's; "…" stands for anything. `make` runs with --dry-run: the real thing is
             what .ci/run does. For consumers.md there is a dataset, and its ref in REF.
    json     must be JSON.
    shell    not run: needs Google Cloud, or a network to install from.
    text     not run: for reading.
"""

import ast
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import keras_remote_airflow
from keras_remote_airflow import Data, make_data_ref, upload_data
from keras_remote_airflow.core import errors
from keras_remote_airflow.core.cloud.retry import REMEDIES
from keras_remote_airflow.core.layout import KERAS_REMOTE, CacheKey, parse_marker
from keras_remote_airflow.testing import StorageServer

from .messages import ENDINGS, read_messages, read_texts
from .pages import (
    PAGES,
    REPOSITORY,
    Block,
    anchor,
    read_blocks,
    read_commands,
    read_headings,
    read_prose,
)

LANGUAGES = {"python", "console", "json", "shell", "text"}
DOCS = REPOSITORY / "docs"
TROUBLESHOOTING = DOCS / "troubleshooting.md"
MKDOCS = REPOSITORY / "mkdocs.yml"

SaveDag = Callable[[str, str], Path]
Definition = ast.ClassDef | ast.FunctionDef


def _id(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


every_page = pytest.mark.parametrize("page", PAGES, ids=_id)


def _pages_with(wanted: Callable[[Block], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "page", [page for page in PAGES if any(map(wanted, read_blocks(page)))], ids=_id
    )


def _is_script(block: Block) -> bool:
    return block.language == "python" and not (block.file_name or block.is_dag_file)


@pytest.fixture
def environment() -> dict[str, str]:
    """Environment of a subprocess: this Python first, and nothing set that a reader has not set."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(
            ("AIRFLOW", "GOOGLE_", "KERAS_REMOTE_", "STORAGE_EMULATOR", "PYTEST_")
        )
    }
    return inherited | {
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        "PYTHONPATH": str(REPOSITORY),
        "AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY": "True",  # 2.11 warns without it
    }


@pytest.fixture
def migrated(airflow_database: Path, tmp_path: Path) -> dict[str, str]:
    """What to add to an environment where `airflow db migrate` shall find its work done."""
    shutil.copy(airflow_database, tmp_path / "migrated.db")
    return {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{tmp_path}/migrated.db"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with every file that the pages say to save."""
    for page in PAGES:
        for block in read_blocks(page):
            if block.language == "python" and block.file_name:
                path = tmp_path / block.file_name
                path.parent.mkdir(exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def example_data(gcs_server: StorageServer, tmp_path: Path) -> str:
    """A dataset for what a page calls /data/…, and the bucket that it calls my-bucket."""
    gcs_server.create_bucket("my-bucket")
    folder = tmp_path / "example"
    folder.mkdir()
    (folder / "a.csv").write_text("a")
    (folder / "b.csv").write_text("b")
    return str(folder)


def _run(
    command: list[str], environment: dict[str, str], folder: Path, timeout: float = 240
) -> tuple[int, str]:
    """Run a command, and end whatever it leaves running; return exit status and output."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"{command} was still running after {timeout} s:\n{output}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
    return process.returncode, output


@every_page
def test_a_page_uses_only_fences_that_say_whether_they_are_run(page: Path) -> None:
    assert {block.language for block in read_blocks(page)} <= LANGUAGES


@_pages_with(_is_script)
def test_python_examples_run(
    page: Path,
    airflow_home: dict[str, str],
    environment: dict[str, str],
    gcs_server: StorageServer,
    tmp_path: Path,
) -> None:
    lines = [""] * len(page.read_text(encoding="utf-8").splitlines())
    for block in filter(_is_script, read_blocks(page)):
        code = block.text.splitlines()
        lines[block.line : block.line + len(code)] = code  # tracebacks show the page's own lines
    script = tmp_path / f"{page.name}.py"
    script.write_text("\n".join(lines), encoding="utf-8")
    home = {"AIRFLOW_HOME": airflow_home["AIRFLOW_HOME"]}
    status, output = _run(
        [sys.executable, str(script)], environment | home | gcs_server.env(), tmp_path
    )
    assert status == 0, output


def test_dag_examples_are_parsed_by_airflow(airflow_home: dict[str, str], tmp_path: Path) -> None:
    for page in PAGES:
        for number, block in enumerate(read_blocks(page)):
            if block.is_dag_file:
                name = f"{page.stem}_{number}.py".replace("-", "_")
                (tmp_path / name).write_text(block.text, encoding="utf-8")
    code = """
import json, sys
try:
    from airflow.dag_processing.dagbag import DagBag
except ImportError:
    from airflow.models import DagBag
bag = DagBag(sys.argv[1])
files = sorted({dag.fileloc for dag in bag.dags.values()})
print("result:", json.dumps([bag.import_errors, files]))
"""
    _, output = _run([sys.executable, "-c", code, str(tmp_path)], airflow_home, tmp_path)
    found = re.search(r"^result: (.*)$", output, re.MULTILINE)
    assert found, output
    import_errors, parsed = json.loads(found[1])
    no_kubernetes = re.compile(r"No module named '(airflow\.providers\.cncf|kubernetes)")
    unparsable = {file for file, error in import_errors.items() if no_kubernetes.search(error)}
    assert not {file: import_errors[file] for file in import_errors.keys() - unparsable}
    assert {*parsed, *unparsable} == set(map(str, tmp_path.glob("*.py")))


@pytest.fixture
def dag_example(example_data: str, tmp_path: Path) -> SaveDag:
    """`dag_example(page, dag_id)` saves a DAG file of a page, with data that is there."""

    def save(page: str, dag_id: str) -> Path:
        (block,) = (
            block
            for block in read_blocks(REPOSITORY / page)
            if block.is_dag_file and f"def {dag_id}(" in block.text
        )
        text, count = re.subn(r'"(/home/airflow/gcs)?/data/\w+"', repr(example_data), block.text)
        assert count == 1
        path = tmp_path / f"{dag_id}.py"
        path.write_text(text, encoding="utf-8")
        return path

    return save


@pytest.mark.parametrize(
    ("page", "dag_id"), [("README.md", "train"), ("docs/consumers.md", "train_on_the_worker")]
)
def test_dag_examples_for_a_worker_run(
    page: str,
    dag_id: str,
    dag_example: SaveDag,
    run_dag: Any,
    gcs_server: StorageServer,
    tmp_path: Path,
) -> None:
    run = run_dag(dag_example(page, dag_id), dag_id, **gcs_server.env(), TMPDIR=str(tmp_path))
    assert len(run.states) >= 2
    assert set(run.states.values()) == {"success"}, run.log


def test_the_dag_examples_for_changed_data_run(
    dag_example: SaveDag, run_scheduler: Any, gcs_server: StorageServer, tmp_path: Path
) -> None:
    dag_file = dag_example("docs/airflow.md", "train_on_words")
    # The one waits for an event that the other one's run adds.
    runs = run_scheduler(dag_file, "train_on_words", **gcs_server.env(), TMPDIR=str(tmp_path))
    assert [run.states for run in runs] == [{"find": "success", "train": "success"}], runs[-1].log


@_pages_with(lambda block: block.language == "console")
@pytest.mark.slow
def test_commands_print_what_the_page_shows(
    page: Path,
    environment: dict[str, str],
    migrated: dict[str, str],
    project: Path,
    example_data: str,
    gcs_server: StorageServer,
) -> None:
    commands = [
        pair
        for block in read_blocks(page)
        if block.language == "console"
        for pair in read_commands(block)
    ]
    script = "".join(f"{command}\nprintf '\\036%s\\036' $?\n" for command, _ in commands)
    folder = project
    if page.name == "README.md":
        script, folder = re.sub(r"^make ", "make --dry-run ", script, flags=re.M), REPOSITORY
        commands = [(command, "") for command, _ in commands]
    if page.name == "consumers.md":
        ref = make_data_ref(upload_data("my-bucket", example_data), is_dir=True)
        environment |= gcs_server.env() | {"REF": json.dumps(ref)}
        script = script.replace("/data/train", str(project / "train"))
        commands = [
            (c, shown.replace("/data/train", str(project / "train"))) for c, shown in commands
        ]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    script = script.replace("9023", port)
    status, output = _run(["bash", "-c", script], environment | migrated, folder)
    results = re.findall(r"(.*?)\x1e(\d+)\x1e", output, re.DOTALL)
    assert len(results) == len(commands), output
    for (command, shown), (printed, status) in zip(commands, results, strict=True):
        assert status == "0", f"{command}\n{output}"
        pattern = r".*".join(map(re.escape, shown.replace("9023", port).split("…")))
        assert re.search(pattern, printed), f"$ {command}\n{printed}\nexpected:\n{shown}"


@pytest.mark.slow
def test_the_tests_that_users_are_shown_pass(
    environment: dict[str, str], migrated: dict[str, str], project: Path
) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"]
    status, output = _run(command, environment | migrated, project)
    assert status == 0, output
    assert "skipped" not in output


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = read_prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)$", text, re.M)
    for target in targets:
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if fragment:
            assert fragment in map(anchor, read_headings(linked)), target
    names = re.findall(r"\[[^]`\[]+\]\[([^]]+)\]", text)
    assert {f"[{name}]: " for name in names} <= set(re.findall(r"^\[[^]]+\]: ", text, re.M))


def test_every_page_is_reachable_from_the_readme() -> None:
    reached, ahead = set(), [PAGES[0]]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        targets = re.findall(r"\]\(([\w./-]+\.md)", read_prose(page))
        ahead += {(page.parent / target).resolve() for target in targets} - reached
    assert set(PAGES) <= reached


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = set(re.findall(r": ([\w./-]+\.md)$", MKDOCS.read_text(encoding="utf-8"), re.M))
    at_root = {"README.md": "index.md"}
    for page in PAGES:
        name = _id(page)
        site_name = name.removeprefix("docs/")
        if site_name == name:
            site_name = at_root.get(name, name.lower())
        assert site_name in listed


def test_every_example_dag_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((dags/\w+\.py)\)", read_prose(REPOSITORY / "README.md")))
    assert linked == {f"dags/{path.name}" for path in REPOSITORY.glob("dags/*.py")}


def test_the_architecture_names_every_module_and_no_other_file():
    page = DOCS / "architecture.md"
    package = REPOSITORY / "keras_remote_airflow"
    modules = [path for path in package.rglob("*.py") if path.stem != "__init__"]
    rooms = set(re.findall(r"\w+", read_blocks(page)[0].text))
    assert [
        m for m in modules if m.stem not in rooms and package / "testing" not in m.parents
    ] == []
    named = re.findall(r"`([\w/]+\.py)`", read_prose(page))
    assert [n for n in named if not any(str(m).endswith(f"/{n}") for m in modules)] == []


def test_json_examples_are_json() -> None:
    blocks = [block for page in PAGES for block in read_blocks(page) if block.language == "json"]
    assert blocks
    for block in blocks:
        json.loads(block.text)


# The formats


def _plain_content_hash() -> Callable[[str], str]:
    code = next(b.text for b in read_blocks(DOCS / "formats.md") if "def content_hash" in b.text)
    namespace: dict[str, Callable[[str], str]] = {}
    exec(code, namespace)
    return namespace["content_hash"]


def _vectors() -> Iterator[Any]:
    row = re.compile(r"^\| (file|directory) (.*?) \| `([0-9a-f]{64})` \|$", re.MULTILINE)
    for kind, data, digest in row.findall(read_prose(DOCS / "formats.md")):
        if kind == "file":
            name, content = re.findall(r"`([^`]+)`", data)
            yield pytest.param(True, {name: content}, digest, id=name)
        else:
            yield pytest.param(False, json.loads(re.findall(r"`([^`]+)`", data)[0]), digest)


@pytest.mark.parametrize(("is_file", "files", "digest"), list(_vectors()))
def test_the_hash_in_plain_python_and_ours_give_the_vectors_shown(
    is_file: bool, files: dict[str, str], digest: str, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    path = str(root / next(iter(files))) if is_file else str(root)
    assert _plain_content_hash()(path) == Data(path).content_hash() == digest


def test_all_four_vectors_are_shown() -> None:
    assert len(list(_vectors())) == 4


def test_the_hash_in_plain_python_takes_the_order_and_the_links_that_ours_takes(
    tmp_path: Path,
) -> None:
    root = tmp_path / "data"
    names = ["a/x", "a.b/x", "a-b", "A", "a b/c/d", "z/é", "z/e\u0301", "\U0001f600", "\uffff"]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes([number]) * number * 70_000)
    (root / "empty").mkdir()
    (root / "linked-file").symlink_to(root / "A")
    (root / "linked-directory").symlink_to(root / "a")
    assert _plain_content_hash()(str(root)) == Data(str(root)).content_hash()


def test_the_marker_shown_is_one() -> None:
    block = next(b for b in read_blocks(DOCS / "formats.md") if b.language == "json")
    content_hash = json.loads(block.text)["content_hash"]
    receipt = parse_marker(
        block.text.encode(), CacheKey("bucket", "default", content_hash, KERAS_REMOTE)
    )
    assert receipt is not None
    assert json.loads(receipt.to_json()) == json.loads(block.text)


# The figures in composer.md


def test_a_hit_costs_two_requests_and_a_miss_three_more_than_files(
    gcs_server: StorageServer, gcs_bucket: str, tmp_path: Path
) -> None:
    for number in range(5):
        (tmp_path / str(number)).write_text(str(number))
    upload_data(gcs_bucket, str(tmp_path))
    assert len(gcs_server.requests) == 5 + 3
    gcs_server.clear_requests()
    upload_data(gcs_bucket, str(tmp_path))
    assert len(gcs_server.requests) == 2


# The error messages


def _sections() -> dict[str, str]:
    """Return the messages that troubleshooting.md has sections for, as regular expressions."""
    text = read_prose(TROUBLESHOOTING)
    ours, _, others = text.partition("\n## Messages of others\n")
    assert others
    shown = re.findall(r"^### `(.*)`$", ours, re.MULTILINE)
    return {heading: r".*".join(map(re.escape, heading.split("…"))) for heading in shown}


def test_every_message_has_a_section() -> None:
    """A new message needs a heading in troubleshooting.md: its words, "…" for what varies."""
    sections = _sections().values()
    missing = [
        f"{where}: {message}"
        for message, where in read_messages().items()
        if not any(re.search(section, message) for section in sections)
    ]
    assert not missing, "\n".join(missing)


def test_every_section_is_about_a_message_that_exists() -> None:
    messages = list(read_messages())
    # What failure() puts together.
    messages += [f"…: HTTP {status} …" for status in REMEDIES]
    for heading, section in _sections().items():
        assert len(heading.replace("…", "").strip()) >= 6, f"{heading} says too little"
        assert any(re.search(section, message) for message in messages), heading


def test_what_is_quoted_in_a_list_is_said_by_the_code() -> None:
    ours, _, _ = read_prose(TROUBLESHOOTING).partition("\n## Messages of others\n")
    quoted = re.findall(r"^- `(.*?)`:", ours, re.MULTILINE)
    assert quoted
    texts = read_texts()
    for quote in quoted:
        pattern = r".*".join(map(re.escape, quote.split("…")))
        assert any(re.search(pattern, text) for text in texts), quote


def test_endings_of_messages_are_said_by_the_code() -> None:
    texts = read_texts()
    assert [e for endings in ENDINGS.values() for e in endings if e not in texts] == []


def test_every_status_with_a_remedy_has_a_section() -> None:
    assert {f"HTTP {status} …" for status in REMEDIES} <= set(_sections())


def test_every_error_class_is_explained() -> None:
    text = read_prose(TROUBLESHOOTING)
    classes = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.KerasRemoteError)
    ]
    assert [name for name in classes if f"`{name}`" not in text] == []


# The parameters


def test_every_public_name_is_under_the_compatibility_policy() -> None:
    text = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    names = keras_remote_airflow.__all__
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


def _definition(module: str, name: str) -> Definition:
    """Return a function's or class's node in our source: to import it would import Airflow."""
    path = REPOSITORY.joinpath("keras_remote_airflow", *module.split(".")).with_suffix(".py")
    (found,) = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
    )
    return found


def _is_value(node: Definition) -> bool:
    """Whether it is a class that has fields and no __init__ of its own."""
    return isinstance(node, ast.ClassDef) and not any(
        isinstance(n, ast.FunctionDef) and n.name == "__init__" for n in node.body
    )


def _parameters(node: Definition) -> set[str]:
    """Return the names of what a function, or a class's __init__, takes; of a value, its fields."""
    if _is_value(node):
        return {
            n.target.id
            for n in node.body
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }
    if isinstance(node, ast.ClassDef):
        (node,) = (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return {argument.arg for argument in arguments} - {"self"}


def _described(node: Definition) -> set[str]:
    """Return the parameters that a docstring describes itself."""
    heading = "Attributes" if _is_value(node) else "Args"
    docstring = ast.get_docstring(node) or ""
    section = re.search(rf"^{heading}:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
    if section is None:  # one that takes a thing or two may say so in its text
        return {name for name in _parameters(node) if f"`{name}`" in docstring}
    names = re.findall(r"^ {4}(\w[\w, ]*): ", section[1], re.MULTILINE)
    return {name for line in names for name in line.split(", ")}


def _described_elsewhere(node: Definition) -> set[str]:
    """Return the parameters of those that a docstring refers to: "... those of `upload_data`"."""
    text = " ".join((ast.get_docstring(node) or "").split())
    modules = {name: module for module, name in CALLED}
    referred = re.findall(r"\b(?:those of|as for|as in|see) `(\w+)`", text)
    return {
        parameter
        for name in referred
        if name in modules
        for parameter in _described(_definition(modules[name], name))
    }


AIRFLOWS_OWN = {"python_callable", "op_args", "op_kwargs"}  # what it makes of a decorated function
TASKS = [
    ("operators", "DataUploadOperator"),
    ("sensors", "CacheSensor"),
    ("decorators", "LocalDataOperator"),
]
CALLED = [
    *((module, name) for name, module in keras_remote_airflow._HOME.items()),
    ("decorators", "LocalDataOperator"),
    ("decorators", "local_data_task"),
    ("consumers", "gcsfuse_pod_kwargs"),
    ("consumers", "materialize_pod_kwargs"),
    ("consumers", "vertex_command_kwargs"),
    ("consumers", "vertex_custom_job_kwargs"),
    ("triggers", "CacheTrigger"),
]


@pytest.mark.parametrize(("module", "name"), TASKS)
def test_every_parameter_is_documented(module: str, name: str) -> None:
    text = "".join(read_prose(page) for page in PAGES)
    parameters = _parameters(_definition(module, name)) - AIRFLOWS_OWN
    assert [p for p in sorted(parameters) if not re.search(rf"`{p}\b", text)] == []


@pytest.mark.parametrize(("module", "name"), CALLED)
def test_docstrings_have_every_parameter_and_no_other(module: str, name: str) -> None:
    node = _definition(module, name)
    parameters = _parameters(node) - (AIRFLOWS_OWN if name == "LocalDataOperator" else set())
    described = _described(node)
    assert described <= parameters
    assert parameters <= described | _described_elsewhere(node)


def test_pages_show_the_figures_of_the_last_benchmark() -> None:
    benchmark = runpy.run_path(str(REPOSITORY / "tests/benchmarks/pages.py"))
    figures = json.loads((DOCS / "benchmark.json").read_text())
    for page, (_, write) in benchmark["SECTIONS"].items():
        assert write(figures).strip() in (REPOSITORY / page).read_text(encoding="utf-8")
