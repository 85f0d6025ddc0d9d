"""The language models read over time, never across the batch, and never ahead."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from workloads import GPT, WordTransformer

from geomprobe.errors import UsageError

TOKENS, TIME, BATCH = 11, 6, 3


def transformer() -> nn.Module:
    return WordTransformer(TOKENS, features=8, heads=2, hidden=16, layers=2)


def gpt() -> nn.Module:
    return GPT(TOKENS, features=8, heads=2, layers=2, context=TIME)


@pytest.fixture(params=[transformer, gpt])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = request.param()
    for parameter in made.parameters():  # initial values near 0 would hide what depends on what
        nn.init.normal_(parameter, 0, 0.5)
    return made


@pytest.fixture
def words() -> Tensor:
    return torch.randint(TOKENS, (TIME, BATCH), generator=torch.Generator().manual_seed(1))


def changed(words: Tensor, time: int | slice, entry: int | slice) -> Tensor:
    other = words.clone()
    other[time, entry] = (other[time, entry] + 1) % TOKENS
    return other


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("time", range(1, TIME))
def test_the_future_does_not_change_the_past(model: nn.Module, words: Tensor, time: int, training: bool) -> None:
    model.train(training)
    before, after = model(words), model(changed(words, slice(time, None), slice(None)))
    assert torch.equal(before[:time], after[:time])


def test_the_past_changes_the_future(model: nn.Module, words: Tensor) -> None:
    before, after = model(words), model(changed(words, 0, 1))
    assert ((before - after)[:, 1].abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("training", [True, False])
def test_another_batch_entry_changes_nothing(model: nn.Module, words: Tensor, training: bool) -> None:
    model.train(training)
    before, after = model(words), model(changed(words, slice(None), 1))
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_a_word_is_told_apart_by_its_place(model: nn.Module) -> None:
    logits = model(torch.zeros(TIME, 1, dtype=torch.long))
    assert len(logits.squeeze(1).unique(dim=0)) == TIME


def test_gradients_reach_every_parameter(model: nn.Module, words: Tensor) -> None:
    model(words).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_transformer_agrees_with_attention_written_out() -> None:
    torch.manual_seed(0)
    model = WordTransformer(TOKENS, features=4, heads=1, hidden=8, layers=1).double()
    words = torch.randint(TOKENS, (TIME,))
    x = model.embedding.weight[words] * 2 + torch.tensor(
        [[math.sin(t), math.cos(t), math.sin(t / 100), math.cos(t / 100)] for t in range(TIME)]
    )
    layer = model.encoder.layers[0]
    query, key, value = (x @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).split(4, dim=1)
    rows = []
    for t in range(TIME):
        weight = ((key[: t + 1] @ query[t]) / 2).exp()
        rows.append(weight @ value[: t + 1] / weight.sum())
    x = layer.norm1(x + layer.self_attn.out_proj(torch.stack(rows)))
    x = layer.norm2(x + layer.linear2(layer.linear1(x).clamp(min=0)))
    torch.testing.assert_close(model(words[:, None])[:, 0], model.decoder(x), rtol=1e-6, atol=1e-7)


def test_wikitext_2s_transformer_has_the_count_of_its_parts() -> None:
    features, tokens, layers = 128, 33_278, 12
    attention = 4 * (features**2 + features)
    perceptron = 2 * (features**2 + features)
    norms = 4 * features
    expected = 2 * tokens * features + tokens + layers * (attention + perceptron + norms)
    with torch.device("meta"):
        assert sum(p.numel() for p in WordTransformer(tokens).parameters()) == expected == 9_747_454


@pytest.mark.parametrize("kind", [WordTransformer, GPT])
def test_features_that_do_not_fit_the_heads_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(UsageError, match="multiple of 4 heads"):
        kind(TOKENS, features=6, heads=4)
