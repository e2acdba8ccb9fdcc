# SPDX-License-Identifier: 0BSD
"""Retrieve a customer from the Dub API as a typed object: one file, standard library only.

    from dub_customers import Dub

    with Dub(token="DUB_API_KEY") as d_client:
        print(d_client.customers.get("ext_42", include_expanded_fields=True))

Origin: the project dub_customers, version below. A copy stands alone and is replaced whole, never
merged. The API's own reference: https://dub.co/docs/api-reference/endpoint/retrieve-a-customer
"""

from __future__ import annotations

__version__ = "1.0.0"

import calendar
import email.message
import email.utils
import functools
import http.client
import io
import json
import math
import os
import random
import re
import socket
import sys
import time
import urllib.parse
import urllib.request
import warnings
import weakref
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Tuple,
    Type,
    TypedDict,
    TypeVar,
    Union,
    cast,
)

# http.client, imported above, has imported ssl wherever there is one. In a Python built without
# it http works, and https is refused by name.
_HAS_SSL = sys.modules.get("ssl") is not None
if TYPE_CHECKING or _HAS_SSL:
    import ssl

__all__ = [
    "APIError",
    "BadRequest",
    "Conflict",
    "Customer",
    "Customers",
    "Discount",
    "Dub",
    "DubError",
    "Forbidden",
    "GetCustomerRequest",
    "InternalServerError",
    "InviteExpired",
    "Link",
    "NoResponseError",
    "NotFound",
    "Partner",
    "RateLimitExceeded",
    "RequestTimeout",
    "ResponseValidationError",
    "Unauthorized",
    "UnprocessableEntity",
]


# --- errors: what can go wrong, by status ---------------------------------------------------------


class DubError(Exception):
    """Base of every error a call raises, except misuse (TypeError, ValueError, RuntimeError)."""


