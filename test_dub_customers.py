# SPDX-License-Identifier: 0BSD
"""Tests of dub_customers.py, in the order of its sections.

Where a new case goes:

    api      plays the Dub API, by pytest-httpserver. `api.client` is a client of it.
    raw      plays what no proper server does: broken HTTP, lost connections, proxies.
    read     feeds bytes to the reader of responses, without a server.
    clock    replaces time and chance, so that no test waits.
    network  replaces the addresses of names.
    tls      holds a certificate, made with the command `openssl`.
"""

import asyncio
import base64
import copy
import dataclasses
import gc
import importlib.util
import json
import logging
import os
import pickle
import random
import re
import resource
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import types
import typing
import urllib.parse
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from email.message import Message
from pathlib import Path
from unittest.mock import Mock
from urllib.request import OpenerDirector

import pytest

import dub_customers
from dub_customers import APIError, Customer, Dub, DubError, NoResponseError, RequestTimeout

# For tests that fork.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
parametrize = pytest.mark.parametrize
MODULE = Path(dub_customers.__file__).resolve()
InvalidResponse = dub_customers.ResponseValidationError
README = Path(__file__).resolve().with_name("README.md").read_text("utf-8")
TOKEN = "!dub_s3cr3t~"
SWALLOWS = 1

EXPANDED = json.loads("""{
"id": "cus_1", "externalId": "user_42", "createdAt": "2026-01-02",
"name": "Ada", "email": "ada@x.co", "avatar": "ada.png", "stripeCustomerId": "cus_2",
"country": "GB", "sales": 0, "saleAmount": -12900.5, "firstSaleAt": "2026-02-01",
"subscriptionCanceledAt": "2026-03-01", "programId": "prog_2",
"link": {"id": "link_1", "domain": "dub.sh", "key": "try", "url": "https://dub.co",
         "shortLink": "https://dub.sh/try", "programId": "prog_1"},
"partner": {"id": "pn_1", "name": "Grace", "email": "g@x.co", "image": "i.png"},
"discount": {"id": "disc_1", "amount": 20, "type": "percentage", "maxDuration": 12,
             "description": "d", "couponId": "co_1", "couponTestId": "ct_1"}
}""")
# More than a float can hold.
EXPANDED["discount"]["partnersCount"] = 10**400
PLAIN = {"id": "cus_1", "externalId": "user_42", "createdAt": "2026-01-02"}
BODY = json.dumps(PLAIN).encode()
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
NOT_FOUND = {"error": {"code": "not_found", "message": "No such.", "doc_url": "url"}}


# --- Helpers ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Remove the proxies, keys and certificates of whoever runs the tests."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("DUB_API_KEY", "SSL_CERT_FILE"):
            monkeypatch.delenv(name)
    # A shell ignores Ctrl-C in what it starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def clock(monkeypatch):
    """Replace time and chance within dub_customers: only its waits take time.

    now, wall: the monotonic time and the time of day. waits: the seconds slept.
    chance: which random wait is drawn, from 0 (the shortest) to 1 (the longest).
    """

    def sleep(seconds):
        clock.waits.append(seconds)
        clock.now += seconds

    clock = types.SimpleNamespace(now=1000.0, wall=1_000_000_000.0, waits=[], chance=1)
    clock.sleep = sleep
    clock.monotonic = lambda: clock.now
    clock.time = lambda: clock.wall
    clock.uniform = lambda low, high: low + clock.chance * (high - low)
    monkeypatch.setattr(dub_customers, "time", clock)
    monkeypatch.setattr(dub_customers, "random", clock)
    return clock


class Api:
    """pytest-httpserver as the Dub API, and a client of it."""

    def __init__(self, httpserver):
        self.httpserver = httpserver
        self.url = httpserver.url_for("")
        self.client = Dub(TOKEN, server_url=self.url)

    def serve(self, data=PLAIN, status=200, headers=None):
        """Answer every request with this: bytes, or JSON of anything else."""
        if not isinstance(data, bytes):
            data = json.dumps(data)
        self.httpserver.expect_request(re.compile("")).respond_with_data(data, status, headers)

    @property
    def requests(self):
        return [request for request, _ in self.httpserver.log]


@pytest.fixture
def api(httpserver):
    return Api(httpserver)


def ask(client, id="cus_1", **options):
    """Make a call that must return the customer who was asked for."""
    assert client.customers.get(id, **options).id == id


def error_of(client, **options):
    """The error that a call raises. Neither it nor its causes show the token."""
    with pytest.raises(DubError) as caught:
        client.customers.get("cus_1", **options)
    assert "s3cr3t" not in everything_in(caught.value) + repr(client)
    return caught.value


def refusal(function, *args, **options):
    """The error for an invalid argument, as text: its class and message."""
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*args, **options)
    assert "s3cr3t" not in everything_in(caught.value)
    return f"{caught.typename}: {caught.value}"


def everything_in(error):
    """All that an error and its causes hold, as text."""
    text = ""
    while error is not None:
        text += f"{error!r} {error} {vars(error)}\n"
        error = error.__cause__ or error.__context__
    return text


def copies_of(thing):
    """The thing after pickle, copy and deepcopy."""
    return [pickle.loads(pickle.dumps(thing)), copy.copy(thing), copy.deepcopy(thing)]


def body_of(id):
    """The JSON of a customer with this id."""
    return json.dumps({**PLAIN, "id": id}).encode()


def response(status="200 OK", body=BODY, *fields):
    """The bytes of a response with a Content-Length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


class Peer:
    """The server's side of one connection. `number` counts the connections from 1."""

    def __init__(self, server, sock, number):
        self.server = server
        self.sock = sock
        self.number = number

    def request(self):
        """Wait for a request. Returns its head, or "" if the client has gone."""
        head = ""
        while not head.endswith("\r\n\r\n"):
            data = self.sock.recv(65536)
            if not data:
                return ""
            head += data.decode("latin-1")
        self.server.requests.append(head)
        self.server.served.append(self.number)
        return head

    def send(self, data):
        self.sock.sendall(data)

    def answer_by_id(self):
        """Serve customers until the client goes, each with the id that was asked for."""
        for head in iter(self.request, ""):
            self.send(response("200 OK", body_of(asked_id(head))))

    def wait_for_end(self):
        while self.sock.recv(65536):
            pass

    def start_tls(self, context):
        self.sock = context.wrap_socket(self.sock, server_side=True)
        self.server.sockets.append(self.sock)


class RawServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Runs `script(peer)` in a thread for each connection, and then closes it.

    An exception in a script fails the test, unless it only means that the client has gone.
    """

    request_queue_size = 64

    def __init__(self, script=Peer.answer_by_id, tls=None, **options):
        super().__init__(("127.0.0.1", 0), None)
        self.script = script
        self.tls = tls
        self.port = self.server_address[1]
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}"
        if tls is not None:
            self.url = f"https://localhost:{self.port}"
            options = {"ssl_context": tls.trusting, **options}
        self.client = Dub(TOKEN, server_url=self.url, **options)
        self.connections = 0
        self.requests = []
        # For each request, the number of its connection.
        self.served = []
        self.sockets = []
        # Counts the connections that have ended.
        self.gone = threading.Semaphore(0)

    def process_request(self, sock, address):
        self.connections += 1
        self.sockets.append(sock)
        sock.settimeout(20)
        super().process_request(sock, self.connections)

    def finish_request(self, sock, number):
        peer = Peer(self, sock, number)
        try:
            if self.tls is not None:
                peer.start_tls(self.tls.server)
            self.script(peer)
        finally:
            peer.sock.close()
            self.gone.release()

    def handle_error(self, sock, number):
        if not isinstance(sys.exc_info()[1], OSError):
            # pytest reports what a thread raises.
            raise

    def wait_until_gone(self, count=1):
        for _ in range(count):
            assert self.gone.acquire(timeout=5)

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.001,))
        self.thread.start()
        return self

    def __exit__(self, *exc_info):
        if self.client is not None:
            self.client.close()
        self.shutdown()
        self.thread.join()
        for sock in self.sockets:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        # This waits for the threads.
        self.server_close()


@pytest.fixture
def raw():
    """Starts servers that have a client: `server = raw(script, tls, **options)`."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(RawServer(*args, **options))


