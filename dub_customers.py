# SPDX-License-Identifier: 0BSD
"""Retrieve a customer from the Dub API as a typed object: one file, standard library only.

    from dub_customers import Dub

    with Dub() as client:  # the key is in DUB_API_KEY
        print(client.customers.get("ext_42", include_expanded_fields=True))

Origin: the project dub_customers, version below. A copy stands alone, and is replaced whole.
The API's own reference: https://dub.co/docs/api-reference/endpoint/retrieve-a-customer
"""

from __future__ import annotations  # X | None on 3.8; public hints are Optional, for get_type_hints

__version__ = "1.1.0"

import calendar
import collections.abc
import email.message
import email.utils
import json
import math
import os
import random
import re
import socket
import sys
import time
import urllib.request
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Optional, TypedDict, Union
from urllib.parse import SplitResult, quote, urlsplit

try:
    import ssl
except ImportError:  # a Python built without it: http works, https is an error that says so
    if TYPE_CHECKING:  # to a type checker, ssl is always the module
        raise
    ssl = None


# --- errors: what can go wrong, by status ---
class DubError(Exception):
    """Base of every error a call raises, except misuse (TypeError, ValueError, RuntimeError)."""


@dataclass(eq=False)
class APIError(DubError):
    """The server responded with a status other than 2xx, which alone chooses the subclass.

    code, message, doc_url: the server's words (https://dub.co/docs/api-reference/errors), or None.
        Without one of its own, the message is the reason and the first words of the body.
    headers: an email.message.Message, with names in upper or lower case. body: at most 1 MiB.
    """

    message: str = ""
    status_code: int = 0
    code: Optional[str] = None
    doc_url: Optional[str] = None
    headers: Mapping[str, str] = field(default_factory=lambda: {}, repr=False)  # dict: untyped
    body: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        code = f" {self.code}" if self.code else ""
        return _one_line(f"{self.status_code}{code}: {self.message}", 300)


class BadRequest(APIError):
    """400: the request is malformed."""


class Unauthorized(APIError):
    """401: the API key is missing or not valid."""


class Forbidden(APIError):
    """403: the key or the plan does not allow it; codes `forbidden` and `exceeded_limit`."""


class NotFound(APIError):
    """404: no such customer or workspace; `code` None: not from the API, check `server_url`."""


class Conflict(APIError):
    """409: codes `conflict` and `invite_pending`."""


class InviteExpired(APIError):
    """410: the invitation to the workspace has expired."""


class UnprocessableEntity(APIError):
    """422: Dub found its own response at odds with its schema; rarely the request."""


@dataclass(eq=False)
class RateLimitExceeded(APIError):
    """429. `retry_after`: seconds until the rate window ends, which is no promise, or None."""

    retry_after: Optional[float] = field(init=False)

    def __post_init__(self) -> None:
        self.retry_after = _retry_after(self.headers)


class InternalServerError(APIError):
    """500: the server failed."""


class NoResponseError(DubError):
    """No whole response, for want of a connection, TLS, a proxy or an end: see the message."""


class RequestTimeout(NoResponseError, TimeoutError):
    """`timeout_ms` ran out. The traceback of `__cause__` shows what was under way."""


class ResponseValidationError(DubError):
    """A 2xx response is not the customer promised. The message says where; `body` is its bytes."""

    def __init__(self, message: str = "", *, body: bytes = b"") -> None:
        super().__init__(message)
        self.body = body


