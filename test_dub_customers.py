"""Tests of dub_customers.py, in its order, each named after the rule it holds.

pytest-httpserver plays the API; a raw socket (`raw`) plays what no proper server does. TLS needs
the command `openssl`, which makes the certificates while the tests run.
"""

import ast
import asyncio
import base64
import copy
import dataclasses
import errno
import inspect
import json
import logging
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import types
import typing
import urllib.parse
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from werkzeug import Response

import dub_customers
from dub_customers import Customer, Discount, Dub, Link, Partner

HERE = Path(__file__).resolve().parent
MODULE = HERE / "dub_customers.py"
TOKEN = "dub_s3cr3tS3cr3tS3cr3t"

PLAIN = {
    "id": "cus_1",
    "externalId": "user_42",
    "name": "Ada Lovelace",
    "email": "ada@example.com",
    "avatar": "https://assets.example.com/ada.png",
    "country": "GB",
    "sales": 3,
    "saleAmount": 12900,
    "createdAt": "2026-01-02T03:04:05.000Z",
    "stripeCustomerId": "cus_stripe",
    "firstSaleAt": "2026-02-01T00:00:00.000Z",
    "subscriptionCanceledAt": "2026-03-01T00:00:00.000Z",
}
EXPANDED = {
    **PLAIN,
    "link": {
        "id": "link_1",
        "domain": "dub.sh",
        "key": "try",
        "shortLink": "https://dub.sh/try",
        "url": "https://dub.co",
        "programId": "prog_1",
    },
    "programId": "prog_2",
    "partner": {"id": "pn_1", "name": "Grace", "email": "grace@example.com", "image": "i.png"},
    "discount": {
        "id": "disc_1",
        "amount": 20,
        "type": "percentage",
        "maxDuration": 12,
        "description": "d",
        "couponId": "co_1",
        "couponTestId": "ct_1",
        "partnersCount": 4,
    },
}


# --- what the tests stand on ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Without proxies, keys and certificates of whoever runs the tests, and without waits."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("DUB_API_KEY", "SSL_CERT_FILE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)


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


@pytest.fixture
def highest(monkeypatch):
    """`random.uniform` gives its upper bound: then the back-off shows in `waits`."""
    monkeypatch.setattr("random.uniform", lambda low, high: low + high)


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


def chunked(*chunks, end=b"0\r\n\r\n"):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end


class Peer:
    """The server's side of one connection."""

    def __init__(self, sock, number):
        self.sock = sock
        self.number = number  # of the connection, from 1

    def request(self):
        """The next request's head as text; empty when the client has gone."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = self.sock.recv(65536)
            if not data:
                return ""
            head += data
        return head.decode("latin-1")

    def send(self, *parts):
        for part in parts:
            self.sock.sendall(part)

    def answer_by_id(self):
        """Serve customers until the client goes, each with the id that was asked for."""
        while True:
            head = self.request()
            if not head:
                return
            self.send(http(body_of(asked_id(head))))

    def wait_for_end(self):
        while self.sock.recv(65536):
            pass

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def asked_id(head):
    path = head.split(" ")[1].split("?")[0]
    return urllib.parse.unquote(path.rsplit("/", 1)[1])


@contextmanager
def raw_server(script, tls=None):
    """A server that runs `script(peer)` on a thread for each connection, then closes it."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    open_socks, threads = [], []
    server = types.SimpleNamespace(
        port=listener.getsockname()[1], url="", requests=[], connections=0, problems=[]
    )
    server.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.port}"

    def serve(sock, number):
        with sock:
            try:
                if tls:
                    sock = tls.wrap_socket(sock, server_side=True)
                    open_socks.append(sock)
                with sock:
                    peer = Peer(sock, number)
                    take = peer.request

                    def request():
                        head = take()
                        if head:
                            server.requests.append(head)
                        return head

                    peer.request = request
                    script(peer)
            except OSError:
                pass
            except BaseException as error:
                server.problems.append(error)

    def accept():
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.connections += 1
            open_socks.append(sock)
            thread = threading.Thread(target=serve, args=(sock, server.connections), daemon=True)
            threads.append(thread)
            thread.start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for sock in open_socks:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in threads:
            thread.join(5)
    assert server.problems == []


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
            answer = answers[min(peer.number, len(answers)) - 1]
            peer.send(answer)

    return script


