# SPDX-License-Identifier: 0BSD
"""Retrieve a customer from the Dub API as a typed object: one file, for Python 3.8 and up.

    from dub_customers import Dub, DubError, NotFound

    with Dub() as client:  # reads the API key from the environment variable DUB_API_KEY
        try:
            print(client.customers.get("ext_42", include_expanded_fields=True))
        except NotFound:
            print("there is no such customer")
        except DubError as error:  # the base class of API and network errors
            print("failed:", error)

API reference: https://dub.co/docs/api-reference/endpoint/retrieve-a-customer
To update a copy of this file, replace the whole file.
"""

from __future__ import annotations

import base64
import calendar
import collections.abc
import contextlib
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
from collections import deque
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, Callable, Mapping, NamedTuple, Optional, TypedDict, TypeVar, Union
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import BaseHandler, OpenerDirector, Request, getproxies, proxy_bypass
from urllib.response import addinfourl

__version__ = "1.2.0"

__all__ = [
    "APIError", "BadRequest", "Conflict", "Customer", "Customers", "Discount", "Dub",
    "DubError", "Forbidden", "GetCustomerRequest", "InternalServerError", "InviteExpired",
    "Link", "NoResponseError", "NotFound", "Partner", "RateLimitExceeded", "RequestTimeout",
    "ResponseValidationError", "Unauthorized", "UnprocessableEntity",
]  # fmt: skip

# Each retry waits a random time up to a limit, which doubles. A random extra is also added to
# Retry-After, so that clients do not all retry at the same moment.
_FIRST_BACKOFF_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 8
_MAX_RETRY_AFTER_SPREAD_SECONDS = 4
# Connect timeout for each resolved address but the last, so that broken IPv6 cannot use up
# all the time.
_MAX_CONNECT_SECONDS = 3
# Firewalls silently drop connections that are idle for minutes.
_MAX_IDLE_SECONDS = 60
# One for each thread of a ThreadPoolExecutor of the default size (at most 32).
_MAX_IDLE_CONNECTIONS = 32
_MAX_RESPONSE_BYTES = 1024 * 1024  # a response usually has 2 to 100 kB

# What a socket raises when an operation times out. With a timeout of 0 (non-blocking), it is
# BlockingIOError or SSLWantReadError.
_TIMEOUTS = (
    TimeoutError,
    socket.timeout,  # an alias of TimeoutError since Python 3.10
    BlockingIOError,
    ssl.SSLWantReadError,
)


# --- Errors ---------------------------------------------------------------------------
class DubError(Exception):
    """Base class of all API and network errors. Misuse raises TypeError or ValueError."""

    def __str__(self) -> str:
        return _one_line(super().__str__())