# --- models: JSON to dataclass, by hand, one line per field ---
@dataclass(frozen=True)
class Link:
    """The short link that brought the customer."""

    id: str
    domain: str
    key: str
    short_link: str
    url: str
    program_id: Optional[str] = None

    @classmethod
    def from_json(cls, data: Any, path: str = "link") -> Link:
        """Map decoded JSON; `path` is its name in a ResponseValidationError."""
        get = _getter(data, path)
        return cls(
            id=get("id", str),
            domain=get("domain", str),
            key=get("key", str),
            short_link=get("shortLink", str),
            url=get("url", str),
            program_id=get("programId", str, None),
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
        """Map decoded JSON; `path` is its name in a ResponseValidationError."""
        get = _getter(data, path)
        return cls(
            id=get("id", str),
            name=get("name", str),
            email=get("email", str, None),
            image=get("image", str, None),
        )


@dataclass(frozen=True)
class Discount:
    """The customer's discount: `amount` per cent or cents, depending on `type` ("percentage" or
    "flat" so far), for `max_duration` months; 0 means once, None for ever."""

    id: str
    amount: Union[int, float]
    type: str
    max_duration: Union[int, float, None] = None
    description: Optional[str] = None
    coupon_id: Optional[str] = None
    coupon_test_id: Optional[str] = None
    partners_count: Union[int, float, None] = None

    @classmethod
    def from_json(cls, data: Any, path: str = "discount") -> Discount:
        """Map decoded JSON; `path` is its name in a ResponseValidationError."""
        get = _getter(data, path)
        return cls(
            id=get("id", str),
            amount=get("amount", int, float),
            type=get("type", str),
            max_duration=get("maxDuration", int, float, None),
            description=get("description", str, None),
            coupon_id=get("couponId", str, None),
            coupon_test_id=get("couponTestId", str, None),
            partners_count=get("partnersCount", int, float, None),
        )


@dataclass(frozen=True)
class Customer:
    """A customer. What the server sent as null or left out is None.

    `sale_amount` is in cents; times (`..._at`) are ISO 8601 strings in UTC. `link`, `program_id`,
    `partner` and `discount` come with `include_expanded_fields`. A customer without a name gets a
    new random one in each response. `raw` is the decoded JSON; `==`, `hash`, `repr` leave it out.
    """

    id: str
    external_id: str
    created_at: str
    name: Optional[str] = None
    email: Optional[str] = None
    avatar: Optional[str] = None
    stripe_customer_id: Optional[str] = None
    country: Optional[str] = None
    sales: Union[int, float, None] = None
    sale_amount: Union[int, float, None] = None
    first_sale_at: Optional[str] = None
    subscription_canceled_at: Optional[str] = None
    link: Optional[Link] = None
    program_id: Optional[str] = None
    partner: Optional[Partner] = None
    discount: Optional[Discount] = None
    raw: Mapping[str, Any] = field(default_factory=lambda: {}, repr=False, compare=False)

    @classmethod
    def from_json(cls, data: Any, path: str = "customer") -> Customer:
        """Map decoded JSON; `path` is its name in a ResponseValidationError."""
        get = _getter(data, path)
        return cls(
            id=get("id", str),
            external_id=get("externalId", str),
            created_at=get("createdAt", str),
            name=get("name", str, None),
            email=get("email", str, None),
            avatar=get("avatar", str, None),
            stripe_customer_id=get("stripeCustomerId", str, None),
            country=get("country", str, None),
            sales=get("sales", int, float, None),
            sale_amount=get("saleAmount", int, float, None),
            first_sale_at=get("firstSaleAt", str, None),
            subscription_canceled_at=get("subscriptionCanceledAt", str, None),
            link=get("link", Link, None),
            program_id=get("programId", str, None),
            partner=get("partner", Partner, None),
            discount=get("discount", Discount, None),
            raw=data,
        )


_JSON_NAMES: dict[Any, str] = {str: "string", int: "number", float: "number", bool: "boolean"}
_JSON_NAMES.update({dict: "object", list: "array", type(None): "null"})


def _getter(data: Any, path: str) -> Callable[..., Any]:
    """A function that gets a field of a decoded object, if it is one of the kinds given."""
    name = _JSON_NAMES.get(data.__class__, data.__class__.__name__)
    if name != "object":
        raise ResponseValidationError(f"{path}: expected object, got {name}")

    def get(key: str, *kinds: Any) -> Any:
        value: Any = data.get(key)
        kind = value.__class__  # compared exactly, since to Python true is an int
        if kind in kinds and (kind is not float or math.isfinite(value)):
            return value
        if value is None and None in kinds:
            return None
        if kinds[0] not in _JSON_NAMES:  # a model
            return kinds[0].from_json(value, f"{path}.{key}")
        got = _JSON_NAMES.get(kind, kind.__name__) if key in data else "nothing"
        got = str(value) if kind in kinds else got  # nan or inf, for which JSON has no name
        raise ResponseValidationError(f"{path}.{key}: expected {_JSON_NAMES[kinds[0]]}, got {got}")

    return get


# --- Dub, Customers: what users touch ---
class _IdOfRequest(TypedDict):
    id: str


class GetCustomerRequest(_IdOfRequest, total=False):
    """What `customers.get(request=...)` takes: `id`, and maybe `include_expanded_fields`."""

    include_expanded_fields: Optional[bool]


class Customers:
    """The customers of a workspace: reached as `Dub(...).customers`."""

    def __init__(self, transport: _Transport) -> None:
        self._transport = transport

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

        id: the customer's id on Dub (`cus_...`), or `ext_` followed by its externalId.
        include_expanded_fields: adds `link`, `program_id`, `partner` and `discount`, if true.
        request: the two above as one mapping, in place of them.
        timeout_ms, max_retries: for this call, in place of the client's.
        http_headers: sent as well, or in place of the client's of the same name.

        Raises a DubError; TypeError or ValueError for bad options, before any request is made;
        RuntimeError once the client is closed; and what a token callable raises.
        """
        if request is not None:
            if id is not None or include_expanded_fields is not None:
                raise TypeError("get() takes id and include_expanded_fields, or request, not both")
            id, include_expanded_fields = _unpack_request(**request)
        timeout_ms = self._transport.timeout_ms if timeout_ms is None else timeout_ms
        max_retries = self._transport.max_retries if max_retries is None else max_retries
        _check_limits(timeout_ms, max_retries)
        url = self._transport.server_url + _customer_path(id, include_expanded_fields)
        headers = {} if http_headers is None else _checked_headers(http_headers)
        return self._transport.get(_Request(url, headers, timeout_ms), max_retries)


class Dub:
    """A client of the Dub API. Threads may share it; it survives fork and pickle.

    token: an API key, or a callable asked for one before each try. None reads DUB_API_KEY at once.
    server_url: http(s)://host[:port][/path]; plain http beyond this machine warns: all can read it.
    timeout_ms: the longest a `get` may take in milliseconds, waits and retries included. Only name
        resolution, a token callable and OpenSSL amid a flooded handshake cannot be interrupted.
    max_retries: how many times a failed request may be sent again.
    ssl_context: in place of `ssl.create_default_context()`; a client with one cannot be pickled.

    Raises TypeError or ValueError for bad options. The proxy is the environment's, which
    urllib.request reads at once (no_proxy at each call). Leaving `with` closes the connections.
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
        source = "DUB_API_KEY" if token is None else "token"
        token = os.environ.get("DUB_API_KEY") if token is None else token
        if token is None:
            raise ValueError("no token: give token=... or set DUB_API_KEY")
        if not callable(token):
            token = _checked_token(token, source)
        _check_limits(timeout_ms, max_retries)
        if ssl_context is not None:
            _typed(ssl_context, "ssl_context", ssl.SSLContext)
        url = _typed(server_url, "server_url", str).rstrip("/")
        server = _split_url(url, "http", "https")
        if server is None or "@" in server.netloc or re.search(r'[?#"<>\\^`{|}]', url):
            raise ValueError("server_url: expected http(s)://host[:port][/path], and nothing else")
        loopback = re.fullmatch(r"localhost|::1|127(\.[0-9]+){3}", str(server.hostname))
        if server.scheme == "http" and not loopback:
            warnings.warn(f"the token goes to {server.netloc} in clear: use https", stacklevel=2)
        self._transport = _Transport(token, url, timeout_ms, max_retries, ssl_context)
        self.customers = Customers(self._transport)

    def close(self) -> None:
        """Close the connections, those in use after their call. A later `get`: RuntimeError."""
        self._transport.connections.close()

    def __enter__(self) -> Dub:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._transport).replace("_Transport", "Dub", 1)


