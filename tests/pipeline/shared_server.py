"""The server of pipelines/server on this machine: a real PostgreSQL, moto's S3, MLflow as compose.yaml starts it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ruamel.yaml import YAML

FOLDER = Path(__file__).parents[2] / "pipelines" / "server"
KEYS = {"AWS_ACCESS_KEY_ID": "shovel", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "password of the admin"}


def binaries() -> Path | None:
    """Where PostgreSQL's programs lie: on the path, or where Debian puts them."""
    found = shutil.which("initdb") or next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    return Path(found).resolve().parent if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def postgresql() -> Iterator[dict[str, str]]:
    """A cluster of its own in a temporary folder, run by nobody in particular; yields libpq's variables."""
    programs, port = binaries(), free_port()
    user = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}  # it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="shovel-postgresql-") as folder:
        if user:
            shutil.chown(folder, "nobody")
        data = f"{folder}/data"
        create = [programs / "initdb", "-D", data, "-U", "shovel", "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(create, check=True, capture_output=True, cwd=folder, **user)
        run = [programs / "postgres", "-D", data, "-p", str(port), "-k", folder, "-c", "fsync=off"]
        with Path(folder, "log").open("w") as log:
            server = subprocess.Popen([*run, "-h", "127.0.0.1"], cwd=folder, stdout=log, stderr=log, **user)
        try:
            variables = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "shovel", "PGPASSWORD": "any"}
            ready = [programs / "pg_isready", "-q"]
            wait(lambda: subprocess.run(ready, env=os.environ | variables).returncode == 0, server)
            make = [programs / "createdb", "mlflow"]
            subprocess.run(make, check=True, env=os.environ | variables)
            yield variables
        finally:
            server.send_signal(signal.SIGINT)  # fast shutdown
            server.wait()


def wait(ready, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.args
        time.sleep(0.1)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


class SharedServer:
    """MLflow as compose.yaml starts it, but on this machine; may be killed and started again."""

    def __init__(self, variables: dict[str, str], log: Path) -> None:
        self.port, self.log, self.process = free_port(), log, None
        services = YAML(typ="safe").load(FOLDER / "compose.yaml")["services"]
        declared = {key: str(value) for key, value in services["mlflow"]["environment"].items()}
        ours = {"MLFLOW_AUTH_CONFIG_PATH": str(FOLDER / "basic_auth.ini"), "PYTHONPATH": str(FOLDER)}
        ours |= {"MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN["MLFLOW_TRACKING_PASSWORD"], "MLFLOW_FLASK_SERVER_SECRET_KEY": "k"}
        self.environment = {**os.environ, **declared, **variables, **KEYS, **ours}
        self.prepare, command = services["prepare"]["command"], services["mlflow"]["command"]
        replaced = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={self.port}"}
        replaced |= {"--workers=2": "--workers=1"}
        words = [replaced.get(word, word) for word in command if not word.startswith("--allowed-hosts")]
        self.command = [sys.executable, "-m", *words]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, cwd=FOLDER, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait(lambda: answers(f"{self.address}/health"), self.process)
        except AssertionError:
            raise AssertionError(self.log.read_text()[-3000:]) from None

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def shared_server(folder: Path) -> Iterator[SharedServer]:
    """PostgreSQL, S3 and MLflow, prepared and started; everything ends with the block."""
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    store.start()
    server = None
    try:
        endpoint = "http://{}:{}".format(*store.get_host_and_port())
        with postgresql() as variables:
            server = SharedServer(variables | {"MLFLOW_S3_ENDPOINT_URL": endpoint}, folder / "mlflow.log")
            prepare = [sys.executable, *server.prepare[1:]]
            subprocess.run(prepare, env=server.environment, cwd=FOLDER, check=True, capture_output=True)
            server.start()
            yield server
            server.kill()
            server = None
    finally:
        if server and server.process:
            server.kill()
        store.stop()


@contextmanager
def killing(server: SharedServer, route: str, after: bool) -> Iterator[str]:
    """An address in front of the server that kills it when it sees a POST to `route`: before or after it was done."""

    class Handler(BaseHTTPRequestHandler):
        def handle_request(self) -> None:
            fatal = self.command == "POST" and self.path.endswith(route)
            if fatal and not after:
                server.kill()
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {**self.headers, "Host": f"127.0.0.1:{server.port}"}
            with closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as upstream:
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                content = answer.read()
            if fatal:
                server.kill()
                self.close_connection = True
                return
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request

        def log_message(self, *_) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