def one_each(*responses):
    """A script: the first connection gets the first response, and so on; the rest the last."""

    def script(peer):
        peer.request()
        peer.send(responses[min(peer.number, len(responses)) - 1])

    return script


def asked_id(head):
    """The customer's id in the head of a request."""
    path = head.split(" ")[1].split("?")[0]
    return urllib.parse.unquote(path.rpartition("/")[2])


def fields_of(head):
    """The header fields of a request, sorted, with names in lower case."""
    fields = [line.split(": ", 1) for line in head.split("\r\n")[1:-2]]
    return sorted((name.lower(), value) for name, value in fields)


class SlowSocket(socket.socket):
    """Receives one byte at a time."""

    def recv_into(self, buffer):
        return super().recv_into(buffer, 1)


def read(data, kind=socket.socket, ended=False, seconds=5):
    """What the reader makes of a response, which must cost little CPU time.

    ended: the stream ends after it. Otherwise the connection stays open.
    seconds: until the deadline.
    """
    started = time.process_time()
    near, far = socket.socketpair()
    with far, kind(fileno=near.detach()) as sock:
        far.sendall(data)
        if ended:
            far.shutdown(socket.SHUT_WR)
        connection = dub_customers._Connection(sock)
        try:
            return connection.exchange(b"GET", time.monotonic() + seconds)
        finally:
            assert time.process_time() - started < 3


def assert_understood(data, body=b"{}", keep_alive=True):
    """The reader accepts these bytes: byte by byte, and with data behind them."""
    for result in (read(data, SlowSocket), read(data + response())):
        assert (result.body, result.keep_alive) == (body, keep_alive)


@pytest.fixture
def network(monkeypatch, clock):
    """Let every name have `network.addresses`, of (family, port).

    `names` are looked up. Without addresses, the `error` is raised after 0.25 seconds.
    `waited` are the seconds spent on the port SWALLOWS, where packets are lost.
    """

    def resolve(host, port, *args, **options):
        network.names.append((host, port))
        if not network.addresses:
            clock.now += 0.25
            raise network.error
        kind = (socket.SOCK_STREAM, 6, "")
        return [(family, *kind, ("127.0.0.1", port)) for family, port in network.addresses]

    def connect(sock, address):
        if address[1] == SWALLOWS:
            network.waited.append(sock.gettimeout())
            clock.now += sock.gettimeout()
            raise socket.timeout("timed out")
        really_connect(sock, address)

    network = types.SimpleNamespace(addresses=[], names=[], waited=[])
    network.error = socket.gaierror(-2, "Name or service not known")
    really_connect = socket.socket.connect
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    return network