# --- below: how it is done. The request: id to path, options to headers ---
# Capitalized as urllib's Request does it, so that a user's of the same name replace them.
_HEADERS = {"Accept": "application/json", "Accept-encoding": "identity"}
_HEADERS["User-agent"] = "dub_customers/{} Python/{}.{}".format(__version__, *sys.version_info[:2])
_RETRIED_STATUSES = (429, 500, 502, 503, 504)  # the server's, or a proxy's to CONNECT


def _typed(value: Any, name: str, *kinds: type) -> Any:
    """The value, if of these types. A str comes back plain: an enum would format as Key.PROD."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    return str.__str__(value) if isinstance(value, str) else value


def _unpack_request(*, id: str, include_expanded_fields: Any = None) -> tuple[str, Any]:
    return id, include_expanded_fields  # Python itself refuses other keys


def _customer_path(id: Any, include_expanded_fields: Any) -> str:
    """The path and query of `GET /customers/{id}`, the id as one segment that decodes to itself."""
    id = _typed(id, "id", str)
    # Dots are steps in a path, however encoded. ext_ alone is likely an empty variable.
    if id in ("", ".", "..", "ext_"):
        raise ValueError(f"id: expected cus_... or ext_ and an externalId, got {id!r}")
    segment = quote(id, safe="")  # a ValueError for lone surrogates
    # Before it decodes, Dub's Next.js cuts off .rsc, and knows pages of these names: hide them.
    if segment.endswith(".rsc"):
        segment = segment[:-4] + "%2Ersc"
    elif segment in ("count", "export", "search-stripe"):
        segment = f"%{ord(segment[0]):X}{segment[1:]}"
    if include_expanded_fields is None:
        return f"/customers/{segment}"
    expand = str(_typed(include_expanded_fields, "include_expanded_fields", bool)).lower()
    return f"/customers/{segment}?includeExpandedFields={expand}"


def _checked_token(token: object, source: str) -> str:
    """The token, if a header can carry it; else an error that says why, and never shows it."""
    text: str = _typed(token, source, str)
    if odd := re.search("[^!-~]", text):
        where = f"{odd[0]!a} at position {odd.start()} of {len(text)}"
        raise ValueError(f"{source} has {where}: a token is printable ASCII without spaces")
    if not text:
        raise ValueError(f"{source} is empty")
    return text


def _checked_headers(http_headers: Mapping[str, str]) -> dict[str, str]:
    """The same headers in plain str, if a request can carry them."""
    checked: dict[str, str] = {}
    for name, value in _typed(http_headers, "http_headers", collections.abc.Mapping).items():
        name, value = _typed(name, "http_headers", str), _typed(value, "http_headers", str)
        if not re.fullmatch("[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise ValueError("http_headers: one of the names is no name of a header")
        if name.lower() in ("content-length", "transfer-encoding", "proxy-authorization"):
            raise ValueError(f"http_headers: {name} has no place in a GET to the server")
        if not re.fullmatch("[\t -~\x80-\xff]*", value):
            raise ValueError(f"http_headers: {name} has a line break or what is not Latin-1 text")
        checked[name] = value
    return checked


def _check_limits(timeout_ms: object, max_retries: object) -> None:
    if not 0 < _typed(timeout_ms, "timeout_ms", int, float) <= 2**31 - 1:  # poll(2)'s C int
        raise ValueError("timeout_ms: expected more than 0 and less than 2**31")
    if _typed(max_retries, "max_retries", int) < 0:
        raise ValueError("max_retries: expected 0 or more")


def _split_url(url: str, *schemes: str) -> SplitResult | None:
    """The parts of a URL with a sane host and port, else None: an error would show its password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if "[" in parts.netloc:
            socket.inet_pton(socket.AF_INET6, host)
        else:
            host.encode("idna")  # no label is empty, or longer than 63 characters
    except (OSError, ValueError):
        return None
    netloc = parts.netloc.rpartition("@")[2]
    sane = re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?", netloc)
    fits = sane and port != 0 and parts.scheme in schemes and re.fullmatch("[!-~]+", url)
    return parts if fits else None


