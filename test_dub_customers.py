"""Tests of dub_customers.py, in its order, each named by the behaviour it holds.

pytest-httpserver plays the API; a server on plain sockets (`raw`) plays what no proper server
does. TLS needs the command `openssl`, which makes two certificates while the tests run.
"""

import ast
import asyncio
import base64
import copy
import dataclasses
import enum
import gc
import inspect
import json
import logging
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
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
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

import pytest

import dub_customers
from dub_customers import Customer, Discount, Dub, Link, NoResponseError, Partner, RequestTimeout

HERE = Path(__file__).resolve().parent
MODULE = HERE / "dub_customers.py"
README = (HERE / "README.md").read_text("utf-8")
TOKEN = "dub_s3cr3tS3cr3tS3cr3t"

EXPANDED = json.loads("""{"id": "cus_1", "externalId": "user_42", "name": "Ada Lovelace",
"email": "ada@example.com", "avatar": "https://assets.example.com/ada.png", "country": "GB",
"sales": 3, "saleAmount": 12900, "createdAt": "2026-01-02T03:04:05.000Z",
"stripeCustomerId": "cus_stripe", "firstSaleAt": "2026-02-01T00:00:00.000Z",
"subscriptionCanceledAt": "2026-03-01T00:00:00.000Z", "programId": "prog_2",
"link": {"id": "link_1", "domain": "dub.sh", "key": "try", "shortLink": "https://dub.sh/try",
 "url": "https://dub.co", "programId": "prog_1"},
"partner": {"id": "pn_1", "name": "Grace", "email": "grace@example.com", "image": "i.png"},
"discount": {"id": "disc_1", "amount": 20, "type": "percentage", "maxDuration": 12,
 "description": "d", "couponId": "co_1", "couponTestId": "ct_1", "partnersCount": 4}}""")
PLAIN = dict(list(EXPANDED.items())[:12])


# --- what the tests stand on ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Without proxies, keys and certificates of whoever runs the tests, and without waits."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("DUB_API_KEY", "SSL_CERT_FILE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


@pytest.fixture
def client(httpserver):
    with Dub(TOKEN, server_url=httpserver.url_for("")) as client:
        yield client


@pytest.fixture
def waits(monkeypatch):
    """The seconds slept, none of which pass."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


def served(httpserver, answer=PLAIN, status=200, **kwargs):
    httpserver.expect_request(re.compile(".*")).respond_with_json(answer, status=status, **kwargs)


def error_body(code="not_found", message="No such customer."):
    return {"error": {"code": code, "message": message, "doc_url": "https://dub.co/e"}}


def body_of(customer_id):
    return json.dumps({**PLAIN, "id": customer_id}).encode()


def http(body=None, status="200 OK", headers=()):
    """An HTTP/1.1 answer, as bytes."""
    body = body_of("cus_1") if body is None else body
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Peer:
    """The server's side of one connection; `number` counts from 1."""

    def __init__(self, server, sock, number):
        self.server, self.sock, self.number = server, sock, number

    def request(self):
        """The next request's head as text; empty when the client has gone."""
        head = ""
        while not head.endswith("\r\n\r\n"):
            data = self.sock.recv(65536)
            if not data:
                return ""
            head += data.decode("latin-1")
        self.server.requests.append(head)
        return head

    def send(self, *parts):
        for part in parts:
            self.sock.sendall(part)

    def answer_by_id(self):
        """Serve customers until the client goes, each with the id that was asked for."""
        for head in iter(self.request, ""):
            self.send(http(body_of(asked_id(head))))

    def wait_for_end(self):
        while self.sock.recv(65536):
            pass


class RawServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Runs `script(peer)` on a thread for each connection, then closes it."""

    request_queue_size = 64

    def __init__(self, script, tls):
        super().__init__(("127.0.0.1", 0), None)
        self.script, self.tls, self.port = script, tls, self.server_address[1]
        self.url = f"https://localhost:{self.port}" if tls else f"http://127.0.0.1:{self.port}"
        self.connections, self.requests, self.open = 0, [], []

    def process_request(self, sock, address):
        self.connections += 1
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().process_request(sock, self.connections)

    def finish_request(self, sock, number):
        with self.tls.wrap_socket(sock, server_side=True) if self.tls else sock as sock:
            self.open.append(sock)
            self.script(Peer(self, sock, number))

    def handle_error(self, sock, number):
        if not issubclass(sys.exc_info()[0], OSError):  # else the client has gone
            raise  # pytest tells what a thread raised


@contextmanager
def raw_server(script, tls=None):
    server = RawServer(script, tls)
    thread = threading.Thread(target=server.serve_forever, args=(0.001,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        for sock in server.open:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        server.server_close()  # waits for the threads
        thread.join()


@contextmanager
def raw(script, tls=None, **options):
    """A raw server and a client of it."""
    with raw_server(script, tls) as server:
        with Dub(TOKEN, server_url=server.url, **options) as client:
            yield server, client


def each_connection(*answers):
    """A script that gives the first connection the first answer, and so on; the last for ever."""

    def script(peer):
        if peer.request():
            peer.send(answers[min(peer.number, len(answers)) - 1])

    return script


def asked_id(head):
    return urllib.parse.unquote(head.split(" ")[1].split("?")[0].rsplit("/", 1)[1])


def in_python(code, *args, flags=(), env=None, cwd=None):
    """Run code in a Python of its own; its completed process."""
    command = [sys.executable, *flags, "-c", code, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def revived(thing):
    return [pickle.loads(pickle.dumps(thing)), copy.copy(thing), copy.deepcopy(thing)]


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# --- the house ------------------------------------------------------------------------------------

PUBLIC = """APIError BadRequest Conflict Customer Customers Discount Dub DubError Forbidden
GetCustomerRequest InternalServerError InviteExpired Link NoResponseError NotFound Partner
RateLimitExceeded RequestTimeout ResponseValidationError Unauthorized UnprocessableEntity"""
TREE = ast.parse(MODULE.read_text("utf-8"))
IMPORTS = [node for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom))]


def refusal(function, *args, **kwargs):
    """The class and the message of the error for misuse, in which nothing of a secret shows."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        function(*args, **kwargs)
    assert not re.search("s3cr3t|pa55word", repr(list(chain(caught.value))))
    return f"{caught.typename}: {caught.value}"


def test_header_holds_licence_version_and_origin():
    lines = MODULE.read_text("utf-8").splitlines()
    assert lines[0] == "# SPDX-License-Identifier: 0BSD"
    assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", dub_customers.__version__)
    assert f'__version__ = "{dub_customers.__version__}"' in lines[:20]
    assert re.search("^Origin: ", dub_customers.__doc__, re.MULTILINE)
    assert "at most 1,000 lines to audit" in " ".join(README.split()) * (len(lines) <= 1000)


def test_imports_the_standard_library_alone_and_little_of_it_at_once(tmp_path):
    assert {getattr(node, "level", 0) for node in IMPORTS} == {0}
    names = {alias.name for node in IMPORTS if type(node) is ast.Import for alias in node.names}
    names |= {node.module for node in IMPORTS if type(node) is ast.ImportFrom}
    assert not {"http", "http.client", "importlib"} & names
    # A Python without site-packages, and in the module's folder nothing else.
    shutil.copy(str(MODULE), str(tmp_path))
    code = "import sys; sys.path.insert(0, sys.argv.pop()); import dub_customers\n"
    code += "print(*sys.modules)\nfor name in sys.argv[1:]: __import__(name)"
    done = in_python(code, *names, tmp_path, flags=["-I", "-S", "-E"])
    assert done.stderr == ""
    loaded = set(done.stdout.split())
    assert {"dub_customers", "urllib.request"} <= loaded
    assert not {"argparse", "http.server", "logging", "asyncio", "multiprocessing"} & loaded


def test_every_top_level_name_is_public_or_underscored():
    imported = {each.asname or each.name.split(".")[0] for node in IMPORTS for each in node.names}
    names = {name for name in vars(dub_customers) if not name.startswith("_")}
    assert names - imported == set(PUBLIC.split())


@pytest.mark.parametrize("name", PUBLIC.split())
def test_public_names_have_docstrings_and_hints_that_resolve(name):
    public = getattr(dub_customers, name)
    assert public.__doc__
    assert not public.__doc__.startswith(f"{name}(")  # as dataclass makes one up
    typing.get_type_hints(public)
    for key in vars(public):
        member = getattr(public, key)
        if inspect.isroutine(member) and (key == "__init__" or not key.startswith("_")):
            typing.get_type_hints(member)
            assert member.__doc__ or key == "__init__"


def test_no_global_is_beyond_pickle():
    """So that a copy pasted into a notebook can travel to workers by value."""
    for name, value in vars(dub_customers).items():
        code = isinstance(value, (types.ModuleType, types.FunctionType, type))
        if not code and not name.startswith("__"):
            assert pickle.dumps(value), name


def test_ssl_is_imported_whether_or_not_another_module_did():
    (plain_try,) = (node for node in TREE.body if type(node) is ast.Try)
    assert ast.dump(plain_try.body[0]) == ast.dump(ast.parse("import ssl").body[0])
    code = "import sys, urllib.request; sys.modules.pop('ssl', None); import dub_customers\n"
    code += "from ssl import create_default_context as new\n"
    code += "print(dub_customers.Dub('dub_x', ssl_context=new()))"
    done = in_python(code, flags=["-X", "lazy_imports=all"])
    shown = "Dub(server_url='https://api.dub.co', timeout_ms=30000, max_retries=2)\n"
    assert (done.stdout, done.stderr) == (shown, "")


WITHOUT_SSL = """
import atexit, sys; sys.modules["ssl"] = None
from dub_customers import Dub, NoResponseError
atexit.register(lambda: print(late.customers.get("cus_3").id))
late = Dub("dub_x", server_url=sys.argv[1])
with Dub("dub_x", server_url=sys.argv[1]) as client:
    print(client.customers.get("cus_1").id, client.customers.get("ext_2").id)
try:
    Dub("dub_x", server_url=sys.argv[1].replace("http", "https")).customers.get("cus_1")
except NoResponseError as error:
    print(error)
"""


def test_without_ssl_http_works_even_at_exit_and_https_is_refused_by_name():
    with raw_server(Peer.answer_by_id) as server:
        done = in_python(WITHOUT_SSL, server.url)
    shown = "cus_1 ext_2\nhttps needs the module ssl, which this Python does not have\ncus_3\n"
    assert (done.stdout, done.stderr, server.connections) == (shown, "", 2)


# --- errors ---------------------------------------------------------------------------------------

STATUS_CLASSES = """400 BadRequest 401 Unauthorized 403 Forbidden 404 NotFound 409 Conflict
410 InviteExpired 422 UnprocessableEntity 429 RateLimitExceeded 500 InternalServerError""".split()
STATUS_CLASSES = {
    int(status): getattr(dub_customers, name)
    for status, name in zip(STATUS_CLASSES[::2], STATUS_CLASSES[1::2])
}


def test_errors_form_the_documented_tree():
    base, api = dub_customers.DubError, dub_customers.APIError
    assert (base.__bases__, api.__bases__) == ((Exception,), (base,))
    assert {cls.__bases__ for cls in STATUS_CLASSES.values()} == {(api,)}
    assert {NoResponseError.__bases__, dub_customers.ResponseValidationError.__bases__} == {(base,)}
    assert RequestTimeout.__bases__ == (NoResponseError, TimeoutError)


