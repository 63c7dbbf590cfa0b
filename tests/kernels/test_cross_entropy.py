"""Cross-entropy: torch's numbers and derivatives, for few and for many classes, alone and side by side."""

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F

from flow_pl.kernels.cross_entropy import REGISTER, cross_entropy, log_softmax

C = 4
SHAPES = [(REGISTER - 1,), (7, 2), (7, REGISTER - 1), (7, REGISTER), (7, 100), (3, 5, REGISTER - 1), (0, 2)]


def theirs(scores, target):
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]), target.reshape(-1), reduction="none").view(
        target.shape
    )


def drawn(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(shape, generator=generator, dtype=dtype)
    return scores.requires_grad_(), torch.randint(shape[-1], shape[:-1], generator=generator)


def derivatives(fn, scores, target):
    """Losses, gradient of a sum with weights, and gradient of a penalty on that."""
    losses = fn(scores, target)
    weights = torch.randn(losses.shape, generator=torch.Generator().manual_seed(1), dtype=losses.dtype)
    (first,) = torch.autograd.grad((losses * weights).sum(), scores, create_graph=True)
    (second,) = torch.autograd.grad((first**3).sum(), scores)
    (plain,) = torch.autograd.grad((fn(scores, target) * weights).sum(), scores)
    return losses, first, second, plain


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_derivatives_of_both_orders_are_torchs(shape):
    torch.testing.assert_close(derivatives(cross_entropy, *drawn(shape)), derivatives(theirs, *drawn(shape)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, 0)], ids=str)
def test_side_by_side(shape, dims):
    if dims[0] == 1 and len(shape) < 2:
        pytest.skip("an axis that it does not have")
    scores, target = drawn((C, *shape))
    scores = scores.detach() if dims[0] is not None else scores.detach()[0]
    scores = (scores.transpose(0, 1) if dims[0] == 1 else scores).contiguous().requires_grad_()
    target = target if dims[1] is not None else target[0]
    ours = derivatives(vmap(cross_entropy, dims), scores, target)
    torch.testing.assert_close(ours, derivatives(vmap(theirs, dims), scores, target))


def test_functional_gradients_side_by_side():
    scores, target = drawn((C, 7, 5))
    ours = vmap(grad(lambda s, y: cross_entropy(s, y).sum()))(scores.detach(), target)
    torch.testing.assert_close(ours, vmap(grad(lambda s, y: theirs(s, y).sum()))(scores.detach(), target))


def test_a_client_has_the_same_loss_in_any_company():
    scores, target = drawn((C, 20, 10), torch.float32)
    together = vmap(cross_entropy)(scores, target)
    torch.testing.assert_close(together[:1], cross_entropy(scores[0], target[0])[None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [2, REGISTER - 1, REGISTER, 100])
def test_log_softmax_is_torchs(classes):
    scores = drawn((C, 7, classes), torch.float32)[0]
    torch.testing.assert_close(log_softmax(scores), scores.log_softmax(-1))


def test_scores_far_apart_give_finite_losses_and_gradients():
    scores = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    losses = cross_entropy(scores, torch.tensor([1]))
    assert losses.item() == 2e4
    (found,) = torch.autograd.grad(losses.sum(), scores)
    assert found.tolist() == [[1.0, -1.0, 0.0]]


def test_a_mapped_pull_back_without_a_graph():
    scores, target = drawn((7, 5))
    losses, pull = torch.func.vjp(lambda s: cross_entropy(s, target), scores)
    with torch.no_grad():
        (found,) = vmap(pull)(torch.eye(7, dtype=losses.dtype))
    torch.testing.assert_close(found, torch.func.jacrev(lambda s: theirs(s, target))(scores))
