"""The LSTM of "Attack of the Tails" (Wang et al., NeurIPS 2020) for texts: embedding, two layers, one decision.

Embedding and hidden states of 200, dropout 0.5 on the embedding, between the layers and before the decision. For
sentiment the paper has one sigmoid output and binary cross-entropy; here two classes' logits and cross-entropy, which
is the same function of their difference. For next words the classes are words.

PyTorch's LSTM of several layers draws its dropout from the global generator, so each layer is an LSTM of its own. Rows
are padded on the left (id 0), so that the last step is always a word.
"""

from torch import Tensor, nn

from tasks.errors import ConfigError
from tasks.models._layers import SeededDropout


class TextLstm(nn.Module):
    """Word ids [batch, words] -> logits [batch, classes]."""

    def __init__(
        self, vocabulary: int, num_classes: int, embedding: int, hidden: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding, padding_idx=0)
        sizes = [embedding, *[hidden] * layers]
        self.layers = nn.ModuleList(nn.LSTM(size, hidden, batch_first=True) for size in sizes[:-1])
        self.dropout = SeededDropout(dropout)
        self.decide = nn.Linear(hidden, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.long()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.embed.num_embeddings:
            raise ConfigError(
                f"the model knows {self.embed.num_embeddings} word ids and the texts have id {int(ids.max())}; give "
                "the model the data set's number of words, as in lstm(vocabulary=5000)"
            )
        states = self.dropout(self.embed(ids))
        for layer in self.layers:
            states = self.dropout(layer(states)[0])
        return self.decide(states[:, -1])


def lstm(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    vocabulary: int = 0,
    embedding: int = 200,
    hidden: int = 200,
    layers: int = 2,
    dropout: float = 0.5,
) -> nn.Module:
    """Return the network for rows of word ids; `vocabulary` ids, 0: as many as classes (next words)."""
    if len(input_shape) != 1 or num_classes < 2:
        raise ConfigError(f"model lstm wants rows of word ids and 2 classes or more, got {input_shape}, {num_classes}")
    if min(embedding, hidden, layers) < 1 or vocabulary < 0:
        raise ConfigError(f"lstm wants sizes of at least 1, got {embedding}, {hidden}, {layers}, {vocabulary}")
    return TextLstm(vocabulary or num_classes, num_classes, embedding, hidden, layers, dropout)
