"""Layers of torch.nn: clients side by side get the gradients that plain autograd gives each of them alone."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from flow_pl.engine.gradients import GradientEngine
from flow_pl.methods.steps import Minibatch, Step
from flow_pl.utils.counter_rng import step_keys

CLIENTS, N, TOKENS = 3, 4, 6


class Called(nn.Module):
    """A layer called in some way, behind a product that gets the gradient of its input."""

    def __init__(self, layer, shape, call=None):
        super().__init__()
        self.layer, self.call = layer, call or (lambda layer, x: layer(x))
        if shape is not None:
            self.factor = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x):
        return self.call(self.layer, x if x.dtype == torch.int64 else x * self.factor)


def attended(layer, x):
    return layer(x, x, x, need_weights=False)[0]


def bags(layer, x):
    return layer(x.flatten(), torch.arange(0, x.numel(), x.shape[1]))


V, S, I, C = (8,), (8, 6), (8, 6, 6), (8, 4, 4, 4)  # noqa: E741  # vectors, sequences, images, cubes
LAYERS = (
    {
        "Identity": (nn.Identity(), V),
        "Linear": (nn.Linear(8, 3), V),
        "Linear without bias": (nn.Linear(8, 3, bias=False), V),
        "Linear of sequences": (nn.Linear(6, 3), S),
        "Bilinear": (nn.Bilinear(8, 8, 3), V, lambda layer, x: layer(x, x.tanh())),
        "Conv1d": (nn.Conv1d(8, 3, 3, padding=1), S),
        "Conv1d, reflected": (nn.Conv1d(8, 3, 3, padding=1, padding_mode="reflect"), S),
        "Conv2d": (nn.Conv2d(8, 3, 3), I),
        "Conv2d, stride": (nn.Conv2d(8, 4, 3, stride=2, padding=1, dilation=2, groups=2, bias=False), I),
        "Conv2d, depthwise": (nn.Conv2d(8, 8, 3, padding="same", groups=8), I),
        "Conv3d": (nn.Conv3d(8, 3, 2), C),
        "ConvTranspose1d": (nn.ConvTranspose1d(8, 3, 3, stride=2, output_padding=1), S),
        "ConvTranspose2d": (nn.ConvTranspose2d(8, 3, 3, stride=2), I),
        "ConvTranspose2d, groups": (nn.ConvTranspose2d(8, 4, 3, groups=2, padding=1), I),
        "ConvTranspose3d": (nn.ConvTranspose3d(8, 3, 2), C),
        "MaxPool1d": (nn.MaxPool1d(2), S),
        "MaxPool2d": (nn.MaxPool2d(3, stride=2, padding=1), I),
        "MaxPool3d": (nn.MaxPool3d(2), C),
        "AvgPool1d": (nn.AvgPool1d(2), S),
        "AvgPool2d": (nn.AvgPool2d(3, padding=1, count_include_pad=False), I),
        "AvgPool3d": (nn.AvgPool3d(2), C),
        "LPPool1d": (nn.LPPool1d(2, 2), S),
        "LPPool2d": (nn.LPPool2d(2, 2), I),
        "AdaptiveAvgPool1d": (nn.AdaptiveAvgPool1d(2), S),
        "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((2, 3)), I),
        "AdaptiveAvgPool3d": (nn.AdaptiveAvgPool3d(2), C),
        "AdaptiveMaxPool1d": (nn.AdaptiveMaxPool1d(2), S),
        "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d((2, 3)), I),
        "AdaptiveMaxPool3d": (nn.AdaptiveMaxPool3d(2), C),
        "MaxUnpool2d": (nn.MaxUnpool2d(2), I, lambda layer, x: layer(*functional.max_pool2d_with_indices(x, 2))),
        "FractionalMaxPool2d": (
            nn.FractionalMaxPool2d(2, output_size=3, _random_samples=torch.full((4, 8, 2), 0.3)),
            I,
        ),
        "LayerNorm": (nn.LayerNorm(8), V),
        "LayerNorm of images": (nn.LayerNorm([8, 6, 6]), I),
        "GroupNorm": (nn.GroupNorm(2, 8), I),
        "GroupNorm of vectors": (nn.GroupNorm(2, 8), V),
        "InstanceNorm1d": (nn.InstanceNorm1d(8, affine=True), S),
        "InstanceNorm2d": (nn.InstanceNorm2d(8, affine=True), I),
        "InstanceNorm3d": (nn.InstanceNorm3d(8), C),
        "RMSNorm": (nn.RMSNorm(8), V),
        "LocalResponseNorm": (nn.LocalResponseNorm(3), I),
        "weight_norm": (nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)), V),
        "weight_norm of hooks": (nn.utils.weight_norm(nn.Conv2d(8, 3, 3)), I),
        "orthogonal": (nn.utils.parametrizations.orthogonal(nn.Linear(8, 3)), V),
        "MultiheadAttention": (nn.MultiheadAttention(6, 2, batch_first=True), S, attended),
        "MultiheadAttention, weights": (
            nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True),
            S,
            lambda layer, x: layer(x, x, x)[0],
        ),
        "TransformerEncoderLayer": (nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), S),
        "TransformerEncoder": (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(6, 2, 8, 0.0, "gelu", batch_first=True, norm_first=True),
                2,
                enable_nested_tensor=False,
            ),
            S,
        ),
        "TransformerDecoderLayer": (
            nn.TransformerDecoderLayer(6, 2, 8, 0.0, batch_first=True),
            S,
            lambda layer, x: layer(
                x, x.tanh(), tgt_is_causal=True, tgt_mask=nn.Transformer.generate_square_subsequent_mask(8)
            ),
        ),
        "Embedding": (nn.Embedding(TOKENS, 4), None),
        "Embedding, padding": (nn.Embedding(TOKENS, 4, padding_idx=2), None),
        "Embedding, by frequency": (nn.Embedding(TOKENS, 4, scale_grad_by_freq=True), None),
        "Embedding, by frequency, padding": (nn.Embedding(TOKENS, 4, 0, scale_grad_by_freq=True), None),
        "EmbeddingBag, sum": (nn.EmbeddingBag(TOKENS, 4, mode="sum"), None),
        "EmbeddingBag, mean": (nn.EmbeddingBag(TOKENS, 4), None),
        "EmbeddingBag, max": (nn.EmbeddingBag(TOKENS, 4, mode="max"), None),
        "EmbeddingBag, padding": (nn.EmbeddingBag(TOKENS, 4, mode="sum", padding_idx=2), None),
        "EmbeddingBag, offsets": (nn.EmbeddingBag(TOKENS, 4, mode="sum"), None, bags),
        "RNNCell": (nn.RNNCell(8, 3), V),
        "GRUCell": (nn.GRUCell(8, 3), V),
        "PixelShuffle": (nn.PixelShuffle(2), I),
        "PixelUnshuffle": (nn.PixelUnshuffle(2), I),
        "ChannelShuffle": (nn.ChannelShuffle(2), I),
        "Unfold": (nn.Unfold(3, padding=1), I),
        "Fold": (nn.Fold(4, 2), (8, 9)),
        "Upsample": (nn.Upsample(scale_factor=2), I),
        "Upsample, bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), I),
        "Upsample, bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), I),
        "Upsample, linear": (nn.Upsample(scale_factor=2, mode="linear"), S),
        "Upsample, trilinear": (nn.Upsample(scale_factor=2, mode="trilinear"), C),
        "Flatten": (nn.Flatten(), I),
        "Unflatten": (nn.Unflatten(1, (2, 4)), V),
        "ZeroPad2d": (nn.ZeroPad2d(1), I),
        "ReflectionPad1d": (nn.ReflectionPad1d(1), S),
        "ReflectionPad2d": (nn.ReflectionPad2d(1), I),
        "ReflectionPad3d": (nn.ReflectionPad3d(1), C),
        "ReplicationPad1d": (nn.ReplicationPad1d(1), S),
        "ReplicationPad2d": (nn.ReplicationPad2d(1), I),
        "ReplicationPad3d": (nn.ReplicationPad3d(1), C),
        "CircularPad2d": (nn.CircularPad2d(1), I),
        "ConstantPad1d": (nn.ConstantPad1d(1, 2.0), S),
        "PReLU": (nn.PReLU(), V),
        "PReLU of channels": (nn.PReLU(8), I),
        "AdaptiveLogSoftmax": (nn.AdaptiveLogSoftmaxWithLoss(8, 6, [2, 4]), V, lambda layer, x: layer.log_prob(x)),
        "CosineSimilarity": (nn.CosineSimilarity(), V, lambda layer, x: layer(x, x.tanh())),
        "PairwiseDistance": (nn.PairwiseDistance(), V, lambda layer, x: layer(x, x.tanh())),
        "cdist": (nn.Identity(), S, lambda layer, x: torch.cdist(x, x.tanh())),
        "CrossEntropyLoss": (
            nn.CrossEntropyLoss(ignore_index=2, reduction="none", label_smoothing=0.1),
            V,
            lambda layer, x: layer(x, torch.tensor([0, 2, 5, 2])),
        ),
        "CrossEntropyLoss, mean": (
            nn.CrossEntropyLoss(ignore_index=2),
            V,
            lambda layer, x: layer(x, torch.tensor([0, 2, 5, 2])),
        ),
        "CrossEntropyLoss, of labels": (
            nn.CrossEntropyLoss(ignore_index=0),
            V,
            lambda layer, x: layer(x, (x.detach().sum(1) > 0).long()),
        ),
        "CrossEntropyLoss, of classes": (
            nn.CrossEntropyLoss(weight=torch.arange(1.0, 9.0)),
            V,
            lambda layer, x: layer(x, (x.detach().sum(1) > 0).long()),
        ),
        "NLLLoss2d": (nn.NLLLoss(ignore_index=1), I, lambda layer, x: layer(x, (x.detach().sum(1) > 0).long())),
        "CTCLoss": (
            nn.CTCLoss(),
            S,
            lambda layer, x: layer(
                x.permute(1, 0, 2).log_softmax(2), torch.tensor([[1, 2]] * N), torch.full((N,), 8), torch.full((N,), 2)
            ),
        ),
        "MultiMarginLoss": (nn.MultiMarginLoss(), V, lambda layer, x: layer(x, (x.detach().sum(1) > 0).long())),
        "HuberLoss": (nn.HuberLoss(), V, lambda layer, x: layer(x, x.detach().tanh())),
        "KLDivLoss": (
            nn.KLDivLoss(reduction="batchmean"),
            V,
            lambda layer, x: layer(x.log_softmax(1), x.detach().softmax(1)),
        ),
        "gather": (nn.Identity(), V, lambda layer, x: x.gather(1, x.detach().argsort(1)[:, :3])),
        "index": (nn.Identity(), V, lambda layer, x: x[:, torch.tensor([0, 0, 3])]),
        "scatter": (
            nn.Identity(),
            V,
            lambda layer, x: torch.zeros_like(x).scatter_add(1, x.detach().argsort(1) // 2, x),
        ),
        "topk": (nn.Identity(), V, lambda layer, x: x.topk(3)[0]),
        "median": (nn.Identity(), V, lambda layer, x: x.median(1)[0]),
        "cumsum": (nn.Identity(), V, lambda layer, x: x.cumsum(1).sort(1)[0]),
        "einsum": (nn.Linear(8, 8), V, lambda layer, x: torch.einsum("ni,oi->no", x, layer.weight)),
        "addmm": (nn.Linear(8, 3), V, lambda layer, x: torch.addmm(layer.bias, x, layer.weight.t())),
        "grid_sample": (
            nn.Identity(),
            I,
            lambda layer, x: functional.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh()),
        ),
        "fft": (nn.Identity(), S, lambda layer, x: torch.fft.rfft(x).abs()),
    }
    | {
        name: (getattr(nn, name)(), V)
        for name in [
            "ReLU",
            "ReLU6",
            "ELU",
            "SELU",
            "CELU",
            "GELU",
            "SiLU",
            "Mish",
            "Sigmoid",
            "Tanh",
            "Hardtanh",
            "Hardsigmoid",
            "Hardswish",
            "Hardshrink",
            "LeakyReLU",
            "LogSigmoid",
            "Softplus",
            "Softshrink",
            "Softsign",
            "Tanhshrink",
        ]
    }
    | {
        "GLU": (nn.GLU(), V),
        "Softmax": (nn.Softmax(1), V),
        "LogSoftmax": (nn.LogSoftmax(1), V),
        "Softmin": (nn.Softmin(1), V),
        "Softmax2d": (nn.Softmax2d(), I),
        "Threshold": (nn.Threshold(0.1, 2.0), V),
    }
    | {
        f"{name} in place": (nn.Sequential(nn.Linear(8, 8), getattr(nn, name)(inplace=True)), V)
        for name in [
            "ReLU",
            "ReLU6",
            "ELU",
            "SELU",
            "CELU",
            "SiLU",
            "Mish",
            "Hardtanh",
            "Hardsigmoid",
            "Hardswish",
            "LeakyReLU",
        ]
    }
    | {"Threshold in place": (nn.Sequential(nn.Linear(8, 8), nn.Threshold(0.1, 2.0, inplace=True)), V)}
)


def gradients(module, weights, x, keys, alone):
    names = list(weights)
    directions = torch.randn(2**15, generator=torch.Generator().manual_seed(0))

    def loss(parameters, x):
        outputs = functional_call(module, parameters, (x,)).flatten()
        return (outputs * directions[: len(outputs)]).sum()

    if alone:
        found = []
        for i in range(CLIENTS):
            leaves = {k: w[i].clone().requires_grad_() for k, w in weights.items()}
            found.append(torch.autograd.grad(loss(leaves, x[i]), list(leaves.values()), materialize_grads=True))
        return {k: torch.stack([g[j] for g in found]) for j, k in enumerate(names)}
    step = Step("model", lambda groups, minibatch: loss(groups["model"], minibatch.x))
    minibatch = Minibatch(x, torch.zeros(CLIENTS, N), torch.ones(CLIENTS, N, dtype=torch.bool))
    grads, _ = GradientEngine(trace_after=None)(step, {"model": weights}, {"model"}, minibatch, None, keys)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("drawing", [False, True])
def test_clients_side_by_side_get_the_gradients_of_each_alone(name, drawing):
    torch.manual_seed(0)
    layer, shape, *call = LAYERS[name]
    module = Called(layer, shape, *call)
    weights = {k: torch.stack([p.detach() * s for s in (1, 0.9, 1.2)]) for k, p in module.named_parameters()}
    x = torch.randint(TOKENS, (CLIENTS, N, 5)) if shape is None else torch.randn(CLIENTS, N, *shape)
    keys = step_keys(torch.arange(CLIENTS), 0, 1)[0] if drawing else None
    expected = gradients(module, weights, x, keys, alone=True)
    found = gradients(module, weights, x, keys, alone=False)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
