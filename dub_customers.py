# SPDX-License-Identifier: 0BSD
# pyright: reportPrivateUsage=false
"""Retrieve a customer from the Dub API as a typed object: one file, for Python 3.8 and up.

    from dub_customers import Dub
    with Dub() as client:  # reads the API key from the environment variable DUB_API_KEY
        print(client.customers.get("ext_42", include_expanded_fields=True))

API reference: https://dub.co/docs/api-reference/endpoint/retrieve-a-customer
"""

from __future__ import annotations

import base64
import calendar
import io
import json
import logging
import math
import os
import random
import re
import socket
import ssl
import sys
import time
import warnings
from collections import abc, deque
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, Callable, Mapping, NamedTuple, Optional, TypedDict, TypeVar, Union
from urllib.parse import SplitResult, quote, unquote_to_bytes, urlsplit
from urllib.request import BaseHandler, OpenerDirector, Request, getproxies, proxy_bypass
from urllib.response import addinfourl

__version__ = "1.2.0"

__all__ = [
    "APIError", "BadRequest", "Conflict", "Customer", "Customers", "Discount", "Dub", "DubError",
    "Forbidden", "GetCustomerRequest", "InternalServerError", "InviteExpired", "Link",
    "NoResponseError", "NotFound", "Partner", "RateLimitExceeded", "RequestTimeout",
    "ResponseValidationError", "Unauthorized", "UnprocessableEntity",
]  # fmt: skip

# Retries wait for a random time, so that clients do not all retry at the same moment.
_FIRST_BACKOFF_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 8
_MAX_RETRY_AFTER_JITTER_SECONDS = 4
# How long to try each address of a host but the last, because the first may be broken IPv6.
_MAX_SECONDS_PER_ADDRESS = 3
# Firewalls silently drop connections that are idle for minutes.
_MAX_IDLE_SECONDS = 60
# One for each thread of a ThreadPoolExecutor of the default size (at most 32).
_MAX_IDLE_CONNECTIONS = 32
_MAX_RESPONSE_BYTES = 1024 * 1024  # real ones: up to 100 kB

_logger = logging.getLogger(__name__)
_TIMEOUTS = (TimeoutError, socket.timeout)  # the same class since Python 3.10


# --- Errors ---------------------------------------------------------------------------
class DubError(Exception):
    """Base class of all API and network errors. Misuse raises TypeError or ValueError."""

    def __str__(self) -> str:
        return _short_line(super().__str__())


class APIError(DubError):
    """The response has a status other than 2xx, such as 502. Some statuses have a subclass.

    code, doc_url: from Dub (https://dub.co/docs/api-reference/errors), or None.
    message: from Dub, or the start of the body, or a note on a redirect.
    status_code: the HTTP status. headers: an `email.message.Message`. body: the content.
    retry_after: for 429 and 503, the seconds to wait after the response came, or None.
    """

    def __init__(
        self,
        message: str = "",
        status_code: int = 0,
        code: Optional[str] = None,
        doc_url: Optional[str] = None,
        headers: Optional[Message] = None,
        body: bytes = b"",
    ) -> None:
        # Unpickling passes only the message, so the others need defaults.
        super().__init__(message)
        self.message = message
        self.status_code = status_code
        self.code = code
        self.doc_url = doc_url
        self.headers = headers or Message()
        self.body = body
        self.retry_after: Optional[float] = None

    def __str__(self) -> str:
        status = str(self.status_code)
        if self.code:
            status += " " + self.code
        if self.retry_after is not None:
            status += f", retry after {math.ceil(self.retry_after)} seconds"
        return _short_line(f"{status}: {self.message}")


class BadRequest(APIError):
    """400: the request is malformed."""


class Unauthorized(APIError):
    """401: the API key is missing or invalid."""


class Forbidden(APIError):
    """403: the API key lacks permission, or the plan is below Business."""


class NotFound(APIError):
    """404: no such customer. If `code` is None, this is not from Dub: check `server_url`."""


class Conflict(APIError):
    """409: `code` is "conflict" or "invite_pending"."""


class InviteExpired(APIError):
    """410: the invitation to the workspace has expired."""


class UnprocessableEntity(APIError):
    """422: Dub sends this when its own response fails validation, not for bad requests."""


class RateLimitExceeded(APIError):
    """429: too many requests in a minute. `retry_after` tells how long to wait."""


class InternalServerError(APIError):
    """500: the server failed."""


class NoResponseError(DubError):
    """No complete, valid response: the network, TLS, a proxy or the server failed."""


class RequestTimeout(NoResponseError, TimeoutError):
    """The call took longer than `timeout_ms`, or the OS gave up earlier. Not retried."""


class ResponseValidationError(DubError):
    """The status is 2xx, but the response is not 200 with a valid customer. See `body`."""

    def __init__(self, message: str = "", *, body: bytes = b"") -> None:
        super().__init__(message)
        self.body = body


# --- Models ---------------------------------------------------------------------------
_Model = TypeVar("_Model", "Link", "Partner", "Discount")


