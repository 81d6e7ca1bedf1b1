"""The federation's clients: node ids come and go, client ids stay.

A node id is random for every process start (unless SuperNodes are authenticated), so each new node is asked once who
it is. The answer is what the client claims: of two nodes that claim one id the later waits until the earlier is gone.
"""

from collections.abc import Iterable
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

ASK_TIMEOUT = 30.0  # seconds a round waits for a new node to say who it is


class Population:
    """Maps node ids to client ids, asks new nodes for theirs, and remembers who owes a reply."""

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self.client_of: dict[int, int] = {}  # node id -> client id, of every node ever accepted
        self.node_of: dict[int, int] = {}  # client id -> node id, of the clients that are here now
        self.malicious: set[int] = set()  # clients that say they are malicious; for the record only
        self.owing: dict[int, str] = {}  # node id -> id of the message it has not answered
        self.federation_size: int | None = None  # how many clients there are, as the clients themselves say
        self._refused: set[int] = set()  # nodes whose answer was no client id
        self._waiting: dict[int, ConfigRecord] = {}  # node id -> its answer, while another node is that client

    def refresh(self, grid: Grid, timeout: float = ASK_TIMEOUT) -> list[int]:
        """Return the clients that are here and owe no reply, sorted; new nodes are asked who they are."""
        here = set(grid.get_node_ids())
        self._settle(grid)
        self._waiting = {node: answer for node, answer in self._waiting.items() if node in here}
        for node, answer in list(self._waiting.items()):
            self._admit(node, answer, here)
        known = self.client_of.keys() | self._refused | self._waiting.keys() | self.owing.keys()
        if new := sorted(here - known):
            self._ask(grid, new, timeout, here)
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

    def _ask(self, grid: Grid, nodes: Iterable[int], timeout: float, here: set[int]) -> None:
        sent = [Message(RecordDict(), node, "query.whoami") for node in nodes]
        replies = list(grid.send_and_receive(sent, timeout=timeout))
        owner = {message.metadata.message_id: message.metadata.dst_node_id for message in sent}
        for reply in sorted(replies, key=lambda r: owner.get(r.metadata.reply_to_message_id, 0)):
            node = owner.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                self._hear(node, reply, here)
        for message_id, node in owner.items():
            log(WARNING, "node %s did not say who it is within %.0f s", node, timeout)
            self.missed(node, message_id)

    def _hear(self, node: int, reply: Message, here: set[int]) -> None:
        answer = reply.content.get("whoami") if reply.has_content() else None
        client = answer.get("client") if isinstance(answer, ConfigRecord) else None
        if not isinstance(answer, ConfigRecord) or not isinstance(client, int) or isinstance(client, bool):
            reason = reply.error.reason if reply.has_error() else f"it claims to be {str(client)[:40]!r}"
            self._refuse(node, str(reason)[:200])
        elif not 0 <= client < self.num_clients:
            self._refuse(node, f"it claims client {str(client)[:40]}, clients are 0 to {self.num_clients - 1}")
        else:
            self._admit(node, answer, here)

    def _refuse(self, node: int, reason: str) -> None:
        log(WARNING, "node %s refused: %s", node, reason)
        self._refused.add(node)

    def _admit(self, node: int, answer: ConfigRecord, here: set[int]) -> None:
        """Make a node its client, unless another node that is here is that client already."""
        client = int(answer["client"])  # type: ignore[arg-type]
        if any(self.client_of[other] == client for other in here & self.client_of.keys()):
            if node not in self._waiting:
                log(WARNING, "node %s waits: client %d is here as another node", node, client)
            self._waiting[node] = answer
            return
        self._waiting.pop(node, None)
        self.client_of[node] = client
        self._note(client, answer)
        if self.num_clients <= 16:
            log(INFO, "client %d is node %s", client, node)

    def _note(self, client: int, answer: ConfigRecord) -> None:
        if answer.get("role") == "malicious":
            self.malicious.add(client)
        if isinstance(size := answer.get("federation-size"), int):
            self.federation_size = max(size, self.federation_size or 0)
