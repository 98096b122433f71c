"""This node's own etcd member: founding a cluster, joining one, coming back, staying up.

A member's standing is kept in `etcd.json` (`etcd.standing`). Until the cluster counts us as a voter
it is UNFINISHED, and the attempt is made again from an empty data directory: nobody relies on it
yet. All connections, of clients and of other members, are made with certificates (`etcd.tls`).

Joining goes through a *learner*, which has no vote: a voter that is added before it has started
blocks the cluster for good (tried on 3.4.23). Learner, start, in sync, promote; one node at a
time, under a key with a lease. That order is a courtesy, not what safety rests on: etcd refuses a
second learner. Who holds the key knows that any learner is left over from an attempt that died,
removes it (no quorum counts it), and goes on.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import trio

from modelfs.errors import MetadataUnavailable, ModelfsError, UserError
from modelfs.ids import NodeId
from modelfsd.etcd.channel import EtcdRefused
from modelfsd.etcd.endings import MemberCorrupt, MemberRemoved, exit_error, last_words
from modelfsd.etcd.join import (
    JOIN_LEASE_SECONDS,
    RETRY_SECONDS,
    UNAVAILABLE,
    keep_lease,
    remove_learners,
    revoke,
    take_turn,
)
from modelfsd.etcd.process import SOCKET_URL, EtcdProcess, check_port
from modelfsd.etcd.standing import Standing, StandingRecord
from modelfsd.etcd.store import TOO_MANY_LEARNERS, EtcdStore, MemberInfo
from modelfsd.etcd.tls import EtcdTls

log = logging.getLogger(__name__)

JOIN_SECONDS = 180.0  # all in all, other nodes' turns included
FOUND_SECONDS = 60.0
RESUME_SECONDS = 15.0  # to serve again; the other voters may be away for longer than that
RETURN_SECONDS = 60.0  # the same, while we look whether we are a voter
SETTLE_SECONDS = 5.0  # for a member that has a leader to hear what it has missed
POLL_SECONDS = 0.1  # etcd does not say when it is ready or in sync: ask
RESTART_SECONDS_MIN, RESTART_SECONDS_MAX = 0.5, 30.0
STEADY_SECONDS = 60.0  # a child that ran so long is restarted without delay again
LOG_CHECK_SECONDS = 300.0


class EtcdMember:
    """This node's etcd child. Use: one of `found`, `join`, `resume`; `run` in a nursery; `stop`.

    `stop` must be called however the others end.
    """

    def __init__(
        self,
        state_directory: Path,
        name: NodeId,
        address: str,
        client_port: int,
        peer_port: int,
        tls: EtcdTls,
    ) -> None:
        self._name, self._address = name, address
        self._client_port, self._peer_port = client_port, peer_port
        host = f"[{address}]" if ":" in address else address
        self.client_endpoint = f"{host}:{client_port}"
        self.client_url = f"https://{self.client_endpoint}"
        self.peer_url = f"https://{host}:{peer_port}"
        self.process = EtcdProcess(state_directory)
        self._tls, self._record = tls, StandingRecord(state_directory)
        self._store = EtcdStore([self.client_endpoint], credentials=tls.credentials())
        self._is_stopping = False
        self._restarted: trio.Event | None = None  # while `restart` works
        self._is_announced = False

    @property
    def standing(self) -> Standing:
        """What `etcd.json` says: ABSENT → found or join; UNFINISHED → the same; MEMBER → resume."""
        return self._record.standing

    async def found(self) -> None:
        """Start a new cluster with this member alone. Raises `UserError`."""
        await self._clear()
        self._record.write(Standing.UNFINISHED)
        self._start(initial=((self._name, self.peer_url),), state="new")
        if not await self._serves_within(FOUND_SECONDS):
            await self.process.stop()
            raise UserError(
                f"etcd did not start in {FOUND_SECONDS:.0f} s; {last_words(self.process)}"
            )
        self._record.write(Standing.MEMBER)
        self._is_announced = True

    async def resume(self) -> None:
        """Start the member of an earlier run. Raises `UserError`.

        Returns when it serves, or after `RESUME_SECONDS` without: it does not serve before a
        quorum is there. An address that has changed is told to the cluster as soon as it serves,
        by `run` if need be.
        """
        await self.process.end_orphan()
        self._start(initial=((self._name, self.peer_url),), state="existing")
        if await self._serves_within(RESUME_SECONDS):
            await self._announce()
        else:
            log.warning("etcd runs, but has no quorum yet: it waits for the other voters")

    async def come_back(self) -> bool:
        """Resume if this node is a voter; whether it is. Raises `UserError`.

        One whose attempt to join died right after it was promoted is a voter as well, and does not
        know it yet. Of two voters neither can be asked without the other, so it starts, and looks.
        """
        if self.standing is Standing.MEMBER:
            await self.resume()
            return True
        is_here = self.standing is Standing.UNFINISHED and self.process.data_directory.exists()
        if not is_here or not self._record.member_id:
            return False
        try:
            await self.process.end_orphan()
            self._start(initial=((self._name, self.peer_url),), state="existing")
            if await self._serves_within(RETURN_SECONDS) and await self._is_voter():
                self._record.write(Standing.MEMBER, self._record.member_id)
                await self._announce()
                return True
        except (UserError, MetadataUnavailable) as error:
            log.info("etcd of an attempt to join cannot be resumed: %s", error)
        log.warning("joining etcd was not finished here: it is begun anew")
        await self.process.stop()
        return False

    async def _is_voter(self) -> bool:
        """Whether we are promoted, as soon as the leader has told us what has come to pass."""
        deadline = trio.current_time() + SETTLE_SECONDS
        while (await self._store.member_status(self.client_endpoint)).is_learner:
            if trio.current_time() > deadline:
                return False
            await trio.sleep(POLL_SECONDS)
        return True

    async def join(self, store: EtcdStore) -> None:
        """Become a voter of the cluster that `store` talks to.

        Raises `UserError`, or `MetadataUnavailable` if it did not succeed in `JOIN_SECONDS`;
        then no child is left running, and `join` may be called again.
        """
        self._assert_unfinished()
        failure: Exception | None = None
        with trio.move_on_after(JOIN_SECONDS) as patience:
            lease = await store.grant(JOIN_LEASE_SECONDS)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(keep_lease, store, lease, nursery.cancel_scope)
                    try:
                        await take_turn(store, self._name, lease)
                        await self._join_in_turn(store)
                    except ModelfsError as error:  # kept, so that no group wraps it
                        failure = error
                    nursery.cancel_scope.cancel()
            finally:
                await revoke(store, lease)
        if self.standing is Standing.MEMBER and failure is None:
            return
        await self.process.stop()
        if failure is None:
            limit = "in time" if patience.cancelled_caught else "before its turn was over"
            failure = MetadataUnavailable(f"this node's etcd did not get in sync {limit}")
        raise failure

    async def run(self) -> None:
        """Keep the child running until `stop`. Raises `MemberRemoved`, `MemberCorrupt`."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_announcing)
            try:
                await self._supervise()
            except UserError as error:  # kept, so that only our caller's nursery wraps it
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def use_new_certificates(self) -> None:
        """Make our own connections with what the files hold now. etcd looks by itself."""
        self._store.set_credentials(self._tls.credentials())

    async def restart(self) -> bool:
        """End the child while `run` runs, which starts it again; whether it serves again in time.

        Its connections end with it, and it reads anew whom to trust.
        """
        self._restarted = trio.Event()
        try:
            await self.process.stop()
            if not self._is_stopping:
                self._launch_again()
        finally:
            self._restarted.set()
            self._restarted = None
        try:
            return await self._serves_within(RESUME_SECONDS)
        except UserError:
            return False  # `run` says why, and sees to it

    async def stop(self) -> None:
        """End the child, in bounded time, also when cancelled. Harmless if there is none."""
        self._is_stopping = True
        await self._store.__aexit__(None, None, None)  # etcd waits for its clients to go
        await self.process.stop()

    def forget(self) -> None:
        """Remove all that a member which has stopped has left: it is of no cluster. Blocks."""
        shutil.rmtree(self.process.data_directory, ignore_errors=True)
        self._record.path.unlink(missing_ok=True)

    # ---------------------------------------------------------------- starting

    def _start(self, initial: Iterable[tuple[str, str]], state: str) -> None:
        check_port(self._address, self._client_port, "--etcd-client-port")
        check_port(self._address, self._peer_port, "--etcd-peer-port")
        self._launch(initial, state)

    def _launch(self, initial: Iterable[tuple[str, str]], state: str) -> None:
        cluster = ",".join(f"{name}={url}" for name, url in initial)
        self.process.start(
            [
                f"--name={self._name}",
                f"--listen-client-urls={self.client_url},{SOCKET_URL}",
                f"--advertise-client-urls={self.client_url}",
                f"--listen-peer-urls={self.peer_url}",
                f"--initial-advertise-peer-urls={self.peer_url}",
                f"--initial-cluster={cluster}",
                f"--initial-cluster-state={state}",
                f"--initial-cluster-token=modelfs-{self._name}",
                *self._tls.arguments(),
            ]
        )

    async def _clear(self) -> None:
        """Make room for a first start. What an unfinished attempt left, nobody relies on."""
        self._assert_unfinished()
        await self.process.end_orphan()
        if self.process.data_directory.exists():
            shutil.rmtree(self.process.data_directory)

    def _assert_unfinished(self) -> None:
        assert self.standing is not Standing.MEMBER

    async def _serves_within(self, seconds: float) -> bool:
        """Whether the member answers and knows a leader in time. Raises if the child ends."""
        deadline = trio.current_time() + seconds
        while trio.current_time() < deadline:
            if not self.process.is_running:
                raise self._exit_error()
            try:
                status = await self._store.member_status(self.client_endpoint)
                if status.leader:
                    return True
            except MetadataUnavailable as error:
                log.debug("etcd does not serve yet: %s", error)
            await trio.sleep(POLL_SECONDS)
        return False

    async def _announce(self) -> None:
        """Tell the cluster our peer URL if it knows another. Failures are left to `run`."""
        try:
            member_id = (await self._store.member_status(self.client_endpoint)).id
            for member in await self._store.members():
                if member.id == member_id and member.peer_urls != (self.peer_url,):
                    await self._store.update_member(member_id, self.peer_url)
                    log.info("etcd's peers now find this member at %s", self.peer_url)
        except UNAVAILABLE as error:
            log.debug("etcd could not be told our address yet: %s", error)
            return
        self._is_announced = True

    # ---------------------------------------------------------------- joining

    async def _join_in_turn(self, store: EtcdStore) -> None:
        learner_id = await self._added_learner(store)
        if learner_id is not None:
            await self._promoted(store, learner_id)
            self._record.write(Standing.MEMBER, learner_id)
        self._is_announced = True

    async def _added_learner(self, store: EtcdStore) -> int | None:
        """Add ourselves as a learner and start it; None if we turn out to be a voter already."""
        while True:
            try:
                known = await store.members()
                if any(self._is_recorded_voter(member) for member in known):
                    self._record.write(Standing.MEMBER)
                    await self.resume()
                    return None
                await self._clear()
                for member in known:
                    await self._remove_leftover(store, member)
                learner = await store.add_learner(self.peer_url)
                self._record.write(Standing.UNFINISHED, learner.id)
                members = await store.members()
                break
            except UNAVAILABLE as error:
                # Mostly "unhealthy cluster": all voters must have been connected for 5 s.
                log.info("etcd does not take us as a learner yet: %s", error)
                if isinstance(error, EtcdRefused) and error.text == TOO_MANY_LEARNERS:
                    await remove_learners(store)
                await trio.sleep(RETRY_SECONDS)
        cluster = [
            (member.name or f"{member.id:x}", url)
            for member in members
            if member.id != learner.id
            for url in member.peer_urls
        ]
        self._start([*cluster, (self._name, self.peer_url)], state="existing")
        return learner.id

    def _is_recorded_voter(self, member: MemberInfo) -> bool:
        """Whether an attempt that died had got as far as being promoted."""
        if self.standing is not Standing.UNFINISHED or member.is_learner:
            return False
        is_here = self.process.data_directory.exists()
        return is_here and self._record.member_id == member.id

    async def _remove_leftover(self, store: EtcdStore, member: MemberInfo) -> None:
        """Remove what we were to the cluster before our data was lost, or an attempt died."""
        if member.name != self._name and self.peer_url not in member.peer_urls:
            return
        if member.name not in ("", self._name) and not member.is_learner:
            raise UserError(
                f"node {member.name} is already a voter of etcd at {self.peer_url}: give this"
                " node another address or another --etcd-peer-port"
            )
        log.warning("removing etcd member %x (%s), left over from before", member.id, member.name)
        await store.remove_member(member.id)

    async def _promoted(self, store: EtcdStore, learner_id: int) -> None:
        """Wait until the learner is a voter."""
        while True:
            if not self.process.is_running:
                raise self._exit_error()
            try:
                ours = [member for member in await store.members() if member.id == learner_id]
                if not ours:
                    raise UserError("another node took us for dead while we joined: try again")
                if not ours[0].is_learner:
                    return
                await store.promote(learner_id)
            except UNAVAILABLE as error:
                log.debug("etcd does not promote us yet: %s", error)
                await trio.sleep(POLL_SECONDS)

    # ---------------------------------------------------------------- running

    async def _supervise(self) -> None:
        pause_seconds = RESTART_SECONDS_MIN
        while True:
            started = trio.current_time()
            while self.process.is_running:
                with trio.move_on_after(LOG_CHECK_SECONDS):
                    await self.process.wait()
                self.process.bound_log()
            if self._is_stopping:
                return
            if self._restarted is not None:
                await self._restarted.wait()
                continue
            error = self._exit_error()
            if isinstance(error, MemberRemoved | MemberCorrupt):
                raise error
            if trio.current_time() - started > STEADY_SECONDS:
                pause_seconds = RESTART_SECONDS_MIN
            log.error("%s; starting it again in %.1f s", error, pause_seconds)
            await trio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, RESTART_SECONDS_MAX)
            if self._is_stopping:
                return
            if not self.process.is_running:  # `restart` may have been first
                self._launch_again()

    def _launch_again(self) -> None:
        """Start the child of a member that runs. What keeps it from starting may pass."""
        try:
            self._launch(((self._name, self.peer_url),), state="existing")
        except (OSError, UserError) as error:
            log.error("etcd cannot be started now: %s", error)

    async def _keep_announcing(self) -> None:
        while not self._is_announced:
            await self._announce()
            await trio.sleep(RETRY_SECONDS)

    def _exit_error(self) -> UserError:
        return exit_error(self.process, self._record.path)
