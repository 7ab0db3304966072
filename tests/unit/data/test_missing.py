import pytest
import torch

from mm_moe.data.missing import MissingProtocol
from mm_moe.errors import ConfigError

IDS = [str(n) for n in range(4000)]
TWO = ("image", "text")


def protocol(**options):
    return MissingProtocol(dataset="d", split="train", **options)


def share_absent(setting, modalities=TWO):
    return (~setting.present(IDS, modalities)).float().mean(0).tolist()


@pytest.mark.parametrize(
    ("kind", "expected"), [("text", [0, 0.7]), ("image", [0.7, 0]), ("both", [0.35, 0.35])]
)
def test_ratio_is_the_share_of_samples_that_lack_something(kind, expected):
    setting = protocol(kind=kind, ratio=0.7)
    # standard error of a share of 4000: at most 0.008; four of them
    assert share_absent(setting) == pytest.approx(expected, abs=0.032)
    absent_B = (~setting.present(IDS, TWO)).any(-1)
    assert absent_B.float().mean().item() == pytest.approx(0.7, abs=0.032)


def test_both_ratio_is_the_share_that_lacks_the_image():
    assert share_absent(protocol(kind="both", ratio=0.8, both_ratio=0.25)) == pytest.approx(
        [0.2, 0.6], abs=0.032
    )


def test_three_modalities_share_the_loss():
    shares = share_absent(protocol(kind="any", ratio=0.9), ("audio", "image", "text"))
    assert shares == pytest.approx([0.3, 0.3, 0.3], abs=0.032)


def test_never_takes_everything_and_corners():
    assert protocol(kind="both", ratio=1.0).present(IDS, TWO).sum(-1).eq(1).all()
    assert protocol(kind="both", ratio=0.0).present(IDS, TWO).all()
    assert protocol(kind="none", ratio=0.7).present(IDS, TWO).all()
    assert protocol(kind="text", ratio=1.0).present([], TWO).shape == (0, 2)


@pytest.mark.parametrize("kind", ["text", "image", "both"])
def test_half_is_a_subset_of_seventy_percent(kind):
    half = ~protocol(kind=kind, ratio=0.5).present(IDS, TWO)
    more = ~protocol(kind=kind, ratio=0.7).present(IDS, TWO)
    assert half.any()
    assert (half & ~more).sum() == 0  # the same samples still lack the same modality


def test_order_and_company_do_not_matter():
    setting = protocol(kind="both", ratio=0.5)
    whole = setting.present(IDS, TWO)
    assert torch.equal(setting.present(IDS[::-1], TWO), whole.flip(0))
    assert torch.equal(setting.present(IDS[7:9], TWO), whole[7:9])
    swapped = setting.present(IDS, ("text", "image"))
    assert torch.equal(swapped, whole.flip(1))


def test_split_data_set_and_seed_each_give_another_table():
    settings = [
        MissingProtocol(dataset="d", split="train", kind="both", ratio=0.5),
        MissingProtocol(dataset="d", split="test", kind="both", ratio=0.5),
        MissingProtocol(dataset="e", split="train", kind="both", ratio=0.5),
        MissingProtocol(dataset="d", split="train", kind="both", ratio=0.5, seed=1),
    ]
    hashes = {setting.table_hash(IDS, TWO) for setting in settings}
    assert len(hashes) == 4
    assert settings[0].table_hash(IDS[::-1], TWO) == settings[0].table_hash(IDS, TWO)


def test_describe_says_both_readings():
    assert (
        protocol(kind="both", ratio=0.7).describe()
        == "70% = 70% of samples lack something: 35% no text, 35% no image"
    )
    assert (
        protocol(kind="text", ratio=0.5).describe()
        == "50% = 50% of samples lack something: 50% no text, 0% no image"
    )
    assert (
        protocol(kind="any", ratio=0.6).describe(("audio", "image", "text"))
        == "60% = 60% of samples lack something: 20% no text, 20% no image, 20% no audio"
    )
    assert protocol().describe() == "0% = every sample keeps all that it has"


def test_wrong_settings_say_what_is_allowed():
    with pytest.raises(ConfigError, match=r"ratio is 70; it is a share"):
        protocol(kind="text", ratio=70)
    with pytest.raises(ConfigError, match=r"'txt'; did you mean text"):
        protocol(kind="txt", ratio=0.5).present(IDS, TWO)
    with pytest.raises(ConfigError, match="at least two modalities"):
        protocol(kind="text", ratio=0.5).present(IDS, ("text",))


THREE = ("text", "audio", "vision")


def test_any_of_two_is_both():
    both, either = (protocol(kind=kind, ratio=0.7) for kind in ("both", "any"))
    assert both.table_hash(IDS, TWO) == either.table_hash(IDS, TWO)
    with pytest.raises(ConfigError, match=r"'both' is for two modalities, and 'd' has 3; take any"):
        protocol(kind="both", ratio=0.5).present(IDS, THREE)


def test_several_modalities_go_together():
    setting = protocol(kind="audio+vision", ratio=0.4)
    present = setting.present(IDS, THREE)
    assert torch.equal(present[:, 1], present[:, 2])
    assert present[:, 0].all()
    assert share_absent(setting, THREE) == pytest.approx([0, 0.4, 0.4], abs=0.032)
    words = "40% = 40% of samples lack something: 40% no vision, 0% no text, 40% no audio"
    assert setting.describe(THREE) == words
    for kind in ("audio+text+vision", "audio+audio", "audio+smell", "+"):
        with pytest.raises(ConfigError, match="unknown missing kind"):
            protocol(kind=kind, ratio=0.4).present(IDS, THREE)


def test_subset_draws_every_pattern_but_the_two_ends():
    setting = protocol(kind="subset", ratio=0.6)
    patterns = [tuple(row) for row in setting.present(IDS, THREE).tolist()]
    shares = {pattern: patterns.count(pattern) / len(IDS) for pattern in set(patterns)}
    assert shares.pop((True, True, True)) == pytest.approx(0.4, abs=0.032)
    assert len(shares) == 6
    assert list(shares.values()) == pytest.approx([0.1] * 6, abs=0.02)
    # each modality is in one set of one and two sets of two of six: half of 60%
    assert "30% no vision, 30% no text, 30% no audio" in setting.describe(THREE)


def test_nested_for_three_too():
    for kind in ("any", "subset"):
        half = ~protocol(kind=kind, ratio=0.5).present(IDS, THREE)
        more = ~protocol(kind=kind, ratio=0.7).present(IDS, THREE)
        assert (half & ~more).sum() == 0