def in_python(code, *args, flags=(), env=None, cwd=None):
    """Run code in a Python of its own; its completed process."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.update(env or {})
    return subprocess.run(
        [sys.executable, *flags, "-c", code, *map(str, args)],
        env=environment,
        cwd=str(cwd) if cwd else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=60,
    )


def loaded_as(name, path=MODULE):
    """The module once more, under another name."""
    spec = spec_from_file_location(name, str(path))
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# --- the house ------------------------------------------------------------------------------------


def test_every_top_level_name_is_public_or_underscored():
    tree = ast.parse(MODULE.read_text("utf-8"))
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {name for name in names if not name.startswith("_")} == set(dub_customers.__all__)


def test_every_public_name_has_a_docstring_and_hints_that_resolve():
    for name in dub_customers.__all__:
        public = getattr(dub_customers, name)
        assert inspect.getdoc(public)
        typing.get_type_hints(public)
    for function in (Dub.__init__, Dub.close, dub_customers.Customers.get, Customer.from_json):
        assert typing.get_type_hints(function)
    assert typing.get_type_hints(Customer)["link"] == typing.Optional[Link]


def test_module_imports_the_standard_library_alone_and_carries_licence_and_version():
    lines = MODULE.read_text("utf-8").splitlines()
    assert lines[0] == "# SPDX-License-Identifier: 0BSD"
    assert any("Origin" in line for line in lines[:15])
    assert f'__version__ = "{dub_customers.__version__}"' in lines[:20]
    assert max(map(len, lines)) <= 100


def test_import_loads_nothing_before_it_is_needed():
    code = "import sys, dub_customers; print(*sys.modules)"
    modules = set(in_python(code, flags=["-S"]).stdout.split())
    assert not modules & {"argparse", "http.server", "logging", "asyncio", "multiprocessing"}
    assert "dub_customers" in modules


# --- errors ---------------------------------------------------------------------------------------

STATUS_CLASSES = {
    400: dub_customers.BadRequest,
    401: dub_customers.Unauthorized,
    403: dub_customers.Forbidden,
    404: dub_customers.NotFound,
    409: dub_customers.Conflict,
    410: dub_customers.InviteExpired,
    422: dub_customers.UnprocessableEntity,
    429: dub_customers.RateLimitExceeded,
    500: dub_customers.InternalServerError,
}


def test_errors_form_the_tree():
    assert dub_customers.DubError.__bases__ == (Exception,)
    assert dub_customers.APIError.__bases__ == (dub_customers.DubError,)
    assert all(cls.__bases__ == (dub_customers.APIError,) for cls in STATUS_CLASSES.values())
    assert dub_customers.NoResponseError.__bases__ == (dub_customers.DubError,)
    assert dub_customers.RequestTimeout.__bases__ == (dub_customers.NoResponseError, TimeoutError)
    assert dub_customers.ResponseValidationError.__bases__ == (dub_customers.DubError,)


def test_errors_can_be_built_by_hand():
    error = dub_customers.NotFound()
    assert (error.status_code, error.code, error.message, error.doc_url) == (0, None, "", None)
    assert (error.headers, error.body, str(error)) == ({}, b"", "0:")
    assert dub_customers.RateLimitExceeded("slow").retry_after is None
    assert dub_customers.ResponseValidationError("x").body == b""
    assert dub_customers.ResponseValidationError().args == ("",)


def test_str_of_an_api_error_is_one_short_line():
    error = dub_customers.APIError("two\nlines \x1b[31m" + "x" * 500, status_code=418, code="pot")
    assert str(error).startswith("418 pot: two lines [31mxxx")
    assert len(str(error)) == 300
    assert str(error).endswith("xxx...")
    assert len(str(dub_customers.APIError("y" * 295, status_code=418))) == 300
    assert str(dub_customers.APIError("y" * 295, status_code=418)).endswith("y")


def revived(thing):
    return [pickle.loads(pickle.dumps(thing)), copy.copy(thing), copy.deepcopy(thing)]


@pytest.mark.parametrize("status", [404, 429, 418])
def test_api_errors_survive_pickle_and_copy(client, httpserver, status):
    served(httpserver, error_body(), status, headers={"Retry-After": "900", "X-Y": "z"})
    with pytest.raises(dub_customers.APIError) as caught:
        client.customers.get("cus_1")
    for twin in revived(caught.value):
        assert type(twin) is type(caught.value)
        assert str(twin) == str(caught.value)
        assert {**vars(twin), "headers": 0} == {**vars(caught.value), "headers": 0}
        assert twin.headers["x-y"] == "z"
        assert getattr(twin, "retry_after", 900) == 900


@pytest.mark.parametrize("name", ["NoResponseError", "RequestTimeout", "ResponseValidationError"])
def test_other_errors_survive_pickle_and_copy(name):
    error = getattr(dub_customers, name)("what happened")
    if name == "ResponseValidationError":
        error.body = b"{}"
    for twin in revived(error):
        assert (type(twin), str(twin), vars(twin)) == (type(error), "what happened", vars(error))


# --- models ---------------------------------------------------------------------------------------


def test_mapping_expanded_customer_field_by_field():
    assert Customer.from_json(EXPANDED) == Customer(
        id="cus_1",
        external_id="user_42",
        created_at="2026-01-02T03:04:05.000Z",
        name="Ada Lovelace",
        email="ada@example.com",
        avatar="https://assets.example.com/ada.png",
        stripe_customer_id="cus_stripe",
        country="GB",
        sales=3,
        sale_amount=12900,
        first_sale_at="2026-02-01T00:00:00.000Z",
        subscription_canceled_at="2026-03-01T00:00:00.000Z",
        link=Link("link_1", "dub.sh", "try", "https://dub.sh/try", "https://dub.co", "prog_1"),
        program_id="prog_2",
        partner=Partner("pn_1", "Grace", "grace@example.com", "i.png"),
        discount=Discount("disc_1", 20, "percentage", 12, "d", "co_1", "ct_1", 4),
    )


def test_optional_fields_default_to_none():
    for model, required in (
        (Customer("a", "b", "c"), 3),
        (Link("a", "b", "c", "d", "e"), 5),
        (Partner("a", "b"), 2),
        (Discount("a", 1, "b"), 3),
    ):
        values = [getattr(model, each.name) for each in dataclasses.fields(model)]
        assert set(map(repr, values[required:])) <= {"None", "{}"}


def test_fields_stand_in_the_documented_order():
    def names(cls):
        return " ".join(each.name for each in dataclasses.fields(cls))

    assert names(Customer) == (
        "id external_id created_at name email avatar stripe_customer_id country sales sale_amount "
        "first_sale_at subscription_canceled_at link program_id partner discount raw"
    )
    assert names(Link) == "id domain key short_link url program_id"
    assert names(Partner) == "id name email image"
    assert names(Discount) == (
        "id amount type max_duration description coupon_id coupon_test_id partners_count"
    )


def without(data, *keys):
    return {key: value for key, value in data.items() if key not in keys}


OPTIONAL = {
    "customer": (
        "name email avatar stripeCustomerId country sales saleAmount firstSaleAt "
        "subscriptionCanceledAt link programId partner discount"
    ).split(),
    "customer.link": ["programId"],
    "customer.partner": ["email", "image"],
    "customer.discount": ("maxDuration description couponId couponTestId partnersCount".split()),
}
REQUIRED = {
    "customer": ["id", "externalId", "createdAt"],
    "customer.link": ["id", "domain", "key", "shortLink", "url"],
    "customer.partner": ["id", "name"],
    "customer.discount": ["id", "amount", "type"],
}
NUMBERS = {"sales", "saleAmount", "amount", "maxDuration", "partnersCount"}


def at(path, change):
    """The expanded customer with `change` made to the object at `path`."""
    data = copy.deepcopy(EXPANDED)
    change(data if path == "customer" else data[path.split(".")[1]])
    return data


def fields_of(table):
    return [pytest.param(path, key, id=f"{path}.{key}") for path in table for key in table[path]]


def snake(key):
    return re.sub("[A-Z]", lambda match: "_" + match.group().lower(), key)


@pytest.mark.parametrize(("path", "key"), fields_of(OPTIONAL))
def test_rule_13_null_and_absent_both_read_as_none(path, key):
    for data in (at(path, lambda it: it.update({key: None})), at(path, lambda it: it.pop(key))):
        read = Customer.from_json(data)
        owner = read if path == "customer" else getattr(read, path.split(".")[1])
        assert getattr(owner, snake(key)) is None


@pytest.mark.parametrize(("path", "key"), fields_of(REQUIRED))
def test_rule_13_required_fields_are_required(path, key):
    kind = "number" if key in NUMBERS else "string"
    null, absent = at(path, lambda it: it.update({key: None})), at(path, lambda it: it.pop(key))
    for data, got in ((null, "null"), (absent, "nothing")):
        with pytest.raises(dub_customers.ResponseValidationError) as caught:
            Customer.from_json(data)
        assert str(caught.value) == f"{path}.{key}: expected {kind}, got {got}"


@pytest.mark.parametrize(("path", "key"), fields_of(OPTIONAL) + fields_of(REQUIRED))
def test_rule_13_misfits_are_located(path, key):
    if key in NUMBERS:
        kind, wrong = "number", {"12": "string", True: "boolean", (): "tuple"}
    elif key in ("link", "partner", "discount"):
        kind, wrong = "object", {"x": "string", 1.5: "number"}
    else:
        kind, wrong = "string", {12: "number", False: "boolean"}
    for value, got in [
        *wrong.items(),
        ([], "array"),
        *([({}, "object")] if kind != "object" else []),
    ]:
        with pytest.raises(dub_customers.ResponseValidationError) as caught:
            Customer.from_json(at(path, lambda it, value=value: it.update({key: value})))
        assert str(caught.value) == f"{path}.{key}: expected {kind}, got {got}"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_rule_13_numbers_are_finite(number):
    with pytest.raises(
        dub_customers.ResponseValidationError, match=f"sales: expected number, got {number}$"
    ):
        Customer.from_json({**PLAIN, "sales": number})


@pytest.mark.parametrize("cls", [Customer, Link, Partner, Discount])
def test_from_json_takes_an_object(cls):
    name = cls.__name__.lower()
    with pytest.raises(dub_customers.ResponseValidationError) as caught:
        cls.from_json(["x"])
    assert str(caught.value) == f"{name}: expected object, got array"


@pytest.mark.parametrize("number", [2**53 + 1, 10**400, -7, 0.1, 3.0], ids=lambda n: str(n)[:17])
def test_rule_13_numbers_stay_what_they_were(number):
    sales = Customer.from_json({**PLAIN, "sales": number}).sales
    assert (sales, type(sales)) == (number, type(number))


def test_rule_13_words_the_server_may_add_stay_str():
    data = at("customer.discount", lambda it: it.update({"type": "barter"}))
    assert Customer.from_json(data).discount.type == "barter"


def test_customer_is_frozen_comparable_hashable_and_keeps_raw_apart():
    first, second = Customer.from_json(EXPANDED), Customer.from_json({**EXPANDED, "later": [1]})
    assert first == second
    assert hash(first) == hash(second)
    assert second.raw["later"] == [1]
    assert "later" not in repr(second)
    assert "raw" not in repr(second)
    assert Customer("cus_1", "u", "t").raw == {}
    for thing in (first, first.link, first.partner, first.discount):
        with pytest.raises(dataclasses.FrozenInstanceError):
            thing.id = "other"
        assert all(twin == thing for twin in revived(thing))


# --- Dub, Customers -------------------------------------------------------------------------------


def test_the_documented_example_works_word_for_word(httpserver, monkeypatch, capsys):
    monkeypatch.setitem(Dub.__init__.__kwdefaults__, "server_url", httpserver.url_for(""))
    httpserver.expect_request("/customers/<id>").respond_with_json(PLAIN)
    with Dub(token="DUB_API_KEY") as d_client:
        res = d_client.customers.get(request={"id": "<id>"})
        assert res is not None
        print(res)
    assert capsys.readouterr().out.startswith("Customer(id='cus_1', external_id='user_42'")


def test_signatures_are_as_designed():
    def described(function):
        return [
            (each.name, each.kind.name, each.default)
            for each in list(inspect.signature(function).parameters.values())[1:]
        ]

    keyword = "KEYWORD_ONLY"
    assert described(Dub.__init__) == [
        ("token", "POSITIONAL_OR_KEYWORD", None),
        ("server_url", keyword, "https://api.dub.co"),
        ("timeout_ms", keyword, 30_000),
        ("max_retries", keyword, 2),
        ("ssl_context", keyword, None),
    ]
    assert described(dub_customers.Customers.get) == [
        ("id", "POSITIONAL_OR_KEYWORD", None),
        *[
            (name, keyword, None)
            for name in (
                "include_expanded_fields request timeout_ms max_retries http_headers".split()
            )
        ],
    ]


def test_closed_client_refuses_and_closing_twice_is_harmless(httpserver):
    client = Dub(TOKEN, server_url=httpserver.url_for(""))
    with client as same:
        assert same is client
    client.close()
    with pytest.raises(RuntimeError, match="^the client is closed$"):
        client.customers.get("cus_1")
    assert httpserver.log == []


def test_repr_shows_options_without_the_token():
    client = Dub(TOKEN, server_url="https://example.com/api/", timeout_ms=5, max_retries=7)
    shown = "Dub(server_url='https://example.com/api', timeout_ms=5, max_retries=7)"
    assert (repr(client), str(client)) == (shown, shown)


def test_client_survives_pickle_and_copy(httpserver):
    served(httpserver)
    url = httpserver.url_for("")
    with Dub(TOKEN, server_url=url, timeout_ms=4321, max_retries=7) as client:
        client.customers.get("cus_1")
        for twin in [*revived(client), *revived(client.customers)]:
            customers = twin.customers if isinstance(twin, Dub) else twin
            assert customers.get("cus_1").id == "cus_1"
            assert (customers._session.timeout_ms, customers._session.max_retries) == (4321, 7)
        assert pickle.loads(pickle.dumps(client.customers.get))("cus_1").id == "cus_1"
    assert {request.headers["Authorization"] for request, _ in httpserver.log} == {
        f"Bearer {TOKEN}"
    }


def test_client_with_an_ssl_context_can_be_copied():
    context = ssl.create_default_context()
    client = Dub(TOKEN, ssl_context=context)
    assert copy.deepcopy(client)._session.ssl_context is context


@pytest.mark.parametrize("context", [object(), "tls", True], ids=repr)
def test_ssl_context_is_checked(context):
    kind = type(context).__name__
    with pytest.raises(TypeError, match=f"^ssl_context: expected SSLContext, got {kind}$"):
        Dub(TOKEN, ssl_context=context)


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError)]
    + [(2**31, ValueError), ("5", TypeError), (True, TypeError), ([], TypeError)],
    ids=repr,
)
def test_timeout_ms_is_checked_on_client_and_call(client, value, error):
    with pytest.raises(error, match="^timeout_ms: "):
        Dub(TOKEN, timeout_ms=value)
    with pytest.raises(error, match="^timeout_ms: "):
        client.customers.get("cus_1", timeout_ms=value)


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (float("nan"), TypeError), (1.0, TypeError), ("5", TypeError)]
    + [(True, TypeError), (False, TypeError)],
    ids=repr,
)
def test_max_retries_is_checked_on_client_and_call(client, value, error):
    with pytest.raises(error, match="^max_retries: "):
        Dub(TOKEN, max_retries=value)
    with pytest.raises(error, match="^max_retries: "):
        client.customers.get("cus_1", max_retries=value)


@pytest.mark.parametrize("timeout_ms", [0.5, 1, 2**31 - 1])
def test_timeout_ms_bounds_are_taken(timeout_ms):
    assert f"timeout_ms={timeout_ms}," in repr(Dub(TOKEN, timeout_ms=timeout_ms))


# --- the request ----------------------------------------------------------------------------------

IDS = {
    "dub id": "cus_1KAP4CDPBSVMMBMH9XX3YZZ0Z",
    "external id": "ext_123",
    "external id that begins with ext_": "ext_ext_5",
    "slash": "ext_user/42",
    "email": "ext_ada@example.com",
    "percent": "ext_50%",
    "already encoded": "ext_a%2Fb",
    "query and fragment": "ext_a?b=c#d",
    "dots": "ext_../../links",
    "path upwards": "../links",
    "three dots": "...",
    "encoded dots": "%2e%2e",
    "space": "ext_a b",
    "spaces only": " ",
    "plus": "ext_+1 555",
    "line breaks": "ext_a\r\nX-Injected: 1\n",
    "semicolon, colon, ampersand": "ext_a;b:c&d=e",
    "nul": "ext_\0",
    "umlaut": "ext_Jürgen",
    "chinese and emoji": "ext_客户🎉",
    "backslash": "ext_a\\b",
    "5,000 characters": "ext_" + "é/" * 2498,
}


@pytest.mark.parametrize("id", list(IDS.values()), ids=list(IDS))
def test_rule_01_id_arrives_as_one_segment_that_decodes_to_itself(id):
    with raw(Peer.answer_by_id) as (server, client):
        assert client.customers.get(id).id == id
        assert client.customers.get(request={"id": id}).id == id
    for head in server.requests:
        target = head.split(" ")[1]
        assert re.fullmatch(r"/customers/(?:[A-Za-z0-9._~-]|%[0-9A-F]{2})+", target)
        assert urllib.parse.unquote(target[len("/customers/") :]) == id
        assert "\r\nX-Injected" not in head


@pytest.mark.parametrize("id", ["", ".", "..", "ext_"], ids=repr)
def test_rule_01_ids_that_name_no_customer_are_refused(client, httpserver, id):
    with pytest.raises(ValueError, match="^id: .* is no customer's id$"):
        client.customers.get(id)
    assert httpserver.log == []


@pytest.mark.parametrize("id", ["ext_\ud800", "\udfff"], ids=ascii)
def test_rule_01_lone_surrogates_are_refused(client, httpserver, id):
    with pytest.raises(ValueError, match="^id: has a lone surrogate"):
        client.customers.get(id)
    assert httpserver.log == []


@pytest.mark.parametrize("id", [None, 5, b"cus_1", ["cus_1"], True], ids=repr)
def test_rule_01_an_id_is_a_str(client, httpserver, id):
    with pytest.raises(TypeError, match=f"^id: expected str, got {type(id).__name__}$"):
        client.customers.get(id)
    with pytest.raises(TypeError, match="^id: expected str, got "):
        client.customers.get(request={} if id is None else {"id": id})
    assert httpserver.log == []


EXPANSIONS = [(None, b""), (True, b"includeExpandedFields=true")]
EXPANSIONS += [(False, b"includeExpandedFields=false")]


@pytest.mark.parametrize(("expand", "query"), EXPANSIONS, ids=["absent", "true", "false"])
@pytest.mark.parametrize("how", ["keyword", "include_expanded_fields", "includeExpandedFields"])
def test_rule_02_expansion_is_said_in_lower_case_or_not_at_all(
    client, httpserver, expand, query, how
):
    httpserver.expect_request("/customers/cus_1", query_string=query).respond_with_json(EXPANDED)
    if how == "keyword":
        customer = client.customers.get("cus_1", include_expanded_fields=expand)
    else:
        customer = client.customers.get(request={"id": "cus_1", how: expand})
    assert customer.partner == Partner("pn_1", "Grace", "grace@example.com", "i.png")
    httpserver.check()
    assert [request.query_string for request, _ in httpserver.log] == [query]


@pytest.mark.parametrize("expand", [1, 0, "true", "", [], {}], ids=repr)
def test_rule_02_expansion_is_a_bool(client, httpserver, expand):
    message = f"^include_expanded_fields: expected bool or None, got {type(expand).__name__}$"
    with pytest.raises(TypeError, match=message):
        client.customers.get("cus_1", include_expanded_fields=expand)
    with pytest.raises(TypeError, match=message):
        client.customers.get(request={"id": "cus_1", "includeExpandedFields": expand})
    assert httpserver.log == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"request": {"ID": "cus_1"}}, "request: unknown 'ID'"),
        ({"request": {"id": "a", "z": 1, "b": 1, 3: 1}}, "request: unknown 'b', 'z', 3"),
        (
            {"request": {"id": "a", "include_expanded_fields": 1, "includeExpandedFields": 1}},
            "request: include_expanded_fields and includeExpandedFields are the same",
        ),
        (
            {"id": "a", "request": {"id": "a"}},
            "get() takes id and include_expanded_fields, or request, not both",
        ),
        (
            {"include_expanded_fields": False, "request": {"id": "a"}},
            "get() takes id and include_expanded_fields, or request, not both",
        ),
        ({"request": "cus_1"}, "request: expected a mapping, got str"),
        ({"request": []}, "request: expected a mapping, got list"),
    ],
)
def test_a_request_with_a_typo_is_refused(client, httpserver, kwargs, message):
    with pytest.raises(TypeError) as caught:
        client.customers.get(**kwargs)
    assert str(caught.value) == message
    assert httpserver.log == []


def test_request_may_be_any_mapping(client, httpserver):
    served(httpserver)
    assert client.customers.get(request=types.MappingProxyType({"id": "cus_1"})).id == "cus_1"
    request = dub_customers.GetCustomerRequest(id="cus_1")
    assert dub_customers.GetCustomerRequest.__total__ is False
    assert client.customers.get(request=request).id == "cus_1"


def test_rule_03_headers_sent():
    with raw(Peer.answer_by_id) as (server, client):
        client.customers.get("cus_1")
    lines = server.requests[0].split("\r\n")
    version = "{}.{}".format(*sys.version_info)
    assert lines[0] == "GET /customers/cus_1 HTTP/1.1"
    assert sorted(line.lower() for line in lines[1:-2]) == [
        "accept-encoding: identity",
        "accept: application/json",
        f"authorization: bearer {TOKEN.lower()}",
        f"host: 127.0.0.1:{server.port}",
        f"user-agent: dub_customers/{dub_customers.__version__} python/{version}",
    ]
    assert f"Bearer {TOKEN}" in server.requests[0]


def test_rule_03_headers_checked_are_the_headers_sent():
    headers = {"X": "checked"}

    def token():
        headers["X"] = "a\r\nY: injected"
        return TOKEN

    with raw_server(Peer.answer_by_id) as server:
        with Dub(token, server_url=server.url) as client:
            client.customers.get("cus_1", http_headers=headers)
    assert "X: checked\r\n" in server.requests[0]


@pytest.mark.parametrize("name", ["user-agent", "USER-AGENT", "accept", "authorization", "host"])
def test_rule_03_headers_given_replace_ours_whatever_their_case(name):
    with raw(Peer.answer_by_id) as (server, client):
        client.customers.get("cus_1", http_headers={name: "mine", "x-Trace": "ä\t1"})
        client.customers.get("cus_1")
    lines = [line.lower() for line in server.requests[0].split("\r\n")]
    assert [line for line in lines if line.startswith(f"{name.lower()}:")] == [
        f"{name.lower()}: mine"
    ]
    assert "x-trace: ä\t1" in lines
    assert "mine" not in server.requests[1]


HEADERS_REFUSED = {
    "line break in value": ({"X": "a\r\nY: b"}, ValueError, "value of X has a line break"),
    "nul in value": ({"X": "\0"}, ValueError, "value of X has"),
    "not Latin-1": ({"X": "客"}, ValueError, "not Latin-1"),
    "delete": ({"X": "\x7f"}, ValueError, "value of X has"),
    "empty name": ({"": "a"}, ValueError, "one of the names is no name of a header"),
    "space in name": ({"X Y": "a"}, ValueError, "is no name of a header"),
    "colon in name": ({"X:": "a"}, ValueError, "is no name of a header"),
    "line break in name": ({"X\n": "a"}, ValueError, "is no name of a header"),
    "name no str": ({1: "a"}, TypeError, "expected str, got int"),
    "value no str": ({"X": 1}, TypeError, "expected str, got int"),
    "value bytes": ({"X": b"a"}, TypeError, "expected str, got bytes"),
    "no mapping": ([("X", "a")], TypeError, "expected a mapping, got list"),
    "body length": ({"content-Length": "5"}, ValueError, "announces a body"),
    "body chunks": ({"Transfer-Encoding": "chunked"}, ValueError, "announces a body"),
}


@pytest.mark.parametrize(
    ("headers", "error", "message"), list(HEADERS_REFUSED.values()), ids=list(HEADERS_REFUSED)
)
def test_rule_03_headers_given_are_checked(client, httpserver, headers, error, message):
    with pytest.raises(error, match=f"^http_headers: .*{message}"):
        client.customers.get("cus_1", http_headers=headers)
    assert httpserver.log == []


TOKENS_REFUSED = {
    "line feed at the end": (TOKEN + "\n", "line break"),
    "carriage return": ("dub_\r", "line break"),
    "space": ("dub_ s3cr3t", "space"),
    "tab": ("\tdub_s3cr3t", "tab"),
    "control character": ("dub_\x1bs3cr3t", "control character"),
    "delete": ("dub_\x7fs3cr3t", "control character"),
    "byte order mark": ("\ufeffdub_s3cr3t", "BOM"),
    "letter": ("dub_s3cr3té", "non-ASCII character"),
    "first beyond ASCII": ("dub_s3cr3t\x80", "non-ASCII character"),
}


@pytest.mark.parametrize("source", ["token", "token()", "DUB_API_KEY"])
@pytest.mark.parametrize(("token", "what"), list(TOKENS_REFUSED.values()), ids=list(TOKENS_REFUSED))
def test_rule_04_tokens_that_no_header_can_carry(httpserver, monkeypatch, source, token, what):
    url = httpserver.url_for("")
    with pytest.raises(ValueError, match="a token is printable ASCII without spaces$") as caught:
        if source == "token":
            Dub(token, server_url=url)
        elif source == "token()":
            Dub(lambda: token, server_url=url).customers.get("cus_1")
        else:
            monkeypatch.setenv("DUB_API_KEY", token)
            Dub(server_url=url)
    position = re.search(r"[^!-~]", token).start()
    assert str(caught.value).startswith(
        f"{source} has a {what} at position {position} of {len(token)}: "
    )
    assert all(
        "dub_" not in repr(error) and "s3cr3t" not in repr(error) for error in chain(caught.value)
    )
    assert httpserver.log == []


def test_rule_04_token_is_a_str_and_not_empty(httpserver, monkeypatch):
    with pytest.raises(ValueError, match="^token is empty$"):
        Dub("")
    with pytest.raises(TypeError, match="^token: expected str, got bytes$"):
        Dub(b"dub_1")
    with pytest.raises(TypeError, match=r"^token\(\): expected str, got NoneType$"):
        Dub(lambda: None, server_url=httpserver.url_for("")).customers.get("cus_1")
    with pytest.raises(ValueError, match="^no token: give token=... or set DUB_API_KEY$"):
        Dub()
    monkeypatch.setenv("DUB_API_KEY", "")
    with pytest.raises(ValueError, match="^DUB_API_KEY is empty$"):
        Dub()


def test_token_from_the_environment_and_from_a_callable(httpserver, monkeypatch):
    served(httpserver)
    monkeypatch.setenv("DUB_API_KEY", "dub_from!env~")
    with Dub(server_url=httpserver.url_for("")) as client:
        client.customers.get("cus_1")
    tokens = iter(["dub_1", "dub_2", "dub_3"])
    httpserver.clear_all_handlers()
    served(httpserver, error_body(), 503)
    with Dub(lambda: next(tokens), server_url=httpserver.url_for("")) as client:
        with pytest.raises(dub_customers.APIError):
            client.customers.get("cus_1")
    assert [request.headers["Authorization"] for request, _ in httpserver.log] == [
        f"Bearer {token}" for token in ("dub_from!env~", "dub_1", "dub_2", "dub_3")
    ]


URLS_TAKEN = ["https://api.dub.co", "HTTPS://API.Dub.co", "https://x.example./v1", "https://a_b"]
URLS_TAKEN += ["https://[2001:db8::1]:8443/", "https://10.0.0.1:1", "https://h:65535/a%20b/c"]
URLS_TAKEN += ["https://" + "a" * 63 + ".example"]


@pytest.mark.parametrize("url", URLS_TAKEN)
def test_rule_05_server_urls_taken(url):
    assert Dub(TOKEN, server_url=url)._session.server_url == url.rstrip("/")


URLS_REFUSED = ["", "api.dub.co", "ftp://h", "file:///etc/passwd", "https://", "https:///p"]
URLS_REFUSED += ["https://h/?q", "https://h?", "https://h/#f", "https://h#", "https://h/a b"]
URLS_REFUSED += ["https://h/\n", "https://h\n", " https://h", "https://h/\x00", "https://h\\x"]
URLS_REFUSED += ["https://h:", "https://h:x", "https://h:0", "https://h:65536", "https://h:-1"]
URLS_REFUSED += [
    "https://a..b",
    "https://.a",
    "https://" + "a" * 64,
    "https://dübb.co",
    "https://[::1",
]
URLS_REFUSED += [
    "https://h:99999999",
    "https://[:::]",
    "https://[1]",
    "https://u:pa55word@h",
    "https://h/\\",
    "https://ſ",
]


@pytest.mark.parametrize("url", URLS_REFUSED, ids=ascii)
def test_rule_05_server_urls_refused(url):
    with pytest.raises(ValueError, match="^server_url: ") as caught:
        Dub(TOKEN, server_url=url)
    assert "pa55word" not in repr(list(chain(caught.value)))


@pytest.mark.parametrize("url", [None, b"https://h", 5], ids=repr)
def test_rule_05_server_url_is_a_str(url):
    with pytest.raises(TypeError, match="^server_url: expected str, got "):
        Dub(TOKEN, server_url=url)


@pytest.mark.parametrize("path", ["", "/", "/api", "/api/", "/api/v1//"])
def test_rule_05_server_url_may_have_a_path(httpserver, path):
    httpserver.expect_request(path.rstrip("/") + "/customers/cus_1").respond_with_json(PLAIN)
    with Dub(TOKEN, server_url=httpserver.url_for("").rstrip("/") + path) as client:
        assert client.customers.get("cus_1").id == "cus_1"


@pytest.mark.parametrize(
    "host", ["example.com", "127.0.0.1.example.com", "10.0.0.1", "[::2]", "128.0.0.1"]
)
def test_rule_05_plain_http_beyond_loopback_warns_at_the_callers_line(host):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1
        Dub(TOKEN, server_url=f"http://{host}")
    assert [(each.filename, each.lineno) for each in caught] == [(__file__, line)]
    assert str(caught[0].message) == f"the token goes to {host} in clear: use https"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.9.8.7", "[::1]:8"])
def test_rule_05_plain_http_to_loopback_does_not_warn(host):
    Dub(TOKEN, server_url=f"http://{host}")
    Dub(TOKEN, server_url="https://example.com")


# --- the exchange ---------------------------------------------------------------------------------


def test_rule_06_the_opener_holds_two_handlers(client):
    kinds = [type(handler).__name__ for handler in client._session.opener.handlers]
    assert sorted(kinds) in (["_KeepAliveHandler"], ["ProxyHandler", "_KeepAliveHandler"])


REDIRECTS = {
    "absolute": "http://127.0.0.1:1/elsewhere",
    "relative": "/customers/other",
    "protocol-relative": "//127.0.0.1:1/x",
    "file": "file:///etc/passwd",
}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", list(REDIRECTS.values()), ids=list(REDIRECTS))
def test_rule_06_redirects_are_not_followed(client, httpserver, status, target):
    answer = Response("", status, {"Location": target})
    answer.autocorrect_location_header = False
    httpserver.expect_request(re.compile(".*")).respond_with_response(answer)
    with pytest.raises(dub_customers.APIError) as caught:
        client.customers.get("cus_1")
    assert type(caught.value) is dub_customers.APIError
    assert str(caught.value) == f"{status}: redirect to {target} not followed"
    assert caught.value.headers["location"] == target
    assert len(httpserver.log) == 1


@pytest.mark.parametrize("status", [300, 305, 399])
def test_rule_06_any_3xx_names_its_target(status):
    answer = http(b"{}", f"{status} X", ["Location: /elsewhere"])
    with raw(each_connection(answer)) as (server, client):
        with pytest.raises(dub_customers.APIError, match=f"^{status}: redirect to /elsewhere not"):
            client.customers.get("cus_1")


@pytest.mark.parametrize("status", [300, 302, 304, 399])
def test_rule_06_a_redirect_may_lack_its_target(status):
    with raw(each_connection(http(b"", f"{status} X"))) as (server, client):
        with pytest.raises(dub_customers.APIError, match=f"^{status}: X$"):
            client.customers.get("cus_1")
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [299, 400])
def test_rule_06_only_a_3xx_is_a_redirect(status):
    answer = http(b"", f"{status} X", ["Location: /elsewhere"])
    with raw(each_connection(answer)) as (server, client):
        with pytest.raises(dub_customers.DubError) as caught:
            client.customers.get("cus_1")
    assert "redirect" not in str(caught.value)


def test_rule_07_100_calls_use_one_connection():
    with raw(Peer.answer_by_id) as (server, client):
        for number in range(100):
            assert client.customers.get(f"cus_{number}").id == f"cus_{number}"
        assert server.connections == 1


def test_rule_07_errors_keep_the_connection():
    def script(peer):
        while peer.request():
            peer.send(http(b"{}", "404 Not Found"))

    with raw(script) as (server, client):
        for _ in range(5):
            with pytest.raises(dub_customers.NotFound):
                client.customers.get("cus_1")
        assert server.connections == 1


@pytest.mark.parametrize("ended", ["with", "close", "neither"])
def test_rule_07_no_connection_is_left_behind(ended):
    gone = []

    def script(peer):
        peer.answer_by_id()
        gone.append(peer.number)

    with raw_server(script) as server:
        client = Dub(TOKEN, server_url=server.url)
        if ended == "with":
            with client:
                client.customers.get("cus_1")
        else:
            client.customers.get("cus_1")
        if ended == "close":
            client.close()
        del client
        deadline = time.monotonic() + 5
        while not gone and time.monotonic() < deadline:
            time.sleep(0.001)
        assert gone == [1]


def test_rule_07_a_call_that_ends_after_close_leaves_no_connection():
    answer, asked = threading.Event(), threading.Event()
    gone = []

    def script(peer):
        peer.request()
        asked.set()
        answer.wait(5)
        peer.send(http())
        peer.wait_for_end()
        gone.append(1)

    with raw_server(script) as server:
        client = Dub(TOKEN, server_url=server.url)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.customers.get, "cus_1")
            assert asked.wait(5)
            client.close()
            answer.set()
            assert call.result(5).id == "cus_1"
        deadline = time.monotonic() + 5
        while not gone and time.monotonic() < deadline:
            time.sleep(0.001)
        assert gone == [1]


def test_rule_07_idle_connections_are_bounded_and_the_oldest_go():
    start = threading.Barrier(40)

    def script(peer):
        peer.request()
        start.wait(5)
        peer.send(http())
        peer.answer_by_id()

    with raw(script) as (server, client), ThreadPoolExecutor(40) as pool:
        for customer in pool.map(lambda _: client.customers.get("cus_1"), range(40)):
            assert customer.id == "cus_1"
        idle = handler_of(client).idle
        assert len(idle) == 32
        assert not any(each.wire.closed for each in idle)
        oldest, newest = idle[0], idle[-1]
        handler_of(client).keep(dub_customers._Connection(socket.socket(), ()))
        assert oldest.wire.closed
        assert not newest.wire.closed


def test_rule_07_a_burst_beyond_the_bound_harms_no_later_call():
    with raw(Peer.answer_by_id) as (server, client), ThreadPoolExecutor(48) as pool:
        start = threading.Barrier(48)

        def get(number):
            start.wait(5)
            return client.customers.get(f"cus_{number}", max_retries=0).id

        for _ in range(3):
            assert list(pool.map(get, range(48))) == [f"cus_{number}" for number in range(48)]


def handler_of(client):
    return client._session.opener.handlers[-1]


def test_rule_07_threads_get_their_own_customers_over_as_many_connections():
    with raw(Peer.answer_by_id) as (server, client), ThreadPoolExecutor(16) as pool:
        ids = [f"cus_{number}" for number in range(320)]
        assert [customer.id for customer in pool.map(client.customers.get, ids)] == ids
        assert server.connections <= 16


def test_rule_08_a_connection_is_not_shared_across_fork():
    with raw(Peer.answer_by_id) as (server, client):
        client.customers.get("cus_1")
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of any fork with threads
            child = os.fork()
        if not child:
            os.write(writer, client.customers.get("cus_of_child").id.encode())
            os._exit(0)
        assert os.read(reader, 100) == b"cus_of_child"
        os.waitpid(child, 0)
        assert client.customers.get("cus_2").id == "cus_2"
        assert server.connections == 2
        os.close(reader)
        os.close(writer)


def test_rule_07_the_bound_holds_when_other_threads_empty_the_stack(client):
    class Racy(list):
        def __len__(self):
            return 99

    handler_of(client).idle = Racy()
    handler_of(client).close()


def test_rule_08_an_old_connection_is_not_used_again(monkeypatch):
    now = time.monotonic()
    offset = [0]
    with raw(Peer.answer_by_id) as (server, client):
        monkeypatch.setattr("time.monotonic", lambda: now + offset[0])
        for offset[0], connections in ((0, 1), (59, 1), (118.5, 1), (178.5, 2)):
            client.customers.get("cus_1")
            assert server.connections == connections
        monkeypatch.undo()


def closing_after_answer(peer):
    peer.request()
    peer.send(http(body_of(f"cus_{peer.number}")))


def resetting_after_answer(peer):
    closing_after_answer(peer)
    peer.reset()


def closing_on_second_request(peer):
    closing_after_answer(peer)
    peer.request()


def resetting_on_second_request(peer):
    closing_on_second_request(peer)
    peer.reset()


def timing_out_when_idle(peer):
    closing_after_answer(peer)
    peer.send(http(b"", "408 Request Timeout", ["Connection: close"]))


def timing_out_on_second_request(peer):
    closing_on_second_request(peer)
    peer.send(http(b"", "408 Request Timeout", ["Connection: close"]))


def answering_twice(peer):
    peer.request()
    peer.send(http(body_of(f"cus_{peer.number}")) + http(body_of("cus_wrong")))
    peer.request()


def answering_into_the_idle(peer):
    closing_after_answer(peer)
    peer.send(http(body_of("cus_wrong")))
    peer.request()


def early_hints_after_answer(peer):
    closing_after_answer(peer)
    peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    peer.request()


@pytest.mark.parametrize(
    "script",
    [
        closing_after_answer,
        resetting_after_answer,
        closing_on_second_request,
        resetting_on_second_request,
        timing_out_when_idle,
        timing_out_on_second_request,
        answering_twice,
        answering_into_the_idle,
        early_hints_after_answer,
    ],
)
def test_rule_08_a_kept_connection_that_fails_costs_nothing(script):
    with raw(script, max_retries=0) as (server, client):
        for number in range(1, 5):
            assert client.customers.get("cus_x").id == f"cus_{number}"
            time.sleep(0.01)
        assert server.connections == 4


def test_rule_08_an_answer_cut_short_on_a_kept_connection_is_a_failure():
    def script(peer):
        peer.request()
        peer.send(http())
        peer.request()
        peer.send(http()[:-5])

    with raw(script, max_retries=0) as (server, client):
        client.customers.get("cus_1")
        with pytest.raises(dub_customers.NoResponseError):
            client.customers.get("cus_1")
        assert server.connections == 1


def test_rule_08_a_408_on_a_new_connection_is_an_answer():
    with raw(each_connection(http(b"", "408 Request Timeout"))) as (server, client):
        with pytest.raises(dub_customers.APIError, match="^408: Request Timeout$"):
            client.customers.get("cus_1")
    assert len(server.requests) == 1


def test_rule_08_works_with_more_than_1024_files_open():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1700 if hard == resource.RLIM_INFINITY else min(1700, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    files = []
    try:
        with raw(Peer.answer_by_id) as (server, client):
            files += [open(os.devnull) for _ in range(1500)]
            for _ in range(3):
                assert client.customers.get("cus_1").id == "cus_1"
            assert server.connections == 1
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


NOT_KEPT = {
    "Connection: close": http(headers=["Connection: close"]),
    "HTTP/1.0": http().replace(b"HTTP/1.1", b"HTTP/1.0"),
    "no length": b"HTTP/1.1 200 OK\r\n\r\n" + body_of("cus_1"),
}


@pytest.mark.parametrize("answer", list(NOT_KEPT.values()), ids=list(NOT_KEPT))
def test_rule_09_connections_that_end_are_not_kept(answer):
    with raw(each_connection(answer)) as (server, client):
        for number in range(1, 4):
            assert client.customers.get("cus_1").id == "cus_1"
            assert handler_of(client).idle == []
            assert server.connections == number


def test_rule_09_switching_protocols_is_final_and_not_kept():
    with raw(each_connection(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")) as (server, client):
        with pytest.raises(dub_customers.APIError, match="^101: Switching Protocols$"):
            client.customers.get("cus_1")
        assert handler_of(client).idle == []


@pytest.mark.parametrize("status", ["100 Continue", "102 Processing", "103 Early Hints", "199 X"])
def test_rule_09_interim_answers_are_passed_over(status):
    def script(peer):
        while True:
            head = peer.request()
            if not head:
                return
            peer.send(
                f"HTTP/1.1 {status}\r\nLink: <x>\r\n\r\n".encode(), http(body_of(asked_id(head)))
            )

    with raw(script) as (server, client):
        assert client.customers.get("cus_1").id == "cus_1"
        assert client.customers.get("cus_2").id == "cus_2"
        assert server.connections == 1


def test_rule_09_a_call_interrupted_by_a_signal_poisons_nothing():
    class Interrupt(BaseException):
        pass

    def interrupt(*_):
        raise Interrupt

    def script(peer):
        head = peer.request()
        if peer.number == 1:
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(0.05)
        peer.send(http(body_of(asked_id(head))))
        peer.answer_by_id()

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with raw(script) as (server, client):
            with pytest.raises(Interrupt):
                client.customers.get("cus_1")
            assert client.customers.get("cus_2").id == "cus_2"
            assert server.connections == 2
    finally:
        signal.signal(signal.SIGALRM, before)


def drip(*parts):
    """A script that sends the first part at once, and the others byte by byte, then for ever."""

    def script(peer):
        peer.request()
        peer.send(parts[0])
        for part in parts[1:]:
            while True:
                for byte in part:
                    time.sleep(0.02)
                    peer.send(bytes([byte]))

    return script


HEAD = b"HTTP/1.1 200 OK\r\n"
NEVER = {
    "says nothing": lambda peer: peer.wait_for_end(),
    "stops mid-header": lambda peer: (peer.send(HEAD + b"X-Y"), peer.wait_for_end()),
    "stops mid-body": lambda peer: (peer.send(http()[:-9]), peer.wait_for_end()),
    "drips the status line": drip(b"", b"HTTP/1.1 200 OKOKOKOKOK" * 9),
    "drips headers": drip(HEAD, b"X-Y: zzzzzzz\r\n"),
    "drips the body": drip(HEAD + b"Content-Length: 9999\r\n\r\n", b" "),
    "drips a body without length": drip(HEAD + b"\r\n", b" "),
    "drips chunks": drip(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "continues for ever": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "hints for ever": drip(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
}


def assert_times_out(client, timeout_ms=150, **kwargs):
    started = time.monotonic()
    with pytest.raises(dub_customers.RequestTimeout) as caught:
        client.customers.get("cus_1", timeout_ms=timeout_ms, **kwargs)
    assert timeout_ms / 1000 <= time.monotonic() - started < timeout_ms / 1000 + 0.45
    url = client._session.server_url
    assert str(caught.value) == f"no answer from {url} within {timeout_ms} ms"
    assert caught.value.__cause__ is not None
    return caught.value


@pytest.mark.parametrize("script", list(NEVER.values()), ids=list(NEVER))
def test_rule_10_deadline_bounds_an_answer_that_never_ends(script):
    with raw(script) as (server, client):
        assert_times_out(client)
        assert server.connections == 1


def test_rule_10_deadline_of_the_client_and_of_the_call():
    with raw(lambda peer: peer.wait_for_end(), timeout_ms=100) as (server, client):
        started = time.monotonic()
        with pytest.raises(dub_customers.RequestTimeout, match="within 100 ms"):
            client.customers.get("cus_1")
        assert 0.1 <= time.monotonic() - started < 0.5
        assert_times_out(client, timeout_ms=200)


def test_rule_10_deadline_bounds_sending():
    with raw(lambda peer: time.sleep(0.5)) as (server, client):
        assert_times_out(client, http_headers={f"X-{n}": "x" * 60_000 for n in range(300)})


def test_rule_10_deadline_bounds_the_tls_handshake(tls):
    with raw_server(lambda peer: peer.wait_for_end()) as server:
        url = server.url.replace("http", "https")
        with Dub(TOKEN, server_url=url, ssl_context=tls.trusting) as client:
            assert_times_out(client)


def test_rule_10_each_try_gets_what_is_left(client, monkeypatch, waits, caplog):
    caplog.set_level(logging.DEBUG, "dub_customers")
    now, given = 1000.0, []
    monkeypatch.setattr("time.monotonic", lambda: now + sum(waits))
    monkeypatch.setattr("random.uniform", lambda low, high: high)

    def lose(request, timeout):
        given.append(timeout)
        waits.append(0.25)  # so long it takes
        raise ConnectionError("lost")

    monkeypatch.setattr(client._session.opener, "open", lose)
    with pytest.raises(dub_customers.NoResponseError, match="ConnectionError: lost$"):
        client.customers.get("cus_1", timeout_ms=2000)
    assert given == pytest.approx([2.0, 1.25], rel=1e-5)
    with pytest.raises(dub_customers.NoResponseError):
        client.customers.get("cus_1")
    assert given[2:] == pytest.approx([30.0, 29.25, 28.0], rel=1e-5)
    assert {record.getMessage().split(" ", 3)[3] for record in caplog.records} == {"250.0 ms"}


@contextmanager
def dead_addresses(monkeypatch, count, *alive):
    """The name `dub.test` has this many addresses that never answer, then those alive."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = []
        for _ in range(4):  # a full backlog: further connections are left unanswered
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            fillers.append(filler)
        dead = (socket.AF_INET, socket.SOCK_STREAM, 6, "", full.getsockname())
        addresses = [dead] * count
        addresses += [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each) for each in alive]
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: addresses)
        yield
        for filler in fillers:
            filler.close()


