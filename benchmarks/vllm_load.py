"""A server under load: `bytelane serve MODEL`, and vLLM's own benchmark tool as its clients.

    .venv-vllm/bin/python benchmarks/vllm_load.py MODEL [--requests 40 --rate 2 --input 128 --output 32]

Random prompts of a fixed length arrive at a rate, answers have a fixed length; what the tool measured is shown as
percentiles, and its JSON is the last line. `--lock FILE` and `--realtime` are as in vllm_serve.py.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from vllm_serve import locked

START_SECONDS = 900
TOOL = (
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as P; from vllm.benchmarks.serve import *; "
    "p = P(); add_cli_args(p); main(p.parse_args())"
)
"""`vllm bench serve`, for builds whose `vllm` program does not start (docs/serving.md)."""

FIGURES = {
    "ttft": "time to first token",
    "tpot": "time per token after it",
    "itl": "between tokens",
    "e2el": "whole request",
}
PERCENTILES = ("p50", "p95", "p99")


def tree(first: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield first
    for task in Path(f"/proc/{first}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            yield from tree(child)


def set_priority(first: int, policy: int, priority: int) -> None:
    """Of every thread of a process and its descendants."""
    for pid in list(tree(first)):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


def wait_until_ready(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        if server.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the server did not start:\n{log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)


def clients(address: str, arguments: argparse.Namespace, requests: int, folder: Path) -> dict[str, float]:
    """Run the tool; what it wrote."""
    command = [sys.executable, "-c", TOOL, "--model", arguments.model, "--base-url", address, "--ignore-eos"]
    command += ["--dataset-name", "random", "--random-input-len", str(arguments.input)]
    command += ["--random-output-len", str(arguments.output), "--num-prompts", str(requests)]
    command += ["--request-rate", str(arguments.rate), "--percentile-metrics", ",".join(FIGURES)]
    command += ["--metric-percentiles", "50,95,99", "--save-result", "--result-dir", str(folder)]
    command += ["--result-filename", f"{requests}.json"]
    if arguments.realtime:
        command = ["chrt", "-f", "1", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"vLLM's benchmark tool failed:\n{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads((folder / f"{requests}.json").read_text())
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint folder")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rate", type=float, default=2, help="requests a second")
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="lock this file while something is timed")
    parser.add_argument("--realtime", action="store_true", help="before other processes while something is timed")
    arguments = parser.parse_args()
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [Path(sys.executable).with_name("bytelane"), "serve", arguments.model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", str(arguments.input + arguments.output + 32)]
    command += ["--max-num-seqs", "16"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_until_ready(address, server, folder / "log")
            clients(address, arguments, 4, folder)
            with locked(arguments.lock):
                if arguments.realtime:
                    set_priority(server.pid, os.SCHED_FIFO, 1)
                found = clients(address, arguments, arguments.requests, folder)
                if arguments.realtime:
                    set_priority(server.pid, os.SCHED_OTHER, 0)
        finally:
            server.terminate()
            server.wait(timeout=60)
    done, rate = found["completed"], found["output_throughput"]
    print(f"{done} of {arguments.requests} requests, {rate:.1f} tokens a second written")
    print(f"{'milliseconds':26}" + "".join(f"{p:>9}" for p in PERCENTILES))
    for key, label in FIGURES.items():
        print(f"{label:26}" + "".join(f"{found[f'{p}_{key}_ms']:9.1f}" for p in PERCENTILES))
    print(json.dumps({k: v for k, v in found.items() if isinstance(v, int | float | str)}))


if __name__ == "__main__":
    main()
