"""The other side of `run.py step` and `gradient`: a ResNet20 in eager PyTorch.

    python benchmarks/torch_resnet20.py step|gradient relu|swish BATCH_SIZE

The network of kaf_study.architectures (biases before batch normalisation, 3x3 convolutions of
stride 2 as skips), channels_last, float32. step: one of fast adversarial training by SGD; gradient:
of the loss in the images, in inference, batch normalisation folded into the convolutions before it.
Prints its version, then does so once for each line it is sent and answers with the loss.
"""

import os
import sys
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

EPSILON, ALPHA = 8 / 255, 10 / 255
LR, MOMENTUM, L2 = 0.1, 0.9, 2.5e-4  # Keras' l2 has no factor 1/2: weight_decay is twice of it


def conv(channels, filters, stride=1):
    return nn.Conv2d(channels, filters, 3, stride=stride, padding=1)


class Block(nn.Module):
    def __init__(self, channels, filters, stride, activation):
        super().__init__()
        self.activation = activation
        self.conv1, self.bn1 = conv(channels, filters, stride), nn.BatchNorm2d(filters)
        self.conv2, self.bn2 = conv(filters, filters), nn.BatchNorm2d(filters)
        self.skip = nn.Identity() if stride == 1 else conv(channels, filters, stride)

    def forward(self, x):
        h = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(h) + self.skip(x)))


def resnet20(activation):
    blocks, channels = [], 16
    for stage, filters in enumerate((16, 32, 64)):
        for index in range(3):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(Block(channels, filters, stride, activation))
            channels = filters
    stem = [conv(3, 16), nn.BatchNorm2d(16), activation]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def training_step(model, optimizer, x, y):
    """Wong, Rice & Kolter 2020, Algorithm 3, as fbfadvtrain has it."""
    delta = torch.empty_like(x).uniform_(-EPSILON, EPSILON)
    delta = ((x + delta).clamp(0, 1) - x).requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(model(x + delta), y), delta)[0]
    with torch.no_grad():
        delta = (delta + ALPHA * gradient.sign()).clamp(-EPSILON, EPSILON)
        x_adv = (x + delta).clamp(0, 1)
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x_adv), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def fold(model):
    """Batch normalisation behind a convolution alone, not behind a sum, as fused_layers.folded."""
    model[0], model[1] = fuse_conv_bn_eval(model[0], model[1]), nn.Identity()
    for block in model:
        if isinstance(block, Block):
            block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
    return model.requires_grad_(False)


def image_gradient(model, x, y):
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), y, reduction="sum")
    torch.autograd.grad(loss, x)
    return loss.item()


def main(what, activation, batch_size):
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    model = resnet20({"relu": nn.ReLU(), "swish": nn.SiLU()}[activation])
    model = model.to(memory_format=torch.channels_last).train()
    if what == "gradient":
        work = partial(image_gradient, fold(model.eval()))
    else:
        optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM, weight_decay=2 * L2)
        work = partial(training_step, model, optimizer)
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.random((batch_size, 3, 32, 32), "float32"))
    x = x.to(memory_format=torch.channels_last)
    y = torch.from_numpy(generator.integers(0, 10, batch_size))
    print(torch.__version__, flush=True)
    for _ in sys.stdin:
        print(work(x, y), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