@pytest.mark.filterwarnings("ignore:the token goes to")
def test_rule_10_deadline_bounds_all_addresses_of_a_name(monkeypatch):
    with dead_addresses(monkeypatch, 4):
        assert_times_out(Dub(TOKEN, server_url="http://dub.test"))


def test_rule_10_no_name_is_asked_for_past_the_deadline(monkeypatch):
    def script(peer):
        peer.request()
        peer.send(http())
        peer.wait_for_end()

    with raw(script) as (server, client):
        client.customers.get("cus_1")
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asked"))
        assert str(assert_times_out(client).__cause__.__cause__) == "timed out"


@pytest.mark.filterwarnings("ignore:the token goes to")
def test_rule_10_dead_addresses_leave_a_live_one_its_turn(monkeypatch):
    with raw_server(Peer.answer_by_id) as server:
        with dead_addresses(monkeypatch, 3, ("127.0.0.1", server.port)):
            with Dub(TOKEN, server_url="http://dub.test", max_retries=0) as client:
                started = time.monotonic()
                assert client.customers.get("cus_1", timeout_ms=400).id == "cus_1"
                assert 0.25 < time.monotonic() - started < 0.4


@pytest.mark.filterwarnings("ignore:the token goes to")
def test_connection_failures_name_host_and_reason(monkeypatch, waits):
    def refuse(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    client = Dub(TOKEN, server_url="http://dub.test:81/api")
    with pytest.raises(dub_customers.NoResponseError) as caught:
        client.customers.get("cus_1")
    assert str(caught.value) == (
        "no answer from http://dub.test:81/api: ConnectionError: cannot connect to dub.test:81: "
        f"[Errno {socket.EAI_NONAME}] Name or service not known"
    )
    assert len(waits) == 2
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [])
    with pytest.raises(dub_customers.NoResponseError, match="the name has no address$"):
        client.customers.get("cus_1")


