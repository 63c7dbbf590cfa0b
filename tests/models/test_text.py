"""Encoders of the transformers library as backbones: padding, blocks, many clients, and what is refused."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, vmap

from flow_pl.checks import check_backbone, check_fit
from flow_pl.engine.draw_check import check_draws
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.kernels.linear import ClientLinears
from flow_pl.methods import Flow
from flow_pl.models import LoRA, TextEncoder
from flow_pl.models.feature_router import FeatureRouter
from flow_pl.models.routed import RoutedModel
from flow_pl.tasks import Classification
from tests.support import chunk, flat, loop, minilm, select

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PADDING, CLASSES = 0, 3
SIZES = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "pad_token_id": PADDING,
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 3, 0, 0], [4, 0, 0, 0, 0]])


def saved(folder, kind="bert", weights=True, **settings):
    """A small encoder with random weights, as a folder."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings})
    (transformers.AutoModel.from_config(config) if weights else config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "deberta-v2", "albert"])
def test_outputs_are_those_of_the_library_and_padding_does_not_count(tmp_path, kind):
    """For an encoder with torch's attention or its own, whatever kind of mask it takes."""
    folder = saved(tmp_path, kind)
    model = TextEncoder(folder, CLASSES).eval()
    plain = transformers.AutoModel.from_pretrained(folder).eval()
    outputs = model(IDS)
    for row, ids in zip(outputs, IDS, strict=True):
        alone = plain(input_ids=ids[None], attention_mask=(ids != PADDING).long()[None]).last_hidden_state[0]
        torch.testing.assert_close(row, model.head(alone[ids != PADDING].mean(0)))
    mask = (IDS != PADDING).long()
    other = IDS.masked_fill(IDS == PADDING, 11)
    types = torch.zeros_like(IDS)
    if kind in ("bert", "albert"):  # whose positions do not follow from the padding token
        torch.testing.assert_close(
            model({"input_ids": other, "attention_mask": mask, "token_type_ids": types}), outputs
        )
    torch.testing.assert_close(model({"input_ids": IDS, "attention_mask": mask}), outputs)


def test_a_text_without_a_token_has_finite_outputs_and_gradients(tmp_path):
    model = TextEncoder(saved(tmp_path), CLASSES)
    outputs = model(torch.zeros(2, 5, dtype=torch.long))
    torch.testing.assert_close(outputs, model.head.bias.expand(2, CLASSES))
    assert all(g.isfinite().all() for g in torch.autograd.grad(outputs.sum(), list(model.head.parameters())))


def test_layers_and_head_are_blocks(tmp_path):
    model = RoutedModel(TextEncoder(saved(tmp_path), CLASSES))
    assert model.blocks == ["encoder.encoder.layer.0", "encoder.encoder.layer.1", "head"]
    assert model.features(IDS, dict(model.backbone.named_parameters())).shape == (3, 8)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_it_passes_the_checks_and_is_routed_by_features(tmp_path, kind):
    method = Flow().bind(TextEncoder(saved(tmp_path, kind)), Classification())
    example = IDS[:1]
    check_fit(method, example, CLASSES)
    assert isinstance(method.modules["router"], FeatureRouter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback of vmap
        check_draws(method, example)
        check_backbone(method, example, side_by_side=True)


def test_clients_side_by_side_have_no_fallback(tmp_path):
    model = TextEncoder(saved(tmp_path), CLASSES).eval()
    weights = {name: torch.stack([p.detach(), 1.1 * p.detach()]) for name, p in model.named_parameters()}
    x = torch.stack([IDS, IDS.flip(0)])
    with warnings.catch_warnings(), ClientLinears():
        warnings.simplefilter("error")
        found = vmap(lambda w, x: functional_call(model, w, (x,)))(weights, x)
    for client in range(2):
        one = {name: p[client] for name, p in weights.items()}
        torch.testing.assert_close(found[client], functional_call(model, one, (x[client],)))


@pytest.mark.slow
def test_clients_with_adapters_masks_and_dropout_train_as_each_alone(tmp_path):
    """Of the weights of attention too; a mask beside the ids, two copies of each layer, a router by features."""
    pytest.importorskip("peft", reason="peft is not installed")
    backbone = LoRA(TextEncoder(saved(tmp_path), CLASSES, dropout=0.2), dropout=0.1)
    method = Flow().bind(backbone, Classification())
    made = chunk((9, 6, 3))
    ids = torch.randint(1, 30, (3, 9, 5), generator=torch.Generator().manual_seed(0))
    x = {"input_ids": ids, "attention_mask": (torch.arange(5) < 3).long().expand_as(ids)}
    check_fit(method, {name: t[0, :1] for name, t in x.items()}, CLASSES)
    server = server_groups(method)
    together = loop().train_clients(method, server, replace(made, train=replace(made.train, x=x)))
    for i in range(3):
        one = select(made, [i])
        one = replace(one, train=replace(one.train, x={name: t[[i]] for name, t in x.items()}))
        alone = loop().train_clients(method, server, one)
        for group in ("global", "router"):
            found = {name: p[i : i + 1] for name, p in together.difference[group].items()}
            torch.testing.assert_close(flat(found), flat(alone.difference[group]), rtol=1e-4, atol=1e-6)


def test_settings_replace_those_of_the_encoder(tmp_path):
    folder = saved(tmp_path, weights=False)
    model = TextEncoder(folder, CLASSES, pretrained=False, padding=9, dropout=0.0)
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    torch.testing.assert_close(model(IDS[:1]), model(IDS[:1, :4]))  # it ends with the token 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no/such/folder"}, "model is no/such/folder, which cannot be loaded"),
        ({"model": "gpt2"}, "GPT2Model, expected an encoder that attends to the whole text"),
        ({"model": "bert", "padding": -1}, "padding is -1"),
        ({"model": "bert", "dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_what_is_no_encoder_is_refused(tmp_path, monkeypatch, settings, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if settings["model"] in ("gpt2", "bert"):
        settings["model"] = saved(tmp_path, settings["model"])
    with pytest.raises(ConfigurationError, match=message):
        TextEncoder(**settings)


@pytest.mark.slow
def test_a_real_encoder_reads_sentences_as_its_library_does():
    """Sentences that mean the same are nearer to each other than to a third; read without a network."""
    folder = minilm()
    sentences = ["how do i sort a list", "what is the way to order an array", "my cat sleeps all day"]
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    model = RoutedModel(TextEncoder(folder, CLASSES).eval())
    assert len(model.blocks) == 7
    with torch.no_grad():
        vectors = model.features(tokens["input_ids"], dict(model.backbone.named_parameters()))
    first, second, third = torch.nn.functional.normalize(vectors)
    assert first @ second > 0.5 > 0.2 > first @ third