class _JsonObject:
    """A decoded JSON object. Checks the type of each field on access."""

    def __init__(self, data: Any, path: str) -> None:
        if not isinstance(data, dict):
            raise _mismatch(path, "object", data)
        self._data: dict[str, Any] = data
        self._path = path

    def string(self, key: str) -> str:
        value = self._data.get(key)
        if isinstance(value, str):
            return value
        raise _mismatch(f"{self._path}.{key}", "string", value)

    def optional_string(self, key: str) -> Optional[str]:
        value = self._data.get(key)
        if value is None or isinstance(value, str):
            return value
        raise _mismatch(f"{self._path}.{key}", "string", value)

    def number(self, key: str) -> float:
        value: Any = self._data.get(key)
        # type() rather than isinstance(), because True is an instance of int. NaN and
        # Infinity, which json.loads() accepts, are not valid JSON numbers.
        if type(value) in (int, float) and abs(value) < math.inf:
            return value  # type: ignore[no-any-return]
        raise _mismatch(f"{self._path}.{key}", "number", value)

    def optional_number(self, key: str) -> Optional[float]:
        return None if self._data.get(key) is None else self.number(key)

    def optional_object(self, key: str, model: type[_Model]) -> Optional[_Model]:
        value = self._data.get(key)
        return None if value is None else model.from_json(value, f"{self._path}.{key}")


# float is left out, because for NaN, the error should say "got nan" and not "got number".
_JSON_NAMES: dict[type, str] = {
    str: "string",
    int: "number",
    bool: "boolean",
    dict: "object",
    list: "array",
    type(None): "null",
}


def _mismatch(path: str, expected: str, value: object) -> ResponseValidationError:
    got = _JSON_NAMES.get(type(value), repr(value))
    return ResponseValidationError(f"{path}: expected {expected}, got {got}")


@dataclass(frozen=True)
class Link:
    """The short link that the customer came from."""

    id: str
    domain: str
    key: str
    short_link: str
    url: str
    program_id: Optional[str] = None

    @classmethod
    def from_json(cls, data: Any, path: str = "link") -> Link:
        """Convert decoded JSON. `path` names this object in a ResponseValidationError."""
        fields = _JsonObject(data, path)
        return cls(
            id=fields.string("id"),
            domain=fields.string("domain"),
            key=fields.string("key"),
            short_link=fields.string("shortLink"),
            url=fields.string("url"),
            program_id=fields.optional_string("programId"),
        )


@dataclass(frozen=True)
class Partner:
    """The partner who referred the customer."""

    id: str
    name: str
    email: Optional[str] = None
    image: Optional[str] = None

    @classmethod
    def from_json(cls, data: Any, path: str = "partner") -> Partner:
        """Convert decoded JSON. `path` names this object in a ResponseValidationError."""
        fields = _JsonObject(data, path)
        return cls(
            id=fields.string("id"),
            name=fields.string("name"),
            email=fields.optional_string("email"),
            image=fields.optional_string("image"),
        )


@dataclass(frozen=True)
class Discount:
    """The customer's discount.

    `amount` is a percentage if `type` is "percentage", cents if it is "flat". The
    discount applies for `max_duration` months: 0 means once, None means forever.
    """

    id: str
    amount: float
    type: str
    max_duration: Optional[float] = None
    description: Optional[str] = None
    coupon_id: Optional[str] = None
    coupon_test_id: Optional[str] = None
    partners_count: Optional[float] = None

    @classmethod
    def from_json(cls, data: Any, path: str = "discount") -> Discount:
        """Convert decoded JSON. `path` names this object in a ResponseValidationError."""
        fields = _JsonObject(data, path)
        return cls(
            id=fields.string("id"),
            amount=fields.number("amount"),
            type=fields.string("type"),
            max_duration=fields.optional_number("maxDuration"),
            description=fields.optional_string("description"),
            coupon_id=fields.optional_string("couponId"),
            coupon_test_id=fields.optional_string("couponTestId"),
            partners_count=fields.optional_number("partnersCount"),
        )


@dataclass(frozen=True)
class Customer:
    """A customer. A field that the server sent as null, or did not send, is None.

    `sale_amount` is in cents. Times are ISO 8601 strings in UTC. If a customer has no name,
    `name` is the email address, or else a random name that differs in each response.
    `link`, `program_id`, `partner` and `discount` need `include_expanded_fields=True`.
    `raw` is the decoded JSON object, with any fields that this version does not know.
    """

    id: str
    external_id: str
    created_at: str
    name: Optional[str] = None
    email: Optional[str] = None
    avatar: Optional[str] = None
    stripe_customer_id: Optional[str] = None
    country: Optional[str] = None
    sales: Optional[float] = None
    sale_amount: Optional[float] = None
    first_sale_at: Optional[str] = None
    subscription_canceled_at: Optional[str] = None
    link: Optional[Link] = None
    program_id: Optional[str] = None
    partner: Optional[Partner] = None
    discount: Optional[Discount] = None
    # lambda: {}, because pyright infers dict[Unknown, Unknown] from dict.
    raw: Mapping[str, Any] = field(default_factory=lambda: {}, repr=False, compare=False)

    @classmethod
    def from_json(cls, data: Any, path: str = "customer") -> Customer:
        """Convert decoded JSON. `path` names this object in a ResponseValidationError."""
        fields = _JsonObject(data, path)
        return cls(
            id=fields.string("id"),
            external_id=fields.string("externalId"),
            created_at=fields.string("createdAt"),
            name=fields.optional_string("name"),
            email=fields.optional_string("email"),
            avatar=fields.optional_string("avatar"),
            stripe_customer_id=fields.optional_string("stripeCustomerId"),
            country=fields.optional_string("country"),
            sales=fields.optional_number("sales"),
            sale_amount=fields.optional_number("saleAmount"),
            first_sale_at=fields.optional_string("firstSaleAt"),
            subscription_canceled_at=fields.optional_string("subscriptionCanceledAt"),
            link=fields.optional_object("link", Link),
            program_id=fields.optional_string("programId"),
            partner=fields.optional_object("partner", Partner),
            discount=fields.optional_object("discount", Discount),
            raw=data,
        )


