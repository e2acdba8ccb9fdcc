# SPDX-License-Identifier: 0BSD
"""What a call costs: dub_customers beside bare http.client, its usual peers and the official SDK.

    python3 .ci/bench.py [--rounds N | --quick]

Everything runs on 127.0.0.1, against a server in another process. Peers are measured if the
Python that runs this can import them: urllib3, httpx, requests, and `dub`, the official SDK.
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
BARE, OURS, URLOPEN, SDK = "http.client", "dub_customers", "urlopen", "dub (SDK)"
THREADS = 16
GROWTH_CALLS = 4000
SECONDS = 10  # until a peer gives a call up
TOKEN = "dub_bench"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Accept": "application/json"}
ID = "cus_1KAP4CDPBSVMMBMH9XX3YZZ0Z"
PATH = f"/customers/{ID}?includeExpandedFields=true"
BODY = b"""{"id":"cus_1KAP4CDPBSVMMBMH9XX3YZZ0Z","externalId":"user_42","name":"Ada Lovelace",\
"email":"ada@example.com","avatar":"https://assets.example.com/ada.png","country":"GB",\
"sales":3,"saleAmount":12900,"createdAt":"2026-01-02T03:04:05.000Z","stripeCustomerId":null,\
"firstSaleAt":"2026-02-01T00:00:00.000Z","subscriptionCanceledAt":null,"programId":"prog_1",\
"link":{"id":"link_1KAP4CDPBSVMMBMH9XX3YZZ0Z","domain":"dub.sh","key":"try",\
"shortLink":"https://dub.sh/try","url":"https://dub.co","programId":"prog_1"},\
"partner":{"id":"pn_1","name":"Grace Hopper","email":"grace@example.com","image":null},\
"discount":{"id":"disc_1","amount":20,"type":"percentage","maxDuration":12,\
"description":null,"couponId":"co_1","couponTestId":null,"partnersCount":4}}"""
REPLY = b"HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Type: application/json"
REPLY += b"\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)

Figures = Dict[str, List[float]]  # by name, one of each round

# --- the server -----------------------------------------------------------------------------------


def serve(certificate: list[str]) -> None:
    """Answer whatever is asked with the customer, over TLS if given a certificate and its key.

    Raw sockets: a server dearer than its clients would make them look alike.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate else None
    if context is not None:
        context.load_cert_chain(*certificate)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        threading.Thread(target=accept, args=(listener, context), daemon=True).start()
        print(listener.getsockname()[1], flush=True)
        sys.stdin.read()  # ends when the parent does, however it does


def accept(listener: socket.socket, context: ssl.SSLContext | None) -> None:
    while True:  # as long as the process, which `serve` ends
        connection = listener.accept()[0]
        threading.Thread(target=converse, args=(connection, context), daemon=True).start()