class _Request(urllib.request.Request):
    """A GET, the time and the bytes that its call may still use, and the proxy it goes through."""

    def __init__(self, url: str, http_headers: dict[str, str], timeout_ms: float) -> None:
        super().__init__(url, headers=http_headers, origin_req_host="")  # else parsed again
        self.proxy = ""
        self.deadline = time.monotonic() + timeout_ms / 1000
        self.bytes_left = 2 * 1024 * 1024

    def set_proxy(self, host: str, type: str) -> None:
        self.proxy = host  # ProxyHandler calls this; urllib's own would overwrite self.host

    def seconds_left(self) -> float:
        """The timeout of a socket's next operation. A fixed one would start anew with each byte."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        return left

    def receive(self, sock: socket.socket) -> bytes:
        if not self.bytes_left:
            raise ConnectionError("2 MiB received for one call, and no end")
        sock.settimeout(self.seconds_left())
        data = sock.recv(min(65536, self.bytes_left))
        self.bytes_left -= len(data)
        return data


# --- the tries: which failures, how long to wait ---
@dataclass
class _Transport:
    """Tries until there is a customer, an error not worth another try, or no time left."""

    token: str | Callable[[], str] = field(repr=False)
    server_url: str
    timeout_ms: float
    max_retries: int
    ssl_context: ssl.SSLContext | None = field(repr=False)

    def __post_init__(self) -> None:
        self.connections = _Connections(self.server_url, self.ssl_context)
        scheme = self.connections.server.scheme
        if proxy := urllib.request.getproxies().get(scheme):
            # urllib would send an https: proxy its password in clear, and misread an @ in a path.
            parts = _split_url(proxy if "://" in proxy else f"http://{proxy}", "http")
            if parts is None or "@" in parts.path or parts.query or parts.fragment:
                raise ValueError(f"{scheme}_proxy: expected [http://][user:password@]host[:port]")
        # No other handlers: without one for redirects, none can take the token to another host.
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(urllib.request.ProxyHandler({scheme: proxy} if proxy else {}))
        self.opener.add_handler(self.connections)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        options = self.token, self.server_url, self.timeout_ms, self.max_retries, self.ssl_context
        return _Transport, options  # the connections do not travel

    def __del__(self) -> None:  # not theirs: with the opener they are a cycle, collected late
        self.connections.close()

    def get(self, request: _Request, max_retries: int) -> Customer:
        if self.connections.closed:
            raise RuntimeError("the client is closed")
        token, retries = self.token, 0
        while True:
            # Outside the `try`: what a callable raises is its owner's business, no failed request.
            key = _checked_token(token(), "token()") if callable(token) else token
            # "Unredirected", so that header_items() lets a user's own win.
            request.add_unredirected_header("Authorization", f"Bearer {key}")
            try:
                return _customer(self.attempt(request))
            except (APIError, OSError) as error:  # a NoResponseError from below is final
                wait = _wait(error, retries, request)
                if wait is None or retries >= max_retries:
                    if isinstance(error, APIError):
                        raise
                    kind = RequestTimeout if _timed_out(error) else NoResponseError
                    reason = _one_line(f"{type(error).__name__}: {error}", 200)
                    raise kind(f"no response from {self.server_url}: {reason}") from error
            time.sleep(wait)
            retries += 1

    def attempt(self, request: _Request) -> _Response:
        started, outcome = time.monotonic(), ""
        try:
            response: _Response = self.opener.open(request)
            outcome = str(response.status)
            return response
        finally:
            # Importing logging takes 10 ms: who wants the line has done so, or is amid doing it.
            if get_logger := getattr(sys.modules.get("logging"), "getLogger", None):
                outcome = outcome or getattr(sys.exc_info()[0], "__name__", "")
                spent = (time.monotonic() - started) * 1000
                get_logger(__name__).debug("GET %s %s %.1f ms", request.selector, outcome, spent)


def _wait(error: Exception, retries: int, request: _Request) -> float | None:
    """Seconds to wait before the next try; None if there is no use, time or room for a body."""
    if _timed_out(error):
        return None
    left = request.deadline - time.monotonic()
    wait = random.uniform(0, 0.5 * 2 ** min(retries, 4))  # full jitter, at most 8 seconds
    if isinstance(error, APIError):
        if error.status_code not in _RETRIED_STATUSES:
            return None
        told = _retry_after(error.headers) if error.status_code in (429, 503) else None
        if told is not None:
            # All threads are told the same moment, and would fill the next window at once: so each
            # adds up to 4 seconds, or up to 4 in 5 of what is left then, if that is less.
            wait = told + random.uniform(0, min(4, 0.8 * max(0, left - told)))
    return wait if wait < left and request.bytes_left >= _MAX_BODY else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks for; None if it is absent or nonsense. By RFC 9110 it holds
    seconds or a date. Dub sends the end of the rate window, in milliseconds since 1970: see
    apps/web/lib/auth/rate-limit-request.ts in https://github.com/dubinc/dub."""
    text = headers.get("Retry-After", "")
    if re.fullmatch("[0-9]{1,9}", text):  # 10 digits, 31 years and more, are no delay but a time
        return float(text)
    moment = _http_date(text)
    if re.fullmatch("[0-9]{10,13}", text):
        moment = int(text) / (1000 if len(text) >= 12 else 1)  # else seconds, as some send
    # By the server's own clock, where it tells it: then a wrong one here does no harm.
    now = _http_date(headers.get("Date", ""))
    return None if moment is None else max(0.0, moment - (time.time() if now is None else now))


