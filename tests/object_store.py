"""A server that speaks the S3 protocol, on loopback, in a process of its own that may be killed."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.processes import REPOSITORY, free_port

BUCKET = "training"


class ObjectStore:
    """A store with an empty bucket; what is uploaded outlives its process."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._uploaded: list[tuple[str, str]] = []
        self.start()

    def start(self) -> None:
        """Starts the server, where it was before and with what it held."""
        command = [sys.executable, "-m", "tests.object_store", str(self.port), json.dumps(self._uploaded)]
        self._process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.1)

    def kill(self) -> None:
        """Ends the server as a crash would."""
        self._process.kill()
        self._process.wait()

    def client(self) -> Any:
        """A client of the vendor's."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="very-secret",
        )

    def upload(self, folder: Path, prefix: str, *names: str) -> str:
        """Puts the files of a folder, or those named, into the store; returns the address."""
        client = self.client()
        for path in folder.iterdir():
            if not names or path.name in names:
                client.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")
                self._uploaded.append((str(path), f"{prefix}/{path.name}"))
        return f"s3://{BUCKET}/{prefix}"

    def environment(self) -> dict[str, str]:
        """What a user of the store sets."""
        return {
            "S3_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "very-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/moto-api/", timeout=5).close()
        except OSError:
            return False
        return True


@contextmanager
def running_store() -> Iterator[ObjectStore]:
    """A store whose address and credentials stand in this process's environment."""
    store = ObjectStore()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in store.environment().items():
                patch.setenv(name, value)
            yield store
    finally:
        store.kill()


def serve(port: int, uploaded: list[tuple[str, str]]) -> None:
    """The server's process."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    from moto.server import main

    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket(BUCKET, "us-east-1")
    for path, key in uploaded:
        backend.put_object(BUCKET, key, Path(path).read_bytes())
    main(["-H", "127.0.0.1", "-p", str(port)])


if __name__ == "__main__":
    serve(int(sys.argv[1]), json.loads(sys.argv[2]))
