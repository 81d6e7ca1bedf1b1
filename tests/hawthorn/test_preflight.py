"""Settings that cannot work are refused before anything starts; those that look odd are said."""

import pytest

from hawthorn.preflight import preflight
from tasks.errors import ConfigError, HawthornError

ONE = {"malicious_clients": "1"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rule": "krum(num_byzantine=50)"}, "cannot aggregate 6 replies a round: .*krum"),
        ({"rule": "trimmed_mean(num_byzantine=2)", "clients_per_round": 3}, "cannot aggregate 3 replies"),
        ({"rule": "krum(num_byzantine=0.7)"}, "krum|num_byzantine"),
        ({"rule": "norm_clipping(max_norm=-1.0)"}, "max_norm"),
        ({"training": "sgd(lr=-1.0)"}, "lr"),
        ({"training": "sgd(batch_size=0)"}, "batch_size"),
        ({"attack": "patch_backdoor(target=77, grid=(1, 1))", **ONE}, "target 77 is no class; classes are 0 to 9"),
        ({"attack": "patch_backdoor(size=(1, 4))", **ONE}, "does not fit in a 8x8 image"),
        ({"attack": "label_flip(source=11, target=1)", **ONE}, "11 is no class"),
        ({"attack": "train_with(lr=-2.0)", **ONE}, "lr"),
        ({"from_model": "/nowhere/model.safetensors"}, "cannot read model"),
    ],
)
def test_impossible_settings(config, changes, says):
    with pytest.raises(HawthornError, match=says):
        preflight(config.replace(**changes))


def test_a_reversed_range_is_not_nobody(config):
    with pytest.raises(ConfigError, match="smaller id first"):
        config.replace(malicious_clients="5-3", attack="sign_flip()")


def test_odd_settings_are_said(config):
    late = config.replace(attack="sign_flip()", attack_schedule="single_shot(rounds=(9,))", **ONE)
    assert "no attack falls into rounds 1 to 3" in preflight(late)[0]
    assert preflight(config.replace(attack="sign_flip()", **ONE)) == []
    assert preflight(config) == []