def test_errors_have_the_documented_attributes_in_order():
    values = {"message": "m", "status_code": 418, "code": "c", "doc_url": "d"}
    values.update(headers={"Retry-After": "5"}, body=b"x")
    shown = "message='m', status_code=418, code='c', doc_url='d'"
    for cls in (dub_customers.APIError, *STATUS_CLASSES.values()):
        error = cls(*values.values())
        if cls is dub_customers.RateLimitExceeded:
            assert repr(error) == f"RateLimitExceeded({shown}, retry_after=5.0)"
            assert vars(error).pop("retry_after") == 5.0
        else:
            assert repr(error) == f"{cls.__name__}({shown})"
        assert vars(error) == values
    error = dub_customers.ResponseValidationError("m", body=b"x")
    assert (str(error), error.body, repr(error)[-5:]) == ("m", b"x", "('m')")


def test_errors_can_be_made_of_nothing_or_of_keywords():
    names, values = "message status_code code doc_url headers body", ("", 0, None, None, {}, b"")
    defaults = dict(zip(names.split(), values))
    assert vars(dub_customers.NotFound()) == defaults
    assert vars(dub_customers.RateLimitExceeded()) == {**defaults, "retry_after": None}
    assert vars(dub_customers.ResponseValidationError()) == {"body": b""}
    assert str(dub_customers.NotFound()) == "0:"
    assert str(dub_customers.NotFound(message="gone", status_code=404)) == "404: gone"
    assert len({dub_customers.RateLimitExceeded("m") for _ in "12"}) == 2  # hashable, each itself


def test_str_of_an_api_error_is_one_line_of_at_most_300_characters():
    def shown(message, **kwargs):
        return str(dub_customers.APIError(message, status_code=418, **kwargs))

    odd = "two\r\nlines\0 \x1b[31m\u2028\u202eend "
    assert shown(odd, code="pot") == "418 pot: two lines [31m end"
    assert shown("y" * 295) == "418: " + "y" * 295
    assert shown("y" * 296) == "418: " + "y" * 292 + "..."


@pytest.mark.parametrize("status", [404, 418, 429])
def test_api_errors_survive_pickle_and_copy(client, httpserver, status):
    served(httpserver, error_body(), status, headers={"Retry-After": "900", "X-Y": "z"})
    with pytest.raises(dub_customers.APIError) as caught:
        client.customers.get("cus_1")
    for error in (caught.value, *revived(caught.value)):
        assert type(error) is STATUS_CLASSES.get(status, dub_customers.APIError)
        assert str(error) == f"{status} not_found: No such customer."
        assert (error.status_code, error.doc_url) == (status, "https://dub.co/e")
        assert json.loads(error.body) == error_body()
        assert (error.headers["x-y"], error.headers.get("RETRY-after")) == ("z", "900")
        assert getattr(error, "retry_after", None) == (900.0 if status == 429 else None)


@pytest.mark.parametrize("name", ["NoResponseError", "RequestTimeout", "ResponseValidationError"])
def test_other_errors_survive_pickle_and_copy(name):
    facts = {"body": b"{}"} if name == "ResponseValidationError" else {}
    for error in revived(getattr(dub_customers, name)("what happened", **facts)):
        assert (type(error).__name__, str(error), vars(error)) == (name, "what happened", facts)


# --- models ---------------------------------------------------------------------------------------

# The fields of each object as JSON has them, in the order of the dataclass.
REQUIRED = {
    "customer": "id externalId createdAt".split(),
    "customer.link": "id domain key shortLink url".split(),
    "customer.partner": "id name".split(),
    "customer.discount": "id amount type".split(),
}
OPTIONAL = {
    "customer": "name email avatar stripeCustomerId country sales saleAmount firstSaleAt "
    "subscriptionCanceledAt link programId partner discount".split(),
    "customer.link": ["programId"],
    "customer.partner": ["email", "image"],
    "customer.discount": "maxDuration description couponId couponTestId partnersCount".split(),
}
FIELDS = [(path, key) for path in REQUIRED for key in REQUIRED[path] + OPTIONAL[path]]
NUMBERS = ("sales", "saleAmount", "amount", "maxDuration", "partnersCount")
MODELS = {"customer": Customer, "link": Link, "partner": Partner, "discount": Discount}


def snake(key):
    return re.sub("[A-Z]", lambda match: "_" + match[0].lower(), key)


def value_at(customer, path, key):
    """What the customer holds for the key of the object at the path."""
    return getattr(getattr(customer, path.partition(".")[2], customer), snake(key))


def changed(path, key, *value):
    """The expanded customer with a new value, or none, for the key of the object at the path."""
    data = copy.deepcopy(EXPANDED)
    owner = data.get(path.partition(".")[2], data)
    owner.pop(key)
    owner.update((key, each) for each in value)
    return data


def mismatch(data, *path, cls=Customer):
    with pytest.raises(dub_customers.ResponseValidationError) as caught:
        cls.from_json(data, *path)
    assert caught.value.body == b""
    return str(caught.value)


@pytest.mark.parametrize("path", list(REQUIRED))
def test_fields_stand_in_order_and_the_optional_ones_default_to_none(path):
    cls, required = MODELS[path.split(".")[-1]], [snake(key) for key in REQUIRED[path]]
    defaults = {snake(key): None for key in OPTIONAL[path]}
    defaults.update({"raw": {}} if cls is Customer else {})
    assert [each.name for each in dataclasses.fields(cls)] == [*required, *defaults]
    assert vars(cls(*required)) == {**dict(zip(required, required)), **defaults}
    assert refusal(cls, *required[1:]).startswith("TypeError: ")


@pytest.mark.parametrize(("path", "key"), FIELDS)
def test_each_field_is_mapped_or_its_mismatch_is_located_and_optional_ones_are_none(path, key):
    value = EXPANDED.get(path.partition(".")[2], EXPANDED)[key]
    read = value_at(Customer.from_json(EXPANDED), path, key)
    assert type(read) is MODELS.get(key, type(value))
    assert key in MODELS or read == value
    kind = "number" if key in NUMBERS else "object" if key in MODELS else "string"
    values = [("number", 12), ("number", 1.5), ("string", "12"), ("boolean", True), ("array", [])]
    values += [("boolean", False), ("object", {}), ("tuple", ())]
    if key in REQUIRED[path]:
        values += [("null", None), ("nothing",)]
    else:
        for data in (changed(path, key, None), changed(path, key)):
            assert value_at(Customer.from_json(data), path, key) is None
    for got, *other in values:
        if got != kind:
            expected = f"{path}.{key}: expected {kind}, got {got}"
            assert mismatch(changed(path, key, *other)) == expected


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_stay_what_they_were_and_are_finite(key):
    path = "customer" if key in EXPANDED else "customer.discount"
    for number in (2**53 + 1, 10**400, 0, -7, 0.1, 3.0):
        read = value_at(Customer.from_json(changed(path, key, number)), path, key)
        assert (read, type(read)) == (number, type(number))
    for number in (float("nan"), float("inf"), float("-inf")):
        expected = f"{path}.{key}: expected number, got {number}"
        assert mismatch(changed(path, key, number)) == expected


@pytest.mark.parametrize("name", list(MODELS))
def test_from_json_takes_an_object_and_the_path_to_it(name):
    for data, got in ((["x"], "array"), (None, "null"), ("x", "string"), (True, "boolean")):
        assert mismatch(data, cls=MODELS[name]) == f"{name}: expected object, got {got}"
        assert mismatch(data, "a.b", cls=MODELS[name]) == f"a.b: expected object, got {got}"
    assert mismatch({**PLAIN, "link": {}}, "a") == "a.link.id: expected string, got nothing"


def test_customers_are_frozen_comparable_hashable_and_keep_raw_apart():
    data = {**EXPANDED, "later": float("nan")}  # a field not known may hold anything
    customer, same = Customer.from_json(data), Customer.from_json(EXPANDED)
    assert customer.raw is data
    assert (customer, hash(customer), repr(customer)) == (same, hash(same), repr(same))
    assert repr(customer).endswith("partners_count=4))")
    assert customer != Customer.from_json({**EXPANDED, "name": "Eve"})
    assert Customer("a", "b", "c").raw is not Customer("a", "b", "c").raw
    for thing in (customer, customer.link, customer.partner, customer.discount):
        with pytest.raises(dataclasses.FrozenInstanceError):
            thing.id = "other"
        assert revived(thing) == [thing] * 3
    assert list(pickle.loads(pickle.dumps(customer)).raw) == list(data)


# --- Dub, Customers -------------------------------------------------------------------------------

EXAMPLE = """from dub_customers import Dub

with Dub(token="DUB_API_KEY") as d_client:
    res = d_client.customers.get(request={"id": "<id>"})
    assert res is not None
    print(res)
"""


def test_the_documented_examples_work_word_for_word(httpserver, monkeypatch, capsys):
    monkeypatch.setitem(Dub.__init__.__kwdefaults__, "server_url", httpserver.url_for(""))
    monkeypatch.setenv("DUB_API_KEY", "dub_of_the_environment")
    served(httpserver)
    exec(EXAMPLE, {})
    docstring = re.findall("^    (.*)$", dub_customers.__doc__, re.MULTILINE)
    exec("\n".join(docstring), {})
    assert capsys.readouterr().out == 2 * f"{Customer.from_json(PLAIN)}\n"
    (first, _), (second, _) = httpserver.log
    assert (first.path, first.query_string) == ("/customers/<id>", b"")
    assert first.headers["Authorization"] == "Bearer DUB_API_KEY"
    assert second.full_path == "/customers/ext_42?includeExpandedFields=true"
    assert second.headers["Authorization"] == "Bearer dub_of_the_environment"


def test_signatures_are_as_documented():
    def described(function):
        _, first, *others = inspect.signature(function).parameters.values()
        assert first.kind is first.POSITIONAL_OR_KEYWORD
        assert {each.kind for each in others} == {first.KEYWORD_ONLY}
        return {each.name: each.default for each in (first, *others)}

    options = {"token": None, "server_url": "https://api.dub.co", "timeout_ms": 30_000}
    assert described(Dub.__init__) == {**options, "max_retries": 2, "ssl_context": None}
    names = "id include_expanded_fields request timeout_ms max_retries http_headers"
    assert described(dub_customers.Customers.get) == dict.fromkeys(names.split())


BOTH = "TypeError: get() takes id and include_expanded_fields, or request, not both"
REQUESTS_REFUSED = {
    "with an id": ({"id": "", "request": {"id": "a"}}, BOTH),
    "with a choice": ({"include_expanded_fields": False, "request": {"id": "a"}}, BOTH),
    "without id": ({"request": {}}, "required keyword-only argument: 'id'"),
    "unknown key": ({"request": {"id": "a", "ID": "b"}}, "unexpected keyword argument 'ID'"),
    "key no str": ({"request": {"id": "a", 3: 1}}, "keywords must be strings"),
    "a str": ({"request": "cus_1"}, "argument after ** must be a mapping, not str"),
    "an empty list": ({"request": []}, "argument after ** must be a mapping, not list"),
}


@pytest.mark.parametrize("reason", REQUESTS_REFUSED)
def test_a_request_that_is_no_mapping_of_its_keys_is_refused(client, httpserver, reason):
    options, message = REQUESTS_REFUSED[reason]
    told = refusal(client.customers.get, **options)
    assert told.startswith("TypeError: ")
    assert message in told
    assert httpserver.log == []


def test_a_callable_is_asked_before_each_try_and_the_environment_once(
    httpserver, monkeypatch, waits
):
    served(httpserver, error_body(), 503)
    monkeypatch.setenv("DUB_API_KEY", "!dub_of_the_environment~")
    tokens = iter(["dub_1", "dub_2", "dub_3"])
    for token in (None, lambda: next(tokens)):
        with Dub(token, server_url=httpserver.url_for("")) as client:
            monkeypatch.delenv("DUB_API_KEY", raising=False)
            with pytest.raises(dub_customers.APIError, match="^503 "):
                client.customers.get("cus_1")
    sent = [request.headers["Authorization"] for request, _ in httpserver.log]
    assert sent[:3] == ["Bearer !dub_of_the_environment~"] * 3
    assert sent[3:] == ["Bearer dub_1", "Bearer dub_2", "Bearer dub_3"]


