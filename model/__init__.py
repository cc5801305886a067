"""The networks, and nothing else: no device, file of ours, rank or log is known here.

The paper's symbols (Zakharov et al. 2019, arXiv 1905.08233), as the code uses them:

    x       a frame, RGB in [-1, 1]           y       its landmarks as a raster, in [-1, 1]
    x_hat   the frame the generator makes     t       the frame to be made; s_1..s_K the sources
    E       embedder, weights phi             e       mean over k of E(x_k, y_k): the person
    G       generator                         psi     coefficients of its adaptive norms, P e
    P       projection from e to psi                  (psi-hat in the paper)
    D       discriminator                     v       what its trunk V makes of (x, y)
    W       a row w_i per training video      r       score v . (w_i + w0) + b; r_hat that of x_hat
    w0, b   direction and offset for all
"""

from model.config import PAPER, PRESETS, SMALL, TINY, ModelConfig
from model.discriminator import Discriminator
from model.embedder import Embedder
from model.generator import Generator
from model.perceptual import Perceptual, make_perceptual
from model.spectral import fold_spectral_norm

__all__ = [
    "PAPER",
    "PRESETS",
    "SMALL",
    "TINY",
    "Discriminator",
    "Embedder",
    "Generator",
    "ModelConfig",
    "Perceptual",
    "fold_spectral_norm",
    "make_perceptual",
]