class APIError(DubError):
    """The response has a status other than 2xx. The subclass depends on the status.

    status_code: the HTTP status. Statuses without a subclass, such as 502, raise APIError.
    code, message, doc_url: see https://dub.co/docs/api-reference/errors. Without a message
        from Dub, `message` is the start of the body. `code` and `doc_url` may be None.
    headers: an `email.message.Message`. body: the content of the response.
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
        super().__init__(message)
        self.message = message
        self.status_code = status_code
        self.code = code
        self.doc_url = doc_url
        self.headers = headers or Message()
        self.body = body

    def __str__(self) -> str:
        status = str(self.status_code)
        if self.code:
            status += " " + self.code
        return _one_line(f"{status}: {self.message}")


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
    """429. `retry_after`: seconds to wait after the response came, or None."""

    retry_after: Optional[float] = None


class InternalServerError(APIError):
    """500: the server failed."""


class NoResponseError(DubError):
    """No complete, valid response: the network, TLS or a proxy failed. See `__cause__`."""


class RequestTimeout(NoResponseError, TimeoutError):
    """The call took longer than `timeout_ms`. (Status 408 is a plain APIError.)"""


class ResponseValidationError(DubError):
    """The response has status 2xx, but its content (`body`) is not a valid customer."""

    def __init__(self, message: str = "", *, body: bytes = b"") -> None:
        super().__init__(message)
        self.body = body


# --- Models ---------------------------------------------------------------------------
_JSON_NAMES: dict[type, str] = {
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    dict: "object",
    list: "array",
    type(None): "null",
}
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


def _mismatch(path: str, expected: str, value: object) -> ResponseValidationError:
    got = _JSON_NAMES.get(type(value), type(value).__name__)
    if got == expected:  # NaN and Infinity are numbers to Python: show them
        got = str(value)
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
class _RequiredKeys(TypedDict):  # typing.Required needs Python 3.11
    id: str


class GetCustomerRequest(_RequiredKeys, total=False):
    """The `request` of `customers.get`. `include_expanded_fields` may be left out."""

    include_expanded_fields: Optional[bool]


class Dub:
    """A client for the Dub API: `client.customers.get(...)` retrieves a customer.

    token: an API key, or a function that returns one and is called before each request.
        If it is None, the key is read from the environment variable DUB_API_KEY.
    server_url: http(s)://host[:port][/path]. Plain http emits a warning, except to loopback.
    timeout_ms: the longest that a call may take, in milliseconds, retries included. It
        cannot interrupt name resolution, a token function, or OpenSSL while a server floods
        it with handshake messages.
    max_retries: how many times a failed request may be sent again.
    ssl_context: used in place of `ssl.create_default_context()`.

    Raises TypeError or ValueError if an argument is invalid. A proxy is looked up when the
    client is created, as urllib does it: in the environment (`https_proxy`) or the system's
    settings.

    Threads can share a client. It can be used after a fork. A pickle contains the token; a
    client with an `ssl_context` cannot be pickled. `close()` or the end of `with` closes its
    connections.
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
            if "DUB_API_KEY" not in os.environ:
                raise ValueError("no API key: set it with `export DUB_API_KEY=dub_xxx`")
            token = _checked_token("DUB_API_KEY", os.environ["DUB_API_KEY"])
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
        # see them. A redirect handler, which it lacks, would send the token to another host.
        self._opener = OpenerDirector()
        self._opener.add_handler(self._handler)
        # add_handler() sets handler.parent, which nothing here uses. Delete it to break the
        # reference cycle: then dropping the client closes its connections and frees its
        # SSLContext at once.
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


