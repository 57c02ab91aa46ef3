"""Measures of a run: which number of which file, and the errors of files that lack it."""

import json

import pytest

from icegrt.config import StudyMeasure
from icegrt.study.measures import MeasureError, read_curve, read_value


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


ROWS = [
    {"kind": "evaluation", "iteration": 0, "score": 1.0},
    {"kind": "ppo", "iteration": 1, "loss": 5.0},
    {"kind": "ppo", "iteration": 2, "loss": 4.0, "evaluation": {"score": 2.0}},
    {"kind": "ppo", "iteration": 3, "loss": 9.0, "evaluation": {"score": 7.0}},
    {"kind": "ppo", "iteration": 3, "loss": 3.0, "evaluation": {"score": 4.0}},
]


def test_a_curve_has_the_evaluation_before_training_and_the_last_row_of_each_iteration(tmp_path):
    write_rows(tmp_path, ROWS)
    assert read_curve(tmp_path, StudyMeasure(name="s", field="evaluation.score")) == [(0, 1), (2, 2), (3, 4)]
    assert read_curve(tmp_path, StudyMeasure(name="l", field="loss")) == [(1, 5), (2, 4), (3, 3)]


def test_the_value_is_the_final_one_or_the_mean_of_the_last(tmp_path):
    write_rows(tmp_path, ROWS)
    assert read_value(tmp_path, StudyMeasure(name="s", field="evaluation.score")) == 4
    assert read_value(tmp_path, StudyMeasure(name="s", field="evaluation.score", last=2)) == 3


def test_a_line_that_was_cut_off_is_ignored_at_the_end_only(tmp_path):
    write_rows(tmp_path, ROWS[:3])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 9, "los')
    measure = StudyMeasure(name="l", field="loss")
    assert read_value(tmp_path, measure) == 4
    path.write_text('{"iteration": 9, "los\n' + json.dumps(ROWS[1]))
    with pytest.raises(MeasureError, match="line 1: not JSON"):
        read_value(tmp_path, measure)


def test_a_number_of_a_json_file_may_be_nested_or_have_dots(tmp_path):
    (tmp_path / "report.json").write_text('{"ppo": {"after": 0.5, "a.b": 2}}')
    for field, value in (("ppo.after", 0.5), ("ppo.a.b", 2)):
        assert read_value(tmp_path, StudyMeasure(name="r", file="report.json", field=field)) == value


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("metrics.jsonl", None, "cannot be read"),
        ("metrics.jsonl", '{"iteration": 1}\n', "no row has the field x.y"),
        ("metrics.jsonl", '{"x": {"y": "NaN"}}\n', "x.y is nan, not a finite number"),
        ("metrics.jsonl", '{"x": {"y": true}}\n', "x.y is True, not a finite number"),
        ("metrics.jsonl", '{"x": {"y": 1}}\n', "1 rows have x.y, the mean is over 3"),
        ("metrics.jsonl", "3\n", "line 1: not a JSON object"),
        ("report.json", "{}", "no field x.y"),
        ("report.json", "{", "not JSON"),
    ],
)
def test_a_missing_measure_is_an_error_that_names_file_and_field(tmp_path, file, text, words):
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(MeasureError) as error:
        read_value(tmp_path, StudyMeasure(name="m", file=file, field="x.y", last=3))
    assert str(tmp_path / file) in str(error.value) and words in str(error.value)
