"""What the endpoint does under load: one client, then many, then a crowd for minutes; it serves the model itself.

    python kernels/bench/serving.py --clients 16 --crowd 32 --seconds 120 --output serving.json

Each client asks again as soon as it is answered; prompts and lengths are random from a fixed seed, answers have a fixed
length unless a stop token ends them. Rounds of one client and of many alternate, the ratio is the median of theirs. The
crowd's errors are counted by status (429 apart), and the memory of the process is read at each quarter of the time.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

import openai
import psutil
import uvicorn
from moe_kernels import device as devices

from pipelines.params import Serve
from pipelines.serving.app import create_app
from pipelines.serving.ledger import Ledger
from pipelines.serving.manager import Manager

NAME, TOKENS = "bench", 48


def main() -> None:
    """Time, print, write the JSON."""
    parser = argparse.ArgumentParser(description="Throughput and memory of the endpoint.")
    parser.add_argument("--model", type=Path, default=Path("data/models/release"))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--crowd", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("serving.json"))
    arguments = parser.parse_args()
    params = Serve()
    manager = Manager(params)
    manager.switch(manager.load(arguments.model, NAME, "1"))
    with tempfile.TemporaryDirectory() as folder:
        address = start(manager, params, Path(folder))
        ask(address, 1, 2)
        rounds = [{n: ask(address, n, 10) for n in (1, arguments.clients)} for _ in range(arguments.rounds)]
        speeds = {n: median(r[n]["tokens_per_s"] for r in rounds) for n in rounds[0]}
        ratio = median(r[arguments.clients]["tokens_per_s"] / r[1]["tokens_per_s"] for r in rounds)
        print(f"tokens/s by clients {speeds}, ratio {ratio:.1f}")
        crowd = ask(address, arguments.crowd, arguments.seconds)
        print(f"{arguments.crowd} clients {crowd}")
    header = {"device": devices.name(devices.default()), "ratio": ratio, "tokens_per_s": speeds}
    arguments.output.write_text(json.dumps(header | {"crowd": crowd, "rounds": rounds}, indent=2) + "\n")


def start(manager: Manager, params: Serve, folder: Path) -> str:
    """The address of the endpoint, which runs in a thread until this process ends."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    app = create_app(manager, params, Ledger(folder / "usage.db", params))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


def ask(address: str, clients: int, seconds: float) -> dict[str, Any]:
    """Tokens a second, latencies, answers by status and resident memory (MiB) while that many clients ask."""
    end, memory = time.monotonic() + seconds, []
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, address, number, end) for number in range(clients)]
        for _ in range(4):
            time.sleep(seconds / 4)
            memory.append(round(psutil.Process().memory_info().rss / 2**20))
        found = [future.result() for future in futures]
    took = time.monotonic() - end + seconds
    latencies = [latency for entry in found for latency in entry["latencies_s"]]
    return {
        "tokens_per_s": sum(entry["tokens"] for entry in found) / took,
        "answers": dict(sum((entry["statuses"] for entry in found), Counter())),
        "latency_s": {"p50": median(latencies), "p95": quantiles(latencies, n=20)[-1] if len(latencies) > 1 else None},
        "rss_mib": memory,
    }


def client(address: str, number: int, end: float) -> dict[str, Any]:
    """One that asks until `end`."""
    random, statuses, tokens, latencies = Random(number), Counter(), 0, []
    api = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=300)
    while time.monotonic() < end:
        begin = time.monotonic()
        prompt = [random.randrange(5, 256) for _ in range(random.randint(4, 60))]
        try:
            done = api.completions.create(model=NAME, prompt=prompt, max_tokens=TOKENS, temperature=0)
            tokens += done.usage.completion_tokens
            statuses["200"] += 1
            latencies.append(time.monotonic() - begin)
        except openai.APIStatusError as error:
            statuses[str(error.status_code)] += 1
            time.sleep(0.2)
    api.close()
    return {"statuses": statuses, "tokens": tokens, "latencies_s": latencies}


if __name__ == "__main__":
    main()