TOKENS_REFUSED = {
    "line feed at the end": (TOKEN + "\n", r"'\n' at position 22 of 23"),
    "space before tab": ("dub_ s3cr3t\t", "' ' at position 4 of 12"),
    "control character": ("\x1bdub_s3cr3t", r"'\x1b' at position 0 of 11"),
    "delete": ("dub_\x7fs3cr3t", r"'\x7f' at position 4 of 11"),
    "byte order mark": ("\ufeffdub_s3cr3t", r"'\ufeff' at position 0 of 11"),
    "letter beyond ASCII": ("dub_s3cr3té", r"'\xe9' at position 10 of 11"),
    "byte that is not UTF-8": ("dub_s3cr3t\udcff", r"'\udcff' at position 10 of 11"),
}


@pytest.mark.parametrize("source", ["token", "token()", "DUB_API_KEY"])
@pytest.mark.parametrize("reason", TOKENS_REFUSED)
def test_tokens_that_no_header_can_carry(httpserver, monkeypatch, source, reason):
    token, odd = TOKENS_REFUSED[reason]
    monkeypatch.setenv("DUB_API_KEY", token if source == "DUB_API_KEY" else "dub_other")
    given = {"token": token, "token()": lambda: token, "DUB_API_KEY": None}[source]
    told = refusal(lambda: Dub(given, server_url=httpserver.url_for("")).customers.get("cus_1"))
    assert told == f"ValueError: {source} has {odd}: a token is printable ASCII without spaces"
    assert httpserver.log == []


def test_a_token_is_there_a_str_and_not_empty(httpserver, monkeypatch):
    assert refusal(Dub) == "ValueError: no token: give token=... or set DUB_API_KEY"
    monkeypatch.setenv("DUB_API_KEY", "")
    assert refusal(Dub) == "ValueError: DUB_API_KEY is empty"
    assert refusal(Dub, "") == "ValueError: token is empty"
    assert refusal(Dub, b"dub_1") == "TypeError: token: expected str, got bytes"
    client = Dub([None, ""].pop, server_url=httpserver.url_for(""))
    assert refusal(client.customers.get, "a") == "ValueError: token() is empty"
    assert refusal(client.customers.get, "a") == "TypeError: token(): expected str, got NoneType"
    assert httpserver.log == []


def fields_sent(head):
    """The fields of a request's head, by name in lower case, sorted; none are taken together."""
    pairs = (line.split(": ", 1) for line in head.split("\r\n")[1:-2])
    return sorted((name.lower(), value) for name, value in pairs)


class Odd(str):
    """Shows itself as something else, as a str enum does on newer Pythons."""

    __str__ = __format__ = __repr__ = lambda self, *_: "Odd.VALUE"


def test_a_str_enum_and_any_str_subclass_count_by_their_value():
    def odd(text):
        return enum.Enum("Odd", {"VALUE": text}, type=Odd).VALUE

    headers = {odd("X-Name"): odd("value")}
    with raw_server(Peer.answer_by_id) as server:
        for token in (odd(TOKEN), lambda: odd(TOKEN)):
            with Dub(token, server_url=odd(server.url)) as client:
                assert client.customers.get(odd("ext_1"), http_headers=headers).id == "ext_1"
                assert client.customers.get(request={"id": odd("cus_2")}).id == "cus_2"
                assert f"server_url={server.url!r}" in repr(client)
    assert len(server.requests) == 4
    for number, head in enumerate(server.requests):
        assert "odd" not in head.lower()
        assert ("authorization", f"Bearer {TOKEN}") in fields_sent(head)
        assert (("x-name", "value") in fields_sent(head)) is (number % 2 == 0)


URLS_TAKEN = ["https://api.dub.co", "https://x.example./v1//", "https://a_b-c", "https://1.2.3.4:1"]
URLS_TAKEN += ["https://[2001:db8::1]:8443/", "https://[::ffff:10.0.0.1]", "https://" + "a" * 63]
URLS_TAKEN += ["https://h:65535/a%20b/c:@;~!"]


@pytest.mark.parametrize("url", URLS_TAKEN)
def test_server_urls_taken_and_shown_without_the_token(url):
    shown = f"Dub(server_url={url.rstrip('/')!r}, timeout_ms=5, max_retries=7)"
    client = Dub(TOKEN, server_url=url, timeout_ms=5, max_retries=7)
    assert (repr(client), str(client)) == (shown, shown)


URLS_REFUSED = {
    "no scheme": ["", "api.dub.co", "//h", "h:80"],
    "another scheme": ["ftp://h", "file:///etc/passwd", "httpsx://h", "socks5://h"],
    "no host": ["https://", "https:///p", "https://:80", "https:h"],
    "query or fragment": ["https://h/?q", "https://h?", "https://h/#f", "https://h#"],
    "user": ["https://pa55word@h", "https://u:pa55word@h", "https://@h", "https://pa55word@h:x"],
    "space": ["https://h/a b", " https://h", "https://h "],
    "control character": ["https://h/\n", "https://h\n", "https://h/\x00", "https://h\t/\x7f"],
    "never in a URL": ["https://h/" + character for character in '\\"<>^`{|}'],
    "port": ["https://h:", "https://h:x", "https://h:-1", "https://h:1:2", "https://h:٣"],
    "port out of range": ["https://h:0", "https://h:00", "https://h:65536", "https://h:99999999"],
    "label": ["https://a..b", "https://.a", "https://" + "a" * 64, "https://h%2e", "https://a,b"],
    "beyond ASCII": ["https://dübb.co", "https://ſ", "https://h/é"],
    "IPv6": ["https://[::1", "https://::1", "https://[:::]", "https://[1]", "https://[v1.a]"],
    "around IPv6": ["https://[::1]x", "https://x[::1]", "https://[fe80::1%25a]"],
}


@pytest.mark.parametrize("reason", URLS_REFUSED)
def test_server_urls_refused(reason):
    expected = "ValueError: server_url: expected http(s)://host[:port][/path], and nothing else"
    for url in URLS_REFUSED[reason]:
        assert refusal(Dub, TOKEN, server_url=url) == expected


@pytest.mark.parametrize("path", ["", "/", "/api", "/api/", "/api/v1//"])
def test_server_url_may_have_a_path_and_any_case(httpserver, path):
    httpserver.expect_request(path.rstrip("/") + "/customers/cus_1").respond_with_json(PLAIN)
    url = httpserver.url_for("").rstrip("/") + path
    for each in (url, url.replace("http://localhost", "HTTP://LocalHost")):
        with Dub(TOKEN, server_url=each) as client:
            assert client.customers.get("cus_1").id == "cus_1"


IN_CLEAR = ["example.com:8080", "127.0.0.1.example.com", "localhost.example.com", "10.0.0.1"]
IN_CLEAR += ["[::2]", "128.0.0.1", "1127.0.0.1", "127a0.0.1"]


@pytest.mark.parametrize("host", IN_CLEAR)
def test_plain_http_beyond_this_machine_warns_at_the_callers_line(host):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1
        Dub(TOKEN, server_url=f"http://{host}/v1")
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert warning.category is UserWarning
    assert str(warning.message) == f"the token goes to {host} in clear: use https"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.9.8.7", "[::1]:8"])
def test_plain_http_to_this_machine_and_https_do_not_warn(host):
    Dub(TOKEN, server_url=f"http://{host}")  # a warning would be an error here
    Dub(TOKEN, server_url="https://example.com")


# What each option of a client, of a call, or of both cannot be.
OPTIONS_REFUSED = {
    "server_url: expected str": [None, b"https://h"],
    "timeout_ms: expected int or float": [None, True, False, "5", [], 1j],
    "timeout_ms: expected more than 0 and less than 2**31": [0, -1, 2**31, 10**400, math.nan],
    "max_retries: expected int": [None, True, False, "5", [], 1.0],
    "max_retries: expected 0 or more": [-1],
    "ssl_context: expected SSLContext": [ssl.SSLContext, ssl, "tls", False],
    "id: expected str": [None, 5, b"cus_1", True],
    "include_expanded_fields: expected bool": [0, 1, "", "true"],
    "http_headers: expected Mapping": [[("X", "a")], ""],
}


@pytest.mark.parametrize("message", OPTIONS_REFUSED)
def test_options_of_a_wrong_type_or_range_are_refused_at_once(client, httpserver, message):
    name = message.split(": ")[0]
    for value in OPTIONS_REFUSED[message]:
        told = f"TypeError: {message}, got {type(value).__name__}"
        if " more" in message:
            told = f"ValueError: {message}"
        if name in Dub.__init__.__kwdefaults__:
            assert refusal(Dub, TOKEN, **{name: value}) == told
        if name == "id" or name in client.customers.get.__kwdefaults__ and value is not None:
            assert refusal(client.customers.get, **{"id": "cus_1", name: value}) == told
        if name in ("id", "include_expanded_fields"):
            request = {"id": "cus_1", name: value}
            assert refusal(client.customers.get, request=request) == told
    assert httpserver.log == []


def test_limits_taken_of_client_and_call(client, httpserver):
    served(httpserver)
    for limits in ({"timeout_ms": 2**31 - 1, "max_retries": 0}, {"timeout_ms": 2147483646.5}):
        with Dub(TOKEN, server_url=httpserver.url_for(""), **limits) as limited:
            assert all(f"{name}={value}" in repr(limited) for name, value in limits.items())
            assert limited.customers.get("cus_1").id == "cus_1"
        assert client.customers.get("cus_1", **limits).id == "cus_1"
    assert client.customers.get("cus_1", max_retries=10**9).id == "cus_1"
    assert len(httpserver.log) == 5


def test_limits_of_a_call_stand_in_place_of_the_clients(httpserver, waits):
    served(httpserver, error_body(), 503)
    url = httpserver.url_for("")
    with Dub(TOKEN, server_url=url, timeout_ms=5e-324, max_retries=1) as client:
        for limits in {}, {"max_retries": 0}:
            with pytest.raises(RequestTimeout):
                client.customers.get("cus_1", **limits)
        assert httpserver.log == []
        for limits, requests in ({}, 2), ({"max_retries": 0}, 1), ({"max_retries": 2}, 3):
            httpserver.clear_log()
            with pytest.raises(dub_customers.APIError):
                client.customers.get("cus_1", timeout_ms=9_000, **limits)
            assert len(httpserver.log) == requests


def leave_with_an_error(client):
    with pytest.raises(KeyError), client as same:
        assert same is client
        raise KeyError


@pytest.mark.parametrize("end", [Dub.close, leave_with_an_error])
def test_close_and_with_close_the_connections_and_later_calls_are_refused(end):
    gone = threading.Event()

    def script(peer):
        peer.answer_by_id()
        gone.set()

    with raw_server(script) as server:
        client = Dub(TOKEN, server_url=server.url)
        assert client.customers.get("cus_1").id == "cus_1"
        assert not gone.wait(0.01)
        end(client)
        assert gone.wait(5)
        for _ in range(2):
            assert refusal(client.customers.get, "a") == "RuntimeError: the client is closed"
            client.close()
        assert (server.connections, len(server.requests)) == (1, 1)