def _http_date(text: str) -> float | None:
    """A date such as `Sun, 06 Nov 1994 08:49:37 GMT`, in seconds since 1970; None if it is none."""
    try:
        return float(calendar.timegm(email.utils.parsedate_to_datetime(text).utctimetuple()))
    except Exception:  # TypeError, ValueError, and on Python 3.8 even UnboundLocalError
        return None


# --- the connections: urllib's opener, kept connections, tunnel, TLS ---
class _Connections(urllib.request.BaseHandler):
    """urllib's handler for http and https, over connections that are kept and shared by threads."""

    def __init__(self, server_url: str, ssl_context: ssl.SSLContext | None) -> None:
        self.server = urlsplit(server_url)
        self.tls = self.server.scheme == "https"
        self.ssl_context = ssl_context
        self.default_context: ssl.SSLContext | None = None
        self.idle: list[_Wire] = []  # a stack without lock, since append and pop are atomic
        self.closed = False

    def http_open(self, request: _Request) -> _Response:
        """The response to the request, after ProxyHandler has seen it."""
        if wire := self.take_idle(request.proxy):
            # The server may just have closed it, or say so by 408: that is no failure.
            before = request.bytes_left
            try:
                response = self.exchange(wire, request)
                if response.status != 408:
                    return response
            except OSError as error:
                if request.bytes_left < before or _timed_out(error):
                    raise
        return self.exchange(_Wire(request.proxy), request)

    https_open = http_open

    def exchange(self, wire: _Wire, request: _Request) -> _Response:
        """Send the request and read the response; keep the connection if it can carry another."""
        headers = {"Host": self.server.netloc, **_HEADERS, **dict(request.header_items())}
        target = request.full_url if request.proxy and not self.tls else request.selector
        if self.tls:
            headers.pop("Proxy-authorization", None)  # for the tunnel alone
        try:
            if wire.sock is None:
                self.connect(wire, request)
            return wire.get(target, headers, request)
        finally:
            if wire.reusable and len(self.idle) < 32:  # as a ThreadPoolExecutor's threads
                self.idle.append(wire)
                if self.closed:
                    self.close()
            else:
                wire.close()

    def take_idle(self, proxy: str) -> _Wire | None:
        """The newest connection through this proxy that is fit for use. Others are closed."""
        while True:
            try:
                wire = self.idle.pop()
            except IndexError:  # not looked for before: another thread may take the last
                return None
            if not self.closed and wire.proxy == proxy and wire.usable():
                return wire
            wire.close()

    def close(self) -> None:
        self.closed = True
        self.take_idle("")  # finds none fit any more, and so closes all

    def connect(self, wire: _Wire, request: _Request) -> None:
        """Connect to the server: directly or through a proxy, with TLS if its URL says https."""
        if self.tls and not ssl:
            raise NoResponseError("https needs the module ssl, which this Python does not have")
        hop, host = urlsplit(f"//{request.proxy or self.server.netloc}"), self.server.hostname
        try:
            port = hop.port or (443 if self.tls else 80)  # a proxy's too, as urllib has it
            wire.connect(str(hop.hostname), port, request)
            if self.tls and request.proxy:
                wire.open_tunnel(self.server.netloc, self.server.port, request)
            if self.tls:
                context = self.ssl_context or self.default_context
                if context is None:  # reads the system's authorities: 10 ms and more
                    context = self.default_context = ssl.create_default_context()
                wire.start_tls(context, str(host), request)
        # For want of sockets or TLS, Pyodide raises RuntimeError, others maybe AttributeError.
        except (OSError, RuntimeError, ValueError, AttributeError) as error:
            if refused := getattr(error, "verify_message", ""):  # of ssl.SSLCertVerificationError
                self.default_context = None  # the next call may find authorities mounted late
                raise NoResponseError(f"certificate of {host} not accepted: {refused}") from error
            kind = socket.timeout if _timed_out(error) else ConnectionError
            raise kind(f"cannot connect to {hop.netloc}: {error}") from error


