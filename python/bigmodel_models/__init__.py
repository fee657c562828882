"""The models of the deep-learning textbooks, built from `bigmodel_kernels.nn`, and a command that trains them.

``python -m bigmodel_models train cnn`` trains one; ``python -m bigmodel_models list`` names them all.
"""

from .additive_attention import AdditiveAttention
from .autoencoder import Autoencoder, ConvAutoencoder
from .bert import BERT, BERTForClassification, BERTForMaskedLM
from .cnn import CNN
from .deepspeech import DeepSpeech
from .gan import GAN, ConvDiscriminator, ConvGenerator, Discriminator, Generator
from .gpt import GPT
from .inception import GoogLeNet, SmallInception
from .mlp import BigModel
from .resnet import ResNet, resnet18, resnet20, resnet34, resnet50
from .rnn import RNN
from .transformer import LearnedPositions, Seq2SeqTransformer, SinusoidalPositions, Transformer
from .vgg import VGG, vgg11, vgg16, vgg_small
from .wavenet import WaveNet, mu_law_decode, mu_law_encode

__all__ = [
    "BERT",
    "CNN",
    "GAN",
    "GPT",
    "RNN",
    "VGG",
    "AdditiveAttention",
    "Autoencoder",
    "BERTForClassification",
    "BERTForMaskedLM",
    "BigModel",
    "ConvAutoencoder",
    "ConvDiscriminator",
    "ConvGenerator",
    "DeepSpeech",
    "Discriminator",
    "Generator",
    "GoogLeNet",
    "LearnedPositions",
    "ResNet",
    "Seq2SeqTransformer",
    "SinusoidalPositions",
    "SmallInception",
    "Transformer",
    "WaveNet",
    "mu_law_decode",
    "mu_law_encode",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "vgg11",
    "vgg16",
    "vgg_small",
]