@pytest.mark.filterwarnings("ignore:the token goes to")
@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_default_ports(monkeypatch, scheme, port):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: asked.append((args, kwargs)))
    with pytest.raises(TypeError):
        Dub(TOKEN, server_url=f"{scheme}://dub.test").customers.get("cus_1")
    assert asked == [(("dub.test", port), {"type": socket.SOCK_STREAM})]


def test_an_address_family_this_machine_lacks_is_passed_over(monkeypatch):
    with raw(Peer.answer_by_id) as (server, client):
        here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))
        other = (9999, socket.SOCK_STREAM, 6, "", ("::1", server.port))
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [other, here])
        assert client.customers.get("cus_1").id == "cus_1"


def test_nothing_waits_for_acknowledgements():
    with raw(Peer.answer_by_id) as (server, client):
        client.customers.get("cus_1")
        sock = handler_of(client).idle[0].wire.sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


MIB = 1024 * 1024


def padded(size):
    return json.dumps({**PLAIN, "pad": "x" * size}).encode()


def of_size(size):
    return padded(size - len(padded(0)))


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_rule_11_a_body_of_1_mib_is_read_and_no_more(framing):
    frame = http if framing == "length" else (lambda body: chunked(body[:9], body[9:]))
    with raw(each_connection(frame(of_size(MIB)), frame(of_size(MIB + 1)))) as (server, client):
        assert len(client.customers.get("cus_1").raw["pad"]) == MIB - len(padded(0))
        with pytest.raises(
            dub_customers.ResponseValidationError, match="more than 1 MiB"
        ) as caught:
            client.customers.get("cus_1")
        assert len(caught.value.body) == MIB
    assert len(server.requests) == 2