def converse(connection: socket.socket, context: ssl.SSLContext | None) -> None:
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        stack.enter_context(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            connection = stack.enter_context(context.wrap_socket(connection, server_side=True))
        asked = b""
        for part in iter(functools.partial(connection.recv, 65536), b""):
            asked += part
            if asked.endswith(b"\r\n\r\n"):  # nobody here sends a body, or two requests at once
                connection.sendall(REPLY)
                asked = b""


@contextlib.contextmanager
def served(*certificate: str) -> Iterator[str]:
    """The URL of a server in another process."""
    command, pipe = [sys.executable, __file__, "--serve", *certificate], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        try:
            port = int(process.stdout.readline())  # type: ignore[union-attr]
            yield f"{'https' if certificate else 'http'}://127.0.0.1:{port}"
        finally:
            process.kill()


def throwaway_certificate(folder: str) -> list[str]:
    """Paths of a self-signed certificate for this machine and of its key; none without openssl."""
    paths = [os.path.join(folder, "certificate.pem"), os.path.join(folder, "key.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-out", paths[0], "-keyout", paths[1]]
    try:
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=6 * SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    return paths


# --- who is measured ------------------------------------------------------------------------------


def peers(url: str, stack: contextlib.ExitStack) -> dict[str, Callable[[], str]]:
    """By name, a call: it fetches the customer over a client of its own and returns the id."""
    calls: dict[str, Callable[[], str]] = {BARE: bare_call(url, stack)}
    ours = stack.enter_context(module(OURS).Dub(TOKEN, server_url=url, timeout_ms=1000 * SECONDS))
    calls[OURS] = lambda: ours.customers.get(ID, include_expanded_fields=True).id
    calls[URLOPEN] = functools.partial(urlopen_call, url + PATH)
    if importlib.util.find_spec("urllib3"):
        pool = stack.enter_context(module("urllib3").PoolManager(headers=HEADERS, timeout=SECONDS))
        calls["urllib3"] = lambda: json.loads(pool.request("GET", url + PATH).data)["id"]
    if importlib.util.find_spec("httpx"):
        client = stack.enter_context(module("httpx").Client(headers=HEADERS, timeout=SECONDS))
        calls["httpx"] = lambda: client.get(url + PATH).json()["id"]
    if importlib.util.find_spec("requests"):
        session = stack.enter_context(module("requests").Session())
        session.headers.update(HEADERS)
        calls["requests"] = lambda: session.get(url + PATH, timeout=SECONDS).json()["id"]
    if importlib.util.find_spec("dub"):
        sdk = stack.enter_context(module("dub").Dub(token=TOKEN, server_url=url))
        wanted = {"id": ID, "include_expanded_fields": True}
        calls[SDK] = lambda: sdk.customers.get(request=wanted, timeout_ms=1000 * SECONDS).id
    for name, call in calls.items():
        if call() != ID:
            raise SystemExit(f"{name} fetched something else")
    return calls


def module(name: str) -> Any:
    return importlib.import_module(name)


def bare_call(url: str, stack: contextlib.ExitStack) -> Callable[[], str]:
    scheme, _, netloc = url.partition("://")
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    connection = stack.enter_context(contextlib.closing(kind(netloc, timeout=SECONDS)))

    def call() -> str:
        connection.request("GET", PATH, headers=HEADERS)
        return json.loads(connection.getresponse().read())["id"]

    return call


def urlopen_call(url: str) -> str:
    request = urllib.request.Request(url, headers=HEADERS)
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return json.loads(response.read())["id"]


# Whole programs. Their arguments: the server's URL, and how many calls the first one makes.
DUB_SCRIPT = f"""
import sys
from {{}} import Dub
with Dub(token={TOKEN!r}, server_url=sys.argv[1]) as client:
    for _ in range(int(sys.argv[2])):
        customer = client.customers.get(request=dict(id={ID!r}, include_expanded_fields=True))
print(customer.id)
"""
URLOPEN_SCRIPT = f"""
import json, sys, urllib.request
request = urllib.request.Request(sys.argv[1] + {PATH!r}, headers={HEADERS!r})
with urllib.request.urlopen(request, timeout={SECONDS}) as response:
    print(json.loads(response.read())["id"])
"""
# The kernel charges a process with the peak of whoever started it: that must not be this one,
# which has all the peers loaded, but one smaller than what it starts.
LAUNCHER = """
import os, sys, time
began = time.perf_counter()
child = os.posix_spawn(sys.executable, [sys.executable, "-c", *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(child, 0)
print(status, time.perf_counter() - began, usage.ru_maxrss)
"""

# --- how it is measured ---------------------------------------------------------------------------


def in_turn(measures: dict[str, Callable[[], float]], rounds: int) -> Figures:
    """Measure all in each round, another first each time; a round before warms up.

    So a machine that changes its speed does so for all, and ratios within a round hold.
    """
    names = list(measures)
    figures: Figures = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            figure = measures[name]()
            if number:
                figures[name].append(figure)
    return figures


def warm(url: str, rounds: int, count: int) -> Figures:
    """Microseconds of a call on a kept connection."""

    def microseconds(call: Callable[[], str]) -> float:
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) / count * 1e6

    with contextlib.ExitStack() as stack:
        calls = peers(url, stack)
        return in_turn({n: functools.partial(microseconds, c) for n, c in calls.items()}, rounds)


def threaded(url: str, rounds: int, count: int) -> tuple[Figures, list[str]]:
    """Calls per second that threads make with one client; and what failed."""
    failures: list[str] = []

    def worker(name: str) -> None:
        for _ in range(count):
            try:
                calls[name]()
            except (
                Exception
            ) as error:  # of the SDK, see https://github.com/encode/httpcore/issues/1110
                failures.append(f"{name}: {type(error).__name__}: {error}")

    def rate(name: str) -> float:
        began, failed = time.perf_counter(), len(failures)
        list(pool.map(worker, [name] * THREADS))
        return (THREADS * count - len(failures) + failed) / (time.perf_counter() - began)

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(THREADS))
        calls = {name: call for name, call in peers(url, stack).items() if name in (OURS, SDK)}
        rates = in_turn({name: functools.partial(rate, name) for name in calls}, rounds)
    return rates, failures