@pytest.fixture(scope="session")
def tls(tmp_path_factory):
    """TLS contexts: of a server called localhost, and of a client that trusts it."""
    pem = tmp_path_factory.mktemp("tls") / "both.pem"
    command = """openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256
        -subj /CN=test -addext subjectAltName=DNS:localhost -keyout both.pem -out both.pem
        -addext keyUsage=digitalSignature,keyCertSign"""
    subprocess.run(command.split(), cwd=str(pem.parent), check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(str(pem))
    trusting = ssl.create_default_context(cafile=str(pem))
    return types.SimpleNamespace(server=server, trusting=trusting, pem=str(pem))


# --- Errors -------------------------------------------------------------------------------
# The status alone decides the class. Every error can be printed, pickled and copied.

CLASSES = {
    400: dub_customers.BadRequest,
    401: dub_customers.Unauthorized,
    403: dub_customers.Forbidden,
    404: dub_customers.NotFound,
    409: dub_customers.Conflict,
    410: dub_customers.InviteExpired,
    422: dub_customers.UnprocessableEntity,
    429: dub_customers.RateLimitExceeded,
    500: dub_customers.InternalServerError,
    502: APIError,  # one without a class of its own
}
PUBLIC = """APIError BadRequest Conflict Customer Customers Discount Dub DubError Forbidden
GetCustomerRequest InternalServerError InviteExpired Link NoResponseError NotFound Partner
RateLimitExceeded RequestTimeout ResponseValidationError Unauthorized
UnprocessableEntity""".split()


def test_all_names_exactly_what_is_public():
    assert sorted(dub_customers.__all__) == PUBLIC


@parametrize("name", PUBLIC)
def test_public_class_has_a_docstring_and_hints_that_resolve(name):
    public = getattr(dub_customers, name)
    # dataclass() makes one up that begins like this.
    assert not (public.__doc__ or f"{name}(").startswith(f"{name}(")
    typing.get_type_hints(public)
    typing.get_type_hints(public.__init__)


def test_errors_form_the_documented_tree():
    assert {each.__bases__ for each in CLASSES.values()} == {(APIError,), (DubError,)}
    assert NoResponseError.__bases__ == (DubError,)
    assert InvalidResponse.__bases__ == (DubError,)
    assert RequestTimeout.__bases__ == (NoResponseError, TimeoutError)


@parametrize("status", CLASSES)
def test_status_decides_the_class(api, status):
    api.serve({"error": {"code": "never_heard_of"}}, status)
    error = error_of(api.client, max_retries=0)
    assert type(error) is CLASSES[status]


def test_api_error_holds_what_the_server_said(api):
    api.serve(NOT_FOUND, 404, {"X-Request-Id": "r1"})
    error = error_of(api.client)
    assert error.code == "not_found"
    assert error.message == "No such."
    assert error.doc_url == "url"
    assert error.headers["x-request-id"] == "r1"
    assert json.loads(error.body) == NOT_FOUND
    assert str(error) == "404 not_found: No such."


def test_api_error_can_be_made_of_nothing():
    values = vars(dub_customers.NotFound())
    assert isinstance(values.pop("headers"), Message)
    nothing = {"message": "", "status_code": 0, "code": None, "doc_url": None, "body": b""}
    assert values == {**nothing, "retry_after": None}


ERRORS = [kind("m", 418, "c", "d", Message(), b"x") for kind in CLASSES.values()]
ERRORS += [NoResponseError("m"), RequestTimeout("m"), InvalidResponse("m", body=b"x")]


@parametrize("error", ERRORS, ids=repr)
def test_error_survives_pickle_and_copy(error):
    error.retry_after = 5.0
    for twin in copies_of(error):
        assert (type(twin), str(twin)) == (type(error), str(error))
        twin.headers = getattr(error, "headers", None)  # which have no ==
        assert vars(twin) == {"headers": None, **vars(error)}


def test_str_of_an_error_is_one_line_of_at_most_300_characters():
    odd = "two\r\nlines\0 \x1b[31m\u2028\u202e end "
    assert str(NoResponseError(odd)) == "two lines [31m end"
    assert str(APIError(odd, 418, "pot\n")) == "418 pot : two lines [31m end"
    assert str(NoResponseError("y" * 301)) == "y" * 300
    assert str(APIError("y" * 999, 418)) == "418: " + "y" * 295


# --- Models -------------------------------------------------------------------------------
# A JSON object that fits becomes a dataclass. What does not fit is named by its path.

MODELS = {"": Customer, "link": dub_customers.Link, "partner": dub_customers.Partner}
MODELS["discount"] = dub_customers.Discount
REQUIRED = {
    "": ["id", "externalId", "createdAt"],
    "link": ["id", "domain", "key", "shortLink", "url"],
    "partner": ["id", "name"],
    "discount": ["id", "amount", "type"],
}
NUMBERS = ("sales", "saleAmount", "amount", "maxDuration", "partnersCount")
FIELDS = [(owner, key) for owner in MODELS for key in EXPANDED.get(owner, EXPANDED)]
OPTIONAL_FIELDS = [(owner, key) for owner, key in FIELDS if key not in REQUIRED[owner]]


def changed(owner, **values):
    """The expanded customer with other values in the object that is called `owner`."""
    data = copy.deepcopy(EXPANDED)
    data.get(owner, data).update(values)
    return data


def field_of(customer, owner, key):
    """The attribute that holds the key of the object."""
    name = re.sub("[A-Z]", lambda match: "_" + match[0].lower(), key)
    return getattr(getattr(customer, owner, customer), name)


def mismatch(data, *path, model=Customer):
    with pytest.raises(InvalidResponse) as caught:
        model.from_json(data, *path)
    return str(caught.value)


@parametrize(("owner", "key"), FIELDS)
def test_each_field_is_read_from_its_key(owner, key):
    value = field_of(Customer.from_json(EXPANDED), owner, key)
    if key not in MODELS:
        assert value == EXPANDED.get(owner, EXPANDED)[key]


@parametrize(("owner", "key"), OPTIONAL_FIELDS)
def test_optional_field_is_none_if_null_or_absent(owner, key):
    data = changed(owner, **{key: None})
    assert field_of(Customer.from_json(data), owner, key) is None
    del data.get(owner, data)[key]
    assert field_of(Customer.from_json(data), owner, key) is None


@parametrize(("owner", "key"), FIELDS)
def test_field_of_another_type_is_named_by_its_path(owner, key):
    path = f"customer.{owner}.{key}".replace("..", ".")
    values = {"string": "12", "number": 12, "boolean": True, "array": [], "object": {}}
    if key in REQUIRED[owner]:
        values["null"] = None
    kind = "number" if key in NUMBERS else "object" if key in MODELS else "string"
    del values[kind]
    for got, value in values.items():
        expected = f"{path}: expected {kind}, got {got}"
        assert mismatch(changed(owner, **{key: value})) == expected


@parametrize(("value", "got"), [(float("nan"), "nan"), (float("-inf"), "-inf"), (1j, "1j")])
def test_number_that_json_cannot_hold_is_rejected(value, got):
    expected = f"customer.sales: expected number, got {got}"
    assert mismatch(changed("", sales=value)) == expected


@parametrize("owner", MODELS)
def test_from_json_takes_only_an_object(owner):
    model = MODELS[owner]
    assert mismatch([], model=model) == f"{owner or 'customer'}: expected object, got array"
    assert mismatch({}, "a.b", model=model) == "a.b.id: expected string, got null"


def test_models_are_frozen_values():
    customer = Customer.from_json(EXPANDED)
    assert copies_of(customer) == [customer] * 3
    assert customer != Customer.from_json(changed("link", key="other"))
    for model in (customer, customer.link, customer.partner, customer.discount):
        with pytest.raises(dataclasses.FrozenInstanceError):
            model.id = "other"


def test_raw_is_the_decoded_object_and_no_part_of_the_value():
    data = {**EXPANDED, "unknown": float("nan")}
    customer = Customer.from_json(data)
    assert customer.raw is data
    assert customer == Customer.from_json(EXPANDED)
    assert hash(customer) == hash(Customer.from_json(EXPANDED))
    assert "unknown" not in repr(customer)
    assert Customer(*PLAIN.values()).raw == {}


# --- Client -------------------------------------------------------------------------------
# `Dub(...).customers.get(...)` returns the customer or raises, before the deadline.


def test_arguments_and_their_defaults_are_as_documented():
    options = {"timeout_ms": 30_000, "max_retries": 2, "ssl_context": None}
    options["server_url"] = "https://api.dub.co"
    assert Dub.__init__.__kwdefaults__ == options
    options = "include_expanded_fields request timeout_ms max_retries http_headers".split()
    assert dub_customers.Customers.get.__kwdefaults__ == dict.fromkeys(options)


def test_token_is_read_from_the_environment_once(raw, monkeypatch):
    server = raw()
    monkeypatch.setenv("DUB_API_KEY", "dub_now")
    client = Dub(server_url=server.url)
    monkeypatch.setenv("DUB_API_KEY", "dub_later")
    ask(client)
    assert ("authorization", "Bearer dub_now") in fields_of(server.requests[0])


def test_token_function_is_called_before_each_request(api, clock):
    api.serve({}, 503)
    error_of(Dub(["dub_2", "dub_1", "dub_0"].pop, server_url=api.url))
    sent = [request.headers["Authorization"] for request in api.requests]
    assert sent == ["Bearer dub_0", "Bearer dub_1", "Bearer dub_2"]


def test_error_of_a_token_function_is_passed_on():
    error = TimeoutError("from the function")
    with pytest.raises(TimeoutError) as caught:
        Dub(Mock(side_effect=error)).customers.get("cus_1")
    assert caught.value is error


@parametrize("end", [Dub.close, Dub.__exit__])
def test_close_closes_the_idle_connections(raw, end):
    server = raw()
    ask(server.client)
    assert not server.gone.acquire(timeout=0.01)
    end(server.client)
    server.wait_until_gone()


def test_closed_client_refuses_calls(api):
    api.client.close()
    api.client.close()  # harmless
    with pytest.raises(RuntimeError, match="is closed$"):
        api.client.customers.get("cus_1")
    assert api.requests == []


def test_call_in_progress_goes_on_after_close(raw, clock):
    def script(peer):
        peer.request()
        server.client.close()
        peer.send([response("503 X"), b"H", response()][peer.number - 1])
        if peer.number == 3:
            peer.wait_for_end()

    server = raw(script)
    ask(server.client)
    # It leaves no connection.
    server.wait_until_gone(3)


@parametrize("duplicate", [lambda dub: pickle.loads(pickle.dumps(dub)), copy.deepcopy])
def test_pickle_and_deepcopy_carry_the_options(api, clock, duplicate):
    api.serve({}, 503)
    url = api.httpserver.url_for("/v1//")
    error_of(duplicate(Dub(TOKEN, server_url=url, timeout_ms=8_000, max_retries=9)))
    assert clock.waits == [0.5, 1, 2, 4]
    assert api.requests[0].path == "/v1/customers/cus_1"
    assert api.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


@parametrize("duplicate", [pickle.dumps, copy.deepcopy])
def test_ssl_context_is_never_silently_lost(duplicate, tls):
    with pytest.raises(TypeError, match="SSLContext"):
        duplicate(Dub(TOKEN, ssl_context=tls.trusting))


@parametrize("max_retries", [0, 1, 3])
def test_max_retries_is_how_often_a_request_is_sent_again(api, clock, max_retries):
    api.serve({}, 500)
    error_of(Dub(TOKEN, server_url=api.url, max_retries=max_retries))
    error_of(api.client, max_retries=max_retries)
    assert len(api.requests) == 2 * (max_retries + 1)


# With https, it waits for the TLS handshake.
@parametrize("scheme", ["http", "https"])
def test_timeout_names_timeout_ms_and_the_server(raw, scheme):
    server = raw(Peer.wait_for_end)
    url = f"{scheme}://{server.address}"
    error = error_of(Dub(TOKEN, server_url=url, timeout_ms=2**31 - 1), timeout_ms=50)
    assert type(error) is RequestTimeout
    assert "timeout_ms=50" in str(error)
    assert server.address in str(error)
    assert server.connections == 1  # it is not retried


def test_timeout_covers_all_retries(api, clock):
    api.serve({}, 503)
    # The third wait, of two seconds, would end at the deadline.
    assert error_of(api.client, timeout_ms=3500, max_retries=9).status_code == 503
    assert clock.waits == [0.5, 1]


@parametrize("drop", [b"x", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_timeout_ends_a_response_that_drips(raw, tls, drop):
    def script(peer):
        peer.request()
        peer.send(response())
        peer.request()
        for _ in range(100):
            time.sleep(0.02)
            peer.send(drop)

    server = raw(script, tls)
    ask(server.client)
    assert type(error_of(server.client, timeout_ms=80)) is RequestTimeout
    assert server.connections == 1


def test_timeout_ends_a_request_that_is_read_slowly(raw):
    def script(peer):
        while not done.wait(0.01):
            peer.sock.recv(4096)

    done = threading.Event()
    headers = {"X-Large": "x" * 18_000_000}
    error = error_of(raw(script).client, timeout_ms=80, http_headers=headers)
    done.set()
    assert type(error) is RequestTimeout


OUTCOMES = [(ConnectionError("broken"), "broken"), (KeyboardInterrupt(), "interrupted")]


@parametrize(("error", "outcome"), OUTCOMES)
def test_request_leaves_one_debug_line(network, caplog, error, outcome):
    caplog.set_level(logging.DEBUG)
    network.error = error
    with pytest.raises((NoResponseError, KeyboardInterrupt)):
        Dub(TOKEN).customers.get("cus_1", include_expanded_fields=True, max_retries=0)
    line = f"GET /customers/cus_1?includeExpandedFields=true: {outcome}, 250.0 ms"
    assert caplog.record_tuples == [("dub_customers", logging.DEBUG, line)]


def test_vendored_copy_logs_under_its_own_name(raw, monkeypatch, caplog):
    spec = importlib.util.spec_from_file_location("vendored", str(MODULE))
    vendored = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vendored", vendored)
    spec.loader.exec_module(vendored)
    caplog.set_level(logging.DEBUG)
    server = raw()
    with vendored.Dub(TOKEN, server_url=server.url) as client:
        ask(client)
    assert caplog.records[-1].name == "vendored"
    assert caplog.messages[-1].startswith("GET /customers/cus_1: 200, ")
    assert fields_of(server.requests[0]) == expected_fields(server)


def test_threads_that_share_a_client_get_their_own_customers(raw):
    def script(peer):
        # A connection ends after two responses. Every fifth breaks in the third one.
        for _, head in zip(range(2), iter(peer.request, "")):
            peer.send(response("200 OK", body_of(asked_id(head))))
        if peer.number % 5 == 0:
            peer.request()
            peer.send([b"", OK[:-5], response()[:-5], CHUNKED + b"x\r\n"][peer.number % 4])

    client = raw(script, max_retries=9).client
    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(ask, client, f"ext_{number}") for number in range(160)]:
            future.result()


# --- Arguments ----------------------------------------------------------------------------
# An invalid argument is a TypeError or ValueError that names it, before any request.


@parametrize(
    ("id", "segment"),
    [
        ("../a?b=c#d\r\n", "%2E%2E%2Fa%3Fb%3Dc%23d%0D%0A"),
        # The server removes the first "ext_" only. It would strip ".rsc".
        ("ext_ext_5.rsc", "ext_ext_5%2Ersc"),
        ("ext_ü客🎉", "ext_%C3%BC%E5%AE%A2%F0%9F%8E%89"),
    ],
)
def test_id_is_sent_as_one_path_segment(raw, id, segment):
    server = raw()
    ask(server.client, id)
    assert server.requests[0].startswith(f"GET /customers/{segment} HTTP/1.1\r\n")


@parametrize(("expand", "said"), [(None, ""), (True, "=true"), (False, "=false")])
def test_expansion_is_said_in_lower_case_or_not_at_all(api, expand, said):
    api.serve()
    request = {"id": "cus_1", "include_expanded_fields": expand}
    ask(api.client, include_expanded_fields=expand)
    api.client.customers.get(request=types.MappingProxyType(request))
    expected = ("includeExpandedFields" + said) * bool(said)
    assert [each.query_string.decode() for each in api.requests] == [expected] * 2


@parametrize(
    ("arguments", "message"),
    [
        ({"request": {}}, "TypeError: id: expected str"),
        ({"id": "a", "include_expanded_fields": 1}, "TypeError: include_exp"),
        ({"request": []}, "TypeError: request: expected Mapping"),
        ({"request": {"id": "a", "expand": 1}}, "TypeError: request: unexpected key 'exp"),
        ({"request": {"id": "a"}, "id": "a"}, "TypeError: pass either"),
        ({"request": {}, "include_expanded_fields": False}, "TypeError: pass either"),
        ({"id": "a", "timeout_ms": True}, "TypeError: timeout_ms: expected int or"),
        ({"id": "a", "timeout_ms": 0}, "ValueError: timeout_ms: expected"),
        ({"id": "a", "http_headers": []}, "TypeError: http_headers: expected Mapping"),
    ],
)
def test_invalid_argument_of_get_is_refused(api, arguments, message):
    assert refusal(api.client.customers.get, **arguments).startswith(message)
    assert api.requests == []


@parametrize("id", ["", ".", "..", "ext_", "ext_\ud800", "cus_\udfff"])
def test_id_that_cannot_be_meant_is_refused(api, id):
    assert refusal(api.client.customers.get, id).startswith("ValueError: id: ")


@parametrize(
    ("options", "message"),
    [
        ({"token": None}, "ValueError: DUB_API_KEY is missing, or"),
        ({"token": b"dub_1"}, "TypeError: token: expected str, got b"),
        ({"ssl_context": False}, "TypeError: ssl_context: expected SSLC"),
        ({"timeout_ms": 2**31}, "ValueError: timeout_ms: expected"),
        ({"timeout_ms": float("nan")}, "ValueError: timeout_ms: expected"),
        ({"max_retries": False}, "TypeError: max_retries: expected int"),
        ({"max_retries": -1}, "ValueError: max_retries: expected 0 or more"),
        ({"server_url": None}, "TypeError: server_url: expected str"),
    ],
)
def test_invalid_option_of_a_client_is_refused(options, message):
    assert refusal(Dub, **{"token": TOKEN, **options}).startswith(message)


def expected_fields(server, **others):
    """The header fields of a request to the server, as fields_of() gives them."""
    fields = {
        "accept": "application/json",
        "accept-encoding": "identity",
        "authorization": f"Bearer {TOKEN}",
        "host": server.address,
        "user-agent": f"dub_customers/{dub_customers.__version__} (Python)",
    }
    return sorted({**fields, **others}.items())


OURS = ["accept", "ACCEPT-Encoding", "authorization", "hOST", "User-agent"]


@parametrize("names", [[], ["X-Name", "x-name"], ["!#$%&'*+.^_`|~-09azAZ"], OURS])
@parametrize("value", ["", "a\t ~\x80\xff"])
def test_http_headers_are_sent_once_in_place_of_ours(raw, names, value):
    server = raw()
    ask(server.client, http_headers=dict.fromkeys(names, value))
    sent = {name.lower(): value for name in names}
    assert fields_of(server.requests[0]) == expected_fields(server, **sent)


BAD_NAMES = ["", "X\n", "é", b"X", "connection", "Content-Length"]
BAD_NAMES += ["TRANSFER-ENCODING", "Proxy-Authorization"]
BAD_VALUES = ["a\nY: b", "\x7f", "\u0100", b"a"]
BAD_HEADERS = [(name, "a") for name in BAD_NAMES] + [("X-Odd", value) for value in BAD_VALUES]


@parametrize(("name", "value"), BAD_HEADERS)
def test_http_headers_that_cannot_be_sent_are_refused(api, name, value):
    told = refusal(api.client.customers.get, "cus_1", http_headers={name: value})
    assert re.match(f"(Value|Type)Error: http_headers.*{str(name).strip()}", told)


# The usual fault is a line break, because the token was read from a file.
@parametrize("token", ["", "s3cr3t\n", "dub s3cr3t", "s3cr3t\x7f", "s3cr3té"])
@parametrize("source", ["token", "token()", "DUB_API_KEY"])
def test_token_that_no_header_can_carry_is_refused(monkeypatch, source, token):
    monkeypatch.setenv("DUB_API_KEY", token)
    given = {"token": token, "token()": lambda: token, "DUB_API_KEY": None}[source]
    told = refusal(lambda: Dub(given).customers.get("cus_1"))
    assert told.startswith(f"ValueError: {source} ")


class OddText(str):
    """Shows itself as something else, as the members of a str enum do."""

    __str__ = __format__ = __repr__ = Mock(return_value="Odd.VALUE")


def test_str_subclass_counts_by_its_value(raw):
    server = raw()
    headers = {OddText("X-Name"): OddText("value")}
    client = Dub(OddText(TOKEN), server_url=OddText(server.url))
    ask(client, OddText("ext_1"), http_headers=headers)
    assert fields_of(server.requests[0]) == expected_fields(server, **{"x-name": "value"})


GOOD_URLS = """http://LOCALHOST http://localhost.:1 http://127.9.8.77 http://[0:0::1]
https://x.example. https://a_b-c https://[::ffff:10.0.0.1] HTTPS://h:65535/a%20b""".split()


@parametrize("url", GOOD_URLS)
def test_server_url_is_accepted(url):
    # A warning would be an error.
    Dub(TOKEN, server_url=url)


BAD_URLS = """api.dub.co ftp://h https://:80 https://h/?q https://h# https://h: https://h:0
https://h:x https://a..b https://dübb.co https://[::1 https://[v1.a] https://[::1]x
https://[..]:1 https://u:s3cr3t@h http://h:x/@s3cr3t""".split()
BAD_URLS += ["https://h/a b", "https://h\n", "https://" + "a" * 64]


@parametrize("url", BAD_URLS)
def test_server_url_is_refused_and_shown_unless_it_may_hold_a_password(url):
    expected = "ValueError: server_url: expected http(s)://host[:port][/path]"
    if "@" not in url:
        expected += f", got {url!r}"
    assert refusal(Dub, TOKEN, server_url=url) == expected


@parametrize("host", ["example.com:80", "127.0.0.1.x", "localhost.x", "1127.0.0.1"])
def test_plain_http_to_another_machine_warns_at_the_callers_line(host):
    with pytest.warns(UserWarning, match=re.escape(f"{host} unencrypted")) as caught:
        Dub(TOKEN, server_url=f"http://{host}/v1")
    assert [each.filename for each in caught] == [__file__]


# --- Retries ------------------------------------------------------------------------------
# What may pass is tried again after a random wait, if the longest such wait fits.

MAY_PASS = [408, 429, 500, 502, 503, 504]


@parametrize("status", MAY_PASS + [302, 400, 401, 404, 407, 409, 410, 422, 430, 501, 505])
def test_status_is_retried_if_it_may_pass(api, clock, status):
    api.serve({}, status)
    assert error_of(api.client).status_code == status
    assert clock.waits == [0.5, 1] * (status in MAY_PASS)


@parametrize("data", [b"", OK[:-3], response()[:-5], b"SSH-2.0-x\r\n"])
def test_lost_or_malformed_response_is_retried(raw, clock, data):
    ask(raw(one_each(data, data, response())).client)
    assert clock.waits == [0.5, 1]


@parametrize(("chance", "waits"), [(0, [0] * 7), (1, [0.5, 1, 2, 4, 8, 8, 8])])
def test_random_wait_doubles_up_to_eight_seconds(api, clock, chance, waits):
    clock.chance = chance
    api.serve({}, 500)
    error_of(api.client, max_retries=7, timeout_ms=99_999)
    assert clock.waits == waits


# A random time is added: as long as the wait told, at least 0.5 and at most 4 seconds. If
# the longest wait would not end within 30 seconds, there is none.
WAITS = [(429, 0, 1, [0.5]), (429, 1, 1, [2]), (429, 7, 1, [11]), (429, 7, 0, [7])]
WAITS += [(503, 25, 1, [29]), (503, 26, 0, []), (500, 3600, 1, [0.5])]


@parametrize(("status", "seconds", "chance", "waits"), WAITS)
def test_retry_after_counts_for_429_and_503(api, clock, status, seconds, chance, waits):
    clock.chance = chance
    api.serve({}, status, {"Retry-After": str(seconds)})
    error_of(api.client, max_retries=1)
    assert clock.waits == waits


# The clock of this machine shows 01:46:40, that of the server ten seconds less.
DATE = "Date: Sun, 09 Sep 2001 01:46:30 GMT"
MOMENTS = [
    ("007", DATE, 7),
    ("1234567890", DATE, None),
    ("1000000000500", DATE, 10.5),
    ("1000000000500", "Date: yesterday", 0.5),
    ("10000000005000", DATE, None),
    ("Sun, 09 Sep 2001 01:46:40 GMT", DATE, 10),
    ("Sun, 09 Sep 2001 01:46:30 GMT", "X: y", 0),
    # An old form, without a zone: it is UTC all the same.
    ("Sun Sep  9 01:46:40 2001", DATE, 10),
    # Python's own functions raise several kinds of errors for these.
    ("6 Nov 1994 1.2.3.4 GMT", DATE, None),
    ("6 Nov 1994 1:2:3 -" + "9" * 400, DATE, None),
]


@parametrize(("value", "date", "seconds"), MOMENTS)
def test_retry_after_is_seconds_or_a_moment(raw, clock, monkeypatch, value, date, seconds):
    monkeypatch.setenv("TZ", "EST5")
    time.tzset()
    failed = response("429 X", b"{}", f"Retry-After: {value}", date)
    error = error_of(raw(one_each(failed)).client, max_retries=0)
    assert error.retry_after == pytest.approx(seconds)


# --- Connections --------------------------------------------------------------------------
# A connection is kept, and used again only if nothing is wrong with it.


def test_instrumentation_that_wraps_the_opener_sees_each_call(api, monkeypatch):
    def traced_open(opener, request, **options):
        request.add_header("traceparent", "00-1")
        answer = really_open(opener, request, **options)
        answers.append(answer)
        return answer

    answers = []
    really_open = OpenerDirector.open
    monkeypatch.setattr(OpenerDirector, "open", traced_open)
    api.serve(NOT_FOUND, 404, {"X": "y"})
    assert error_of(api.client).code == "not_found"
    (answer,) = answers
    assert (answer.getcode(), answer.url) == (404, f"{api.url}customers/cus_1")
    assert answer.headers["X"] == answer.info()["X"] == "y"
    assert answer.fp.closed
    assert api.requests[0].headers["traceparent"] == "00-1"


@parametrize("status", [300, 301, 399, 400])
def test_redirect_is_an_error_that_names_the_target(api, status):
    target = api.httpserver.url_for("/elsewhere")
    api.serve({}, status, {"Location": target})
    is_named = f"redirect to {target} not followed" in str(error_of(api.client))
    assert is_named is (status < 400)
    assert len(api.requests) == 1


def test_packets_are_not_delayed(raw, monkeypatch):
    monkeypatch.setattr(socket.socket, "setsockopt", Mock())
    ask(raw().client)
    options = [each.args for each in socket.socket.setsockopt.mock_calls]
    assert options == [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]


def open_many(raw, count):
    """A server whose client has idle connections. The one made last is idle the longest."""

    def script(peer):
        peer.request()
        if peer.number < count:
            ask(server.client)
        peer.send(response())
        peer.answer_by_id()

    server = raw(script)
    ask(server.client)
    return server


def test_at_most_32_idle_connections_are_kept(raw):
    server = open_many(raw, 34)
    server.wait_until_gone(2)
    assert not server.gone.acquire(timeout=0.05)
    server.client.close()
    server.wait_until_gone(32)


def test_oldest_idle_connection_is_used_first(raw):
    server = open_many(raw, 3)
    for _ in range(4):
        ask(server.client)
    assert server.served == [1, 2, 3, 3, 2, 1, 3]


# The monotonic clock may stand still while a machine sleeps.
@parametrize(("seconds", "closed"), [(60, 0), (61, 3), (-61, 3)])
def test_connections_idle_for_a_minute_are_closed(raw, clock, seconds, closed):
    server = open_many(raw, 3)
    clock.wall += seconds
    ask(server.client)
    server.wait_until_gone(closed)
    assert not server.gone.acquire(timeout=0.01)


@parametrize("data", [b"", response()])
def test_connection_is_not_used_if_there_is_something_to_read(raw, tls, data):
    own = response("200 OK", body_of("ext_1"))
    server = raw(one_each(own + data, own), tls, max_retries=0)
    for _ in range(2):
        ask(server.client, "ext_1")
        server.wait_until_gone()


@parametrize("sent", [b"", b"H"])
def test_kept_connection_that_fails_is_replaced_if_no_byte_came(raw, tls, sent):
    def script(peer):
        for data in (response(), sent):
            peer.request()
            peer.send(data)

    server = raw(script, tls, max_retries=0)
    ask(server.client)
    with suppress(NoResponseError):
        ask(server.client)
        assert sent == b""
    assert server.connections == 2 - len(sent)


def test_connection_is_not_shared_across_fork(raw, tls, monkeypatch):
    server = raw(tls=tls)
    ask(server.client)
    child = os.fork()
    if child == 0:
        os._exit(server.client.customers.get("ext_1").id != "ext_1")
    assert os.waitpid(child, 0)[1] == 0
    ask(server.client)
    # Once more in this process, for the report of coverage.
    monkeypatch.setattr(os, "getpid", Mock(return_value=child))
    ask(server.client)
    assert server.served == [1, 2, 1, 3]


def test_more_than_1024_open_files_do_no_harm(raw):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1700), hard))
    files = [os.dup(0) for _ in range(1100)]
    server = raw()
    ask(server.client)
    ask(server.client)
    for file in files:
        os.close(file)
    assert server.connections == 1