def test_rule_11_a_body_cut_at_1_mib_is_cut():
    answer = http(of_size(MIB * 2))
    with raw(each_connection(answer[: answer.index(b"{") + MIB])) as (server, client):
        with pytest.raises(dub_customers.NoResponseError, match="IncompleteRead"):
            client.customers.get("cus_1")


def endless(status, framing):
    def script(peer):
        peer.request()
        peer.send(f"HTTP/1.1 {status}\r\n{framing}\r\n\r\n".encode())
        while True:
            peer.send(
                b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n" if "chunked" in framing else b"x" * 65536
            )

    return script


@pytest.mark.parametrize(
    "framing", ["Transfer-Encoding: chunked", "Content-Length: 31457280", "X: y"]
)
def test_rule_11_endless_bodies_are_refused(framing):
    with raw(endless("200 OK", framing)) as (server, client):
        with pytest.raises(dub_customers.ResponseValidationError, match="more than 1 MiB"):
            client.customers.get("cus_1")
        assert handler_of(client).idle == []
    assert len(server.requests) == 1
    with raw(endless("404 Not Found", framing)) as (server, client):
        with pytest.raises(dub_customers.NotFound, match="^404: Not Found$") as caught:
            client.customers.get("cus_1")
    assert len(caught.value.body) == MIB


# --- TLS and proxies ------------------------------------------------------------------------------


def openssl(folder, *args):
    done = subprocess.run(
        ["openssl", *args], cwd=str(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="session")
def tls(tmp_path_factory):
    """A new authority, server contexts with certificates of it, a client context that trusts it."""
    folder = tmp_path_factory.mktemp("tls")
    request = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl(
        folder, *request, "-x509", "-subj", "/CN=Test CA", "-keyout", "ca.key", "-out", "ca.pem",
        "-addext", "keyUsage=critical,keyCertSign", "-days", "2",
    )  # fmt: skip
    (folder / "index.txt").touch()
    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca=it\n[it]\ndatabase=index.txt\nrand_serial=yes\nnew_certs_dir=.\n"
        "default_md=sha256\npolicy=any\nunique_subject=no\ncopy_extensions=copy\n[any]\ncommonName=supplied\n"
    )

    def server(name, names, start, end):
        openssl(
            folder, *request, "-subj", f"/CN={name}", "-keyout", f"{name}.key",
            "-out", f"{name}.csr", "-addext", f"subjectAltName={names}",
        )  # fmt: skip
        openssl(
            folder, "ca", "-batch", "-config", "ca.cnf", "-cert", "ca.pem", "-keyfile", "ca.key",
            "-in", f"{name}.csr", "-out", f"{name}.pem", "-startdate", start, "-enddate", end,
        )  # fmt: skip
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(folder / f"{name}.pem"), str(folder / f"{name}.key"))
        return context

    here = "DNS:localhost,IP:127.0.0.1,IP:::1"
    return types.SimpleNamespace(
        authority=str(folder / "ca.pem"),
        trusting=ssl.create_default_context(cafile=str(folder / "ca.pem")),
        good=server("good", here, "20200101000000Z", "20450101000000Z"),
        named=server("named", "DNS:localhost", "20200101000000Z", "20450101000000Z"),
        other=server("other", "DNS:example.com", "20200101000000Z", "20450101000000Z"),
        expired=server("expired", here, "20200101000000Z", "20210101000000Z"),
    )


def test_tls_keeps_its_connection_and_its_context(tls, monkeypatch):
    made = []
    create = ssl.create_default_context
    monkeypatch.setenv("SSL_CERT_FILE", tls.authority)
    monkeypatch.setattr("ssl.create_default_context", lambda: made.append(1) or create())

    def script(peer):
        for _ in range(3):
            head = peer.request()
            if head:
                peer.send(http(body_of(asked_id(head))))

    with raw(script, tls.good) as (server, client):
        assert made == []
        for number in range(6):
            assert client.customers.get(f"cus_{number}").id == f"cus_{number}"
        assert server.connections == 2
        assert made == [1]


def test_tls_bytes_nobody_asked_for_are_found(tls):
    with raw(answering_twice, tls.good, ssl_context=tls.trusting, max_retries=0) as (
        server,
        client,
    ):
        for number in range(1, 4):
            assert client.customers.get("cus_x").id == f"cus_{number}"


