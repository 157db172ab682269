"""Corpora of every kind that is read, as real files, and what is said of damaged ones."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from transformers import PreTrainedTokenizerFast

from polyprag import Document
from polyprag.corpus import Chunker, content_id, infer_format, read_corpus
from polyprag.corpus.chunks import count_words
from polyprag.corpus.summary import Summary
from polyprag.errors import CorpusError, InvalidInput


def rows(path: Path | str, **options: Any) -> list[tuple[Any, Any, Any, Any]]:
    with read_corpus(path, **options) as reader:
        return [(d.id, d.title, d.text, d.metadata) for d in reader]


def complaint(path: Path | str, **options: Any) -> str:
    with pytest.raises(CorpusError) as caught, read_corpus(path, **options) as reader:
        list(reader)
    return str(caught.value)


def pdf(path: Path, *pages: str, title: str | None = None, password: str | None = None) -> Path:
    """A PDF with a page for each text, its lines under each other."""
    writer = PdfWriter()
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    for text in pages:
        page = writer.add_blank_page(612, 792)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): writer._add_object(font)})}
        )
        content = DecodedStreamObject()
        lines = "".join(f"({line}) Tj 0 -14 Td " for line in text.split("\n"))
        content.set_data(f"BT /F1 12 Tf 72 720 Td {lines} ET".encode("latin-1"))
        page[NameObject("/Contents")] = writer._add_object(content)
    if title is not None:
        writer.add_metadata({"/Title": title})
    if password is not None:
        writer.encrypt(password, algorithm="RC4-128")
    with path.open("wb") as stream:
        writer.write(stream)
    return path


# --- tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_csv_with_quotes_and_line_breaks(tmp_path: Path, packed: bool) -> None:
    data = b'\xef\xbb\xbfid,title,text,lang\r\na,Tern,"A ""tern"",\r\n\r\nso called.",en\r\nb,,Skua,\r\n'
    path = tmp_path / ("c.csv.gz" if packed else "c.csv")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert rows(path) == [
        ("a", "Tern", 'A "tern",\r\n\r\nso called.', {"lang": "en"}),
        ("b", None, "Skua", {"lang": ""}),
    ]


@pytest.mark.parametrize(
    ("data", "line", "problem"),
    [
        (b'id,text\na,"x\ny"\nb,x,y\n', 4, "3 columns, but the header has 2"),
        (b"id;text\na;x\n", 2, "the header is one column, 'id;text', and seems to part cells by semicolons"),
        (b"id;text\na;x, y\n", 2, "2 columns, but the header has 1; the header is one column, 'id;text'"),
        (b'id,text\na,"x\n', 2, "no valid CSV"),
        (b'id,text\na,"x"y\n', 2, "no valid CSV"),
        (b"id,text\na,\xff\n", 2, "no valid UTF-8"),
        (b"id,id\n", 1, "names 'id' twice"),
        (b'id,text\na,"x\ny"\na,z\n', 4, "already that of line 2"),
    ],
)
def test_bad_csv_is_named(tmp_path: Path, data: bytes, line: int, problem: str) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(data)
    message = complaint(path)
    assert message.startswith(f"{path}, line {line}: ")
    assert problem in message


def test_a_csv_cell_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("id,text\na," + "x" * 500_000 + "\n")
    assert len(rows(path)[0][2]) == 500_000


def test_the_passages_of_dpr(tmp_path: Path) -> None:
    path = tmp_path / "psgs_w100.tsv"
    path.write_text('id\ttext\ttitle\n1\t"Aaron is ""a"" prophet"\tAaron\n2\t"the ""x"""\t"The ""Y"""\n')
    assert infer_format(path) == "dpr"
    assert rows(path) == [(1, "Aaron", 'Aaron is "a" prophet', None), (2, 'The "Y"', 'the "x"', None)]
    path.write_text("id\ttext\ttitle\nx1\ta\tb\n")
    assert "line 2: the id 'x1' is no whole number" in complaint(path)


