import torch

from retina.interop.foreign import rename, tower_rules


def test_the_first_rule_that_fits_gives_the_name() -> None:
    state = {name: torch.tensor(float(i)) for i, name in enumerate(["a.1.w", "b.w", "c.w", "xa.1.w", "d"])}
    renamed = rename(
        state, [(r"a\.(\d)\.w", lambda m: f"ours.{int(m[1]) + 1}"), (r"[ab]\..*", "b")], [("c.*", "no use")]
    )
    assert {key: float(value) for key, value in renamed.state.items()} == {"ours.2": 0.0, "b": 1.0}
    assert renamed.names == {"ours.2": "a.1.w", "b": "b.w"}
    assert renamed.unused == {"c.w": "no use"}
    assert renamed.unknown == ["xa.1.w", "d"]


def test_no_tensor_takes_the_place_of_another() -> None:
    renamed = rename({"a1": torch.zeros(1), "a2": torch.ones(1)}, [(r"a\d", "a")])
    assert renamed.state["a"].item() == 0.0
    assert renamed.unknown == ["a2"]


def test_towers_count_convolutions_or_norms_too() -> None:
    state = {
        f"t.{i}.{part}.{kind}": torch.zeros(1) for i in (0, 1) for part in ("conv", "gn") for kind in ("weight", "bias")
    }
    with_norm = rename(state, tower_rules("t", "box", conv=r"\.conv", norm=r"\.gn", has_norm=True))
    assert sorted(with_norm.state) == [
        f"head.box.convs.{i}.{kind}" for i in (0, 1, 3, 4) for kind in ("bias", "weight")
    ]
    without = rename(
        {k: v for k, v in state.items() if "gn" not in k},
        tower_rules("t", "box", conv=r"\.conv", norm=r"\.gn", has_norm=False),
    )
    assert sorted(without.state) == [f"head.box.convs.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