# --- Client ---------------------------------------------------------------------------
class GetCustomerRequest(TypedDict, total=False):
    """The `request` of `customers.get`. `id` is required (typing.Required needs 3.11)."""

    id: str
    include_expanded_fields: Optional[bool]


class Dub:
    """A client for the Dub API: `client.customers.get(...)` retrieves a customer.

    token: an API key, or a function that returns one and is called before each request.
        If it is None, the key is read from the environment variable DUB_API_KEY.
    server_url: http(s)://host[:port][/path]. Plain http emits a warning, except to loopback.
    timeout_ms: how many milliseconds a call may take, retries included. It cannot interrupt
        name resolution, a token function, or a TLS handshake while the server keeps sending data.
    max_retries: how many times a failed request may be sent again. The immediate resend when a
        kept connection turns out to be closed is not counted.
    ssl_context: used in place of `ssl.create_default_context()`. Such a client cannot be pickled.

    Invalid arguments raise TypeError or ValueError. A new client looks up the proxy as urllib does.
    Threads can share a client. It can be used after a fork, and pickled (with its token).
    """

    def __init__(
        self,
        token: Union[str, Callable[[], str], None] = None,
        *,
        server_url: str = "https://api.dub.co",
        timeout_ms: float = 30_000,
        max_retries: int = 2,
        ssl_context: Optional[ssl.SSLContext] = None,
    ) -> None:
        if token is None:
            token = _checked_token("DUB_API_KEY", os.environ.get("DUB_API_KEY", ""))
        elif not callable(token):
            token = _checked_token("token", token)
        server = _split_server_url(server_url)
        if server.scheme == "http" and not _is_loopback(server.hostname):
            warnings.warn(f"the API key is sent to {server.netloc} unencrypted", stacklevel=2)
        _check_limits(timeout_ms, max_retries)
        _check_type("ssl_context", ssl_context, ssl.SSLContext, type(None))
        self._token = token
        self._server_url = server.geturl()
        self._timeout_ms = timeout_ms
        self._max_retries = max_retries
        self._handler = _KeepAliveHandler(server, ssl_context)
        # Requests go through urllib's opener so that tools that patch it, such as OpenTelemetry,
        # see them. Only our handler is added: it keeps connections open, and never redirects.
        self._opener = OpenerDirector()
        self._opener.add_handler(self._handler)
        # add_handler() set it to the opener. This unused cycle would delay handler.__del__().
        del self._handler.parent

    @property
    def customers(self) -> Customers:
        """The customers of the workspace: call `client.customers.get(...)`."""
        return Customers(self)

    def close(self) -> None:
        """Close the connections. Calls in progress finish; later ones raise RuntimeError."""
        self._handler.close()

    def __enter__(self) -> Dub:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Customers:
    """The customers of a workspace. Use it as `Dub(...).customers`."""

    def __init__(self, client: Dub) -> None:
        self._client = client

    def get(
        self,
        id: Optional[str] = None,
        *,
        include_expanded_fields: Optional[bool] = None,
        request: Optional[GetCustomerRequest] = None,
        timeout_ms: Optional[float] = None,
        max_retries: Optional[int] = None,
        http_headers: Optional[Mapping[str, str]] = None,
    ) -> Customer:
        """Retrieve a customer.

        id: the customer's id on Dub (`cus_...`), or `ext_` followed by its external id.
        include_expanded_fields: adds `link`, `program_id`, `partner` and `discount`.
        request: the two arguments above in one mapping, as the official SDK takes them.
        timeout_ms, max_retries: override those of the client.
        http_headers: extra headers, which override the client's own.

        Raises APIError (NotFound, RateLimitExceeded, ...) if the server sends an error,
        NoResponseError if there is no response (RequestTimeout if it takes too long), and
        ResponseValidationError if it is not a customer. Invalid arguments raise TypeError or
        ValueError, a closed client RuntimeError.
        """
        client = self._client
        path = _customer_path(id, include_expanded_fields, request)
        headers = _checked_headers(http_headers)
        timeout_ms = client._timeout_ms if timeout_ms is None else timeout_ms
        max_retries = client._max_retries if max_retries is None else max_retries
        _check_limits(timeout_ms, max_retries)
        if client._handler.closed:
            raise RuntimeError("the client is closed")
        deadline = time.monotonic() + timeout_ms / 1000
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            token = client._token
            if callable(token):
                token = _checked_token("token()", token())
            # Names may differ in case here. Request() capitalizes them, and the last one wins.
            all_headers = {**_HEADERS, "Authorization": "Bearer " + token, **headers}
            http_request = Request(client._server_url + path, headers=all_headers)
            try:
                return _parse_response(self._send(http_request, timeout_ms, deadline))
            except (APIError, NoResponseError) as error:
                delay = _retry_delay(error, backoff, deadline)
                if delay is None or max_retries == 0:
                    raise
            time.sleep(delay)
            max_retries -= 1
            backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)

    def _send(self, request: Request, timeout_ms: float, deadline: float) -> addinfourl:
        """Send a request once, and log it. Converts an OSError to a NoResponseError."""
        started = time.monotonic()
        outcome = "interrupted"
        try:
            response: addinfourl = self._client._opener.open(request, timeout=deadline - started)
            outcome = str(response.code)
            return response
        except OSError as error:
            outcome = str(error)
            message = f"no valid response from {self._client._handler.route}: {error}"
            if isinstance(error, _TIMEOUTS):
                raise RequestTimeout(f"{message} (timeout_ms={timeout_ms})") from error
            if isinstance(error, ssl.SSLCertVerificationError):
                message += "; SSL_CERT_FILE or ssl_context can help"
            raise NoResponseError(message) from error
        finally:
            milliseconds = (time.monotonic() - started) * 1000
            _logger.debug("GET %s: %s, %.1f ms", request.selector, outcome, milliseconds)


