"""`EtcdStore`: the port `MetadataStore` over etcd's gRPC interface, and calls about its members.

Keys of the port are relative; on the way in the cluster's prefix is put before them, and on the
way out it is taken off. A range that a caller names therefore never leaves the prefix.

What etcd guarantees and we rely on: a transaction is one revision; `Range` is linearizable; a key
whose lease lapses is deleted in a revision of its own; watches deliver whole revisions in order.

A lease that has lapsed when a transaction puts a key under it: nothing happens, and `commit`
raises `MetadataUnavailable` that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from modelfs.errors import MetadataUnavailable
from modelfs.ids import Revision
from modelfs.limits import TRANSACTION_OPS_MAX
from modelfs.ports import Compare, Delete, KeyValue, Put, Target, Txn, TxnResult
from modelfsd.etcd import etcd_rpc_pb2 as rpc
from modelfsd.etcd.channel import (
    Credentials,
    EtcdChannels,
    EtcdRefused,
    EtcdStatistics,
    Repeat,
    ResponseTooLarge,
)
from modelfsd.etcd.watch import EtcdWatch

PAGE_KEYS = 1000  # of `load`: 5 MiB if every inode record holds a small file
LOADS_MAX = 3  # a load that lasts so long that history is compacted under it starts again

LEARNER_NOT_READY = "etcdserver: can only promote a learner member which is in sync with leader"
TOO_MANY_LEARNERS = "etcdserver: too many learner members in cluster"
MEMBER_NOT_FOUND = "etcdserver: member not found"
_LEASE_NOT_FOUND = "etcdserver: requested lease not found"
_COMPACTED = "etcdserver: mvcc: required revision has been compacted"

_TARGETS = {
    Target.CREATE: rpc.Compare.CompareTarget.CREATE,
    Target.MOD: rpc.Compare.CompareTarget.MOD,
}


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """One member of the cluster, as the cluster lists it."""

    id: int
    name: str  # empty if it has never started
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    is_learner: bool

    @property
    def client_endpoints(self) -> tuple[str, ...]:
        """The client URLs as "host:port"."""
        return tuple(url.partition("://")[2].rstrip("/") for url in self.client_urls)


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """How one member sees itself."""

    id: int
    leader: int  # its id; 0: the member knows of none
    version: str
    database_bytes: int  # the file's size; the quota counts this
    database_used_bytes: int
    raft_index: int
    raft_applied_index: int
    is_learner: bool
    errors: tuple[str, ...]


def prefix_end(prefix: bytes) -> bytes:
    """The smallest key above all keys that start with `prefix`."""
    stem = prefix.rstrip(b"\xff")
    assert stem, "no key lies above these"
    return stem[:-1] + bytes([stem[-1] + 1])


class EtcdStore:
    """A `MetadataStore` over one etcd cluster; an async context manager.

    Endpoints are "host:port". A cancelled commit may or may not take effect.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        prefix: bytes = b"modelfs/",
        credentials: Credentials | None = None,
    ) -> None:
        assert prefix
        self._prefix = prefix
        self._channels = EtcdChannels(endpoints, credentials)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._channels.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The endpoints in use."""
        return self._channels.endpoints

    def set_endpoints(self, endpoints: Sequence[str]) -> None:
        """Use these endpoints from now on. Watches on others go on until they break."""
        self._channels.set_endpoints(endpoints)

    def reach_through(self, endpoint: str, path: Path) -> None:
        """Prefer an endpoint, and reach it through this Unix socket whenever that is there."""
        self._channels.reach_through(endpoint, path)

    def set_credentials(self, credentials: Credentials | None) -> None:
        """Show these from the next connection on."""
        self._channels.set_credentials(credentials)

    def statistics(self) -> EtcdStatistics:
        """What has been asked of etcd so far."""
        return self._channels.statistics()

    # ---------------------------------------------------------------- the port

    async def commit(self, txn: Txn) -> TxnResult:
        """See the port. Raises `OutOfSpace` when etcd's quota is used up."""
        assert len(txn.ops) <= TRANSACTION_OPS_MAX and len(txn.compares) <= TRANSACTION_OPS_MAX
        request = rpc.TxnRequest(
            compare=[self._compare(compare) for compare in txn.compares],
            success=[self._operation(op) for op in txn.ops],
        )
        try:
            response = await self._channels.call(
                "/etcdserverpb.KV/Txn", request, rpc.TxnResponse, Repeat.ONCE
            )
        except EtcdRefused as refused:
            if refused.text == _LEASE_NOT_FOUND:
                raise MetadataUnavailable("the lease of a key to be put has lapsed") from refused
            raise
        return TxnResult(response.succeeded, Revision(response.header.revision))

    async def get(self, key: bytes) -> KeyValue | None:
        """See the port."""
        response = await self._range(rpc.RangeRequest(key=self._prefix + key))
        return self._key_value(response.kvs[0]) if response.kvs else None

    async def load(
        self, prefix: bytes, bare: bytes | None = None
    ) -> tuple[Revision, list[KeyValue]]:
        """See the port. The deadline holds for each page."""
        for _ in range(LOADS_MAX):
            try:
                return await self._load_once(prefix, bare)
            except EtcdRefused as refused:
                if refused.text != _COMPACTED:
                    raise
        raise MetadataUnavailable(f"etcd's history was compacted during {LOADS_MAX} loads")

    async def page(self, prefix: bytes, after: bytes, limit: int) -> list[KeyValue]:
        """See the port."""
        start = self._prefix + max(prefix, after + b"\0")
        page, _ = await self._page(start, prefix_end(self._prefix + prefix), limit, 0)
        return [self._key_value(kv) for kv in page.kvs]

    def watch(self, prefix: bytes, start: Revision) -> EtcdWatch:
        """See the port. Connection errors come from the iterator; the next watch tries another
        endpoint. A caller that watches again after an error should pause if it keeps failing.
        """
        key = self._prefix + prefix
        return EtcdWatch(self._channels, key, prefix_end(key), start, self._strip)

    async def grant(self, ttl_seconds: int) -> int:
        """See the port. An uncertain grant leaves at worst a lease that lapses by itself."""
        response = await self._channels.call(
            "/etcdserverpb.Lease/LeaseGrant",
            rpc.LeaseGrantRequest(TTL=ttl_seconds),
            rpc.LeaseGrantResponse,
            Repeat.IDEMPOTENT,
        )
        if response.error:
            raise MetadataUnavailable(f"etcd granted no lease: {response.error}")
        return response.ID

    async def keep_alive(self, lease: int) -> bool:
        """See the port. Raises only `MetadataUnavailable`: a renewal too many does no harm.

        The method is a stream for etcd; on the wire, one request that ends the stream is a
        plain call.
        """
        response = await self._channels.call(
            "/etcdserverpb.Lease/LeaseKeepAlive",
            rpc.LeaseKeepAliveRequest(ID=lease),
            rpc.LeaseKeepAliveResponse,
            Repeat.READ,
        )
        return response.TTL > 0

    async def revoke(self, lease: int) -> None:
        """See the port."""
        try:
            await self._channels.call(
                "/etcdserverpb.Lease/LeaseRevoke",
                rpc.LeaseRevokeRequest(ID=lease),
                rpc.LeaseRevokeResponse,
                Repeat.IDEMPOTENT,
            )
        except EtcdRefused as refused:
            if refused.text != _LEASE_NOT_FOUND:
                raise

    # ---------------------------------------------------------------- history

    async def compact(self, revision: Revision) -> None:
        """Forget what was superseded before `revision`. etcd does it by itself as it grows."""
        request = rpc.CompactionRequest(revision=revision, physical=True)
        try:
            await self._channels.call(
                "/etcdserverpb.KV/Compact", request, rpc.CompactionResponse, Repeat.IDEMPOTENT
            )
        except EtcdRefused as refused:
            if refused.text != _COMPACTED:
                raise

    # ---------------------------------------------------------------- the cluster's members

    async def members(self) -> tuple[MemberInfo, ...]:
        """All members, learners included."""
        response = await self._channels.call(
            "/etcdserverpb.Cluster/MemberList",
            rpc.MemberListRequest(),
            rpc.MemberListResponse,
            Repeat.READ,
        )
        return tuple(_member_info(member) for member in response.members)

    async def add_learner(self, peer_url: str) -> MemberInfo:
        """Add a member that does not vote yet, before it is started.

        Raises `EtcdRefused`: there is a learner already, a voter is down, or the URL is taken.
        """
        response = await self._channels.call(
            "/etcdserverpb.Cluster/MemberAdd",
            rpc.MemberAddRequest(peerURLs=[peer_url], isLearner=True),
            rpc.MemberAddResponse,
            Repeat.ONCE,
        )
        return _member_info(response.member)

    async def promote(self, member_id: int) -> None:
        """Make a learner a voter. Raises `EtcdRefused` if it is not in sync yet."""
        await self._channels.call(
            "/etcdserverpb.Cluster/MemberPromote",
            rpc.MemberPromoteRequest(ID=member_id),
            rpc.MemberPromoteResponse,
            Repeat.ONCE,
        )

    async def remove_member(self, member_id: int) -> None:
        """Remove a member for good: its id never comes back. An unknown one is no error."""
        try:
            await self._channels.call(
                "/etcdserverpb.Cluster/MemberRemove",
                rpc.MemberRemoveRequest(ID=member_id),
                rpc.MemberRemoveResponse,
                Repeat.IDEMPOTENT,
            )
        except EtcdRefused as refused:
            if refused.text != MEMBER_NOT_FOUND:
                raise

    async def update_member(self, member_id: int, peer_url: str) -> None:
        """Tell the cluster where a member listens for its peers."""
        await self._channels.call(
            "/etcdserverpb.Cluster/MemberUpdate",
            rpc.MemberUpdateRequest(ID=member_id, peerURLs=[peer_url]),
            rpc.MemberUpdateResponse,
            Repeat.IDEMPOTENT,
        )

    async def member_status(self, endpoint: str) -> MemberStatus:
        """How the member at this endpoint sees itself, with or without a leader."""
        response = await self._channels.ask(
            endpoint, "/etcdserverpb.Maintenance/Status", rpc.StatusRequest(), rpc.StatusResponse
        )
        return MemberStatus(
            id=response.header.member_id,
            leader=response.leader,
            version=response.version,
            database_bytes=response.dbSize,
            database_used_bytes=response.dbSizeInUse,
            raft_index=response.raftIndex,
            raft_applied_index=response.raftAppliedIndex,
            is_learner=response.isLearner,
            errors=tuple(response.errors),
        )

    # ---------------------------------------------------------------- inside

    async def _range(self, request: rpc.RangeRequest) -> rpc.RangeResponse:
        return await self._channels.call(
            "/etcdserverpb.KV/Range", request, rpc.RangeResponse, Repeat.READ
        )

    async def _load_once(
        self, prefix: bytes, bare: bytes | None
    ) -> tuple[Revision, list[KeyValue]]:
        """All keys under a prefix, in pages at the revision of the first. Raises as `_range`."""
        start = self._prefix + prefix
        end = prefix_end(start)
        revision, keys, limit = 0, list[KeyValue](), PAGE_KEYS
        while True:
            page, limit = await self._page(start, end, limit, revision)
            revision = revision or page.header.revision
            for kv in page.kvs:
                row = self._key_value(kv)
                is_bare = bare is not None and row.key.startswith(bare)
                keys.append(replace(row, value=b"") if is_bare else row)
            if not page.more:
                return Revision(revision), keys
            start = page.kvs[-1].key + b"\0"

    async def _page(
        self, start: bytes, end: bytes, limit: int, revision: int
    ) -> tuple[rpc.RangeResponse, int]:
        """The first keys of a range, and how many a page may have: fewer if they are large."""
        while True:
            request = rpc.RangeRequest(key=start, range_end=end, limit=limit, revision=revision)
            try:
                return await self._range(request), limit
            except ResponseTooLarge:
                if limit == 1:
                    raise
                limit = max(1, limit // 4)

    def _compare(self, compare: Compare) -> rpc.Compare:
        message = rpc.Compare(
            result=rpc.Compare.CompareResult.EQUAL,
            target=_TARGETS[compare.target],
            key=self._prefix + compare.key,
        )
        if compare.target is Target.CREATE:
            message.create_revision = compare.revision
        else:
            message.mod_revision = compare.revision
        if compare.range_end is not None:
            message.range_end = self._prefix + compare.range_end
        return message

    def _operation(self, op: Put | Delete) -> rpc.RequestOp:
        key = self._prefix + op.key
        if isinstance(op, Put):
            put = rpc.PutRequest(key=key, value=op.value, lease=op.lease)
            return rpc.RequestOp(request_put=put)
        end = b"" if op.range_end is None else self._prefix + op.range_end
        return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key, range_end=end))

    def _key_value(self, kv: rpc.KeyValue) -> KeyValue:
        return KeyValue(
            key=self._strip(kv.key),
            value=kv.value,
            create_revision=Revision(kv.create_revision),
            mod_revision=Revision(kv.mod_revision),
        )

    def _strip(self, key: bytes) -> bytes:
        assert key.startswith(self._prefix)
        return key[len(self._prefix) :]


def _member_info(member: rpc.Member) -> MemberInfo:
    return MemberInfo(
        id=member.ID,
        name=member.name,
        peer_urls=tuple(member.peerURLs),
        client_urls=tuple(member.clientURLs),
        is_learner=member.isLearner,
    )
