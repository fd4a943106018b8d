"""Losses that torch does not have, or has only on logits."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone uses

from .errors import ConfigurationError


class FocalLoss(nn.Module):
    """Binary focal loss: cross entropy that counts confident samples little.

    With ``p_t`` the probability given to the true class, and ``alpha_t`` = ``alpha`` for positives and
    ``1 - alpha`` for negatives, a sample's loss is ``-alpha_t * (1 - p_t) ** gamma * log(p_t)``; the result is
    the mean.

    Args:
        alpha: weight of the positive class, between 0 and 1; None weighs both alike with 1.
        gamma: how little a confident sample counts; 0 is plain cross entropy.
        from_logits: take logits instead of probabilities.

    Shapes: prediction and target alike, any; the target is 0 or 1, of any dtype.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017, equation 5.

    >>> import torch
    >>> loss = FocalLoss(alpha=0.75, gamma=2.0)
    >>> round(loss(torch.tensor([0.9, 0.1]), torch.tensor([1.0, 0.0])).item(), 4)
    0.0005
    """

    def __init__(self, alpha: float | None = 0.75, gamma: float = 2.0, *, from_logits: bool = False) -> None:
        super().__init__()
        if alpha is not None and not 0 <= alpha <= 1:
            raise ConfigurationError(
                f"alpha is {alpha}, but it is a fraction. Pass a number between 0 and 1, or None."
            )
        if not gamma >= 0:
            raise ConfigurationError(f"gamma is {gamma}. Pass a number of at least 0.")
        self.alpha = alpha
        self.gamma = gamma
        self.from_logits = from_logits

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss over all elements."""
        target = target.to(prediction.dtype)
        if self.from_logits:
            entropy = F.binary_cross_entropy_with_logits(prediction, target, reduction="none")
            prediction = prediction.sigmoid()
        else:
            entropy = F.binary_cross_entropy(prediction, target, reduction="none")
        true_class = prediction * target + (1 - prediction) * (1 - target)
        loss = (1 - true_class) ** self.gamma * entropy
        if self.alpha is not None:
            loss = loss * (self.alpha * target + (1 - self.alpha) * (1 - target))
        return loss.mean()

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"alpha={self.alpha}, gamma={self.gamma}, from_logits={self.from_logits}"


class SymmetricCrossEntropy(nn.Module):
    """Cross entropy plus its reverse, for noisy labels: ``alpha * CE(q, p) + beta * CE(p, q)``.

    ``p`` are the predicted probabilities and ``q`` the one-hot labels; both are clamped to [1e-4, 1] in the
    reverse term, where ``log q`` would otherwise be infinite.

    Args:
        alpha: weight of the cross entropy.
        beta: weight of the reverse cross entropy.

    Shapes: logits [N, C], target [N] class numbers.

    Source: Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels, 2019.

    >>> import torch
    >>> loss = SymmetricCrossEntropy(alpha=1.0, beta=1.0)
    >>> round(loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0])).item(), 4)
    1.2248
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0) -> None:
        super().__init__()
        for name, weight in (("alpha", alpha), ("beta", beta)):
            if not weight >= 0:
                raise ConfigurationError(f"{name} is {weight}, but it is a weight. Pass a number of at least 0.")
        self.alpha = alpha
        self.beta = beta

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss over the batch."""
        probability = logits.softmax(dim=1).clamp(1e-4, 1.0)
        label = F.one_hot(target, logits.shape[1]).to(logits.dtype).clamp(1e-4, 1.0)
        reverse = -(probability * label.log()).sum(dim=1).mean()
        return self.alpha * F.cross_entropy(logits, target) + self.beta * reverse

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"alpha={self.alpha}, beta={self.beta}"
