from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrlhf.data.formats import Completion, Pair, Prompt, Ranked, Stepwise, read_pairs
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import Encoded, contents, encode_rows

PROMPT = Encoded([8, 9], (), Prompt("", {"answer": 3, "id": None}, "x:1"))
COMPLETION = Encoded([8], ([9, 0],), Completion("", "", {"score": 1.0, "label": True}, "x:1"))
PAIR = Encoded([8], ([9], [10, 0]), Pair("", "", "", 0.5, {}, "x:1"))
RANKED = Encoded([8], ([9], [10, 0]), Ranked("", ("", ""), (1, 2), (True, True), {}, "x:1"))
STEPS = Encoded([8], ([9, 0],), Stepwise("", "", " ", (1.0, 0.5), {}, "x:1"), ends=(0, 1))


def said(row, **changes):
    return replace(row, source=replace(row.source, **changes))


@pytest.mark.parametrize(
    ("row", "other"),
    [
        (PROMPT, replace(PROMPT, prompt=[8, 10])),
        (PROMPT, said(PROMPT, columns={"answer": 4})),
        (COMPLETION, replace(COMPLETION, prompt=[8, 9], answers=([0],))),
        (COMPLETION, replace(COMPLETION, spans=((0, 1),))),
        (COMPLETION, said(COMPLETION, columns={"score": 0.0, "label": True})),
        (COMPLETION, said(COMPLETION, columns={"score": 1.0, "label": False})),
        (PAIR, replace(PAIR, answers=([9, 10], [0]))),
        (PAIR, replace(PAIR, answers=PAIR.answers[::-1])),
        (PAIR, said(PAIR, margin=0.0)),
        (RANKED, said(RANKED, ranks=(2, 1))),
        (STEPS, said(STEPS, labels=(0.0, 0.5))),
        (STEPS, replace(STEPS, ends=(1,))),
    ],
)
def test_contents_of_another_row_differ(row, other):
    assert contents([row]) != contents([other])
    assert contents([row, other]) != contents([other, row])


@pytest.mark.parametrize("row", [PROMPT, COMPLETION, PAIR, RANKED, STEPS])
def test_contents_leave_out_what_is_not_learnt_from(row):
    assert contents([row]) == contents([said(row, where="y:2")])
    if row is not PROMPT:
        assert contents([row]) == contents([said(row, columns={**row.source.columns, "id": 1})])


def test_contents_do_not_depend_on_the_format(tokenizer, jsonl, tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0}
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist([row]), path)
    first, second = (
        encode_rows(read_pairs(read_rows(file), tokenizer), tokenizer, 16, 9).items
        for file in (path, jsonl(row))
    )
    assert contents(first) == contents(second)
