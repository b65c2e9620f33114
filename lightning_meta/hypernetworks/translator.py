r"""A compact GNMT with LSTM or HyperLSTM cells (Wu et al. 2016; Ha et al. 2016, section 4.6).

Letters: B sentences, S subwords of a source sentence and T of a target sentence, with the end symbol; V subwords in the
vocabulary, D numbers of a subword's embedding, H units of a layer, K hypotheses of a beam. What Ha et al. do not print
about GNMT is from memory.
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
    """Encoded source sentences, which the decoder attends to."""

    values: Tensor  # (B, S, H)
    keys: Tensor  # (B, S, H): what queries are compared with
    present: Tensor  # (B, S), bool: False for padding


class Encoder(nn.Module):
    """Encoder: a bidirectional layer and forward layers above it, with residual connections from the third layer on.

    Args:
        subwords: V.
        piece_size: D.
        hidden_size: H.
        layers: Number of layers, at least 2.
        dropout: Dropout probability at the input of each layer.
        network: ``lstm`` or ``hyper_lstm``.
        options: See ``recurrent_network``.
    """

    def __init__(
        self, subwords: int, piece_size: int, hidden_size: int, layers: int, dropout: float, network: Network, **options
    ):
        super().__init__()
        self.embed, self.dropout = nn.Embedding(subwords, piece_size), dropout
        first = recurrent_network(network, piece_size, hidden_size, bidirectional=True, **options)
        inputs = [2 * hidden_size] + [hidden_size] * (layers - 2)
        self.layers = nn.ModuleList([first, *(recurrent_network(network, n, hidden_size, **options) for n in inputs)])

    def forward(self, source: Tensor) -> Tensor:
        """Encode sentences (S, B) as (B, S, H), with zeros for padding."""
        lengths = (source != PAD).sum(0).cpu()
        x = pack_padded_sequence(self.embed(source), lengths, enforce_sorted=False)
        for i, layer in enumerate(self.layers):
            y, _ = layer(x._replace(data=F.dropout(x.data, self.dropout, self.training)))
            x = y if i < 2 else y._replace(data=y.data + x.data)
        return pad_packed_sequence(x, batch_first=True, total_length=len(source))[0]


class Attention(nn.Module):
    r"""Additive attention (Bahdanau et al. 2015): a network with one hidden layer scores each source position.

    .. math:: a_{ts} = \mathrm{softmax}_s\, v^T \tanh(W q_t + U x_s), \quad m_t = \sum_s a_{ts} x_s

    Args:
        size: H.
    """

    def __init__(self, size: int):
        super().__init__()
        self.query, self.key = nn.Linear(size, size, bias=False), nn.Linear(size, size)  # W, U
        self.score = nn.Linear(size, 1, bias=False)  # v

    def memory(self, values: Tensor, present: Tensor) -> Memory:
        """Prepare the encoded source x (B, S, H) for ``forward``."""
        return Memory(values, self.key(values), present)

    def forward(self, q: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return the contexts m (B, T, H) and the weights a (B, T, S) of queries q (B, T, H)."""
        hidden = torch.tanh(self.query(q)[:, :, None] + memory.keys[:, None])
        scores = self.score(hidden).squeeze(-1)
        weights = scores.masked_fill(~memory.present[:, None], float("-inf")).softmax(-1)
        return weights.to(memory.values.dtype) @ memory.values, weights


