"""Data sources, columns, labels and splits: what is read, and what is refused with which words."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from zograph.cli.data import hash_of, labelled, load_tables, split_rows, unlabelled
from zograph.cli.inputs import InputError
from zograph.cli.tables import Row, Table, read_table

CSV = 'text,label\n"good, very",1\nbad,0\n"two\nlines",1\n'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(labels: list[object], source: str = "rows") -> Table:
    rows = [Row(f"{source}:{i}", {"text": f"t{i}", "label": v}) for i, v in enumerate(labels)]
    return Table(source, ("text", "label"), rows)


def dataset(labels: list[object], held_out: list[object], classes: list[str] | None = None):
    return labelled(table(labels), table(held_out, "eval"), "", None, None, classes=classes)


def refusal(message: str):
    return pytest.raises(InputError, match=re.escape(message))


def test_csv_knows_the_line_of_each_row(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", CSV + "last,0\n")
    rows = read_table(path).rows
    assert [r.values["text"] for r in rows] == ["good, very", "bad", "two\nlines", "last"]
    assert [r.where for r in rows] == [f"{path}:{n}" for n in (2, 3, 4, 6)]


def test_tsv_takes_quotes_literally(tmp_path: Path) -> None:
    path = write(tmp_path, "d.tsv", 'sentence\tlabel\nsay "so\t1\n')
    assert read_table(path).rows[0].values == {"sentence": 'say "so', "label": "1"}


def test_jsonl_collects_columns_and_passes_over_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", '{"text": "a"}\n\n{"text": "b", "label": 1}\n')
    data = read_table(path)
    assert data.columns == ("text", "label")
    assert data.rows[1].where == f"{path}:3"


def test_txt_is_one_text_a_line(tmp_path: Path) -> None:
    data = read_table(write(tmp_path, "d.txt", "one\ntwo\r\n"))
    assert [r.values["text"] for r in data.rows] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "d.csv",
            "text,label\na,1\nb\n",
            "d.csv:3: unreadable line: 1 fields, but the header has 2",
        ),
        ("d.csv", 'text,label\na,1\n"b,0\n', "d.csv:3: unreadable line: unexpected end of data"),
        ("d.csv", "text,text\na,1\n", "d.csv:1: a column name stands twice"),
        ("d.tsv", "text\tlabel\na\t1\t2\n", "d.tsv:2: unreadable line: 3 fields"),
        ("d.jsonl", '{"text": "a"}\n{"text": \n', "d.jsonl:2: unreadable line: Expecting value"),
        ("d.jsonl", "[1]\n", "d.jsonl:1: unreadable line: not a JSON object"),
        ("d.csv", b"text,label\na,1\n\xff\xfe,0\n", "d.csv:3: unreadable line: not UTF-8"),
        ("d.xlsx", "", "d.xlsx: unknown kind of file; use one of .csv, .tsv, .jsonl, .txt"),
    ],
)
def test_unreadable_files_are_named_with_their_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path, name, content)
    with refusal(message):
        read_table(path)


def test_missing_file(tmp_path: Path) -> None:
    with refusal("none.csv: cannot be read: No such file or directory"):
        load_tables(str(tmp_path / "none.csv"))


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    with refusal("d.csv: 0 rows; at least 2 are needed"):
        load_tables(str(write(tmp_path, "d.csv", content)))


def test_split_does_not_depend_on_the_order_of_rows() -> None:
    rows = table(list(range(50)))
    backwards = Table(rows.source, rows.columns, rows.rows[::-1])
    halves = [split_rows(t, 0.2, key=lambda r: r.values["text"]) for t in (rows, backwards)]
    one, two = ({r.where for r in held.rows} for _, held in halves)
    assert one == two
    assert len(one) == 10


def test_hash_is_stable() -> None:
    assert hash_of("zograph") == 0xFF45C881E27C767E


def test_vader_is_clear_balanced_and_split_by_family() -> None:
    train, held_out, how = load_tables("vader")
    assert "family" in how
    families = [{r.values["family"] for r in t.rows} for t in (train, held_out)]
    assert not families[0] & families[1]
    assert len(train.rows) + len(held_out.rows) == 5599
    assert all(abs(r.values["rating"]) >= 1 for r in train.rows)
    data = labelled(train, held_out, how, None, None)
    assert data.classes == ["negative", "positive"]
    counts = Counter(e.label for e in data.held_out)
    assert min(counts.values()) > 0.35 * len(data.held_out)


def test_labels_by_number_and_by_name() -> None:
    assert dataset([0, "1", 1.0, True], [1]).classes == ["0", "1"]
    data = dataset(["neg", "pos"], ["pos"])
    assert (data.classes, data.held_out[0].label) == (["neg", "pos"], 1)
    stars = dataset([1, 5], [4])
    assert (len(stars.classes), stars.held_out[0].label) == (6, 4)


def test_labels_of_a_model_with_classes() -> None:
    data = dataset(["pos", 0], [1], classes=["neg", "pos"])
    assert [e.label for e in data.train + data.held_out] == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "held_out", "classes", "message"),
    [
        ([1, 1], [1], None, "rows: every training row has the label '1'"),
        ([0, -1], [0], None, "rows:1: label -1 is out of range"),
        ([0, 5000], [0], None, "rows:1: label 5000 is out of range"),
        ([0, 1], [2], None, "eval:0: label '2' is out of range: the 2 classes are 0, 1"),
        ([0, 3], [0], ["a", "b"], "rows:1: label '3' is out of range: the 2 classes are a, b"),
        ([0, None], [0], None, "rows:1: column 'label' holds no label but None"),
        ([0, 0.5], [0], None, "rows:1: column 'label' holds no label but 0.5"),
        ([f"x{i}" for i in range(1001)], ["x1"], None, "1001 different values"),
    ],
)
def test_refused_labels(
    labels: list[object], held_out: list[object], classes: list[str] | None, message: str
) -> None:
    with refusal(message):
        dataset(labels, held_out, classes)


def test_missing_columns_list_those_there_are() -> None:
    both = table([0, 1]), table([0])
    with refusal("rows: no column 'words'; its columns: text, label"):
        labelled(*both, "", "words", None)
    with refusal("rows: no column 'kind'; its columns: text, label"):
        labelled(*both, "", None, "kind")
    bare = Table("bare", ("a", "b"), [Row("bare:1", {"a": "x", "b": 0})])
    with refusal("bare: name a column with --label-column; its columns: a, b"):
        labelled(bare, bare, "", "a", None)


def test_blank_texts() -> None:
    rows = [Row("r:1", {"text": " "}), Row("r:2", {"text": "word"})]
    blank = Table("r", ("text",), rows)
    assert [e.text for e in unlabelled(blank, blank, "", None).train] == ["word"]
    with refusal("r: column 'text' holds no text at all"):
        unlabelled(Table("r", ("text",), rows[:1]), blank, "", None)
    rows[0].values["label"] = rows[1].values["label"] = 0
    with refusal("r:1: column 'text' holds no text but ' '"):
        labelled(Table("r", ("text", "label"), rows), blank, "", None, None)


def test_saved_hugging_face_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(str(tmp_path / "d"))
    train, held_out, how = load_tables(str(tmp_path / "d"))
    data = labelled(train, held_out, how, None, None)
    assert (data.classes, data.split) == (["no", "yes"], "held out: the split 'validation'")


def test_folder_without_a_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "x.json").write_text(json.dumps({}))
    with refusal("not readable as a folder written by save_to_disk"):
        load_tables(str(tmp_path))