def test_tls_by_name_and_by_fork(tls):
    with raw(Peer.answer_by_id, tls.good) as (server, _):
        url = f"https://localhost:{server.port}"
        with Dub(TOKEN, server_url=url, ssl_context=tls.trusting) as client:
            client.customers.get("cus_1")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                child = os.fork()
            if not child:
                os._exit(0 if client.customers.get("cus_2").id == "cus_2" else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert client.customers.get("cus_3").id == "cus_3"
        assert server.connections == 2


@pytest.mark.parametrize(
    ("certificate", "trusted", "reason"),
    [
        ("good", False, "self.signed certificate in certificate chain|unable to get local issuer"),
        ("other", True, "IP address mismatch, certificate is not valid for '127.0.0.1'."),
        ("expired", True, "certificate has expired"),
    ],
    ids=["unknown issuer", "wrong host name", "expired"],
)
def test_tls_certificates_are_verified(tls, certificate, trusted, reason):
    context = tls.trusting if trusted else None
    with raw(Peer.answer_by_id, getattr(tls, certificate), ssl_context=context) as (server, client):
        with pytest.raises(dub_customers.NoResponseError) as caught:
            client.customers.get("cus_1")
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        assert re.fullmatch(
            f"the certificate of 127.0.0.1 is not accepted: ({reason}).*", str(caught.value)
        )
        assert server.connections == 1
        assert server.requests == []


def test_tls_to_a_server_that_speaks_plain_http_is_no_answer(waits):
    with raw_server(lambda peer: peer.send(http())) as server:
        with Dub(TOKEN, server_url=server.url.replace("http", "https")) as client:
            with pytest.raises(dub_customers.NoResponseError, match="SSLError"):
                client.customers.get("cus_1")
    assert len(waits) == 2


def test_rule_07_without_ssl_http_works_and_https_is_refused_by_name(httpserver, monkeypatch):
    served(httpserver)
    monkeypatch.setitem(sys.modules, "ssl", None)
    module = loaded_as("dub_without_ssl")
    try:
        with module.Dub(TOKEN, server_url=httpserver.url_for("")) as client:
            for _ in range(3):
                assert client.customers.get("cus_1").id == "cus_1"
        with pytest.raises(module.NoResponseError) as caught:
            module.Dub(TOKEN, server_url="https://127.0.0.1:1").customers.get("cus_1")
        assert str(caught.value) == "https needs the module ssl, which this Python does not have"
    finally:
        del sys.modules["dub_without_ssl"]


def proxy(peer):
    """A proxy for http that answers itself, and for https a tunnel to the port that was asked."""
    while True:
        head = peer.request()
        if not head:
            return
        if not head.startswith("CONNECT"):
            peer.send(http(body_of(asked_id(head))))
            continue
        host, port = head.split(" ")[1].rsplit(":", 1)
        with socket.create_connection((host.strip("[]"), int(port))) as onward:
            peer.send(b"HTTP/1.1 200 Connection established\r\nX-Proxy: 1\r\n\r\n")
            back = threading.Thread(target=pump, args=(onward, peer.sock))
            back.start()
            pump(peer.sock, onward)
            back.join()
        return


def pump(source, target):
    while True:
        try:
            data = source.recv(65536)
            target.sendall(data) if data else target.shutdown(socket.SHUT_WR)
        except OSError:
            return
        if not data:
            return


CREDENTIALS = "Basic " + base64.b64encode(b"us@er:pa:55word").decode()


def headers_of(head):
    return {line.split(":")[0].lower(): line.split(": ")[1] for line in head.split("\r\n")[1:-2]}


def test_rule_12_http_through_a_proxy(monkeypatch):
    with raw_server(proxy) as server:
        monkeypatch.setenv("http_proxy", f"http://us%40er:pa%3A55word@127.0.0.1:{server.port}")
        with Dub(TOKEN, server_url="http://localhost:1/v1") as client:
            for number in range(3):
                assert client.customers.get(f"ext_{number}/x").id == f"ext_{number}/x"
    assert server.connections == 1
    assert server.requests[0].startswith("GET http://localhost:1/v1/customers/ext_0%2Fx HTTP/1.1")
    headers = headers_of(server.requests[0])
    assert headers["proxy-authorization"] == CREDENTIALS
    assert headers["host"] == "localhost:1"


@pytest.mark.parametrize("credentials", [True, False])
def test_rule_12_https_through_a_proxy(tls, monkeypatch, credentials):
    with raw_server(proxy) as relay, raw_server(Peer.answer_by_id, tls.good) as server:
        login = "us%40er:pa%3A55word@" if credentials else ""
        monkeypatch.setenv("https_proxy", f"http://{login}127.0.0.1:{relay.port}")
        with Dub(TOKEN, server_url=server.url, ssl_context=tls.trusting) as client:
            for number in range(3):
                assert client.customers.get(f"cus_{number}").id == f"cus_{number}"
    assert (relay.connections, server.connections) == (1, 1)
    assert len(relay.requests) == 1
    expected = {"host": f"127.0.0.1:{server.port}"}
    if credentials:
        expected["proxy-authorization"] = CREDENTIALS
    assert relay.requests[0].startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n")
    assert headers_of(relay.requests[0]) == expected
    assert TOKEN not in relay.requests[0]
    assert "proxy-authorization" not in headers_of(server.requests[0])
    assert headers_of(server.requests[0])["host"] == f"127.0.0.1:{server.port}"


def test_rule_12_through_a_tunnel_the_certificate_is_the_servers(tls, monkeypatch):
    with raw_server(proxy) as relay, raw_server(Peer.answer_by_id, tls.named) as server:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{relay.port}")
        url = f"https://localhost:{server.port}"
        with Dub(TOKEN, server_url=url, ssl_context=tls.trusting) as client:
            assert client.customers.get("cus_1").id == "cus_1"


def test_rule_12_the_tunnel_names_the_default_port(monkeypatch):
    answer = http(b"", "403 Forbidden")
    with raw_server(each_connection(answer)) as relay:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{relay.port}")
        with Dub(TOKEN, server_url="https://dub.test") as client:
            with pytest.raises(dub_customers.NoResponseError):
                client.customers.get("cus_1")
    assert relay.requests[0] == "CONNECT dub.test:443 HTTP/1.1\r\nHost: dub.test:443\r\n\r\n"


@pytest.mark.parametrize(
    ("status", "requests"), [("407 X", 1), ("403 X", 1), ("300 X", 1), ("503 X", 3), ("504 X", 3)]
)
def test_rule_12_a_proxy_that_refuses_the_tunnel(monkeypatch, waits, status, requests):
    with raw_server(each_connection(http(b"", status))) as relay:
        monkeypatch.setenv("https_proxy", f"http://u:pa55word@127.0.0.1:{relay.port}")
        with Dub(TOKEN, server_url="https://dub.test") as client:
            with pytest.raises(dub_customers.NoResponseError) as caught:
                client.customers.get("cus_1")
    refusal = f"proxy 127.0.0.1:{relay.port} answered {status[:3]} to CONNECT"
    assert str(caught.value).endswith(refusal)
    assert len(relay.requests) == requests
    assert "pa55word" not in repr([(error, str(error)) for error in chain(caught.value)])


def test_rule_12_a_proxy_that_wants_a_password_from_plain_http(monkeypatch):
    with raw_server(each_connection(http(b"", "407 Proxy Authentication Required"))) as relay:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{relay.port}")
        with Dub(TOKEN, server_url="http://localhost:1") as client:
            with pytest.raises(
                dub_customers.APIError, match="^407: Proxy Authentication Required$"
            ):
                client.customers.get("cus_1")
    assert len(relay.requests) == 1


def test_rule_12_a_proxy_that_is_down(monkeypatch, waits):
    with socket.create_server(("127.0.0.1", 0)) as down:
        port = down.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://u:pa55word@127.0.0.1:{port}")
    with pytest.raises(dub_customers.NoResponseError) as caught:
        Dub(TOKEN).customers.get("cus_1")
    assert f"cannot connect to 127.0.0.1:{port}: [Errno {errno.ECONNREFUSED}]" in str(caught.value)
    assert "pa55word" not in repr([(error, str(error)) for error in chain(caught.value)])


PROXIES_REFUSED = ["http:/u:pa55word@h", "socks5://u:pa55word@h:1", "http://u:pa55word@h:port"]
PROXIES_REFUSED += [
    "http://u:pa55word@" + "h" * 64,
    "http://u:pa55word%40h:1",
    "http://u:pa55word@",
]
PROXIES_REFUSED += ["http://u:pa55word@h:65536", "ftp://u:pa55word@h", "http://u:pa55word@h:0"]
PROXIES_REFUSED += [
    "http://u:pa55word\udce9@h",
    "http://@\udce9pa55word@h",
    "http://pa55word@[:::]",
]


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("setting", PROXIES_REFUSED)
def test_rule_12_a_proxy_setting_that_is_no_url(monkeypatch, scheme, setting):
    monkeypatch.setenv(f"{scheme}_proxy", setting)
    with pytest.raises(dub_customers.NoResponseError) as caught:
        Dub(TOKEN, server_url=f"{scheme}://localhost:1").customers.get("cus_1")
    message = f"{scheme}_proxy is set to something else than a proxy's URL"
    assert [str(error) for error in chain(caught.value)] == [message]


PROXIES_TAKEN = ["{}", "u:p@{}", "u@p@{}", "HTTP://{}/path", "http://u:p@ss@{}", "http://u:a/b@{}"]
PROXIES_TAKEN += ["http://u:#?[@{}"]


@pytest.mark.parametrize("setting", PROXIES_TAKEN)
def test_rule_12_a_proxy_setting_as_short_as_urllib_takes_it(monkeypatch, setting):
    with raw_server(proxy) as relay:
        monkeypatch.setenv("http_proxy", setting.format(f"127.0.0.1:{relay.port}"))
        with Dub(TOKEN, server_url="http://localhost:1") as client:
            assert client.customers.get("cus_1").id == "cus_1"


def test_rule_12_a_bad_proxy_setting_is_no_matter_where_it_does_not_apply(
    client, httpserver, monkeypatch
):
    served(httpserver)
    monkeypatch.setenv("http_proxy", "socks5://h")
    monkeypatch.setenv("no_proxy", "localhost")
    with Dub(TOKEN, server_url=httpserver.url_for("")) as other:
        assert other.customers.get("cus_1").id == "cus_1"


def test_rule_12_a_proxy_cannot_forge_the_answer_ahead_of_tls(tls, monkeypatch):
    forged = b"HTTP/1.1 200 OK\r\n\r\n" + http(body_of("cus_forged"))
    with raw_server(each_connection(forged)) as relay:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{relay.port}")
        with Dub(TOKEN, server_url="https://localhost", ssl_context=tls.trusting) as client:
            with pytest.raises(dub_customers.NoResponseError) as caught:
                client.customers.get("cus_1", max_retries=0)
    told = f"HTTPException: proxy 127.0.0.1:{relay.port} spoke ahead of TLS"
    assert str(caught.value) == f"no answer from https://localhost: {told}"


def test_rule_12_no_proxy_is_honoured_and_a_new_route_takes_a_new_connection(monkeypatch):
    with raw_server(proxy) as relay, raw_server(Peer.answer_by_id) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{relay.port}")
        with Dub(TOKEN, server_url=server.url) as client:
            for no_proxy in ("127.0.0.1", "", "127.0.0.1"):
                monkeypatch.setenv("no_proxy", no_proxy)
                assert client.customers.get("cus_1").id == "cus_1"
    assert (relay.connections, server.connections) == (1, 2)


def test_rule_12_a_proxy_reached_by_tls(tls, monkeypatch):
    with raw_server(proxy, tls.good) as relay:
        monkeypatch.setenv("http_proxy", f"https://u:p@127.0.0.1:{relay.port}")
        with Dub(TOKEN, server_url="http://localhost:1", ssl_context=tls.trusting) as client:
            assert client.customers.get("cus_1").id == "cus_1"
    assert relay.requests[0].startswith("GET http://localhost:1/customers/cus_1 HTTP/1.1")


def test_rule_12_one_proxy_is_not_reached_by_another(tls, monkeypatch):
    with raw_server(proxy, tls.good) as relay, raw_server(proxy) as other:
        monkeypatch.setenv("http_proxy", f"https://127.0.0.1:{relay.port}")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{other.port}")
        with Dub(TOKEN, server_url="http://localhost:1", ssl_context=tls.trusting) as client:
            assert client.customers.get("cus_1").id == "cus_1"
    assert (len(relay.requests), other.connections) == (1, 0)


def test_rule_12_a_users_proxy_authorization_never_reaches_the_server():
    with raw(Peer.answer_by_id) as (server, client):
        client.customers.get("cus_1", http_headers={"proxy-authorization": "Basic x"})
    assert "proxy-authorization" not in server.requests[0].lower()


# --- the answer -----------------------------------------------------------------------------------


def test_rule_13_a_200_is_a_customer_with_raw_as_it_came(client, httpserver):
    answer = {**EXPANDED, "sales": 2**53 + 1, "saleAmount": 0.5, "added": {"later": [1, None]}}
    served(httpserver, answer)
    customer = client.customers.get("cus_1")
    assert customer.raw == answer
    assert (customer.sales, customer.sale_amount) == (9007199254740993, 0.5)
    assert type(customer.sales) is int


def test_rule_13_a_misfit_carries_the_body_and_is_not_retried(client, httpserver):
    served(httpserver, {**EXPANDED, "link": {**EXPANDED["link"], "shortLink": None}})
    message = "^customer.link.shortLink: expected string, got null$"
    with pytest.raises(dub_customers.ResponseValidationError, match=message) as caught:
        client.customers.get("cus_1")
    assert json.loads(caught.value.body)["id"] == "cus_1"
    assert len(httpserver.log) == 1


DEEP = b"[" * 100_000
NOT_JSON = {
    "sign-in page": (b"<!DOCTYPE html>\n<h1>Sign in</h1>" + b"x" * 9999, "Expecting value"),
    "empty": (b"", "Expecting value"),
    "two objects": (body_of("cus_1") * 2, "Extra data"),
    "bad UTF-8": (b'{"id": "\xff"}', "'utf-8' codec"),
    "deep nesting": (DEEP, ""),
    "deep nesting in a field": (b'{"id": ' + DEEP, ""),
    "NaN": (b'{"id": NaN}', r"NaN is not JSON"),
    "Infinity": (b'{"id": -Infinity}', "-Infinity is not JSON"),
    "1e999": (b'{"unknown": 1e999}', "a number beyond a float"),
    "-1e999": (b'{"unknown": -1e999}', "a number beyond a float"),
    "UTF-16": (body_of("cus_1").decode().encode("utf-16"), "'utf-8' codec"),
    "cut object": (body_of("cus_1")[:-1], ""),
}


@pytest.mark.parametrize(("body", "reason"), list(NOT_JSON.values()), ids=list(NOT_JSON))
def test_rule_14_a_body_that_is_not_json_is_described(body, reason):
    headers = ["Content-Type: text/html; charset=x", "Content-Encoding: br"]
    with raw(each_connection(http(body, headers=headers))) as (server, client):
        with pytest.raises(dub_customers.ResponseValidationError) as caught:
            client.customers.get("cus_1")
    message = str(caught.value)
    assert message.startswith(f"200 answer is not the JSON of a customer ({reason}")
    assert "), Content-Type text/html; charset=x, Content-Encoding br: '" in message
    assert len(message) < 600
    assert "\n" not in message
    assert caught.value.body == body
    assert caught.value.__cause__ is not None
    assert len(server.requests) == 1
    if b"Sign in" in body:
        start = "<!DOCTYPE html> <h1>Sign in</h1>"
        assert message.endswith(f"br: '{start}{'x' * (100 - len(start))}'")


def test_rule_14_a_giant_number_is_never_another_error():
    body = b'{"sales": ' + b"9" * 6000 + b"}"
    with raw(each_connection(http(body))) as (server, client):
        with pytest.raises(dub_customers.ResponseValidationError):
            client.customers.get("cus_1")
    assert len(server.requests) == 1


def test_rule_14_the_message_is_short_whatever_came():
    headers = ["Content-Type: " + "t" * 9999, "Content-Encoding: " + "e" * 9999]
    with raw(each_connection(http(b"'\\\x00" * 9999, headers=headers))) as (server, client):
        with pytest.raises(dub_customers.ResponseValidationError) as caught:
            client.customers.get("cus_1")
    message = str(caught.value)
    assert len(message) < 600
    assert f"Content-Type {'t' * 77}..., Content-Encoding {'e' * 77}...: " in message


@pytest.mark.parametrize("status", ["201 Created", "204 No Content", "206 Partial", "299 X"])
def test_rule_14_another_2xx_is_not_the_answer_promised(status):
    with raw(each_connection(http(b"" if status[:3] == "204" else None, status))) as (
        server,
        client,
    ):
        with pytest.raises(dub_customers.ResponseValidationError) as caught:
            client.customers.get("cus_1")
    described = f"{status[:3]} answer is not the JSON of a customer (a customer comes with 200): '"
    assert str(caught.value).startswith(described)
    assert len(server.requests) == 1


CODES = [(400, "bad_request"), (401, "unauthorized"), (403, "forbidden"), (403, "exceeded_limit")]
CODES += [(404, "not_found"), (409, "conflict"), (409, "invite_pending"), (410, "invite_expired")]
CODES += [(422, "unprocessable_entity"), (429, "rate_limit_exceeded")]
CODES += [(500, "internal_server_error"), (404, "never_heard_of"), (418, "teapot"), (502, "bad")]


@pytest.mark.parametrize(("status", "code"), CODES)
def test_rule_15_class_by_status_words_from_the_envelope(client, httpserver, waits, status, code):
    served(httpserver, error_body(code, "Because."), status, headers={"X-Request": "r1"})
    with pytest.raises(dub_customers.APIError) as caught:
        client.customers.get("cus_1")
    error = caught.value
    assert type(error) is STATUS_CLASSES.get(status, dub_customers.APIError)
    assert (error.status_code, error.code, error.message) == (status, code, "Because.")
    assert (error.doc_url, error.headers["x-request"]) == ("https://dub.co/e", "r1")
    assert json.loads(error.body) == error_body(code, "Because.")
    assert str(error) == f"{status} {code}: Because."


NO_ENVELOPE = [b"", b"<html>", b"null", b"[]", b'"x"', b"7", b"{}", b'{"error": null}', b"\xff"]
NO_ENVELOPE += [
    b'{"error": []}',
    b'{"error": "x"}',
    b'{"error": {"message": 5, "code": null}}',
    DEEP,
]


@pytest.mark.parametrize("body", NO_ENVELOPE, ids=lambda body: repr(body[:40]))
def test_rule_15_an_envelope_that_does_not_fit_never_hides_the_status(body):
    with raw(each_connection(http(body, "404 Not Here"))) as (server, client):
        with pytest.raises(dub_customers.NotFound) as caught:
            client.customers.get("cus_1")
    error = caught.value
    assert (error.message, error.code, error.doc_url) == ("Not Here", None, None)
    assert error.body == body
    assert str(error) == "404: Not Here"


def test_rule_15_a_message_is_made_up_where_there_is_none():
    with raw(each_connection(http(b"", "404"))) as (server, client):
        with pytest.raises(dub_customers.NotFound, match="^404: no message$"):
            client.customers.get("cus_1")


NO_ANSWERS = {
    "TLS": b"\x15\x03\x01\x00\x02\x02\x46",
    "SSH": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
    "no number": b"HTTP/1.1 abc OK\r\n\r\n",
    "number too small": b"HTTP/1.1 99 OK\r\n\r\n",
    "empty lines": b"\r\n\r\n",
    "500 headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    "header of 100 kB": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    "status line of 100 kB": b"HTTP/1.1 200 " + b"y" * 100_000 + b"\r\n\r\n",
    "negative length": http().replace(b"Length: ", b"Length: -"),
    "length no number": http().replace(b"Length: ", b"Length: x"),
    "chunk of size -1": chunked().replace(b"0\r\n\r\n", b"-1\r\n" + body_of("cus_1")),
    "chunk of size -5": chunked().replace(b"0\r\n\r\n", b"-5\r\n" + body_of("cus_1")),
    "bad chunk size": chunked(b"{", end=b"zz\r\n\r\n"),
    "cut in a chunk": chunked(body_of("cus_1"))[:-30],
    "cut between chunks": chunked(body_of("cus_1"), end=b""),
    "cut by length": http()[:-5],
    "cut before the body": http()[: -len(body_of("cus_1"))],
    "closed without a word": b"",
    "cut in the status line": b"HTTP/1.1 200",
    "cut after the status line": b"HTTP/1.1 404 Not Found\r\n",
    "cut in the head": b"HTTP/1.1 404 Not Found\r\nX-Y: z\r\n",
    "cut after an interim answer": b"HTTP/1.1 103 Early Hints\r\n\r\n",
}


@pytest.mark.parametrize("answer", list(NO_ANSWERS.values()), ids=list(NO_ANSWERS))
def test_rule_16_what_is_no_answer_is_tried_again(answer, waits):
    with raw(each_connection(answer, answer, http())) as (server, client):
        assert client.customers.get("cus_1").id == "cus_1"
        assert len(server.requests) == 3
        with pytest.raises(dub_customers.NoResponseError) as caught:
            with raw(each_connection(answer)) as (second, other):
                other.customers.get("cus_1", max_retries=0)
        assert str(caught.value).startswith(f"no answer from {second.url}: ")
        assert len(str(caught.value)) < 300
        assert caught.value.__cause__ is not None
        assert len(second.requests) == 1


# --- trying again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_rule_16_statuses_that_are_tried_again(client, httpserver, waits, status):
    httpserver.expect_ordered_request("/customers/cus_1").respond_with_json({}, status=status)
    httpserver.expect_ordered_request("/customers/cus_1").respond_with_json({}, status=status)
    httpserver.expect_ordered_request("/customers/cus_1").respond_with_json(PLAIN)
    assert client.customers.get("cus_1").id == "cus_1"
    httpserver.check()
    assert len(httpserver.log) == 3
    assert waits == [0.0, 0.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 410, 422, 418, 501, 505])
