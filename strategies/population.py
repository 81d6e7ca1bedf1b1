"""The federation's clients: node ids come and go, client ids stay.

A node id is random for every process start (unless SuperNodes are authenticated), so each new node is asked once who
it is. The answer is the client's claim: two nodes that claim one id are told apart by refusing the later one.
"""

from collections.abc import Iterable
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import log
from flwr.serverapp import Grid


class Population:
    """Maps node ids to client ids, asks new nodes for theirs, and remembers who owes a reply."""

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self.client_of: dict[int, int] = {}  # node id -> client id, of every node ever accepted
        self.node_of: dict[int, int] = {}  # client id -> node id, of the clients that are here now
        self.malicious: set[int] = set()  # clients that say they are malicious; for the record only
        self.owing: dict[int, str] = {}  # node id -> id of the message it has not answered
        self.federation_size: int | None = None  # how many clients there are, as the clients themselves say
        self._refused: set[int] = set()

    def refresh(self, grid: Grid, timeout: float) -> list[int]:
        """Return the clients that are here and owe no reply, sorted; new nodes are asked who they are."""
        here = set(grid.get_node_ids())
        self._settle(grid)
        new = sorted(here - self.client_of.keys() - self._refused - self.owing.keys())
        if new:
            self._ask(grid, new, timeout)
        self.node_of = {self.client_of[n]: n for n in sorted(here & self.client_of.keys()) if self._current(n)}
        return sorted(client for client, node in self.node_of.items() if node not in self.owing)

    def missed(self, node: int, message_id: str) -> None:
        """Note that a node did not answer in time: it is not asked again until it has, as nodes work one by one."""
        self.owing[node] = message_id

    def _current(self, node: int) -> bool:
        """A client that came back as a new node is the newest one accepted under its id."""
        newest = [n for n, client in self.client_of.items() if client == self.client_of[node]][-1]
        return newest == node

    def _settle(self, grid: Grid) -> None:
        """Collect late replies; they are too late to use, but their senders are free again."""
        if self.owing:
            late = {reply.metadata.reply_to_message_id for reply in grid.pull_messages(set(self.owing.values()))}
            self.owing = {node: message for node, message in self.owing.items() if message not in late}

    def _ask(self, grid: Grid, nodes: Iterable[int], timeout: float) -> None:
        sent = [Message(RecordDict(), node, "query.whoami", ttl=timeout) for node in nodes]
        replies = list(grid.send_and_receive(sent, timeout=timeout))
        owner = {message.metadata.message_id: message.metadata.dst_node_id for message in sent}
        live = {n for n in self.node_of.values() if n in set(grid.get_node_ids())}
        for reply in sorted(replies, key=lambda r: owner.get(r.metadata.reply_to_message_id, 0)):
            node = owner.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                self._admit(node, reply, live)
        for message_id, node in owner.items():
            log(WARNING, "node %s did not say who it is within %.0f s", node, timeout)
            self.missed(node, message_id)

    def _admit(self, node: int, reply: Message, live: set[int]) -> None:
        answer = reply.content.get("whoami") if reply.has_content() else None
        client = answer.get("client") if isinstance(answer, ConfigRecord) else None
        if not isinstance(client, int) or isinstance(client, bool) or not 0 <= client < self.num_clients:
            reason = reply.error.reason if reply.has_error() else f"it claims client {str(client)[:40]!r}"
            log(WARNING, "node %s refused: %s; clients are 0 to %d", node, str(reason)[:200], self.num_clients - 1)
            self._refused.add(node)
            return
        if any(self.client_of[n] == client for n in live):
            log(WARNING, "node %s refused: client %d is already here as another node", node, client)
            self._refused.add(node)
            return
        live.add(node)
        self.client_of[node] = client
        if isinstance(answer, ConfigRecord):
            self._note(client, answer)
        if self.num_clients <= 16:
            log(INFO, "client %d is node %s", client, node)

    def _note(self, client: int, answer: ConfigRecord) -> None:
        if answer.get("role") == "malicious":
            self.malicious.add(client)
        if isinstance(size := answer.get("federation-size"), int):
            self.federation_size = max(size, self.federation_size or 0)
