"""The models of the deep-learning textbooks, built from `bigmodel_kernels.nn`, and a command that trains them.

``python -m bigmodel_models train cnn`` trains one; ``python -m bigmodel_models list`` names them all.
"""

from .additive_attention import AdditiveAttention
from .autoencoder import Autoencoder, ConvAutoencoder
from .cnn import CNN
from .gan import GAN, ConvDiscriminator, ConvGenerator, Discriminator, Generator
from .mlp import BigModel
from .rnn import RNN
from .transformer import LearnedPositions, Seq2SeqTransformer, SinusoidalPositions, Transformer

__all__ = [
    "CNN",
    "GAN",
    "RNN",
    "AdditiveAttention",
    "Autoencoder",
    "BigModel",
    "ConvAutoencoder",
    "ConvDiscriminator",
    "ConvGenerator",
    "Discriminator",
    "Generator",
    "LearnedPositions",
    "Seq2SeqTransformer",
    "SinusoidalPositions",
    "Transformer",
]