def _timed_out(error: Exception) -> bool:
    """Whether our own deadline ended something: the system's ETIMEDOUT has a number."""
    return isinstance(error, socket.timeout) and error.errno is None


# --- the wire: HTTP/1.1 by RFC 9112 over one socket, under a deadline ---
_MAX_BODY = 1024 * 1024  # bytes; one more is read, to know. A customer takes 2 to 100 kB
_MAX_HEAD = 64 * 1024  # bytes, and 100 fields
_STATUS_LINE = re.compile(rb"HTTP/(1\.[01]) ([1-9][0-9]{2})(?: ([^\r\n\0]*))?\r\n")  # 4 of RFC 9112
_FIELD = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n"  # 5.1
_FIELD_LINES = re.compile(rb"((?:%b)*)(\r\n)|((?:%b)+)" % (_FIELD, _FIELD))  # all, or so far
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n\0]*)?\r\n")  # 7.1
_CLOSE = re.compile("(^|,)[ \t]*close[ \t]*($|,)", re.IGNORECASE)  # 9.6
_LENGTHS = re.compile("[0-9]{1,99}(?:[ \t]*,[ \t]*[0-9]{1,99})*")  # RFC 9110, 8.6
# Once a line has this, it matches now or never. (A CR at the very end may become a CRLF.)
_LINE_OVER = re.compile(rb"\r[\0-\xff]|[\n\0]")


class _Response(NamedTuple):
    status: int
    reason: str
    headers: dict[str, str]  # by name in lower case
    body: bytes