class Decoder(nn.Module):
    """Decoder: the bottom layer's output is the attention's query; the layers above also read the context.

    The bottom layer does not read the context, so in training each layer processes the whole target sentence at once:
    first the bottom layer, then the attention, then the layers above. Residual connections start at the third layer.

    Args:
        subwords: V.
        piece_size: D.
        hidden_size: H.
        layers: Number of layers, at least 2.
        dropout: Dropout probability at the input of each layer.
        network: ``lstm`` or ``hyper_lstm``.
        options: See ``recurrent_network``.
    """

    def __init__(
        self, subwords: int, piece_size: int, hidden_size: int, layers: int, dropout: float, network: Network, **options
    ):
        super().__init__()
        self.embed, self.dropout = nn.Embedding(subwords, piece_size), dropout
        inputs = [piece_size] + [2 * hidden_size] * (layers - 1)
        self.layers = nn.ModuleList(recurrent_network(network, n, hidden_size, **options) for n in inputs)
        self.attention = Attention(hidden_size)
        self.output = nn.Linear(hidden_size, subwords)

    def forward(
        self, subwords: Tensor, memory: Memory, states: list[State | None] | None = None
    ) -> tuple[Tensor, list[State], Tensor]:
        """Process target subwords and predict the subword after each.

        Args:
            subwords: (T, K * B): K hypotheses for each sentence; hypothesis k of sentence b is column k * B + b.
            memory: The B source sentences.
            states: State of each layer. None: the initial state.

        Returns:
            Logits (T, K * B, V), states, attention weights (K, B, T, S).
        """
        states = states or [None] * len(self.layers)
        (T, _), B = subwords.shape, len(memory.values)
        q, state = self.layers[0](self._drop(self.embed(subwords)), states[0])
        query = q.view(T, -1, B, q.shape[-1]).permute(2, 1, 0, 3)  # (B, K, T, H)
        context, weights = self.attention(query.flatten(1, 2), memory)
        context = context.view(query.shape).permute(2, 1, 0, 3).reshape(q.shape)
        x, after = q, [state]
        for i, layer in enumerate(self.layers[1:], 1):
            y, state = layer(self._drop(torch.cat([x, context], -1)), states[i])
            x = y if i < 2 else x + y
            after.append(state)
        return self.output(self._drop(x)), after, weights.unflatten(1, (-1, T)).transpose(0, 1)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Hypotheses(NamedTuple):
    """The best translation that beam search found for each sentence."""

    subwords: Tensor  # (T, B): subwords and EOS, then PAD
    scores: Tensor  # (B,)
    attention: Tensor  # (B, T, S)