def test_a_folder_of_beir(tmp_path: Path) -> None:
    lines = [
        {"_id": "4983", "title": "Microstructure", "text": "Alterations of it.", "metadata": {}},
        {"_id": "5", "title": "Only a title", "text": ""},
        {"_id": "6", "title": "", "text": ""},
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert infer_format(tmp_path) == "folder"
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "0-dimensional?"}\n')
    assert infer_format(tmp_path) == "beir"
    with read_corpus(tmp_path) as reader:
        found = [(d.id, d.title, d.text) for d in reader]
        assert reader.left_out.empty == 1
    assert found == [
        ("4983", "Microstructure", "Alterations of it."),
        ("5", "Only a title", "Only a title"),
    ]
    assert "line 2: the text in 'text' is empty" in complaint(tmp_path, on_empty="error")
    assert [row[0] for row in rows(tmp_path, on_empty="skip")] == ["4983"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    day = dt.date(1815, 12, 10)
    table = pa.table(
        {
            "id": [7, 8],
            "title": ["Ada", None],
            "text": ["Born in London.", "Another."],
            "day": [day, None],
            "score": [1.5, float("nan")],
            "tags": [["a", "b"], []],
        }
    )
    pq.write_table(table, path, row_group_size=1)
    assert rows(path) == [
        (7, "Ada", "Born in London.", {"day": "1815-12-10", "score": 1.5, "tags": ["a", "b"]}),
        (8, None, "Another.", {"day": None, "score": None, "tags": []}),
    ]
    assert rows(path, metadata=False)[0] == (7, "Ada", "Born in London.", None)


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["x", "y"], "image": [None, b"\0"]}), path)
    assert complaint(path).startswith(f"{path}, row 2: the field 'image' holds bytes")
    assert [row[0] for row in rows(path, metadata=False)] == ["a", "b"], "bytes that nobody keeps do no harm"
    pq.write_table(pa.table({"id": ["a", "a"], "text": ["x", "y"]}), path)
    assert complaint(path).startswith(f"{path}, row 2: the id 'a' is already that of row 1")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert complaint(path).startswith(f"{path}, row 1: no valid Parquet")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 3_000_000], pa.date32()),  # the year 10,000 and on
        pa.array([1, 10**18], pa.timestamp("us")),
        pa.array([b"a", b"\xff"]).cast(pa.string(), safe=False),
    ],
    ids=["date", "timestamp", "text"],
)
def test_a_cell_of_parquet_that_python_has_no_form_for_is_named(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": ["x", "y"], "odd": column}), path)
    said = complaint(path)
    assert said.startswith(f"{path}, row 2: the field 'odd', of type {column.type}, cannot be read")


def test_two_columns_of_parquet_with_one_name(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table([["x"], ["a"], ["b"]], names=["text", "by", "by"]), path)
    assert complaint(path) == f"{path}: two columns are named 'by'; give each column its own name"


def test_a_data_set_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"id": ["a", "b"], "text": ["x", "y"], "n": [1, 2]})
    data.save_to_disk(tmp_path / "one")
    assert infer_format(tmp_path / "one") == "datasets"
    assert rows(tmp_path / "one") == [("a", None, "x", {"n": 1}), ("b", None, "y", {"n": 2})]
    late = pa.table({"text": ["x"], "day": pa.array([3_000_000], pa.date32())})
    datasets.Dataset(late).save_to_disk(tmp_path / "late")
    assert complaint(tmp_path / "late").startswith(f"{tmp_path / 'late'}, row 1: the row cannot be read")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "two")
    assert [row[0] for row in rows(tmp_path / "two", split="test")] == ["b"]
    for options in ({}, {"split": "dev"}):
        with pytest.raises(InvalidInput, match="train, test"):
            rows(tmp_path / "two", **options)
    assert f"{tmp_path / 'two'} (train), row 1: the field 'body' is missing" in complaint(
        tmp_path / "two", split="train", text_field="body"
    )
    with pytest.raises(InvalidInput, match="splits"):
        read_corpus(tmp_path / "c.jsonl", split="train")


