"""A grid whose clients answer in this process: what a strategy asks of Flower's, without Flower's processes."""

import abc
from collections.abc import Iterable

from flwr.app import ConfigRecord, Message, RecordDict


class AnsweringGrid(abc.ABC):
    """A grid of benign clients 0, 1, ...; a subclass's `train` is what they reply to a training message."""

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self.answers: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.num_clients + 1))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self._reply(message, number) for number, message in enumerate(messages)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for number, message in enumerate(messages):
            reply = self._reply(message, number)
            self.answers[reply.metadata.reply_to_message_id] = reply
        return list(self.answers)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.answers.pop(i) for i in list(message_ids) if i in self.answers]

    @abc.abstractmethod
    def train(self, message: Message, client: int) -> Message: ...

    def _reply(self, message: Message, number: int) -> Message:
        message.metadata.__dict__["_message_id"] = f"{message.metadata.message_type}-{number}"
        client = message.metadata.dst_node_id - 1
        if message.metadata.message_type == "train":
            return self.train(message, client)
        return Message(RecordDict({"whoami": ConfigRecord({"client": client, "role": "benign"})}), reply_to=message)