def test_pickle_and_deep_copy_carry_the_options_and_a_copy_the_connections_too():
    with raw_server(Peer.answer_by_id) as server:
        url = f"{server.url}/v1"
        with Dub(TOKEN, server_url=url, timeout_ms=4321, max_retries=7) as client:
            client.customers.get("ext_1")
            assert [repr(twin) for twin in revived(client)] == [repr(client)] * 3
            calls = [twin.customers.get for twin in revived(client)]
            calls += [twin.get for twin in revived(client.customers)]
            calls += [pickle.loads(pickle.dumps(client.customers.get))]
            connections = []
            for call in calls:
                assert call("cus_2").id == "cus_2"
                connections.append(server.connections)
            assert connections == [2, 2, 3, 4, 4, 5, 6]
        assert [calls[number]("cus_3").id for number in (0, 2)] == ["cus_3"] * 2
        assert refusal(calls[1], "cus_3") == "RuntimeError: the client is closed"
    for head in server.requests:
        assert head.startswith("GET /v1/customers/")
        assert ("authorization", f"Bearer {TOKEN}") in fields_sent(head)


# --- the request ----------------------------------------------------------------------------------

PAGES = ["count", "export", "search-stripe"]  # which the server has beside the customers
IDS = {
    "plain": ["cus_1KAP4CDPBSVMMBMH9XX3YZZ0Z", "ext_42", "ext_ext_5", "ext_a-b.c_d~e", "ext_count"],
    "reserved characters": ["ext_user/42", "ext_ada@example.com", "cus_a?b=c#d", "ext_a;b:c&d=e"],
    "percent": ["ext_50%", "ext_a%2Fb", "%2e%2e", "ext_a%2Ersc"],
    "dots": ["...", "ext_..", "../links", "ext_../../links", "ext_rsc"],
    "blanks": [" ", "ext_+1 555", "ext_a\r\nX-Injected: 1\n", "cus_\0"],
    "beyond ASCII": ["ext_Jürgen客户🎉", "ext_" + "é/" * 2498],
    "a suffix that the server cuts off": ["ext_alice.rsc", "cus_1.rsc.rsc", ".rsc", "a.rsc.b"],
    "a page of the server": PAGES,
}


@pytest.mark.parametrize("reason", IDS)
def test_an_id_arrives_as_one_segment_that_decodes_to_itself(reason):
    with raw(Peer.answer_by_id) as (server, client):
        for id in IDS[reason]:
            assert client.customers.get(id).id == id
    for id, head in zip(IDS[reason], server.requests):
        match = re.match(r"GET /customers/((?:[A-Za-z0-9._~-]|%[0-9A-F]{2})+) HTTP/1.1\r\n", head)
        assert urllib.parse.unquote(match[1]) == id
        if id in PAGES:
            assert match[1] not in PAGES
        else:
            assert match[1] == re.sub(r"\.rsc$", "%2Ersc", urllib.parse.quote(id, safe=""))


def test_ids_refused(client, httpserver):
    for id in ("", ".", "..", "ext_", "ext_\ud800", "cus_\udfff"):
        told = f"ValueError: id: expected cus_... or ext_ and an externalId, got {id!r}"
        if len(id) > 4:
            told = "surrogates not allowed"
        assert refusal(client.customers.get, id).endswith(told)
        assert refusal(client.customers.get, request={"id": id}).endswith(told)
    assert httpserver.log == []


@pytest.mark.parametrize("expand", [None, True, False])
def test_expansion_is_said_in_lower_case_or_not_at_all(client, httpserver, expand):
    served(httpserver)
    request = dub_customers.GetCustomerRequest(id="ext_a.rsc", include_expanded_fields=expand)
    for options in request, {"request": request}, {"request": types.MappingProxyType(request)}:
        assert client.customers.get(**options).id == "cus_1"
    assert dub_customers.GetCustomerRequest.__total__ is False  # the choice may be left out
    said = {None: "", True: "includeExpandedFields=true", False: "includeExpandedFields=false"}
    sent = [request.full_path for request, _ in httpserver.log]
    assert sent == [f"/customers/ext_a.rsc?{said[expand]}"] * 3


def fields_expected(server, **others):
    version = "{}.{}".format(*sys.version_info)
    fields = {
        "accept": "application/json",
        "accept-encoding": "identity",
        "authorization": f"Bearer {TOKEN}",
        "host": f"127.0.0.1:{server.port}",
        "user-agent": f"dub_customers/{dub_customers.__version__} Python/{version}",
    }
    return sorted({**fields, **others}.items())


def test_headers_sent_are_ours_and_a_calls_which_replace_ours_in_any_case():
    theirs = {"x-Trace": "\t ~\x80ä\xff", "X-Empty": "", "!#$%&'*+.^_`|~-09azAZ": "1"}
    theirs.update({"accept": "2", "USER-AGENT": "3", "AUTHORIZATION": "4", "hOST": "5"})
    theirs.update({"Accept-ENCODING": "6", "Connection": "7"})
    with raw(Peer.answer_by_id) as (server, client):
        for headers in ({}, theirs, None, {"X-Name": "1", "x-name": "2"}):
            client.customers.get("cus_1", http_headers=headers)
    sent = [fields_sent(head) for head in server.requests]
    assert sent[0] == sent[2] == fields_expected(server)
    assert sent[1] == fields_expected(server, **{name.lower(): theirs[name] for name in theirs})
    assert sent[3] == fields_expected(server, **{"x-name": "2"})


HEADERS_REFUSED = {
    "expected str, got int": [{1: "a"}, {"X": 1}],
    "expected str, got bytes": [{b"X": "a"}, {"X": b"a"}],
    "X has a line break or what is not Latin-1 text": [
        {"X": value} for value in ("a\r\nY: b", "a\n", "\ra", "\0", "\x1f", "\x7f", "\u0100")
    ],
    "one of the names is no name of a header": [
        {"X": "a", name: "b"} for name in ("", "X Y", "X:", "X\n", "\tX", "é", "Y(")
    ],
    "content-Length has no place in a GET to the server": [{"content-Length": "5"}],
    "Transfer-encoding has no place in a GET to the server": [{"Transfer-encoding": "chunked"}],
    "PROXY-Authorization has no place in a GET to the server": [{"PROXY-Authorization": "x"}],
}


@pytest.mark.parametrize("message", HEADERS_REFUSED)
def test_headers_refused(client, httpserver, message):
    for headers in HEADERS_REFUSED[message]:
        told = refusal(client.customers.get, "cus_1", http_headers=headers)
        kind = "TypeError" if message.startswith("expected") else "ValueError"
        assert told == f"{kind}: http_headers: {message}"
    assert httpserver.log == []


def test_headers_checked_are_the_headers_sent():
    headers = {"X": "checked"}

    def token():
        headers["X"] = "a\r\nY: injected"
        return TOKEN

    with raw_server(Peer.answer_by_id) as server:
        with Dub(token, server_url=server.url) as client:
            client.customers.get("cus_1", http_headers=headers)
    assert fields_sent(server.requests[0]) == fields_expected(server, x="checked")


# --- the tries ------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch, waits):
    """The waits, and nothing else, take time. What is drawn is the highest of its range."""
    monkeypatch.setattr("time.monotonic", lambda: 1000.0 + sum(waits))
    monkeypatch.setattr("random.uniform", lambda low, high: low + high)
    return waits


def outcome(client, **options):
    """The customer, or the error that the call raises."""
    try:
        return client.customers.get("cus_1", **options)
    except dub_customers.DubError as error:
        return error


def shown_by(error):
    return repr([(each, str(each), vars(each)) for each in chain(error)])


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
INTERIM = b"HTTP/1.1 100 X\r\nX: %s\r\n\r\n"
MIB = 1024 * 1024
PLANS = {0: [4.0], 7: [11.0], 25: [29.0], 26: [29.2], 29: [29.8], 30: [], 3600: [], "?": [0.5]}
FOUND = r"Customer\(id='cus_1'"
CALLS = []


def case(id, responses, expected, waited, **options):
    """What a call is answered, connection by connection; what comes of it; its waits, in 30 s."""
    CALLS.append(pytest.param(responses, expected, waited, options, id=id))


for status in (429, 500, 502, 503, 504):
    case(f"{status}", [http(b"{}", f"{status} X")] * 2 + [http()], FOUND, [0.5, 1.0])
for status in (400, 401, 403, 404, 408, 409, 410, 418, 422, 428, 430, 499, 501, 505, 599, 600):
    case(f"{status}", [http(b"", f"{status} X"), http()], f"{status}: X$", [])
for lost in (b"", OK[:-3], http()[:-5], b"SSH-2.0-OpenSSH_9.2p1\r\n"):
    case(f"lost twice: {lost[:9]}", [lost, lost, http()], FOUND, [0.5, 1.0])
for status in (429, 500, 502, 503, 504):
    for seconds, waited in PLANS.items():
        waited = waited if status in (429, 503) else [0.5]
        expected = FOUND if waited else f"{status}: X"
        limited = http(b"{}", f"{status} X", [f"retry-after: {seconds}"])
        case(f"{status}, again in {seconds} s", [limited, http()], expected, waited)
for max_retries, waited in ((0, []), (1, [0.5]), (7, [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0])):
    options = {"max_retries": max_retries, "timeout_ms": 99_999}
    case(f"{max_retries} retries", [http(b"", "500 X")], "500: X$", waited, **options)
for timeout_ms, waited in ((500, []), (1500, [0.5]), (3500, [0.5, 1.0])):  # ends as a wait would
    options = {"max_retries": 9, "timeout_ms": timeout_ms}
    case(f"{timeout_ms} ms, lost", [b""], "no response from .*: ConnectionError", waited, **options)
for status in (300, 301, 302, 303, 305, 307, 308, 399):
    for target in ("http://127.0.0.1:1/x", "/customers/other", "file:///etc/passwd"):
        moved = http(b"{}", f"{status} X", [f"Location: {target}"])
        case(f"{status} {target}", [moved], f"{status}: redirect to {target} not followed$", [])
for size, waited in ((MIB, [0.5]), (MIB + 1, [])):  # 2 MiB is the most for a call, 1 for a try
    failed = http(b"x" * (size - len(http(b"", "503 X")) - 6), "503 X")
    case(f"{size} bytes", [failed], "503: X: x", waited, max_retries=9)
for extra, expected in ((0, FOUND), (1, "no .*: 2 MiB received for one call, and no end$")):
    first = INTERIM % (b"y" * (32768 - 23 + extra - len(http())))
    case(f"2 MiB and {extra}", [first + INTERIM % (b"y" * 32745) * 63 + http()], expected, [])
case("302 to nowhere", [http(b"", "302 X")], "302: X$", [])
case("400 with Location", [http(b"", "400 X", ["Location: /x"])], "400: X$", [])


@pytest.mark.parametrize(("responses", "expected", "waited", "options"), CALLS)
def test_what_is_tried_again_and_when(clock, caplog, responses, expected, waited, options):
    caplog.set_level(logging.DEBUG)
    with raw(each_connection(*responses)) as (server, client):
        result = outcome(client, **options)
        assert re.match(expected, str(result))
        assert clock == pytest.approx(waited)
        assert len(server.requests) == server.connections == len(waited) + 1
        if isinstance(result, Exception):
            assert server.requests[0].count(TOKEN) == 1
            assert TOKEN not in shown_by(result) + repr(vars(client)) + caplog.text


BEFORE = "Sun, 09 Sep 2001 01:46:30 GMT"  # ten seconds before the second 1,000,000,000
RETRY_AFTERS = f"""0;;0|007;{BEFORE};7|999999999;;999999999|999999990;1 Jan 2001 00:00 GMT;999999990
1000000010;;10|1000000010;yesterday;10|1000000000;{BEFORE};10|1000000000;;0|{BEFORE};;0
99999999999;Wed, 16 Nov 5138 09:46:29 GMT;10|100000000000;Sat, 03 Mar 1973 09:46:30 GMT;10
1000000000500;{BEFORE};10.5|9999999999999;;8999999999.999|{BEFORE};{BEFORE};0
1000000000;Sun, 09 Sep 2001 01:46:50 GMT;0|Sun, 09 Sep 2001 01:46:50 GMT;;10
Sunday, 09-Sep-01 01:46:40 GMT;{BEFORE};10|Sun Sep  9 01:46:40 2001;{BEFORE};10
Sun, 09 Sep 2001 03:46:40 +0200;{BEFORE};10""".replace("\n", "|")
NONSENSE = "|soon|-5|+7|1.5|0x10|nan|inf|1e400|7, 7|\u0663|12345678901234|6 Nov 1994 1.2.3.4 GMT|"
NONSENSE += "Fri, 31 Dec 9999 23:59:59 -2359|Mon, 99 Nov 2026 10:00:00 GMT|:|,|\xe9|" + "9" * 400
RETRY_AFTERS += "".join(f"|{value};{value};" for value in NONSENSE.split("|"))


