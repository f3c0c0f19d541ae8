"""What a merge configuration's parameters may be: every problem, word for word."""

from __future__ import annotations

from inspect import signature

import pytest
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import ParameterScope
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

from fusechat_merge import sce, varm
from fusechat_merge.mergekit_bridge.parameters import SPECS, parameter_problems


def problems(text: str, method: str = "varm", base: str | None = "base") -> list[str]:
    settings = {"merge_method": method, "base_model": base, **yaml.safe_load(text)}
    return parameter_problems(MergeConfiguration.model_validate(settings))


def of_all(parameters: str, method: str = "varm") -> list[str]:
    return problems(f"{{models: [{{model: a}}], parameters: {{{parameters}}}}}", method)


@pytest.mark.parametrize(
    "parameters",
    [
        "",
        "granularity: layer, statistic: absolute, lambda: 0.5, weight: 2",
        "lambda: [0, 0.5, 1.0]",
        "lambda: -1",
        "lambda: 1e-3",  # YAML 1.1 reads a string; mergekit takes it as a number
        "granularity: [{filter: mlp, value: module}, {filter: norm, value: element}, {value: layer}]",
        "granularity: {filter: mlp, value: module}",
        "granularity: [matrix, module]",
        "weight: [{filter: self_attn, value: [0.0, 1.0]}, {value: 1.0}]",
        "weight: 0",
        "lambda: []",
    ],
)
def test_accepted(parameters):
    assert of_all(parameters) == []


@pytest.mark.parametrize("parameters", ["select_topk: 0.1", "select_topk: 0, variant: fork"])
def test_accepted_by_sce(parameters):
    assert of_all(parameters, "fusechat_sce") == []


def test_the_python_functions_have_the_declared_defaults():
    """`varm` and `sce` take the same parameters in Python, `lambda` as `lambda_`."""
    for spec, function in ((SPECS["varm"], varm), (SPECS["fusechat_sce"], sce)):
        taken = signature(function).parameters
        for parameter in spec.parameters:
            if parameter.scope is ParameterScope.SHARED:
                name = {"lambda": "lambda_"}.get(parameter.name, parameter.name)
                assert taken[name].default == parameter.default, parameter.name


VARM_TAKES = "it takes granularity, statistic, lambda, weight"
SCE_TAKES = "it takes select_topk, variant"
GRANULARITIES = "use one of matrix, module, layer, model, element"
REFUSED = {
    "varm": {
        "granularty: module": "varm has no parameter 'granularty' (did you mean 'granularity'?);"
        f" {VARM_TAKES}",
        "int8_mask: true": f"varm has no parameter 'int8_mask'; {VARM_TAKES}",
        "granularity: modul": f"'modul' is unknown (did you mean 'module'?); {GRANULARITIES}",
        "granularity: 3": f"3 is unknown; {GRANULARITIES}",
        "granularity: [{filter: mlp, value: blok}, {value: layer}]": "'blok' is unknown;"
        f" {GRANULARITIES}",
        "statistic: squared": "'squared' is unknown (did you mean 'square'?); use one of square,"
        " absolute",
        "lambda: .nan": "nan is not a finite number",
        "lambda: [1, .inf]": "inf is not a finite number",
        "lambda: much": "'much' is not a finite number",
        "lambda: true": "True is not a finite number",
        "weight: -0.5": "-0.5 is below 0",
        "weight: '-1e-3'": "'-1e-3' is below 0",
        "weight: [{filter: mlp, value: [1, -2]}, {value: 1}]": "-2 is below 0",
        "weight: {filter: mlp, value: -2}": "-2 is below 0",
    },
    "fusechat_sce": {
        "select_topk: 1.5": "1.5 is above 1",
        "select_topk: -0.1": "-0.1 is below 0",
        "select_topk: .nan": "nan is not a finite number",
        "select_topk: false": "False is not a finite number",
        "select_topk: 10%": "'10%' is not a finite number",
        "variant: forks": "'forks' is unknown (did you mean 'fork'?); use one of paper, fork",
        "weight: 1": f"fusechat_sce has no parameter 'weight'; {SCE_TAKES}",
        "topk: 1": "fusechat_sce has no parameter 'topk' (did you mean 'select_topk'?);"
        f" {SCE_TAKES}",
    },
}
"""What is said of parameters, after the parameter's name."""


@pytest.mark.parametrize(
    ("method", "parameters"), [(method, text) for method in REFUSED for text in REFUSED[method]]
)
def test_refused(method, parameters):
    name, _, _ = parameters.partition(":")
    assert of_all(parameters, method) == [f"parameters.{name}: {REFUSED[method][parameters]}"]