def test_a_data_set_of_the_hub_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, subset: str | None, **options: Any) -> Any:
        asked.append((name, subset, options))
        if name == "no/such":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
        return {"train": iter([{"id": "a", "text": "x"}])}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows("hf://datasets/owner/name", subset="en") == [("a", None, "x", None)]
    assert asked == [("owner/name", "en", {"streaming": True})]
    assert "hf://datasets/no/such: no data set can be read there" in complaint("hf://datasets/no/such")


# --- texts ------------------------------------------------------------------------------------------


def test_a_comment_in_code_is_no_heading(tmp_path: Path) -> None:
    path = tmp_path / "guide.md"
    for fence, end in (("```", "```"), ("~~~~sh", "~~~\n# not yet\n~~~~~"), ("  ```` sh", "````")):
        path.write_text(f"{fence}\n# install it\n{end}\n\n# The guide\n")
        assert rows(path)[0][1] == "The guide"
    path.write_text("```not a fence``` at all\n\n# The guide\n")
    assert rows(path)[0][1] == "The guide"
    path.write_text("```\n# never closed\n")
    assert rows(path)[0][1] == "guide"


def test_a_file_whose_name_is_no_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"))
    try:
        Path(odd).write_text("A text.")
    except OSError:
        pytest.skip("the file system takes no such name")
    said = f"{tmp_path / 'caf'}\\udce9.txt: the name of the file, by which its text is called, is no UTF-8"
    assert complaint(tmp_path).startswith(said)
    assert complaint(odd).startswith(said)


def test_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("hidden")
    (tmp_path / "z.txt").write_text("Last.")
    (tmp_path / "b" / "guide.md").write_text("---\ntitle: 'The guide'\ntags: [a]\n---\n# Heading\n\nBody.\n")
    (tmp_path / "b" / "other.markdown").write_text("Intro.\n\n# First heading #\n\n## Second\n")
    (tmp_path / "a.jsonl").write_text('{"id": "row", "text": "A row."}\n')
    (tmp_path / "logo.png").write_bytes(b"\x89PNG")
    (tmp_path / "Makefile").write_text("x")
    with read_corpus(tmp_path) as reader:
        found = {d.id: (d.title, d.text, d.metadata) for d in reader}
        assert reader.left_out.files == {".png": 1, "no suffix": 1}
    assert list(found) == ["row", "z.txt", "b/guide.md", "b/other.markdown"]
    assert found["b/guide.md"] == ("The guide", "# Heading\n\nBody.\n", {"source": "b/guide.md"})
    assert found["b/other.markdown"][0] == "First heading"
    assert found["z.txt"] == ("z", "Last.", {"source": "z.txt"})
    (tmp_path / "z.txt").write_bytes(b"one\ntwo \xff\n")
    assert complaint(tmp_path).startswith(f"{tmp_path / 'z.txt'}, line 2: no valid UTF-8")
    (tmp_path / "z.txt").write_text(" \n")
    assert complaint(tmp_path).startswith(f"{tmp_path / 'z.txt'}: the text in 'text' is empty")


def test_duplicates_across_files_name_both(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"id": "x", "text": "same"}\n')
    message = complaint(tmp_path)
    assert message.startswith(f"{tmp_path / 'b.jsonl'}, line 1: ")
    assert f"already that of {tmp_path / 'a.jsonl'}, line 1" in message
    assert len(rows(tmp_path, on_duplicate="skip")) == 1


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "no document in the folder" in complaint(tmp_path)


def test_pdf_gives_a_document_a_page(tmp_path: Path) -> None:
    path = pdf(tmp_path / "report.pdf", "The mill stands in\nOst, and exam-\nples follow.", "", "Third page.")
    assert rows(path) == [
        (
            "report.pdf#page=1",
            "report",
            "The mill stands in Ost, and examples follow.",
            {"page": 1, "source": "report.pdf"},
        ),
        ("report.pdf#page=3", "report", "Third page.", {"page": 3, "source": "report.pdf"}),
    ]
    assert rows(pdf(tmp_path / "t.pdf", "x", title="A title"))[0][1] == "A title"