@pytest.mark.parametrize("case", RETRY_AFTERS.split("|"), ids=lambda case: ascii(case)[:40])
def test_retry_after_is_seconds_a_date_or_an_epoch_by_the_servers_clock(monkeypatch, case):
    value, date, seconds = case.split(";")
    monkeypatch.setattr("time.time", lambda: 1_000_000_000.0)
    error = dub_customers.RateLimitExceeded(headers={"Retry-After": value, "Date": date})
    assert type(error.retry_after) is (float if seconds else type(None))
    assert error.retry_after == (pytest.approx(float(seconds)) if seconds else None)


@pytest.mark.parametrize("kind", [OSError, TimeoutError, ValueError, dub_customers.NotFound])
@pytest.mark.parametrize("tries", [1, 2])
def test_what_a_token_callable_raises_is_passed_on_untouched(httpserver, waits, kind, tries):
    served(httpserver, {}, 503)
    error = kind("from the callable")
    token = Mock(side_effect=[TOKEN] * (tries - 1) + [error])
    with Dub(token, server_url=httpserver.url_for("")) as client:
        with pytest.raises(kind) as caught:
            client.customers.get("cus_1")
    assert caught.value is error
    assert len(httpserver.log) == len(waits) == tries - 1


def test_each_attempt_leaves_one_debug_line_where_logging_is_imported(monkeypatch, clock, caplog):
    def fail(*_, **__):
        clock.append(0.25)
        raise errors.pop()

    caplog.set_level(logging.DEBUG, "dub_customers")
    errors = [KeyboardInterrupt, OSError]
    with raw(each_connection(http(b"{}", "503 X"), http())) as (server, client):
        client.customers.get("ext_a b", include_expanded_fields=True)
        for found in (types.ModuleType("logging"), None):  # half imported, not imported
            monkeypatch.setitem(sys.modules, "logging", found)
            assert outcome(client).id == "cus_1"
        monkeypatch.setitem(sys.modules, "logging", logging)
        monkeypatch.setattr("socket.getaddrinfo", fail)
        outcome(client, max_retries=0)
        with pytest.raises(KeyboardInterrupt):
            client.customers.get("cus_1")
    assert {(each.name, each.levelno) for each in caplog.records} == {("dub_customers", 10)}
    assert [each.getMessage() for each in caplog.records] == [
        "GET /customers/ext_a%20b?includeExpandedFields=true 503 0.0 ms",
        "GET /customers/ext_a%20b?includeExpandedFields=true 200 0.0 ms",
        "GET /customers/cus_1 ConnectionError 250.0 ms",
        "GET /customers/cus_1 KeyboardInterrupt 250.0 ms",
    ]


def assert_times_out(client, expected="timed out", **options):
    started = time.monotonic()
    error = outcome(client, timeout_ms=100, **options)
    assert -0.002 <= time.monotonic() - started - 0.1 < 1
    assert (type(error), type(error.__cause__)) == (RequestTimeout, socket.timeout)
    expected = f"no response from https?://[^/]+:[0-9]+: {socket.timeout.__name__}: {expected}"
    assert re.fullmatch(expected, str(error))


DRIPS = {
    "nothing": (b"", b""),
    "status line": (OK[:-2], b"O"),
    "field": (OK, b"X"),
    "body": (OK + b"Content-Length: 9999\r\n\r\n", b" "),
    "body to the end": (OK + b"\r\n", b" "),
    "chunk size": (CHUNKED + b"1;", b"x"),
    "chunks": (CHUNKED, b"1\r\n \r\n"),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n"),
    "interim responses": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}
ERRORS = [socket.gaierror(-2, "Name or service not known"), OSError(110, "Connection timed out")]
ERRORS += [None, OSError("x" * 300), RuntimeError("no sockets"), ValueError("?"), AttributeError()]


@pytest.mark.parametrize(("start", "drop"), list(DRIPS.values()), ids=list(DRIPS))
def test_a_response_that_drips_ends_with_the_deadline_of_the_call(monkeypatch, start, drop):
    def script(peer):
        for response in (http(), http(b"", "503 X"), start):
            peer.request()
            peer.send(response)
        while drop:
            time.sleep(0.005)
            peer.send(drop)
        peer.wait_for_end()

    with raw(script) as (server, client):
        client.customers.get("cus_1")
        monkeypatch.setattr("random.uniform", lambda low, high: 0.03)
        assert_times_out(client)
        assert (server.connections, len(server.requests)) == (1, 3)


@pytest.mark.parametrize("pace", [0.01, 0.2], ids=["reads slowly", "does not read"])
def test_the_deadline_bounds_sending(pace):
    def script(peer):
        peer.request()
        peer.send(http())
        time.sleep(pace)
        while peer.sock.recv(65536):
            time.sleep(pace)

    with raw(script) as (server, client):
        client.customers.get("cus_1")
        assert_times_out(client, http_headers={f"X-{n}": "x" * 60_000 for n in range(300)})


def test_the_deadline_bounds_the_tls_handshake():
    with raw_server(Peer.wait_for_end) as server:
        client = Dub(TOKEN, server_url=f"https://127.0.0.1:{server.port}")
        assert_times_out(client, f"cannot connect to 127.0.0.1:{server.port}: .*timed out")
        assert server.connections == 1


def test_addresses_share_the_time_and_no_name_is_asked_for_without_any(monkeypatch, clock):
    def connect(sock, address):
        if address[1] == 1:
            raise ConnectionRefusedError("refused")
        if address[1] == 2:
            clock.append(sock.gettimeout())  # as long as it may, and no answer
            raise socket.timeout("timed out")
        really_connect(sock, address)

    def resolve(*_, **__):
        families = [9999] + [socket.AF_INET] * 5  # the first is none that this machine has
        found = zip(families, [("127.0.0.1", port) for port in ports])
        return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in found]

    really_connect = socket.socket.connect
    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with raw(Peer.answer_by_id) as (server, client):
        ports = [2, 2, 1, 2, server.port]
        assert client.customers.get("cus_1").id == "cus_1"
        assert clock == [7.5, 11.25]
        ports = [2, 1, 2]
        error = outcome(Dub(TOKEN, server_url="https://dub.test"))
        assert (type(error), clock[2:]) == (RequestTimeout, [30.0])
        assert str(error).endswith("cannot connect to dub.test: timed out")
    monkeypatch.setattr("socket.getaddrinfo", pytest.fail)
    late = Dub(lambda: clock.append(30) or TOKEN, server_url="https://dub.test")
    assert type(outcome(late)) is RequestTimeout


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_failures_to_connect_are_told_and_tried_again(monkeypatch, waits, scheme, port, error):
    resolve = Mock(return_value=[], side_effect=error)
    monkeypatch.setattr("socket.getaddrinfo", resolve)
    result = outcome(Dub(TOKEN, server_url=f"{scheme}://localhost/api"))
    reason = "the name has no address" if error is None else str(error)
    reason = f"ConnectionError: cannot connect to localhost: {reason}".strip()
    reason = reason if len(reason) <= 200 else f"{reason[:197]}..."
    assert str(result) == f"no response from {scheme}://localhost/api: {reason}"
    assert type(result) is NoResponseError
    assert resolve.mock_calls == [call("localhost", port, type=socket.SOCK_STREAM)] * 3
    assert len(waits) == 2


# --- the connections ------------------------------------------------------------------------------


def test_the_opener_holds_urllibs_proxy_handler_and_ours_alone(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    handlers = Dub(TOKEN, server_url="http://localhost:1")._transport.opener.handlers
    kinds = [(type(each).__module__, type(each).__bases__[0].__name__) for each in handlers]
    assert kinds == [("urllib.request", "BaseHandler"), ("dub_customers", "BaseHandler")]


def test_100_calls_use_one_connection_that_delays_no_packet(monkeypatch):
    def setsockopt(sock, *option):
        options.append((sock.getpeername()[1], option))

    options = []
    monkeypatch.setattr(socket.socket, "setsockopt", setsockopt)
    with raw(Peer.answer_by_id) as (server, client):
        for number in range(100):
            assert client.customers.get(f"cus_{number}").id == f"cus_{number}"
        assert (server.connections, len(server.requests)) == (1, 100)
        assert (server.port, (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)) in options


def test_32_idle_connections_are_kept_and_closed_with_the_last_reference():
    gone, start = threading.Semaphore(0), threading.Barrier(40)

    def script(peer):
        peer.request()
        start.wait(5)
        peer.send(http())
        peer.answer_by_id()
        gone.release()

    with raw_server(script) as server:
        client = Dub(TOKEN, server_url=server.url)
        with ThreadPoolExecutor(40) as pool:
            list(pool.map(client.customers.get, ["cus_1"] * 40))
        assert all(gone.acquire(timeout=5) for _ in range(8))
        assert [client.customers.get(f"cus_{n}").id for n in range(2)] == ["cus_0", "cus_1"]
        assert not gone.acquire(timeout=0.01)
        assert server.connections == 40
        del client, pool
        if sys.implementation.name == "pypy":
            gc.collect()
        assert all(gone.acquire(timeout=5) for _ in range(32))


def test_a_call_that_ends_after_close_leaves_no_connection():
    def script(peer):
        peer.request()
        client.close()
        peer.send(http())
        peer.wait_for_end()
        gone.set()

    gone = threading.Event()
    with raw(script) as (server, client):
        assert client.customers.get("cus_1").id == "cus_1"
        assert gone.wait(5)


def test_16_threads_get_their_own_customers_over_a_network_that_fails():
    faults = [b"", http()[:-5], OK[:-5], CHUNKED + b"zz\r\n", http(b"", "503 X")]

    def script(peer):
        for count, head in enumerate(iter(peer.request, ""), 1):
            if count == 3 and peer.number % 5 == 0:
                return peer.send(faults[peer.number // 5 % len(faults)])
            peer.send(http(body_of(asked_id(head))))
            if count == 5:
                return None

    ids = [f"ext_{number}" for number in range(320)]
    with raw(script, max_retries=9) as (server, client), ThreadPoolExecutor(16) as pool:
        assert [customer.id for customer in pool.map(client.customers.get, ids)] == ids


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_a_connection_is_not_shared_across_fork(tls, secure):
    context = tls.here if secure else None
    with raw(Peer.answer_by_id, context, ssl_context=tls.trusting) as (server, client):
        client.customers.get("cus_1")
        child = os.fork()
        if not child:
            os._exit(0 if client.customers.get("cus_of_child").id == "cus_of_child" else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert client.customers.get("cus_2").id == "cus_2"
        assert server.connections == 2


def test_a_connection_idle_for_60_seconds_is_not_used_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: 1000.0 + now[0])
    with raw(Peer.answer_by_id) as (server, client):
        for now[0], connections in ((0, 1), (59.75, 1), (119.5, 1), (179.5, 2)):
            client.customers.get("cus_1")
            assert server.connections == connections


LOGIN = "Proxy-authorization: Basic " + base64.b64encode(b"us@er:pa:55word").decode()
TIMED_OUT = http(b"", "408 Request Timeout", ["Connection: close"])
LATE = http(body_of("cus_late"))
# How a kept connection ends: after a second request or not, this is sent, it is reset or not; and
# whether that costs a try, or a new connection is used at once.
KEPT = {
    "closed while idle": (False, b"", False, False),
    "reset while idle": (False, b"", True, False),
    "408 while idle": (False, TIMED_OUT, False, False),
    "another customer while idle": (False, LATE, False, False),
    "an interim response while idle": (False, b"HTTP/1.1 103 Early Hints\r\n\r\n", False, False),
    "closed on request": (True, b"", False, False),
    "reset on request": (True, b"", True, False),
    "408 on request": (True, TIMED_OUT, False, False),
    "cut after a byte": (True, b"H", False, True),
    "cut after an interim response": (True, b"HTTP/1.1 100 Continue\r\n\r\n", False, True),
    "cut before the last byte": (True, http()[:-1], False, True),
}


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
@pytest.mark.parametrize(("asked", "sent", "resets", "costs"), list(KEPT.values()), ids=list(KEPT))
def test_a_kept_connection_that_fails_is_replaced(tls, secure, asked, sent, resets, costs):
    late = threading.Semaphore(0)

    def script(peer):
        peer.request()
        peer.send(http(body_of(f"cus_{peer.number}")))
        if asked:
            peer.request()
        peer.send(sent)
        if resets:
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        elif sent and not asked:
            late.release()
            peer.wait_for_end()

    options = {"max_retries": 0, "ssl_context": tls.trusting}
    with raw(script, tls.here if secure else None, **options) as (server, client):
        for number in (1, None, 2, None) if costs else (1, 2, 3, 4):
            result = outcome(client)
            if number:
                assert result.id == f"cus_{number}"
            else:
                assert type(result) is NoResponseError
                assert re.search("closed before the response was whole$| EOF ", str(result))
            assert asked or not sent or late.acquire(timeout=5)
        assert server.connections == (2 if costs else 4)


def test_kept_connections_work_with_more_than_1024_files_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1700, hard) if hard > 0 else 1700, hard))
    with ExitStack() as files:
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1500):
            files.enter_context(open(os.devnull))
        with raw(Peer.answer_by_id) as (server, client):
            for _ in range(3):
                assert client.customers.get("cus_1").id == "cus_1"
            assert server.connections == 1