class _Wire:
    """One connection: HTTP/1.1 by RFC 9112 over one socket. What that does not allow is refused as
    it is read: nobody can tell where it ends, and its tail would be the next call's customer."""

    sock: Any = None  # a socket, from `connect` on

    def __init__(self, proxy: str) -> None:
        self.proxy, self.process, self.old_at = proxy, os.getpid(), math.inf
        self.buffer = bytearray()  # received, and not yet read
        self.room = 0  # bytes that the head under way may still take
        self.reusable = False  # whether a response was read to its end, and another may follow

    def connect(self, host: str, port: int, request: _Request) -> None:
        """Connect to the first address of the name that lets us, each in its share of the time."""
        request.seconds_left()  # not even ask for the name when it is too late
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        while addresses:
            family, kind, protocol, _, address = addresses.pop(0)
            try:
                self.sock = socket.socket(family, kind, protocol)
                self.sock.settimeout(request.seconds_left() / (1 + len(addresses)))
                self.sock.connect(address)
                # Else the request may wait for the acknowledgement of what TLS sent last.
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return
            except OSError:
                self.close()
                if not addresses:
                    raise
        raise OSError("the name has no address")

    def open_tunnel(self, netloc: str, port: int | None, request: _Request) -> None:
        target = netloc if port else f"{netloc}:443"
        ours = {k: v for k, v in request.headers.items() if k == "Proxy-authorization"}
        _, status, _, _ = self.ask(f"CONNECT {target}", {"Host": target, **ours}, request)
        if not 200 <= status < 300:
            kind = ConnectionError if status in _RETRIED_STATUSES else NoResponseError
            raise kind(f"proxy {request.proxy} answered {status} to CONNECT")
        if not self.usable():  # what it said would be taken for the server's part of TLS
            raise ConnectionError("the proxy spoke or hung up ahead of TLS")

    def start_tls(self, tls: ssl.SSLContext, host: str, request: _Request) -> None:
        # The handshake apart: interrupted in wrap_socket, it would leave the socket open.
        # A ragged end is one without TLS's own: anybody may have cut there (RFC 9112, 9.8).
        how: dict[str, Any] = {"do_handshake_on_connect": False, "suppress_ragged_eofs": False}
        self.sock = tls.wrap_socket(self.sock, server_hostname=host, **how)
        self.sock.settimeout(request.seconds_left())
        self.sock.do_handshake()

    def usable(self) -> bool:
        """Whether it is this process's (not inherited by fork), not old, and silent."""
        if self.process != os.getpid() or time.monotonic() >= self.old_at or self.buffer:
            return False
        try:
            self.sock.settimeout(0)
            self.sock.recv(1)  # the end, an error, or a byte nobody asked for
            return False
        except OSError as error:  # by name, since there may be no ssl
            return type(error).__name__ in ("BlockingIOError", "SSLWantReadError")

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()

    __del__ = close

    def get(self, target: str, headers: dict[str, str], request: _Request) -> _Response:
        """The response to a GET; `reusable` tells afterwards whether another may follow."""
        version, status, reason, fields = self.ask(f"GET {target}", headers, request)
        coding, length = fields.get("transfer-encoding"), fields.get("content-length")
        body, stays = b"", version == b"1.1" and not _CLOSE.search(fields.get("connection", ""))
        if status in (101, 204, 304):  # no body; one that is announced may still come
            stays = stays and status != 101 and coding is None and length in (None, "0")
        elif coding is not None:
            if coding.lower() != "chunked" or length is not None or version == b"1.0":
                raise ConnectionError("Transfer-Encoding is not chunked alone (RFC 9112, 6.1, 6.3)")
            body = self.chunks()
        elif length is not None:
            # Repeated, a length is as good as said once. int() alone would take more than digits.
            sizes = {int(each) for each in length.split(",")} if _LENGTHS.fullmatch(length) else ()
            if len(sizes) != 1:
                raise ConnectionError("Content-Length is not one number (RFC 9112, 6.3)")
            body = self.take(min(*sizes, _MAX_BODY + 1))
        else:
            while len(self.buffer) <= _MAX_BODY and self.receive(may_end=True):
                pass
            body, stays = bytes(self.buffer[: _MAX_BODY + 1]), False
        self.old_at = time.monotonic() + 60  # middleboxes forget it silently, within minutes
        self.reusable = stays and len(body) <= _MAX_BODY and not self.buffer
        return _Response(status, reason, fields, body)

    def ask(self, what: str, headers: dict[str, str], request: _Request) -> tuple[Any, ...]:
        """Send a request without a body. Version, status, reason and headers of the response."""
        self.request, self.reusable = request, False  # receive() uses its time and bytes
        lines = [f"{what} HTTP/1.1", *map(": ".join, headers.items()), "", ""]
        data = "\r\n".join(lines).encode("latin-1")
        while data:
            self.sock.settimeout(request.seconds_left())
            data = data[self.sock.send(data) :]
        while True:
            self.room = _MAX_HEAD
            version, code, reason = self.line("a status line", _STATUS_LINE, b"HTTP/1.")
            status, fields = int(code), self.fields()
            if status >= 200 or status == 101:  # the others of 1xx are interim
                return version, status, reason.decode("utf-8", "replace"), fields

    def fields(self) -> dict[str, str]:
        """The fields of a head, or the trailers of a body, up to the empty line."""
        fields: dict[str, str] = {}
        count, end = 0, b""
        while not end:
            whole, end, part = self.line("a header field", _FIELD_LINES)
            for line in (whole or part).decode("latin-1").split("\r\n")[:-1]:
                name, _, value = line.partition(":")
                name, value = name.lower(), value.strip(" \t")
                fields[name] = f"{fields[name]}, {value}" if name in fields else value
                count += 1
            if count > 100:
                raise ConnectionError("more than 100 header fields")
        return fields

    def chunks(self) -> bytes:
        """A chunked body; of one beyond the bound, that much and a byte."""
        body = bytearray()
        while len(body) <= _MAX_BODY:
            self.room = _MAX_HEAD
            size = int(self.line("the size of a chunk", _CHUNK_SIZE)[0], 16)
            if size == 0:
                self.fields()
                break
            body += self.take(min(size, _MAX_BODY + 1 - len(body)))
            if len(body) <= _MAX_BODY and any(self.take(1) != byte for byte in (b"\r", b"\n")):
                raise ConnectionError("a chunk is longer than it said (RFC 9112, 7.1)")
        return bytes(body)

    def line(self, what: str, pattern: re.Pattern[bytes], start: bytes = b"") -> tuple[bytes, ...]:
        """The groups of the pattern in the next line; one that cannot match any more is refused."""
        seen, match = 0, pattern.match(self.buffer)
        while not match or match.end() > self.room:
            odd = match or _LINE_OVER.search(self.buffer, seen) or len(self.buffer) >= self.room
            if odd or not start.startswith(bytes(self.buffer[: len(start)])):
                raise ConnectionError(f"expected {what} in bounds, got {bytes(self.buffer[:40])!r}")
            seen = max(0, len(self.buffer) - 1)
            self.receive()
            match = _LINE_OVER.search(self.buffer, seen) and pattern.match(self.buffer)
        groups, self.room = match.groups(b""), self.room - match.end()  # copied, before the del
        del self.buffer[: match.end()]
        return groups

    def take(self, count: int) -> bytes:
        while len(self.buffer) < count:
            self.receive()
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    def receive(self, *, may_end: bool = False) -> bool:
        """Receive into the buffer; False at the end of the stream, where there may be one."""
        data = self.request.receive(self.sock)
        if not data and not may_end:
            raise ConnectionError("the connection was closed before the response was whole")
        self.buffer += data
        return bool(data)


# --- the answer: status to error, body to customer ---
_ERRORS: dict[int, type[APIError]] = {400: BadRequest, 401: Unauthorized, 403: Forbidden}
_ERRORS.update({404: NotFound, 409: Conflict, 410: InviteExpired, 422: UnprocessableEntity})
_ERRORS.update({429: RateLimitExceeded, 500: InternalServerError})