def test_interrupted_call_leaves_no_connection(raw):
    def script(peer):
        peer.request()
        os.kill(os.getpid(), signal.SIGINT)
        peer.wait_for_end()

    server = raw(script)
    with pytest.raises(KeyboardInterrupt):
        server.client.customers.get("cus_1")
    server.wait_until_gone()


@parametrize(("timeout_ms", "waited"), [(30_000, [3, 3, 24]), (4_000, [2, 1, 1])])
def test_address_but_the_last_gets_half_the_time_or_3_seconds(network, timeout_ms, waited):
    network.addresses = [(socket.AF_INET, SWALLOWS)] * 3
    assert type(error_of(Dub(TOKEN), timeout_ms=timeout_ms)) is RequestTimeout
    assert network.waited == waited


def test_address_without_a_socket_is_passed_over(raw, network):
    server = raw(max_retries=0)
    network.addresses = [(9999, server.port), (socket.AF_INET, server.port)]
    ask(server.client)


HOSTS = [("https://dub.test", "dub.test", 443), ("http://[::1]:8000", "::1", 8000)]


@parametrize(("url", "host", "port"), HOSTS)
def test_name_without_an_address_is_an_error_after_retries(network, url, host, port):
    error = error_of(Dub(TOKEN, server_url=url))
    assert type(error) is NoResponseError
    assert re.search(f"from .*{host}.*: .*Name or service not known", str(error))
    assert network.names == [(host, port)] * 3


