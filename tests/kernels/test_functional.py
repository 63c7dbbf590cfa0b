"""How modules are called."""

from torch import nn

from flow_pl.kernels.functional import differentiable


def test_recurrent_layers_without_dropout_keep_what_a_gradient_needs():
    """cuDNN's do in training mode only; dropout stays off."""
    plain, dropping = nn.LSTM(2, 3), nn.LSTM(2, 3, num_layers=2, dropout=0.5)
    net = nn.Sequential(plain, dropping, nn.Dropout(0.5)).eval()
    with differentiable([net]):
        assert [part.training for part in net.modules()] == [False, True, False, False]
    assert not any(part.training for part in net.modules())