GIVE = "'weight' has no meaning under the base model: give it to the targets"
MOVE = "'lambda' has no meaning under the base model: move it to parameters"
FOR_ALL = "counts for all models: move it from the model to parameters"
WEIGTH = f"varm has no parameter 'weigth' (did you mean 'weight'?); {VARM_TAKES}"


def test_a_key_where_mergekit_ignores_it():
    assert problems(
        """
        models:
          - {model: base, parameters: {weight: 1, lambda: 2, weigth: 1}}
          - {model: a, parameters: {granularity: module, weight: 2}}
          - {model: b, parameters: {weigth: 2}}
        """
    ) == [
        f"models[0].parameters.weight: {GIVE}",
        f"models[0].parameters.lambda: {MOVE}",
        f"models[0].parameters.weigth: {WEIGTH}",
        f"models[1].parameters.granularity: 'granularity' {FOR_ALL}",
        f"models[2].parameters.weigth: {WEIGTH}",
    ]


def test_slices():
    text = """
        slices:
          - sources:
              - {model: base, layer_range: [0, 1], parameters: {weight: 1}}
              - {model: a, layer_range: [0, 1], parameters: {lambda: 1}}
            parameters: {lambda: much, granularity: layer}
          - base_model: a
            sources:
              - {model: base, layer_range: [1, 2], parameters: {weight: -1}}
              - {model: a, layer_range: [1, 2], parameters: {weight: 1}}
    """
    assert problems(text) == [
        "slices[0].parameters.lambda: 'much' is not a finite number",
        f"slices[0].sources[0].parameters.weight: {GIVE}",
        f"slices[0].sources[1].parameters.lambda: 'lambda' {FOR_ALL}",
        "slices[1].sources[0].parameters.weight: -1 is below 0",
        f"slices[1].sources[1].parameters.weight: {GIVE}",
    ]


def test_modules():
    text = """
        parameters: {lambda: x}
        modules:
          text_decoder:
            parameters: {statistics: square}
            models:
              - {model: base}
              - {model: a, parameters: {statistic: square}}
          vision_tower:
            slices:
              - sources: [{model: base, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]
                parameters: {weight: [1, x]}
    """
    assert problems(text) == [
        "parameters.lambda: 'x' is not a finite number",
        "modules.text_decoder.parameters.statistics: varm has no parameter 'statistics' (did you"
        f" mean 'statistic'?); {VARM_TAKES}",
        f"modules.text_decoder.models[1].parameters.statistic: 'statistic' {FOR_ALL}",
        "modules.vision_tower.slices[0].parameters.weight: 'x' is not a finite number",
    ]


SLICE = "{base_model: base, sources: [{model: base, layer_range: [0, 1]}]}"
BASELESS = "{sources: [{model: base, layer_range: [0, 1]}]}"
MISSING = ["base_model is missing: varm needs the pivot"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: [{model: a}]", MISSING),
        (f"slices: [{SLICE}, {BASELESS}]", MISSING),
        (f"slices: [{SLICE}, {SLICE}]", []),
        (f"modules: {{default: {{slices: [{SLICE}]}}}}", []),
        (f"modules: {{default: {{slices: [{SLICE}, {BASELESS}]}}}}", MISSING),
        (f"modules: {{a: {{slices: [{SLICE}]}}, b: {{models: [{{model: a}}]}}}}", MISSING),
    ],
)
def test_the_base(text, expected):
    assert problems(text, base=None) == expected


def test_other_methods_are_none_of_our_business():
    text = "{models: [{model: a, parameters: {foo: 1}}], parameters: {weight: -1}}"
    assert problems(text, "task_arithmetic", base=None) == []


def test_mergekit_pytorchs_configuration():
    def raw(**settings):
        return parameter_problems(
            RawPyTorchMergeConfig.model_validate({"merge_method": "varm", **settings})
        )

    base = {"model": "base.safetensors", "parameters": {"weight": 1}}
    target = {"model": "a.safetensors", "parameters": {"lambda": 1}}
    assert raw(models=[base, target], base_model="base.safetensors", parameters={"x": 1}) == [
        f"parameters.x: varm has no parameter 'x'; {VARM_TAKES}",
        f"models[0].parameters.weight: {GIVE}",
        f"models[1].parameters.lambda: 'lambda' {FOR_ALL}",
    ]
    assert raw(models=[{"model": "a.safetensors"}]) == MISSING