@pytest.mark.parametrize("secure", [False, True], ids=["in a response", "in a TLS handshake"])
def test_a_signal_handler_that_raises_leaves_no_descriptor_and_poisons_nothing(tls, secure):
    def script(peer):
        if peer.number == 1:
            data = peer.sock.recv(65536)
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(0.02)
            peer.send(LATE if b"GET" in data else b"")
        elif secure:
            peer.sock = tls.here.wrap_socket(peer.sock, server_side=True)
        with peer.sock:
            peer.answer_by_id()

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    opened = os.listdir("/dev/fd")
    with raw_server(script) as server:
        url = f"https://localhost:{server.port}" if secure else server.url
        with Dub(TOKEN, server_url=url, ssl_context=tls.trusting, max_retries=0) as client:
            with pytest.raises(KeyboardInterrupt):
                client.customers.get("cus_1")
            assert client.customers.get("cus_2").id == "cus_2"
            assert server.connections == 2
    signal.signal(signal.SIGALRM, before)
    assert len(os.listdir("/dev/fd")) == len(opened)


@pytest.fixture(scope="session")
def tls(tmp_path_factory):
    """A server's context, of a certificate for `localhost`, and a client's that trusts it."""
    pem = tmp_path_factory.mktemp("tls") / "both.pem"
    command = """openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -days 2
        -subj /CN=test -addext subjectAltName=DNS:localhost -keyout both.pem -out both.pem
        -addext keyUsage=digitalSignature,keyCertSign"""
    subprocess.run(command.split(), cwd=str(pem.parent), check=True, capture_output=True)
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(str(pem))
    trusting = ssl.create_default_context(cafile=str(pem))
    return types.SimpleNamespace(here=here, trusting=trusting, pem=pem)


def test_certificates_are_verified_by_one_context_until_one_fails(tls, monkeypatch, tmp_path):
    def script(peer):
        for _ in range(3):
            peer.send(http(body_of(asked_id(peer.request()))))

    made = Mock(wraps=ssl.create_default_context)
    monkeypatch.setattr("ssl.create_default_context", made)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "late.pem"))
    with raw(script, tls.here) as (server, client):
        assert made.call_count == 0
        error = outcome(client)
        assert (type(error), error.__cause__.verify_code) == (NoResponseError, 18)
        assert re.match("certificate of localhost not accepted: self.signed", str(error))
        assert (server.connections, server.requests) == (1, [])
        (tmp_path / "late.pem").write_text(tls.pem.read_text())
        for number in range(6):
            assert client.customers.get(f"cus_{number}").id == f"cus_{number}"
        assert (server.connections, made.call_count) == (3, 2)
        url = f"https://127.0.0.1:{server.port}"
        error = outcome(Dub(TOKEN, server_url=url, ssl_context=tls.trusting))
        assert re.match("certificate of 127.0.0.1 not accepted: IP address mismatch", str(error))
        assert (server.connections, made.call_count) == (4, 2)


@pytest.mark.parametrize("setting", ["{}", "u@{}", "us%40er:pa%3A55word@{}", "HTTP://{}/path"])
def test_http_through_a_proxy_asks_for_the_whole_url(monkeypatch, setting):
    with raw_server(Peer.answer_by_id) as relay:
        monkeypatch.setenv("http_proxy", setting.format(f"127.0.0.1:{relay.port}"))
        with Dub(TOKEN, server_url="http://localhost:1/v1") as client:
            for number in range(3):
                assert client.customers.get(f"ext_{number}/x").id == f"ext_{number}/x"
    assert relay.connections == 1
    first, *fields = relay.requests[0].split("\r\n")
    assert first == "GET http://localhost:1/v1/customers/ext_0%2Fx HTTP/1.1"
    assert ("Host: localhost:1" in fields, LOGIN in fields) == (True, "55word" in setting)


@pytest.mark.parametrize("login", ["us%40er:pa%3A55word@", ""], ids=["with login", "without"])
def test_https_through_a_proxy_is_a_tunnel_that_sees_no_token(tls, monkeypatch, login):
    def script(peer):
        connects.append(peer.request())
        peer.send(b"HTTP/1.1 200 Connection established\r\nX-Proxy: 1\r\n\r\n")
        with tls.here.wrap_socket(peer.sock, server_side=True) as peer.sock:
            peer.answer_by_id()

    connects = []
    with raw_server(script) as relay, raw_server(Peer.answer_by_id, tls.here) as server:
        for name in ("default_proxy", "all_proxy", "http_proxy"):  # none of them is for https
            monkeypatch.setenv(name, f"http://127.0.0.1:{relay.port}")
        with Dub(TOKEN, server_url=server.url, ssl_context=tls.trusting) as client:
            assert client.customers.get("cus_1").id == "cus_1"
        assert (relay.connections, server.connections) == (0, 1)
        monkeypatch.setenv("https_proxy", f"http://{login}127.0.0.1:{relay.port}")
        with Dub(TOKEN, server_url="https://localhost:81", ssl_context=tls.trusting) as client:
            for number in range(3):
                assert client.customers.get(f"cus_{number}").id == f"cus_{number}"
    lines = ["CONNECT localhost:81 HTTP/1.1", "Host: localhost:81", *([LOGIN] if login else [])]
    assert (relay.connections, connects) == (1, ["\r\n".join([*lines, "", ""])])
    assert "proxy-authorization" not in relay.requests[1].lower()
    fields = {"Host: localhost:81", f"Authorization: Bearer {TOKEN}"}
    assert fields < set(relay.requests[1].split("\r\n"))


@pytest.mark.parametrize(("status", "tries"), [(300, 1), (404, 1), (407, 1), (429, 3), (502, 3)])
def test_a_proxy_that_refuses_the_tunnel(monkeypatch, waits, status, tries):
    with raw_server(each_connection(http(b"", f"{status} X"))) as relay:
        monkeypatch.setenv("https_proxy", f"http://us%40er:pa%3A55word@127.0.0.1:{relay.port}")
        error = outcome(Dub(TOKEN, server_url="https://dub.test"))
        assert str(error).endswith(f"proxy 127.0.0.1:{relay.port} answered {status} to CONNECT")
        assert type(error) is NoResponseError
        assert relay.connections == tries
        host = "dub.test:443"
        assert relay.requests[0] == f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n{LOGIN}\r\n\r\n"
        assert "55word" not in shown_by(error)


def by_packets_of(size, monkeypatch, receive=socket.socket.recv):
    """Whatever is received comes in packets of this size at most."""
    monkeypatch.setattr(socket.socket, "recv", lambda sock, most: receive(sock, min(most, size)))


@pytest.mark.parametrize("size", [1, 65536], ids=["byte by byte", "at once"])
def test_a_proxy_cannot_speak_ahead_of_tls(tls, monkeypatch, size):
    by_packets_of(size, monkeypatch)
    with raw_server(each_connection(b"HTTP/1.1 200 OK\r\n\r\n" + LATE)) as relay:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{relay.port}")
        error = outcome(Dub(TOKEN, server_url="https://localhost", ssl_context=tls.trusting))
        assert str(error).endswith("the proxy spoke or hung up ahead of TLS")


def test_no_proxy_is_read_at_each_call_and_another_route_takes_another_connection(monkeypatch):
    with raw_server(Peer.answer_by_id) as relay, raw_server(Peer.answer_by_id) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{relay.port}")
        with Dub(TOKEN, server_url=server.url) as client:
            for no_proxy in ("127.0.0.1", "", "127.0.0.1"):
                monkeypatch.setenv("no_proxy", no_proxy)
                assert client.customers.get("cus_1").id == "cus_1"
    assert (relay.connections, server.connections) == (1, 2)


BAD_PROXIES = "socks5://u:pa55word@h:1|socks5h://u:pa55word@h|https://u:pa55word@h|ftp://h|http://|"
BAD_PROXIES += "http:/u:pa55word@h|http://u:pa55word@h:x|http://u:pa55word%40h:1|http://pa55word@|"
BAD_PROXIES += "http://u:pa55word@h:65536|http://u:pa55word@h:0|http://pa55word@h..h|http://[:::]|"
BAD_PROXIES += "http://u:pa/55word@h|http://u:pa?55word@h|http://pa#55word@h|//pa55word|pa55word:|"
BAD_PROXIES += "http://pa55word\udce9@h|http://pa55word\xe9@h|http://pa55word@h\xe9|h pa55word|"
BAD_PROXIES += "http://h?55word|http://h#55word"


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("setting", BAD_PROXIES.split("|") + ["h" * 64], ids=ascii)
def test_a_proxy_setting_that_is_no_http_proxy_is_refused_unseen(monkeypatch, scheme, setting):
    monkeypatch.setenv(f"{scheme}_proxy", setting)
    with pytest.raises(ValueError, match=f"^{scheme}_proxy: ") as caught:
        Dub(TOKEN, server_url=f"{scheme}://localhost:1")
    assert "55word" not in shown_by(caught.value)
    other = {"http": "https", "https": "http"}[scheme]
    Dub(TOKEN, server_url=f"{other}://localhost:1")


# --- the wire -------------------------------------------------------------------------------------

BODY = body_of("cus_1")
LENGTH = f"Content-Length: {len(BODY)}"
SIZE = f"{len(BODY):x}"  # of a chunk


def answer(*lines, status="HTTP/1.1 200 OK", body=BODY):
    return "\r\n".join([status, *lines, "", ""]).encode() + body


def chunk(coding="chunked", size=SIZE, end="\r\n", last="0", trailers=""):
    chunks = f"{size}\r\n".encode() + BODY + f"{end}{last}\r\n{trailers}\r\n".encode()
    return answer(f"Transfer-Encoding: {coding}", body=chunks)