class APIError(DubError):
    """The server answered, with a status other than 2xx. Subclasses exist for the documented ones.

    status_code: the HTTP status, which alone chose the class.
    code, message, doc_url: the server's own words (https://dub.co/docs/api-reference/errors);
        code and doc_url are None where it gave none, message then says what HTTP says.
    headers: of the answer, looked up in any case. body: bytes, at most 1 MiB.
    """

    # Only `message` is positional, the rest have defaults: so pickle and copy can rebuild it.
    def __init__(
        self,
        message: str = "",
        *,
        status_code: int = 0,
        code: Optional[str] = None,
        doc_url: Optional[str] = None,
        headers: Optional[Mapping[str, str]] = None,
        body: bytes = b"",
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code
        self.message = message
        self.doc_url = doc_url
        self.headers: Mapping[str, str] = {} if headers is None else headers
        self.body = body

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
    """404: no such customer in the key's workspace, or no such workspace."""


class Conflict(APIError):
    """409: codes `conflict` and `invite_pending`."""


class InviteExpired(APIError):
    """410: the invitation to the workspace has expired."""


class UnprocessableEntity(APIError):
    """422: the request is well-formed but wrong."""


class RateLimitExceeded(APIError):
    """429: too many requests. `retry_after`: seconds until the next may go, None if not told."""

    retry_after: Optional[float] = None


class InternalServerError(APIError):
    """500: the server failed."""


class NoResponseError(DubError):
    """No whole answer came: name, connection, TLS, proxy, or it broke off. `__cause__` says why."""


class RequestTimeout(NoResponseError, TimeoutError):
    """`timeout_ms` ran out before an answer had come."""


class ResponseValidationError(DubError):
    """A 2xx answer is not the customer promised: the message says where. `body`: its bytes."""

    def __init__(self, message: str = "", *, body: bytes = b"") -> None:
        super().__init__(message)
        self.body = body


# --- models: JSON to dataclass, by hand, one place per object -------------------------------------


# What a field may hold, as json decodes it. Types are compared exactly: to Python true is an int.
_STRING: Tuple[type, ...] = (str,)
_NUMBER: Tuple[type, ...] = (int, float)
_OR_NONE: Tuple[type, ...] = (type(None),)
_STRING_OR_NONE = _STRING + _OR_NONE
_NUMBER_OR_NONE = _NUMBER + _OR_NONE
_OBJECT: Tuple[type, ...] = (dict,)
_OBJECT_OR_NONE = _OBJECT + _OR_NONE


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
    def from_json(cls, data: object, path: str = "link") -> Link:
        """Map the decoded object; `path` locates a misfit in the ResponseValidationError."""
        return _made(cls, _read(data, path, _LINK))


_LINK = {
    "id": ("id", _STRING),
    "domain": ("domain", _STRING),
    "key": ("key", _STRING),
    "short_link": ("shortLink", _STRING),
    "url": ("url", _STRING),
    "program_id": ("programId", _STRING_OR_NONE),
}


@dataclass(frozen=True)
class Partner:
    """The partner who referred the customer."""

    id: str
    name: str
    email: Optional[str] = None
    image: Optional[str] = None

    @classmethod
    def from_json(cls, data: object, path: str = "partner") -> Partner:
        """Map the decoded object; `path` locates a misfit in the ResponseValidationError."""
        return _made(cls, _read(data, path, _PARTNER))


_PARTNER = {
    "id": ("id", _STRING),
    "name": ("name", _STRING),
    "email": ("email", _STRING_OR_NONE),
    "image": ("image", _STRING_OR_NONE),
}


@dataclass(frozen=True)
class Discount:
    """What the customer has off. `type` is "percentage" or "flat" today; the server may add more.

    `amount` is in per cent or in cents, by `type`; `max_duration` in months, None without end.
    """

    id: str
    amount: Union[int, float]
    type: str
    max_duration: Union[int, float, None] = None
    description: Optional[str] = None
    coupon_id: Optional[str] = None
    coupon_test_id: Optional[str] = None
    partners_count: Union[int, float, None] = None

    @classmethod
    def from_json(cls, data: object, path: str = "discount") -> Discount:
        """Map the decoded object; `path` locates a misfit in the ResponseValidationError."""
        return _made(cls, _read(data, path, _DISCOUNT))


_DISCOUNT = {
    "id": ("id", _STRING),
    "amount": ("amount", _NUMBER),
    "type": ("type", _STRING),
    "max_duration": ("maxDuration", _NUMBER_OR_NONE),
    "description": ("description", _STRING_OR_NONE),
    "coupon_id": ("couponId", _STRING_OR_NONE),
    "coupon_test_id": ("couponTestId", _STRING_OR_NONE),
    "partners_count": ("partnersCount", _NUMBER_OR_NONE),
}


@dataclass(frozen=True)
class Customer:
    """A customer. What the server sent as null or left out is None.

    `sale_amount` is in cents; times (`..._at`) are ISO 8601 strings in UTC. `link`, `program_id`,
    `partner` and `discount` come with `include_expanded_fields` only. `raw` is the decoded answer
    as it came, with the fields this version does not know; `==`, `hash` and `repr` leave it out.
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
    def from_json(cls, data: object, path: str = "customer") -> Customer:
        """Map the decoded object; `path` locates a misfit in the ResponseValidationError."""
        fields = _read(data, path, _CUSTOMER)
        if fields["link"] is not None:
            fields["link"] = Link.from_json(fields["link"], f"{path}.link")
        if fields["partner"] is not None:
            fields["partner"] = Partner.from_json(fields["partner"], f"{path}.partner")
        if fields["discount"] is not None:
            fields["discount"] = Discount.from_json(fields["discount"], f"{path}.discount")
        fields["raw"] = data
        return _made(cls, fields)


_CUSTOMER = {
    "id": ("id", _STRING),
    "external_id": ("externalId", _STRING),
    "created_at": ("createdAt", _STRING),
    "name": ("name", _STRING_OR_NONE),
    "email": ("email", _STRING_OR_NONE),
    "avatar": ("avatar", _STRING_OR_NONE),
    "stripe_customer_id": ("stripeCustomerId", _STRING_OR_NONE),
    "country": ("country", _STRING_OR_NONE),
    "sales": ("sales", _NUMBER_OR_NONE),
    "sale_amount": ("saleAmount", _NUMBER_OR_NONE),
    "first_sale_at": ("firstSaleAt", _STRING_OR_NONE),
    "subscription_canceled_at": ("subscriptionCanceledAt", _STRING_OR_NONE),
    "link": ("link", _OBJECT_OR_NONE),
    "program_id": ("programId", _STRING_OR_NONE),
    "partner": ("partner", _OBJECT_OR_NONE),
    "discount": ("discount", _OBJECT_OR_NONE),
}

_KINDS: Dict[object, str] = {
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    dict: "object",
    list: "array",
}


_Model = TypeVar("_Model")


def _read(
    data: Any, path: str, table: Mapping[str, Tuple[str, Tuple[type, ...]]]
) -> Dict[str, Any]:
    """The fields of a decoded object, by a table of field: (JSON key, what it may hold)."""
    if type(data) not in _OBJECT:
        raise ResponseValidationError(f"{path}: expected object, got {_kind(data)}")
    fields: Dict[str, Any] = {}
    for name, (key, kinds) in table.items():
        value = data.get(key)
        kind = value.__class__
        if kind not in kinds or (kind is float and not math.isfinite(value)):
            got = _kind(value) if key in data else "nothing"
            raise ResponseValidationError(f"{path}.{key}: expected {_KINDS[kinds[0]]}, got {got}")
        fields[name] = value
    return fields


def _made(model: Type[_Model], fields: Dict[str, Any]) -> _Model:
    # As model(**fields), but for the setting of frozen fields one by one, 3 of 8 microseconds.
    it = object.__new__(model)
    it.__dict__.update(fields)
    return it


def _kind(value: Any) -> str:
    """Name a decoded value as JSON does."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return _KINDS.get(cast(object, type(value)), type(value).__name__)


# --- Dub, Customers: what users touch -------------------------------------------------------------


class _RequiredOfGetCustomer(TypedDict):
    id: str


class GetCustomerRequest(_RequiredOfGetCustomer, total=False):
    """What `customers.get(request=...)` takes: `id`, and one spelling of the other at most."""

    include_expanded_fields: Optional[bool]
    includeExpandedFields: Optional[bool]


class Customers:
    """The customers of a workspace: reached as `Dub(...).customers`."""

    def __init__(self, session: _Session) -> None:
        self._session = session

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
        include_expanded_fields: whether to add `link`, `program_id`, `partner` and `discount`;
            None leaves the choice to the server, which adds none.
        request: the two above as one mapping, in place of them.
        timeout_ms, max_retries: for this call, in place of the client's.
        http_headers: sent as well, or in place of the client's of the same name.

        Raises an APIError by status, NoResponseError, RequestTimeout or ResponseValidationError,
        all of them DubError; TypeError or ValueError for what it cannot take, before it is
        sent; and RuntimeError once the client is closed.
        """
        if request is not None:
            if id is not None or include_expanded_fields is not None:
                raise TypeError("get() takes id and include_expanded_fields, or request, not both")
            id, include_expanded_fields = _unpack_request(request)
        session = self._session
        return session.retrieve(
            _customer_path(id, include_expanded_fields),
            {} if http_headers is None else _checked_headers(http_headers),
            session.timeout_ms if timeout_ms is None else _checked_timeout_ms(timeout_ms),
            session.max_retries if max_retries is None else _checked_max_retries(max_retries),
        )


class Dub:
    """A client of the Dub API. Threads may share it; it survives fork and pickle.

    token: an API key (`dub_...`), or a callable asked for one before each try; None reads the
        environment variable DUB_API_KEY, now.
    server_url: http or https, a host, maybe a port and a path. Plain http beyond this machine
        warns, for the token travels in clear.
    timeout_ms: the longest a `get` may take in milliseconds, waits and retries included. Only the
        system's name resolution, and a token callable, cannot be interrupted.
    max_retries: how many times a failed request may be sent again, from 0.
    ssl_context: in place of `ssl.create_default_context()`; a client with one cannot be pickled.

    Raises TypeError or ValueError for options it cannot take. Proxies are read from the
    environment, as urllib.request does. Leaving `with`, or `close()`, closes the connections.
    """

    customers: Customers

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
            token = os.environ.get("DUB_API_KEY")
            if token is None:
                raise ValueError("no token: give token=... or set DUB_API_KEY")
            _checked_token(token, "DUB_API_KEY")
        elif not callable(token):
            _checked_token(token, "token")
        if ssl_context is not None and not hasattr(ssl_context, "wrap_socket"):
            raise TypeError(f"ssl_context: expected SSLContext, got {type(ssl_context).__name__}")
        server = _checked_server_url(server_url)
        if server.scheme == "http" and not _is_loopback(str(server.hostname)):
            warnings.warn(f"the token goes to {server.netloc} in clear: use https", stacklevel=2)
        self._session = _Session(
            token,
            server_url.rstrip("/"),
            _checked_timeout_ms(timeout_ms),
            _checked_max_retries(max_retries),
            ssl_context,
        )
        self.customers = Customers(self._session)

    def close(self) -> None:
        """Close the connections. A later `get` raises RuntimeError; a second `close` is nothing."""
        self._session.close()

    def __enter__(self) -> Dub:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        session = self._session
        return (
            f"Dub(server_url={session.server_url!r}, timeout_ms={session.timeout_ms!r}, "
            f"max_retries={session.max_retries!r})"
        )


# ==================================================================================================
# Below: how it is done.


# --- the request: id to path, options to headers --------------------------------------------------

_USER_AGENT = "dub_customers/{} Python/{}.{}".format(__version__, *sys.version_info)

# poll(2), under every timeout of a socket, counts milliseconds in a C int: 24.8 days.
_LONGEST_TIMEOUT_MS = 2**31 - 1

# Patterns, which re compiles when first used: a call needs few of them.
# A host: labels of up to 63 letters, digits, hyphens or underscores; or IPv6 in brackets.
_HOST = r"(?:(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?|\[[0-9a-f:.]+\])(?::[0-9]+)?"
# A path: what may stand there by RFC 3986, so neither `?` nor `#`.
_SERVER_URL = rf"(?ai)https?://({_HOST})(?:/[a-z0-9._~!$&'()*+,;=:@%/-]*)?"
# As urllib splits it: user and password end at the last @ of the host's part, and may hold a slash
# before the first. A path is ignored. Lone surrogates are left out: urllib shows the password then.
_PROXY_URL = (
    r"(?ais)(?:https?://(?:[^@\ud800-\udfff]*@(?:[^@/\ud800-\udfff]*@)*)?"
    rf"|(?:[^@/\ud800-\udfff]*@)*)({_HOST})(?:/.*)?"
)
_HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEADER_VALUE = r"[\t -~\x80-\xff]*"
_NOT_PRINTABLE = r"[^!-~]"


def _unpack_request(request: GetCustomerRequest) -> Tuple[Optional[str], Optional[bool]]:
    if not isinstance(cast(object, request), Mapping):
        raise TypeError(f"request: expected a mapping, got {type(request).__name__}")
    unknown = set(request) - {"id", "include_expanded_fields", "includeExpandedFields"}
    if unknown:
        raise TypeError(f"request: unknown {', '.join(sorted(map(repr, unknown)))}")
    if "include_expanded_fields" in request and "includeExpandedFields" in request:
        raise TypeError("request: include_expanded_fields and includeExpandedFields are the same")
    return request.get("id"), request.get(
        "include_expanded_fields", request.get("includeExpandedFields")
    )


def _customer_path(id: object, include_expanded_fields: object) -> str:
    """The path and query of `GET /customers/{id}`, the id as one segment that decodes to itself."""
    if not isinstance(id, str):
        raise TypeError(f"id: expected str, got {type(id).__name__}")
    # `.` and `..` are steps in a path, however they are encoded; `ext_` names no customer.
    if id in ("", ".", "..", "ext_"):
        raise ValueError(f"id: {id!r} is no customer's id")
    try:
        path = "/customers/" + urllib.parse.quote(id, safe="")
    except UnicodeEncodeError as error:
        raise ValueError("id: has a lone surrogate, which UTF-8 cannot encode") from error
    if include_expanded_fields is None:
        return path
    if not isinstance(include_expanded_fields, bool):
        kind = type(include_expanded_fields).__name__
        raise TypeError(f"include_expanded_fields: expected bool or None, got {kind}")
    return f"{path}?includeExpandedFields={str(include_expanded_fields).lower()}"


def _checked_token(token: object, source: str) -> str:
    """The token, if it can stand in a header; else an error that says why, and never shows it."""
    if not isinstance(token, str):
        raise TypeError(f"{source}: expected str, got {type(token).__name__}")
    if not token:
        raise ValueError(f"{source} is empty")
    bad = re.search(_NOT_PRINTABLE, token)
    if bad:
        names = {"\n": "line break", "\r": "line break", " ": "space", "\t": "tab", "\ufeff": "BOM"}
        other = "control character" if bad.group() <= "\x7f" else "non-ASCII character"
        raise ValueError(
            f"{source} has a {names.get(bad.group(), other)} at position {bad.start()} of "
            f"{len(token)}: a token is printable ASCII without spaces"
        )
    return token


def _checked_headers(http_headers: Mapping[str, str]) -> Mapping[str, str]:
    if not isinstance(cast(object, http_headers), Mapping):
        raise TypeError(f"http_headers: expected a mapping, got {type(http_headers).__name__}")
    http_headers = dict(http_headers)  # what is checked must not change before a later try
    for name, value in http_headers.items():
        for text in (name, value):
            if not isinstance(cast(object, text), str):
                raise TypeError(f"http_headers: expected str, got {type(text).__name__}")
        if not re.fullmatch(_HEADER_NAME, name):
            raise ValueError("http_headers: one of the names is no name of a header")
        if name.lower() in ("content-length", "transfer-encoding"):
            raise ValueError(f"http_headers: {name} announces a body, and a GET here has none")
        if not re.fullmatch(_HEADER_VALUE, value):
            raise ValueError(
                f"http_headers: the value of {name} has a line break, another control character, "
                "or one that is not Latin-1"
            )
    return http_headers


def _checked_server_url(server_url: str) -> urllib.parse.SplitResult:
    """The parts of it. An error does not echo the URL, which may hold a password."""
    if not isinstance(cast(object, server_url), str):
        raise TypeError(f"server_url: expected str, got {type(server_url).__name__}")
    if not _names_a_host(_SERVER_URL, server_url):
        raise ValueError(
            "server_url: expected http(s)://host[:port][/path], without user, query or fragment"
        )
    return urllib.parse.urlsplit(server_url)


def _names_a_host(pattern: str, url: str) -> bool:
    """Whether a URL fits the pattern, and the host in it has a sane port or IPv6 address if any."""
    match = re.fullmatch(pattern, url)
    if match is None:
        return False
    try:
        host = urllib.parse.urlsplit(f"//{match.group(1)}")
        if "[" in host.netloc:
            socket.inet_pton(socket.AF_INET6, str(host.hostname))
        return host.port != 0
    except (OSError, ValueError):
        return False


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.[0-9]+){3}", host))


def _checked_timeout_ms(timeout_ms: float) -> float:
    if isinstance(timeout_ms, bool) or not isinstance(cast(object, timeout_ms), (int, float)):
        raise TypeError(f"timeout_ms: expected int or float, got {type(timeout_ms).__name__}")
    if not 0 < timeout_ms <= _LONGEST_TIMEOUT_MS:
        raise ValueError("timeout_ms: expected more than 0 and less than 2**31")
    return timeout_ms


def _checked_max_retries(max_retries: int) -> int:
    if isinstance(max_retries, bool) or not isinstance(cast(object, max_retries), int):
        raise TypeError(f"max_retries: expected int, got {type(max_retries).__name__}")
    if max_retries < 0:
        raise ValueError("max_retries: expected 0 or more")
    return max_retries


# --- the exchange: urllib opener, kept-alive connections, deadline --------------------------------

_MAX_BODY = 1024 * 1024  # bytes; a customer is under 2 kB
_MAX_IDLE = 32  # connections; as many as a ThreadPoolExecutor has threads at most by default
_MAX_IDLE_SECONDS = 60  # middleboxes forget quiet connections within minutes, and tell nobody
_NOTHING_YET = (BlockingIOError, *([ssl.SSLWantReadError] if _HAS_SSL else []))


class _Answer(NamedTuple):
    status: int
    reason: str
    headers: email.message.Message
    body: bytes


def _left(ends: float) -> float:
    """Seconds until the deadline, for a socket timeout. Past it, raises what a socket would."""
    left = ends - time.monotonic()
    if left <= 0:
        raise socket.timeout("timed out")
    return left


class _Wire(io.RawIOBase):
    """The bytes of one socket, each send and receive given only what is left of the deadline.

    A socket's own timeout bounds one operation: a byte a second would outlive it for ever.
    """

    ends: Optional[float]  # None: do not wait
    received: int  # bytes of this answer so far
    ended: bool  # the server has closed its side

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, data: bytes) -> None:
        while data:
            self.sock.settimeout(_left(cast(float, self.ends)))
            data = data[self.sock.send(data) :]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(0 if self.ends is None else _left(self.ends))
        count = self.sock.recv_into(buffer)
        self.received += count
        self.ended = count == 0
        return count

    def readall(self) -> bytes:
        # Nobody asks for everything, but http.client (from Python 3.10) for a chunk of size -1.
        raise http.client.HTTPException("a chunk of negative size")

    def close(self) -> None:
        super().close()
        self.sock.close()


class _Connection(io.BufferedReader):
    """One connection: the buffered file that http.client reads every answer on it from.

    It outlives each answer, and so keeps bytes that came behind one, where `quiet` finds them.
    Nothing refers back to it: one that is dropped is closed at once (by `_Wire`, as any file).
    """

    idle_since: float

    def __init__(self, sock: socket.socket, route: Tuple[Optional[str], ...]) -> None:
        self.wire = _Wire(sock)
        super().__init__(self.wire)
        self.route = route
        self.process = os.getpid()

    def makefile(self, mode: str) -> _Connection:
        return self  # to http.client this object is the socket too

    def close(self) -> None:
        """Do nothing: http.client closes its file after each answer, and the connection goes on."""

    def flush(self) -> None:
        """Do nothing: an answer dropped after `hang_up` would flush a file that is closed."""

    def hang_up(self) -> None:
        self.wire.close()

    def usable(self) -> bool:
        """Whether it is this process's (not inherited by fork), not old, and quiet."""
        return (
            self.process == os.getpid()
            and time.monotonic() - self.idle_since < _MAX_IDLE_SECONDS
            and self.quiet()
        )

    def quiet(self) -> bool:
        """Whether there is nothing to read: no end, no error, no byte nobody asked for."""
        self.wire.ends = None
        try:
            self.peek()
        except _NOTHING_YET:
            return True
        except OSError:
            pass
        return False

    def ask(self, head: str, ends: float) -> http.client.HTTPResponse:
        """Send a request without a body; the final answer to it, its head read."""
        self.wire.ends = ends
        self.wire.received = 0
        self.wire.send(head.encode("latin-1"))
        while True:
            response = http.client.HTTPResponse(cast(socket.socket, self))
            response.begin()
            if self.wire.ended:  # http.client takes the end of the stream for the end of the head
                raise http.client.RemoteDisconnected("the answer broke off in its head")
            if response.status >= 200 or response.status == 101:
                return response

    def get(self, head: str, ends: float) -> Tuple[_Answer, bool]:
        """The answer to a GET, and whether another may follow on this connection."""
        response = self.ask(head, ends)
        # http.client reads on to the end of the stream where it cannot make out the length.
        unknown = response.length is None and not response.chunked
        if unknown and "Content-Length" in response.headers:
            raise http.client.HTTPException("a Content-Length that is no length")
        try:
            body = response.read(_MAX_BODY + 1)
        except ValueError as error:
            raise http.client.HTTPException("a chunk of negative size") from error
        if response.length and len(body) <= _MAX_BODY:
            raise http.client.IncompleteRead(body, response.length)
        whole = response.isclosed() and response.status >= 200
        answer = _Answer(response.status, response.reason, response.headers, body)
        return answer, whole and not response.will_close


class _ProxyHandler(urllib.request.ProxyHandler):
    """urllib's, but a setting that is no http(s) URL of a host is refused, not guessed at."""

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        if req.has_proxy() or urllib.request.proxy_bypass(req.host):
            return None
        if not _names_a_host(_PROXY_URL, proxy):  # not shown: it may hold a password
            raise NoResponseError(f"{type}_proxy is set to something else than a proxy's URL")
        return super().proxy_open(req, proxy, type)


class _KeepAliveHandler(urllib.request.BaseHandler):
    """urllib's handler for http and https, over connections that are kept.

    The idle ones are a stack, newest last. It has no lock, since append and pop are atomic: so
    none can be found locked after a fork.
    """

    def __init__(self, server_url: str, ssl_context: Optional[ssl.SSLContext]) -> None:
        self.server = urllib.parse.urlsplit(server_url)
        self.ssl_context = ssl_context
        self.idle: List[_Connection] = []
        self.closed = False

    def http_open(self, request: urllib.request.Request) -> _Answer:
        """Exchange it for the answer. ProxyHandler has been here: `host` may be the proxy's."""
        ends = time.monotonic() + cast(float, request.timeout)
        headers = {"Host": self.server.netloc, "Accept-encoding": "identity", **request.headers}
        proxy_authorization = headers.pop("Proxy-authorization", None)
        route = (request.type, request.host, proxy_authorization)
        if request.has_proxy() and proxy_authorization is not None:
            headers["Proxy-authorization"] = proxy_authorization
        head = _head(f"GET {request.selector}", headers)
        connection = self.take(route)
        if connection is not None:
            # The server may close it, or say so by 408, while the request is on its way: that is
            # no failure, and a GET may be sent again.
            try:
                answer = self.exchange(connection, head, ends)
                if answer.status != 408:
                    return answer
            except (OSError, http.client.HTTPException):
                if connection.wire.received:
                    raise
        return self.exchange(self.connect(route, ends), head, ends)

    https_open = http_open

    def exchange(self, connection: _Connection, head: str, ends: float) -> _Answer:
        """Use the connection for one GET; keep it if it is fit for another."""
        try:
            answer, fit = connection.get(head, ends)
        except BaseException:
            connection.hang_up()
            raise
        if fit:
            self.keep(connection)
        else:
            connection.hang_up()
        return answer

    def take(self, route: Tuple[Optional[str], ...]) -> Optional[_Connection]:
        while True:
            try:
                connection = self.idle.pop()
            except IndexError:
                return None
            if connection.route == route and connection.usable():
                return connection
            connection.hang_up()

    def keep(self, connection: _Connection) -> None:
        connection.idle_since = time.monotonic()
        self.idle.append(connection)
        self.bound()

    def close(self) -> None:
        self.closed = True
        self.bound()

    def bound(self) -> None:
        """Hang up the oldest beyond the bound; all once closed, also those kept after that."""
        try:
            while len(self.idle) > (0 if self.closed else _MAX_IDLE):
                self.idle.pop(0).hang_up()
        except IndexError:
            pass  # other threads have emptied it

    def connect(self, route: Tuple[Optional[str], ...], ends: float) -> _Connection:
        """A new connection: to the server or a proxy, through its tunnel, with TLS, as need be."""
        scheme, netloc, proxy_authorization = route
        tls = scheme == "https"
        if tls and not _HAS_SSL:
            raise NoResponseError("https needs the module ssl, which this Python does not have")
        first = urllib.parse.urlsplit(f"//{netloc}")
        try:
            sock = _connected_socket(str(first.hostname), first.port or (443 if tls else 80), ends)
        except OSError as error:
            raise ConnectionError(f"cannot connect to {netloc}: {error}") from error
        connection = _Connection(sock, route)
        try:
            tls_host = first.hostname
            if self.server.scheme == "https" and netloc != self.server.netloc:
                tls_host = self.server.hostname
                self.open_tunnel(connection, proxy_authorization, ends)
            if tls:
                self.start_tls(connection, str(tls_host), ends)
        except BaseException:
            connection.hang_up()
            raise
        return connection

    def open_tunnel(
        self, connection: _Connection, authorization: Optional[str], ends: float
    ) -> None:
        target = self.server.netloc if self.server.port else f"{self.server.netloc}:443"
        headers = {"Host": target}
        if authorization is not None:
            headers["Proxy-Authorization"] = authorization
        response = connection.ask(_head(f"CONNECT {target}", headers), ends)
        if not 200 <= response.status < 300:
            refusal = f"proxy {connection.route[1]} answered {response.status} to CONNECT"
            if response.status in _RETRIED_STATUSES:
                raise ConnectionError(refusal)
            raise NoResponseError(refusal)
        if not connection.quiet():  # it would be taken for the server's answer
            raise http.client.HTTPException(f"proxy {connection.route[1]} spoke ahead of TLS")

    def start_tls(self, connection: _Connection, host: str, ends: float) -> None:
        if self.ssl_context is None:
            self.ssl_context = ssl.create_default_context()  # reads the CA bundle: 10 ms and more
        wire = connection.wire
        try:
            # The handshake apart: interrupted in wrap_socket, it would leave the socket open.
            tls_socket = self.ssl_context.wrap_socket(
                wire.sock, server_hostname=host, do_handshake_on_connect=False
            )
            wire.sock = tls_socket
            wire.sock.settimeout(_left(ends))
            tls_socket.do_handshake()
        except ssl.SSLCertVerificationError as error:
            raise NoResponseError(
                f"the certificate of {host} is not accepted: {error.verify_message}"
            ) from error


def _head(request_line: str, headers: Mapping[str, str]) -> str:
    lines = [f"{request_line} HTTP/1.1", *map(": ".join, headers.items())]
    return "\r\n".join(lines) + "\r\n\r\n"


def _connected_socket(host: str, port: int, ends: float) -> socket.socket:
    """A socket connected to the first address of the name that answers.

    What is left until the deadline is shared out among the addresses: a dead one leaves the others
    their turn.
    """
    _left(ends)  # not even ask for the name when it is too late
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for untried in range(len(addresses), 0, -1):
        family, kind, protocol, _, address = addresses[-untried]
        try:
            return _connected_to(family, kind, protocol, address, _left(ends) / untried)
        except OSError:
            if untried == 1:
                raise
    raise OSError("the name has no address")


def _connected_to(
    family: int, kind: int, protocol: int, address: Any, timeout: float
) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.settimeout(timeout)
        sock.connect(address)
        # Else the request may wait for the acknowledgement of what the TLS handshake sent last.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except BaseException:
        sock.close()
        raise


# --- the answer: status to error, body to customer ------------------------------------------------

_ERRORS: Dict[int, Type[APIError]] = {
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


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number beyond a float")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)


def _customer(answer: _Answer) -> Customer:
    """The customer in a 200; an APIError or ResponseValidationError for anything else."""
    status, _, headers, body = answer
    if not 200 <= status < 300:
        raise _api_error(answer)
    try:
        if status != 200:
            raise ValueError("a customer comes with 200")
        if len(body) > _MAX_BODY:
            raise ValueError("more than 1 MiB")
        data = _JSON.decode(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        described = f"{status} answer is not the JSON of a customer ({_one_line(str(error), 120)})"
        for name in ("Content-Type", "Content-Encoding"):
            if name in headers:
                described += f", {name} {_one_line(headers[name], 80)}"
        start = _one_line(body[:100].decode("utf-8", "replace"), 100)
        raise ResponseValidationError(f"{described}: {start!r}", body=body[:_MAX_BODY]) from error
    try:
        return Customer.from_json(data)
    except ResponseValidationError as error:
        error.body = body
        raise


def _api_error(answer: _Answer) -> APIError:
    status, reason, headers, body = answer
    told = _error_envelope(body)
    message = told.get("message") or reason or "no message"
    if 300 <= status < 400 and "Location" in headers:
        message = f"redirect to {headers['Location']} not followed"
    error = _ERRORS.get(status, APIError)(
        message,
        status_code=status,
        code=told.get("code"),
        doc_url=told.get("doc_url"),
        headers=cast(Mapping[str, str], headers),
        body=body[:_MAX_BODY],
    )
    if isinstance(error, RateLimitExceeded):
        error.retry_after = _retry_after(error.headers)
    return error


def _error_envelope(body: bytes) -> Dict[str, str]:
    """The texts in `{"error": {"code", "message", "doc_url"}}`, as far as the body fits it."""
    try:
        error: Any = _JSON.decode(body.decode("utf-8"))["error"]
        return {key: value for key, value in error.items() if isinstance(value, str)}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}


def _one_line(text: str, limit: int) -> str:
    """The text on one line, without control characters, cut to `limit` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


# --- trying again: which failures, how long to wait -----------------------------------------------

_RETRIED_STATUSES = (429, 500, 502, 503, 504)


class _Lost(Exception):
    """An exchange that failed for `__cause__`, and may do better another time."""


class _Session:
    """What `Dub` and `Customers` share: the options, which pickle and copy, and the opener."""

    def __init__(
        self,
        token: Union[str, Callable[[], str]],
        server_url: str,
        timeout_ms: float,
        max_retries: int,
        ssl_context: Optional[ssl.SSLContext],
    ) -> None:
        self.token = token
        self.server_url = server_url
        self.timeout_ms = timeout_ms
        self.max_retries = max_retries
        self.ssl_context = ssl_context
        # No other handlers: without one for redirects none can be followed, to another host with
        # the token least of all; without one for files no file can be opened.
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(_ProxyHandler())
        handler = _KeepAliveHandler(server_url, ssl_context)
        self.opener.add_handler(handler)
        # Called once: by close(), when the last user drops the session, or as Python exits.
        self.close = weakref.finalize(self, handler.close)

    def __reduce__(self) -> Tuple[Callable[[], _Session], Tuple[()]]:
        options = self.token, self.server_url, self.timeout_ms, self.max_retries, self.ssl_context
        return functools.partial(_Session, *options), ()

    def retrieve(
        self, path: str, http_headers: Mapping[str, str], timeout_ms: float, max_retries: int
    ) -> Customer:
        """Try until there is a customer, an error not worth another try, or no time left."""
        if not self.close.alive:
            raise RuntimeError("the client is closed")
        ends = time.monotonic() + timeout_ms / 1000
        tried = 0
        while True:
            headers = self.headers(http_headers)
            try:
                return _customer(self.attempt(path, headers, ends))
            except (APIError, _Lost) as error:
                wait = _wait(error, tried)
                if wait is None or tried >= max_retries or time.monotonic() + wait >= ends:
                    if isinstance(error, APIError):
                        raise
                    cause = error.__cause__
                    late = time.monotonic() >= ends
                    raise self.no_response(cause, timeout_ms if late else None) from cause
            time.sleep(wait)
            tried += 1

    def no_response(self, cause: object, late_ms: Optional[float]) -> NoResponseError:
        """What to tell of a failed exchange, which has run out of time if `late_ms` is given."""
        if late_ms is not None:
            return RequestTimeout(f"no answer from {self.server_url} within {late_ms} ms")
        reason = _one_line(f"{type(cause).__name__}: {cause}", 200)
        return NoResponseError(f"no answer from {self.server_url}: {reason}")

    def headers(self, http_headers: Mapping[str, str]) -> Dict[str, str]:
        """What to send. What a token callable raises is its caller's business, not a failed try."""
        token = _checked_token(self.token(), "token()") if callable(self.token) else self.token
        return {
            "Authorization": f"Bearer {token}",
            "Accept": "application/json",
            "User-Agent": _USER_AGENT,
            **http_headers,
        }

    def attempt(self, path: str, headers: Dict[str, str], ends: float) -> _Answer:
        """One request and its answer, noted in the log."""
        # Request files headers under one spelling of their names: so a user's replace ours.
        request = urllib.request.Request(self.server_url + path, headers=headers)
        started = time.monotonic()
        outcome: object = None
        try:
            answer = cast(_Answer, self.opener.open(request, timeout=ends - started))
            outcome = answer.status
            return answer
        except BaseException as error:
            outcome = type(error).__name__
            if isinstance(error, (OSError, http.client.HTTPException)):
                raise _Lost from error
            raise
        finally:
            _log_attempt(path, outcome, (time.monotonic() - started) * 1000)


def _log_attempt(path: str, outcome: object, milliseconds: float) -> None:
    # Importing logging takes 10 ms: whoever wants the line has done it already.
    # Another thread may be importing it just now.
    get_logger = getattr(sys.modules.get("logging"), "getLogger", None)
    if get_logger is not None:
        get_logger(__name__).debug("GET %s %s %.1f ms", path, outcome, milliseconds)


def _wait(error: Exception, tried: int) -> Optional[float]:
    """Seconds to wait before the next try, after `tried` + 1 of them; None: it is not worth one."""
    if isinstance(error, APIError):
        if error.status_code not in _RETRIED_STATUSES:
            return None
        told = _retry_after(error.headers) if error.status_code in (429, 503) else None
        if told is not None:
            return told
    return random.uniform(0, 0.5 * 2 ** min(tried, 4))  # full jitter, at most 8 seconds


def _retry_after(headers: Mapping[str, str]) -> Optional[float]:
    """Seconds that the header Retry-After asks for, not below 0; None if it is absent or nonsense.

    By RFC 9110 it holds seconds or a date. Dub sends the end of the rate window, in milliseconds
    since 1970: https://github.com/dubinc/dub, apps/web/lib/auth/rate-limit-request.ts at 1de955f.
    """
    text = headers.get("Retry-After", "").strip()
    # The server's own clock, where it tells it: then a wrong one here does no harm.
    now = _http_date(headers.get("Date", ""))
    if now is None:
        now = time.time()
    if re.fullmatch("[0-9]{1,13}", text):
        number = int(text)
        if number < 10**9:  # 31 years: more than that is no delay but a time
            return float(number)
        moment = number / 1000 if number >= 10**11 else float(number)
    else:
        date = _http_date(text)
        if date is None:
            return None
        moment = date
    return max(0.0, moment - now)


def _http_date(text: str) -> Optional[float]:
    """A date such as `Sun, 06 Nov 1994 08:49:37 GMT`, in seconds since 1970; None if it is none."""
    try:
        return float(calendar.timegm(email.utils.parsedate_to_datetime(text).utctimetuple()))
    except (TypeError, ValueError, OverflowError, IndexError):  # by version of Python
        return None


# --- command line ---------------------------------------------------------------------------------

# The documented answer, expanded.
_EXAMPLE = b"""{
 "id": "cus_1KAP4CDPBSVMMBMH9XX3YZZ0Z", "externalId": "user_42", "name": "Ada Lovelace",
 "email": "ada@example.com", "avatar": "https://assets.example.com/ada.png", "country": "GB",
 "sales": 3, "saleAmount": 12900, "createdAt": "2026-01-02T03:04:05.000Z",
 "stripeCustomerId": null, "firstSaleAt": "2026-02-01T00:00:00.000Z",
 "subscriptionCanceledAt": null, "programId": "prog_1",
 "link": {"id": "link_1KAP4CDPBSVMMBMH9XX3YZZ0Z", "domain": "dub.sh", "key": "try",
  "shortLink": "https://dub.sh/try", "url": "https://dub.co", "programId": "prog_1"},
 "partner": {"id": "pn_1", "name": "Grace Hopper", "email": "grace@example.com", "image": null},
 "discount": {"id": "disc_1", "amount": 20, "type": "percentage", "maxDuration": 12,
  "description": null, "couponId": "co_1", "couponTestId": null, "partnersCount": 4}
}"""


def _main() -> int:
    """Print a customer as JSON. Returns the exit status: 0, or 1 after one line on the error."""
    import argparse

    parser = argparse.ArgumentParser(
        description="Print a customer of the Dub API as JSON. The key is read from DUB_API_KEY."
    )
    parser.add_argument("id", nargs="?", metavar="ID", help="cus_... or ext_ and the externalId")
    parser.add_argument("--expand", action="store_true", help="with link, partner and discount")
    parser.add_argument("--server-url", default="https://api.dub.co", metavar="URL")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--demo", action="store_true", help="fetch the documented example from a server in here"
    )
    options = parser.parse_args()
    if (options.id is None) != options.demo:
        parser.error("give an ID, or --demo")
    try:
        if options.demo:
            customer = _demo()
        else:
            with Dub(server_url=options.server_url) as client:
                expand = options.expand or None
                customer = client.customers.get(options.id, include_expanded_fields=expand)
        print(json.dumps(customer.raw, indent=2), flush=True)
    except (DubError, OSError, ValueError, Warning, KeyboardInterrupt) as error:
        print("error:", _one_line(str(error) or type(error).__name__, 600), file=sys.stderr)
        # Output that could not be written stays in the buffer, and would fail once more at exit.
        if isinstance(error, OSError) and not isinstance(error, DubError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _demo() -> Customer:
    """Serve the example on loopback and fetch it as any user would: a self-test without network."""
    import http.server
    import socketserver
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(_EXAMPLE)

        def log_message(self, format: str, *args: object) -> None:
            pass

    os.environ["no_proxy"] = "*"  # a proxy would look for 127.0.0.1 on its own machine
    # Not http.server.HTTPServer, which looks its own name up: that can hang without a network.
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with Dub("dub_demo", server_url=url) as client:
            customer = client.customers.get("ext_user_42", include_expanded_fields=True)
        thread.join()
    return customer


if __name__ == "__main__":
    sys.exit(_main())