# --- Everything below is private. The path of a call: ---------------------------------
#   Customers.get                 checks the arguments; makes a Request; retries
#   Customers._send               sends it once; logs it; converts OSError to NoResponseError
#   OpenerDirector.open           urllib's; calls http_open or https_open of its handler
#   _KeepAliveHandler.http_open   takes an idle connection or makes a new one
#   _Connection.exchange          speaks HTTP, more strictly than http.client; raises OSError
#   _parse_response               makes a Customer, or raises an error


# --- Arguments ------------------------------------------------------------------------
_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": f"dub_customers/{__version__} (Python)",
}
# These affect framing, the connection or the proxy. Host and Authorization may be overridden.
_RESERVED_HEADERS = ("connection", "content-length", "transfer-encoding", "proxy-authorization")
_HEADER_NAME = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEADER_VALUE = r"[\t -~\x80-\xff]*"  # no ASCII control but the tab
# api.dub.co, [2001:db8::1], [::ffff:10.0.0.1]; maybe a port. For re.ASCII | re.IGNORECASE.
_HOST = r"[\w-]{1,63}(\.[\w-]{1,63})*\.?"
_IPV6 = r"\[[\da-f:]{2,45}(\.\d+){0,3}\]"
_HOST_AND_PORT = rf"({_HOST}|{_IPV6})(:\d+)?"
_URL_CHAR = r"[\w.~%!$&'()*+,;=-]"


def _check_type(name: str, value: Any, *types: type) -> None:
    # Reject bool where int is expected: it is a subclass.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        expected = " or ".join(each.__name__ for each in types)
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def _checked_token(name: str, token: str) -> str:
    _check_type(name, token, str)
    if not re.fullmatch("[!-~]+", token):  # visible ASCII
        fault = "is missing, or has a space, a line break or a non-ASCII character"
        raise ValueError(f"{name} {fault}")
    return token


def _check_limits(timeout_ms: Any, max_retries: Any) -> None:
    _check_type("timeout_ms", timeout_ms, int, float)
    if not 0 < timeout_ms < 2**31:  # poll() takes a C int
        raise ValueError("timeout_ms: expected 0 < timeout_ms < 2**31")
    _check_type("max_retries", max_retries, int)
    if max_retries < 0:
        raise ValueError("max_retries: expected 0 or more")


def _checked_headers(http_headers: Any) -> dict[str, str]:
    _check_type("http_headers", http_headers, abc.Mapping, type(None))
    headers = dict(http_headers or {})
    for name, value in headers.items():
        for text in (name, value):
            _check_type(f"http_headers[{name!r}]", text, str)
        if not re.fullmatch(_HEADER_NAME, name) or name.lower() in _RESERVED_HEADERS:
            raise ValueError(f"http_headers: {name!r} is invalid or reserved")
        if not re.fullmatch(_HEADER_VALUE, value):
            raise ValueError(f"http_headers: {name}: control or non-Latin-1 character")
    return headers