def cases(expected, texts, make):
    return [pytest.param(expected, make(each), id=ascii(each)) for each in texts.split("|")]


def ask_twice(sent, **options):
    """What comes at once of a call answered by this, on a connection that is held open. When then
    another customer comes late on it, a second call must get its own."""
    both = threading.Barrier(2)

    def script(peer):
        if peer.number == 1 and peer.request():
            with suppress(OSError):  # the client may close it
                peer.send(sent)
            both.wait(5)
            with suppress(OSError):
                peer.send(LATE)
            both.wait(5)
        peer.answer_by_id()

    with raw(script, max_retries=0) as (server, client):
        started = time.monotonic()
        result = outcome(client, **options)
        assert time.monotonic() - started < 0.5  # of 30: at once, on a busy machine too
        both.wait(5)
        both.wait(5)
        assert client.customers.get("cus_2").id == "cus_2"
        assert server.connections == 2
    return result


REFUSED = cases(
    "expected a status line",
    "HTTP/2 200|HTTP/1.2 200 OK|HTTP/11 200 OK|http/1.1 200 OK|ICY 200 OK|HTTP/1.1|HTTP/1.1 OK|{}|"
    "HTTP/1.1 20 OK|HTTP/1.1 2000 OK|HTTP/1.1 099 OK|HTTP/1.1 +20 OK|HTTP/1.1  200 OK|HTTP/1.1 2|"
    "HTTP/1.1\t200 OK|HTTP/1.1 200OK|HTTP/1.1 200 OK\nX: y|HTTP/1.1 200 OK\rX: y|HTTP/1.1 200 O\0K|"
    "\r\nHTTP/1.1 200 OK|SSH-2.0-OpenSSH_9.2p1|\x15\3\1\0\2\2\x46|\0\0\x12\4\0\0\0\0\0\0\3|\n| ",
    lambda line: answer(LENGTH, status=line),
)
REFUSED += cases(
    "expected a header field",
    "Nonsense|: y|X : y|X Y: z|\xdc: y|X: y\r\n z: 1|X: y\r\n\tz| X: y|X: y\rZ: 1|X: y\r|"
    "X: y\nZ: 1|X: y\0|X\0: y|X: y\r\n\n|Content-Length\r\n: 5|X\r: y|(: y",
    lambda line: answer(LENGTH, line),
)
REFUSED += cases(
    "Content-Length is not one number",
    "|+68|-0|-1|6_8|0x44|6 8|68 68|68;|'68'|1e2|68.0|\u0666\u0668|68, 69|68,|,68|68,,68|168, 68|"
    f"68, 168|6868, 68|68\r\nContent-Length: 69|68\x0b|x|{'9' * 100}|{'00000000000000,' * 9}x",
    lambda value: answer(f"Content-Length: {value}"),
)
REFUSED += cases(
    "Transfer-Encoding is not chunked alone",
    "|gzip|gzip, chunked|chunked, gzip|chunked, chunked|chunked,|identity|xchunked|chunked;q=1|'|"
    "chun ked|chunked\x0b|chunked\r\nTransfer-Encoding: chunked|chunked\r\nContent-Length: x|"
    f"chunked\r\n{LENGTH}|identity\r\n{LENGTH}",
    chunk,
)
REFUSED += cases(
    "expected the size of a chunk",
    f"|-5|+5|0x44|4_4|g|.| {SIZE}|{SIZE} x|{SIZE} 0|{'0' * 15}{SIZE}|{SIZE}\n|{SIZE}\r|{SIZE};\n|"
    f"{SIZE};x\ry|{SIZE};\0|{SIZE}\x0b",
    lambda size: chunk(size=size),
)
REFUSED += cases("chunk is longer", "1|5|f", lambda size: chunk(size=size))
REFUSED += cases("chunk is longer", "x|\rx", lambda end: CHUNKED + b"1\r\n{" + end.encode())
REFUSED += cases("chunk is longer", "|\n|\r|\r\r|\n\r|xx|0\r\n", lambda end: chunk(end=end))
REFUSED += cases("size of a chunk", "x|-1|\r\n0|0\n|0\n\n|0\r", lambda last: chunk(last=last))
REFUSED += cases("expected a header", "x\r\n|x\n| x: y\r\n", lambda lines: chunk(trailers=lines))
REFUSED += cases("chunked alone", "HTTP/1.0", lambda v: chunk().replace(b"HTTP/1.1", v.encode()))
for start in (OK[:-2], OK + b"X: ", CHUNKED + b"1;"):  # and no end in 64 KiB
    REFUSED.append(pytest.param("expected", start + b"x" * 65536, id=f"{start[-9:]}..."))


@pytest.mark.parametrize(("why", "sent"), REFUSED)
def test_what_rfc_9112_does_not_allow_is_refused_at_once(why, sent):
    error = ask_twice(sent)
    assert (type(error), type(error.__cause__)) == (NoResponseError, ConnectionError)
    assert re.match(f"no response from http://127[^ ]+: ConnectionError: .*{why}", str(error))


# What is told of the customer or error, and by how many connections two calls are answered.
KEEPS, ENDS = ("Customer(id='cus_1'", 1), ("Customer(id='cus_1'", 2)
UNDERSTOOD = cases(
    KEEPS,
    "HTTP/1.1 200 OK|HTTP/1.1 200|HTTP/1.1 200 |HTTP/1.1 200 \xdc\u20ac|HTTP/1.1 200 \t a: b",
    lambda line: answer(LENGTH, status=line),
)
UNDERSTOOD += cases(
    KEEPS,
    f"{LENGTH.lower()}|{LENGTH.upper()}|{LENGTH} \t |{LENGTH.replace(' ', '')}|X:\r\n{LENGTH}|"
    f"{LENGTH.replace(' ', ' 00')}|{LENGTH}\r\n{LENGTH}|{LENGTH}, {len(BODY)} ,\t0{len(BODY)}|"
    f"{LENGTH}\r\n!#$%&'*+.^_`~9a: \xdc\u20ac;\x01|{LENGTH}\r\nConnection: keep-alive|"
    f"{LENGTH}\r\nConnection: closed, x-close|{LENGTH}\r\nConnection:|{LENGTH}\r\nUpgrade: close",
    answer,
)
UNDERSTOOD += cases(KEEPS, "chunked|CHUNKED|Chunked \t|\t chunked\r\nConnection: x", chunk)
UNDERSTOOD += cases(
    KEEPS,
    f'{SIZE.upper()}|{SIZE:0>16}|{SIZE} \t|{SIZE};|{SIZE};a=b|{SIZE} ;x="y;z"; q|{SIZE};\xdc',
    lambda size: chunk(size=size),
)
UNDERSTOOD += cases(KEEPS, "00|0000000000000000|0 ;x=y|0\t", lambda last: chunk(last=last))
UNDERSTOOD += cases(KEEPS, "X: y\r\n|Content-Length: 5\r\n", lambda lines: chunk(trailers=lines))
UNDERSTOOD += cases(
    KEEPS,
    "100 Continue|102 |103 Early Hints\r\nLink: <x>|199 X\r\nContent-Length: 5|"
    + "\r\n\r\nHTTP/1.1 ".join(["100 Continue"] * 9),
    lambda lines: f"HTTP/1.1 {lines}\r\n\r\n".encode() + answer(LENGTH),
)
UNDERSTOOD += cases(
    ENDS,
    "close|CLOSE|keep-alive , Close|x\r\nConnection: close|close\r\nConnection: x",
    lambda lines: answer(LENGTH, f"connection:{lines}"),
)
UNDERSTOOD += cases(ENDS, "x|\r\n|HTTP/1.1 100 X\r\n\r\n", lambda rest: http() + rest.encode())
UNDERSTOOD += cases(ENDS, "x|\r\n|0\r\n\r\n", lambda rest: chunk() + rest.encode())
OLD = partial(answer, LENGTH, status="HTTP/1.0 200 OK")
UNDERSTOOD += cases(ENDS, "X: y|Connection: keep-alive", OLD)
for code, ended in ((204, "204 response is not"), (304, "304: X"), (101, "101: X")):
    bare = partial(answer, status=f"HTTP/1.1 {code} X", body=b"")
    UNDERSTOOD += cases((ended, 1 + (code == 101)), "X: y|Content-Length: 0", bare)
    UNDERSTOOD += cases((ended, 2), f"{LENGTH}|Transfer-Encoding: chunked|Connection: close", bare)


@pytest.mark.parametrize(("result", "sent"), UNDERSTOOD)
def test_what_rfc_9112_allows_is_understood_cut_anywhere(monkeypatch, result, sent):
    expected, connections = result
    assert str(ask_twice(sent)).startswith(expected)
    for size in (1, 2, 7, 65536):
        by_packets_of(size, monkeypatch)
        with raw(lambda p: [p.send(sent) for _ in iter(p.request, "")]) as (server, client):
            for _ in range(2):
                assert str(outcome(client)).startswith(expected)
            assert server.connections == connections


HEAD = len(answer(LENGTH, body=b""))
LIMITS = {
    "head": (65536 - HEAD, lambda size: answer(LENGTH, f"X: {'y' * (size - 5)}")),
    "status line": (65536 - HEAD, lambda n: answer(LENGTH, status="HTTP/1.1 200 OK" + "x" * n)),
    "fields": (99, lambda count: answer(LENGTH, *["X: y"] * count)),
    "chunk size": (65536 - len(SIZE) - 3, lambda n: chunk(size=f"{SIZE};{'x' * n}")),
    "trailers": (100, lambda count: chunk(trailers="X: y\r\n" * count)),
    "size of trailers": (65536 - 10, lambda n: chunk(trailers=f"X: {'y' * n}\r\n")),
    "interim response": (65536 - 23, lambda n: INTERIM % (b"y" * n) + http()),
}
FRAMINGS = ["Content-Length: {}\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n", "\r\n"]


@pytest.mark.parametrize(("most", "make"), list(LIMITS.values()), ids=list(LIMITS))
def test_heads_have_64_kib_and_100_fields_at_most(most, make):
    assert ask_twice(make(most)).id == "cus_1"
    assert type(ask_twice(make(most + 1))) is NoResponseError


@pytest.mark.parametrize("framing", FRAMINGS, ids=["counted", "chunked", "to the end"])
def test_a_body_may_have_1_mib_and_no_more(framing):
    def padded(size, body, status):
        body = body[:-1] + b', "pad": "' + b"x" * (size - len(body) - 11) + b'"}'
        head = f"HTTP/1.1 {status}\r\n{framing.format(len(body))}".encode()
        if "chunked" in framing:
            body = b"9\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (body[:9], len(body) - 9, body[9:])
        return head + body

    def script(peer):
        while peer.request():
            peer.send(sent[len(server.requests) - 1])
            if framing == "\r\n":
                return

    sent = [padded(size, BODY, "200 OK") for size in (MIB, MIB + 1, 3 * MIB)]
    error = json.dumps(error_body()).encode()
    sent += [padded(size, error, "404 X") for size in (MIB, MIB + 2, 3 * MIB)]
    with raw(script) as (server, client):
        results = [outcome(client) for _ in sent]
        kinds = [type(each).__name__[:8] for each in results]
        assert kinds == ["Customer", "Response", "Response"] + ["NotFound"] * 3
        assert {len(each.body) for each in results[1:]} == {MIB}
        assert [each.code for each in results[3:]] == ["not_found", None, None]
        assert server.connections == (6 if framing == "\r\n" else 4)  # not kept where cut