def test_rule_16_statuses_that_are_not_tried_again(client, httpserver, waits, status):
    served(httpserver, error_body(), status)
    with pytest.raises(dub_customers.APIError):
        client.customers.get("cus_1")
    assert (len(httpserver.log), waits) == (1, [])


@pytest.mark.parametrize("reset", [False, True], ids=["refused", "reset"])
def test_rule_16_connection_failures_are_tried_again(waits, reset):
    if reset:
        with raw(lambda peer: (peer.request(), peer.reset())) as (server, client):
            with pytest.raises(dub_customers.NoResponseError):
                client.customers.get("cus_1")
        assert len(server.requests) == 3
    else:
        with socket.create_server(("127.0.0.1", 0)) as down:
            url = f"http://127.0.0.1:{down.getsockname()[1]}"
        with pytest.raises(dub_customers.NoResponseError, match="cannot connect to 127.0.0.1:"):
            Dub(TOKEN, server_url=url).customers.get("cus_1")
    assert len(waits) == 2


@pytest.mark.parametrize(
    "error", [OSError, TimeoutError, ValueError, dub_customers.InternalServerError]
)
def test_rule_16_what_the_token_callable_raises_is_the_callers(httpserver, error):
    asked = []

    def token():
        asked.append(1)
        raise error("from the callable")

    with Dub(token, server_url=httpserver.url_for("")) as client:
        with pytest.raises(error, match="from the callable") as caught:
            client.customers.get("cus_1")
    assert type(caught.value) is error
    assert (len(asked), len(httpserver.log)) == (1, 0)


@pytest.mark.parametrize("how", ["client", "call"])
@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_rule_16_max_retries_is_counted_beside_the_first(httpserver, waits, max_retries, how):
    served(httpserver, {}, 503)
    options = {"max_retries": max_retries}
    url = httpserver.url_for("")
    with Dub(TOKEN, server_url=url, **(options if how == "client" else {})) as client:
        with pytest.raises(dub_customers.APIError, match="^503: "):
            client.customers.get("cus_1", **(options if how == "call" else {}))
    assert len(httpserver.log) == max_retries + 1


def test_rule_16_back_off_doubles_up_to_8_seconds_with_full_jitter(httpserver, waits, monkeypatch):
    drawn = []
    monkeypatch.setattr("random.uniform", lambda *bounds: drawn.append(bounds) or 0.125)
    served(httpserver, {}, 500)
    with Dub(TOKEN, server_url=httpserver.url_for(""), max_retries=7) as client:
        with pytest.raises(dub_customers.InternalServerError):
            client.customers.get("cus_1")
    assert drawn[:7] == [(0, 0.5), (0, 1.0), (0, 2.0), (0, 4.0), (0, 8.0), (0, 8.0), (0, 8.0)]
    assert waits == [0.125] * 7


@pytest.mark.usefixtures("highest")
def test_rule_16_a_wait_past_the_deadline_is_not_begun(client, httpserver, waits):
    served(httpserver, {}, 503)
    started = time.monotonic()
    with pytest.raises(dub_customers.APIError, match="^503: "):
        client.customers.get("cus_1", timeout_ms=500, max_retries=99)
    assert time.monotonic() - started < 0.4
    assert (waits, len(httpserver.log)) == ([], 1)


@pytest.mark.usefixtures("highest")
def test_rule_16_a_connection_failure_without_time_to_wait_is_no_timeout(waits):
    with raw(each_connection(b"")) as (server, client):
        with pytest.raises(dub_customers.NoResponseError) as caught:
            client.customers.get("cus_1", timeout_ms=400)
    assert type(caught.value) is dub_customers.NoResponseError


def epoch_ms(seconds):
    return str(int((time.time() + seconds) * 1000))


def epoch(seconds):
    return str(int(time.time() + seconds))


RETRY_AFTERS = {
    "seconds": lambda: "7",
    "padded seconds": lambda: " 7 ",
    "epoch milliseconds": lambda: epoch_ms(7),
    "epoch seconds": lambda: epoch(7),
    "HTTP date": lambda: formatdate(time.time() + 7, usegmt=True),
}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("value", list(RETRY_AFTERS.values()), ids=list(RETRY_AFTERS))
def test_rule_17_retry_after_is_waited_for(waits, status, value):
    limited = http(b"{}", f"{status} X", [f"Retry-After: {value()}"])
    with raw(each_connection(limited, http())) as (server, client):
        assert client.customers.get("cus_1").id == "cus_1"
    assert len(waits) == 1
    assert 5.5 <= waits[0] <= 7


@pytest.mark.parametrize("status", [500, 502, 504])
def test_rule_17_retry_after_is_ignored_elsewhere(waits, status):
    failed = http(b"{}", f"{status} X", [f"Retry-After: {epoch_ms(9)}"])
    with raw(each_connection(failed, http())) as (server, client):
        assert client.customers.get("cus_1").id == "cus_1"
    assert waits == [0.0]


@pytest.mark.parametrize("hours", [-2, 2])
@pytest.mark.parametrize("value", ["epoch milliseconds", "epoch seconds", "HTTP date"])
def test_rule_17_the_servers_clock_counts(waits, monkeypatch, hours, value):
    date = formatdate(time.time(), usegmt=True)
    limited = http(b"{}", "429 X", [f"Retry-After: {RETRY_AFTERS[value]()}", f"Date: {date}"])
    now = time.time
    with raw(each_connection(limited, http())) as (server, client):
        monkeypatch.setattr("time.time", lambda: now() + hours * 3600)
        assert client.customers.get("cus_1").id == "cus_1"
    assert 6 <= waits[0] <= 8


@pytest.mark.parametrize(
    "value", ["3600", lambda: epoch_ms(3600), lambda: epoch(3600)], ids=["s", "ms", "epoch"]
)
def test_rule_17_a_call_that_cannot_wait_says_how_long_at_once(client, httpserver, waits, value):
    header = value if isinstance(value, str) else value()
    served(httpserver, error_body("rate_limit_exceeded"), 429, headers={"Retry-After": header})
    with pytest.raises(dub_customers.RateLimitExceeded) as caught:
        client.customers.get("cus_1")
    assert 3595 <= caught.value.retry_after <= 3601
    assert (waits, len(httpserver.log)) == ([], 1)


NONSENSE = ["soon", "-5", "nan", "inf", "1e400", "9" * 400, "", "1.5", "٣", "+7", "0x10"]
NONSENSE += ["Mon, 99 Nov 2026 10:00:00 GMT", "Mon, 23 Nov 2026 99:00:00 GMT", "12345678901234"]
NONSENSE += ["Fri, 31 Dec 9999 23:59:59 -2359"]


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: ascii(value)[:32])
def test_rule_17_nonsense_is_no_header(waits, value):
    limited = b"HTTP/1.1 429 X\r\nContent-Length: 0\r\nRetry-After: %s\r\n\r\n" % value.encode()
    with raw(each_connection(limited, http())) as (server, client):
        assert client.customers.get("cus_1").id == "cus_1"
    assert waits == [0.0]
    with raw(each_connection(limited), max_retries=0) as (server, client):
        with pytest.raises(dub_customers.RateLimitExceeded) as caught:
            client.customers.get("cus_1")
    assert caught.value.retry_after is None


def test_rule_17_without_the_header_there_is_no_retry_after(client, httpserver):
    served(httpserver, {}, 429)
    with pytest.raises(dub_customers.RateLimitExceeded) as caught:
        client.customers.get("cus_1", max_retries=0)
    assert caught.value.retry_after is None


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        ("0", "", 0),
        ("999999999", "", 999999999),
        ("1000000000", "Sun, 09 Sep 2001 01:46:30 GMT", 10),
        ("99999999999", "Wed, 16 Nov 5138 09:46:29 GMT", 10),
        ("100000000000", "Sat, 03 Mar 1973 09:46:30 GMT", 10),
        ("1000000000", "Sun, 09 Sep 2001 01:46:50 GMT", 0),
        ("Sun, 09 Sep 2001 01:46:40 GMT", "Sun, 09 Sep 2001 01:46:30 GMT", 10),
        ("Sun Sep  9 01:46:40 2001", "Sun, 09 Sep 2001 01:46:30 GMT", 10),
        ("Sun, 09 Sep 2001 03:46:40 +0200", "Sun, 09 Sep 2001 01:46:30 GMT", 10),
    ],
)
def test_rule_17_units_by_magnitude(value, date, seconds):
    read = dub_customers._retry_after({"Retry-After": value, "Date": date})
    assert (read, type(read)) == (seconds, float)