def _customer_path(id: Any, expand: Any, request: Any) -> str:
    if request is not None:
        if id is not None or expand is not None:
            raise TypeError("pass either request, or id and include_expanded_fields")
        _check_type("request", request, abc.Mapping)
        for key in request:
            if key not in ("id", "include_expanded_fields"):
                raise TypeError(f"request: unexpected key {key!r}")
        id = request.get("id")
        expand = request.get("include_expanded_fields")
    _check_type("id", id, str)
    # Servers resolve a segment "." or ".." even if encoded. Lone surrogates cannot be encoded.
    if id in ("", ".", "..", "ext_") or re.search("[\ud800-\udfff]", id):
        raise ValueError(f"id: empty, incomplete or not Unicode: {id[:99]!r}")
    # Encode "/" and other delimiters, and dots: Dub's server (Next.js) would strip ".rsc".
    path = "/customers/" + quote(id, safe="").replace(".", "%2E")
    if expand is None:
        return path
    _check_type("include_expanded_fields", expand, bool)
    return path + "?includeExpandedFields=" + str(expand).lower()


def _split_server_url(server_url: Any) -> SplitResult:
    _check_type("server_url", server_url, str)
    expected = "http(s)://host[:port][/path]"
    if "@" not in server_url:  # It may hold a password.
        expected += f", got {server_url[:99]!r}"
    pattern = f"https?://{_HOST_AND_PORT}(/({_URL_CHAR}|[/:@])*)?"
    return _split_url("server_url", server_url.rstrip("/"), pattern, expected)


def _split_url(name: str, url: str, pattern: str, expected: str) -> SplitResult:
    with suppress(ValueError):  # invalid port or IPv6
        parts = urlsplit(url)
        if re.fullmatch(pattern, url, re.ASCII | re.IGNORECASE) and parts.port != 0:
            return parts
    raise ValueError(f"{name}: expected {expected}")


def _is_loopback(host: Optional[str]) -> bool:
    # localhost, ::1 with any number of zeros, 127.0.0.0/8, the same in IPv6
    pattern = r"localhost\.?|[0:]+:0*1|(::ffff:)?127(\.\d{1,3}){3}"
    return re.fullmatch(pattern, str(host)) is not None


# --- Retries --------------------------------------------------------------------------
def _retry_delay(error: DubError, backoff: float, deadline: float) -> Optional[float]:
    """How many seconds to wait before the next try. None if there should be no next try."""
    # _send() sets __cause__. No retry after a timeout, bad certificate, or refusal by the proxy.
    if isinstance(error.__cause__, (*_TIMEOUTS, ssl.SSLCertVerificationError, PermissionError)):
        return None
    retry_after = 0.0
    if isinstance(error, APIError):
        if error.status_code not in (408, 429, 500, 502, 503, 504):
            return None
        retry_after = error.retry_after or 0.0
    # A random extra: up to retry_after (at most 4 s), or up to the backoff if that is longer.
    max_jitter = max(backoff, min(retry_after, _MAX_RETRY_AFTER_JITTER_SECONDS))
    # Assume the longest wait, so that the decision to retry is not random.
    if time.monotonic() + retry_after + max_jitter >= deadline:
        return None
    return retry_after + random.uniform(0, max_jitter)


def _parse_retry_after(headers: Message) -> Optional[float]:
    """The header Retry-After in seconds from now, or None if it is missing or malformed."""
    value = headers.get("Retry-After", "")
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    retry_at = _timestamp(value)
    if retry_at is None:
        return None
    # Prefer the server's clock, in case this machine's is wrong.
    now = _timestamp(headers.get("Date", "")) or time.time()
    return max(0.0, retry_at - now)


def _timestamp(text: str) -> Optional[float]:
    """Seconds since 1970, from a date or from milliseconds since 1970. None if malformed."""
    # Dub sends milliseconds: apps/web/lib/auth/rate-limit-request.ts in github.com/dubinc/dub.
    if re.fullmatch("[0-9]{13}", text):
        return int(text) / 1000
    try:
        return float(calendar.timegm(parsedate_to_datetime(text).utctimetuple()))
    except Exception:  # The exception type varies by Python version.
        return None


