r"""An ``AutoencoderKLWan`` whose weights are computed instead of trained.

The Wan VAE class of diffusers can be configured down to one stage without residual blocks, whose ``patch_size``
option folds every 4 x 4 patch of pixels into 48 channels. What is left computes, per patch,

    encoder:  conv_in -> middle block -> RMS norm -> SiLU -> conv_out        48 -> 36 -> 32
    decoder:  conv_in -> middle block -> RMS norm -> SiLU -> conv_out        16 -> 36 -> 48

with 3 x 3 x 3 causal convolutions. The weights are set so that the whole is a principal component analysis of the
patches, 48 -> 16, without any training:

- *Convolutions* are zero except at their last time tap and spatial centre: they become matrices.
- *Middle block*: every residual branch ends in a convolution that is zero, so it is the identity.
- *SiLU* is cancelled by pairs: channels hold :math:`a` and :math:`-a`, and
  :math:`\mathrm{silu}(a) - \mathrm{silu}(-a) = a\sigma(a) + a\sigma(-a) = a`, exactly.
- *RMS norm* :math:`h \mapsto \gamma\sqrt{D}\,h/\lVert h\rVert` is made linear by one constant channel K that is far
  larger than the data: :math:`\lVert h\rVert = K(1 + O(\lVert a\rVert^2/K^2))`, so with
  :math:`\gamma = K/\sqrt{D}` it is the identity up to 1e-5. With D = 36 and K = 3072 the gain is 512, which
  bfloat16 and float16 hold exactly.

The latents are divided by :math:`\sqrt{\sigma_i\sigma_0}`, half way to whitening: component i has the standard
deviation :math:`\sqrt{\sigma_i/\sigma_0}`, so the flow model sees the strong components above the noise first.

There is no compression of time. ``encode`` of this class drops frames beyond 4k + 1; :func:`encode_patches` does not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

PATCH = 4  # pixels on a side
CHANNELS = 3 * PATCH * PATCH  # values in a patch
LATENTS = 16  # principal components kept
WIDTH = 36  # hidden channels: pairs of components, the constant, and spare ones; a square number, see GAIN
CONSTANT = 3072.0  # the large constant channel
GAIN = CONSTANT / math.sqrt(WIDTH)  # 512: makes the RMS norm an identity


@dataclass(frozen=True)
class PatchBasis:
    """An orthonormal basis of pixel patches.

    ``axes`` (16, 48) are the principal directions, ``mean`` (48,) the mean patch, ``deviation`` (16,) the standard
    deviations along the axes. Pixels are in [-1, 1]; the 48 values of a patch are in the order of :func:`fold`.
    """

    axes: Tensor
    mean: Tensor
    deviation: Tensor

    @classmethod
    def fit(cls, clips: Tensor, max_patches: int = 60_000, seed: int = 0) -> "PatchBasis":
        """Principal components of the patches of ``clips`` (batch, 3, frames, height, width)."""
        patches = fold(clips).permute(0, 2, 3, 4, 1).reshape(-1, CHANNELS).float()
        order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))
        patches = patches[order[:max_patches]]
        mean = patches.mean(0)
        axes = torch.linalg.svd(patches - mean, full_matrices=False).Vh[:LATENTS]
        axes = axes * torch.sign(axes.sum(1, keepdim=True) + 1e-9)  # the sign of a component is arbitrary: fix it
        return cls(axes, mean, ((patches - mean) @ axes.T).std(0))

    @property
    def scale(self) -> Tensor:
        """What each latent is divided by, (16,): half way to whitening."""
        return (self.deviation * self.deviation[0]).sqrt()


def fold(clips: Tensor) -> Tensor:
    """Fold patches into channels, in the order of the Wan VAE: (b, 3, t, h, w) -> (b, 48, t, h/4, w/4)."""
    b, c, t, h, w = clips.shape
    x = clips.view(b, c, t, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(0, 1, 6, 4, 2, 3, 5).reshape(b, c * PATCH * PATCH, t, h // PATCH, w // PATCH)


def encode_patches(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Normalised latents of ``clips``, read off the weights of an analytic ``vae``: one matrix product.

    ``clips`` is (batch, 3, frames, height, width) in [-1, 1]; the result (batch, 16, frames, height/4, width/4) is
    what the transformer is trained on, ``(encode(clips) - latents_mean) / latents_std``, for any number of frames.
    """
    conv = vae.encoder.conv_in
    axes = conv.weight[:LATENTS, :, -1, 1, 1].to(clips)
    scale = torch.tensor(vae.config.latents_std).to(clips)
    shift = conv.bias[:LATENTS].to(clips) / scale
    return torch.einsum("zc,bcthw->bzthw", axes / scale[:, None], fold(clips)) + shift.view(1, -1, 1, 1, 1)


@torch.no_grad()
def build_vae(basis: PatchBasis) -> AutoencoderKLWan:
    """An ``AutoencoderKLWan`` that encodes to and decodes from ``basis``."""
    vae = AutoencoderKLWan(
        base_dim=WIDTH,
        z_dim=LATENTS,
        dim_mult=[1],
        num_res_blocks=0,
        temperal_downsample=[],
        is_residual=False,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        patch_size=PATCH,
        scale_factor_temporal=1,
        scale_factor_spatial=PATCH,
        latents_mean=[0.0] * LATENTS,
        latents_std=[round(v, 5) for v in basis.scale.tolist()],
    )
    for parameter in vae.parameters():
        parameter.zero_()
    for module in vae.modules():
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            module.gamma.fill_(1.0)

    identity = torch.eye(LATENTS)
    offset = basis.axes @ basis.mean
    encoder, decoder = vae.encoder, vae.decoder

    _set_matrix(encoder.conv_in, [basis.axes, -basis.axes], rows=True)
    encoder.conv_in.bias[:LATENTS] = -offset
    encoder.conv_in.bias[LATENTS : 2 * LATENTS] = offset
    encoder.conv_in.bias[2 * LATENTS] = CONSTANT
    encoder.norm_out.gamma.fill_(GAIN)
    _set_matrix(encoder.conv_out, [identity, -identity], rows=False)
    encoder.conv_out.bias[LATENTS:] = -12.0  # log-variance: the latent distribution is a point
    vae.quant_conv.weight[:, :, 0, 0, 0] = torch.eye(2 * LATENTS)

    vae.post_quant_conv.weight[:, :, 0, 0, 0] = identity
    _set_matrix(decoder.conv_in, [identity, -identity], rows=True)
    decoder.conv_in.bias[2 * LATENTS] = CONSTANT
    decoder.norm_out.gamma.fill_(GAIN)
    _set_matrix(decoder.conv_out, [basis.axes.T, -basis.axes.T], rows=False)
    decoder.conv_out.bias.copy_(basis.mean)
    return vae


def _set_matrix(conv: nn.Conv3d, parts: Sequence[Tensor], rows: bool) -> None:
    """Make the causal ``conv`` the matrix of ``parts``, stacked as output ``rows`` or as input columns."""
    matrix = torch.cat(tuple(parts), dim=0 if rows else 1)
    conv.weight[: matrix.shape[0], : matrix.shape[1], -1, 1, 1] = matrix
