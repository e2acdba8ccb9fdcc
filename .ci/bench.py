# SPDX-License-Identifier: 0BSD
"""Measure dub_customers beside bare http.client, its usual peers and the official SDK.

    python .ci/bench.py [--rounds N | --quick]

Everything runs on 127.0.0.1, against a server in another process. A peer is measured if
this Python can import it: `pip install urllib3 httpx requests dub`. dub is the official SDK.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import http.client
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

ROOT = str(Path(__file__).resolve().parent.parent)
BARE = "http.client"
OURS = "dub_customers"
URLOPEN = "urlopen"
SDK = "dub (SDK)"
PEERS = ("urllib3", "httpx", "requests", "dub")
THREADS = 16
GROWTH_CALLS = 4000
TIMEOUT_SECONDS = 10
TOKEN = "dub_bench"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Accept": "application/json"}
ID = "cus_1KAP4CDPBSVMMBMH9XX3YZZ0Z"
PATH = f"/customers/{ID}?includeExpandedFields=true"
CUSTOMER = {
    "id": ID,
    "externalId": "user_42",
    "name": "Ada Lovelace",
    "email": "ada@example.com",
    "avatar": "https://assets.example.com/ada.png",
    "country": "GB",
    "sales": 3,
    "saleAmount": 12900,
    "createdAt": "2026-01-02T03:04:05.000Z",
    "stripeCustomerId": None,
    "firstSaleAt": "2026-02-01T00:00:00.000Z",
    "subscriptionCanceledAt": None,
    "programId": "prog_1",
    "link": {
        "id": "link_1KAP4CDPBSVMMBMH9XX3YZZ0Z",
        "domain": "dub.sh",
        "key": "try",
        "shortLink": "https://dub.sh/try",
        "url": "https://dub.co",
        "programId": "prog_1",
    },
    "partner": {
        "id": "pn_1",
        "name": "Grace Hopper",
        "email": "grace@example.com",
        "image": None,
    },
    "discount": {
        "id": "disc_1",
        "amount": 20,
        "type": "percentage",
        "maxDuration": 12,
        "description": None,
        "couponId": "co_1",
        "couponTestId": None,
        "partnersCount": 4,
    },
}
BODY = json.dumps(CUSTOMER, separators=(",", ":")).encode()
HEAD = f"""\
HTTP/1.1 200 OK
Date: Sun, 06 Nov 1994 08:49:37 GMT
Content-Type: application/json
Content-Length: {len(BODY)}