LOGIN = ("proxy-authorization", "Basic " + base64.b64encode(b"us@er:pa:s3cr3t").decode())


@pytest.mark.filterwarnings("ignore:the API key")
@parametrize("setting", ["{}", "http://{}/", "HTTP://us%40er:pa%3As3cr3t@{}"])
def test_http_proxy_is_asked_for_the_whole_url(raw, monkeypatch, setting):
    relay = raw()
    monkeypatch.setenv("http_proxy", setting.format(relay.address))
    client = Dub(TOKEN, server_url="http://dub.test/v1")
    # It was looked up when the client was made.
    monkeypatch.delenv("http_proxy")
    ask(client, "ext_a/b")
    head = relay.requests[0]
    assert head.startswith("GET http://dub.test/v1/customers/ext_a%2Fb HTTP/1.1\r\n")
    assert ("host", "dub.test") in fields_of(head)
    assert (LOGIN in fields_of(head)) == ("s3cr3t" in setting)


@parametrize(("login", "port"), [("us%40er:pa%3As3cr3t@", ""), ("", ":81")])
def test_https_proxy_never_sees_the_token(raw, tls, monkeypatch, login, port):
    def script(peer):
        peer.request()
        # Lengths and codings do not count here.
        peer.send(CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n"))
        peer.start_tls(tls.server)
        peer.answer_by_id()

    relay = raw(script)
    monkeypatch.setenv("https_proxy", f"http://{login}{relay.address}")
    client = Dub(TOKEN, server_url=f"https://localhost{port}", ssl_context=tls.trusting)
    ask(client)
    ask(client)
    connect, get, _ = relay.requests
    target = "localhost" + (port or ":443")
    assert connect.startswith(f"CONNECT {target} HTTP/1.1\r\n")
    assert fields_of(connect) == [("host", target)] + [LOGIN] * bool(login)
    assert "proxy-authorization" not in get.lower()
    assert ("host", f"localhost{port}") in fields_of(get)


REFUSALS = [("https", 302, 1), ("https", 403, 1), ("https", 407, 1), ("https", 502, 3)]


@pytest.mark.filterwarnings("ignore:the API key")
@parametrize(("scheme", "status", "tries"), REFUSALS + [("http", 407, 1)])
def test_refusal_of_a_proxy_is_told(raw, monkeypatch, clock, scheme, status, tries):
    relay = raw(one_each(response(f"{status} X")))
    monkeypatch.setenv(f"{scheme}_proxy", f"http://user:s3cr3t@{relay.address}")
    told = str(error_of(Dub(TOKEN, server_url=f"{scheme}://[2001:db8::1]")))
    assert f"proxy {relay.address} ({scheme}_proxy): the proxy" in told
    assert str(status) in told
    assert ("user name and password" in told) == (status == 407)
    assert relay.connections == tries
    assert "[2001:db8::1]" in relay.requests[0].split("\r\n")[0]


def test_proxy_without_a_port_is_at_port_80(network, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy.test")
    error_of(Dub(TOKEN), max_retries=0)
    assert network.names == [("proxy.test", 80)]


# The second host is in no_proxy. To the others, the token would leave this machine.
UNUSED = [("http_proxy", "https://dub.test"), ("https_proxy", "https://api.dub.local")]
UNUSED += [("http_proxy", "http://localhost"), ("http_proxy", "http://[::ffff:127.0.0.1]")]


@parametrize(("variable", "url"), UNUSED)
def test_proxy_is_not_used(network, monkeypatch, variable, url):
    monkeypatch.setenv(variable, "127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "example.com,dub.local")
    error_of(Dub(TOKEN, server_url=url), max_retries=0)
    assert network.names[0][0] == urllib.parse.urlsplit(url).hostname


BAD_PROXIES = ["https://u:s3cr3t@h", "http://u:pa/s3cr3t@h", "http://h/s3cr3t", "s3cr3t@h"]
BAD_PROXIES += ["http://u:s3cr3t\udcff@h", "http://u:s3cr3t\t@h"]


@parametrize("setting", BAD_PROXIES)
def test_unsupported_proxy_setting_is_refused_unseen(monkeypatch, setting):
    monkeypatch.setenv("https_proxy", setting)
    assert re.match("ValueError: https_proxy: .*http://.*socks5:", refusal(Dub, TOKEN))


@parametrize("host", ["localhost", "127.0.0.1"])
def test_certificate_that_is_not_accepted_is_not_retried(raw, tls, clock, host):
    server = raw(tls=tls)
    context = {"127.0.0.1": tls.trusting}.get(host)
    url = server.url.replace("localhost", host)
    error = error_of(Dub(TOKEN, server_url=url, ssl_context=context))
    assert error.__cause__.verify_message in str(error)
    assert re.search("SSL_CERT_FILE.*ssl_context", str(error))
    assert server.connections == 1


@parametrize("data", [response(), response("404 X"), b"\n"])
def test_client_that_is_dropped_frees_its_connections_and_tls_context(raw, data):
    def script(peer):
        peer.request()
        peer.send(data)
        peer.wait_for_end()

    context = ssl.create_default_context()
    server = raw(script, ssl_context=context, max_retries=0)
    context = weakref.ref(context)
    with suppress(DubError):
        server.client.customers.get("cus_1")
    server.client = None
    if sys.implementation.name == "pypy":
        gc.collect()
    assert context() is None
    server.wait_until_gone()


def test_tls_context_is_made_once_when_first_needed(raw, tls, monkeypatch):
    made = Mock(return_value=tls.trusting)
    monkeypatch.setattr(ssl, "create_default_context", made)
    server = raw(one_each(response()), tls, ssl_context=None)
    assert made.call_count == 0
    ask(server.client)
    ask(server.client)
    assert made.call_count == 1


def test_end_of_the_stream_counts_only_if_tls_confirms_it(raw, tls):
    # By default, Python 3.8 and 3.9 let OpenSSL ignore it: OP_IGNORE_UNEXPECTED_EOF.
    tls.trusting.options &= ~0x80
    server = raw(one_each(OK + b"\r\n" + BODY), tls, max_retries=0)
    assert type(error_of(server.client)) is NoResponseError


# --- HTTP/1.1 -----------------------------------------------------------------------------
# A response is understood by the letter of RFC 9112, or rejected and its connection closed.

BAD_HEADS = [
    b"HTTP/2 200 OK",
    b"HTTP/1.1 099 OK",
    # An empty line before it, a bare line feed, a bare carriage return.
    b"\r\nHTTP/1.1 200 OK",
    b"HTTP/1.1 200 OK\nX: y",
    b"HTTP/1.1 200 OK\rX: y",
    OK + b"Nonsense",
    OK + b": y",
    OK + b"X : y",
    OK + b"X: \x1f",
    OK + b"X: y\nZ: 1",
    # A folded line.
    OK + b"X: y\r\n z: 1",
]
BAD_FRAMINGS = [
    b"Content-Length: ",
    # More than the limit.
    b"Content-Length: 1048577",
    b"Content-Length: 2\r\nContent-Length: 2",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5",
]
BAD_CHUNKS = [
    b"g\r\n",
    b"2 \r\n{}\r\n0\r\n\r\n",
    b"000000002\r\n{}\r\n",
    b"2\n{}\r\n",
    b"2;\0\r\n",
    # Fewer bytes than the size says, and other bytes than a line end after them.
    b"3\r\n{}\r\n\r\n",
    b"2\r\n{}xx0\r\n\r\n",
    # A trailer.
    b"0\r\nx\r\n\r\n",
]
END = b"\r\nContent-Length: 2\r\n\r\n{}"
MALFORMED = [head + END for head in BAD_HEADS]
MALFORMED += [OK + fields + b"\r\n\r\n0\r\n\r\n" for fields in BAD_FRAMINGS]
MALFORMED += [CHUNKED + chunks for chunks in BAD_CHUNKS]
# A pattern that is not linear would take half a minute for this.
MALFORMED += [pytest.param(OK + b"X: a" + b" " * 60_000 + b"\0" + END, id="many blanks")]
GOOD_HEADS = [
    b"HTTP/1.1 200\r\n",
    OK + b"X:\r\n",
    OK + b"!#$%&'*+.^_`|~-09azAZ: \t ~\x80\xff\r\n",
    OK + b"Connection: keep-alive, closed\r\nConnection: x-close\r\n",
    # After an interim response.
    b"HTTP/1.1 199 X\r\nContent-Length: 5\r\n\r\n" + OK,
]
CLOSING_HEADS = [
    b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n",
    OK + b"connection: keep-alive ,\tCLOSE\r\n",
    OK + b"Connection: close\r\nConnection: x\r\n",
    # After an interim response.
    b"HTTP/1.1 100 X\r\nConnection: close\r\n\r\n" + OK,
]


FAULTS = [
    (b"Content-Length: 3\r\n\r\n{}", "ended too early"),
    (b"Content-Length: x\r\n\r\n{}", "unclear where its body ends"),
    (b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n", "a chunk exceeds its size"),
    (b"x" * 50, f"incomplete response: '{'x' * 40}'"),
]


@parametrize(("data", "message"), FAULTS)
def test_error_tells_what_is_wrong_with_a_response(data, message):
    with pytest.raises(ConnectionError, match=f"{message}$"):
        read(OK + data, ended=True)


@parametrize("data", MALFORMED)
def test_malformed_response_is_rejected_at_once(data):
    for kind in (socket.socket, SlowSocket):
        with pytest.raises(ConnectionError):
            read(data, kind)


@parametrize("head", GOOD_HEADS)
def test_legal_head_is_understood(head):
    assert_understood(head + b"content-LENGTH: \t02\t \r\n\r\n{}")


def test_legal_chunks_are_understood():
    data = OK + b"Transfer-Encoding: \tCHUNKED \r\n\r\n"
    data += b'0000000a \t;a="b"; q\xdc\r\n0123456789\r\nB\r\n0123456789\n\r\n'
    data += b"00;x\r\nX: y\r\nContent-Length: 5\r\n\r\n"
    assert_understood(data, b"01234567890123456789\n")


@parametrize("head", CLOSING_HEADS)
def test_connection_is_not_kept_if_the_server_closes_it(head):
    assert_understood(head + b"Content-Length: 2\r\n\r\n{}", keep_alive=False)


@parametrize("status", [b"204", b"304"])
def test_204_and_304_have_no_body(status):
    head = b"HTTP/1.1 " + status + b" X\r\nContent-Length: 2\r\n\r\n"
    assert_understood(head, body=b"", keep_alive=False)


def test_blanks_and_tabs_around_a_value_are_dropped():
    headers = read(OK + b"X: \t\xa0y\x85\t \r\nContent-Length: 0\r\n\r\n").headers
    assert headers["X"] == "\xa0y\x85"


def test_deadline_counts_even_if_there_is_always_something_to_read():
    with pytest.raises(socket.timeout, match="the deadline has passed$"):
        read(response(), seconds=0)


def test_body_without_a_length_ends_with_the_stream():
    result = read(OK + b"\r\n{}", ended=True)
    assert (result.body, result.keep_alive) == (b"{}", False)


def test_response_that_is_cut_anywhere_is_rejected():
    whole = b"HTTP/1.1 100 X\r\nX: y\r\n\r\n" + response("200 OK", b"{}")
    chunked = CHUNKED + b"1;x\r\n{\r\n1\r\n}\r\n0\r\nX: y\r\n\r\n"
    for data in (whole, chunked):
        for end in range(len(data)):
            with pytest.raises(ConnectionError):
                read(data[:end], ended=True)


# The response may have 1 MiB with what stands for "@".
@parametrize("template", [b"HTTP/1.1 100 X\r\nX: @\r\n\r\n" + response(), OK + b"\r\n@"])
def test_response_has_at_most_1_mib(raw, template):
    most = template.replace(b"@", b"y" * (1024 * 1024 - len(template) + 1))
    server = raw(one_each(most, most.replace(b"y", b"yy", 1)), max_retries=0)
    with suppress(InvalidResponse):
        ask(server.client)
    assert str(error_of(server.client)).endswith(" exceeds 1 MiB")


CHANGES = [b"", b"\r\n", b"\n", b"\0", b" ", b":", b",", b"0", b"\xff", b"X: y\r\n"]


def mutated(choose, number):
    """A response with this number in its body, and one or two random changes."""
    body = body_of(f"<{number}>" * 5)
    chunked = CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    data = choose.choice([response("200 OK", body), chunked])
    for _ in range(choose.choice([1, 1, 2])):
        start = choose.randrange(choose.choice([80, len(data)]))
        end = start + choose.choice([0, 1, 1, 1, 20])
        change = choose.choice([*CHANGES, data[start:end] * 2])
        data = data[:start] + change + data[end:]
    return data


def test_mutated_response_is_the_right_customer_or_an_error(raw, clock):
    def script(peer):
        for id in map(asked_id, iter(peer.request, "")):
            data = responses.get(id) or response("200 OK", body_of(id))
            size = {"0": 1, "1": 40}.get(id[-1], 99_999)  # of a packet
            for start in range(0, len(data), size):
                peer.send(data[start : start + size])
            if id in responses and id[-1] != "9":
                break  # else the client may wait for more, in vain

    choose = random.Random(9112)
    responses = {str(number): mutated(choose, number) for number in range(400)}
    client = raw(script, max_retries=0).client
    customers = 0
    for number in responses:
        with suppress(DubError):
            timeout_ms = 30 if number[-1] == "9" else 9000
            customer = client.customers.get(number, timeout_ms=timeout_ms)
            assert f"<{number}>" in customer.id
            customers += 1
        ask(client, f"own_{number}", max_retries=9)
    assert 30 < customers < 360


# --- Responses ----------------------------------------------------------------------------
# 200 with a customer is a Customer. Every other response is an error that helps.


@parametrize(
    ("body", "message"),
    [
        (b"null", "null"),
        (b'{"error": null}', '{"error": null}'),
        (b'{"error": {"message": [1]}}', '{"error": {"message": [1]}}'),
        (b"<h1>\n\nTIMEOUT</h1>\0", "<h1> TIMEOUT</h1>"),
        (b" \r\n", "the server sent no message"),
        (b"[" * 100_000, "[" * 100),
        (b'\xef\xbb\xbf{"error": {"message": "m", "doc_url": {}}}', "m"),
    ],
)
def test_error_of_any_shape_tells_what_the_server_said(api, body, message):
    api.serve(body, status=404)
    error = error_of(api.client)
    assert (error.message, error.body) == (message, body)
    assert (error.status_code, error.code, error.doc_url) == (404, None, None)


@parametrize("body", [b"", b"[]", b'{"id": "\xff"}'])
def test_body_that_is_no_customer_is_not_retried(api, body):
    api.serve(body)
    error = error_of(api.client)
    assert (type(error), error.body) == (InvalidResponse, body)
    assert len(api.requests) == 1


@parametrize("status", [200, 201, 299])
def test_message_tells_status_type_encoding_and_first_words(api, status):
    headers = {"Content-Type": "text/html", "Content-Encoding": "br"}
    body = b"<h1>\nHi" if status == 200 else BODY
    api.serve(body, status, headers)
    told = str(error_of(api.client))
    assert re.search(f"status {status}.*text/html.*br.*'(<h1> Hi|.*cus_1.*)'", told)


# --- Command line -------------------------------------------------------------------------
# It prints JSON, or one line that begins with "error:".


def dub(line, **env):
    """Run a line of shell in which `dub` is the command. Returns what came of it."""
    line = f'dub() {{ "{sys.executable}" "{MODULE}" "$@"; }}; {line}'
    env = {**os.environ, "DUB_API_KEY": TOKEN, **env}
    done = subprocess.run(["sh", "-c", line], env=env, capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@parametrize("option", ["", "--expand"])
def test_command_prints_the_customer_as_json(api, option):
    data = {**PLAIN, "name": "Jürgen", "country": "\ud800"}
    api.serve(data)
    code, output, errors = dub(f"dub cus_1 {option} --server-url {api.url}")
    assert (code, errors) == (0, "")
    assert json.loads(output) == data
    assert output.startswith('{\n  "id": "cus_1",\n')
    assert ("includeExpandedFields=true" in api.requests[0].url) == bool(option)


@parametrize(
    ("line", "message"),
    [
        ("dub ..", "id: .*"),
        ("unset DUB_API_KEY; dub cus_1", "DUB_API_KEY is missing.*"),
        ("dub cus_1 --server-url $URL", "429 not_found, retry after 900 seconds.*"),
    ],
)
def test_command_fails_with_one_line(api, line, message):
    api.serve(NOT_FOUND, 429, {"Retry-After": "900"})
    code, output, errors = dub(line, URL=api.url)
    assert (code, output) == (1, "")
    assert re.fullmatch(f"error: {message}\n", errors)


@parametrize("arguments", ["", "cus_1 --demo", "cus_1 --unknown", "a b"])
def test_wrong_arguments_exit_with_2(arguments):
    code, output, errors = dub(f"dub {arguments}")
    assert (code, output) == (2, "")
    assert errors.startswith("usage: ")


def test_help_and_version_are_printed():
    told = " ".join(dub("dub --help")[1].split())
    assert re.search("Set DUB_API_KEY.*ext_ .*--demo print.*--expand add", told)
    assert dub("dub --version")[1] == dub_customers.__version__ + "\n"


def test_demo_needs_no_key_and_no_network():
    code, output, errors = dub("unset DUB_API_KEY; dub --demo", http_proxy="127.0.0.1:1")
    assert (code, errors) == (0, "")
    customer = Customer.from_json(json.loads(output))
    assert None not in (customer.link, customer.partner, customer.discount)


def test_ctrl_c_ends_the_command_without_a_traceback(raw):
    def script(peer):
        peer.request()
        os.kill(process.pid, signal.SIGINT)
        peer.wait_for_end()

    command = [sys.executable, str(MODULE), "cus_1", "--server-url", raw(script).url]
    env = {**os.environ, "DUB_API_KEY": TOKEN}
    with subprocess.Popen(command, env=env, stdout=-1, stderr=-1) as process:
        assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 130


# --- Samples ------------------------------------------------------------------------------
# Every sample in the README and in the module's docstring runs as it stands.

SAMPLES = re.findall("^```python\n(.*?)^```$", README, re.M | re.S)
SAMPLES += ["\n".join(re.findall("^    (.*)", dub_customers.__doc__, re.M))]


@parametrize("sample", SAMPLES)
def test_sample_runs(api, monkeypatch, capsys, sample):
    # Python 3.8 has none.
    async def to_thread(function, *args):
        return await asyncio.get_running_loop().run_in_executor(None, function, *args)

    api.serve(EXPANDED)
    monkeypatch.setenv("DUB_API_KEY", TOKEN)
    monkeypatch.setitem(Dub.__init__.__kwdefaults__, "server_url", api.url)
    monkeypatch.setattr(asyncio, "to_thread", to_thread, raising=False)
    names = vars(types.ModuleType("__main__"))
    exec(compile(sample, "README.md", "exec"), names)
    for name in re.findall(r"^def (test_\w+)[(]httpserver", sample, re.M):
        api.httpserver.clear()
        names[name](api.httpserver)
    assert "failed" not in capsys.readouterr().out