def test_a_response_cut_short_anywhere_is_a_failure(tls):
    chunks = CHUNKED + b"1;x\r\n{\r\n1\r\n}\r\n0\r\nX: y\r\n\r\n"
    for whole in (http(b"{}"), INTERIM % b"y" + http(b"{}"), chunks):
        with raw(each_connection(*[whole[:end] for end in range(len(whole) + 1)])) as (_, client):
            for _ in whole:
                error = outcome(client, max_retries=0)
                assert str(error).endswith("closed before the response was whole")
            assert type(outcome(client)) is dub_customers.ResponseValidationError
    cut = each_connection(OK + b"\r\n" + BODY)  # for all that TLS tells; older Pythons hide it
    with raw(cut, tls.here, max_retries=0, ssl_context=tls.trusting) as (_, client):
        assert (type(outcome(client)) is NoResponseError) is (sys.version_info >= (3, 10))


def test_a_head_that_comes_byte_by_byte_costs_little(monkeypatch):
    by_packets_of(1, monkeypatch)
    with raw(each_connection(answer(LENGTH, f"X: {'y' * 60_000}"))) as (_, client):
        started = time.process_time()
        assert outcome(client).id == "cus_1"
        assert time.process_time() - started < 5  # searched anew each time, it takes 50


def test_mutated_responses_end_in_time_with_the_right_customer_or_an_error(monkeypatch):
    choose, customers = random.Random(9112), 0
    odd = [b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b",", b"0", b"9", b"\xff", b"X: y\r\n"]
    for number in range(300):
        body = body_of(f"<{number}>" * 5)
        chunks = CHUNKED + b"9\r\n%s\r\n%x;x\r\n%s\r\n0\r\nX: y\r\n\r\n"
        chunks %= (body[:9], len(body) - 9, body[9:])
        sent = bytearray(choose.choice([http(body), INTERIM % b"y" + http(body), chunks]))
        for _ in range(choose.choice([1, 1, 2])):
            place = choose.randrange(choose.choice([80, len(sent)]))
            size = choose.choice([0, 1, 1, 1, choose.randrange(30)])
            twice, changed = sent[place : place + size] * 2, bytes([choose.randrange(256)]) * size
            sent[place : place + size] = choose.choice([changed, b"", twice, choose.choice(odd)])
        by_packets_of(choose.choice([1, 9, 65536]), monkeypatch)
        result = ask_twice(bytes(sent), timeout_ms=20)
        if isinstance(result, Customer):
            assert f"<{number}>" in result.id
            customers += 1
    assert 40 < customers < 260


# --- the answer -----------------------------------------------------------------------------------

CODES = "400 BadRequest|401 Unauthorized|403 Forbidden|404 NotFound|409 Conflict|502 APIError|"
CODES += "410 InviteExpired|422 UnprocessableEntity|429 RateLimitExceeded|500 InternalServerError"


@pytest.mark.parametrize("case", CODES.split("|"))
@pytest.mark.parametrize("code", ["not_found", "exceeded_limit", "never_heard_of"])
def test_the_status_alone_chooses_the_class(client, httpserver, case, code):
    status, kind = case.split()
    served(httpserver, error_body(code, "Because."), int(status), headers={"X-Request": "r1"})
    error = outcome(client, max_retries=0)
    assert type(error) is getattr(dub_customers, kind)
    assert (error.status_code, error.code, error.message) == (int(status), code, "Because.")
    assert (error.doc_url, error.headers["x-request"]) == ("https://dub.co/e", "r1")
    assert json.loads(error.body) == error_body(code, "Because.")
    assert str(error) == f"{status} {code}: Because."


DEEP = b"[" * 100_000
# What a body tells in place of a message, where it is not the API's envelope.
WORDS = 'null|[]|"x"|7|{}|{"error": null}|{"error": [1]}|{"error": "x"}|{"error": {"message": 5}}'
WORDS = {body.encode(): body for body in WORDS.split("|")}
WORDS.update({b"": "", b" \r\n ": "", b"\xff": "\ufffd", DEEP: "[" * 97 + "..."})
WORDS[b"<html>\n\n<h1>FUNCTION_TIMEOUT</h1>\0"] = "<html> <h1>FUNCTION_TIMEOUT</h1>"


@pytest.mark.parametrize(("body", "words"), list(WORDS.items()), ids=lambda each: ascii(each)[:40])
def test_a_body_that_is_no_envelope_shows_its_first_words_and_hides_no_status(body, words):
    for reason, message in (("Odd", f"Odd: {words}" if words else "Odd"), ("", words)):
        with raw(each_connection(http(body, f"404 {reason}"))) as (server, client):
            error = outcome(client)
        assert (type(error), error.code, error.doc_url) == (dub_customers.NotFound, None, None)
        assert (error.message, error.body) == (message or "no message", body)


NOT_JSON = r"200 response is not a customer's JSON \(.*\) \['text/html; charset=x', 'br'\]: "
ODD_BODIES = {
    "sign-in page": (b"<!DOCTYPE html>\n<h1>Hi</h1>", NOT_JSON + "'<!DOCTYPE html> <h1>Hi</h1>'$"),
    "empty": (b"", NOT_JSON + "''$"),
    "two objects": (BODY * 2, ".*Extra data"),
    "bad UTF-8": (b'{"id": "\xff"}', ".*'utf-8' codec"),
    "cut": (BODY[:-1], ".*line 1"),
    "deep nesting": (DEEP, NOT_JSON + r"'\[{97}\.\.\.'$"),
    "giant number": (b'{"id": ' + b"9" * 6000 + b"}", ""),
    "mismatch": (b'{"id": 5}', "customer.id: expected string, got number$"),
}


@pytest.mark.parametrize(("body", "expected"), list(ODD_BODIES.values()), ids=list(ODD_BODIES))
@pytest.mark.parametrize("status", [200, 201, 299])
def test_a_2xx_that_is_no_customer_is_described_and_not_tried_again(status, body, expected):
    headers = ["Content-Type: text/html; charset=x", "Content-Encoding: br"]
    with raw(each_connection(http(body, f"{status} X", headers))) as (server, client):
        error = outcome(client)
        assert len(server.requests) == 1
    assert (type(error), error.body) == (dub_customers.ResponseValidationError, body)
    comes = rf"{status} response is not a customer's JSON \(a customer comes with 200, .*br"
    assert re.match(expected if status == 200 else comes, str(error))
    assert len(str(error)) <= 400 and "\n" not in str(error)


# --- command line, README -------------------------------------------------------------------------

# What a shell runs => exit status => its output => its errors, as patterns
COMMANDS = r"""
{dub} cus_1 {url} => 0 => {plain} =>
{dub} --expand cus_1 {url} => 0 => {expanded} =>
LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {dub} ext_é {url} => 0 => {plain} =>
{dub} $(printf 'ext_\351') {url} => 1 =>  => error: .*surrogates not allowed
{dub} ext_none {url} => 1 =>  => error: 404 not_found: No such customer.
{dub} ext_deep {url} 2>&1 | tail -n 1 => 0 => (}}|error: .+) =>
{dub} .. => 1 =>  => error: id: [^\n]+'..'
env -u DUB_API_KEY {dub} cus_1 => 1 =>  => error: no token: give token=... or set DUB_API_KEY
PYTHONWARNINGS=error {dub} x --server-url http://dub.test => 1 =>  => error: [^\n]+ use https
{dub} => 2 =>  => usage: .+error: .+
{dub} cus_1 --demo => 2 =>  => usage: .+error: .+
{dub} --version => 0 => {version} =>
{dub} --help => 0 => usage: .+ID.+--expand.+ =>
http_proxy=http://127.0.0.1:1 no_proxy= {dub} --demo => 0 => .+cus_1KAP4CDPBSVMMBMH9XX3YZZ0Z.+ =>
{dub} --demo >&- => 1 =>  => error: [^\n]+Bad file descriptor
{dub} .. 2>&- => 1 =>  =>
{dub} --demo >/dev/full => 1 =>  => error: [^\n]+No space left on device
{dub} --help >/dev/full => 1 =>  => error: [^\n]+No space left on device
({dub} --demo; echo $? >&2) | true => 0 =>  => error: [^\n]+Broken pipe\n1
{no_threads} --demo => 1 =>  => error: can't start new thread
""".strip()
EXPAND = "includeExpandedFields=true"
NO_THREADS = """import runpy, threading
def start(self): raise RuntimeError("can't start new thread")
threading.Thread.start = start
runpy.run_path("dub_customers.py", run_name="__main__")"""


@pytest.mark.parametrize("line", COMMANDS.splitlines())
def test_command_line(httpserver, line):
    words = {"url": f"--server-url {httpserver.url_for('')}", "version": dub_customers.__version__}
    words["dub"] = f"{shlex.quote(sys.executable)} dub_customers.py"
    words["no_threads"] = f"{shlex.quote(sys.executable)} -c {shlex.quote(NO_THREADS)}"
    for name, data in (("plain", PLAIN), ("expanded", EXPANDED)):
        words[name] = re.escape(json.dumps(data, indent=2))
    answers = [("cus_1", "", PLAIN), ("ext_\xe9", "", PLAIN), ("cus_1", EXPAND, EXPANDED)]
    for id, query, data in answers:
        httpserver.expect_request(f"/customers/{id}", query_string=query).respond_with_json(data)
    httpserver.expect_request("/customers/ext_none").respond_with_json(error_body(), 404)
    depth = 1200 if sys.version_info < (3, 13) else 20_000  # which 3.13 could print again
    deep = body_of("x")[:-1] + b', "later": ' + b"[" * depth + b"]" * depth + b"}"
    httpserver.expect_request("/customers/ext_deep").respond_with_data(deep)
    command, status, output, errors = f"{line} ".split(" => ")
    command = ["sh", "-c", command.format(**words).encode()]
    env = {**os.environ, "DUB_API_KEY": TOKEN}
    done = subprocess.run(command, env=env, cwd=str(HERE), capture_output=True, timeout=60)
    for pattern, data in ((errors, done.stderr), (output, done.stdout)):
        pattern = pattern.strip().format(**words)
        assert re.fullmatch(pattern and pattern + "\n", data.decode(), re.DOTALL)
    assert done.returncode == int(status)


@pytest.mark.parametrize("handler", ["default_int_handler", "SIG_IGN"])
def test_ctrl_c_ends_the_command_by_the_signal_unless_that_is_ignored(monkeypatch, handler):
    def script(peer):
        peer.request()
        os.kill(process.pid, signal.SIGINT)
        peer.send(http())

    code = f"import runpy, signal; signal.signal(signal.SIGINT, signal.{handler})\n"
    code += "runpy.run_path('dub_customers.py', run_name='__main__')"
    monkeypatch.setenv("DUB_API_KEY", TOKEN)
    with raw_server(script) as server:
        command = [sys.executable, "-c", code, "cus_1", "--server-url", server.url]
        with subprocess.Popen(command, cwd=str(HERE), stdout=-1, stderr=-1) as process:
            output, errors = process.communicate(timeout=30)
    ignored = handler == "SIG_IGN"
    assert (process.returncode, errors) == (0 if ignored else -signal.SIGINT, b"")
    assert (b"cus_1" in output) is ignored


SAMPLES = re.findall("^```python\n(.*?)^```$", README, re.M | re.S)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_readme_samples_run(httpserver, monkeypatch, sample):
    async def to_thread(function, *args):  # which Python 3.8 does not have, as the README says
        return await asyncio.get_running_loop().run_in_executor(None, function, *args)

    served(httpserver, EXPANDED)
    monkeypatch.setenv("DUB_API_KEY", TOKEN)
    monkeypatch.setitem(Dub.__init__.__kwdefaults__, "server_url", httpserver.url_for(""))
    monkeypatch.setattr(asyncio, "to_thread", to_thread, raising=False)
    exec(compile(sample, "README.md", "exec"), vars(types.ModuleType("__main__")))
    assert httpserver.log