# --- Connections ----------------------------------------------------------------------
class _KeepAliveHandler(BaseHandler):
    """A handler for urllib's opener that keeps connections open, for any thread to use."""

    def __init__(self, server: SplitResult, ssl_context: Optional[ssl.SSLContext]) -> None:
        # A deque needs no lock: its methods are atomic.
        self.idle: deque[_Connection] = deque()
        self.closed = False
        self.server = server
        self.picklable = ssl_context is None
        self.ssl_context: Any = ssl_context  # or https_open() makes one
        self.route = server.netloc
        self.proxy = _find_proxy(server)
        self.proxy_headers: dict[str, str] = {}
        if self.proxy is not None:
            login, _, address = self.proxy.netloc.rpartition("@")
            self.route += f" through the proxy {address} ({server.scheme}_proxy)"
            if login:
                basic = base64.b64encode(unquote_to_bytes(login)).decode()
                self.proxy_headers["Proxy-Authorization"] = "Basic " + basic

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and deepcopy of a Dub. The copy is open, and looks up the proxy anew."""
        if not self.picklable:
            raise TypeError("an SSLContext cannot be pickled")
        return _KeepAliveHandler, (self.server, None)

    def __del__(self) -> None:
        for connection in self.idle:
            connection.sock.close()

    def close(self) -> None:
        self.closed = True
        with suppress(IndexError):
            while True:
                self.idle.popleft().sock.close()

    def http_open(self, request: Request) -> addinfourl:
        """Send a request and read the response. Raises OSError."""
        # OpenerDirector.open sets request.timeout. `or 0` is for type checkers.
        deadline = time.monotonic() + (request.timeout or 0)
        headers = {"Host": self.server.netloc, **dict(request.header_items())}
        via_proxy = self.proxy is not None and self.server.scheme == "http"
        target = request.full_url if via_proxy else request.selector
        if via_proxy:
            headers.update(self.proxy_headers)
        response = self.fetch(_encode("GET", target, headers), deadline)
        if via_proxy and response.status == 407:
            raise PermissionError("the proxy requires a user name and password (407)")
        # Tools that patch urllib expect code, headers and url, which addinfourl has.
        body = io.BytesIO(response.body)
        return addinfourl(body, response.headers, request.full_url, response.status)

    def https_open(self, request: Request) -> addinfourl:
        if self.ssl_context is None:
            self.ssl_context = ssl.create_default_context()
        return self.http_open(request)

    def fetch(self, request: bytes, deadline: float) -> _Response:
        """Send a request over an idle connection or, if none is usable, over a new one."""
        connection = self.take_idle()
        if connection is not None:
            try:
                return self.fetch_over(connection, request, deadline)
            except OSError as error:
                if isinstance(error, _TIMEOUTS) or connection.stream.response_size > 0:
                    raise
                # Nothing since exchange() began: probably, the server had closed it. Use a new one.
        return self.fetch_over(self.connect(deadline), request, deadline)

    def take_idle(self) -> Optional[_Connection]:
        """Take the connection that is idle longest: this way, dead ones are found and closed."""
        with suppress(IndexError):
            while True:
                connection = self.idle.popleft()
                if connection.is_usable():
                    return connection
                connection.sock.close()
        return None

    def fetch_over(self, connection: _Connection, request: bytes, deadline: float) -> _Response:
        try:
            response = connection.exchange(request, deadline)
        except BaseException:
            connection.sock.close()
            raise
        if response.keep_alive and len(self.idle) < _MAX_IDLE_CONNECTIONS:
            self.idle.append(connection)
        else:
            connection.sock.close()
        # If close() ran meanwhile, it missed the connection just added.
        if self.closed:
            self.close()
        return response

    def connect(self, deadline: float) -> _Connection:
        """Connect to the server, through the proxy if there is one, with TLS if it is https."""
        next_hop = self.proxy or self.server
        port = next_hop.port or {"http": 80, "https": 443}[next_hop.scheme]
        sock = _create_connection(next_hop.hostname, port, deadline)
        try:
            if self.server.scheme == "http":
                return _Connection(sock)
            if self.proxy is not None:
                self.open_tunnel(sock, deadline)
            # Raises if the peer has reset it: before Python 3.13, wrap_socket() would leak it.
            sock.getpeername()
            sock = self.ssl_context.wrap_socket(
                sock,
                server_hostname=self.server.hostname,
                do_handshake_on_connect=False,
                # A connection that ends without TLS's close_notify was cut: raise an error.
                suppress_ragged_eofs=False,
            )
            _set_timeout(sock, deadline)
            # OpenSSL looks at the timeout only if it has to wait for data: a flood can exceed it.
            sock.do_handshake()
            return _Connection(sock)
        except BaseException:
            sock.close()
            raise

    def open_tunnel(self, sock: socket.socket, deadline: float) -> None:
        target = self.server.netloc
        if self.server.port is None:
            target += ":443"
        headers = {"Host": target, **self.proxy_headers}
        # Only the socket is used afterwards. TLS servers send nothing first, so no data is lost.
        response = _Connection(sock).exchange(_encode("CONNECT", target, headers), deadline)
        message = f"the proxy answered {response.status}"
        if response.status >= 500:
            raise ConnectionError(message)  # retried
        if response.status == 407:
            message += ": it requires a user name and password"
        if response.status >= 300:
            raise PermissionError(message)  # not retried


def _find_proxy(server: SplitResult) -> Optional[SplitResult]:
    """The proxy that is configured for the server. Raises ValueError if it is not supported."""
    url = getproxies().get(server.scheme)
    # The API key in a plain http request to loopback must not leave this machine.
    is_local = server.scheme == "http" and _is_loopback(server.hostname)
    if not url or is_local or proxy_bypass(server.netloc):
        return None
    url = url if "://" in url else "http://" + url
    pattern = f"http://({_URL_CHAR}*:({_URL_CHAR}|:)*@)?{_HOST_AND_PORT}/?"
    # The setting is not shown, because it may hold a password.
    expected = "http://[user:password@]host[:port] (not https: or socks5:)"
    return _split_url(f"{server.scheme}_proxy", url, pattern, expected)


def _create_connection(host: Optional[str], port: int, deadline: float) -> socket.socket:
    """Like socket.create_connection(), but with one deadline for all addresses."""
    *others, last = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for address in others:
        # Leave at least half of the time to the addresses after this one.
        seconds = min((deadline - time.monotonic()) / 2, _MAX_SECONDS_PER_ADDRESS)
        with suppress(OSError):
            return _connect_to(address, time.monotonic() + seconds)
    return _connect_to(last, deadline)


def _connect_to(address: tuple[Any, ...], deadline: float) -> socket.socket:
    """Connect to one of the addresses that getaddrinfo() returned."""
    family, kind, protocol, _, socket_address = address
    sock = socket.socket(family, kind, protocol)
    try:
        _set_timeout(sock, deadline)
        sock.connect(socket_address)
        # Disable Nagle's algorithm: it would delay the request after a TLS handshake.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except BaseException:
        sock.close()
        raise


def _set_timeout(sock: socket.socket, deadline: float) -> None:
    """Let the next operation wait until the deadline. Raises socket.timeout if it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise socket.timeout("the deadline has passed")
    sock.settimeout(left)


