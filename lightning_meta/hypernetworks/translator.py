r"""A compact GNMT whose cells are LSTMs or HyperLSTMs (Wu et al. 2016; Ha et al. 2016, section 4.6).

Letters: B sentences, S pieces of a source sentence and T of a target one, each with its end; V pieces that the model
knows, D numbers of a piece's embedding, H units of a layer, K hypotheses of a beam. What is said here of GNMT is
recalled, but for what Ha et al. print.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_meta.hypernetworks.recurrent import Network, recurrent_network
from lightning_meta.sources.subwords import BOS, EOS, PAD, UNKNOWN

State = tuple[Tensor, Tensor]


class Memory(NamedTuple):
    """Source sentences as the decoder reads them."""

    values: Tensor  # (B, S, H)
    keys: Tensor  # (B, S, H): what a query is compared with
    present: Tensor  # (B, S), bool: False where a sentence is over


class Encoder(nn.Module):
    """Reads source sentences: a bidirectional layer and others above it, with residual connections from the third on.

    Args:
        pieces: V.
        piece_size: D.
        hidden_size: H.
        layers: At least 2.
        dropout: Probability that a number is dropped on its way into a layer, in training.
        network: See ``recurrent_network``.
        options: Of ``recurrent_network``.
    """

    def __init__(
        self, pieces: int, piece_size: int, hidden_size: int, layers: int, dropout: float, network: Network, **options
    ):
        super().__init__()
        self.embed, self.dropout = nn.Embedding(pieces, piece_size), dropout
        first = recurrent_network(network, piece_size, hidden_size, bidirectional=True, **options)
        inputs = [2 * hidden_size] + [hidden_size] * (layers - 2)
        self.layers = nn.ModuleList([first, *(recurrent_network(network, n, hidden_size, **options) for n in inputs)])

    def forward(self, source: Tensor) -> Tensor:
        """What stands at each place (B, S, H) of sentences (S, B); zeros where there is none."""
        lengths = (source != PAD).sum(0).cpu()
        x = pack_padded_sequence(self.embed(source), lengths, enforce_sorted=False)
        for i, layer in enumerate(self.layers):
            y, _ = layer(x._replace(data=F.dropout(x.data, self.dropout, self.training)))
            x = y if i < 2 else y._replace(data=y.data + x.data)
        return pad_packed_sequence(x, batch_first=True, total_length=len(source))[0]


class Attention(nn.Module):
    r"""Looks up the source by what the decoder says (Bahdanau et al. 2015): a network of one hidden layer.

    .. math:: a_{ts} = \mathrm{softmax}_s\, v^T \tanh(W q_t + U x_s), \quad m_t = \sum_s a_{ts} x_s

    Args:
        size: H.
    """

    def __init__(self, size: int):
        super().__init__()
        self.query, self.key = nn.Linear(size, size, bias=False), nn.Linear(size, size)  # W, U
        self.score = nn.Linear(size, 1, bias=False)  # v

    def memory(self, values: Tensor, present: Tensor) -> Memory:
        """What ``forward`` reads of x (B, S, H)."""
        return Memory(values, self.key(values), present)

    def forward(self, q: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """The contexts m (B, T, H) and the weights a (B, T, S) for queries q (B, T, H)."""
        hidden = torch.tanh(self.query(q)[:, :, None] + memory.keys[:, None])
        scores = self.score(hidden).squeeze(-1)
        weights = scores.masked_fill(~memory.present[:, None], float("-inf")).softmax(-1)
        return weights.to(memory.values.dtype) @ memory.values, weights


class Decoder(nn.Module):
    """Writes target sentences: the bottom layer asks the attention, the layers above it read the context as well.

    The bottom layer itself does not read the context, so that a known sentence runs through it as a whole, then the
    attention, then each layer above. Residual connections begin at the third layer.

    Args:
        pieces: V.
        piece_size: D.
        hidden_size: H.
        layers: At least 2.
        dropout: As of ``Encoder``.
        network: See ``recurrent_network``.
        options: Of ``recurrent_network``.
    """

    def __init__(
        self, pieces: int, piece_size: int, hidden_size: int, layers: int, dropout: float, network: Network, **options
    ):
        super().__init__()
        self.embed, self.dropout = nn.Embedding(pieces, piece_size), dropout
        inputs = [piece_size] + [2 * hidden_size] * (layers - 1)
        self.layers = nn.ModuleList(recurrent_network(network, n, hidden_size, **options) for n in inputs)
        self.attention = Attention(hidden_size)
        self.output = nn.Linear(hidden_size, pieces)

    def forward(
        self, pieces: Tensor, memory: Memory, states: list[State | None] | None = None
    ) -> tuple[Tensor, list[State], Tensor]:
        """Runs over what was written so far.

        Args:
            pieces: (T, K * B): K hypotheses for each sentence; hypothesis k of sentence b in column k * B + b.
            memory: The B sentences.
            states: Of each layer. None: the start.

        Returns:
            Logits of the piece after each (T, K * B, V), states, attention weights (K, B, T, S).
        """
        states = states or [None] * len(self.layers)
        (T, _), B = pieces.shape, len(memory.values)
        q, state = self.layers[0](self._dropped(self.embed(pieces)), states[0])
        asked = q.view(T, -1, B, q.shape[-1]).permute(2, 1, 0, 3)  # (B, K, T, H)
        context, weights = self.attention(asked.flatten(1, 2), memory)
        context = context.view(asked.shape).permute(2, 1, 0, 3).reshape(q.shape)
        x, after = q, [state]
        for i, layer in enumerate(self.layers[1:], 1):
            y, state = layer(self._dropped(torch.cat([x, context], -1)), states[i])
            x = y if i < 2 else x + y
            after.append(state)
        return self.output(self._dropped(x)), after, weights.unflatten(1, (-1, T)).transpose(0, 1)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Hypotheses(NamedTuple):
    """The best translation that a search found for each sentence."""

    pieces: Tensor  # (T, B): with EOS, then PAD
    scores: Tensor  # (B,)
    attention: Tensor  # (B, T, S)


class Translator(nn.Module):
    """Encoder, attention and decoder.

    Args:
        pieces: V, of both languages together.
        piece_size: D.
        hidden_size: H.
        encoder_layers: At least 2.
        decoder_layers: At least 2.
        dropout: Probability that a number is dropped on its way into a layer, in training.
        network: ``lstm`` or ``hyper_lstm``.
        options: Of ``recurrent_network``.

    Raises:
        ValueError: An option does not fit.
    """

    def __init__(
        self,
        pieces: int,
        piece_size: int,
        hidden_size: int,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        dropout: float = 0.0,
        network: Network = "hyper_lstm",
        **options,
    ):
        super().__init__()
        for name, layers in (("encoder_layers", encoder_layers), ("decoder_layers", decoder_layers)):
            if layers < 2:
                raise ValueError(f"expected {name} of at least 2, got {layers}: the first one is of another kind")
        if not 0 <= dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got {dropout}: choose a probability")
        self.encoder = Encoder(pieces, piece_size, hidden_size, encoder_layers, dropout, network, **options)
        self.decoder = Decoder(pieces, piece_size, hidden_size, decoder_layers, dropout, network, **options)

    def read(self, source: Tensor) -> Memory:
        """Sentences (S, B), each with EOS, then PAD."""
        return self.decoder.attention.memory(self.encoder(source), source.t() != PAD)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Minus the logarithm of the probability of each piece of ``target`` (T, B) after those before it; 0 for PAD.

        Args:
            source: (S, B): pieces and EOS, then PAD.
            target: (T, B), likewise.
        """
        before = torch.cat([torch.full_like(target[:1], BOS), target[:-1]])
        logits, _, _ = self.decoder(before, self.read(source))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, reduction="none")
        return losses.view(target.shape)

    @torch.no_grad()
    def search(
        self,
        source: Tensor,
        longest: Tensor,
        beam: int = 4,
        length_penalty: float = 0.2,
        coverage_penalty: float = 0.2,
    ) -> Hypotheses:
        r"""Looks for the translation Y of each sentence X with the best score (GNMT's, recalled), piece by piece.

        .. math::
            s(Y, X) &= \log P(Y | X) / lp(Y) + \beta \sum_s \log \min(\sum_t a_{ts}, 1) \\
            lp(Y) &= (5 + |Y|)^\alpha / (5 + 1)^\alpha

        At each step the K likeliest hypotheses that go on are kept. One that ends competes for the best score if it was
        among the K likeliest of all. The search of a sentence is over when K have ended and one of them is likelier
        than all that go on: a model that is sure has a few unlikely ones end long before the right one. A beam of 1 is
        the greedy search. The end counts as a piece, in |Y| and in the sum over t.

        Args:
            source: (S, B): pieces and EOS, then PAD.
            longest: (B,): most pieces of a translation, its end counted; there it must end.
            beam: K.
            length_penalty: alpha.
            coverage_penalty: beta.
        """
        memory, K, (S, B) = self.read(source), beam, source.shape
        V, T = self.decoder.output.out_features, int(longest.max())
        columns, every = torch.arange(B, device=source.device), torch.arange(V, device=source.device)
        pieces, states = torch.full((1, K * B), BOS, device=source.device), None
        written = torch.full((T, K, B), PAD, device=source.device)
        attention = memory.values.new_zeros(K, B, T, S)
        odds = memory.values.new_full((K, B), float("-inf"))  # log P of the hypotheses that go on
        odds[0] = 0
        best = Hypotheses(written[:, 0].clone(), odds.new_full((B,), float("-inf")), attention[0].clone())
        ended, likeliest = torch.zeros_like(longest), odds.new_full((B,), float("-inf"))  # of those: log P
        for t in range(T):
            searching = ((ended < K) | (odds.amax(0) > likeliest)) & (t < longest)
            if not searching.any():
                break
            logits, states, weights = self.decoder(pieces, memory, states)
            attention[:, :, t] = weights[:, :, 0]
            allowed = (every == EOS) | ((longest > t + 1)[:, None] & (every > UNKNOWN))  # (B, V)
            step = logits[0].to(odds.dtype).log_softmax(-1).view(K, B, V).masked_fill(~allowed, float("-inf"))
            total = (odds[..., None] + step).transpose(0, 1).flatten(1)
            top, order = (x.t() for x in total.topk(min(2 * K, K * V)))  # K of them do not end, where there are so many
            parent, piece = order // V, order % V

            ends = (piece == EOS) & top.isfinite()
            counted = ends[:K] & searching
            covered = attention[:, :, : t + 1].sum(2).clamp(1e-9, 1).log() * memory.present
            penalty = coverage_penalty * covered.sum(-1).gather(0, parent[:K])
            scores = top[:K] / ((6 + t) / 6) ** length_penalty + penalty
            score, which = scores.masked_fill(~counted, float("-inf")).max(0)
            whose = parent[which, columns]
            found = written[:, whose, columns]
            found[t] = EOS
            better = score > best.scores
            best = Hypotheses(
                torch.where(better, found, best.pieces),
                torch.where(better, score, best.scores),
                torch.where(better[:, None, None], attention[whose, columns], best.attention),
            )
            ended = ended + counted.sum(0)
            likeliest = torch.maximum(likeliest, top[:K].masked_fill(~counted, float("-inf")).amax(0))

            first = (piece == EOS).long().argsort(dim=0, stable=True)[:K]  # the likeliest that do not end
            parent, piece, odds = (x.gather(0, first) for x in (parent, piece, top))
            odds = odds.masked_fill(piece == EOS, float("-inf"))  # there were fewer than K
            rows = (parent * B + columns).flatten()
            states = [tuple(part.index_select(1, rows) for part in state) for state in states]
            written, attention = written[:, parent, columns], attention[parent, columns]
            written[t] = piece
            pieces = piece.view(1, -1)
        return best
