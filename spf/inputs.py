"""What a model's matrices are given by samples: its leading directions, its moments, its size."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spf.activations import Activations
from spf.bases import InputSketch, Tokens
from spf.data import Anchor
from spf.errors import UnsupportedModelError
from spf.linalg import exact_matmul, project_out_right
from spf.pools import Pools
from spf.progress import progress
from spf.sharding import spread_over_ranks


def emphasis(deciding: Tensor, weight: float) -> Tensor:
    """The weight of each token (T,): `weight` around the beginning of the answer, 1 elsewhere."""
    return 1 + (weight - 1) * deciding


class Inputs(Activations):
    """Measures the inputs of a model's trainable matrices over samples."""

    @torch.no_grad()
    def input_bases(
        self,
        anchors: Sequence[Anchor],
        names: Sequence[str],
        *,
        rank: int,
        more: int = 0,
        energy: float = 1.0,
        tokens: Tokens = "all",
        decision_weight: float = 1.0,
        gradient_share: float = 0.0,
        batch_size: int = 8,
    ) -> dict[str, Tensor]:
        """V (n, k), float32, per named matrix: the leading directions of its inputs over the anchors' tokens.

        The `more` after the first `rank` of them are less exact.

        The tokens around the beginning of the answer, where a refusal is decided (`DECISION_TOKENS`), weigh
        `decision_weight`, all others 1. `gradient_share` of a token's weight is, instead, how much the matrix's answer
        to it moves that decision: the squared gradient of the log-odds of the refusal's first tokens, over its sample's
        mean. Matrices that read the same inputs share their weights.

        A matrix that no anchor passes through, or only zeros, is left out. An expert that fewer tokens reach than
        `rank` is given directions of what the other experts of its layer read, too.

        Raises:
            UnsupportedModelError: an anchor sends NaN or inf through a matrix.
        """
        shared = self._shared_inputs(anchors[:1], names)
        # Twice the rank and 16 more keep the sketched directions accurate (Halko et al., section 4.2).
        sketches = {name: InputSketch(2 * rank + 16) for name in dict.fromkeys(shared.values())}
        pools = Pools([name for name in names if self.matrices[name].expert], 2 * rank + 16)

        def add(name: str, x: Tensor, weights: Tensor) -> None:
            try:
                sketches[name].add(x, weights)
                pools.add(name, x, weights)
            except ValueError as error:
                raise UnsupportedModelError(f"{name}: {error}") from error

        def take(name: str, x: Tensor, y: Tensor, deciding: Tensor) -> None:
            add(name, x, emphasis(deciding, decision_weight))

        if gradient_share:
            groups: dict[str, list[str]] = {}
            for name, first in shared.items():
                groups.setdefault(first, []).append(name)
            for name, x, deciding, moves in self._decisions(anchors, groups, max(1, batch_size // 2), tokens):
                fixed = emphasis(deciding, decision_weight)
                add(name, x, (1 - gradient_share) * fixed + gradient_share * moves)
        else:
            self._stream(anchors, list(sketches), take, batch_size, tokens)
        counts = {name: sketch.count for name, sketch in sketches.items()}
        sketches = {name: sketch for name, sketch in sketches.items() if sketch.count}
        # a sketch leaves when its basis is made, so that they are never all there at once
        with progress(len(sketches), "held directions") as bar:

            def basis(name: str) -> Tensor:
                bar.update()
                return sketches.pop(name).basis(rank + more, energy)

            bases = spread_over_ranks(list(sketches), basis)
        bases = pools.fill(bases, counts, rank + more, energy)
        found = {name: bases[shared[name]] for name in names if shared[name] in bases}
        return {name: V for name, V in found.items() if V.shape[1]}

    def response_norms(self, anchors: Sequence[Anchor], names: Sequence[str]) -> dict[str, float]:
        """Root mean square of each named matrix's outputs over all tokens of the anchors."""
        return self._norms(anchors, names, lambda name, x, y: y.float())

    def free_shares(self, anchors: Sequence[Anchor], bases: Mapping[str, Tensor]) -> dict[str, float]:
        """Root mean square over the anchors' tokens of |x - V V^T x| / |x|, x a matrix's inputs, V (n, k) its basis."""

        def free(name: str, x: Tensor, y: Tensor) -> Tensor:
            # with DeepSpeed's offload the bases are where the optimizer is
            return project_out_right(nn.functional.normalize(x.float(), dim=-1), bases[name].to(x.device))

        return self._norms(anchors, list(bases), free)

    @torch.no_grad()
    def input_moments(
        self, anchors: Sequence[Anchor], bases: Mapping[str, Tensor], decision_weight: float
    ) -> dict[str, Tensor]:
        """Sum over the anchors' tokens of w (R^T x)(R^T x)^T (r, r), x a matrix's input with unit norm, R (n, r) its
        basis, w `decision_weight` around the beginning of the answer and 1 elsewhere; by the bases' names."""
        sums: dict[str, Tensor] = {}

        def take(name: str, x: Tensor, y: Tensor, deciding: Tensor) -> None:
            rows = exact_matmul(nn.functional.normalize(x.float(), dim=-1), bases[name].to(x.device))
            weights = emphasis(deciding.to(x.device), decision_weight)
            moment = exact_matmul((rows * weights[:, None]).T, rows)
            sums[name] = sums[name] + moment if name in sums else moment

        self._stream(anchors, list(bases), take, batch_size=8)
        return sums

    @torch.no_grad()
    def _norms(
        self, anchors: Sequence[Anchor], names: Sequence[str], of: Callable[[str, Tensor, Tensor], Tensor]
    ) -> dict[str, float]:
        """Root mean square over the anchors' tokens of what `of` makes of a named matrix's inputs and outputs."""
        squares, tokens = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)

        def take(name: str, x: Tensor, y: Tensor, deciding: Tensor) -> None:
            squares[name] += float(of(name, x, y).square().sum())
            tokens[name] += len(x)

        self._stream(anchors, names, take, batch_size=16)
        return {name: (total / max(tokens[name], 1)) ** 0.5 for name, total in squares.items()}
