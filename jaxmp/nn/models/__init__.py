"""Reference models, written to be read: each file has a frozen config and a Linen module."""

from jaxmp.nn.models.gpt import GPT as GPT
from jaxmp.nn.models.gpt import GPT2_124M as GPT2_124M
from jaxmp.nn.models.gpt import GPTConfig as GPTConfig
from jaxmp.nn.models.llama import LLAMA_1B as LLAMA_1B
from jaxmp.nn.models.llama import LLAMA_7B as LLAMA_7B
from jaxmp.nn.models.llama import Llama as Llama
from jaxmp.nn.models.llama import LlamaConfig as LlamaConfig
from jaxmp.nn.models.mlp import MLP as MLP
from jaxmp.nn.models.mlp import MLPConfig as MLPConfig
from jaxmp.nn.models.resnet import ResNet as ResNet
from jaxmp.nn.models.resnet import ResNetConfig as ResNetConfig
from jaxmp.nn.models.vit import VisionTransformer as VisionTransformer
from jaxmp.nn.models.vit import ViTConfig as ViTConfig
