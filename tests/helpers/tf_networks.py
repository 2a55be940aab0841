"""The reference's networks written anew, naively: NHWC, with variables by name.

A variable is made on first use, so names, order and shapes follow from running the program, as in
TensorFlow 1. Kernels follow the fixtures' rule. Padding and pooling are spelled out.
"""

import zlib
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F


def rule_kernel(name, shape):
    """The fixtures' kernels: small integers drawn from the name, scaled by the fan-in."""
    draws = np.random.RandomState(zlib.crc32(name.encode()))
    kernel = draws.randint(-2, 3, size=shape, dtype=np.int8).astype(np.float32)
    return kernel * np.float32(1.0 / np.sqrt(float(np.prod(shape[:-1]))))


class Arrays:
    """Named arrays with the interface of an open checkpoint."""

    def __init__(self, arrays):
        self.arrays = dict(arrays)
        self.names = list(self.arrays)

    def shape(self, name):
        return self.arrays[name].shape

    def read(self, name):
        return self.arrays[name]


class Program:
    """Runs a network on images and remembers its variables and ending points."""

    def __init__(self, dtype=torch.float64):
        self.dtype, self.variables, self.points = dtype, {}, {}
        self.layers = Counter()

    def variable(self, name, shape, low=-0.2, high=0.2):
        if len(shape) > 1:
            self.variables[name] = rule_kernel(name, shape)
        else:
            draws = np.random.RandomState(zlib.crc32(name.encode()))
            self.variables[name] = draws.uniform(low, high, shape).astype(np.float32)
        return torch.from_numpy(self.variables[name]).to(self.dtype)

    def numbered(self, base):
        """conv2d, conv2d_1, conv2d_2 ..."""
        self.layers[base] += 1
        return base if self.layers[base] == 1 else f"{base}_{self.layers[base] - 1}"

    def batch_norm(self, x, scope):
        c = (x.shape[-1],)
        gamma = self.variable(f"{scope}/gamma", c, 0.6, 1.4)
        beta = self.variable(f"{scope}/beta", c)
        mean = self.variable(f"{scope}/moving_mean", c)
        variance = self.variable(f"{scope}/moving_variance", c, 0.5, 1.5)
        return (x - mean) / torch.sqrt(variance + 1e-5) * gamma + beta

    def conv(self, x, name, out, k, stride=1, pad=0, bias=None):
        kernel = self.variable(name, (k, k, x.shape[-1], out))
        x = F.pad(x, (0, 0, pad, pad, pad, pad))
        y = F.conv2d(x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), stride=stride)
        y = y.permute(0, 2, 3, 1)
        return y if bias is None else y + self.variable(bias, (out,))


