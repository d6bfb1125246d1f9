"""The lines of `items.jsonl` and `users.jsonl`, and raw ids."""

from fractions import Fraction

import numpy as np
import pytest

from modeling_cllm4rec.records_cllm4rec import LINES_AT_ONCE, plain_id, read_records, write_records


def test_lines_that_are_parsed_together_give_what_each_gives_alone(tmp_path):
    lines = [{"id": number, "title": f"{number}, [{number}] \u2028 \\n"} for number in range(2 * LINES_AT_ONCE + 1)]
    write_records(tmp_path / "items.jsonl", lines)
    assert list(read_records(tmp_path / "items.jsonl")) == lines


@pytest.mark.parametrize("line", ["", "[]", '"id"', '{"title": "id"}', '{"id": 1}, {"id": 2}', '{"id": 1', "null"])
def test_a_wrong_line_is_named_wherever_it_stands(tmp_path, line):
    good = [f'{{"id": {number}}}' for number in range(LINES_AT_ONCE + 1)]
    (tmp_path / "items.jsonl").write_text("\n".join([*good, line, *good]))
    with pytest.raises(ValueError, match=rf"items\.jsonl, line {LINES_AT_ONCE + 2}: not a JSON object with an \"id\""):
        list(read_records(tmp_path / "items.jsonl"))


def test_records_that_cannot_be_written_leave_the_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "users.jsonl"
    write_records(path, [{"id": "ann"}])
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_records(path, [{"id": "bob"}, {"id": object()}])
    assert [file.name for file in tmp_path.iterdir()] == ["users.jsonl"]
    assert path.read_text() == '{"id": "ann"}\n'


@pytest.mark.parametrize(
    ("raw", "plain"),
    [(np.int64(3), 3), (np.float64(2.5), 2.5), (Fraction(1, 2), 0.5), ("a", "a"), (Fraction(4, 2), 2.0), (3, 3)],
)
def test_ids_are_kept_as_json_carries_them(raw, plain):
    found = plain_id(raw)
    assert (found, type(found)) == (plain, type(plain))