# Customers uses private attributes of Dub.
# pyright: reportPrivateUsage=false
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

        Raises a DubError: an APIError (NotFound, RateLimitExceeded, ...) if the server sends
        an error, a NoResponseError if there is no response (RequestTimeout if it takes too
        long), or a ResponseValidationError if the response is not a customer. Raises
        TypeError or ValueError for an invalid argument, RuntimeError if the client is
        closed, and whatever a token function raises.
        """
        client = self._client
        path = _customer_path(id, include_expanded_fields, request)
        headers = _checked_headers(http_headers or {})
        timeout_ms = client._timeout_ms if timeout_ms is None else timeout_ms
        max_retries = client._max_retries if max_retries is None else max_retries
        _check_limits(timeout_ms, max_retries)
        if client._handler.closed:
            raise RuntimeError("the client is closed")
        deadline = time.monotonic() + timeout_ms / 1000
        retries_left = max_retries
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
                if delay is None or retries_left == 0:
                    raise
            time.sleep(delay)
            retries_left -= 1
            backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)

    def _send(self, request: Request, timeout_ms: float, deadline: float) -> addinfourl:
        """Send a request once, and log it. Raises NoResponseError."""
        started = time.monotonic()
        outcome = "interrupted"
        try:
            response: addinfourl = self._client._opener.open(request, timeout=deadline - started)
            outcome = str(response.code)
            return response
        except OSError as error:
            outcome = str(error)
            message = f"no valid response from {self._client._handler.route}"
            if isinstance(error, _TIMEOUTS):
                raise RequestTimeout(f"{message} in time (timeout_ms={timeout_ms})") from error
            message += f": {error}"
            if isinstance(error, ssl.SSLCertVerificationError):
                message += "; use SSL_CERT_FILE or ssl_context to trust another authority"
            raise NoResponseError(message) from error
        finally:
            milliseconds = (time.monotonic() - started) * 1000
            logger = logging.getLogger(__name__)
            logger.debug("GET %s: %s, %.1f ms", request.selector, outcome, milliseconds)


# --- Everything below is private ------------------------------------------------------
#
# The path of a call:
#   Customers.get                 checks the arguments; makes a Request; retries
#   Customers._send               sends it once; logs it; raises NoResponseError
#   OpenerDirector.open           urllib's; calls http_open or https_open of its handler
#   _KeepAliveHandler.http_open   takes an idle connection or makes a new one
#   _Connection.exchange          sends the request, reads the response
# Then Customers.get calls _parse_response, which makes a Customer or an error.


# --- Arguments ------------------------------------------------------------------------
_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": f"dub_customers/{__version__} (Python)",
}
# Headers that affect the framing of messages, the connection or the proxy.
_RESERVED_HEADERS = ("connection", "content-length", "transfer-encoding", "proxy-authorization")
_HEADER_NAME = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # such as Content-Type
_HEADER_VALUE = r"[\t -~\x80-\xff]*"  # no control characters but the tab


def _check_type(name: str, value: Any, *types: type) -> None:
    # Reject bool where int is expected: it is a subclass.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        expected = " or ".join(each.__name__ for each in types)
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def _checked_token(name: str, token: str) -> str:
    _check_type(name, token, str)
    if not re.fullmatch("[!-~]+", token):  # visible ASCII
        raise ValueError(
            f"{name} is empty or contains a space, a line break or a non-ASCII character"
        )
    return token


def _check_limits(timeout_ms: Any, max_retries: Any) -> None:
    _check_type("timeout_ms", timeout_ms, int, float)
    if not 0 < timeout_ms < 2**31:  # poll() takes milliseconds as a C int
        raise ValueError("timeout_ms: expected more than 0 and less than 2**31")
    _check_type("max_retries", max_retries, int)
    if max_retries < 0:
        raise ValueError("max_retries: expected 0 or more")


def _checked_headers(http_headers: Mapping[str, str]) -> dict[str, str]:
    _check_type("http_headers", http_headers, collections.abc.Mapping)
    headers = dict(http_headers)
    for name, value in headers.items():
        _check_type(f"http_headers: the value of {name!r}", value, str)
        if not re.fullmatch(_HEADER_NAME, name) or name.lower() in _RESERVED_HEADERS:
            raise ValueError(f"http_headers: {name!r} is invalid or reserved")
        if not re.fullmatch(_HEADER_VALUE, value):
            raise ValueError(f"http_headers: {name} has a control character or is not Latin-1")
    return headers


def _customer_path(id: Any, include_expanded_fields: Any, request: Any) -> str:
    if request is not None:
        if id is not None or include_expanded_fields is not None:
            raise TypeError("pass either request, or id and include_expanded_fields")
        _check_type("request", request, collections.abc.Mapping)
        for key in request:
            if key not in ("id", "include_expanded_fields"):
                raise TypeError(f"request: unexpected key {key!r}")
        id = request.get("id")
        include_expanded_fields = request.get("include_expanded_fields")
    _check_type("id", id, str)
    # Servers resolve "." and ".." even when encoded. After "ext_", a part is missing. Lone
    # surrogates cannot be encoded.
    if id in ("", ".", "..", "ext_") or re.search("[\ud800-\udfff]", id):
        raise ValueError(f"id: empty, incomplete or not valid Unicode: {id[:99]!r}")
    # Encode dots, or Dub's server (Next.js) would strip a final ".rsc".
    path = "/customers/" + quote(id, safe="").replace(".", "%2E")
    if include_expanded_fields is not None:
        _check_type("include_expanded_fields", include_expanded_fields, bool)
        value = str(include_expanded_fields).lower()
        path += f"?includeExpandedFields={value}"
    return path


def _split_server_url(server_url: Any) -> SplitResult:
    _check_type("server_url", server_url, str)
    parts = _split_url(server_url.rstrip("/"))
    if parts and parts.scheme in ("http", "https") and "@" not in parts.netloc:
        return parts
    message = "server_url: expected http(s)://host[:port][/path]"
    if "@" not in server_url:  # A URL with "@" may hold a password.
        message += f", got {server_url[:99]!r}"
    raise ValueError(message)


def _split_url(url: str) -> Optional[SplitResult]:
    """Split a URL. Returns None if it is malformed, or has a query or a fragment."""
    # Reject queries, fragments and anything but visible ASCII.
    if re.search("[?#]|[^!-~]", url):
        return None
    try:
        parts = urlsplit(url)
        if parts.port == 0:
            return None
    except ValueError:
        # The port is not a number up to 65535, or the brackets do not match.
        return None
    # api.dub.co
    hostname = r"[\w-]{1,63}(\.[\w-]{1,63})*\.?"
    # [2001:db8::1], [::ffff:192.0.2.1]
    ipv6 = r"\[[\da-fA-F:]{2,45}(\.\d+){0,3}\]"
    # A proxy's URL may have user:password@ before the host.
    host_and_port = parts.netloc.rpartition("@")[2]
    return parts if re.fullmatch(rf"({hostname}|{ipv6})(:\d+)?", host_and_port) else None


def _is_loopback(host: Optional[str]) -> bool:
    # localhost, ::1 in any spelling, 127.0.0.1
    return bool(re.fullmatch(r"localhost\.?|[0:]+:0*1|127(\.[0-9]{1,3}){3}", host or ""))


# --- Retries --------------------------------------------------------------------------
def _retry_delay(error: DubError, backoff: float, deadline: float) -> Optional[float]:
    """How many seconds to wait before the next try. None if there should be no next try."""
    # Do not retry timeouts, untrusted certificates, or a refusal by the proxy, which is a
    # PermissionError.
    if isinstance(error.__cause__, (*_TIMEOUTS, ssl.SSLCertVerificationError, PermissionError)):
        return None
    retry_after = 0.0
    if isinstance(error, APIError):
        if error.status_code not in (408, 429, 500, 502, 503, 504):
            return None
        if error.status_code in (429, 503):
            retry_after = _parse_retry_after(error.headers) or 0.0
    # Jitter: up to the backoff, or up to Retry-After (at most 4 s) if that is longer.
    spread = max(backoff, min(retry_after, _MAX_RETRY_AFTER_SPREAD_SECONDS))
    # Assume the longest wait, so that the decision to retry is not random.
    if time.monotonic() + retry_after + spread >= deadline:
        return None
    return retry_after + random.uniform(0, spread)


def _parse_retry_after(headers: Message) -> Optional[float]:
    """The header Retry-After in seconds from now, or None if it is missing or malformed.

    It is a number of seconds, a date, or Dub's own form, milliseconds since 1970: see
    apps/web/lib/auth/rate-limit-request.ts in https://github.com/dubinc/dub.
    """
    value = headers.get("Retry-After", "")
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    retry_at = _timestamp(value)
    if re.fullmatch("[0-9]{13}", value):  # milliseconds
        retry_at = int(value) / 1000
    if retry_at is None:
        return None
    # Prefer the server's clock, in case this machine's is wrong.
    now = _timestamp(headers.get("Date", ""))
    if now is None:
        now = time.time()
    return max(0.0, retry_at - now)


def _timestamp(date: str) -> Optional[float]:
    """Seconds since 1970 for a date like `Sun, 06 Nov 1994 08:49:37 GMT`. None if malformed."""
    try:
        return float(calendar.timegm(parsedate_to_datetime(date).utctimetuple()))
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
        self.user_ssl_context = ssl_context  # for __reduce__
        self.active_ssl_context = ssl_context  # connect() creates it if it is None.
        self.route = server.netloc  # for error messages
        self.proxy = _find_proxy(server)
        self.proxy_headers: dict[str, str] = {}
        if self.proxy is not None:
            credentials, _, address = self.proxy.netloc.rpartition("@")
            self.route += f" through the proxy {address} ({server.scheme}_proxy)"
            if credentials:
                user, _, password = credentials.partition(":")
                basic = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode())
                self.proxy_headers["Proxy-Authorization"] = f"Basic {basic.decode()}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickling or deep-copying a client yields an open one without connections."""
        if self.user_ssl_context is not None:
            raise TypeError("a client with an ssl_context (SSLContext) cannot be pickled")
        return _KeepAliveHandler, (self.server, None)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True
        for connection in self.pop_idle():
            connection.sock.close()

    def pop_idle(self) -> collections.abc.Iterator[_Connection]:
        """Remove and yield idle connections one by one, oldest first, to weed out stale ones."""
        while True:
            try:
                connection = self.idle.popleft()
            except IndexError:  # none left
                return
            yield connection

    def http_open(self, request: Request) -> addinfourl:
        """Send a request and read the response. Raises OSError."""
        # OpenerDirector.open sets request.timeout. `or 0` is for type checkers.
        deadline = time.monotonic() + (request.timeout or 0)
        headers = {"Host": self.server.netloc, **dict(request.header_items())}
        target = request.selector
        if self.proxy is not None and self.server.scheme == "http":
            target = request.full_url
            headers.update(self.proxy_headers)
        response = self.fetch(_encode("GET", target, headers), deadline)
        # This is what urllib's own handlers return, and what instrumentation expects.
        return addinfourl(
            io.BytesIO(response.body), response.headers, request.full_url, response.status
        )

    # OpenerDirector finds http_open and https_open by name.
    https_open = http_open

    def fetch(self, request: bytes, deadline: float) -> _Response:
        """Send a request over an idle connection or, if none is usable, over a new one."""
        for connection in self.pop_idle():
            if not connection.is_usable():
                connection.sock.close()
                continue
            try:
                return self.fetch_over(connection, request, deadline)
            except OSError as error:
                if isinstance(error, _TIMEOUTS) or connection.stream.received > 0:
                    raise
                # The server probably closed the connection before it saw the request. Use a
                # new connection, without spending a retry.
                break
        return self.fetch_over(self.connect(deadline), request, deadline)

    def fetch_over(self, connection: _Connection, request: bytes, deadline: float) -> _Response:
        """Send a request over this connection, then keep or close the connection."""
        try:
            response = connection.exchange(request, deadline)
        except BaseException:
            connection.sock.close()
            raise
        if response.keep_alive and len(self.idle) < _MAX_IDLE_CONNECTIONS:
            connection.idle_since = time.time()
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
            if self.server.scheme == "https":
                if self.proxy is not None:
                    self.open_tunnel(sock, deadline)
                if self.active_ssl_context is None:
                    self.active_ssl_context = ssl.create_default_context()
                # suppress_ragged_eofs=False, because an end of the stream without a close_notify
                # may be a truncation attack.
                sock = self.active_ssl_context.wrap_socket(
                    sock,
                    server_hostname=self.server.hostname,
                    do_handshake_on_connect=False,
                    suppress_ragged_eofs=False,
                )
                _set_timeout(sock, deadline)
                sock.do_handshake()
            return _Connection(sock)
        except BaseException:
            sock.close()
            raise

    def open_tunnel(self, sock: socket.socket, deadline: float) -> None:
        """Ask the proxy for a tunnel to the server."""
        target = self.server.netloc
        if self.server.port is None:
            target += ":443"
        # `tunnel` only reads the proxy's reply. Dropping it does not close the socket, and what
        # it may have read too much is not from the server, which waits for the TLS handshake.
        tunnel = _Connection(sock)
        headers = {"Host": target, **self.proxy_headers}
        tunnel.send(_encode("CONNECT", target, headers), deadline)
        response = tunnel.read_head()
        if 200 <= response.status < 300:
            return
        message = f"the proxy answered {response.status}"
        if response.status == 407:
            message += ": the user name or password is missing or wrong"
        if response.status >= 500:
            raise ConnectionError(message)  # retried
        raise PermissionError(message)  # not retried: see _retry_delay