def test_under_load_every_call_returns_its_own_customer():
    faults = [b"", http()[:-5], b"HTTP/1.1 2", chunked(b"{", end=b"zz\r\n"), http(b"", "503 X")]

    def script(peer):
        served = 0
        while True:
            head = peer.request()
            if not head:
                return
            served += 1
            if served == 3 and peer.number % 5 == 0:
                peer.send(faults[peer.number // 5 % len(faults)])
                return
            if served == 5:
                return
            peer.send(http(body_of(asked_id(head))))

    with raw(script, max_retries=9) as (server, client), ThreadPoolExecutor(16) as pool:
        ids = [f"ext_{number}" for number in range(640)]
        assert [customer.id for customer in pool.map(client.customers.get, ids)] == ids


# --- the token is told to nobody else -------------------------------------------------------------


def test_each_attempt_leaves_one_debug_line(client, httpserver, caplog):
    caplog.set_level(logging.DEBUG, "dub_customers")
    served(httpserver, {}, 503)
    with pytest.raises(dub_customers.APIError):
        client.customers.get("ext_a b", include_expanded_fields=True)
    lines = [(record.name, record.levelno, record.getMessage()) for record in caplog.records
             if record.name.startswith("dub")]  # fmt: skip
    pattern = r"GET /customers/ext_a%20b\?includeExpandedFields=true 503 [0-9]+\.[0-9] ms"
    assert len(lines) == 3
    for name, level, message in lines:
        assert (name, level) == ("dub_customers", logging.DEBUG)
        assert re.fullmatch(pattern, message)
        assert float(message.split()[-2]) < 1000


def test_the_debug_line_tells_milliseconds_and_what_failed(caplog):
    caplog.set_level(logging.DEBUG, "dub_customers")
    with raw(lambda peer: peer.wait_for_end()) as (server, client):
        with pytest.raises(dub_customers.RequestTimeout):
            client.customers.get("cus_1", timeout_ms=60)
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.match(r"GET /customers/cus_1 (timeout|TimeoutError) ", message)
    assert 60 <= float(message.split()[-2]) < 500


def test_the_debug_line_of_a_call_interrupted_and_of_a_bad_proxy(caplog, monkeypatch):
    caplog.set_level(logging.DEBUG, "dub_customers")
    monkeypatch.setenv("http_proxy", "http:/x")
    with pytest.raises(dub_customers.NoResponseError):
        Dub(TOKEN, server_url="http://localhost:1").customers.get("cus_1")
    monkeypatch.setenv("http_proxy", "socks5://x")
    with pytest.raises(dub_customers.NoResponseError):
        Dub(TOKEN, server_url="http://localhost:1").customers.get("cus_1")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.delenv("http_proxy")
    monkeypatch.setattr("socket.getaddrinfo", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Dub(TOKEN, server_url="http://localhost:1").customers.get("cus_1")
    outcomes = [record.getMessage().rsplit(" ", 2)[0] for record in caplog.records]
    assert outcomes == [
        f"GET /customers/cus_1 {outcome}"
        for outcome in ("NoResponseError", "NoResponseError", "KeyboardInterrupt")
    ]


def test_without_logging_imported_nothing_is_logged(client, httpserver, monkeypatch):
    served(httpserver)
    monkeypatch.delitem(sys.modules, "logging")
    assert client.customers.get("cus_1").id == "cus_1"
    monkeypatch.setitem(sys.modules, "logging", types.ModuleType("half imported"))
    assert client.customers.get("cus_1").id == "cus_1"


def test_a_reason_is_told_in_at_most_200_characters():
    with raw(each_connection(b"HTTP/9" + b"y" * 5000 + b"\r\n")) as (server, client):
        with pytest.raises(dub_customers.NoResponseError) as caught:
            client.customers.get("cus_1", max_retries=0)
    head = f"no answer from {server.url}: BadStatusLine: HTTP/9yyy"
    assert str(caught.value).startswith(head)
    assert len(str(caught.value)) == len(f"no answer from {server.url}: ") + 200


def test_a_chunk_of_negative_size_is_named():
    connection = dub_customers._Wire(socket.socket())
    with connection, pytest.raises(Exception, match="^a chunk of negative size$"):
        connection.readall()


def test_what_is_wrong_with_an_answer_is_named(client, httpserver, monkeypatch):
    with raw(each_connection(NO_ANSWERS["length no number"])) as (server, other):
        with pytest.raises(dub_customers.NoResponseError) as caught:
            other.customers.get("cus_1", max_retries=0)
    told = "HTTPException: a Content-Length that is no length"
    assert str(caught.value) == f"no answer from {server.url}: {told}"

    def read(self, amount):
        raise ValueError("read length must be non-negative or -1")

    served(httpserver)
    monkeypatch.setattr("http.client.HTTPResponse.read", read)
    with pytest.raises(dub_customers.NoResponseError, match="Exception: a chunk of negative size$"):
        client.customers.get("cus_1", max_retries=0)


def test_rule_10_nothing_left_is_too_late(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 5.0)
    with pytest.raises(socket.timeout, match="^timed out$"):
        dub_customers._left(5.0)
    assert dub_customers._left(5.5) == 0.5


FAILURES = {
    "not found": http(b"{}", "404 Not Found"),
    "redirect": http(b"", "302 Found", ["Location: http://127.0.0.1:1/"]),
    "sign-in page": http(b"<html>"),
    "misfit": http(b"{}"),
    "cut": http()[:-5],
    "no http": b"SSH-2.0\r\n",
    "rate limit": http(b"{}", "429 X", ["Retry-After: 3600"]),
}


@pytest.mark.parametrize("answer", list(FAILURES.values()), ids=list(FAILURES))
def test_the_token_is_in_no_failure(answer, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    with raw(each_connection(answer)) as (server, client):
        with pytest.raises(dub_customers.DubError) as caught:
            client.customers.get("cus_1")
        told = [repr(client), repr(client.customers), caplog.text, *capsys.readouterr()]
        told += [repr(vars(client))]
    for error in chain(caught.value):
        told += [repr(error), str(error), repr(error.args), repr(vars(error))]
    assert TOKEN not in "".join(told)
    assert server.requests[0].count(TOKEN) == 1


# --- command line ---------------------------------------------------------------------------------


def run_command(monkeypatch, *args):
    """Run the file as a script in this process; its exit status."""
    monkeypatch.setattr("sys.argv", [str(MODULE), *args])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(MODULE), run_name="__main__")
    return ended.value.code


def test_command_prints_the_customer_as_json(httpserver, monkeypatch, capsys):
    answer = {**PLAIN, "name": "Jürgen\ud800", "later": 1}
    httpserver.expect_request("/customers/ext_a b", query_string=b"").respond_with_json(answer)
    monkeypatch.setenv("DUB_API_KEY", TOKEN)
    assert run_command(monkeypatch, "ext_a b", "--server-url", httpserver.url_for("")) == 0
    out, err = capsys.readouterr()
    assert out == json.dumps(answer, indent=2) + "\n"
    assert err == ""
    assert out.isascii()


def test_command_expands(httpserver, monkeypatch, capsys):
    httpserver.expect_request(
        "/customers/cus_1", query_string="includeExpandedFields=true"
    ).respond_with_json(EXPANDED)
    monkeypatch.setenv("DUB_API_KEY", TOKEN)
    url = httpserver.url_for("")
    assert run_command(monkeypatch, "--expand", "cus_1", "--server-url", url) == 0
    assert json.loads(capsys.readouterr().out) == EXPANDED


def test_command_fails_with_one_line_and_status_1(httpserver, monkeypatch, capsys):
    served(httpserver, error_body(), 404)
    url = httpserver.url_for("")
    for key, args, line in (
        (TOKEN, ["cus_1", "--server-url", url], "404 not_found: No such customer."),
        (TOKEN, ["..", "--server-url", url], "id: '..' is no customer's id"),
        (TOKEN, ["cus_1", "--server-url", "x"], "server_url: expected http(s)://host"),
        (TOKEN + "\n", ["cus_1"], "DUB_API_KEY has a line break at position 22 of 23"),
    ):
        monkeypatch.setenv("DUB_API_KEY", key)
        assert run_command(monkeypatch, *args) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"error: {line}")
        assert err.count("\n") == 1
        assert "s3cr3t" not in err
    monkeypatch.delenv("DUB_API_KEY")
    assert run_command(monkeypatch, "cus_1") == 1
    assert capsys.readouterr().err == "error: no token: give token=... or set DUB_API_KEY\n"


def test_command_fails_in_one_line_where_warnings_are_errors(monkeypatch, capsys):
    monkeypatch.setenv("DUB_API_KEY", TOKEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_command(monkeypatch, "cus_1", "--server-url", "http://dub.test") == 1
    assert capsys.readouterr().err == "error: the token goes to dub.test in clear: use https\n"


def test_command_interrupted(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setenv("DUB_API_KEY", TOKEN)
    monkeypatch.setattr("socket.getaddrinfo", interrupt)
    assert run_command(monkeypatch, "cus_1") == 1
    assert capsys.readouterr().err == "error: KeyboardInterrupt\n"


@pytest.mark.parametrize(
    "args", [[], ["cus_1", "cus_2"], ["--demo", "cus_1"], ["--unknown"]], ids=str
)
def test_command_used_wrongly_exits_with_2(monkeypatch, capsys, args):
    assert run_command(monkeypatch, *args) == 2
    out, err = capsys.readouterr()
    assert (out, err[:6]) == ("", "usage:")
    assert args == ["--unknown"] or "error: " in err
    if args in ([], ["--demo", "cus_1"]):
        assert err.endswith(": error: give an ID, or --demo\n")


def test_command_helps_and_tells_its_version(monkeypatch, capsys):
    assert run_command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == dub_customers.__version__ + "\n"
    assert run_command(monkeypatch, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Print a customer of the Dub API as JSON. The key is read from DUB_API_KEY." in shown
    assert "[--expand] [--server-url URL] [--version] [--demo] [ID]" in shown
    assert "[ID] Print a customer" in shown
    assert "ID cus_... or ext_ and the externalId" in shown
    assert "--expand with link, partner and discount" in shown
    assert "--demo fetch the documented example from a server in here" in shown


def test_demo_needs_no_key_network_or_proxy_settings(monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert run_command(monkeypatch, "--demo") == 0
    out, err = capsys.readouterr()
    assert err == ""
    documented = Customer.from_json(json.loads(out))
    assert documented.id == "cus_1KAP4CDPBSVMMBMH9XX3YZZ0Z"
    assert None not in (documented.link, documented.partner, documented.discount)


def test_command_that_cannot_print_says_so(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        assert run_command(monkeypatch, "--demo") == 1
    assert re.fullmatch(r"error: \[Errno [0-9]+\] [A-Za-z ]+\n", capsys.readouterr().err)


def test_command_that_cannot_print_exits_with_1():
    reader, stdout = os.pipe()
    os.close(reader)
    command = [sys.executable, str(MODULE), "--demo"]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=30)
    os.close(stdout)
    assert done.returncode == 1
    assert re.fullmatch(rb"error: \[Errno [0-9]+\] [A-Za-z ]+\n", done.stderr)


# --- any Python, anywhere -------------------------------------------------------------------------

CALL = """
import sys
from dub_customers import Dub, DubError
with Dub("dub_x", server_url=sys.argv[1]) as client:
    print(client.customers.get("cus_1").id)
    try:
        client.customers.get("..")
    except ValueError as error:
        print(error)
"""
PRINTED = "cus_1\nid: '..' is no customer's id\n"


@pytest.mark.parametrize(
    ("flags", "env"),
    [
        (["-X", "dev", "-W", "error"], {}),
        (["-OO"], {}),
        (["-S"], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ],
    ids=["dev", "optimized", "C locale"],
)
def test_runs_under_any_flags(httpserver, flags, env):
    served(httpserver)
    done = in_python(CALL, httpserver.url_for(""), flags=flags, env=env)
    assert (done.stdout, done.stderr) == (PRINTED, "")


def test_runs_isolated(httpserver):
    served(httpserver)
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})" + CALL
    done = in_python(code, httpserver.url_for(""), flags=["-I", "-S", "-B"])
    assert (done.stdout, done.stderr) == (PRINTED, "")


def test_runs_from_a_zip_and_a_read_only_folder(httpserver, tmp_path):
    served(httpserver)
    archive = tmp_path / "app.zip"
    with zipfile.ZipFile(str(archive), "w") as packed:
        packed.write(str(MODULE), "dub_customers.py")
    folder = tmp_path / "frozen"
    folder.mkdir()
    shutil.copy(str(MODULE), str(folder))
    folder.chmod(0o555)
    for place in (archive, folder):
        env = {"PYTHONPATH": str(place)}
        done = in_python(CALL, httpserver.url_for(""), env=env, cwd=tmp_path)
        assert (done.stdout, done.stderr) == (PRINTED, "")


AUDIT = """
import os, sys
def refuse(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event in ("socket.bind", "subprocess.Popen", "os.fork", "os.system"):
        raise SystemExit("refused " + event)
sys.addaudithook(refuse)
"""


def test_runs_where_writing_subprocesses_and_listening_are_forbidden(httpserver):
    served(httpserver)
    done = in_python(AUDIT + CALL, httpserver.url_for(""))
    assert (done.stdout, done.stderr) == (PRINTED, "")


def test_import_opens_nothing_and_starts_nothing():
    code = AUDIT + (
        "sys.addaudithook(lambda event, args: event.startswith('socket.') and "
        "sys.exit(event))\nimport dub_customers, threading\nprint(threading.active_count())"
    )
    done = in_python(code)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_runs_without_modules_that_may_be_missing(httpserver):
    served(httpserver)
    names = ["ssl", "_ssl", "ctypes", "multiprocessing", "asyncio", "sqlite3"]
    code = f"import sys; sys.modules.update(dict.fromkeys({names}))" + CALL
    done = in_python(code, httpserver.url_for(""))
    assert (done.stdout, done.stderr) == (PRINTED, "")


def test_vendored_under_another_name(httpserver, tmp_path, caplog):
    served(httpserver)
    package = tmp_path / "app" / "_vendor"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    shutil.copy(str(MODULE), str(package / "dub.py"))
    code = (
        "import logging, pickle, sys\n"
        "logging.basicConfig(level='DEBUG', stream=sys.stdout, format='%(name)s')\n"
        "from app._vendor.dub import Dub\n"
        "client = pickle.loads(pickle.dumps(Dub('dub_x', server_url=sys.argv[1])))\n"
        "print(pickle.loads(pickle.dumps(client.customers.get('cus_1'))).__class__.__module__)\n"
        "assert 'dub_customers' not in sys.modules\n"
    )
    done = in_python(code, httpserver.url_for(""), env={"PYTHONPATH": str(tmp_path)})
    assert (done.stdout, done.stderr) == ("app._vendor.dub\napp._vendor.dub\n", "")
    done = subprocess.run(
        [sys.executable, "-B", "-m", "app._vendor.dub", "--demo"],
        cwd=str(tmp_path), stdout=subprocess.PIPE, timeout=30,
    )  # fmt: skip
    assert json.loads(done.stdout)["externalId"] == "user_42"


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_pool_carries_a_used_client(httpserver, method):
    served(httpserver)
    with Dub(TOKEN, server_url=httpserver.url_for("")) as client:
        client.customers.get("cus_1")
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            customers = list(pool.map(client.customers.get, ["cus_1"] * 4))
    assert [customer.id for customer in customers] == ["cus_1"] * 4


# --- the README -----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text("utf-8")


def blocks(language):
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [pytest.param(text, id=text.strip().splitlines()[0]) for text in found]


@pytest.mark.parametrize("sample", blocks("python"))
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_readme_sample_runs(httpserver, monkeypatch, sample):
    served(httpserver, EXPANDED)
    monkeypatch.setenv("DUB_API_KEY", TOKEN)
    monkeypatch.setitem(Dub.__init__.__kwdefaults__, "server_url", httpserver.url_for(""))
    if not hasattr(asyncio, "to_thread"):  # Python 3.8; as the README says

        async def to_thread(function, *args):
            return await asyncio.get_running_loop().run_in_executor(None, function, *args)

        monkeypatch.setattr(asyncio, "to_thread", to_thread, raising=False)
    main = types.ModuleType("__main__")
    exec(compile(sample, "README.md", "exec"), vars(main))
    assert httpserver.log


@pytest.mark.parametrize("commands", blocks("sh"))
def test_readme_command_runs(httpserver, tmp_path, commands):
    served(httpserver, EXPANDED)
    shutil.copy(str(MODULE), str(tmp_path))
    (tmp_path / "app" / "_vendor").mkdir(parents=True)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python3").symlink_to(sys.executable)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    for command in commands.strip().splitlines():
        if " dub_customers.py " in command and "_42" in command:
            command += f" --server-url {httpserver.url_for('')}"
        done = subprocess.run(
            command, shell=True, cwd=str(tmp_path), env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