# --- HTTP/1.1 -------------------------------------------------------------------------
# Matches `HTTP/1.1 200 OK`. Groups: the minor version, the status, the reason.
_STATUS_LINE = re.compile(rf"HTTP/1\.([01]) ([1-9]\d\d)( {_HEADER_VALUE})?\r\n")
# Matches `Content-Type: application/json`, or the empty line at the end (groups: None).
_FIELD_LINE = re.compile(rf"(?:({_HEADER_NAME}):({_HEADER_VALUE}))?\r\n")
# Matches `1F;name=value`.
_CHUNK_SIZE_LINE = re.compile(rf"([\da-fA-F]{{1,8}})([ \t]*;{_HEADER_VALUE})?\r\n")


def _encode(method: str, target: str, headers: dict[str, str]) -> bytes:
    message = f"{method} {target} HTTP/1.1\r\n"
    for name, value in headers.items():
        message += name + ": " + value + "\r\n"
    return (message + "\r\n").encode("latin-1")


class _Response(NamedTuple):
    status: int
    headers: Message
    body: bytes
    keep_alive: bool


class _Stream(io.RawIOBase):
    """The incoming bytes of a socket as a raw file, with a deadline and a size limit."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline: Optional[float] = None  # None while is_usable() peeks
        self.response_size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.deadline is not None:
            _set_timeout(self.sock, self.deadline)
        size = self.sock.recv_into(buffer)
        self.response_size += size
        if self.response_size > _MAX_RESPONSE_BYTES:
            raise ConnectionError("the response exceeds 1 MiB")
        return size


class _Connection:
    """An HTTP/1.1 connection (RFC 9112). It replaces http.client, which is lenient about where a
    response ends: leftover bytes could be read as the next response, with the wrong customer.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.stream = _Stream(sock)
        self.reader = io.BufferedReader(self.stream, 65536)
        self.pid = os.getpid()

    def exchange(self, request: bytes, deadline: float) -> _Response:
        self.stream.deadline = deadline
        self.stream.response_size = 0
        # Not sendall(): over TLS, it would apply the timeout to each part.
        unsent = request
        while unsent:
            _set_timeout(self.sock, deadline)
            unsent = unsent[self.sock.send(unsent) :]
        status, headers, keep_alive = self.read_head()
        encodings = headers.get_all("Transfer-Encoding", [])
        lengths = headers.get_all("Content-Length", [])
        body = b""
        if status in (204, 304) or request.startswith(b"CONNECT"):
            # No body is expected. Not reusable, in case one comes. (open_tunnel() ignores this.)
            keep_alive = False
        elif encodings + lengths:
            body = self.read_body(encodings, lengths)
        else:
            keep_alive = False  # The body ends with the stream.
            body = self.reader.read()
        self.idle_since = time.time()
        return _Response(status, headers, body, keep_alive)

    def read_head(self) -> tuple[int, Message, bool]:
        """Read the status line and the headers, after any interim responses (1xx)."""
        keep_alive = True
        while True:
            match = self.read_line(_STATUS_LINE)
            status = int(match[2])
            headers = self.read_fields()
            options = ",".join(headers.get_all("Connection", [])).lower()
            if match[1] == "0" or "close" in re.findall("[^, \t]+", options):
                keep_alive = False
            if status >= 200:
                return status, headers, keep_alive

    def read_fields(self) -> Message:
        """Read header or trailer fields, up to and including the empty line after them."""
        fields = Message()
        while True:
            name, value = self.read_line(_FIELD_LINE).groups()
            if name is None:
                return fields
            fields[name] = value.strip(" \t")

    def read_line(self, pattern: re.Pattern[str]) -> re.Match[str]:
        line = self.reader.readline().decode("latin-1")
        match = pattern.fullmatch(line)
        if match is None:
            raise ConnectionError(f"malformed or incomplete response: {line[:40]!r}")
        return match

    def read_body(self, encodings: list[str], lengths: list[str]) -> bytes:
        if not lengths and [each.lower() for each in encodings] == ["chunked"]:
            return self.read_chunks()
        # Several lengths do not match, because a comma joins them.
        if not encodings and re.fullmatch("[0-9]{1,20}", ",".join(lengths)):
            return self.read(int(lengths[0]))
        raise ConnectionError("malformed response: unclear where its body ends")

    def read_chunks(self) -> bytes:
        chunks: list[bytes] = []
        while True:
            size = int(self.read_line(_CHUNK_SIZE_LINE)[1], 16)
            if size == 0:
                self.read_fields()
                return b"".join(chunks)
            chunks.append(self.read(size))
            if self.read(2) != b"\r\n":
                raise ConnectionError("malformed response: a chunk exceeds its size")

    def read(self, size: int) -> bytes:
        """Read exactly `size` bytes. Check the size first, as self.reader allocates that much."""
        if size > _MAX_RESPONSE_BYTES:
            raise ConnectionError("the response exceeds 1 MiB")
        data = self.reader.read(size)
        if len(data) < size:
            raise ConnectionError("the response ended too early")
        return data

    def is_usable(self) -> bool:
        """Whether another request can be sent, by this process."""
        # The monotonic clock may stop while the machine sleeps. The wall clock may be set back.
        idle_seconds = abs(time.time() - self.idle_since)
        if idle_seconds > _MAX_IDLE_SECONDS or self.pid != os.getpid():
            return False
        # A usable connection has nothing to read, so that peek() raises "would block". If peek()
        # returns, there is unsolicited data, or the server has closed the connection.
        self.stream.deadline = None
        self.sock.setblocking(False)
        try:
            self.reader.peek(1)
            return False
        except OSError as error:
            return isinstance(error, (BlockingIOError, ssl.SSLWantReadError))


