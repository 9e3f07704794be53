import dataclasses
from pathlib import Path

import pytest

from fastssl.config import (
    PretrainConfig,
    field_help,
    from_dict,
    load_config,
    method_arguments,
    read_yaml,
    type_name,
)

yaml = pytest.importorskip("yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "config: unknown setting 'epoch'. Did you mean 'epochs'?"),
        ({"accumulate": 4}, "config: unknown setting 'accumulate'. Summed losses of small batches"),
        ({"epochs": "three"}, "config: epochs must be a whole number or none, got 'three'."),
        ({"epochs": 2.5}, "epochs must be a whole number or none, got 2.5 (float)."),
        ({"epochs": True}, "epochs must be a whole number or none, got True (bool)."),
        ({"lr": [1]}, "lr must be a number or none, got [1] (list)."),
        ({"seed": None}, "seed must be a whole number, got None (NoneType)."),
        ({"resume": "yes"}, "resume must be true or false, got 'yes'."),
        ({"data": 3}, "data must be text or a list, got 3 (int)."),
        (
            {"optimizer": "adamv"},
            "must be adamw, adam, sgd, lars, lamb, lion, adamw8bit, adam8bit, sgd8bit, lars8bit, "
            "lamb8bit, lion8bit or none, got 'adamv'. Did you mean",
        ),
        (
            {"precision": "bf61"},
            "must be auto, fp32, bf16 or fp16, got 'bf61'. Did you mean 'bf16'?",
        ),
        ({"method": "simcrl"}, "got 'simcrl'. Did you mean 'simclr'?"),
        ({"method_args": 3}, "method_args must be a mapping, got 3 (int)."),
        ({"method_args": {"temp": 1}}, "unknown setting 'temp'. Did you mean 'temperature'?"),
        ({"method_args": {"temperature": "hot"}}, "temperature must be a number, got 'hot'."),
        ({"method_args": {"backbone": "x"}}, "method_args: unknown setting 'backbone'."),
        ({"lr": -1}, "lr must be a finite number >= 0, got -1.0."),
        ({"lr": "nan"}, "lr must be a finite number >= 0, got nan."),
        ({"lr": "inf"}, "lr must be a finite number >= 0, got inf."),
        ({"epochs": 0}, "epochs must be a finite number >= 1, got 0."),
        ({"batch_size": 1}, "batch_size must be a finite number >= 2, got 1."),
        ({"freeze": 3}, "freeze must be a list or none, got 3 (int)."),
        ({"max_grad_norm": -1}, "max_grad_norm must be a finite number >= 0, got -1.0."),
        ([1, 2], "config: must be a mapping of settings, got [1, 2]."),
    ],
)
def test_errors_name_the_setting_the_rule_and_the_value(values, message):
    with pytest.raises(ValueError) as caught:
        from_dict(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_python_construction_is_checked_too():
    with pytest.raises(ValueError, match="epochs must be a whole number"):
        PretrainConfig(epochs="many")
    with pytest.raises(ValueError, match="unknown setting 'temprature'"):
        dataclasses.replace(PretrainConfig(), method_args={"temprature": 1})
    assert PretrainConfig(out=Path("a") / "b").out == str(Path("a", "b"))


def test_text_is_read_as_the_type_asked_for():
    config = from_dict(
        {
            "epochs": "3",
            "lr": "3e-3",
            "weight_decay": 0,
            "image_size": "none",
            "resume": "true",
            "data": "123",
            "freeze": "backbone.conv*, backbone.bn.*",
            "method_args": {"temperature": "0.5", "hidden_dim": "none", "out_dim": "64"},
        }
    )
    assert (config.epochs, config.lr, config.image_size) == (3, 0.003, None)
    assert (config.resume, config.data) == (True, "123")
    assert isinstance(config.weight_decay, float)
    assert config.freeze == ["backbone.conv*", "backbone.bn.*"]
    assert config.method_args == {"temperature": 0.5, "hidden_dim": None, "out_dim": 64}


def test_yaml_round_trip(tmp_path):
    config = PretrainConfig(lr=1e-3, method_args={"temperature": 0.5}, backbone="vit_small")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    assert load_config(path) == config


def test_yaml_numbers_without_a_point(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 3e-3\n")  # text to YAML 1.1
    assert read_yaml(path) == {"lr": "3e-3"}
    assert load_config(path).lr == 0.003


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [1", "must be YAML, got while parsing"),
        ("- 1\n- 2\n", "must hold lines of `name: value`, got [1, 2]."),
        ("", "must hold lines of `name: value`, got None."),
        ("epoch: 3\n", "settings.yaml: unknown setting 'epoch'. Did you mean 'epochs'?"),
    ],
)
def test_file_errors_name_the_file(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert message in str(caught.value) and "settings.yaml" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*nix.yaml: No such file"):
        load_config(tmp_path / "nix.yaml")


def test_every_field_has_help_from_the_source():
    text = field_help()
    assert set(text) == {field.name for field in dataclasses.fields(PretrainConfig)}
    assert text["lr"].startswith("Peak learning rate")
    assert [name for name, help_text in text.items() if not help_text] == ["method"]


def test_method_arguments_are_those_of_the_class():
    arguments = method_arguments("simclr")
    assert arguments["temperature"] is float
    assert type_name(arguments["hidden_dim"]) == "a whole number or none"
    assert "backbone" not in arguments
