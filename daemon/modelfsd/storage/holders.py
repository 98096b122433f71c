"""Who holds which chunks: asks the nodes that are up, this one included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import trio

from modelfs.errors import PeerRefused, PeerUnavailable
from modelfs.ids import ChunkId, NodeId
from modelfsd.storage.chunks import Chunks


@dataclass(slots=True)
class Holders:
    """For each node that is up, which of the chunks it has. One that did not answer has none."""

    answers: dict[NodeId, list[bool]] = field(default_factory=dict)  # in the order of their names
    silent: dict[NodeId, str] = field(default_factory=dict)  # and why

    def counts(self) -> list[int]:
        """How many nodes have each chunk."""
        return [sum(have) for have in zip(*self.answers.values(), strict=True)]


async def ask_holders(chunks: Chunks, ids: Sequence[ChunkId]) -> Holders:
    """Ask all nodes about all of these chunks."""
    found = await ask_nodes(chunks, dict.fromkeys({*chunks.mirror.nodes, chunks.node_id}, ids))
    by_name = sorted(found.answers.items(), key=lambda item: chunks.name_of(item[0]))
    found.answers = dict(by_name)
    return found


async def ask_nodes(chunks: Chunks, questions: Mapping[NodeId, Sequence[ChunkId]]) -> Holders:
    """Ask each of these nodes about the chunks that go with it, all at once."""
    found = Holders()

    async def ask(node: NodeId, ids: Sequence[ChunkId]) -> None:
        try:
            if node == chunks.node_id:
                answer = await trio.to_thread.run_sync(chunks.store.has, ids, False)
            else:
                answer = await chunks.peers.has(node, ids, False)
        except (PeerUnavailable, PeerRefused) as error:
            found.silent[node] = str(error.reason)
            answer = [False] * len(ids)
        except OSError as error:  # this node's disk
            found.silent[node] = str(error)
            answer = [False] * len(ids)
        found.answers[node] = answer

    async with trio.open_nursery() as nursery:
        for node, ids in questions.items():
            nursery.start_soon(ask, node, ids)
    return found