def processes(url: str, rounds: int, environment: dict[str, str]) -> tuple[Figures, Figures, float]:
    """Milliseconds and peak MiB of processes that fetch one customer; MiB more for many."""
    scripts = {URLOPEN: URLOPEN_SCRIPT, OURS: DUB_SCRIPT.format("dub_customers")}
    if importlib.util.find_spec("dub"):
        scripts[SDK] = DUB_SCRIPT.format("dub")
    peaks: Figures = {name: [] for name in scripts}

    def run(name: str, count: int = 1) -> float:
        milliseconds, peak = launch(environment, scripts[name], url, str(count))
        peaks[name].append(peak)
        return milliseconds

    times = in_turn({name: functools.partial(run, name) for name in scripts}, rounds)
    run(OURS, 1 + GROWTH_CALLS)
    growth = peaks[OURS].pop() - statistics.median(peaks[OURS])
    return times, {name: each[1:] for name, each in peaks.items()}, growth


def launch(environment: dict[str, str], *arguments: str) -> tuple[float, float]:
    command, limit = [sys.executable, "-IS", "-c", LAUNCHER, *arguments], 12 * SECONDS
    done = subprocess.run(command, env=environment, stdout=-1, check=True, timeout=limit)
    fetched, status, seconds, peak = done.stdout.decode().split()
    if (fetched, status) != (ID, "0"):
        raise SystemExit("a script fetched something else")
    return float(seconds) * 1e3, int(peak) / (2**20 if sys.platform == "darwin" else 2**10)


# --- what is printed ------------------------------------------------------------------------------


def ratio(figures: Figures, name: str, base: str) -> float:
    """Median over the rounds of the ratio within a round; NaN if one was not measured."""
    if name not in figures or base not in figures:
        return float("nan")
    return statistics.median(a / b for a, b in zip(figures[name], figures[base]))


def two_places(figure: float) -> str:
    return "-" if figure != figure else f"{figure:.2f}"


def table(title: str, unit: str, base: str, figures: Figures) -> None:
    print(f"\n{title:46}{unit:>12}{'quartiles':>20}{'x ' + base:>18}")
    for name, each in figures.items():
        low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
        spread, times = f"{low:.1f} to {high:.1f}", two_places(ratio(figures, name, base))
        print(f"  {name:44}{middle:12.1f}{spread:>20}{times:>18}")


def targets(*lines: tuple[str, float, str, float]) -> None:
    print("\nTargets of dub_customers")
    for what, got, relation, limit in lines:
        met = got <= limit if relation == "<=" else got >= limit
        word = "not measured" if got != got else "met" if met else "MISSED"
        print(f"  {what:44}{two_places(got):>12}{relation:>8} {limit:<11}{word:>18}")