# --- Responses ------------------------------------------------------------------------
_ERRORS = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: InviteExpired,
    422: UnprocessableEntity,
    429: RateLimitExceeded,
    500: InternalServerError,
}


def _parse_response(response: addinfourl) -> Customer:
    """The customer in a response. Raises APIError or ResponseValidationError."""
    status = response.code or 0
    # Not response.read(), which addinfourl wraps anew each time: that takes a tenth of a call.
    body = response.fp.read()
    response.close()
    data: Any = None
    with suppress(ValueError, RecursionError):
        data = json.loads(body.decode("utf-8-sig"))  # maybe with a byte order mark
    if status == 200 and data is not None:
        try:
            return Customer.from_json(data)
        except ResponseValidationError as error:
            error.body = body
            raise
    start = _short_line(body[:100].decode(errors="replace"))
    if 200 <= status < 300:
        kind = response.headers.get("Content-Type")
        encoding = response.headers.get("Content-Encoding")
        message = f"got status {status}, type {kind}, encoding {encoding}: {start!r}"
        raise ResponseValidationError("expected a customer, " + message, body=body)
    raise _api_error(status, response.headers, body, data, start)


def _api_error(status: int, headers: Message, body: bytes, data: Any, start: str) -> APIError:
    details = {}
    # Dub sends {"error": {"code": ..., "message": ..., "doc_url": ...}}. Ignore other shapes.
    with suppress(LookupError, TypeError, AttributeError):
        fields = data["error"].items()
        details = {key: value for key, value in fields if isinstance(value, str)}
    message = details.get("message") or start or "the server sent no message"
    if 300 <= status < 400 and "Location" in headers:
        message = f"redirect to {headers['Location']} not followed"
    error_class = _ERRORS.get(status, APIError)
    error = error_class(message, status, details.get("code"), details.get("doc_url"), headers, body)
    if status in (429, 503):
        error.retry_after = _parse_retry_after(headers)
    return error


def _short_line(text: str) -> str:
    """At most 300 characters of the text, without line breaks and control characters."""
    printable = "".join(char if char.isprintable() else " " for char in text[:300])
    return " ".join(printable.split())


# --- Command line ---------------------------------------------------------------------
_EXAMPLE = b"""{
"id": "cus_1KAP4CDPBSVMMBMH9XX3YZZ0Z", "externalId": "user_42", "name": "Ada Lovelace",
"sales": 3, "saleAmount": 12900, "createdAt": "2026-01-02T03:04:05.000Z",
"link": {"id": "link_1", "domain": "dub.sh", "key": "try",
         "shortLink": "https://dub.sh/try", "url": "https://dub.co"},
"partner": {"id": "pn_1", "name": "Grace Hopper"},
"discount": {"id": "disc_1", "amount": 20, "type": "percentage"}
}"""


def _main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Print a customer as JSON. Set DUB_API_KEY.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("id", nargs="?", help="cus_..., or ext_ and an external id")
    source.add_argument("--demo", action="store_true", help="print an example")
    parser.add_argument("--expand", action="store_true", help="add link, partner, discount")
    parser.add_argument("--server-url", default="https://api.dub.co")
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args()
    try:
        if options.demo:
            customer = _demo()
        else:
            client = Dub(server_url=options.server_url)
            customer = client.customers.get(options.id, include_expanded_fields=options.expand)
        print(json.dumps(customer.raw, indent=2))
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT
    except Exception as error:
        sys.exit(f"error: {error}")


def _demo() -> Customer:
    """Try the whole client without an API key: retrieve an example from a local server."""
    import http.server
    import socketserver
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + _EXAMPLE)

    # Not http.server.HTTPServer, which does a host name lookup that can be slow.
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with Dub("dub_demo", server_url=url) as client:
            return client.customers.get("ext_user_42")


if __name__ == "__main__":
    _main()
