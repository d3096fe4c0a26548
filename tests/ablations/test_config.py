"""What a file of ablations becomes, and every file that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from palf_dist.ablations.config import BASE, Ablations, designs_of, load_ablations
from palf_dist.config import RunConfig
from palf_dist.config_loading import load_config
from palf_dist.errors import ConfigError
from palf_dist.policies import policy_spec
from palf_dist.tasks.suites import load_suite, suite_overrides
from tests.distributed.small import small_config

CONFIGS = Path(__file__).parents[2] / "configs"


def ablations(*variants: dict[str, object], leave_out: tuple[str, ...] = ()) -> Ablations:
    named = [{"name": f"v{index}", "group": "g", "set": changes} for index, changes in enumerate(variants)]
    return Ablations.model_validate({"leave_out": leave_out, "variants": named})


def refused(made: Ablations, base: RunConfig | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        designs_of(made, {"": base or small_config()})
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "groups"),
    [
        ("ablations", [], {"basis losses": 4, "state features": 18, "loss hyper-parameters": 7, "outer loss": 9}),
        ("ablations-palf", ["policy.kind=palf"], {"basis losses": 5, "state features": 6, "frequency": 3}),
    ],
)
def test_the_files_that_come_along_fit_the_published_configuration(name, overrides, groups):
    suite = load_suite("palf12")
    bases = {
        f"fold-{fold}": load_config(CONFIGS / "palf12.yaml", [*suite_overrides(suite, str(fold)), *overrides])
        for fold in (0, 1)
    }
    designs = designs_of(load_ablations(CONFIGS / f"{name}.yaml"), bases)
    assert designs[0].name == BASE and designs[0].configs["fold-1"].data == bases["fold-1"].data
    assert len({design.name for design in designs}) == len(designs)
    counts = {group: sum(design.group == group for design in designs) for group in groups}
    assert counts == groups
    for design in designs:
        for fold, config in design.configs.items():
            assert config.evaluation.methods == ("policy", "ce") and config.data == bases[fold].data
            assert config.inner == bases[fold].inner and config.distributed == bases[fold].distributed
        one, other = (config.model_copy(update={"data": bases["fold-0"].data}) for config in design.configs.values())
        assert one == other and design.words


def test_each_entry_of_a_list_is_left_out_in_turn():
    designs = designs_of(ablations(leave_out=("basis", "features", "hyperparameters")), {"": small_config()})
    base = policy_spec(small_config().policy)
    found = {design.name: policy_spec(design.configs[""].policy) for design in designs[1:]}
    assert set(found) == {f"no-{name}" for name in (*base.basis, *base.features, *base.hyperparameters)}
    assert found["no-ce"].basis == ("robust_ce",) and found["no-ce"].features == base.features
    assert found["no-noise_rate"].features == tuple(name for name in base.features if name != "noise_rate")
    assert found["no-la"].hyperparameters == ("e", "ew", "wd")
    one = small_config(policy={"basis": ["robust_ce"]})
    assert len(designs_of(ablations(leave_out=("basis",)), {"": one})) == 1, "there has to be a loss"


def test_wrong_variants_are_one_message_with_a_line_for_each():
    made = ablations(
        {"policy.refrsh": 3},
        {"inner.steps": 6, "policy.refresh": 3},
        {"policy.refresh": 4},
        {"policy.kind": "robust"},
        {"estimator.window": 99},
        {"seed": 1},
    )
    lines = refused(made).splitlines()
    assert lines[0].startswith("v0: --set: policy.refrsh: unknown key; did you mean policy.refresh?")
    assert lines[1].startswith("v1: a variant may change seed, policy, estimator")
    assert lines[2] == "v1: inner.steps: 12 in the base, 6 here"
    assert lines[3:5] == [f"v{i}: is the configuration of base; leave one of them out" for i in (2, 3)]
    assert lines[5].startswith("v4: --set: estimator.window: must be at most inner.steps") and len(lines) == 6


@pytest.mark.parametrize(
    ("field", "value"),
    [("data.max_rows", 99), ("evaluation.seeds", 3), ("tasks.test_size", 30), ("tasks.noise.high", 0.5)],
)
def test_what_all_share_is_not_for_a_variant(field, value):
    assert f"v0: {field}: " in refused(ablations({field: value}))


def test_a_dataset_is_judged_by_one_fold():
    folds = {"fold-0": small_config(), "fold-1": small_config()}
    with pytest.raises(ConfigError, match="--fold: digits, iris is held out in more than one"):
        designs_of(ablations({"seed": 1}), folds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "variants: there are none; name some, or lists to leave_out"),
        ("leave_out: [bases]", "leave_out.0: must be 'basis', 'features' or 'hyperparameters'"),
        ("variants: [{name: a, group: b}]", "variants.0.set: is required"),
        ("variants: [{name: a, group: b, set: {}}]", "variants.0.set: Dictionary should have at least 1 item"),
        ("variants: [{name: ../a, group: b, set: {seed: 1}}]", "variants.0.name: String should match pattern"),
        ("variants: [{name: base, group: b, set: {seed: 1}}]", "variants.0.name: base is what tables call something"),
        ("variants: [{name: focal, group: b, set: {seed: 1}}]", "variants.0.name: focal is what tables call something"),
        (
            "variants: [{name: a, group: b, set: {seed: 1}}, {name: a, group: b, set: {seed: 2}}]",
            "variants.1.name: a is there more than once",
        ),
        *(
            (f"variants: [{{name: {name}, group: b, set: {{seed: 1}}}}]", f"variants.0.name: {name} may be a file of")
            for name in ("ablations.md", "ablations.json", "ablations_tasks.png", "own.json")
        ),
        *(
            (f"variants: [{{name: a, group: b, set: {{policy.hidden: {value}}}}}]", message)
            for value, message in (
                ("!!binary aGVsbG8=", "variants.0.set: a: policy.hidden is a bytes, which no configuration holds"),
                ("!!set {x: null}", "variants.0.set: a: policy.hidden is a set, which"),
                ("!!timestamp 2020-01-01", "variants.0.set: a: policy.hidden is a date, which"),
                ("[1, !!binary aGVsbG8=]", "variants.0.set: a: policy.hidden is a list, which"),
            )
        ),
    ],
)
def test_a_file_that_is_wrong_names_the_field(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_ablations(tmp_path / "a.yaml")
    assert message in str(caught.value)


def test_a_generated_name_that_a_variant_has_too_is_told():
    made = Ablations.model_validate(
        {"leave_out": ["hyperparameters"], "variants": [{"name": "no-wd", "group": "g", "set": {"seed": 5}}]}
    )
    assert refused(made) == "no-wd: is the name of more than one; name each another way"


def test_a_policy_that_adapts_has_no_features_to_leave_out():
    base = small_config(policy={"kind": "maml"})
    assert refused(ablations(leave_out=("features",)), base).startswith("leave_out: a maml policy reads its own")
    assert len(designs_of(ablations(leave_out=("basis",)), {"": base})) == 3


@pytest.mark.parametrize("pool", [8, 9])
def test_a_pool_as_large_as_the_run_is_the_base(pool):
    """Four outer steps of two groups; the first seven of them are fewer."""
    assert refused(ablations({"tasks.pool": pool})) == "v0: is the configuration of base; leave one of them out"
    assert len(designs_of(ablations({"tasks.pool": 7}), {"": small_config()})) == 2
    pooled = small_config(tasks={"pool": 7})
    assert len(designs_of(ablations({"tasks.pool": None}), {"": pooled})) == 2
