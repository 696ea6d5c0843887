"""What StatsD and OpenLineage receive of a whole DAG run, through Airflow's own clients."""

import json
import socket
from pathlib import Path

DAGS = Path(__file__).parent / "dags"
GOLDEN = "15d41417b45aa09c0450d8955b845bb278f2990728bcc5d919d62309a2c6ebee"


def test_a_run_reports_its_uploads(run_dag, gcs_server, dataset, tmp_path):
    events = tmp_path / "events.jsonl"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        run = run_dag(
            DAGS / "reports.py",
            "reports",
            **gcs_server.env(),
            TEST_DATA=str(dataset),
            AIRFLOW__METRICS__STATSD_ON="True",
            AIRFLOW__METRICS__STATSD_HOST="127.0.0.1",
            AIRFLOW__METRICS__STATSD_PORT=str(statsd.getsockname()[1]),
            AIRFLOW__METRICS__STATSD_INFLUXDB_ENABLED="True",  # StatsD itself knows no tags
            AIRFLOW__METRICS__METRICS_ALLOW_LIST="keras_remote",  # Airflow's would fill the buffer
            AIRFLOW__OPENLINEAGE__EXECUTION_TIMEOUT="60",
            AIRFLOW__OPENLINEAGE__TRANSPORT=json.dumps(
                {"type": "file", "log_file_path": str(events), "append": True}
            ),
        )
        metrics = list(receive(statsd))
    assert run.states == {"miss": "success", "hit": "success"}, run.log

    expected = {
        "misses,task=miss": "1|c",
        "files,task=miss": "2|c",
        "bytes,task=miss": "2|c",
        "duration,task=miss": took(run, "miss"),
        "hits,task=hit": "1|c",
        "files,task=hit": "0|c",
        "bytes,task=hit": "0|c",
        "duration,task=hit": took(run, "hit"),
    }
    assert metrics == [
        f"airflow.keras_remote.upload.{name.replace('task=', 'dag_id=reports,task_id=')}:{value}"
        for name, value in expected.items()
    ]

    completed = {
        event["job"]["name"]: event
        for event in map(json.loads, events.read_text().splitlines())
        if event["eventType"] == "COMPLETE"
    }
    for task, size in ("miss", 2), ("hit", 0):
        (read,) = completed[f"reports.{task}"]["inputs"]
        (written,) = completed[f"reports.{task}"]["outputs"]
        assert (read["namespace"], read["name"]) == ("file", str(dataset))
        assert (written["namespace"], written["name"]) == (
            "gs://test-bucket",
            f"default/data-cache/{GOLDEN}",
        )
        for found in (read, written):
            assert found["facets"]["version"]["datasetVersion"] == GOLDEN
        assert written["outputFacets"]["outputStatistics"]["size"] == size


def receive(listener):
    """What is waiting: on the loopback interface all that was sent."""
    listener.setblocking(False)
    while True:
        try:
            yield listener.recv(65536).decode()
        except BlockingIOError:
            return


def took(run, task):
    return f"{1000 * run.xcoms[task]['upload_stats']['seconds']:.6f}|ms"
