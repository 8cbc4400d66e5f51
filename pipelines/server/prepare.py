"""Tables of the database and buckets of the store, before the server starts; may be repeated.

python prepare.py          addresses and passwords from the environment, see compose.yaml
"""

from __future__ import annotations

import os
import subprocess
import sys

BUCKETS = ("mlflow", "dvc")
DATABASE = "postgresql+psycopg2:///mlflow"  # the rest of the address: PGHOST, PGPORT, PGUSER, PGPASSWORD


def main() -> None:
    """Raises `CalledProcessError` or botocore's `ClientError` when database or store refuse."""
    import boto3

    subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", DATABASE], check=True)
    store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    present = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
    for name in set(BUCKETS) - present:
        store.create_bucket(Bucket=name)


if __name__ == "__main__":
    main()