"""
RESPONSE = HEAD.replace("\n", "\r\n").encode() + BODY

Call = Callable[[], str]  # fetches the customer and returns its id
Figures = Dict[str, List[float]]  # by name: one figure for each round


# --- The server ---------------------------------------------------------------------------


def serve(certificate: list[str]) -> None:
    """Answer every request with the customer, over TLS if there is a certificate and a key.

    It uses raw sockets, because a server that is slower than its clients would make them
    look alike.
    """
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        start_thread(accept, listener, context)
        print(listener.getsockname()[1], flush=True)
        sys.stdin.read()  # returns when the parent process ends


def start_thread(function: Callable[..., None], *args: object) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()


def accept(listener: socket.socket, context: ssl.SSLContext | None) -> None:
    while True:
        connection, _ = listener.accept()
        start_thread(answer, connection, context)


def answer(connection: socket.socket, context: ssl.SSLContext | None) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        if context is not None:
            connection = context.wrap_socket(connection, server_side=True)
        received = b""
        while True:
            part = connection.recv(65536)
            if not part:
                break
            received += part
            if received.endswith(b"\r\n\r\n"):  # no client sends a body
                connection.sendall(RESPONSE)
                received = b""
    connection.close()


@contextlib.contextmanager
def running_server(*certificate: str) -> Iterator[str]:
    """Run the server in another process. Gives its URL."""
    command = [sys.executable, __file__, "--serve", *certificate]
    scheme = "https" if certificate else "http"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            yield f"{scheme}://127.0.0.1:{port}"
        finally:
            process.kill()


def make_certificate(folder: str) -> list[str]:
    """Paths of a self-signed certificate and its key. An empty list without openssl."""
    certificate = os.path.join(folder, "certificate.pem")
    key = os.path.join(folder, "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-out", certificate, "-keyout", key]
    try:
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return [certificate, key]


# --- Who is measured ----------------------------------------------------------------------


def make_calls(url: str, stack: contextlib.ExitStack) -> dict[str, Call]:
    """By name, a function that fetches the customer. Each has a client of its own."""
    calls = {
        BARE: http_client_call(url, stack),
        OURS: our_call(url, stack),
        URLOPEN: functools.partial(urlopen_call, url + PATH),
    }
    if is_installed("urllib3"):
        calls["urllib3"] = urllib3_call(url, stack)
    if is_installed("httpx"):
        calls["httpx"] = httpx_call(url, stack)
    if is_installed("requests"):
        calls["requests"] = requests_call(url, stack)
    if is_installed("dub"):
        calls[SDK] = sdk_call(url, stack)
    for name, call in calls.items():
        if call() != ID:
            raise SystemExit(f"{name} fetched something else")
    return calls


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def module(name: str) -> Any:
    return importlib.import_module(name)


def http_client_call(url: str, stack: contextlib.ExitStack) -> Call:
    scheme, _, address = url.partition("://")
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    connection = kind(address, timeout=TIMEOUT_SECONDS)
    stack.callback(connection.close)

    def call() -> str:
        connection.request("GET", PATH, headers=HEADERS)
        return json.loads(connection.getresponse().read())["id"]

    return call


def our_call(url: str, stack: contextlib.ExitStack) -> Call:
    timeout_ms = TIMEOUT_SECONDS * 1000
    client = stack.enter_context(module(OURS).Dub(TOKEN, server_url=url, timeout_ms=timeout_ms))

    def call() -> str:
        return client.customers.get(ID, include_expanded_fields=True).id

    return call


def urlopen_call(url: str) -> str:
    request = urllib.request.Request(url, headers=HEADERS)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        return json.loads(response.read())["id"]


def urllib3_call(url: str, stack: contextlib.ExitStack) -> Call:
    pool = module("urllib3").PoolManager(headers=HEADERS, timeout=TIMEOUT_SECONDS)
    stack.enter_context(pool)
    return lambda: json.loads(pool.request("GET", url + PATH).data)["id"]


def httpx_call(url: str, stack: contextlib.ExitStack) -> Call:
    client = module("httpx").Client(headers=HEADERS, timeout=TIMEOUT_SECONDS)
    stack.enter_context(client)
    return lambda: client.get(url + PATH).json()["id"]


def requests_call(url: str, stack: contextlib.ExitStack) -> Call:
    session = stack.enter_context(module("requests").Session())
    session.headers.update(HEADERS)
    return lambda: session.get(url + PATH, timeout=TIMEOUT_SECONDS).json()["id"]


def sdk_call(url: str, stack: contextlib.ExitStack) -> Call:
    timeout_ms = TIMEOUT_SECONDS * 1000
    sdk = module("dub").Dub(token=TOKEN, server_url=url, timeout_ms=timeout_ms)
    stack.enter_context(sdk)
    request = {"id": ID, "include_expanded_fields": True}
    return lambda: sdk.customers.get(request=request).id


# Programs. Their arguments are the server's URL and how many calls to make.
DUB_SCRIPT = f"""
import sys
from {{}} import Dub
with Dub(token={TOKEN!r}, server_url=sys.argv[1]) as client:
    for _ in range(int(sys.argv[2])):
        request = dict(id={ID!r}, include_expanded_fields=True)
        customer = client.customers.get(request=request)
print(customer.id)
"""
URLOPEN_SCRIPT = f"""
import json, sys, urllib.request
request = urllib.request.Request(sys.argv[1] + {PATH!r}, headers={HEADERS!r})
with urllib.request.urlopen(request, timeout={TIMEOUT_SECONDS}) as response:
    print(json.loads(response.read())["id"])
