"""How far apart the base's hidden states are at every two depths: what a seam has to bridge.

Angular distance (Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers",
arXiv:2403.17887, section 3): d(x, y) = arccos(x · y / |x||y|) / π, between 0 and 1. They take the
last token of many sequences; here it is the mean over tokens, because a probe has few sequences.

Block influence (Men et al., "ShortGPT", arXiv:2403.03853, section 2): BI = 1 − E[x · y / |x||y|],
the mean over tokens; theirs is of one layer, here of whatever stands between two depths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from dus_cli.data.streams import IGNORED
from dus_cli.maps.layers import Seam

# Bytes of hidden states that are kept of all depths together, in fp32.
KEPT_BYTES = 512 << 20

# Tokens whose depths are compared at a time.
_AT_ONCE = 256

# At least this many tokens, however wide the model: a mean over fewer is too noisy.
_FEWEST = 256


@dataclass(frozen=True)
class Distances:
    """Means over `num_tokens` tokens for every two depths 0…n. Depth d is the input of layer d;
    depth n is the last layer's output.
    """

    angular: list[list[float]]
    influence: list[list[float]]
    num_tokens: int

    def of(self, seam: Seam) -> tuple[float, float]:
        """The angular distance and block influence between the output of a seam's lower layer and
        the input that its upper layer has in the base.
        """
        below, above = seam.base_layers
        return self.angular[below + 1][above], self.influence[below + 1][above]


class Depths:
    """The directions of the base's hidden states at every depth, for tokens spread evenly over the
    text.

    Args:
        num_layers: of the base.
        width: of a hidden state.
        labels: of all batches; tokens that predict nothing count nothing.
    """

    def __init__(self, num_layers: int, width: int, labels: Sequence[Tensor]) -> None:
        most = max(_FEWEST, KEPT_BYTES // (4 * width * (num_layers + 1)))
        share = min(1.0, most / sum(int((each != IGNORED).sum()) for each in labels))
        self._places = [
            _spread((each.flatten() != IGNORED).nonzero()[:, 0], share) for each in labels
        ]
        self._ends = list(accumulate(map(len, self._places)))
        self._filled = [0] * (num_layers + 1)
        self._kept: Tensor | None = None

    def add(self, depth: int, hidden: Tensor) -> None:
        """Hidden states (rows, length, width) of the next batch at a depth."""
        batch, width = self._filled[depth], hidden.shape[-1]
        if self._kept is None:
            # Allocated at once: many small tensors that outlive their neighbours would fragment the
            # heap.
            size = len(self._filled), self._ends[-1], width
            self._kept = torch.empty(size, dtype=torch.float32, device=hidden.device)
        places, stop = self._places[batch], self._ends[batch]
        rows = hidden.reshape(-1, width)[places.to(hidden.device)]
        self._kept[depth, stop - len(places) : stop] = functional.normalize(rows.float(), dim=-1)
        self._filled[depth] += 1

    def distances(self) -> Distances:
        """Compare every depth with every other, and free the directions."""
        assert self._kept is not None
        size, count, _ = self._kept.shape
        angular, influence = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
        for states in torch.split(self._kept.transpose(0, 1), _AT_ONCE):  # (tokens, depths, width)
            cosines = (states @ states.mT).clamp_(-1, 1)  # of every two depths, for each token
            angular += cosines.arccos().sum(0).cpu() / math.pi
            influence += (1 - cosines).sum(0).cpu()
        self._kept = None
        for table in (angular, influence):  # equal to itself but for rounding
            table.div_(count).fill_diagonal_(0.0)
        return Distances(angular.tolist(), influence.tolist(), count)


def _spread(places: Tensor, share: float) -> Tensor:
    """Choose about this share of the places, evenly spread."""
    count = max(1, round(len(places) * share)) if len(places) else 0
    return places[torch.linspace(0, len(places) - 1, count).long()] if count else places