def _customer(response: _Response) -> Customer:
    """The customer in a 200; an APIError or ResponseValidationError for anything else."""
    status, _, headers, body = response
    if not 200 <= status < 300:
        raise _api_error(response)
    try:
        if status != 200 or len(body) > _MAX_BODY:
            raise ValueError("a customer comes with 200, and in 1 MiB at most")
        data = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        start = _one_line(body[:400].decode("utf-8", "replace"), 100)
        about = [headers[name] for name in ("content-type", "content-encoding") if name in headers]
        message = f"{status} response is not a customer's JSON ({error}) {about}: {start!r}"
        raise ResponseValidationError(_one_line(message, 400), body=body[:_MAX_BODY]) from error
    try:
        return Customer.from_json(data)
    except ResponseValidationError as error:
        raise ResponseValidationError(str(error), body=body) from None


def _api_error(response: _Response) -> APIError:
    status, reason, headers, body = response
    try:  # as far as the body is `{"error": {"code", "message", "doc_url"}}`
        envelope: Any = json.loads(body.decode())["error"]
        told = {key: value for key, value in envelope.items() if isinstance(value, str)}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        told = {}
    # Of a platform's page, in place of the API's JSON, the first words are the only clue.
    start = _one_line(body[:400].decode("utf-8", "replace"), 100)
    message = told.get("message") or ": ".join(filter(None, [reason, start])) or "no message"
    if 300 <= status < 400 and "location" in headers:
        message = f"redirect to {headers['location']} not followed"
    caseless = email.message.Message()
    for name, value in headers.items():
        caseless[name] = value
    facts: dict[str, Any] = {"code": told.get("code"), "doc_url": told.get("doc_url")}
    facts.update(status_code=status, headers=caseless, body=body[:_MAX_BODY])
    return _ERRORS.get(status, APIError)(message, **facts)


def _one_line(text: str, limit: int) -> str:
    """The text on one line, without control characters, cut to `limit` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


# --- command line ---
_EXAMPLE = b"""{"id": "cus_1KAP4CDPBSVMMBMH9XX3YZZ0Z", "externalId": "user_42", "country": "GB",
"name": "Ada Lovelace", "email": "ada@example.com", "avatar": "https://assets.example.com/ada.png",
"sales": 3, "saleAmount": 12900, "createdAt": "2026-01-02T03:04:05.000Z", "stripeCustomerId": null,
"firstSaleAt": "2026-02-01T00:00:00.000Z", "subscriptionCanceledAt": null, "programId": "prog_1",
"link": {"id": "link_1KAP4CDPBSVMMBMH9XX3YZZ0Z", "domain": "dub.sh", "key": "try",
"shortLink": "https://dub.sh/try", "url": "https://dub.co", "programId": "prog_1"}, "partner":
{"id": "pn_1", "name": "Grace Hopper", "email": "grace@example.com", "image": null}, "discount":
{"id": "disc_1", "amount": 20, "type": "percentage", "maxDuration": 12, "description": null,
"couponId": "co_1", "couponTestId": null, "partnersCount": 4}}"""  # the documented one, expanded


def _main() -> None:
    """Print a customer as JSON. Exit status: 0; 1 after one line on the error; 2 for bad usage."""
    import argparse
    import signal

    # Ctrl-C ends this as it ends other programs: without a traceback, and a shell's loop with it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parser = argparse.ArgumentParser(description="Print a customer as JSON, by the DUB_API_KEY.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("id", nargs="?", metavar="ID", help="cus_... or ext_ and the externalId")
    which.add_argument("--demo", action="store_true", help="an example from a server in here")
    parser.add_argument("--expand", action="store_true", help="with link, partner, discount")
    parser.add_argument("--server-url", default="https://api.dub.co", metavar="URL")
    parser.add_argument("--version", action="version", version=__version__)
    try:
        # Python's own sys.stdout is None if closed, and reports a full disk only at exit.
        with open(1, "w", closefd=False) as sys.stdout:
            options = parser.parse_args()
            if options.demo:
                found = _demo()
            else:  # the id as the bytes that were typed, whatever encoding the terminal has
                id = os.fsencode(options.id).decode("utf-8", "surrogateescape")
                with Dub(server_url=options.server_url) as client:
                    found = client.customers.get(id, include_expanded_fields=options.expand or None)
            print(json.dumps(found.raw, indent=2))
    except (DubError, OSError, ValueError, RuntimeError, Warning) as error:  # (no thread, -W error)
        sys.exit(f"error: {_one_line(str(error) or type(error).__name__, 600)}")


def _demo() -> Customer:
    """Serve the example on loopback and fetch it as any user would: a self-test without network."""
    import http.server
    import socketserver
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)  # which writes no log
            self.end_headers()
            self.wfile.write(_EXAMPLE)

    os.environ.update(http_proxy="", no_proxy="*")  # unset; and no system's
    # Not HTTPServer, which looks its own name up: that can hang without a network.
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with Dub("dub_demo", server_url=f"http://127.0.0.1:{server.server_address[1]}") as client:
            return client.customers.get("ext_user_42", include_expanded_fields=True)


if __name__ == "__main__":
    _main()
