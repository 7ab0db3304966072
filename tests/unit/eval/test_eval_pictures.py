import io
import sys

import numpy as np
import pytest
from PIL import Image

from eval.pictures import expert_load_map, loss_curve, png, save_png, score_bars

VALUES = {"replay": {"complete": 0.8, "mixed": 0.6}, "plain": {"complete": 0.7}}


def test_bars_have_the_heights_of_the_values():
    figure = score_bars(VALUES, conditions=["complete", "mixed"], metric="accuracy")
    axes = figure.axes[0]
    assert sorted(bar.get_height() for bar in axes.patches) == pytest.approx([60, 70, 80])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["complete", "mixed"]
    assert axes.get_ylabel() == "accuracy (%)"


def test_chance_is_one_dashed_line_at_each_condition():
    figure = score_bars(
        VALUES, conditions=["complete", "mixed"], metric="accuracy", chance={"complete": 0.25}
    )
    axes = figure.axes[0]
    levels = [line.get_segments() for line in axes.collections if line.get_label() == "chance"]
    assert len(levels) == 1
    assert [segment[0][1] for segment in levels[0]] == pytest.approx([25])
    assert "chance" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_values_in_units_are_not_percentages():
    figure = score_bars(
        {"m": {"complete": 0.5}}, conditions=["complete"], metric="mae", percent=False
    )
    assert figure.axes[0].patches[0].get_height() == pytest.approx(0.5)
    assert figure.axes[0].get_ylabel() == "mae"


def test_loss_curve_uses_the_training_rows_only():
    rows = [{"step": 1, "loss": 2.0, "learning_rate": 0.1}, {"step": 1, "eval_loss": 9.0}]
    rows += [{"step": 2, "loss": 1.0, "learning_rate": 0.05}]
    loss, rate = loss_curve(rows).axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 2], [2, 1]]
    assert rate.lines[0].get_ydata().tolist() == [0.1, 0.05]


def test_load_map_shows_shares_of_each_layer():
    figure = expert_load_map({"image.0": [3, 1], "text.0": [1, 1, 2], "text.1": [0, 0, 0]})
    share_LE = figure.axes[0].images[0].get_array()
    assert share_LE[0, :2].tolist() == [0.75, 0.25]
    assert bool(share_LE.mask[0, 2]) or np.isnan(share_LE[0, 2])  # no such expert
    assert share_LE[1].tolist() == [0.25, 0.25, 0.5]
    assert share_LE[2].tolist() == [0, 0, 0]
    assert [text.get_text() for text in figure.axes[0].texts][:2] == ["75%", "25%"]


@pytest.mark.parametrize("name", ["plain", "$x", "a$b$", r"\frac{", "<script>"])
def test_any_name_can_be_drawn(name, tmp_path):
    figure = score_bars({name: {name: 0.5}}, conditions=[name], metric=name)
    save_png(figure, tmp_path / "bars.png")
    assert Image.open(tmp_path / "bars.png").format == "PNG"
    png(expert_load_map({name: [1, 2]}))


def test_no_global_state():
    image = Image.open(io.BytesIO(png(loss_curve([{"step": 1, "loss": 1.0}]))))
    assert image.size[0] > 500
    assert "matplotlib.pyplot" not in vars(sys.modules["eval.pictures"])
