"""Join tokens: one line that lets a new machine in.

    modelfs-<base64url of: MessagePack array of `Token`'s fields, then 4 bytes of its BLAKE3 hash>

The hash tells a line that was cut off or mistyped from one that the cluster does not know. A token
carries all that a stranger needs: whom to believe (the fingerprint of the authority), where to
ask, and a secret. The cluster keeps a hash of the secret only, under `security/token/<id>`, with
when it expires and how often it may still be used (`TokenRecord`). A record outlives its token by
a day, so that a token that came too late can be told so; then its etcd lease takes it.

Admission is one guarded transaction that uses up one use. Who asks again with the same key, since
the answer was lost on the way, is answered again and uses up nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import math
import secrets
import sys
from pathlib import Path
from typing import Annotated

import blake3
import msgspec

from modelfs.errors import ProtocolError, UserError
from modelfs.ids import ClusterId, is_node_id
from modelfs.limits import NAME_BYTES_MAX
from modelfsd.addresses import HostPort

PREFIX = "modelfs-"
FORMAT = 1
SECRET_BYTES = 32
CHECK_BYTES = 4
ADDRESSES_MAX = 8
TOKEN_LENGTH_MAX = 4096
USES_MAX = 10_000
TTL_SECONDS_MAX = 30 * 86400.0
KEPT_SECONDS = 86400  # how long a record outlives its token


_Hash = Annotated[bytes, msgspec.Meta(min_length=1, max_length=64)]


class Token(msgspec.Struct, array_like=True, frozen=True):
    """What a token says. Never shown: its `repr` leaves the secret out."""

    format: int
    cluster: Annotated[str, msgspec.Meta(max_length=16)]
    fingerprint: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    addresses: Annotated[
        list[tuple[Annotated[str, msgspec.Meta(max_length=NAME_BYTES_MAX)], int]],
        msgspec.Meta(max_length=ADDRESSES_MAX),
    ]
    id: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]

    def __repr__(self) -> str:
        return f"Token({self.id.hex()} of cluster {self.cluster})"


class TokenRecord(msgspec.Struct, array_like=True, frozen=True):
    """What the cluster knows of a token."""

    secret_hash: _Hash
    expires_at: float
    uses_left: Annotated[int, msgspec.Meta(ge=0, le=USES_MAX)]
    used_by: Annotated[
        list[_Hash], msgspec.Meta(max_length=USES_MAX)
    ]  # the hashes of the keys that it let in


def new_token(
    cluster: ClusterId, fingerprint: bytes, addresses: list[HostPort], now: float,
    ttl_seconds: float, uses: int,
) -> tuple[Token, TokenRecord]:  # fmt: skip
    """A token and what the cluster is to keep of it."""
    secret = secrets.token_bytes(SECRET_BYTES)
    token = Token(
        FORMAT, cluster, fingerprint, addresses[:ADDRESSES_MAX], secrets.token_bytes(8), secret
    )
    return token, TokenRecord(hash_of(secret), now + ttl_seconds, uses, [])


def hash_of(secret: bytes) -> bytes:
    """What is kept of a secret. It is random and long, so a fast hash is as good as a slow one."""
    return hashlib.sha256(b"modelfs join token\0" + secret).digest()


def format_token(token: Token) -> str:
    """The line."""
    body = msgspec.msgpack.encode(token)
    check = blake3.blake3(body).digest(length=CHECK_BYTES)
    return PREFIX + base64.urlsafe_b64encode(body + check).decode().rstrip("=")


def parse_token(text: str) -> Token:
    """A token from its line. Raises `UserError`, which does not repeat it."""
    text = text.strip()
    if not text.startswith(PREFIX):
        raise UserError(
            f"this is not a join token: one begins with {PREFIX} and is printed by `modelfs token`"
        )
    cut = UserError(
        "this join token is damaged or not whole: copy all of the line that `modelfs token` printed"
    )
    encoded = text[len(PREFIX) :]
    if not encoded.isascii() or len(text) > TOKEN_LENGTH_MAX:
        raise cut
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise cut from None
    body, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
    if check != blake3.blake3(body).digest(length=CHECK_BYTES):
        raise cut
    try:
        token = msgspec.msgpack.decode(body, type=Token)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise UserError(
            "this join token was made by another version of modelfs: install the same on all nodes"
        ) from None
    has_ports = all(host and 0 < port < 1 << 16 for host, port in token.addresses)
    if token.format != FORMAT or not is_node_id(token.cluster) or not has_ports:
        raise UserError(
            "this join token was made by another version of modelfs: install the same on all nodes"
        )
    return token


def read_token(source: str) -> Token:
    """A token from what `--join` was given: itself, `-` for standard input, or a file's name.

    Raises `UserError`, which never repeats what might be a token.
    """
    source = source.strip()
    if source.startswith(PREFIX) and "/" not in source:
        return parse_token(source)
    if source == "-":
        return parse_token(sys.stdin.readline(TOKEN_LENGTH_MAX + 1))
    try:
        with Path(source.removeprefix("@")).open(encoding="ascii", errors="replace") as file:
            text = file.read(TOKEN_LENGTH_MAX + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no file"
        raise UserError(
            f"what was given is not a join token, nor a file with one ({reason}): "
            "give the token, a file's name, or - for standard input"
        ) from None
    return parse_token(text)


# ---------------------------------------------------------------- what the cluster decides


class TokenRefused(ProtocolError):
    """A token that lets nobody in (any more); the text is for whoever holds it."""


def decode_record(value: bytes) -> TokenRecord:
    """Raises `ProtocolError` if the record is damaged."""
    try:
        record = msgspec.msgpack.decode(value, type=TokenRecord)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a damaged record of a token: {error}") from None
    if not math.isfinite(record.expires_at):
        raise ProtocolError("a damaged record of a token: it never expires")
    return record


def use(record: TokenRecord | None, secret: bytes, key_hash: bytes, now: float) -> TokenRecord:
    """The record after a use by the holder of a key; the same if he has used it before.

    Raises `TokenRefused`. Whether a token is known is not told to who has not its secret.
    """
    if record is None or not hmac.compare_digest(record.secret_hash, hash_of(secret)):
        raise TokenRefused(
            "the cluster does not know this join token: make one with `modelfs token`"
        )
    if key_hash in record.used_by:
        return record
    if now > record.expires_at:
        raise TokenRefused(
            f"this join token expired {_ago(now - record.expires_at)} ago: "
            "make another with `modelfs token`, or one that lasts longer with --ttl"
        )
    if record.uses_left < 1:
        raise TokenRefused(
            "this join token is used up: make another with `modelfs token`, "
            "or one for several nodes with --uses"
        )
    return TokenRecord(
        record.secret_hash, record.expires_at, record.uses_left - 1, [*record.used_by, key_hash]
    )


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