class Translator(nn.Module):
    """Translation model: encoder, attention and decoder.

    Args:
        subwords: V, subwords of both languages together.
        piece_size: D.
        hidden_size: H.
        encoder_layers: Number of encoder layers, at least 2.
        decoder_layers: Number of decoder layers, at least 2.
        dropout: Dropout probability at the input of each layer.
        network: ``lstm`` or ``hyper_lstm``.
        options: See ``recurrent_network``.

    Raises:
        ValueError: If an option is out of range.

    >>> import torch
    >>> translator = Translator(20, 4, 6, layer_norm=True).eval()
    >>> source, target = torch.randint(4, 20, (5, 3)), torch.randint(4, 20, (7, 3))
    >>> translator(source, target).shape
    torch.Size([7, 3])
    >>> translator.beam_search(source, torch.tensor([4, 5, 6])).subwords.shape
    torch.Size([6, 3])
    """

    def __init__(
        self,
        subwords: int,
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
                raise ValueError(f"expected {name} of at least 2, got {layers}: choose 2 or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got {dropout}: choose a probability")
        self.encoder = Encoder(subwords, piece_size, hidden_size, encoder_layers, dropout, network, **options)
        self.decoder = Decoder(subwords, piece_size, hidden_size, decoder_layers, dropout, network, **options)

    def read(self, source: Tensor) -> Memory:
        """Encode sentences (S, B): subwords and EOS, then PAD."""
        return self.decoder.attention.memory(self.encoder(source), source.t() != PAD)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Compute the cross-entropy in nats of each target subword, given the source and the subwords before it.

        Args:
            source: (S, B): subwords and EOS, then PAD.
            target: (T, B), the same.

        Returns:
            (T, B), 0 for PAD.
        """
        before = torch.cat([torch.full_like(target[:1], BOS), target[:-1]])
        logits, _, _ = self.decoder(before, self.read(source))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, reduction="none")
        return losses.view(target.shape)

    @torch.no_grad()
    def beam_search(
        self,
        source: Tensor,
        longest: Tensor,
        beam: int = 4,
        length_penalty: float = 0.2,
        coverage_penalty: float = 0.2,
    ) -> Hypotheses:
        r"""Search for the translation Y of each sentence X with the best score (GNMT's, from memory) by beam search.

        .. math::
            s(Y, X) &= \log P(Y | X) / lp(Y) + \beta \sum_s \log \min(\sum_t a_{ts}, 1) \\
            lp(Y) &= (5 + |Y|)^\alpha / (5 + 1)^\alpha

        Each step keeps the K likeliest open hypotheses. A hypothesis that ends competes for the best score if it is
        among the K likeliest of all. The search for a sentence stops only when K have ended and the likeliest of them
        is likelier than all open ones; otherwise early, unlikely endings would win. A beam of 1 is greedy search. EOS
        counts as a subword in |Y| and in the sum over t.

        Args:
            source: (S, B): subwords and EOS, then PAD.
            longest: Maximum number of subwords of each translation, EOS included, (B,).
            beam: K.
            length_penalty: alpha.
            coverage_penalty: beta.

        Returns:
            The best translations and their scores and attention weights.
        """
        memory, K, (S, B) = self.read(source), beam, source.shape
        V, T = self.decoder.output.out_features, int(longest.max())
        columns, every = torch.arange(B, device=source.device), torch.arange(V, device=source.device)
        subwords, states = torch.full((1, K * B), BOS, device=source.device), None
        written = torch.full((T, K, B), PAD, device=source.device)
        attention = memory.values.new_zeros(K, B, T, S)
        odds = memory.values.new_full((K, B), float("-inf"))  # log P of the open hypotheses
        odds[0] = 0
        best = Hypotheses(written[:, 0].clone(), odds.new_full((B,), float("-inf")), attention[0].clone())
        ended, likeliest = (
            torch.zeros_like(longest),
            odds.new_full((B,), float("-inf")),
        )  # log P of the likeliest ended one
        for t in range(T):
            searching = ((ended < K) | (odds.amax(0) > likeliest)) & (t < longest)
            if not searching.any():
                break
            logits, states, weights = self.decoder(subwords, memory, states)
            attention[:, :, t] = weights[:, :, 0]
            allowed = (every == EOS) | ((longest > t + 1)[:, None] & (every > UNKNOWN))  # (B, V)
            step = logits[0].to(odds.dtype).log_softmax(-1).view(K, B, V).masked_fill(~allowed, float("-inf"))
            total = (odds[..., None] + step).transpose(0, 1).flatten(1)
            top, order = (x.t() for x in total.topk(min(2 * K, K * V)))  # at least K do not end, if V allows
            parent, subword = order // V, order % V

            ends = (subword == EOS) & top.isfinite()
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
                torch.where(better, found, best.subwords),
                torch.where(better, score, best.scores),
                torch.where(better[:, None, None], attention[whose, columns], best.attention),
            )
            ended = ended + counted.sum(0)
            likeliest = torch.maximum(likeliest, top[:K].masked_fill(~counted, float("-inf")).amax(0))

            first = (subword == EOS).long().argsort(dim=0, stable=True)[:K]  # the likeliest that do not end
            parent, subword, odds = (x.gather(0, first) for x in (parent, subword, top))
            odds = odds.masked_fill(subword == EOS, float("-inf"))  # if fewer than K are open
            rows = (parent * B + columns).flatten()
            states = [tuple(part.index_select(1, rows) for part in state) for state in states]
            written, attention = written[:, parent, columns], attention[parent, columns]
            written[t] = subword
            subwords = subword.view(1, -1)
        return best
