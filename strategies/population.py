"""The federation's clients: node ids come and go, client ids stay.

A node id is random for every process start (unless SuperNodes are authenticated), so each new node is asked who it is.
Nothing here waits: questions are sent in one round and answers collected in a later one, so that a node which never
answers costs nobody time. The answer is the node's claim; of two nodes that claim one client the later one waits until
the earlier is gone.

A process that is killed and started again before anybody missed it is the same node, and knows nothing of what it was
asked: its reply would be waited for for ever. Nodes work one message at a time, so a node that owes a reply is asked
who it is: an answer says that it is free.
"""

from collections.abc import Iterable
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from strategies.checks import shorten

MAX_QUESTIONS = 3  # a node that answers with errors is asked so often
LONGEST_REST = 64  # rounds
PATIENCE = 20  # looks for an answer until the question is asked again, as it may be lost too; doubles each time


class Population:
    """Maps node ids to client ids, asks new nodes for theirs, and remembers who owes a reply or rests."""

    def __init__(self, num_clients: int, restarts: bool = False) -> None:
        self.num_clients = num_clients
        self.restarts = restarts  # whether nodes may be processes that forget what they were asked
        self.client_of: dict[int, int] = {}  # node id -> client id, of every node accepted, in order of acceptance
        self.node_of: dict[int, int] = {}  # client id -> node id, of the clients that are here now
        self.roles: dict[int, str] = {}  # client id -> role it says it has; for the record only
        self.owing: dict[int, str] = {}  # node id -> id of the message it has not answered in time
        self._asked: dict[int, str] = {}  # node id -> id of the question it has not answered yet
        self._questions: dict[int, int] = {}  # node id -> how often it was asked
        self._looks: dict[int, int] = {}  # node id -> looks for its answer since it was asked
        self._probes: dict[int, int] = {}  # node id -> questions lost since it owes a reply
        self._refused: set[int] = set()  # nodes whose answer was no client id
        self._waiting: dict[int, ConfigRecord] = {}  # node id -> its answer, while another node is that client
        self._misses: dict[int, int] = {}  # client id -> deadlines missed so far
        self._rest: dict[int, int] = {}  # client id -> rounds it still sits out

    def refresh(self, grid: Grid) -> list[int]:
        """Return the clients that are here, owe no reply and do not rest, sorted; never waits."""
        here = set(grid.get_node_ids())
        self._forget(here)
        self._collect(grid, here)
        for node, answer in list(self._waiting.items()):
            self._admit(node, answer, here)
        known = self.client_of.keys() | self._refused | self._waiting.keys()
        self._ask(grid, sorted((here - known - self._asked.keys()) | self._unheard()))
        self._collect(grid, here)  # engines that answer at once have answered
        self.node_of = {client: node for node, client in self.client_of.items() if node in here}
        return sorted(c for c, node in self.node_of.items() if node not in self.owing and not self._rest.get(c))

    @property
    def num_free(self) -> int:
        """Clients that were here at the last `refresh` and owe no reply; those that rest count."""
        return sum(node not in self.owing for node in self.node_of.values())

    def end_round(self, missed: dict[int, str]) -> None:
        """Note who did not answer in time (node id -> message id); everybody's rest gets a round shorter.

        Such a client is not asked again until its late reply has come, as nodes work one message at a time, and then
        sits out 1, 2, 4, ... rounds: one that is late again and again cannot make every round wait.
        """
        self._rest = {client: left - 1 for client, left in self._rest.items() if left > 1}
        for node, message_id in missed.items():
            client = self.client_of[node]
            self.owing[node] = message_id
            self._misses[client] = self._misses.get(client, 0) + 1
            self._rest[client] = min(2 ** (self._misses[client] - 1), LONGEST_REST)

    def _forget(self, here: set[int]) -> None:
        """Drop what concerns nodes that are gone."""
        for book in (self.owing, self._asked, self._waiting, self._questions, self._looks, self._probes):
            for node in book.keys() - here:
                del book[node]
        self._refused &= here

    def _unheard(self) -> set[int]:
        """Return the nodes to ask because they may have forgotten what they owe, or the question itself."""
        if not self.restarts:
            return set()
        again = set()
        for node in self._asked:
            self._looks[node] = self._looks.get(node, 0) + 1
            if self._looks[node] >= PATIENCE * 2 ** self._probes.get(node, 0):
                self._probes[node] = self._probes.get(node, 0) + 1
                again.add(node)
        return again | (self.owing.keys() - self._asked.keys())

    def _ask(self, grid: Grid, nodes: Iterable[int]) -> None:
        questions = [Message(RecordDict(), node, "query.whoami") for node in nodes]
        if questions:
            grid.push_messages(questions)
        for question in questions:
            node = question.metadata.dst_node_id
            self._asked[node] = question.metadata.message_id
            self._looks[node] = 0
            if node not in self.client_of:
                self._questions[node] = self._questions.get(node, 0) + 1

    def _collect(self, grid: Grid, here: set[int]) -> None:
        """Take answers to questions, and late replies: too late to use, but their senders are free again."""
        questions = {message: node for node, message in self._asked.items()}
        expected = questions | {message: node for node, message in self.owing.items()}
        if not expected:
            return
        replies = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(list(expected))}
        for message_id, node in sorted(expected.items(), key=lambda item: item[1]):
            if message_id not in replies:
                continue
            self.owing.pop(node, None)
            if message_id in questions:
                del self._asked[node]
                self._probes.pop(node, None)
                if node not in self.client_of:
                    self._hear(node, replies[message_id], here)

    def _hear(self, node: int, reply: Message, here: set[int]) -> None:
        if reply.has_error():
            if self._questions[node] >= MAX_QUESTIONS:
                self._refuse(node, f"it answers with errors: {shorten(reply.error.reason)}")
            return
        answer = reply.content.get("whoami")
        client = answer.get("client") if isinstance(answer, ConfigRecord) else None
        if not isinstance(answer, ConfigRecord) or not isinstance(client, int) or isinstance(client, bool):
            self._refuse(node, f"it claims to be {shorten(repr(client), 40)}")
        elif not 0 <= client < self.num_clients:
            self._refuse(node, f"it claims client {client}, clients are 0 to {self.num_clients - 1} (num-clients)")
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
        self.roles[client] = "malicious" if answer.get("role") == "malicious" else "benign"
        if self.num_clients <= 16:
            log(INFO, "client %d is node %s", client, node)
