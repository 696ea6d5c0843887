"""Uploads with outlets: which of them add events, and which skip."""

import os

import pendulum

from keras_remote_airflow import DataUploadOperator

try:
    from airflow.sdk import Asset, AssetAlias, dag, get_current_context, task
except ImportError:  # Airflow 2
    from airflow.datasets import Dataset as Asset
    from airflow.datasets import DatasetAlias as AssetAlias
    from airflow.decorators import dag, task
    from airflow.operators.python import get_current_context

DATA, FILE = os.environ["TEST_DATA"], os.environ["TEST_FILE"]
ALIAS, PLAIN = AssetAlias("new"), Asset(uri="x-test://plain/asset")
BUCKET = {"bucket_name": "test-bucket"}
RETRY = {"retries": 1, "retry_delay": pendulum.duration(seconds=0)}


class DiesOnceItHasPublished(DataUploadOperator):
    def execute(self, context):
        ref = super().execute(context)
        if context["ti"].try_number == 1:
            raise RuntimeError("the worker is gone")
        return ref


class FailsOnceBeforeItUploads(DataUploadOperator):
    def execute(self, context):
        if context["ti"].try_number == 1:
            raise RuntimeError("no connection")
        return super().execute(context)


@task(trigger_rule="all_done")
def pull():
    ti = get_current_context()["ti"]
    keys = ["return_value", "gcs_uri", "upload_stats"]
    return [ti.xcom_pull(task_ids="skips", key=key) for key in keys]


@dag(schedule=None, start_date=pendulum.datetime(2024, 1, 1), catchup=False)
def outlets():
    miss = DataUploadOperator(task_id="miss", data=DATA, outlets=[ALIAS, PLAIN], **BUCKET)
    hit = DataUploadOperator(task_id="hit", data=DATA, outlets=[ALIAS, PLAIN], **BUCKET)
    skips = DataUploadOperator(
        task_id="skips", data=DATA, outlets=[ALIAS, PLAIN], on_cache_hit="skip", **BUCKET
    )
    gcs = DataUploadOperator(
        task_id="gcs",
        data="gs://elsewhere/日本 #?a",
        outlets=[ALIAS],
        on_cache_hit="skip",
        **BUCKET,
    )
    # In a namespace of its own, so that what it uploads is new.
    dies = DiesOnceItHasPublished(
        task_id="dies",
        data=DATA,
        namespace_prefix="dies",
        outlets=[ALIAS],
        on_cache_hit="skip",
        **BUCKET,
        **RETRY,
    )
    # What this one finds was published before the run began.
    fails = FailsOnceBeforeItUploads(
        task_id="fails",
        data=DATA,
        namespace_prefix="long-ago",
        outlets=[ALIAS],
        **BUCKET,
        **RETRY,
    )
    many = DataUploadOperator.partial(
        task_id="many", namespace_prefix="équipe", outlets=[ALIAS], **BUCKET
    ).expand(data=[DATA, FILE])

    @task
    def downstream(ref):
        return ref

    miss >> hit >> skips
    downstream.override(task_id="skipped")(skips.output)
    downstream.override(task_id="after_dies")(dies.output)
    skips >> pull()
    [gcs, fails, many]  # noqa: B018 - they stand alone


outlets()
