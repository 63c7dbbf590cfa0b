"""Modules that are no Sequential: blocks by name, mixed where they are called."""

import copy

import pytest
import torch
from torch import nn

from flow_pl.errors import ConfigurationError
from flow_pl.models import EMNISTCNN, MLP, NextWordLSTM
from flow_pl.models.blocks import automatic_blocks
from flow_pl.models.routed import RoutedModel
from flow_pl.models.routers import SequenceRouter
from tests.models.nets import Residual, ResNet
from tests.models.test_routed import given


def group(module):
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def moved(parameters):
    return {name: p + 0.3 * torch.randn_like(p) for name, p in parameters.items()}


class Transformer(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        self.position = nn.Parameter(torch.zeros(5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.tokens(x) + self.position).mean(1))


class Stages(nn.Module):
    """The layers of a vision transformer as timm and torchvision have them."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(1, 8, 2, 2)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=30, **sizes))


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (lambda: MLP(4, 3), "linear1 head"),
        (lambda: NextWordLSTM(9, 4, 5, 4), "lstm linear head"),
        (lambda: ResNet(norm=lambda c: nn.GroupNorm(1, c)), "conv1 bn1 layer1 layer2 layer3 layer4 fc"),
        (Residual, "stem inner head"),
        (Transformer, "encoder.layers.0 encoder.layers.1 head"),
        (Stages, "patch_embed blocks.0 blocks.1 blocks.2 norm head"),
        (bert, "bert.encoder.layer.0 bert.encoder.layer.1 bert.pooler classifier"),
        (lambda: nn.Linear(2, 2), ""),
    ],
)
def test_automatic_blocks(make, blocks):
    assert automatic_blocks(make()) == blocks.split()


def by_hand(net, g, w, q, x):
    """`Residual` with the two copies of stem and head mixed."""
    one, two = copy.deepcopy(net), copy.deepcopy(net)
    one.load_state_dict(g)
    two.load_state_dict({**g, **w})
    share = q[..., None]
    h = (share[:, 0, 0] * one.stem(x) + share[:, 0, 1] * two.stem(x)).tanh() * one.scale
    h = h + one.inner(h).tanh()
    return share[:, 1, 0] * one.head(h) + share[:, 1, 1] * two.head(h)


def test_a_block_is_mixed_where_it_is_called():
    torch.manual_seed(0)
    net = Residual()
    model = RoutedModel(net, ["stem", "head"])
    g, x, q = group(net), torch.randn(7, 6), torch.rand(7, 2, 2).softmax(-1)
    w = model.local_copy(moved(g))
    assert set(w) == {"stem.weight", "stem.bias", "head.weight", "head.bias"}
    out, decided = model.routed(x, g, w, given(q))
    torch.testing.assert_close(out, by_hand(net, g, w, q, x))
    assert torch.equal(decided, q)
    together = torch.vmap(lambda x, q: model.routed(x, g, w, given(q))[0])(x.view(7, 1, 6), q.view(7, 1, 2, 2))
    torch.testing.assert_close(together.view(7, 3), out)
    assert "forward" not in vars(net.stem)


def test_a_sequential_with_its_blocks_by_name_has_the_same_numbers():
    """Named in another order, the blocks are intercepted; what they give does not change."""
    torch.manual_seed(0)
    net = EMNISTCNN(4, (1, 8, 8), (0.0, 0.0))
    chain, named = RoutedModel(net), RoutedModel(net, ["head", "linear", "conv2", "conv1"])
    assert (chain.chosen, named.chosen) == (False, True)
    g, x, q = group(net), torch.randn(5, 1, 8, 8), torch.rand(5, 4, 2).softmax(-1)
    w = moved(g)
    for options in ({}, {"hard": True}, {"hard": True, "ahead": True}):
        expected, decided = chain.routed(x, g, w, given(q), **options)
        found, again = named.routed(x, g, w, given(q.flip(1)), **options)
        assert torch.equal(found, expected)
        assert torch.equal(decided, again.flip(1))


class Words(nn.Module):
    """`NextWordLSTM` as a module that calls its layers itself."""

    def __init__(self, chain):
        super().__init__()
        for name, child in chain.named_children():
            setattr(self, name, child)

    def forward(self, x):
        return self.head(self.linear(self.lstm(self.embedding(x))))


def test_a_recurrent_block_of_any_module_mixes_its_state_at_every_step():
    torch.manual_seed(0)
    chain = NextWordLSTM(9, 4, 5, 4)
    x, g = torch.randint(9, (3, 6)), group(chain)
    w = moved(g)
    found = []
    for net in (chain, Words(chain)):
        model = RoutedModel(net)
        assert model.blocks == ["lstm", "linear", "head"]
        torch.manual_seed(1)
        router = SequenceRouter(model.block_modules("a test"), (5,), (4,), dropout=0.0)
        model.routed(x, g, w, router.bind(None, x))  # lazy layers take their shapes
        torch.manual_seed(2)
        for p in router.parameters():
            nn.init.normal_(p)
        found += model.routed(x, g, w, router.bind(None, x))
    assert found[1].shape == (3, 6, 3, 2)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_features_and_head_of_any_module():
    net = Residual()
    model = RoutedModel(net)
    x, w = torch.randn(4, 6), moved(group(net))
    model.initialize(x)
    features = model.features(x, w)
    h = torch.tanh(x @ w["stem.weight"].T + w["stem.bias"]) * w["scale"]
    torch.testing.assert_close(features, h + torch.tanh(h @ w["inner.weight"].T + w["inner.bias"]))
    torch.testing.assert_close(model.head(features, w), model.plain(x, w))
    body, head = model.body_and_head(["inner", "head"])
    assert head == ["inner.weight", "inner.bias", "head.weight", "head.bias"]
    assert body == ["scale", "stem.weight", "stem.bias"]
    assert model.body_and_head(1)[1] == ["head.weight", "head.bias"]


def test_a_layer_gets_what_else_it_is_called_with():
    """The mask of a Hugging Face encoder reaches both copies of each layer."""
    torch.manual_seed(0)
    net = bert().eval()

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(input_ids=x, attention_mask=(x > 0).long()).logits

    model = RoutedModel(Logits())
    assert model.blocks[0] == "net.bert.encoder.layer.0"
    x = torch.tensor([[4, 5, 6, 0], [7, 8, 0, 0]])
    g = group(model.backbone)
    w = moved(g)
    for way in (0.0, 1.0):
        q = torch.tensor([1 - way, way]).expand(2, len(model.blocks), 2)
        for hard in (False, True):
            out, _ = model.routed(x, g, w, given(q), hard=hard, ahead=hard)
            torch.testing.assert_close(out, model.plain(x, g, model.local_copy(w) if way else {}))


class Odd(nn.Module):
    """A forward given as a function of (module, x)."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 3)
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def tied():
    odd = Odd(lambda m, x: m.b(m.a(m.c(x))), c=nn.Linear(6, 6))
    odd.c.weight = odd.a.weight
    return odd


@pytest.mark.parametrize(
    ("net", "blocks", "message"),
    [
        (Residual(), ["stm"], "blocks names 'stm', which is not a submodule of Residual: the closest names are 'stem'"),
        (Residual(), ["zzz"], "which is not a submodule of Residual: it has 'stem', 'inner', 'head'"),
        (Residual(), ["scale"], "blocks names 'scale', which is not a submodule"),
        (Residual(), ["dropout"], "blocks names 'dropout' of Residual, which has no parameters to train"),
        (Residual(), ["stem", "stem"], "blocks names 'stem' of Residual twice"),
        (Residual(), [], r"blocks is \[\], expected a list of names of submodules of Residual, or auto"),
        (ResNet(norm=lambda c: nn.GroupNorm(1, c)), ["layer1.0", "layer1"], "'layer1.0' of ResNet, which is inside"),
        (Transformer(), ["encoder.layers"], r"a ModuleList, which is never called itself: name what it holds \(enc"),
        (Transformer(), ["tokens"], "names 'tokens' of Transformer, an embedding table"),
        (tied(), None, r"the backbone Odd uses a parameter twice \(c.weight\)"),
        (nn.Sequential(nn.ReLU()), None, "the backbone Sequential has no block with trainable parameters"),
    ],
)
def test_blocks_that_there_are_not(net, blocks, message):
    with pytest.raises(ConfigurationError, match=message):
        RoutedModel(net, blocks)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m.b(m.a(m.a(x))), r"block 'a' \(Linear\) of the backbone is called several times in a forward"),
        (lambda m, x: m.b(x), r"block 'a' \(Linear\) of the backbone is never called in a forward"),
        (
            lambda m, x: m.b(m.a(x.view(-1, 2, 3).flatten(1)[:, None].transpose(0, 1))[0]),
            r"returns outputs of shape \[1, 4, 6\]",
        ),
    ],
)
def test_calls_that_cannot_be_mixed(forward, message):
    model = RoutedModel(Odd(forward))
    g = group(model.backbone)
    with pytest.raises(ConfigurationError, match=message):
        model.routed(torch.randn(4, 6), g, g, given(torch.full((4, 2, 2), 0.5)))
    assert "forward" not in vars(model.backbone.a)


def test_a_block_that_gives_a_tuple():
    net = Odd(lambda m, x: m.b(m.gru(x[:, None])[0][:, 0]), gru=nn.GRU(6, 6, batch_first=True))
    model = RoutedModel(net, ["gru", "b"])
    g = group(net)
    with pytest.raises(ConfigurationError, match=r"block 'gru' \(GRU\) of the backbone returns a tuple, not a tensor"):
        model.routed(torch.randn(4, 6), g, g, given(torch.full((4, 2, 2), 0.5)))


def test_a_head_that_is_not_the_end():
    model = RoutedModel(Odd(lambda m, x: m.b(m.a(x)).relu()))
    model.initialize(torch.randn(2, 6))
    with pytest.raises(ConfigurationError, match=r"block 'b' \(Linear\) .* is not the end of Odd"):
        model.head(torch.randn(2, 6), group(model.backbone))