def _find_proxy(server: SplitResult) -> Optional[SplitResult]:
    """The proxy that is configured for the server. Raises ValueError if it is not supported."""
    if server.scheme == "http" and _is_loopback(server.hostname):
        return None  # Do not send unencrypted loopback requests to a proxy.
    url = getproxies().get(server.scheme)
    if not url or proxy_bypass(server.netloc):
        return None
    if "://" not in url:
        url = "http://" + url
    proxy = _split_url(url)
    if proxy and proxy.scheme == "http" and proxy.path in ("", "/"):
        return proxy
    # The setting is not shown, because it may hold a password.
    raise ValueError(
        f"{server.scheme}_proxy: expected http://[user:password@]host[:port]; "
        "proxies of other kinds, such as https: and socks5:, are not supported"
    )


def _create_connection(host: Optional[str], port: int, deadline: float) -> socket.socket:
    """Like socket.create_connection(), but with one deadline for all addresses."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    while addresses:
        family, kind, protocol, _, address = addresses.pop(0)
        timeout = deadline - time.monotonic()
        if addresses:  # Keep at least half of the time for the remaining ones.
            timeout = min(timeout / 2, _MAX_CONNECT_SECONDS)
        try:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(max(0, timeout))
                sock.connect(address)
                # Disable Nagle's algorithm: it would delay the request after a TLS handshake.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except BaseException:
                sock.close()
                raise
        except OSError:
            # Go on with the next address, if there is one.
            if not addresses:
                raise
    raise OSError(f"{host} has no address")


def _set_timeout(sock: socket.socket, deadline: float) -> None:
    """Let the next operation wait until the deadline. If that is 0, do not wait."""
    left = deadline - time.monotonic()
    if deadline > 0 and left <= 0:
        raise socket.timeout("the deadline has passed")
    sock.settimeout(max(0, left))


# --- HTTP/1.1 -------------------------------------------------------------------------
# Matches `HTTP/1.1 200 OK`.
_STATUS_LINE = re.compile(rf"HTTP/1\.([01]) ([1-9][0-9][0-9])( {_HEADER_VALUE})?\r\n".encode())
# Matches `Content-Type: application/json`, or the empty line at the end (groups: None).
_FIELD_LINE = re.compile(rf"(?:({_HEADER_NAME}):({_HEADER_VALUE}))?\r\n".encode())
# Matches `1F;name=value`.
_CHUNK_SIZE_LINE = re.compile(rf"([0-9A-Fa-f]{{1,8}})([ \t]*;{_HEADER_VALUE})?\r\n".encode())


def _encode(method: str, target: str, headers: dict[str, str]) -> bytes:
    message = f"{method} {target} HTTP/1.1\r\n"
    for name, value in headers.items():
        message += name + ": " + value + "\r\n"
    return (message + "\r\n").encode("latin-1")


class _Response(NamedTuple):
    status: int
    headers: Message
    keep_alive: bool
    body: bytes = b""


class _Stream(io.RawIOBase):
    """The incoming bytes of a socket as a raw file, with a deadline and a size limit."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline = 0.0  # 0: do not wait
        self.received = 0  # bytes of the current response

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        _set_timeout(self.sock, self.deadline)
        size = self.sock.recv_into(buffer)
        self.received += size
        if self.received > _MAX_RESPONSE_BYTES:
            raise ConnectionError("the response is larger than 1 MiB")
        return size