def test_pdf_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert complaint(pdf(tmp_path / "scan.pdf", "", "")).startswith(
        f"{tmp_path / 'scan.pdf'}: no page has text"
    )
    locked = pdf(tmp_path / "locked.pdf", "secret", password="x")
    assert complaint(locked).startswith(f"{locked}: the file is encrypted")
    whole = pdf(tmp_path / "whole.pdf", "text").read_bytes()
    damaged = tmp_path / "damaged.pdf"
    for cut in (0, 20, len(whole) // 2):
        damaged.write_bytes(whole[:cut])
        assert complaint(damaged).startswith(str(damaged))


# --- pieces -----------------------------------------------------------------------------------------

_SENTENCES = "The mill is old. It stands in Ost! Who owns it? Nobody knows today."


def test_pieces_are_whole_sentences(tmp_path: Path) -> None:
    path = tmp_path / "mill.txt"
    path.write_text(_SENTENCES)
    found = rows(path, chunker=Chunker(8))
    assert [row[2] for row in found] == [
        "The mill is old. It stands in Ost!",
        "Who owns it? Nobody knows today.",
    ]
    assert [row[0] for row in found] == ["mill.txt#chunk=1", "mill.txt#chunk=2"]
    assert [row[3] for row in found] == [
        {"source": "mill.txt", "chunk": 1, "start": 0},
        {"source": "mill.txt", "chunk": 2, "start": 35},
    ]
    overlapping = [row[2] for row in rows(path, chunker=Chunker(8, overlap=4))]
    assert overlapping[1].startswith("It stands in Ost!")
    assert rows(path, chunker=Chunker(100)) == [("mill.txt", "mill", _SENTENCES, {"source": "mill.txt"})]


def test_pages_and_rows_are_split_too(tmp_path: Path) -> None:
    ids = [row[0] for row in rows(pdf(tmp_path / "r.pdf", "One two. Three four."), chunker=Chunker(2))]
    assert ids == ["r.pdf#page=1&chunk=1", "r.pdf#page=1&chunk=2"]
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": 1, "text": "One two. Three four."}\n{"id": 2, "text": "One"}\n')
    assert [row[0] for row in rows(path, chunker=Chunker(2))] == ["1#chunk=1", "1#chunk=2", "2"]
    assert [row[0] for row in rows(path, chunker=Chunker(2), chunk_tables=False)] == [1, 2]


def test_a_field_where_pieces_keep_their_place_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "One.", "start": "1998"}\n{"text": "One two. Three four.", "start": "1999"}\n')
    said = complaint(path, chunker=Chunker(2))
    assert said.startswith(f"{path}, line 2: the field 'start' is where each piece of a text keeps")
    assert "--no-metadata" in said
    assert len(rows(path, chunker=Chunker(2), metadata=False)) == 3
    assert [row[3] for row in rows(path)] == [{"start": "1998"}, {"start": "1999"}]


@pytest.mark.parametrize("field", ["id", "title", "text", "by"])
def test_half_of_a_surrogate_pair_in_memory(field: str) -> None:
    given = [{"id": "a", "text": "x"}, {"id": "b", "text": "y", field: "z\ud800"}]
    with pytest.raises(CorpusError, match=r"rows in memory, row 2: .*surrogate.*; change the row"):
        list(read_corpus(given))


def test_markdown_is_split_at_its_headings(tmp_path: Path) -> None:
    path = tmp_path / "g.md"
    path.write_text("# One\n\nFirst part here.\n\n# Two\n\nSecond part here.\n")
    assert [row[2] for row in rows(path, chunker=Chunker(5))] == [
        "# One\n\nFirst part here.",
        "# Two\n\nSecond part here.",
    ]


_LONG = "The oil comes from Ost. It is kept in the red shed. The keeper writes down how much."