"""
# It starts a program and measures it. A process begins with the peak memory of the one that
# started it, so that must be a small one, not this one with all the peers loaded.
LAUNCHER = """
import os, sys, time
began = time.perf_counter()
child = os.posix_spawn(sys.executable, [sys.executable, "-c", *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(child, 0)
print(status, time.perf_counter() - began, usage.ru_maxrss)
"""


# --- How it is measured -------------------------------------------------------------------


def measure_in_turn(measures: dict[str, Callable[[], float]], rounds: int) -> Figures:
    """Measure each of them in every round, after one round that does not count.

    If the machine becomes faster or slower, it does so for all of them, and the ratios
    within a round stay true. Another one is first in each round.
    """
    names = list(measures)
    figures: Figures = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            figure = measures[name]()
            if number > 0:
                figures[name].append(figure)
    return figures


def measure_calls(url: str, rounds: int, count: int) -> Figures:
    """Microseconds of a call on a kept connection."""

    def microseconds(call: Call) -> float:
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) / count * 1e6

    with contextlib.ExitStack() as stack:
        calls = make_calls(url, stack)
        measures = {name: functools.partial(microseconds, call) for name, call in calls.items()}
        return measure_in_turn(measures, rounds)


def measure_threads(url: str, rounds: int, count: int) -> tuple[Figures, list[str]]:
    """Calls per second of threads that share a client, and the failures."""
    failures: list[str] = []

    def work(name: str) -> int:
        succeeded = 0
        for _ in range(count):
            try:
                calls[name]()
                succeeded += 1
            # The SDK fails at times: https://github.com/encode/httpcore/issues/1110
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
        return succeeded

    def calls_per_second(name: str) -> float:
        began = time.perf_counter()
        succeeded = sum(pool.map(work, [name] * THREADS))
        return succeeded / (time.perf_counter() - began)

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(THREADS))
        calls = make_calls(url, stack)
        names = [name for name in (OURS, SDK) if name in calls]
        measures = {name: functools.partial(calls_per_second, name) for name in names}
        figures = measure_in_turn(measures, rounds)
    return figures, failures


def measure_processes(
    url: str, rounds: int, environment: dict[str, str]
) -> tuple[Figures, Figures, float]:
    """Milliseconds and peak MiB of programs that fetch a customer; growth with many calls."""
    scripts = {URLOPEN: URLOPEN_SCRIPT, OURS: DUB_SCRIPT.format(OURS)}
    if is_installed("dub"):
        scripts[SDK] = DUB_SCRIPT.format("dub")
    peaks: Figures = {name: [] for name in scripts}

    def run(name: str) -> float:
        milliseconds, peak = launch(environment, scripts[name], url, "1")
        peaks[name].append(peak)
        return milliseconds

    measures = {name: functools.partial(run, name) for name in scripts}
    times = measure_in_turn(measures, rounds)
    for figures in peaks.values():
        del figures[0]  # the round that does not count
    _, peak = launch(environment, scripts[OURS], url, str(GROWTH_CALLS))
    return times, peaks, peak - statistics.median(peaks[OURS])


def launch(environment: dict[str, str], *arguments: str) -> tuple[float, float]:
    """Run a program. Returns its milliseconds and its peak memory in MiB."""
    command = [sys.executable, "-IS", "-c", LAUNCHER, *arguments]
    output = subprocess.check_output(command, env=environment, timeout=120)
    fetched, status, seconds, peak = output.decode().split()
    if fetched != ID or status != "0":
        raise SystemExit("a program fetched something else")
    units_per_mib = 2**20 if sys.platform == "darwin" else 2**10
    return float(seconds) * 1000, int(peak) / units_per_mib


# --- What is printed ----------------------------------------------------------------------


def ratio(figures: Figures, name: str, base: str) -> float:
    """Median of the ratios within a round. NaN if one of the two was not measured."""
    if name not in figures or base not in figures:
        return float("nan")
    pairs = zip(figures[name], figures[base])
    return statistics.median(figure / base_figure for figure, base_figure in pairs)


def two_places(figure: float) -> str:
    return "-" if figure != figure else f"{figure:.2f}"  # NaN differs from itself


def print_table(title: str, unit: str, base: str, figures: Figures) -> None:
    print(f"\n{title:42}{unit:>12}{'quartiles':>20}{'x ' + base:>18}")
    for name, each in figures.items():
        low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
        quartiles = f"{low:.1f} to {high:.1f}"
        times = two_places(ratio(figures, name, base))
        print(f"  {name:40}{middle:12.1f}{quartiles:>20}{times:>18}")


def print_target(what: str, figure: float, relation: str, limit: float) -> None:
    is_met = figure <= limit if relation == "<=" else figure >= limit
    verdict = "met" if is_met else "MISSED"
    if figure != figure:  # NaN
        verdict = "not measured"
    print(f"  {what:40}{two_places(figure):>12}{relation:>8} {limit:<11}{verdict:>18}")


def print_introduction(rounds: int, few: int, count: int) -> None:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"{python}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs")
    versions = [f"{OURS} {module(OURS).__version__}"]
    for name in PEERS:
        if is_installed(name):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    print(", ".join(versions))
    print(
        f"""
Each call fetches an expanded customer, {len(BODY)} bytes of JSON, from a server in another
process. dub_customers and the SDK make an object of it, the others a dictionary. They take
turns, after one round that does not count: {rounds} rounds of {count} calls (1), {few} rounds
of {count} calls in each thread (2), {rounds} rounds of one process (3). Figures are medians
over the rounds. "x" is the median of the ratios within a round. With https, all of them trust
the same self-signed certificate. urlopen makes a new connection for each call."""
    )


def measure(rounds: int, count: int, folder: str) -> None:
    # A program of (3) loads the authorities of the system, not the certificate made here.
    environment = dict(os.environ, PYTHONPATH=ROOT)
    few = max(2, rounds // 4)
    print_introduction(rounds, few, count)
    certificate = make_certificate(folder)
    https: Figures = {}
    if certificate:
        os.environ["SSL_CERT_FILE"] = certificate[0]
        os.environ["REQUESTS_CA_BUNDLE"] = certificate[0]
        with running_server(*certificate) as url:
            https = measure_calls(url, rounds, count)
    with running_server() as url:
        http = measure_calls(url, rounds, count)
        rates, failures = measure_threads(url, few, count)
        times, peaks, growth = measure_processes(url, rounds, environment)

    print_table("1. Call on a kept connection, http", "us", BARE, http)
    if https:
        print_table("1. Call on a kept connection, https", "us", BARE, https)
    else:
        print("\n1. Call on a kept connection, https: not measured, because openssl is missing")
    print_table(f"2. {THREADS} threads that share a client, http", "calls/s", SDK, rates)
    print(f"  calls that failed: {len(failures)}", *failures[:1])
    print_table("3. Process, from start to end, http", "ms", URLOPEN, times)
    print_table("3. Its peak memory", "MiB", URLOPEN, peaks)
    print(f"  {OURS} after {GROWTH_CALLS} calls: {growth:+.1f} MiB")

    print("\nTargets of dub_customers")
    print_target("call, http, x http.client", ratio(http, OURS, BARE), "<=", 1.0)
    print_target("call, https, x http.client", ratio(https, OURS, BARE), "<=", 1.0)
    print_target("call, http, urllib3 x ours", ratio(http, "urllib3", OURS), ">=", 1.5)
    print_target("call, https, urllib3 x ours", ratio(https, "urllib3", OURS), ">=", 1.5)
    print_target("call, http, SDK x ours", ratio(http, SDK, OURS), ">=", 8)
    print_target("call, https, SDK x ours", ratio(https, SDK, OURS), ">=", 8)
    print_target("process, x urlopen", ratio(times, OURS, URLOPEN), "<=", 1.4)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure dub_customers beside its peers.")
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="2 or more (40)")
    parser.add_argument("--quick", action="store_true", help="only see whether this runs")
    parser.add_argument("--serve", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            del os.environ[name]
    # The programs of (3) must not compile the modules each time.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.path.insert(0, ROOT)
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            measure(rounds=2, count=10, folder=folder)
        else:
            measure(rounds=max(2, options.rounds), count=50, folder=folder)


if __name__ == "__main__":
    main()