def describe(rounds: int, few: int, count: int) -> None:
    versions = [f"dub_customers {module(OURS).__version__}"]
    for name in ("urllib3", "httpx", "requests", "dub"):
        if importlib.util.find_spec(name):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"{python}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs")
    print(
        f"""{", ".join(versions)}

Each call fetches one expanded customer, {len(BODY)} bytes of JSON, from a raw-socket server in
another process on 127.0.0.1; dub_customers and the SDK make an object of it, the others a dict.
Peers take turns: {rounds} rounds of {count} calls (1), {few} of {count} calls a thread (2),
{rounds} of one process (3), after one round that does not count. Figures are medians over the
rounds, with quartiles; "x" is the median of the ratio within a round. Memory is by wait4.
For https, all trust one self-signed certificate; urlopen keeps no connection."""
    )


def measure(rounds: int, count: int, folder: str) -> None:
    # For the processes: the certificate of this run would spare them a real CA bundle.
    environment = dict(os.environ, PYTHONPATH=ROOT)
    certificate, https = throwaway_certificate(folder), {}
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE") if certificate else ():
        os.environ[name] = certificate[0]
    few = max(2, rounds // 4)
    describe(rounds, few, count)
    with served() as url:
        http = warm(url, rounds, count)
        table("1. Warm call, http", "us", BARE, http)
        if certificate:
            with served(*certificate) as tls_url:
                https = warm(tls_url, rounds, count)
            table("1. Warm call, https", "us", BARE, https)
        else:
            print("\n1. Warm call, https: left out, for want of an openssl to make a certificate")
        rates, failures = threaded(url, few, count)
        table(f"2. One client in {THREADS} threads, http", "calls/s", SDK, rates)
        print(f"  calls that failed: {len(failures)}", *failures[:1], sep="; ")
        times, peaks, growth = processes(url, rounds, environment)
    table("3. Process from start to end, http", "ms", URLOPEN, times)
    table("3. Its peak memory", "MiB", URLOPEN, peaks)
    print(f"\n{f'4. Peak memory, {GROWTH_CALLS} calls later':46}{growth:+12.1f} MiB")
    targets(
        ("warm call, http, x http.client", ratio(http, OURS, BARE), "<=", 1.0),
        ("warm call, https, x http.client", ratio(https, OURS, BARE), "<=", 1.0),
        ("warm call, http, urllib3 x ours", ratio(http, "urllib3", OURS), ">=", 1.5),
        ("warm call, https, urllib3 x ours", ratio(https, "urllib3", OURS), ">=", 1.5),
        ("warm call, http, SDK x ours", ratio(http, SDK, OURS), ">=", 10),
        ("warm call, https, SDK x ours", ratio(https, SDK, OURS), ">=", 10),
        (f"{THREADS} threads, calls/s, x SDK", ratio(rates, OURS, SDK), ">=", 8),
        ("process, x urlopen", ratio(times, OURS, URLOPEN), "<=", 1.3),
        ("process, x SDK", ratio(times, OURS, SDK), "<=", 0.25),
        ("peak memory, x urlopen", ratio(peaks, OURS, URLOPEN), "<=", 1.15),
        ("peak memory, x SDK", ratio(peaks, OURS, SDK), "<=", 0.6),
        (f"growth over {GROWTH_CALLS} calls, MiB", growth, "<=", 6),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure dub_customers beside its peers.")
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="2 or more (40)")
    parser.add_argument("--quick", action="store_true", help="2 rounds: a smoke run, no measure")
    parser.add_argument("--serve", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    for name in list(os.environ):  # no detours, and no module compiled more than once
        if name.lower().endswith("_proxy") or name == "PYTHONDONTWRITEBYTECODE":
            del os.environ[name]
    sys.path.insert(0, ROOT)
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            measure(2, 10, folder)
        else:
            measure(max(2, options.rounds), 50, folder)


if __name__ == "__main__":
    main()
