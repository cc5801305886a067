"""The equations of the paper (section 3.2), one function each.

Every L1 distance is a mean over elements, never a sum: the weights in the training config then mean
the same at every size of picture, map and embedding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def content_loss(
    fake: Sequence[Float[Tensor, "..."]],
    real: Sequence[Float[Tensor, "..."]],
    layer_weights: Sequence[float],
) -> Float[Tensor, ""]:
    """L_CNT of one perceptual network: weighted sum over its layers of the mean |fake - real|.

    `real` is the same network's view of the real frame; it takes no gradient.
    """
    terms = [
        weight * _l1(fake_layer, real_layer.detach())
        for weight, fake_layer, real_layer in zip(layer_weights, fake, real, strict=True)
    ]
    return torch.stack(terms).sum()


def adversarial_loss(r_hat: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """The score part of L_ADV, equation 4: -r_hat, mean over the batch."""
    return -r_hat.float().mean()


def feature_matching_loss(
    fake: Sequence[Float[Tensor, "..."]], real: Sequence[Float[Tensor, "..."]]
) -> Float[Tensor, ""]:
    """L_FM: mean over the discriminator's blocks of the mean |fake - real|, real side fixed."""
    terms = [_l1(ours, theirs.detach()) for ours, theirs in zip(fake, real, strict=True)]
    return torch.stack(terms).mean()


def matching_loss(e: Float[Tensor, "b d"], w_i: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """L_MCH, equation 6: mean |e - w_i|; both sides take the gradient.

    The paper writes the norm |e - w_i|_1, a sum over d = 512 elements, and public weights for this
    term (10, before that 80) go with the mean that implementations take. A weight on the sum is
    one 512th of the weight here.
    """
    return _l1(e, w_i)


def hinge_loss(r: Float[Tensor, " b"], r_hat: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """L_DSC, equation 7: max(0, 1 + r_hat) + max(0, 1 - r), means over the batch."""
    return F.relu(1 + r_hat.float()).mean() + F.relu(1 - r.float()).mean()


def _l1(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    return (a - b).abs().float().mean()