def same_pads(side, window, stride):
    """TensorFlow's SAME: (before, after)."""
    total = max((-(-side // stride) - 1) * stride + window - side, 0)
    return total // 2, total - total // 2


def pool_same(x, window, stride, reduce):
    """SAME pooling over axes 1 and 2 of an array, window by window over what is inside it."""
    rows, columns = ((side, same_pads(side, window, stride)[0]) for side in x.shape[1:3])

    def spans(side, before):
        starts = [i * stride - before for i in range(-(-side // stride))]
        return [slice(max(start, 0), min(start + window, side)) for start in starts]

    return np.stack(
        [
            np.stack([reduce(x[:, r, c], axis=(1, 2)) for c in spans(*columns)], axis=1)
            for r in spans(*rows)
        ],
        axis=1,
    )


def max_pool_valid(x, window, stride):
    return x.unfold(1, window, stride).unfold(2, window, stride).amax((-1, -2))


def resnet_v2(program, x, blocks, bottleneck):
    """Embedding before normalization of [B, H, W, 3]; the reference's ``resnet_model``."""
    scope = "resnet_model"

    def conv(x, out, k, stride):
        # fixed padding for strides, SAME otherwise: the same for odd kernels
        name = f"{scope}/{program.numbered('conv2d')}/kernel"
        return program.conv(x, name, out, k, stride, (k - 1) // 2)

    def norm_relu(x):
        return program.batch_norm(x, f"{scope}/{program.numbered('batch_normalization')}").relu()

    x = conv(x, 64, 7, 2)
    x = torch.from_numpy(pool_same(x.numpy(), 3, 2, np.max))
    points = [x]
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for number in range(count):
            stride = 2 if stage and not number else 1
            shortcut = x
            x = norm_relu(x)
            points.append(x)
            if number == 0:
                shortcut = conv(x, width * (4 if bottleneck else 1), 1, stride)
            if bottleneck:
                x = norm_relu(conv(x, width, 1, 1))
                x = norm_relu(conv(x, width, 3, stride))
                x = conv(x, 4 * width, 1, 1)
            else:
                x = conv(norm_relu(conv(x, width, 3, stride)), width, 3, 1)
            x = x + shortcut
    x = norm_relu(x)
    program.points = {str(i): point for i, point in enumerate([*points, x])}
    x = x.mean((1, 2))
    kernel = program.variable(f"{scope}/dense/kernel", (x.shape[1], 128))
    return x @ kernel + program.variable(f"{scope}/dense/bias", (128,))


def vgg16_bn_last(program, x):
    """The same of ``vgg_16(with_bn=True, fix_bug=True, dropout_keep_prob=0)``."""

    def conv(x, scope, out, k=3, pad=1, norm=False):
        bias = None if norm else f"{scope}/biases"
        y = program.conv(x, f"{scope}/weights", out, k, 1, pad, bias)
        return (program.batch_norm(y, f"{scope}/batch_normalization") if norm else y).relu()

    for stage, (plain, out) in enumerate(((1, 64), (1, 128), (2, 256), (2, 512), (2, 512)), 1):
        for i in range(plain):
            x = conv(x, f"vgg_16/conv{stage}/conv{stage}_{i + 1}", out)
        x = conv(x, f"vgg_16/conv{stage}_final/conv{stage}_final_1", out, norm=True)
        program.points[str(stage - 1)] = x
        x = max_pool_valid(x, 2, 2)
    if x.shape[1] < 7:  # a small image, for the convolutions alone
        return None
    x = conv(x, "vgg_16/fc6", 4096, 7, 0, norm=True)
    x = conv(x, "vgg_16/fc7", 4096, 1, 0, norm=True)
    x = program.conv(x, "vgg_16/fc8/weights", 128, 1, 1, 0, "vgg_16/fc8/biases")
    return x[:, 0, 0]


def alexnet_bn(program, x):
    """The same of ``alexnet_v2_with_bn_no_drop``."""

    def conv(x, name, out, k, stride=1, pad=0):
        scope = f"alexnet_v2/{name}"
        y = program.conv(x, f"{scope}/weights", out, k, stride, pad, f"{scope}/biases")
        program.points[name] = program.batch_norm(y, scope).relu()
        return program.points[name]

    x = max_pool_valid(conv(x, "conv1", 64, 11, 4), 3, 2)
    x = max_pool_valid(conv(x, "conv2", 192, 5, 1, 2), 3, 2)
    x = conv(conv(x, "conv3", 384, 3, 1, 1), "conv4", 384, 3, 1, 1)
    x = max_pool_valid(conv(x, "conv5", 256, 3, 1, 1), 3, 2)
    if x.shape[1] < 5:  # a small image, for the convolutions alone
        return None
    x = conv(conv(x, "fc6", 4096, 5), "fc7", 4096, 1)
    return program.conv(x, "alexnet_v2/fc8/weights", 128, 1, 1, 0, "alexnet_v2/fc8/biases")[:, 0, 0]


def vvs_resnet(program, x, blocks, bottleneck, suffix=""):
    """The same of unsup_vvs's ``get_resnet_18(num_cat=128)``, or of its ResNet-50.

    Its average pooling by 7, VALID, is the mean of a map of 7x7; for small images the mean as well.
    """

    def conv_norm(x, scope, out, k, stride, same=True):
        if same:
            rows, columns = (same_pads(side, k, stride) for side in x.shape[1:3])
            x = F.pad(x, (0, 0, *columns, *rows))
        y = program.conv(x, f"{scope}/weights", out, k, stride, 0, f"{scope}/bias")
        return program.batch_norm(y, f"{scope}{suffix}/batch_normalization")

    x = program.points["0"] = conv_norm(x, "encode1", 64, 7, 2, same=False).relu()
    x = program.points["1"] = torch.from_numpy(pool_same(x.numpy(), 3, 2, np.max))
    layer = 1
    for stage, count in enumerate(blocks):
        for number in range(count):
            layer += 1
            width, stride = 64 * 2**stage, 2 if stage and not number else 1
            convs = [(width, 3, stride), (width, 3, 1)]
            if bottleneck:
                convs = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
            y = x
            for i, sizes in enumerate(convs):
                y = conv_norm(y.relu() if i else y, f"encode{layer}/conv_{i}", *sizes)
            if y.shape != x.shape:
                x = conv_norm(x, f"encode{layer}/transfer", y.shape[-1], 1, stride)
            x = program.points[str(layer)] = (y + x).relu()
    x = x.mean((1, 2))
    kernel = program.variable("category2/weights", (x.shape[1], 128))
    return x @ kernel + program.variable("category2/bias", (128,))