class _Connection:
    """An HTTP/1.1 connection (RFC 9112).

    Unlike http.client, it is strict about where a response ends. Otherwise leftover bytes
    could be read as the next response, and the wrong customer returned.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.stream = _Stream(sock)
        self.reader = io.BufferedReader(self.stream, 65536)
        self.pid = os.getpid()
        self.idle_since = 0.0

    def exchange(self, request: bytes, deadline: float) -> _Response:
        self.send(request, deadline)
        response = self.read_head()
        # 204 and 304 have no body. In case one was sent anyway, do not reuse the connection.
        if response.status in (204, 304):
            return response._replace(keep_alive=False)
        encodings = response.headers.get_all("Transfer-Encoding", [])
        lengths = response.headers.get_all("Content-Length", [])
        if not encodings and not lengths:  # The body ends with the stream.
            return response._replace(body=self.reader.read(), keep_alive=False)
        return response._replace(body=self.read_body(encodings, lengths))

    def send(self, request: bytes, deadline: float) -> None:
        self.stream.deadline = deadline
        self.stream.received = 0
        while request:
            _set_timeout(self.sock, deadline)
            size = self.sock.send(request)
            request = request[size:]

    def read_head(self) -> _Response:
        """Read the status line and the headers, after any interim responses (1xx)."""
        keep_alive = True
        while True:
            match = self.read_line(_STATUS_LINE)
            status = int(match[2])
            headers = self.read_fields()
            options = ",".join(headers.get_all("Connection", [])).lower()
            if match[1] == b"0" or "close" in re.findall("[^, \t]+", options):
                keep_alive = False
            if status >= 200:
                return _Response(status, headers, keep_alive)

    def read_fields(self) -> Message:
        """Read header or trailer fields, up to and including the empty line after them."""
        fields = Message()
        while True:
            name, value = self.read_line(_FIELD_LINE).groups()
            if name is None:
                return fields
            fields[name.decode()] = value.decode("latin-1").strip(" \t")

    def read_line(self, pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        line = self.reader.readline()
        match = pattern.fullmatch(line)
        if match is None:
            raise ConnectionError(f"malformed or incomplete response: {line[:40]!r}")
        return match

    def read_body(self, encodings: list[str], lengths: list[str]) -> bytes:
        if [each.lower() for each in encodings] == ["chunked"] and not lengths:
            return self.read_chunks()
        # exchange() ensures that there is an encoding or a length.
        if encodings or len(lengths) > 1 or not re.fullmatch("[0-9]{1,20}", lengths[0]):
            raise ConnectionError("malformed response: it is unclear where its body ends")
        return self.read(int(lengths[0]))

    def read_chunks(self) -> bytes:
        chunks: list[bytes] = []
        while True:
            size = int(self.read_line(_CHUNK_SIZE_LINE)[1], 16)
            if size == 0:
                self.read_fields()
                return b"".join(chunks)
            chunks.append(self.read(size))
            if self.read(2) != b"\r\n":
                raise ConnectionError("malformed response: a chunk exceeds its declared size")

    def read(self, size: int) -> bytes:
        """Read exactly `size` bytes."""
        if size > _MAX_RESPONSE_BYTES:
            raise ConnectionError("the response is larger than 1 MiB")
        data = self.reader.read(size)
        if len(data) < size:
            raise ConnectionError("the response ended too early")
        return data

    def is_usable(self) -> bool:
        """Whether another request can be sent, by this process."""
        # Wall-clock time, because the monotonic clock may stop while the machine sleeps. abs()
        # is for a clock that was set back.
        if abs(time.time() - self.idle_since) > _MAX_IDLE_SECONDS:
            return False
        if self.pid != os.getpid():
            return False
        # There must be nothing to read: data would be unsolicited, and an end of the stream means
        # that the server has closed. Then peek(), which does not wait, raises a timeout.
        self.stream.deadline = 0.0
        try:
            self.reader.peek(1)
        except _TIMEOUTS:
            return True  # There is nothing to read.
        except OSError:
            pass
        # There was data, the end of the stream, or an error.
        return False


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
    headers = response.headers
    # response.read() is slow, because addinfourl wraps it with tempfile.
    body = response.fp.read()
    if not 200 <= status < 300:
        raise _api_error(status, headers, body)
    data = _decode_json(body) if status == 200 else None
    if data is None:  # another 2xx status, invalid JSON, or null
        start = _one_line(body.decode("utf-8", "replace"), 100)
        raise ResponseValidationError(
            f"expected a customer, got status {status}, type {headers.get('Content-Type')}, "
            f"encoding {headers.get('Content-Encoding')}: {start!r}",
            body=body,
        )
    try:
        return Customer.from_json(data)
    except ResponseValidationError as error:
        error.body = body
        raise


def _api_error(status: int, headers: Message, body: bytes) -> APIError:
    details = {}
    # Dub sends {"error": {"code": ..., "message": ..., "doc_url": ...}}. Any other shape has no
    # details.
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        fields = _decode_json(body)["error"].items()
        details = {key: value for key, value in fields if isinstance(value, str)}
    start = _one_line(body.decode("utf-8", "replace"), 100)
    message = details.get("message") or start or "the server sent no message"
    if 300 <= status < 400 and "Location" in headers:
        message = f"redirect to {headers['Location']} not followed"
    # This is from a proxy for http. With https, open_tunnel() raises.
    if status == 407 and not details:
        message = "the user name or password for a proxy (http_proxy) is missing or wrong"
    error = _ERRORS.get(status, APIError)(
        message, status, details.get("code"), details.get("doc_url"), headers, body
    )
    if isinstance(error, RateLimitExceeded):
        error.retry_after = _parse_retry_after(headers)
    return error


def _decode_json(body: bytes) -> Any:
    """The decoded JSON, or None if it is not valid. There may be a byte order mark."""
    try:
        return json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _one_line(text: str, limit: int = 300) -> str:
    """The beginning of the text, without line breaks and other control characters."""
    printable = "".join(char if char.isprintable() else " " for char in text[:limit])
    return " ".join(printable.split())


# --- Command line ---------------------------------------------------------------------
_EXAMPLE = b"""{
"id": "cus_1KAP4CDPBSVMMBMH9XX3YZZ0Z", "externalId": "user_42", "name": "Ada Lovelace",
"email": "ada@example.com", "country": "GB", "sales": 3, "saleAmount": 12900,
"createdAt": "2026-01-02T03:04:05.000Z", "programId": "prog_1",
"link": {"id": "link_1", "domain": "dub.sh", "key": "try", "programId": "prog_1",
         "shortLink": "https://dub.sh/try", "url": "https://dub.co"},
"partner": {"id": "pn_1", "name": "Grace Hopper", "email": null, "image": null},
"discount": {"id": "disc_1", "amount": 20, "type": "percentage", "maxDuration": 12}
}"""


def _main() -> None:
    import argparse

    parser = argparse.ArgumentParser(
        description="Print a customer of your Dub workspace as JSON.",
        epilog="Example: DUB_API_KEY=dub_xxx python3 dub_customers.py ext_42 --expand. The exit"
        " status is 0 if the customer was printed, 1 after an error, 2 after a usage error.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("id", nargs="?", metavar="ID", help="cus_..., or ext_ and an external id")
    source.add_argument(
        "--demo", action="store_true", help="show an example, without using the network"
    )
    parser.add_argument("--expand", action="store_true", help="add link, partner and discount")
    parser.add_argument(
        "--server-url", default="https://api.dub.co", metavar="URL", help="default: %(default)s"
    )
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args()
    try:
        if options.demo:
            customer = _demo()
        else:
            with Dub(server_url=options.server_url) as client:
                # Without --expand, None omits the parameter.
                customer = client.customers.get(
                    options.id, include_expanded_fields=options.expand or None
                )
        _print(customer)
    except KeyboardInterrupt:
        sys.exit(130)  # how shells report Ctrl-C
    except (DubError, OSError, ValueError, RecursionError) as error:
        retry_after = getattr(error, "retry_after", None)
        wait = "" if retry_after is None else f" (wait {math.ceil(retry_after)} seconds)"
        sys.exit(f"error: {error}{wait}")


def _print(customer: Customer) -> None:
    if sys.stdout is None:
        raise OSError("standard output is closed")
    is_utf8 = sys.stdout.encoding.lower() == "utf-8"
    # Write through a second file object, so that a failed write is not reported again at exit.
    # Text is ASCII unless standard output is UTF-8. A lone surrogate becomes \udxxx, which is
    # how JSON escapes it.
    with open(
        sys.stdout.fileno(), "w", encoding="utf-8", errors="backslashreplace", closefd=False
    ) as file:
        print(json.dumps(customer.raw, indent=2, ensure_ascii=not is_utf8), file=file)


def _demo() -> Customer:
    """Retrieve an example from a server in this process."""
    import http.server
    import socketserver
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # An HTTP/1.0 body ends when the connection closes.
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + _EXAMPLE)

    # Not http.server.HTTPServer, which does a host name lookup that can be slow.
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with Dub("dub_demo", server_url=f"http://127.0.0.1:{server.server_address[1]}") as client:
            return client.customers.get("ext_user_42", include_expanded_fields=True)


if __name__ == "__main__":
    _main()