@pytest.mark.parametrize("heading", ["## Oil", "# Stores\n\n## Oil", "Oil\n==="])
def test_a_heading_stays_with_the_block_that_is_too_long_for_one_piece(heading: str) -> None:
    text = f"# Lamp\n\nIt is lit at six.\n\n{heading}\n\n{_LONG}\n\nAnother paragraph."
    for overlap in (0, 3):
        pieces = Chunker(15, overlap=overlap).split(text, markdown=True)
        found = [piece for _, piece in pieces]
        assert found[:2] == [
            "# Lamp\n\nIt is lit at six.",
            f"{heading}\n\nThe oil comes from Ost. It is kept in the red shed.",
        ]
        assert found[-1].endswith("Another paragraph.")
        assert all(text[start : start + len(piece)] == piece for start, piece in pieces)
    # Where not a word of the block has room beside it, and where nothing follows, there it stays alone.
    pieces = Chunker(1).split(f"# Oil\n\n{_LONG}\n\n# End", markdown=True)
    assert [pieces[0][1], pieces[-1][1]] == ["# Oil", "# End"]


_MARKDOWN = st.sampled_from(
    ["# A\n", "## B b\n\n", "C\n==\n", "a b. ", "c d e! ", "\n", "\n\n", "- f\n", "  "]
)


@settings(max_examples=50)
@given(parts=st.lists(_MARKDOWN, min_size=1, max_size=40), size=st.integers(1, 12))
def test_pieces_of_markdown_hold_the_whole_text_and_are_small_enough(parts: list[str], size: int) -> None:
    text = "".join(parts)
    for measure, count in (("words", count_words), ("characters", len)):
        pieces = Chunker(size, measure=measure).split(text, markdown=True)
        assert "".join("".join(piece.split()) for _, piece in pieces) == "".join(text.split())
        for start, piece in pieces:
            assert text[start : start + len(piece)] == piece
            assert count(piece) <= size


@settings(max_examples=25)
@given(text=st.text(st.sampled_from("ab .!?\n日"), min_size=1, max_size=200), size=st.integers(1, 12))
def test_pieces_hold_the_whole_text_and_are_small_enough(text: str, size: int) -> None:
    for measure, count in (("words", count_words), ("characters", len)):
        pieces = Chunker(size, measure=measure).split(text)
        assert "".join("".join(piece.split()) for _, piece in pieces) == "".join(text.split())
        for start, piece in pieces:
            assert text[start : start + len(piece)] == piece
            assert count(piece) <= max(size, 1)


def test_pieces_by_the_tokens_of_a_model(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer("x" * 50, truncation=True, max_length=4)  # leaves a limit behind in the tokenizer
    for measure in (tokenizer, tokenizer.backend_tokenizer, len):
        pieces = [piece for _, piece in Chunker(20, measure=measure).split(_SENTENCES)]
        assert pieces[0] == "The mill is old."
        assert all(len(piece) <= 20 for piece in pieces), "one token a character"


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 5, "overlap": 5}, {"size": 5, "measure": "bytes"}])
def test_wrong_pieces(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Chunker(**options)


# --- the summary ------------------------------------------------------------------------------------


def test_summary() -> None:
    documents = [Document(f"d{n}", "word " * n, "T" if n > 1 else None, {"n": n}) for n in (1, 2, 3, 40)]
    found = Summary.of(documents, first=2)
    assert found.to_json() == {
        "documents": 4,
        "with_title": 3,
        "text_bytes": 230,
        "unit": "words",
        "total": 46,
        "lengths": {"shortest": 1, "p10": 1, "median": 2, "p90": 40, "longest": 40},
        "metadata_fields": {"n": 4},
    }
    assert found.first == documents[:2]
    bars = found.histogram()
    assert (bars[0], bars[-1][1], sum(count for _, _, count in bars)) == ((1, 5, 3), 40, 4)
    assert Summary.of([]).quantiles() == {}
    assert content_id(None, "x") != content_id("x", "")


def test_the_real_corpus_in_other_forms(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    with read_corpus(real_data("corpus/wiki_passages_00.jsonl.gz"), id_field="pid") as reader:
        some = [next(reader) for _ in range(300)]
    table = {"id": [d.id for d in some], "title": [d.title for d in some], "text": [d.text for d in some]}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    expected = [(d.id, d.title, d.text, None) for d in some]
    assert rows(tmp_path / "c.parquet") == expected
    words = [count_words(d.text or "") for d in read_corpus(tmp_path / "c.parquet", chunker=Chunker(40))]
    assert max(words) <= 40
    assert sum(words) == sum(count_words(d.text or "") for d in some)
